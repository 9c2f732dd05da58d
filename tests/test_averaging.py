"""Averages of weights, whatever the weights are."""

import dataclasses
import functools
from typing import Any

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

from samrobust.experiments import methods, scoring
from samrobust.experiments.run import train
from samrobust.experiments.scoring import make_after_epoch, make_judge
from samrobust.models import BatchNorm
from samrobust.training import InterruptedRunError, make_train_step
from samrobust.training.averaging.ema import ema, mix
from samrobust.training.averaging.fawa import fawa
from samrobust.training.averaging.generalist import generalist
from samrobust.training.averaging.swa import swa
from samrobust.training.state import TrainState

pytestmark = pytest.mark.usefixtures("programs_made_once")

KEY = jax.random.key(0)
IMAGES = jax.random.uniform(jax.random.key(1), (6, 2, 2, 1))
LABELS = jnp.arange(6, dtype=jnp.int32) % 3


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_a_long_memory_forgets_in_every_precision(dtype):
    """In bfloat16 a decay of 0.999 is 1, and changes of a thousandth round away."""
    averaging = ema(0.999)
    ones, zeros = ({"w": jnp.full(2, value, dtype)} for value in (1, 0))
    average = averaging.update(averaging.init(ones), ones, jnp.int32(0))
    for step in range(1, 200):
        average = averaging.update(average, zeros, jnp.int32(step))
    assert average["w"] == pytest.approx(0.999**199, rel=1e-4)
    assert average["w"].dtype == jnp.float32


def test_whole_numbers_are_copied():
    averaging = ema(0.9)
    average = averaging.init({"count": jnp.int32(1)})
    average = averaging.update(average, {"count": jnp.int32(7)}, jnp.int32(3))
    assert (int(average["count"]), average["count"].dtype) == (7, jnp.int32)


def draw(number):
    shapes = {"params": (3, 2), "batch_stats": (4,)}
    keys = jax.random.split(jax.random.key(number))
    named = zip(shapes, keys, strict=True)
    return {name: jax.random.normal(key, shapes[name]) for name, key in named}


def test_fawa_without_a_threshold_is_ema_of_the_epochs_bit_for_bit():
    plain, fair = ema(0.7), fawa(0.0, 0.7)
    functions: Any = (plain.update, fair.update, fair.admit)
    update, keep, admit = (jax.jit(function) for function in functions)
    average, admitted = plain.init(draw(0)), fair.init(draw(0))
    for step in range(5):
        average = update(average, draw(step), jnp.int32(step))
        admitted = admit(keep(admitted, draw(step), step), draw(step), jnp.float32(0))
        helpers.assert_same_bits({n: admitted[n] for n in average}, average)


def test_an_epoch_that_fails_a_class_leaves_the_average_as_it_was():
    averaging: Any = fawa(0.3, 0.5)
    first, second = draw(1), draw(2)
    average = averaging.admit(averaging.init(draw(0)), first, 0.5)
    helpers.assert_same_bits({n: average[n] for n in first}, first)
    same = averaging.admit(average, second, 0.29)
    helpers.assert_same_bits(averaging.update(same, second, 7), average)
    moved = averaging.admit(same, second, 0.3)
    expected = jax.tree.map(lambda a, b: (a + b) / 2, first, second)
    helpers.assert_close({n: moved[n] for n in first}, expected, atol=1e-7)


@pytest.mark.parametrize("value", [jnp.inf, jnp.nan])
def test_weights_that_are_not_finite_leave_no_trace_where_they_do_not_count(value):
    """Nothing times infinity is no number."""
    good, bad = jnp.ones(3), jnp.full(3, value)
    helpers.assert_same_bits(mix(good, bad, jnp.float32(1)), good)
    helpers.assert_same_bits(mix(bad, good, jnp.float32(0)), good)
    averaging: Any = fawa(0.3)
    average = averaging.admit(averaging.init({"w": good}), {"w": good}, 0.5)
    kept = averaging.admit(averaging.update(average, {"w": bad}, 1), {"w": bad}, 0.2)
    helpers.assert_same_bits(kept["w"], good)
    averaging = swa(0.0, steps_per_epoch=2, total_steps=4)
    average = averaging.update(averaging.init({"w": bad}), {"w": good}, jnp.int32(1))
    kept = averaging.update(average, {"w": bad}, jnp.int32(2))  # within an epoch
    helpers.assert_same_bits(kept["w"], good)


def test_before_an_epoch_is_over_swa_is_the_last_weights_even_if_none_ever_is():
    averaging = swa(0.0, steps_per_epoch=10, total_steps=5)
    average = averaging.init({"w": jnp.zeros(2)})
    for step in range(5):
        average = averaging.update(
            average, {"w": jnp.full(2, 1.0 * step)}, jnp.int32(step)
        )
    helpers.assert_same_bits(average["w"], jnp.full(2, 4.0))


class Small(nn.Module):
    """A linear network behind BatchNorm."""

    @nn.compact
    def __call__(self, images, *, train):
        flat = images.reshape(len(images), -1)
        return nn.Dense(3)(BatchNorm()(flat, train=train))


def away(logits_fn, images, labels, *, key):
    """Some other images."""
    del logits_fn, labels
    return jnp.clip(images + 0.3 * jax.random.normal(key, images.shape), 0, 1)


@functools.cache
def states_of(averaging=None, **options):
    """The states and metrics after each of six steps, two an epoch."""
    optimizer = optax.sgd(0.3, momentum=0.9)
    method = make_train_step(Small(), optimizer, averaging=averaging, **options)
    if averaging is not None:
        natural = make_train_step(Small(), optimizer, averaging=averaging)
        method = averaging.join(method, natural)
    step, found = jax.jit(method.train_step), []
    state = jax.jit(method.init)(KEY, IMAGES)
    for number in range(6):
        state, metrics = step(state, IMAGES, LABELS, jax.random.key(number))
        found.append((state, metrics))
    return found


def halved(state):
    """What an average may do with the verdict on an epoch."""
    average = jax.tree.map(lambda x: x / 2, state.average)
    return dataclasses.replace(state, average=average), {"worst_class": 0.0}


@pytest.mark.parametrize("after_epoch", [None, halved])
def test_the_log_says_how_far_the_average_is_from_the_weights(
    after_epoch, tmp_path, monkeypatch
):
    monkeypatch.setattr(scoring, "make_after_epoch", lambda *_: after_epoch)
    config = helpers.make_config("ema,decay=0.9", {"data.train_size": 64})
    outcome = train(config, helpers.load_data(config), tmp_path)
    pairs = [outcome.state.average["params"], outcome.state.params]
    average, weights = (
        np.concatenate([leaf.ravel() for leaf in jax.tree.leaves(x)]) for x in pairs
    )
    said = helpers.log_of(tmp_path)[-1]["average_distance"]
    assert said == pytest.approx(np.linalg.norm(average - weights), rel=1e-4)
    assert said > 0


@pytest.mark.parametrize("make", [swa, generalist])
def test_an_average_over_epochs_must_be_told_how_long_they_are(make):
    with pytest.raises(TypeError, match="'steps_per_epoch' and 'total_steps'"):
        make(0.5)


EPOCHS = {"steps_per_epoch": 2, "total_steps": 6}


@pytest.mark.parametrize(("share", "options"), [(1.0, {"adversary": away}), (0.0, {})])
def test_a_generalist_of_one_expert_is_its_method_bit_for_bit(share, options):
    """Also where both experts go on from the mixture."""
    often = {"decay": 0.0, "reset": 0.5, "every": 1}
    averaging = generalist(share, share, **often, **EPOCHS)
    found = states_of(averaging, adversary=away)
    for (state, _), (expected, _) in zip(found, states_of(**options), strict=True):
        helpers.assert_same_bits(state.eval_variables, expected.variables)


def test_until_they_go_on_from_the_mixture_experts_are_their_methods_bit_for_bit():
    averaging = generalist(0.4, reset=0.9, every=3, **EPOCHS)
    found = states_of(averaging, adversary=away)
    together = zip(found, states_of(adversary=away), states_of(), strict=True)
    for (state, metrics), robust, natural in list(together)[:4]:
        helpers.assert_same_bits(state.variables, robust[0].variables)
        helpers.assert_same_bits(
            state.average["natural"].variables, natural[0].variables
        )
        assert metrics["natural_loss"] == natural[1]["loss"]
        assert metrics["loss"] == robust[1]["loss"]
    last, _ = found[-1]
    helpers.assert_same_bits(last.variables, last.eval_variables)


FAIR = {
    "data.validation_size": 1,
    "data.split_seed": 4,
    "evaluation.batch_size": 1,
    "training.learning_rate": 0.5,
}


def test_a_stopped_run_remembers_which_epochs_were_admitted(tmp_path):
    config = helpers.make_config("fawa,threshold=0.5", FAIR)
    dataset, answers = helpers.load_data(config), iter([False] * 10)

    def follow(name, should_stop=lambda: False):
        options = {"validate": lambda _: {"score": 0.0}, "should_stop": should_stop}
        return train(config, dataset, tmp_path / name, **options)

    whole = follow("whole")
    with pytest.raises(InterruptedRunError):
        follow("stopped", lambda: next(answers, True))
    helpers.assert_same_bits(follow("stopped").state, whole.state)
    lines = helpers.log_of(tmp_path / "whole")
    assert lines == helpers.log_of(tmp_path / "stopped")
    worst = [line["validation_worst_class"] for line in lines]
    assert set(worst) == {0.0, 100.0}
    assert bool(whole.state.average["begun"])


def test_the_worst_class_is_that_of_the_trained_weights_on_held_out_images():
    config = helpers.make_config("fawa,threshold=0.5", {"data.validation_size": 40})
    dataset = helpers.load_data(config)
    variables = helpers.init_variables(helpers.make_model(config, dataset))
    average = fawa(0.5).init(variables)
    state = TrainState(jnp.int32(3), **variables, opt_state=(), average=average)
    judge, labels = make_judge(config, dataset), dataset.validation.labels
    after_epoch = make_after_epoch(judge, labels, fawa(0.5).admit)
    assert after_epoch is not None
    _, found = after_epoch(state)
    of_class = []
    for label in np.unique(dataset.validation.labels):
        chosen = dataset.validation.labels == label
        part = dataclasses.replace(
            dataset,
            test=dataclasses.replace(
                dataset.validation,
                images=dataset.validation.images[chosen],
                labels=dataset.validation.labels[chosen],
            ),
        )
        of_class.append(helpers.plain_accuracy(config, part, state.variables))
    assert found == {"worst_class": pytest.approx(min(of_class))}
    assert make_after_epoch(judge, labels, None) is None


def test_fawa_without_held_out_images_is_refused_before_any_work():
    message = r"Expected data\.validation_size > 0 with an average that epochs are"
    with pytest.raises(ValueError, match=message):
        helpers.make_config("at,norm=linf,eps=16+fawa,threshold=0.2")


def test_a_generalist_costs_a_pass_more():
    row = "at,norm=linf,eps=8+generalist,beta=0.4"
    config = helpers.make_config(row, {"attack.num_steps": 10})
    assert methods.cost(config) == pytest.approx(1 + 1 + 10 * 2 / 3)
    assert config.label == "AT (linf, eps = 8/255) + Generalist (beta = 0.4)"


BAD = {
    "threshold": (lambda: fawa(1.5), "threshold <= 1, got threshold=1.5"),
    "decay": (lambda: fawa(0.2, 1.0), "decay < 1, got decay=1"),
    "beta": (lambda: generalist(-0.1, **EPOCHS), "0 <= beta, got beta=-0.1"),
    "every": (lambda: generalist(0.4, every=0, **EPOCHS), "1 <= every, got every=0"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_an_average_cannot_mean_is_refused(name):
    make, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        make()
