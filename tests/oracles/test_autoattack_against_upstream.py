"""The whole standard AutoAttack against the authors', on one trained network."""

import functools
import logging

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from samrobust.attacks import autoattack, cross_entropy, l2, linf
from samrobust.data import load_dataset
from samrobust.types import Array

torch = pytest.importorskip("torch")
upstream = pytest.importorskip("pyautoattack")

RADII = {"Linf": linf(0.06), "L2": l2(0.3)}
NUM_IMAGES = 100


def predict(weights: list[Array], images: Array) -> Array:
    return jnp.tanh(images.reshape(len(images), -1) @ weights[0]) @ weights[1]


@functools.cache
def trained():
    """Weights that fit the digits, and test images with their labels."""
    dataset = load_dataset("digits", test_size=NUM_IMAGES)
    images = jnp.asarray(dataset.train.images, jnp.float32) / 255
    labels = jnp.asarray(dataset.train.labels)
    rng = np.random.default_rng(0)
    weights = [
        jnp.asarray(rng.standard_normal(shape) / shape[0] ** 0.5, jnp.float32)
        for shape in ((64, 32), (32, 10))
    ]
    optimizer = optax.adam(0.01)

    @jax.jit
    def step(weights, state):
        def loss(weights):
            return jnp.mean(cross_entropy(predict(weights, images), labels))

        updates, state = optimizer.update(jax.grad(loss)(weights), state)
        return optax.apply_updates(weights, updates), state

    state = optimizer.init(weights)
    for _ in range(150):
        weights, state = step(weights, state)
    return weights, dataset.test.images.astype(np.float32) / 255, dataset.test.labels


@pytest.mark.parametrize("norm", list(RADII))
def test_robust_accuracy_is_upstreams_within_half_a_point(norm):
    weights, images, labels = trained()
    logits_fn = functools.partial(predict, weights)
    attack = functools.partial(autoattack(RADII[norm]), logits_fn)
    result = jax.jit(attack)(images, labels, key=jax.random.key(0))
    ours = np.asarray(jnp.argmax(logits_fn(result), axis=-1)) == labels

    w1, w2 = (torch.from_numpy(np.array(w)) for w in weights)

    def model(images):
        flat = images.permute(0, 2, 3, 1).reshape(len(images), -1)
        return torch.tanh(flat @ w1) @ w2

    logging.disable(logging.CRITICAL)
    try:
        theirs = upstream.AutoAttack(model, norm=norm, eps=RADII[norm].radius, seed=0)
        pixels = torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))
        truth = torch.from_numpy(labels.astype(np.int64))
        attacked, _ = theirs.run_standard_evaluation(pixels, truth, batch_size=100)
    finally:
        logging.disable(logging.NOTSET)
    with torch.no_grad():
        standing = (model(attacked).argmax(1) == truth).numpy()
    assert 0.1 < standing.mean() < 0.9
    # Half a point of so few images is none, but for one at the very edge of the ball.
    assert np.sum(ours != standing) <= 1
