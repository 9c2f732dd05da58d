"""Training image classifiers that hold up under attack, in JAX and Flax.

Standard training, sharpness-aware minimization and PGD adversarial training, what grew
out of them and their combinations, and the honest measurement of what they are worth.
`samrobust.attacks` and `samrobust.sharpness` are libraries of their own: they work in
any JAX program. The names below are imported when they are first used.

>>> import samrobust
>>> attack = samrobust.pgd(samrobust.linf(8 / 255), step_size=2 / 255, num_steps=10)
"""

import importlib
from typing import Any

__version__ = "0.2.0"

_HOMES = {
    "samrobust.attacks": (
        *("Ball", "apgd", "apgd_targeted", "autoattack", "ddn", "fab_minimal"),
        *("fab_targeted", "fgsm", "l2", "linf", "noise", "pgd", "square"),
        *("cross_entropy", "dlr", "margin", "targeted_dlr"),
    ),
    "samrobust.data": ("Split",),
    "samrobust.experiments.networks": ("load",),
    "samrobust.sharpness": (
        *("asam", "asam_davda", "awp", "entropy_sgd", "esam", "fisher_sam", "fsam"),
        *("friendly_sam", "gradient_point", "gsam", "last_aux", "last_metrics"),
        *("looksam", "msam", "rwp", "sam", "sam_on", "ssam", "two_pass"),
    ),
    "samrobust.studies.sharpness": (
        *("average_sharpness", "boundary_distance", "hessian_eigenvalues"),
        *("hessian_trace", "input_gradient_norm", "local_linearity_error"),
        *("logit_gap", "logit_norm", "relative_flatness", "worst_case_sharpness"),
    ),
    "samrobust.training": (
        *("Adversary", "Averaging", "Method", "Objective", "RunFolder", "TrainState"),
        *("as_adversary", "fit", "make_train_step"),
    ),
    "samrobust.training.averaging.ema": ("ema",),
    "samrobust.training.averaging.fawa": ("fawa",),
    "samrobust.training.averaging.generalist": ("generalist",),
    "samrobust.training.averaging.swa": ("swa",),
    "samrobust.training.objectives.trades": ("trades_loss",),
}
_HOME = {name: home for home, names in _HOMES.items() for name in names}

__all__ = sorted(_HOME)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'samrobust' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
