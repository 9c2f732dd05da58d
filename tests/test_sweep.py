"""Many workers on one grid of runs: each run once, whatever fails or dies."""

import contextlib
import dataclasses
import errno
import gc
import json
import os
import subprocess
import sys
import time
import weakref
from pathlib import Path
from typing import Any

import helpers
import jax
import pytest

from samrobust.experiments import sweep, turns
from samrobust.experiments.identity import identity_of
from samrobust.experiments.run import PlannedRun
from samrobust.experiments.survey import read_plan
from samrobust.experiments.workdir import settle_config
from samrobust.system.claims.lease import ClaimedError, claim
from samrobust.system.distributed import ending
from samrobust.system.failures import read_failure, recording_failure
from samrobust.system.files import WorkdirError, write_json, write_sealed
from samrobust.training import InterruptedRunError, TrainingDivergedError

NAMES = ["a", "b", "c"]

# A worker whose runs are short: they note who does them, and take a while.
WORKER = """
import os, pathlib, sys, time
from samrobust.experiments import sweep, turns
from samrobust.system.claims.lease import claim
from samrobust.system.files import append_json_line, read_json, write_json

class Planned:
    config, shared = None, ()
    def __init__(self, workdir):
        self.workdir = workdir

def run(config, workdir, observer, *, dataset, should_stop, shared):
    with claim(workdir):
        if read_json(workdir / "result.json") is None:
            append_json_line(workdir / "began.jsonl", {"pid": os.getpid()})
            time.sleep(0.15)
            write_json(workdir / "result.json", {"pid": os.getpid()})
        return read_json(workdir / "result.json")

sweep.run = run
folder = pathlib.Path(sys.argv[1])
runs = [Planned(folder / str(i)) for i in range(16)]
print("ready", flush=True)
sys.stdin.readline()
results = sweep.run_all(runs, lambda _: None, lambda _: [None], on_failure=print)
print(len(results))
"""


def start_worker(folder: Path) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", WORKER, str(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=helpers.ROOT,
    )


def begin(worker: subprocess.Popen) -> None:
    assert worker.stdin is not None
    worker.stdin.write("\n")
    worker.stdin.flush()


def test_workers_share_the_runs_and_one_that_is_killed_is_replaced(tmp_path):
    with contextlib.ExitStack() as stack:
        workers = [start_worker(tmp_path) for _ in range(3)]
        for worker in workers:
            stack.enter_context(worker)
            stack.callback(worker.kill)
        for worker in workers:
            assert worker.stdout is not None
            assert worker.stdout.readline() == "ready\n"
        victim, *others = workers
        begin(victim)
        began = f'"pid": {victim.pid}}}'
        while not any(
            began in path.read_text() for path in tmp_path.glob("*/began.jsonl")
        ):
            time.sleep(0.01)
        for worker in others:
            begin(worker)
        victim.kill()
        outputs = [worker.communicate(timeout=300)[0] for worker in others]
    assert [output.split() for output in outputs] == [["16"], ["16"]]
    starts = [
        [line["pid"] for line in helpers.read_lines(path)]
        for path in tmp_path.glob("*/began.jsonl")
    ]
    assert len(starts) == 16
    twice = [pids for pids in starts if len(pids) > 1]
    assert all(len(pids) == 2 and pids[0] == victim.pid for pids in twice)
    assert len(twice) <= 1  # the run that it was killed in
    assert {pids[-1] for pids in starts} >= {other.pid for other in others}


# The same with a run that does as it is told.


@dataclasses.dataclass
class Script:
    """What each run does, attempt by attempt: an error, or a result's name."""

    acts: dict[str, list[Any]]
    order: list[str] = dataclasses.field(default_factory=list)

    def run(self, config, workdir, observer, *, dataset, should_stop, shared):
        del config, observer, dataset, should_stop, shared
        self.order.append(workdir.name)
        act = self.acts.get(workdir.name, [None]).pop(0)
        if callable(act):
            act = act(workdir)
        if isinstance(act, BaseException):
            raise act
        return {"name": workdir.name}


@pytest.fixture
def follow(tmp_path, monkeypatch):
    """Runs a, b and c by a script: the results' names, the failures, the order."""
    monkeypatch.setattr(turns, "_TICK", 0.001)

    def follow(acts, **options):
        script = Script(acts)
        monkeypatch.setattr(sweep, "run", script.run)
        failures: list[tuple[str, str]] = []
        runs: list[Any] = [PlannedRun(None, tmp_path / name) for name in NAMES]
        results = sweep.run_all(
            runs,
            lambda _: None,  # type: ignore[arg-type,return-value]
            lambda group: [helpers.Silent()] * len(group),
            on_failure=lambda planned, text: failures.append(
                (planned.workdir.name, text)
            ),
            **options,
        )
        return [result["name"] for result in results], failures, script.order

    return follow


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (TrainingDivergedError("Not finite."), "Not finite."),
        (MemoryError(), "MemoryError"),
        (KeyError("bug"), "KeyError: 'bug'"),
        (ZeroDivisionError("division\nby zero"), "ZeroDivisionError: division by zero"),
        (jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED"), "RESOURCE_EXHAUSTED"),
        (OSError(28, "No space left"), "OSError: [Errno 28] No space left"),
        (WorkdirError("It is damaged."), "It is damaged."),
    ],
    ids=lambda value: type(value).__name__,
)
def test_whatever_fails_the_others_go_on(follow, error, text):
    results, failures, order = follow({"b": [error]})
    assert (results, order) == (["a", "c"], NAMES)
    ((name, message),) = failures
    assert name == "b"
    assert text in message


@pytest.mark.parametrize(
    "error",
    [InterruptedRunError("saved"), KeyboardInterrupt(), OSError(errno.ESTALE, "NFS")],
)
def test_a_stop_stops_all(follow, error):
    with pytest.raises(type(error)):
        follow({"b": [error]})


def test_a_broken_connection_stops_all_though_all_processes_meet_it(
    follow, monkeypatch
):
    """Every later collective operation would fail too."""
    monkeypatch.setattr(ending, "is_joined", lambda: True)
    with pytest.raises(ValueError, match="Gloo"):
        follow({"b": [ValueError(helpers.BROKEN_CONNECTION)]})


def test_what_a_failed_run_held_is_free_before_the_next_one(follow):
    class Array:
        pass

    alive = []

    def fail(_):
        array = Array()
        alive.append(weakref.ref(array))
        cycle: list[Any] = [array]
        cycle.append(cycle)
        raise MemoryError

    def look(_):
        assert alive[0]() is None

    gc.disable()
    try:
        results, failures, _ = follow({"a": [fail], "b": [look]})
    finally:
        gc.enable()
    assert results == ["b", "c"]
    assert failures == [("a", "MemoryError")]


def test_a_run_held_by_another_comes_last_and_is_no_failure(follow):
    waits = []
    results, failures, order = follow(
        {"a": [ClaimedError(), ClaimedError(), None]},
        on_wait=lambda held: waits.append([planned.workdir.name for planned in held]),
    )
    assert results == NAMES
    assert failures == []
    assert order == ["a", "b", "c", "a", "a"]
    assert waits == [["a"]]


def test_while_others_hold_the_last_runs_a_stop_is_heard(follow):
    answers = iter([False, False, True])
    with pytest.raises(InterruptedRunError, match="while others held the last runs"):
        follow(
            {"b": [ClaimedError()] * 9},
            should_stop=lambda: next(answers),
        )


def fail_elsewhere(workdir: Path) -> ClaimedError:
    """Another worker holds the run, and fails."""
    workdir.mkdir(exist_ok=True)
    write_json(
        workdir / "failure.json",
        {"id": os.urandom(4).hex(), "message": "Not finite.", "host": "node7"},
    )
    return ClaimedError()


def test_a_run_that_fails_elsewhere_meanwhile_is_reported_and_not_tried_again(follow):
    results, failures, order = follow({"a": [fail_elsewhere, None]})
    assert results == ["b", "c"]
    assert failures == [("a", "Not finite. (on node7)")]
    assert order == NAMES


def finish_elsewhere(workdir: Path) -> None:
    """Another worker tries the run again, and finishes it."""
    write_json(workdir / "result.json", {})
    (workdir / "failure.json").unlink()


def fail_here(workdir: Path) -> None:
    with recording_failure(workdir):
        raise MemoryError


@pytest.mark.parametrize("fail", [fail_elsewhere, fail_here])
def test_a_run_that_was_finished_since_it_failed_is_no_failure(follow, tmp_path, fail):
    (tmp_path / "a").mkdir()
    later = [ClaimedError(), lambda _: finish_elsewhere(tmp_path / "a")]
    results, failures, order = follow({"a": [fail, None], "c": later})
    assert (results, failures) == (NAMES, [])
    assert order == [*NAMES, "c", "a"]


def test_a_run_with_a_result_that_fails_here_alone_is_a_failure(follow, tmp_path):
    helpers.make_folder(tmp_path / "a")
    write_json(tmp_path / "a" / "result.json", {})
    results, failures, _ = follow({"a": [OSError(28, "No space left")] * 2})
    assert results == ["b", "c"]
    assert failures == [("a", "OSError: [Errno 28] No space left")]


def test_a_run_that_failed_before_is_tried_again(follow, tmp_path):
    fail_elsewhere(tmp_path / "a")
    results, failures, _ = follow({})
    assert (results, failures) == (NAMES, [])


# Failures, recorded.


def test_a_failure_is_recorded_and_removed_by_a_success(tmp_path):
    with pytest.raises(ZeroDivisionError), recording_failure(tmp_path):
        print(1 / 0)
    failure = read_failure(tmp_path)
    assert failure is not None
    assert failure["error"] == "ZeroDivisionError"
    assert failure["message"] == "ZeroDivisionError: division by zero"
    assert failure["traceback"].endswith("ZeroDivisionError: division by zero\n")
    assert "print(1 / 0)" in failure["traceback"]
    assert failure["pid"] == os.getpid()
    assert "commit" in failure["provenance"]
    with recording_failure(tmp_path):
        pass
    assert read_failure(tmp_path) is None


def test_a_failure_that_cannot_be_recorded_is_still_the_one_that_is_raised(tmp_path):
    (tmp_path / "failure.json").mkdir()
    with (
        pytest.warns(UserWarning, match="Could not write"),
        pytest.raises(ZeroDivisionError),
        recording_failure(tmp_path),
    ):
        print(1 / 0)


def test_a_long_traceback_is_cut_at_its_beginning(tmp_path):
    with pytest.raises(ValueError, match="x"), recording_failure(tmp_path):
        raise ValueError("x" * 10_000 + "end")
    failure = json.loads((tmp_path / "failure.json").read_text())
    assert len(failure["traceback"]) <= 4000
    assert failure["traceback"].endswith("end\n")


def test_a_stop_is_no_failure_and_leaves_the_record_of_one(tmp_path):
    with pytest.raises(KeyError), recording_failure(tmp_path):
        raise KeyError
    before = read_failure(tmp_path)
    for error in (InterruptedRunError, KeyboardInterrupt):
        with (
            pytest.raises(error),
            recording_failure(
                tmp_path, is_failure=lambda e: not isinstance(e, InterruptedRunError)
            ),
        ):
            raise error
    assert before is not None
    assert read_failure(tmp_path) == before


def test_a_failure_that_cannot_be_recorded_is_raised_all_the_same(
    tmp_path, monkeypatch
):
    def fail(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", fail)
    with (
        pytest.warns(UserWarning, match="Could not write .*No space left"),
        pytest.raises(KeyError),
        recording_failure(tmp_path),
    ):
        raise KeyError
    assert list(tmp_path.iterdir()) == []


# The plan.


def make_runs(workdir: Path, rows: list[str]) -> list[PlannedRun]:
    return [
        PlannedRun(helpers.make_config(row), workdir / row / "seed0") for row in rows
    ]


def test_the_plans_of_all_calls_are_kept_each_run_once(tmp_path):
    workdir = tmp_path / "table"
    sweep.record_plan(workdir, make_runs(workdir, ["st"]))
    sweep.record_plan(workdir, make_runs(workdir, ["st", "at,norm=linf,eps=16"]))
    sweep.record_plan(workdir, make_runs(workdir, ["sam,rho=0.2"]))
    plan = read_plan(workdir)
    assert list(plan) == [
        *("st/seed0", "at,norm=linf,eps=16/seed0", "sam,rho=0.2/seed0")
    ]
    assert [(x["label"], x["epochs"], x["work"]) for x in plan.values()] == [
        ("ST", 4, "0:1.0000"),
        ("AT (linf, eps = 16/255)", 4, "0:2.3333"),
        ("SAM (rho = 0.2)", 4, "0:2.0000"),
    ]


def test_a_call_that_plans_all_rows_says_in_which_order(tmp_path):
    rows = ["st", "sam,rho=0.2", "at,norm=linf,eps=16"]
    for call in (rows[::2], rows):
        sweep.record_plan(tmp_path, make_runs(tmp_path, call))
    assert list(read_plan(tmp_path)) == [f"{row}/seed0" for row in rows]


def test_a_table_is_not_made_in_the_directory_of_a_run(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(
        WorkdirError, match=r"a table.s directory, got workdir=.* a run"
    ):
        sweep.refuse_other_configs(tmp_path, make_runs(tmp_path, ["st"]))


def test_what_another_call_plans_meanwhile_is_kept(tmp_path, monkeypatch):
    in_turn = sweep.claim_in_turn

    def after_theirs(folder):
        sweep.write_json(tmp_path / "plan.json", {"runs": [{"path": "theirs/seed0"}]})
        return in_turn(folder)

    monkeypatch.setattr(sweep, "claim_in_turn", after_theirs)
    sweep.record_plan(tmp_path, make_runs(tmp_path, ["st"]))
    assert read_plan(tmp_path).keys() == {"theirs/seed0", "st/seed0"}


def test_a_plan_in_a_directory_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(WorkdirError, match="Expected a writable directory"):
        sweep.record_plan(tmp_path / "file", [])


def test_a_result_of_another_config_is_not_taken_for_this_one(tmp_path):
    (planned,) = make_runs(tmp_path, ["st"])
    assert sweep.finished(planned) is None
    with claim(planned.workdir):
        settle_config(planned.workdir, planned.config)
        result = {"row": "st", "run": identity_of(planned.config, None).as_dict()}
        write_sealed(planned.workdir / "result.json", result)
    assert sweep.finished(planned) == result
    other = helpers.make_config("st", {"training.momentum": 0.5})
    with pytest.raises(WorkdirError, match=r"differs in training\.momentum"):
        sweep.finished(PlannedRun(other, planned.workdir))
