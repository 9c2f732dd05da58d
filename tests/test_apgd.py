"""APGD and its targeted form: the documented guarantees, edges and messages.

Their numbers are compared with the authors' code in `tests/oracles`.
"""

import functools

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from samrobust.attacks import apgd, apgd_targeted, cross_entropy, dlr, l2, linf
from samrobust.attacks.apgd import ApgdRun
from samrobust.attacks.per_example import likeliest_wrong

KEY = jax.random.key(3)
EPS = float(np.finfo(np.float32).eps)
BALLS = {"linf": (linf, 0.06), "l2": (l2, 0.15)}
ATTACKS = {
    "cross_entropy": functools.partial(apgd, num_steps=8),
    "dlr": functools.partial(apgd, loss=dlr, num_steps=8),
    "targeted": functools.partial(apgd_targeted, num_targets=2, num_steps=8),
}
every_attack = pytest.mark.parametrize("name", ATTACKS)
# For what does not depend on the loss that `apgd` ascends.
each_form = pytest.mark.parametrize("name", ["dlr", "targeted"])
every_ball = pytest.mark.parametrize("ball", BALLS)


def net(num_classes=5, size=12, seed=0):
    rng = np.random.default_rng(seed)
    first, second = rng.normal(size=(size, 16)), rng.normal(size=(16, num_classes))

    def logits_fn(images):
        flat = images.reshape(len(images), -1)
        return jnp.tanh(flat @ first.astype(np.float32)) @ second.astype(np.float32)

    return logits_fn


LOGITS_FN = net()


@functools.cache
def batch(num=40, seed=1):
    """Images on the faces of the box among them, and their own labels."""
    pixels = np.random.default_rng(seed).uniform(-0.2, 1.2, (num, 2, 2, 3)).clip(0, 1)
    images = jnp.asarray(pixels, jnp.float32)
    return images, jnp.argmax(LOGITS_FN(images), -1)


@functools.cache
def compiled(name, ball, **changes):
    """Made and jitted once for all tests that give it images of the same shape."""
    return helpers.jitted(make(name, ball, **changes), LOGITS_FN)


def attacked(name, ball, images, labels, **changes):
    return compiled(name, ball, **changes)[0](images, labels, KEY)


def is_wrong(images, labels):
    return np.asarray(jnp.argmax(LOGITS_FN(images), -1) != labels)


def make(name, ball, **changes):
    make_ball, radius = BALLS[ball]
    return ATTACKS[name](make_ball(changes.pop("radius", radius)), **changes)


@every_attack
@every_ball
def test_the_result_keeps_shape_and_dtype_and_lies_in_the_ball_and_the_box(name, ball):
    images, labels = batch()
    adversarial = attacked(name, ball, images, labels)
    assert adversarial.shape == images.shape
    assert adversarial.dtype == images.dtype
    assert 0 <= adversarial.min() < adversarial.max() <= 1
    delta = (np.asarray(adversarial, np.float64) - images).reshape(len(images), -1)
    lengths = np.linalg.norm(delta, {"linf": np.inf, "l2": 2}[ball], axis=1)
    assert BALLS[ball][1] / 2 < lengths.max() <= BALLS[ball][1] + 16 * EPS
    assert 0.1 < is_wrong(adversarial, labels).mean() < 0.9


@every_attack
@every_ball
def test_radius_zero_returns_the_images_bit_for_bit(name, ball):
    images, labels = batch()
    still = make(name, ball, radius=0.0)(LOGITS_FN, images, labels, key=KEY)
    assert np.asarray(still).tobytes() == np.asarray(images).tobytes()


@each_form
def test_a_radius_as_large_as_the_box_leaves_nothing_right(name):
    images, labels = batch()
    adversarial = attacked(name, "linf", images, labels, radius=1.0, num_steps=20)
    assert is_wrong(adversarial, labels).all()


@every_attack
def test_images_that_are_misclassified_as_they_are_come_back_unchanged(name):
    images, labels = batch()
    labels = jnp.where(jnp.arange(len(labels)) < 5, (labels + 1) % 5, labels)
    adversarial = attacked(name, "linf", images, labels)
    changed = np.any(np.asarray(adversarial != images), axis=(1, 2, 3))
    np.testing.assert_array_equal(changed, np.arange(len(labels)) >= 5)


def broken_of_many(name, ball, **changes):
    """Which of 200 examples are broken."""
    images, labels = batch(200)
    return is_wrong(attacked(name, ball, images, labels, **changes), labels)


@pytest.mark.parametrize(
    ("name", "ball", "changes"),
    [
        ("dlr", "l2", {"num_steps": 1}),
        ("targeted", "linf", {"num_steps": 1, "num_targets": 1}),
    ],
)
def test_more_restarts_break_every_example_that_fewer_do(name, ball, changes):
    one = broken_of_many(name, ball, **changes)
    more = broken_of_many(name, ball, restarts=3, **changes)
    assert np.all(more >= one)
    assert more.sum() > one.sum()


def test_more_restarts_toward_several_targets_break_every_example_that_fewer_do():
    logits_fn, images, labels = helpers.oscillating(2000)

    def broken(restarts):
        attack = apgd_targeted(
            linf(0.05), num_targets=4, num_steps=1, restarts=restarts
        )
        attacked = jax.jit(lambda key: attack(logits_fn, images, labels, key=key))
        return np.asarray(jnp.argmax(logits_fn(attacked(KEY)), -1) != labels)

    one, two = broken(1), broken(2)
    assert np.all(two >= one)
    assert two.sum() > one.sum()


def test_further_targets_break_every_example_that_fewer_do_and_some_more():
    few, many = (
        broken_of_many("targeted", "l2", num_steps=2, num_targets=num) for num in (1, 4)
    )
    assert np.all(many >= few)
    assert many.sum() > few.sum()


def test_targets_beyond_all_wrong_classes_change_nothing():
    images, labels = batch(200)
    all_wrong, many = (
        attacked("targeted", "linf", images, labels, num_steps=1, num_targets=num)
        for num in (4, 9)
    )
    np.testing.assert_array_equal(all_wrong, many)


def test_no_target_is_pursued_a_second_time_where_few_are_left():
    images, labels = batch(200)
    changes = {"num_steps": 1, "first_target": 3}  # of four wrong classes the last
    one, many = (
        attacked("targeted", "linf", images, labels, num_targets=num, **changes)
        for num in (1, 9)
    )
    np.testing.assert_array_equal(one, many)


def test_the_best_score_never_falls_and_belongs_to_the_best_images():
    make_ball, radius = BALLS["l2"]
    images, labels = batch()
    ascent = ApgdRun(
        make_ball(radius), 20, 0.75, 1, (0.0, 1.0), cross_entropy, LOGITS_FN,
        images, labels,
    )  # fmt: skip

    def step(state, index):
        state = ascent.step(state, index, KEY)
        return state, (state.best.score, state.step_size)

    @jax.jit
    def run():
        start = ascent.begin(ascent.start(KEY), KEY)
        return start, *jax.lax.scan(step, start, jnp.arange(20))

    start, state, (scores, sizes) = run()
    assert np.all(scores[0] >= start.best.score)
    assert np.all(scores[1:] >= scores[:-1])
    robust = np.isfinite(state.best.score)
    losses = cross_entropy(LOGITS_FN(state.best.images), labels)
    np.testing.assert_allclose(losses[robust], state.best.score[robust], rtol=1e-5)
    assert is_wrong(state.best.images, labels)[~robust].all()
    ratios = np.log2(2 * radius / np.asarray(sizes))
    np.testing.assert_allclose(ratios, np.round(ratios), atol=1e-4)
    assert ratios.max() > 1


@every_attack
def test_an_examples_steps_do_not_depend_on_its_batch(name):
    images, labels = batch()
    attack, _ = compiled(name, "linf")
    whole = attack(images, labels, KEY)
    # With companions that are broken before it begins, and with others.
    for others, classes in [(images, (labels + 1) % 5), (1 - images, labels)]:
        mixed = attack(
            images.at[12:].set(others[12:]), labels.at[12:].set(classes[12:]), KEY
        )
        np.testing.assert_allclose(mixed[:12], whole[:12], atol=1e-5)
    assert np.any(whole[12:] != mixed[12:])


@each_form
def test_an_attack_ends_when_all_are_broken(name):
    calls = []

    def logits_fn(images):
        jax.debug.callback(lambda: calls.append(1))
        return LOGITS_FN(images)

    images, labels = batch(4)
    attack, _ = helpers.jitted(make(name, "linf", num_steps=50, restarts=5), logits_fn)
    attack(images, (labels + 1) % 5, KEY)
    jax.effects_barrier()
    assert len(calls) == 1


def test_jit_does_not_change_the_result_and_a_second_call_does_not_trace_again():
    images, labels = batch()
    attack, traces = compiled("cross_entropy", "l2")
    first = attack(images, labels, KEY)
    plain = make("cross_entropy", "l2")(LOGITS_FN, images, labels, key=KEY)
    np.testing.assert_allclose(first, plain, atol=1e-5)
    other = attack(images, labels, jax.random.key(9))
    assert np.any(other != first)
    assert traces == [images.shape]


@each_form
def test_gradients_flow_around_the_attack_and_not_through_it(name):
    images, labels = batch(4)
    attack = make(name, "linf")

    def totals(scale, images):
        def logits_fn(images):
            return scale * LOGITS_FN(images)

        adversarial = attack(logits_fn, images, labels, key=KEY)
        return jnp.sum(adversarial), jnp.sum(logits_fn(adversarial))

    through, around = jax.jit(jax.jacrev(totals, (0, 1)))(1.0, images)
    assert through[0] == 0
    assert np.all(np.asarray(through[1]) == 0)
    assert around[0] != 0


def noisy(images, *, key):
    """A classifier that adds noise to its input."""
    return LOGITS_FN(images + 0.1 * jax.random.normal(key, images.shape))


def test_the_gradient_of_random_logits_is_the_mean_over_the_draws():
    images, labels = batch(4)
    ascent = ApgdRun(
        linf(0.1), 3, 0.75, 4, (0.0, 1.0), cross_entropy, noisy, images, labels
    )
    gradient, losses, _ = jax.jit(ascent.measure)(images, KEY)

    @jax.jit
    def draw(index):
        def total(images):
            losses = cross_entropy(
                noisy(images, key=jax.random.fold_in(KEY, index)), labels
            )
            return jnp.sum(losses), losses

        return jax.grad(total, has_aux=True)(images)

    gradients, all_losses = zip(*[draw(index) for index in range(4)], strict=True)
    np.testing.assert_allclose(gradient, sum(gradients) / 4, atol=1e-5)
    np.testing.assert_allclose(losses, all_losses[-1], rtol=1e-5)
    assert np.abs(gradients[0] - gradients[1]).max() > 1e-3


@each_form
def test_random_logits_are_attacked_with_a_fresh_key_at_every_draw(name):
    keys = []

    def logits_fn(images, *, key):
        jax.debug.callback(
            lambda data: keys.append(data.tobytes()), jax.random.key_data(key)
        )
        return noisy(images, key=key)

    images, labels = batch()
    attack, _ = helpers.jitted(make(name, "l2", eot=3), logits_fn)
    adversarial = attack(images, labels, KEY)
    jax.effects_barrier()
    assert len(set(keys)) == len(keys) >= 1 + 3 * 9
    assert is_wrong(adversarial, labels).any()


REJECTED = {
    "num_steps >= 1": {"num_steps": 0},
    "restarts >= 1": {"restarts": 0},
    "0 <= rho <= 1": {"rho": 1.5},
    "eot >= 1": {"eot": 0},
    r"box\[0\] < box\[1\]": {"box": (1.0, 0.0)},
}


@every_attack
@pytest.mark.parametrize("condition", REJECTED)
def test_arguments_out_of_range_are_refused_at_construction(name, condition):
    with pytest.raises(ValueError, match=f"Expected {condition}, got"):
        make(name, "linf", **REJECTED[condition])


def test_no_target_is_refused():
    with pytest.raises(ValueError, match="num_targets >= 1, got num_targets=0"):
        apgd_targeted(linf(0.1), num_targets=0)


@every_attack
def test_images_of_too_little_precision_are_refused(name):
    images, labels = batch()
    with pytest.raises(ValueError, match=r"float32 images.*got dtype='bfloat16'"):
        make(name, "linf")(LOGITS_FN, images.astype(jnp.bfloat16), labels, key=KEY)


@pytest.mark.parametrize(("name", "needed"), [("dlr", 3), ("targeted", 4)])
def test_too_few_classes_are_refused_and_just_enough_are_attacked(name, needed):
    images, _ = batch()
    attack = make(name, "linf", radius=0.5)
    enough, too_few = net(needed), net(needed - 1)
    labels = jnp.argmax(enough(images), -1)
    adversarial = helpers.jitted(attack, enough)[0](images, labels, KEY)
    assert np.mean(jnp.argmax(enough(adversarial), -1) != labels) > 0.9
    with pytest.raises(ValueError, match=f"Expected {needed} classes for the.*DLR"):
        attack(too_few, images, labels * 0, key=KEY)


def test_the_label_is_no_target_where_other_classes_have_no_logit_either():
    logits = jnp.array([[1.0, -jnp.inf, -jnp.inf], [-jnp.inf, 2.0, 3.0]])
    found = likeliest_wrong(logits, jnp.array([0, 2]))
    np.testing.assert_array_equal(found, [[1, 2], [1, 0]])
