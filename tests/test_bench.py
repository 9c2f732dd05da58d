"""The bench: counts, the plan, processes, rows, and the command."""

import argparse
import dataclasses
import importlib.util
import json
import re
import sys
import types
from typing import Any

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from samrobust.cli import bench as cli_bench
from samrobust.data import DatasetUnavailableError, dataset_facts, load_dataset
from samrobust.experiments import configuration
from samrobust.models import PreActResNet, ViT
from samrobust.studies.bench import programs, timing, worker
from samrobust.studies.bench.counts import StepCost, count_passes, step_cost
from samrobust.studies.bench.images import make_dataset
from samrobust.studies.bench.plan import Options, Task, plan
from samrobust.studies.bench.report import to_sheet, write_report
from samrobust.studies.bench.results import summarize
from samrobust.studies.bench.suite import Launcher, schedule
from samrobust.studies.bench.timing import measure
from samrobust.training import InterruptedRunError

DIGITS = f"{helpers.ROOT}/configs/digits.py"
CIFAR = f"{helpers.ROOT}/configs/cifar10.py"


# Counts.


def multiply_adds(width, blocks, side):
    """Those of a PreActResNet's convolutions: of all, and of the first.

    A tap on the padding counts for nothing: along an axis the first and the last place
    miss one of three, at stride 2 the first alone.
    """

    def convolution(inputs, outputs, *, window=3, stride=1):
        missing = 0 if window == 1 else 3 - stride
        taps = window * side // stride - missing
        return taps**2 * inputs * outputs

    stem, channels = convolution(3, width), width
    total = stem
    for stage, num_blocks in enumerate(blocks):
        features = width * 2**stage
        for block in range(num_blocks):
            stride = 2 if stage > 0 and block == 0 else 1
            if channels != features:
                total += convolution(channels, features, window=1, stride=stride)
            total += convolution(channels, features, stride=stride)
            side //= stride
            total += convolution(features, features)
            channels = features
    return total, stem


def test_the_operations_of_a_pass_are_those_of_its_convolutions():
    width, blocks, side = 64, (1, 2), 8
    model = PreActResNet(width=width, blocks=blocks)
    counts = count_passes(model, (side, side, 3), batch_size=8)
    total, stem = multiply_adds(width, blocks, side)
    expected = {
        "weights": 6 * total - 2 * stem,
        "images": 4 * total,
        "both": 6 * total,
    }
    for name, cost in counts.items():
        assert 1 <= cost.flops / expected[name] < 1.03  # the rest is elementwise


def test_the_operations_of_a_pass_are_those_of_a_transformers_products():
    dim, depth, num_tokens = 192, 1, 17
    counts = count_passes(ViT(dim=dim, depth=depth), (16, 16, 3), batch_size=8)
    block = 12 * num_tokens * dim**2 + 2 * num_tokens**2 * dim
    total = depth * block + (num_tokens - 1) * 48 * dim
    assert 1 <= counts["both"].flops / (6 * total) < 1.05


def test_a_step_is_as_many_passes_as_its_method_takes():
    st = step_cost(PASSES)
    assert step_cost(PASSES, num_passes=2).flops == 2 * st.flops
    attacked = step_cost(PASSES, attack_steps=10)
    wasteful = step_cost(PASSES, attack_steps=10, attack_weight_gradients=True)
    assert round(attacked.flops / st.flops, 2) == 7.69
    assert round(wasteful.flops / st.flops, 2) == 11.01


def test_an_attack_that_throws_gradients_away_costs_more_memory_traffic_too():
    counts = count_passes(PreActResNet(width=4, blocks=(1,)), (8, 8, 1), batch_size=8)
    lean = step_cost(counts, 10)
    wasteful = step_cost(counts, 10, attack_weight_gradients=True)
    assert step_cost(counts).elements < lean.elements < wasteful.elements


# Images.


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "digits"])
def test_the_made_up_images_are_of_the_shape_and_contrast_of_the_data_set(name):
    dataset = make_dataset(name, 64, 32)
    facts = dataset_facts(name)
    assert dataset.train.images.shape == (64, *facts.image_shape)
    assert dataset.train.images.dtype == np.uint8
    assert (len(dataset.test), dataset.num_classes) == (32, facts.num_classes)
    pixels = dataset.train.images / 255
    np.testing.assert_allclose(pixels.mean((0, 1, 2)), dataset.mean, atol=0.1)
    assert (pixels.std((1, 2)) > 0.05).all()
    again = make_dataset(name, 64, 32)
    np.testing.assert_array_equal(again.train.images, dataset.train.images)


def test_the_made_up_digits_have_the_shape_of_the_real_ones():
    real = load_dataset("digits")
    made_up = make_dataset("digits", 1, 1)
    assert made_up.image_shape == real.image_shape
    assert made_up.num_classes == real.num_classes


def test_the_images_are_like_those_of_the_data_set_in_the_configs_own_folder(tmp_path):
    overrides = ("--config.data.name=mine", f"--config.data.data_dir={tmp_path}")
    config = configuration.load_config(DIGITS, overrides)
    with pytest.raises(DatasetUnavailableError, match=re.escape(f"in {tmp_path} as")):
        programs.begin(config, 1)


def test_a_network_is_timed_whose_rounds_are_longer_than_its_epochs():
    """As many steps as an epoch has: Entropy-SGD is refused with fewer than a round."""
    longer = {"entropy_sgd.inner_steps": 6, "training.epochs": 2}
    config = helpers.make_config("entropy_sgd,gamma=0.03", longer)
    _, _, carry = programs.begin(config, 1)
    assert int(carry.state.step) == 0


# Timing.


def test_a_repeat_is_as_many_calls_as_fill_its_time(monkeypatch):
    now, waits = [0.0], []

    def call():
        now[0] += 1 / 64
        return round(64 * now[0])

    monkeypatch.setattr(
        timing, "time", types.SimpleNamespace(perf_counter=lambda: now[0])
    )
    options = {"warmup_calls": 1, "wait": waits.append}
    assert measure(call, repeats=3, min_seconds=1 / 8, **options) == [1 / 64] * 3
    # Each call of the warmup is waited for, and the last one of a repeat.
    assert waits == [*range(1, 9), 16, 24, 32]


def test_the_warm_up_lasts_until_three_calls_take_the_same_time(monkeypatch):
    # A heap that grows, as of a training step on a CPU; and one that never stops.
    for durations, left_out in (([7, 7, 11, 12, 11, 7, 7, 7], 8), ([1, 9] * 20, 12)):
        now, made = [0.0], iter(durations + [8] * 20)
        clock = types.SimpleNamespace(perf_counter=lambda now=now: now[0])
        monkeypatch.setattr(timing, "time", clock)

        def call(now=now, made=made):
            now[0] += next(made)

        options = {"warmup_calls": 3, "wait": lambda _: None}
        found = measure(call, repeats=2, min_seconds=1.0, **options)
        assert found == (durations + [8] * 20)[left_out : left_out + 2]


# Programs.


def test_an_unrolled_program_has_no_loop_and_the_same_results():
    @jax.jit
    def attack(x, other):
        def step(_, carry):
            moved, count = carry
            return moved + jax.grad(lambda x: jnp.sum(jnp.tanh(x)))(moved), count + 1

        return {"moved": jax.lax.fori_loop(0, 4, step, (x, 0)), "other": other}

    arguments = (jnp.arange(3.0), jnp.ones(2))
    unrolled = jax.jit(programs._unrolled(attack, *arguments))
    assert "while" in attack.lower(*arguments).as_text()
    assert "while" not in unrolled.lower(*arguments).as_text()
    expected, found = attack(*arguments), unrolled(*arguments)
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_allclose, found, expected)


# The plan.


def test_the_plan_has_a_row_for_every_combination_and_each_method_its_config_row():
    options = Options(
        CIFAR,
        batch_sizes=(64, 128),
        precisions=("float32", "bfloat16"),
        methods=("at",),
    )
    tasks = plan(options)
    steps = [task for task in tasks if task.kind == "step"]
    assert {(t.batch_size, t.precision) for t in steps} == {
        (size, dtype) for size in (64, 128) for dtype in ("float32", "bfloat16")
    }
    assert {task.row for task in steps} == {"at,norm=linf,eps=1"}
    evaluations = [task for task in tasks if task.kind == "evaluation"]
    assert len(evaluations) == 2  # one a precision, whatever the training batch


def test_pytorch_has_all_variants_in_float32_and_the_fast_ones_in_bfloat16():
    precisions = ("float32", "bfloat16")
    pytest.importorskip("torch")
    options = Options(CIFAR, compare="pytorch", methods=("st",), precisions=precisions)
    variants = [(t.precision, t.variant) for t in plan(options) if t.kind == "pytorch"]
    assert variants == [
        ("float32", "reference"),
        ("float32", "resident"),
        ("float32", "tuned"),
        ("float32", "compiled"),
        ("bfloat16", "tuned"),
        ("bfloat16", "compiled"),
    ]
    options = dataclasses.replace(options, variants=("graphed", "pure"))
    variants = [(t.precision, t.variant) for t in plan(options) if t.kind == "pytorch"]
    assert [name for precision, name in variants if precision == "float32"] == [
        "graphed"
    ]
    assert ("bfloat16", "pure") in variants


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"methods": ("trades",)}, "method"),
        ({"precisions": ("float8",)}, r"model\.dtype"),
        ({"measure": ("unrolled",), "methods": ("st",)}, "--measure"),
        ({"xla_flags": ("", "xla_a=1")}, "--xla_NAME=VALUE"),
        ({"row": ("mart,beta=6",)}, "mart"),
        ({"overrides": ("--config.model.depth=3",)}, "depth"),
    ],
)
def test_a_plan_that_cannot_run_is_refused_before_anything_starts(options, message):
    with pytest.raises(ValueError, match=message):
        plan(Options(DIGITS, **options))


def test_the_roofline_and_the_counts_come_first_then_each_row_in_each_round():
    options = Options(DIGITS, measure=("step",), methods=("st", "at"))
    names = [name for name, _ in schedule(plan(options), options)]
    assert [name.split(",")[0] for name in names] == [
        *("roofline", "counts"),
        *("round 1: st step", "round 1: at step"),
        *("round 2: st step", "round 2: at step"),
    ]
    bare = dataclasses.replace(options, no_rates=True, rounds=1)
    names = [name for name, _ in schedule(plan(bare), bare)]
    assert [name.split(",")[0] for name in names] == [
        *("round 1: st step", "round 1: at step"),
    ]


def test_ceilings_that_are_known_are_not_measured_again(tmp_path):
    file = tmp_path / "machine.json"
    known = {"matmul": 8e14, "copy": 4e12}
    file.write_text(json.dumps({"commit": "abc", "bfloat16": known}))
    precisions = ("bfloat16", "float32")
    options = Options(
        *(DIGITS, (), ("step",), ("st",)), precisions=precisions, ceilings=str(file)
    )
    order = schedule(plan(options), options)
    assert [(t.kind, t.precision) for _, t in order if t.kind == "roofline"] == [
        ("roofline", "float32")
    ]
    assert summarize({}, options).ceilings == {"bfloat16": known}
    for content in (None, "{", "[]", '{"bfloat16": {"matmul": 1.0}}'):
        file.unlink()
        if content is not None:
            file.write_text(content)
        with pytest.raises(ValueError, match="a JSON file with the matmul and"):
            plan(options)
        file.touch()


def test_without_matplotlib_a_bench_has_numbers_and_no_picture(tmp_path, monkeypatch):
    st = plan(Options(CIFAR, measure=("step",), methods=("st",)))[0]
    report = summarize({st: [fake_step([1.0])]}, OPTIONS)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    written = write_report(report, tmp_path)
    assert [path.name for path in written] == ["bench.json", "bench.md"]


def test_several_seeds_in_a_program_are_rows_of_steps_alone():
    tasks = plan(Options(CIFAR, methods=("st",), seeds_per_program=(1, 2)))
    found = [(task.kind, task.seeds) for task in tasks]
    assert found == [("step", 1), ("evaluation", 1), ("step", 2)]
    assert tasks[-1].name == "st step, batch 128, float32, 2 seeds a program"


def test_a_step_of_several_seeds_is_timed_as_the_share_of_one():
    calls = []

    def measure(call, **_):
        calls.append(call())
        return [6.0]

    config = helpers.make_config("st", {"training.steps_per_call": 3})
    assert programs.step(config, measure, seeds=2)["seconds"] == [1.0]
    first, second = calls[0]
    assert int(first.state.step) == int(second.state.step) == 3
    assert helpers.as_bits(first.state.params) != helpers.as_bits(second.state.params)


def test_rows_of_any_method_are_measured_in_place_of_the_first_ones():
    rows = ("sam,rho=0.1", "trades,norm=linf,eps=8,beta=6", "st")
    options = Options(CIFAR, measure=("step", "evaluation"), row=rows)
    tasks = plan(options)
    assert [task.method for task in tasks] == [*rows, ""]
    outcomes: dict = {task: [fake_step([float(i + 1)])] for i, task in enumerate(tasks)}
    report = summarize(outcomes, options)
    assert [row.get("cost") for row in report.rows[:3]] == [1 / 3, 2 / 3, 1.0]


def test_a_cost_is_the_median_of_the_rounds_with_their_range():
    st, sam = plan(Options(CIFAR, measure=("step",), methods=("st", "sam")))
    rounds = {st: [1.0, 2.0, 4.0], sam: [2.0, 6.0, 10.0]}  # a machine that slows down
    outcomes = {task: [fake_step([x]) for x in each] for task, each in rounds.items()}
    row = find(summarize(outcomes, OPTIONS), "step", "sam")
    assert (row["cost"], row["cost_low"], row["cost_high"]) == (2.5, 2.0, 3.0)


def test_what_another_bench_left_in_the_cache_is_no_first_compilation():
    (st,) = plan(Options(CIFAR, measure=("step",), methods=("st",)))
    rounds = [
        fake_step([1.0]) | {"compile_seconds": seconds, "from_cache": True}
        for seconds in (2.0, 4.0)
    ]
    for count, cached in ((1, 2.0), (2, 3.0)):
        row = find(summarize({st: rounds[:count]}, OPTIONS), "step", "st")
        assert "compile_cold" not in row
        assert row["compile_cached"] == cached


def test_a_round_that_failed_is_compared_with_no_other():
    st, sam = plan(Options(CIFAR, measure=("step",), methods=("st", "sam")))
    failed: dict = {"error": "killed"}
    outcomes = {
        st: [fake_step([1.0]), fake_step([2.0]), fake_step([4.0])],
        sam: [failed, fake_step([6.0]), fake_step([10.0])],
    }
    row = find(summarize(outcomes, OPTIONS), "step", "sam")
    assert (row["cost_low"], row["cost_high"]) == (2.5, 3.0)
    assert row["step_seconds"] == 8.0
    assert "compile_cold" not in row  # what the first one left is not known
    rows = summarize({st: [fake_step([1.0]), failed], sam: [failed]}, OPTIONS).rows
    assert [row["method"] for row in rows] == ["st"]
    outcomes = {st: [fake_step([1.0]), failed], sam: [failed, fake_step([6.0])]}
    assert "cost" not in find(summarize(outcomes, OPTIONS), "step", "sam")


# Rows.


def fake(seconds, **more):
    return {"seconds": seconds, "peak_memory": 10**9, **more}


def fake_step(seconds):
    return fake(seconds, checkpoint_seconds=1.0, pipeline_seconds=0.01)


OPTIONS = Options(CIFAR, rounds=2)
PASSES = {  # of PreActResNet-18
    "weights": StepCost(2.899e9, 1.85e7),
    "images": StepCost(1.939e9, 1.45e7),
    "both": StepCost(2.902e9, 1.86e7),
}
ROOFLINE = {"matmul": 2e11, "copy": 4e10, "provenance": {"jax": "1"}}
FIRST = {
    Task("roofline", "", "st", 128, "float32"): [ROOFLINE],
    Task("counts", "", "st", 128, "float32"): [{"passes": PASSES}],
}


def fake_report():
    pytest.importorskip("torch")
    tasks = plan(dataclasses.replace(OPTIONS, compare="pytorch"))
    seconds = {"st": 1.0, "sam": 2.1, "at": 8.0, "": 5.0}
    outcomes = dict(FIRST)
    for task in tasks:
        base = seconds[task.method]
        if task.kind == "pytorch":
            about = {"parity": {}, "versions": {}}
            outcomes[task] = [fake([factor * base], **about) for factor in (1.5, 2.5)]
        else:
            about = {"checkpoint_seconds": 1.0, "pipeline_seconds": base / 100}
            outcomes[task] = [
                fake([base, base], compile_seconds=seconds, **about)
                for seconds in (10.0, 1.5)
            ]
    return summarize(outcomes, OPTIONS)


def find(report, kind, method, variant=""):
    wanted = (kind, method, variant)
    (row,) = [
        r for r in report.rows if (r["kind"], r["method"], r["variant"]) == wanted
    ]
    return row


def test_a_row_has_rates_fractions_and_costs(monkeypatch):
    # This process must not take memory of the device that its children measure.
    monkeypatch.setattr(jax, "devices", lambda *_: pytest.fail("a device is asked for"))
    report = fake_report()
    row = find(report, "step", "at")
    flops = step_cost(PASSES, 10).flops
    assert row["images_per_second"] == pytest.approx(128 / 8.0)
    assert row["tflops"] == pytest.approx(16 * flops / 1e12)
    assert row["matmul_fraction"] == pytest.approx(16 * flops / 2e11)
    assert (row["cost"], round(row["flop_cost"], 2), row["paper_cost"]) == (8, 7.69, 11)
    assert (row["compile_cold"], row["compile_cached"]) == (10.0, 1.5)


def test_what_all_devices_did_is_compared_with_what_one_of_them_can():
    options = dataclasses.replace(OPTIONS, measure=("step",), methods=("st",))
    (task,) = plan(options)
    pytorch = dataclasses.replace(task, kind="pytorch", variant="reference")
    for num_devices in (1, 4):
        own = fake_step([1.0]) | {"num_devices": num_devices}
        outcomes = {**FIRST, task: [own], pytorch: [fake([1.0])]}
        row, other = summarize(outcomes, options).rows
        total = row["tflops"] * 1e12
        assert row["matmul_fraction"] == pytest.approx(total / 2e11 / num_devices)
        assert other["matmul_fraction"] == pytest.approx(total / 2e11)
        # PyTorch is on one.
        assert ("ratio" in other) == (num_devices == 1)


def test_the_ratios_to_pytorch_are_taken_round_by_round():
    row = find(fake_report(), "pytorch", "sam", "tuned")
    assert row["ratio"] == pytest.approx(2.0)
    assert (row["ratio_low"], row["ratio_high"]) == pytest.approx((1.5, 2.5))
    reference = find(fake_report(), "pytorch", "at", "reference")
    assert round(reference["flop_cost"], 2) == 11.01


def test_an_evaluation_is_told_in_epochs_of_standard_training():
    evaluated = find(fake_report(), "evaluation", "")
    assert evaluated["st_epochs"] == pytest.approx(100 / 392)


def test_what_is_compared_was_measured_alike():
    """An evaluation in its own precision; PyTorch with the plainest of our steps."""

    def step(seconds, precision="float32", **setting: Any):
        return {
            Task("step", "st", "st", 64, precision, **setting): [
                fake_step([seconds]) | {"num_devices": setting.get("devices", 1)}
            ]
        }

    def judging(seconds, precision):
        task = Task("evaluation", "", "st", 500, precision)
        return {task: [fake([seconds], compile_seconds=1.0)]}

    outcomes = step(4.0) | judging(10.0, "float32")
    outcomes |= step(1.0, "bfloat16") | judging(2.5, "bfloat16")
    rows = summarize(outcomes, OPTIONS).rows
    told = [row["st_epochs"] for row in rows if row["kind"] == "evaluation"]
    assert told[0] == pytest.approx(told[1], rel=0.05)
    pytorch = Task("pytorch", "st", "st", 64, "float32", variant="reference")
    others: list[dict[str, Any]] = [{"devices": 4}, {"devices": 1, "seeds": 2}]
    for other in others:
        outcomes = step(1.0, **other) | step(4.0, devices=1)
        found = summarize(outcomes | {pytorch: [fake([4.0])]}, OPTIONS).rows
        assert found[-1]["ratio"] == 1.0


def test_a_failed_row_is_reported_and_the_others_stand():
    tasks = plan(Options(CIFAR, measure=("step",)))
    outcomes = {tasks[0]: [{"error": "out of memory"}], tasks[1]: [fake_step([2.0])]}
    report = summarize(outcomes, OPTIONS)
    assert report.failures == [("st step, batch 128, float32", "out of memory")]
    assert [row["method"] for row in report.rows] == ["sam"]
    text = to_sheet(report).to_markdown()
    assert "failed: st step, batch 128, float32: out of memory" in text


def test_notes_speak_of_what_was_measured_alone():
    options = Options(CIFAR, measure=("step",), methods=("st",))
    outcomes = {task: [fake_step([2.0])] for task in plan(options)}
    for rates in (True, False):
        report = summarize(FIRST | outcomes if rates else outcomes, options)
        text = "\n".join(to_sheet(report).notes)
        for words in ("TFLOP/s by", "'by FLOPs'", "reach here:"):
            assert (words in text) == rates


def test_a_column_that_no_row_fills_is_left_out():
    options = Options(CIFAR, measure=("step",), methods=("sam",))
    outcomes = {task: [fake_step([2.0])] for task in plan(options)}
    outcomes[next(iter(outcomes))][0]["compile_seconds"] = 3.0
    for rates in (True, False):
        report = summarize(FIRST | outcomes if rates else outcomes, options)
        sheet = to_sheet(report)
        for table in sheet.tables:
            columns = zip(*table.rows, strict=True)
            assert all(set(cells) != {"-"} for cells in columns)
        titles = {title for table in sheet.tables for title in table.header}
        assert {"ms a step", "the paper", "compile s"} <= titles
        assert ({"TFLOP/s", "% matmul", "% copy", "by FLOPs"} <= titles) == rates
        assert not titles & {"cost", "cached"}
        assert not any(note.startswith("cost: ") for note in sheet.notes)


def test_a_row_has_the_median_and_the_interquartile_range_of_all_repeats():
    task = Task("step", "st", "st", 128, "float32")
    rounds = [fake_step([1, 2]), fake_step([3, 4, 100])]
    (row,) = summarize({task: rounds}, OPTIONS).rows
    assert (row["step_seconds"], row["step_iqr"]) == (3, 2)
    (row,) = summarize({task: [fake_step([3.0])]}, OPTIONS).rows
    assert (row["step_seconds"], row["step_iqr"]) == (3, 0)


def test_the_operations_are_those_of_the_settings_that_were_measured():
    overrides = ("--config.attack.num_steps=5",)
    options = Options(CIFAR, overrides, methods=("at",), measure=("step",))
    (task,) = plan(options)
    (row,) = summarize({**FIRST, task: [fake_step([8.0])]}, options).rows
    st = step_cost(PASSES).flops
    assert row["flop_cost"] == pytest.approx(step_cost(PASSES, 5).flops / st)


def test_the_operations_count_each_view_that_an_objective_differentiates():
    row = "trades,norm=linf,eps=8,beta=6"
    options = Options(CIFAR, row=(row,), measure=("step",))
    (task,) = plan(options)
    (found,) = summarize({**FIRST, task: [fake_step([8.0])]}, options).rows
    # Two views with weight gradients; the attack has a forward pass beside ten steps.
    expected = step_cost(PASSES, 10.5, 2).flops / step_cost(PASSES).flops
    assert found["flop_cost"] == pytest.approx(expected)


def test_the_files_of_a_report_are_complete_and_say_what_was_measured(tmp_path):
    report = fake_report()
    paths = write_report(report, tmp_path)
    assert [path.name for path in paths] == ["bench.json", "bench.md", "bench.png"]
    stored = json.loads(paths[0].read_text())
    assert len(stored["rows"]) == len(report.rows)
    text = paths[1].read_text()
    assert "| at step | 128 | 8000 ±0 | 16 |" in text
    assert "| sam tuned | 128 |" in text
    assert "2.00 (1.50 to 2.50)" in text
    assert paths[2].read_bytes().startswith(b"\x89PNG")


def test_the_picture_of_another_bench_does_not_stay(tmp_path, monkeypatch):
    (st,) = plan(Options(CIFAR, measure=("step",), methods=("st",)))
    report = summarize({st: [fake_step([1.0])]}, OPTIONS)
    assert write_report(report, tmp_path)[-1].name == "bench.png"
    write_report(report._replace(rows=[]), tmp_path)
    assert not (tmp_path / "bench.png").exists()
    write_report(report, tmp_path)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    write_report(report, tmp_path)
    assert not (tmp_path / "bench.png").exists()


# Processes and the command.


def launcher(tmp_path, should_stop, **overrides):
    flags = [f"--config.{name}={value}" for name, value in overrides.items()]
    overrides = (*helpers.make_flags(), *flags)
    options = Options(DIGITS, overrides, repeats=1, min_seconds=0.01)
    return Launcher(options, tmp_path, should_stop)


AT = Task("step", "at", "at,norm=linf,eps=16", 32, "float32")


def test_a_worker_that_fails_leaves_its_complaint(tmp_path):
    launch = launcher(tmp_path, lambda: False, **{"model.width": -1})
    outcome = launch(AT)
    assert re.search(r"exit code 1: .*model\.width", outcome["error"])


def test_a_flag_that_xla_does_not_know_fails_its_row_alone(tmp_path):
    launch = launcher(tmp_path, lambda: False)
    st = {"method": "st", "row": "st"}
    unknown = dataclasses.replace(AT, **st, xla_flags="--xla_gpu_nonsense=1")
    assert "xla_gpu_nonsense" in launch(unknown)["error"]


def test_flags_that_xla_does_not_know_are_refused_before_any_row(tmp_path, monkeypatch):
    started = []

    def here(_, __, spec, ___):
        started.append(spec["task"]["kind"])
        assert spec["task"]["kind"] == "probe"
        worker._check_flags(Options(**spec["options"]))
        return {}

    monkeypatch.setattr(Launcher, "_run", here)
    good = "--xla_cpu_multi_thread_eigen=true --xla_gpu_autotune_level=0"
    for flags, said in (
        (("", good, "--xla_gpu_nonsense=1"), "'--xla_gpu_nonsense=1'. XLA says: "),
        (("--xla_gpu_autotune_level=high",), "'high' is not a valid int32"),
    ):
        options = Options(DIGITS, (*helpers.make_flags(),), xla_flags=flags)
        launch = Launcher(options, tmp_path, lambda: False)
        with pytest.raises(ValueError, match=r"^Expected options that XLA") as caught:
            launch.check_flags(AT)
        assert said in str(caught.value)
        assert "\n" not in str(caught.value)
    for flags, processes in (("",), 0), (("", good), 1):
        started.clear()
        options = Options(DIGITS, (*helpers.make_flags(),), xla_flags=flags)
        Launcher(options, tmp_path, lambda: False).check_flags(AT)
        assert len(started) == processes


def test_a_flag_that_xla_does_not_know_is_one_line_and_nothing_is_written(
    tmp_path, bench
):
    workdir = tmp_path / "new"
    done = bench(
        workdir, "--methods=st", "--xla-flags=", "--xla-flags=--xla_gpu_oops=1"
    )
    assert done.returncode == 2
    (line,) = done.err.splitlines()
    assert "got --xla-flags='--xla_gpu_oops=1'" in line
    assert (done.out, workdir.exists()) == ("", False)


def test_a_bench_that_is_stopped_ends_its_worker_at_once(tmp_path):
    answers = iter([False])
    launch = launcher(tmp_path, lambda: next(answers, True))
    with pytest.raises(InterruptedRunError, match="kept"):
        launch(AT)


def command_of(workdir, *flags):
    own = (f"--config={DIGITS}", f"--workdir={workdir}")
    return ("bench", *own, *helpers.make_flags(), *flags)


@pytest.fixture
def bench(capsys):
    """The command in this process, which measures nothing itself: its code and words.

    What it measures, it measures in processes of its own.
    """

    def run(workdir, *flags):
        code = helpers.main(*command_of(workdir, *flags))
        return types.SimpleNamespace(returncode=code, **capsys.readouterr()._asdict())

    return run


def test_the_command_measures_writes_and_shows(tmp_path, monkeypatch, capsys):
    """In this process, which has loaded JAX; the next test has processes of its own."""
    caches = set()

    def run_here(_, __, spec, environment):
        caches.add(environment["JAX_COMPILATION_CACHE_DIR"])
        return worker.outcome(spec)

    def without_much_warmup(call: Any, **options: Any):
        fewer: Any = options | {"warmup_calls": 1}
        return measure(call, **fewer)

    monkeypatch.setattr(Launcher, "_run", run_here)
    monkeypatch.setattr(worker, "measure", without_much_warmup)
    flags = ("--repeats=2", "--rounds=1", "--min-seconds=0.01", "--methods=st,at")
    measured = ("--measure=step,evaluation,unrolled", *helpers.make_flags())
    command = ("bench", f"--config={DIGITS}", f"--workdir={tmp_path}")
    assert helpers.main(*command, *flags, *measured) == 0
    assert "Speed" in capsys.readouterr().out
    report = json.loads((tmp_path / "bench.json").read_text())
    rows = {f"{r['method']} {r['kind']}".strip(): r for r in report["rows"]}
    assert list(rows) == [
        *("st step", "at step", "evaluation", "at unrolled"),
    ]
    assert all(len(row["seconds"]) == 1 for row in rows.values())
    assert rows["at step"]["cost"] > 1
    assert rows["at step"]["flop_cost"] > rows["st step"]["flop_cost"] == 1
    assert rows["at step"]["copy_fraction"] > 0
    assert 0 < rows["at step"]["matmul_fraction"] < 1
    assert 0 < rows["at step"]["pipeline_share"] < 1
    assert len(caches) == 1  # a second round would find the programs of the first


def test_an_earlier_bench_is_replaced_by_rows_alone(tmp_path, monkeypatch):
    outcomes = {"roofline": ROOFLINE, "counts": {"passes": PASSES}}
    outcomes["step"] = {"error": "out of memory"}

    def launch(_, task):
        if task.kind not in outcomes:
            raise InterruptedRunError("Stopped.")
        return outcomes[task.kind]

    monkeypatch.setattr(Launcher, "__call__", launch)
    command = ("bench", f"--config={DIGITS}", f"--workdir={tmp_path}", "--methods=st")
    (tmp_path / "bench.json").write_text("earlier")
    assert helpers.main(*command, "--measure=step,evaluation") == 75
    assert (tmp_path / "bench.json").read_text() == "earlier"
    outcomes["step"] = fake_step([1.0])
    assert helpers.main(*command, "--measure=step,evaluation") == 75
    assert len(json.loads((tmp_path / "bench.json").read_text())["rows"]) == 1
    outcomes["step"] = {"error": "out of memory"}  # of all rows: that is told
    assert helpers.main(*command, "--measure=step") == 1
    assert json.loads((tmp_path / "bench.json").read_text())["failures"]


def test_ceilings_of_another_device_are_measured_again(tmp_path, monkeypatch):
    known, launched = {"matmul": 8e14, "copy": 4e12}, []
    outcomes = {
        "probe": {"provenance": {"device": "this one"}},
        "roofline": ROOFLINE,
        "counts": {"passes": PASSES},
        "step": fake_step([1.0]),
    }

    def launch(_, task):
        launched.append(task.kind)
        return outcomes[task.kind]

    def bench_with(**of_file):
        launched.clear()
        file = tmp_path / "machine.json"
        file.write_text(json.dumps({**of_file, "float32": known}))
        command = ("bench", f"--config={DIGITS}", f"--workdir={tmp_path}")
        flags = ("--methods=st", "--measure=step", f"--ceilings={file}")
        assert helpers.main(*command, *flags, "--rounds=1") == 0
        return json.loads((tmp_path / "bench.json").read_text())["ceilings"]["float32"]

    monkeypatch.setattr(Launcher, "__call__", launch)
    assert bench_with() == known
    assert launched == ["counts", "step"]
    assert bench_with(device="this one") == known
    assert launched == ["probe", "counts", "step"]
    with pytest.warns(UserWarning, match=r"machine\.json is not known to be of"):
        found = bench_with(device="another")
    assert found == {name: ROOFLINE[name] for name in known}
    outcomes["probe"] = {"error": "killed"}
    with pytest.warns(UserWarning, match="measured again"):
        bench_with(device="this one")
    assert launched == ["probe", "roofline", "counts", "step"]


def test_several_devices_and_steps_per_call_are_rows_of_their_own(tmp_path):
    flags = ("--repeats=1", "--rounds=1", "--min-seconds=0.01", "--methods=st")
    flags += ("--measure=step", "--no-rates")
    flags += ("--devices=1,2", "--steps-per-call=3")
    code, _, errors = helpers.run_command(*command_of(tmp_path, *flags))
    assert code == 0, errors
    report = json.loads((tmp_path / "bench.json").read_text())
    settings = [(r["devices"], r["steps_per_call"]) for r in report["rows"]]
    assert settings == [(1, 3), (2, 3)]
    for row in report["rows"]:
        assert len(row["seconds"]) == 1
        assert row["compile_cold"] > 0
    assert report["provenance"]["command"].startswith("samrobust bench")


def test_an_evaluation_on_all_devices_has_the_batch_of_a_run(
    tmp_path, bench, monkeypatch
):
    monkeypatch.setenv("JAX_NUM_CPU_DEVICES", "2")
    flags = ("--repeats=1", "--rounds=1", "--min-seconds=0.01", "--no-rates")
    own = ("--config.evaluation.num_steps=1", "--config.evaluation.batch_size=0")
    done = bench(tmp_path, "--measure=evaluation", *flags, *own)
    assert done.returncode == 0, done.err
    (row,) = json.loads((tmp_path / "bench.json").read_text())["rows"]
    assert (row["num_devices"], row["batch_size"]) == (2, 1000)
    (seconds,) = row["seconds"][0]
    assert row["images_per_second"] == pytest.approx(1000 / seconds)


def test_a_profile_is_a_perfetto_trace_and_no_measurement(tmp_path, bench):
    done = bench(tmp_path, "--profile", "--methods=st", "--measure=step")
    assert done.returncode == 0, done.err
    assert list(tmp_path.glob("traces/st_step*/**/perfetto_trace.json.gz"))
    assert not (tmp_path / "bench.json").exists()


@pytest.mark.parametrize(
    "flag",
    [
        *("--methods=fgsm", "--measure=speed", "--variants=fastest"),
        *("--batch-sizes=0", "--rounds=0", "--repeats=0", "--min-seconds=0"),
    ],
)
def test_a_bad_flag_is_refused_in_one_line_before_anything_starts(
    flag, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(Launcher, "__call__", lambda *_: pytest.fail("it measures"))
    workdir = tmp_path / "new"
    flags = (f"--config={DIGITS}", f"--workdir={workdir}", flag)
    assert helpers.main("bench", *flags) == 2
    name = flag.partition("=")[0]
    complaint = capsys.readouterr().err
    assert complaint.startswith(f"samrobust: error: argument {name}: ")
    assert not workdir.exists()


@pytest.mark.parametrize(
    ("command", "refused", "how"),
    [
        (("--aot=h200", "--profile"), "--profile", "with --aot"),
        (("--aot=v5e", "--rounds=2"), "--rounds", "with --aot"),
        (("--aot=v5e", "--repeats=2"), "--repeats", "with --aot"),
        (("--aot=v5e", "--min-seconds=2"), "--min-seconds", "with --aot"),
        (("--aot=v5e", "--cache=/tmp/c", "--no-rates"), "--cache, --no-rates", "with"),
        (("--aot=v5e", "--variants=tuned"), "--variants", "with --aot"),
        (("--aot=v5e", "--compare=pytorch"), "--compare", "with --aot"),
        (("--variants=tuned",), "--variants", "without --compare"),
        (("--profile", "--compare=pytorch"), "--compare", "with --profile"),
        (("--profile", "--no-rates"), "--no-rates", "with --profile"),
    ],
)
def test_a_flag_that_is_not_read_is_refused_in_one_line(
    command, refused, how, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(Launcher, "__call__", lambda *_: pytest.fail("it measures"))
    workdir = tmp_path / "new"
    flags = (f"--config={DIGITS}", f"--workdir={workdir}")
    assert helpers.main("bench", *flags, *command) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"samrobust: error: Expected no {refused} {how}")
    assert not workdir.exists()


def test_of_each_flag_is_known_which_benches_read_it():
    parser = argparse.ArgumentParser()
    cli_bench.add_flags(parser)
    flags = {action.dest for action in parser._actions} - {"help"}
    read = {name for names in cli_bench._READ.values() for name in names}
    assert flags == read | set(cli_bench._ALWAYS) - {"command", "overrides"}


def test_rows_are_named_in_one_way(capsys):
    flags = (f"--config={DIGITS}", "--methods=st", "--row=sam,rho=0.1")
    assert helpers.main("bench", *flags) == 2
    assert "not allowed with argument --methods" in capsys.readouterr().err


def test_a_bench_without_a_device_is_one_line_and_measures_nothing(
    tmp_path, bench, monkeypatch
):
    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    done = bench(tmp_path, "--methods=st", "--measure=step")
    assert done.returncode == 2
    assert done.out.count("\n") <= 1  # the progress
    assert done.err.startswith("samrobust: error: Expected a device that JAX can")
    assert done.err.count("\n") == 1
    assert not (tmp_path / "bench.json").exists()


@pytest.mark.parametrize(
    ("flag", "package", "message"),
    [
        (
            "--measure=step",
            None,
            "the package torch, got --compare='pytorch'. Install it",
        ),
        ("--measure=evaluation", True, "step in --measure, got --compare='pytorch'"),
        ("--config.model.name=vit", True, "model.name='preact_resnet', got"),
    ],
)
def test_a_comparison_that_cannot_be_made_is_refused_before_any_measurement(
    tmp_path, capsys, monkeypatch, flag, package, message
):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: package)
    monkeypatch.setattr(Launcher, "__call__", lambda *_: pytest.fail("it measures"))
    code = helpers.main(
        *("bench", f"--config={DIGITS}", f"--workdir={tmp_path / 'new'}"),
        *("--compare=pytorch", flag),
    )
    assert code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "new").exists()
