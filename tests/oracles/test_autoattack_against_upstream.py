"""The whole standard AutoAttack against the authors', on one trained network."""

import argparse
import functools
import logging

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from samrobust.attacks import autoattack, cross_entropy, identity, l2, linf
from samrobust.data import load_dataset
from samrobust.evaluation import make_evaluator
from samrobust.experiments import building, configuration
from samrobust.experiments.networks import save_variables
from samrobust.experiments.workdir import settle_config
from samrobust.types import Array

torch = pytest.importorskip("torch")
upstream = pytest.importorskip("pyautoattack")
study = pytest.importorskip("samrobust.studies.autoattack_upstream")

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


def test_the_study_shows_both_attacks_the_network_and_the_images_of_a_run(
    tmp_path, monkeypatch
):
    small = ("width=2", "blocks=(1,)", "mean=(0.2,)", "std=(0.5,)")
    overrides = [f"--config.model.{field}" for field in small]
    config = configuration.load_config("digits:st", overrides)
    facts = building.load_facts(config)
    model = building.make_model(config, facts)
    variables = helpers.draw_variables(model, facts.image_shape, 0)
    settle_config(tmp_path, config)
    save_variables(config, facts, tmp_path, variables)

    def make_fake(model, attacks, *, batch_size):
        unattacked = {"natural": identity, **dict.fromkeys(attacks, identity)}
        return make_evaluator(model, unattacked, batch_size=batch_size)

    def judge(model, split, *_):
        pixels = split.images.transpose(0, 3, 1, 2).astype(np.float32) / 255
        with torch.no_grad():
            return (model(torch.from_numpy(pixels)).argmax(1).numpy()) == split.labels

    monkeypatch.setattr(study, "make_autoattack_evaluator", make_fake)
    monkeypatch.setattr(study, "_upstream", judge)
    flags = {"norm": "linf", "epsilon": 1.0, "num_examples": 40, "batch_size": 40}
    (ours, _), (theirs, _) = (
        side(tmp_path, argparse.Namespace(**flags))
        for side in (study._ours, study._theirs)
    )
    assert 0 < ours.sum() < 40
    np.testing.assert_array_equal(ours, theirs)
