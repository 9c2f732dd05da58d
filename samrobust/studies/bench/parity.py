"""The parity file: what another framework must compute alike before it is timed."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from samrobust.attacks.losses import cross_entropy
from samrobust.data import take_batch
from samrobust.experiments import building
from samrobust.experiments.robustbench import with_normalization
from samrobust.models.torch.names import to_tensors
from samrobust.models.torch.weights import Weights
from samrobust.studies.bench.programs import begin
from samrobust.types import Array, Config, PyTree

__all__ = ["parity"]


def parity(config: Config, path: str) -> dict[str, Any]:
    """Writes weights, a batch and what they lead to, for another framework to repeat.

    Logits and the gradient of the summed loss in the images by batch statistics, and
    the parameters after one step of standard training. Weights have the names and the
    layouts of PyTorch, see `samrobust.experiments.robustbench_model`.
    BatchNorm's parameters are moved so that no activation is near the kink of a ReLU:
    there rounding alone decides a gradient.
    """
    size = min(16, config.training.batch_size)
    dataset, method, carry = begin(config, size)
    model = building.make_model(config, dataset)
    state = dataclasses.replace(carry.state, params=_off_kinks(carry.state.params))
    train = dataset.train
    images, labels = take_batch(train.images, train.labels, np.arange(size), 0, size)

    def logits_fn(images: Array) -> Any:
        return model.apply(state.variables, images, train=True)

    def loss(images: Array) -> Array:
        return jnp.sum(cross_entropy(logits_fn(images), labels))

    with jax.default_matmul_precision("highest"):
        step, key = jax.jit(method.train_step), jax.random.key(1)
        updated, _ = step(state, images, labels, key)
        logits = jax.jit(logits_fn)(images)
        image_gradient = jax.jit(jax.grad(loss))(images)
    tensors = to_tensors(state.variables, model)
    moved = to_tensors({"params": updated.params}, model)
    section = config.model
    statistics = {n: section[n] or getattr(dataset, n) for n in ("mean", "std")}
    trees = {
        "network": with_normalization(Weights(tensors, statistics)),
        "updated": {f"model.{name}": tensor for name, tensor in moved.items()},
        "images": images,
        "labels": labels,
        "logits": logits,
        "image_gradient": image_gradient,
    }
    arrays: Any = traverse_util.flatten_dict(trees, sep="/")
    np.savez(path, **jax.device_get(arrays))
    return {}


def _off_kinks(params: PyTree) -> PyTree:
    """Returns every BatchNorm's scale at 0.3, its biases at 2 and -2 in turn."""

    def move(path: tuple[Any, ...], leaf: Array) -> Array:
        layer, name = path[-2].key, path[-1].key
        if not layer.startswith("norm"):
            return leaf
        signs = 1 - 2 * (jnp.arange(leaf.size) % 2)
        return jnp.full_like(leaf, 0.3) if name == "scale" else 2.0 * signs

    return jax.tree_util.tree_map_with_path(move, params)
