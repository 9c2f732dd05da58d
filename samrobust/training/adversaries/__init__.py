"""Adversaries: the makers of the images that are trained on."""

__all__ = ["ADVERSARIES"]

# By their names in rows of tables.
ADVERSARIES = {
    "at": "samrobust.training.adversaries.at:ENTRY",
    "fgsm_rs": "samrobust.training.adversaries.fgsm_rs:ENTRY",
    "nfgsm": "samrobust.training.adversaries.nfgsm:ENTRY",
    "free": "samrobust.training.adversaries.free:ENTRY",
    "dynamic": "samrobust.training.adversaries.dynamic:ENTRY",
    "cfa": "samrobust.training.adversaries.cfa:ENTRY",
}
