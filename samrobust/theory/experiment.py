"""The trained world beside its population optima: seeds, confidence bands, pairs."""

import dataclasses
from collections.abc import Callable, Iterator

import numpy as np
from scipy.special import stdtrit

from samrobust.checks import check
from samrobust.theory import closed_forms as forms
from samrobust.theory.grid import Grid
from samrobust.theory.logistic import SamLogistic, logistic_weight
from samrobust.theory.population import minimise, sam_all_weights
from samrobust.theory.trained import Training, train
from samrobust.theory.world import World

__all__ = [
    "Effort",
    "Estimate",
    "all_weights_shift",
    "experiment",
    "plan_experiment",
]


@dataclasses.dataclass(frozen=True)
class Effort:
    """How much is trained.

    Attributes:
      seeds: independent runs of each method, >= 2; 0 trains nothing.
      samples: fresh samples of a run, >= 10 batches.
      batch_size: of SGD, >= 1.

    Raises:
      ValueError: if one is out of range.
    """

    seeds: int = 5
    samples: int = 300_000
    batch_size: int = 1_000

    def __post_init__(self) -> None:
        """Checks the ranges."""
        enough = self.seeds == 0 or self.seeds >= 2
        fix = "One run has no confidence band."
        check(enough, "seeds >= 2, or 0 for no training", fix, seeds=self.seeds)
        check(self.batch_size >= 1, "batch_size >= 1", batch_size=self.batch_size)
        check(
            self.samples >= 10 * self.batch_size,
            f"samples >= 10 batches of {self.batch_size}",
            samples=self.samples,
        )


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A trained weight over seeds beside the minimum of the loss it was trained on.

    Attributes:
      method: `st`, `at`, `at all features`, `sam` (w_1 alone) or `sam all weights`.
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
        """Whether the population value lies in the band widened by half.

        `yes`, `no`, or `unresolved` where 0 lies in it too: a training without the
        effect would agree as well. None where no population value is known.
        """
        if self.population is None:
            return None
        width = 1.5 * self.half_width
        if abs(self.mean - self.population) > width:
            return "no"
        return "yes" if abs(self.mean) > width else "unresolved"


def all_weights_shift(world: World, rho: float) -> float | None:
    """What SAM on all weights adds to w*, 0-1 loss.

    None beyond a third of sqrt(d), where the ball comes near classifiers without the
    other features, and where the loss is too flat.
    """
    if rho > np.sqrt(world.d) / 3:
        return None
    objective = sam_all_weights(world, rho)
    optimum = minimise(
        objective, world, has_kink=True, num_scanned=60, num_bisections=36
    )
    shift = float(optimum.w - forms.standard_weight(world))
    return shift if optimum.error < 0.01 * abs(shift) else None


def plan_experiment(grid: Grid, effort: Effort) -> int:
    """How many trainings `experiment` needs."""
    if effort.seeds == 0:
        return 0
    return 2 + 2 * len(_trained_radii(grid)) + 2 * len(grid.rho)


def experiment(
    grid: Grid, effort: Effort, *, on_start: Callable[[str], None] = lambda _: None
) -> Iterator[Estimate]:
    """Trains the grid's first world by every method and radius, one after the other.

    Args:
      grid: its first world, its radii of SAM, and of the attack those up to 0.6 eta.
      effort: how much.
      on_start: called with a name before each training.
    """
    if effort.seeds == 0:
        return
    world = grid.world
    num_steps = effort.samples // effort.batch_size

    def run(method: str, *, epsilon: float = 0.0, rho: float = 0.0) -> np.ndarray:
        radius = epsilon or rho
        on_start(f"training {method}" + (f", radius {radius:g}" if radius else ""))
        training = Training(method, num_steps, effort.batch_size)
        return train(world, training, effort.seeds, epsilon=epsilon, rho=rho)

    start = float(forms.standard_weight(world))
    plain = run("st")
    yield _estimate("st", 0.0, "w", plain, logistic_weight(world), start)
    for epsilon in _trained_radii(grid):
        for method in ("at", "at all features"):
            moves = method == "at all features"
            form = (
                forms.adversarial_weight_all_features
                if moves
                else forms.adversarial_weight
            )
            population = logistic_weight(world, epsilon, moves_robust=moves)
            values = run(method, epsilon=epsilon)
            zero_one = float(form(world, epsilon))
            yield _estimate(method, epsilon, "w", values, population, zero_one)
    logistic, alone = SamLogistic(world), run("sam")
    for rho in grid.rho:
        population = logistic.stationary(rho, effort.batch_size) - start
        population = population if np.isfinite(population) else None
        shift = float(forms.sam_weight(world, rho)) - start
        values = run("sam", rho=rho) - alone
        yield _estimate("sam", rho, "shift", values, population, shift)
    for rho in grid.rho:
        # Radii are relative to weights of 1; those of the logistic loss are 2 eta.
        values = run("sam all weights", rho=2 * float(world.eta) * rho) - plain
        yield _estimate(
            "sam all weights", rho, "shift", values, None, all_weights_shift(world, rho)
        )


def _trained_radii(grid: Grid) -> list[float]:
    """Those that leave a signal: near eta the weights grow without bound."""
    eta = float(grid.world.eta)
    most = 0.6 * min(eta, 1) + 1e-12
    return [float(e) for e in grid.attack_radii(eta) if e <= most]


def _estimate(
    method: str,
    radius: float,
    quantity: str,
    values: np.ndarray,
    population: float | None,
    zero_one: float | None,
) -> Estimate:
    count = len(values)
    error = np.std(values, ddof=1) / np.sqrt(count)
    return Estimate(
        method,
        radius,
        quantity,
        float(np.mean(values)),
        float(stdtrit(count - 1, 0.975) * error),
        tuple(map(float, values)),
        population,
        zero_one,
    )
