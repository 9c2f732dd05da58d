"""The programs that are measured: a step, an epoch, an evaluation.

All of them are the package's own: the same train step, loop and evaluator as a run
uses, compiled with the same options.
"""

import itertools
import math
import pathlib
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any, Protocol
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from samrobust.data import Dataset, random_crop_and_flip, take_batch
from samrobust.evaluation import make_evaluator
from samrobust.experiments import building
from samrobust.studies.bench import timing
from samrobust.studies.bench.images import make_dataset
from samrobust.system.distributed import data_mesh, replicated, sharded
from samrobust.system.runtime import compiler_options
from samrobust.training import Method
from samrobust.training.checkpoint import Checkpoints
from samrobust.training.epoch import EpochPlan, EpochRunner, LoopState
from samrobust.training.fit import fresh_carry
from samrobust.training.state import TrainState
from samrobust.types import Array, Config

__all__ = ["epoch", "evaluation", "initial_carry", "step", "unrolled"]

_POOL = 4  # different batches, so that no step sees the one before it again
_EPOCH_STEPS = 16  # of the shortened epoch that is measured


class _Spec(Protocol):
    """The fields of a worker's `Spec` that the programs need."""

    path: str
    trace: bool

    @property
    def protocol(self) -> timing.Protocol: ...


def step(config: Config, spec: _Spec) -> dict[str, Any]:
    """The bare training step, on batches that lie on the device."""
    batch_size = config.training.batch_size
    dataset = make_dataset(config.data.name, _POOL * batch_size, 1)
    method = building.make_method(config, dataset, steps_per_epoch=_POOL)
    steps = building.make_plan(config, len(dataset.train)).steps_per_call
    pool = _on_device(dataset, batch_size)

    def one_step(state: TrainState, images: Array, labels: Array, key: Array):
        which = state.step % _POOL
        key = jax.random.fold_in(key, state.step)
        return method.train_step(state, images[which], labels[which], key)[0]

    def run(state: TrainState, *data: Array) -> TrainState:
        if steps == 1:
            return one_step(state, *data)
        state, _ = jax.lax.scan(
            lambda state, _: (one_step(state, *data), None), state, length=steps
        )
        return state

    jitted = jax.jit(run, donate_argnums=0, out_shardings=replicated(data_mesh()))
    state = initial_carry(method, config, dataset).state
    arguments = (*pool, jax.random.key(1))
    program, compilation = _compile(lambda: jitted.lower(state, *arguments))

    def call() -> TrainState:
        nonlocal state
        state = program(state, *arguments)
        return state

    return compilation | _run(call, spec, steps)


def unrolled(config: Config, spec: _Spec) -> dict[str, Any]:
    """The same step with the loop of the attack written out, iteration by iteration."""

    def fori_loop(lower: int, upper: int, body: Callable, start: Any) -> Any:
        for index in range(lower, upper):
            start = body(index, start)
        return start

    config = config.copy_and_resolve_references()
    config.training.steps_per_call = 1
    with mock.patch.object(jax.lax, "fori_loop", fori_loop):
        return step(config, spec)


def epoch(config: Config, spec: _Spec) -> dict[str, Any]:
    """The loop as a run has it: batches, augmentation, metrics, checkpoints.

    Beside the seconds of a step: `checkpoint_seconds`, for which saving holds up the
    loop, and `pipeline_seconds`, which a step's batch and augmentation take alone.
    """
    batch_size = config.training.batch_size
    steps = building.make_plan(config, batch_size).steps_per_call
    num_steps = math.ceil(_EPOCH_STEPS / steps) * steps
    dataset = make_dataset(config.data.name, num_steps * batch_size, 1)
    method = building.make_method(config, dataset, num_steps)
    plan = EpochPlan(num_steps * batch_size, batch_size, steps, drop_remainder=False)
    runner = EpochRunner(
        method.train_step,
        plan,
        dataset.train,
        padding=config.data.padding,
        flip=config.data.flip,
        mesh=data_mesh(),
        key=jax.random.key(1),
    )
    carry = initial_carry(method, config, dataset)
    _, compilation = _compile(lambda: runner.lower(plan.chunks()[0], carry))
    calls = itertools.chain.from_iterable(
        zip(plan.chunks(), itertools.repeat(runner.permutation(number)), strict=False)
        for number in itertools.count()
    )

    def call() -> Any:
        nonlocal carry
        following, permutation = next(calls)
        carry, _ = runner.run(following, carry, permutation)
        return carry

    outcome = compilation | _run(call, spec, steps)
    if not spec.trace:
        outcome["checkpoint_seconds"] = _checkpoint_seconds(carry)
        outcome["pipeline_seconds"] = _pipeline_seconds(config, dataset, spec)
    return outcome


def evaluation(config: Config, spec: _Spec) -> dict[str, Any]:
    """Clean accuracy and all attacks of the config, in one pass over a few batches."""
    batch_size = config.evaluation.batch_size
    dataset = make_dataset(config.data.name, 1, batch_size)
    model = building.make_model(config, dataset)
    attacks = building.evaluation_attacks(config)
    evaluate = make_evaluator(model, attacks, batch_size=batch_size)
    method = building.make_method(config, dataset, 1)
    variables = initial_carry(method, config, dataset).state.variables
    key = jax.random.key(1)
    started = time.perf_counter()
    evaluate(variables, dataset.test, key)
    first = time.perf_counter() - started

    def call() -> Any:
        return evaluate(variables, dataset.test, key)

    outcome = _run(call, spec, 1)
    if "seconds" in outcome:
        steady = statistics.median(outcome["seconds"])
        outcome["compile_seconds"] = max(0.0, first - steady)
    return outcome | {"num_images": batch_size}


def initial_carry(method: Method, config: Config, dataset: Dataset) -> LoopState:
    """Returns what a run begins with, on all devices."""
    begin = fresh_carry(method, config.training.batch_size, dataset.image_shape)
    return jax.jit(begin, out_shardings=replicated(data_mesh()))(jax.random.key(0))


def _on_device(dataset: Dataset, batch_size: int) -> tuple[Array, Array]:
    """The training images as batches [P, B, ...], split over the devices."""
    everything = np.arange(len(dataset.train))
    images, labels = take_batch(
        dataset.train.images, dataset.train.labels, everything, 0, len(everything)
    )
    placement = sharded(data_mesh())
    spec = PartitionSpec(None, *placement.spec)
    data = (
        images.reshape(-1, batch_size, *images.shape[1:]),
        labels.reshape(-1, batch_size),
    )
    return jax.device_put(data, NamedSharding(placement.mesh, spec))


def _compile(lower: Callable[[], Any]) -> tuple[Any, dict[str, float]]:
    """A compiled program, and what tracing and compiling it took."""
    started = time.perf_counter()
    lowered = lower()
    traced = time.perf_counter()
    program = lowered.compile(compiler_options())
    compiled = time.perf_counter()
    return program, {
        "lower_seconds": traced - started,
        "compile_seconds": compiled - traced,
    }


def _run(call: Callable[[], Any], spec: _Spec, steps: int) -> dict[str, Any]:
    """Seconds of a step, a value a repeat; or nothing, if a trace is asked for."""
    if not spec.trace:
        seconds = timing.measure(call, spec.protocol)
        return {"seconds": [value / steps for value in seconds]}
    jax.block_until_ready(call())
    with jax.profiler.trace(spec.path, create_perfetto_trace=True):
        for _ in range(2):
            jax.block_until_ready(call())
    return {"trace": spec.path}


def _checkpoint_seconds(carry: LoopState) -> float:
    """How long saving holds up the loop, the median of three."""
    seconds = []
    with (
        tempfile.TemporaryDirectory() as folder,
        Checkpoints(pathlib.Path(folder) / "checkpoints", keep=1) as checkpoints,
    ):
        for number in range(3):
            started = time.perf_counter()
            checkpoints.save(number, carry, {})
            seconds.append(time.perf_counter() - started)
            checkpoints.wait()
    return statistics.median(seconds)


def _pipeline_seconds(config: Config, dataset: Dataset, spec: _Spec) -> float:
    """Seconds that drawing and augmenting a batch take alone, as one program."""
    batch_size = config.training.batch_size
    options = {"padding": config.data.padding, "flip": config.data.flip}
    images, labels = jax.device_put((dataset.train.images, dataset.train.labels))
    order = jnp.arange(len(labels))

    @jax.jit
    def draw(images: Array, labels: Array, order: Array, key: Array) -> Any:
        batch, labels = take_batch(images, labels, order, 0, batch_size)
        return random_crop_and_flip(batch, **options, key=key), labels

    key = jax.random.key(2)
    protocol = timing.Protocol(spec.protocol.repeats, 0.2, warmup_calls=3)
    return statistics.median(
        timing.measure(lambda: draw(images, labels, order, key), protocol)
    )
