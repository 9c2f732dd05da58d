"""Weights to PyTorch and back: the same logits, the same bits, and nothing run."""

import functools
import json
import pathlib
import pickle
from importlib import util

import helpers
import jax
import numpy as np
import pytest

from samrobust.experiments import configuration, robustbench
from samrobust.experiments.networks import load_network, save_variables
from samrobust.models import PreActResNet
from samrobust.models.torch import (
    Weights,
    from_tensors,
    infer_architecture,
    read_weights,
    to_tensors,
    write_pytorch,
)

torch = pytest.importorskip("torch")
safetensors_torch = pytest.importorskip("safetensors.torch")
twin = pytest.importorskip("torch_twin")

MEAN, STD = (0.49, 0.48, 0.45), (0.25, 0.24, 0.26)
NETWORKS = {
    "two blocks a stage": {"width": 4, "blocks": (2, 2), "num_classes": 10},
    "uneven": {"width": 4, "blocks": (1, 3), "num_classes": 3},
}


def make_ours(fields, seed=0):
    """Our network with random variables: statistics, scales and biases too."""
    model = PreActResNet(mean=MEAN, std=STD, **fields)
    return model, helpers.draw_variables(model, (8, 8, 3), seed)


def make_images(seed=1):
    return np.random.default_rng(seed).uniform(size=(5, 8, 8, 3)).astype(np.float32)


def as_torch_images(images):
    """Normalised outside, as the reference does."""
    mean, std = (np.asarray(values, np.float32) for values in (MEAN, STD))
    normalized = (images - mean) / std
    return torch.from_numpy(np.array(normalized.transpose(0, 3, 1, 2)))


def make_theirs(fields, seed=0):
    """The reference's network, with statistics of some training passes."""
    torch.manual_seed(seed)
    network = twin.TwinResNet(**fields)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if "bn" in name:
                parameter.uniform_(0.3, 1.3)
        for shift in range(3):
            network(as_torch_images(make_images(shift)))
    return network.eval()


@functools.cache
def make_predict(model):
    return jax.jit(lambda variables, x: model.apply(variables, x, train=False))


def logits_of(model, variables, images):
    return np.asarray(make_predict(model)(variables, images))


@pytest.mark.parametrize("fields", NETWORKS.values(), ids=NETWORKS)
def test_an_exported_network_has_the_same_logits_in_pytorch(fields, tmp_path):
    model, variables = make_ours(fields)
    path = tmp_path / "weights.pth"
    write_pytorch(path, Weights(to_tensors(variables, model), {}))
    network = twin.TwinResNet(**fields)
    network.load_state_dict(torch.load(path, weights_only=True), strict=True)
    images = make_images()
    with torch.no_grad():
        logits = network.eval()(as_torch_images(images)).numpy()
    assert np.ptp(logits) > 0.1
    np.testing.assert_allclose(logits_of(model, variables, images), logits, atol=1e-5)


@pytest.mark.parametrize("fields", NETWORKS.values(), ids=NETWORKS)
def test_an_imported_state_dict_has_the_same_logits_here(fields, tmp_path):
    network = make_theirs(fields)
    path = tmp_path / "weights.pth"
    torch.save(network.state_dict(), path)
    tensors = read_weights(path).tensors
    assert infer_architecture(tensors) == fields
    model = PreActResNet(mean=MEAN, std=STD, **fields)
    variables = from_tensors(tensors, model, (32, 32, 3))
    images = make_images()
    with torch.no_grad():
        logits = network(as_torch_images(images)).numpy()
    assert np.ptp(logits) > 0.1
    np.testing.assert_allclose(logits_of(model, variables, images), logits, atol=1e-5)


def test_a_pytorch_file_there_and_back_is_the_same_to_the_bit(tmp_path):
    fields = NETWORKS["two blocks a stage"]
    model, variables = make_ours(fields)
    path = tmp_path / "weights.pth"
    metadata = {"mean": list(MEAN), "std": list(STD), **fields, "blocks": [2, 2]}
    write_pytorch(path, Weights(to_tensors(variables, model), metadata))
    weights = read_weights(path)
    helpers.assert_same_bits(
        from_tensors(weights.tensors, model, (32, 32, 3)), variables
    )
    assert weights.metadata == metadata
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        "weights.json",
        "weights.pth",
    ]


def test_the_counters_of_batches_are_int64_scalars():
    model, variables = make_ours(NETWORKS["uneven"])
    tensors = to_tensors(variables, model)
    counters = [n for n in tensors if n.endswith("num_batches_tracked")]
    theirs = twin.TwinResNet(**NETWORKS["uneven"]).state_dict()
    assert tensors.keys() == theirs.keys()
    assert len(counters) == 9
    assert all(tensors[n].shape == () for n in counters)
    assert all(tensors[n].dtype == np.int64 for n in counters)


@pytest.mark.parametrize("entry", ["state_dict", "model_state_dict", "net", "model"])
def test_a_checkpoint_of_a_parallel_run_is_understood(entry, tmp_path):
    network = make_theirs(NETWORKS["uneven"])
    state = {f"module.{n}": t for n, t in network.state_dict().items()}
    path = tmp_path / "checkpoint.pth.tar"
    torch.save({"epoch": 3, entry: state, "acc": 0.5}, path)
    assert read_weights(path).tensors.keys() == network.state_dict().keys()


class Normalised(torch.nn.Module):
    """As robust networks are often saved: pixels are normalized before the network."""

    def __init__(self, network):
        super().__init__()
        for name, values in (("mean", MEAN), ("std", STD)):
            self.register_buffer(name, torch.tensor(values)[None, :, None, None])
        self.network = network

    def forward(self, images):
        return self.network((images - self.mean) / self.std)


def wrap(state, network_prefix, mean, std):
    """A state dict as of `Normalised`, by other names."""
    named = {f"{network_prefix}{n}": t for n, t in state.items()}
    values = {mean: torch.tensor(MEAN), std: torch.tensor(STD).view(3, 1, 1)}
    return values | named


WRAPPINGS = {
    "buffers beside": ("network.", "mean", "std"),
    "a layer beside": ("model.", "normalize.mean", "normalize.std"),
    "a sequence": ("1.", "0.mu", "0.sigma"),
    "in parallel": ("module.model.", "module.normalize.mean", "module.normalize.std"),
    "buffers of the network": ("", "mu", "std"),
}


@pytest.mark.parametrize("names", WRAPPINGS.values(), ids=WRAPPINGS)
@pytest.mark.parametrize("entry", [None, "state_dict"])
def test_a_normalization_before_the_network_becomes_its_mean_and_std(
    names, entry, tmp_path
):
    network = make_theirs(NETWORKS["uneven"])
    state = wrap(network.state_dict(), *names)
    path = tmp_path / "weights.pth"
    torch.save({entry: state, "epoch": 3} if entry else state, path)
    weights = read_weights(path)
    assert weights.tensors.keys() == network.state_dict().keys()
    assert weights.metadata.keys() == {"mean", "std"}
    mean, std = weights.metadata["mean"], weights.metadata["std"]
    helpers.assert_same_bits(
        np.asarray([mean, std], np.float32), np.asarray([MEAN, STD], np.float32)
    )
    assert type(mean[0]) is float


def test_the_tensors_of_a_normalized_network_have_the_wrapped_names():
    """So that the wrappings above are not of our invention alone."""
    network = make_theirs(NETWORKS["uneven"])
    theirs = Normalised(network).state_dict().keys()
    ours = wrap(network.state_dict(), *WRAPPINGS["buffers beside"]).keys()
    assert set(theirs) == set(ours)


@pytest.mark.parametrize("extra", ["mean", "normalize.std", "input.mu"])
def test_half_a_normalization_is_left_to_be_refused(extra, tmp_path):
    state = make_theirs(NETWORKS["uneven"]).state_dict()
    path = tmp_path / "weights.pth"
    torch.save({**state, extra: torch.tensor(MEAN)}, path)
    weights = read_weights(path)
    assert (set(weights.tensors) - set(state), weights.metadata) == ({extra}, {})
    model = PreActResNet(mean=MEAN, std=STD, **NETWORKS["uneven"])
    with pytest.raises(ValueError, match="a superfluous " + extra):
        from_tensors(weights.tensors, model, (32, 32, 3))


def test_a_normalization_that_the_metadata_deny_is_refused(tmp_path):
    state = wrap(make_theirs(NETWORKS["uneven"]).state_dict(), "1.", "0.mean", "0.std")
    path = tmp_path / "weights.pth"
    told = {"mean": list(MEAN), "std": [0.25, 0.24, 0.2]}
    write_pytorch(path, Weights({n: t.numpy() for n, t in state.items()}, told))
    with pytest.raises(ValueError, match=r"Expected std=\[0\.25, .* as in the tensors"):
        read_weights(path)


class Malicious:
    """Touches a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return pathlib.Path.touch, (self.path,)


@pytest.mark.parametrize("as_zip", [True, False])
def test_a_malicious_pickle_is_refused_and_not_run(as_zip, tmp_path):
    trace, path = tmp_path / "trace", tmp_path / "weights.pth"
    content = {"conv1.weight": torch.zeros(1), "x": Malicious(trace)}
    if as_zip:
        torch.save(content, path)
    else:
        path.write_bytes(pickle.dumps(content))
    with pytest.raises(ValueError, match=r"Expected a PyTorch file of tensors alone"):
        read_weights(path)
    assert not trace.exists()
    with pytest.raises(Exception):  # noqa: B017, PT011 - it does run where it is let
        torch.load(path, weights_only=False)["x"].missing  # noqa: B018
    assert trace.exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1, 2], "Expected a state dict"),
        ({"model": {"conv1.weight": 3}}, "Expected a state dict"),
    ],
)
def test_other_objects_are_refused(content, message, tmp_path):
    path = tmp_path / "weights.pth"
    torch.save(content, path)
    with pytest.raises(ValueError, match=message):
        read_weights(path)


def test_a_cut_off_pytorch_file_is_refused(tmp_path):
    path = tmp_path / "weights.pth"
    torch.save({"conv1.weight": torch.zeros(1000)}, path)
    path.write_bytes(path.read_bytes()[:900])
    with pytest.raises(ValueError, match="damaged"):
        read_weights(path)


def test_the_json_file_of_other_weights_is_refused(tmp_path):
    model, variables = make_ours(NETWORKS["uneven"])
    path = tmp_path / "weights.pth"
    write_pytorch(path, Weights(to_tensors(variables, model), {"width": 4}))
    _, others = make_ours(NETWORKS["uneven"], seed=1)
    write_pytorch(
        tmp_path / "others.pth", Weights(to_tensors(others, model), {"width": 4})
    )
    (tmp_path / "others.pth").replace(path)
    with pytest.raises(ValueError, match=r"Expected weights\.json to belong to"):
        read_weights(path)
    path.with_suffix(".json").write_text(json.dumps({"width": 7}))  # not one of ours
    assert read_weights(path).metadata == {}


# --- the commands -----------------------------------------------------------------


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """A run on digits that was never trained, with statistics of its own."""
    folder = tmp_path_factory.mktemp("run")
    config = helpers.make_config(overrides={"model.blocks": (1, 2), "model.width": 4})
    dataset = helpers.load_data(config)
    model = helpers.make_model(config, dataset)
    variables = helpers.draw_variables(model, dataset.image_shape)
    save_variables(config, dataset, folder, variables)
    (folder / "config.json").write_text(config.to_json_best_effort())
    return folder


def export(workdir, kind, output):
    return helpers.main(
        "export", f"--workdir={workdir}", f"--format={kind}", f"--output={output}"
    )


def read_run(workdir):
    config = configuration.with_defaults(
        json.loads((workdir / "config.json").read_text())
    )
    dataset = helpers.load_data(config)
    model = helpers.make_model(config, dataset)
    return model, load_network(config, dataset, workdir, "last").variables, dataset


def test_a_run_goes_to_a_pytorch_file_and_comes_back_to_the_bit(workdir, tmp_path):
    path, again = tmp_path / "weights.pth", tmp_path / "again"
    assert export(workdir, "pytorch", path) == 0
    arguments = (f"--input={path}", f"--workdir={again}", "--config=configs/digits.py")
    assert helpers.main("import", *arguments) == 0
    model, variables, _ = read_run(workdir)
    model_again, variables_again, _ = read_run(again)
    helpers.assert_same_bits(variables_again, variables)
    assert model_again == model


def test_an_export_replaces_no_json_file_but_its_own(workdir, tmp_path, capsys):
    before = (workdir / "config.json").read_bytes()
    assert export(workdir, "pytorch", workdir / "config.pth") == 2
    assert "Expected no other JSON file" in capsys.readouterr().err
    assert (workdir / "config.json").read_bytes() == before
    assert not (workdir / "config.pth").exists()
    for _ in range(2):
        assert export(workdir, "pytorch", tmp_path / "again.pth") == 0


def test_a_whole_preactresnet_18_goes_here_and_back_by_command(tmp_path):
    """As others save it: 11 million weights, in parallel, behind a normalization."""
    torch.manual_seed(0)
    network = twin.TwinResNet(in_channels=1)
    rng = np.random.default_rng(0)
    normalized = [rng.normal(size=(16, 1, 8, 8)).astype(np.float32) for _ in range(3)]
    for batch in normalized:
        network(torch.from_numpy(batch))
    mean, std = 0.3, 0.4
    state = {f"module.model.{n}": t for n, t in network.eval().state_dict().items()}
    state["module.normalize.mean"] = torch.full([1, 1, 1], mean)
    state["module.normalize.std"] = torch.full([1, 1, 1], std)
    path, workdir = tmp_path / "theirs.pth", tmp_path / "run"
    torch.save({"state_dict": state, "epoch": 3}, path)
    arguments = (
        f"--input={path}",
        f"--workdir={workdir}",
        "--config=configs/digits.py",
    )
    assert helpers.main("import", *arguments) == 0

    model, variables, dataset = read_run(workdir)
    assert sum(leaf.size for leaf in jax.tree.leaves(variables["params"])) > 11e6
    images = dataset.test.images[:4].astype(np.float32) / 255
    pixels = torch.from_numpy(images.transpose(0, 3, 1, 2).copy())
    with torch.no_grad():
        logits = network((pixels - mean) / std).numpy()
    assert np.ptp(logits) > 0.1
    np.testing.assert_allclose(logits_of(model, variables, images), logits, atol=1e-5)

    outputs = {"pytorch": "a.pth", "safetensors": "a.safetensors", "robustbench": "b"}
    for kind, name in outputs.items():
        assert export(workdir, kind, tmp_path / name) == 0
    theirs = network.state_dict()
    for found in (
        torch.load(tmp_path / "a.pth", weights_only=True),
        safetensors_torch.load_file(tmp_path / "a.safetensors"),
    ):
        assert found.keys() == theirs.keys()
        for name, tensor in found.items():
            counts = name.endswith("num_batches_tracked")
            assert torch.equal(tensor, torch.tensor(0) if counts else theirs[name])
    with torch.no_grad():
        bundled = load_bundle(tmp_path / "b")(pixels).numpy()
    np.testing.assert_allclose(bundled, logits, atol=1e-5)


def test_a_bundle_is_imported_to_the_same_bits(workdir, tmp_path):
    assert export(workdir, "robustbench", tmp_path / "bundle") == 0
    path, again = tmp_path / "bundle" / "model.pt", tmp_path / "again"
    arguments = (f"--input={path}", f"--workdir={again}", "--config=configs/digits.py")
    assert helpers.main("import", *arguments) == 0
    model, variables, _ = read_run(workdir)
    model_again, variables_again, _ = read_run(again)
    helpers.assert_same_bits(variables_again, variables)
    for name in ("mean", "std"):
        values = np.float32(getattr(model_again, name))
        np.testing.assert_array_equal(values, np.float32(getattr(model, name)))


def make_line(accuracy, **evaluation):
    usual = {"attack": "autoattack", "version": "standard", "split": "test"}
    return {
        "accuracy": accuracy,
        "evaluation": {**usual, "checkpoint": "last", **evaluation},
        "num_test": 500,
        "seed": 0,
        "provenance": {"date": "now", "device": "cpu", "commit": "c", "command": "x"},
    }


CLAIMED = {"natural": 84.2, "l2 16/255": 70.0, "linf 8/255": 51.166}
OTHERS = [  # newer, none of them the claim
    make_line({"natural": 1.0, "linf 8/255": 1.0}, attack="pgd"),
    make_line({"natural": 2.0, "linf 8/255": 2.0}, version="custom"),
    make_line({"natural": 3.0, "linf 8/255": 3.0}, checkpoint="best"),
    make_line({"natural": 4.0, "linf 8/255": 4.0}, split="validation"),
    make_line({"natural": 5.0}),
]


def load_bundle(folder):
    spec = util.spec_from_file_location("bundled_model", folder / "model.py")
    assert spec is not None
    assert spec.loader is not None
    module = util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.load_model(folder / "model.pt")


def test_a_bundle_has_the_logits_of_the_run_on_plain_pixels(workdir, tmp_path):
    assert export(workdir, "robustbench", tmp_path / "bundle") == 0
    network = load_bundle(tmp_path / "bundle")
    model, variables, dataset = read_run(workdir)
    images = dataset.test.images[:6].astype(np.float32) / 255
    with torch.no_grad():
        logits = network(torch.from_numpy(images.transpose(0, 3, 1, 2).copy())).numpy()
    assert np.ptp(logits) > 0.1
    np.testing.assert_allclose(logits_of(model, variables, images), logits, atol=1e-5)
    names = {n.partition(".")[0] for n in network.state_dict()}
    assert names == {"mean", "std", "model"}


def test_a_stopped_export_leaves_no_claim_beside_other_weights(
    workdir, tmp_path, monkeypatch
):
    assert export(workdir, "robustbench", tmp_path) == 0
    before = (tmp_path / "model.pt").read_bytes()

    def stopped(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(robustbench, "write_text", stopped)  # after the weights
    assert export(workdir, "robustbench", tmp_path) == 130
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"model.pt", "model.py"}
    assert (tmp_path / "model.pt").read_bytes() == before


def bundle_of(workdir, tmp_path, lines):
    """The claim and the README of a bundle of a run with these evaluations."""
    evaluations = workdir / "evaluations.jsonl"
    evaluations.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert export(workdir, "robustbench", tmp_path) == 0
    evaluations.unlink()
    info = json.loads((tmp_path / "model_info.json").read_text())
    return info, (tmp_path / "README.md").read_text()


UNCLAIMED = {
    "link": "",
    "name": "A PreActResNet 4 [1, 2]: ST",
    "authors": "",
    "additional_data": False,
    "number_forward_passes": 1,
    "dataset": "digits",
    "venue": "",
    "architecture": "PreActResNet 4 [1, 2]",
}


def test_a_bundle_claims_what_the_standard_autoattack_left(workdir, tmp_path):
    lines = [make_line({"natural": 9.0, "linf 8/255": 9.0}), make_line(CLAIMED)]
    info, readme = bundle_of(workdir, tmp_path, lines + OTHERS)
    origin = info.pop("samrobust")
    assert info == {
        **UNCLAIMED,
        "eps": "8/255",
        "clean_acc": "84.20",
        "autoattack_acc": "51.17",
        "footnote": "Robust accuracy at linf 8/255 by samrobust's AutoAttack.",
    }
    assert (origin["checkpoint"], origin["step"], origin["seed"]) == ("last", 0, 0)
    assert "* l2 16/255: 70.00 %" in readme
    assert "`link`, `authors`, `venue`, `reported`; `unreliable` only if" in readme


def test_a_claim_under_l2_has_robustbenchs_way_to_write_the_radius(workdir, tmp_path):
    accuracy = {"natural": 84.2, "l2 16/255": 70.0, "l2 127.5/255": 51.0}
    info, _ = bundle_of(workdir, tmp_path, [make_line(accuracy)])
    assert (info["eps"], info["autoattack_acc"]) == ("0.5", "51.00")


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ([], "has not been evaluated"),
        ([{}, {"evaluation": 3}, {"accuracy": []}], "has not been evaluated"),
        ([make_line(CLAIMED) | {"num_test": 48}], "on only 48 of the 500 test images"),
        ([make_line(CLAIMED) | {"step": 7}], "has not been evaluated"),
    ],
)
def test_a_bundle_claims_nothing_of_less_than_all_test_images(
    lines, said, workdir, tmp_path
):
    info, readme = bundle_of(workdir, tmp_path, lines)
    assert info.pop("samrobust")["step"] == 0
    assert info == UNCLAIMED
    assert said in readme
    # What an evaluation measures is nothing to be filled in by hand.
    assert "`link`, `authors`, `venue`, `reported`; " in readme


# --- files of others ----------------------------------------------------------------


def make_state(seed=0):
    """A state dict as the paper's code has it."""
    return make_theirs(NETWORKS["uneven"], seed).state_dict()


def swa_state():
    """What the average of two networks is saved as."""
    average = torch.optim.swa_utils.AveragedModel(make_theirs(NETWORKS["uneven"]))
    for seed in (0, 1):
        average.update_parameters(make_theirs(NETWORKS["uneven"], seed))
    return average.state_dict()


def under(prefix, state):
    return {f"{prefix}{name}": tensor for name, tensor in state.items()}


STATE, EMA = make_state(), make_state(1)
TAKEN = {  # the file, whose tensors are taken, what is said
    "an average": (swa_state(), "an average over 2 networks (n_averaged)"),
    "an average in a checkpoint": (
        {"epoch": 3, "swa": swa_state()},
        "Of the file its entry swa was taken.",
    ),
    "an EMA alone": ({"ema": EMA, "epoch": 1}, "Of the file its entry ema was taken."),
    "one network twice": ({"net": STATE, "model": STATE}, "its entry model was taken"),
    "deep in a list": ({"runs": [{"net": STATE}]}, "its entry runs.0.net was taken"),
    "scalars beside": ({**STATE, "acc": 3.5, "at": None}, "no tensors: acc, at."),
    "a NumPy scalar in a checkpoint": (
        {"net": STATE, "acc": np.float64(93.5), "n": np.int64(3)},
        "its entry net was taken",
    ),
    "NumPy scalars beside": ({**STATE, "acc": np.float32(1)}, "no tensors: acc."),
    "half precision": (
        {n: t.half() if t.is_floating_point() else t for n, t in STATE.items()},
        "48 tensors of float16 became float32, which holds their values.",
    ),
    "bfloat16": (
        {n: t.bfloat16() if t.is_floating_point() else t for n, t in STATE.items()},
        "48 tensors of bfloat16 became float32, which holds their values.",
    ),
    "float64": (
        {n: t.double() / 3 if t.is_floating_point() else t for n, t in STATE.items()},
        "48 tensors of float64 became float32, which moved ",
    ),
}


@pytest.mark.parametrize(("content", "said"), TAKEN.values(), ids=TAKEN)
def test_one_network_is_taken_from_a_file_and_what_was_chosen_is_said(
    content, said, tmp_path
):
    path = tmp_path / "weights.pth"
    torch.save(content, path)
    weights = read_weights(path)
    assert said in " ".join(weights.notes)
    assert weights.tensors.keys() == STATE.keys()
    model = PreActResNet(mean=MEAN, std=STD, **NETWORKS["uneven"])
    from_tensors(weights.tensors, model, (32, 32, 3))


def test_the_average_of_networks_is_what_is_imported(tmp_path):
    path = tmp_path / "weights.pth"
    torch.save(swa_state(), path)
    mean = (STATE["linear.weight"] + EMA["linear.weight"]) / 2
    taken = read_weights(path).tensors["linear.weight"]
    np.testing.assert_allclose(taken, mean.numpy(), rtol=1e-6)
    torch.save(STATE, path)
    assert read_weights(path).notes == ()


def deep(levels):
    content = {"net": STATE}
    for _ in range(levels):
        content = {"x": content, "y": [1]}
    return content


REFUSED = {
    "a network beside its EMA": (
        {"model": STATE, "model_ema": EMA},
        "with 2: model, model_ema.",
    ),
    "an EMA by another name": (
        {"state_dict": STATE, "ema_state_dict": EMA, "epoch": 3},
        "with 2: state_dict, ema_state_dict.",
    ),
    "a network around its EMA": (
        {**STATE, "ema": EMA},
        "with 2: ema, the file itself.",
    ),
    "a network in a list": ({"net": STATE, "old": [EMA]}, "with 2: net, old.0."),
    "an attacker's copy": (
        under("model.", STATE) | under("attacker.model.", STATE),
        "behind='model., attacker.model.'",
    ),
    "with and without a prefix": (
        under("module.", STATE) | {"bn.bias": EMA["bn.bias"]},
        "twice='bn.bias'",
    ),
    "another network": ({"fc.weight": torch.zeros(2)}, "with the keys fc.weight."),
    "many keys": (
        {f"layer{i}": torch.zeros(1) for i in range(60)},
        "layer7, and 52 more. Is it",
    ),
    "nothing": ({}, "with no key."),
    "a module": (torch.nn.Linear(1, 1), "torch.nn.modules.linear.Linear"),
    "sparse": (
        {**STATE, "linear.weight": STATE["linear.weight"].to_sparse()},
        "linear.weight is sparse_coo",
    ),
    "meta": (
        {**STATE, "linear.weight": torch.zeros(3, 8, device="meta")},
        "linear.weight is on the device meta, without values",
    ),
    "complex": (
        {**STATE, "linear.weight": torch.zeros(3, 8, dtype=torch.complex64)},
        "linear.weight is complex64",
    ),
    "larger than the file": (
        {**STATE, "linear.weight": torch.zeros(1).expand(2**20, 2**20)},
        "more than the file holds",
    ),
    "beyond float32": (
        {**STATE, "linear.weight": torch.full((3, 8), 1e300, dtype=torch.float64)},
        "tensor='linear.weight', value=1e+300",
    ),
}


@pytest.mark.filterwarnings("ignore:Sparse")
@pytest.mark.parametrize(("content", "said"), REFUSED.values(), ids=REFUSED)
def test_other_files_are_refused_in_one_line_with_what_was_found(
    content, said, tmp_path
):
    path = tmp_path / "weights.pth"
    torch.save(content, path)
    with pytest.raises(ValueError, match=r"Expected") as raised:
        read_weights(path)
    message = str(raised.value)
    assert said in message
    assert "\n" not in message
    assert "weights_only" not in message
    assert len(message) < 800


def test_a_deep_file_is_searched_to_its_end(tmp_path):
    path = tmp_path / "weights.pth"
    torch.save(deep(50), path)
    assert read_weights(path).tensors.keys() == STATE.keys()
    both = deep(50)
    torch.save({**both, "z": [[[EMA]]]}, path)
    with pytest.raises(ValueError, match="with 2: x"):
        read_weights(path)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"\x80\x02}q\x00.", b"(" * 9])
def test_damaged_pytorch_files_are_refused_without_pytorchs_advice(content, tmp_path):
    path = tmp_path / "weights.pth"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="Expected") as raised:
        read_weights(path)
    assert "\n" not in str(raised.value)
    assert "weights_only" not in str(raised.value)
    assert raised.value.__cause__ is None


def test_a_network_of_ones_own_comes_back_from_a_file_that_names_it(tmp_path):
    tensors = {"params.Dense_0.kernel": np.arange(4.0, dtype=np.float32).reshape(2, 2)}
    metadata = {"model": {"name": "mine:Linear"}}
    write_pytorch(tmp_path / "own.pth", Weights(tensors, metadata))
    read = read_weights(tmp_path / "own.pth")
    assert read.metadata == metadata
    assert read.tensors.keys() == tensors.keys()
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(read.tensors[name], tensor)
