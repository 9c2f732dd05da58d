"""Balls, steps and passes of adversaries: what those share that attack by PGD.

Radii and steps are in 1/255 units, as in configs.
"""

import functools
from collections.abc import Mapping
from typing import Any

from samrobust.attacks import Ball, l2, linf
from samrobust.attacks.pgd import LONGEST_STEP
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
)
from samrobust.types import Field

__all__ = [
    "PGD_FIELDS",
    "attack_passes",
    "check_alpha",
    "check_extent",
    "check_options",
    "check_steps",
    "make_ball",
]

# Range of step size / radius. Shorter ones are lost in float32's rounding of pixels.
STEP = (1e-4, LONGEST_STEP)
_radius = functools.partial(check_real, 0, LARGEST_REAL)
# The reference code's 1e-10, times a batch below 1e7.
_floor = functools.partial(check_real, 0, 1e-3)


def check_alpha(**values: Any) -> None:
    """Refuses a step, in radii, that is lost in rounding or leaves every ball."""
    check_real(*STEP, **values)


def check_extent(**values: Any) -> None:
    """Refuses a length, in radii, that is negative or leaves every ball."""
    check_real(0, LONGEST_STEP, **values)


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


def attack_passes(values: Mapping[str, Any]) -> float:
    """Returns the cost of PGD in passes with weight gradients: 2/3 a step.

    Where a restart's last iterate is compared with others, 1/3 for its loss.
    """
    restarts = values.get("restarts", 1)
    compares = restarts > 1 or values.get("judge") == "any"
    return restarts * (2 * values["num_steps"] + compares) / 3
