"""The Square attack: its windows, its guarantees, and what it accepts."""

import functools

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from samrobust.attacks import cross_entropy, l2, linf, margin, square
from samrobust.attacks.square import L2Moves, LinfMoves, pulse, pulses, window_sizes

KEY = jax.random.key(3)
BALLS = {"linf": linf, "l2": l2}
EPS = float(np.finfo(np.float32).eps)
SHAPES = {
    "gray": (4, 8, 8, 1),
    "color": (4, 10, 10, 3),
    "wide": (4, 5, 9, 3),
    "high": (4, 14, 6, 1),
    "smaller than the smallest window": (4, 2, 2, 3),
}


def run(attack, logits_fn, images, labels, key=KEY):
    return helpers.jitted(attack, logits_fn)[0](images, labels, key)


def make_problem(shape=(12, 6, 6, 2), seed=0, num_classes=3):
    """Images on the box's faces among them, a random net, and its own labels."""
    rng = np.random.default_rng(seed)
    size = int(np.prod(shape[1:]))
    pixels = np.clip(rng.uniform(-0.2, 1.2, shape), 0, 1)
    w1 = (rng.standard_normal((size, 16)) / size**0.5).astype(np.float32)
    w2 = rng.standard_normal((16, num_classes)).astype(np.float32)

    def logits_fn(images):
        return jnp.tanh((images.reshape(len(images), -1) - 0.5) @ w1) @ w2

    hidden = np.tanh((pixels.reshape(len(pixels), -1) - 0.5) @ w1)
    labels = jnp.asarray(np.argmax(hidden @ w2, -1))
    return logits_fn, jnp.asarray(pixels, jnp.float32), labels


def never_fooled(images):
    return jnp.zeros([len(images), 2]) + jnp.array([1.0, 0.0])


@functools.cache
def compiled(ball):
    """An attack on the classifier of `make_problem`, compiled once for many tests."""
    attack = square(BALLS[ball]({"linf": 0.1, "l2": 0.3}[ball]), num_queries=40)
    return helpers.jitted(attack, make_problem()[0])


# Windows


def test_the_windows_shrink_as_the_paper_has_it():
    sizes = window_sizes(9001, 0.8, (32, 32, 3), rescale=False, odd=False)
    halvings = [0, 10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000]
    shares = [0.8 / 2**k for k in range(10)]
    for after, share in zip(halvings, shares, strict=True):
        assert sizes[after + 1] == max(round((share * 1024) ** 0.5), 1)
    changes = np.flatnonzero(np.diff(sizes)) + 1
    np.testing.assert_array_equal(changes, np.array(halvings[1:]) + 1)


def test_a_rescaled_schedule_ends_where_ten_thousand_queries_end():
    whole = window_sizes(10000, 0.8, (32, 32, 3), rescale=False, odd=False)
    tenth = window_sizes(1000, 0.8, (32, 32, 3), rescale=True, odd=False)
    np.testing.assert_array_equal(tenth, whole[::10])


@pytest.mark.parametrize("shape", SHAPES)
def test_windows_fit_into_the_image_and_those_of_l2_are_odd_from_three_up(shape):
    image = SHAPES[shape][1:]
    for odd in (False, True):
        sizes = window_sizes(500, 1.0, image, rescale=True, odd=odd)
        assert np.all((sizes >= 1) & (sizes <= min(image[:2])))
        assert np.all(np.diff(sizes) <= 0)
        free = sizes[sizes < min(image[:2])]
        assert not odd or np.all((free % 2 == 1) & (free >= 3))


@pytest.mark.parametrize("size", [1, 2, 3, 6, 7, 29])
def test_a_pulse_has_unit_norm_and_two_opposite_halves(size):
    values = pulse(size)
    np.testing.assert_allclose(np.linalg.norm(values), 1, rtol=1e-6)
    assert np.all(values[: size // 2] > 0)
    assert np.all(values[size // 2 :] < 0)


def test_pulses_of_all_queries_share_one_table():
    sizes = np.array([7, 7, 3, 3, 3])
    table, which = pulses(sizes)
    assert table.shape == (2, 7, 7)
    for query, size in enumerate(sizes):
        np.testing.assert_array_equal(table[which[query], :size, :size], pulse(size))
        assert np.all(table[which[query], size:] == 0)


@pytest.mark.parametrize("moves_of", [LinfMoves, L2Moves])
def test_a_query_draws_all_corners_but_the_last_ones_and_all_signs(moves_of):
    images = jnp.zeros([2, 7, 5, 2])
    moves = moves_of(images, 0.1, (0.0, 1.0), np.full(400, 3, np.int32))
    keys = jax.random.split(KEY, 400)
    draws = jax.jit(jax.vmap(moves.draw, (None, 0)))(jnp.int32(0), keys)
    for corner in {"corner", "source"} & draws.keys():
        rows, columns = np.asarray(draws[corner]).reshape(-1, 2).T
        np.testing.assert_array_equal(np.unique(rows), [0, 1, 2, 3])
        np.testing.assert_array_equal(np.unique(columns), [0, 1])
    signs = np.asarray(draws["signs"])
    np.testing.assert_allclose(signs.mean(0), 0, atol=0.2)
    np.testing.assert_array_equal(np.abs(signs), 1)


# Guarantees


@pytest.mark.parametrize(
    ("ball", "shape"),
    [
        *(("l2", shape) for shape in SHAPES),
        *(("linf", shape) for shape in ("wide", "high", list(SHAPES)[-1])),
    ],
)
def test_the_result_keeps_shape_and_dtype_and_lies_in_the_ball_and_the_box(ball, shape):
    logits_fn, images, labels = make_problem(SHAPES[shape])
    radius = {"linf": 0.05, "l2": 0.3}[ball]
    attack = square(BALLS[ball](radius), num_queries=30, rescale_schedule=True)
    adversarial = run(attack, logits_fn, images, labels)
    assert adversarial.shape == images.shape
    assert adversarial.dtype == images.dtype
    assert 0 <= np.min(adversarial) <= np.max(adversarial) <= 1
    lengths = helpers.norms(
        ball, np.asarray(adversarial, np.float64) - np.asarray(images)
    )
    assert np.all(lengths <= radius + 8 * EPS)
    assert lengths.max() > radius / 4


def test_the_result_lies_in_another_box():
    logits_fn, images, labels = make_problem()
    attack = square(linf(0.5), num_queries=5, box=(-1.0, 1.0))
    adversarial = run(attack, lambda x: logits_fn(x * 0), images * 2 - 1, labels * 0)
    assert np.min(adversarial) >= -1
    assert np.max(adversarial) <= 1
    assert np.min(run(attack, never_fooled, images * 2 - 1, labels * 0)) == -1


@pytest.mark.parametrize("ball", BALLS)
def test_radius_zero_returns_the_images_and_never_asks_the_classifier(ball):
    _, images, labels = make_problem()

    def logits_fn(images):
        raise AssertionError(images)

    adversarial = square(BALLS[ball](0.0))(logits_fn, images, labels, key=KEY)
    assert np.asarray(adversarial).tobytes() == np.asarray(images).tobytes()


@pytest.mark.parametrize("ball", BALLS)
def test_misclassified_images_come_back_unchanged(ball):
    _, images, labels = make_problem()
    labels = np.where(np.arange(12) % 2 == 0, (np.asarray(labels) + 1) % 3, labels)
    attack, _ = compiled(ball)
    changed = np.any(attack(images, labels, KEY) != images, axis=(1, 2, 3))
    np.testing.assert_array_equal(changed[::2], False)
    assert changed[1::2].any()


@functools.cache
def outcome(ball, num_queries, restarts=1, loss=margin):
    """Which of 100 examples are fooled by how many queries, and their losses."""
    logits_fn, images, labels = make_problem((100, 6, 6, 2), seed=1)
    radius = {"linf": 0.08, "l2": 0.4}[ball]
    attack = square(
        BALLS[ball](radius), num_queries=num_queries, restarts=restarts, loss=loss
    )
    logits = logits_fn(run(attack, logits_fn, images, labels))
    fooled = np.asarray(jnp.argmax(logits, -1) != labels)
    losses = [loss(outputs, labels) for outputs in (logits, logits_fn(images))]
    return fooled, *map(np.asarray, losses)


@pytest.mark.parametrize(("ball", "loss"), [("linf", cross_entropy), ("l2", margin)])
def test_more_queries_and_restarts_never_lower_a_loss_nor_lose_what_is_fooled(
    ball, loss
):
    few, few_losses, natural = outcome(ball, 3, loss=loss)
    assert 0 < few.sum() < 100
    assert np.all(few_losses[~few] >= natural[~few] - 1e-6)
    for num_queries, restarts in [(60, 1), (3, 5)]:
        many, many_losses, _ = outcome(ball, num_queries, restarts, loss)
        assert np.all(many[few])
        assert few.sum() < many.sum() < 100
        robust = ~many
        assert np.all(many_losses[robust] >= few_losses[robust] - 1e-6)
        assert many_losses[robust].mean() > few_losses[robust].mean()


@pytest.mark.parametrize(("ball", "radius"), [("linf", 1.0), ("l2", 8.4)])
def test_a_large_radius_fools_the_classifier_everywhere(ball, radius):
    logits_fn, images, labels = make_problem()
    attack = square(BALLS[ball](radius), num_queries=300)
    logits = logits_fn(run(attack, logits_fn, images, labels))
    assert np.all(jnp.argmax(logits, -1) != labels)


@pytest.mark.parametrize("ball", BALLS)
def test_classifiers_without_a_gradient_are_fooled(ball):
    logits_fn, images, labels = make_problem()

    def decisions(images):
        return np.round(np.asarray(logits_fn(images)) * 4).astype(np.float32)

    def black_box(images):
        result = jax.ShapeDtypeStruct((len(images), 3), jnp.float32)
        return jax.pure_callback(decisions, result, images)

    radius = {"linf": 0.2, "l2": 1.0}[ball]
    labels = jnp.argmax(black_box(images), -1)
    attack = square(BALLS[ball](radius), num_queries=100)
    logits = black_box(run(attack, black_box, images, labels))
    assert np.mean(jnp.argmax(logits, -1) != labels) > 0.5


@pytest.mark.parametrize("ball", BALLS)
def test_an_examples_outcome_does_not_depend_on_the_others(ball):
    _, images, labels = make_problem()
    attack, _ = compiled(ball)
    whole = attack(images, labels, KEY)
    changed = np.array(images), np.array(labels)
    changed[0][6:], changed[1][6:] = 0.5, 0
    mixed = attack(*changed, KEY)
    np.testing.assert_allclose(mixed[:6], whole[:6], atol=1e-6)


# What is accepted, and when the search ends


def count_queries(logits_fn, images, labels, **options):
    """How often the classifier is asked."""
    asked = []

    def counting(images):
        jax.debug.callback(lambda: asked.append(1))
        return logits_fn(images)

    run(square(linf(0.1), **options), counting, images, labels).block_until_ready()
    jax.effects_barrier()
    return len(asked)


def test_the_search_ends_once_all_examples_are_broken():
    images, labels = jnp.full([3, 6, 6, 1], 0.5), jnp.zeros(3, jnp.int32)

    def any_change_fools(images):
        change = jnp.max(jnp.abs(images - 0.5), (1, 2, 3))
        return jnp.stack([jnp.full_like(change, 0.05), change], -1)

    few = {"num_queries": 7, "restarts": 3}
    # The images themselves, and of each run the start alone or all candidates.
    assert count_queries(any_change_fools, images, labels, **few) == 1 + 3
    assert count_queries(never_fooled, images, labels, **few) == 1 + 3 * 8


def test_a_misclassified_candidate_is_taken_though_its_loss_is_no_higher():
    logits_fn, images, labels = make_problem()
    attack = square(linf(0.3), num_queries=60, loss=lambda *_: jnp.zeros(12))
    logits = logits_fn(run(attack, logits_fn, images, labels))
    assert np.mean(jnp.argmax(logits, -1) != labels) > 0.5


def test_an_example_whose_label_ties_goes_on():
    """Every change ties; one pixel at its upper bound decides, once all start low."""
    images, labels = jnp.full([4, 6, 6, 1], 0.5), jnp.zeros(4, jnp.int32)

    def logits_fn(images):
        changed = jnp.max(jnp.abs(images - 0.5), (1, 2, 3)) > 0.05
        row = jnp.all(images[:, 2, :5, 0] > 0.55, axis=1)
        return jnp.stack([1.0 - changed, jnp.where(row, 1.0, 0.0)], -1)

    attack = square(linf(0.1), num_queries=60)
    adversarial = run(attack, logits_fn, images, labels)
    assert np.all(jnp.argmax(logits_fn(adversarial), -1) == 1)


def test_losses_of_nan_are_not_preferred():
    logits_fn, images, labels = make_problem()
    attack = square(linf(0.05), num_queries=20, loss=lambda *_: jnp.full(12, jnp.nan))
    adversarial = np.asarray(run(attack, logits_fn, images, labels))
    assert np.all((adversarial >= 0) & (adversarial <= 1))
    robust = np.asarray(jnp.argmax(logits_fn(adversarial), -1) == labels)
    np.testing.assert_array_equal(adversarial[robust], images[robust])


# In larger programs


def test_jit_does_not_change_the_result():
    logits_fn, images, labels = make_problem()
    attack = square(linf(0.1), num_queries=40)
    np.testing.assert_allclose(
        compiled("linf")[0](images, labels, KEY),
        attack(logits_fn, images, labels, key=KEY),
        atol=1e-6,
    )


def test_the_result_depends_on_the_key_and_a_second_call_does_not_trace_again():
    _, images, labels = make_problem()
    attack, traces = compiled("l2")
    first = attack(images, labels, KEY)
    np.testing.assert_array_equal(first, attack(images, labels, KEY))
    assert np.any(first != attack(images, labels, jax.random.key(4)))
    assert len(traces) == 1


@pytest.mark.parametrize("ball", BALLS)
def test_the_size_of_the_program_does_not_depend_on_queries_or_restarts(ball):
    logits_fn, images, labels = make_problem()

    def size(num_queries, restarts):
        attack = square(BALLS[ball](0.1), num_queries=num_queries, restarts=restarts)
        jaxpr = jax.make_jaxpr(lambda x, k: attack(logits_fn, x, labels, key=k))
        return len(str(jaxpr(images, KEY)).splitlines())

    assert size(20, 2) == size(3000, 2) == size(20, 9)


def test_no_gradient_flows_through_the_result():
    logits_fn, images, labels = make_problem()
    attack = square(linf(0.1), num_queries=3)

    def total(images, scale):
        return jnp.sum(attack(lambda x: scale * logits_fn(x), images, labels, key=KEY))

    gradients = jax.jit(jax.grad(total, argnums=(0, 1)))(images, 2.0)
    assert not any(np.any(gradient) for gradient in gradients)


# Messages

BAD = {
    "no query": ({"num_queries": 0}, r"num_queries >= 1, got num_queries=0\."),
    "empty windows": ({"p_init": 0.0}, r"0 < p_init <= 1, got p_init=0\.0\."),
    "large windows": ({"p_init": 1.5}, r"0 < p_init <= 1, got p_init=1\.5\."),
    "no run": ({"restarts": 0}, r"restarts >= 1, got restarts=0\."),
    "empty box": ({"box": (1.0, 1.0)}, r"box\[0\] < box\[1\], got box=\(1\.0, 1\.0\)"),
}


@pytest.mark.parametrize("case", BAD)
def test_square_rejects(case):
    options, message = BAD[case]
    with pytest.raises(ValueError, match=f"Expected {message}"):
        square(linf(0.1), **options)


@pytest.mark.parametrize("radius", [0.0, 0.1])
def test_square_rejects_images_of_another_shape_or_dtype(radius):
    logits_fn, images, labels = make_problem()
    attack = square(linf(radius))
    with pytest.raises(
        ValueError, match=r"images \[B, H, W, C\], got shape=\(12, 72\)"
    ):
        attack(logits_fn, images.reshape(12, 72), labels, key=KEY)
    with pytest.raises(ValueError, match=r"float32 images.*got dtype='bfloat16'"):
        attack(logits_fn, images.astype(jnp.bfloat16), labels, key=KEY)


def test_square_rejects_a_classifier_of_one_class():
    logits_fn, images, labels = make_problem(num_classes=1)
    with pytest.raises(ValueError, match=r"2 classes or more.*logits_shape=\(12, 1\)"):
        square(linf(0.1))(logits_fn, images, labels, key=KEY)
