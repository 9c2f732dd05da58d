"""FGSM from a random start: adversarial training at the price of two standard steps.

Reference: Wong, Rice and Kolter (2020), arXiv 2001.03994, Algorithm 3.
"""

from samrobust import attacks
from samrobust.attacks import linf
from samrobust.checks import check_radius
from samrobust.training.adversaries.radii import PGD_FIELDS, check_alpha, check_options
from samrobust.training.parts import Adversary, as_adversary
from samrobust.training.phases import START
from samrobust.types import Entry

__all__ = ["ENTRY", "ONE_STEP", "fgsm_rs"]


def fgsm_rs(
    epsilon: float, alpha: float = 1.25, batch_norm: str = "train"
) -> Adversary:
    """Builds FGSM-RS: x + clip(d + alpha eps sign(g(x + d)), -eps, eps).

    PGD of one step in the l-inf ball, from d uniform in it. Costs 2/3 of a pass with
    weight gradients. At a large radius it may overfit catastrophically within an epoch:
    accuracy under its own attack, `accuracy` in the log, stays high, and under PGD it
    falls to 0. With held-out images (`data.validation_size`) each epoch is judged by
    PGD, and `evaluation.checkpoint=best` takes one before.

    Args:
      epsilon: radius in 1/255 units.
      alpha: the step in radii; 1.25 in the authors' code, 10/255 at 8/255.
      batch_norm: see `Adversary`; `train` in the authors' code.

    Raises:
      ValueError: for a value out of range.

    Reference: Wong, Rice and Kolter (2020), arXiv 2001.03994, Algorithm 3, as their
    code, locuslab/fast_adversarial. *Our deviation*: radii are in pixels, where their
    code has them in normalized ones, channel by channel, which is the same; the
    attack's pass does not update BatchNorm's running statistics.
    """
    check_radius("linf", epsilon=epsilon)
    check_alpha(alpha=alpha)
    radius = epsilon / 255
    attack = attacks.pgd(linf(radius), step_size=alpha * radius, num_steps=1)
    return as_adversary(attack, batch_norm=batch_norm)


ONE_STEP = {
    "epsilon": PGD_FIELDS["epsilon"],
    "alpha": check_alpha,
    "batch_norm": PGD_FIELDS["batch_norm"],
    "start": START,
}
ENTRY = Entry(
    fgsm_rs,
    "FGSM-RS (eps = {eps:g}/255)",
    options={"eps": "epsilon"},
    fields=ONE_STEP,
    attack_passes=2 / 3,
    check=check_options,
)
