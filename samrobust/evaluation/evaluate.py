"""Natural and robust accuracy: every test example exactly once, whatever the batch.

The network is evaluated in inference mode (running BatchNorm statistics), in the
precision it was made with. All attacks run in one pass over the data. Accuracies are
percentages. An example with a logit that is not finite is not classified rightly: a
network that has some on the images as they are is refused, and those that an attack
led it to are reported.
"""

import warnings
from collections.abc import Callable, Mapping

import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from samrobust.attacks import identity
from samrobust.checks import check
from samrobust.data import Split
from samrobust.evaluation.measure import (
    classifier,
    is_correct,
    is_finite,
    make_measure,
    of_name,
)
from samrobust.parallel import is_primary
from samrobust.types import Array, Attack, PyTree

__all__ = [
    "Evaluator",
    "accuracies",
    "check_finite",
    "make_evaluator",
    "warn_of_non_finite",
]

Evaluator = Callable[..., dict[str, np.ndarray]]


def make_evaluator(
    model: nn.Module, attacks: Mapping[str, Attack], *, batch_size: int
) -> Evaluator:
    """Builds a function that attacks a trained network on a whole split.

    Args:
      model: `apply(variables, images, train=False)` gives logits.
      attacks: by the names of the columns; `identity` gives natural accuracy.
      batch_size: over all devices; at most the number of examples is used, rounded up
        to a multiple of the devices.

    Returns:
      `evaluate(variables, split, key, *, on_batch=None, on_non_finite=None) ->
      {name: correct}` with `correct` bool [N] in the order of the split: whether the
      example is classified rightly after the attack. `on_batch(done, num_examples)` is
      called after every batch, and in between where one takes long.
      `on_non_finite(counts)` is called at the end if an attack led to logits that are
      not finite, with the number of such examples by the attacks' names; by default it
      warns. The function compiles once for splits of one size and may be called for
      many networks; it raises a ValueError if an image as it is has such logits.

      **Guarantees.** Each example is judged exactly once; an incomplete last batch is
      padded and the padding ignored. The random numbers of an example depend on the
      key, the attack's name and the example's position in the split alone, so that its
      outcome depends neither on the batch nor on the devices, up to rounding.

    Raises:
      ValueError: if batch_size < 1 or the split is empty.
    """

    def judge(
        variables: PyTree, images: Array, labels: Array, *, key: Array
    ) -> dict[str, Array]:
        logits_fn = classifier(model, variables)
        found = {}
        for name, attack in attacks.items():
            attacked = attack(logits_fn, images, labels, key=of_name(key, name))
            logits = logits_fn(attacked)
            verdict = is_correct(logits, labels), is_finite(logits)
            found[name] = jnp.stack(verdict, axis=-1)
        return found

    measure = make_measure(judge, batch_size=batch_size)

    def evaluate(
        variables: PyTree,
        split: Split,
        key: Array,
        *,
        on_batch: Callable[[int, int], None] = lambda *_: None,
        on_non_finite: Callable[[dict[str, int]], None] = warn_of_non_finite,
    ) -> dict[str, np.ndarray]:
        found = measure(variables, split, key, on_batch=on_batch)
        bad = {name: int(np.sum(~found[name][:, 1])) for name in attacks}
        for name, attack in attacks.items():
            if attack is identity:
                check_finite(bad.pop(name), len(split))
        if any(bad.values()):
            on_non_finite({name: count for name, count in bad.items() if count})
        return {name: found[name][:, 0] for name in attacks}  # in their order

    return evaluate


def check_finite(non_finite: int, num_examples: int) -> None:
    """Refuses a network whose logits of the images as they are are not all finite."""
    check(
        non_finite == 0,
        "a network with finite logits",
        "NaN or infinity is no prediction: there is no accuracy to report. Its weights "
        "are broken, as by a training that diverged, or its numbers overflow.",
        images_without=non_finite,
        num_images=num_examples,
    )


def warn_of_non_finite(counts: Mapping[str, int]) -> None:
    """Warns that attacks led to logits that are not finite, by their names."""
    if is_primary():
        told = ", ".join(f"{count} under {name}" for name, count in counts.items())
        warnings.warn(
            f"The network has NaN or infinite logits on adversarial images ({told}). "
            "They count as misclassified.",
            stacklevel=2,
        )


def accuracies(outcome: Mapping[str, np.ndarray]) -> dict[str, float]:
    """The percentage of examples classified rightly, by the attacks' names.

    >>> accuracies({"natural": np.array([True, True, False, True])})
    {'natural': 75.0}
    """
    return {name: 100 * float(np.mean(correct)) for name, correct in outcome.items()}
