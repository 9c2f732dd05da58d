"""The command in two processes that meet over loopback: one end for both."""

import contextlib
import json
import pathlib
import random
import resource
import shutil
import signal
import subprocess
import time

import helpers
import pytest

from samrobust.system.claims import claim

ST = "st"  # how processes end does not depend on what they do

LONG = {
    "data.train_size": 256,
    "training.batch_size": 16,
    "training.epochs": 3,
    "checkpoint.minutes": 0.001,
    "evaluation.linf": (),
}
NUM_STEPS = 48
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


def assert_ends_like(workdir: pathlib.Path, undisturbed: pathlib.Path) -> None:
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
def test_sigterm_to_any_process_stops_all_at_the_same_step(
    tmp_path, cache, undisturbed
):
    """Soon, and again after a resumption: then there are more steps than calls."""
    for victim in (1, 0):
        began = newest(tmp_path)
        group = helpers.start_command_group(2, *arguments_of(tmp_path), **cache)
        wait_until(group, tmp_path, began + 3)
        group[victim].send_signal(signal.SIGTERM)
        asked = time.monotonic()
        outcomes = helpers.finish_group(group)
        # How many steps that makes depends on how long a checkpoint takes.
        assert time.monotonic() - asked < 15
        assert [code for code, *_ in outcomes] == [75, 75], outcomes
        step = newest(tmp_path)
        assert (
            f"Stopped at step {step} of {NUM_STEPS}; the state is saved."
            in (outcomes[0][2])
        )
    outcomes = helpers.finish_group(
        helpers.start_command_group(2, *arguments_of(tmp_path, RARELY), **cache)
    )
    assert [code for code, *_ in outcomes] == [0, 0], outcomes
    assert_ends_like(tmp_path, undisturbed)


@pytest.mark.slow
def test_a_run_whose_workdir_was_taken_over_ends_and_leaves_the_files_alone(
    tmp_path, cache
):
    """But for a checkpoint that it was writing already."""
    lease = {"SAMROBUST_CLAIM_LEASE": "1"}
    # It saves every 0.6 s, so just after a checkpoint it writes none.
    arguments = arguments_of(
        tmp_path, {"training.epochs": 6, "checkpoint.minutes": 0.01}
    )
    group = helpers.start_command_group(2, *arguments, **cache, **lease)
    wait_until(group, tmp_path, 1)
    for process in group:
        process.send_signal(signal.SIGSTOP)
    time.sleep(2)
    folder = tmp_path / "checkpoints" / "last"
    with claim(tmp_path):
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
    for arguments in (command, arguments_of(undisturbed)):
        outcomes = helpers.finish_group(
            helpers.start_command_group(2, *arguments, **cache)
        )
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
@pytest.mark.parametrize("victim", [0, 1])
def test_a_dead_process_ends_the_other_in_bounded_time(tmp_path, cache, victim):
    group = helpers.start_command_group(2, *arguments_of(tmp_path), **cache)
    wait_until(group, tmp_path, 5)
    group[victim].kill()
    killed = time.monotonic()
    outcomes = helpers.finish_group(group)
    assert time.monotonic() - killed < 40  # heartbeats may be silent for 10 s
    code, _, errors = outcomes[1 - victim]
    assert code not in (0, 75)
    assert "Another process of this run died" in errors or (
        "another task died" in errors  # JAX's own words when process 0 is gone
    )
    assert newest(tmp_path) >= 5


@pytest.mark.slow
def test_a_full_disk_ends_all_and_keeps_what_is_written(tmp_path, cache):
    """A limit on the size of files stands in for a full disk."""
    group = helpers.start_command_group(2, *arguments_of(tmp_path), **cache)
    wait_until(group, tmp_path, 5)
    resource.prlimit(group[0].pid, resource.RLIMIT_FSIZE, (1, 1))
    outcomes = helpers.finish_group(group)
    assert [code for code, *_ in outcomes] == [1, 1], outcomes
    assert "File too large" in outcomes[0][2]
    # A line of the log fails in all, and process 0 says so; a checkpoint in it alone.
    assert outcomes[1][2] == "" or "process 0 failed: " in outcomes[1][2]
    assert newest(tmp_path) >= 5
    outcomes = helpers.finish_group(
        helpers.start_command_group(2, *arguments_of(tmp_path, RARELY), **cache)
    )
    assert [code for code, *_ in outcomes] == [0, 0], outcomes


@pytest.mark.slow
def test_processes_killed_at_random_end_bit_identical(tmp_path, cache, undisturbed):
    """SIGTERM and SIGKILL, to a random process, at random moments, again and again."""
    chance = random.Random(0)
    kinds = []
    while newest(tmp_path) < NUM_STEPS:
        group = helpers.start_command_group(2, *arguments_of(tmp_path), **cache)
        step = newest(tmp_path) + chance.randint(4, 12)
        kind = None
        with contextlib.suppress(AssertionError):  # it ended before
            wait_until(group, tmp_path, min(step, NUM_STEPS))
            time.sleep(chance.uniform(0, 0.1))
            kind = chance.choice([signal.SIGTERM, signal.SIGKILL])
            group[chance.randrange(2)].send_signal(kind)
            kinds.append(kind)
        outcomes = helpers.finish_group(group)
        if kind != signal.SIGKILL and newest(tmp_path) < NUM_STEPS:
            assert [code for code, *_ in outcomes] == [75, 75], outcomes
    assert len(set(kinds)) == 2
    outcomes = helpers.finish_group(
        helpers.start_command_group(2, *arguments_of(tmp_path, RARELY), **cache)
    )
    assert [code for code, *_ in outcomes] == [0, 0], outcomes
    assert_ends_like(tmp_path, undisturbed)


@pytest.mark.slow
def test_a_table_of_two_processes_goes_on_after_a_run_that_fails(tmp_path, cache):
    config, diverging = helpers.write_diverging_config(tmp_path), helpers.DIVERGING
    arguments = [
        *("table", f"--config={config}", f"--workdir={tmp_path}"),
        *(f"--rows={row}" for row in (diverging, ST)),
        *helpers.make_flags(),
    ]
    outcomes = helpers.finish_group(helpers.start_command_group(2, *arguments, **cache))
    assert [code for code, *_ in outcomes] == [1, 1], outcomes
    assert outcomes[1][1:] == ("", "")
    assert "failed SAM (rho = 0.4), seed 0: The loss, a gradient" in outcomes[0][1]
    assert "| ST |" in (tmp_path / "table.md").read_text()
    failure = json.loads((tmp_path / diverging / "seed0" / "failure.json").read_text())
    assert failure["error"] == "TrainingDivergedError"
    assert json.loads((tmp_path / ST / "seed0" / "result.json").read_text())


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"training.momentum": 0.5}, "training.momentum was 0.9, is 0.5"),
        ({"data.train_size": 9999}, "train_size"),
    ],
)
def test_what_cannot_work_ends_all_processes_with_code_2(
    cache, undisturbed, overrides, message
):
    arguments = arguments_of(undisturbed, overrides)
    outcomes = helpers.finish_group(helpers.start_command_group(2, *arguments, **cache))
    assert [code for code, *_ in outcomes] == [2, 2], outcomes
    assert message in outcomes[0][2]
