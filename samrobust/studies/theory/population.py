"""The exact population losses of linear classifiers, and their direct minimization.

Given the label, the margin of w = (w_1, 1, ..., 1) is +-w_1 + N(d eta, d), so that
every loss here is a mixture of two normal tails:

    L = p Phi(-up) + (1 - p) Phi(-down)

with the standardized margins `up`, where x_1 is right, and `down`, where it is wrong.
Nothing is expanded or sampled; all is float64, and losses are kept as logarithms, so
that a loss of 1e-100 has as many digits as one of 0.1. These are the numbers that
`samrobust.studies.theory.closed_forms` is held against; this module does not know that
one.

An objective takes weights [N, ...] with one axis or more before those of its worlds:
whatever is scanned or searched has the leading axes, so that everything broadcasts.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeAlias

import numpy as np
from scipy.special import erfcx, log_ndtr

from samrobust.studies.theory.world import Floats, World

__all__ = [
    "Objective",
    "Optimum",
    "Value",
    "accuracy",
    "adversarial",
    "minimize",
    "natural",
    "sam_all_weights",
    "sam_robust_weight",
]

# Points of each grid of a search: of refinements by 9, and within each of them.
_LIFT_GRIDS, _ANGLE_GRIDS = [9] * 6, [17, *[7] * 10]


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


Objective: TypeAlias = Callable[[np.ndarray], Value]


class Optimum(NamedTuple):
    """A place where a loss is smallest.

    Attributes:
      w: the weight w_1; infinite where x_1 alone is best, all others being 0 beside it.
      error: what rounding and the search may add to it; infinite where float64 cannot
        tell, since the loss is flat there to the last digit.
    """

    w: np.ndarray
    error: np.ndarray


def natural(world: World) -> Objective:
    """Builds the 0-1 loss `1 - Pr(f_w(x) = y)`."""
    return adversarial(world, 0.0, moves_robust=False)


def adversarial(world: World, epsilon: Floats, *, moves_robust: bool) -> Objective:
    """Builds the 0-1 loss under the worst perturbation with `||delta||_inf <= epsilon`.

    The worst one takes epsilon times the l1 norm of the weights off the margin.

    Args:
      world: the data.
      epsilon: the radius.
      moves_robust: whether x_1 is perturbed too, as equation (9) says; False: the
        other features alone.
    """
    root, on_robust = np.sqrt(world.d), epsilon if moves_robust else 0.0

    def objective(w: np.ndarray) -> Value:
        # The mean margin of x_2 ... x_{d+1}, less what the attack takes off.
        rest = root**2 * (world.eta - epsilon) - on_robust * np.abs(w)
        slope = on_robust * np.sign(w)
        up, down = (rest + w) / root, (rest - w) / root
        return _mixture(world.p, up, (1 - slope) / root, down, (-1 - slope) / root)

    return objective


def sam_robust_weight(world: World, rho: Floats) -> Objective:
    """Builds SAM's loss, equation (11), where the perturbation moves w_1 alone.

    The worst of 33 weights from w_1 - rho to w_1 + rho, both included: no property of
    the loss is used to choose among them.
    """
    plain = natural(world)

    def objective(w: np.ndarray) -> Value:
        return _worst(plain(w + rho * _leading(np.linspace(-1, 1, 33), w)))

    return objective


def sam_all_weights(world: World, rho: Floats) -> Objective:
    """Builds SAM's loss where all d + 1 weights are perturbed, `||delta||_2 <= rho`.

    The loss depends on the perturbed weights through w_1, the sum and the norm of the
    others, and so on three numbers: the change c of w_1, and those of the others along
    (1, ..., 1), a, and across it, b >= 0. Since a positive factor changes no decision
    the worst perturbation has length rho. It is searched for on that half-sphere, on
    the sides c >= 0 and c <= 0 apart, by a refined search for the latitude of b within
    which, for every b, there is one for the angle of (c, a).
    """
    root = np.sqrt(world.d)

    def margins(
        w: np.ndarray, angle: np.ndarray, lift: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        # Spherical coordinates of the perturbation: a, c and b, in this order.
        along = root + rho * np.cos(lift) * np.cos(angle)
        first = w + rho * np.cos(lift) * np.sin(angle)
        norm = np.hypot(along, rho * np.sin(lift))
        mean = world.eta * root * along
        return (mean + first) / norm, (mean - first) / norm, norm

    def log_loss(w: np.ndarray, angle: np.ndarray, lift: np.ndarray) -> np.ndarray:
        up, down, _ = margins(w, angle, lift)
        return np.logaddexp(*_log_parts(world.p, up, down))

    def loss(w: np.ndarray, angle: np.ndarray, lift: np.ndarray) -> Value:
        up, down, norm = margins(w, angle, lift)
        return _mixture(world.p, up, 1 / norm, down, -1 / norm)

    def worst_on_side(w: np.ndarray, sign: int) -> Value:
        def worst_angle(lift: np.ndarray) -> np.ndarray:
            start = np.full(lift.shape, sign * np.pi / 2)
            return _search(
                lambda angle: log_loss(w, angle, lift), start, np.pi / 2, _ANGLE_GRIDS
            )

        lift = _search(
            lambda lift: log_loss(w, worst_angle(lift), lift),
            np.full(w.shape, np.pi / 4),
            np.pi / 4,
            _LIFT_GRIDS,
        )
        return loss(w, worst_angle(lift), lift)

    def objective(w: np.ndarray) -> Value:
        sides = worst_on_side(w, -1), worst_on_side(w, +1)
        return _worst(Value(*map(np.stack, zip(*sides, strict=True))))

    return objective


def minimize(
    objective: Objective,
    world: World,
    *,
    has_kink: bool = False,
    num_scanned: int = 400,
    num_bisections: int = 60,
    num_searches: int = 3,
) -> Optimum:
    """Finds the global minimum over all w_1 from minus to plus infinity.

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
    p, _, root = np.broadcast_arrays(world.p, world.eta, np.sqrt(world.d))
    # w_1 = sqrt(d) tan(angle) maps the whole line to a finite interval.
    low, high, has_valley = _scan(objective, root, num_scanned, num_searches)
    for _ in range(num_bisections):
        middle = (low + high) / 2
        rising = objective(root * np.tan(middle)).rising
        low, high = np.where(rising, low, middle), np.where(rising, middle, high)
    found = root * np.tan((low + high) / 2)
    w, bottom = found[num_searches // 2], objective(found)
    log_loss, slope, _, doubt = (part[num_searches // 2] for part in bottom)
    if has_kink:
        with np.errstate(divide="ignore"):
            doubt = 4 * np.finfo(float).eps * (1 + np.abs(log_loss)) / np.abs(slope)
    # Bisection, disagreement of the searches, rounding of w, rounding of the loss.
    width = np.max(root * np.abs(np.tan(high) - np.tan(low)), axis=0)
    error = width + np.ptp(found, axis=0) + np.spacing(np.abs(w)) + doubt
    # The loss of x_1 alone, to which it falls or climbs as w_1 goes to infinity.
    gain = np.log1p(-p) - log_loss
    climbs = objective((root * 1e8)[None]).rising[0]
    known = climbs | ~has_valley | (np.abs(gain) > 1e-12)
    w = np.where(climbs | has_valley & (gain > 0), w, np.inf)
    return Optimum(w, np.where(known, np.where(np.isinf(w), 0.0, error), np.inf))


def accuracy(objective: Objective, w: Floats) -> np.ndarray:
    """Returns one minus the loss at weights [...] of worlds that broadcast to them."""
    return -np.expm1(objective(np.asarray(w, float)).log_loss)


def _scan(
    objective: Objective, root: np.ndarray, num_points: int, num_searches: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Brackets each search's lowest valley by two angles [S, ...].

    By the last two where it sees none; the third result [...] is where all see one.
    """
    starts = (np.arange(num_searches)[:, None] + 0.5) / num_searches
    end = np.pi / 2 - 1e-9
    angles = -np.pi / 2 + np.pi / num_points * (np.arange(-1, num_points + 1) + starts)
    angles = np.clip(angles, -end, end).reshape(num_searches, -1, *[1] * root.ndim)
    value = objective(root * np.tan(angles))
    valley = ~value.rising[:, :-1] & value.rising[:, 1:]
    heights = np.minimum(value.log_loss[:, :-1], value.log_loss[:, 1:])
    lowest = np.argmin(np.where(valley, heights, np.inf), axis=1, keepdims=True)
    has_valley = np.any(valley, axis=1)
    lowest = np.where(np.expand_dims(has_valley, 1), lowest, num_points)
    low, high = (
        np.take_along_axis(angles, lowest + side, axis=1)[:, 0] for side in (0, 1)
    )
    return low, high, np.asarray(np.all(has_valley, axis=0))


def _search(
    loss: Callable[[np.ndarray], np.ndarray],
    middle: np.ndarray,
    half: float,
    grids: Sequence[int],
) -> np.ndarray:
    """Finds the worst point of middle +- half, by grids that shrink around it."""
    low, high = middle - half, middle + half
    for count in grids:
        points = middle + half * _leading(np.linspace(-1, 1, count), middle)
        points = np.clip(points, low, high)
        worst = np.argmax(loss(points), axis=0, keepdims=True)
        middle = np.take_along_axis(points, worst, axis=0)[0]
        half *= 2.2 / (count - 1)
    return middle


def _worst(value: Value) -> Value:
    """Selects the largest of the losses along the first axis."""
    worst = np.argmax(value.log_loss, axis=0, keepdims=True)
    return Value(*(np.take_along_axis(part, worst, axis=0)[0] for part in value))


def _leading(values: np.ndarray, beside: np.ndarray) -> np.ndarray:
    """Puts values [N] on an axis before those of another array."""
    return values.reshape(-1, *[1] * np.ndim(beside))


def _log_parts(
    p: Floats, up: np.ndarray, down: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the logarithms of both parts of L = p Phi(-up) + (1 - p) Phi(-down)."""
    return np.log(p) + log_ndtr(-up), np.log1p(-p) + log_ndtr(-down)


def _mixture(
    p: Floats,
    up: np.ndarray,
    up_slope: np.ndarray,
    down: np.ndarray,
    down_slope: np.ndarray,
) -> Value:
    """Returns the loss of two margins with their derivatives by w_1, > 0 and < 0."""
    right, wrong = _log_parts(p, up, down)
    total = np.logaddexp(right, wrong)
    slope = -np.exp(right - total) * _hazard(up) * up_slope
    slope -= np.exp(wrong - total) * _hazard(down) * down_slope
    # The ratio of the two densities, whose difference the slope is.
    log_ratio = np.log(p) - np.log1p(-p) + np.log(-up_slope / down_slope)
    log_ratio = log_ratio + (down - up) * (down + up) / 2
    with np.errstate(divide="ignore"):
        rounding = 4 * np.finfo(float).eps * (1 + up**2 + down**2)
        doubt = rounding / np.abs(down * down_slope - up * up_slope)
    return Value(total, slope, log_ratio < 0, doubt)


def _hazard(x: np.ndarray) -> np.ndarray:
    """Returns phi(x) / Phi(-x), the slope of -log Phi(-x)."""
    # The scaled erfc underflows for no large x, unlike the two factors of the ratio.
    return np.sqrt(2 / np.pi) / erfcx(x / np.sqrt(2))
