"""Which statement of Section 4 holds where, and by how much the others are off.

A verdict is computed from the points, never written down: a formula holds where it
equals the direct minimum within twice the error of that minimum.
"""

import dataclasses

import numpy as np

from samrobust.theory.closed_forms import sam_weight
from samrobust.theory.grid import Points, Study

__all__ = ["Verdict", "judge"]

_SMALL = 0.1  # what an expansion calls small


@dataclasses.dataclass(frozen=True)
class Verdict:
    """The outcome for one statement.

    Attributes:
      statement: as a formula.
      source: the theorem, or `ours`.
      verdict: `holds`, `holds for ...`, `off by ...`.
      holds: whether it holds at every point that it is about; None: no such point.
      points: how many points it was checked at, those that float64 decides.
      undecided: at how many float64 cannot tell.
      deviation: the largest relative deviation, of a formula's value from the minimum
        (of its shift w - w* for SAM); None for inequalities.
      error: the largest stated error of the minimum, relative in the same way.
    """

    statement: str
    source: str
    verdict: str
    holds: bool | None
    points: int
    undecided: int
    deviation: float | None = None
    error: float | None = None


def judge(study: Study) -> list[Verdict]:
    """The verdicts, in the order of the theorems."""
    verdicts = [
        _formula("w* = ln(p/(1-p)) / (2 eta)", "4.1", study.standard, "standard"),
        _formula(
            "w_AT = ln(p/(1-p)) / (2 (eta-eps)), x_1 left alone", "4.2", study.attack
        ),
        _printed_attack(study.attack_all),
        _formula("w_AT: our root, all features attacked", "ours", study.attack_all),
        _formula(
            "logistic loss: w_AT as in 4.2, x_1 left alone",
            "ours",
            study.attack,
            "logistic",
            exact="printed",
        ),
        *_sam_verdicts(study.sam),
        *_relation(study),
        *_all_weights(study.sam_all),
    ]
    return [_decided(verdict) for verdict in verdicts]


def _decided(verdict: Verdict) -> Verdict:
    """The verdict, or that there is none: nothing holds by having no points."""
    if verdict.points:
        return verdict
    left = " that float64 decides" if verdict.undecided else ""
    return dataclasses.replace(verdict, verdict=f"no point{left}", holds=None)


def _formula(
    statement: str,
    source: str,
    points: Points,
    column: str = "formula",
    *,
    exact: str = "w",
) -> Verdict:
    known = points.where(np.isfinite(points.error))
    value, truth = getattr(known, column), getattr(known, exact)
    agree_at_infinity = np.array_equal(np.isinf(value), np.isinf(truth))
    finite = np.isfinite(truth)
    size = np.maximum(truth, known.standard)[finite]  # 0 is a value too
    deviation = np.abs(value[finite] - truth[finite]) / size
    error = known.error[finite] / size
    holds = agree_at_infinity and bool(np.all(deviation <= 2 * error + 1e-12))
    return Verdict(
        statement,
        source,
        "holds" if holds else f"off by up to {_percent(deviation)}",
        holds,
        len(known),
        len(points) - len(known),
        _largest(deviation),
        _largest(error) if exact == "w" else None,
    )


def _printed_attack(points: Points) -> Verdict:
    known = points.where(np.isfinite(points.error))
    finite = known.where(np.isfinite(known.w))
    size = np.maximum(finite.w, finite.standard)
    deviation = np.abs(finite.printed - finite.w) / size
    alone = len(known) - len(finite)
    verdict = f"off by up to {_percent(deviation)}; x_1 alone is best at {alone} points"
    return Verdict(
        "w_AT = ln(p/(1-p)) / (2 (eta-eps)), all features attacked, eq. (9)",
        "4.2",
        verdict if alone or np.any(deviation > 1e-8) else "holds",
        not alone and not np.any(deviation > 1e-8),
        len(known),
        len(points) - len(known),
        _largest(deviation),
        _largest(finite.error / size),
    )


def _sam_verdicts(points: Points) -> list[Verdict]:
    known = points.resolved()
    shift = known.w - known.standard
    error = _largest(known.error / shift)
    count = (len(known), len(points) - len(known))

    def every(statement: str, source: str, true: np.ndarray) -> Verdict:
        return Verdict(statement, source, _share(true), bool(np.all(true)), *count)

    def off(column: str) -> np.ndarray:
        return (getattr(known, column) - known.standard) / shift

    exact = np.abs(off("formula") - 1)
    printed, corrected = off("printed"), np.abs(off("corrected") - 1)
    beyond = known.printed - known.standard > known.upper
    small = _is_small(known)
    holds = bool(np.all(exact * shift <= 2 * known.error + 1e-13 * known.w))
    return [
        every("w_SAM > w*", "4.3", shift > 0),
        every("w_SAM - w* <= rho", "ours", shift <= known.radius + known.error),
        Verdict(
            "w_SAM: our fixed point",
            "ours",
            "holds" if holds else f"off by up to {_percent(exact)}",
            holds,
            *count,
            _largest(exact),
            error,
        ),
        every(
            "c w rho^2/(3d) <= w_SAM - w* <= w rho^2/(3d)",
            "ours",
            (shift >= known.lower - known.error) & (shift <= known.upper + known.error),
        ),
        Verdict(
            "w_SAM = w* + (2/3) w* rho^2 + ...",
            "4.4",
            f"off by a factor of {_range(printed)}; beyond the proven bounds at "
            f"{np.sum(beyond)} points",
            not np.any(printed > 1 + _SMALL),
            *count,
            _largest(np.abs(printed - 1)),
            error,
        ),
        Verdict(
            "w_SAM = w* + w* rho^2/(3d) + ...",
            "4.4 corrected",
            *_expansion(corrected[small]),
            len(points) - len(known),
            _largest(corrected[small]),
            error,
        ),
    ]


def _is_small(points: Points) -> np.ndarray:
    """Where rho is small in the sense of the corrected expansion."""
    slope = points.radius * (points.eta + points.standard / points.d)
    return (slope < _SMALL) & (points.radius**2 / points.d < _SMALL)


def _relation(study: Study) -> list[Verdict]:
    known = study.sam.resolved()
    undecided = len(study.sam) - len(known)
    epsilon, small = known.attack_radius, _is_small(known)
    printed = known.attack_radius_printed / epsilon
    corrected = np.abs(known.attack_radius_corrected / epsilon - 1)
    stated = known.where(known.eta <= np.sqrt(3 * known.d))
    less = stated.attack_radius < stated.radius
    equal = study.attack.where(study.attack.eta <= np.sqrt(3 * study.attack.d))
    larger = equal.w > sam_weight(equal.world, equal.radius)
    return [
        Verdict(
            "2 + 3/eps_SAM^2 = 2 eta/eps_AT at equal w_1",
            "4.5",
            f"eps_AT off by a factor of {_range(printed)}",
            not np.any(np.abs(printed - 1) > _SMALL),
            len(known),
            undecided,
            _largest(np.abs(printed - 1)),
        ),
        Verdict(
            "1 + 3d/eps_SAM^2 = eta/eps_AT at equal w_1",
            "4.5 corrected",
            *_expansion(corrected[small]),
            undecided,
            _largest(corrected[small]),
        ),
        Verdict(
            "eps_SAM > eps_AT at equal w_1, eta <= sqrt(3d)",
            "4.5",
            _share(less),
            bool(np.all(less)),
            len(stated),
            undecided,
        ),
        Verdict(
            "w_AT > w_SAM at equal radius, eta <= sqrt(3d)",
            "4.5",
            _share(larger),
            bool(np.all(larger)),
            len(equal),
            0,
        ),
    ]


def _all_weights(points: Points) -> list[Verdict]:
    known = points.resolved()
    shift = known.w - known.standard
    positive = known.standard**2 > 2 * known.d
    expected = known.coefficient * known.standard * known.radius**2
    deviation = np.abs(expected / shift - 1)
    undecided = len(points) - len(known)
    raised = shift > 0
    agree = raised == positive
    return [
        Verdict(
            "w_SAM > w* where all weights are perturbed",
            "4.3",
            _share(raised),
            bool(np.all(raised)),
            len(known),
            undecided,
        ),
        Verdict(
            "all weights: w_SAM > w* just where w*^2 > 2d, small rho",
            "ours",
            _share(agree),
            bool(np.all(agree)),
            len(known),
            undecided,
        ),
        Verdict(
            "all weights: w_SAM = w* + K w* rho^2 + ...",
            "ours",
            *_expansion(deviation),
            undecided,
            _largest(deviation),
            _largest(known.error / np.abs(shift)),
        ),
    ]


def _expansion(deviation: np.ndarray) -> tuple[str, bool, int]:
    """Verdict, whether it holds, and the number of points with a small rho."""
    holds = bool(np.all(deviation < _SMALL))
    word = "holds for small rho: within" if holds else "off for small rho by up to"
    return f"{word} {_percent(deviation)}", holds, len(deviation)


def _range(values: np.ndarray) -> str:
    return f"{np.min(values):.2g} to {np.max(values):.2g}" if len(values) else "?"


def _share(true: np.ndarray) -> str:
    if np.all(true):
        return "holds"
    return f"holds at {np.sum(true)} of {len(true)} points"


def _largest(values: np.ndarray) -> float | None:
    return float(np.max(values)) if len(values) else None


def _percent(values: np.ndarray) -> str:
    return f"{100 * np.max(values):.2g} %" if len(values) else "nothing"
