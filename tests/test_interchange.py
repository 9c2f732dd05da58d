"""`samrobust export` and `import` without PyTorch: safetensors, workdirs, refusals."""

import hashlib
import json
import shutil
import sys

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors
import safetensors.numpy

from samrobust.data import datasets
from samrobust.experiments import building, configuration, interchange
from samrobust.experiments.networks import load_network, save_variables
from samrobust.experiments.robustbench import find_evaluation
from samrobust.experiments.workdir import config_of_run
from samrobust.models import PreActResNet
from samrobust.models.torch import Weights, read_weights, to_tensors, write_safetensors
from samrobust.training.checkpoint import CheckpointError, Checkpoints

pytestmark = pytest.mark.usefixtures("programs_made_once")

DIGITS = "--config=configs/digits.py:st"
FIELDS = {"model.width": 4, "model.blocks": (1, 2), "model.mean": (0.3,)}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A workdir of a network that was never trained, and its variables."""
    workdir = tmp_path_factory.mktemp("runs") / "run"
    config = helpers.make_config(overrides=FIELDS)
    dataset = helpers.load_data(config)
    model = helpers.make_model(config, dataset)
    variables = helpers.draw_variables(model, dataset.image_shape)
    workdir.mkdir()
    save_variables(config, dataset, workdir, variables)
    (workdir / "config.json").write_text(config.to_json_best_effort())
    return workdir, variables, model


@pytest.fixture(scope="module")
def exported(run, tmp_path_factory):
    path = tmp_path_factory.mktemp("out") / "sub" / "weights.safetensors"
    assert export(run[0], path) == 0
    return path


def export(workdir, path, kind="safetensors", *more):
    return helpers.main(
        "export", f"--workdir={workdir}", f"--format={kind}", f"--output={path}", *more
    )


def bring(path, workdir, *more):
    return helpers.main(
        "import", f"--input={path}", f"--workdir={workdir}", DIGITS, *more
    )


def test_an_exported_file_holds_the_network_and_what_else_it_takes(run, exported):
    _, variables, model = run
    tensors = safetensors.numpy.load_file(exported)
    kernel = variables["params"]["stage2_block1"]["shortcut"]["kernel"]
    np.testing.assert_array_equal(
        tensors["layer2.0.shortcut.0.weight"][5, 3, 0, 0], kernel[0, 0, 3, 5]
    )
    stem = variables["params"]["stem"]["kernel"]
    np.testing.assert_array_equal(tensors["conv1.weight"][3, 0, 1, 2], stem[1, 2, 0, 3])
    head = variables["params"]["head"]["kernel"]
    np.testing.assert_array_equal(tensors["linear.weight"][7, 2], head[2, 7])
    np.testing.assert_array_equal(
        tensors["layer2.1.bn2.running_var"],
        variables["batch_stats"]["stage2_block2"]["norm2"]["var"],
    )
    with safetensors.safe_open(exported, framework="np") as file:
        header = {n: json.loads(v) for n, v in file.metadata().items() if n != "format"}
    origin = header.pop("origin")
    assert len(origin.pop("identity")) == 16
    assert len(origin.pop("network")) == 64
    assert origin == {
        "label": "ST",
        "row": "st",
        "seed": 0,
        "checkpoint": "last",
        "step": 0,
        "imported": {},
    }
    assert header == {
        "mean": [0.3],
        "std": list(model.std),
        "num_classes": 10,
        "width": 4,
        "blocks": [1, 2],
    }
    assert [file.name for file in exported.parent.iterdir()] == [exported.name]


def test_export_and_import_give_the_same_bits(run, exported, tmp_path):
    workdir = tmp_path / "imported"
    assert bring(exported, workdir) == 0
    stored = json.loads((workdir / "config.json").read_text())
    assert stored["model"]["width"] == 4
    assert stored["model"]["blocks"] == [1, 2]
    assert stored["model"]["mean"] == [0.3]
    config = configuration.with_defaults(stored)
    dataset = helpers.load_data(config)
    assert helpers.make_model(config, dataset) == run[2]
    helpers.assert_same_bits(
        load_network(config, dataset, workdir, "last").variables, run[1]
    )
    note = json.loads((workdir / "import.json").read_text())
    assert note["source"] == "weights.safetensors"
    assert note["sha256"] == hashlib.sha256(exported.read_bytes()).hexdigest()
    again = tmp_path / "again.safetensors"
    assert export(workdir, again) == 0
    weights, first = read_weights(again), read_weights(exported)
    helpers.assert_same_bits(weights.tensors, first.tensors)
    origin, earlier = (w.metadata.pop("origin") for w in (weights, first))
    assert weights.metadata == first.metadata
    assert earlier["imported"] == {}
    assert origin["imported"] == {n: note[n] for n in ("source", "sha256")}


def test_the_network_of_another_file_is_refused_and_mended_by_importing_again(
    exported, tmp_path, capsys
):
    other = tmp_path / "other.safetensors"
    weights = read_weights(exported)
    weights.tensors["linear.bias"] = weights.tensors["linear.bias"] + 1
    write_safetensors(other, weights)
    folders = tmp_path / "one", tmp_path / "two"
    identities = []
    for path, folder in zip((exported, other), folders, strict=True):
        assert bring(path, folder) == 0
        config = config_of_run(folder)
        network = load_network(config, building.load_facts(config), folder, "last")
        identities.append(network.identity.hash)
    assert len(set(identities)) == 2
    shutil.rmtree(folders[1] / "checkpoints")
    shutil.copytree(folders[0] / "checkpoints", folders[1] / "checkpoints")
    config = config_of_run(folders[1])
    with pytest.raises(CheckpointError, match="data is 'import"):
        load_network(config, helpers.load_data(config), folders[1], "last")
    capsys.readouterr()
    assert bring(other, folders[1]) == 0
    assert capsys.readouterr().out.startswith("Imported")
    mended = load_network(config, helpers.load_data(config), folders[1], "last")
    assert mended.identity.hash == identities[1]
    assert bring(other, folders[1], "--config.data.data_dir=elsewhere") == 0
    assert "Already imported" in capsys.readouterr().out
    assert config_of_run(folders[1]).data.data_dir == "elsewhere"


def test_an_imported_network_is_evaluated_as_the_run_it_came_from(
    run, exported, tmp_path, capsys
):
    workdir = tmp_path / "imported"
    assert bring(exported, workdir, "--config.data.test_size=60") == 0
    flags = ("--norm=linf", "--epsilon=8", "--num-steps=1", "--num-examples=60")
    accuracy = []
    for folder in (workdir, run[0]):
        assert helpers.main("evaluate", f"--workdir={folder}", *flags) == 0
        accuracy.append(
            helpers.read_lines(folder / "evaluations.jsonl")[-1]["accuracy"]
        )
    assert accuracy[0] == accuracy[1]
    assert accuracy[0].keys() == {"natural", "linf 8/255"}
    assert "Next: samrobust evaluate" in capsys.readouterr().out


def test_training_goes_on_from_an_imported_network_where_all_fields_are_its(
    run, exported, tmp_path, capsys
):
    workdir, sizes = tmp_path / "imported", {"data.train_size": 64, "data.test_size": 8}
    slow = {**sizes, "training.epochs": 1, "training.learning_rate": 1e-9}
    assert bring(exported, workdir, *helpers.make_flags(slow)) == 0
    flags = helpers.make_flags({**slow, "model.width": 4, "model.blocks": (1, 2)})
    train = ("train", f"--workdir={workdir}", DIGITS, *flags)
    config = json.loads((workdir / "config.json").read_text())
    assert helpers.main(*train) == 2
    message = " ".join(capsys.readouterr().err.split())
    assert "label was 'Imported ST', is 'ST'; model.mean was [0.3], is None" in message
    assert json.loads((workdir / "config.json").read_text()) == config
    assert not (workdir / "failure.json").exists()
    told = [f"--config.model.{n}={tuple(config['model'][n])}" for n in ("mean", "std")]
    assert helpers.main(*train, "--config.label=Imported ST", *told) == 0
    config = configuration.with_defaults(config)
    dataset = helpers.load_data(config)
    trained = load_network(config, dataset, workdir, "last").variables["params"]
    for new, old in zip(
        jax.tree.leaves(trained), jax.tree.leaves(run[1]["params"]), strict=True
    ):
        np.testing.assert_allclose(new, old, atol=1e-6)


def test_mean_and_std_are_the_data_sets_where_the_file_has_none(
    exported, run, tmp_path
):
    bare = tmp_path / "bare.safetensors"
    write_safetensors(bare, Weights(read_weights(exported).tensors, {}))
    assert bring(bare, tmp_path / "imported") == 0
    stored = json.loads((tmp_path / "imported" / "config.json").read_text())
    assert stored["model"]["mean"] is None
    config = configuration.with_defaults(stored)
    dataset = helpers.load_data(config)
    assert helpers.make_model(config, dataset).mean == dataset.mean != run[2].mean


def test_the_command_line_has_the_last_word_on_mean_and_std(exported, tmp_path, capsys):
    workdir = tmp_path / "imported"
    assert bring(exported, workdir, "--config.model.mean=(0.25,)") == 0
    model = json.loads((workdir / "config.json").read_text())["model"]
    assert model["mean"] == [0.25]
    assert "; mean of the command line, std of the file." in capsys.readouterr().out


def test_another_network_comes_back_as_its_file_says(tmp_path, capsys):
    # Two heads and three, the default, have tensors of the same shapes.
    fields = {"patch": 2, "dim": 6, "depth": 1, "heads": 2}
    chosen = [f"--config.model.{name}={value}" for name, value in fields.items()]
    vit = "--config.model.name=vit"
    config = configuration.load_config("configs/digits.py:st", [vit, *chosen])
    dataset = helpers.load_data(config)
    model = helpers.make_model(config, dataset)
    variables = helpers.draw_variables(model, dataset.image_shape)
    (tmp_path / "run").mkdir()
    save_variables(config, dataset, tmp_path / "run", variables)
    (tmp_path / "run/config.json").write_text(config.to_json_best_effort())
    path, workdir = tmp_path / "vit.safetensors", tmp_path / "imported"
    assert export(tmp_path / "run", path) == 0
    assert bring(path, workdir, vit, *chosen[:3]) == 0
    imported = config_of_run(workdir).model.to_dict()
    assert fields.items() <= imported.items()
    assert bring(path, tmp_path / "other", "--config.model.name=wide_resnet") == 2
    message = "Expected model.name=vit as in the file, got model.name='wide_resnet'."
    assert message in capsys.readouterr().err


def test_a_workdir_that_holds_a_run_is_refused(run, exported, capsys):
    before = sorted(path.name for path in run[0].iterdir())
    assert bring(exported, run[0]) == 2
    assert "Expected a --workdir without a run" in capsys.readouterr().err
    assert sorted(path.name for path in run[0].iterdir()) == before


@pytest.mark.parametrize(
    "name", ["plan.json", "result.json", "checkpoints/best", "autoattack"]
)
def test_what_a_table_or_a_run_has_left_is_refused(name, exported, tmp_path, capsys):
    (tmp_path / name).mkdir(parents=True)
    assert bring(exported, tmp_path) == 2
    assert "without a run, got" in (said := capsys.readouterr().err)
    assert name in said.partition(" with ")[2]
    assert [path.name for path in tmp_path.iterdir()] == [name.partition("/")[0]]


def test_another_data_set_has_no_numbers_of_the_paper(exported, tmp_path):
    flags = (f"--input={exported}", "--config=cifar10:st", "--dataset=digits")
    assert helpers.main("import", *flags, f"--workdir={tmp_path / 'imported'}") == 0
    assert json.loads((tmp_path / "imported/config.json").read_text())["paper"] == {}


def change(tensors, name, value):
    """Without a tensor, or with another in its place."""
    changed = {n: t for n, t in tensors.items() if n != name}
    return changed if value is None else changed | {name: value}


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("bn.weight", None, "no bn.weight [8]"),
        ("fc.bias", np.zeros(3, np.float32), "a superfluous fc.bias [3]"),
        (
            "layer1.0.conv1.weight",
            np.zeros((4, 4, 1, 3), np.float32),
            "layer1.0.conv1.weight [4, 4, 1, 3] instead of [4, 4, 3, 3]",
        ),
        ("linear.weight", np.zeros((7, 8), np.float32), "instead of [10, 8]"),
        ("bn.bias", np.zeros(8, np.int64), "bn.bias [8] of int64 instead of float32"),
        ("bn.bias", np.zeros(8, np.bool_), "tensors={'bn.bias': 'BOOL'}"),
        ("bn.bias", np.full(8, 1e300), "tensor='bn.bias', value=1e+300"),
        ("bn.bias", np.full(8, np.nan, np.float32), "bn.bias with 8 of 8 NaN"),
        ("bn.running_mean", np.full(8, np.inf), "bn.running_mean with 8 of 8 NaN or"),
        (
            "bn.running_var",
            np.linspace(-1, 1, 8).astype(np.float32),
            "bn.running_var with the variance -1",
        ),
        ("linear.weight", np.zeros((0, 8), np.float32), "[0, 8] instead of [10, 8]"),
        ("linear.weight", np.zeros((), np.float32), "linear.weight with 2 axes"),
        ("linear.weight", None, "a tensor linear.weight, got names='bn.bias, bn."),
        ("ema.linear.weight", np.zeros(1), "behind='ema., no prefix'"),
        ("conv1.weight", None, "Expected a tensor conv1.weight with 4 axes"),
        ("conv1.weight", np.zeros((4, 3, 3, 3), np.float32), "instead of [4, 1, 3, 3]"),
    ],
)
def test_a_file_of_another_network_is_refused_by_name_and_nothing_written(
    name, value, message, exported, tmp_path, capsys
):
    path, workdir = tmp_path / "weights.safetensors", tmp_path / "imported"
    tensors = change(safetensors.numpy.load_file(exported), name, value)
    safetensors.numpy.save_file(tensors, path)
    assert bring(path, workdir) == 2
    assert message in capsys.readouterr().err
    assert not workdir.exists()


@pytest.mark.parametrize("content", [b"", b"garbage that is no header", None])
def test_a_damaged_file_is_refused(content, exported, tmp_path, capsys):
    path = tmp_path / "weights.safetensors"
    whole = exported.read_bytes()
    path.write_bytes(whole[:-100] if content is None else content)
    assert bring(path, tmp_path / "imported") == 2
    assert "Expected a safetensors file" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"width": 8}, "Expected width=4 as in the tensors, got width=8"),
        ({"blocks": [1, 1]}, "Expected blocks=[1, 2] as in the tensors"),
        ({"blocks": 3}, "Expected blocks=[1, 2] as in the tensors"),
        ({"mean": "abc", "std": [1.0]}, "Expected a list of numbers for mean"),
        ({"mean": [0.5]}, "Expected mean and std in the file's metadata, or neither"),
        (
            {"mean": [0.5, 0.5], "std": [1.0]},
            "Expected one model.mean or one a channel (1)",
        ),
    ],
)
def test_a_header_that_cannot_be_true_is_refused(
    metadata, message, exported, tmp_path, capsys
):
    path, weights = tmp_path / "weights.safetensors", read_weights(exported)
    write_safetensors(path, Weights(weights.tensors, metadata))
    assert bring(path, tmp_path / "imported") == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "imported").exists()


def test_a_std_of_zero_is_refused(exported, tmp_path, capsys):
    assert bring(exported, tmp_path / "imported", "--config.model.std=(0.0,)") == 2
    assert "1e-06 <= model.std" in capsys.readouterr().err


def test_the_data_set_may_be_named_beside_the_config(exported, tmp_path):
    arguments = (f"--input={exported}", f"--workdir={tmp_path / 'imported'}")
    assert helpers.main("import", *arguments, "--dataset=digits") == 0
    stored = json.loads((tmp_path / "imported" / "config.json").read_text())
    assert (stored["data"]["name"], stored["training"]["epochs"]) == ("digits", 100)


@pytest.mark.parametrize(
    ("kind", "name", "message"),
    [
        ("safetensors", "weights.pth", "Expected --output=NAME.safetensors"),
        ("pytorch", "weights.pth", "pip install torch"),
        ("robustbench", "bundle", "pip install torch"),
    ],
)
def test_an_output_that_cannot_be_is_refused_at_once(
    kind, name, message, run, tmp_path, capsys, monkeypatch
):
    monkeypatch.setitem(sys.modules, "torch", None)  # as if it were not installed
    assert export(run[0], tmp_path / name, kind) == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_pytorch_file_without_pytorch_is_refused(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    (tmp_path / "weights.pth").write_bytes(b"")
    assert bring(tmp_path / "weights.pth", tmp_path / "imported") == 2
    assert "pip install torch" in capsys.readouterr().err


def test_a_run_without_the_checkpoint_is_refused(run, tmp_path, capsys):
    path = tmp_path / "weights.safetensors"
    assert export(run[0], path, "safetensors", "--checkpoint=best") == 1
    assert "Expected a checkpoint" in capsys.readouterr().err
    assert export(run[0], path, "safetensors", "--step=7") == 1
    assert "a checkpoint of step 7 in" in capsys.readouterr().err
    assert export(tmp_path / "nowhere", path) == 2
    assert "Expected a run's --workdir" in capsys.readouterr().err
    assert not path.exists()


def test_a_claim_is_made_of_the_largest_float32_evaluation():
    def line(num_test, accuracy, **fields):
        evaluation = {"attack": "autoattack", "version": "standard"}
        evaluation |= {"split": "test", "checkpoint": "last"}
        accuracies = {"natural": 90.0, "linf 8/255": accuracy}
        return (
            {"evaluation": evaluation, "num_test": num_test}
            | fields
            | {"accuracy": accuracies}
        )

    full = line(10_000, 47.0, dtype="float32")
    coarse = line(10_000, 49.0, dtype="bfloat16")
    few = line(100, 51.0, dtype="float32")
    unnamed = line(10_000, 48.0)
    assert find_evaluation([full, coarse, few], "last", "float32", {}) is full
    assert find_evaluation([full, unnamed], "last", "float32", {}) is unnamed
    assert find_evaluation([full, unnamed], "last", "bfloat16", {}) is full
    assert find_evaluation([coarse], "last", "float32", {}) is None
    assert find_evaluation([full], "best", "float32", {}) is None


class Killed(BaseException):
    """What ends a process ends this test's command."""


def kill_at(monkeypatch, moment):
    """The process ends at the given one of the writes of an import; -1: at none."""
    moments = []

    def dying(function):
        def call(*arguments, **options):
            moments.append(function)
            if len(moments) - 1 == moment:
                raise Killed
            result = function(*arguments, **options)
            moments.append(function)
            if len(moments) - 1 == moment:
                raise Killed
            return result

        return call

    for name in ("write_json", "save_variables"):
        monkeypatch.setattr(interchange, name, dying(getattr(interchange, name)))
    return moments


@pytest.mark.parametrize(
    ("moment", "again"),
    [(moment, "another file") for moment in range(1, 6)]
    + [(moment, "the same file") for moment in (0, 2, 4)],
)
def test_an_import_killed_at_any_write_is_done_by_the_next(
    moment, again, exported, tmp_path, monkeypatch
):
    workdir, other = tmp_path / "imported", tmp_path / "other.safetensors"
    tensors = dict(read_weights(exported).tensors)
    tensors["linear.bias"] = tensors["linear.bias"] + 1
    write_safetensors(other, Weights(tensors, {}))
    with monkeypatch.context() as patch:
        moments = kill_at(patch, moment)
        with pytest.raises(Killed):
            bring(exported, workdir)
    assert len(moments) == moment + 1
    committed = moment == 5
    assert (workdir / "config.json").exists() == committed
    path = exported if again == "the same file" else other
    assert bring(path, workdir) == (2 if committed and path == other else 0)
    config = configuration.with_defaults(
        json.loads((workdir / "config.json").read_text())
    )
    stored = load_network(config, helpers.load_data(config), workdir, "last").variables
    expected = read_weights(exported if committed else path).tensors["linear.bias"]
    np.testing.assert_array_equal(stored["params"]["head"]["bias"], expected)


def test_an_import_has_no_more_writes_than_those(exported, tmp_path, monkeypatch):
    moments = kill_at(monkeypatch, -1)
    assert bring(exported, tmp_path / "imported") == 0
    assert len(moments) == 6
    assert bring(exported, tmp_path / "imported") == 0
    assert len(moments) == 6


def test_a_repeated_import_is_done_and_anything_else_there_is_refused(
    exported, tmp_path, capsys
):
    workdir = tmp_path / "imported"
    assert bring(exported, workdir) == 0
    before = {path: path.read_bytes() for path in workdir.glob("*.json")}
    assert bring(exported, workdir) == 0
    assert "Already imported" in capsys.readouterr().out
    assert bring(exported, workdir, "--config.model.mean=(0.2,)") == 2
    assert "model.mean was [0.3], is [0.2]" in capsys.readouterr().err
    (workdir / "metrics.jsonl").touch()
    assert bring(exported, workdir) == 2
    assert "a run, got workdir=" in capsys.readouterr().err
    (workdir / "metrics.jsonl").unlink()
    (workdir / "config.json").rename(tmp_path / "config.json")
    (workdir / "evaluations.jsonl").touch()
    assert bring(exported, workdir) == 2
    assert "with evaluations.jsonl" in capsys.readouterr().err
    (workdir / "import.json").rename(tmp_path / "import.json")
    assert bring(exported, workdir) == 2
    assert "with evaluations.jsonl, checkpoints" in capsys.readouterr().err
    for name in ("config.json", "import.json"):
        (tmp_path / name).rename(workdir / name)
    assert {path: path.read_bytes() for path in workdir.glob("*.json")} == before
    (workdir / "evaluations.jsonl").unlink()
    with Checkpoints(workdir / "checkpoints" / "last") as checkpoints:
        checkpoints.save(3, {"trained": jnp.zeros(1)}, wait=True)
    assert bring(exported, workdir) == 2
    assert "with a checkpoint of step 3. Choose another" in capsys.readouterr().err


def test_export_and_import_read_no_images(exported, tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise AssertionError

    entry_of = datasets.entry_of

    def without_images(name):
        return entry_of(name)._replace(load=refuse)

    monkeypatch.setattr(datasets, "entry_of", without_images)
    workdir = tmp_path / "imported"
    assert bring(exported, workdir) == 0
    assert export(workdir, tmp_path / "again.safetensors") == 0
    model = PreActResNet(width=4, blocks=(1,))
    tensors = to_tensors(helpers.draw_variables(model, (32, 32, 3)), model)
    write_safetensors(tmp_path / "rgb.safetensors", Weights(tensors, {}))
    rgb = ("import", f"--input={tmp_path / 'rgb.safetensors'}", "--dataset=cifar10")
    assert helpers.main(*rgb, f"--workdir={tmp_path / 'rgb'}") == 0
    assert export(tmp_path / "rgb", tmp_path / "rgb2.safetensors") == 0
    weights = read_weights(tmp_path / "rgb2.safetensors")
    assert weights.metadata["mean"] == [0.4914, 0.4822, 0.4465]
    helpers.assert_same_bits(weights.tensors, tensors)


@pytest.mark.parametrize(
    ("dtype", "said"),
    [
        (np.float16, "tensors of float16 became float32, which holds their values."),
        (jnp.bfloat16, "tensors of bfloat16 became float32, which holds their values."),
        (np.float64, "tensors of float64 became float32, which moved 1 of "),
    ],
)
def test_floats_of_other_sizes_become_float32_and_it_is_said(
    dtype, said, exported, tmp_path, capsys
):
    path, workdir = tmp_path / "weights.safetensors", tmp_path / "imported"
    tensors = safetensors.numpy.load_file(exported)
    floats = {n: t.astype(dtype) for n, t in tensors.items() if t.dtype == np.float32}
    if dtype == np.float64:
        floats["bn.bias"] = floats["bn.bias"] + np.array([1e-12] + [0.0] * 7)
    save_with_bfloat16(floats, path)
    assert bring(path, workdir) == 0
    assert said in capsys.readouterr().out
    note = json.loads((workdir / "import.json").read_text())
    assert said in note["notes"][0]
    taken = read_weights(path).tensors
    assert {t.dtype for t in taken.values()} == {np.dtype(np.float32)}
    for name, tensor in taken.items():
        np.testing.assert_array_equal(tensor, floats[name].astype(np.float32))


def save_with_bfloat16(tensors, path):
    """Writes a safetensors file by hand: a header of JSON, and the bytes."""
    names = {np.float16: "F16", np.float64: "F64"}
    header, place = {}, 0
    for name, tensor in tensors.items():
        kind = names.get(tensor.dtype.type, "BF16")
        offsets = [place, place := place + tensor.nbytes]
        header[name] = {
            "dtype": kind,
            "shape": list(tensor.shape),
            "data_offsets": offsets,
        }
    text = json.dumps(header).encode()
    content = b"".join(tensor.tobytes() for tensor in tensors.values())
    path.write_bytes(len(text).to_bytes(8, "little") + text + content)


def lying(change):
    """A file of one tensor with its header changed."""
    entry = {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}
    text = json.dumps({"linear.weight": {**entry, **change}}).encode()
    return len(text).to_bytes(8, "little") + text + bytes(16)


HOSTILE = {
    "a shape beyond the file": lying({"shape": [2**40, 2**20]}),
    "a shape that overflows": lying({"shape": [2**63, 2]}),
    "offsets beyond the file": lying({"data_offsets": [0, 2**40]}),
    "offsets in reverse": lying({"data_offsets": [16, 0]}),
    "a negative shape": lying({"shape": [-2, 2]}),
    "another type": lying({"dtype": "F8_E4M3", "shape": [16]}),
    "no type": lying({"dtype": "??"}),
    "a header beyond the file": (2**62).to_bytes(8, "little") + b"{}",
    "a header of nothing": (0).to_bytes(8, "little"),
    "a header that is a list": (2).to_bytes(8, "little") + b"[]",
    "a deep header": (200_000).to_bytes(8, "little") + b"[" * 200_000,
    "no tensor": (2).to_bytes(8, "little") + b"{}",
    "not UTF-8": (4).to_bytes(8, "little") + b"\xff\xfe\x00\x00",
}


@pytest.mark.parametrize("content", HOSTILE.values(), ids=HOSTILE)
def test_a_header_that_lies_is_refused_in_one_line(content, tmp_path, capsys):
    path = tmp_path / "weights.safetensors"
    path.write_bytes(content)
    assert bring(path, tmp_path / "imported") == 2
    error = capsys.readouterr().err
    assert error.startswith("samrobust: error: Expected ")
    assert error.count("\n") == 1
    assert len(error) < 600


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("mean", "[NaN]"),
        ("mean", "[1e999]"),
        ("mean", "[" * 100_000),
        ("std", str([0.1] * 1000)),
        ("origin", '{"step": Infinity}'),
        ("blocks", "9" * 5000),
        ("width", ""),
    ],
)
def test_metadata_that_cannot_be_are_refused_in_one_line(
    name, text, exported, tmp_path, capsys
):
    path = tmp_path / "weights.safetensors"
    header = {"mean": "[0.3]", "std": "[0.3]", name: text}
    safetensors.numpy.save_file(safetensors.numpy.load_file(exported), path, header)
    assert bring(path, tmp_path / "imported") == 2
    error = capsys.readouterr().err
    assert error.startswith("samrobust: error: Expected ")
    assert error.count("\n") == 1
    assert len(error) < 800
    assert not (tmp_path / "imported").exists()


def test_what_is_no_file_is_refused_in_one_line(tmp_path, capsys):
    (tmp_path / "folder.safetensors").mkdir()
    (tmp_path / "loop.safetensors").symlink_to(tmp_path / "loop.safetensors")
    for name in ("folder", "loop", "nothing"):
        path = tmp_path / f"{name}.safetensors"
        assert bring(path, tmp_path / "imported") == 2
        assert "Expected an existing file of weights" in capsys.readouterr().err
