"""Averages of weights, evaluated in place of the last ones."""

__all__ = ["AVERAGES"]

# By their names in rows of tables.
AVERAGES = {
    "ema": "samrobust.training.averaging.ema:ENTRY",
    "fawa": "samrobust.training.averaging.fawa:ENTRY",
    "generalist": "samrobust.training.averaging.generalist:ENTRY",
    "swa": "samrobust.training.averaging.swa:ENTRY",
}
