"""`samrobust estimate`: what is timed, how it adds up, and what it says."""

import subprocess
import sys

import helpers
import pytest

from samrobust.cli import planning
from samrobust.experiments import configuration, methods
from samrobust.studies import estimate as study
from samrobust.studies.bench import suite, worker

CONFIG = f"{helpers.ROOT}/configs/digits.py"


def plan_of(tmp_path, *rows, seeds=1, **fields):
    """The runs of a table of digits; fields are by names with `__` for dots."""
    arguments = planning.argparse.Namespace(
        config=CONFIG,
        workdir=tmp_path,
        rows=list(rows),
        seeds=seeds,
        shard=None,
        overrides=[f"--config.{k.replace('__', '.')}={v}" for k, v in fields.items()],
    )
    return planning.make_plan(arguments).runs


def timed(tasks, seconds):
    """Outcomes: seconds of a step by row, 4 s of a batch, 1 s to compile each."""
    return {
        family: {
            "seconds": [seconds[task.row] if task.kind == "step" else 4.0],
            "compile_seconds": 1.0,
            "checkpoint_seconds": 0.5,
            "peak_memory": 1e9 if task.kind == "step" else 2e9,
            "num_devices": 1,
            "provenance": {"device": "GPU"},
        }
        for family, task in tasks.items()
    }


def tasks_of(runs):
    return study.tasks_of(runs, devices=1, seeds_per_program=1)


def test_rows_that_differ_in_strengths_are_timed_once(tmp_path):
    rows = ("st", "sam,rho=0.2", "sam,rho=0.4", "asam,rho=1", "msam,rho=0.3")
    rows += (
        "sam,rho=0.4,start=0.8",
        "sam,rho=0.2,model.batch_norm_group=16,sam.m=16",
        "st,model.width=8",
    )
    tasks = tasks_of(plan_of(tmp_path, *rows, seeds=2))
    found = [task.row for task in tasks.values() if task.kind == "step"]
    assert found == [
        "st",
        "sam,rho=0.2",
        "sam,rho=0.2,model.batch_norm_group=16,sam.m=16",
        "st,model.width=8",
    ]
    judged = [task.row for task in tasks.values() if task.kind == "evaluation"]
    assert judged == [found[0], *found[2:]]  # one a network


def test_a_late_part_costs_from_its_epoch_on_and_shared_epochs_cost_once(tmp_path):
    rows = ("st", "sam,rho=0.4,start=0.8", "sam,rho=0.8,start=0.8")
    runs = plan_of(tmp_path, *rows, training__epochs=10)
    tasks = tasks_of(runs)
    outcomes = timed(tasks, {"st": 1.0, "sam,rho=0.4,start=0.8": 3.0})
    found = study.estimate(runs, tasks, outcomes, workers=1)
    st, first, second = found.rows
    steps = 1297 // 64  # without the incomplete last batch
    epoch = {"st": steps * 1.0 + 0.5, "sam": steps * 3.0 + 0.5}
    assert st.training() == pytest.approx(10 * epoch["st"])
    assert first.timed == ("st", "sam,rho=0.4,start=0.8")
    late = 8 * epoch["st"] + 2 * epoch["sam"]
    assert (first.training(), second.training()) == pytest.approx((late, late))
    # Epochs 1 to 8 of the three are one trunk, which the first of them trains.
    judged = first.evaluation
    totals = [row.total for row in found.rows]
    assert totals == pytest.approx(
        [
            10 * epoch["st"] + judged + 2,
            2 * epoch["sam"] + judged + 3,
            2 * epoch["sam"] + judged + 3,
        ]
    )
    assert found.seconds == pytest.approx(sum(totals))
    assert st.memory == 2e9


def test_a_replayed_or_smaller_training_has_its_own_number_of_steps(tmp_path):
    runs = plan_of(tmp_path, "st", data__train_size=640, training__epochs=2)
    tasks = tasks_of(runs)
    found = study.estimate(runs, tasks, timed(tasks, {"st": 1.0}), workers=1)
    assert found.rows[0].training() == pytest.approx(2 * (10 + 0.5))


@pytest.mark.parametrize(
    ("fields", "batches"),
    [
        # 4 s a batch of 64 under one attack of 10 steps: 2/3 + 20/3 passes an image.
        ({"linf": "(8.,)", "l2": "()"}, 500 / 64),
        ({"linf": "(8.,16.)", "l2": "()"}, 500 / 64 * (1 + 40 / 3) / (22 / 3)),
        ({"linf": "()", "l2": "(64.,)", "restarts": 2}, 500 / 64 * (42 / 22)),
        ({"linf": "()", "l2": "()"}, 500 / 64),
        # AutoAttack alone of 5000 queries of Square, which are forward passes.
        (
            {
                **{"linf": "(8.,)", "l2": "()", "attack": "autoattack"},
                **{"version": "custom", "members": "('square',)"},
            },
            500 / 64 * (5001 / 3) / (22 / 3),
        ),
    ],
)
def test_evaluation_is_scaled_by_passes_to_all_images_and_attacks(
    tmp_path, fields, batches
):
    own = {f"evaluation__{name}": value for name, value in fields.items()}
    runs = plan_of(tmp_path, "st", evaluation__num_steps=10, **own)
    tasks = tasks_of(runs)
    found = study.estimate(runs, tasks, timed(tasks, {"st": 1.0}), workers=1)
    assert found.rows[0].evaluation == pytest.approx(4.0 * batches, rel=2e-3)


def test_workers_take_the_next_run_as_they_are_free(tmp_path):
    rows = ("st", "at,norm=linf,eps=8")
    runs = plan_of(tmp_path, *rows, seeds=2, training__epochs=1)
    tasks = tasks_of(runs)
    outcomes = timed(tasks, {"st": 1.0, "at,norm=linf,eps=8": 100.0})
    alone, two = (study.estimate(runs, tasks, outcomes, workers=n) for n in (1, 2))
    st, at = (row.training() + row.evaluation for row in alone.rows)
    assert alone.seconds == pytest.approx(2 * st + 2 * at + 2 + 2)
    # One takes ST and AT, compiling; then the first one free takes the second ST, AT.
    assert two.seconds == pytest.approx(2 + st + st + at)
    assert (alone.devices, two.devices) == (1, 2)


def test_a_program_that_fails_is_named_and_its_rows_left_out(tmp_path):
    runs = plan_of(tmp_path, "st", "sam,rho=0.2")
    tasks = tasks_of(runs)
    outcomes = timed(tasks, {"st": 1.0, "sam,rho=0.2": 2.0})
    family = next(f for f, task in tasks.items() if task.row == "sam,rho=0.2")
    outcomes[family] = {"error": "exit code 1: RESOURCE_EXHAUSTED"}
    found = study.estimate(runs, tasks, outcomes, workers=1)
    assert [row.label for row in found.rows] == ["ST"]
    assert found.failures == [(tasks[family].name, "exit code 1: RESOURCE_EXHAUSTED")]


def test_the_command_times_the_programs_and_shows_time_memory_and_cost(
    tmp_path, capsys, monkeypatch
):
    def in_this_process(_, module, spec, environment=None):
        del module, environment
        spec["options"] |= {"repeats": 1, "min_seconds": 1e-3}
        return worker.outcome(spec)

    monkeypatch.setattr(suite.Launcher, "_run", in_this_process)
    workdir = tmp_path / "table"
    done = helpers.make_folder(workdir / "st" / "seed1")
    (done / "result.json").write_text("{}")
    flags = [f"--config={CONFIG}", "--rows=st", "--seeds=3", f"--workdir={workdir}"]
    flags += ["--devices=2", "--price-per-hour=3.5", *helpers.make_flags()]
    assert helpers.main("estimate", *flags) == 0
    output = capsys.readouterr().out
    assert [line.split()[:3] for line in output.splitlines() if "ST" in line] == [
        ["ST", "st", "2"]
    ]
    assert "2 runs (1 more have finished) on 2 x " in output
    assert ", at 3.5 an hour for each device until the last run ends." in output
    for seed in (0, 2):
        folder = helpers.make_folder(workdir / "st" / f"seed{seed}")
        (folder / "result.json").write_text("{}")
    assert helpers.main("estimate", *flags) == 0
    assert capsys.readouterr().out == "All 3 runs have finished.\n"


def test_the_process_that_adds_up_takes_no_device_from_those_that_time(tmp_path):
    script = (
        f"import sys; sys.path.insert(0, {str(helpers.ROOT / 'tests')!r})\n"
        "import test_estimate as t, pathlib\n"
        f"runs = t.plan_of(pathlib.Path({str(tmp_path)!r}), 'st', 'trades,norm=linf,"
        "eps=8,beta=6+sam,rho=0.2,start=0.5')\n"
        "from jax._src import xla_bridge\n"
        "tasks = t.tasks_of(runs)\n"
        "seconds = {task.row: 1.0 for task in tasks.values()}\n"
        "t.study.estimate(runs, tasks, t.timed(tasks, seconds), workers=1)\n"
        "sys.exit(xla_bridge.backends_are_initialized())\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_the_cost_of_a_row_is_that_of_its_phases():
    row = "at,norm=linf,eps=8,start=0.2+sam,rho=0.1,start=0.6"
    config = configuration.load_config(
        f"{CONFIG}:{row}", ["--config.training.epochs=10"]
    )
    assert methods.phases_of(config) == [range(2), range(2, 6), range(6, 10)]
    totals = [methods.passes_at(config, epoch).total for epoch in (0, 1, 2, 6)]
    attack = config.attack.num_steps * 2 / 3
    assert totals == pytest.approx([1, 1, 1 + attack, 2 + attack])
    mean = (2 + 4 * (1 + attack) + 4 * (2 + attack)) / 10
    assert methods.cost(config) == pytest.approx(mean)
