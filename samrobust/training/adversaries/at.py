"""PGD adversarial training: the adversary of Madry et al.

Reference: Madry et al. (2018), arXiv 1706.06083, equation (2.1).
"""

import functools
from collections.abc import Mapping
from typing import Any

from samrobust import attacks
from samrobust.attacks import Ball, l2, linf
from samrobust.attacks.losses import LOSSES
from samrobust.checks import (
    BATCH_NORM,
    LARGEST_REAL,
    NORMS,
    Rule,
    check,
    check_choice,
    check_radius,
    check_real,
    count,
    one_of,
    switch,
)
from samrobust.training.parts import Adversary, as_adversary
from samrobust.training.phases import START
from samrobust.types import Entry, Field

__all__ = [
    "ENTRY",
    "PGD_FIELDS",
    "at",
    "attack_passes",
    "check_alpha",
    "check_extent",
    "check_options",
    "check_steps",
    "make_ball",
]

# Range of step size / radius. Beyond ten radii steps only jump between the faces of the
# ball; below this fraction a step is lost in float32's rounding of pixels.
STEP = (1e-4, 10.0)
_radius = functools.partial(check_real, 0, LARGEST_REAL)
# The reference code's 1e-10, times a batch below 1e7.
_floor = functools.partial(check_real, 0, 1e-3)


def check_alpha(**values: Any) -> None:
    """Refuses a step, in radii, that is lost in rounding or leaves every ball."""
    check_real(*STEP, **values)


def check_extent(**values: Any) -> None:
    """Refuses a length, in radii, that is negative or leaves every ball."""
    check_real(0, STEP[1], **values)


# The fields of every attack by PGD in training; radii and steps in 1/255 units.
PGD_FIELDS: Mapping[str, Field | Rule] = {
    "norm": Field("linf", one_of(*NORMS)),
    "epsilon": _radius,
    # A step as a fraction of epsilon, by norm; `step_size` follows.
    "relative_step_size.linf": Field(0.25, check_alpha),
    "relative_step_size.l2": Field(0.125, check_alpha),
    "step_size": _radius,
    "num_steps": count,
    # How the attacked network normalizes: by the batch (train) or running statistics.
    "batch_norm": one_of(*BATCH_NORM),
    # Added to the norm of an example's gradient in l2 steps; the reference code's
    # 1e-10 on the gradient of the mean loss, times its batch of 128.
    "gradient_floor": _floor,
}


def make_ball(norm: str, epsilon: float, gradient_floor: float = 0.0) -> Ball:
    """Returns a ball of radius `epsilon` in 1/255 units."""
    if norm == "l2":
        return l2(epsilon / 255, gradient_floor=gradient_floor)
    return linf(epsilon / 255)


def check_options(eps: float, norm: str = "linf", **_: Any) -> None:
    """Refuses a radius in other units than 1/255 in the name of a row."""
    check_radius(norm, eps=eps)


def check_steps(norm: str, epsilon: float, step_size: float) -> None:
    """Refuses a radius in other units than 1/255, and steps that do not fit it.

    Raises:
      ValueError: see above.
    """
    check_choice(NORMS, norm=norm)
    check_radius(norm, epsilon=epsilon)
    low, high = STEP
    check(
        low <= step_size / epsilon <= high,
        f"a step of {low:g} to {high:g} radii",
        step_size=step_size,
        epsilon=epsilon,
    )


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


def attack_passes(values: Mapping[str, Any]) -> float:
    """Returns the cost of PGD in passes with weight gradients: 2/3 a step.

    Where a restart's last iterate is compared with others, 1/3 for its loss.
    """
    restarts = values.get("restarts", 1)
    compares = restarts > 1 or values.get("judge") == "any"
    return restarts * (2 * values["num_steps"] + compares) / 3


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
