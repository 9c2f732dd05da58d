"""Theorems 4.1 to 4.5 as formulas, as printed and as they are, each with its domain.

All take the parameters of `samrobust.studies.theory.world`, scalars or arrays, in
float64. docs/theory.md derives them. The classifier is sgn(w_1 x_1 + x_2 + ... +
x_{d+1}) and the loss the 0-1 loss throughout; SAM perturbs w_1 alone unless said
otherwise.

Reference: Wei, Zhu and Zhang (2023), Section 4.
"""

import numpy as np
from scipy.optimize import elementwise
from scipy.special import logsumexp

from samrobust.studies.theory.population import adversarial
from samrobust.studies.theory.world import (
    Floats,
    World,
    check_attack_radius,
    check_sam_radius,
)

__all__ = [
    "adversarial_weight",
    "adversarial_weight_all_features",
    "all_weights_coefficient",
    "equal_attack_radius",
    "equal_attack_radius_corrected",
    "equal_attack_radius_printed",
    "sam_weight",
    "sam_weight_bounds",
    "sam_weight_corrected",
    "sam_weight_printed",
    "standard_weight",
]

_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(64)


def standard_weight(world: World) -> np.ndarray:
    """Returns Theorem 4.1: `w* = ln(p / (1 - p)) / (2 eta)`. Exact for all of (7).

    >>> float(standard_weight(World(p=0.7, eta=0.1, d=10)).round(4))
    4.2365
    """
    return world.log_odds / (2 * np.asarray(world.eta, float))


def adversarial_weight(world: World, epsilon: Floats) -> np.ndarray:
    """Returns Theorem 4.2 as printed: `ln(p / (1 - p)) / (2 (eta - epsilon))`.

    Exact for 0 < epsilon < eta if the perturbation leaves x_1 alone, or rounds it back
    to its sign. With x_1 perturbed too see `adversarial_weight_all_features`.

    Raises:
      ValueError: if epsilon is outside Theorem 4.2.
    """
    check_attack_radius(epsilon, world.eta)
    return world.log_odds / (2 * (world.eta - np.asarray(epsilon, float)))


def adversarial_weight_all_features(world: World, epsilon: Floats) -> np.ndarray:
    """Returns Theorem 4.2 for all features perturbed, as equation (9) is written.

    The smaller root of

        2 (eta - epsilon) w - (2 epsilon / d) w^2
          = ln(p / (1 - p)) + ln((1 - epsilon) / (1 + epsilon))

    where it is real, positive and better than the limits w_1 = 0 and w_1 = infinity
    (x_1 alone, with robust accuracy p); else the better one of these. Exact for 0 <
    epsilon < eta, epsilon < 1. As d grows and epsilon shrinks it tends to
    `adversarial_weight`.

    Raises:
      ValueError: if epsilon is outside Theorem 4.2.
    """
    check_attack_radius(epsilon, world.eta)
    epsilon = np.asarray(epsilon, float)
    odds = world.log_odds + np.log1p(-epsilon) - np.log1p(epsilon)
    gap = world.eta - epsilon
    square = gap**2 - 2 * epsilon * odds / world.d
    root = odds / (gap + np.sqrt(np.maximum(square, 0)))
    root = np.maximum(root, 0.0)  # robust x_1 that misleads more than it helps
    loss = adversarial(world, epsilon, moves_robust=True)(root)
    exists = (square >= 0) & (loss.log_loss < np.log1p(-np.asarray(world.p)))
    return np.where(exists, root, np.inf)


def sam_weight(world: World, rho: Floats) -> np.ndarray:
    """Solves for the exact w_1 of SAM on the robust weight: Theorem 4.3 in numbers.

    The solution of

        w = w* + ln(I(d eta + w) / I(d eta - w)) / (2 eta),
        I(m) = integral from 0 to rho of cosh(m t / d) exp(-t^2 / (2 d)) dt

    between w* and w* + rho, for all of equation (7) and every rho > 0, with
    Gauss-Legendre quadrature. `sam_weight_bounds` says what it lies between.

    Raises:
      ValueError: if rho is not a radius.
    """
    check_sam_radius(rho)
    start = standard_weight(world)

    def excess(w: np.ndarray, *parameters: np.ndarray) -> np.ndarray:
        start, rho, eta, d = parameters
        ratio = _log_integral(d * eta + w, d, rho) - _log_integral(d * eta - w, d, rho)
        return w - start - ratio / (2 * eta)

    bracket, parameters = (start, start + rho), (start, rho, world.eta, world.d)
    found = elementwise.find_root(excess, bracket, args=parameters)
    # A shift below the rounding of w* has no sign to search by.
    return np.where(found.success, found.x, start)


def _log_integral(m: np.ndarray, d: np.ndarray, rho: np.ndarray) -> np.ndarray:
    """Returns ln I(m), up to a term that does not depend on m."""
    m, d, rho = (part[..., None] for part in np.broadcast_arrays(np.abs(m), d, rho))
    # The integrand is a normal density around |m|: nothing lies beyond 12 deviations.
    low = np.maximum(0, np.minimum(m, rho) - 12 * np.sqrt(d))
    half = (np.minimum(rho, m + 12 * np.sqrt(d)) - low) / 2
    t = low + half * (1 + _NODES)
    log_cosh = m * t / d + np.log1p(np.exp(-2 * m * t / d))
    log_values = log_cosh - t**2 / (2 * d)
    return np.asarray(logsumexp(log_values, b=half * _WEIGHTS, axis=-1))


def sam_weight_bounds(
    world: World, rho: Floats, w: Floats
) -> tuple[np.ndarray, np.ndarray]:
    """Returns our bounds on `w_SAM - w*`, at w = w_SAM; not in the paper.

        c w rho^2 / (3 d)  <=  w_SAM - w*  <=  min(rho, w rho^2 / (3 d)),
        c = exp(-rho^2 / (2 d)) / (1 + (rho (eta + w / d))^2 / 3)

    For all of equation (7) and every rho > 0. The upper one says w_SAM <= w* / (1 -
    rho^2 / (3 d)) for rho^2 < 3 d: the corrected expansion errs on one side.
    """
    rho, d = np.asarray(rho, float), np.asarray(world.d, float)
    upper = w * rho**2 / (3 * d)
    damping = np.exp(-(rho**2) / (2 * d)) / (1 + (rho * (world.eta + w / d)) ** 2 / 3)
    return damping * upper, np.minimum(rho, upper)


def sam_weight_printed(world: World, rho: Floats) -> np.ndarray:
    """Returns Theorem 4.4 as printed: `w* + (2 / 3) w* rho^2`. Off: see below."""
    return standard_weight(world) * (1 + 2 * np.square(rho) / 3)


def sam_weight_corrected(world: World, rho: Floats) -> np.ndarray:
    """Returns Theorem 4.4 corrected: `w* + w* rho^2 / (3 d)`.

    The expansion of `sam_weight` for small rho; good while rho (eta + w* / d) and rho^2
    / d are small.
    """
    return standard_weight(world) * (1 + np.square(rho) / (3 * world.d))


def equal_attack_radius_printed(world: World, rho: Floats) -> np.ndarray:
    """Solves Theorem 4.5 as printed for epsilon: `2 + 3 / rho^2 = 2 eta / epsilon`."""
    return 2 * world.eta / (2 + 3 / np.square(rho))


def equal_attack_radius_corrected(world: World, rho: Floats) -> np.ndarray:
    """Solves Theorem 4.5 corrected for epsilon: `1 + 3 d / rho^2 = eta / epsilon`."""
    return world.eta / (1 + 3 * world.d / np.square(rho))


def equal_attack_radius(world: World, w: Floats) -> np.ndarray:
    """Returns where `adversarial_weight` is w >= w*: `eta (1 - w* / w)`. Exact."""
    return world.eta * (1 - standard_weight(world) / w)


def all_weights_coefficient(world: World) -> np.ndarray:
    """Returns K in `w_SAM = w* + K w* rho^2 + ...` for SAM on all d + 1 weights.

        K = (w*^2 / d - 2) / (3 d)

    negative, so that SAM lowers the robust weight, unless w*^2 > 2 d. For small rho and
    the normalization w_2 = ... = w_{d+1} = 1, on which it depends.
    """
    return (standard_weight(world) ** 2 / world.d - 2) / (3 * np.asarray(world.d))
