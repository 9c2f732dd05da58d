"""Signs of gradient masking: whether a robust accuracy can be believed.

    balls = {"linf 8/255": linf(8 / 255)}
    findings = run_sanity(model, variables, split, balls, key=key)
    console.print(to_sheet(findings).to_rich())

docs/sanity.md explains what each check looks for, and its threshold.
"""

from samrobust.evaluation.diagnostics.checks import (
    Effort,
    Surrogate,
    run_sanity,
    some_of,
)
from samrobust.evaluation.diagnostics.finding import (
    PASSED,
    UNDECIDED,
    WARNING,
    Finding,
    allowance,
    to_json,
    to_sheet,
    write_report,
)

__all__ = [
    "PASSED",
    "UNDECIDED",
    "WARNING",
    "Effort",
    "Finding",
    "Surrogate",
    "allowance",
    "run_sanity",
    "some_of",
    "to_json",
    "to_sheet",
    "write_report",
]
