"""Minima of the logistic loss, which can be trained: population optima.

In this world the log-odds of the label are linear, ln(p / (1 - p)) x_1 + 2 eta (x_2 +
... + x_{d+1}), so that logistic regression is well specified: its minimum is the Bayes
classifier, whose w_1 relative to the others is Theorem 4.1's w*. An attack that leaves
x_1 alone only replaces eta by eta - epsilon: Theorem 4.2, exactly. With x_1 attacked
too, and under SAM, the logistic and the 0-1 loss have different minima.

SAM has two here, both on w_1 alone in `2 eta (w_1 x_1 + x_2 + ...)`, whose factor is
the Bayes classifier's, so that without SAM the minimum is w*. Equation (11), the
minimum of the worst loss in the ball, is one; the algorithm, which steps along the
gradient of a batch, ends elsewhere: where the expected gradient after that step is
zero. It depends on the size of the batch.

All worlds here are of scalars.
"""

from collections.abc import Callable

import numpy as np
from scipy.optimize import elementwise
from scipy.special import expit, ndtr

from samrobust.studies.theory.closed_forms import standard_weight
from samrobust.studies.theory.world import Floats, World

__all__ = ["logistic_weight", "sam_minimax_weight", "sam_step_weight"]

_NUM_NODES = 8001
_SIGN = np.array([[1.0], [-1.0]])  # of x_1 times the label


def logistic_weight(
    world: World, epsilon: float = 0.0, *, moves_robust: bool = False
) -> float:
    """Finds w_1 relative to the other weights at the minimum of the adversarial loss.

    Newton's method on the two weights, in float64, with the trapezoidal rule for the
    normal, which converges exponentially, over what lies near the decision boundary.

    Args:
      world: the data.
      epsilon: the radius in l-inf, 0 <= epsilon < eta.
      moves_robust: whether x_1 is perturbed too.

    Raises:
      RuntimeError: if Newton's method does not converge.
    """
    log_mass, others = _quadrature(world, epsilon)
    robust = _SIGN - epsilon * moves_robust
    features = np.stack(np.broadcast_arrays(robust, others))
    # Not at the answer for an attack that leaves x_1 alone, but near it.
    weights = 0.8 * np.array([float(world.log_odds), 2 * (world.eta - epsilon)])
    for _ in range(100):
        margin = np.tensordot(weights, features, 1)
        log_wrong = log_mass - np.logaddexp(0, margin)
        wrong = np.exp(log_wrong - np.max(log_wrong))  # a factor changes no root
        gradient = -np.sum(wrong * features, axis=(1, 2))
        curved = wrong * np.exp(-np.logaddexp(0, -margin))
        hessian = np.einsum("xy,axy,bxy->ab", curved, features, features)
        step = np.linalg.solve(hessian, gradient)
        largest = np.max(np.abs(step) / np.maximum(np.abs(weights), 1e-3))
        # Damped: no weight changes by more than half of itself.
        weights = weights - step / max(1.0, 2 * largest)
        if largest < 1e-9:  # the next step's would be its square
            # Below 0 the perturbation changes sides: by symmetry 0 is the minimum then.
            return max(0.0, float(weights[0] / weights[1]))
    message = f"Newton's method found no minimum for {world}, epsilon={epsilon}."
    raise RuntimeError(message)


def sam_minimax_weight(world: World, rho: Floats) -> np.ndarray:
    """Finds the w_1 of equation (11): as good at w_1 - rho as at w_1 + rho.

    Args:
      world: the data.
      rho: radii [...] of SAM.

    Returns:
      [...]; NaN where the loss is too flat for float64.
    """
    # The exponents of the probabilities are no larger than these.
    exponents = 45 + world.log_odds + 2 * world.eta * np.asarray(rho, float)
    fits = np.minimum(exponents, world.d * world.eta**2 / 2) < 700
    farthest = 2 * np.max(rho, where=fits, initial=0)
    log_mass, others = _quadrature(world, farthest=farthest)
    mass, scale = np.exp(log_mass), 2 * world.eta

    def loss(w: np.ndarray) -> np.ndarray:
        margin = scale * (_SIGN * w[..., None, None] + others)
        return np.sum(mass * np.logaddexp(0, -margin), axis=(-2, -1))

    w = _root(world, rho, 1, lambda w, rho: loss(w + rho) - loss(w - rho))
    return np.where(fits, w, np.nan)


def sam_step_weight(world: World, rho: Floats, batch_size: int) -> np.ndarray:
    """Finds the w_1 where the expected gradient of a SAM step is zero.

    A batch's gradients at w and at w +- rho are taken as jointly normal, as they are
    for large batches: with mu, sigma and C the mean, deviation and covariance of an
    example's gradient, and k = mu(w) sqrt(B) / sigma(w), it is

        mu(w + rho) Phi(k) + mu(w - rho) Phi(-k)
          + (C(w + rho, w) - C(w - rho, w)) phi(k) / (sigma(w) sqrt(B))

    Args:
      world: the data.
      rho: radii [...] of SAM.
      batch_size: B, examples in a step.

    Returns:
      [...]; NaN where gradients are too small for float64.
    """
    log_mass, others = _quadrature(world, farthest=5 * np.max(rho))
    mass = np.exp(log_mass - world.d * world.eta**2 / 2)
    scale, root = 2 * world.eta, np.sqrt(batch_size)

    def gradients(w: np.ndarray) -> np.ndarray:
        margin = scale * (_SIGN * w[..., None, None] + others)
        return -scale * _SIGN * expit(-margin)

    def mean(values: np.ndarray) -> np.ndarray:
        return np.sum(mass * values, axis=(-2, -1))

    def expected(w: np.ndarray, rho: np.ndarray) -> np.ndarray:
        here, above, below = gradients(w), gradients(w + rho), gradients(w - rho)
        center, up, down = mean(here), mean(above), mean(below)
        deviation = np.sqrt(mean(here**2) - center**2)
        k = center * root / deviation
        # The covariance of an example's gradients at w and at both ends.
        tilt = mean(here * (above - below)) - center * (up - down)
        tilt *= np.exp(-(k**2) / 2) / np.sqrt(2 * np.pi)
        return up * ndtr(k) + down * ndtr(-k) + tilt / (deviation * root)

    with np.errstate(divide="ignore", invalid="ignore"):
        return _root(world, rho, 4, expected)


def _quadrature(
    world: World, epsilon: float = 0.0, farthest: float = 0.0
) -> tuple[np.ndarray, np.ndarray]:
    """Returns log-probabilities [2, N] of nodes, and x_2 + ... + x_{d+1} [N] there.

    By the trapezoidal rule for a normal, beside both signs of x_1. With m and v the
    mean and the value of that sum in units of its standard deviation, and v_0 the
    decision boundary, density times gradient is proportional to exp(-v^2/2) / cosh(m (v
    - v_0)). The nodes cover that peak and no more, since it is the narrower the larger
    m is. The probabilities lack the factor exp(-m^2/2).

    Args:
      world: the data.
      epsilon: what an attack takes off each x_i.
      farthest: how far w_1 may lie from w*.
    """
    mean = np.sqrt(world.d) * (world.eta - epsilon)
    boundary = world.log_odds / mean + farthest / np.sqrt(world.d)
    end = min(10 + mean, boundary + 45 / mean)
    nodes = np.linspace(-end, end, _NUM_NODES)
    log_density = np.log((nodes[1] - nodes[0]) / np.sqrt(2 * np.pi))
    log_density = log_density + mean * nodes - nodes**2 / 2
    log_chance = np.log(np.array([[world.p], [1 - world.p]]))
    return log_chance + log_density, np.sqrt(world.d) * nodes


def _root(
    world: World, rho: Floats, reach: float, function: Callable[..., np.ndarray]
) -> np.ndarray:
    """Finds where a function of (w, rho) is zero, within `reach` radii of w*."""
    start, rho = standard_weight(world), np.asarray(rho, float)
    bracket = (start - reach * rho, start + reach * rho)
    return elementwise.find_root(function, bracket, args=(rho,)).x
