"""The losses against SciPy, in float64, and their documented properties."""

import hypothesis
import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import in_one_program
from scipy import special

from samrobust.attacks.losses import LOSSES, cross_entropy, dlr, margin, targeted_dlr
from samrobust.training.objectives.label_smoothing import label_smoothing
from samrobust.training.objectives.mart import mart_loss
from samrobust.training.objectives.trades import kl_divergence, trades_loss

settings = hypothesis.settings(max_examples=40, deadline=None, derandomize=True)
logits_and_labels = st.tuples(
    hnp.arrays(np.float32, (4, 3), elements=st.floats(-80, 80, width=32)),
    hnp.arrays(np.int32, 4, elements=st.integers(0, 2)),
)
compiled = {name: jax.jit(loss) for name, loss in LOSSES.items()}


def gradient(loss, logits, labels):
    """Of the sum of the losses, with respect to the logits."""
    return in_one_program(jax.grad(lambda z: jnp.sum(loss(z, labels))), logits)


def reference(name, logits, labels):
    logits = np.asarray(logits, np.float64)
    rows = np.arange(len(labels))
    of_label = logits[rows, labels]
    if name == "cross_entropy":
        return np.asarray(special.logsumexp(logits, axis=-1)) - of_label
    others = logits.copy()
    others[rows, labels] = -np.inf
    return others.max(-1) - of_label


@pytest.mark.parametrize("name", LOSSES)
@hypothesis.given(case=logits_and_labels)
@settings
def test_the_losses_are_those_of_scipy(name, case):
    logits, labels = case
    np.testing.assert_allclose(
        compiled[name](logits, labels),
        reference(name, logits, labels),
        rtol=1e-6,
        atol=3e-5,
    )


@hypothesis.given(case=logits_and_labels)
@settings
def test_the_cross_entropy_is_not_negative(case):
    logits, labels = case
    assert np.all(compiled["cross_entropy"](logits, labels) >= 0)


@hypothesis.given(case=logits_and_labels)
@settings
def test_the_margin_is_positive_only_where_the_example_is_misclassified(case):
    logits, labels = case
    losses = np.asarray(compiled["margin"](logits, labels))
    wrong = logits.argmax(-1) != labels
    assert np.all(wrong[losses > 0])
    assert not np.any(wrong[losses < 0])


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_the_losses_are_float32_and_exact_for_the_logits_given(name, dtype):
    logits = jax.random.normal(jax.random.key(0), [16, 5]).astype(dtype) * 3
    labels = np.arange(16) % 5
    losses = compiled[name](logits, labels)
    assert losses.shape == (16,)
    assert losses.dtype == jnp.float32
    np.testing.assert_allclose(
        losses, reference(name, logits.astype(jnp.float32), labels), rtol=1e-5
    )


@pytest.mark.parametrize("name", LOSSES)
def test_the_losses_do_not_change_when_all_logits_shift(name):
    logits = np.arange(12, dtype=np.float32).reshape(3, 4) % 5
    labels = np.array([0, 1, 2])
    shifted = compiled[name](logits + 64, labels)
    np.testing.assert_allclose(compiled[name](logits, labels), shifted, rtol=5e-6)


def test_a_small_cross_entropy_is_exact_however_large_the_logits_are():
    logits = np.array([[20, 5, 4, 3], [25, 9.5, 0, 0], [0, -12, -13, -14]], np.float32)
    labels = np.zeros(3, np.int32)
    exact = reference("cross_entropy", logits.astype(np.float64), labels)
    for shift in (0, 32, 4096):
        found = compiled["cross_entropy"](logits + np.float32(shift), labels)
        np.testing.assert_allclose(found, exact, rtol=0, atol=1.2e-7)  # of 1, a unit


@pytest.mark.parametrize("name", LOSSES)
def test_the_losses_and_their_gradients_are_finite_for_huge_logits(name):
    logits = np.array([[1e30, -1e30, 0.0], [0.0, 3e4, -3e4]], np.float32)
    labels = np.array([1, 0])
    assert np.all(np.isfinite(compiled[name](logits, labels)))
    assert np.all(np.isfinite(gradient(LOSSES[name], logits, labels)))


def test_the_gradient_of_the_cross_entropy_is_softmax_minus_one_hot():
    logits = jax.random.normal(jax.random.key(1), [6, 4]) * 2
    labels = np.arange(6) % 4
    found = gradient(cross_entropy, logits, labels)
    expected = special.softmax(np.asarray(logits, np.float64), -1) - np.eye(4)[labels]
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_the_gradient_of_the_margin_does_not_vanish_where_the_classifier_is_sure():
    logits, labels = np.array([[200.0, 0.0, 1.0]], np.float32), np.array([0])
    expected = [[-1.0, 0.0, 1.0]]
    np.testing.assert_array_equal(gradient(margin, logits, labels), expected)
    assert np.abs(gradient(cross_entropy, logits, labels)).max() < 1e-30


@pytest.mark.parametrize("name", LOSSES)
def test_jit_does_not_change_the_losses(name):
    logits = jax.random.normal(jax.random.key(2), [8, 3])
    labels = jnp.arange(8) % 3
    np.testing.assert_allclose(
        compiled[name](logits, labels), LOSSES[name](logits, labels), rtol=1e-6
    )


def sorted_dlr(logits, labels, targets=None):
    """The formulas, by a sort in float64."""
    logits = np.asarray(logits, np.float64)
    rows, top = np.arange(len(labels)), np.sort(logits)[:, ::-1]
    if targets is not None:
        scale = top[:, 0] - (top[:, 2] + top[:, 3]) / 2
        return (logits[rows, targets] - logits[rows, labels]) / (scale + 1e-12)
    others = logits.copy()
    others[rows, labels] = -np.inf
    rise = others.max(-1) - logits[rows, labels]
    return rise / (top[:, 0] - top[:, 2] + 1e-12)


@pytest.mark.parametrize("num_classes", [4, 10])
def test_the_dlr_losses_are_those_of_a_sort(num_classes):
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 5, [40, num_classes]).astype(np.float32)
    labels, targets = rng.integers(0, num_classes, [2, 40])
    np.testing.assert_allclose(
        jax.jit(dlr)(logits, labels),
        sorted_dlr(logits, labels),
        rtol=1e-5,
    )
    np.testing.assert_allclose(
        jax.jit(targeted_dlr)(logits, labels, targets),
        sorted_dlr(logits, labels, targets),
        rtol=1e-5,
        atol=1e-6,
    )


def test_the_dlr_losses_stay_and_their_gradients_are_finite_where_logits_tie():
    logits, labels, targets = jnp.zeros([1, 4]), jnp.array([1]), jnp.array([2])
    assert dlr(logits, labels)[0] == targeted_dlr(logits, labels, targets)[0] == 0
    assert np.all(np.isfinite(gradient(dlr, logits, labels)))


def test_a_classifier_cannot_hide_from_the_dlr_losses_by_its_scale():
    logits = jax.random.normal(jax.random.key(3), [6, 5])
    labels, targets = np.arange(6) % 5, np.arange(6) % 4
    far = logits * 1000 + 7
    losses, targeted = jax.jit(dlr), jax.jit(targeted_dlr)
    np.testing.assert_allclose(losses(far, labels), losses(logits, labels), rtol=1e-4)
    np.testing.assert_allclose(
        targeted(far, labels, targets),
        targeted(logits, labels, targets),
        rtol=1e-4,
        atol=1e-6,
    )


def test_the_dlr_losses_refuse_too_few_classes():
    labels = jnp.array([0])
    with pytest.raises(ValueError, match="3 classes for the DLR loss, got classes=2"):
        dlr(jnp.zeros([1, 2]), labels)
    with pytest.raises(ValueError, match=r"4 classes for the targeted.*got classes=3"):
        targeted_dlr(jnp.zeros([1, 3]), labels, labels)


# Objectives of training


def numpy_objectives(natural, adversarial, labels):
    """Label smoothing by 0.2, MART of beta 5 and TRADES of beta 6, in float64."""
    log_p, log_q = (
        special.log_softmax(np.asarray(logits, np.float64), -1)
        for logits in (natural, adversarial)
    )
    chosen = np.arange(len(labels)), labels
    divergence = np.sum(np.exp(log_p) * (log_p - log_q), -1)
    others = np.exp(log_q)
    others[chosen] = 0
    boosted = -log_q[chosen] - np.log(1.0001 - others.max(-1))
    unsure = 1.0000001 - np.exp(log_p[chosen])
    return {
        "label smoothing": -0.8 * log_p[chosen] - 0.2 * log_p.mean(-1),
        "MART": boosted + 5 * divergence * unsure,
        "TRADES": -log_p[chosen] + 6 * divergence,
    }


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_the_objectives_are_float32_and_exact_for_the_logits_given(dtype):
    keys = jax.random.split(jax.random.key(0))
    one, other = ((3 * jax.random.normal(k, [16, 5])).astype(dtype) for k in keys)
    labels = np.arange(16) % 5
    found = {
        "label smoothing": label_smoothing(0.2).loss(one, labels),
        "MART": mart_loss(5.0).loss(one, other, labels),
        "TRADES": trades_loss(6.0).loss(one, other, one, labels),
    }
    for name, expected in numpy_objectives(one, other, labels).items():
        assert found[name].dtype == jnp.float32
        np.testing.assert_allclose(found[name], expected, rtol=2e-5, err_msg=name)


def test_classes_without_a_logit_have_no_part_in_the_divergence():
    natural, adversarial = np.array([[1.0, 0.0, 2.0]]), np.array([[0.0, 0.0, 0.5]])
    masked = [
        jnp.insert(jnp.asarray(logits, jnp.float32), 1, -jnp.inf, axis=1)
        for logits in (natural, adversarial)
    ]
    p, q = (special.softmax(logits, -1) for logits in (natural, adversarial))
    found, slope = jax.value_and_grad(lambda z: kl_divergence(masked[0], z)[0])(
        masked[1]
    )
    np.testing.assert_allclose(found, np.sum(p * np.log(p / q)), rtol=1e-6)
    np.testing.assert_allclose(slope, np.insert(q - p, 1, 0, axis=1), atol=1e-6)
