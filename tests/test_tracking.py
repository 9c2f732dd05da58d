"""TensorBoard and W&B: each step once, never in the way, off by default."""

import json
import os
import struct
import subprocess
import sys
import threading
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import helpers
import pytest

from samrobust.experiments import tracking
from samrobust.experiments.run import run
from samrobust.experiments.tracking import Tracking, check_trackers
from samrobust.system.files import append_json_line
from samrobust.training import InterruptedRunError, Progress

ON = {"tracking.tensorboard": True}

# Records what is done with it, as lines of $WANDB_STANDIN; fails where told to.
STANDIN = """
import json, os

def note(name, /, *arguments, **named):
    with open(os.environ["WANDB_STANDIN"], "a") as file:
        file.write(json.dumps([name, *arguments, named], default=str) + "\\n")
    if name in os.environ.get("WANDB_FAILS", "").split():
        raise ConnectionError("no network")

class Settings(dict):
    pass

class Summary:
    def update(self, values):
        note("summary", values)

class Run:
    summary = Summary()
    def __init__(self):
        self.step = int(os.environ.get("WANDB_STEP", "0"))
    def log(self, values, step, commit):
        note("log", values, step=step, commit=commit)
    def finish(self, exit_code):
        note("finish", exit_code=exit_code)

def init(**named):
    note("init", **named)
    return Run()

def teardown():
    note("teardown")
"""


@pytest.fixture
def wandb(tmp_path, monkeypatch):
    """A package `wandb` that records; returns its calls so far."""
    folder = tmp_path / "packages"
    folder.mkdir()
    (folder / "wandb.py").write_text(STANDIN)
    record = folder / "calls.jsonl"
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    monkeypatch.setenv("WANDB_STANDIN", str(record))
    yield lambda: [json.loads(line) for line in record.read_text().splitlines()]
    sys.modules.pop("wandb", None)


def read_scalars(workdir: Path) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard shows: a start event purges the steps from its own on."""
    proto = pytest.importorskip("tensorboardX.proto.event_pb2")
    scalars: dict[str, list[tuple[int, float]]] = {}
    files = (workdir / "tensorboard").iterdir()
    for path in sorted(files, key=lambda path: path.stat().st_mtime_ns):
        content = path.read_bytes()
        while content:
            (size,) = struct.unpack("<Q", content[:8])
            event = proto.Event.FromString(content[12 : 12 + size])
            content = content[12 + size + 4 :]
            if event.session_log.status == proto.SessionLog.START:
                for name, values in scalars.items():
                    scalars[name] = [v for v in values if v[0] < event.step]
            for value in event.summary.value:
                pair = (event.step, value.simple_value)
                scalars.setdefault(value.tag, []).append(pair)
    return scalars


def expected_scalars(workdir: Path, name: str) -> list[tuple[int, Any]]:
    lines = helpers.read_lines(workdir / "metrics.jsonl")
    return [(line["step"], pytest.approx(line[name], rel=1e-6)) for line in lines]


def progress(step: int, metrics: dict[str, Any] | None = None) -> Progress:
    return Progress("training", step, 100, metrics or {})


def stop_after(calls: int):
    answers = iter([False] * calls)
    return lambda: next(answers, True)


# TensorBoard.


def test_event_files_of_a_run_stopped_and_resumed_agree_with_the_log(tmp_path):
    pytest.importorskip("tensorboardX")
    config = helpers.make_config("st", ON)
    dataset = helpers.load_data(config)
    with pytest.raises(InterruptedRunError):
        run(
            config,
            tmp_path,
            helpers.Silent(),
            dataset=dataset,
            should_stop=stop_after(7),
        )
    assert read_scalars(tmp_path)["loss"] == expected_scalars(tmp_path, "loss")
    time.sleep(1.1)  # files are named by the second
    result = run(config, tmp_path, helpers.Silent(), dataset=dataset)
    scalars = read_scalars(tmp_path)
    for name in ("loss", "accuracy", "learning_rate"):
        assert scalars[name] == expected_scalars(tmp_path, name)
        assert len(scalars[name]) == 4
    for attack, accuracy in result["accuracy"].items():
        name = "result/" + attack.replace(" ", "_").replace("/", "_")
        assert scalars[name] == [(12, pytest.approx(accuracy))]


FULL_DISK = """
import contextlib, pathlib, sys, types, warnings
from samrobust.experiments import tracking
from samrobust.system.files import append_json_line
warnings.formatwarning = lambda message, *_: f"warning: {message}\\n"
workdir = pathlib.Path(sys.argv[1])
(workdir / "tensorboard").mkdir()
import tensorboardX.record_writer as records
records.open_file = lambda path: open("/dev/full", "wb")
config = types.SimpleNamespace(
    tracking=types.SimpleNamespace(tensorboard=True, wandb="")
)
with contextlib.closing(tracking.Tracking(config, workdir)) as tracked:
    follow = tracked.following(lambda _: None)
    for step in range(1, 13):
        append_json_line(workdir / "metrics.jsonl", {"step": step, "loss": 1.0})
        follow(types.SimpleNamespace(metrics={"step": step}))
    tracked.finish({"natural": 99.0})
print("done")
"""


def test_a_disk_that_is_full_is_said_once_and_leaves_no_traceback_at_the_end(tmp_path):
    pytest.importorskip("tensorboardX")
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, "done\n")
    assert done.stderr.count("\n") == 1
    assert "A tracker failed and is left out (OSError: [Errno 28]" in done.stderr


def test_trackers_are_off_by_default_and_leave_nothing(tmp_path):
    config = helpers.make_config("st")
    with closing(Tracking(config, tmp_path)) as tracked:
        on_progress = print
        assert tracked.following(on_progress) is on_progress
        tracked.finish({"natural": 99.0})
    assert list(tmp_path.iterdir()) == []


# W&B.


def make_log(workdir: Path, *steps: int) -> None:
    for step in steps:
        append_json_line(
            workdir / "metrics.jsonl", {"step": step, "epoch": step, "loss": 1 / step}
        )


def track_steps(workdir: Path, *steps: int, finish: bool = True) -> list[Progress]:
    """Tracks a run that writes these steps; returns what its observer was told."""
    config = helpers.make_config("sam,rho=0.2", {"tracking.wandb": "sharp"})
    told: list[Progress] = []
    with closing(Tracking(config, workdir)) as tracked:
        follow = tracked.following(told.append)
        follow(progress(0))
        for step in steps:
            make_log(workdir, step)
            follow(progress(step, {"step": step}))
            follow(progress(step, {"step": step}))
        if finish:
            tracked.finish({"natural": 99.0, "linf 8/255": 50.0})
    return told


def test_a_run_is_logged_line_by_line_and_finished(tmp_path, wandb):
    workdir = helpers.make_folder(tmp_path / "run")
    track_steps(workdir, 1, 2)
    init, *calls = wandb()
    assert init[0] == "init"
    assert (init[1]["project"], init[1]["resume"]) == ("sharp", "allow")
    assert init[1]["name"] == "SAM (rho = 0.2), seed 0"
    assert init[1]["config"]["sam"]["rho"] == 0.2
    assert init[1]["id"] == json.loads((workdir / "wandb.json").read_text())["id"]
    assert calls == [
        ["log", {"epoch": 1, "loss": 1.0}, {"step": 1, "commit": True}],
        ["log", {"epoch": 2, "loss": 0.5}, {"step": 2, "commit": True}],
        ["summary", {"result/natural": 99.0, "result/linf_8_255": 50.0}, {}],
        ["finish", {"exit_code": 0}],
    ]


def test_a_restart_goes_on_in_the_same_run_with_what_it_lacks(
    tmp_path, wandb, monkeypatch
):
    workdir = helpers.make_folder(tmp_path / "run")
    track_steps(workdir, 1, 2, finish=False)
    first = wandb()
    assert first[-1] == ["finish", {"exit_code": 1}]
    make_log(workdir, 3)  # written, and then killed: W&B did not get it
    monkeypatch.setenv("WANDB_STEP", "3")  # its next one
    track_steps(workdir, 4)
    init, *calls = wandb()[len(first) :]
    assert init[1]["id"] == first[0][1]["id"]
    assert [call[2]["step"] for call in calls if call[0] == "log"] == [3, 4]


def test_two_workdirs_are_two_runs(tmp_path, wandb):
    for name in ("a", "b"):
        track_steps(helpers.make_folder(tmp_path / name), 1)
    ids = {call[1]["id"] for call in wandb() if call[0] == "init"}
    assert len(ids) == 2


@pytest.mark.parametrize("where", ["init", "log", "summary", "finish"])
def test_a_tracker_that_fails_warns_once_and_the_run_goes_on(
    tmp_path, wandb, monkeypatch, where
):
    workdir = helpers.make_folder(tmp_path / "run")
    monkeypatch.setenv("WANDB_FAILS", where)
    with pytest.warns(UserWarning, match="no network.*metrics.jsonl has") as caught:
        told = track_steps(workdir, 1, 2, 3)
    assert len(caught) == 1
    assert len(told) == 7
    assert sum(call[0] == where for call in wandb()) == 1
    names = [call[0] for call in wandb()]
    assert names.count("finish") == (where != "init")  # closed, and once
    assert ("teardown" in names) == (where == "finish")


def test_one_tracker_that_fails_does_not_stop_the_other(tmp_path, wandb, monkeypatch):
    pytest.importorskip("tensorboardX")
    monkeypatch.setenv("WANDB_FAILS", "log")
    config = helpers.make_config("st", {**ON, "tracking.wandb": "sharp"})
    workdir = helpers.make_folder(tmp_path / "run")
    make_log(workdir, 1, 2)
    on = Tracking(config, workdir)
    follow = on.following(lambda _: None)
    with pytest.warns(UserWarning, match="no network"):
        follow(progress(2, {"step": 2}))
    on.finish({"natural": 99.0})
    on.close()
    assert read_scalars(workdir)["loss"] == [(1, 1.0), (2, 0.5)]
    assert [call[0] for call in wandb()] == ["init", "log", "finish"]
    assert wandb()[-1][-1] == {"exit_code": 1}


def test_an_end_that_is_not_sent_is_not_awaited_for_ever(tmp_path, wandb, monkeypatch):
    monkeypatch.setattr(tracking, "_PATIENCE", 0.05)
    workdir = helpers.make_folder(tmp_path / "run")
    config = helpers.make_config("st", {"tracking.wandb": "sharp"})
    make_log(workdir, 1)
    on = Tracking(config, workdir)
    on.finish({"natural": 99.0})
    over = threading.Event()
    monkeypatch.setattr(
        sys.modules["wandb"].Run, "finish", lambda *_, **__: over.wait()
    )
    with pytest.warns(UserWarning, match="`wandb sync` sends it later"):
        on.close()
    over.set()
    assert wandb()


# Packages.


@pytest.mark.parametrize(
    ("field", "value", "command"),
    [
        ("tensorboard", True, r"pip install 'tensorboardX>=2\.6'"),
        ("wandb", "sharp", r"pip install 'wandb>=0\.18'"),
    ],
)
def test_a_missing_package_is_refused_with_the_command_that_installs_it(
    tmp_path, monkeypatch, field, value, command
):
    helpers.make_folder(tmp_path / "wandb")  # as W&B leaves it: no package
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.setattr(sys, "path_importer_cache", {})
    for name in ("tensorboardX", "wandb"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    config = helpers.make_config("st", {f"tracking.{field}": value})
    with pytest.raises(ValueError, match=rf"tracking\.{field}={value!r}.*{command}"):
        check_trackers(config, tmp_path)
    check_trackers(helpers.make_config("st"), tmp_path)


@pytest.mark.parametrize("command", ["table", "train"])
def test_the_commands_refuse_it_before_any_work(tmp_path, capsys, monkeypatch, command):
    monkeypatch.setattr(tracking.util, "find_spec", lambda _: None)
    row = ":st" if command == "train" else ""
    code = helpers.main(
        *(command, f"--config=configs/digits.py{row}", f"--workdir={tmp_path}/run"),
        "--config.tracking.tensorboard=True",
    )
    assert code == 2
    assert "Expected the package tensorboardX, got" in capsys.readouterr().err
    assert os.listdir(tmp_path) == []
