"""Every closed form beside its numerical truth, over a grid of worlds and radii."""

import dataclasses
import itertools
import types
from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np

from samrobust.checks import check
from samrobust.studies.theory import closed_forms as forms, population
from samrobust.studies.theory.logistic import logistic_weight
from samrobust.studies.theory.world import World, check_attack_radius, check_sam_radius

__all__ = ["Grid", "Points", "Study", "study"]

_SMALL = 0.03  # relative to the perturbation that changes margins by one deviation
_FRACTIONS = (0.1, 0.3, 0.6, 0.9)  # of eta, where no epsilon is given


@dataclasses.dataclass(frozen=True)
class Grid:
    """The worlds and radii to look at: all combinations.

    Attributes:
      p, eta, d: of equation (7); the first of each make the world that is trained.
      epsilon: radii of the attack; empty: 0.1, 0.3, 0.6 and 0.9 of each eta (of 1
        where eta is larger).
      rho: radii of SAM.

    Raises:
      ValueError: for an empty axis; names the assumption that a value breaks.
    """

    p: tuple[float, ...] = (0.7, 0.95)
    eta: tuple[float, ...] = (0.1, 0.03, 0.5)
    d: tuple[float, ...] = (10, 1, 100, 1000)
    epsilon: tuple[float, ...] = ()
    rho: tuple[float, ...] = (0.1, 1.0, 3.0)

    def __post_init__(self) -> None:
        """Checks the values before anything is computed."""
        for name in ("p", "eta", "d", "rho"):
            values = getattr(self, name)
            check(len(values) > 0, f"at least one {name}", **{name: values})
        World(*np.ix_(self.p, self.eta, self.d))
        for eta in self.eta:
            check_attack_radius(self.attack_radii(eta), eta)
        check_sam_radius(np.array(self.rho))

    @property
    def world(self) -> World:
        """Returns the world that is trained and drawn."""
        return World(self.p[0], self.eta[0], self.d[0])

    def attack_radii(self, eta: float) -> np.ndarray:
        """Returns the radii of the attack in worlds with this eta."""
        return np.array(self.epsilon or [part * min(eta, 1) for part in _FRACTIONS])


class Points(types.SimpleNamespace):
    """Arrays [N] of one sort of point, by name.

    `p`, `eta`, `d`, `radius` (NaN where there is none), `standard` (w*), `w` and
    `error` (the direct minimum), and what formulas say.
    """

    def __len__(self) -> int:
        return len(self.p)

    @property
    def world(self) -> World:
        """Returns the worlds of all points."""
        return World(self.p, self.eta, self.d)

    def where(self, mask: np.ndarray) -> "Points":
        """Returns those of a mask [N]."""
        return Points(**{name: column[mask] for name, column in vars(self).items()})

    def resolved(self) -> "Points":
        """Returns those whose shift w - w* the direct minimum knows to a thousandth."""
        return self.where(self.error < 1e-3 * np.abs(self.w - self.standard))

    def beside(self, **columns: np.ndarray) -> "Points":
        """Returns them with more columns, or others."""
        return Points(**vars(self) | columns)


class Study(NamedTuple):
    """The points of each part of the theory.

    Attributes:
      standard: worlds alone.
      attack: worlds x epsilon, x_1 left alone; `logistic`: that loss's minimum.
      attack_all: worlds x epsilon, all features perturbed; `logistic` likewise.
      sam: worlds x rho, w_1 perturbed.
      sam_all: worlds, all weights perturbed, at a rho that is small for each of them.
    """

    standard: Points
    attack: Points
    attack_all: Points
    sam: Points
    sam_all: Points


def study(grid: Grid, *, on_part: Callable[[str], None] = lambda _: None) -> Study:
    """Minimizes every loss at every point, and evaluates every formula there.

    Args:
      grid: what to look at.
      on_part: called with the name of each part before it is computed.
    """
    on_part("standard training")
    worlds = _points(grid, lambda _: [np.nan])
    world = worlds.world
    optimum = population.minimize(population.natural(world), world)
    standard = worlds.beside(**optimum._asdict())
    on_part("adversarial training")
    attacks = _points(grid, grid.attack_radii)
    attack, attack_all = (
        _attack(attacks, moves_robust=moves) for moves in (False, True)
    )
    on_part("SAM on the robust weight")
    sam = _sam(_points(grid, lambda _: grid.rho))
    on_part("SAM on all weights")
    return Study(standard, attack, attack_all, sam, _sam_all(worlds))


def _points(grid: Grid, radii: Callable[[float], Iterable[float]]) -> Points:
    """Returns the grid's worlds, each with its radii, and with w*."""
    rows = [
        (*world, radius)
        for world in itertools.product(grid.p, grid.eta, grid.d)
        for radius in radii(world[1])
    ]
    columns = np.array(rows, float).T
    points = Points(**dict(zip(("p", "eta", "d", "radius"), columns, strict=True)))
    return points.beside(standard=forms.standard_weight(points.world))


def _attack(points: Points, *, moves_robust: bool) -> Points:
    world, epsilon = points.world, points.radius
    objective = population.adversarial(world, epsilon, moves_robust=moves_robust)
    printed = forms.adversarial_weight(world, epsilon)
    whole = forms.adversarial_weight_all_features(world, epsilon)
    worlds = map(World, points.p, points.eta, points.d)
    logistic = [
        logistic_weight(one, radius, moves_robust=moves_robust)
        for one, radius in zip(worlds, epsilon, strict=True)
    ]
    return points.beside(
        **population.minimize(objective, world)._asdict(),
        printed=printed,
        formula=whole if moves_robust else printed,
        logistic=np.array(logistic),
    )


def _sam(points: Points) -> Points:
    world, rho = points.world, points.radius
    objective = population.sam_robust_weight(world, rho)
    optimum = population.minimize(objective, world, has_kink=True)
    formula = forms.sam_weight(world, rho)
    lower, upper = forms.sam_weight_bounds(world, rho, formula)
    return points.beside(
        **optimum._asdict(),
        formula=formula,
        lower=lower,
        upper=upper,
        printed=forms.sam_weight_printed(world, rho),
        corrected=forms.sam_weight_corrected(world, rho),
        attack_radius=forms.equal_attack_radius(world, optimum.w),
        attack_radius_printed=forms.equal_attack_radius_printed(world, rho),
        attack_radius_corrected=forms.equal_attack_radius_corrected(world, rho),
    )


def _sam_all(points: Points) -> Points:
    world, start = points.world, points.standard
    root = np.sqrt(points.d)
    # Beside the margins' deviation; and what across (1, ..., 1) costs less, w*^2 / d.
    scale = 1 / (root * points.eta + (1 + start) / root)
    rho = _SMALL * np.minimum(scale, 10 * start**2 / points.d)
    optimum = population.minimize(
        population.sam_all_weights(world, rho),
        world,
        has_kink=True,
        num_scanned=24,
        num_bisections=36,
        num_searches=1,
    )
    coefficient = forms.all_weights_coefficient(world)
    return points.beside(radius=rho, **optimum._asdict(), coefficient=coefficient)
