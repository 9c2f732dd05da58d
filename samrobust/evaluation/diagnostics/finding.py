"""Findings of the checks: the one rule by which counts are judged, how they are shown.

A sound attack is allowed to be worse than another on one image in a hundred: robust
accuracies are quoted to a point. A count is held against that rate with its luck: more
images than `allowance(total)` would show in fewer than one of a hundred samples.
"""

import dataclasses
import itertools
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from rich.text import Text
from scipy import stats

from samrobust.system.files import write_sealed, write_text
from samrobust.system.tables import Sheet, TextTable

__all__ = [
    "PASSED",
    "UNDECIDED",
    "WARNING",
    "Finding",
    "allowance",
    "is_hardly",
    "is_more",
    "is_mostly",
    "to_json",
    "to_sheet",
    "write_report",
]

PASSED, WARNING, UNDECIDED = "passed", "warning", "undecided"
_STYLES = {PASSED: "green", WARNING: "bold red", UNDECIDED: "yellow"}
_RATE = 0.01  # images in which a sound attack may be the weaker one
_LUCK = 0.01  # how often a verdict may be luck


@dataclasses.dataclass(frozen=True)
class Finding:
    """The outcome of one check.

    Attributes:
      check: its name, as in docs/sanity.md.
      verdict: `passed`, `warning` or `undecided`.
      text: what was measured, and what follows, in a sentence or two.
      values: what was measured; JSON.
      ball: the attacked ball, as in `linf 8/255`; empty: the network itself.
    """

    check: str
    verdict: str
    text: str
    values: dict[str, Any]
    ball: str = ""

    @classmethod
    def from_dict(cls, stored: dict[str, Any]) -> "Finding":
        """Returns a finding of `sanity.json`."""
        names = [field.name for field in dataclasses.fields(cls)]
        return cls(**{name: stored[name] for name in names})

    @property
    def anchor(self) -> str:
        """Returns where it is explained.

        >>> Finding("logit scale", PASSED, "", {}).anchor
        'docs/sanity.md#logit-scale'
        """
        return f"docs/sanity.md#{self.check.replace(' ', '-')}"


def allowance(total: int) -> int:
    """Returns how many of `total` images may speak against an attack that is sound.

    The 99 % quantile of the binomial distribution of `total` images with a rate of 1 %.

    >>> [allowance(total) for total in (1, 50, 256, 1000, 10_000)]
    [0, 3, 7, 18, 124]
    """
    return int(stats.binom.ppf(1 - _LUCK, total, _RATE))


def is_more(count: int, total: int) -> bool:
    """Tells whether `count` of `total` images are more than `allowance` gives."""
    return count > allowance(total)


def is_mostly(count: int, total: int) -> bool:
    """Tells whether something holds for most of all images like these `total`.

    The one-sided sign test: a coin would show `count` heads or more in fewer than one
    of a hundred throws. Fewer than 7 images cannot say so.

    >>> is_mostly(6, 6), is_mostly(7, 7), is_mostly(60, 100), is_mostly(70, 100)
    (False, True, False, True)
    """
    return bool(stats.binom.sf(count - 1, total, 0.5) < _LUCK)


def is_hardly(count: int, total: int) -> bool:
    """Tells whether something is not shown for most, of as many as could show it.

    >>> is_hardly(6, 6), is_hardly(4, 7), is_hardly(7, 7)
    (False, True, False)
    """
    return is_mostly(total, total) and not is_mostly(count, total)


def to_sheet(findings: Sequence[Finding], note: str = "") -> Sheet:
    """Returns a table for the network and each ball, for a console and as Markdown.

    Args:
      findings: of `run_sanity`.
      note: a sentence on what was looked at.
    """
    tables = []
    for ball, group in itertools.groupby(findings, key=lambda finding: finding.ball):
        rows = []
        for found in group:
            see = f" See {found.anchor}." if found.verdict == WARNING else ""
            verdict = Text(found.verdict, _STYLES[found.verdict])
            rows.append((found.check, verdict, f"{found.text}{see}"))
        title = f"Sanity checks, {ball or 'the network'}"
        tables.append(TextTable(("check", "verdict", "finding"), rows, title, words=3))
    counts = _counts(findings)
    told = ", ".join(f"{count} {verdict}" for verdict, count in counts.items() if count)
    if counts[WARNING] > 1:
        told = told.replace(WARNING, "warnings")
    summary = f"Of {len(findings)} checks: {told}."
    explained = "docs/sanity.md explains every check."
    return Sheet(tables, [summary, *filter(None, [note]), explained])


def to_json(findings: Sequence[Finding], **about: Any) -> dict[str, Any]:
    """Returns the findings with all numbers; `about` goes in front."""
    listed = [{**dataclasses.asdict(f), "explained": f.anchor} for f in findings]
    return {**about, "verdicts": _counts(findings), "findings": listed}


def _counts(findings: Sequence[Finding]) -> dict[str, int]:
    return {v: sum(f.verdict == v for f in findings) for v in _STYLES}


def write_report(
    findings: Sequence[Finding],
    folder: pathlib.Path,
    *,
    note: str = "",
    about: Mapping[str, Any],
) -> list[pathlib.Path]:
    """Writes `sanity.json` and `sanity.md`, each replaced in one step.

    Args:
      findings: of `run_sanity`.
      folder: exists.
      note: a sentence on what was looked at.
      about: what `sanity.json` begins with; JSON.

    Returns:
      The files.
    """
    paths = [folder / "sanity.json", folder / "sanity.md"]
    write_sealed(paths[0], to_json(findings, **about))
    write_text(paths[1], to_sheet(findings, note).to_markdown())
    return paths
