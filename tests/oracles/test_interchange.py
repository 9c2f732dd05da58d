"""Weights to PyTorch and back: the same logits, the same bits, and nothing run."""

import json
import pathlib
import pickle

import helpers
import jax
import numpy as np
import pytest

from samrobust.interchange import (
    Weights,
    from_tensors,
    infer_architecture,
    read_weights,
    to_tensors,
    write_pytorch,
)
from samrobust.models import PreActResNet

torch = pytest.importorskip("torch")
reference = pytest.importorskip("torch_reference_network")

MEAN, STD = (0.49, 0.48, 0.45), (0.25, 0.24, 0.26)
NETWORKS = {
    "two blocks a stage": {"width": 4, "blocks": (2, 2, 2), "num_classes": 10},
    "one stage, seven classes": {"width": 6, "blocks": (3,), "num_classes": 7},
    "uneven": {"width": 4, "blocks": (1, 3), "num_classes": 3},
}


def make_ours(fields, seed=0):
    """Our network with random variables: statistics, scales and biases too."""
    model = PreActResNet(mean=MEAN, std=STD, **fields)
    images = np.zeros((1, 8, 8, 3), np.float32)
    like = jax.eval_shape(lambda: model.init(jax.random.key(0), images, train=False))
    rng = np.random.default_rng(seed)

    def draw(leaf):
        values = rng.uniform(0.2, 1.2, leaf.shape)
        if leaf.ndim > 1:
            values = (values - 0.7) / np.sqrt(np.prod(leaf.shape[:-1]) / 6)
        return values.astype(np.float32)

    return model, jax.tree.map(draw, like)


def make_images(seed=1):
    return np.random.default_rng(seed).uniform(size=(5, 8, 8, 3)).astype(np.float32)


def as_torch_images(images):
    """Normalised outside, as the reference does."""
    normalised = (images - np.float32(MEAN)) / np.float32(STD)
    return torch.from_numpy(np.array(normalised.transpose(0, 3, 1, 2)))


def make_theirs(fields, seed=0):
    """The reference's network, with statistics of some training passes."""
    torch.manual_seed(seed)
    network = reference.ReferenceNetwork(**fields)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if "bn" in name:
                parameter.uniform_(0.3, 1.3)
        for shift in range(3):
            network(as_torch_images(make_images(shift)))
    return network.eval()


def logits_of(model, variables, images):
    return np.asarray(
        jax.jit(lambda v, x: model.apply(v, x, train=False))(variables, images)
    )


@pytest.mark.parametrize("fields", NETWORKS.values(), ids=NETWORKS)
def test_an_exported_network_has_the_same_logits_in_pytorch(fields, tmp_path):
    model, variables = make_ours(fields)
    path = tmp_path / "weights.pth"
    write_pytorch(path, Weights(to_tensors(variables), {}))
    network = reference.ReferenceNetwork(**fields)
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
    variables = from_tensors(tensors, model, 3)
    images = make_images()
    with torch.no_grad():
        logits = network(as_torch_images(images)).numpy()
    assert np.ptp(logits) > 0.1
    np.testing.assert_allclose(logits_of(model, variables, images), logits, atol=1e-5)


def test_a_pytorch_file_there_and_back_is_the_same_to_the_bit(tmp_path):
    fields = NETWORKS["two blocks a stage"]
    model, variables = make_ours(fields)
    path = tmp_path / "weights.pth"
    metadata = {"mean": list(MEAN), "std": list(STD), **fields, "blocks": [2, 2, 2]}
    write_pytorch(path, Weights(to_tensors(variables), metadata))
    weights = read_weights(path)
    helpers.assert_same_bits(from_tensors(weights.tensors, model, 3), variables)
    assert weights.metadata == metadata
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        "weights.json",
        "weights.pth",
    ]


def test_the_counters_of_batches_are_int64_scalars():
    _, variables = make_ours(NETWORKS["uneven"])
    tensors = to_tensors(variables)
    counters = [n for n in tensors if n.endswith("num_batches_tracked")]
    theirs = reference.ReferenceNetwork(**NETWORKS["uneven"]).state_dict()
    assert tensors.keys() == theirs.keys()
    assert len(counters) == 9
    assert all(tensors[n].shape == () for n in counters)
    assert all(tensors[n].dtype == np.int64 for n in counters)


@pytest.mark.parametrize("entry", ["state_dict", "net", "model"])
def test_a_checkpoint_of_a_parallel_run_is_understood(entry, tmp_path):
    network = make_theirs(NETWORKS["uneven"])
    state = {f"module.{n}": t for n, t in network.state_dict().items()}
    path = tmp_path / "checkpoint.pth.tar"
    torch.save({"epoch": 3, entry: state, "acc": 0.5}, path)
    assert read_weights(path).tensors.keys() == network.state_dict().keys()


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
        ({"conv1.weight": torch.zeros(1, dtype=torch.bfloat16)}, "float32 tensors"),
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
    _, variables = make_ours(NETWORKS["uneven"])
    path = tmp_path / "weights.pth"
    write_pytorch(path, Weights(to_tensors(variables), {"width": 4}))
    _, others = make_ours(NETWORKS["uneven"], seed=1)
    write_pytorch(tmp_path / "others.pth", Weights(to_tensors(others), {"width": 4}))
    (tmp_path / "others.pth").replace(path)
    with pytest.raises(ValueError, match=r"Expected weights\.json to belong to"):
        read_weights(path)
    path.with_suffix(".json").write_text(json.dumps({"width": 7}))  # not one of ours
    assert read_weights(path).metadata == {}
