"""`samrobust export` and `import` without PyTorch: safetensors, workdirs, refusals."""

import hashlib
import json
import sys

import helpers
import jax
import numpy as np
import pytest
import safetensors
import safetensors.numpy

from samrobust import configuration
from samrobust.interchange import (
    Weights,
    read_weights,
    write_safetensors,
)
from samrobust.interchange.robustbench import find_evaluation
from samrobust.training import load_network, save_variables

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
    assert weights.metadata == first.metadata


def test_an_imported_network_is_evaluated_as_the_run_it_came_from(
    run, exported, tmp_path, capsys
):
    workdir = tmp_path / "imported"
    assert bring(exported, workdir, "--config.data.test_size=60") == 0
    flags = ("--norm=linf", "--epsilon=8", "--num-steps=1", "--num-examples=60")
    accuracy = []
    for folder in (workdir, run[0]):
        with helpers.quick_compilation():
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
    with helpers.quick_compilation():
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


def test_the_command_line_has_the_last_word_on_mean_and_std(exported, tmp_path):
    workdir = tmp_path / "imported"
    assert bring(exported, workdir, "--config.model.mean=(0.25,)") == 0
    model = json.loads((workdir / "config.json").read_text())["model"]
    assert model["mean"] == [0.25]


def test_a_workdir_that_holds_a_run_is_refused(run, exported, capsys):
    before = sorted(path.name for path in run[0].iterdir())
    assert bring(exported, run[0]) == 2
    assert "Expected a --workdir without a run" in capsys.readouterr().err
    assert sorted(path.name for path in run[0].iterdir()) == before


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
        ("bn.bias", np.zeros(8, np.float16), "Expected float32 tensors"),
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
        ({"mean": [0.5, 0.5], "std": [1.0]}, "Expected one mean or one a channel (1)"),
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
    assert "0 < each value of model.std" in capsys.readouterr().err


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
    assert find_evaluation([full, coarse, few], "last", "float32") is full
    assert find_evaluation([full, unnamed], "last", "float32") is unnamed
    assert find_evaluation([full, unnamed], "last", "bfloat16") is full
    assert find_evaluation([coarse], "last", "float32") is None
    assert find_evaluation([full], "best", "float32") is None
