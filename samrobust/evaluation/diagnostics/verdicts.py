"""Judgments of measurements: pure functions of NumPy arrays to findings.

`standing` means: classified correctly after an attack, bool [N]. A comparison counts
images and holds the count against `allowance`.
"""

from collections.abc import Iterable, Mapping, Sequence

import jax.numpy as jnp
import numpy as np

from samrobust.attacks.calls import PROBABILITIES
from samrobust.attacks.losses import normalized
from samrobust.evaluation.diagnostics.finding import (
    PASSED,
    UNDECIDED,
    WARNING,
    Finding,
    allowance,
    is_hardly,
    is_more,
)

__all__ = [
    "judge_finite",
    "judge_gradients",
    "judge_logit_scale",
    "judge_noise",
    "judge_outputs",
    "judge_precision",
    "judge_products",
    "judge_radii",
    "judge_randomness",
    "judge_restarts",
    "judge_square",
    "judge_steps",
    "judge_transfer",
]

# Sums in another order differ by a few units of 1.2e-7, never by a thousand of them.
_ROUNDING = 1e-4


def judge_outputs(outputs: np.ndarray) -> Finding:
    """Judges whether the outputs [N, K] are logits and not probabilities."""
    count = int(np.sum(normalized(jnp.asarray(outputs))))
    values = {"images": len(outputs), "normalized": count}
    is_bad = count == len(outputs)
    text = PROBABILITIES if is_bad else "The outputs are not probabilities."
    return _finding("logits", is_bad, text, values)


def judge_gradients(
    correct: np.ndarray,
    zero: np.ndarray,
    zero_margin: np.ndarray,
    saturated: np.ndarray,
) -> Finding:
    """Judges whether the gradient that an attack follows is there; bool [N] each.

    Args:
      correct: classified correctly; the others need no attack.
      zero: the gradient of the cross entropy is exactly zero.
      zero_margin: that of the margin loss is.
      saturated: the cross entropy itself is.
    """
    total = int(correct.sum())
    if total == 0:
        text = "No image is classified correctly: there is nothing to attack."
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
        f"correctly classified images ({allowance(total)} are allowed), that of the "
        f"margin at {deep}; the loss itself is zero in float32 at {full}."
    )
    if is_more(flat, total):
        text += (
            " The network is flat there: gradients are masked."
            if is_more(deep, total)
            else " The loss is saturated: attack with the margin or DLR loss."
        )
    return _finding("zero gradients", is_more(flat, total), text, values)


def judge_randomness(first: np.ndarray, second: np.ndarray) -> Finding:
    """Judges whether two passes over the same images give the same logits [N, K]."""
    both = np.isfinite(first) & np.isfinite(second)  # -inf rules out a class
    size = max(np.max(np.abs(first[both]), initial=0.0), np.finfo(np.float32).tiny)
    size, apart = float(size), bool(np.any(first[~both] != second[~both]))
    largest = float(np.max(np.abs(first[both] - second[both]), initial=0.0))
    changed = int(np.sum(first.argmax(-1) != second.argmax(-1)))
    values = {"largest_difference": largest, "largest_logit": size, "changed": changed}
    differs = apart or largest > _ROUNDING * size
    text = f"Two passes over the same images differ by at most {largest:.2g}."
    if differs:
        text = (
            f"Two passes over the same images differ by up to {largest:.2g} in "
            f"logits of up to {size:.3g}, and in {changed} of {len(first)} "
            'predictions: the network is random. Use AutoAttack with version="rand"; '
            "all other findings are about one draw."
        )
    return _finding("randomness", differs, text, values)


def judge_products(dtype: str, products: Mapping[str, int]) -> Finding:
    """Judges whether all is in float32, where there is no copy to compare with.

    Args:
      dtype: the network's, as far as it says.
      products: how many there are of each precision, as from `count_products`.
    """
    values = {"dtype": dtype, "products": dict(products)}
    coarse = {n: c for n, c in products.items() if n not in ("float32", "float64")}
    if not coarse:
        text = f"The network computes in {dtype}, and so do its matrix products."
        return Finding("low precision", PASSED, text, values)
    told = ", ".join(f"{count} {name}" for name, count in coarse.items())
    text = (
        f"Of {sum(products.values())} matrix products and convolutions some "
        f"take less than float32 ({told}), where the network has no dtype to "
        "set that would tell what this changes. `float32 rounded` is what a "
        "`precision` of the network's own asks for: TF32 on a GPU, bfloat16 "
        "on a TPU."
    )
    return Finding("low precision", UNDECIDED, text, values)


def judge_precision(
    dtype: str,
    products: Mapping[str, int],
    natural: tuple[np.ndarray, np.ndarray],
    attacked: tuple[np.ndarray, np.ndarray],
) -> Finding:
    """Judges whether computing in less than float32 changes anything.

    Args:
      dtype: the network's.
      products: as above.
      natural: logits [N, K] of the network and of its copy in float32.
      attacked: who stands, bool [N] each, after an attack along the network's own
        gradients and along those of the copy, both judged on the network itself.
    """
    total, (own, exact) = len(natural[0]), attacked
    changed = int(np.sum(natural[0].argmax(-1) != natural[1].argmax(-1)))
    gained = int(np.sum(own)) - int(np.sum(exact))
    values = {
        "dtype": dtype,
        "products": dict(products),
        "changed": changed,
        "accuracy": _percent(own),
        "accuracy_float32_gradients": _percent(exact),
        "gained": gained,
        "allowed": allowance(total),
    }
    text = (
        f"The network computes in {dtype}; float32 would change {changed} of {total} "
        f"predictions. {_percent(own):.1f} % survive PGD, {_percent(exact):.1f} % "
        f"after PGD along float32 gradients ({allowance(total)} images are allowed)."
    )
    is_bad = is_more(changed, total) or is_more(gained, total)
    if is_bad:
        text += (
            " Evaluate it with --dtype=float32: its precision is part of the defense."
        )
    return _finding("low precision", is_bad, text, values)


def judge_steps(
    stages: Sequence[int], standing: np.ndarray, margins: np.ndarray
) -> Finding:
    """Judges whether steps lead anywhere, and whether there are enough of them.

    Args:
      stages: numbers of steps S.
      standing: bool [N, S], after each of them.
      margins: [N, S], the margin loss there.
    """
    total, left = len(standing), standing[:, -1]
    num_left = int(left.sum())
    if not standing.any():
        return _unseen("steps", "the first steps of PGD")
    curve, told = _curve(stages, standing.T, "steps")
    late = int(np.sum(standing[:, -2] & ~left))
    fallen = int(np.sum(standing[:, 0] & ~left))
    climbed = int(np.sum(margins[left, -1] > margins[left, 0]))
    is_weak = is_more(late, total)
    is_flat = not is_more(fallen, total) and is_hardly(climbed, num_left)
    is_flat = is_flat and is_more(num_left, total)
    text = f"Robust accuracy levels off with the number of steps ({told})."
    if is_weak:
        text = (
            f"Robust accuracy still falls with the last steps ({told}): the attack is "
            f"too weak at {stages[-2]} steps. Take more, or APGD."
        )
    elif is_flat:
        text = (
            f"Steps lead nowhere ({told}): of {num_left} images left standing the "
            f"last iterate is worse than the first for {climbed} only. The gradients "
            "do not say where the loss rises."
        )
    values = {"accuracy": curve, "late": late, "climbed": climbed}
    return _finding("steps", is_weak or is_flat, text, values)


def judge_restarts(numbers: Sequence[int], standing: np.ndarray) -> Finding:
    """Judges whether restarts suffice; standing is bool [N, S] after each number."""
    if not standing.any():
        return _unseen("restarts", "the first restarts of PGD")
    curve, told = _curve(numbers, standing.T, "restarts")
    late = int(np.sum(standing[:, -2] & ~standing[:, -1]))
    is_weak = is_more(late, len(standing))
    text = f"More restarts break hardly any more images ({told})."
    if is_weak:
        text = (
            f"Robust accuracy still falls with the last restarts ({told}): whether an "
            "image breaks is a matter of luck. Take more restarts, or APGD."
        )
    return _finding("restarts", is_weak, text, {"accuracy": curve, "late": late})


def judge_radii(standing: Mapping[float, np.ndarray]) -> Finding:
    """Judges whether accuracy falls to zero as the radius, in 1/255, grows."""
    radii = sorted(standing)
    each = [standing[radius] for radius in radii]
    if not np.any(each):
        return _unseen("radius", "the smallest radius")
    names = [f"{radius:.4g}" for radius in radii]
    curve, told = _curve(names, each, "radius in 1/255")
    total, counts = len(each[0]), [int(one.sum()) for one in each]
    rise = max(0, *np.diff(counts).tolist())
    text = f"Robust accuracy falls to {_percent(each[-1]):.1f} % ({told})."
    if is_more(counts[-1], total):
        text = (
            f"{counts[-1]} of {total} images survive even where an image may become "
            f"any other ({told}): the attack fails, or the network gives all images "
            "the same answer."
        )
    elif is_more(rise, total):
        text = (
            f"A larger ball breaks fewer images ({told}), though it holds the smaller "
            "one: the attack gets lost."
        )
    is_bad = is_more(counts[-1], total) or is_more(rise, total)
    values = {"accuracy": curve, "left": counts[-1], "largest_rise": rise}
    return _finding("radius", is_bad, text, values)


def judge_square(white_box: np.ndarray, square: np.ndarray, queries: int) -> Finding:
    """Judges whether Square, which sees no gradients, breaks what APGD does not."""
    if not white_box.any():
        return _unseen("square", "APGD")
    beaten, text = _compare(white_box, square, f"Square ({queries} queries)")
    if beaten:
        text += " Gradients are masked, and robust accuracy is an illusion."
    return _finding("square", beaten, text, _counts(white_box, square))


def judge_transfer(
    white_box: np.ndarray, transferred: Mapping[str, np.ndarray]
) -> Finding:
    """Judges whether images made on other networks break what APGD does not."""
    if not transferred:
        text = "Not done: no other run was given. Name some with --transfer-from."
        return Finding("transfer", UNDECIDED, text, {})
    if not white_box.any():
        return _unseen("transfer", "APGD")
    union = np.all(list(transferred.values()), axis=0)
    beaten, text = _compare(
        white_box, union, f"Images made on {', '.join(transferred)}"
    )
    if beaten:
        text += " Another network's gradients say more of it than its own."
    values = {name: _counts(white_box, s) for name, s in transferred.items()}
    return _finding("transfer", beaten, text, values)


def judge_logit_scale(
    plain: np.ndarray, rescaled: np.ndarray, margins: np.ndarray
) -> Finding:
    """Judges whether PGD breaks more with logits divided by the size of their margin.

    Args:
      plain: who stands after PGD on the cross entropy.
      rescaled: who stands after PGD on that of rescaled logits.
      margins: [N], the margin loss of the natural images.
    """
    if not plain.any():
        return _unseen("logit scale", "PGD")
    gained = int(np.sum(plain)) - int(np.sum(rescaled))
    finite = np.abs(margins[np.isfinite(margins)])
    size = float(np.median(finite)) if len(finite) else 0.0
    hides = is_more(gained, len(plain))
    follows = ": large logits hide the gradient. Attack with the margin or DLR."
    shares = _percent(plain), _percent(rescaled)
    text = (
        f"{shares[0]:.1f} % survive PGD on the cross entropy, {shares[1]:.1f} % once "
        f"logits are rescaled (their median margin is {size:.3g})"
        f"{follows if hides else '.'}"
    )
    values = {"accuracy": shares[0], "accuracy_rescaled": shares[1]}
    values |= {"gained": gained, "median_margin": size}
    return _finding("logit scale", hides, text, values)


def judge_noise(
    white_box: np.ndarray,
    noise: np.ndarray,
    margins: tuple[np.ndarray, np.ndarray],
    draws: int,
) -> Finding:
    """Judges whether random noise of the radius is as bad as the attack.

    Args:
      white_box: who stands after APGD.
      noise: who stands after noise.
      margins: [N] each, the margin loss after APGD and after noise.
      draws: of noise.
    """
    if not white_box.any():
        return _unseen("noise", "APGD")
    both = white_box & noise
    num_both = int(both.sum())
    worse = int(np.sum(margins[0][both] > margins[1][both]))
    values = {**_counts(white_box, noise), "both": num_both, "worse": worse}
    beaten, text = _compare(white_box, noise, f"Random noise ({draws} draws)")
    useless = is_more(num_both, len(both)) and is_hardly(worse, num_both)
    if beaten:
        text += " An attack that noise beats does not attack."
    elif useless:
        text = (
            f"Of {num_both} images that survive both, APGD brings {worse} nearer "
            "to a mistake than random noise does, not clearly more than half. An "
            "attack no better than noise does not attack."
        )
    return _finding("noise", beaten or useless, text, values)


def judge_finite(finite: Mapping[str, np.ndarray]) -> Finding:
    """Judges whether the logits of the images from each attack are finite, bool [N]."""
    counts = {name: int(np.sum(~each)) for name, each in finite.items()}
    bad = [f"{count} under {name}" for name, count in counts.items() if count]
    text = "All highest logits are finite."
    if bad:
        text = (
            "Adversarial images lead to a highest logit that is NaN or infinite "
            f"({', '.join(bad)}): no gradient helps there. They count as misclassified."
        )
    return _finding("finite logits", bool(bad), text, counts)


def _finding(check: str, is_bad: bool, text: str, values: Mapping) -> Finding:
    return Finding(check, WARNING if is_bad else PASSED, text, dict(values))


def _unseen(check: str, attack: str) -> Finding:
    text = f"No image survives {attack}: there is nothing left to look at."
    return Finding(check, UNDECIDED, text, {})


def _compare(white_box: np.ndarray, other: np.ndarray, name: str) -> tuple[bool, str]:
    """Tells whether another attack breaks more of what stands than may be; in words."""
    total, left = len(white_box), int(white_box.sum())
    count = int(np.sum(white_box & ~other))
    text = (
        f"{name} would leave {_percent(other):.1f} % and break {count} of {left} "
        f"images that APGD left standing ({allowance(total)} of {total} are allowed)."
    )
    return is_more(count, total), text


def _counts(white_box: np.ndarray, other: np.ndarray) -> dict[str, float]:
    return {
        "accuracy": _percent(other),
        "accuracy_white_box": _percent(white_box),
        "broken_by_it_alone": int(np.sum(white_box & ~other)),
        "allowed": allowance(len(white_box)),
    }


def _curve(
    names: Iterable[object], standing: Iterable[np.ndarray], unit: str
) -> tuple[dict[str, float], str]:
    """Returns the accuracies by names, and in words."""
    pairs = zip(names, standing, strict=True)
    curve = {str(name): _percent(each) for name, each in pairs}
    points = ", ".join(f"{name}: {value:.1f}" for name, value in curve.items())
    return curve, f"accuracy in % by {unit}: {points}"


def _percent(standing: np.ndarray) -> float:
    return 100 * float(np.mean(standing))
