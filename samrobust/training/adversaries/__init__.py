"""Adversaries: the makers of the images that are trained on."""

__all__ = ["ADVERSARIES"]

# By their names in rows of tables.
ADVERSARIES = {
    "at": "samrobust.training.adversaries.at:ENTRY",
}
