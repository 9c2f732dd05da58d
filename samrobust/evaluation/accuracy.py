"""Natural and robust accuracy: every test example exactly once, whatever the batch.

The network is evaluated in inference mode (`model.apply(variables, images,
train=False)`), in its own precision. An example whose highest logit is NaN or infinite
counts as misclassified: a network with such logits on natural images is refused, and
those under attack are reported. Outputs that are probabilities draw a warning.

All evaluators have one signature (`Evaluator`) and return an `Outcome`.
"""

import dataclasses
import pathlib
import warnings
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from samrobust.attacks import identity
from samrobust.attacks.calls import warn_of_probabilities
from samrobust.attacks.losses import is_finite, normalized
from samrobust.checks import check
from samrobust.data import Split
from samrobust.evaluation.fates import Fates
from samrobust.evaluation.measure import (
    BatchFn,
    OnBatch,
    classifier,
    is_correct,
    make_measure,
    of_name,
)
from samrobust.system.distributed import is_primary
from samrobust.types import Array, Attack, PyTree

__all__ = [
    "Archive",
    "Evaluator",
    "Outcome",
    "check_finite",
    "conclude",
    "judge_by",
    "make_evaluator",
    "make_natural",
]


class Archive(NamedTuple):
    """A folder in which an evaluation stores the fate of every example.

    Attributes:
      folder: receives the files; made, in a directory that is there.
      examples: whether the adversarial images are stored too.
      provenance: of the caller, in JSON's types; stored with the outcome if this call
        contributes to it.
    """

    folder: pathlib.Path
    examples: bool = False
    provenance: dict[str, Any] | None = None


@dataclasses.dataclass(frozen=True)
class Outcome:
    """The verdict on a network, example by example, under every attack.

    Attributes:
      correct: by column, bool [N] in the order of the split: whether the example is
        classified correctly under the attack.
      non_finite: how many examples have a highest logit that is NaN or infinite under
        the attack, by column; columns without any are left out.
      fates: by column, which member of an ensemble broke which example; empty for
        other attacks.
    """

    correct: dict[str, np.ndarray]
    non_finite: dict[str, int]
    fates: Mapping[str, Fates] = dataclasses.field(default_factory=dict)

    @property
    def accuracy(self) -> dict[str, float]:
        """Returns the percentage of examples classified correctly, by column.

        >>> Outcome({"natural": np.array([True, True, False, True])}, {}).accuracy
        {'natural': 75.0}
        """
        return {name: 100 * float(np.mean(of)) for name, of in self.correct.items()}

    @property
    def ended_by(self) -> dict[str, dict[str, Any]]:
        """Returns the provenance of the call that finished each stored column."""
        return {
            c: own.provenance[-1] for c, own in self.fates.items() if own.provenance
        }

    @property
    def details(self) -> dict[str, Any]:
        """Returns the results besides the accuracies, in JSON's types.

        Of an ensemble, `autoattack`: by column, the accuracy after each member; of a
        stored column also its file, relative to the folder above its own, and the
        provenance of the call that began it.
        """
        found: dict[str, Any] = {}
        if self.non_finite:
            found["non_finite"] = self.non_finite
        if fates := self.fates.items():
            paths = {c: own.path for c, own in fates}
            found["autoattack"] = {
                "after_each": {c: own.after_each() for c, own in fates},
                "outcome": {
                    c: f"{p.parent.name}/{p.name}" for c, p in paths.items() if p
                },
                "begun_by": {
                    c: own.provenance[0] for c, own in fates if own.provenance
                },
            }
        return found


class Evaluator(Protocol):
    """A function that attacks a trained network on a whole split.

    It compiles once for splits of one size and may be called for many networks.
    """

    def __call__(
        self,
        variables: PyTree,
        split: Split,
        key: Array,
        *,
        archive: Archive | None = None,
        on_batch: OnBatch = lambda *_: None,
    ) -> Outcome:
        """Judges a network.

        Args:
          variables: of the network: whatever `model.apply` takes.
          split: N images and their labels.
          key: of all random numbers.
          archive: where an evaluation that can resume after a kill, as AutoAttack's,
            stores its progress; others start over and write nothing there.
          on_batch: called after every batch, and during one that takes long; may
            raise, and so end the evaluation.

        Returns:
          The outcome. **Guarantees.** Each example is judged exactly once. Its random
          numbers depend on the key, the column's name and the example's position in the
          split alone, so that its outcome depends neither on the batch nor on the
          devices, up to rounding.

        Raises:
          ValueError: if the split is empty, or the highest logit of an image as it is
            is NaN or infinite.
        """
        ...


def make_evaluator(
    model: nn.Module, attacks: Mapping[str, Attack], *, batch_size: int
) -> Evaluator:
    """Builds the evaluator that runs every attack to its end, in one pass over a split.

    Args:
      model: `apply(variables, images, train=False)` gives logits.
      attacks: by the names of the columns; `identity` gives natural accuracy.
      batch_size: as `make_measure` takes it.

    Raises:
      ValueError: if batch_size < 0.
    """
    measure = make_measure(judge_by(model, attacks), batch_size=batch_size)

    def evaluate(
        variables: PyTree,
        split: Split,
        key: Array,
        *,
        archive: Archive | None = None,
        on_batch: OnBatch = lambda *_: None,
    ) -> Outcome:
        del archive
        found = measure(variables, split, key, on_batch=on_batch)
        bad = {name: int(np.sum(~found[name][:, 1])) for name in attacks}
        for name, attack in attacks.items():
            if attack is identity:
                check_finite(bad.pop(name), len(split))
                if is_primary():
                    warn_of_probabilities(found[name][:, 2])
        correct = {name: found[name][:, 0] for name in attacks}  # in their order
        return conclude(correct, bad)

    return evaluate


def judge_by(model: nn.Module, attacks: Mapping[str, Attack]) -> BatchFn:
    """Builds the verdict on a batch under every attack, by its name, bool [B, 3].

    Of each example: it is classified correctly, its logits are finite, and they are
    probabilities.
    """

    def judge(
        variables: PyTree, images: Array, labels: Array, *, key: Array
    ) -> dict[str, Array]:
        logits_fn = classifier(model, variables)
        found = {}
        for name, attack in attacks.items():
            attacked = attack(logits_fn, images, labels, key=of_name(key, name))
            logits = logits_fn(attacked)
            verdict = is_correct(logits, labels), is_finite(logits), normalized(logits)
            found[name] = jnp.stack(verdict, axis=-1)
        return found

    return judge


def make_natural(
    model: nn.Module, *, batch_size: int
) -> Callable[[PyTree, Split, Array, OnBatch], np.ndarray]:
    """Builds the evaluator of natural images, with which the others begin.

    Returns:
      `is_right(variables, split, key, on_batch) -> bool [N]`, which reports to
      `on_batch` that nothing is done yet.
    """
    evaluate = make_evaluator(model, {"natural": identity}, batch_size=batch_size)

    def is_right(
        variables: PyTree, split: Split, key: Array, on_batch: OnBatch
    ) -> np.ndarray:
        def tell(*_: Any) -> None:
            on_batch(0, len(split), "natural")

        return evaluate(variables, split, key, on_batch=tell).correct["natural"]

    return is_right


def conclude(
    correct: dict[str, np.ndarray],
    non_finite: Mapping[str, int],
    fates: Mapping[str, Fates] | None = None,
) -> Outcome:
    """Builds an outcome, and warns where the highest logit is NaN or infinite."""
    counts = {name: count for name, count in non_finite.items() if count}
    if counts and is_primary():
        told = ", ".join(f"{count} under {name}" for name, count in counts.items())
        warnings.warn(
            f"The highest logit is NaN or infinite on adversarial images ({told}). "
            "They count as misclassified.",
            stacklevel=3,
        )
    return Outcome(correct, counts, fates or {})


def check_finite(non_finite: int, num_examples: int) -> None:
    """Refuses a network whose highest logit of a natural image is NaN or infinite."""
    check(
        non_finite == 0,
        "a network with finite logits",
        "NaN or infinity is no prediction: there is no accuracy to report. Its weights "
        "are broken, as by a training that diverged, or its numbers overflow.",
        images_without=non_finite,
        num_images=num_examples,
    )
