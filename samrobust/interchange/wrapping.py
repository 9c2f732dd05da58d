"""Networks that stand behind a layer which normalises the pixels, as PyTorch files do.

Robust networks are often saved together with it: as buffers `mean` and `std` beside a
network under `model.`, or as the first of a sequence, `0.mean` before `1.conv1.weight`.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from samrobust.checks import check

__all__ = ["Weights", "unwrapped"]

_HEAD = "linear.weight"  # the one tensor of this name, so it tells the prefix
_NAMES = {"mean": "mean", "mu": "mean", "std": "std", "sigma": "std"}
_TOLERANCE = 1e-6


@dataclasses.dataclass(frozen=True)
class Weights:
    """The content of a file.

    Attributes:
      tensors: arrays by PyTorch's names.
      metadata: some of `mean`, `std`, `num_classes`, `width` and `blocks`.
    """

    tensors: dict[str, np.ndarray]
    metadata: dict[str, Any]


def unwrapped(weights: Weights) -> Weights:
    """The network alone, by its own names; its normalisation in the metadata.

    What belongs to neither keeps its name, and is refused as superfluous where the
    tensors are taken.

    Raises:
      ValueError: if the metadata say otherwise.

    >>> tensors = {"0.mean": [0.5], "0.std": [0.25], "1.linear.weight": [[1.0]]}
    >>> arrays = {name: np.array(values) for name, values in tensors.items()}
    >>> unwrapped(Weights(arrays, {}))
    Weights(tensors={'linear.weight': array([[1.]])}, \
metadata={'mean': [0.5], 'std': [0.25]})
    """
    prefix = _prefix(weights.tensors)
    found = _normalisation(weights.tensors, prefix)
    used = {name for name, _ in found.values()}
    tensors = {
        name.removeprefix(prefix): tensor
        for name, tensor in weights.tensors.items()
        if name not in used
    }
    values = {kind: value for kind, (_, value) in found.items()}
    for kind, value in values.items():
        claimed = weights.metadata.get(kind, value)
        check(
            len(claimed) == len(value)
            and np.allclose(claimed, value, rtol=0, atol=_TOLERANCE),
            f"{kind}={value} as in the tensors",
            **{kind: claimed},
        )
    return Weights(tensors, {**values, **weights.metadata})


def _prefix(tensors: Mapping[str, np.ndarray]) -> str:
    """What stands before the names of the network; empty where that is not clear."""
    found = [
        name.removesuffix(_HEAD)
        for name in tensors
        if name == _HEAD or name.endswith("." + _HEAD)
    ]
    return found[0] if len(found) == 1 else ""


def _normalisation(
    tensors: Mapping[str, np.ndarray], prefix: str
) -> dict[str, tuple[str, list[float]]]:
    """Names and values of `mean` and `std`; both, or neither.

    Of several that could be meant, as those of BatchNorms never are, none is taken.
    """
    outside = [name for name in tensors if not (prefix and name.startswith(prefix))]
    found = [name for name in outside if name.rpartition(".")[2] in _NAMES]
    by_kind = {
        _NAMES[name.rpartition(".")[2]]: (name, tensors[name].reshape(-1).tolist())
        for name in found
    }
    return by_kind if len(found) == len(by_kind) == 2 else {}
