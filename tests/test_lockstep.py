"""Several seeds in one program: each as its lone run, whatever befalls the others."""

import concurrent.futures
import dataclasses
import functools
import json
import shutil
import signal
import sys
import time
import types
from pathlib import Path
from typing import Any

import helpers
import jax
import jax.numpy as jnp
import optax
import pytest
from flax import linen as nn

from samrobust import sharpness
from samrobust.attacks import linf, pgd
from samrobust.experiments import sweep, tracking
from samrobust.experiments.reporting import progress
from samrobust.experiments.run import PlannedRun
from samrobust.training import (
    InterruptedRunError,
    RunFolder,
    RunLog,
    TrainingDivergedError,
    as_adversary,
    fit,
    make_train_step,
)
from samrobust.training.averaging.ema import ema
from samrobust.training.epoch import EpochRunner
from samrobust.training.lockstep import Lockstep

pytestmark = pytest.mark.usefixtures("programs_made_once")

SPLIT = helpers.make_split(20, side=4)
NUM_STEPS = 6  # of two epochs: 2 steps in a call, then an incomplete batch
CALLS = [0, 2, 3, 5]  # the steps at which they begin


class Network(nn.Module):
    """A network with all that a state may hold: statistics, and dropout's draws."""

    @nn.compact
    def __call__(self, images, *, train):
        x = nn.Dense(4)(images.reshape(len(images), -1))
        x = nn.BatchNorm(use_running_average=not train, momentum=0.9)(x)
        x = nn.Dropout(0.3, deterministic=not train)(nn.relu(x))
        return nn.Dense(10)(x)


@functools.cache
def method(name: str) -> Any:
    """A method by its name, of which the last has all parts at once."""
    network, parts = Network(), {}
    images = jnp.zeros((1, 4, 4, 1))
    variables = network.init(jax.random.key(0), images, train=False)
    ascent = sharpness.sam(0.1, aux=variables["batch_stats"])
    attack = pgd(linf(0.1), step_size=0.05, num_steps=2)
    if name.startswith("at"):
        parts["adversary"] = as_adversary(attack)
    if name.endswith("ema"):
        parts["averaging"] = ema(0.5)
    sgd = optax.sgd(0.1, momentum=0.9)
    tx = optax.chain(ascent, sgd) if "sam" in name else sgd
    return make_train_step(network, tx, **parts)


def train(seed: int, name: str = "st", **options: Any) -> Any:
    """Trains for two epochs, alone or with a companion."""
    sizes = {"epochs": 2, "batch_size": 8, "flip": True}
    sizes["drop_remainder"] = name != "st"  # one program less
    options = {**sizes, "steps_per_call": 2, **options}
    return fit(method(name), SPLIT, key=jax.random.key(seed), **options)


@functools.cache
def alone(seed: int, name: str = "st") -> tuple[Any, list[Any]]:
    """The final state of a lone run, and its log without timings."""
    log = RunLog()
    state = train(seed, name, log=log).state
    return state, list(map(helpers.without_timings, log.lines))


def together(*runs: Any, **options: Any) -> list[Any]:
    """Runs functions of a companion in lockstep: what they return or raise."""
    lockstep = Lockstep(len(runs), **options)

    def join(run: Any) -> Any:
        with lockstep.joined() as companion:
            try:
                return run(companion=companion, should_stop=companion.should_stop)
            except Exception as error:
                return error

    with concurrent.futures.ThreadPoolExecutor(len(runs)) as pool:
        return list(pool.map(join, runs))


@pytest.fixture
def calls(monkeypatch) -> list[list[int]]:
    """The steps at which runs were, call by call."""
    for seed in (3, 5):
        alone(seed)  # whose calls are none of the test's
    found, run_each = [], EpochRunner.run_each

    def noted(self, chunk, turns):
        found.append([int(turn.carry.state.step) for turn in turns])
        return run_each(self, chunk, turns)

    monkeypatch.setattr(EpochRunner, "run_each", noted)
    return found


# Each is its lone run.


@pytest.mark.parametrize("name", ["st", "at+sam+ema"])
def test_each_seed_ends_at_the_bits_of_its_lone_run(name, calls):
    expected = [alone(seed, name) for seed in (3, 5)]
    calls.clear()
    logs = [RunLog(), RunLog()]
    outcomes = together(
        *(
            functools.partial(train, seed, name, log=log)
            for seed, log in zip((3, 5), logs, strict=True)
        )
    )
    for outcome, log, (state, lines) in zip(outcomes, logs, expected, strict=True):
        helpers.assert_same_bits(outcome.state, state)
        assert list(map(helpers.without_timings, log.lines)) == lines
    assert calls == [[step, step] for step in (CALLS if name == "st" else (0, 2))]
    assert helpers.as_bits(expected[0][0]) != helpers.as_bits(expected[1][0])


def test_the_images_are_on_the_device_once():
    counts = []

    def on_progress(_: Any) -> None:
        shapes = [array.shape for array in jax.live_arrays()]
        counts.append(shapes.count(SPLIT.images.shape))

    run = functools.partial(train, on_progress=on_progress)
    together(*(functools.partial(run, seed) for seed in (3, 5)))
    assert max(counts) == 1


@pytest.fixture
def take(monkeypatch) -> Any:
    """A clock's hand: a call of the device takes 10 seconds, a new program 9000."""
    now, run_each, compile_chunk = [0.0], EpochRunner.run_each, EpochRunner.compile
    clock = types.SimpleNamespace(monotonic=lambda: now[0])
    monkeypatch.setattr(sys.modules["samrobust.training.lockstep"], "time", clock)

    def take(seconds: float) -> dict[str, float]:
        now[0] += seconds
        return {"score": 0.0}

    def timed(self, chunk, turns):
        take(10.0)
        return run_each(self, chunk, turns)

    def compiled(self, chunk, carries):
        take(0.0 if (chunk, len(carries)) in self._compiled else 9000.0)
        return compile_chunk(self, chunk, carries)

    monkeypatch.setattr(EpochRunner, "run_each", timed)
    monkeypatch.setattr(EpochRunner, "compile", compiled)
    return take


@pytest.mark.parametrize("validates", [False, True])
def test_the_seconds_of_an_epoch_are_each_runs_share_of_its_calls(validates, take):
    logs = [RunLog(), RunLog()]

    def trained_and_judged(seed: int, **companion: Any) -> None:
        validate = (lambda _: take(100.0)) if validates else None
        train(seed, log=logs[seed], validate=validate, **companion)
        take(1000.0)

    together(*(functools.partial(trained_and_judged, seed) for seed in (0, 1)))
    shares = [[line["seconds"] for line in log.lines] for log in logs]
    assert [sum(share) for share in shares] == [20, 20]  # four calls of both
    assert shares == [[10, 10]] * 2 or not validates


@pytest.mark.usefixtures("take")
def test_the_seconds_of_a_run_that_goes_on_alone_are_all_of_its_calls():
    log, score = RunLog(), lambda _: {"score": 0.0}
    first = functools.partial(train, 0, epochs=1)
    together(first, functools.partial(train, 1, log=log, validate=score))
    assert [line["seconds"] for line in log.lines] == [10, 20]


# Stopped, killed, resumed.


def stop_after(count: int) -> Any:
    """A question that is answered with yes after so many times."""
    answers = iter([False] * count)
    return lambda: next(answers, True)


def folder_run(seed: int, folder: Path, **options: Any) -> Any:
    log = RunFolder(folder / str(seed), minutes=60)
    return functools.partial(train, seed, log=log, **options)


def assert_all_as_alone(outcomes: list[Any], seeds: tuple[int, ...] = (3, 5)) -> None:
    for outcome, seed in zip(outcomes, seeds, strict=True):
        helpers.assert_same_bits(outcome.state, alone(seed)[0])


def test_a_stop_finds_all_at_one_step_and_they_go_on_from_there(tmp_path, calls):
    runs = [folder_run(seed, tmp_path) for seed in (3, 5)]
    # Two programs are compiled first.
    outcomes = together(*runs, should_stop=stop_after(3))
    for outcome in outcomes:
        assert isinstance(outcome, InterruptedRunError)
        assert "at step 3 of 6" in str(outcome)
    again = together(*(folder_run(seed, tmp_path) for seed in (3, 5)))
    assert_all_as_alone(again)
    assert calls == [[step, step] for step in CALLS]


@pytest.mark.parametrize("seeds", [(3,), (3, 5)])
def test_what_was_begun_together_goes_on_alone(tmp_path, seeds):
    together(
        *(folder_run(seed, tmp_path) for seed in (3, 5)), should_stop=stop_after(3)
    )
    assert_all_as_alone([folder_run(seed, tmp_path)() for seed in seeds], seeds)


def test_what_was_begun_alone_is_caught_up_with_and_goes_on_together(tmp_path, calls):
    with pytest.raises(InterruptedRunError, match="at step 3 of 6"):
        folder_run(3, tmp_path, should_stop=stop_after(1))()
    calls.clear()
    outcomes = together(*(folder_run(seed, tmp_path) for seed in (3, 5)))
    assert_all_as_alone(outcomes)
    assert calls == [[0], [2], [3, 3], [5, 5]]


def test_a_run_that_has_ended_is_waited_for_no_longer(tmp_path, calls):
    folder_run(3, tmp_path)()
    calls.clear()
    assert_all_as_alone(together(*(folder_run(seed, tmp_path) for seed in (3, 5))))
    assert calls == [[step] for step in CALLS]


def test_checkpoints_are_due_at_the_same_steps(tmp_path):
    times: dict[int, list[float]] = {3: [], 5: []}

    def run(seed: int, **how: Any) -> Any:
        clock = how["companion"].clock
        how["on_progress"] = lambda _: times[seed].append(clock())
        folder = tmp_path / str(seed)
        log = RunFolder(folder, minutes=1e-4, keep=99, clock=clock)
        return train(seed, log=log, **how)

    together(*(functools.partial(run, seed) for seed in (3, 5)))
    first, second = (helpers.checkpoint_steps(tmp_path / str(i)) for i in (3, 5))
    assert first[-1] == NUM_STEPS
    assert second == first
    assert times[3][1:] == times[5][1:]  # once both have begun
    assert len(set(times[3])) > len(CALLS)


# What befalls one.


class Poisoned(RunLog):
    """A log whose run resumes from numbers that are not finite."""

    def restore(self, fresh: Any, num_steps: int) -> Any:
        del num_steps
        params = jax.tree.map(lambda leaf: leaf * jnp.nan, fresh.state.params)
        state = dataclasses.replace(fresh.state, params=params)
        return dataclasses.replace(fresh, state=state)


def test_a_seed_that_diverges_takes_no_other_with_it(calls):
    runs = (functools.partial(train, 3), functools.partial(train, 5, log=Poisoned()))
    good, bad = together(*runs)
    assert isinstance(bad, TrainingDivergedError)
    helpers.assert_same_bits(good.state, alone(3)[0])
    # Until the totals of its epoch are read, while the next one begins.
    assert calls == [[0, 0], [2, 2], [3, 3], [5]]


def test_a_run_that_fails_before_it_trains_is_left_out(calls):
    def fail(**_: Any) -> None:
        raise OSError(28, "No space left on device")

    good, bad = together(functools.partial(train, 3), fail)
    assert isinstance(bad, OSError)
    helpers.assert_same_bits(good.state, alone(3)[0])
    assert calls == [[step] for step in CALLS]


def test_a_program_that_cannot_run_fails_all_of_its_runs(monkeypatch):
    def fail(*_: Any) -> None:
        raise MemoryError("RESOURCE_EXHAUSTED")

    monkeypatch.setattr(EpochRunner, "run_each", fail)
    outcomes = together(*(functools.partial(train, seed) for seed in (3, 5)))
    assert [type(outcome) for outcome in outcomes] == [MemoryError] * 2


# Tables.


def planned(folder: Path, names: list[str]) -> list[Any]:
    """Runs `row/seed`, of which those that end in ! are finished."""
    found = []
    for name in names:
        row, seed = name.rstrip("!").split("/")
        config = helpers.make_config(row, {"seed": int(seed)})
        found.append(PlannedRun(config, folder / row / seed))
        if name.endswith("!"):
            found[-1].workdir.mkdir(parents=True)
            (found[-1].workdir / "result.json").touch()
    return found


def test_seeds_of_a_row_that_are_not_finished_are_taken_together(tmp_path):
    names = ["st/0!", "sam,rho=0.2/0", "st/1", "sam,rho=0.2/1", "st/2", "st/3", "st/4"]
    groups = sweep._groups(planned(tmp_path, names), 3)
    found = [[p.workdir.relative_to(tmp_path).as_posix() for p in g] for g in groups]
    assert found == [
        ["st/0"],
        ["sam,rho=0.2/0", "sam,rho=0.2/1"],
        ["st/1", "st/2", "st/3"],
        ["st/4"],
    ]


def make_arguments(workdir: Path, *others: str) -> list[str]:
    return [
        *("table", "--config=configs/digits.py", f"--workdir={workdir}", "--rows=st"),
        *("--seeds=3", *others, *helpers.make_flags({"training.epochs": 2})),
    ]


def test_the_progress_of_several_seeds_in_a_program_goes_forward(
    tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(progress, "_SECONDS_BETWEEN_LINES", 0.0)
    assert helpers.main(*make_arguments(tmp_path, "--seeds-per-program=3")) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if ", eta " in line]
    shares = [int(line.partition("%")[0]) for line in lines]
    assert shares[0] == 0
    assert shares == sorted(shares)
    assert shares[-1] == 100
    for seed in range(3):
        assert any(f"seed {seed}: training" in line for line in lines)
    assert not any("eta -" in line for line in lines if not line.startswith("  0%"))


def test_a_table_of_several_seeds_in_a_program_is_that_of_lone_runs(tmp_path, calls):
    assert helpers.main(*make_arguments(tmp_path / "alone")) == 0
    lone, calls[:] = list(calls), []
    words = make_arguments(tmp_path / "together", "--seeds-per-program=2")
    assert helpers.main(*words) == 0
    assert lone == [[step] for step in range(6)] * 3
    assert calls == [[step, step] for step in range(6)] + [[s] for s in range(6)]
    for seed in range(3):
        run, expected = (
            tmp_path / name / "st" / f"seed{seed}" for name in ("together", "alone")
        )
        leaves = helpers.read_checkpoint(expected)
        helpers.assert_same_bits(helpers.read_checkpoint(run), leaves)
        assert helpers.log_of(run) == helpers.log_of(expected)
        result, other = (
            json.loads((p / "result.json").read_text()) for p in (run, expected)
        )
        assert result.keys() == other.keys()
        assert result["accuracy"] == other["accuracy"]
        assert result["run"] == other["run"]
    tables = [
        (tmp_path / name / "table.csv").read_text() for name in ("together", "alone")
    ]
    assert tables[0] == tables[1]


@pytest.mark.slow
def test_a_command_that_is_stopped_and_killed_ends_at_the_bits_of_lone_runs(tmp_path):
    words = ["table", "--config=configs/digits.py", "--rows=st", "--seeds=2"]
    words += helpers.make_flags({"training.epochs": 100})  # 300 steps
    lone, workdir = (tmp_path / name for name in ("lone", "together"))
    assert helpers.run_command(*words, f"--workdir={lone}")[0] == 0
    words += ["--seeds-per-program=2", f"--workdir={workdir}"]
    folders = [workdir / "st" / f"seed{seed}" for seed in (0, 1)]

    def disturb(end: signal.Signals) -> int:
        before = [max(helpers.checkpoint_steps(f), default=0) for f in folders]
        process = helpers.start_command(*words, "--config.checkpoint.minutes=0")
        while process.poll() is None:
            newest = [max(helpers.checkpoint_steps(f), default=0) for f in folders]
            if all(now > then for now, then in zip(newest, before, strict=True)):
                process.send_signal(end)
                break
            time.sleep(0.01)
        return helpers.finish_command(process)[0]

    def disturb_twice() -> tuple[list[int], list[int]]:
        shutil.rmtree(workdir, ignore_errors=True)
        codes = [disturb(signal.SIGTERM)]
        stopped = [helpers.checkpoint_steps(folder)[-1] for folder in folders]
        return [*codes, disturb(signal.SIGKILL)], stopped

    tries = (disturb_twice() for _ in range(5))  # it may end before it is disturbed
    codes = [75, -signal.SIGKILL]
    stopped = next(steps for found, steps in tries if found == codes)
    assert stopped[0] == stopped[1] < 300
    assert helpers.run_command(*words)[0] == 0
    for folder in folders:
        leaves = helpers.read_checkpoint(lone / folder.relative_to(workdir))
        helpers.assert_same_bits(helpers.read_checkpoint(folder), leaves)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--seeds-per-program=4"], "Expected seeds_per_program <= 3"),
        (["--seeds-per-program=2", "--shard=0/3"], "Expected seeds_per_program <= 1"),
        (
            ["--seeds-per-program=2", "--config.tracking.wandb=mine"],
            "no tracking.wandb with several seeds in a program",
        ),
        (["--seeds-per-program=0"], "argument --seeds-per-program"),
    ],
)
def test_what_cannot_be_is_refused_before_any_work(
    tmp_path, capsys, monkeypatch, flags, message
):
    monkeypatch.setattr(tracking, "check_trackers", lambda *_: None)
    assert helpers.main(*make_arguments(tmp_path / "table", *flags)) == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "table").exists()


def test_several_devices_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda: 4)
    with pytest.raises(ValueError, match=r"Expected one device .* devices=4\."):
        sweep.check_seeds_per_program(2, planned(tmp_path, ["st/0", "st/1"]))
    sweep.check_seeds_per_program(1, planned(tmp_path, ["st/0", "st/1"]))
