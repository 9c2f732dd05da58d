"""The command in two processes that meet over loopback: one end for both."""

import contextlib
import json
import pathlib
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from typing import NamedTuple

import helpers
import numpy as np
import pytest

from samrobust.experiments.run import run
from samrobust.system.claims.lease import ClaimedError, claim

ST = "st"  # how processes end does not depend on what they do

LONG = {
    "data.train_size": 256,
    "training.batch_size": 16,
    "training.epochs": 6,
    "checkpoint.minutes": 0.001,
    "evaluation.linf": (),
}
NUM_STEPS = 96
# For starts that nobody disturbs: how often a run saves may change, and costs time.
RARELY = {"checkpoint.minutes": 10.0}


def arguments_of(workdir: pathlib.Path, overrides: dict | None = None) -> list[str]:
    return [
        *("train", f"--config=configs/digits.py:{ST}", f"--workdir={workdir}"),
        *helpers.make_flags({**LONG, **(overrides or {})}),
    ]


def newest(workdir: pathlib.Path) -> int:
    return max(helpers.checkpoint_steps(workdir), default=0)


def wait_until(processes: list[subprocess.Popen], workdir: pathlib.Path, step: int):
    """Until a checkpoint of the step, or of a later one, is written."""
    while newest(workdir) < step:
        assert all(process.poll() is None for process in processes)
        time.sleep(0.005)


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> dict[str, str]:
    """A cache of compiled programs for processes that are killed."""
    folder = tmp_path_factory.mktemp("xla")
    return {"JAX_COMPILATION_CACHE_DIR": str(folder)}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, cache) -> pathlib.Path:
    """A run of two processes from its start to its end."""
    workdir = tmp_path_factory.mktemp("undisturbed")
    outcomes = helpers.finish_group(
        helpers.start_command_group(2, *arguments_of(workdir, RARELY), **cache)
    )
    assert [code for code, *_ in outcomes] == [0, 0], outcomes
    assert "natural" in outcomes[0][1]
    assert outcomes[1][1:] == ("", "")  # process 0 alone speaks
    return workdir


# What ends both processes of a start, each given as a group.
DISTURBANCES = {
    # Twice: after a resumption there are more steps than calls.
    "SIGTERM to 1": lambda group: group[1].send_signal(signal.SIGTERM),
    "SIGTERM to 0": lambda group: group[0].send_signal(signal.SIGTERM),
    "death of 1": lambda group: group[1].kill(),
    "death of 0": lambda group: group[0].kill(),
    # A limit on the size of files stands in for it.
    "full disk": lambda group: resource.prlimit(
        group[0].pid, resource.RLIMIT_FSIZE, (1, 1)
    ),
}


class End(NamedTuple):
    """How both processes of a start ended; the newest checkpoints before and after."""

    outcomes: list[tuple[int, str, str]]
    began: int
    step: int


@pytest.fixture(scope="module")
def disturbed(tmp_path_factory, cache) -> tuple[pathlib.Path, dict[str, End]]:
    """A run disturbed in every way, each time it is started, and finished at last."""
    workdir = tmp_path_factory.mktemp("disturbed")
    chance = random.Random(0)
    ends = {}
    for name, disturb in DISTURBANCES.items():
        began = newest(workdir)
        group = helpers.start_command_group(2, *arguments_of(workdir), **cache)
        wait_until(group, workdir, began + chance.randint(2, 5))
        time.sleep(chance.uniform(0, 0.1))  # at any moment of a step
        disturb(group)
        ends[name] = End(helpers.finish_group(group), began, newest(workdir))
    outcomes = helpers.finish_group(
        helpers.start_command_group(2, *arguments_of(workdir, RARELY), **cache)
    )
    assert [code for code, *_ in outcomes] == [0, 0], outcomes
    return workdir, ends


@pytest.mark.slow
@pytest.mark.parametrize("victim", [1, 0])
def test_sigterm_to_any_process_stops_all_at_the_same_step(disturbed, victim):
    end = disturbed[1][f"SIGTERM to {victim}"]
    assert [code for code, *_ in end.outcomes] == [75, 75], end.outcomes
    words = f"Stopped at step {end.step} of {NUM_STEPS}; the state is saved."
    assert words in end.outcomes[0][2]
    assert end.began < end.step < NUM_STEPS


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_dead_process_ends_the_other(disturbed, victim):
    end = disturbed[1][f"death of {victim}"]
    code, _, errors = end.outcomes[1 - victim]
    assert code not in (0, 75)
    assert "Another process of this run died" in errors or (
        "another task died" in errors  # JAX's own words when process 0 is gone
    )
    assert end.step > end.began


@pytest.mark.slow
def test_a_full_disk_ends_all_and_keeps_what_is_written(disturbed):
    end = disturbed[1]["full disk"]
    assert [code for code, *_ in end.outcomes] == [1, 1], end.outcomes
    assert "File too large" in end.outcomes[0][2]
    # A line of the log fails in all, and process 0 says so; a checkpoint in it alone.
    errors = end.outcomes[1][2]
    assert errors == "" or "process 0 failed: " in errors
    assert end.step > end.began


@pytest.mark.slow
def test_a_run_disturbed_in_every_way_ends_bit_identical(disturbed, undisturbed):
    workdir, _ = disturbed
    helpers.assert_same_bits(
        helpers.read_checkpoint(workdir), helpers.read_checkpoint(undisturbed)
    )
    assert helpers.log_of(workdir) == helpers.log_of(undisturbed)
    one, other = (
        json.loads((path / "result.json").read_text())["accuracy"]
        for path in (workdir, undisturbed)
    )
    assert one == other


@pytest.mark.slow
def test_a_run_whose_workdir_was_taken_over_ends_and_leaves_the_files_alone(
    tmp_path, cache
):
    """But for a checkpoint that it was writing already."""
    lease = {"SAMROBUST_CLAIM_LEASE": "1"}
    # It saves every 0.6 s, so just after a checkpoint it writes none.
    arguments = arguments_of(tmp_path, {"checkpoint.minutes": 0.01})
    group = helpers.start_command_group(2, *arguments, **cache, **lease)
    wait_until(group, tmp_path, 1)
    for process in group:
        process.send_signal(signal.SIGSTOP)
    folder = tmp_path / "checkpoints" / "last"
    with contextlib.ExitStack() as heir:
        while True:  # until the lease of those that stand still is over
            with contextlib.suppress(ClaimedError):
                heir.enter_context(claim(tmp_path))
                break
            time.sleep(0.05)
        shutil.copytree(folder / str(newest(tmp_path)), folder / "95")  # by its heir
        for process in group:
            process.send_signal(signal.SIGCONT)
        outcomes = helpers.finish_group(group)
        assert [code for code, *_ in outcomes] == [69, 69], outcomes
        assert "took over" in outcomes[0][2]
        assert newest(tmp_path) == 95
    assert not (tmp_path / "failure.json").exists()


@pytest.mark.slow
def test_a_finished_run_is_evaluated_and_left_in_order(cache, undisturbed):
    command = ("evaluate", f"--workdir={undisturbed}")
    outcomes = helpers.finish_group(helpers.start_command_group(2, *command, **cache))
    assert [code for code, *_ in outcomes] == [0, 0], outcomes
    assert [errors for *_, errors in outcomes] == ["", ""]
    (line,) = helpers.read_lines(undisturbed / "evaluations.jsonl")
    result = json.loads((undisturbed / "result.json").read_text())
    assert line["accuracy"] == result["accuracy"]


@pytest.mark.slow
def test_processes_that_were_started_differently_are_refused(tmp_path, cache):
    commands = [
        arguments_of(tmp_path, {"training.momentum": momentum})
        for momentum in (0.9, 0.5)
    ]
    group = helpers.start_different_commands(commands, **cache)
    outcomes = helpers.finish_group(group)
    assert [code for code, *_ in outcomes] == [2, 2], outcomes
    assert "the same config and the same data in all processes" in outcomes[1][2]
    assert "momentum" in outcomes[1][2]


@pytest.mark.slow
@pytest.mark.parametrize("command", ["evaluate", "curves"])
def test_a_finished_run_is_not_judged_on_two_data_sets(
    tmp_path, monkeypatch, cache, command
):
    folders = [helpers.make_folder(tmp_path / name) for name in ("one", "other")]
    images = helpers.make_split(32).images
    for labels, folder in enumerate(folders):
        y = (np.arange(32) + labels) % 4
        arrays = {"x_train": images, "y_train": y, "x_test": images, "y_test": y}
        np.savez(folder / "data.npz", **arrays)
    whole = {"data.train_size": None, "data.test_size": None}
    config = helpers.make_config(
        ST, {"data.name": "data.npz", "training.epochs": 1, **whole}
    )
    monkeypatch.chdir(folders[0])
    workdir = tmp_path / "table" / ST / "seed0"
    run(config, workdir, helpers.Silent(), dataset=helpers.load_data(config))
    arguments = {
        "evaluate": [f"--workdir={workdir}"],
        "curves": [f"--workdir={tmp_path / 'table'}", "--linf=8", "--l2="],
    }
    program = [sys.executable, "-m", "samrobust.cli", command, *arguments[command]]
    group = helpers.start_group(
        [["env", f"--chdir={folder}", *program] for folder in folders],
        **cache,
        PYTHONPATH=str(helpers.ROOT),
    )
    outcomes = helpers.finish_group(group)
    assert [code for code, *_ in outcomes] == [2, 2], outcomes
    assert "the same data in all processes, got differences" in outcomes[1][2]


@pytest.mark.slow
def test_a_table_of_two_processes_goes_on_after_a_run_that_fails(tmp_path, cache):
    config, diverging = helpers.write_diverging_config(tmp_path), helpers.DIVERGING
    arguments = [
        *("table", f"--config={config}", f"--workdir={tmp_path}"),
        *(f"--rows={row}" for row in (diverging, ST)),
        *helpers.make_flags({**LONG, **RARELY}),
    ]
    outcomes = helpers.finish_group(helpers.start_command_group(2, *arguments, **cache))
    assert [code for code, *_ in outcomes] == [1, 1], outcomes
    assert outcomes[1][1:] == ("", "")
    assert "failed SAM (rho = 0.4), seed 0: The loss, a gradient" in outcomes[0][1]
    assert "| ST |" in (tmp_path / "table.md").read_text()
    failure = json.loads((tmp_path / diverging / "seed0" / "failure.json").read_text())
    assert failure["error"] == "TrainingDivergedError"
    assert json.loads((tmp_path / ST / "seed0" / "result.json").read_text())
