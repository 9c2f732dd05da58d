"""What every attack keeps to, whoever calls it and from within what.

One table of all public attacks. Images are as small as they may be, for nearly all the
time goes into compiling.
"""

import functools

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from samrobust.attacks import (
    apgd,
    apgd_targeted,
    autoattack,
    ddn,
    dlr,
    draws,
    fab_minimal,
    fab_targeted,
    fgsm,
    identity,
    l2,
    linf,
    noise,
    pgd,
    square,
    staged_pgd,
)
from samrobust.attacks.ddn import _direction

KEYS = jax.random.split(jax.random.key(3), 5)
BALLS = {"linf": linf(0.1), "l2": l2(0.2)}
SHAPE = (3, 2, 1)  # of an image
CLASSES = 4


def staged(ball):
    """The pieces of staged PGD, put together again."""
    pieces = staged_pgd(ball, step_size=0.05, num_steps=2, restarts=2)

    def attack(logits_fn, images, labels, *, key):
        current = pieces.start(images, labels, 1, key=key)
        return pieces.advance(logits_fn, current, images, labels, 2)[0]

    return attack


def part_of(name):
    """A member of AutoAttack, by its part."""

    def make(ball):
        (member,) = autoattack(ball, version="custom", members=[name]).members

        def attack(logits_fn, images, labels, *, key):
            return member.part(logits_fn, images, labels, 1, key=key)

        return attack

    return make


def with_options(make, **options):
    return functools.partial(make, **options)


ATTACKS = {
    "identity": lambda _: identity,
    "pgd": with_options(pgd, step_size=0.05, num_steps=1),
    "pgd, any": with_options(pgd, step_size=0.05, num_steps=1, restarts=2, judge="any"),
    "staged_pgd": staged,
    "fgsm": fgsm,
    "noise": with_options(noise, num_draws=2),
    "apgd": with_options(apgd, num_steps=2, loss=dlr),
    "apgd_targeted": with_options(apgd_targeted, num_steps=2, num_targets=2),
    "fab_targeted": with_options(fab_targeted, num_steps=2, restarts=2),
    "fab_minimal": with_options(fab_minimal, num_steps=2, restarts=2),
    "ddn": lambda _: ddn(num_steps=2),
    "square": with_options(square, num_queries=3, restarts=2),
    "autoattack": with_options(
        autoattack, version="custom", members=("apgd-ce", "square")
    ),
    "part of apgd-t": part_of("apgd-t"),
    "part of fab-t": part_of("fab-t"),
}
# Whose outcome on a linear classifier shows what they drew.
RANDOM = {"pgd, any", "staged_pgd", "noise", "apgd", "square", "autoattack"}


@pytest.fixture(autouse=True, scope="module")
def _compile_quickly():
    with helpers.quick_compilation():
        yield


@functools.cache
def make_weights():
    rng = np.random.default_rng(4)
    return rng.standard_normal((int(np.prod(SHAPE)), CLASSES)).astype(np.float32)


def logits_fn(images):
    """A linear classifier whose sums do not depend on the number of examples."""
    flat = images.reshape(len(images), -1, 1) - 0.5
    return jnp.sum(flat * jnp.asarray(make_weights(), images.dtype)[None], axis=1)


@functools.cache
def make_problem(num=5):
    rng = np.random.default_rng(num)
    images = rng.uniform(0.4, 0.6, (num, *SHAPE)).astype(np.float32)
    return images, np.asarray(jnp.argmax(logits_fn(images), -1), np.int32)


@functools.cache
def compiled(name, ball):
    attack = ATTACKS[name](BALLS[ball])
    return jax.jit(
        lambda images, labels, key: attack(logits_fn, images, labels, key=key)
    )


every_attack = pytest.mark.parametrize("name", ATTACKS)
every_ball = pytest.mark.parametrize("ball", BALLS)


@every_ball
@every_attack
def test_what_an_example_draws_depends_on_its_own_key_alone(name, ball):
    attack, (images, labels) = compiled(name, ball), make_problem()
    whole = np.asarray(attack(images, labels, KEYS))
    chosen = np.array([4, 2])
    np.testing.assert_array_equal(
        attack(images[chosen], labels[chosen], KEYS[chosen]), whole[chosen]
    )
    if name in RANDOM and ball == "l2":
        other = attack(images, labels, KEYS[::-1]) != whole
        np.testing.assert_array_equal(np.any(other, (1, 2, 3)), [1, 1, 0, 1, 1])


def test_a_step_where_the_gradient_is_zero_draws_from_the_examples_key_alone():
    start = jnp.full([5, *SHAPE], 0.5)
    draw = jax.jit(lambda x, key: _direction(0 * x, key))
    whole = np.asarray(draw(start, KEYS))
    assert len({row.tobytes() for row in whole}) == 5
    np.testing.assert_array_equal(draw(start[1:3], KEYS[1:3]), whole[1:3])


def test_one_key_is_each_examples_with_its_position_folded_in():
    key = KEYS[0]
    own = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(5))
    for draw in (draws.uniform, draws.normal, draws.coins):
        np.testing.assert_array_equal(draw(key, (5, 2)), draw(own, (5, 2)))
    old = jax.random.key_data(key)  # a key of the old kind
    np.testing.assert_array_equal(draws.normal(old, (5, 2)), draws.normal(key, (5, 2)))
    with pytest.raises(ValueError, match=r"of one an example, got key_shape=\(4,\)"):
        draws.normal(own[:4], (5, 2))
