"""The parts of a method in one step: what each is given, and what it leaves."""

from typing import Any

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

from samrobust.attacks import linf, noise
from samrobust.attacks.losses import cross_entropy
from samrobust.data import Split
from samrobust.models import BatchNorm
from samrobust.sharpness import sam
from samrobust.training import (
    Adversary,
    InterruptedRunError,
    Objective,
    fit,
    make_train_step,
)
from samrobust.training.averaging.ema import ema
from samrobust.training.log import RunFolder
from samrobust.training.objectives.mart import mart_loss
from samrobust.training.objectives.trades import kl_divergence, kl_pgd, trades_loss

KEY = jax.random.key(0)
RNG = np.random.default_rng(1)
IMAGES: Any = RNG.uniform(size=(8, 2, 2, 1)).astype(np.float32)
LABELS: Any = np.arange(8, dtype=np.int32) % 3
DELTA = (0.1 * RNG.standard_normal(IMAGES.shape)).astype(np.float32)


class Network(nn.Module):
    """A hidden layer, and BatchNorm where that is wanted."""

    normalizes: bool = False

    @nn.compact
    def __call__(self, images, *, train):
        hidden = nn.Dense(4)(images.reshape(len(images), -1))
        if self.normalizes:
            hidden = BatchNorm(batch_norm_group=4)(hidden, train=train)
        return nn.Dense(3)(jnp.tanh(hidden))


def remembers(learns: bool = True) -> Adversary:
    """Moves images by what it remembers, and keeps what it is taught."""

    def perturb(logits_fn, images, labels, state, *, key):
        del logits_fn, labels, key
        return images + state["delta"], state | {"calls": state["calls"] + 1}

    def learn(state, images, labels, gradients, correct):
        return state | {
            "images": images,
            "labels": labels,
            "gradients": gradients,
            "correct": correct,
        }

    def init(images):
        empty = {name: jnp.zeros_like(images) for name in ("images", "gradients")}
        zeros = jnp.zeros(len(images), jnp.int32)
        return {
            "delta": DELTA,
            "calls": jnp.zeros([], jnp.int32),
            "labels": zeros,
            "correct": zeros > 0,
            **empty,
        }

    return Adversary(perturb, init, learn if learns else None)


@pytest.mark.parametrize("group_size", [0, 4])
def test_an_adversary_learns_from_the_first_pass(group_size):
    model = Network()
    tx = optax.chain(sam(0.1, aux={}, grouped=group_size > 0), optax.sgd(0.1))
    init, step = make_train_step(
        model, tx, adversary=remembers(), group_size=group_size
    )
    state = init(KEY, IMAGES)

    def loss(images):
        logits: Any = model.apply(state.variables, images, train=True)
        return jnp.mean(cross_entropy(logits, LABELS)), logits

    gradients, logits = jax.jit(jax.grad(loss, has_aux=True))(IMAGES + DELTA)
    after, metrics = jax.jit(step)(state, IMAGES, LABELS, KEY)
    learned = after.adversary
    assert int(learned["calls"]) == 1
    np.testing.assert_array_equal(learned["images"], IMAGES + DELTA)
    np.testing.assert_array_equal(learned["labels"], LABELS)
    np.testing.assert_allclose(learned["gradients"], gradients, atol=1e-7)
    correct = np.argmax(logits, -1) == LABELS
    np.testing.assert_array_equal(learned["correct"], correct)
    assert float(metrics["accuracy"]) == pytest.approx(correct.mean())


def test_images_are_differentiated_for_those_who_learn_alone():
    def flops(learns):
        init, step = make_train_step(
            Network(), optax.sgd(0.1), adversary=remembers(learns)
        )
        state = init(KEY, IMAGES)
        return len(str(jax.make_jaxpr(step)(state, IMAGES, LABELS, KEY)))

    assert flops(True) > flops(False)


def test_running_statistics_see_the_views_in_their_order():
    model = Network(normalizes=True)
    views = ("natural", "adversarial", "natural")

    def loss(natural, adversarial, again, labels):
        return cross_entropy(natural + adversarial + again, labels)

    init, step = make_train_step(
        model,
        optax.sgd(0.1),
        adversary=remembers(),
        objective=Objective(loss, views),
    )
    state = init(KEY, IMAGES)
    after, _ = jax.jit(step)(state, IMAGES, LABELS, KEY)
    variables, images = state.variables, {"natural": IMAGES}
    images["adversarial"] = IMAGES + DELTA

    @jax.jit
    def updated(variables, images):
        return model.apply(variables, images, train=True, mutable=["batch_stats"])[1]

    for view in views:
        variables = {**variables, **updated(variables, images[view])}
    helpers.assert_close(after.batch_stats, variables["batch_stats"], atol=1e-6)


def test_a_view_that_stands_twice_is_computed_once():
    def operations(views):
        def loss(*logits_and_labels):
            *logits, labels = logits_and_labels
            return jnp.sum(jnp.stack([cross_entropy(z, labels) for z in logits]), 0)

        init, step = make_train_step(
            *(Network(normalizes=True), optax.sgd(0.1)),
            adversary=noise(linf(0.1)),
            objective=Objective(loss, views),
        )
        arguments = (init(KEY, IMAGES), IMAGES, LABELS, KEY)
        program: Any = jax.jit(step).lower(*arguments).compile()
        return program.cost_analysis()["flops"]

    with helpers.usual_compilation():
        once = operations(("natural",))
        assert operations(("natural", "adversarial")) > 1.5 * once
        assert operations(("natural", "natural")) < 1.1 * once


def test_an_objective_that_compares_needs_an_adversary():
    with pytest.raises(ValueError, match="an adversary for an objective that"):
        make_train_step(Network(), optax.sgd(0.1), objective=trades_loss(6.0))


def test_the_logits_of_a_method_are_those_of_the_network_as_it_is_evaluated():
    method = make_train_step(Network(), optax.sgd(0.5), averaging=ema(0.75))
    init, step = method
    state = init(KEY, IMAGES)
    for _ in range(2):
        state, _ = jax.jit(step)(state, IMAGES, LABELS, KEY)
    found = method.logits(state, IMAGES)
    expected = Network().apply(state.eval_variables, IMAGES, train=False)
    np.testing.assert_array_equal(found, expected)
    assert np.any(found != Network().apply(state.variables, IMAGES, train=False))


@pytest.mark.parametrize(
    ("labels", "message"),
    [(LABELS + 2, r"labels in 0\.\.2, got labels=\[3"), (LABELS - 1, "0 <= labels")],
)
def test_labels_that_the_network_has_no_logit_for_are_refused(labels, message):
    images = np.asarray(255 * IMAGES).astype(np.uint8)
    method = make_train_step(Network(), optax.sgd(0.1))
    options: Any = {"epochs": 1, "batch_size": len(images), "key": KEY}
    with pytest.raises(ValueError, match=f"^Expected {message}"):
        fit(method, Split(images, np.asarray(labels)), **options)
    with pytest.raises(ValueError, match=r"^Expected a samrobust\.data\.Split"):
        fit(method, (images, np.asarray(LABELS)), **options)  # pyright: ignore


def test_without_a_log_nothing_is_said_to_be_saved():
    images = np.asarray(255 * IMAGES).astype(np.uint8)
    method = make_train_step(Network(), optax.sgd(0.1))
    options: Any = {"epochs": 2, "batch_size": 8, "key": KEY}
    with pytest.raises(
        InterruptedRunError, match=r"^Stopped at step 1 of 2; it had no"
    ):
        fit(method, Split(images, LABELS), should_stop=lambda: True, **options)


def test_a_state_that_no_checkpoint_can_keep_is_refused_before_any_step(tmp_path):
    images = np.asarray(255 * IMAGES).astype(np.uint8)
    method = make_train_step(Network(), optax.noisy_sgd(0.1, key=0))
    options: Any = {"epochs": 1, "batch_size": 8, "key": KEY}
    with pytest.raises(ValueError, match=r"no typed PRNG key.*rng_key"):
        fit(method, Split(images, LABELS), log=RunFolder(tmp_path), **options)
    fit(method, Split(images, LABELS), **options)


def test_weights_in_64_bits_are_refused_by_name():
    class Wide(nn.Module):
        @nn.compact
        def __call__(self, images, *, train):
            del train
            flat = images.reshape(len(images), -1)
            return nn.Dense(3, param_dtype=jnp.float64)(flat)

    images = np.asarray(255 * IMAGES).astype(np.uint8)
    options: Any = {"epochs": 1, "batch_size": 8, "key": KEY}
    wanted = r"at most 32 bits, got params\['Dense_0'\]\['bias'\]='float64'"
    with jax.enable_x64(True), pytest.raises(ValueError, match=wanted):
        fit(make_train_step(Wide(), optax.sgd(0.1)), Split(images, LABELS), **options)


@pytest.mark.parametrize("dtype", [np.uint8, np.int64])
def test_labels_may_be_of_any_integer_type(dtype):
    images = np.asarray(255 * IMAGES).astype(np.uint8)
    method = make_train_step(Network(), optax.sgd(0.1))
    options: Any = {"epochs": 1, "batch_size": len(images), "key": KEY}
    found, expected = (
        fit(method, Split(images, np.asarray(LABELS, kind)), **options).state.params
        for kind in (dtype, np.int32)
    )
    helpers.assert_same_bits(found, expected)


def test_accuracy_is_that_of_the_images_under_attack():
    def loss(natural, adversarial, again, labels):
        del adversarial, again
        return cross_entropy(natural, labels)

    def perturb(logits_fn, images, labels, state, *, key):
        del logits_fn, labels, key
        return jnp.zeros_like(images), state

    init, step = make_train_step(
        Network(),
        optax.sgd(0.1),
        adversary=Adversary(perturb),
        objective=Objective(loss, ("natural", "adversarial", "natural")),
    )
    _, metrics = jax.jit(step)(init(KEY, IMAGES), IMAGES, LABELS, KEY)
    # All images are alike under this attack: those of one class are right.
    assert float(metrics["accuracy"]) in (2 / 8, 3 / 8)


def test_an_average_is_of_all_variables_and_is_what_is_evaluated():
    model = Network(normalizes=True)
    init, step = make_train_step(model, optax.sgd(0.5), averaging=ema(0.75))
    state = init(KEY, IMAGES)
    trained = []
    for number in range(3):
        state, _ = jax.jit(step)(state, IMAGES, LABELS, jax.random.key(number))
        trained.append(state.variables)
    expected = trained[0]
    for variables in trained[1:]:
        expected = jax.tree.map(lambda a, w: 0.75 * a + 0.25 * w, expected, variables)
    helpers.assert_close(state.eval_variables, expected, atol=1e-6)
    assert state.eval_variables.keys() == {"params", "batch_stats"}


@pytest.mark.parametrize("name", ["adam", "adamw", "lion", "rmsprop", "adafactor"])
def test_any_optax_optimizer_trains(name):
    init, step = make_train_step(Network(), getattr(optax, name)(1e-2))
    state = init(KEY, IMAGES)
    losses = []
    for number in range(5):
        state, metrics = jax.jit(step)(state, IMAGES, LABELS, jax.random.key(number))
        losses.append(float(metrics["loss"]))
    assert losses[-1] < losses[0]


def test_the_attack_of_trades_stays_in_its_set_and_raises_the_divergence():
    model = Network()
    variables = model.init(KEY, IMAGES, train=False)
    attack = kl_pgd(linf(0.05), step_size=0.02, num_steps=5)

    def logits_fn(images: Any) -> Any:
        return model.apply(variables, images, train=False)

    attacked = jax.jit(lambda key: attack(logits_fn, IMAGES, LABELS, key=key))(KEY)
    assert float(jnp.max(jnp.abs(attacked - IMAGES))) <= 0.05 + 1e-6
    assert float(jnp.min(attacked)) >= 0
    assert float(jnp.max(attacked)) <= 1
    found = kl_divergence(logits_fn(IMAGES), logits_fn(attacked))
    corner = jnp.clip(IMAGES + 0.05 * jnp.sign(attacked - IMAGES), 0, 1)
    # On so smooth a network a corner of the ball is the worst there is.
    expected = kl_divergence(logits_fn(IMAGES), logits_fn(corner))
    np.testing.assert_allclose(found, expected, rtol=0.2)
    assert float(jnp.min(found)) > 0


@pytest.mark.parametrize("objective", [trades_loss(2.0), mart_loss(2.0)])
def test_a_class_that_the_network_rules_out_plays_no_part(objective):
    def mean(logits: Any, ruled_out: Any) -> Any:
        views = [jnp.concatenate([z, ruled_out], axis=-1) for z in logits]
        views = (*views, views[0])[: len(objective.views)]
        return jnp.mean(objective.loss(*views, jnp.array([0, 1])))

    logits = jax.random.normal(KEY, (2, 2, 3))
    none, one = (np.full([2, n], -np.inf, np.float32) for n in (0, 1))
    measure = jax.jit(jax.value_and_grad(mean))
    found, expected = (measure(logits, z) for z in (one, none))
    helpers.assert_close(found, expected, atol=1e-6)


BAD = {
    "beta": (lambda: trades_loss(-1.0), "0 <= beta, got beta=-1"),
    "decay": (lambda: ema(1.0), "decay < 1, got decay=1"),
    "view": (
        lambda: make_train_step(
            Network(), optax.sgd(0.1), objective=Objective(cross_entropy, ("hard",))
        ),
        "view in {natural, adversarial}, got view='hard'",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_what_a_part_cannot_mean_is_refused(name):
    make, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        make()
