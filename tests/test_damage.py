"""A damaged file of a run gives the right number, or a line that says what is wrong.

Every file of a finished and of a half-finished run is damaged in every way of a table.
What is read from it afterwards must be what was written, bit for bit, or be refused in
one line: never another number.
"""

import contextlib
import dataclasses
import pathlib
import shutil
import warnings
from collections.abc import Callable
from typing import Any

import helpers
import jax
import numpy as np
import pytest

from samrobust.experiments.building import make_training
from samrobust.experiments.identity import identity_of
from samrobust.experiments.networks import load_network
from samrobust.experiments.run import run, train
from samrobust.experiments.survey import survey_run
from samrobust.experiments.workdir import config_of_run, read_result, settle_config
from samrobust.system.files import WorkdirError, append_json_line
from samrobust.training import InterruptedRunError
from samrobust.training.checkpoint import CheckpointError
from samrobust.training.epoch import LoopState
from samrobust.training.log import RunFolder

pytestmark = pytest.mark.usefixtures("programs_made_once")

REFUSED = (WorkdirError, CheckpointError)


@dataclasses.dataclass
class Made:
    """A run as it was left, and another of the same shapes, seed 1."""

    config: Any
    dataset: Any
    workdir: pathlib.Path
    other: pathlib.Path
    states: dict[int, Any]


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Made:
    """A run with its result, and an evaluation."""

    def finish(seed: int) -> pathlib.Path:
        config = helpers.make_config("st", {"training.epochs": 1, "seed": seed})
        workdir = tmp_path_factory.mktemp(f"finished{seed}")
        result = run(config, workdir, helpers.Silent(), dataset=dataset)
        append_json_line(workdir / "evaluations.jsonl", {"step": result["step"]})
        return workdir

    config = helpers.make_config("st", {"training.epochs": 1})
    dataset = helpers.load_data(config)
    workdir = finish(0)
    state = load_network(config, dataset, workdir, "last").variables
    return Made(config, dataset, workdir, finish(1), {3: state})


@pytest.fixture(scope="module")
def half_finished(tmp_path_factory) -> Made:
    """A run that was stopped after two checkpoints, steps 4 and 5 of 12."""
    config = helpers.make_config("st", {"checkpoint.minutes": 0.0})
    dataset = helpers.load_data(config)

    def stop(seed: int) -> pathlib.Path:
        config = helpers.make_config("st", {"checkpoint.minutes": 0.0, "seed": seed})
        workdir = tmp_path_factory.mktemp(f"half{seed}")
        settle_config(workdir, config)
        answers = iter([False] * 4)
        with contextlib.suppress(InterruptedRunError):
            train(config, dataset, workdir, should_stop=lambda: next(answers, True))
        return workdir

    made = Made(config, dataset, stop(0), stop(1), {})
    for step in helpers.checkpoint_steps(made.workdir):
        alone = tmp_path_factory.mktemp("alone")
        source = made.workdir / "checkpoints" / "last" / str(step)
        shutil.copytree(source, alone / "checkpoints" / "last" / str(step))
        made.states[step] = go_on(made, alone)[0]
    assert sorted(made.states) == [4, 5]
    return made


def flip(content: bytes, place: float) -> bytes:
    changed = bytearray(content)
    if changed:
        changed[int(place * (len(changed) - 1))] ^= 4
    return bytes(changed)


# What becomes of a file's content; of a name alone, see `damage_file`.
DAMAGES: dict[str, Callable[[bytes], bytes] | None] = {
    "removed": None,
    "a folder": None,
    "a link to nowhere": None,
    "of another run": None,
    "empty": lambda content: content[:0],
    "cut in half": lambda content: content[: len(content) // 2],
    "without its last bytes": lambda content: content[:-2],
    "zeros": lambda content: bytes(len(content)),
    "noise": lambda content: np.random.default_rng(0).bytes(len(content)),
    "first byte flipped": lambda content: flip(content, 0.0),
    "middle byte flipped": lambda content: flip(content, 0.5),
    "byte flipped further on": lambda content: flip(content, 0.8),
    "twice": lambda content: content + content,
    "with more behind it": lambda content: content + b'{"accuracy": 100',
    "a list": lambda content: b"[]" + content[:0],
    "an empty object": lambda content: b"{}" + content[:0],
    "a number": lambda content: b"3" + content[:0],
    "NaN": lambda content: b'{"accuracy": NaN, "step": NaN}' + content[:0],
}


def damage_file(path: pathlib.Path, damage: str, twin: pathlib.Path) -> None:
    change = DAMAGES[damage]
    content = twin.read_bytes() if damage == "of another run" else path.read_bytes()
    path.unlink()
    if damage == "a folder":
        path.mkdir()
    elif damage == "a link to nowhere":
        path.symlink_to("nowhere")
    elif damage != "removed":
        path.write_bytes(content if change is None else change(content))


EACH = pytest.mark.parametrize("damage", DAMAGES)


def files_of(workdir: pathlib.Path, inside: str = "") -> list[pathlib.Path]:
    """All files of a run that are read, relative to its workdir.

    Claims are not part of it; older checkpoints are read only where the newest one is
    damaged.
    """
    left_out = {".claim", *map(str, helpers.checkpoint_steps(workdir)[:-1])}
    found = (p.relative_to(workdir) for p in sorted(workdir.rglob("*")) if p.is_file())
    return [p for p in found if inside in str(p) and left_out.isdisjoint(p.parts)]


def twin_of(made: Made, file: pathlib.Path) -> pathlib.Path:
    """The same file of the other run; of what has a random name, its only neighbor."""
    twin = made.other / file
    return twin if twin.exists() else sorted(twin.parent.iterdir())[0]


@contextlib.contextmanager
def refused_in_a_line():
    """Lets a refusal pass that a user can read."""
    refusals = []
    try:
        yield
    except REFUSED as error:
        refusals.append(str(error))
    assert [text for text in refusals if "\n" in text or len(text) > 1000] == []


def each_damaged(made: Made, damage: str, tmp_path: pathlib.Path, inside: str):
    """Copies of the run, each with one damaged file; yields the copy and the file."""
    for number, file in enumerate(files_of(made.workdir, inside)):
        copy = pathlib.Path(shutil.copytree(made.workdir, tmp_path / str(number)))
        damage_file(copy / file, damage, twin_of(made, file))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # skipped checkpoints are said
            yield copy, file
        shutil.rmtree(copy)


def go_on(made: Made, workdir: pathlib.Path) -> tuple[LoopState, int, list[Any]]:
    """The state that a training would go on from, the step, and the log so far."""
    key = jax.eval_shape(lambda: jax.random.key(0))
    like = jax.eval_shape(make_training(made.config, made.dataset, 1).begin, key)
    fresh = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), like)
    identity = identity_of(made.config, made.dataset)
    with RunFolder(workdir, identity=identity) as history:
        carry = history.restore(fresh, 12)
        return carry, int(carry.state.step), history.lines


@EACH
def test_the_network_of_a_finished_run_is_read_as_it_was_written_or_not_at_all(
    finished, damage, tmp_path
):
    read = 0
    for copy, file in each_damaged(finished, damage, tmp_path, ""):
        with refused_in_a_line():
            network = load_network(finished.config, finished.dataset, copy, "last")
            helpers.assert_same_bits(network.variables, finished.states[3])
            assert network.step == 3, file
            read += 1
    assert read >= 1  # from undamaged checkpoints, whatever else is damaged


@EACH
def test_the_result_of_a_finished_run_is_read_as_it_was_written_or_not_at_all(
    finished, damage, tmp_path
):
    identity = identity_of(finished.config, finished.dataset)
    expected = read_result(finished.workdir, identity)
    for copy, file in each_damaged(finished, damage, tmp_path, ".json"):
        with refused_in_a_line():
            settle_config(copy, finished.config)
            result = read_result(copy, identity)
            gone = file.name == "result.json" and not (copy / file).is_file()
            assert result == (None if gone else expected), file
        survey_run(copy)  # never raises


@EACH
def test_a_half_finished_run_goes_on_from_what_it_saved_or_not_at_all(
    half_finished, damage, tmp_path
):
    for copy, file in each_damaged(half_finished, damage, tmp_path, ""):
        with refused_in_a_line():
            settle_config(copy, half_finished.config)
            carry, step, lines = go_on(half_finished, copy)
            helpers.assert_same_bits(carry, half_finished.states[step])
            assert [line["step"] for line in lines] == [3], file
            config_of_run(copy)
        survey_run(copy)


def test_a_log_that_is_lost_after_the_training_costs_nothing(finished, tmp_path):
    copy = pathlib.Path(shutil.copytree(finished.workdir, tmp_path / "run"))
    before = (copy / "metrics.jsonl").read_bytes()
    expected = run(finished.config, copy, helpers.Silent(), dataset=finished.dataset)
    for name in ("metrics.jsonl", "result.json"):
        (copy / name).unlink()
    result = run(finished.config, copy, helpers.Silent(), dataset=finished.dataset)
    assert (copy / "metrics.jsonl").read_bytes() == before
    for key in ("accuracy", "step_seconds", "identity", "step", "images"):
        assert result[key] == expected[key]
