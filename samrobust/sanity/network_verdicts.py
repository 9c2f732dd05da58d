"""From measurements to findings on the network itself: pure functions of arrays."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from samrobust.sanity.finding import (
    PASSED,
    UNDECIDED,
    WARNING,
    Finding,
    allowance,
    is_more,
)
from samrobust.sanity.verdicts import percent

__all__ = ["judge_gradients", "judge_precision", "judge_randomness"]

# Sums in another order differ by some units of 1.2e-7; a thousand of them is no order.
_ROUNDING = 1e-4


def judge_gradients(
    correct: np.ndarray,
    zero: np.ndarray,
    zero_margin: np.ndarray,
    saturated: np.ndarray,
) -> Finding:
    """Whether the gradient that an attack follows is there; bool [N] each.

    Args:
      correct: classified rightly; the others need no attack.
      zero: the gradient of the cross entropy is exactly zero.
      zero_margin: that of the margin loss is.
      saturated: the cross entropy itself is.
    """
    total = int(correct.sum())
    if total == 0:
        text = "No image is classified rightly: there is nothing to attack."
        return Finding("zero gradients", UNDECIDED, text, {})
    flat, deep, full = (
        int(np.sum(correct & v)) for v in (zero, zero_margin, saturated)
    )
    values = {
        "images": total,
        "zero_cross_entropy": flat,
        "zero_margin": deep,
        "saturated": full,
    }
    text = (
        f"The gradient of the cross entropy is exactly zero at {flat} of {total} "
        f"rightly classified images ({allowance(total)} are allowed), that of the "
        f"margin at {deep}; the loss itself is zero in float32 at {full}."
    )
    if not is_more(flat, total):
        return Finding("zero gradients", PASSED, text, values)
    if is_more(deep, total):
        text += " The network is flat there: gradients are masked."
    else:
        text += " The loss is saturated: attack with the margin or DLR loss."
    return Finding("zero gradients", WARNING, text, values)


def judge_randomness(first: np.ndarray, second: np.ndarray) -> Finding:
    """Whether two passes over the same images give the same logits [N, K]."""
    size = max(float(np.max(np.abs(first))), np.finfo(np.float32).tiny)
    largest = float(np.max(np.abs(first - second)))
    changed = int(np.sum(first.argmax(-1) != second.argmax(-1)))
    values = {"largest_difference": largest, "largest_logit": size, "changed": changed}
    if not largest <= _ROUNDING * size:
        text = (
            f"Two passes over the same images differ by up to {largest:.2g} in "
            f"logits of up to {size:.3g}, and in {changed} of {len(first)} "
            'predictions: the network is random. Use AutoAttack with version="rand"; '
            "all other findings are about one draw."
        )
        return Finding("randomness", WARNING, text, values)
    text = f"Two passes over the same images differ by at most {largest:.2g}."
    return Finding("randomness", PASSED, text, values)


def judge_precision(
    dtype: str,
    products: Mapping[str, int],
    natural: tuple[np.ndarray, np.ndarray] | None = None,
    attacked: tuple[np.ndarray, np.ndarray] | None = None,
) -> Finding:
    """Whether computing in less than float32 changes anything.

    Args:
      dtype: the network's.
      products: how many there are of each precision, as from `count_products`.
      natural: logits [N, K] of the network and of its copy in float32; None: there is
        no copy, the network is in float32 as far as it says.
      attacked: who stands, bool [N] each, after an attack along the network's own
        gradients and along those of the copy, both judged on the network itself.
    """
    values: dict[str, Any] = {"dtype": dtype, "products": dict(products)}
    if natural is None or attacked is None:
        coarse = {n: c for n, c in products.items() if n not in ("float32", "float64")}
        if coarse:
            told = ", ".join(f"{count} {name}" for name, count in coarse.items())
            text = (
                f"Of {sum(products.values())} matrix products and convolutions some "
                f"take less than float32 ({told}), where the network has no dtype to "
                "set that would tell what this changes. `float32 rounded` is what a "
                "`precision` of the network's own asks for: TF32 on a GPU, bfloat16 "
                "on a TPU."
            )
            return Finding("low precision", UNDECIDED, text, values)
        text = f"The network computes in {dtype}, and so do its matrix products."
        return Finding("low precision", PASSED, text, values)
    total = len(natural[0])
    changed = int(np.sum(natural[0].argmax(-1) != natural[1].argmax(-1)))
    own, exact = attacked
    gained = int(np.sum(own & ~exact)) - int(np.sum(~own & exact))
    values |= {
        "changed": changed,
        "accuracy": percent(own),
        "accuracy_float32_gradients": percent(exact),
        "gained": gained,
        "allowed": allowance(total),
    }
    text = (
        f"The network computes in {dtype}; float32 would change {changed} of {total} "
        f"predictions. {percent(own):.1f} % stand after PGD, {percent(exact):.1f} % "
        f"after PGD along float32 gradients ({allowance(total)} images are allowed)."
    )
    if is_more(changed, total) or is_more(gained, total):
        text += (
            " Evaluate it with --dtype=float32: its precision is part of the defence."
        )
        return Finding("low precision", WARNING, text, values)
    return Finding("low precision", PASSED, text, values)
