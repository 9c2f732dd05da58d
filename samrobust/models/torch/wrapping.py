"""Networks behind a layer that normalizes the pixels, as in many PyTorch files.

Robust networks are often saved with that layer: as buffers `mean` and `std` next to a
network under `model.`, or as the first of a sequence, `0.mean` before `1.conv1.weight`.
An average of weights (`torch.optim.swa_utils.AveragedModel`) has an `n_averaged`, too.
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from samrobust.checks import check

__all__ = ["MOST_CHANNELS", "Weights", "first_of", "is_head", "listed", "unwrapped"]

MOST_CHANNELS = 16  # more than any image has
_HEAD = "linear.weight"  # the only tensor of this name: it reveals the prefix
_NAMES = {"mean": "mean", "mu": "mean", "std": "std", "sigma": "std"}
_AVERAGED = "n_averaged"
_TOLERANCE = 1e-6
_NAMED, _LENGTH = 8, 60  # names in a message, and characters of one


@dataclasses.dataclass(frozen=True)
class Weights:
    """The content of a file.

    Attributes:
      tensors: arrays by PyTorch's names.
      metadata: some of `mean`, `std`, `num_classes`, `width`, `blocks` and `origin`.
      notes: what was chosen, left out or rounded in reading, a sentence each.
    """

    tensors: dict[str, np.ndarray]
    metadata: dict[str, Any]
    notes: tuple[str, ...] = ()


def is_head(name: object) -> bool:
    """Tells the name of the last layer's weights, behind any prefix."""
    return isinstance(name, str) and f".{name}".endswith(f".{_HEAD}")


def listed(names: Iterable[object]) -> str:
    """Lists names out of a file in one line of readable length.

    >>> listed(["conv1.weight", 3, "x" * 80])[:40]
    'conv1.weight, 3, xxxxxxxxxxxxxxxxxxxxxxx'
    """
    return first_of([_readable(name) for name in names], _NAMED, ", ")


def first_of(texts: Sequence[str], most: int = 5, between: str = "; ") -> str:
    """Joins the first few texts, and says how many more there are.

    >>> first_of(["a", "b", "c"], most=2)
    'a; b; and 1 more'
    """
    more = [f"and {len(texts) - most} more"] if len(texts) > most else []
    return between.join([*texts[:most], *more])


def _readable(name: object) -> str:
    if isinstance(name, int) and abs(name) < 10**9:
        return str(name)
    if not isinstance(name, str):
        return f"a {type(name).__name__}"
    text = "".join(c if c.isprintable() else "?" for c in name[: _LENGTH + 1])
    return text if len(text) <= _LENGTH else f"{text[:_LENGTH]}..."


def unwrapped(weights: Weights) -> Weights:
    """Returns the network alone, by its own names, its normalization as metadata.

    Other tensors keep their names; `from_tensors` refuses them as superfluous.

    Raises:
      ValueError: if there is not one network, or the metadata say otherwise.

    >>> tensors = {"0.mean": [0.5], "0.std": [0.25], "1.linear.weight": [[1.0]]}
    >>> arrays = {name: np.array(values) for name, values in tensors.items()}
    >>> unwrapped(Weights(arrays, {}))
    Weights(tensors={'linear.weight': array([[1.]])}, \
metadata={'mean': [0.5], 'std': [0.25]}, notes=())
    """
    prefix = _prefix(weights.tensors)
    outside = {n: t for n, t in weights.tensors.items() if not n.startswith(prefix)}
    beside = outside if prefix else weights.tensors
    found = _normalization(beside)
    averaged = [n for n, t in beside.items() if _counts_averaged(n, t)]
    used = {name for name, _ in found.values()} | set(averaged)
    inside = {
        name.removeprefix(prefix): tensor
        for name, tensor in weights.tensors.items()
        if name not in outside and name not in used
    }
    left = {name: tensor for name, tensor in outside.items() if name not in used}
    twice = [name for name in left if name in inside]
    check(
        not twice,
        f"each tensor once, with the prefix {prefix!r} or without",
        "Save the network that is meant in a file of its own.",
        twice=listed(twice),
    )
    values = {kind: value for kind, (_, value) in found.items()}
    for kind, value in values.items():
        claimed = weights.metadata.get(kind, value)
        check(
            len(claimed) == len(value)
            and np.allclose(claimed, value, rtol=0, atol=_TOLERANCE),
            f"{kind}={value} as in the tensors",
            **{kind: claimed},
        )
    notes = [
        f"The weights are an average over {weights.tensors[name].item():g} networks "
        f"({name}); BatchNorm's statistics are the file's."
        for name in averaged
    ]
    return Weights(
        inside | left, {**values, **weights.metadata}, (*weights.notes, *notes)
    )


def _prefix(tensors: Mapping[str, np.ndarray]) -> str:
    """Returns the prefix of the network's names."""
    found = [name.removesuffix(_HEAD) for name in tensors if is_head(name)]
    check(
        len(found) > 0,
        f"a tensor {_HEAD}",
        "Is it a pre-activation ResNet, with the names of the paper's code?",
        names=listed(tensors),
    )
    check(
        len(found) == 1,
        "one network in the file",
        "Save the one that is meant in a file of its own.",
        behind=listed(prefix or "no prefix" for prefix in found),
    )
    return found[0]


def _counts_averaged(name: str, tensor: np.ndarray) -> bool:
    return name.rpartition(".")[2] == _AVERAGED and tensor.size == 1


def _normalization(
    tensors: Mapping[str, np.ndarray],
) -> dict[str, tuple[str, list[float]]]:
    """Finds names and values of `mean` and `std`; both, or neither.

    If there are several candidates (those of BatchNorms never are), it takes none.
    """
    found = [
        name
        for name, tensor in tensors.items()
        if name.rpartition(".")[2] in _NAMES and tensor.size <= MOST_CHANNELS
    ]
    by_kind = {
        _NAMES[name.rpartition(".")[2]]: (name, tensors[name].reshape(-1).tolist())
        for name in found
    }
    return by_kind if len(found) == len(by_kind) == 2 else {}
