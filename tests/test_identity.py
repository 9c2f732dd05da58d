"""Whose result is it? Files of another run are never taken for this one's."""

import dataclasses
import json
import pathlib
import shutil

import helpers
import jax
import numpy as np
import pytest

import samrobust
from samrobust.data import Split
from samrobust.experiments import identity
from samrobust.experiments.identity import Identity, identity_of
from samrobust.experiments.interchange import export_weights
from samrobust.experiments.networks import load, load_network
from samrobust.experiments.run import run, train
from samrobust.system.files import WorkdirError
from samrobust.training.checkpoint import CheckpointError, Checkpoints
from samrobust.training.log import RunFolder, checkpoint_folder

pytestmark = pytest.mark.usefixtures("programs_made_once")

# Runs of the same shapes as the first, which is `st` with seed 0 and one epoch.
OTHERS = {
    "seed": ("st", {"seed": 1}, "seed is 1, not 0"),
    "learning rate": ("st", {"training.learning_rate": 0.2}, "learning_rate is 0.2"),
    "length": ("st", {"training.epochs": 2}, "training.epochs is 2, not 1"),
    "method": ("sam,rho=0.2", {}, "sam.rho is 0.2, not 0.0"),
    "data": ("st", {"data.split_seed": 5}, "data.split_seed is 5, not 0"),
}


@pytest.fixture(scope="module")
def dataset():
    return helpers.load_data(helpers.make_config())


@pytest.fixture(scope="module")
def runs(tmp_path_factory, dataset) -> dict[str, pathlib.Path]:
    """The first run and the others, each finished."""
    made = {}
    for name, (row, overrides, _) in {"first": ("st", {}, ""), **OTHERS}.items():
        config = helpers.make_config(row, {"training.epochs": 1, **overrides})
        made[name] = tmp_path_factory.mktemp(name.replace(" ", "-"))
        own = helpers.load_data(config) if name == "data" else dataset
        run(config, made[name], helpers.Silent(), dataset=own)
    return made


@pytest.fixture
def first(runs, tmp_path) -> pathlib.Path:
    """A copy of the first run."""
    return pathlib.Path(shutil.copytree(runs["first"], tmp_path / "run"))


def config_of_first():
    return helpers.make_config("st", {"training.epochs": 1})


def test_a_network_is_loaded_and_exported_with_the_data_of_its_training(tmp_path):
    """Whose mean and deviation are its own; built-in data need not be there."""
    digits = helpers.load_data(config_of_first())
    arrays = {
        **{f"x_{name}": getattr(digits, name).images for name in ("train", "test")},
        **{f"y_{name}": getattr(digits, name).labels for name in ("train", "test")},
    }
    file, workdir = tmp_path / "mine.npz", tmp_path / "run"
    np.savez(file, **arrays)
    fields = {"training.epochs": 1, "data.name": str(file)}
    fields |= {"data.train_size": None, "data.test_size": None}
    config = helpers.make_config("st", fields)
    run(config, workdir, helpers.Silent(), dataset=helpers.load_data(config))
    mean = load(workdir).model.mean
    np.savez(file, **arrays | {"x_train": 255 - arrays["x_train"]})
    for read in (load, lambda folder: export_weights(config, folder, "last")):
        with pytest.raises(CheckpointError, match=r"of this run, got .*: data is "):
            read(workdir)
    np.savez(file, **arrays)
    assert load(workdir).model.mean == mean


each_other = pytest.mark.parametrize("name", OTHERS)


@each_other
def test_the_result_of_another_run_is_refused_by_what_differs(
    runs, first, dataset, name
):
    shutil.copy(runs[name] / "result.json", first / "result.json")
    with pytest.raises(WorkdirError, match=OTHERS[name][2]):
        run(config_of_first(), first, helpers.Silent(), dataset=dataset)


@each_other
def test_checkpoints_of_another_run_are_refused_by_what_differs(
    runs, first, dataset, name
):
    """By those who go on with them, and by those who evaluate them."""
    (first / "result.json").unlink()
    shutil.rmtree(first / "checkpoints")
    shutil.copytree(runs[name] / "checkpoints", first / "checkpoints")
    config, message = config_of_first(), f"{OTHERS[name][2]}|missing="
    with pytest.raises(CheckpointError, match=message):
        train(config, dataset, first)
    with pytest.raises(CheckpointError, match=message):
        load_network(config, dataset, first, "last")


@pytest.mark.parametrize("name", ["config.source.mine", "data", "random", "test"])
def test_a_process_whose_inputs_are_not_those_of_process_0_is_refused(
    first, dataset, monkeypatch, name
):
    """Also where the run has finished, and nothing is trained."""
    monkeypatch.setattr(identity, "is_joined", lambda: True)
    of_primary = {name: "another"}
    monkeypatch.setattr(
        identity, "broadcast_from_primary", lambda inputs: inputs() | of_primary
    )
    config, message = config_of_first(), f"in all processes, got .*'{name}': .'another"
    with pytest.raises(ValueError, match=message):
        run(config, first, helpers.Silent(), dataset=dataset)
    with pytest.raises(ValueError, match=message):
        load_network(config, dataset, first, "last")


@each_other
def test_a_workdir_without_its_config_is_refused_whatever_is_asked_of_it(
    runs, dataset, name, tmp_path
):
    copy = pathlib.Path(shutil.copytree(runs[name], tmp_path / "run"))
    (copy / "config.json").unlink()
    before = sorted(copy.rglob("*"))
    with pytest.raises(WorkdirError, match=r"Expected a config\.json beside result"):
        run(config_of_first(), copy, helpers.Silent(), dataset=dataset)
    assert [path for path in before if not path.exists()] == []


def test_the_table_does_not_take_the_result_of_another_run(runs, tmp_path, capsys):
    workdir = tmp_path / "table"
    folder = workdir / "st" / "seed0"
    shutil.copytree(runs["first"], folder)
    shutil.copy(runs["seed"] / "result.json", folder / "result.json")
    code = helpers.main(
        *("table", "--rows=st", "--collect", f"--workdir={workdir}"),
        *helpers.make_flags({"training.epochs": 1}),
    )
    assert code == 2
    output = " ".join(capsys.readouterr().out.split())
    assert "seed is 1, not 0" in output


def test_the_same_config_on_other_data_is_another_run(first, dataset):
    """As where a directory of data was replaced by another."""
    flipped = dataset.train.images[:, :, ::-1].copy()
    other = dataclasses.replace(dataset, train=Split(flipped, dataset.train.labels))
    config = config_of_first()
    with pytest.raises(WorkdirError, match=r"got another's: data is '\w+\+\w+', not"):
        run(config, first, helpers.Silent(), dataset=other)
    with pytest.raises(CheckpointError, match="data is"):
        train(config, other, first)


def test_other_means_in_the_same_file_make_another_run(tmp_path):
    """The name of data of one's own does not say them."""
    path, images = tmp_path / "own.npz", np.arange(40 * 64).reshape(40, 8, 8, 1)
    arrays = {
        name: (images % 251).astype(np.uint8) if name[0] == "x" else np.arange(40) % 4
        for name in ("x_train", "y_train", "x_test", "y_test")
    }

    def dataset_with(mean):
        np.savez(path, allow_pickle=False, **arrays, mean=[mean], std=[0.25])
        return helpers.load_data(config)

    config = helpers.make_config(
        "st",
        {"training.epochs": 1, "training.batch_size": 20, "data.name": str(path)}
        | {"data.train_size": 40, "data.test_size": 40},
    )
    run(config, tmp_path / "run", helpers.Silent(), dataset=dataset_with(0.5))
    again = run(config, tmp_path / "run", helpers.Silent(), dataset=dataset_with(0.5))
    changed = dataset_with(0.25)
    message = r"data is '\w+\+\w+ mean 0\.5 std 0\.25', not '.* mean 0\.25 std"
    with pytest.raises(WorkdirError, match=message):
        run(config, tmp_path / "run", helpers.Silent(), dataset=changed)
    with pytest.raises(CheckpointError, match=message):
        train(config, changed, tmp_path / "run")
    with pytest.raises(CheckpointError, match=message):
        samrobust.load(tmp_path / "run")
    now = identity_of(config, changed)
    before = dataclasses.replace(now, data=(now.data or "").partition(" mean")[0])
    assert before.unlike(now) == "" == now.unlike(before)  # of an older version
    assert again["identity"] != now.hash


def test_a_result_on_other_test_images_is_refused(first, dataset):
    test = Split(dataset.test.images, np.roll(dataset.test.labels, 1))
    other = dataclasses.replace(dataset, test=test)
    with pytest.raises(WorkdirError, match="on the test images at hand"):
        run(config_of_first(), first, helpers.Silent(), dataset=other)


def test_a_checkpoint_that_says_not_of_which_run_it_is_is_refused(first, dataset):
    folder = checkpoint_folder(first, "last")
    config = config_of_first()
    state = load_network(config, dataset, first, "last").variables
    shutil.rmtree(folder)
    with Checkpoints(folder) as checkpoints:
        checkpoints.save(3, state, {"epoch_seconds": 0.0}, wait=True)
    with pytest.raises(CheckpointError, match="it does not say of which"):
        load_network(config, dataset, first, "last")


def damage_newest(workdir: pathlib.Path) -> None:
    step = helpers.checkpoint_steps(workdir)[-1]
    for path in (workdir / "checkpoints" / "last" / str(step)).rglob("d/*"):
        path.write_bytes(bytes(path.stat().st_size))


@pytest.mark.parametrize("damage", [damage_newest, lambda w: remove_newest(w)])
def test_an_older_step_of_a_finished_run_is_evaluated_only_where_it_is_named(
    dataset, tmp_path, damage
):
    config = config_of_first()
    config.checkpoint.minutes = 0.0
    expected = run(config, tmp_path, helpers.Silent(), dataset=dataset)
    assert expected["step"] == 3
    damage(tmp_path)
    with pytest.raises(CheckpointError, match=r"--step names it\.$"):
        load_network(config, dataset, tmp_path, "last")
    older = helpers.checkpoint_steps(tmp_path)[0]
    network = load_network(config, dataset, tmp_path, "last", step=older)
    assert (network.step, network.identity.hash) == (older, expected["identity"])


def remove_newest(workdir: pathlib.Path) -> None:
    step = helpers.checkpoint_steps(workdir)[-1]
    shutil.rmtree(workdir / "checkpoints" / "last" / str(step))


def test_every_number_names_step_and_identity(first):
    result = json.loads((first / "result.json").read_text())
    assert helpers.main("evaluate", f"--workdir={first}", "--norm=linf") == 0
    (line,) = helpers.read_lines(first / "evaluations.jsonl")
    for key in ("step", "identity", "images"):
        assert line[key] == result[key], key
    assert line["provenance"]["jax"] == jax.__version__
    assert len(result["identity"]) == 16


def test_64_bit_types_switched_on_outside_change_no_number(first):
    before = json.loads((first / "result.json").read_text())["accuracy"]
    jax.config.update("jax_enable_x64", True)
    try:
        assert helpers.main("evaluate", f"--workdir={first}") == 0
    finally:
        jax.config.update("jax_enable_x64", False)
    (line,) = helpers.read_lines(first / "evaluations.jsonl")
    assert line["accuracy"] == before


def test_another_generator_of_random_numbers_makes_another_run(dataset):
    identity = identity_of(config_of_first(), dataset)
    other = dataclasses.replace(identity, random="0" * 24)
    assert "JAX_DEFAULT_PRNG_IMPL" in other.unlike(identity)
    assert other.unlike(identity, draws=False) == ""
    assert other.hash != identity.hash


def test_another_generator_trains_no_further_but_reads_the_network(
    first, dataset, monkeypatch
):
    monkeypatch.setattr("samrobust.experiments.identity.random_bits", lambda: "0" * 24)
    config = config_of_first()
    assert load_network(config, dataset, first, "last").step == 3
    with pytest.raises(CheckpointError, match="JAX_DEFAULT_PRNG_IMPL"):
        train(config, dataset, first)


def test_what_cannot_be_added_to_is_found_out_before_the_attack(
    first, capsys, monkeypatch
):
    monkeypatch.setattr("samrobust.experiments.scoring.Scorer", pytest.fail)
    (first / "evaluations.jsonl").mkdir()
    assert helpers.main("evaluate", f"--workdir={first}") == 2
    assert "Expected a writable directory" in capsys.readouterr().err


def test_an_error_on_its_way_is_not_hidden_by_that_of_a_pending_write(
    dataset, tmp_path, monkeypatch
):
    def fail(_):
        raise CheckpointError("a full disk")

    config = config_of_first()
    identity = identity_of(config, dataset)
    monkeypatch.setattr(Checkpoints, "close", fail)
    with (
        pytest.raises(KeyError, match="the first"),
        RunFolder(tmp_path, identity=identity),
    ):
        raise KeyError("the first")
    with (
        pytest.raises(CheckpointError, match="full disk"),
        RunFolder(tmp_path, identity=identity),
    ):
        pass


def test_a_config_file_of_the_same_name_in_the_way_changes_nothing(
    tmp_path, monkeypatch
):
    (helpers.make_folder(tmp_path / "configs") / "base.py").write_text("LR = 3")
    monkeypatch.chdir(tmp_path)
    assert helpers.make_config("st").training.momentum == 0.9


def test_a_run_that_ends_at_equal_bits_is_another_run_than_one_that_need_not():
    usual, exact = (
        identity_of(helpers.make_config("st", {"training.deterministic": value}), None)
        for value in (False, True)
    )
    assert exact.unlike(usual) == "training.deterministic is True, not False"
    del usual.config["training"]["deterministic"]  # as older versions left it
    assert exact.unlike(usual) == "training.deterministic is True, not False"


def test_a_run_that_goes_on_with_other_libraries_keeps_its_identity_and_says_so(
    dataset,
):
    begun = identity_of(config_of_first(), dataset)
    (versions,) = begun.versions
    later = dataclasses.replace(begun, versions=({**versions, "jax": "99.0"},))
    assert begun.unlike(later) == ""
    both = later.resumed(begun.as_dict())
    assert [v["jax"] for v in both.versions] == [jax.__version__, "99.0"]
    assert both.hash == begun.hash != later.hash
    assert later.resumed(both.as_dict()) == both
    assert Identity.from_dict(json.loads(json.dumps(both.as_dict()))) == both
