"""What the logistic loss, which can be trained, has its minimum at: population optima.

In this world the log-odds of the label are linear, ln(p / (1 - p)) x_1 + 2 eta (x_2 +
... + x_{d+1}), so that logistic regression is well specified: its minimum is the Bayes
classifier, whose w_1 relative to the others is Theorem 4.1's w*. An attack that leaves
x_1 alone only replaces eta by eta - epsilon: Theorem 4.2, exactly. With x_1 attacked
too, and under SAM, the logistic and the 0-1 loss have different minima.

SAM has two here. Equation (11), the minimum of the worst loss in the ball, is one; the
algorithm, which steps along the gradient of a batch, ends elsewhere: where the expected
gradient after that step is zero. It depends on the size of the batch.
"""

from collections.abc import Callable

import numpy as np
from scipy.special import ndtr

from samrobust.theory.closed_forms import standard_weight
from samrobust.theory.world import World

__all__ = ["SamLogistic", "logistic_weight"]

_NUM_NODES = 8001


def logistic_weight(
    world: World, epsilon: float = 0.0, *, moves_robust: bool = False
) -> float:
    """The w_1 relative to the other weights at the minimum of the adversarial loss.

    Newton's method on the two weights, in float64, with the trapezoidal rule for the
    normal, which converges exponentially and reaches beyond the decision boundary.

    Args:
      world: of scalars.
      epsilon: the radius in l-inf, 0 <= epsilon < eta.
      moves_robust: whether x_1 is perturbed too.

    Raises:
      RuntimeError: if Newton's method does not converge.
    """
    nodes, log_density = _log_normal(world)
    noise = np.sqrt(world.d) * nodes
    sign = np.array([[1.0], [-1.0]])
    log_mass = np.log(np.array([[world.p], [1 - world.p]])) + log_density
    robust = np.broadcast_to(sign - epsilon * moves_robust, log_mass.shape)
    others = np.broadcast_to(world.d * (world.eta - epsilon) + noise, log_mass.shape)
    features = np.stack([robust, others])
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
        weights = weights - step / max(1.0, 2 * largest)
        if largest < 1e-9:  # the next step's would be its square
            break
    else:
        message = f"Newton's method found no minimum for {world}, epsilon={epsilon}."
        raise RuntimeError(message)
    # Below 0 the perturbation changes sides: by symmetry 0 is the minimum then.
    return max(0.0, float(weights[0] / weights[1]))


class SamLogistic:
    """SAM on w_1 alone with the logistic loss of `2 eta (w_1 x_1 + x_2 + ...)`.

    The factor is the Bayes classifier's, so that without SAM the minimum is w*.

    Args:
      world: of scalars.
    """

    def __init__(self, world: World):
        self._world, self._scale = world, 2 * float(world.eta)
        nodes, log_density = _log_normal(world)
        self._mass = np.array([[world.p], [1 - world.p]]) * np.exp(log_density)
        self._others = world.d * world.eta + np.sqrt(world.d) * nodes
        self._sign = np.array([[1.0], [-1.0]])

    def minimax(self, rho: float) -> float:
        """The w_1 of equation (11): as good at w_1 - rho as at w_1 + rho."""
        start = float(standard_weight(self._world))

        def excess(w: float) -> float:
            return self._loss(w + rho) - self._loss(w - rho)

        return _bisect(excess, start - rho, start + rho)

    def stationary(self, rho: float, batch_size: int) -> float:
        """The w_1 where the expected gradient of a SAM step is zero.

        A batch's gradients at w and at w +- rho are taken as jointly normal, as they
        are for large batches: with mu, sigma and C the mean, deviation and covariance
        of an example's gradient, and k = mu(w) sqrt(B) / sigma(w), it is

            mu(w + rho) Phi(k) + mu(w - rho) Phi(-k)
              + (C(w + rho, w) - C(w - rho, w)) phi(k) / (sigma(w) sqrt(B))
        """
        start = float(standard_weight(self._world))

        def expected(w: float) -> float:
            here, above, below = (
                self._gradients(w + shift) for shift in (0.0, rho, -rho)
            )
            mean = np.sum(self._mass * here)
            deviation = np.sqrt(np.sum(self._mass * here**2) - mean**2)
            if not deviation > 0:
                return np.nan  # gradients too small for float64
            k = mean * np.sqrt(batch_size) / deviation
            up, down = (np.sum(self._mass * other) for other in (above, below))
            tilt = np.sum(self._mass * here * (above - below)) - mean * (up - down)
            tilt *= np.exp(-(k**2) / 2) / np.sqrt(2 * np.pi)
            tilt /= deviation * np.sqrt(batch_size)
            return float(up * ndtr(k) + down * ndtr(-k) + tilt)

        return _bisect(expected, start - 4 * rho, start + 4 * rho)

    def _margins(self, w: float) -> np.ndarray:
        return self._scale * (self._sign * w + self._others)

    def _loss(self, w: float) -> float:
        return float(np.sum(self._mass * np.logaddexp(0, -self._margins(w))))

    def _gradients(self, w: float) -> np.ndarray:
        return -self._scale * self._sign * _sigmoid(-self._margins(w))


def _log_normal(world: World) -> tuple[np.ndarray, np.ndarray]:
    """Nodes and log-weights of the trapezoidal rule for a standard normal."""
    end = 10 + np.sqrt(world.d) * world.eta
    nodes = np.linspace(-end, end, _NUM_NODES)
    return nodes, np.log((nodes[1] - nodes[0]) / np.sqrt(2 * np.pi)) - nodes**2 / 2


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return np.exp(-np.logaddexp(0, -x))


def _bisect(function: Callable[[float], float], low: float, high: float) -> float:
    """A zero of a function that is negative at `low` and positive at `high`."""
    for _ in range(60):
        middle = (low + high) / 2
        value = function(middle)
        if np.isnan(value):
            return np.nan
        low, high = (low, middle) if value > 0 else (middle, high)
    return (low + high) / 2
