"""The compiled part of the loop: data on the device in, several steps, state out.

Batches are gathered, augmented and trained on inside `jit`; metrics are summed on the
device. Every random number is a pure function of the seed and the step, so that a run
can resume at any step as if it had never stopped.
"""

import copy
import dataclasses
import functools
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.stages import Traced

from samrobust.checks import check, check_whole, count
from samrobust.data import Split, augmented, epoch_permutation, take_batch
from samrobust.system.compiler import compiler_options
from samrobust.system.distributed import data_mesh, replicate, replicated, shard_batch
from samrobust.training.repeating import repeat
from samrobust.training.state import TrainState
from samrobust.training.step import TrainStep
from samrobust.types import Array, Augmentation, PyTree

__all__ = [
    "Chunk",
    "EpochPlan",
    "EpochRunner",
    "LoopState",
    "MetricSums",
    "Turn",
    "make_plan",
    "zero_sums",
]

MetricSums: TypeAlias = dict[str, Any]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LoopState:
    """Arrays that go from chunk to chunk, and into checkpoints.

    Attributes:
      state: of the training.
      totals: of the current epoch's metrics, see `zero_sums`.
    """

    state: TrainState
    totals: MetricSums


class Turn(NamedTuple):
    """A run's part in a call of the device: what differs between seeds.

    Attributes:
      carry: donated.
      permutation: of the epoch.
      key: of the run's steps.
    """

    carry: LoopState
    permutation: Array
    key: Array


@dataclasses.dataclass(frozen=True)
class Chunk:
    """Work of one call of the device: `num_steps` steps on batches of `batch_size`.

    Attributes:
      num_steps: training steps in the call.
      batch_size: examples of a step, over all devices.
      phase: of the training, whose step is taken.
    """

    num_steps: int
    batch_size: int
    phase: int = 0


@dataclasses.dataclass(frozen=True)
class EpochPlan:
    """Division of an epoch's examples into batches, and of the batches into chunks.

    Attributes:
      num_examples: of the training split.
      batch_size: over all devices.
      steps_per_call: at most this many steps a call.
      drop_remainder: leave out an incomplete last batch.
      replays: steps in a row on each batch, the same images and labels. An epoch keeps
        its number of steps, so that the data are seen once in `replays` epochs.
    """

    num_examples: int
    batch_size: int
    steps_per_call: int
    drop_remainder: bool
    replays: int = 1

    @property
    def remainder(self) -> int:
        """Size of the incomplete last batch; 0 if there is none."""
        return 0 if self.drop_remainder else self.num_examples % self.batch_size

    @property
    def num_steps(self) -> int:
        """Steps in an epoch."""
        return self.num_examples // self.batch_size + (self.remainder > 0)

    def chunks(self, start: int = 0, phase: int = 0) -> list[Chunk]:
        """Returns the chunks from step `start` of an epoch in a phase to its end."""
        full = self.num_examples // self.batch_size
        chunks = []
        for step in range(start, full, self.steps_per_call):
            steps = min(self.steps_per_call, full - step)
            chunks.append(Chunk(steps, self.batch_size, phase))
        if self.remainder and start < self.num_steps:
            chunks.append(Chunk(1, self.remainder, phase))
        return chunks


def make_plan(
    num_examples: int,
    batch_size: int,
    *,
    steps_per_call: int = 0,
    drop_remainder: bool = False,
    replays: int = 1,
) -> EpochPlan:
    """Divides an epoch into batches and chunks.

    Args:
      num_examples: of the training split.
      batch_size: over all devices, which divide it.
      steps_per_call: 0: 1 on the CPU, where a loop over steps does not pay, else of 13
        to 50 the divisor of the full batches next to 25, so that all chunks of them
        are one program; 25 where there is none.
      drop_remainder: leave out an incomplete last batch.
      replays: see `EpochPlan`.

    Raises:
      ValueError: for a size or count below its minimum, if there is not one batch, the
        devices do not divide a full one, or an incomplete one would be replayed.
    """
    count(batch_size=batch_size, replays=replays)
    check_whole(0, steps_per_call=steps_per_call)
    devices = data_mesh().devices
    full = num_examples // batch_size
    if steps_per_call == 0:
        on_cpu = devices.flat[0].platform == "cpu"
        steps_per_call = 1 if on_cpu else _divisor_near(25, full)
    plan = EpochPlan(num_examples, batch_size, steps_per_call, drop_remainder, replays)
    check(
        plan.num_steps > 0,
        f"batch_size <= {num_examples}, the training examples",
        "Or keep an incomplete batch: drop_remainder=False." if num_examples else "",
        batch_size=batch_size,
    )
    check(
        batch_size % devices.size == 0,
        f"batch_size divisible by the {devices.size} devices",
        "Choose another size: with this one devices would do the same work twice.",
        batch_size=batch_size,
    )
    check(
        replays == 1 or plan.remainder == 0,
        "drop_remainder with replays",
        f"The last batch has {plan.remainder} examples.",
        drop_remainder=drop_remainder,
        replays=replays,
    )
    return plan


def _divisor_near(size: int, number: int) -> int:
    """Returns the divisor within a factor of two of `size`; `size` if there is none.

    >>> _divisor_near(25, 390), _divisor_near(25, 391 * 2), _divisor_near(25, 397)
    (26, 23, 25)
    """
    near = range(size // 2 + 1, 2 * size + 1)
    divisors = [n for n in near if number % n == 0]
    return min(divisors, key=lambda n: abs(n - size), default=size)


def zero_sums(metrics: Iterable[str]) -> MetricSums:
    """Returns the sums of these metrics over no step."""
    return {
        "examples": jnp.zeros([], jnp.float32),
        # After which metrics, or variables at the end of a call, are not finite.
        "first_bad_step": jnp.full([], -1, jnp.int32),
        "sums": {name: jnp.zeros([], jnp.float32) for name in metrics},
    }


def _noted(totals: MetricSums, arrays: PyTree, step: Array) -> MetricSums:
    """Notes the step if it is the first after which arrays are not finite."""
    leaves = jax.tree.leaves(arrays)
    finite = jnp.all(jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in leaves]))
    is_first = ~finite & (totals["first_bad_step"] < 0)
    first = jnp.where(is_first, step, totals["first_bad_step"])
    return {**totals, "first_bad_step": first}


def _added(totals: MetricSums, metrics: dict[str, Array], size: int) -> MetricSums:
    """Adds a step's metrics."""
    # Weighted by examples: the last batch of an epoch may be smaller.
    sums = {name: totals["sums"][name] + size * x for name, x in metrics.items()}
    return {**totals, "examples": totals["examples"] + size, "sums": sums}


class EpochRunner:
    """Runner of the chunks of an epoch, on data that stay on the device.

    Traced without 64-bit types, whatever `jax_enable_x64` says: with them augmentation
    draws other numbers, and a resumed run would differ.

    Args:
      train_step: the pure step, or one for each phase of the training.
      plan: of the epoch.
      split: the training images, copied to every device once.
      padding: of the random crop, in pixels.
      flip: mirror at random.
      augment: applied thereafter; None: nothing more.
      mesh: over which batches are split; all else is replicated.
      key: of all batches, augmentations and attacks of the run.
    """

    def __init__(
        self,
        train_step: TrainStep | Sequence[TrainStep],
        plan: EpochPlan,
        split: Split,
        *,
        padding: int,
        flip: bool,
        augment: Augmentation | None = None,
        mesh: Mesh,
        key: Array,
    ):
        several = isinstance(train_step, Sequence)
        self._train_steps = train_step if several else (train_step,)
        self._plan, self._mesh = plan, mesh
        self._options = compiler_options()  # of the context that it is built in
        options: dict[str, Any] = {"padding": padding, "flip": flip, "augment": augment}
        self._augment = functools.partial(augmented, **options)
        self._placement = replicated(mesh)
        images_and_labels = (split.images, split.labels)
        self._data = replicate(images_and_labels, mesh)
        self._shuffle_key, self._step_key = jax.random.split(key)
        self._permute = jax.jit(
            lambda key, epoch: epoch_permutation(key, epoch, len(split)),
            out_shardings=self._placement,
        )
        self._compiled: dict[tuple[Chunk, int], Callable[..., Any]] = {}

    def seconds(self) -> float:
        """Returns a time; the difference of two is what this run took meanwhile."""
        return time.monotonic()

    def rest(self) -> None:
        """Does nothing: the time of a run by itself is that of the wall."""

    def permutation(self, epoch: int) -> Array:
        """Returns the order of the examples in an epoch, int32 [N]."""
        with jax.enable_x64(False):
            return self._permute(self._shuffle_key, epoch // self._plan.replays)

    def reseeded(self, key: Array) -> "EpochRunner":
        """Returns the runner of another run, with the same programs and data."""
        other = copy.copy(self)
        other._shuffle_key, other._step_key = jax.random.split(key)
        return other

    def turn(self, carry: LoopState, permutation: Array) -> Turn:
        """Returns what a call takes of this run, with its key."""
        return Turn(carry, permutation, self._step_key)

    def run(
        self, chunk: Chunk, carry: LoopState, permutation: Array
    ) -> tuple[LoopState, Array]:
        """Runs a chunk without waiting for it.

        Args:
          chunk: compiled at its first use.
          carry: donated: must not be used afterwards.
          permutation: of the epoch.

        Returns:
          The new carry, and an array that is ready when the chunk is done.
        """
        (outcome,) = self.run_each(chunk, [self.turn(carry, permutation)])
        return outcome

    def run_each(
        self, chunk: Chunk, turns: Sequence[Turn]
    ) -> list[tuple[LoopState, Array]]:
        """Runs the same chunk of several runs as one program; as `run`.

        The runs differ in their seeds alone: the steps taken are this runner's. Each is
        at a step of its own.
        """
        carries, permutations, keys = (list(each) for each in zip(*turns, strict=True))
        program = self.compile(chunk, carries)
        return program(carries, *self._data, permutations, keys)

    def compile(
        self, chunk: Chunk, carries: Sequence[LoopState]
    ) -> Callable[..., list[tuple[LoopState, Array]]]:
        """Returns the compiled function of a chunk, for so many runs."""
        name = chunk, len(carries)
        if name not in self._compiled:
            traced = self.trace(chunk, carries)
            with jax.enable_x64(False):
                self._compiled[name] = traced.lower().compile(self._options)
        return self._compiled[name]

    def trace(self, chunk: Chunk, carries: Sequence[LoopState]) -> Traced:
        """Traces the function of a chunk; of carries shapes and placement suffice."""
        jitted = jax.jit(
            self._make_run(chunk), donate_argnums=0, out_shardings=self._placement
        )
        labels = self._data[1]
        permutation = jax.ShapeDtypeStruct(
            labels.shape, jnp.int32, sharding=self._placement
        )
        permutations = [permutation] * len(carries)
        keys = [self._step_key] * len(carries)
        with jax.enable_x64(False):
            return jitted.trace(list(carries), *self._data, permutations, keys)

    def _make_run(self, chunk: Chunk) -> Callable[..., Any]:
        def one_step(
            carry: LoopState,
            images: Array,
            labels: Array,
            permutation: Array,
            key: Array,
        ) -> LoopState:
            step = carry.state.step
            number = step // self._plan.replays  # of the batch
            start = (number % self._plan.num_steps) * self._plan.batch_size
            batch = take_batch(images, labels, permutation, start, chunk.batch_size)
            batch_images, batch_labels = shard_batch(batch, self._mesh)
            crop_key, attack_key = jax.random.split(jax.random.fold_in(key, step))
            if self._plan.replays > 1:  # replays of a batch are cropped alike
                crop_key, _ = jax.random.split(jax.random.fold_in(key, number))
            batch_images = self._augment(batch_images, key=crop_key)
            train_step = self._train_steps[chunk.phase]
            state, metrics = train_step(
                carry.state, batch_images, batch_labels, attack_key
            )
            totals = _added(carry.totals, metrics, chunk.batch_size)
            return LoopState(state, _noted(totals, metrics, step))

        def run(
            carries: list[LoopState],
            images: Array,
            labels: Array,
            permutations: list[Array],
            keys: list[Array],
        ) -> list[tuple[LoopState, Array]]:
            def step_of_each(carries: list[LoopState]) -> list[LoopState]:
                # Side by side, and not under `vmap`, which would make grouped
                # convolutions of those with each run's own weights.
                return [
                    one_step(carry, images, labels, *own)
                    for carry, *own in zip(carries, permutations, keys, strict=True)
                ]

            if chunk.num_steps == 1:
                # No loop: XLA's CPU compiler is better outside one.
                carries = step_of_each(carries)
            else:
                carries = repeat(step_of_each, carries, chunk.num_steps)
            return [ended(carry) for carry in carries]

        def ended(carry: LoopState) -> tuple[LoopState, Array]:
            # Once a call, since it reads every parameter: what is not finite in them
            # shows in the next step's metrics anyway.
            state = carry.state
            totals = _noted(carry.totals, state.variables, state.step - 1)
            # A copy of the step: the carry is donated next.
            return LoopState(state, totals), state.step + 0

        return run
