"""The trained world beside its population optima: seeds, confidence bands, pairs."""

import dataclasses
from collections.abc import Callable, Iterator

import numpy as np
from scipy.special import stdtrit

from samrobust.studies.theory import closed_forms as forms
from samrobust.studies.theory.logistic import logistic_weight, sam_step_weight
from samrobust.studies.theory.population import minimize, sam_all_weights
from samrobust.studies.theory.study import Grid
from samrobust.studies.theory.training import TrainingEffort, train
from samrobust.studies.theory.world import World

__all__ = ["Estimate", "all_weights_shift", "experiment", "plan"]


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A trained weight over seeds beside the minimum of the loss it was trained on.

    Attributes:
      method: of `samrobust.studies.theory.training`.
      radius: epsilon or rho.
      quantity: `w` for w_1 relative to the others; `shift` for what SAM adds to it,
        paired by seed with rho = 0 on the same samples.
      mean, half_width: over the seeds, with the half-width of the 95 % band.
      values: of each seed.
      population: what it should be: the minimum of the logistic population loss; for
        `sam` the point where the expected gradient of a SAM step on a batch is zero;
        None for `sam all weights`, where we know of none.
      zero_one: the minimum of the 0-1 loss, which Section 4 is about; infinite where
        x_1 alone is best; None for `sam all weights` where we do not know it.
    """

    method: str
    radius: float
    quantity: str
    mean: float
    half_width: float
    values: tuple[float, ...]
    population: float | None
    zero_one: float | None

    @property
    def agrees(self) -> str | None:
        """Tells whether the population value lies in the band widened by half.

        `yes`, `no`, or `unresolved` where 0 lies in it too: a training without the
        effect would agree as well. None where no population value is known.
        """
        if self.population is None:
            return None
        width = 1.5 * self.half_width
        if abs(self.mean - self.population) > width:
            return "no"
        return "yes" if abs(self.mean) > width else "unresolved"


def plan(grid: Grid, effort: TrainingEffort) -> list[tuple[str, float]]:
    """Lists the trainings of the grid's first world, as methods with radii.

    Radii of the attack are those up to 0.6 eta: near eta the weights grow without
    bound. SAM on w_1 comes without a radius too, to compare with.
    """
    if effort.seeds == 0:
        return []
    eta = float(grid.world.eta)
    most = 0.6 * min(eta, 1) + 1e-12
    return [
        ("st", 0.0),
        *(
            (method, float(epsilon))
            for epsilon in grid.attack_radii(eta)
            if epsilon <= most
            for method in ("at", "at all features")
        ),
        *(("sam", rho) for rho in (0.0, *grid.rho)),
        *(("sam all weights", rho) for rho in grid.rho),
    ]


def experiment(
    grid: Grid,
    effort: TrainingEffort,
    *,
    on_start: Callable[[str], None] = lambda _: None,
) -> Iterator[Estimate]:
    """Trains as planned, one after the other.

    Args:
      grid: of the plan.
      effort: how much.
      on_start: called with a name before each training.
    """
    unperturbed = {}
    for method, radius in plan(grid, effort):
        on_start(f"training {method}" + (f", radius {radius:g}" if radius else ""))
        values = train(grid.world, method, effort, radius)
        if not radius:
            unperturbed[method] = values
        is_sam = method.startswith("sam")
        if is_sam and not radius:
            continue
        if is_sam:
            values = values - unperturbed["sam" if method == "sam" else "st"]
        error = np.std(values, ddof=1) / np.sqrt(effort.seeds)
        yield Estimate(
            method,
            radius,
            "shift" if is_sam else "w",
            float(np.mean(values)),
            float(stdtrit(effort.seeds - 1, 0.975) * error),
            tuple(map(float, values)),
            *_optima(grid.world, method, radius, effort.batch_size),
        )


def all_weights_shift(world: World, rho: float) -> float | None:
    """Finds what SAM on all weights adds to w*, 0-1 loss.

    None beyond a third of sqrt(d), where the ball comes near classifiers without the
    other features, and where the loss is too flat.
    """
    if rho > np.sqrt(world.d) / 3:
        return None
    objective = sam_all_weights(world, rho)
    optimum = minimize(
        objective, world, has_kink=True, num_scanned=60, num_bisections=36
    )
    shift = float(optimum.w - forms.standard_weight(world))
    return shift if optimum.error < 0.01 * abs(shift) else None


def _optima(
    world: World, method: str, radius: float, batch_size: int
) -> tuple[float | None, float | None]:
    """Returns the minima of the trained and of the 0-1 loss; for SAM less w*."""
    start = float(forms.standard_weight(world))
    if method == "st":
        return logistic_weight(world), start
    if method == "at":
        zero_one = forms.adversarial_weight(world, radius)
        return logistic_weight(world, radius), float(zero_one)
    if method == "at all features":
        zero_one = forms.adversarial_weight_all_features(world, radius)
        return logistic_weight(world, radius, moves_robust=True), float(zero_one)
    if method == "sam":
        shift = float(sam_step_weight(world, radius, batch_size)) - start
        zero_one = float(forms.sam_weight(world, radius)) - start
        return shift if np.isfinite(shift) else None, zero_one
    return None, all_weights_shift(world, radius)
