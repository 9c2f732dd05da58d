"""Objectives, with the adversaries that belong to them."""

__all__ = ["OBJECTIVES"]

# By their names in rows of tables.
OBJECTIVES = {
    "trades": "samrobust.training.objectives.trades:ENTRY",
}
