"""Parity's file: what another framework must compute alike before it is timed."""

import dataclasses
import pathlib
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from samrobust.attacks.losses import cross_entropy
from samrobust.data import take_batch
from samrobust.experiments import building
from samrobust.studies.bench.images import make_dataset
from samrobust.studies.bench.programs import initial_carry
from samrobust.types import Array, Config, PyTree

__all__ = ["parity"]


class _Spec(Protocol):
    """The field of a worker's `Spec` that is needed."""

    path: str


def parity(config: Config, spec: _Spec) -> dict[str, Any]:
    """Writes weights, a batch and what they lead to, for another framework to repeat.

    Logits and the gradient of the summed loss in the images by batch statistics, and
    the parameters after one step of standard training; see
    `twin/reference.py` for the names. BatchNorm's parameters are moved
    so that no activation is near the kink of a ReLU: there rounding alone decides a
    gradient.
    """
    size = min(16, config.training.batch_size)
    dataset = make_dataset(config.data.name, size, 1)
    model = building.make_model(config, dataset)
    method = building.make_method(config, dataset, steps_per_epoch=1)
    state = initial_carry(method, config, dataset).state
    state = dataclasses.replace(state, params=_off_kinks(state.params))
    images, labels = take_batch(
        dataset.train.images, dataset.train.labels, np.arange(size), 0, size
    )

    def logits_fn(images: Array) -> Any:
        return model.apply(state.variables, images, train=True)

    def loss(images: Array) -> Array:
        return jnp.sum(cross_entropy(logits_fn(images), labels))

    with jax.default_matmul_precision("highest"):
        updated, _ = jax.jit(method.train_step)(
            state, images, labels, jax.random.key(1)
        )
        logits = jax.jit(logits_fn)(images)
        image_gradient = jax.jit(jax.grad(loss))(images)
    trees = {
        "params": state.params,
        "batch_stats": state.batch_stats,
        "updated": updated.params,
    }
    arrays = traverse_util.flatten_dict(trees, sep="/") | {
        "images": images,
        "labels": labels,
        "logits": logits,
        "image_gradient": image_gradient,
        **{
            name: config.training[name]
            for name in ("learning_rate", "momentum", "weight_decay")
        },
    }
    contents: Any = {name: np.asarray(array) for name, array in arrays.items()}
    np.savez(pathlib.Path(spec.path), **contents)
    return {
        "mean": dataset.mean,
        "std": dataset.std,
        "image_shape": dataset.image_shape,
        "num_classes": dataset.num_classes,
    }


def _off_kinks(params: PyTree) -> PyTree:
    """Every BatchNorm's scale at 0.3, its biases at 2 and -2 in turn."""

    def move(path: tuple[Any, ...], leaf: Array) -> Array:
        layer, name = path[-2].key, path[-1].key
        if not layer.startswith("norm"):
            return leaf
        signs = 1 - 2 * (jnp.arange(leaf.size) % 2)
        return jnp.full_like(leaf, 0.3) if name == "scale" else 2.0 * signs

    return jax.tree_util.tree_map_with_path(move, params)
