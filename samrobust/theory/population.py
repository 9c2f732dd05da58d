"""The exact population losses of linear classifiers, and their direct minimisation.

Given the label, the margin of w = (w_1, 1, ..., 1) is +-w_1 + N(d eta, d), so that
every loss here is a mixture of two normal tails:

    L = p Phi(-up) + (1 - p) Phi(-down)

with the standardised margins `up`, where x_1 is right, and `down`, where it is wrong.
Nothing is expanded or sampled; all is float64, and losses are kept as logarithms, so
that a loss of 1e-100 has as many digits as one of 0.1. These are the numbers that
`samrobust.theory.closed_forms` is held against; this module does not know that one.
"""

from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import numpy as np
from scipy.special import erfcx, log_ndtr

from samrobust.theory.world import Floats, World

_LIFT_ROUNDS = 6  # refinements of a search by 9 points, and of one within it
_ANGLE_ROUNDS = (17, *[7] * 10)

__all__ = [
    "Objective",
    "Optimum",
    "Value",
    "accuracy",
    "adversarial",
    "minimise",
    "natural",
    "sam_all_weights",
    "sam_robust_weight",
]


class Value(NamedTuple):
    """A loss at weights w_1.

    Attributes:
      log_loss: its natural logarithm.
      slope: the derivative of that by w_1; 0 where it is too small for float64.
      rising: the slope's sign, which is known there too.
      doubt: how far rounding may move a zero of the slope that is near.
    """

    log_loss: np.ndarray
    slope: np.ndarray
    rising: np.ndarray
    doubt: np.ndarray


_Margin: TypeAlias = tuple[np.ndarray, np.ndarray | float]
Objective: TypeAlias = Callable[[np.ndarray], Value]


class Optimum(NamedTuple):
    """Where a loss is smallest.

    Attributes:
      w: the weight w_1; infinite where x_1 alone is best, all others being 0 beside it.
      error: what rounding and the search may add to it; infinite where float64 cannot
        tell, since the loss is flat there to the last digit.
    """

    w: np.ndarray
    error: np.ndarray


def natural(world: World) -> Objective:
    """The 0-1 loss `1 - Pr(f_w(x) = y)` of worlds [...] at weights [..., N].

    Every objective here takes weights with one axis more than the world's parameters.
    """
    return adversarial(world, 0.0, moves_robust=False)


def adversarial(world: World, epsilon: Floats, *, moves_robust: bool) -> Objective:
    """The 0-1 loss under the worst perturbation with `||delta||_inf <= epsilon`.

    The worst one takes epsilon times the l1 norm of the weights off the margin.

    Args:
      world: the data.
      epsilon: the radius.
      moves_robust: whether x_1 is perturbed too, as equation (9) says; False: the
        other features alone.
    """
    eta, epsilon, root = _columns(world.eta, epsilon, np.sqrt(world.d))
    p = _columns(world.p)[0]

    def objective(w: np.ndarray) -> Value:
        loss = epsilon * np.abs(w) if moves_robust else 0.0
        slope = epsilon * np.sign(w) if moves_robust else 0.0
        rest = root**2 * (eta - epsilon) - loss
        return _mixture(
            p,
            ((rest + w) / root, (1 - slope) / root),
            ((rest - w) / root, (-1 - slope) / root),
        )

    return objective


def sam_robust_weight(
    world: World, rho: Floats, *, num_candidates: int = 33
) -> Objective:
    """SAM's loss, equation (11), where the perturbation moves w_1 alone.

    The worst of `num_candidates` weights from w_1 - rho to w_1 + rho, both included: no
    property of the loss is used to choose among them.
    """
    plain = natural(_with_axis(world))
    (radius,) = _columns(rho)
    steps = np.linspace(-1, 1, num_candidates)

    def objective(w: np.ndarray) -> Value:
        value = plain(w[..., None] + radius[..., None] * steps)
        worst = np.argmax(value.log_loss, axis=-1, keepdims=True)
        return Value(*(np.take_along_axis(part, worst, -1)[..., 0] for part in value))

    return objective


def sam_all_weights(world: World, rho: Floats) -> Objective:
    """SAM's loss where the perturbation moves all d + 1 weights, `||delta||_2 <= rho`.

    The loss depends on the perturbed weights through w_1, the sum and the norm of the
    others, and so on three numbers: the change c of w_1, and those of the others along
    (1, ..., 1), a, and across it, b >= 0. Since a positive factor changes no decision
    the worst perturbation has length rho. It is searched for on that half-sphere, on
    the sides c >= 0 and c <= 0 apart, by a refined search for b within which, for every
    b, there is one for the angle of (c, a).
    """
    columns = _columns(world.eta, rho, np.sqrt(world.d), world.p)

    def losses(w: np.ndarray, angle: np.ndarray, lift: np.ndarray) -> Value:
        eta, radius, root, p, w = (
            part.reshape(part.shape + (1,) * (angle.ndim - part.ndim))
            for part in (*columns, w)
        )
        across = radius * np.sin(lift)
        along = root + radius * np.cos(lift) * np.cos(angle)
        first = w + radius * np.cos(lift) * np.sin(angle)
        norm = np.hypot(along, across)
        mean = eta * root * along
        up, down = (mean + first) / norm, (mean - first) / norm
        return _mixture(p, (up, 1 / norm), (down, -1 / norm))

    def side(w: np.ndarray, sign: int) -> Value:
        lift, half = np.full(w.shape, np.pi / 4), np.pi / 4
        found = lift
        ends = sorted((0.0, sign * np.pi))
        for _ in range(_LIFT_ROUNDS):
            lifts = np.clip(_around(lift, half, 9), 0, np.pi / 2)
            angle, width = np.full(lifts.shape, sign * np.pi / 2), np.pi / 2
            for count in _ANGLE_ROUNDS:
                angles = np.clip(_around(angle, width, count), ends[0], ends[1])
                values = losses(w, angles, lifts[..., None])
                best = np.argmax(values.log_loss, -1, keepdims=True)
                angle = np.take_along_axis(angles, best, -1)[..., 0]
                width *= 2.2 / (count - 1)
            values = losses(w, angle, lifts)
            best = np.argmax(values.log_loss, -1, keepdims=True)
            lift = np.take_along_axis(lifts, best, -1)[..., 0]
            found = np.take_along_axis(angle, best, -1)[..., 0]
            half *= 2.2 / 8
        return losses(w, found, lift)

    def objective(w: np.ndarray) -> Value:
        larger, smaller = side(w, +1), side(w, -1)
        take = larger.log_loss > smaller.log_loss
        return Value(
            *(np.where(take, *pair) for pair in zip(larger, smaller, strict=True))
        )

    return objective


def minimise(
    objective: Objective,
    world: World,
    *,
    has_kink: bool = False,
    num_scanned: int = 400,
    num_bisections: int = 60,
    num_searches: int = 3,
) -> Optimum:
    """The global minimum over all w_1 from minus to plus infinity.

    A scan of the whole line finds the valleys, bisection on the sign of the slope the
    bottom of the lowest one, where a kink may be. Both are done several times, from
    different points; what these differ by is part of the error.

    Args:
      objective: of `world`.
      world: of any shape.
      has_kink: whether the objective is the largest of several losses, so that their
        rounding is part of the error.
      num_scanned: points of a scan, equidistant in arctan(w_1 / sqrt d).
      num_bisections: steps of each bisection.
      num_searches: scans and bisections.
    """
    shape = np.broadcast_shapes(*map(np.shape, (world.p, world.eta, world.d)))
    root = np.broadcast_to(np.sqrt(world.d), shape)[..., None]
    starts = (np.arange(num_searches) + 0.5) / num_searches
    scans = [_scan(objective, root, num_scanned, start) for start in starts]
    low, high, valley = (np.stack(part, -1) for part in zip(*scans, strict=True))
    for _ in range(num_bisections):
        middle = (low + high) / 2
        rising = objective(root * np.tan(middle)).rising
        low, high = np.where(rising, low, middle), np.where(rising, middle, high)
    found = root * np.tan((low + high) / 2)
    middle = num_searches // 2
    w = found[..., middle]
    width = np.max(root * np.abs(np.tan(high) - np.tan(low)), axis=-1)
    bottom = Value(*(part[..., middle] for part in objective(found)))
    rounding = bottom.doubt
    if has_kink:
        rounding = 4 * np.finfo(float).eps * (1 + np.abs(bottom.log_loss))
        with np.errstate(divide="ignore"):
            rounding = rounding / np.abs(bottom.slope)
    error = width + np.ptp(found, axis=-1) + np.spacing(np.abs(w)) + rounding
    # The loss of x_1 alone, to which it falls or climbs as w_1 goes to infinity.
    gain = np.log1p(-np.asarray(world.p)) - bottom.log_loss
    climbs = objective(root * 1e8).rising[..., 0]
    valley = valley.all(axis=-1)
    known = climbs | ~valley | (np.abs(gain) > 1e-12)
    w = np.where(climbs | valley & (gain > 0), w, np.inf)
    return Optimum(w, np.where(known, np.where(np.isinf(w), 0.0, error), np.inf))


def _scan(
    objective: Objective, root: np.ndarray, count: int, start: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The angles around the lowest valley, and if there is one; else the last two."""
    step = np.pi / count
    inner = -np.pi / 2 + step * (np.arange(count) + start)
    angles = np.array([1e-9 - np.pi / 2, *inner, np.pi / 2 - 1e-9])
    value = objective(root * np.tan(angles))
    valley = ~value.rising[..., :-1] & value.rising[..., 1:]
    heights = np.minimum(value.log_loss[..., :-1], value.log_loss[..., 1:])
    lowest = np.argmin(np.where(valley, heights, np.inf), axis=-1)
    lowest = np.where(valley.any(axis=-1), lowest, count)
    return angles[lowest], angles[lowest + 1], np.asarray(valley.any(axis=-1))


def accuracy(objective: Objective, w: Floats) -> np.ndarray:
    """One minus the loss at weights that have the shape of the world's parameters."""
    return -np.expm1(objective(np.asarray(w, float)[..., None]).log_loss)[..., 0]


def _mixture(p: np.ndarray, up: _Margin, down: _Margin) -> Value:
    """The loss of two margins, each with its derivative by w_1: > 0 and < 0."""
    right = np.log(p) + log_ndtr(-up[0])
    wrong = np.log1p(-p) + log_ndtr(-down[0])
    total = np.logaddexp(right, wrong)
    slope = -np.exp(right - total) * _hazard(up[0]) * up[1]
    slope -= np.exp(wrong - total) * _hazard(down[0]) * down[1]
    # The ratio of the two densities, whose difference the slope is.
    log_ratio = np.log(p) - np.log1p(-p) + np.log(-up[1] / down[1])
    log_ratio = log_ratio + (down[0] - up[0]) * (down[0] + up[0]) / 2
    with np.errstate(divide="ignore"):
        rounding = 4 * np.finfo(float).eps * (1 + up[0] ** 2 + down[0] ** 2)
        doubt = rounding / np.abs(down[0] * down[1] - up[0] * up[1])
    return Value(total, slope, log_ratio < 0, doubt)


def _hazard(x: np.ndarray) -> np.ndarray:
    """phi(x) / Phi(-x), the slope of -log Phi(-x)."""
    return np.sqrt(2 / np.pi) / erfcx(x / np.sqrt(2))


def _around(middle: np.ndarray, half: float, count: int) -> np.ndarray:
    return middle[..., None] + half * np.linspace(-1, 1, count)


def _columns(*values: Floats) -> list[np.ndarray]:
    """The values with one axis more, to broadcast against weights."""
    return [np.asarray(value, float)[..., None] for value in values]


def _with_axis(world: World) -> World:
    return World(*_columns(world.p, world.eta, world.d))
