"""The programs that are measured: a step, an epoch, an evaluation, and the roofline.

All but the last are the package's own: the same train step, loop and evaluator as a run
uses, compiled with the same options. Each function measures one of them under a config
and returns what it found, ready for JSON.
"""

import functools
import itertools
import math
import pathlib
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core
from jax.sharding import NamedSharding, PartitionSpec

from samrobust.data import Dataset, random_crop_and_flip, take_batch
from samrobust.evaluation import make_evaluator
from samrobust.experiments import building
from samrobust.studies.bench.images import make_dataset
from samrobust.system.distributed import data_mesh, replicated, sharded
from samrobust.system.runtime import compiler_options
from samrobust.training import Method
from samrobust.training.checkpoint import Checkpoints
from samrobust.training.epoch import EpochPlan, EpochRunner, LoopState
from samrobust.training.fit import fresh_carry
from samrobust.training.state import TrainState
from samrobust.types import Array, Config

__all__ = [
    "POOL",
    "begin",
    "epoch",
    "evaluation",
    "jit_steps",
    "on_pool",
    "roofline",
    "step",
    "step_program",
    "unrolled",
]

# `timing.measure` with its options; or writes a trace and returns no seconds.
Measure: TypeAlias = Callable[..., list[float]]
Found: TypeAlias = dict[str, Any]

POOL = 4  # different batches, so that no step sees the one before it again
_EPOCH_STEPS = 16  # of the shortened epoch that is measured


def step(config: Config, measure: Measure, *, unroll: bool = False) -> Found:
    """Measures the bare training step, on batches that lie on the device."""
    jitted, arguments, num_steps = step_program(config, unroll=unroll)
    program, compilation = _compile(lambda: jitted.lower(*arguments))
    seconds = measure(_repeated(program, *arguments))
    return compilation | {"seconds": [value / num_steps for value in seconds]}


unrolled = functools.partial(step, unroll=True)


def step_program(
    config: Config, *, unroll: bool = False
) -> tuple[Any, tuple[Any, ...], int]:
    """Returns the program of one call: training steps, without the rest of the loop.

    Args:
      config: of the step.
      unroll: the loop of the attack; wants one step a call.

    Returns:
      A jitted function from the state and data to the next state, which it is donated;
      its arguments, and the number of steps it takes.
    """
    batch_size = config.training.batch_size
    dataset, method, carry = begin(config, POOL * batch_size)
    num_steps = building.make_plan(config, len(dataset.train)).steps_per_call
    arguments = (carry.state, *_on_device(dataset, batch_size), jax.random.key(1))
    one_step = on_pool(method)
    if unroll:
        one_step = _unrolled(one_step, *arguments)
    return jit_steps(one_step, num_steps), arguments, num_steps


def on_pool(method: Method) -> Callable[..., TrainState]:
    """Returns a training step that takes its batch out of several, [P, B, ...]."""

    def one_step(state: TrainState, images: Array, labels: Array, key: Array):
        which = state.step % POOL
        key = jax.random.fold_in(key, state.step)
        return method.train_step(state, images[which], labels[which], key)[0]

    return one_step


def jit_steps(one_step: Callable[..., TrainState], num_steps: int) -> Any:
    """Returns `num_steps` steps as one jitted function, which is donated the state."""

    def run(state: TrainState, *data: Array) -> TrainState:
        if num_steps == 1:
            return one_step(state, *data)
        state, _ = jax.lax.scan(
            lambda state, _: (one_step(state, *data), None), state, length=num_steps
        )
        return state

    return jax.jit(run, donate_argnums=0, out_shardings=replicated(data_mesh()))


def epoch(config: Config, measure: Measure) -> Found:
    """Measures the loop of a run: batches, augmentation, metrics, checkpoints.

    Beside the seconds of a step: `checkpoint_seconds`, for which saving holds up the
    loop, and `pipeline_seconds`, which a step's batch and augmentation take alone.
    """
    batch_size = config.training.batch_size
    steps = building.make_plan(config, batch_size).steps_per_call
    num_steps = math.ceil(_EPOCH_STEPS / steps) * steps
    dataset, method, carry = begin(config, num_steps * batch_size)
    plan = EpochPlan(num_steps * batch_size, batch_size, steps, drop_remainder=False)
    augmentation = {"padding": config.data.padding, "flip": config.data.flip}
    options: dict[str, Any] = augmentation | {"mesh": data_mesh()}
    key = jax.random.key(1)
    runner = EpochRunner(method.train_step, plan, dataset.train, **options, key=key)
    _, compilation = _compile(lambda: runner.lower(plan.chunks()[0], carry))
    chunks = (
        (chunk, permutation)
        for permutation in map(runner.permutation, itertools.count())
        for chunk in plan.chunks()
    )

    def run() -> LoopState:
        nonlocal carry
        chunk, permutation = next(chunks)
        carry, _ = runner.run(chunk, carry, permutation)
        return carry

    seconds = [value / steps for value in measure(run)]
    if not seconds:
        return {}

    @jax.jit
    def draw(images: Array, labels: Array, order: Array, key: Array) -> Any:
        batch, labels = take_batch(images, labels, order, 0, batch_size)
        return random_crop_and_flip(batch, **augmentation, key=key), labels

    data = jax.device_put((dataset.train.images, dataset.train.labels))
    data += (jnp.arange(len(dataset.train)), jax.random.key(2))
    drawing = measure(lambda: draw(*data), min_seconds=0.2)
    return compilation | {
        "seconds": seconds,
        "checkpoint_seconds": _checkpoint_seconds(carry),
        "pipeline_seconds": statistics.median(drawing),
    }


def evaluation(config: Config, measure: Measure) -> Found:
    """Measures clean accuracy and all attacks of the config, on one batch."""
    batch_size = config.evaluation.batch_size
    dataset, _, carry = begin(config, 1, batch_size)
    model = building.make_model(config, dataset)
    attacks = building.evaluation_attacks(config)
    evaluate = make_evaluator(model, attacks, batch_size=batch_size)
    arguments = (carry.state.variables, dataset.test, jax.random.key(1))
    started = time.perf_counter()
    evaluate(*arguments)
    first = time.perf_counter() - started
    seconds = measure(lambda: evaluate(*arguments))
    steady = statistics.median(seconds or [first])
    return {"seconds": seconds, "compile_seconds": max(0.0, first - steady)}


def roofline(config: Config, measure: Measure) -> Found:
    """Measures the most that the device can do, in this process's settings.

    Returns:
      `matmul`: operations per second of a large square matrix product in the config's
      dtype, two a multiply-add. `copy`: bytes per second, read and written, of a pass
      over an array beyond any cache. The fastest repeat counts.

    Reference: Williams, Waterman and Patterson (2009), "Roofline".
    """
    on_cpu = jax.default_backend() == "cpu"
    size = 2048 if on_cpu else 8192
    matrix = jax.random.normal(jax.random.key(0), (size, size)) / size**0.5
    matrix = matrix.astype(config.model.dtype)
    numbers = jnp.ones((128 if on_cpu else 1024) * 2**18, jnp.float32)

    def fastest(function: Callable[[Array], Array], start: Array) -> float:
        apply = jax.jit(function, donate_argnums=0)
        return min(measure(_repeated(apply, jnp.copy(start))))

    return {
        "matmul": 2 * size**3 / fastest(lambda x: matrix @ x, matrix),
        "copy": 2 * numbers.nbytes / fastest(lambda x: x * 1.0001, numbers),
    }


def begin(
    config: Config, num_train: int, num_test: int = 1
) -> tuple[Dataset, Method, LoopState]:
    """Returns images, the config's method, and the first state, on all devices."""
    dataset = make_dataset(config.data.name, num_train, num_test)
    batch_size = config.training.batch_size
    method = building.make_method(config, dataset, max(1, num_train // batch_size))
    fresh = fresh_carry(method, batch_size, dataset.image_shape)
    everywhere = replicated(data_mesh())
    return dataset, method, jax.jit(fresh, out_shardings=everywhere)(jax.random.key(0))


def _unrolled(function: Callable[..., Any], *arguments: Any) -> Callable[..., Any]:
    """Returns a function whose loops of a known length, `lax.scan`s, are unrolled."""
    jaxpr, shape = jax.make_jaxpr(function, return_shape=True)(*arguments)
    flat = core.jaxpr_as_fun(_with_unrolled_scans(jaxpr))
    treedef = jax.tree.structure(shape)
    return lambda *args: jax.tree.unflatten(treedef, flat(*jax.tree.leaves(args)))


def _with_unrolled_scans(program: Any) -> Any:
    """Returns a jaxpr, closed or not, whose scans have all their steps in one turn."""
    if isinstance(program, core.ClosedJaxpr):
        return program.replace(jaxpr=_with_unrolled_scans(program.jaxpr))
    if not isinstance(program, core.Jaxpr):
        return program
    equations = []
    for equation in program.eqns:
        params = {k: _with_unrolled_scans(v) for k, v in equation.params.items()}
        if equation.primitive.name == "scan":
            params["unroll"] = params["length"]
        equations.append(equation.replace(params=params))
    return program.replace(eqns=equations)


def _repeated(
    function: Callable[..., Any], state: Any, *rest: Any
) -> Callable[[], Any]:
    """Returns a call of `state <- function(state, *rest)`; the state may be donated."""

    def call() -> Any:
        nonlocal state
        state = function(state, *rest)
        return state

    return call


def _on_device(dataset: Dataset, batch_size: int) -> tuple[Array, Array]:
    """Returns the training images as batches [P, B, ...], split over the devices."""
    everything = np.arange(len(dataset.train))
    images, labels = take_batch(
        dataset.train.images, dataset.train.labels, everything, 0, len(everything)
    )
    placement = sharded(data_mesh())
    batched = NamedSharding(placement.mesh, PartitionSpec(None, *placement.spec))
    cut = [x.reshape(-1, batch_size, *x.shape[1:]) for x in (images, labels)]
    return tuple(jax.device_put(cut, batched))


def _compile(lower: Callable[[], Any]) -> tuple[Any, Found]:
    """Returns a compiled program, and the seconds to trace and compile it."""
    started = time.perf_counter()
    program = lower().compile(compiler_options())
    return program, {"compile_seconds": time.perf_counter() - started}


def _checkpoint_seconds(carry: LoopState) -> float:
    """Measures how long saving holds up the loop, the median of three."""
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
