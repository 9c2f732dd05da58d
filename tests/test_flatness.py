"""Flatness, confidence and margin, held against closed forms and dense Hessians."""

import functools
import math
from typing import Any

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
import scipy.special
from helpers import in_one_program
from jax.flatten_util import ravel_pytree

from samrobust.attacks import (
    boundary_distance,
    cross_entropy,
    fab_minimal,
    input_gradient_norm,
    l2,
    linf,
    local_linearity_error,
    margin,
)
from samrobust.models import PreActResNet
from samrobust.sharpness.measures import (
    average_sharpness,
    hessian_eigenvalues,
    hessian_trace,
    logit_gap,
    logit_norm,
    relative_flatness,
    worst_case_sharpness,
)

KEY = jax.random.key(3)
RNG = np.random.default_rng(0)


@pytest.fixture(autouse=True, scope="module")
def _float64():
    with jax.enable_x64(True):
        yield


@pytest.mark.parametrize("scale", [1e-150, 1.0, 1e150])
def test_no_scale_of_a_hessian_is_lost(scale):
    values = jnp.array([1.0, 2.0, 5.0])
    loss = lambda w: scale * jnp.sum(values * w**2) / 2  # noqa: E731
    found = in_one_program(hessian_eigenvalues, loss, jnp.ones(3), key=KEY)
    np.testing.assert_allclose(found, scale * values, rtol=1e-9)


def test_a_hessian_in_bfloat16_weights_is_measured_in_float32():
    weights = jnp.ones(3, jnp.bfloat16)
    loss = lambda w: jnp.sum(jnp.array([1.0, 2.0, 5.0], jnp.bfloat16) * w**2) / 2  # noqa: E731
    found = in_one_program(hessian_eigenvalues, loss, weights, key=KEY)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, [1.0, 2.0, 5.0], rtol=0.02)


@pytest.mark.parametrize("order", [1, 2])
def test_a_slope_whose_square_underflows_is_measured(order):
    slopes = np.array([[3e-200, 0], [4e-200, 0]])
    found = in_one_program(
        input_gradient_norm,
        *(lambda x: x @ slopes, np.full([1, 2], 0.5), np.array([0])),
        order=order,
        loss=lambda logits, _: logits[:, 0],
    )
    np.testing.assert_allclose(found, [{1: 7e-200, 2: 5e-200}[order]], rtol=1e-12)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_radius_of_each_image_may_be_wider_than_the_images(dtype):
    images = np.full([2, 2], 0.5, np.float32)
    found = in_one_program(
        local_linearity_error,
        *(lambda x: x**2, images, np.array([0, 0])),
        ball=linf(jnp.array([0.1, 0.2], dtype)),
        loss=lambda logits, _: logits[:, 0],
        key=KEY,
    )
    np.testing.assert_allclose(found, [0.01, 0.04], rtol=1e-4)


def quadratic(size=5, *, shift=0.0):
    """A quadratic loss of two leaves, its Hessian and its gradient at the weights."""
    root = RNG.normal(size=(size, size))
    hessian: Any = root @ root.T / size - shift * np.eye(size)
    slope: Any = RNG.normal(size=size)
    weights = {"a": RNG.normal(size=2), "b": np.ones((size - 2, 1))}
    flat = np.concatenate([weights["a"], np.ones(size - 2)])

    def loss(weights):
        w = jnp.concatenate([weights["a"], weights["b"][:, 0]]) - flat
        return 0.7 + slope @ w + w @ hessian @ w / 2

    return loss, weights, flat, hessian, slope


def largest_in_ball(hessian, slope, rho):
    """max <g, e> + e'He / 2 over ||e|| <= rho, H positive: its secular equation."""
    values, vectors = np.linalg.eigh(hessian)
    along = vectors.T @ slope

    def excess(multiplier):
        return np.linalg.norm(along / (multiplier - values)) - rho

    high = values[-1] + np.linalg.norm(slope) / rho
    root = scipy.optimize.brentq(excess, values[-1] + 1e-12, high, xtol=1e-14)
    e = along / (root - values)
    return along @ e + values @ e**2 / 2


@pytest.fixture(scope="module")
def network():
    """A small network of our own layers in float64; its loss and its dense Hessian."""
    model = PreActResNet(num_classes=3, width=2, blocks=(1,), dtype=jnp.float64)
    variables = helpers.draw_variables(model, (4, 4, 1))
    variables = jax.tree.map(lambda leaf: jnp.asarray(leaf, float), variables)
    images = jnp.asarray(RNG.uniform(size=(6, 4, 4, 1)))
    labels = jnp.arange(6) % 3

    def loss(params):
        state = {**variables, "params": params}
        logits: Any = model.apply(state, images, train=False)
        return jnp.mean(cross_entropy(logits, labels))

    flat, unravel = ravel_pytree(variables["params"])
    hessian = jax.jit(jax.jacrev(jax.grad(lambda w: loss(unravel(w)))))(flat)
    np.testing.assert_allclose(hessian, hessian.T, atol=1e-12)
    return loss, variables["params"], np.asarray((hessian + hessian.T) / 2)


# --- perturbed weights ----------------------------------------------------------------


@pytest.mark.parametrize("adaptive", [False, True])
def test_worst_case_sharpness_of_a_quadratic_is_the_maximum_over_the_ball(adaptive):
    loss, weights, flat, hessian, slope = quadratic()
    scale = np.abs(flat) if adaptive else np.ones_like(flat)
    expected = largest_in_ball(
        np.diag(scale) @ hessian @ np.diag(scale), scale * slope, 0.8
    )

    def find(num_steps):
        settings = {"rho": 0.8, "num_steps": num_steps, "adaptive": adaptive}
        return worst_case_sharpness(loss, weights, **settings, key=KEY)

    first, third, found = in_one_program(lambda: [find(n) for n in (1, 3, 200)])
    np.testing.assert_allclose(found, expected, rtol=1e-9)
    assert 0 < first < third < expected


def test_the_first_step_of_the_worst_case_is_that_of_sam():
    loss, weights, _, _, _ = quadratic()

    def first_step():
        grads = jax.grad(loss)(weights)
        length = jnp.sqrt(sum(jnp.sum(g**2) for g in jax.tree.leaves(grads)))
        moved = jax.tree.map(lambda w, g: w + 0.3 * g / length, weights, grads)
        return loss(moved) - loss(weights)

    found = in_one_program(
        worst_case_sharpness, loss, weights, rho=0.3, num_steps=1, key=KEY
    )
    np.testing.assert_allclose(found, in_one_program(first_step), rtol=1e-12)


def test_at_a_minimum_the_worst_case_is_half_lambda_max_times_the_radius_squared():
    hessian: Any = np.diag([1.0, 3.0, 7.0])
    loss = lambda w: w @ hessian @ w / 2  # noqa: E731
    found = in_one_program(
        worst_case_sharpness, loss, jnp.zeros(3), rho=0.2, num_steps=60, key=KEY
    )
    np.testing.assert_allclose(found, 0.5 * 7 * 0.2**2, rtol=1e-12)


def test_a_loss_that_only_falls_has_no_worst_case_above_it():
    loss = lambda w: -jnp.sum(w**2)  # noqa: E731
    found = in_one_program(worst_case_sharpness, loss, jnp.zeros(3), rho=0.2, key=KEY)
    assert found == 0


def test_the_worst_case_of_complex_weights_is_uphill():
    def loss(w):
        return jnp.sum(jnp.abs(w - 1) ** 2)

    found = in_one_program(
        worst_case_sharpness, loss, np.array([1 + 3j]), rho=0.1, key=KEY
    )
    np.testing.assert_allclose(found, 3.1**2 - 3**2, rtol=1e-9)


def test_radius_zero_is_no_sharpness():
    loss, weights, _, _, _ = quadratic()
    assert in_one_program(worst_case_sharpness, loss, weights, rho=0.0, key=KEY) == 0
    assert in_one_program(average_sharpness, loss, weights, sigma=0.0, key=KEY) == 0


@pytest.mark.parametrize("adaptive", [False, True])
def test_average_sharpness_of_a_quadratic_is_half_the_scaled_trace(adaptive):
    loss, weights, flat, hessian, _ = quadratic(shift=0.1)
    scale = np.abs(flat) if adaptive else np.ones_like(flat)
    scaled = 0.3**2 * np.diag(scale) @ hessian @ np.diag(scale)
    found = in_one_program(
        *(average_sharpness, loss, weights),
        sigma=0.3,
        num_samples=20_000,
        adaptive=adaptive,
        key=KEY,
    )
    error = np.linalg.norm(scaled) / np.sqrt(2 * 20_000)  # of z'Az/2
    assert abs(found - np.trace(scaled) / 2) < 4 * error


def test_noise_of_both_signs_does_not_see_a_slope():
    slope: Any = RNG.normal(size=4)
    found = in_one_program(
        *(average_sharpness, lambda w: slope @ w, jnp.ones(4)),
        sigma=1.0,
        num_samples=1,
        key=KEY,
    )
    assert abs(found) < 1e-15


# --- the Hessian ----------------------------------------------------------------------


def test_lanczos_finds_the_ends_of_a_dense_spectrum_and_its_trace(network):
    loss, params, hessian = network
    expected = np.linalg.eigvalsh(hessian)
    few, found = in_one_program(
        lambda: [
            hessian_eigenvalues(loss, params, num_steps=n, key=KEY) for n in (4, 40)
        ]
    )
    np.testing.assert_allclose(found[-1], expected[-1], rtol=1e-8)
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-6)
    assert expected[0] <= few[0] < 0 < few[-1] < expected[-1]
    trace = in_one_program(hessian_trace, loss, params, num_samples=400, key=KEY)
    beside = hessian - np.diag(np.diag(hessian))
    error = np.sqrt(2 * np.sum(beside**2) / 400)
    assert abs(trace - np.trace(hessian)) < 4 * error < 0.3 * np.trace(hessian)


def test_as_many_steps_as_weights_give_all_eigenvalues(network):
    loss, params, hessian = network
    found = in_one_program(hessian_eigenvalues, loss, params, num_steps=10_000, key=KEY)
    np.testing.assert_allclose(found, np.linalg.eigvalsh(hessian), atol=1e-10)


@pytest.mark.parametrize("values", [[2.0] * 4, [0.0] * 4, [-1.0, 0.0, 0.0, 3.0]])
def test_eigenvalues_are_found_as_often_as_they_occur(values):
    turn = np.linalg.qr(RNG.normal(size=(4, 4)))[0]
    hessian = turn @ np.diag(values) @ turn.T
    loss = lambda w: w @ hessian @ w / 2  # noqa: E731
    found = in_one_program(hessian_eigenvalues, loss, jnp.ones(4), key=KEY)
    np.testing.assert_allclose(found, values, atol=1e-12)


def test_one_draw_gives_the_trace_of_a_diagonal_hessian():
    values = jnp.array([-1.0, 4.0, 2.5])
    found = in_one_program(
        *(hessian_trace, lambda w: values @ w**2 / 2, jnp.ones(3)),
        num_samples=1,
        key=KEY,
    )
    np.testing.assert_allclose(found, 5.5, rtol=1e-14)


# --- outputs --------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1.0, 30.0])  # unsure, and sure up to rounding
def test_relative_flatness_is_the_definition_with_a_dense_hessian(scale):
    features, bias = RNG.normal(size=(5, 4)), RNG.normal(size=3)
    kernel = scale * RNG.normal(size=(4, 3))
    labels: Any = np.array([0, 1, 2, 0, 1])
    logits = features @ kernel + bias

    def loss(kernel):
        return jnp.mean(cross_entropy(features @ kernel + bias, labels))

    hessian = np.asarray(jax.jit(jax.hessian(loss))(kernel))  # [4, 3, 4, 3]
    expected = np.einsum("ms,mt,jsjt->", kernel, kernel, hessian)
    measure = jax.jit(relative_flatness)
    found = measure(logits, features, kernel)
    assert found.shape == (5,)
    np.testing.assert_allclose(np.mean(found), expected, rtol=1e-9)
    scaled = measure(logits, 8 * features, kernel / 8)
    np.testing.assert_allclose(scaled, found, rtol=1e-12)


def test_confidence_does_not_see_the_mean_of_the_logits_and_scales_with_them():
    logits = jnp.asarray(RNG.normal(size=(4, 5)))
    for measure in map(jax.jit, (logit_norm, logit_gap)):
        np.testing.assert_allclose(measure(3 * logits + 7), 3 * measure(logits))
    ordered = np.sort(logits, axis=1)
    np.testing.assert_allclose(logit_gap(logits), ordered[:, -1] - ordered[:, -2])
    np.testing.assert_allclose(logit_norm(logits), np.std(logits, axis=1) * 5**0.5)


# --- around images --------------------------------------------------------------------


def linear(size=6):
    """A linear classifier of two classes, images in the middle of their box."""
    slope = RNG.normal(size=size)
    images = 0.5 + 0.001 * RNG.normal(size=(3, size))

    def logits_fn(images):
        value = (images - 0.5) @ slope + 0.01
        return jnp.stack([value, -value], axis=-1)

    return jax.jit(logits_fn), images, slope


@pytest.mark.parametrize("order", [1, 2])
def test_the_gradient_of_a_linear_model_has_the_norm_of_its_weights(order):
    logits_fn, images, slope = linear()
    labels = np.zeros(3, int)
    found = in_one_program(input_gradient_norm, logits_fn, images, labels, order=order)
    wrong = scipy.special.softmax(logits_fn(images), axis=1)[:, 1]
    expected = 2 * wrong * np.linalg.norm(slope, order)
    np.testing.assert_allclose(found, expected, rtol=1e-12)


@pytest.mark.parametrize(("ball", "dual"), [(linf(0.1), 1), (l2(0.1), 2)])
def test_the_boundary_of_a_linear_model_is_its_margin_over_the_dual_norm(ball, dual):
    logits_fn, images, slope = linear()
    labels = np.array([0, 0, 1])  # the last is misclassified
    found = in_one_program(
        *(boundary_distance, logits_fn, images, labels),
        attack=fab_minimal(ball),
        ball=ball,
        key=KEY,
    )
    right, wrong = np.asarray(logits_fn(images))[:2].T
    expected = (right - wrong) / 2 / np.linalg.norm(slope, dual)
    assert np.all(found[:2] >= expected)
    np.testing.assert_allclose(found[:2], expected, rtol=1e-2)
    assert found[2] == 0


def test_a_boundary_that_is_not_found_is_infinitely_far():
    found = in_one_program(
        boundary_distance,
        lambda x: jnp.stack([jnp.ones(len(x)), 0 * x[:, 0]], axis=-1),
        *(np.full([1, 2], 0.5), np.array([0])),
        attack=fab_minimal(l2(1.0), num_steps=2),
        ball=l2(1.0),
        key=KEY,
    )
    assert found[0] == math.inf


def test_a_linear_loss_has_no_linearity_error():
    logits_fn, images, _ = linear()
    found = in_one_program(
        *(local_linearity_error, logits_fn, images, np.zeros(3, int)),
        ball=linf(0.1),
        loss=margin,
        key=KEY,
    )
    np.testing.assert_allclose(found, 0, atol=1e-15)


@pytest.mark.parametrize(
    ("ball", "curvature"), [(linf(0.1), 1 + 2 + 4.0), (l2(0.1), 4.0)]
)
def test_the_linearity_error_of_a_quadratic_is_its_largest_curvature(ball, curvature):
    values = np.array([1.0, 2.0, 4.0])
    found = in_one_program(
        local_linearity_error,
        lambda x: x**2 @ np.stack([values, values], axis=1) / 2,
        *(np.full([2, 3], 0.4), np.array([0, 0])),
        ball=ball,
        num_steps=40,
        loss=lambda logits, _: logits[:, 0],
        key=KEY,
    )
    np.testing.assert_allclose(found, curvature * 0.1**2 / 2, rtol=1e-6)


def test_the_linearity_error_stays_in_the_box_and_vanishes_with_the_radius():
    square = functools.partial(
        local_linearity_error,
        *(lambda x: x**2, jnp.array([[0.98, 0.98]]), jnp.array([0])),
        loss=lambda logits, _: logits[:, 0],
        key=KEY,
    )
    # Downhill there is room for the radius, uphill there is not.
    found, nothing = in_one_program(
        lambda: [square(ball=linf(radius)) for radius in (0.1, 0.0)]
    )
    assert 0 < found <= 0.1**2 + 1e-12
    assert nothing < 1e-15


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda f: worst_case_sharpness(f, 1.0, rho=-1.0, key=KEY), "0 <= rho"),
        (lambda f: average_sharpness(f, 1.0, sigma=-1.0, key=KEY), "0 <= sigma"),
        (
            lambda f: average_sharpness(f, 1.0, sigma=1.0, num_samples=0, key=KEY),
            "1 <= num_samples",
        ),
        (lambda f: hessian_eigenvalues(f, 1.0, num_steps=0, key=KEY), "1 <= num_steps"),
        (lambda f: hessian_trace(f, 1.0, num_samples=0, key=KEY), "1 <= num_samples"),
        (
            lambda f: input_gradient_norm(f, jnp.ones([1, 1]), jnp.zeros(1), order=3),
            r"order in \{1, 2\}",
        ),
    ],
)
def test_what_measures_nothing_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call(lambda w: w)


IMAGES, LABELS = jnp.full([2, 3], 0.5), jnp.array([0, 2])
NOT_AROUND = {
    "bytes": (lambda of: of(IMAGES * 255, LABELS), "pixels in the box"),
    "a column of labels": (lambda of: of(IMAGES, LABELS[:, None]), r"labels \[B\]"),
    "no classes": (lambda of: of(IMAGES, LABELS + 1), r"labels in 0 \.\. K-1"),
    "a mean": (
        lambda of: of(IMAGES, LABELS, loss=lambda z, y: cross_entropy(z, y).mean()),
        r"a loss \[B\] of each",
    ),
}


@pytest.mark.parametrize("case", NOT_AROUND)
def test_what_is_measured_around_images_is_refused_as_an_attack_refuses_it(case):
    call, message = NOT_AROUND[case]
    slope = functools.partial(input_gradient_norm, lambda x: x, order=1)
    error = functools.partial(
        local_linearity_error, lambda x: x, ball=linf(0.1), key=KEY
    )
    for measure in (slope, error):
        with pytest.raises(ValueError, match=f"^Expected .*{message}"):
            call(measure)


def test_a_radius_in_other_units_is_refused():
    with pytest.raises(ValueError, match="did you mean 8 / 255"):
        local_linearity_error(lambda x: x, IMAGES, LABELS, ball=linf(8.0), key=KEY)


@pytest.mark.parametrize(
    "shapes", [([1, 4], [4, 3]), ([2, 2], [4, 3]), ([2, 4], [3, 4])]
)
def test_a_relative_flatness_of_shapes_that_do_not_fit_is_refused(shapes):
    with pytest.raises(ValueError, match=r"^Expected shapes \[B, K\] of logits"):
        relative_flatness(jnp.zeros([2, 3]), *map(jnp.zeros, shapes))


def test_float32_weights_are_measured_in_float32():
    weights = {"a": jnp.ones(3, jnp.float32), "b": jnp.ones([2, 2], jnp.float32)}

    def loss(weights):
        return jnp.sum(weights["a"] ** 2) + jnp.sum(weights["b"] ** 2)

    for found in (  # outside of jit
        worst_case_sharpness(loss, weights, rho=0.1, key=KEY),
        average_sharpness(loss, weights, sigma=0.1, key=KEY),
        hessian_eigenvalues(loss, weights, num_steps=3, key=KEY),
        hessian_trace(loss, weights, key=KEY),
    ):
        assert found.dtype == jnp.float32
        assert jnp.all(jnp.isfinite(found))
