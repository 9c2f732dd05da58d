"""Natural and robust accuracy: every test example exactly once, whatever the batch.

The network is evaluated in inference mode (running BatchNorm statistics), in the
precision it was made with. All attacks run in one pass over the data. Accuracies are
percentages.
"""

import zlib
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from samrobust.data import Split
from samrobust.evaluation.measure import classifier, make_measure
from samrobust.types import Array, Attack, PyTree

__all__ = ["Evaluator", "accuracies", "make_evaluator"]

Evaluator = Callable[..., dict[str, np.ndarray]]


def make_evaluator(
    model: nn.Module, attacks: Mapping[str, Attack], *, batch_size: int
) -> Evaluator:
    """Builds a function that attacks a trained network on a whole split.

    Args:
      model: `apply(variables, images, train=False)` gives logits.
      attacks: by the names of the columns; `identity` gives natural accuracy.
      batch_size: over all devices; rounded up to a multiple of their number.

    Returns:
      `evaluate(variables, split, key, *, on_batch=None) -> {name: correct}` with
      `correct` bool [N] in the order of the split: whether the example is classified
      rightly after the attack. `on_batch(done, num_examples)` is called after every
      batch. The function compiles once and may be called for many networks.

      **Guarantees.** Each example is judged exactly once; an incomplete last batch is
      padded and the padding ignored. The random start of an attack depends on the key,
      the attack's name and the batch alone.

    Raises:
      ValueError: if batch_size < 1 or the split is empty.
    """

    def judge(
        variables: PyTree, images: Array, labels: Array, *, key: Array
    ) -> dict[str, Array]:
        logits_fn = classifier(model, variables)
        correct = {}
        for name, attack in attacks.items():
            own_key = jax.random.fold_in(key, zlib.crc32(name.encode()))
            attacked = attack(logits_fn, images, labels, key=own_key)
            correct[name] = jnp.argmax(logits_fn(attacked), axis=-1) == labels
        return correct

    measure = make_measure(judge, batch_size=batch_size)

    def evaluate(
        variables: PyTree,
        split: Split,
        key: Array,
        *,
        on_batch: Callable[[int, int], None] = lambda *_: None,
    ) -> dict[str, np.ndarray]:
        outcome = measure(variables, split, key, on_batch=on_batch)
        return {name: outcome[name] for name in attacks}  # `jit` sorts dictionaries

    return evaluate


def accuracies(outcome: Mapping[str, np.ndarray]) -> dict[str, float]:
    """The percentage of examples classified rightly, by the attacks' names.

    >>> accuracies({"natural": np.array([True, True, False, True])})
    {'natural': 75.0}
    """
    return {name: 100 * float(np.mean(correct)) for name, correct in outcome.items()}
