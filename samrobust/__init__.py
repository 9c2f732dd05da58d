"""Training image classifiers that hold up under attack, in JAX and Flax.

Standard training, sharpness-aware minimization and PGD adversarial training, what grew
out of them and their combinations, and the honest measurement of what they are worth.
`samrobust.attacks` and `samrobust.sharpness` are libraries of their own: they work in
any JAX program. The names below are imported when they are first used, packages too.

>>> import samrobust
>>> attack = samrobust.pgd(samrobust.linf(8 / 255), step_size=2 / 255, num_steps=10)
"""

import ast
import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.2.0"

if TYPE_CHECKING:
    from samrobust import (
        attacks as attacks,
        data as data,
        models as models,
        sharpness as sharpness,
        training as training,
    )
    from samrobust.attacks import (
        Ball as Ball,
        apgd as apgd,
        apgd_targeted as apgd_targeted,
        autoattack as autoattack,
        boundary_distance as boundary_distance,
        cross_entropy as cross_entropy,
        ddn as ddn,
        dlr as dlr,
        fab_minimal as fab_minimal,
        fab_targeted as fab_targeted,
        fgsm as fgsm,
        input_gradient_norm as input_gradient_norm,
        l2 as l2,
        linf as linf,
        local_linearity_error as local_linearity_error,
        margin as margin,
        noise as noise,
        pgd as pgd,
        square as square,
        targeted_dlr as targeted_dlr,
    )
    from samrobust.data import Split as Split
    from samrobust.experiments.networks import load as load
    from samrobust.sharpness import (
        asam as asam,
        asam_davda as asam_davda,
        awp as awp,
        entropy_sgd as entropy_sgd,
        esam as esam,
        fisher_sam as fisher_sam,
        friendly_sam as friendly_sam,
        fsam as fsam,
        gradient_point as gradient_point,
        gsam as gsam,
        last_aux as last_aux,
        last_metrics as last_metrics,
        looksam as looksam,
        msam as msam,
        rwp as rwp,
        sam as sam,
        sam_on as sam_on,
        ssam as ssam,
        two_pass as two_pass,
    )
    from samrobust.sharpness.measures import (
        average_sharpness as average_sharpness,
        hessian_eigenvalues as hessian_eigenvalues,
        hessian_trace as hessian_trace,
        logit_gap as logit_gap,
        logit_norm as logit_norm,
        relative_flatness as relative_flatness,
        worst_case_sharpness as worst_case_sharpness,
    )
    from samrobust.training import (
        Adversary as Adversary,
        Averaging as Averaging,
        Method as Method,
        Objective as Objective,
        RunFolder as RunFolder,
        TrainState as TrainState,
        as_adversary as as_adversary,
        fit as fit,
        make_train_step as make_train_step,
    )
    from samrobust.training.averaging.ema import ema as ema
    from samrobust.training.averaging.fawa import fawa as fawa
    from samrobust.training.averaging.generalist import generalist as generalist
    from samrobust.training.averaging.swa import swa as swa
    from samrobust.training.objectives.trades import trades_loss as trades_loss


def _homes() -> dict[str, str]:
    """Returns the module of each name, from the imports above."""
    with open(__file__, encoding="utf-8") as file:
        nodes = ast.walk(ast.parse(file.read()))
    return {
        alias.name: node.module
        for node in nodes
        if isinstance(node, ast.ImportFrom) and node.module
        for alias in node.names
        if alias.asname
    }


_HOMES = _homes()
__all__ = sorted(_HOMES)  # pyright: ignore[reportUnsupportedDunderAll]

if not TYPE_CHECKING:

    def __getattr__(name: str) -> Any:
        if name not in _HOMES:
            raise AttributeError(f"module 'samrobust' has no attribute {name!r}")
        home = _HOMES[name]
        if home == __name__:  # a package of this one
            return importlib.import_module(f"{home}.{name}")
        return getattr(importlib.import_module(home), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
