"""The convolution, BatchNorm and PreActResNet against XLA, SciPy and NumPy."""

import functools
import re
from typing import Any

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from scipy import signal, stats

from samrobust.models import BatchNorm, PreActResNet, conv2d

KEY = jax.random.key(0)


def normal(shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


# Convolution

CASES = [
    pytest.param(window, stride, size, id=f"window {window}, stride {stride}, {size}")
    for window in (1, 3, 5)
    for stride in (1, 2, 3)
    for size in ((6, 7),)
] + [
    pytest.param(3, 2, (8, 8), id="even"),
    pytest.param(3, 2, (7, 5), id="odd"),
    pytest.param(3, 1, (2, 2), id="smaller than the window"),
    pytest.param(3, 2, (2, 1), id="smaller than the window, stride 2"),
    pytest.param(5, 1, (7, 3), id="narrower than the window"),
]


def native(images, kernel, stride, padding):
    return lax.conv_general_dilated(
        images,
        kernel,
        (stride, stride),
        [(padding, padding)] * 2,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )


def conv_inputs(window, size, dtype=jnp.float32, channels=(2, 3)):
    images = normal((2, *size, channels[0])).astype(dtype)
    return images, normal((window, window, *channels), seed=1).astype(dtype)


def assert_close(first, second, tolerance=1e-5):
    """To a tolerance relative to the largest entry of each leaf."""
    for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
        assert a.shape == b.shape
        assert a.dtype == b.dtype
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        np.testing.assert_allclose(a, b, atol=tolerance * max(np.abs(b).max(), 1e-30))


@pytest.mark.parametrize(("window", "stride", "size"), CASES)
def test_conv2d_and_its_gradients_are_those_of_xla(window, stride, size):
    images, kernel = conv_inputs(window, size)

    @jax.jit
    def results(images, kernel):
        def of(conv):
            def outputs(images, kernel):
                return conv(images, kernel, stride, window // 2)

            values, vjp = jax.vjp(outputs, images, kernel)
            return values, vjp(jnp.cos(7 * values))

        return of(conv2d), of(native)

    assert_close(*results(images, kernel))


@pytest.mark.parametrize("padding", [0, 1])
def test_padding_may_be_less_than_half_the_window(padding):
    images, kernel = conv_inputs(3, (6, 7))

    def of(conv):
        def energy(images, kernel):
            return jnp.sum(jnp.sin(conv(images, kernel, 2, padding)))

        return jax.jit(jax.value_and_grad(energy, (0, 1)))(images, kernel)

    assert_close(of(conv2d), of(native))


@pytest.mark.parametrize("size", [(5, 6), (2, 2)])
@pytest.mark.parametrize("stride", [1, 2])
def test_second_derivatives_are_those_of_xla(stride, size):
    """Reverse over reverse: the gradient of a function of the gradients."""
    images, kernel = conv_inputs(3, size)

    @jax.jit
    def results(images, kernel):
        def of(conv):
            def energy(images, kernel):
                return jnp.sum(jnp.sin(conv(images, kernel, stride, 1)))

            def penalty(images, kernel):
                first = jax.grad(energy, (0, 1))(images, kernel)
                return sum(jnp.sum(jnp.tanh(gradient)) for gradient in first)

            return jax.grad(penalty, (0, 1))(images, kernel)

        return of(conv2d), of(native)

    assert_close(*results(images, kernel))


@pytest.mark.parametrize("stride", [1, 2])
def test_conv2d_is_the_correlation_of_scipy(stride):
    images, kernel = conv_inputs(3, (7, 6))
    outputs: Any = jax.jit(conv2d, static_argnums=(2, 3))(images, kernel, stride, 1)
    x, k = np.asarray(images, np.float64), np.asarray(kernel, np.float64)
    expected = np.zeros((2, 7, 6, 3))
    for b, c, d in np.ndindex(2, 2, 3):
        expected[b, :, :, d] += signal.correlate2d(x[b, :, :, c], k[:, :, c, d], "same")
    np.testing.assert_allclose(outputs, expected[:, ::stride, ::stride], atol=1e-5)


@pytest.mark.parametrize("stride", [1, 2])
def test_bfloat16_stays_bfloat16_and_near_float32(stride):
    images, kernel = conv_inputs(3, (6, 6), jnp.bfloat16)

    @jax.jit
    def results(images, kernel):
        def outputs(images, kernel) -> Any:
            return conv2d(images, kernel, stride, 1)

        values, vjp = jax.vjp(outputs, images, kernel)
        return values, vjp(jnp.ones_like(values))

    low = results(images, kernel)
    assert all(leaf.dtype == jnp.bfloat16 for leaf in jax.tree.leaves(low))
    high = results(images.astype(jnp.float32), kernel.astype(jnp.float32))
    raised = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), low)
    assert_close(raised, high, 2.0**-7)


def gradients(conv, argnums: Any = 0):
    """Of a net of two convolutions, one of them with a stride."""

    def energy(images, first, second):
        hidden = jnp.tanh(conv(images, first, 1, 1))
        return jnp.sum(jnp.tanh(conv(hidden, second, 2, 1)))

    return jax.grad(energy, argnums)


def compile_on_the_cpu(function, *arguments):
    """The optimized program, as text."""
    with jax.default_device(jax.devices("cpu")[0]), helpers.usual_compilation():
        return jax.jit(function).lower(*arguments).compile().as_text() or ""


def two_kernels():
    images, first = conv_inputs(3, (8, 8), channels=(3, 8))
    _, second = conv_inputs(3, (8, 8), channels=(8, 8))
    return images, first, second


def test_in_a_loop_on_the_cpu_every_convolution_of_the_input_gradient_is_canonical():
    """XLA computes others by a naive loop: 20 to 100 times slower."""

    def ascend(images, first, second):
        gradient = gradients(conv2d)
        return lax.fori_loop(0, 3, lambda _, x: x + gradient(x, first, second), images)

    compiled = compile_on_the_cpu(ascend, *two_kernels())
    labels = re.findall(r"dim_labels=(\w+->\w+)", compiled)
    assert len(labels) == 4  # two forward, two backward
    assert set(labels) == {"b01f_01io->b01f"}


def test_in_a_loop_on_the_cpu_training_too_has_canonical_convolutions_alone():
    def descend(images, first, second):
        gradient = gradients(conv2d, argnums=(1, 2))

        def step(_, kernels):
            moved = gradient(images, *kernels)
            return jax.tree.map(lambda k, g: k - 0.1 * g, kernels, moved)

        return lax.fori_loop(0, 3, step, (first, second))

    compiled = compile_on_the_cpu(descend, *two_kernels())
    labels = re.findall(r"dim_labels=(\w+->\w+)", compiled)
    assert len(labels) == 5  # two forward, one to the first layer, two to the kernels
    assert set(labels) == {"b01f_01io->b01f"}


def test_in_a_loop_on_the_cpu_products_with_a_hessian_have_canonical_ones_alone():
    images, first, second = two_kernels()

    def lanczos(first, second):
        gradient = gradients(conv2d, argnums=(1, 2))
        along = lambda kernels: gradient(images, *kernels)  # noqa: E731

        def step(_, vector):
            return jax.vjp(along, (first, second))[1](vector)[0]

        return lax.fori_loop(0, 3, step, (first, second))

    compiled = compile_on_the_cpu(lanczos, first, second)
    labels = re.findall(r"dim_labels=(\w+->\w+)", compiled)
    assert len(labels) >= 10
    assert set(labels) == {"b01f_01io->b01f"}


def test_on_the_cpu_images_smaller_than_the_window_meet_no_convolution():
    """Nor do their gradients: XLA would compute them by a naive loop."""
    whole, to_small = conv_inputs(3, (4, 4))

    def convolutions(images, kernel, stride):
        def energy(images):
            return jnp.sum(jnp.sin(conv2d(images, kernel, stride, 1)))

        compiled = compile_on_the_cpu(jax.grad(energy), images)
        return compiled.count(" convolution(")

    for size in ((2, 4), (4, 2)):
        assert convolutions(*conv_inputs(3, size), stride=1) == 0
    assert convolutions(whole, to_small, stride=2) == 1  # the forward one


def test_the_kernels_of_an_attack_are_flipped_once_and_not_at_every_step():
    def ascend(images, first, second):
        gradient = gradients(conv2d)
        return lax.fori_loop(0, 3, lambda _, x: x + gradient(x, first, second), images)

    compiled = compile_on_the_cpu(ascend, *two_kernels())
    compiled = re.sub(r", metadata=\{[^}]*\}", "", compiled)
    body = re.search(r"\bwhile\(.*body=%?([\w.]+)", compiled)
    assert body is not None
    (inside,) = re.findall(
        rf"^%{re.escape(body.group(1))} .*?^}}", compiled, re.MULTILINE | re.DOTALL
    )
    assert "convolution(" in inside
    assert " call(" not in inside
    entry = compiled[compiled.index("ENTRY") :]
    assert len(re.findall(r" call\(.*to_apply=%?_flip", entry)) == 2


def test_the_gradient_of_a_one_by_one_kernel_is_that_of_xla():
    images, kernel = conv_inputs(1, (7, 6))

    def of(conv):
        energy = lambda kernel: jnp.sum(jnp.sin(conv(images, kernel, 2, 0)))  # noqa: E731
        return jax.jit(jax.grad(energy))(kernel)

    assert_close(of(conv2d), of(native))


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_lowered_for_an_accelerator_the_convolutions_are_the_native_ones(platform):
    def convolutions(conv):
        traced = jax.jit(gradients(conv, argnums=(0, 1, 2))).trace(*two_kernels())
        text = traced.lower(lowering_platforms=(platform,)).as_text()
        pattern = r"stablehlo\.convolution\(.*?\) (dim_numbers.*)"
        return sorted(re.findall(pattern, text))

    assert len(convolutions(native)) == 6
    assert convolutions(conv2d) == convolutions(native)


# BatchNorm


@functools.partial(
    jax.jit, static_argnames=("train", "batch_norm_group", "epsilon", "dtype")
)
def batch_norm(inputs, train, variables: Any = None, **options) -> tuple[Any, Any]:
    model = BatchNorm(**options)
    variables = variables or model.init(KEY, inputs, train=False)
    return model.apply(variables, inputs, train=train, mutable=["batch_stats"])


def test_the_running_statistics_are_pytorchs():
    """Momentum .9; the mean and the UNBIASED variance of the batch."""
    inputs = 3 + 2 * normal([4, 3, 2, 5])
    mean, var = jnp.arange(5.0), jnp.arange(1.0, 6.0)
    params = {"scale": jnp.ones(5), "bias": jnp.zeros(5)}
    variables = {"params": params, "batch_stats": {"mean": mean, "var": var}}
    _, updated = batch_norm(inputs, True, variables)
    batch = np.asarray(inputs, np.float64).reshape(-1, 5)
    stats_ = updated["batch_stats"]
    np.testing.assert_allclose(
        stats_["mean"], 0.9 * mean + 0.1 * batch.mean(0), rtol=1e-5
    )
    np.testing.assert_allclose(
        stats_["var"], 0.9 * var + 0.1 * batch.var(0, ddof=1), rtol=1e-5
    )


def test_training_normalizes_by_the_biased_variance_of_the_batch():
    inputs = 3 + 2 * normal([4, 3, 2, 5])
    scale, bias = jnp.arange(1.0, 6.0), jnp.arange(5.0)
    variables = {
        "params": {"scale": scale, "bias": bias},
        "batch_stats": {"mean": jnp.zeros(5), "var": jnp.ones(5)},
    }
    outputs, _ = batch_norm(inputs, True, variables, epsilon=0.1)
    x = np.asarray(inputs, np.float64)
    axes = (0, 1, 2)
    expected = (x - x.mean(axes)) / np.sqrt(x.var(axes) + 0.1) * scale + bias
    np.testing.assert_allclose(outputs, expected, atol=1e-5)


def test_evaluation_normalizes_by_the_running_statistics_and_updates_nothing():
    inputs = normal([4, 5])
    mean, var = jnp.arange(5.0), jnp.arange(1.0, 6.0)
    variables = {
        "params": {"scale": jnp.ones(5), "bias": jnp.zeros(5)},
        "batch_stats": {"mean": mean, "var": var},
    }
    outputs, updated = batch_norm(inputs, False, variables)
    expected = (inputs - mean) / np.sqrt(np.asarray(var) + 1e-5)
    np.testing.assert_allclose(outputs, expected, atol=1e-5)
    np.testing.assert_array_equal(updated["batch_stats"]["mean"], mean)
    np.testing.assert_array_equal(updated["batch_stats"]["var"], var)


def test_initializing_in_training_mode_does_not_update_the_statistics():
    inputs = 3 + normal([4, 5])
    fresh = BatchNorm().init(KEY, inputs, train=True)["batch_stats"]
    np.testing.assert_array_equal(fresh["mean"], np.zeros(5))
    np.testing.assert_array_equal(fresh["var"], np.ones(5))


@pytest.mark.parametrize("shape", [(1, 1, 1, 3), (4, 2, 2, 3)])
def test_a_constant_or_single_input_gives_the_bias_and_no_nan(shape):
    outputs, updated = batch_norm(jnp.full(shape, 5.0), True)
    np.testing.assert_allclose(outputs, np.zeros(shape), atol=1e-5)
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(updated))


def test_batch_norm_in_bfloat16_keeps_float32_statistics():
    inputs = (100 + normal([512, 2])).astype(jnp.bfloat16)
    outputs, updated = batch_norm(inputs, True, dtype=jnp.bfloat16)
    assert outputs.dtype == jnp.bfloat16
    exact = np.asarray(inputs, np.float64)
    variance = 0.9 + 0.1 * exact.var(0, ddof=1)
    assert updated["batch_stats"]["var"].dtype == jnp.float32
    np.testing.assert_allclose(updated["batch_stats"]["var"], variance, rtol=1e-4)


def random_batch_norm(seed=0) -> Any:
    rng = np.random.default_rng(seed)

    def draw():
        return jnp.asarray(rng.uniform(0.5, 2, 5), jnp.float32)

    return {
        "params": {"scale": draw(), "bias": draw()},
        "batch_stats": {"mean": draw(), "var": draw()},
    }


@pytest.mark.parametrize("group", [1, 2, 3, 6])
def test_each_group_of_examples_is_normalized_as_a_batch_of_its_own(group):
    inputs = 3 + 2 * normal([6, 3, 2, 5])
    variables = random_batch_norm()
    outputs, updated = batch_norm(inputs, True, variables, batch_norm_group=group)
    alone = [
        batch_norm(inputs[i : i + group], True, variables) for i in range(0, 6, group)
    ]
    expected = np.concatenate([outputs for outputs, _ in alone])
    np.testing.assert_allclose(outputs, expected, atol=1e-6)
    mean_of_groups = jax.tree.map(
        lambda *leaves: np.mean(leaves, axis=0), *[moved for _, moved in alone]
    )
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6),
        updated,
        mean_of_groups,
    )


def test_with_groups_the_running_variance_is_the_mean_of_the_unbiased_ones():
    inputs = jnp.asarray([[0.0], [2.0], [10.0], [16.0]])
    _, updated = batch_norm(inputs, True, batch_norm_group=2)
    moved = updated["batch_stats"]
    np.testing.assert_allclose(moved["mean"], [0.1 * (1 + 13) / 2], rtol=1e-6)
    np.testing.assert_allclose(moved["var"], [0.9 + 0.1 * (2 + 18) / 2], rtol=1e-6)


def test_the_groups_shape_the_gradient():
    inputs = normal([6, 5])

    def loss(inputs, group):
        outputs, _ = batch_norm(
            inputs, True, random_batch_norm(), batch_norm_group=group
        )
        return jnp.sum(outputs**3)

    gradient = jax.jit(jax.grad(loss), static_argnums=1)
    grouped = gradient(inputs, 3)
    alone = [gradient(inputs[i : i + 3], 0) for i in (0, 3)]
    np.testing.assert_allclose(grouped, np.concatenate(alone), atol=1e-4, rtol=1e-4)
    assert np.abs(grouped - gradient(inputs, 0)).max() > 0.01


def test_a_group_as_large_as_the_batch_is_the_batch_bit_for_bit():
    inputs = normal([6, 3, 2, 5])
    whole = batch_norm(inputs, True, random_batch_norm())
    group = batch_norm(inputs, True, random_batch_norm(), batch_norm_group=6)
    helpers.assert_same_bits(group, whole)


def test_evaluation_knows_no_groups():
    inputs = normal([7, 5])
    outputs, _ = batch_norm(inputs, False, random_batch_norm())
    grouped, _ = batch_norm(inputs, False, random_batch_norm(), batch_norm_group=2)
    helpers.assert_same_bits(grouped, outputs)


@pytest.mark.parametrize("size", [1, 3])
def test_a_batch_that_the_groups_do_not_divide_is_refused(size):
    message = (
        "Expected a batch divisible by batch_norm_group, got batch_norm_group=2, "
        rf"batch_size={size}\. Choose a group"
    )
    with pytest.raises(ValueError, match=message):
        batch_norm(normal([size, 5]), True, batch_norm_group=2)


# PreActResNet


def images_of(num, size=8, channels=3):
    pixels = np.random.default_rng(0).uniform(size=(num, size, size, channels))
    return jnp.asarray(pixels, jnp.float32)


@functools.partial(jax.jit, static_argnames=("model", "train"))
def init(model, images, train=False):
    return model.init(KEY, images, train=train)


@functools.partial(jax.jit, static_argnames=("model", "train"))
def logits_of(model, variables, images, train=False):
    return model.apply(variables, images, train=train)


@functools.partial(jax.jit, static_argnames="model")
def totals_and_gradients(model, variables, images):
    """Of the logits, in evaluation and in training."""

    def total(images, train):
        return jnp.sum(model.apply(variables, images, train=train))

    return [jax.value_and_grad(total)(images, train=train) for train in (False, True)]


@pytest.fixture(scope="module")
def small():
    """A tiny net whose running statistics are near those of its activations."""
    model = PreActResNet(num_classes=4, width=4, blocks=(1, 1))
    variables = init(model, images_of(1))

    @jax.jit
    def adapted(variables, images):
        def body(_, batch_stats):
            variables_now = {**variables, "batch_stats": batch_stats}
            _, updated = model.apply(
                variables_now, images, train=True, mutable=["batch_stats"]
            )
            return updated["batch_stats"]

        return lax.fori_loop(0, 20, body, variables["batch_stats"])

    return model, {**variables, "batch_stats": adapted(variables, images_of(16) ** 2)}


def reference_logits(variables, images, strides):
    """The network written out, in evaluation, with the convolution of XLA."""
    params, batch_stats = variables["params"], variables["batch_stats"]

    def norm_relu(inputs, params, running):
        unit = (inputs - running["mean"]) / jnp.sqrt(running["var"] + 1e-5)
        return jnp.maximum(unit * params["scale"] + params["bias"], 0)

    hidden = native(images, params["stem"]["kernel"], 1, 1)
    for name, stride in strides.items():
        block, running = params[name], batch_stats[name]
        active = norm_relu(hidden, block["norm1"], running["norm1"])
        if "shortcut" in block:
            hidden = native(active, block["shortcut"]["kernel"], stride, 0)
        inner = native(active, block["conv1"]["kernel"], stride, 1)
        inner = norm_relu(inner, block["norm2"], running["norm2"])
        hidden = hidden + native(inner, block["conv2"]["kernel"], 1, 1)
    hidden = norm_relu(hidden, params["norm"], batch_stats["norm"])
    return hidden.mean((1, 2)) @ params["head"]["kernel"] + params["head"]["bias"]


def num_parameters(model, channels=3):
    shapes = jax.eval_shape(
        lambda: model.init(KEY, jnp.zeros([1, 8, 8, channels]), train=False)
    )
    return sum(leaf.size for leaf in jax.tree.leaves(shapes["params"]))


def parameter_formula(num_classes, width, blocks, channels):
    total, before = 9 * channels * width, width
    for stage, count in enumerate(blocks):
        after = width * 2**stage
        for block in range(count):
            projected = before != after or (stage > 0 and block == 0)
            total += 2 * before + 9 * before * after  # norm1, conv1
            total += 2 * after + 9 * after * after  # norm2, conv2
            total += before * after if projected else 0
            before = after
    return total + 2 * before + before * num_classes + num_classes


def test_the_default_has_the_parameters_of_the_papers_model():
    assert num_parameters(PreActResNet()) == 11_172_170
    assert parameter_formula(10, 64, (2, 2, 2, 2), 3) == 11_172_170


@pytest.mark.parametrize(
    ("num_classes", "width", "blocks", "channels"),
    [
        (10, 64, (3, 4, 6, 3), 3),
        (100, 8, (1, 1), 3),
        (2, 4, (2,), 1),
        (7, 16, (1, 3), 2),
    ],
)
def test_the_options_give_the_expected_number_of_parameters(
    num_classes, width, blocks, channels
):
    model = PreActResNet(num_classes=num_classes, width=width, blocks=blocks)
    expected = parameter_formula(num_classes, width, blocks, channels)
    assert num_parameters(model, channels) == expected


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("train", [False, True])
def test_all_parameters_statistics_and_logits_are_float32(dtype, train):
    model = PreActResNet(dtype=dtype, width=8)

    def run(images):
        variables = model.init(KEY, images, train=False)
        return variables, model.apply(
            variables, images, train=train, mutable=["batch_stats"]
        )

    images = jax.ShapeDtypeStruct((5, 32, 32, 3), jnp.float32)
    variables, (logits, updated) = jax.eval_shape(run, images)
    assert (logits.shape, logits.dtype) == ((5, 10), jnp.float32)
    leaves = jax.tree.leaves((variables, updated))
    assert {leaf.dtype for leaf in leaves} == {jnp.dtype(jnp.float32)}


def test_bfloat16_is_the_dtype_of_all_hidden_layers():
    model = PreActResNet(width=4, dtype=jnp.bfloat16)

    def hidden(images):
        variables = model.init(KEY, images, train=False)
        _, seen = model.apply(
            variables,
            images,
            train=False,
            capture_intermediates=True,
            mutable=["intermediates"],
        )
        return seen["intermediates"]

    seen = jax.eval_shape(hidden, jax.ShapeDtypeStruct((2, 8, 8, 3), jnp.float32))
    layers = {name: layer for name, layer in seen.items() if name != "__call__"}
    assert layers.pop("head")["__call__"][0].dtype == jnp.float32
    assert {leaf.dtype for leaf in jax.tree.leaves(layers)} == {jnp.dtype(jnp.bfloat16)}


def test_the_logits_in_bfloat16_are_near_those_in_float32(small):
    model, variables = small
    images = images_of(8)
    exact = logits_of(model, variables, images)
    low = logits_of(model.clone(dtype=jnp.bfloat16), variables, images)
    assert np.any(low != exact)
    np.testing.assert_allclose(low, exact, atol=0.03 * np.ptp(exact))


def test_in_evaluation_an_examples_logits_do_not_depend_on_the_batch(small):
    model, variables = small
    images = images_of(6)
    whole = logits_of(model, variables, images)
    alone = logits_of(model, variables, images[2:3])
    np.testing.assert_allclose(alone, whole[2:3], atol=1e-6)
    np.testing.assert_allclose(
        logits_of(model, variables, images[::-1]), whole[::-1], atol=1e-6
    )


def test_in_training_an_examples_logits_depend_on_the_batch_and_not_on_the_statistics(
    small,
):
    model, variables = small
    images = images_of(6)

    def train(variables, images):
        return logits_of(model, variables, images, train=True)

    whole = train(variables, images)
    assert np.abs(train(variables, images[:3]) - whole[:3]).max() > 1e-3
    other = {
        **variables,
        "batch_stats": jax.tree.map(jnp.ones_like, variables["batch_stats"]),
    }
    np.testing.assert_array_equal(train(other, images), whole)


def test_only_training_with_mutable_statistics_updates_them(small):
    model, variables = small
    images = images_of(6)

    @jax.jit
    def run(variables, images):
        with_update = model.apply(
            variables, images, train=True, mutable=["batch_stats"]
        )
        _, evaluated = model.apply(
            variables, images, train=False, mutable=["batch_stats"]
        )
        return with_update, model.apply(variables, images, train=True), evaluated

    (logits, updated), without, evaluated = run(variables, images)
    np.testing.assert_allclose(without, logits, atol=1e-6)
    before = variables["batch_stats"]
    jax.tree.map(np.testing.assert_array_equal, evaluated["batch_stats"], before)
    old, new = jax.tree.leaves(before), jax.tree.leaves(updated["batch_stats"])
    assert all(np.any(a != b) for a, b in zip(old, new, strict=True))


def test_the_logits_are_those_of_the_network_written_out(small):
    model, variables = small
    # Scales and biases of the norms are not left at 1 and 0.
    params = jax.tree.map(
        lambda leaf: leaf + 0.3 * normal(leaf.shape), variables["params"]
    )
    variables = {**variables, "params": params}
    images = images_of(3)
    strides = {"stage1_block1": 1, "stage2_block1": 2}
    expected = jax.jit(
        lambda variables, images: reference_logits(variables, images, strides)
    )(variables, images)
    np.testing.assert_allclose(
        logits_of(model, variables, images), expected, rtol=1e-5, atol=1e-5
    )


def test_the_pixels_are_normalized_inside(small):
    model, variables = small
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
    images = images_of(4)
    shifted = images * jnp.array(std) + jnp.array(mean)
    inside = logits_of(model.clone(mean=mean, std=std), variables, shifted)
    np.testing.assert_allclose(
        inside, logits_of(model, variables, images), rtol=1e-4, atol=1e-5
    )


def test_kernels_and_the_heads_bias_are_uniform_with_the_bound_of_pytorch():
    """U(-1/sqrt(fan_in), 1/sqrt(fan_in)) for each of them."""
    model = PreActResNet(num_classes=50, width=8, blocks=(1, 1))
    params = init(model, images_of(1))["params"]
    flat = {
        jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    }
    assert not np.any(
        flat["stage1_block1/conv1/kernel"] == flat["stage1_block1/conv2/kernel"]
    )
    kernels = [name for name in flat if name.endswith("kernel")]
    assert len(kernels) == 1 + 2 + 3 + 1
    for name in [*kernels, "head/bias"]:
        weights = flat.pop(name)
        fan_in = 16 if name == "head/bias" else np.prod(weights.shape[:-1])
        bound = fan_in**-0.5
        assert np.abs(weights).max() <= bound * (1 + 1e-6)
        uniform = stats.uniform(-bound, 2 * bound)
        assert stats.kstest(weights.ravel(), uniform.cdf).pvalue > 1e-3
    assert all(np.all(leaf == name.endswith("scale")) for name, leaf in flat.items())


def test_mirrored_images_and_mirrored_kernels_give_the_same_logits(small):
    """Symmetric padding, at stride 2 too: on odd sizes left and right are equal."""
    model, variables = small
    images = images_of(3, size=9)
    mirrored = jax.tree.map(
        lambda leaf: leaf[:, ::-1] if leaf.ndim == 4 else leaf, variables
    )
    logits = logits_of(model, variables, images)
    assert np.any(logits_of(model, variables, images[:, :, ::-1]) != logits)
    np.testing.assert_allclose(
        logits_of(model, mirrored, images[:, :, ::-1]), logits, atol=1e-5
    )


@pytest.mark.parametrize("value", [0.0, 0.5, 1.0])
def test_constant_images_give_finite_logits_and_gradients(small, value):
    model, variables = small
    found = totals_and_gradients(model, variables, jnp.full([2, 8, 8, 3], value))
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(found))


@pytest.mark.parametrize("size", [8, 9, 32])
def test_images_of_any_size_are_classified(size):
    model = PreActResNet(width=4, num_classes=3)
    logits = jax.eval_shape(
        lambda images: model.init_with_output(KEY, images, train=False)[0],
        jax.ShapeDtypeStruct((2, size, size, 1), jnp.float32),
    )
    assert logits.shape == (2, 3)


@pytest.mark.parametrize("train", [False, True])
def test_a_network_with_groups_is_initialized_with_one_image(train):
    plain = PreActResNet(width=2, blocks=(1,))
    grouped = PreActResNet(width=2, blocks=(1,), batch_norm_group=4)

    found, expected = (init(model, images_of(1), train) for model in (grouped, plain))
    helpers.assert_same_bits(found, expected)


def test_every_layer_of_a_network_normalizes_by_groups():
    plain = PreActResNet(width=2, blocks=(1, 1))
    grouped = PreActResNet(width=2, blocks=(1, 1), batch_norm_group=3)
    images = images_of(6)
    variables = init(plain, images)

    def logits(model, images):
        return logits_of(model, variables, images, train=True)

    alone = np.concatenate([logits(plain, images[:3]), logits(plain, images[3:])])
    np.testing.assert_allclose(logits(grouped, images), alone, atol=1e-5)
    assert np.abs(alone - logits(plain, images)).max() > 1e-3
