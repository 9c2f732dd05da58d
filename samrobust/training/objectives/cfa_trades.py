"""CFA with TRADES: radius and regularization calibrated class by class.

Reference: Wei et al. (2023), arXiv 2303.14460.
"""

from samrobust.attacks import linf
from samrobust.attacks.losses import cross_entropy
from samrobust.checks import amount, check_radius, share
from samrobust.training.adversaries.cfa import FIELDS, class_wise
from samrobust.training.adversaries.radii import (
    attack_passes,
    check_alpha,
    check_extent,
    check_options,
)
from samrobust.training.objectives import trades
from samrobust.training.parts import Adversary, Objective
from samrobust.types import Array, Attack, Entry

__all__ = ["ENTRY", "cfa_trades", "regularized"]


def regularized(
    natural: Array, adversarial: Array, again: Array, labels: Array, betas: Array
) -> Array:
    """Returns (CE(f(x), y) + beta KL(f(x) || f(x'))) / (1 + beta), [B].

    Args:
      natural: logits of x, [B, K].
      adversarial: logits of x', [B, K].
      again: logits of x once more, [B, K].
      labels: int [B].
      betas: of the examples' classes, [B].
    """
    divergence = trades.kl_divergence(again, adversarial)
    return (cross_entropy(natural, labels) + betas * divergence) / (1 + betas)


def cfa_trades(
    epsilon: float,
    beta: float,
    alpha: float = 0.25,
    num_steps: int = 10,
    base: float = 0.5,
    base_beta: float = 0.5,
    begin: float = 0.05,
    batch_norm: str = "eval",
    *,
    num_classes: int,
    steps_per_epoch: int,
    total_steps: int,
) -> tuple[Adversary, Objective]:
    """Builds TRADES with eps_k = (base + R_k) eps and beta_k = (base_beta + R_k) beta.

    Class-wise calibrated margins and regularization (CCM and CCR), R_k as of
    `samrobust.training.adversaries.cfa.cfa`; the loss is `regularized`. Costs what
    TRADES does.

    Args:
      epsilon: radius in 1/255 units, in the l-inf norm.
      beta: >= 0, see `trades_loss`; the authors' is 6.
      alpha: the step in radii epsilon, for every class.
      num_steps: of the attack on KL.
      base: lambda_1 >= 0; the authors' is 0.5.
      base_beta: lambda_2 >= 0; the authors' is 0.5.
      begin: the fraction of the epochs before R_k counts, one epoch at least.
      batch_norm: see `Adversary`; `eval` in the authors' code.
      num_classes: of the data.
      steps_per_epoch: of the training.
      total_steps: of it.

    Raises:
      ValueError: for a value out of range.

    Reference: Wei et al. (2023), arXiv 2303.14460, as their code, PKU-ML/CFA. *Our
    deviation*: as of `kl_pgd` and `cfa`.
    """
    check_radius("linf", epsilon=epsilon)
    check_alpha(alpha=alpha)
    amount(beta=beta)
    check_extent(base=base, base_beta=base_beta)
    share(begin=begin)
    radius = epsilon / 255

    def make_attack(radii: Array) -> Attack:
        step_size = alpha * radius
        return trades.kl_pgd(linf(radii), step_size=step_size, num_steps=num_steps)

    adversary, of_classes = class_wise(
        *(make_attack, radius),
        base=base,
        begin=begin,
        batch_norm=batch_norm,
        num_classes=num_classes,
        steps_per_epoch=steps_per_epoch,
        total_steps=total_steps,
    )
    adversary = adversary._replace(
        weigh=lambda state, labels: of_classes(state, base_beta, beta)[labels]
    )
    return adversary, Objective(regularized, trades.VIEWS)


ENTRY = Entry(
    cfa_trades,
    "CFA with TRADES (eps = {eps:g}/255, beta = {beta:g})",
    options={"eps": "epsilon", "beta": "beta"},
    fields=FIELDS | {"beta": amount, "base_beta": check_extent},
    attack_passes=lambda values: attack_passes(values) + 1 / 3,
    check=check_options,
)
