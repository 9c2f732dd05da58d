"""A run that is stopped, killed or damaged ends bit-identical to one that was not."""

import contextlib
import dataclasses
import errno
import json
import os
import random
import signal
import subprocess
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import helpers
import pytest

from samrobust.data import DatasetUnavailableError
from samrobust.experiments import building
from samrobust.experiments.run import run, train
from samrobust.system.claims import lease as claims_lease
from samrobust.system.claims.lease import ClaimedError, claim
from samrobust.system.files import WorkdirError
from samrobust.training import InterruptedRunError

pytestmark = pytest.mark.usefixtures("programs_made_once")

ROW = "at,norm=linf,eps=16+sam,rho=0.2"
NUM_STEPS = 96  # 16 an epoch
# A checkpoint whenever 60 ms have passed; a few steps take that long.
LONG = {
    "data.train_size": 256,
    "training.batch_size": 16,
    "training.epochs": 6,
    "checkpoint.minutes": 0.001,
    "data.validation_size": 64,
    "evaluation.checkpoint": "best",
}


@dataclasses.dataclass
class Start:
    """One start of the command: how it was ended, and what it left."""

    signal: signal.Signals | None
    began_at: int
    steps: list[int]
    code: int
    output: str
    errors: str


@dataclasses.dataclass
class Chain:
    """All starts of a run until its end."""

    workdir: Path
    starts: list[Start]


def newest(workdir: Path) -> int:
    return max(helpers.checkpoint_steps(workdir), default=0)


def wait_for(process: subprocess.Popen, condition) -> bool:
    """Polls until the condition holds; false if the process ends before."""
    while process.poll() is None:
        with contextlib.suppress(OSError):  # a checkpoint is removed as we look
            if condition():
                return True
        time.sleep(0.002)
    return False


def damage_newest(workdir: Path) -> None:
    """Flips a bit in the arrays of the newest checkpoint."""
    folder = workdir / "checkpoints" / "last" / str(newest(workdir)) / "state"
    for path in folder.glob("**/d/*"):
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 4
        path.write_bytes(content)


def run_chain(folder: Path, ends: list[str]) -> Chain:
    """Starts the same command again and again and ends it as `ends` say."""
    rng = random.Random(0)
    workdir = folder / ("broken" if ends[1:] else "whole")
    arguments = (
        "train",
        f"--config=configs/digits.py:{ROW}",
        f"--workdir={workdir}",
        *helpers.make_flags(LONG),
    )
    # A process killed as it writes to the cache of compiled programs must not
    # damage that of other tests.
    cache = {"JAX_COMPILATION_CACHE_DIR": str(folder / "xla")}
    chain = Chain(workdir, [])
    for end in ends:
        start = newest(workdir)
        process = helpers.start_command(*arguments, **cache)
        sent = None
        more, sleep = rng.randint(1, 10), rng.uniform(0, 0.05)
        if end in ("kill", "term"):
            ready = lambda: newest(workdir) >= start + more  # noqa: B023, E731
        else:
            ready = lambda: newest(workdir) == NUM_STEPS  # noqa: E731
        if end != "none" and wait_for(process, ready):
            time.sleep(sleep)
            sent = signal.SIGTERM if end == "term" else signal.SIGKILL
            process.send_signal(sent)
        code, output, errors = helpers.finish_command(process)
        steps = helpers.checkpoint_steps(workdir)
        chain.starts.append(Start(sent, start, steps, code, output, errors))
    return chain


@pytest.fixture(scope="module")
def chains(tmp_path_factory) -> tuple[Chain, Chain]:
    """A run that was never disturbed, and one that was."""
    folder = tmp_path_factory.mktemp("chains")
    return (
        run_chain(folder, ["none"]),
        run_chain(folder, ["kill", "term", "evaluation", "none"]),
    )


@pytest.mark.slow
def test_a_run_that_is_never_disturbed_ends_without_a_word_of_warning(chains):
    (start,) = chains[0].starts
    assert (start.code, start.errors) == (0, "")


def test_the_runs_were_disturbed_as_planned(chains):
    starts = chains[1].starts
    assert sum(start.signal is not None for start in starts) == len(starts) - 1
    assert starts[-1].code == 0


@pytest.mark.parametrize("which", ["last", "best"])
def test_a_run_killed_at_random_moments_ends_bit_identical(chains, which):
    whole, broken = (chain.workdir for chain in chains)
    newest, expected = (
        helpers.checkpoint_steps(path, which)[-1] for path in (broken, whole)
    )
    assert newest == expected
    leaves = helpers.read_checkpoint(whole, which)
    assert len(leaves) > 20
    helpers.assert_same_bits(helpers.read_checkpoint(broken, which), leaves)


def test_a_run_killed_at_random_moments_has_the_same_result(chains):
    whole, broken = (
        json.loads((chain.workdir / "result.json").read_text()) for chain in chains
    )
    assert broken["accuracy"] == whole["accuracy"]
    assert broken.keys() == whole.keys()


def test_the_log_of_a_killed_run_has_each_epoch_once_and_equal(chains):
    whole, broken = (
        helpers.read_lines(chain.workdir / "metrics.jsonl") for chain in chains
    )
    assert [line["epoch"] for line in broken] == list(range(1, 7))
    assert list(map(helpers.without_timings, broken)) == list(
        map(helpers.without_timings, whole)
    )
    assert all(line["seconds"] > 0 for line in broken)


def test_sigterm_saves_the_state_and_says_how_to_go_on(chains):
    starts = chains[1].starts
    (index,) = (i for i, x in enumerate(starts) if x.signal == signal.SIGTERM)
    stopped, following = starts[index], starts[index + 1]
    assert stopped.code == 75
    step = stopped.steps[-1]
    assert f"samrobust: Stopped at step {step} of {NUM_STEPS}" in stopped.errors
    assert stopped.errors.endswith("Rerun the same command to resume.")
    assert following.began_at == step


def test_no_kill_leaves_temporary_files_behind(chains):
    workdir = chains[1].workdir
    names = {path.name for path in workdir.iterdir()}
    assert names == {
        *("config.json", "metrics.jsonl", "result.json", "checkpoints", ".claim")
    }
    assert not list((workdir / ".claim").glob(".*"))
    for folder in (workdir / "checkpoints").iterdir():
        assert all(path.name.isdigit() for path in folder.iterdir())


# The same without processes: quicker, and at chosen moments.


def log_of(workdir: Path) -> list[dict[str, Any]]:
    """The log without timings."""
    return [
        helpers.without_timings(line)
        for line in helpers.read_lines(workdir / "metrics.jsonl")
    ]


def stop_after(calls: int):
    """A `should_stop` that says yes once it was asked often enough."""
    answers = iter([False] * calls)
    return lambda: next(answers, True)


@pytest.fixture(scope="module")
def short(tmp_path_factory) -> tuple[Any, Any, Path, Any]:
    """Twelve steps of SAM, never disturbed: config, data, workdir, outcome."""
    config = helpers.make_config("sam,rho=0.2", {"checkpoint.minutes": 0.0})
    dataset = helpers.load_data(config)
    workdir = tmp_path_factory.mktemp("short")
    return config, dataset, workdir, train(config, dataset, workdir)


@pytest.mark.parametrize("calls", [0, 2, 7])
def test_a_run_stopped_anywhere_goes_on_and_ends_bit_identical(short, tmp_path, calls):
    config, dataset, _, expected = short
    with pytest.raises(InterruptedRunError, match=f"step {calls + 1} of 12"):
        train(config, dataset, tmp_path, should_stop=stop_after(calls))
    assert newest(tmp_path) == calls + 1
    outcome = train(config, dataset, tmp_path)
    helpers.assert_same_bits(outcome.state, expected.state)


def test_a_run_stopped_again_and_again_ends_bit_identical(short, tmp_path):
    config, dataset, workdir, expected = short
    for step in (4, 8):
        with pytest.raises(InterruptedRunError, match=f"step {step} of 12"):
            train(config, dataset, tmp_path, should_stop=stop_after(3))
    outcome = train(config, dataset, tmp_path)
    helpers.assert_same_bits(outcome.state, expected.state)
    assert log_of(tmp_path) == log_of(workdir)


def test_a_damaged_newest_checkpoint_is_skipped_with_a_warning(short, tmp_path):
    config, dataset, workdir, expected = short
    with pytest.raises(InterruptedRunError):
        train(config, dataset, tmp_path, should_stop=stop_after(7))
    damaged = newest(tmp_path)
    assert damaged == 8
    damage_newest(tmp_path)
    with pytest.warns(UserWarning, match=f"Skipping the damaged .*last/{damaged}"):
        outcome = train(config, dataset, tmp_path)
    helpers.assert_same_bits(outcome.state, expected.state)
    assert log_of(tmp_path) == log_of(workdir)


def test_a_log_cut_off_by_a_kill_is_mended(short, tmp_path):
    config, dataset, workdir, _ = short
    with pytest.raises(InterruptedRunError):
        train(config, dataset, tmp_path, should_stop=stop_after(4))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "epo')
    train(config, dataset, tmp_path)
    assert log_of(tmp_path) == log_of(workdir)


class Forbidden:
    """An observer that must not be told of any work."""

    def on_progress(self, progress):
        pytest.fail(f"unexpected {progress}")

    def on_batch(self, done, num_examples, doing=""):
        pytest.fail(f"unexpected {done} of {num_examples} {doing}")


def modification_times(workdir: Path) -> dict[str, int]:
    return {
        str(path): path.stat().st_mtime_ns
        for path in workdir.rglob("*")
        if path.is_file() and path.name != "config.json" and ".claim" not in path.parts
    }


def test_a_finished_run_is_read_and_not_run_again(short, tmp_path):
    config, dataset, *_ = short
    result = run(config, tmp_path, helpers.Silent(), dataset=dataset)
    before = modification_times(tmp_path)
    assert run(config, tmp_path, Forbidden(), dataset=dataset) == result
    assert modification_times(tmp_path) == before


def test_a_finished_training_is_evaluated_without_training_again(short):
    config, dataset, workdir, expected = short
    reports = []
    outcome = train(config, dataset, workdir, on_progress=reports.append)
    assert {report.phase for report in reports} <= {"compiling"}
    helpers.assert_same_bits(outcome.state, expected.state)
    assert outcome.seconds == expected.seconds


def test_a_workdir_of_another_config_is_refused_and_the_field_is_named(short, tmp_path):
    config, dataset, *_ = short
    run(config, tmp_path, helpers.Silent(), dataset=dataset)
    other = helpers.make_config(
        "sam,rho=0.2", {"training.momentum": 0.5, "checkpoint.minutes": 1.0}
    )
    message = r"another config: training\.momentum was 0\.9, is 0\.5\. Choose another"
    with pytest.raises(WorkdirError, match=message):
        run(other, tmp_path, helpers.Silent(), dataset=dataset)


def test_a_second_process_on_a_workdir_is_refused(tmp_path, capsys):
    arguments = ("train", "--config=configs/digits.py:st", f"--workdir={tmp_path}")
    with claim(tmp_path):
        assert helpers.main(*arguments, *helpers.make_flags()) == 69
    errors = capsys.readouterr().err
    assert errors.startswith("samrobust: error: Another process (host ")
    assert f"is working in {tmp_path}." in errors
    assert not (tmp_path / "config.json").exists()


def test_a_workdir_that_cannot_be_written_is_refused(short, tmp_path):
    config, dataset, *_ = short
    (tmp_path / "file").touch()
    for workdir in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(WorkdirError, match="Expected a writable directory, got"):
            run(config, workdir, helpers.Silent(), dataset=dataset)


def test_a_disk_that_fills_up_fails_the_run_and_costs_no_checkpoint(
    short, tmp_path, monkeypatch
):
    config, dataset, workdir, _ = short
    sync, writes = os.fsync, []

    def fill_up(file):
        writes.append(file)
        if len(writes) > 6:  # config and empty log with their names, two epochs
            raise OSError(errno.ENOSPC, "No space left on device")
        sync(file)

    monkeypatch.setattr(os, "fsync", fill_up)
    with (
        pytest.warns(UserWarning, match=r"Could not write .*failure\.json"),
        pytest.raises(OSError, match="No space left"),
    ):
        run(config, tmp_path, helpers.Silent(), dataset=dataset)
    assert newest(tmp_path) == 8  # of 12: the third epoch could not be noted
    assert not list(tmp_path.glob(".*.tmp"))
    monkeypatch.undo()
    run(config, tmp_path, helpers.Silent(), dataset=dataset)
    assert log_of(tmp_path) == log_of(workdir)
    helpers.assert_same_bits(
        helpers.read_checkpoint(tmp_path), helpers.read_checkpoint(workdir)
    )


def claim_elsewhere(workdir: Path, *, generation: int, lease: float) -> Path:
    """A claim as a process of another machine leaves it."""
    path = workdir / ".claim" / f"{generation}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"token": "x", "host": "elsewhere", "machine": "x", "lease": lease}
    path.write_text(json.dumps(content))
    return path


def test_a_run_that_was_taken_over_stops_and_writes_nothing_more(
    short, tmp_path, monkeypatch
):
    config, dataset, *_ = short
    monkeypatch.setenv("SAMROBUST_CLAIM_LEASE", "0.3")
    calls, before = [], []

    def take_over():
        calls.append(None)
        if len(calls) == 6:
            claim_elsewhere(tmp_path, generation=9, lease=60.0)
            time.sleep(0.2)  # it is paused, and does not notice
            before.append((newest(tmp_path), log_of(tmp_path)))
        return False

    with pytest.raises(
        ClaimedError, match=r"host elsewhere.* took over .*Let that one"
    ):
        run(config, tmp_path, helpers.Silent(), dataset=dataset, should_stop=take_over)
    assert len(calls) == 6
    ((step, log),) = before
    # What was on its way at that moment may have ended: the step it was asked at.
    assert newest(tmp_path) <= step + 1
    assert log_of(tmp_path) == log
    assert not (tmp_path / "failure.json").exists()
    assert {path.name for path in (tmp_path / ".claim").iterdir()} == {
        *("1.json", "9.json")
    }


def waiting(monkeypatch, then: Callable[[], object]) -> None:
    """Something happens whenever a claim of another machine is awaited."""
    clock = types.SimpleNamespace(monotonic=time.monotonic, sleep=lambda _: then())
    monkeypatch.setattr(claims_lease, "time", clock)


def test_a_job_that_starts_again_elsewhere_waits_for_the_lease_of_the_dead_one(
    tmp_path, capsys, monkeypatch
):
    path = claim_elsewhere(tmp_path, generation=1, lease=60.0)
    waiting(monkeypatch, lambda: os.utime(path, (0, 0)))

    def load_data(_):  # what comes next
        raise DatasetUnavailableError("The wait is over.")

    monkeypatch.setattr(building, "load_data", load_data)
    arguments = ("train", "--config=configs/digits.py:st", f"--workdir={tmp_path}")
    assert helpers.main(*arguments, *helpers.make_flags()) == 2
    output, errors = capsys.readouterr()
    assert "Waiting up to 60 s for a sign of life." in " ".join(output.split())
    assert "The wait is over." in errors


def test_a_job_that_waits_for_a_dead_one_can_be_stopped(tmp_path, capsys, monkeypatch):
    claim_elsewhere(tmp_path, generation=1, lease=60.0)
    waiting(monkeypatch, lambda: os.kill(os.getpid(), signal.SIGTERM))
    arguments = ("train", "--config=configs/digits.py:st", f"--workdir={tmp_path}")
    assert helpers.main(*arguments, *helpers.make_flags()) == 75
    assert "Rerun the same command to resume." in capsys.readouterr().err


def test_a_run_that_diverges_exits_with_1_and_names_step_and_checkpoint(
    tmp_path, capsys
):
    code = helpers.main(
        *("train", "--config=configs/digits.py:st", f"--workdir={tmp_path}"),
        *helpers.make_flags({"training.learning_rate": 1e20}),
    )
    assert code == 1
    errors = capsys.readouterr().err
    assert "the parameters are not finite at step" in errors
    assert "Last good checkpoint: none was saved before" in errors
    assert not (tmp_path / "result.json").exists()
