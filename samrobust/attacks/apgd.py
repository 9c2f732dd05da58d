"""APGD: projected gradient ascent that sets its own step size, and its targeted form.

`z = P(x_k + step * steepest_ascent(grad loss(x_k)))`, then
`x_{k+1} = P(x_k + 0.75 (z - x_k) + 0.25 (x_k - x_{k-1}))`; the step starts at twice the
radius and halves at checkpoints where the loss stalls, and the ascent resumes from the
best iterate. Two of the four attacks of AutoAttack: `apgd(ball)` on the cross entropy
and `apgd_targeted(ball)`. A single run is `ApgdRun`, cut into its first state and its
steps, so that restarts and targets are loops around it.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from samrobust.attacks import draws
from samrobust.attacks.balls import Ball, into_set
from samrobust.attacks.calls import (
    Call,
    attack_of,
    check_losses,
    check_set,
    check_target,
)
from samrobust.attacks.losses import cross_entropy, targeted_dlr
from samrobust.attacks.numbers import real, whole
from samrobust.attacks.per_example import (
    BestSoFar,
    any_is_left,
    better,
    filled,
    judged_first,
    likeliest_wrong,
    repeat_while,
    score,
    select,
    spread,
)
from samrobust.checks import check
from samrobust.types import Array, CheckedAttack, LossFn

__all__ = ["ApgdRun", "ApgdState", "apgd", "apgd_targeted", "windows"]

_MOMENTUM = 0.75  # the paper's alpha: the share of the new step in the next iterate
# Lengths of the windows between checkpoints, as shares of the number of steps.
_FIRST_WINDOW, _LEAST_WINDOW, _SHRINKAGE = 0.22, 0.06, 0.03


def apgd(
    ball: Ball,
    *,
    loss: LossFn = cross_entropy,
    num_steps: int = 100,
    restarts: int = 1,
    rho: float = 0.75,
    eot: int = 1,
    box: tuple[float, float] = (0.0, 1.0),
) -> CheckedAttack:
    """Builds Auto-PGD within a ball and a box.

    Every run starts at a random point of the ball's surface. At a checkpoint an example
    halves its step and returns to its best iterate, if its loss rose in at most `rho`
    of the steps since the last checkpoint (condition 1), or if the step was not halved
    there and the best loss has not risen since (condition 2). The checkpoints are after
    22, 41, 57, 70, 80, 87, 93 and 99 of 100 steps, and in proportion for other numbers.

    Args:
      ball: the allowed perturbations, from `linf` or `l2`. The authors' code adds 1e-12
        to the norm of an l2 gradient: `l2(radius, gradient_floor=1e-12)`.
      loss: what is maximized, per example; `cross_entropy`, `dlr` or `margin`.
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
      box, and in the ball up to a few units in the last place. Images at radius 0, and
      those that are misclassified as they are, return unchanged. Of every other example
      the result is the first misclassified iterate, starts included, or else the one of
      highest loss: more restarts never raise the accuracy; more steps, as another
      schedule, may. With a key for each example and logits that are not random, the
      outcome does not depend on the batch, up to rounding; with one key it depends on
      the place there. No gradient flows through the result.

    Raises:
      ValueError: if an argument is outside its range; when called, if the images are of
        another dtype, or if the loss needs more classes: `dlr` needs 3.

    Reference: Croce and Hein (2020), arXiv 2003.01690, algorithm 1. The authors' code
    is followed where it says more or differs: windows in whole steps, the loss before
    the first step taken as 0, random logits judged by the last draw. *Our deviation*:
    we return the first of several misclassified iterates, not the last, and without
    one the iterate of highest loss, not the image; we take a full l2 step also where
    the gradient is below 1e-12 (see `ball`).

    >>> from samrobust.attacks import linf
    >>> weights = jnp.array([[1.0, -1.0], [0.5, 0.0]])
    >>> adversarial = apgd(linf(8 / 255), num_steps=10)(
    ...     lambda x: x @ weights, jnp.full([1, 2], 0.5), jnp.array([0]),
    ...     key=jax.random.key(0))
    >>> jnp.round((adversarial - 0.5) * 255)
    Array([[-8., -8.]], dtype=float32)
    """
    box, loss = check_set(ball, box), check_losses(loss)
    restarts = whole(1, restarts=restarts)
    make_run = _run_maker(ball, num_steps, rho, eot, box)

    def attacked(call: Call) -> Array:
        first_key, runs_key = draws.split(call.key)
        run = make_run(loss, *call[:3])
        logits = run.logits(call.images, first_key)
        first = judged_first(call.images, logits, call.labels)
        key_of = functools.partial(draws.of_run, runs_key, restarts, 1)
        return _worst_of(restarts, lambda _: run, key_of, first)

    return attack_of(attacked, box=box, ball=ball, is_random=eot > 1)


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
) -> CheckedAttack:
    """Builds Auto-PGD on the targeted DLR loss, one target class after the other.

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
    box, restarts = check_set(ball, box), whole(1, restarts=restarts)
    num_targets = whole(1, num_targets=num_targets)
    make_run = _run_maker(ball, num_steps, rho, eot, box)

    def attacked(call: Call) -> Array:
        first_key, runs_key = draws.split(call.key)
        run = make_run(cross_entropy, *call[:3])
        logits = run.logits(call.images, first_key)
        check_target(first_target, logits.shape[-1])
        classes = likeliest_wrong(logits, call.labels)

        def toward(index: Array) -> ApgdRun:
            targets = classes[:, first_target + index // restarts]
            return run._replace(loss=lambda z, y: targeted_dlr(z, y, targets))

        num_left = jnp.minimum(num_targets, classes.shape[1] - first_target)
        key_of = functools.partial(draws.of_run, runs_key, restarts, classes.shape[1])
        first = judged_first(call.images, logits, call.labels)
        return _worst_of(num_left * restarts, toward, key_of, first)

    return attack_of(attacked, box=box, ball=ball, is_random=eot > 1)


_Measured = tuple[Array, Array, Array]


class ApgdState(NamedTuple):
    """State of a run: an example a row, so that a caller may drop rows between steps.

    Attributes:
      current: the iterate, [B, ...].
      previous: the iterate before, [B, ...].
      gradient: of the loss at `current`, [B, ...].
      loss: [B], as measured last; 0 before the first step.
      best: the first misclassified iterate, or else the one of highest loss.
      best_gradient: the gradient there, [B, ...].
      step_size: [B].
      rises: int [B], how often the loss rose since the last checkpoint.
      last_score: [B], the best score at the last checkpoint.
      halved: bool [B], whether the step was halved there; at the start it counts as
        halved.
    """

    current: Array
    previous: Array
    gradient: Array
    loss: Array
    best: BestSoFar
    best_gradient: Array
    step_size: Array
    rises: Array
    last_score: Array
    halved: Array


class ApgdRun(NamedTuple):
    """Options and data of a run, see `apgd`; `logits_fn` takes a `key` if `eot` > 1."""

    ball: Ball
    num_steps: int
    rho: float
    eot: int
    box: tuple[float, float]
    loss: LossFn
    logits_fn: Callable[..., Array]
    images: Array
    labels: Array

    def outcome(self, known: Array, key: Array) -> BestSoFar:
        """Returns the best of all steps; where `known` is infinite none is."""
        start_key, draws_key = draws.split(key)

        def is_left(state: ApgdState) -> Array:
            best = jnp.maximum(known, state.best.score)
            return any_is_left(state.best._replace(score=best))

        def step(index: Array, state: ApgdState) -> ApgdState:
            return self.step(state, index, draws.fold_in(draws_key, index))

        first_key = draws.fold_in(draws_key, self.num_steps)
        first = self.begin(self.start(start_key), first_key)
        return repeat_while(is_left, self.num_steps, step, first).best

    def start(self, key: Array) -> Array:
        """Returns random images at the surface of the ball, clipped to the box."""
        noise = self.ball.sample(key, self.images.shape).astype(self.images.dtype)
        length = self.ball.norm(noise)
        radius = filled(self.images, self.ball.radius)
        scale = radius / jnp.where(length > 0, length, 1.0)  # onto the surface
        return jnp.clip(self.images + noise * spread(scale, noise), *self.box)

    def begin(self, start: Array, key: Array) -> ApgdState:
        """Returns the state before the first step; the key is for random logits."""
        gradient, _, reached = self.measure(start, key)
        return ApgdState(
            current=start,
            previous=start,
            gradient=gradient,
            loss=jnp.zeros_like(reached),  # as in the authors' code: see `apgd`
            best=BestSoFar(start, reached),
            best_gradient=gradient,
            step_size=2 * filled(start, self.ball.radius),  # the paper's eta^(0)
            rises=filled(start, 0, jnp.int32),
            last_score=reached,
            halved=filled(start, 1, bool),  # condition 2 waits for one checkpoint
        )

    def step(self, state: ApgdState, index: Array, key: Array) -> ApgdState:
        """Takes step number `index`, and the checkpoint behind it if one is due."""
        current = self.moved(state, index)
        gradient, loss, reached = self.measure(current, key)
        higher = reached > state.best.score  # a mistake scores infinity
        following = state._replace(
            current=current,
            previous=state.current,
            gradient=gradient,
            loss=loss,
            best=select(higher, BestSoFar(current, reached), state.best),
            best_gradient=select(higher, gradient, state.best_gradient),
            rises=state.rises + (loss > state.loss).astype(jnp.int32),
        )
        return self.checked(following, jnp.asarray(windows(self.num_steps))[index])

    def moved(self, state: ApgdState, index: Array) -> Array:
        """Returns the next iterate: a projected step mixed with the last, projected."""
        current, previous = state.current, state.previous
        # Algorithm 1: z^(k+1), then its mix with the last step, by the momentum alpha.
        direction = self.ball.steepest_ascent(state.gradient)
        length = spread(state.step_size, current)
        plain = into_set(current + length * direction, self.images, self.ball, self.box)
        share = jnp.where(index > 0, _MOMENTUM, 1.0).astype(current.dtype)
        mixed = share * (plain - current) + (1 - share) * (current - previous)
        return into_set(current + mixed, self.images, self.ball, self.box)

    def checked(self, state: ApgdState, window: Array) -> ApgdState:
        """Halves the step and goes back to the best iterate where the loss stalls.

        `window` is the number of steps since the last checkpoint, 0 where none is due.
        """
        # The paper's conditions 1 and 2.
        enough = self.rho * window.astype(jnp.float32)
        rarely = state.rises.astype(jnp.float32) <= enough
        in_vain = ~state.halved & (state.last_score >= state.best.score)
        due = window > 0
        halve = due & (rarely | in_vain)
        return state._replace(
            current=select(halve, state.best.images, state.current),
            gradient=select(halve, state.best_gradient, state.gradient),
            step_size=jnp.where(halve, state.step_size / 2, state.step_size),
            rises=jnp.where(due, 0, state.rises),
            last_score=jnp.where(due, state.best.score, state.last_score),
            halved=jnp.where(due, halve, state.halved),
        )

    def measure(self, current: Array, key: Array) -> _Measured:
        """Returns the gradient, mean over draws, and the last losses and scores [B]."""
        gradient_of = jax.grad(self.total_loss, has_aux=True)
        if self.eot == 1:
            gradient, (losses, scores) = gradient_of(current, key)
            return gradient, losses, scores

        def draw(index: Array | int, carry: _Measured) -> _Measured:
            own_key = draws.fold_in(key, index)
            gradient, (losses, scores) = gradient_of(current, own_key)
            return carry[0] + gradient, losses, scores

        nothing = (jnp.zeros_like(current), filled(current, 0), filled(current, 0))
        gradient, losses, scores = jax.lax.fori_loop(0, self.eot, draw, nothing)
        return gradient / self.eot, losses, scores  # EOT: the mean over the draws

    def total_loss(self, current: Array, key: Array) -> tuple[Array, tuple]:
        """Returns the sum of the losses; the losses [B] and the scores [B]."""
        logits = self.logits(current, key)
        losses = self.loss(logits, self.labels).astype(current.dtype)
        # Of a sum, each example's gradient is that of its own loss.
        return jnp.sum(losses), (losses, score(losses, logits, self.labels))

    def logits(self, images: Array, key: Array) -> Array:
        """Returns the logits, one draw of them where they are random."""
        if self.eot == 1:
            return self.logits_fn(images)
        return self.logits_fn(images, key=key)


def windows(num_steps: int) -> np.ndarray:
    """Returns the checkpoints: for each step the length of the window it ends, or 0.

    The paper's recursion, in whole steps as its code rounds them. int32 [num_steps].

    >>> [(step + 1, k) for step, k in enumerate(windows(100).tolist()) if k]
    [(22, 22), (41, 19), (57, 16), (70, 13), (80, 10), (87, 7), (93, 6), (99, 6)]
    """
    least = max(int(_LEAST_WINDOW * num_steps), 1)
    shrinkage = max(int(_SHRINKAGE * num_steps), 1)
    ends = np.zeros(num_steps, np.int32)
    window = end = max(int(_FIRST_WINDOW * num_steps), 1)
    while end <= num_steps:
        ends[end - 1] = window
        window = max(window - shrinkage, least)  # p_(j+1) - p_j, shrinking
        end += window
    return ends


def _run_maker(
    ball: Ball, num_steps: int, rho: float, eot: int, box: tuple[float, float]
) -> Callable[..., ApgdRun]:
    """Checks the options; returns a factory that makes a run for given data."""
    num_steps, eot = whole(1, num_steps=num_steps), whole(1, eot=eot)
    rho = real(rho=rho)
    check(0 <= rho <= 1, "0 <= rho <= 1", rho=rho)
    return functools.partial(ApgdRun, ball, num_steps, rho, eot, box)


def _worst_of(
    num_runs: int | Array,
    run_of: Callable[[Array], ApgdRun],
    key_of: Callable[[Array], Array],
    first: BestSoFar,
) -> Array:
    """Returns the worst images that the runs find, until no example is left."""

    def pursue(index: Array, best: BestSoFar) -> BestSoFar:
        return better(best, run_of(index).outcome(best.score, key_of(index)))

    return repeat_while(any_is_left, num_runs, pursue, first).images
