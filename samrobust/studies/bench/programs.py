"""The programs that are measured: a training step, an evaluation, and the roofline.

All but the last are the package's own: the same loop and evaluator as a run uses,
compiled with the same options. Each function measures one of them under a config and
returns what it found, ready for JSON.
"""

import functools
import pathlib
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jax.extend import core

from samrobust.checks import LARGEST_COUNT
from samrobust.data import Dataset, DatasetFacts, Split, augmented, take_batch
from samrobust.evaluation import make_evaluator
from samrobust.evaluation.measure import batch_size_for
from samrobust.experiments import building
from samrobust.studies.bench.images import make_dataset
from samrobust.system.compiler import deterministic_programs
from samrobust.system.distributed import data_mesh, replicated
from samrobust.system.jaxprs import abstract_key
from samrobust.training import Method
from samrobust.training.checkpoint import Checkpoints
from samrobust.training.epoch import Chunk, EpochPlan, EpochRunner, LoopState
from samrobust.types import Array, Config

__all__ = [
    "begin",
    "evaluation",
    "num_steps",
    "num_train",
    "roofline",
    "step",
    "training",
    "unrolled",
]

# `timing.measure` with its options; or writes a trace and returns no seconds.
Measure: TypeAlias = Callable[..., list[float]]
Found: TypeAlias = dict[str, Any]


# JAX's events: a program is looked for in the cache, and is there.
_REQUEST = "/jax/compilation_cache/compile_requests_use_cache"
_HIT = "/jax/compilation_cache/cache_hits"


def step(
    config: Config, measure: Measure, *, unroll: bool = False, seeds: int = 1
) -> Found:
    """Measures a training step as epochs run it, and what an epoch costs beside.

    With several seeds in the program, the time of a step is each one's share.
    `pipeline_seconds` is what a step's batch and augmentation take alone;
    `checkpoint_seconds`, for how long saving holds up the loop.
    """
    facts = building.load_facts(config)
    split = _images(config, num_train(config, facts), 1).train
    runner, chunk, begin = training(config, facts, split, unroll=unroll)
    init = jax.jit(begin, out_shardings=replicated(data_mesh()))
    carries = [init(jax.random.key(seed)) for seed in range(seeds)]
    found = _compiled(lambda: runner.compile(chunk, carries))
    permutation = runner.permutation(0)

    def call() -> list[LoopState]:
        nonlocal carries
        turns = [runner.turn(carry, permutation) for carry in carries]
        carries = [carry for carry, _ in runner.run_each(chunk, turns)]
        return carries

    seconds = [value / (chunk.num_steps * seeds) for value in measure(call)]
    if not seconds or unroll:
        return found | {"seconds": seconds}

    @jax.jit
    def draw(images: Array, labels: Array, order: Array, key: Array) -> Any:
        batch, labels = take_batch(images, labels, order, 0, chunk.batch_size)
        return augmented(batch, **building.augmentation(config), key=key), labels

    data = jax.device_put((split.images, split.labels))
    drawing = measure(
        lambda: draw(*data, permutation, jax.random.key(2)), min_seconds=0.2
    )
    return found | {
        "seconds": seconds,
        "checkpoint_seconds": _checkpoint_seconds(carries[0]),
        "pipeline_seconds": statistics.median(drawing),
    }


unrolled = functools.partial(step, unroll=True)


def training(
    config: Config, facts: DatasetFacts, split: Split, *, unroll: bool = False
) -> tuple[EpochRunner, Chunk, Callable[[Array], LoopState]]:
    """Returns the loop of a run, the first of its calls, and its initialization.

    Args:
      config: of the run.
      facts: of the data set.
      split: the images to train on.
      unroll: the loop of the attack.
    """
    plan = building.make_plan(config, len(split))
    built = building.make_training(config, facts, plan.num_steps)
    train_step = built.method.train_step
    if unroll:
        key = abstract_key()
        size, shape = plan.batch_size, facts.image_shape
        images = jax.ShapeDtypeStruct((size, *shape), jnp.float32)
        labels = jax.ShapeDtypeStruct((size,), jnp.int32)
        state = jax.eval_shape(built.begin, key).state
        train_step = _unrolled(train_step, state, images, labels, key)
    with deterministic_programs(config.training.deterministic):
        runner = EpochRunner(
            *(train_step, plan, split),
            **building.augmentation(config),
            mesh=data_mesh(),
            key=jax.random.key(1),
        )
    return runner, plan.chunks()[0], built.begin


def _compiled(compile_it: Callable[[], object]) -> Found:
    """Compiles a program: how many seconds it takes, and whether the cache had it."""
    events: list[str] = []

    def listen(event: str, **_: object) -> None:
        events.append(event)

    jax.monitoring.register_event_listener(listen)
    try:
        started = time.perf_counter()
        compile_it()
        seconds = time.perf_counter() - started
    finally:
        jax.monitoring.unregister_event_listener(listen)
    found, wanted = events.count(_HIT), events.count(_REQUEST)
    return {"compile_seconds": seconds, "from_cache": found == wanted > 0}


def num_train(config: Config, facts: DatasetFacts) -> int:
    """Returns the number of images that a run of the config trains on."""
    return config.data.train_size or facts.num_train - config.data.validation_size


def num_steps(config: Config, facts: DatasetFacts) -> int:
    """Returns the number of steps in an epoch of a run of the config."""
    training = config.training
    size, drop = num_train(config, facts), training.drop_remainder
    return EpochPlan(size, training.batch_size, 1, drop).num_steps


def evaluation(config: Config, measure: Measure) -> Found:
    """Measures clean accuracy and all attacks of the config, on one batch."""
    batch_size = batch_size_for(LARGEST_COUNT, config.evaluation.batch_size)
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
    return {
        "seconds": seconds,
        "compile_seconds": max(0.0, first - steady),
        "batch_size": batch_size,
    }


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
        apply, state = jax.jit(function, donate_argnums=0), jnp.copy(start)

        def call() -> Array:
            nonlocal state
            state = apply(state)
            return state

        return min(measure(call))

    return {
        "matmul": 2 * size**3 / fastest(lambda x: matrix @ x, matrix),
        "copy": 2 * numbers.nbytes / fastest(lambda x: x * 1.0001, numbers),
    }


def begin(
    config: Config, num_train: int, num_test: int = 1
) -> tuple[Dataset, Method, LoopState]:
    """Returns images, the config's method, and the first state, on all devices."""
    dataset = _images(config, num_train, num_test)
    steps = max(1, num_steps(config, building.load_facts(config)))
    built = building.make_training(config, dataset, steps)
    init = jax.jit(built.begin, out_shardings=replicated(data_mesh()))
    return dataset, built.method, init(jax.random.key(0))


def _images(config: Config, num_train: int, num_test: int) -> Dataset:
    data = config.data
    return make_dataset(data.name, num_train, num_test, data_dir=data.data_dir)


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
