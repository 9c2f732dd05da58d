"""PGD adversarial training: the adversary of Madry et al.

Reference: Madry et al. (2018), arXiv 1706.06083, equation (2.1).
"""

from samrobust import attacks
from samrobust.attacks.losses import LOSSES
from samrobust.checks import check_choice, count, one_of, switch
from samrobust.training.adversaries.radii import (
    PGD_FIELDS,
    attack_passes,
    check_options,
    check_steps,
    make_ball,
)
from samrobust.training.parts import Adversary, as_adversary
from samrobust.training.phases import START
from samrobust.types import Entry

__all__ = ["ENTRY", "at"]


def at(
    norm: str,
    epsilon: float,
    step_size: float,
    num_steps: int = 10,
    random_start: bool = True,
    restarts: int = 1,
    loss: str = "cross_entropy",
    judge: str = "final",
    batch_norm: str = "train",
    gradient_floor: float = 128e-10,
) -> Adversary:
    """Builds the adversary of PGD adversarial training.

    Args:
      norm: `linf` or `l2`.
      epsilon: radius in 1/255 units.
      step_size: in 1/255 units.
      num_steps: of PGD.
      random_start: see `samrobust.attacks.pgd`.
      restarts: see there; each example keeps its worst case.
      loss: `cross_entropy` or `margin`.
      judge: `final` or `any`, see there.
      batch_norm: see `Adversary`.
      gradient_floor: see `samrobust.attacks.l2`.

    Raises:
      ValueError: for a value out of range.

    Reference: Madry et al. (2018), arXiv 1706.06083; of the paper equation (5).
    """
    check_steps(norm, epsilon, step_size)
    check_choice(tuple(LOSSES), loss=loss)
    attack = attacks.pgd(
        make_ball(norm, epsilon, gradient_floor),
        step_size=step_size / 255,
        num_steps=num_steps,
        random_start=random_start,
        restarts=restarts,
        loss=LOSSES[loss],
        judge=judge,
    )
    return as_adversary(attack, batch_norm=batch_norm)


ENTRY = Entry(
    at,
    "AT ({norm}, eps = {eps:g}/255)",
    options={"norm": "norm", "eps": "epsilon"},
    fields={
        **PGD_FIELDS,
        "random_start": switch,
        "restarts": count,  # each example keeps its worst case
        "loss": one_of(*LOSSES),
        "judge": one_of("final", "any"),  # which iterate is taken
        "start": START,
    },
    section="attack",
    attack_passes=attack_passes,
    check=check_options,
)
