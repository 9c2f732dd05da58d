"""Verdicts: which statement of Section 4 holds where, and how far off others are.

A verdict is computed from the points, never written down. A formula holds where it
equals the direct minimum within twice the error of that minimum; Theorems 4.4 and 4.5
as printed are formulas, judged at every radius. An expansion that is corrected, or
ours, holds for small rho where it gives the shift w - w*, or the radius of AT, within
10 % at every point with a small rho.
"""

import dataclasses
from typing import NamedTuple

import numpy as np

from samrobust.studies.theory.closed_forms import sam_weight
from samrobust.studies.theory.study import Points, Study

__all__ = ["Verdict", "judge"]

_SMALL = 0.1  # what an expansion calls small, and within what it holds there


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


class _Comparison(NamedTuple):
    """A verdict before its name: `deviation` and `error` are those of all points."""

    words: str
    holds: np.bool
    points: int
    deviation: np.ndarray | None = None
    error: np.ndarray | None = None


def judge(study: Study) -> list[Verdict]:
    """Returns the verdicts, in the order of the theorems."""
    printed = "w_AT = ln(p/(1-p)) / (2 (eta-eps))"
    logistic = "logistic loss: w_AT as in 4.2, x_1 left alone"
    return [
        *_formulas(study.standard, ("w* = ln(p/(1-p)) / (2 eta)", "4.1", "standard")),
        *_formulas(study.attack, (f"{printed}, x_1 left alone", "4.2", "formula")),
        *_formulas(
            study.attack_all,
            (f"{printed}, all features attacked, eq. (9)", "4.2", "printed"),
            ("w_AT: our root, all features attacked", "ours", "formula"),
        ),
        *_formulas(study.attack, (logistic, "ours", "logistic"), exact="printed"),
        *_sam(study.sam),
        *_equal_weights(study.sam),
        *_equal_radii(study.attack),
        *_sam_all(study.sam_all),
    ]


def _verdicts(undecided: int, *rows: tuple[str, str, _Comparison]) -> list[Verdict]:
    """Names the outcomes; nothing holds by having no points."""
    verdicts = []
    for statement, source, (words, holds, points, *numbers) in rows:
        if not points:
            words = "no point that float64 decides" if undecided else "no point"
        known = bool(holds) if points else None
        largest = [
            None if values is None or not len(values) else float(np.max(values))
            for values in numbers
        ]
        row = (statement, source, words, known, points, undecided, *largest)
        verdicts.append(Verdict(*row))
    return verdicts


def _formulas(
    points: Points, *rows: tuple[str, str, str], exact: str = "w"
) -> list[Verdict]:
    """Judges whether columns equal the minimum, infinity included."""
    known = points.where(np.isfinite(points.error))
    return _verdicts(
        len(points) - len(known),
        *(
            (statement, source, _equality(known, column, exact))
            for statement, source, column in rows
        ),
    )


def _sam(points: Points) -> list[Verdict]:
    known = points.resolved()
    start, radius, error = known.standard, known.radius, known.error
    shift, beyond = known.w - start, np.sum(known.printed - start > known.upper)
    between = (shift >= known.lower - error) & (shift <= known.upper + error)
    exact = (known.formula - start) / shift
    holds = _equal(known.formula, known.w, error, 1e-13 * known.w)
    fixed_point = _factor(exact, holds, "off by {}", error / shift)
    holds = _equal(known.printed, known.w, error, 1e-13 * known.w)
    words = f"off by {{}}; beyond the proven bounds at {beyond} points"
    printed = _factor((known.printed - start) / shift, holds, words, error / shift)
    corrected = ((known.corrected - start) / shift)[_is_small(known)]
    corrected = _expansion(corrected, error / shift)
    return _verdicts(
        len(points) - len(known),
        ("w_SAM > w*", "4.3", _every(shift > 0)),
        ("w_SAM - w* <= rho", "ours", _every(shift <= radius + error)),
        ("w_SAM: our fixed point", "ours", fixed_point),
        ("c w rho^2/(3d) <= w_SAM - w* <= w rho^2/(3d)", "ours", _every(between)),
        ("w_SAM = w* + (2/3) w* rho^2 + ...", "4.4", printed),
        ("w_SAM = w* + w* rho^2/(3d) + ...", "4.4 corrected", corrected),
    )


def _equal_weights(points: Points) -> list[Verdict]:
    known = points.resolved()
    exact, printed = known.attack_radius, known.attack_radius_printed
    # That of w, through eps_AT = eta (1 - w* / w).
    error = known.error * known.eta * known.standard / known.w**2
    holds = _equal(printed, exact, error, 1e-13 * exact)
    printed = _factor(printed / exact, holds, "eps_AT off by {}")
    corrected = _expansion((known.attack_radius_corrected / exact)[_is_small(known)])
    less = _every((exact < known.radius)[_is_stated(known)])
    return _verdicts(
        len(points) - len(known),
        ("2 + 3/eps_SAM^2 = 2 eta/eps_AT at equal w_1", "4.5", printed),
        ("1 + 3d/eps_SAM^2 = eta/eps_AT at equal w_1", "4.5 corrected", corrected),
        ("eps_SAM > eps_AT at equal w_1, eta <= sqrt(3d)", "4.5", less),
    )


def _equal_radii(points: Points) -> list[Verdict]:
    larger = points.w > sam_weight(points.world, points.radius)
    larger = _every(larger[_is_stated(points)])
    return _verdicts(
        0, ("w_AT > w_SAM at equal radius, eta <= sqrt(3d)", "4.5", larger)
    )


def _sam_all(points: Points) -> list[Verdict]:
    known = points.resolved()
    start, shift = known.standard, known.w - known.standard
    sign = _every((shift > 0) == (start**2 > 2 * known.d))
    ratio = known.coefficient * start * known.radius**2 / shift
    expansion = _expansion(ratio, known.error / np.abs(shift))
    return _verdicts(
        len(points) - len(known),
        ("w_SAM > w* where all weights are perturbed", "4.3", _every(shift > 0)),
        ("all weights: w_SAM > w* just where w*^2 > 2d, small rho", "ours", sign),
        ("all weights: w_SAM = w* + K w* rho^2 + ...", "ours", expansion),
    )


def _is_small(points: Points) -> np.ndarray:
    """Tells where rho is small in the sense of the corrected expansion."""
    slope = points.radius * (points.eta + points.standard / points.d)
    return (slope < _SMALL) & (points.radius**2 / points.d < _SMALL)


def _is_stated(points: Points) -> np.ndarray:
    """Tells where Theorem 4.5 orders the radii."""
    return points.eta <= np.sqrt(3 * points.d)


def _equality(known: Points, column: str, exact: str) -> _Comparison:
    value, truth = getattr(known, column), getattr(known, exact)
    finite = np.isfinite(truth)
    size = np.maximum(truth, known.standard)[finite]  # 0 is a value too
    error = known.error[finite]
    holds = np.all(np.isinf(value) == np.isinf(truth))
    holds &= _equal(value[finite], truth[finite], error, 1e-12 * size)
    deviation, error = np.abs(value[finite] - truth[finite]) / size, error / size
    words = "holds" if holds else f"off by up to {_percent(deviation)}"
    if alone := np.sum(np.isinf(truth) & np.isfinite(value)):
        words += f"; x_1 alone is best at {alone} points"
    return _Comparison(
        words, holds, len(known), deviation, error if exact == "w" else None
    )


def _equal(
    value: np.ndarray,
    truth: np.ndarray,
    error: np.ndarray,
    rounding: np.ndarray,
) -> np.bool:
    """Tells whether values are the minimum at all points; `rounding` is their own."""
    return np.all(np.abs(value - truth) <= 2 * error + rounding)


def _every(true: np.ndarray) -> _Comparison:
    """Judges whether an inequality is true at every point."""
    holds = np.all(true)
    words = "holds" if holds else f"holds at {np.sum(true)} of {len(true)} points"
    return _Comparison(words, holds, len(true))


def _factor(
    ratio: np.ndarray, holds: np.bool, words: str, error: np.ndarray | None = None
) -> _Comparison:
    """Says how far off a printed formula is, as its ratio to the minimum."""
    off = np.abs(ratio - 1)
    least, most = np.min(ratio, initial=np.inf), np.max(ratio, initial=0)
    factor = f"a factor of {least:.2g} to {most:.2g}"
    if np.all(off < _SMALL):  # where a factor would read as 1
        factor = f"up to {_percent(off)}"
    words = "holds" if holds else words.format(factor)
    return _Comparison(words, holds, len(ratio), off, error)


def _expansion(ratio: np.ndarray, error: np.ndarray | None = None) -> _Comparison:
    """Judges whether an expansion's ratio to the minimum is 1 within 10 %."""
    off = np.abs(ratio - 1)
    holds = np.all(off < _SMALL)
    word = "holds for small rho: within" if holds else "off for small rho by up to"
    return _Comparison(f"{word} {_percent(off)}", holds, len(ratio), off, error)


def _percent(values: np.ndarray) -> str:
    return f"{100 * np.max(values, initial=0):.2g} %"
