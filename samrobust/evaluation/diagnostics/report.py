"""The findings for people and programs: terminal, Markdown, JSON."""

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from samrobust.evaluation.diagnostics.finding import PASSED, UNDECIDED, WARNING, Finding
from samrobust.system.files import write_json, write_text

__all__ = ["to_json", "to_markdown", "to_rich", "write_report"]

_STYLES = {PASSED: "green", WARNING: "bold red", UNDECIDED: "yellow"}
_NETWORK = "the network"


def to_rich(findings: Sequence[Finding], note: str = "") -> Group:
    """Returns the findings for a Rich console, with the number of warnings."""
    table = Table(box=box.SIMPLE, show_edge=False, pad_edge=False)
    for name in ("check", "verdict"):
        table.add_column(name, no_wrap=True)
    table.add_column("finding", overflow="fold")
    previous = None
    for finding in findings:
        if finding.ball != previous:
            table.add_section()
            table.add_row(Text(finding.ball or _NETWORK, style="bold"))
            previous = finding.ball
        verdict = Text(finding.verdict, style=_STYLES[finding.verdict])
        text = Text(finding.text)
        if finding.verdict == WARNING:
            text.append(f" See {finding.anchor}.")
        table.add_row(Text(finding.check), verdict, text)
    lines = [_summary(findings), *([note] if note else [])]
    return Group(Text("Sanity checks", style="bold"), table, Text("\n".join(lines)))


def to_markdown(findings: Sequence[Finding], note: str = "") -> str:
    """Returns the same in Markdown."""
    lines = [f"**Sanity checks.** {_summary(findings)}"]
    lines += ["", note] if note else []
    previous = None
    for finding in findings:
        if finding.ball != previous:
            lines += ["", f"**{finding.ball or _NETWORK}**", ""]
            lines += ["| check | verdict | finding |", "| :--- | :--- | :--- |"]
            previous = finding.ball
        text = finding.text.replace("|", "\\|")
        verdict = finding.verdict
        shown = f"**{verdict}**" if verdict == WARNING else verdict
        lines.append(f"| {finding.check} | {shown} | {text} |")
    return "\n".join([*lines, "", "docs/sanity.md explains every check."]) + "\n"


def to_json(findings: Sequence[Finding], **about: Any) -> dict[str, Any]:
    """Returns the findings with all numbers; `about` goes in front."""
    listed = [{**dataclasses.asdict(f), "explained": f.anchor} for f in findings]
    counts = {v: sum(f.verdict == v for f in findings) for v in _STYLES}
    return {**about, "verdicts": counts, "findings": listed}


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
    write_json(paths[0], to_json(findings, **about))
    write_text(paths[1], to_markdown(findings, note))
    return paths


def _summary(findings: Sequence[Finding]) -> str:
    counts = {v: sum(f.verdict == v for f in findings) for v in _STYLES}
    parts = [f"{count} {verdict}" for verdict, count in counts.items() if count]
    told = ", ".join(parts)
    if counts[WARNING] > 1:
        told = told.replace(WARNING, "warnings")
    return f"Of {len(findings)} checks: {told}."
