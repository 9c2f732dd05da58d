"""The progress display: a bar with an ETA on a terminal, lines elsewhere."""

import io

import jax
import pytest
from rich.console import Console

from samrobust.experiments.reporting import progress as progress_module
from samrobust.experiments.reporting.progress import ProgressDisplay
from samrobust.experiments.scoring import in_parts
from samrobust.training import Progress

METRICS = {"epoch": 3, "loss": 0.25, "accuracy": 91.5}


def make(terminal, total=10.0):
    file = io.StringIO()
    console = Console(file=file, force_terminal=terminal, width=100)
    return ProgressDisplay(console, total), file


def test_without_a_terminal_a_line_says_share_metrics_and_eta(monkeypatch):
    display, file = make(terminal=False)
    with display.live():
        run = display.run("ST, seed 0", 8.0, 2.0)
        monkeypatch.setattr(progress_module, "_SECONDS_BETWEEN_LINES", 0.0)
        run.on_progress(Progress("compiling", 0, 10, {}))
        run.on_progress(Progress("training", 5, 10, METRICS))
    line = file.getvalue()
    assert " 40%  ST, seed 0: training 50%, loss 0.250, accuracy 91.5 %" in line
    assert "eta" in line


def test_without_a_terminal_a_line_is_one_however_long_and_its_eta_not_negative():
    display, file = make(terminal=False, total=0.3)
    display.show("waiting for " + 20 * "AT (linf, eps = 8/255), seed 0; ", 0.1 + 0.2)
    (line,) = file.getvalue().splitlines()
    assert line.startswith("100%  waiting for ")
    assert line.endswith("(elapsed 0 s, eta 0 s)")


def test_the_share_of_a_run_that_goes_on_is_of_the_work_that_was_left(monkeypatch):
    monkeypatch.setattr(progress_module, "_SECONDS_BETWEEN_LINES", 0.0)
    display, file = make(terminal=False)
    with display.live():
        run = display.run("ST, seed 0", 8.0, 2.0)
        run.on_progress(Progress("compiling", 5, 10, {}))  # 4 of 10 units done before
        run.on_progress(Progress("training", 10, 10, {}))  # 4 of 6 done here
    compiling, training = file.getvalue().splitlines()
    assert compiling.startswith("  0%")
    assert training.startswith(" 67%")


def test_without_a_terminal_lines_are_rare():
    display, file = make(terminal=False)
    with display.live():
        run = display.run("ST, seed 0", 8.0, 2.0)
        for step in range(10):
            run.on_progress(Progress("training", step, 10, {}))
    assert file.getvalue().count("training") == 1


def test_on_a_terminal_a_bar_shows_the_run_and_an_eta():
    display, file = make(terminal=True)
    with display.live():
        display.run("SAM", 8.0, 2.0).on_progress(Progress("training", 5, 10, METRICS))
    assert "SAM: training 50%, loss 0.250, accuracy 91.5 %" in file.getvalue()
    assert "eta" in file.getvalue()


def test_runs_share_the_bar_in_proportion_to_their_work(monkeypatch):
    monkeypatch.setattr(progress_module, "_SECONDS_BETWEEN_LINES", 0.0)
    display, file = make(terminal=False, total=20.0)
    with display.live():
        for name, done in (("first", 500), ("second", 250)):
            run = display.run(name, 8.0, 2.0)
            run.on_progress(Progress("compiling", 0, 10, {}))
            run.on_batch(done, 500)
    lines = [line for line in file.getvalue().splitlines() if "attacked" in line]
    assert lines[0].startswith(" 50%  first: attacked 500 of 500 images")
    assert lines[1].startswith(" 95%  second: attacked 250 of 500 images")


def test_an_evaluation_in_parts_goes_on_where_the_part_before_ended():
    display, _ = make(terminal=False, total=20.0)
    run, done = display.run("first", 8.0, 2.0), []
    for part in in_parts(run.on_batch, [1, 3]):
        for count in (1, 10, 20):
            part(count, 20)
            done.append(run.done - 8)
    expected = [0.025, 0.25, 0.5, 0.575, 1.25, 2]
    assert done == pytest.approx(expected, abs=1e-5)


def test_epochs_that_an_earlier_run_leaves_are_no_work_of_a_later_one(monkeypatch):
    monkeypatch.setattr(progress_module, "_SECONDS_BETWEEN_LINES", 0.0)
    for begun, shares in ((5, (" 62%", " 88%")), (0, (" 50%", " 90%"))):
        display, file = make(terminal=False, total=16.0)
        with display.live():
            first = display.run("first", 8.0, 2.0)
            first.on_progress(Progress("training", 0, 10, {}))
            first.on_batch(500, 500)
            run = display.run("second", 8.0, 2.0, 4.0)
            run.on_progress(
                Progress("compiling", begun, 10, {})
            )  # 0: the trunk is lost
            run.on_progress(Progress("training", 10, 10, {}))
        *_, compiling, training = file.getvalue().splitlines()
        assert (compiling[:4], training[:4]) == shares


def test_outcomes_that_are_only_read_promise_no_speed(monkeypatch):
    """Of a run whose second part, nearly all of its work, an earlier call has done."""
    now = 0.0
    monkeypatch.setattr(progress_module.time, "monotonic", lambda: now)
    monkeypatch.setattr(progress_module, "_SECONDS_BETWEEN_LINES", 0.0)
    display, file = make(terminal=False, total=200.0)
    with display.live():
        read, _ = in_parts(display.run("read", 0.0, 100.0).on_batch, [1, 99])
        now = 1.0
        read(20, 20)
        run = display.run("measured", 0.0, 100.0)
        measured, attacked = in_parts(run.on_batch, [1, 99])
        measured(20, 20)
        now = 51.0
        attacked(10, 20)
    assert file.getvalue().splitlines()[-1].endswith("(elapsed 51 s, eta 49 s)")


def test_a_run_done_elsewhere_leaves_the_total_and_may_come_again(monkeypatch):
    monkeypatch.setattr(progress_module, "_SECONDS_BETWEEN_LINES", 0.0)
    display, file = make(terminal=False, total=30.0)
    with display.live():
        display.run("held", 8.0, 2.0)  # and never told of progress
        mine = display.run("mine", 8.0, 2.0)
        mine.on_progress(Progress("training", 0, 10, {}))
        mine.on_batch(500, 500)
        display.run("held too", 8.0, 2.0)
        display.wait_for(["held", "held too"])
        again = display.run("held", 8.0, 2.0)
        again.on_progress(Progress("training", 0, 10, {}))
        again.on_batch(250, 500)
    *_, attacked, waiting, training, last = file.getvalue().splitlines()
    assert attacked.startswith(" 50%  mine: attacked")
    assert waiting.startswith("100%  waiting for other workers: held, held too")
    assert training.startswith(" 50%  held: training")
    assert last.startswith(" 95%  held: attacked")


def test_runs_that_go_on_together_share_the_bar(monkeypatch):
    monkeypatch.setattr(progress_module, "_SECONDS_BETWEEN_LINES", 0.0)
    display, file = make(terminal=False, total=40.0)
    work = 8.0, 2.0, 0.0
    with display.live():
        runs = display.run_together({"first": work, "second": work})
        for step in (0, 5, 10):
            for run in runs:
                run.on_progress(Progress("training", step, 10, {}))
        for run in runs:
            run.on_batch(500, 500)
        for run in display.run_together({"third": work, "fourth": work}):
            run.on_progress(Progress("training", 0, 10, {}))
    shares = [int(line.partition("%")[0]) for line in file.getvalue().splitlines()]
    assert shares == [0, 0, 10, 20, 30, 40, 45, 50, 50, 50]


def test_where_nothing_is_left_to_do_here_waiting_is_shown(monkeypatch):
    monkeypatch.setattr(progress_module, "_SECONDS_BETWEEN_LINES", 0.0)
    display, file = make(terminal=False, total=10.0)
    with display.live():
        display.run("held", 8.0, 2.0)
        display.say("waiting")
    assert file.getvalue().startswith("  0%  waiting")


@pytest.mark.parametrize("terminal", [False, True])
def test_the_eta_leaves_out_the_time_that_programs_took_to_compile(
    monkeypatch, terminal
):
    now, event = 0.0, progress_module._COMPILATION
    monkeypatch.setattr(progress_module.time, "monotonic", lambda: now)
    monkeypatch.setattr(progress_module, "_SECONDS_BETWEEN_LINES", 0.0)
    display, file = make(terminal)
    with display.live():
        run = display.run("ST, seed 0", 0.0, 10.0)
        run.on_batch(0, 500)
        for attacked in (100, 200):  # 40 s for a fifth of the work, behind 60 s of XLA
            jax.monitoring.record_event_duration_secs(event, 60.0)
            now += 100.0
            run.on_batch(attacked, 500)
    first, second = "eta 3 min", "eta 2 min"  # of 160 and 120 s; or of 400 and 300
    assert first in file.getvalue() or terminal  # which is redrawn now and then
    assert second in file.getvalue()


def test_the_compilation_clock_runs_while_a_program_compiles():
    clock = progress_module._compilation_clock()
    begun = clock()
    jax.jit(lambda x: x + 1)(1.0)
    assert clock() > begun


@pytest.mark.parametrize("width", [80, 100, 140])
def test_the_bar_fits_its_terminal(width):
    file = io.StringIO()
    console = Console(file=file, force_terminal=True, width=width, color_system=None)
    display = ProgressDisplay(console, 10.0)
    with display.live():
        run = display.run("AT (linf, eps = 16/255) + SAM (rho = 0.2), seed 0", 8.0, 2.0)
        run.on_progress(Progress("validating", 5, 10, METRICS))
    bars = [line for line in file.getvalue().split("\r") if "eta" in line]
    assert bars
    assert all("0:00:00" in line for line in bars)
