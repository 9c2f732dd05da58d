"""Averages of weights, evaluated in place of the last ones."""

__all__ = ["AVERAGES"]

# By their names in rows of tables.
AVERAGES = {
    "ema": "samrobust.training.averaging.ema:ENTRY",
    "swa": "samrobust.training.averaging.swa:ENTRY",
}
