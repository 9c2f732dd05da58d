"""The paper's model of robust and non-robust features, equation (7), and its sampler.

    y ~ U{-1, +1};   x_1 = y with probability p, else -y;   x_2 .. x_{d+1} ~ N(eta y, 1)

x_1 is the robust feature: a perturbation smaller than 1 cannot change its sign. The
other d are non-robust: together they may tell more than x_1 does, but a perturbation of
size eta takes all of it away. Classifiers are sgn(w_1 x_1 + x_2 + ... + x_{d+1}), with
the d equal weights normalized to 1.

Reference: Wei, Zhu and Zhang (2023), Section 4.1, after Tsipras et al. (2019), arXiv
1805.12152.
"""

import dataclasses
from typing import TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from samrobust.checks import check
from samrobust.types import Array

__all__ = ["Floats", "World", "check_attack_radius", "check_sam_radius", "sample"]

Floats: TypeAlias = float | np.ndarray  # float64, of one shape or broadcast to it


@dataclasses.dataclass(frozen=True)
class World:
    """The parameters of the data, scalars or arrays that broadcast: a grid of worlds.

    Attributes:
      p: how often x_1 has the label's sign, 1/2 < p < 1.
      eta: the mean of a non-robust feature times the label, > 0 (1e-6 to 1e3).
      d: the number of non-robust features, an integer >= 1.

    Raises:
      ValueError: names the assumption that a parameter breaks.

    >>> float(World(p=0.7, eta=0.1, d=10).log_odds.round(4))
    0.8473
    """

    p: Floats
    eta: Floats
    d: Floats

    def __post_init__(self) -> None:
        """Checks the assumptions of equation (7)."""
        p, eta, d = (np.asarray(part, float) for part in (self.p, self.eta, self.d))
        _check_each(
            (p > 0.5) & (p < 1),
            "1/2 < p < 1",
            "Equation (7) assumes that x_1 predicts the label better than chance, and "
            "not always.",
            p=p,
        )
        _check_each(
            (eta >= 1e-6) & (eta <= 1e3),
            "1e-6 <= eta <= 1e3",
            "Equation (7) assumes that the non-robust features point to the label; "
            "float64 resolves no others.",
            eta=eta,
        )
        _check_each(
            (d >= 1) & (d == np.floor(d)),
            "an integer d >= 1",
            "Equation (7) has d non-robust features.",
            d=d,
        )

    @property
    def log_odds(self) -> np.ndarray:
        """Returns ln(p / (1 - p)) > 0: what x_1 says about the label."""
        p = np.asarray(self.p, float)
        return np.log(p) - np.log1p(-p)


def check_attack_radius(epsilon: Floats, eta: Floats) -> None:
    """Refuses attacks outside Theorem 4.2 with a `ValueError` that says why."""
    epsilon, eta = np.asarray(epsilon, float), np.asarray(eta, float)
    _check_each(
        (epsilon > 0) & (epsilon < eta),
        "0 < epsilon < eta",
        "Theorem 4.2 assumes an attack that leaves the non-robust features some of "
        "their meaning; from eta on the best of these weights is unbounded.",
        epsilon=epsilon,
        eta=eta,
    )
    _check_each(
        epsilon < 1,
        "epsilon < 1",
        "Equation (7) assumes that no perturbation changes the sign of x_1 = +-1.",
        epsilon=epsilon,
    )


def check_sam_radius(rho: Floats) -> None:
    """Refuses radii that are no radii with a `ValueError`."""
    rho = np.asarray(rho, float)
    _check_each(
        (rho >= 1e-9) & (rho <= 1e9),
        "1e-9 <= rho <= 1e9",
        "Equation (11) maximizes over a ball of weights; float64 resolves no others.",
        rho=rho,
    )


def sample(world: World, num_examples: int, key: Array) -> tuple[Array, Array]:
    """Draws examples.

    Args:
      world: of scalars.
      num_examples: how many, n.
      key: consumed.

    Returns:
      Features float32 [n, d + 1], x_1 first, and labels int32 [n], -1 or +1.

    >>> features, labels = sample(World(0.7, 0.1, 10), 5, jax.random.key(0))
    >>> features.shape, labels.shape
    ((5, 11), (5,))
    """
    label_key, robust_key, noise_key = jax.random.split(key, 3)
    labels = jax.random.rademacher(label_key, (num_examples,), jnp.int32)
    right = jax.random.bernoulli(robust_key, world.p, (num_examples,))
    robust = jnp.where(right, labels, -labels)
    noise = jax.random.normal(noise_key, (num_examples, int(world.d)), jnp.float32)
    others = world.eta * labels[:, None] + noise
    return jnp.concatenate([robust[:, None], others], axis=1), labels


def _check_each(
    holds: np.ndarray, condition: str, fix: str, **values: np.ndarray
) -> None:
    """Checks all elements; the message shows the first that breaks the condition."""
    holds, *arrays = np.broadcast_arrays(holds, *values.values())
    first = np.argmin(holds)
    shown = {
        name: float(array.flat[first])
        for name, array in zip(values, arrays, strict=True)
    }
    check(bool(holds.flat[first]), condition, fix, **shown)
