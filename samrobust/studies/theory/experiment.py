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

# Of a weight, relative: an average of float32 has some dozens of roundings of 1e-7.
_RESOLUTION = 1e-5


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
      memory: what is at least and at most left of the start, by a 95 % band: by how
        much the mean differs from that of training on the same samples that starts near
        the Bayes classifier; for a shift, the sums of both trainings'. 0, 0: nothing,
        or not measured.
      resolution: how far float32 may move the mean.
    """

    method: str
    radius: float
    quantity: str
    mean: float
    half_width: float
    values: tuple[float, ...]
    population: float | None
    zero_one: float | None
    memory: tuple[float, float] = (0.0, 0.0)
    resolution: float = 0.0

    @property
    def agrees(self) -> str | None:
        """Tells whether the population value lies in the band widened by half.

        `yes`, `no`, or `unresolved` where 0 lies in it too: a training without the
        effect would agree as well. `not converged` where the start certainly matters by
        more than that half; and, if the weight does not agree, where it may. Else None
        where no population value is known. The resolution widens all.
        """
        beside_noise = 0.5 * self.half_width + self.resolution
        width, (least, most) = self.half_width + beside_noise, self.memory
        if not least <= beside_noise:  # NaN has not converged either
            return "not converged"
        if self.population is not None and abs(self.mean - self.population) <= width:
            return "yes" if abs(self.mean) > width else "unresolved"
        if most > beside_noise:
            return "not converged"
        return None if self.population is None else "no"


def plan(grid: Grid, effort: TrainingEffort) -> list[tuple[str, float]]:
    """Lists the trainings of the grid's first world, as methods with radii.

    Radii of the attack are those up to 0.6 min(eta, 1): near eta the weights grow
    without bound, and from 1 on an attack can change the sign of x_1. SAM on w_1 comes
    without a radius too, to compare with.
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
    """Trains as planned, one after the other, and each a second time from elsewhere.

    Convergence is judged without the population value, which is what a weight that has
    converged is compared with, and not by whether the weights still move: where
    gradients vanish they do not.

    Args:
      grid: of the plan.
      effort: how much.
      on_start: called with a name before each training.
    """
    unperturbed = {}
    for method, radius in plan(grid, effort):
        on_start(f"training {method}" + (f", radius {radius:g}" if radius else ""))
        values, others = (
            train(grid.world, method, effort, radius, near_bayes=near)
            for near in (False, True)
        )
        difference, doubt = _mean_with_band(others - values)
        memory = np.maximum(abs(difference) + np.array([-doubt, doubt]), 0)
        resolution = _RESOLUTION * abs(float(np.mean(values)))
        if not radius:
            unperturbed[method] = values, memory
        is_sam = method.startswith("sam")
        if is_sam and not radius:
            continue
        if is_sam:
            plain, plain_memory = unperturbed["sam" if method == "sam" else "st"]
            values, memory = values - plain, memory + plain_memory
        yield Estimate(
            method,
            radius,
            "shift" if is_sam else "w",
            *_mean_with_band(values),
            tuple(map(float, values)),
            *_optima(grid.world, method, radius, effort.batch_size),
            (float(memory[0]), float(memory[1])),
            resolution,
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


def _mean_with_band(values: np.ndarray) -> tuple[float, float]:
    """Returns the mean over seeds [S] and the half-width of its 95 % band."""
    error = np.std(values, ddof=1) / np.sqrt(len(values))
    return float(np.mean(values)), float(stdtrit(len(values) - 1, 0.975) * error)


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
