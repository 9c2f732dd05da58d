"""The attacks on images in float64: as exact as these, and with float32's outcome.

Robustness that comes from rounding would show here: as an example that stands in one
precision and falls in the other.
"""

import functools

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import in_one_program

from samrobust.attacks import (
    apgd,
    apgd_targeted,
    autoattack,
    cross_entropy,
    ddn,
    dlr,
    fab_minimal,
    fab_targeted,
    l2,
    linf,
    margin,
    noise,
    pgd,
    square,
    staged_pgd,
    targeted_dlr,
)

KEY = jax.random.key(5)
BALLS = {"linf": linf(0.05), "l2": l2(0.2)}
ATTACKS = {
    "apgd-ce": apgd,
    "apgd-dlr": functools.partial(apgd, loss=dlr),
    "apgd-t": apgd_targeted,
    "fab-t": fab_targeted,
    "fab-t with restarts": functools.partial(fab_targeted, restarts=2, num_steps=20),
    "square": functools.partial(square, num_queries=1000),
    "autoattack": autoattack,
    "noise": noise,
    "pgd": functools.partial(pgd, step_size=0.01, num_steps=10, restarts=2),
    "pgd, any": functools.partial(pgd, step_size=0.01, num_steps=10, judge="any"),
}
MINIMAL = {"fab": fab_minimal, "ddn": lambda _: ddn()}
LOSSES = {
    "cross_entropy": cross_entropy,
    "margin": margin,
    "dlr": dlr,
    "targeted_dlr": lambda logits, labels: targeted_dlr(logits, labels, 1 - labels),
}
BOTH = (np.float32, np.float64)

every_ball = pytest.mark.parametrize("ball", BALLS)


@functools.cache
def make_problem(num=24):
    """Weights, images that float32 can hold, and labels, of which one is wrong."""
    rng = np.random.default_rng(5)
    sizes = ((16, 12), (12, 5))
    weights = [rng.standard_normal(size).astype(np.float32) for size in sizes]
    images = rng.uniform(size=(num, 4, 4, 1)).astype(np.float32)
    labels = np.array(jnp.argmax(logits_of(weights, images), -1), np.int32)
    labels[0] = (labels[0] + 1) % 5
    return weights, images, labels


def logits_of(weights, images, scale=1.0):
    """A small network that bends, all of it in the images' precision."""
    first, second = (jnp.asarray(array, images.dtype) for array in weights)
    hidden = jnp.tanh((images.reshape(len(images), -1) - 0.5) @ first / 2)
    return scale * (hidden @ second)


@functools.cache
def compiled(name, ball):
    """The attack as a program of the logits' scale too."""
    attack = {**ATTACKS, **MINIMAL}[name](BALLS[ball])

    @jax.jit
    def run(images, labels, scale):
        logits_fn = functools.partial(logits_of, make_problem()[0], scale=scale)
        result = attack(logits_fn, images, labels, key=KEY)
        return result, margin(logits_fn(result), labels)

    return run


@functools.cache
def attacked(name, ball, dtype, scale=1.0):
    """Adversarial images, and their margins: positive where an example is broken."""
    _, images, labels = make_problem()
    with jax.enable_x64(dtype is np.float64):
        given = jnp.asarray(images, dtype), jnp.asarray(labels), scale
        return tuple(map(np.asarray, compiled(name, ball)(*given)))


def lengths(ball, result):
    return helpers.norms(ball, np.asarray(result, np.float64) - make_problem()[1])


@every_ball
@pytest.mark.parametrize("name", [*ATTACKS, *MINIMAL])
def test_what_it_hands_in_is_float64_in_the_ball_and_in_the_box(name, ball):
    result, margins = attacked(name, ball, np.float64)
    assert result.dtype == margins.dtype == np.float64
    assert 0 <= result.min() < result.max() <= 1
    far = lengths(ball, result)
    assert far[0] == 0 or name.startswith(("pgd", "square"))  # misclassified as it is
    if name in ATTACKS:
        # Of float32 it would be 1e-8 and more.
        assert 0 < far.max() <= BALLS[ball].radius + 16 * np.finfo(np.float64).eps
        assert np.any(result != result.astype(np.float32))


@every_ball
@pytest.mark.parametrize("name", ATTACKS)
def test_the_same_examples_break_in_both_precisions_but_for_ties(name, ball):
    margins = [attacked(name, ball, dtype)[1] for dtype in BOTH]
    broken = [values > 0 for values in margins]
    differ = broken[0] != broken[1]
    assert np.all(np.min(np.abs(margins), axis=0)[differ] < 1e-4)
    assert differ.sum() <= 1
    assert 0.2 < np.mean(broken[1]) < 0.9


@every_ball
@pytest.mark.parametrize("name", MINIMAL)
def test_the_distances_are_those_of_float32_up_to_its_rounding(name, ball):
    far = [lengths(ball, attacked(name, ball, dtype)[0]) for dtype in BOTH]
    np.testing.assert_allclose(*far, rtol=1e-4)
    assert np.all(attacked(name, ball, np.float64)[1][1:] > 0)


@every_ball
def test_pgd_in_stages_stays_in_float64(ball):
    weights, images, labels = make_problem()
    pieces = staged_pgd(BALLS[ball], step_size=0.01, num_steps=5)
    with jax.enable_x64(True):
        exact = jnp.asarray(images, np.float64)
        start = in_one_program(pieces.start, exact, labels, 0, key=KEY)
        logits_fn = functools.partial(logits_of, weights)
        final, broken = in_one_program(
            pieces.advance, logits_fn, start, exact, labels, 5
        )
        assert start.dtype == final.dtype == np.float64
        assert broken[0]
        radius = BALLS[ball].radius + 16 * np.finfo(np.float64).eps
        for current in (start, final):
            assert lengths(ball, current).max() <= radius


def test_a_network_that_hides_behind_float32_is_exposed_by_float64():
    """Logits 150 times as large: the cross entropy's gradient is 0 in float32."""
    hidden, exposed = (
        attacked("apgd-ce", "linf", dtype, 150.0)[1] > 0 for dtype in BOTH
    )
    assert hidden.sum() < exposed.sum()
    single, double = (
        attacked("autoattack", "linf", dtype, 150.0)[1] > 0 for dtype in BOTH
    )
    np.testing.assert_array_equal(single, double)
    assert np.all(single >= exposed)


@pytest.mark.parametrize("name", LOSSES)
def test_losses_of_float64_logits_are_float64_and_exact(name):
    logits = np.random.default_rng(2).normal(size=(6, 5))
    labels = np.array([0, 1] * 3, np.int32)
    near = logits.astype(np.float32)
    with jax.enable_x64(True):
        exact, rounded, single = (
            jax.jit(LOSSES[name])(values, labels)
            for values in (logits, near.astype(np.float64), near)
        )
        exact, rounded, single = map(np.asarray, (exact, rounded, single))
    assert (exact.dtype, rounded.dtype, single.dtype) == (np.float64,) * 2 + (
        near.dtype,
    )
    np.testing.assert_allclose(single, rounded, rtol=1e-5)
    assert np.all(exact != rounded)
