"""N-FGSM: one step from noise that is larger than the ball, and no way back into it.

Reference: de Jorge et al. (2022), arXiv 2202.01181, Algorithm 1.
"""

from samrobust import attacks
from samrobust.attacks import draws, linf
from samrobust.checks import check_radius
from samrobust.training.adversaries.fgsm_rs import ONE_STEP
from samrobust.training.adversaries.radii import (
    check_alpha,
    check_extent,
    check_options,
)
from samrobust.training.parts import Adversary, as_adversary
from samrobust.types import Array, Entry

__all__ = ["ENTRY", "nfgsm"]


def nfgsm(
    epsilon: float, noise: float = 2.0, alpha: float = 1.0, batch_norm: str = "train"
) -> Adversary:
    """Builds N-FGSM: x + d + alpha eps sign(g(x + d)), d ~ U(-k eps, k eps).

    Perturbations are up to (k + alpha) eps long: they are not clipped to the ball,
    which is what keeps catastrophic overfitting away. Costs 2/3 of a pass with weight
    gradients.

    Args:
      epsilon: radius in 1/255 units.
      noise: k >= 0, how far the noise reaches, in radii; the authors' is 2.
      alpha: the step in radii; the authors' is 1.
      batch_norm: see `Adversary`; `train` in the authors' code.

    Raises:
      ValueError: for a value out of range.

    Reference: de Jorge et al. (2022), arXiv 2202.01181, Algorithm 1, as their code,
    pdejorge/N-FGSM: x + d is clipped to the box before the step as well. *Our
    deviation*: the attack's pass does not update BatchNorm's running statistics.
    """
    check_radius("linf", epsilon=epsilon)
    check_extent(noise=noise)
    check_alpha(alpha=alpha)
    radius = epsilon / 255

    def sample(key: Array, shape: tuple[int, ...]) -> Array:
        return draws.uniform(key, shape, -noise * radius, noise * radius)

    # No step leaves this ball, or that of all images: nothing is projected but pixels.
    reach = linf(min((noise + alpha) * radius, 1.0))._replace(sample=sample)
    attack = attacks.pgd(reach, step_size=alpha * radius, num_steps=1)
    return as_adversary(attack, batch_norm=batch_norm)


ENTRY = Entry(
    nfgsm,
    "N-FGSM (eps = {eps:g}/255)",
    options={"eps": "epsilon"},
    fields={**ONE_STEP, "noise": check_extent},
    attack_passes=2 / 3,
    check=check_options,
)
