"""The training loop: batches, metrics, schedules, the best state, divergence."""

import contextlib
import dataclasses
import functools
import json
import math
import shutil
import statistics
import types
from pathlib import Path
from typing import Any

import helpers
import hypothesis
import jax
import numpy as np
import optax
import pytest
from hypothesis import strategies as st

from samrobust.data import Dataset, Split, epoch_permutation, take_batch
from samrobust.evaluation import measure
from samrobust.experiments import building
from samrobust.experiments.building import make_plan, make_training
from samrobust.experiments.components import make_optimizer
from samrobust.experiments.networks import load_network
from samrobust.experiments.run import run, train
from samrobust.experiments.workdir import settle_config
from samrobust.sharpness import sam
from samrobust.system import compiler
from samrobust.system.claims.lease import ClaimedError
from samrobust.system.distributed import data_mesh, replicated
from samrobust.training import (
    InterruptedRunError,
    TrainingDivergedError,
    epoch,
    make_train_step,
)
from samrobust.training.checkpoint import Checkpoints
from samrobust.training.epoch import Chunk, EpochPlan, EpochRunner, LoopState
from samrobust.training.fit import fit
from samrobust.training.log import EndedEpoch, RunFolder, RunLog
from samrobust.training.state import TrainState

FIELDS = {
    *("step", "epoch", "loss", "accuracy", "learning_rate"),
    *("examples_per_second", "seconds"),
}
# The network is left as it is, for all practical purposes.
FROZEN = {"training.learning_rate": 1e-30, "training.weight_decay": 0.0}


pytestmark = pytest.mark.usefixtures("programs_made_once")


# An attack, a method of two passes, and seven steps an epoch.
AT_SAM = "at,norm=linf,eps=16+sam,rho=0.2"
SEVEN = {"data__train_size": 56, "training__batch_size": 8}


@functools.cache
def trained(row: str = "st", **overrides: Any):
    """A run in a folder of its own: its outcome, the folder, config and data."""
    return trained_and_watched(row, **overrides)[:4]


@functools.cache
def trained_and_watched(row: str, **overrides: Any):
    """As `trained`; and how much was compiled until the end of each epoch."""
    names = {name.replace("__", "."): value for name, value in overrides.items()}
    config = helpers.make_config(row, names)
    dataset = helpers.load_data(config)
    workdir = helpers.lasting_folder()
    compilations, at_end_of_epoch = 0, {}

    def on_event(event: str, duration_secs: float, **kwargs: Any) -> None:
        nonlocal compilations
        del duration_secs, kwargs
        compilations += event == "/jax/core/compile/backend_compile_duration"

    def on_progress(progress: Any) -> None:
        if progress.metrics and progress.phase == "training":
            at_end_of_epoch[progress.metrics["epoch"]] = compilations

    jax.monitoring.register_event_duration_secs_listener(on_event)
    try:
        outcome = train(config, dataset, workdir, on_progress=on_progress)
    finally:
        jax.monitoring.unregister_event_duration_listener(on_event)
    return outcome, workdir, config, dataset, at_end_of_epoch


def ten_equal_images() -> Dataset:
    """Ten images of one color, labeled 0 to 9.

    Batch normalization makes the network's logits the same for all of them, so that
    the loss of an example depends on its label alone.
    """
    images = np.full((10, 8, 8, 1), 100, np.uint8)
    split = Split(images, np.arange(10, dtype=np.int32))
    nothing = Split(images[:0], split.labels[:0])
    return Dataset("digits", 10, (0.3,), (0.4,), split, nothing, split)


def train_frozen(workdir: Path, **overrides: Any) -> list[dict[str, Any]]:
    """Trains on the ten equal images without any progress; the lines of its log."""
    names = {name.replace("__", "."): value for name, value in overrides.items()}
    names = {"training.batch_size": 4, "training.drop_remainder": False} | names
    config = helpers.make_config("st", {**FROZEN, **names})
    train(config, ten_equal_images(), workdir)
    return helpers.read_lines(workdir / "metrics.jsonl")


# The plan of an epoch.


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"steps_per_call": -1}, "0 <= steps_per_call, got steps_per_call=-1"),
        ({"steps_per_call": 1.5}, "a whole number for steps_per_call"),
        ({"replays": 0}, "1 <= replays, got replays=0"),
        ({"replays": 1.5}, "a whole number for replays"),
        ({"batch_size": 0}, "1 <= batch_size, got batch_size=0"),
    ],
)
def test_counts_that_are_none_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        epoch.make_plan(20, **{"batch_size": 8, **fields})


@pytest.mark.parametrize(
    ("num_examples", "steps_per_call"),
    [
        (50_000, 26),
        (45_000, 27),
        (49_920, 26),
        (397 * 128, 25),
        (12 * 53 * 128, 25),
        (128, 25),
    ],
)
def test_on_an_accelerator_the_calls_of_an_epoch_are_one_program_where_they_can_be(
    num_examples, steps_per_call, monkeypatch
):
    gpu = types.SimpleNamespace(platform="gpu")
    mesh = types.SimpleNamespace(devices=np.array([gpu]))
    monkeypatch.setattr(epoch, "data_mesh", lambda: mesh)
    plan = epoch.make_plan(num_examples, 128)
    assert plan.steps_per_call == steps_per_call
    assert epoch.make_plan(num_examples, 128, steps_per_call=7).steps_per_call == 7
    if steps_per_call != 25:
        full = {chunk.num_steps for chunk in plan.chunks() if chunk.batch_size == 128}
        assert full == {steps_per_call}


def test_the_programs_of_a_run_are_compiled_as_its_config_says(tmp_path, monkeypatch):
    """Those that judge held-out images too, for the best checkpoint and an average."""
    asked = []
    usual = compiler.compiler_options

    def note():
        asked.append(compiler._DETERMINISTIC.get())
        return usual()

    for module in (epoch, measure):
        monkeypatch.setattr(module, "compiler_options", note)
    for deterministic in (True, False):
        fields = {"training.deterministic": deterministic, "training.epochs": 1}
        config = helpers.make_config("st", {"data.validation_size": 32, **fields})
        train(config, helpers.load_data(config), tmp_path / str(deterministic))
        assert asked == [deterministic] * 2
        asked.clear()


@pytest.mark.parametrize("drop_remainder", [False, True])
@pytest.mark.parametrize("steps_per_call", [1, 3, 100])
@pytest.mark.parametrize(("num_examples", "batch_size"), [(20, 4), (23, 4), (3, 5)])
def test_an_epoch_visits_every_example_exactly_once(
    num_examples, batch_size, steps_per_call, drop_remainder
):
    plan = EpochPlan(num_examples, batch_size, steps_per_call, drop_remainder)
    labels = np.arange(num_examples, dtype=np.int32)
    images = np.zeros((num_examples, 1, 1, 1), np.uint8)
    permutation = np.asarray(epoch_permutation(jax.random.key(0), 2, num_examples))
    seen, step = [], 0
    for chunk in plan.chunks():
        assert 1 <= chunk.num_steps <= steps_per_call
        for _ in range(chunk.num_steps):
            start = step * batch_size
            _, batch = take_batch(images, labels, permutation, start, chunk.batch_size)
            seen += batch.tolist()
            step += 1
    left_out = num_examples % batch_size if drop_remainder else 0
    assert step == plan.num_steps
    assert len(seen) == num_examples - left_out
    assert seen == permutation[: len(seen)].tolist()


@hypothesis.settings(deadline=None)
@hypothesis.given(st.integers(1, 300), st.integers(1, 300))
def test_the_steps_of_an_epoch_are_the_slices_of_a_list(num_examples, batch_size):
    slices = [
        range(num_examples)[start : start + batch_size]
        for start in range(0, num_examples, batch_size)
    ]
    full = sum(len(part) == batch_size for part in slices)
    assert EpochPlan(num_examples, batch_size, 1, False).num_steps == len(slices)
    assert EpochPlan(num_examples, batch_size, 1, True).num_steps == full


@pytest.mark.parametrize("drop_remainder", [False, True])
def test_the_calls_from_any_step_are_the_rest_of_the_epoch(drop_remainder):
    plan = EpochPlan(23, 4, 3, drop_remainder)
    sizes = [
        size for chunk in plan.chunks() for size in [chunk.batch_size] * chunk.num_steps
    ]
    assert sizes == [4] * 5 + [3] * (not drop_remainder)
    for start in range(plan.num_steps + 1):
        rest = [
            size
            for chunk in plan.chunks(start)
            for size in [chunk.batch_size] * chunk.num_steps
        ]
        assert rest == sizes[start:]


def test_the_calls_of_an_epoch_are_as_long_as_allowed():
    calls = EpochPlan(29, 4, 3, drop_remainder=False).chunks(phase=1)
    sizes = [(3, 4), (3, 4), (1, 4), (1, 1)]
    assert calls == [Chunk(*size, phase=1) for size in sizes]


GROUPS = {"sam.m": 8, "model.batch_norm_group": 4}


@pytest.mark.parametrize(
    ("overrides", "remainder", "field"),
    [
        (GROUPS, 12, r"sam\.m, got sam\.m=8"),
        ({"model.batch_norm_group": 4}, 6, r"model\.batch_norm_group, got .*=4"),
    ],
)
def test_a_last_batch_that_the_groups_do_not_divide_is_refused(
    overrides, remainder, field
):
    options = {"training.drop_remainder": False, **overrides}
    config = helpers.make_config("sam,rho=0.2", options)
    message = (
        f"Expected the last batch of an epoch, {remainder} of {64 + remainder} "
        rf"examples, divisible by {field}\. Set training\.drop_remainder"
    )
    with pytest.raises(ValueError, match=message):
        make_plan(config, 64 + remainder)
    assert make_plan(config, 64 + 8).remainder == 8
    dropped = {**options, "training.drop_remainder": True}
    assert make_plan(helpers.make_config("sam,rho=0.2", dropped), 64 + remainder)


def test_examples_chosen_of_a_last_batch_that_do_not_fill_groups_are_refused():
    options = {"training.drop_remainder": False, "model.batch_norm_group": 8}
    config = helpers.make_config("esam,rho=0.2", options)
    chosen = "Expected the examples chosen of the last batch of an epoch, 4 of 72 "
    with pytest.raises(ValueError, match=f"{chosen}.*divisible by model.batch_norm_gr"):
        make_plan(config, 72)
    assert [make_plan(config, size).remainder for size in (64, 80)] == [0, 16]


def lowered_step(config: Any, **options: Any) -> str:
    """The program of a config's step; with options, of the step they make."""
    dataset = helpers.load_data(config)
    init, step = make_training(config, dataset, 3).method
    key = jax.eval_shape(lambda: jax.random.key(0))
    images = jax.ShapeDtypeStruct((32, *dataset.image_shape), "float32")
    state = jax.eval_shape(lambda key: init(key, images), key)
    if options:
        model = helpers.make_model(config, dataset)
        schedule = building.learning_rate_schedule(config, 3)
        _, step = make_train_step(
            model.clone(batch_norm_group=options.pop("batch_norm_group")),
            optax.chain(
                sam(config.sam.rho, aux=state.batch_stats, grouped=True),
                *make_optimizer(config, schedule),
            ),
            **options,
        )
    labels = jax.ShapeDtypeStruct((32,), "int32")
    return jax.jit(step).lower(state, images, labels, key).as_text()


def test_the_groups_of_a_config_are_those_of_its_step():
    config = helpers.make_config("sam,rho=0.2", GROUPS)
    expected = lowered_step(config, group_size=8, batch_norm_group=4)
    assert lowered_step(config) == expected
    assert lowered_step(config, group_size=8, batch_norm_group=8) != expected


def test_groups_as_large_as_the_batch_are_no_groups():
    """Not in an incomplete last batch either."""
    sizes = {"sam.m": 32, "model.batch_norm_group": 32}
    options = {"training.drop_remainder": False, **sizes}
    config = helpers.make_config("sam,rho=0.2", options)
    assert make_plan(config, 65).remainder == 1
    assert lowered_step(config) == lowered_step(helpers.make_config("sam,rho=0.2"))


def test_an_epoch_without_drop_remainder_trains_on_every_label_once(tmp_path):
    lines = train_frozen(tmp_path, training__epochs=20)
    assert [line["step"] for line in lines] == list(range(3, 61, 3))
    losses = [line["loss"] for line in lines]
    np.testing.assert_allclose(losses, losses[0], rtol=1e-6)
    # One of ten labels is the one that is always predicted.
    np.testing.assert_allclose([line["accuracy"] for line in lines], 10.0, rtol=1e-6)


def test_an_epoch_with_drop_remainder_leaves_out_other_examples_each_time(tmp_path):
    lines = train_frozen(tmp_path, training__epochs=20, training__drop_remainder=True)
    assert [line["step"] for line in lines] == list(range(2, 41, 2))
    # The predicted label is among the eight of ten, or it is not.
    accuracies = {round(line["accuracy"], 4) for line in lines}
    assert accuracies == {0.0, 12.5}
    assert len({round(line["loss"], 4) for line in lines}) > 5


# The log.


def test_the_log_has_a_line_an_epoch_with_the_promised_fields():
    _, workdir, _, _ = trained()
    lines = helpers.read_lines(workdir / "metrics.jsonl")
    assert [(line["epoch"], line["step"]) for line in lines] == [
        (1, 3),
        (2, 6),
        (3, 9),
        (4, 12),
    ]
    for line in lines:
        assert line.keys() >= FIELDS
        assert all(math.isfinite(value) for value in line.values())
        assert 0 <= line["accuracy"] <= 100
        rate = 96 / line["seconds"]
        assert line["examples_per_second"] == pytest.approx(rate)


def test_the_log_of_sam_says_that_it_is_on():
    _, workdir, _, _ = trained(AT_SAM, **SEVEN, training__steps_per_call=1)
    for line in helpers.read_lines(workdir / "metrics.jsonl"):
        assert line["rho"] == pytest.approx(0.2)
        assert -1 <= line["cosine"] < 1
        assert line["gradient_norm"] > 0


def test_the_outcome_is_the_final_state_and_the_time_of_all_epochs():
    outcome, workdir, _, _ = trained()
    lines = helpers.read_lines(workdir / "metrics.jsonl")
    assert int(outcome.state.step) == 12
    assert outcome.seconds == pytest.approx(sum(line["seconds"] for line in lines))
    times = [line["seconds"] / 3 for line in lines]
    assert outcome.step_seconds == pytest.approx(statistics.median(times))


def test_progress_is_reported_after_every_call(tmp_path):
    config = helpers.make_config()
    reports = []
    train(config, helpers.load_data(config), tmp_path, on_progress=reports.append)
    assert reports[0].phase == "compiling"
    assert {report.num_steps for report in reports} == {12}
    steps = [report.step for report in reports if report.phase == "training"]
    assert sorted(set(steps)) == list(range(1, 13))
    assert steps == sorted(steps)
    assert reports[-1].metrics["epoch"] == 4


# Schedules.


def test_the_step_schedule_drops_at_three_quarters_and_nine_tenths(tmp_path):
    lines = train_frozen(tmp_path, training__epochs=20)
    rates = [line["learning_rate"] / 1e-30 for line in lines]
    expected = [1.0] * 15 + [0.1] * 3 + [0.01] * 2
    np.testing.assert_allclose(rates, expected, rtol=1e-5)


def test_the_cosine_schedule_falls_to_zero(tmp_path):
    options: dict[str, Any] = {"training__schedule": "cosine"}
    options |= {"training__drop_remainder": True, "training__epochs": 5}
    lines = train_frozen(tmp_path, **options)
    last_steps = np.arange(2, 11, 2) - 1  # of each epoch, of 10 in all
    expected = (1 + np.cos(np.pi * last_steps / 10)) / 2
    rates = [line["learning_rate"] / 1e-30 for line in lines]
    np.testing.assert_allclose(rates, expected, rtol=1e-5)


# Ways to the same parameters, and to others.


def test_several_steps_a_call_end_at_the_same_parameters():
    """Seven steps an epoch in calls of 3, 3 and 1; on CPUs bit for bit."""
    one, three = (
        trained(AT_SAM, **SEVEN, training__steps_per_call=count)[0].state
        for count in (1, 3)
    )
    assert int(one.step) == int(three.step) == 28
    if jax.default_backend() == "cpu":
        helpers.assert_same_bits(three, one)
    else:
        helpers.assert_close(three.params, one.params, atol=1e-4)


# What must not get slow.


def test_a_run_compiles_in_its_first_epoch_and_never_again():
    """Whatever calls its epochs are made of."""
    *_, at_end_of_epoch = trained_and_watched(
        AT_SAM, **SEVEN, training__steps_per_call=3
    )
    assert sorted(at_end_of_epoch) == [1, 2, 3, 4]
    assert at_end_of_epoch[1] > 0
    assert at_end_of_epoch[4] == at_end_of_epoch[1]


def test_an_augmentation_is_applied_to_every_batch():
    """Images that lie upside down from the start train to the same bits."""
    config = helpers.make_config()
    dataset = helpers.load_data(config)
    method = make_training(config, dataset, 3).method
    options = {"epochs": 1, "batch_size": 96, "key": jax.random.key(0)}
    split = dataset.train
    turned = fit(method, Split(split.images[:, ::-1], split.labels), **options)
    augmented = fit(method, split, augment=lambda x, **_: x[:, ::-1], **options)
    helpers.assert_same_bits(turned.state.params, augmented.state.params)
    with pytest.raises(ValueError, match=r"^Expected the augmentation to return float"):
        fit(method, split, augment=lambda x, **_: x > 0.5, **options)


def make_runner(row, **sizes):
    """A runner of epochs, its plan, and what its first call takes."""
    names = {name.replace("__", "."): value for name, value in sizes.items()}
    config = helpers.make_config(row, names)
    dataset = helpers.load_data(config)
    plan = make_plan(config, len(dataset.train))
    built = make_training(config, dataset, plan.num_steps)
    runner = EpochRunner(
        built.method.train_step,
        plan,
        dataset.train,
        padding=1,
        flip=True,
        mesh=data_mesh(),
        key=jax.random.key(1),
    )
    init = jax.jit(built.begin)
    carry = jax.device_put(init(jax.random.key(0)), replicated(data_mesh()))
    return runner, plan, carry


def test_nothing_travels_between_host_and_device_within_an_epoch():
    sizes = {"training__batch_size": 40, "training__drop_remainder": False}
    runner, plan, carry = make_runner("st", **sizes)
    assert plan.remainder > 0
    permutation = runner.permutation(0)
    for chunk in plan.chunks():
        runner.compile(chunk, [carry])
    with jax.transfer_guard("disallow"):
        for chunk in plan.chunks():
            carry, _ = runner.run(chunk, carry, permutation)
    assert int(carry.state.step) == plan.num_steps


def test_the_totals_of_an_epoch_are_read_while_the_next_one_runs(monkeypatch):
    events = []

    def spy(owner, name):
        original = getattr(owner, name)

        def noted(*args, **options):
            events.append(name)
            return original(*args, **options)

        monkeypatch.setattr(owner, name, noted)

    config = helpers.make_config()
    dataset = helpers.load_data(config)
    method = make_training(config, dataset, 3).method
    spy(EpochRunner, "run")
    spy(jax, "device_get")
    spy(RunLog, "append")
    fit(method, dataset.train, epochs=3, batch_size=32, key=jax.random.key(0))
    settled = ["device_get", "append"]
    inner = ["run", *settled, "run", "run"]
    assert events == ["run"] * 3 + 2 * inner + [*settled, "device_get"]


def test_a_checkpoint_at_the_end_of_an_epoch_has_the_line_of_the_epoch(tmp_path):
    overrides = {"training.epochs": 2, "checkpoint.minutes": 0, "checkpoint.keep": 9}
    config = helpers.make_config("st", overrides)
    dataset = helpers.load_data(config)
    train(config, dataset, tmp_path)
    expected = helpers.log_of(tmp_path)
    assert helpers.checkpoint_steps(tmp_path) == list(range(1, 7))
    for step in range(4, 7):
        shutil.rmtree(tmp_path / "checkpoints" / "last" / str(step))
    train(config, dataset, tmp_path)
    assert helpers.log_of(tmp_path) == expected


def test_the_same_config_gives_the_same_bits_and_another_seed_does_not(tmp_path):
    outcome, _, config, dataset = trained()
    again = train(config, dataset, tmp_path)
    helpers.assert_same_bits(again.state, outcome.state)
    other, *_ = trained(seed=1)
    bits, other_bits = (
        helpers.as_bits(state.params) for state in (outcome.state, other.state)
    )
    weights = [name for name in bits if "kernel" in name]
    assert weights
    assert all(bits[name] != other_bits[name] for name in weights)


def test_bfloat16_trains_with_parameters_and_statistics_in_float32():
    state, losses = trained_in("bfloat16")
    leaves = jax.tree.leaves((state.params, state.batch_stats))
    assert {str(leaf.dtype) for leaf in leaves} == {"float32"}
    assert all(1 < loss < 4 for loss in losses)


def test_bfloat16_is_near_float32_but_not_the_same():
    exact, rounded = (trained_in(dtype)[1][0] for dtype in ("float32", "bfloat16"))
    assert rounded == pytest.approx(exact, rel=0.05)
    assert rounded != exact


def trained_in(dtype: str) -> tuple[TrainState, list[float]]:
    """The state after a run in a precision, and the losses of its epochs."""
    settings = {"training__steps_per_call": 1, "model__dtype": dtype}
    if dtype == "float32":  # as `trained` has it already
        del settings["model__dtype"]
    outcome, workdir, _, _ = trained(AT_SAM, **SEVEN, **settings)
    lines = helpers.read_lines(workdir / "metrics.jsonl")
    return outcome.state, [line["loss"] for line in lines]


# The best state.


class Judge:
    """Gives the scores of a list, one an epoch, and remembers the parameters."""

    def __init__(self, *scores: float):
        self._scores, self.seen = iter(scores), []

    def __call__(self, state):
        self.seen.append(jax.tree.map(np.array, state.params))
        return {"score": next(self._scores)}


@pytest.mark.parametrize(
    ("scores", "best"),
    [((1.0, 3.0, 2.0, 2.0), 2), ((5.0, 5.0, 4.0, 1.0), 1), ((0.0, 1.0, 2.0, 3.0), 4)],
)
def test_the_best_checkpoint_is_that_of_the_highest_score(tmp_path, scores, best):
    config = helpers.make_config()
    dataset, judge = helpers.load_data(config), Judge(*scores)
    train(config, dataset, tmp_path, validate=judge)
    assert helpers.checkpoint_steps(tmp_path, "best") == [3 * best]
    variables = load_network(config, dataset, tmp_path, "best").variables
    helpers.assert_same_bits(variables["params"], judge.seen[best - 1])
    lines = helpers.read_lines(tmp_path / "metrics.jsonl")
    assert tuple(line["validation_score"] for line in lines) == scores


def state_after(step: int) -> LoopState:
    """The state of a network with one weight, which says after how many steps."""
    count: Any = np.asarray(step, np.int32)
    state = TrainState(count, {"w": np.ones(1, np.float32)}, {}, ())
    totals: Any = {"examples": np.float32(0), "first_bad_step": np.int32(-1)}
    return LoopState(state, jax.tree.map(np.asarray, totals | {"sums": {}}))


@pytest.mark.parametrize(("score", "best"), [(49.0, 10), (55.0, 20), (60.0, 20)])
def test_a_run_that_goes_on_knows_the_best_as_of_where_it_goes_on(
    tmp_path, score, best
):
    def keep(log: RunFolder, step: int, score: float) -> None:
        log.keep_best(state_after(step), step, {"score": score})

    with RunFolder(tmp_path) as killed:
        killed.restore(state_after(0), 100)
        keep(killed, 5, 40.0)
        keep(killed, 10, 50.0)
        killed.save(state_after(15), 15, 0.0)
        keep(killed, 20, 60.0)
    assert helpers.checkpoint_steps(tmp_path, "best") == [10, 20]
    with RunFolder(tmp_path) as log:
        assert log.restore(state_after(0), 100).state.step == 15
        assert helpers.checkpoint_steps(tmp_path, "best") == [10]
        # Rounding leads elsewhere now: the same step has another score.
        keep(log, 20, score)
        log.save(state_after(25), 25, 0.0)
    assert helpers.checkpoint_steps(tmp_path, "best")[-1] == best
    with Checkpoints(tmp_path / "checkpoints" / "best") as checkpoints:
        found = checkpoints.restore(None, jax.tree.map(np.asarray, state_after(0)))
    assert found.metadata["validation"] == {"score": max(score, 50.0)}


@pytest.mark.parametrize("goes_on", [False, True])
def test_the_best_network_of_a_killed_run_is_not_taken_for_that_of_the_next(
    tmp_path, goes_on
):
    """A kill comes after the first best network is saved, and before its checkpoint."""
    with RunFolder(tmp_path) as killed:
        killed.restore(state_after(0), 100)
        if goes_on:
            killed.save(state_after(5), 5, 0.0)
        killed.keep_best(state_after(10), 10, {"score": 60.0})
    with RunFolder(tmp_path) as log:
        log.restore(state_after(0), 100)
        assert helpers.checkpoint_steps(tmp_path, "best") == []
        zeros = {"w": np.zeros(1, np.float32)}
        other = dataclasses.replace(state_after(10).state, params=zeros)
        log.keep_best(LoopState(other, state_after(10).totals), 10, {"score": 50.0})
        log.save(state_after(15), 15, 0.0)
    with Checkpoints(tmp_path / "checkpoints" / "best") as checkpoints:
        like = LoopState(other, state_after(10).totals)
        found = checkpoints.restore(None, jax.tree.map(np.asarray, like))
    assert found.metadata["validation"] == {"score": 50.0}
    assert not np.any(found.state.state.params["w"])


def test_a_run_that_another_took_over_meanwhile_removes_no_best_checkpoint(tmp_path):
    def refuse():
        if (tmp_path / "checkpoints/last/7").is_dir():  # taken over after that write
            raise ClaimedError("another worker")

    with RunFolder(tmp_path, may_write=refuse) as log:
        log.restore(state_after(0), 100)
        for step in (1, 2):
            log.keep_best(state_after(step), step, {"score": float(step)})
            log.begin_to_save(state_after(step), step, 0.0)
        with Checkpoints(tmp_path / "checkpoints" / "best", keep=9) as theirs:
            theirs.save(6, state_after(6), wait=True)
        with pytest.raises(ClaimedError):
            log.save(state_after(7), 7, 0.0)
    assert 6 in helpers.checkpoint_steps(tmp_path, "best")


def test_the_best_of_every_checkpoint_that_is_kept_is_kept(tmp_path):
    with RunFolder(tmp_path, keep=2) as log:
        log.restore(state_after(0), 100)
        for step in range(1, 7):
            log.keep_best(state_after(step), step, {"score": float(step)})
            log.begin_to_save(state_after(step), step, 0.0)
        log.save(state_after(7), 7, 0.0)
    lasts = helpers.checkpoint_steps(tmp_path, "last")
    assert lasts == [6, 7]
    assert {6} <= {*helpers.checkpoint_steps(tmp_path, "best")} <= {5, 6}


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        (
            {"score": float("nan")},
            r"^Expected a finite score from validate, got score=nan",
        ),
        (
            {"score": 1, "x": np.float32("inf")},
            r"^Expected a finite x from validate, got x=inf\.$",
        ),
        (
            {"accuracy": 1.0},
            r"^Expected a score from validate, got names=\['accuracy'\]\.$",
        ),
    ],
)
def test_what_validate_returns_is_checked(tmp_path, numbers, message):
    config = helpers.make_config()
    with pytest.raises(ValueError, match=message):
        train(config, helpers.load_data(config), tmp_path, validate=lambda _: numbers)


def test_validation_does_not_change_the_training(tmp_path):
    outcome, _, config, dataset = trained()
    judged = train(config, dataset, tmp_path, validate=Judge(2.0, 1.0, 1.0, 1.0))
    helpers.assert_same_bits(judged.state, outcome.state)


def test_the_best_score_survives_an_interruption(tmp_path):
    config = helpers.make_config()
    dataset = helpers.load_data(config)
    judge = Judge(1.0, 3.0, 2.0, 2.5)
    stops = iter([False] * 6)
    with pytest.raises(InterruptedRunError, match="step 7 of 12"):
        train(
            config,
            dataset,
            tmp_path,
            validate=judge,
            should_stop=lambda: next(stops, True),
        )
    train(config, dataset, tmp_path, validate=judge)
    assert helpers.checkpoint_steps(tmp_path, "best") == [6]


def test_the_best_checkpoint_is_evaluated_where_the_config_says_so(tmp_path):
    overrides = {
        "data.validation_size": 40,
        "training.learning_rate": 0.3,
        "training.epochs": 6,
    }
    last = helpers.make_config("st", {**overrides, "evaluation.checkpoint": "last"})
    best = helpers.make_config("st", {**overrides, "evaluation.checkpoint": "best"})
    dataset = helpers.load_data(last)
    results = []
    for name, config in (("last", last), ("best", best)):
        workdir = helpers.make_folder(tmp_path / name)
        settle_config(workdir, config)
        # The first epoch is the best, says this judge; then evaluate the run.
        train(config, dataset, workdir, validate=Judge(*range(6, 0, -1)))
        results.append(run(config, workdir, helpers.Silent(), dataset=dataset))
    assert [result["checkpoint"] for result in results] == ["last", "best"]
    for result, which in zip(results, ("last", "best"), strict=True):
        variables = load_network(last, dataset, tmp_path / which, which).variables
        natural = helpers.plain_accuracy(last, dataset, variables)
        assert result["accuracy"]["natural"] == pytest.approx(natural)
    assert results[0]["accuracy"] != results[1]["accuracy"]


def test_a_run_validates_on_the_held_out_images(tmp_path):
    overrides = {"data.validation_size": 40, "checkpoint.keep": 10}
    config = helpers.make_config("at,norm=linf,eps=16", overrides)
    dataset = helpers.load_data(config)
    run(config, tmp_path, helpers.Silent(), dataset=dataset)
    lines = helpers.read_lines(tmp_path / "metrics.jsonl")
    for line in lines:
        assert line["validation_score"] == line["validation_robust"]
        assert line["validation_robust"] <= line["validation_natural"]
    held_out = dataclasses.replace(dataset, test=dataset.validation)
    variables = load_network(config, dataset, tmp_path, "last").variables
    natural = helpers.plain_accuracy(config, held_out, variables)
    assert lines[-1]["validation_natural"] == pytest.approx(natural)


# Divergence.


@pytest.mark.parametrize("batch_size", [32, 96])  # an epoch of three steps, of one
def test_a_loss_that_is_not_finite_stops_the_run_and_spares_the_good_checkpoint(
    tmp_path, batch_size
):
    overrides = {
        "training.batch_size": batch_size,
        "training.learning_rate": 1e20,
        "checkpoint.minutes": 0.0,
        "checkpoint.keep": 100,
    }
    config = helpers.make_config("st", overrides)
    dataset = helpers.load_data(config)
    messages = []
    for _ in range(2):  # a restart ends in the same way
        with pytest.raises(TrainingDivergedError, match="not finite") as error:
            train(config, dataset, tmp_path)
        messages.append(str(error.value))
    steps = helpers.checkpoint_steps(tmp_path)
    assert steps
    assert f"checkpoint: step {steps[-1]} " in messages[0]
    assert f"at step {steps[-1]}. " in messages[0]  # steps before it are done
    assert messages[1] == messages[0]
    for step in steps:
        leaves = helpers.read_checkpoint(tmp_path, step=step)
        bad = [name for name, leaf in leaves.items() if not np.isfinite(leaf).all()]
        assert bad == []


def test_what_is_on_the_device_ends_before_a_divergence_is_told(tmp_path, monkeypatch):
    """A process that ended meanwhile might crash, with another exit code."""
    begun, ended, run_chunk = [], [], EpochRunner.run

    def remember(*arguments):
        carry, done = run_chunk(*arguments)
        begun.append(done)
        return carry, done

    monkeypatch.setattr(EpochRunner, "run", remember)
    monkeypatch.setattr(jax, "block_until_ready", ended.append)
    config = helpers.make_config("st", {"training.learning_rate": 1e20})
    with pytest.raises(TrainingDivergedError):
        train(config, helpers.load_data(config), tmp_path)
    assert begun[-1] is ended[-1]


def test_without_a_checkpoint_the_message_of_a_divergence_says_so(tmp_path):
    overrides = {"training.learning_rate": 1e20}
    config = helpers.make_config("st", overrides)
    with pytest.raises(TrainingDivergedError, match="none was saved before"):
        train(config, helpers.load_data(config), tmp_path)
    assert helpers.checkpoint_steps(tmp_path) == []


def test_parameters_that_overflow_in_the_very_last_step_stop_the_run_too(tmp_path):
    """The loss and the gradient of that step are finite; what it leaves is not."""
    overrides = {
        "training.learning_rate": 3e38,
        "training.milestones": (),
        "training.epochs": 1,
        "training.batch_size": 96,
        "training.weight_decay": 100.0,
    }
    config = helpers.make_config("st", overrides)
    with pytest.raises(TrainingDivergedError):
        train(config, helpers.load_data(config), tmp_path)
    assert helpers.checkpoint_steps(tmp_path) == []


def test_a_second_pass_of_sam_that_is_not_finite_stops_the_run(tmp_path):
    overrides = {"training.epochs": 1, "training.batch_size": 96}
    config = helpers.make_config("sam,rho=0.2", overrides)
    config.sam.rho = 1e30  # which no row may ask for
    with pytest.raises(TrainingDivergedError):
        train(config, helpers.load_data(config), tmp_path)
    assert helpers.checkpoint_steps(tmp_path) == []


def test_running_statistics_that_overflow_stop_the_run(tmp_path):
    """The parameters stay finite, but the network cannot be evaluated."""
    overrides = {"training.epochs": 1, "training.batch_size": 96}
    config = helpers.make_config("sam,rho=0.2", overrides)
    config.sam.rho = 1e10
    with pytest.raises(TrainingDivergedError):
        train(config, helpers.load_data(config), tmp_path)


def test_every_line_of_the_log_is_json_that_any_reader_takes(tmp_path):
    config = helpers.make_config(
        "sam,rho=0.2", {"training.epochs": 1, "training.batch_size": 96}
    )
    config.sam.rho = 1e30
    with contextlib.suppress(TrainingDivergedError):
        train(config, helpers.load_data(config), tmp_path)
    for line in (tmp_path / "metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=lambda name: pytest.fail(name))


# What is refused.


def test_a_batch_larger_than_the_data_is_refused_where_remainders_are_dropped(tmp_path):
    config = helpers.make_config("st", {"training.batch_size": 97})
    message = r"training\.batch_size <= 96, .* got .*=97\. .*\.drop_remainder=False"
    with pytest.raises(ValueError, match=message):
        train(config, helpers.load_data(config), tmp_path)


def test_the_weights_of_a_run_that_saved_none_are_refused(tmp_path):
    config = helpers.make_config()
    dataset = helpers.load_data(config)
    for which in ("last", "best"):
        with pytest.raises(RuntimeError, match=r"Expected a checkpoint in .*got none"):
            load_network(config, dataset, tmp_path, which)


def test_every_accuracy_in_a_line_is_in_percent():
    sums = {"loss": 8.0, "accuracy": 2.0, "natural_loss": 4.0, "natural_accuracy": 1.0}
    totals = {"sums": sums, "examples": 4.0, "first_bad_step": -1}
    line = RunLog().line_of(EndedEpoch(1, 3, totals, {}, lambda: 2.0))
    wanted = {"loss": 2.0, "natural_loss": 1.0, "examples_per_second": 2.0}
    wanted |= {"accuracy": 50.0, "natural_accuracy": 25.0}
    assert {name: line[name] for name in wanted} == wanted
