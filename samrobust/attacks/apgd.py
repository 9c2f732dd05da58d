"""APGD: projected gradient ascent that sets its own step size, and its targeted form.

`z = P(x_k + step * steepest_ascent(grad loss(x_k)))`, then
`x_{k+1} = P(x_k + 0.75 (z - x_k) + 0.25 (x_k - x_{k-1}))`; the step starts at twice the
radius and halves at checkpoints where the loss stalls, and the ascent goes on from the
best iterate. Two of the four attacks of AutoAttack: `apgd(ball)` on the cross entropy
and `apgd_targeted(ball)`. The single run is in `samrobust.attacks.ascent`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from samrobust.attacks import draws
from samrobust.attacks.ascent import Ascent, State, Worst, worse
from samrobust.attacks.balls import Ball
from samrobust.attacks.calls import (
    Call,
    accept,
    check_ball,
    check_box,
    check_losses,
    check_target,
)
from samrobust.attacks.examples import filled
from samrobust.attacks.numbers import real, whole
from samrobust.checks import check
from samrobust.objectives import cross_entropy, misclassified, targeted_dlr
from samrobust.types import Array, Attack, LogitsFn, LossFn

__all__ = ["apgd", "apgd_targeted"]


def apgd(
    ball: Ball,
    *,
    loss: LossFn = cross_entropy,
    num_steps: int = 100,
    restarts: int = 1,
    rho: float = 0.75,
    eot: int = 1,
    box: tuple[float, float] = (0.0, 1.0),
) -> Attack:
    """Auto-PGD within a ball and a box.

    Every run starts at a random point of the ball's surface. At a checkpoint the step
    of an example halves, and it goes back to its best iterate, if its loss rose in at
    most `rho` of the steps since the last checkpoint, or if the step was not halved
    there and the best loss has not risen since. The checkpoints are after 22, 41, 57,
    70, 80, 87, 93 and 99 of 100 steps, and in these proportions for other numbers.

    Args:
      ball: the allowed perturbations, from `linf` or `l2`. The authors' code adds 1e-12
        to the norm of an l2 gradient: `l2(radius, gradient_floor=1e-12)`.
      loss: what is maximised, per example; `cross_entropy`, `dlr` or `margin`.
      num_steps: number of gradient steps of a run, >= 1.
      restarts: number of independent runs, >= 1.
      rho: the share of rising steps that keeps a step from halving, in [0, 1].
      eot: number of draws, >= 1, that a gradient is the mean of. With more than one
        `logits_fn` is random and is called as `logits_fn(images, key=key)`, with one
        key or a key array [B], as the attack is.
      box: the range of pixel values, clipped to after every projection.

    Returns:
      `attack(logits_fn, images, labels, *, key) -> images` on images [B, ...] in the
      box, float32 (or float64), and labels int [B]. Wrap it in `jax.jit`: outside it
      compiles at every call. It ends when all examples of the batch are misclassified.

      **Guarantees.** Shape and dtype of the images are kept. The result lies in the
      box, and in the ball up to a few units in the last place. Radius 0 returns the
      images unchanged, and so do images that are misclassified as they are. Of an
      example the first misclassified iterate is handed in, starts included, or the one
      of highest loss where there is none, so that more steps and restarts never raise
      the accuracy. Up to rounding, and where the logits are not random, its outcome
      does not depend on the batch it is in. No gradient flows through the result.

    Raises:
      ValueError: if an argument is outside its range; when called, if the images are of
        another dtype, or if the loss needs more classes: `dlr` needs 3.

    Reference: Croce and Hein (2020), arXiv 2003.01690, algorithm 1. The authors' code
    is followed where it says more or differs: windows in whole steps, the loss before
    the first step taken as 0, random logits judged by the last draw. *Our deviation*:
    of several misclassified iterates the first is handed in, not the last; of the
    others the one of highest loss, not the image; a full l2 step also where the
    gradient is below 1e-12 (see `ball`).

    >>> from samrobust.attacks import linf
    >>> weights = jnp.array([[1.0, -1.0], [0.5, 0.0]])
    >>> adversarial = apgd(linf(8 / 255), num_steps=10)(
    ...     lambda x: x @ weights, jnp.full([1, 2], 0.5), jnp.array([0]),
    ...     key=jax.random.key(0))
    >>> jnp.round((adversarial - 0.5) * 255)
    Array([[-8., -8.]], dtype=float32)
    """
    settings = _make_settings(ball, num_steps, rho, eot, box)
    restarts, loss = _positive(restarts=restarts), check_losses(loss)

    def attack(
        logits_fn: LogitsFn, images: Array, labels: Array, *, key: Array
    ) -> Array:
        call = settings.accept(logits_fn, images, labels, key)
        if ball.radius == 0:
            return call.images
        natural_key, runs_key = draws.split(call.key)
        task = _Task(settings, *call[:3])
        natural = task.natural_logits(natural_key)
        return task.worst(restarts, lambda _: loss, natural, runs_key)

    return attack


def apgd_targeted(
    ball: Ball,
    *,
    num_targets: int = 9,
    first_target: int | Array = 0,
    num_steps: int = 100,
    restarts: int = 1,
    rho: float = 0.75,
    eot: int = 1,
    box: tuple[float, float] = (0.0, 1.0),
) -> Attack:
    """Auto-PGD on the targeted DLR loss, one target class after the other.

    The targets of an example are its most likely wrong classes at the image itself,
    the likeliest first. An example counts as broken wherever it is misclassified,
    also as another class than the target.

    Args:
      ball: as for `apgd`.
      num_targets: number of target classes, >= 1; all wrong ones if there are fewer.
      first_target: how many of the likeliest ones are left out before them, >= 0 and
        below the number of wrong classes. May be traced, unlike the rest: a caller that
        drops broken examples between targets compiles once for all of them.
      num_steps: number of gradient steps of a run, >= 1.
      restarts: number of runs for each target, >= 1.
      rho: as for `apgd`.
      eot: as for `apgd`.
      box: as for `apgd`.

    Returns:
      As from `apgd`, with its guarantees.

    Raises:
      ValueError: as `apgd` does; when called, if there are fewer than 4 classes, which
        `targeted_dlr` needs.

    Reference: Croce and Hein (2020), arXiv 2003.01690, section 4.1 and equation (5);
    deviations as for `apgd`.

    >>> from samrobust.attacks import linf
    >>> adversarial = apgd_targeted(linf(0.1), num_steps=10)(
    ...     lambda x: x, jnp.array([[0.9, 0.8, 0.2, 0.1]]), jnp.array([0]),
    ...     key=jax.random.key(0))
    >>> int(jnp.argmax(adversarial))
    1
    """
    settings = _make_settings(ball, num_steps, rho, eot, box)
    restarts, num_targets = (
        _positive(restarts=restarts),
        _positive(num_targets=num_targets),
    )

    def attack(
        logits_fn: LogitsFn, images: Array, labels: Array, *, key: Array
    ) -> Array:
        call = settings.accept(logits_fn, images, labels, key)
        if ball.radius == 0:
            return call.images
        natural_key, runs_key = draws.split(call.key)
        task = _Task(settings, *call[:3])
        natural = task.natural_logits(natural_key)
        classes = _wrong_classes(natural, call.labels)
        check_target(first_target, natural.shape[-1])

        def loss_of(run: Array) -> LossFn:
            targets = classes[:, first_target + run // restarts]
            return lambda logits, labels: targeted_dlr(logits, labels, targets)

        num_left = jnp.minimum(num_targets, classes.shape[1] - first_target)
        num_runs = num_left * restarts
        return task.worst(num_runs, loss_of, natural, runs_key)

    return attack


class _Settings(NamedTuple):
    """The arguments that a single run needs."""

    ball: Ball
    num_steps: int
    rho: float
    eot: int
    box: tuple[float, float]

    def accept(
        self, logits_fn: LogitsFn, images: Array, labels: Array, key: Array
    ) -> Call:
        """The arguments of a call, looked at."""
        options = {"box": self.box, "ball": self.ball, "is_random": self.eot > 1}
        return accept(logits_fn, images, labels, key, **options)


def _make_settings(
    ball: Ball, num_steps: int, rho: float, eot: int, box: tuple[float, float]
) -> _Settings:
    """Refuses what the attacks cannot mean."""
    num_steps, eot = _positive(num_steps=num_steps), _positive(eot=eot)
    rho, box = real(rho=rho), check_box(box)
    check(0 <= rho <= 1, "0 <= rho <= 1", rho=rho)
    check_ball(ball, box)
    return _Settings(ball, num_steps, rho, eot, box)


def _positive(**one: Any) -> int:
    ((name, value),) = one.items()
    check(whole(**one) >= 1, f"{name} >= 1", **one)
    return value


class _Task(NamedTuple):
    """Settings and data of all runs of an attack."""

    settings: _Settings
    logits_fn: Callable[..., Array]
    images: Array
    labels: Array

    def ascent(self, loss: LossFn) -> Ascent:
        """A run on a loss."""
        return Ascent(*self.settings, loss, self.logits_fn, self.images, self.labels)

    def natural_logits(self, key: Array) -> Array:
        """The logits of the images, [B, K]."""
        return self.ascent(cross_entropy).logits(self.images, key)

    def worst(
        self,
        num_runs: int | Array,
        loss_of: Callable[[Array], LossFn],
        natural: Array,
        key: Array,
    ) -> Array:
        """The outcome of runs on the losses `loss_of(run)`, until nothing is left."""
        wrong = misclassified(natural, self.labels)
        lowest = filled(self.images, -jnp.inf)
        unseen = Worst(self.images, jnp.where(wrong, jnp.inf, lowest))

        def is_unfinished(carry: tuple[Array, Worst]) -> Array:
            run, worst = carry
            return (run < num_runs) & _any_is_left(worst.score)

        def pursue(carry: tuple[Array, Worst]) -> tuple[Array, Worst]:
            run, worst = carry
            own_key = draws.fold_in(key, run)
            outcome = _run(self.ascent(loss_of(run)), worst.score, own_key)
            return run + 1, worse(worst, outcome)

        _, worst = jax.lax.while_loop(is_unfinished, pursue, (jnp.int32(0), unseen))
        return jax.lax.stop_gradient(worst.images)


def _run(ascent: Ascent, known: Array, key: Array) -> Worst:
    """The outcome of one run; examples of infinite `known` score need not be broken."""
    start_key, draws_key = draws.split(key)

    def is_unfinished(carry: tuple[Array, State]) -> Array:
        index, state = carry
        best = jnp.maximum(known, state.best.score)
        return (index < ascent.num_steps) & _any_is_left(best)

    def step(carry: tuple[Array, State]) -> tuple[Array, State]:
        index, state = carry
        own_key = draws.fold_in(draws_key, index)
        return index + 1, ascent.step(state, index, own_key)

    first_key = draws.fold_in(draws_key, ascent.num_steps)
    state = ascent.begin(ascent.start(start_key), first_key)
    _, state = jax.lax.while_loop(is_unfinished, step, (jnp.int32(0), state))
    return state.best


def _any_is_left(score: Array) -> Array:
    return jnp.any(~jnp.isposinf(score))


def _wrong_classes(logits: Array, labels: Array) -> Array:
    """The classes but the label, the likeliest first: [B, K - 1]."""
    is_label = jax.nn.one_hot(labels, logits.shape[-1], dtype=bool)
    others = jnp.where(is_label, -jnp.inf, logits)
    return jnp.argsort(others, axis=-1, descending=True)[:, :-1]
