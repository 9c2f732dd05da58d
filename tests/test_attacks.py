"""Balls and PGD: closed forms, a NumPy twin, and the documented guarantees."""

import functools

import flax.linen as nn
import hypothesis
import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import in_one_program
from scipy import stats

from samrobust.attacks import JUDGES, cross_entropy, identity, l2, linf, margin, pgd

KEY = jax.random.key(3)
BALLS = {"linf": linf, "l2": l2}
EPS = float(np.finfo(np.float32).eps)

settings = hypothesis.settings(max_examples=30, deadline=None, derandomize=True)
perturbations = hnp.arrays(
    np.float32,
    (3, 4),
    elements=st.floats(-4, 4, width=32, allow_subnormal=False),
)


def run(attack, logits_fn, images, labels, key=KEY):
    """The attack in `jit`."""
    jitted = jax.jit(
        lambda images, labels, key: attack(logits_fn, images, labels, key=key)
    )
    return jitted(images, labels, key)


def norms(ball, delta):
    """NumPy's norm of each example, in float64."""
    order = {"linf": np.inf, "l2": 2}[ball]
    flat = np.asarray(delta, np.float64).reshape(len(delta), -1)
    return np.linalg.norm(flat, order, axis=1)


def in_ball(ball, radius, num, rng, size):
    """Points [num, size] of the ball, its surface and corners among them."""
    directions = rng.standard_normal((num, size))
    directions /= norms(ball, directions)[:, None]
    lengths = np.maximum(rng.uniform(size=(num, 1)), rng.uniform(size=(num, 1)) > 0.5)
    if ball == "linf":
        directions[: num // 4] = np.sign(directions[: num // 4])
    return radius * lengths * directions


# Balls


@pytest.mark.parametrize("ball", BALLS)
@hypothesis.given(delta=perturbations, radius=st.sampled_from([0.0, 0.3, 1.0, 5.0]))
@settings
def test_the_projection_has_its_closed_form(ball, delta, radius):
    exact = delta.astype(np.float64)
    if ball == "linf":
        expected = np.clip(exact, -radius, radius)
    else:
        length = norms(ball, exact)[:, None]
        expected = exact * np.minimum(1, radius / np.maximum(length, 1e-300))
    projected = BALLS[ball](radius).project(jnp.asarray(delta))
    np.testing.assert_allclose(projected, expected, rtol=4 * EPS, atol=1e-37)
    assert np.all(norms(ball, projected) <= radius * (1 + 4 * EPS))


@pytest.mark.parametrize("ball", BALLS)
def test_no_point_of_the_ball_is_nearer_than_the_projection(ball):
    rng = np.random.default_rng(0)
    delta = rng.standard_normal((8, 5)).astype(np.float32) * 2
    projected = np.asarray(BALLS[ball](0.7).project(jnp.asarray(delta)), np.float64)
    points = in_ball(ball, 0.7, 4000, rng, 5)
    for point, nearest in zip(delta, projected, strict=True):
        distances = np.linalg.norm(point - points, axis=1)
        assert np.linalg.norm(point - nearest) <= distances.min() + 1e-6
        # The projection on a convex set is the one point with this property.
        assert np.max((points - nearest) @ (point - nearest)) <= 1e-6


@pytest.mark.parametrize("ball", BALLS)
@hypothesis.given(delta=perturbations)
@settings
def test_the_projection_does_not_change_a_bit_inside_the_ball(ball, delta):
    radius = float(norms(ball, delta).max()) * (1 + 4 * EPS) + 1e-30
    projected = BALLS[ball](radius).project(jnp.asarray(delta))
    np.testing.assert_array_equal(np.asarray(projected), delta)


@pytest.mark.parametrize("ball", BALLS)
def test_the_projection_treats_each_example_by_itself(ball):
    delta = jax.random.normal(KEY, [3, 2, 2, 3])
    project = jax.jit(BALLS[ball](0.5).project)
    alone = np.concatenate([project(delta[i : i + 1]) for i in range(3)])
    np.testing.assert_array_equal(project(delta), alone)


@pytest.mark.parametrize("ball", BALLS)
def test_the_norm_is_that_of_numpy(ball):
    delta = jax.random.normal(KEY, [5, 3, 2, 2])
    length = BALLS[ball](1.0).norm(delta)
    assert length.shape == (5,)
    np.testing.assert_allclose(length, norms(ball, delta), rtol=1e-6)


@pytest.mark.parametrize("ball", BALLS)
@pytest.mark.parametrize("radius", [0.0, 0.1, 3.0])
def test_samples_lie_in_the_ball_and_depend_on_the_key_alone(ball, radius):
    sample = jax.jit(BALLS[ball](radius).sample, static_argnums=1)
    first = sample(KEY, (200, 3, 2, 1))
    assert first.shape == (200, 3, 2, 1)
    assert first.dtype == jnp.float32
    assert np.all(norms(ball, first) <= radius * (1 + 4 * EPS))
    np.testing.assert_array_equal(first, sample(KEY, (200, 3, 2, 1)))
    other = sample(jax.random.key(4), (200, 3, 2, 1))
    assert radius == 0 or np.mean(np.asarray(first) == other) < 0.01


def test_linf_samples_are_uniform():
    delta = np.asarray(linf(0.3).sample(KEY, (1000, 4)))
    uniform = stats.uniform(-0.3, 0.6)
    assert stats.kstest(delta.ravel(), uniform.cdf).pvalue > 1e-3
    np.testing.assert_allclose(np.corrcoef(delta.T), np.eye(4), atol=0.12)


def test_l2_samples_have_uniform_lengths_and_uniform_directions():
    delta = np.asarray(in_one_program(l2(0.3).sample, KEY, (2000, 2)), np.float64)
    lengths = np.linalg.norm(delta, axis=1)
    angles = np.arctan2(delta[:, 0], delta[:, 1])
    assert stats.kstest(lengths, stats.uniform(0, 0.3).cdf).pvalue > 1e-3
    assert stats.kstest(angles, stats.uniform(-np.pi, 2 * np.pi).cdf).pvalue > 1e-3
    assert abs(np.corrcoef(lengths, angles)[0, 1]) < 0.1


def test_l2_directions_are_uniform_in_many_dimensions():
    delta = in_one_program(l2(1.0).sample, KEY, (2000, 3, 2))
    delta = np.asarray(delta, np.float64).reshape(2000, 6)
    unit = delta / np.linalg.norm(delta, axis=1, keepdims=True)
    np.testing.assert_allclose(unit.mean(0), np.zeros(6), atol=0.04)
    np.testing.assert_allclose(unit.T @ unit / 2000, np.eye(6) / 6, atol=0.03)


@pytest.mark.parametrize("ball", BALLS)
def test_the_steepest_ascent_attains_the_dual_norm(ball):
    gradient = jax.random.normal(KEY, [16, 3, 2, 2])
    direction = jax.jit(BALLS[ball](0.1).steepest_ascent)(gradient)
    gain = np.sum(np.asarray(gradient, np.float64) * direction, axis=(1, 2, 3))
    dual = np.linalg.norm(
        np.asarray(gradient).reshape(16, -1), {"linf": 1, "l2": 2}[ball], axis=1
    )
    np.testing.assert_allclose(norms(ball, direction), 1.0, rtol=4 * EPS)
    np.testing.assert_allclose(gain, dual, rtol=1e-6)


@pytest.mark.parametrize("ball", BALLS)
def test_no_direction_of_unit_norm_ascends_steeper(ball):
    rng = np.random.default_rng(1)
    gradient = rng.standard_normal((1, 6)).astype(np.float32)
    direction = jax.jit(BALLS[ball](0.1).steepest_ascent)(gradient)
    others = in_ball(ball, 1.0, 4000, rng, 6)
    assert np.max(others @ gradient[0]) <= np.sum(gradient * direction) * (1 + 4 * EPS)


@pytest.mark.parametrize("ball", BALLS)
@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1.0, 1e12, 1e30])
def test_the_step_has_unit_length_however_small_or_large_the_gradient(ball, scale):
    gradient = np.asarray(jax.random.normal(KEY, [4, 3, 3])) * np.float32(scale)
    direction = jax.jit(BALLS[ball](0.1).steepest_ascent)(gradient)
    np.testing.assert_allclose(norms(ball, direction), 1.0, rtol=8 * EPS)


@pytest.mark.parametrize("make_ball", [linf, l2, lambda r: l2(r, gradient_floor=1e-7)])
def test_a_zero_gradient_gives_a_zero_step_to_its_example_alone(make_ball):
    gradient = jnp.array([[0.0, -0.0], [2.0, 2.0]])
    direction = jax.jit(make_ball(0.1).steepest_ascent)(gradient)
    np.testing.assert_array_equal(direction[0], [0.0, 0.0])
    assert np.all(np.asarray(direction[1]) > 0)


@hypothesis.given(
    gradient=hnp.arrays(np.float32, (2, 3), elements=st.floats(0.125, 4, width=32)),
    floor=st.sampled_from([0.0, 1e-10, 1e-3, 1.0]),
    scale=st.sampled_from([1.0, 2.0**-30]),
)
@settings
def test_the_gradient_floor_is_added_to_the_norm(gradient, floor, scale):
    gradient = gradient * np.float32(scale)
    direction = l2(0.1, gradient_floor=floor).steepest_ascent(jnp.asarray(gradient))
    exact = gradient.astype(np.float64)
    expected = exact / (np.linalg.norm(exact, axis=1, keepdims=True) + floor)
    np.testing.assert_allclose(direction, expected, rtol=1e-6)


def test_the_floor_reproduces_the_reference_codes_gradient_of_the_mean():
    gradient = np.asarray(jax.random.normal(KEY, [8, 5]), np.float64) * 1e-9
    of_mean = gradient / 8
    expected = of_mean / (np.linalg.norm(of_mean, axis=1, keepdims=True) + 1e-10)
    ball = l2(0.1, gradient_floor=8 * 1e-10)
    direction = ball.steepest_ascent(jnp.asarray(gradient, jnp.float32))
    np.testing.assert_allclose(direction, expected, rtol=1e-5)


@pytest.mark.parametrize("ball", BALLS)
@pytest.mark.parametrize("radius", [-0.1, float("inf"), float("nan")])
def test_a_ball_rejects_a_negative_or_infinite_radius(ball, radius):
    message = rf"Expected 0 <= radius < inf, got radius={radius}\. .*`8 / 255`"
    with pytest.raises(ValueError, match=message):
        BALLS[ball](radius)


@pytest.mark.parametrize("floor", [-1e-10, float("inf"), float("nan")])
def test_l2_rejects_a_negative_or_infinite_gradient_floor(floor):
    with pytest.raises(ValueError, match=rf"0 <= gradient_floor < inf.*={floor}"):
        l2(1.0, gradient_floor=floor)


@pytest.mark.parametrize("ball", BALLS)
def test_a_ball_knows_its_radius(ball):
    assert BALLS[ball](0.25).radius == 0.25


# PGD on classifiers whose optimum is known


def linear(weights):
    """A plain function as classifier, the images of any shape."""
    return lambda images: images.reshape(len(images), -1) @ weights


def linear_problem(num_classes=2, size=6, seed=0, low=0.3, high=0.7):
    rng = np.random.default_rng(seed)
    images = rng.uniform(low, high, (5, size)).astype(np.float32)
    labels = rng.integers(0, num_classes, 5).astype(np.int32)
    weights = rng.standard_normal((size, num_classes)).astype(np.float32)
    return jnp.asarray(images), jnp.asarray(labels), jnp.asarray(weights)


@pytest.mark.parametrize("loss", [cross_entropy, margin])
@pytest.mark.parametrize("random_start", [False, True])
def test_linf_pgd_reaches_the_optimum_of_a_linear_classifier(loss, random_start):
    images, labels, weights = linear_problem(low=0.0, high=1.0)  # the box bites
    attack = pgd(
        linf(0.1), step_size=0.05, num_steps=6, loss=loss, random_start=random_start
    )
    adversarial = run(attack, linear(weights), images, labels)
    ascent = np.asarray(weights)[:, 1 - labels] - np.asarray(weights)[:, labels]
    expected = np.clip(np.asarray(images) + 0.1 * np.sign(ascent.T), 0, 1)
    np.testing.assert_allclose(adversarial, expected, atol=1e-6)


@pytest.mark.parametrize("loss", [cross_entropy, margin])
@pytest.mark.parametrize("random_start", [False, True])
def test_l2_pgd_reaches_the_optimum_of_a_linear_classifier(loss, random_start):
    images, labels, weights = linear_problem()
    attack = pgd(
        l2(0.2), step_size=0.2, num_steps=40, loss=loss, random_start=random_start
    )
    adversarial = run(attack, linear(weights), images, labels)
    ascent = (np.asarray(weights)[:, 1 - labels] - np.asarray(weights)[:, labels]).T
    unit = ascent / np.linalg.norm(ascent, axis=1, keepdims=True)
    # Projected steps approach it geometrically: the angle halves each time.
    np.testing.assert_allclose(adversarial, np.asarray(images) + 0.2 * unit, atol=1e-5)


@pytest.mark.parametrize(("ball", "dual"), [("linf", 1), ("l2", 2)])
def test_pgd_stays_below_the_certified_margin_and_attains_it(ball, dual):
    """Margins of a linear classifier grow by at most radius * ||w_k - w_y||_dual."""
    images, labels, weights = linear_problem(num_classes=4)
    logits_fn = linear(weights)
    labels = jnp.argmax(logits_fn(images), -1)
    attack = pgd(
        BALLS[ball](0.02), step_size=0.01, num_steps=20, loss=margin, restarts=8,
        judge="any",
    )  # fmt: skip
    adversarial = run(attack, logits_fn, images, labels)
    logits, w = np.asarray(logits_fn(images)), np.asarray(weights)
    bounds = np.array([
        max(
            logits[i, k] - logits[i, y] + 0.02 * np.linalg.norm(w[:, k] - w[:, y], dual)
            for k in range(4)
            if k != y
        )
        for i, y in enumerate(np.asarray(labels))
    ])  # fmt: skip
    reached = np.asarray(margin(logits_fn(adversarial), labels))
    assert np.all(reached <= bounds + 1e-5)
    # Where no misclassification ended the search, the worst case was found.
    robust = bounds < 0
    assert robust.any()
    np.testing.assert_allclose(reached[robust], bounds[robust], atol=1e-3)
    assert np.all(reached[~robust] > 0)


# PGD against the same loop in NumPy


def two_layers(seed=0, size=8, num_classes=3):
    rng = np.random.default_rng(seed)
    return rng.standard_normal((size, 6)), rng.standard_normal((6, num_classes))


def tanh_net(w1, w2):
    w1, w2 = jnp.asarray(w1, jnp.float32), jnp.asarray(w2, jnp.float32)
    return lambda x: jnp.tanh((x.reshape(len(x), -1) - 0.5) @ w1) @ w2


def numpy_pgd(ball, radius, step_size, num_steps, w1, w2, images, labels, start):
    """PGD on the cross entropy of `tanh_net`, its gradient by hand, in float64."""
    one_hot = np.eye(w2.shape[1])[labels]
    current = start
    for _ in range(num_steps):
        hidden = np.tanh((current - 0.5) @ w1)
        odds = np.exp(hidden @ w2)
        error = odds / odds.sum(1, keepdims=True) - one_hot
        gradient = (error @ w2.T * (1 - hidden**2)) @ w1.T
        if ball == "linf":
            step = np.sign(gradient)
        else:
            step = gradient / np.linalg.norm(gradient, axis=1, keepdims=True)
        delta = current + step_size * step - images
        if ball == "linf":
            delta = np.clip(delta, -radius, radius)
        else:
            length = np.linalg.norm(delta, axis=1, keepdims=True)
            delta = delta * np.minimum(1, radius / length)
        current = np.clip(images + delta, 0, 1)
    return current


@pytest.mark.parametrize("random_start", [False, True])
@pytest.mark.parametrize("ball", BALLS)
def test_pgd_reaches_the_pixels_of_a_numpy_loop(ball, random_start):
    w1, w2 = two_layers()
    rng = np.random.default_rng(5)
    images = rng.uniform(size=(6, 8)).astype(np.float32)
    labels = rng.integers(0, 3, 6)
    radius, step_size = 0.3, 0.07
    arguments = (tanh_net(w1, w2), jnp.asarray(images), jnp.asarray(labels))

    def ours(num_steps):
        attack = pgd(
            BALLS[ball](radius),
            step_size=step_size,
            num_steps=num_steps,
            random_start=random_start,
        )
        return np.asarray(run(attack, *arguments), np.float64)

    start = ours(0)  # the same key gives the same start
    assert np.array_equal(start, images) != random_start
    expected = numpy_pgd(
        ball, radius, step_size, 7, w1, w2, images.astype(np.float64), labels, start
    )
    np.testing.assert_allclose(ours(7), expected, atol=3e-6)


# PGD's guarantees


def random_problem(shape=(6, 2, 2, 2), dtype=jnp.float32, seed=1):
    """Images on the box's faces among them, a random net, and its own labels."""
    rng = np.random.default_rng(seed)
    pixels = np.clip(rng.uniform(-0.2, 1.2, shape), 0, 1)
    images = jnp.asarray(pixels, dtype)
    logits_fn = tanh_net(*two_layers(seed, int(np.prod(shape[1:]))))
    labels = jnp.argmax(logits_fn(images.astype(jnp.float32)), -1)
    return logits_fn, images, labels


RUNS = [(1, False), (1, True), (3, True)]


@pytest.mark.parametrize(("restarts", "random_start"), RUNS)
@pytest.mark.parametrize("judge", JUDGES)
@pytest.mark.parametrize("ball", BALLS)
def test_the_result_keeps_shape_and_dtype_and_lies_in_the_ball_and_the_box(
    ball, judge, restarts, random_start
):
    logits_fn, images, labels = random_problem()
    radius = 0.11
    attack = pgd(
        BALLS[ball](radius), step_size=0.06, num_steps=4, restarts=restarts,
        random_start=random_start, judge=judge,
    )  # fmt: skip
    adversarial = run(attack, logits_fn, images, labels)
    assert adversarial.shape == images.shape
    assert adversarial.dtype == images.dtype
    pixels = np.asarray(adversarial, np.float64)
    assert pixels.min() >= 0
    assert pixels.max() <= 1
    delta = pixels - np.asarray(images, np.float64)
    assert norms(ball, delta).max() > radius / 4
    slack = 4 * EPS * (1 if ball == "linf" else 8**0.5)
    assert np.all(norms(ball, delta) <= radius + slack)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.uint8])
@pytest.mark.parametrize("radius", [0.0, 0.11])
def test_images_of_too_little_precision_are_refused(dtype, radius):
    logits_fn, images, labels = random_problem(dtype=dtype)
    attack = pgd(linf(radius), step_size=0.06, num_steps=4)
    with pytest.raises(ValueError, match=f"float32 images.*got dtype='{dtype.dtype}'"):
        attack(logits_fn, images, labels, key=KEY)


@pytest.mark.parametrize("ball", BALLS)
@hypothesis.given(seed=st.integers(0, 10**6))
@hypothesis.settings(settings, max_examples=10)
def test_the_result_lies_in_the_ball_and_the_box_for_random_nets(ball, seed):
    _, images, labels = random_problem(seed=seed)
    w1, w2 = two_layers(seed)
    adversarial = compiled_attack(ball)(
        jnp.asarray(w1), jnp.asarray(w2), images, labels
    )
    delta = np.asarray(adversarial, np.float64) - np.asarray(images, np.float64)
    assert np.all(norms(ball, delta) <= 0.2 + 4 * EPS)
    assert 0 <= np.min(adversarial) <= np.max(adversarial) <= 1


@functools.cache
def compiled_attack(ball):
    attack = pgd(BALLS[ball](0.2), step_size=0.1, num_steps=5)

    def on_net(w1, w2, images, labels):
        return attack(tanh_net(w1, w2), images, labels, key=KEY)

    return jax.jit(on_net)


def test_the_result_lies_in_another_box():
    _, images, labels = random_problem()
    images = images * 2 - 1
    logits_fn = tanh_net(*two_layers())
    attack = pgd(linf(0.5), step_size=0.5, num_steps=3, box=(-1.0, 1.0))
    adversarial = np.asarray(run(attack, logits_fn, images, labels))
    assert adversarial.min() == -1
    assert adversarial.max() == 1


@pytest.mark.parametrize("ball", BALLS)
def test_radius_zero_returns_the_images_bit_for_bit(ball):
    logits_fn, images, labels = random_problem()
    for restarts, random_start in RUNS:
        attack = pgd(
            BALLS[ball](0.0), step_size=0.0, num_steps=3, restarts=restarts,
            random_start=random_start, judge="any",
        )  # fmt: skip
        adversarial = run(attack, logits_fn, images, labels)
        assert np.asarray(adversarial).tobytes() == np.asarray(images).tobytes()


def test_the_identity_attack_returns_the_images_and_never_asks_the_classifier():
    _, images, labels = random_problem()

    def logits_fn(images):
        raise AssertionError(images)

    assert identity(logits_fn, images, labels, key=KEY) is images
    none = pgd(linf(0.0), step_size=1.0, num_steps=1)
    np.testing.assert_array_equal(none(logits_fn, images, labels, key=KEY), images)


@pytest.mark.parametrize("judge", JUDGES)
def test_no_steps_return_the_start(judge):
    logits_fn, images, labels = random_problem()
    still = pgd(linf(0.1), step_size=0.0, num_steps=0, random_start=False, judge=judge)
    np.testing.assert_array_equal(run(still, logits_fn, images, labels), images)
    start = pgd(linf(0.1), step_size=0.0, num_steps=0, judge=judge)
    delta = np.asarray(run(start, logits_fn, images, labels)) - np.asarray(images)
    assert 0.05 < np.abs(delta).max() <= 0.1 + EPS


def test_jit_does_not_change_the_result():
    logits_fn, images, labels = random_problem()
    attack = pgd(
        linf(0.1), step_size=0.04, num_steps=4, random_start=False, judge="any"
    )
    np.testing.assert_allclose(
        run(attack, logits_fn, images, labels),
        attack(logits_fn, images, labels, key=KEY),
        atol=1e-6,
    )


def test_the_result_depends_on_the_key_and_on_nothing_else():
    logits_fn, images, labels = random_problem()
    attack = pgd(linf(0.1), step_size=0.02, num_steps=2)
    jitted = jax.jit(lambda key: attack(logits_fn, images, labels, key=key))
    np.testing.assert_array_equal(jitted(KEY), jitted(KEY))
    assert np.any(jitted(KEY) != jitted(jax.random.key(4)))


def test_a_second_call_does_not_trace_again():
    logits_fn, images, labels = random_problem()
    attack = pgd(linf(0.1), step_size=0.04, num_steps=4, restarts=2, judge="any")
    traces = []

    @jax.jit
    def jitted(images, labels, key):
        traces.append(1)
        return attack(logits_fn, images, labels, key=key)

    adversarial = jitted(images, labels, KEY)
    jitted(adversarial, labels, jax.random.key(9))
    assert len(traces) == 1


@pytest.mark.parametrize("ball", BALLS)
def test_a_batch_of_one_is_attacked_as_in_a_larger_batch(ball):
    logits_fn, images, labels = random_problem()
    attack = pgd(BALLS[ball](0.1), step_size=0.04, num_steps=3, random_start=False)
    whole = run(attack, logits_fn, images, labels)
    alone = run(attack, logits_fn, images[2:3], labels[2:3])
    np.testing.assert_allclose(alone, whole[2:3], atol=1e-6)


@pytest.mark.parametrize("judge", JUDGES)
@pytest.mark.parametrize("ball", BALLS)
def test_attacking_a_batch_equals_attacking_its_halves(ball, judge):
    logits_fn, images, labels = random_problem()
    attack = pgd(
        BALLS[ball](0.1), step_size=0.04, num_steps=3, random_start=False, judge=judge
    )
    whole = run(attack, logits_fn, images, labels)
    halves = [
        run(attack, logits_fn, images[half], labels[half])
        for half in (slice(3), slice(3, 6))
    ]
    np.testing.assert_allclose(whole, np.concatenate(halves), atol=1e-6)


def test_an_examples_steps_do_not_depend_on_its_batch_with_a_gradient_floor_either():
    """The gradient is that of the sum of the losses, not of their mean."""
    logits_fn, images, labels = random_problem()
    ball = l2(0.5, gradient_floor=1.0)
    attack = pgd(ball, step_size=0.1, num_steps=2, random_start=False)
    whole = run(attack, logits_fn, images, labels)
    alone = run(attack, logits_fn, images[:1], labels[:1])
    np.testing.assert_allclose(alone, whole[:1], atol=1e-6)
    assert norms("l2", whole - images).max() < 0.19  # shorter than two full steps


@functools.cache
def outcome(ball, judge, restarts):
    """Which of 200 examples a weak attack fools, and the losses it leaves."""
    rng = np.random.default_rng(2)
    logits_fn = tanh_net(*two_layers(2))
    images = jnp.asarray(rng.uniform(size=(200, 8)), jnp.float32)
    labels = jnp.argmax(logits_fn(images), -1)
    radius = {"linf": 0.06, "l2": 0.15}[ball]
    attack = pgd(
        BALLS[ball](radius), step_size=radius, num_steps=1, restarts=restarts,
        judge=judge,
    )  # fmt: skip
    logits = logits_fn(run(attack, logits_fn, images, labels))
    fooled = np.asarray(jnp.argmax(logits, -1) != labels)
    return fooled, np.asarray(cross_entropy(logits, labels))


@pytest.mark.parametrize("judge", JUDGES)
@pytest.mark.parametrize("ball", BALLS)
def test_more_restarts_misclassify_every_example_that_fewer_do(ball, judge):
    few, few_losses = outcome(ball, judge, 1)
    many, many_losses = outcome(ball, judge, 5)
    assert np.all(many[few])
    assert 0 < few.sum() < many.sum() < 200
    assert np.all(many_losses[~many] >= few_losses[~many] - 1e-6)


@pytest.mark.parametrize("restarts", [1, 5])
@pytest.mark.parametrize("ball", BALLS)
def test_judging_any_iterate_is_never_weaker_than_judging_the_final_one(ball, restarts):
    final, final_losses = outcome(ball, "final", restarts)
    one, losses = outcome(ball, "any", restarts)
    assert np.all(one[final])
    assert np.all(losses[~one] >= final_losses[~one] - 1e-6)


def test_restarts_hand_in_each_examples_own_worst_case():
    """Without steps, half of the starts of each example are misclassified."""
    images = jnp.full([64, 1], 0.5)
    labels = jnp.zeros(64, jnp.int32)

    def logits_fn(images):
        return jnp.concatenate([jnp.full_like(images, 0.5), images], -1)

    def fooled(restarts):
        attack = pgd(linf(0.3), step_size=0.0, num_steps=0, restarts=restarts)
        adversarial = run(attack, logits_fn, images, labels)
        return np.mean(np.asarray(adversarial) > 0.5)

    assert 0.3 < fooled(1) < 0.7
    assert fooled(16) == 1


def test_restarts_hand_in_the_highest_loss_where_no_run_misclassifies():
    images, labels = jnp.full([32, 1], 0.5), jnp.zeros(32, jnp.int32)

    def logits_fn(images):
        return jnp.concatenate([jnp.full_like(images, 10.0), images], -1)

    def highest(restarts):
        attack = pgd(
            linf(0.3), step_size=0.0, num_steps=0, restarts=restarts, loss=margin
        )
        return np.asarray(run(attack, logits_fn, images, labels))

    one, many = highest(1), highest(30)
    assert np.all(many >= one)
    assert many.min() > 0.65  # the maximum of 30 uniform draws from [0.2, 0.8]


def profile_net(profile):
    """Two classes whose margin is `profile(x)` but always seems to grow with x."""

    def logits_fn(images):
        margin = profile(images) + images - jax.lax.stop_gradient(images)
        return jnp.concatenate([jnp.zeros_like(images), margin], -1)

    return logits_fn


def run_past(profile, judge):
    """Iterates .5, .6, .7, .8, .9 on a classifier with this margin."""
    attack = pgd(
        linf(0.45), step_size=0.1, num_steps=4, random_start=False, judge=judge
    )
    images, labels = jnp.full([1, 1], 0.5), jnp.zeros(1, jnp.int32)
    logits_fn = profile_net(lambda x: jax.lax.stop_gradient(profile(x)))
    return float(run(attack, logits_fn, images, labels)[0, 0])


def test_judging_any_hands_in_the_first_misclassified_iterate():
    def profile(x):
        return jnp.where((x > 0.65) & (x < 0.85), x, -1.0)

    np.testing.assert_allclose(run_past(profile, "any"), 0.7, rtol=1e-6)
    np.testing.assert_allclose(run_past(profile, "final"), 0.9, rtol=1e-6)


def test_judging_any_hands_in_the_highest_loss_where_nothing_is_misclassified():
    def profile(x):
        return -1 - jnp.abs(x - 0.8)

    np.testing.assert_allclose(run_past(profile, "any"), 0.8, rtol=1e-6)


def test_judging_any_counts_the_start_and_the_last_iterate():
    np.testing.assert_allclose(run_past(lambda x: 1 - x, "any"), 0.5, rtol=1e-6)
    np.testing.assert_allclose(run_past(lambda x: x - 0.85, "any"), 0.9, rtol=1e-6)


@pytest.mark.parametrize("ball", BALLS)
def test_a_classifier_with_zero_gradient_leaves_the_images_alone(ball):
    _, images, labels = random_problem()
    attack = pgd(BALLS[ball](0.1), step_size=0.1, num_steps=3, random_start=False)
    adversarial = attack(lambda x: jnp.zeros([len(x), 3]), images, labels, key=KEY)
    np.testing.assert_array_equal(adversarial, images)


@pytest.mark.parametrize("ball", BALLS)
def test_the_result_lies_in_the_box_where_the_gradient_is_nan(ball):
    _, images, labels = random_problem()
    attack = pgd(BALLS[ball](0.1), step_size=0.1, num_steps=1, random_start=False)

    def logits_fn(images):
        flat = images.reshape(len(images), -1)
        return jnp.sqrt(flat - jax.lax.stop_gradient(flat))[:, :3] * 0 + flat[:, :3]

    adversarial = np.asarray(run(attack, logits_fn, images, labels))
    assert np.all((adversarial >= 0) & (adversarial <= 1))


# PGD in larger programs


def jaxpr_of(num_steps, restarts=2):
    logits_fn, images, labels = random_problem()
    attack = pgd(linf(0.1), step_size=0.1, num_steps=num_steps, restarts=restarts)
    return jax.make_jaxpr(lambda x, key: attack(logits_fn, x, labels, key=key))(
        images, KEY
    )


def test_the_size_of_the_program_does_not_depend_on_steps_or_restarts():
    sizes = {
        len(str(jaxpr_of(num_steps, restarts)).splitlines())
        for num_steps, restarts in [(2, 2), (50, 2), (2, 50)]
    }
    assert len(sizes) == 1
    assert "while" in str(jaxpr_of(5)) or "scan" in str(jaxpr_of(5))


@pytest.mark.parametrize("radius", [0.1, 0.0])
def test_no_gradient_flows_through_the_result(radius):
    _, images, labels = random_problem()
    w1, w2 = two_layers()
    attack = pgd(linf(radius), step_size=0.1, num_steps=2)

    def total(images, w2):
        return jnp.sum(attack(tanh_net(w1, w2), images, labels, key=KEY))

    gradients = jax.jit(jax.grad(total, argnums=(0, 1)))(images, jnp.asarray(w2))
    assert not any(np.any(gradient) for gradient in gradients)


def test_gradients_of_parameters_flow_around_the_attack():
    """As in adversarial training: the images are constants of the outer gradient."""
    _, images, labels = random_problem()
    w1, w2 = two_layers()
    attack = pgd(linf(0.1), step_size=0.1, num_steps=2, random_start=False)

    def outer(w2, attacked):
        logits_fn = tanh_net(w1, w2)
        images = attacked(logits_fn)
        return jnp.sum(cross_entropy(logits_fn(images), labels))

    def crafted(logits_fn):
        return attack(logits_fn, images, labels, key=KEY)

    w2 = jnp.asarray(w2, jnp.float32)
    fixed = jax.jit(lambda w2: crafted(tanh_net(w1, w2)))(w2)
    gradient = jax.jit(jax.grad(outer), static_argnums=1)
    expected = gradient(w2, lambda _: fixed)
    np.testing.assert_allclose(gradient(w2, crafted), expected, rtol=1e-5)


class LinenNet(nn.Module):
    @nn.compact
    def __call__(self, images):
        hidden = nn.tanh(nn.Conv(4, (3, 3))(images))
        return nn.Dense(3)(hidden.reshape(len(images), -1))


class NNXNet(nnx.Module):
    def __init__(self, rngs):
        self.conv = nnx.Conv(2, 4, (3, 3), rngs=rngs)
        self.dense = nnx.Linear(16, 3, rngs=rngs)

    def __call__(self, images):
        hidden = nnx.tanh(self.conv(images))
        return self.dense(hidden.reshape(len(images), -1))


def linen_logits_fn():
    net = LinenNet()
    variables = jax.jit(net.init)(KEY, jnp.zeros([1, 2, 2, 2]))
    return lambda images: net.apply(variables, images)


def nnx_logits_fn():
    graph, state = nnx.split(NNXNet(nnx.Rngs(0)))
    return lambda images: nnx.merge(graph, state)(images)


def equinox_logits_fn():
    equinox = pytest.importorskip("equinox")
    net = equinox.nn.MLP(8, 3, 4, 1, key=KEY)
    return lambda images: jax.vmap(net)(images.reshape(len(images), -1))


@pytest.mark.parametrize(
    "make_logits_fn", [linen_logits_fn, nnx_logits_fn, equinox_logits_fn]
)
def test_pgd_raises_the_loss_of_models_of_any_library(make_logits_fn):
    _, images, labels = random_problem()
    logits_fn = make_logits_fn()
    attack = pgd(linf(0.1), step_size=0.05, num_steps=3, random_start=False)
    adversarial = run(attack, logits_fn, images, labels)
    losses = jax.jit(lambda images: cross_entropy(logits_fn(images), labels))
    assert np.all(losses(adversarial) > losses(images))


# PGD's messages

GOOD = {"step_size": 0.1, "num_steps": 3}
BAD = {
    "negative steps": ({"num_steps": -1}, r"num_steps >= 0, got num_steps=-1\."),
    "no step size": ({"step_size": 0.0}, r"0 < step_size < inf, got step_size=0\.0\."),
    "negative step size": (
        {"step_size": -0.1},
        r"0 < step_size < inf, got step_size=-0\.1",
    ),
    "NaN step size": (
        {"step_size": float("nan")},
        "0 < step_size < inf, got step_size=nan",
    ),
    "a step in 255ths": (
        {"step_size": 2.0},
        "an l-inf step_size within.*step_size=2.0, box.*did you mean 2 / 255",
    ),
    "no run": ({"restarts": 0}, r"restarts >= 1, got restarts=0\."),
    "equal restarts": (
        {"restarts": 2, "random_start": False},
        "random_start when restarts > 1, got restarts=2, random_start=False. Without",
    ),
    "unknown judge": ({"judge": "best"}, r"judge in \{final, any\}, got judge='best'"),
    "empty box": ({"box": (1.0, 1.0)}, r"box\[0\] < box\[1\], got box=\(1\.0, 1\.0\)"),
}


@pytest.mark.parametrize("case", BAD)
def test_pgd_rejects(case):
    arguments, message = BAD[case]
    with pytest.raises(ValueError, match=f"Expected {message}"):
        pgd(linf(0.1), **(GOOD | arguments))


def test_any_step_size_will_do_where_no_step_is_taken():
    pgd(linf(0.0), step_size=0.0, num_steps=3)
    pgd(linf(0.0), step_size=2.0, num_steps=3)
    pgd(linf(0.1), step_size=0.0, num_steps=0)


def test_a_step_out_of_the_box_is_in_its_units_where_the_radius_is_as_large():
    pgd(linf(1.0), step_size=1.25, num_steps=1)  # FGSM-RS at 255/255
