"""`samrobust status`: every state, read from files that others are writing."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console

from samrobust import cli
from samrobust.cli import status
from samrobust.experiments.reporting.status import status_to_rich
from samrobust.experiments.survey import (
    STATES,
    RunStatus,
    read_plan,
    remaining,
    remaining_together,
    survey,
    survey_run,
)
from samrobust.system.claims.lease import claim
from samrobust.system.files import write_json

CONFIG = {"label": "ST", "seed": 0, "training": {"epochs": 8}}
RESULT = {"row": "st"}
FAILURE = {"id": "1", "message": "The loss is not finite.", "host": "node7"}


def make_run(
    folder: Path,
    *,
    epochs: int = 0,
    seconds: float = 30.0,
    result: object = None,
    failure: object = None,
    age: float | None = None,
) -> Path:
    """The files of a run; `age` is that of a foreign claim."""
    folder.mkdir(parents=True)
    write_json(folder / "config.json", CONFIG)
    lines = [
        {"step": 10 * i, "epoch": i, "loss": 1 / i, "accuracy": 90.0, "seconds": x}
        for i, x in enumerate([999.0, *[seconds] * (epochs - 1)][:epochs], 1)
    ]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "metrics.jsonl").write_text(text)
    for name, content in (("result", result), ("failure", failure)):
        if content is not None:
            write_json(folder / f"{name}.json", content)
    if age is not None:
        path = folder / ".claim" / "1.json"
        path.parent.mkdir()
        path.write_text(json.dumps({"host": "node7", "machine": "x", "lease": 60.0}))
        then = time.time() - age
        os.utime(path, (then, then))
    return folder


# States.


def test_a_run_without_a_file_has_not_started(tmp_path):
    for work in ("0:7.5", 7.5):  # older versions planned a number
        planned = {"label": "AT", "seed": 3, "epochs": 20, "work": work}
        run = survey_run(tmp_path / "absent", planned)
        assert run == RunStatus("AT, seed 3", "not started", epochs=20, work=7.5)
    assert survey_run(tmp_path / "absent", planned | {"epochs": 0}).work is None


def test_a_run_at_work_names_its_host_and_its_last_epoch(tmp_path):
    run = survey_run(make_run(tmp_path / "run", epochs=4, age=5.0))
    assert run.description == "running on node7"
    assert (run.name, run.epoch, run.epochs) == ("ST, seed 0", 4, 8)
    assert (run.loss, run.accuracy) == (0.25, 90.0)
    assert run.epoch_seconds == 30.0  # the first one, which compiles, counts less


def test_epochs_that_are_left_are_as_long_as_their_phase_costs(tmp_path):
    """Four of eight epochs at 30 s; the last two cost seven times as much."""
    planned = {"epochs": 80, "work": "0:1.0 6:7.0"}  # the config's 8 are the run's
    run = survey_run(make_run(tmp_path / "run", epochs=4, age=5.0), planned)
    assert (run.epoch_seconds, run.work) == (120.0, 4.0)
    assert remaining([run]) == [2 * 30.0 + 2 * 7 * 30.0]
    run = survey_run(make_run(tmp_path / "next", epochs=1), {"work": "0:1 1:7 9:5"})
    assert run.epoch_seconds == 7 * 999.0


def test_a_run_of_this_machine_is_at_work_until_its_process_is_gone(tmp_path):
    folder = make_run(tmp_path / "run")
    with claim(folder):
        assert survey_run(folder).state == "running"
        mine = (folder / ".claim" / "1.json").read_text()
    assert survey_run(folder).state == "waiting"
    dead = json.loads(mine) | {"started": "1"}
    (folder / ".claim" / "2.json").write_text(json.dumps(dead))
    assert survey_run(folder).state == "stale"


def test_a_run_whose_worker_fell_silent_is_stale(tmp_path):
    run = survey_run(make_run(tmp_path / "run", epochs=1, age=100.0))
    assert run.description == "stale on node7"


def test_a_run_that_was_stopped_is_waiting(tmp_path):
    assert survey_run(make_run(tmp_path / "run", epochs=1)).description == "waiting"
    for name in ("config.json", "metrics.jsonl"):  # each alone says that it began
        folder = make_run(tmp_path / name, epochs=1)
        (folder / name).unlink()
        assert survey_run(folder).description == "waiting"
    with claim(tmp_path / "claimed"):  # and stopped before it wrote anything
        pass
    assert survey_run(tmp_path / "claimed").description == "waiting"


def test_a_failed_run_says_why(tmp_path):
    run = survey_run(make_run(tmp_path / "run", failure=FAILURE, age=100.0))
    assert (run.state, run.error) == ("failed", "The loss is not finite.")


def test_a_run_whose_result_is_damaged_says_so(tmp_path):
    folder = make_run(tmp_path / "run", epochs=8, result=RESULT)
    (folder / "result.json").write_text("")
    run = survey_run(folder)
    assert (run.state, run.error[:22]) == ("failed", "result.json is damaged")


def test_a_failed_run_that_is_tried_again_is_running(tmp_path):
    run = survey_run(make_run(tmp_path / "run", failure=FAILURE, age=5.0))
    assert (run.state, run.error) == ("running", "The loss is not finite.")


def test_a_finished_run_is_done_whatever_else_lies_there(tmp_path):
    folder = make_run(
        tmp_path / "run", epochs=8, result=RESULT, failure=FAILURE, age=5.0
    )
    run = survey_run(folder)
    assert (run.description, run.error, run.epoch) == ("done", "", 8)


@pytest.mark.parametrize(
    "name", ["config.json", "metrics.jsonl", "result.json", ".claim/1.json"]
)
def test_a_half_written_file_counts_as_absent(tmp_path, name):
    folder = make_run(tmp_path / "run", epochs=2, age=5.0)
    path = folder / name
    path.write_text((path.read_text() if path.exists() else "")[:-3] + '\n{"st\x00')
    assert survey_run(folder).state == "running"


# Tables.


@pytest.fixture
def table(tmp_path) -> Path:
    """A table with a run in each state."""
    rows = [
        {"path": f"st/seed{i}", "label": "ST", "seed": i, "epochs": 8, "work": "0:1"}
        for i in range(6)
    ]
    other = {"path": "at/seed0", "label": "AT", "seed": 0, "epochs": 8, "work": "0:8"}
    write_json(tmp_path / "plan.json", {"runs": [*rows, other]})
    make_run(tmp_path / "st" / "seed0", epochs=8, result=RESULT)
    make_run(tmp_path / "st" / "seed1", epochs=4, age=5.0)
    make_run(tmp_path / "st" / "seed2", epochs=2, age=100.0)
    make_run(tmp_path / "st" / "seed3", epochs=2)
    make_run(tmp_path / "st" / "seed4", epochs=1, failure=FAILURE)
    make_run(tmp_path / "unplanned" / "seed0", epochs=2, age=5.0)
    return tmp_path


def test_a_table_shows_planned_runs_in_order_and_then_what_else_is_there(table):
    make_run(table / "st" / "copy of seed0")
    runs = survey(table)
    assert [run.state for run in runs] == [
        *("done", "running", "stale", "waiting", "failed"),
        *("not started", "not started", "running"),
    ]
    assert {run.state for run in runs} == set(STATES)
    assert runs[6].name == "AT, seed 0"


def test_the_workdir_of_one_run_shows_that_run(table):
    (run,) = survey(table / "st" / "seed1")
    assert run.description == "running on node7"
    for name in ("config.json", "metrics.jsonl", "result.json", ".claim"):
        (table / "new" / name / name).mkdir(parents=True)
        assert len(survey(table / "new" / name)) == 1


def test_what_is_left_is_epochs_times_seconds_predicted_where_unknown():
    known = RunStatus("a", "running", epoch=2, epochs=10, epoch_seconds=5.0, work=1.0)
    other = RunStatus("b", "waiting", epoch=4, epochs=6, epoch_seconds=30.0, work=4.0)
    absent = RunStatus("c", "not started", epochs=10, work=8.0)
    done = RunStatus("d", "done", epoch=10, epochs=10, epoch_seconds=9.0)
    failed = RunStatus("e", "failed", epoch=1, epochs=10, epoch_seconds=9.0)
    runs = [known, other, absent, done, failed]
    rate = (5.0 / 1.0 + 30.0 / 4.0) / 2
    assert remaining(runs) == [40.0, 60.0, 80 * rate, 0.0, None]
    assert remaining_together(runs) == 100 + 80 * rate
    assert remaining_together([known, known, done]) == 40.0
    long = RunStatus("f", "waiting", epochs=10, epoch_seconds=50.0)
    assert remaining_together([known, known, long]) == 500.0  # one run, one worker
    assert remaining_together([other, done]) is None  # nobody at work
    for unknown in (RunStatus("g", "waiting"), RunStatus("h", "", epoch_seconds=5.0)):
        assert remaining_together([known, unknown]) is None
    longer = RunStatus("i", "running", epoch=11, epochs=10, epoch_seconds=5.0)
    assert remaining([longer]) == [0.0]


def test_seeds_of_one_program_share_the_time_of_one_worker(tmp_path):
    """The seconds of their epochs are a third of those on the wall, each."""
    for seed in range(3):
        run = make_run(tmp_path / "st" / f"seed{seed}", epochs=4, seconds=10.0, age=5.0)
        claim = {"host": "node7", "machine": "x", "pid": 42, "lease": 60.0}
        write_json(run / ".claim" / "1.json", claim)
    make_run(tmp_path / "st" / "seed3", epochs=4, seconds=10.0)
    runs = survey(tmp_path)
    assert remaining(runs) == [120.0, 120.0, 120.0, 40.0]
    assert remaining_together(runs) == 160.0


def render(runs, width=100) -> str:
    console = Console(width=width, color_system=None)
    with console.capture() as capture:
        console.print(status_to_rich(runs))
    return capture.get()


def test_the_table_says_states_epochs_etas_totals_and_errors(table):
    text = render(survey(table))
    lines = [" ".join(line.split()) for line in text.splitlines()]
    assert "ST, seed 0 done 8/8 0.125 90.0 % -" in lines
    assert "ST, seed 1 running on node7 4/8 0.250 90.0 % 2 min" in lines
    assert "ST, seed 4 failed 1/8 1.000 90.0 % -" in lines
    assert any(line.startswith("AT, seed 0 not started 0/8 - - ") for line in lines)
    totals = "8 runs: 1 done, 2 running, 1 stale, 1 waiting, 2 not started, 1 failed."
    assert totals in text
    assert "ETA of all: " in text
    assert "ETAs cover training only." in " ".join(lines)
    assert "ST, seed 4: The loss is not finite." in lines


def test_a_long_error_is_shown_whole_on_a_narrow_terminal():
    error = "A sentence that goes on for longer than the terminal is wide. " * 3
    run = RunStatus("SAM (rho = 0.2), seed 0", "failed", error=error + "End.")
    assert "End." in render([run], width=60)


# The command.


def main(*arguments, **environment):
    script = (
        "import sys\nfrom samrobust.cli import main\n"
        "code = main(sys.argv[1:])\n"
        "loaded = [m for m in ('jax', 'matplotlib', 'absl') if m in sys.modules]\n"
        "print('loaded', loaded)\nsys.exit(code)"
    )
    return subprocess.run(
        [sys.executable, "-c", script, *arguments],
        env={**os.environ, "COLUMNS": "120", **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_command_loads_no_jax_and_changes_nothing(table):
    def files():
        return {p: p.stat().st_mtime_ns for p in table.rglob("*") if p.is_file()}

    before = files()
    done = main("status", f"--workdir={table}")
    assert (done.returncode, done.stderr) == (0, "")
    assert "8 runs: 1 done" in done.stdout
    assert "loaded []" in done.stdout
    assert files() == before


HOSTILE = [
    *(b"", b"\x00\xff\xfe", b"\x89PNG\r\n" * 99, b"{", b"null", b"3", b"[]", b'"a"'),
    *(b"NaN", b"[" * 99_999, b"9" * 5000, b'{"runs": 3}', b'{"training": [1]}'),
    *(b'{"runs": [1, null, [], {"path": 3}, {"path": "/etc"}, {"path": "../x"}]}',),
]
VALUES = [None, True, -1, 0, 1e308, 10**400, float("nan"), float("inf"), "x\x1b[31m\n"]
VALUES += ["0:1 9:1e999", "5:1 2:1", "0:" + 99 * "9", "0:0"]
VALUES += ["\ud800[/red]", [], [1], {}, {"epochs": "x"}]
FIELDS = ("path", "label", "seed", "epochs", "work", "epoch", "loss", "accuracy")
FIELDS += ("seconds", "training", "message", "host", "machine", "lease", "refreshed")


def spoil(path: Path, how: object) -> None:
    """Puts something else in place of a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    if how == "folder":
        path.mkdir()
    elif how == "pipe":
        os.mkfifo(path)
    elif how == "loop":
        path.symlink_to(path)
    elif isinstance(how, bytes):
        path.write_bytes(how)
    else:
        fields = dict.fromkeys(FIELDS, how)
        run = {**fields, "path": "st/seed1"}
        path.write_text(json.dumps({**fields, "runs": [fields, run]}) + "\n")


@pytest.mark.parametrize(
    "name",
    ["plan.json"]
    + [
        f"st/seed1/{name}.json"
        for name in ("config", "result", "failure", ".claim/9", "metrics.jsonl")
    ],
)
def test_whatever_lies_in_place_of_a_file_status_shows_the_runs(table, name, capsys):
    path = table / name.replace(".jsonl.json", ".jsonl")
    (table / "st" / "seed1" / "result.json").write_text("{}")
    for how in (*HOSTILE, *VALUES, "folder", "pipe", "loop"):
        spoil(path, how)
        for workdir in (table, table / "st" / "seed1"):
            assert cli.main(["status", f"--workdir={workdir}"]) == 0, how
            out, err = capsys.readouterr()
            assert err == ""
            assert "run" in out
            assert "\x1b" not in out
        if path.is_dir():
            path.rmdir()


def test_what_may_not_be_read_counts_as_absent_or_is_said(table, monkeypatch, capsys):
    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied", str(table))

    with monkeypatch.context() as patch:
        patch.setattr("builtins.open", refuse)
        patch.setattr(Path, "open", refuse)
        patch.setattr(os, "listdir", refuse)
        assert cli.main(["status", f"--workdir={table}"]) == 0
    with monkeypatch.context() as patch:
        patch.setattr(Path, "stat", refuse)
        assert cli.main(["status", f"--workdir={table}"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("samrobust: error: Expected a directory to look at, got /")
    assert error.count("\n") == 1


def test_what_a_damaged_plan_still_says_is_kept_as_it_is_planned_again(tmp_path):
    known = {"path": "at/seed3", "label": "AT", "seed": 3}
    bad = {"work": float("nan"), "epochs": 10**400, "row": [], "more": {}}
    runs = [{**known, **bad}, {"path": "/x"}, {"path": "a/../../x"}, {"path": ""}, 3]
    (tmp_path / "plan.json").write_text(json.dumps({"runs": runs}))
    assert read_plan(tmp_path) == {"at/seed3": known}


def test_a_claim_from_the_future_is_no_sign_of_life(tmp_path):
    assert survey_run(make_run(tmp_path / "run", age=-1e6)).state == "stale"
    assert survey_run(make_run(tmp_path / "near", age=-5.0)).state == "running"


def test_watching_goes_on_until_all_is_done(table, monkeypatch, capsys):
    run = table / "st" / "seed1"
    sleeps = []

    def sleep(seconds):
        sleeps.append(seconds)
        if len(sleeps) == 2:
            write_json(run / "result.json", RESULT)

    monkeypatch.setattr(status.time, "sleep", sleep)
    assert cli.main(["status", f"--workdir={run}", "--watch"]) == 0
    assert sleeps == [5.0, 5.0]
    assert "1 run: 1 done." in capsys.readouterr().out


def test_watching_outlasts_a_network_that_is_away(table, monkeypatch, capsys):
    def refuse(*_, **__):
        raise ConnectionError("503 Service Unavailable")

    def sleep(_):
        patch.undo()
        write_json(run / "result.json", RESULT)

    run = table / "st" / "seed1"
    said = "samrobust: error: Expected a directory to look at, got "
    with monkeypatch.context() as patch:
        patch.setattr(Path, "exists", refuse)
        assert cli.main(["status", f"--workdir={run}"]) == 69
        assert capsys.readouterr().err.startswith(said)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "exists", refuse)
        monkeypatch.setattr(status.time, "sleep", sleep)
        assert cli.main(["status", f"--workdir={run}", "--watch"]) == 0
    out, err = capsys.readouterr()
    assert err.startswith(said)
    assert err.count("\n") == 1
    assert "1 run: 1 done." in out


def test_a_result_that_cannot_be_looked_at_counts_as_absent(table, monkeypatch, capsys):
    for error in (PermissionError(13, "Permission denied"), ConnectionError("503")):

        def refuse(path, *, error=error):
            if path.name == "result.json":
                raise error
            return os.path.isfile(path)

        with monkeypatch.context() as patch:
            patch.setattr(Path, "is_file", refuse)
            assert cli.main(["status", f"--workdir={table}"]) == 0
        out, err = capsys.readouterr()
        assert (err, "8 runs: " in out) == ("", True)


def test_ctrl_c_ends_watching_without_a_word(table, monkeypatch, capsys):
    def interrupt(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(status.time, "sleep", interrupt)
    assert cli.main(["status", f"--workdir={table}", "--watch"]) == 130
    assert capsys.readouterr().err == ""
