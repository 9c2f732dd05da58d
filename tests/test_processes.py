"""One process or several: the same numbers, and one end.

Real processes that meet over loopback. Those of the first half run this file as a
script; those of the second half the `samrobust` command.
"""

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

import helpers
import jax
import pytest

from samrobust import parallel
from samrobust.claims import claim
from samrobust.experiments import evaluate_run, run
from samrobust.training import InterruptedRunError, train

ST, SAM, AT = "st", "sam,rho=0.2", "at,norm=linf,eps=16"
ROWS = [ST, SAM, AT]
# Sums over a batch are taken in another order, and BatchNorm and the steps of PGD
# make the differences grow; over 12 steps they stay far below this.
TOLERANCE = 1e-4
# Processes and devices of each. The first one is this process itself.
LAYOUTS = {"1x1": (1, 1), "1x2": (1, 2), "1x8": (1, 8), "2x1": (2, 1), "2x2": (2, 2)}
SEVERAL = [layout for layout in LAYOUTS if layout != "1x1"]
VALIDATED = {"data.validation_size": 50, "evaluation.checkpoint": "best"}
EARLY = {"evaluation.judge": "any", "evaluation.early_stop": True}


def work(folder: pathlib.Path, layout: str) -> None:
    """What every process of a layout does."""
    for row in ROWS:
        uneven = {"evaluation.batch_size": 13, **(VALIDATED if row == SAM else {})}
        config = helpers.make_config(row, uneven)
        dataset = helpers.load_data(config)
        run(config, folder / layout / row, helpers.Silent(), dataset=dataset)
    config = helpers.make_config(AT, EARLY)
    dataset = helpers.load_data(config)
    accuracy = evaluate_run(
        config, folder / layout / AT, helpers.Silent(), dataset=dataset
    )
    values = parallel.from_primary(lambda: {"who": 0, "layout": layout})
    assert values == {"who": 0, "layout": layout}
    try:
        parallel.from_primary(lambda: 1 // 0)
    except ZeroDivisionError as error:
        assert parallel.is_shared(error) == (jax.process_count() > 1)  # noqa: PT017
    if parallel.is_primary():
        (folder / layout / "early.json").write_text(json.dumps(accuracy))
    if layout == "2x1":
        move(folder / "1x1 to 2x1")
        start_to_move(folder / "2x1 to 1x1")


def start_to_move(workdir: pathlib.Path) -> None:
    """The first steps of a run that will go on elsewhere."""
    config = helpers.make_config(SAM)
    answers = iter([False] * 4)
    with contextlib.suppress(InterruptedRunError):
        train(
            config,
            helpers.load_data(config),
            workdir,
            should_stop=lambda: next(answers, True),
        )


def move(workdir: pathlib.Path) -> None:
    """The rest of it."""
    config = helpers.make_config(SAM)
    train(config, helpers.load_data(config), workdir)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> pathlib.Path:
    """The runs in all layouts."""
    folder = tmp_path_factory.mktemp("processes")
    with helpers.quick_compilation():
        start_to_move(folder / "1x1 to 2x1")
        work(folder, "1x1")
        for layout, (count, devices) in LAYOUTS.items():
            if layout == "1x1":
                continue
            outcomes = helpers.finish_group(
                helpers.start_group(
                    [[sys.executable, "-W", "error", __file__, str(folder), layout]]
                    * count,
                    devices=devices,
                    **helpers.QUICK_COMPILATION,
                )
            )
            for code, _, errors in outcomes:
                assert code == 0, errors
        move(folder / "2x1 to 1x1")
    return folder


def assert_equal_runs(workdir: pathlib.Path, expected: pathlib.Path) -> None:
    helpers.assert_equal_runs(workdir, expected, tolerance=TOLERANCE)


def result_of(folder: pathlib.Path, layout: str, row: str) -> dict:
    return json.loads((folder / layout / row / "result.json").read_text())


@pytest.mark.slow
@pytest.mark.parametrize("row", [ST, AT])
@pytest.mark.parametrize("layout", SEVERAL)
def test_every_layout_trains_to_the_same_numbers(folder, layout, row):
    assert_equal_runs(folder / layout / row, folder / "1x1" / row)


@pytest.mark.parametrize("which", ["last", "best"])
@pytest.mark.parametrize("row", [ST, SAM, AT])
def test_two_processes_end_bit_identical_to_two_devices_of_one(folder, row, which):
    if which == "best" and row != SAM:
        pytest.skip("this row keeps no best checkpoint")
    one, two = (
        helpers.read_checkpoint(folder / layout / row, which)
        for layout in ("1x2", "2x1")
    )
    assert len(one) > 20
    helpers.assert_same_bits(two, one)
    assert helpers.log_of(folder / "2x1" / row) == helpers.log_of(folder / "1x2" / row)


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("layout", SEVERAL)
def test_every_layout_measures_the_same_accuracies(folder, layout, row):
    """But for one of the 48 images, which may lie on the border of its class."""
    result, expected = (result_of(folder, name, row) for name in (layout, "1x1"))
    assert result["accuracy"] == pytest.approx(expected["accuracy"], abs=100.1 / 48)
    count, devices = LAYOUTS[layout]
    provenance = result["provenance"]
    assert provenance["num_processes"] == count
    assert provenance["num_devices"] == count * devices


@pytest.mark.parametrize("layout", SEVERAL)
def test_evaluation_with_early_stop_too(folder, layout):
    accuracy, expected = (
        json.loads((folder / name / "early.json").read_text())
        for name in (layout, "1x1")
    )
    assert accuracy == pytest.approx(expected, abs=100.1 / 48)


@pytest.mark.parametrize("way", ["1x1 to 2x1", "2x1 to 1x1"])
def test_a_run_moves_to_another_number_of_processes(folder, way):
    config = helpers.make_config(SAM)
    with helpers.quick_compilation():
        train(config, helpers.load_data(config), folder / "unmoved")
    assert_equal_runs(folder / way, folder / "unmoved")


# The command.

LONG = {
    "data.train_size": 256,
    "training.batch_size": 16,
    "training.epochs": 10,
    "checkpoint.minutes": 0.001,
}
NUM_STEPS = 160


def arguments_of(workdir: pathlib.Path, overrides: dict | None = None) -> list[str]:
    return [
        *("train", f"--config=configs/digits.py:{SAM}", f"--workdir={workdir}"),
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
    return {**helpers.QUICK_COMPILATION, "JAX_COMPILATION_CACHE_DIR": str(folder)}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, cache) -> pathlib.Path:
    """A run of two processes from its start to its end."""
    workdir = tmp_path_factory.mktemp("undisturbed")
    outcomes = helpers.finish_group(
        helpers.start_command_group(2, *arguments_of(workdir), **cache)
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
        wait_until(group, tmp_path, began + 15)
        asked = newest(tmp_path)
        group[victim].send_signal(signal.SIGTERM)
        outcomes = helpers.finish_group(group)
        assert [code for code, *_ in outcomes] == [75, 75], outcomes
        step = newest(tmp_path)
        assert (
            f"Stopped at step {step} of {NUM_STEPS}; the state is saved."
            in (outcomes[0][2])
        )
        assert step - asked < 25  # the signal and the checkpoint take time, too
    outcomes = helpers.finish_group(
        helpers.start_command_group(2, *arguments_of(tmp_path), **cache)
    )
    assert [code for code, *_ in outcomes] == [0, 0], outcomes
    assert_ends_like(tmp_path, undisturbed)


@pytest.mark.slow
def test_a_run_whose_workdir_was_taken_over_ends_and_leaves_the_files_alone(
    tmp_path, cache
):
    """But for a checkpoint that it was writing already."""
    lease = {"SAMROBUST_CLAIM_LEASE": "1"}
    group = helpers.start_command_group(2, *arguments_of(tmp_path), **cache, **lease)
    wait_until(group, tmp_path, 10)
    for process in group:
        process.send_signal(signal.SIGSTOP)
    time.sleep(2)
    folder = tmp_path / "checkpoints" / "last"
    with claim(tmp_path):
        shutil.copytree(folder / str(newest(tmp_path)), folder / "150")  # by its heir
        for process in group:
            process.send_signal(signal.SIGCONT)
        outcomes = helpers.finish_group(group)
        assert [code for code, *_ in outcomes] == [2, 2], outcomes
        assert "took over" in outcomes[0][2]
        assert newest(tmp_path) == 150
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
    wait_until(group, tmp_path, 10)
    group[victim].kill()
    killed = time.monotonic()
    outcomes = helpers.finish_group(group)
    assert time.monotonic() - killed < 40  # heartbeats may be silent for 10 s
    code, _, errors = outcomes[1 - victim]
    assert code not in (0, 75)
    assert "Another process of this run is gone" in errors or (
        "another task died" in errors  # JAX's own words when process 0 is gone
    )
    assert newest(tmp_path) >= 10


@pytest.mark.slow
def test_a_full_disk_ends_all_and_keeps_what_is_written(tmp_path, cache):
    """A limit on the size of files stands in for a full disk."""
    group = helpers.start_command_group(2, *arguments_of(tmp_path), **cache)
    wait_until(group, tmp_path, 10)
    resource.prlimit(group[0].pid, resource.RLIMIT_FSIZE, (1, 1))
    outcomes = helpers.finish_group(group)
    assert [code for code, *_ in outcomes] == [1, 1], outcomes
    assert "process 0 failed: " in outcomes[1][2]
    assert newest(tmp_path) >= 10
    outcomes = helpers.finish_group(
        helpers.start_command_group(2, *arguments_of(tmp_path), **cache)
    )
    assert [code for code, *_ in outcomes] == [0, 0], outcomes


@pytest.mark.slow
def test_processes_killed_at_random_end_bit_identical(tmp_path, cache, undisturbed):
    """SIGTERM and SIGKILL, to a random process, at random moments, again and again."""
    chance = random.Random(0)
    kinds = []
    while newest(tmp_path) < NUM_STEPS:
        group = helpers.start_command_group(2, *arguments_of(tmp_path), **cache)
        step = newest(tmp_path) + chance.randint(1, 60)
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
        helpers.start_command_group(2, *arguments_of(tmp_path), **cache)
    )
    assert [code for code, *_ in outcomes] == [0, 0], outcomes
    assert_ends_like(tmp_path, undisturbed)


@pytest.mark.slow
def test_a_table_of_two_processes_goes_on_after_a_run_that_fails(tmp_path, cache):
    diverging = "sam,rho=1e30"  # overflows in the second pass of its first step
    arguments = [
        *("table", "--config=configs/digits.py", f"--workdir={tmp_path}"),
        *(f"--rows={row}" for row in (diverging, ST)),
        *helpers.make_flags(),
    ]
    outcomes = helpers.finish_group(helpers.start_command_group(2, *arguments, **cache))
    assert [code for code, *_ in outcomes] == [1, 1], outcomes
    assert outcomes[1][1:] == ("", "")
    assert "failed SAM (rho = 1e+30), seed 0: The loss, a gradient" in outcomes[0][1]
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


if __name__ == "__main__":
    parallel.join(lambda: False)
    work(pathlib.Path(sys.argv[1]), sys.argv[2])
    parallel.part()
