"""The form of BatchNorm that accelerators run, beside autodiff of the formulas."""

import functools
import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from samrobust.models import BatchNorm, batch_norm


def fused_and_plain(relu, dtype=jnp.float64, epsilon=1e-5):
    """Values and gradients of both forms, as functions of one signature."""
    form = batch_norm._Form(epsilon, relu, dtype)

    def fused(inputs, shift, scale, bias, cotangents):
        outputs = batch_norm._fused(form, inputs, shift, scale, bias)
        residuals = inputs, *outputs[1:], scale, bias
        return outputs, batch_norm._fused_backward(form, *residuals, *cotangents)

    def plain(inputs, shift, scale, bias, cotangents):
        del shift
        values = functools.partial(batch_norm._plain, form)
        outputs, vjp = jax.vjp(values, inputs, scale, bias)
        return outputs, vjp(cotangents)

    return fused, plain


def arguments_of(shape, mean=0.0, dtype=jnp.float64):
    """Inputs of standard deviation 1 around `mean`, a shift near it, cotangents."""
    rng = np.random.default_rng(0)
    channels = shape[-1:]
    inputs = mean + rng.normal(size=shape)
    shift, scale, bias = rng.normal(size=(3, *channels))
    cotangents = [rng.normal(size=size) for size in (shape, channels, channels)]
    arrays = inputs, mean + shift, scale, bias, tuple(cotangents)
    return jax.tree.map(lambda array: jnp.asarray(array, dtype), arrays)


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("shape", [(6, 5), (6, 3, 4, 5)])
@pytest.mark.parametrize("num_devices", [1, 8])  # two sums, or one of both
def test_the_fused_batch_norm_has_the_values_and_gradients_of_the_formulas(
    monkeypatch, shape, relu, num_devices
):
    mesh = types.SimpleNamespace(size=num_devices)
    monkeypatch.setattr(batch_norm, "data_mesh", lambda: mesh)
    with jax.enable_x64(True):
        fused, plain = map(jax.jit, fused_and_plain(relu))
        arguments = arguments_of(shape)
        found, expected = fused(*arguments), plain(*arguments)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, atol=1e-12), found, expected
        )


def test_the_fused_batch_norm_keeps_its_digits_where_the_mean_is_1000_deviations():
    """In float32, whose 24 bits E[x^2] - E[x]^2 would use up."""
    fused, _ = fused_and_plain(relu=True, dtype=jnp.float32)
    arguments = arguments_of((512, 5), 1000.0, jnp.float32)
    (outputs, mean, var), gradients = jax.jit(fused)(*arguments)
    with jax.enable_x64(True):
        _, plain = fused_and_plain(relu=True)
        exact = jax.tree.map(lambda x: np.asarray(x, np.float64), arguments)
        expected, expected_gradients = jax.jit(plain)(*exact)
    np.testing.assert_allclose(mean, expected[1], rtol=1e-7)
    np.testing.assert_allclose(var, expected[2], rtol=1e-5)
    np.testing.assert_allclose(outputs, expected[0], atol=1e-3)
    for found, correct in zip(gradients, expected_gradients, strict=True):
        np.testing.assert_allclose(found, correct, rtol=1e-3, atol=2e-3)


def test_the_fused_variance_of_a_constant_is_not_negative_by_rounding():
    """E[x^2] - E[x]^2 of seven equal numbers far from the shift is not always 0."""
    inputs = jnp.broadcast_to(jnp.linspace(100, 1000, 64), (7, 64))
    one, zero = jnp.ones(64), jnp.zeros(64)
    form = batch_norm._Form(1e-5, False, jnp.float32)
    outputs, _, var = batch_norm._fused(form, inputs, zero, one, zero)
    assert np.all(var >= 0)
    assert np.all(np.isfinite(outputs))


def test_the_gradient_of_inputs_in_bfloat16_is_in_bfloat16():
    inputs, *others, (of_outputs, *of_statistics) = arguments_of(
        (6, 5), dtype=jnp.float32
    )
    inputs, of_outputs = (x.astype(jnp.bfloat16) for x in (inputs, of_outputs))
    for form in fused_and_plain(relu=True, dtype=jnp.bfloat16):
        cotangents = of_outputs, *of_statistics
        _, gradients = jax.eval_shape(form, inputs, *others, cotangents)
        names = [gradient.dtype.name for gradient in gradients]
        assert names == ["bfloat16", "float32", "float32"]


def test_a_relu_in_batch_norm_has_no_gradient_at_zero():
    zero, one = jnp.zeros(2), jnp.ones(2)
    cotangents = jnp.ones((4, 2)), zero, zero
    for form in fused_and_plain(relu=True, dtype=jnp.float32):
        _, gradients = form(jnp.zeros((4, 2)), zero, one, zero, cotangents)
        assert not any(np.any(gradient) for gradient in gradients)


def test_the_fused_batch_norm_normalizes_each_group_by_itself():
    with jax.enable_x64(True):
        fused, plain = fused_and_plain(relu=True)
        inputs, shift, scale, bias, _ = arguments_of((6, 2, 2, 5))
        groups = np.asarray(inputs).reshape(3, 2, 2, 2, 5)
        cotangents = np.cos(groups), np.ones((3, 5)), np.ones((3, 5))
        axes = 0, None, None, None, 0
        found = jax.jit(jax.vmap(fused, axes))(groups, shift, scale, bias, cotangents)
        plain = jax.jit(plain)
        for i in range(3):
            of_group = jax.tree.map(lambda leaf, i=i: leaf[i], cotangents)
            expected = plain(groups[i], shift, scale, bias, of_group)
            jax.tree.map(
                lambda a, b, i=i: np.testing.assert_allclose(a[i], b, atol=1e-12),
                found,
                expected,
            )


@pytest.mark.parametrize("relu", [False, True])
def test_the_fused_batch_norm_has_the_second_derivatives_of_the_formulas(relu):
    """Of the gradients, with respect to all that they are made of."""
    with jax.enable_x64(True):
        inputs, shift, scale, bias, cotangents = arguments_of((6, 2, 2, 5))

        def total(pair, inputs, scale, bias, cotangents):
            _, gradients = pair(inputs, shift, scale, bias, cotangents)
            return sum(jnp.sum(jnp.sin(gradient)) for gradient in gradients)

        found, expected = (
            jax.jit(jax.grad(functools.partial(total, form), argnums=(0, 1, 2, 3)))(
                inputs, scale, bias, cotangents
            )
            for form in fused_and_plain(relu)
        )
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, atol=1e-11), found, expected
        )


def layer_and_inputs(relu) -> tuple[Any, Any, Any]:
    rng = np.random.default_rng(0)
    inputs = jnp.asarray(rng.normal(size=(8, 4, 4, 5)), jnp.float32)
    layer = BatchNorm(relu=relu)
    init = jax.jit(layer.init, static_argnames="train")
    return layer, init(jax.random.key(0), inputs, train=False), inputs


def test_batch_norm_keeps_its_inputs_for_the_backward_pass_and_nothing_as_large():
    layer, variables, inputs = layer_and_inputs(relu=True)

    def outputs(inputs):
        return layer.apply(variables, inputs, train=True, mutable=["batch_stats"])

    _, vjp, _ = jax.vjp(outputs, inputs, has_aux=True)
    large = [leaf for leaf in jax.tree.leaves(vjp) if leaf.size >= inputs.size]
    assert len(large) == 1
    np.testing.assert_array_equal(large[0], inputs)


@pytest.mark.parametrize("train", [False, True])
def test_a_relu_in_batch_norm_is_the_relu_after_it(train):
    found, expected = (
        layer.apply(variables, inputs, train=train)
        for layer, variables, inputs in map(layer_and_inputs, (True, False))
    )
    np.testing.assert_array_equal(found, jax.nn.relu(expected))
