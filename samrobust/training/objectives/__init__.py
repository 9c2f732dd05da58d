"""Objectives, with the adversaries that belong to them."""

__all__ = ["OBJECTIVES"]

# By their names in rows of tables.
OBJECTIVES = {
    "trades": "samrobust.training.objectives.trades:ENTRY",
    "mart": "samrobust.training.objectives.mart:ENTRY",
    "cfa_trades": "samrobust.training.objectives.cfa_trades:ENTRY",
    "label_smoothing": "samrobust.training.objectives.label_smoothing:ENTRY",
}
