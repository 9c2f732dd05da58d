"""The sanity checks, one after the other, on a trained network.

    balls = {"linf 8/255": linf(8 / 255)}
    findings = run_sanity(model, variables, split, balls, key=key)

Gradient masking is a network without useful gradients, not one that is robust;
docs/sanity.md explains every check. Out of scope: robust accuracy itself, for which
these images are too few.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from samrobust import attacks
from samrobust.attacks import Ball
from samrobust.checks import check
from samrobust.data import Split
from samrobust.data.splits import spread
from samrobust.evaluation import BatchFn, check_finite, make_measure
from samrobust.evaluation.diagnostics import verdicts
from samrobust.evaluation.diagnostics.finding import Finding
from samrobust.evaluation.diagnostics.measures import (
    Craft,
    count_products,
    float32_copy,
    measure_crafts,
    measure_gradients,
    measure_logits,
    measure_steps,
    rescaled_cross_entropy,
)
from samrobust.types import Array, Attack, LossFn, PyTree

__all__ = ["Effort", "Surrogate", "run_sanity", "some_of"]


@dataclasses.dataclass(frozen=True)
class Effort:
    """The effort of the checks; the default is for a verdict, less is for tests.

    Attributes:
      steps: numbers of PGD steps whose curve is looked at, rising, at least two.
      restarts: numbers of restarts, likewise.
      restart_steps: steps of each of these restarts, and of PGD elsewhere.
      apgd_steps: of APGD on the cross entropy and on DLR, the white-box attack.
      queries: of Square.
      radii: how many, from the ball's to that of the whole box.
      draws: of random noise.
    """

    steps: tuple[int, ...] = (1, 10, 20, 50, 100)
    restarts: tuple[int, ...] = (1, 5, 10)
    restart_steps: int = 20
    apgd_steps: int = 100
    queries: int = 1000
    radii: int = 5
    draws: int = 10

    def __post_init__(self):
        for name in ("steps", "restarts"):
            values = getattr(self, name)
            rising = all(a < b for a, b in itertools.pairwise(values))
            check(
                len(values) >= 2 and rising and values[0] >= 1,
                f"two or more rising numbers >= 1 for {name}",
                **{name: values},
            )
        check(self.radii >= 2, "radii >= 2", radii=self.radii)


class Surrogate(NamedTuple):
    """Another trained network, whose adversarial images are tried on this one."""

    model: nn.Module
    variables: PyTree


@dataclasses.dataclass
class _Look:
    """A network under examination, and the measuring of it.

    Attributes:
      model, variables: the network.
      transfer: others, by name.
      split: the images.
      effort: how hard to try.
      batch_size: as `make_measure` takes it.
      num_measures: how often `measure` will be called.
      key: the randomness of all measurements.
      on_batch: called with the progress, see `run_sanity`.
      num_measured: how often `measure` was called.
    """

    model: nn.Module
    variables: PyTree
    transfer: Mapping[str, Surrogate]
    split: Split
    effort: Effort
    batch_size: int
    num_measures: int
    key: Array
    on_batch: Callable[[int, int], None]
    num_measured: int = 0

    def measure(
        self, batch_fn: BatchFn, variables: PyTree | None = None
    ) -> dict[str, np.ndarray]:
        """Measures something on all images, by default of the network itself."""
        return self.measuring(batch_fn)(variables)

    def measuring(
        self, batch_fn: BatchFn
    ) -> Callable[[PyTree | None], dict[str, np.ndarray]]:
        """Returns `measure` of one thing, which compiles once."""
        measure = make_measure(batch_fn, batch_size=self.batch_size)

        def on_batch(done: int, num_examples: int) -> None:
            total = self.num_measures * num_examples
            self.on_batch(self.num_measured * num_examples + done, total)

        def measured(variables: PyTree | None = None) -> dict[str, np.ndarray]:
            variables = self.variables if variables is None else variables
            own_key = jax.random.fold_in(self.key, self.num_measured)
            outcome = measure(variables, self.split, own_key, on_batch=on_batch)
            self.num_measured += 1
            return outcome

        return measured


def run_sanity(
    model: nn.Module,
    variables: PyTree,
    split: Split,
    balls: Mapping[str, Ball],
    *,
    transfer: Mapping[str, Surrogate] | None = None,
    num_examples: int = 256,
    batch_size: int = 256,
    effort: Effort | None = None,
    key: Array,
    on_batch: Callable[[int, int], None] = lambda *_: None,
) -> list[Finding]:
    """Looks for signs that a network's robustness is an illusion.

    Args:
      model: `apply(variables, images, train=False)` gives logits [B, K], K >= 2. That
        it draws random numbers (`make_rng`) is one of the defects; it is attacked
        under one draw.
      variables: of the model.
      split: images to look at; `some_of(split, num_examples)` are taken.
      balls: by name, as in `linf 8/255`; best the largest ball of each norm that robust
        accuracy is stated for.
      transfer: other networks on the same images, by name, not empty.
      num_examples: images to look at, >= 1. With fewer than 100 little is resolved.
      batch_size: as `make_measure` takes it.
      effort: see there.
      key: consumed.
      on_batch: called after every batch as `on_batch(done, total)`, in images times
        measurements; it may raise, and so end the work.

    Returns:
      The findings: those on the network, then those on each ball.

    Raises:
      ValueError: for arguments outside their range, a ball of radius 0 among them.
    """
    check(num_examples >= 1, "num_examples >= 1", num_examples=num_examples)
    check(len(split) >= 1, "a split with examples", num_examples=len(split))
    for name, ball in balls.items():
        holds = 0 < float(ball.radius) < math.inf
        check(holds, "balls of radius > 0", ball=name, radius=ball.radius)
    transfer = dict(transfer or {})
    check("" not in transfer, "names for the networks of transfer", names=[*transfer])
    # How often `_on_network` and `_on_ball` measure, for an accurate progress bar.
    has_copy = float32_copy(model) is not None
    num_measures = 3 + has_copy + (5 + bool(transfer) + has_copy) * len(balls)
    look = _Look(
        model,
        variables,
        transfer,
        some_of(split, num_examples),
        effort or Effort(),
        batch_size,
        num_measures,
        key,
        on_batch,
    )
    findings, logits = _on_network(look)
    for name, ball in balls.items():
        found = _on_ball(look, ball, logits)
        findings += [dataclasses.replace(finding, ball=name) for finding in found]
    return findings


def some_of(split: Split, num_examples: int) -> Split:
    """Selects at most `num_examples` of a split, evenly spread, in order.

    >>> split = Split(np.zeros([10, 1, 1, 1], np.uint8), np.arange(10, dtype=np.int32))
    >>> some_of(split, 4).labels.tolist()
    [1, 3, 5, 9]
    """
    count = min(num_examples, len(split))
    indices = spread(len(split), count)
    return Split(split.images[indices], split.labels[indices])


def _on_network(look: _Look) -> tuple[list[Finding], list[np.ndarray]]:
    """Judges whether it gives logits, gradients, and in two passes the same.

    Returns:
      The findings; the logits [N, K], and if it has a copy in float32, of that too.

    Raises:
      ValueError: if a highest logit is NaN or infinite: there is nothing to check.
    """
    models = [look.model, float32_copy(look.model)]
    network, *copy = [look.measuring(measure_logits(m)) for m in models if m]
    first, second, *exact = (each(None) for each in (network, network, *copy))
    check_finite(int(np.sum(~first["finite"])), len(first["finite"]))
    gradients = look.measure(measure_gradients(look.model))
    names = ("correct", "zero", "zero_margin", "saturated")
    logits = first["logits"]
    return [
        verdicts.judge_outputs(logits),
        verdicts.judge_gradients(*(gradients[name] for name in names)),
        verdicts.judge_randomness(logits, second["logits"]),
    ], [logits, *(each["logits"] for each in exact)]


def _on_ball(look: _Look, ball: Ball, logits: list[np.ndarray]) -> list[Finding]:
    """Runs all checks on the attack within one ball."""
    pgd, effort = _pgd(look, ball), look.effort
    # The ascent on this loss does not change with a factor of the logits.
    scale_free = attacks.dlr if logits[0].shape[-1] >= 3 else attacks.margin
    crafts = {
        "apgd": attacks.apgd(ball, num_steps=effort.apgd_steps),
        "apgd dlr": attacks.apgd(ball, loss=scale_free, num_steps=effort.apgd_steps),
        "pgd": pgd,
        "rescaled": _pgd(look, ball, rescaled_cross_entropy),
        "noise": attacks.noise(ball, num_draws=effort.draws),
        "natural": attacks.identity,
    }
    outcome = _attacked(look, crafts)
    white_box = outcome["apgd"] & outcome["apgd dlr"]
    white_margin = np.maximum(outcome["apgd margin"], outcome["apgd dlr margin"])
    square = attacks.square(ball, num_queries=effort.queries)
    square = _attacked(look, {"square": square})["square"]
    return [
        _steps(look, ball),
        _restarts(look, ball),
        _radii(look, ball),
        verdicts.judge_square(white_box, square, effort.queries),
        _transfer(look, ball, white_box),
        verdicts.judge_logit_scale(
            outcome["pgd"], outcome["rescaled"], outcome["natural margin"]
        ),
        _precision(look, logits, outcome["pgd"], pgd),
        verdicts.judge_noise(
            white_box,
            outcome["noise"],
            (white_margin, outcome["noise margin"]),
            effort.draws,
        ),
        verdicts.judge_finite({name: outcome[f"{name} finite"] for name in crafts}),
    ]


def _pgd(look: _Look, ball: Ball, loss: LossFn = attacks.cross_entropy) -> Attack:
    return attacks.pgd(
        ball,
        step_size=ball.radius / 4,
        num_steps=look.effort.restart_steps,
        loss=loss,
        judge="any",
    )


def _attacked(look: _Look, by_name: Mapping[str, Attack]) -> dict[str, np.ndarray]:
    """Measures the network on images of its own making."""
    return _crafted(look, {n: Craft(a, look.model) for n, a in by_name.items()}, {})


def _crafted(
    look: _Look, crafts: dict[str, Craft], others: dict[str, PyTree]
) -> dict[str, np.ndarray]:
    variables = {"": look.variables, **others}
    return look.measure(measure_crafts(look.model, crafts), variables)


def _steps(look: _Look, ball: Ball) -> Finding:
    stages = look.effort.steps
    found = look.measure(measure_steps(look.model, ball, stages, 1))
    return verdicts.judge_steps(stages, found["standing"][:, 0], found["margin"][:, 0])


def _restarts(look: _Look, ball: Ball) -> Finding:
    numbers, steps = look.effort.restarts, (look.effort.restart_steps,)
    outcome = look.measure(measure_steps(look.model, ball, steps, numbers[-1]))
    after_each = np.logical_and.accumulate(outcome["standing"][:, :, 0], axis=1)
    return verdicts.judge_restarts(numbers, after_each[:, np.array(numbers) - 1])


def _radii(look: _Look, ball: Ball) -> Finding:
    """Tries radii up to where the ball around any image of the box is the whole box."""
    is_linf = math.isinf(ball.order)
    whole = 1.0 if is_linf else math.sqrt(math.prod(look.split.images.shape[1:]))
    start = min(float(ball.radius), whole / 2)
    radii = [float(r) for r in np.geomspace(start, whole, look.effort.radii)]
    make = attacks.linf if is_linf else attacks.l2
    steps = look.effort.restart_steps
    grid = {f"{r}": attacks.apgd(make(r), num_steps=steps) for r in radii}
    outcome = _attacked(look, grid)
    return verdicts.judge_radii({255 * r: outcome[f"{r}"] for r in radii})


def _transfer(look: _Look, ball: Ball, white_box: np.ndarray) -> Finding:
    if not look.transfer:
        return verdicts.judge_transfer(white_box, {})
    attack = attacks.apgd(ball, num_steps=look.effort.apgd_steps)
    crafts = {n: Craft(attack, other.model, n) for n, other in look.transfer.items()}
    others = {name: other.variables for name, other in look.transfer.items()}
    outcome = _crafted(look, crafts, others)
    return verdicts.judge_transfer(white_box, {name: outcome[name] for name in crafts})


def _precision(
    look: _Look, logits: list[np.ndarray], own: np.ndarray, pgd: Attack
) -> Finding:
    dtype = str(jnp.dtype(getattr(look.model, "dtype", None) or jnp.float32))
    shape = look.split.images.shape[1:]
    products = count_products(look.model, look.variables, shape)
    copy = float32_copy(look.model)
    if copy is None:
        return verdicts.judge_products(dtype, products)
    exact = _crafted(look, {"exact": Craft(pgd, copy)}, {})["exact"]
    return verdicts.judge_precision(
        dtype, products, (logits[0], logits[1]), (own, exact)
    )
