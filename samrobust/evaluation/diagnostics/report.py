"""The findings for people and programs: terminal, Markdown, JSON."""

import dataclasses
import itertools
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from rich.text import Text

from samrobust.evaluation.diagnostics.finding import PASSED, UNDECIDED, WARNING, Finding
from samrobust.system.files import write_sealed, write_text
from samrobust.system.tables import Sheet, TextTable

__all__ = ["to_json", "to_sheet", "write_report"]

_STYLES = {PASSED: "green", WARNING: "bold red", UNDECIDED: "yellow"}


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
