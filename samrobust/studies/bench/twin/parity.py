"""The gate before the timing: does the step compute what the other framework does?

The other framework's weights, images and results lie in a file of flat arrays; see
`parity`. Paths are Flax's, images there are [B, H, W, C].

Out of scope: SAM and attacks; the tests hold these to the oracles.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from samrobust.studies.bench.twin.network import PreActResNet, from_jax, to_jax
from samrobust.studies.bench.twin.spec import Spec, check
from samrobust.studies.bench.twin.steps import make_model, make_trainer

__all__ = [
    "TOLERANCES",
    "Arrays",
    "Batch",
    "check_deviations",
    "load_weights",
    "parity",
    "read_batch",
]

# Largest deviations that are allowed, relative to the largest value. Two frameworks
# are within 5e-6, unless rounding carries an activation over the kink of its ReLU: then
# an image gradient of PreActResNet-18 was seen to be off by 2e-3 and an update by
# 4e-5. So the weights of the file are to keep activations off the kinks, by scales of
# 0.3 and biases of -2 or 2 in batch normalisation. On an H200 they are within 1e-6.
TOLERANCES = {"logits": 1e-5, "image_gradient": 1e-4, "update": 1e-5}

Arrays = Mapping[str, np.ndarray]
Batch = tuple[np.ndarray, np.ndarray]  # float32 [B, C, H, W] and int64 [B]


def parity(spec: Spec, arrays: Arrays) -> dict[str, float]:
    """Deviations `max |a - b| / max |b|` of the variant's step, not compiled.

    Args:
      spec: method and precision are of no account: standard training in float32.
      arrays: `params/...` and `batch_stats/...` with Flax's paths; `images`
        [B, H, W, C] in [0, 1] and `labels` [B]; in train mode `logits` [B, K] and
        `image_gradient` [B, H, W, C] of the summed cross entropy; `updated/...`, the
        parameters after one step of SGD with the scalars `learning_rate`, `momentum`
        and `weight_decay`.

    Returns:
      The deviations of `logits`, `image_gradient` and `update`.
    """
    rates = {
        name: float(_get(arrays, name))
        for name in ("learning_rate", "momentum", "weight_decay")
    }
    plain = dataclasses.replace(spec, method="st", precision="float32", **rates)
    trainer = make_trainer(plain, load_weights(make_model(spec), arrays))
    images, labels = trainer.place(*map(torch.from_numpy, read_batch(spec, arrays)))
    with torch.no_grad():
        logits = trainer.loss(images, labels)[1].cpu().numpy()
    gradient = trainer.image_gradient(images, labels) * len(labels)
    trainer.step(images, labels)
    updated, expected = to_jax(trainer.model)["params"], _tree(arrays, "updated")
    return {
        "logits": _deviation("logits", logits, _get(arrays, "logits")),
        "image_gradient": _deviation(
            "image_gradient",
            gradient.permute(0, 2, 3, 1).cpu().numpy(),
            _get(arrays, "image_gradient"),
        ),
        "update": _deviation("updated", _flat(updated), _flat(expected)),
    }


def check_deviations(deviations: Mapping[str, float]) -> None:
    """Raises `ValueError` unless all deviations are within `TOLERANCES`."""
    limits = ", ".join(f"{name} <= {limit:g}" for name, limit in TOLERANCES.items())
    check(
        # A deviation that is NaN is none to be trusted.
        all(deviations[name] <= limit for name, limit in TOLERANCES.items()),
        f"deviations from the parity file {limits}",
        "The two frameworks do not compute the same thing, and are not timed.",
        **deviations,
    )


def _deviation(name: str, ours: np.ndarray, theirs: np.ndarray) -> float:
    check(
        ours.shape == theirs.shape,
        f"{name} of shape {ours.shape} in the parity file",
        shape=theirs.shape,
    )
    return float(np.max(np.abs(ours - theirs)) / np.max(np.abs(theirs)))


def _flat(tree: Any) -> np.ndarray:
    """All leaves of nested dictionaries in one array, sorted by their paths."""
    if not isinstance(tree, Mapping):
        return np.ravel(tree)
    return np.concatenate([np.empty(0), *(_flat(tree[key]) for key in sorted(tree))])


def _get(arrays: Arrays, name: str) -> np.ndarray:
    check(name in arrays, "all arrays of the parity file", missing=name)
    return arrays[name]


def _tree(arrays: Arrays, collection: str) -> dict[str, Any]:
    """`{"a/b/c": x}` as `{"b": {"c": x}}` for the names that begin with `a`."""
    tree: dict[str, Any] = {}
    for name, value in arrays.items():
        first, *path = name.split("/")
        if first == collection:
            node = tree
            for key in path[:-1]:
                node = node.setdefault(key, {})
            node[path[-1]] = value
    return tree


def load_weights(model: PreActResNet, arrays: Arrays) -> PreActResNet:
    """The model with the weights of the parity file."""
    names = ("params", "batch_stats")
    try:
        from_jax(model, {name: _tree(arrays, name) for name in names})
    except KeyError as error:
        raise ValueError(
            f"Expected the weights of the spec's network, got none for {error}. "
            "Write the parity file with the spec's width and blocks."
        ) from error
    return model


def read_batch(spec: Spec, arrays: Arrays) -> Batch:
    """The images and labels of the parity file, in PyTorch's layout and dtype."""
    images, labels = _get(arrays, "images"), _get(arrays, "labels")
    check(
        list(images.shape[1:]) == spec.image_shape,
        f"images of shape [B, *{spec.image_shape}] in the parity file",
        shape=images.shape,
    )
    planes = np.ascontiguousarray(images.transpose(0, 3, 1, 2), np.float32)
    return planes, labels.astype(np.int64)
