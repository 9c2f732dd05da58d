"""FAB, DDN and noise: closed forms on linear classifiers, and the guarantees."""

import functools

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from samrobust.attacks import ddn, fab_minimal, fab_targeted, l2, linf, noise

KEY = jax.random.key(3)
EPS = float(np.finfo(np.float32).eps)
BALLS = {"linf": linf, "l2": l2}
RADII = {"linf": 0.06, "l2": 0.2}
DUAL = {"linf": 1, "l2": 2}

# Attacks with a radius and without, by name; few steps, since most of a test compiles.
BOUNDED = {
    "fab": lambda ball: fab_targeted(ball, num_steps=10),
    "fab with restarts": lambda ball: fab_targeted(ball, num_steps=5, restarts=2),
    "noise": lambda ball: noise(ball, num_draws=5),
}
MINIMAL = {
    "minimal fab linf": lambda: fab_minimal(linf(0.1), num_steps=10),
    "minimal fab l2": lambda: fab_minimal(l2(0.1), num_steps=5, restarts=2),
    "ddn": lambda: ddn(num_steps=20),
}
ALL = {
    **{f"{name} {ball}": functools.partial(make, BALLS[ball](RADII[ball]))
       for name, make in BOUNDED.items() for ball in BALLS},
    **MINIMAL,
}  # fmt: skip


def problem(num=40, shape=(2, 2, 2), num_classes=4, seed=0):
    """A random net, images on the box's faces among them, a tenth of labels wrong."""
    rng = np.random.default_rng(seed)
    size = int(np.prod(shape))
    w1 = jnp.asarray(rng.standard_normal((size, 16)), jnp.float32)
    w2 = jnp.asarray(rng.standard_normal((16, num_classes)), jnp.float32)

    def logits_fn(images):
        return jnp.tanh((images.reshape(len(images), -1) - 0.5) @ w1) @ w2

    pixels = np.clip(rng.uniform(-0.1, 1.1, (num, *shape)), 0, 1)
    images = jnp.asarray(pixels, jnp.float32)
    labels = jnp.argmax(logits_fn(images), -1)
    return logits_fn, images, jnp.where(jnp.arange(num) % 10 == 9, 3 - labels, labels)


def run(attack, logits_fn, images, labels, key=KEY):
    return helpers.jitted(attack, logits_fn)[0](images, labels, key)


def is_wrong(logits_fn, images, labels):
    return np.asarray(jnp.argmax(logits_fn(images), -1) != labels)


@functools.cache
def compiled(name):
    """An attack on the classifier of `problem`, compiled once for most tests."""
    return helpers.jitted(ALL[name](), problem()[0])


@functools.cache
def outcome(name):
    """Original and attacked images, and which are misclassified before and after."""
    logits_fn, images, labels = problem()
    result = compiled(name)[0](images, labels, KEY)
    wrong = [is_wrong(logits_fn, x, labels) for x in (images, result)]
    return np.asarray(images), np.asarray(result), *wrong


# Guarantees


@pytest.mark.parametrize("name", ALL)
def test_the_result_keeps_shape_and_dtype_and_lies_in_the_box(name):
    images, result, _, _ = outcome(name)
    assert result.shape == images.shape
    assert result.dtype == images.dtype
    assert result.min() >= 0
    assert result.max() <= 1


@pytest.mark.parametrize("name", ALL)
def test_images_that_are_misclassified_already_are_unchanged(name):
    images, result, before, _ = outcome(name)
    assert 2 <= before.sum() <= 4
    np.testing.assert_array_equal(result[before], images[before])


@pytest.mark.parametrize("name", ALL)
def test_some_images_are_broken_and_the_others_are_left_alone(name):
    images, result, before, after = outcome(name)
    assert after.sum() > before.sum()
    if not name.startswith("noise"):  # which hands in its most harmful draw
        np.testing.assert_array_equal(result[~after], images[~after])
    assert after.all() == (name in MINIMAL)


@pytest.mark.parametrize("ball", BALLS)
@pytest.mark.parametrize("name", BOUNDED)
def test_the_result_lies_in_the_ball(name, ball):
    images, result, _, _ = outcome(f"{name} {ball}")
    moved = helpers.norms(ball, result.astype(np.float64) - images)
    assert moved.max() > RADII[ball] / 2
    assert np.all(moved <= RADII[ball] + 4 * EPS)


@pytest.mark.parametrize("ball", BALLS)
@pytest.mark.parametrize("name", BOUNDED)
def test_radius_zero_returns_the_images_bit_for_bit(name, ball):
    logits_fn, images, labels = problem()
    result = BOUNDED[name](BALLS[ball](0.0))(logits_fn, images, labels, key=KEY)
    assert np.asarray(result).tobytes() == np.asarray(images).tobytes()


def test_a_large_radius_breaks_every_image():
    logits_fn, images, labels = problem()
    result = run(BOUNDED["fab"](linf(1.0)), logits_fn, images, labels)
    assert is_wrong(logits_fn, result, labels).all()


@pytest.mark.parametrize("name", ["fab linf", "fab with restarts l2", "ddn"])
def test_the_result_lies_in_another_box(name):
    logits_fn, images, labels = problem()
    make = {
        "fab linf": lambda box: fab_minimal(linf(1.0), num_steps=5, box=box),
        "fab with restarts l2": lambda box: fab_minimal(
            l2(4.0), num_steps=5, restarts=2, box=box
        ),
        "ddn": lambda box: ddn(num_steps=5, init_epsilon=10.0, box=box),
    }[name]
    attack = make((-1.0, 0.6))
    result = run(attack, lambda x: logits_fn(0.5 * x + 0.5), 1.6 * images - 1, labels)
    assert np.min(result) == -1
    assert np.isclose(np.max(result), 0.6)


@pytest.mark.parametrize("name", ["fab linf", "ddn"])
def test_jit_does_not_change_the_result(name):
    logits_fn, images, labels = problem()
    plain = ALL[name]()(logits_fn, images, labels, key=KEY)
    np.testing.assert_allclose(outcome(name)[1], plain, atol=1e-4)


@pytest.mark.parametrize("name", ["fab linf", "ddn"])
def test_attacking_a_batch_equals_attacking_its_halves(name):
    """Even where one half alone would end all runs early."""
    _, images, labels = problem()
    labels = labels.at[:20].set((labels[:20] + 1) % 4)  # done before it begins
    attack, _ = compiled(name)
    whole = attack(images, labels, KEY)
    for half in (slice(20), slice(20, 40)):
        alone = attack(images[half], labels[half], KEY)
        np.testing.assert_allclose(whole[half], alone, atol=1e-5)
    assert np.any(whole[20:] != images[20:])


@pytest.mark.parametrize("name", ["minimal fab l2", "noise l2", "ddn"])
def test_a_second_call_does_not_trace_again_and_the_key_decides(name):
    _, images, labels = problem()
    attack, traces = compiled(name)
    first, again = attack(images, labels, KEY), attack(images, labels, KEY)
    np.testing.assert_array_equal(first, again)
    other = attack(images, labels, jax.random.key(4))
    # DDN draws only where the gradient is zero, which is nowhere here.
    assert np.any(other != first) == (name != "ddn")
    attack(images * 0.5, labels, KEY)
    assert traces.count(images.shape) == 1


@pytest.mark.parametrize("name", ["fab linf", "noise linf", "ddn"])
def test_no_gradient_flows_through_the_result(name):
    logits_fn, images, labels = problem(num=4)

    def total(images):
        return jnp.sum(ALL[name]()(logits_fn, images, labels, key=KEY))

    assert not np.any(jax.jit(jax.grad(total))(images))


@pytest.mark.parametrize("name", ["fab linf", "ddn"])
def test_a_classifier_without_gradients_and_one_of_nan_leave_the_box_alone(name):
    _, images, labels = problem(num=4)

    def steep(images):
        pixels = images.reshape(len(images), -1)
        return (
            pixels[:, :4] + 0 * jnp.sqrt(pixels - jax.lax.stop_gradient(pixels))[:, :4]
        )

    @jax.jit
    def attacked(images, labels, is_steep):
        def logits_fn(x):
            return jax.lax.cond(is_steep, steep, lambda x: jnp.ones([len(x), 4]), x)

        gradient = jax.grad(lambda x: jnp.sum(logits_fn(x)))(images)
        return gradient, ALL[name]()(logits_fn, images, labels, key=KEY)

    gradient, flat = attacked(images, labels * 0, False)
    assert not np.any(gradient)
    assert np.all((flat >= 0) & (flat <= 1))
    gradient, nan = attacked(images, labels, True)
    assert np.isnan(gradient).any()
    assert np.all((nan >= 0) & (nan <= 1))


@pytest.mark.parametrize("name", ["fab linf", "noise l2", "ddn"])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.uint8])
def test_images_of_too_little_precision_are_refused(name, dtype):
    logits_fn, images, labels = problem(num=2)
    with pytest.raises(ValueError, match=f"float32 images.*got dtype='{dtype.dtype}'"):
        ALL[name]()(logits_fn, images.astype(dtype), labels, key=KEY)


# FAB


def linear_problem(num_classes, seed=0, size=6):
    rng = np.random.default_rng(seed)
    images = jnp.asarray(rng.uniform(0.4, 0.6, (16, size)), jnp.float32)
    weights = jnp.asarray(rng.standard_normal((size, num_classes)), jnp.float32)

    def logits_fn(images):
        return (images - 0.5) @ weights

    return logits_fn, images, jnp.argmax(logits_fn(images), -1), weights


def distances_to_planes(ball, logits_fn, images, labels, weights):
    """|z_k - z_y| / ||w_k - w_y||_dual, [B, K]; infinite at the label."""
    logits, w, y = (
        np.asarray(logits_fn(images)),
        np.asarray(weights),
        np.asarray(labels),
    )
    gaps = logits[np.arange(len(y)), y][:, None] - logits
    normals = w[:, None, :] - w[:, y][:, :, None]
    lengths = np.linalg.norm(normals, DUAL[ball], axis=0)
    return np.where(lengths > 0, gaps / np.where(lengths > 0, lengths, 1), np.inf)


@pytest.mark.parametrize(("ball", "num_classes"), [("linf", 5), ("l2", 5), ("l2", 2)])
def test_fab_measures_the_distance_to_a_linear_boundary(ball, num_classes):
    problem = linear_problem(num_classes)
    logits_fn, images, labels, _ = problem
    result = run(fab_minimal(BALLS[ball](0.1)), logits_fn, images, labels)
    assert is_wrong(logits_fn, result, labels).all()
    expected = distances_to_planes(ball, *problem).min(axis=1)
    # A step overshoots by a twentieth; what follows narrows it down.
    np.testing.assert_allclose(
        helpers.norms(ball, result - images), expected, rtol=1e-2
    )


@pytest.mark.parametrize("ball", BALLS)
def test_fab_breaks_the_examples_nearer_than_the_radius_and_no_others(ball):
    problem = linear_problem(5)
    logits_fn, images, labels, _ = problem
    distances = distances_to_planes(ball, *problem).min(axis=1)
    radius = float(np.median(distances))
    result = run(fab_targeted(BALLS[ball](radius)), logits_fn, images, labels)
    broken = is_wrong(logits_fn, result, labels)
    np.testing.assert_array_equal(broken, distances < radius)


def test_fab_needs_the_target_that_is_nearest_in_pixels_not_in_logits():
    """The runner-up's logit is nearer, but the third class has the steeper gradient."""

    def logits_fn(x):
        return jnp.stack([x[:, 0] * 0, 0.1 * x[:, 0] - 0.1, x[:, 1] - 0.7], axis=-1)

    images, labels = jnp.full([1, 2], 0.5), jnp.zeros(1, jnp.int32)
    few, many = (
        run(fab_targeted(linf(0.3), num_targets=n), logits_fn, images, labels)
        for n in (1, 2)
    )
    np.testing.assert_array_equal(few, images)
    assert is_wrong(logits_fn, many, labels).all()


def test_fab_keeps_what_the_first_run_found_though_others_of_the_batch_go_on():
    """The likelier class is 0.1 away along one pixel, the other 0.02 along another."""

    def logits_fn(x):
        likelier, nearer = x[:, 0] - 0.6, 10 * (x[:, 1] - 0.52)
        return jnp.stack([jnp.zeros_like(likelier), likelier, nearer], -1)

    images, labels = jnp.array([[0.5, 0.5], [0.1, 0.1]]), jnp.zeros(2, jnp.int32)
    found = run(fab_targeted(l2(0.2), num_steps=5), logits_fn, images, labels)
    np.testing.assert_allclose(found - images, [[0.1, 0], [0, 0]], atol=0.01)


def test_more_targets_and_more_restarts_never_lengthen_what_fab_finds():
    logits_fn, images, labels = problem(seed=1)

    def lengths(num_targets, restarts):
        attack = fab_minimal(
            l2(1.0), num_targets=num_targets, restarts=restarts, num_steps=3
        )
        return helpers.norms("l2", run(attack, logits_fn, images, labels) - images)

    one, targets, restarts = lengths(1, 1), lengths(3, 1), lengths(3, 6)
    assert np.all(targets <= one + 1e-6)
    assert np.all(restarts <= targets + 1e-6)
    assert targets.sum() < one.sum() - 0.01


def test_a_third_restart_never_lengthens_what_two_find():
    logits_fn, images, labels = helpers.oscillating(500)

    def lengths(restarts):
        attack = fab_minimal(l2(0.3), num_targets=4, num_steps=5, restarts=restarts)
        found = run(attack, logits_fn, images, labels)
        wrong = is_wrong(logits_fn, found, labels)
        return np.where(wrong, helpers.norms("l2", found - images), np.inf)

    two, three = lengths(2), lengths(3)
    assert np.all(three <= two + 1e-6)
    assert np.any(three < two - 1e-3)


def test_only_a_restart_leaves_a_point_without_gradient():
    images, labels = jnp.full([8, 3], 0.5), jnp.zeros(8, jnp.int32)

    def logits_fn(x):
        return jnp.stack([jnp.full(len(x), 0.01), jnp.sum((x - 0.5) ** 2, 1)], -1)

    def broken(restarts):
        attack = fab_targeted(l2(0.4), restarts=restarts, num_steps=10)
        result = run(attack, logits_fn, images, labels)
        return is_wrong(logits_fn, result, labels)

    assert not broken(1).any()
    assert broken(2).all()


@pytest.mark.parametrize("ball", BALLS)
def test_restarts_begin_half_a_radius_away(ball):
    """Without gradient and walks home the first step stays where it is."""
    images, labels = jnp.full([64, 3], 0.5), jnp.zeros(64, jnp.int32)

    def logits_fn(x):
        moved = jnp.any(x != 0.5, axis=1) + 0 * jnp.sum(x, axis=1)
        return jnp.stack([jnp.full(len(x), 0.5), moved], axis=-1)

    attack = fab_minimal(BALLS[ball](0.4), num_steps=1, restarts=2, alpha_max=0.0)
    delta = np.asarray(run(attack, logits_fn, images, labels)) - 0.5
    np.testing.assert_allclose(helpers.norms(ball, delta), 0.2, rtol=1e-6)
    assert len(np.unique(delta, axis=0)) == 64


def test_a_classifier_of_one_class_is_refused():
    _, images, labels = problem(num=2)
    attack = fab_targeted(linf(0.1))
    with pytest.raises(ValueError, match=r"2 classes or more.*logits_shape=\(2, 1\)"):
        attack(lambda x: jnp.zeros([len(x), 1]), images, labels * 0, key=KEY)


BAD_FAB = {
    "no target": ({"num_targets": 0}, r"num_targets >= 1, got num_targets=0\."),
    "negative steps": ({"num_steps": -1}, r"num_steps >= 0, got num_steps=-1\."),
    "no run": ({"restarts": 0}, r"restarts >= 1, got restarts=0\."),
    "alpha": ({"alpha_max": 1.5}, r"0 <= alpha_max <= 1, got alpha_max=1\.5\."),
    "eta": ({"eta": 0.9}, r"1 <= eta < inf, got eta=0\.9\."),
    "beta": ({"beta": 1.0}, r"0 < beta < 1, got beta=1\.0\."),
    "empty box": ({"box": (1.0, 1.0)}, r"box\[0\] < box\[1\], got box=\(1\.0, 1\.0\)"),
}


@pytest.mark.parametrize("make", [fab_targeted, fab_minimal])
@pytest.mark.parametrize("case", BAD_FAB)
def test_fab_rejects(case, make):
    arguments, message = BAD_FAB[case]
    with pytest.raises(ValueError, match=f"Expected {message}"):
        make(linf(0.1), **arguments)


def test_fab_without_a_radius_rejects_random_starts_of_radius_zero():
    fab_minimal(linf(0.0))
    with pytest.raises(ValueError, match=r"Expected ball.radius > 0 when restarts > 1"):
        fab_minimal(linf(0.0), restarts=2)


# DDN


def test_ddn_measures_the_distance_to_a_linear_boundary():
    problem = linear_problem(2)
    logits_fn, images, labels, _ = problem
    attack = ddn(num_steps=300, init_epsilon=0.1)
    result = run(attack, logits_fn, images, labels)
    assert is_wrong(logits_fn, result, labels).all()
    expected = distances_to_planes("l2", *problem).min(axis=1)
    lengths = helpers.norms("l2", result - images)
    assert np.all(lengths >= expected * (1 - 1e-4))
    assert np.all(lengths <= expected * 1.06)  # the radius moves by a twentieth


def test_ddn_goes_in_random_directions_where_the_gradient_is_zero():
    images, labels = jnp.full([8, 4], 0.5), jnp.zeros(8, jnp.int32)

    def logits_fn(x):
        far = jnp.sum(jnp.square(x - 0.5), axis=1) > 0.05
        return jnp.stack([jnp.zeros(len(x)), jnp.where(far, 1.0, -1.0)], axis=-1)

    attack, _ = helpers.jitted(ddn(num_steps=40, init_epsilon=0.1), logits_fn)
    results = [attack(images, labels, jax.random.key(k)) for k in (0, 1)]
    for result in results:
        assert is_wrong(logits_fn, result, labels).all()
        assert helpers.norms("l2", result - images).max() < 0.3
    assert np.all(results[0] != results[1])


BAD_DDN = {
    "negative steps": ({"num_steps": -1}, r"num_steps >= 0, got num_steps=-1\."),
    "epsilon": ({"init_epsilon": 0.0}, "0 < init_epsilon < inf, got init_epsilon=0.0"),
    "gamma": ({"gamma": 1.0}, r"0 < gamma < 1, got gamma=1\.0\."),
    "empty box": ({"box": (1.0, 0.0)}, r"box\[0\] < box\[1\], got box=\(1\.0, 0\.0\)"),
}


@pytest.mark.parametrize("case", BAD_DDN)
def test_ddn_rejects(case):
    arguments, message = BAD_DDN[case]
    with pytest.raises(ValueError, match=f"Expected {message}"):
        ddn(**arguments)


# Noise


@pytest.mark.parametrize("ball", BALLS)
def test_noise_lies_at_the_full_radius_in_uniform_directions(ball):
    images, labels = jnp.full([2000, 3], 0.5), jnp.zeros(2000, jnp.int32)

    def logits_fn(x):
        return jnp.concatenate([jnp.ones([len(x), 1]), 0 * x], -1)

    attack = noise(BALLS[ball](0.3), num_draws=1)
    delta = np.asarray(run(attack, logits_fn, images, labels)) - 0.5
    np.testing.assert_allclose(helpers.norms(ball, delta), 0.3, rtol=1e-6)
    np.testing.assert_allclose(delta.mean(0), 0, atol=0.03)
    variance = {"linf": 0.09, "l2": 0.03}[ball]
    np.testing.assert_allclose(np.cov(delta.T), variance * np.eye(3), atol=0.01)
    if ball == "linf":  # the corners
        np.testing.assert_allclose(np.abs(delta), 0.3, rtol=1e-6)


def test_more_noise_breaks_every_example_that_less_does():
    logits_fn, images, labels = problem(num=200)
    fooled = [
        is_wrong(logits_fn, run(attack, logits_fn, images, labels), labels)
        for attack in (noise(linf(0.1), num_draws=n) for n in (1, 50))
    ]
    assert np.all(fooled[1][fooled[0]])
    assert fooled[0].sum() < fooled[1].sum() < 200


def test_noise_hands_in_the_highest_loss_where_nothing_is_misclassified():
    images, labels = jnp.full([32, 4], 0.5), jnp.zeros(32, jnp.int32)

    def logits_fn(x):
        return jnp.stack([jnp.full(len(x), 9.0), jnp.sum(x, axis=1)], axis=-1)

    result = run(noise(linf(0.25), num_draws=64), logits_fn, images, labels)
    assert np.mean(np.sum(result, axis=1) == 3) > 0.9  # of 16 corners the highest


def test_noise_rejects():
    with pytest.raises(ValueError, match=r"Expected num_draws >= 1, got num_draws=0\."):
        noise(linf(0.1), num_draws=0)
    with pytest.raises(ValueError, match=r"Expected box\[0\] < box\[1\]"):
        noise(linf(0.1), box=(0.0, 0.0))
