"""From measurements to findings on the attack: pure functions of NumPy arrays.

`standing` means: classified rightly after an attack, bool [N]. A comparison counts
images and holds the count against `allowance`. Those on the network itself are in
`samrobust.sanity.network_verdicts`.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from samrobust.sanity.finding import (
    PASSED,
    UNDECIDED,
    WARNING,
    Finding,
    allowance,
    is_more,
    is_mostly,
)

__all__ = [
    "judge_finite",
    "judge_logit_scale",
    "judge_noise",
    "judge_radii",
    "judge_restarts",
    "judge_square",
    "judge_steps",
    "judge_transfer",
    "percent",
]


def percent(standing: np.ndarray) -> float:
    """The share of what holds, in percent."""
    return 100 * float(np.mean(standing))


def judge_steps(
    stages: Sequence[int], standing: np.ndarray, margins: np.ndarray
) -> Finding:
    """Whether steps lead anywhere, and whether there are enough of them.

    Args:
      stages: numbers of steps S.
      standing: bool [N, S], after each of them.
      margins: [N, S], the margin loss there.
    """
    total = len(standing)
    curve = {str(n): percent(standing[:, i]) for i, n in enumerate(stages)}
    late = int(np.sum(standing[:, -2] & ~standing[:, -1]))
    fallen = int(np.sum(standing[:, 0] & ~standing[:, -1]))
    left = standing[:, -1]
    climbed = int(np.sum(margins[left, -1] > margins[left, 0]))
    is_flat = not is_more(fallen, total) and not is_mostly(climbed, int(left.sum()))
    told = _curve(curve, "steps")
    verdict = WARNING
    if is_more(late, total):
        text = (
            f"Robust accuracy still falls with the last steps ({told}): the attack is "
            f"too weak at {stages[-2]} steps. Take more, or APGD."
        )
    elif is_flat and is_more(int(left.sum()), total):
        text = (
            f"Steps lead nowhere ({told}): of {left.sum()} images left standing the "
            f"last iterate is worse than the first for {climbed} only. The gradients "
            "do not say where the loss rises."
        )
    else:
        verdict = PASSED
        text = f"Robust accuracy levels off with the number of steps ({told})."
    values = {"accuracy": curve, "late": late, "climbed": climbed}
    return Finding("steps", verdict, text, values)


def judge_restarts(numbers: Sequence[int], standing: np.ndarray) -> Finding:
    """Whether there are enough restarts; standing is bool [N, S] after each number."""
    curve = {str(n): percent(standing[:, i]) for i, n in enumerate(numbers)}
    late = int(np.sum(standing[:, -2] & ~standing[:, -1]))
    told = _curve(curve, "restarts")
    values = {"accuracy": curve, "late": late}
    if is_more(late, len(standing)):
        text = (
            f"Robust accuracy still falls with the last restarts ({told}): whether an "
            "image breaks is a matter of luck. Take more restarts, or APGD."
        )
        return Finding("restarts", WARNING, text, values)
    text = f"More restarts break hardly any more images ({told})."
    return Finding("restarts", PASSED, text, values)


def judge_radii(standing: Mapping[float, np.ndarray]) -> Finding:
    """Whether accuracy falls to zero as the radius, in 1/255, grows."""
    radii = sorted(standing)
    total = len(standing[radii[0]])
    counts = [int(standing[radius].sum()) for radius in radii]
    curve = {f"{radius:.4g}": percent(standing[radius]) for radius in radii}
    told = _curve(curve, "/255")
    rises = max(int(rise) for rise in np.diff(counts))
    values = {"accuracy": curve, "left": counts[-1], "largest_rise": max(rises, 0)}
    if is_more(counts[-1], total):
        text = (
            f"{counts[-1]} of {total} images stand even where an image may become any "
            f"other ({told}): the attack does not find what surely is there."
        )
        return Finding("radius", WARNING, text, values)
    if is_more(rises, total):
        text = (
            f"A larger ball breaks fewer images ({told}), though it holds the smaller "
            "one: the attack gets lost."
        )
        return Finding("radius", WARNING, text, values)
    text = f"Robust accuracy falls to {percent(standing[radii[-1]]):.1f} % ({told})."
    return Finding("radius", PASSED, text, values)


def judge_square(white_box: np.ndarray, square: np.ndarray, queries: int) -> Finding:
    """Whether Square, which sees no gradients, breaks what APGD left standing."""
    beaten, text = _compare(white_box, square, f"Square ({queries} queries)")
    if beaten:
        text += " Gradients are masked, and robust accuracy is an illusion."
    return Finding("square", *_verdict(beaten, text), _counts(white_box, square))


def judge_transfer(
    white_box: np.ndarray, transferred: Mapping[str, np.ndarray]
) -> Finding:
    """Whether images made on other networks break what APGD left standing."""
    if not transferred:
        text = "Not done: no other run was given. Name some by --transfer-from."
        return Finding("transfer", UNDECIDED, text, {})
    union = np.all(list(transferred.values()), axis=0)
    names = ", ".join(transferred)
    beaten, text = _compare(white_box, union, f"Images made on {names}")
    if beaten:
        text += " Another network's gradients say more of it than its own."
    values = {name: _counts(white_box, s) for name, s in transferred.items()}
    return Finding("transfer", *_verdict(beaten, text), values)


def judge_noise(
    white_box: np.ndarray,
    noise: np.ndarray,
    margins: tuple[np.ndarray, np.ndarray],
    draws: int,
) -> Finding:
    """Whether random noise of the radius is as bad as the attack.

    Args:
      white_box: who stands after APGD.
      noise: who stands after noise.
      margins: [N] each, the margin loss after APGD and after noise.
      draws: of noise.
    """
    both = white_box & noise
    worse = int(np.sum(margins[0][both] > margins[1][both]))
    values = {**_counts(white_box, noise), "both": int(both.sum()), "worse": worse}
    beaten, text = _compare(white_box, noise, f"Random noise ({draws} draws)")
    useless = is_more(int(both.sum()), len(both)) and not is_mostly(
        worse, int(both.sum())
    )
    if beaten:
        text += " An attack that noise beats does not attack."
    elif useless:
        text = (
            f"Of {both.sum()} images that stand under both, APGD brings {worse} nearer "
            "to a mistake than random noise does, not clearly more than half. An "
            "attack no better than noise does not attack."
        )
    return Finding("noise", *_verdict(beaten or useless, text), values)


def judge_logit_scale(
    plain: np.ndarray, rescaled: np.ndarray, margins: np.ndarray
) -> Finding:
    """Whether PGD breaks more once the logits are divided by the size of their margin.

    Args:
      plain: who stands after PGD on the cross entropy.
      rescaled: who stands after PGD on that of rescaled logits.
      margins: [N], the margin loss of the images as they are.
    """
    gained = int(np.sum(plain & ~rescaled)) - int(np.sum(~plain & rescaled))
    size = float(np.median(np.abs(margins)))
    values = {
        "accuracy": percent(plain),
        "accuracy_rescaled": percent(rescaled),
        "gained": gained,
        "median_margin": size,
    }
    told = (
        f"{percent(plain):.1f} % stand after PGD on the cross entropy, "
        f"{percent(rescaled):.1f} % once logits are rescaled (their median margin is "
        f"{size:.3g})"
    )
    if is_more(gained, len(plain)):
        text = f"{told}: large logits hide the gradient. Attack with the margin or DLR."
        return Finding("logit scale", WARNING, text, values)
    return Finding("logit scale", PASSED, f"{told}.", values)


def judge_finite(finite: Mapping[str, np.ndarray]) -> Finding:
    """Whether the logits [N] of what each attack hands in are finite."""
    counts = {name: int(np.sum(~each)) for name, each in finite.items()}
    bad = {name: count for name, count in counts.items() if count}
    if bad:
        told = ", ".join(f"{count} under {name}" for name, count in bad.items())
        text = (
            f"Adversarial images lead to NaN or infinite logits ({told}): gradients "
            "say nothing there. They count as misclassified."
        )
        return Finding("finite logits", WARNING, text, counts)
    return Finding("finite logits", PASSED, "All logits are finite.", counts)


def _compare(white_box: np.ndarray, other: np.ndarray, name: str) -> tuple[bool, str]:
    """Whether another attack breaks more of what stands than may be, and in words."""
    total, left = len(white_box), int(white_box.sum())
    count = int(np.sum(white_box & ~other))
    text = (
        f"{name} would leave {percent(other):.1f} % and break {count} of {left} images "
        f"that APGD left standing ({allowance(total)} of {total} are allowed)."
    )
    return is_more(count, total), text


def _counts(white_box: np.ndarray, other: np.ndarray) -> dict[str, float]:
    return {
        "accuracy": percent(other),
        "accuracy_white_box": percent(white_box),
        "broken_by_it_alone": int(np.sum(white_box & ~other)),
        "allowed": allowance(len(white_box)),
    }


def _verdict(is_bad: bool, text: str) -> tuple[str, str]:
    return (WARNING if is_bad else PASSED), text


def _curve(curve: Mapping[str, float], unit: str) -> str:
    points = ", ".join(f"{n}: {value:.1f}" for n, value in curve.items())
    return f"accuracy in % by {unit.replace('/255', 'radius in 1/255')}: {points}"
