"""What every attack keeps to, whoever calls it and from within what.

One table of all public attacks. Images are as small as they may be, for nearly all the
time goes into compiling.
"""

import functools
import json
from typing import Any

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from samrobust.attacks import (
    apgd,
    apgd_targeted,
    autoattack,
    cross_entropy,
    ddn,
    dlr,
    draws,
    fab_minimal,
    fab_targeted,
    fgsm,
    identity,
    l2,
    linf,
    margin,
    noise,
    pgd,
    square,
    staged_pgd,
    targeted_dlr,
)
from samrobust.attacks.ddn import _direction
from samrobust.attacks.losses import misclassified

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
    "autoattack": with_options(autoattack, version="custom", members=["apgd-ce"]),
    "part of apgd-t": part_of("apgd-t"),
    "part of fab-t": part_of("fab-t"),
}
# Whose outcome on a linear classifier shows what they drew.
RANDOM = {"pgd, any", "staged_pgd", "noise", "apgd", "square", "autoattack"}


PROGRAMS = [
    name
    for name in ATTACKS
    if name not in ("identity", "fgsm", "fab_minimal") and "part" not in name
]


@functools.cache
def make_weights():
    rng = np.random.default_rng(4)
    return rng.standard_normal((int(np.prod(SHAPE)), CLASSES)).astype(np.float32)


def logits_fn(images):
    """A linear classifier whose sums do not depend on the number of examples."""
    flat = images.reshape(len(images), len(make_weights()), 1) - 0.5
    return jnp.sum(flat * jnp.asarray(make_weights(), images.dtype)[None], axis=1)


@functools.cache
def make_problem(num=5) -> Any:
    rng = np.random.default_rng(num)
    images = rng.uniform(0.4, 0.6, (num, *SHAPE)).astype(np.float32)
    return images, np.asarray(jnp.argmax(logits_fn(images), -1), np.int32)


@functools.cache
def make_attack(name, ball):
    return ATTACKS[name](BALLS[ball])


@functools.cache
def compiled(name, ball):
    return jax.jit(make_attack(name, ball), static_argnums=0)


@functools.cache
def outcome(name, ball):
    """Of the problem, with a key for each example."""
    return np.asarray(compiled(name, ball)(logits_fn, *make_problem(), key=KEYS))


def traced(attack, images, labels, key):
    """Shape and dtype of an outcome: wrong types show without compiling."""
    return jax.eval_shape(
        lambda images, labels, key: attack(logits_fn, images, labels, key=key),
        images,
        labels,
        key,
    )


# All where nothing is compiled, else those that are programs of their own.
every_attack = pytest.mark.parametrize("name", ATTACKS)
each_program = pytest.mark.parametrize("name", PROGRAMS)
every_ball = pytest.mark.parametrize("ball", BALLS)


# Called rightly


@every_ball
@each_program
def test_jit_takes_it_keeps_shape_and_dtype_stays_inside_and_compiles_once(name, ball):
    images, labels = make_problem()
    adversarial = outcome(name, ball)
    assert (adversarial.shape, adversarial.dtype) == (images.shape, images.dtype)
    assert 0 <= adversarial.min() <= adversarial.max() <= 1
    if name not in ("fab_minimal", "ddn"):
        lengths = BALLS[ball].norm(jnp.asarray(adversarial - images))
        assert np.all(lengths <= BALLS[ball].radius * (1 + 1e-5))
    attack: Any = compiled(name, ball)
    again = attack(logits_fn, images, labels, key=KEYS)
    np.testing.assert_array_equal(again, adversarial)
    assert attack._cache_size() == 1


def test_labels_of_few_bits_name_no_other_class():
    """Class 256 is class 0 in uint8."""
    images, labels = np.array([[0.0, 0.1]], np.float32), np.zeros(1, np.uint8)

    def many(images):
        logits = jnp.zeros([len(images), 300]).at[:, 0].set(images[:, 0])
        return logits.at[:, 256].set(images[:, 1])

    options = {"random_start": False, "judge": "any"}
    attack = pgd(linf(0.1), step_size=0.1, num_steps=1, **options)

    @jax.jit
    def attacked(images, labels):
        wrong = misclassified(many(images), labels)
        return wrong, attack(many, images, labels, key=KEYS[:1])

    wrong, found = attacked(images, labels)
    assert wrong
    np.testing.assert_array_equal(found, images)


@every_ball
@each_program
def test_what_an_example_draws_depends_on_its_own_key_alone(name, ball):
    """Not on the batch either: here it is a batch of one."""
    (images, labels), whole = make_problem(), outcome(name, ball)
    attack = jax.jit(make_attack(name, ball), static_argnums=0)
    alone = attack(logits_fn, images[3:4], labels[3:4], key=KEYS[3:4])
    np.testing.assert_array_equal(alone, whole[3:4])
    if name in RANDOM and ball == "l2":
        other = compiled(name, ball)(logits_fn, images, labels, key=KEYS[::-1])
        changed = np.any(other != whole, axis=(1, 2, 3))
        np.testing.assert_array_equal(changed, [True, True, False, True, True])


@every_ball
@every_attack
def test_one_key_and_a_batch_of_none_are_served(name, ball):
    (images, labels), attack = make_problem(), make_attack(name, ball)
    assert traced(attack, images, labels, KEYS[0]).shape == images.shape
    nothing = attack(logits_fn, images[:0], labels[:0], key=KEYS[:0])
    assert nothing.shape == (0, *SHAPE)


@every_ball
@every_attack
def test_radius_zero_returns_the_images(name, ball):
    if name in ("fab_minimal", "ddn"):  # nothing but the scale of their starts
        return
    (images, labels), still = make_problem(), BALLS[ball]
    attack = ATTACKS[name]({"linf": linf, "l2": l2}[ball](still.radius * 0))
    found = attack(logits_fn, images, labels, key=KEYS)
    np.testing.assert_array_equal(found, images)


@every_ball
@every_attack
def test_keys_may_be_vectorized_over(name, ball):
    """Which computes the same: looked at where little compiles."""
    (images, labels), attack = make_problem(), make_attack(name, ball)
    vectorized = jax.vmap(lambda keys: attack(logits_fn, images, labels, key=keys))
    twice = jnp.stack([KEYS, KEYS[::-1]])
    assert jax.eval_shape(vectorized, twice).shape == (2, *images.shape)
    assert jax.eval_shape(vectorized, KEYS).shape == (5, *images.shape)
    if name == "pgd, any":
        found = jax.jit(vectorized)(twice)[0]
        np.testing.assert_allclose(found, outcome(name, ball), atol=1e-6)


@every_ball
@every_attack
def test_float64_strict_promotion_and_checks_for_nan_are_borne(name, ball):
    images, labels = make_problem()
    with (
        jax.enable_x64(True),
        jax.numpy_dtype_promotion("strict"),
        jax.numpy_rank_promotion("raise"),
        jax.debug_nans(True),
    ):
        attack = jax.jit(make_attack(name, ball), static_argnums=0)
        for dtype in (np.float32, np.float64):
            of = traced(attack, images.astype(dtype), labels, KEYS)
            assert of.dtype == dtype
        if name not in PROGRAMS or ball == "l2":
            return
        precise = attack(logits_fn, images.astype(np.float64), labels, key=KEYS)
    np.testing.assert_allclose(precise, outcome(name, ball), atol=1e-5)


# Radii of one's own

MAKE_BALL = {"linf": linf, "l2": l2}
# Neither has a radius that could differ by example: see the refusal of `autoattack`.
SCALED = [name for name in PROGRAMS if name not in ("ddn", "autoattack")]


def attack_of_radius(name, ball, images, labels, keys, radius):
    attack = ATTACKS[name](MAKE_BALL[ball](radius))
    return attack(logits_fn, images, labels, key=keys)


@functools.cache
def with_radii(name, ball):
    """A program that is given the radii with the images."""
    return jax.jit(functools.partial(attack_of_radius, name, ball))


@pytest.mark.parametrize(
    ("name", "ball"),
    [
        *((name, "l2") for name in ("staged_pgd", "noise", "apgd", "fab_targeted")),
        *((name, ball) for name in ("pgd", "square") for ball in BALLS),
    ],
)
def test_each_example_has_the_outcome_of_its_own_radius_and_of_0_none(name, ball):
    (images, labels), radius = make_problem(), BALLS[ball].radius
    attack: Any = with_radii(name, ball)
    radii = jnp.full(5, radius).at[1].set(0.0).at[4].set(2 * radius)
    found = np.asarray(attack(images, labels, KEYS, radii))
    np.testing.assert_array_equal(found[1], images[1])
    expected = outcome(name, ball)
    same = np.array([0, 2, 3])
    np.testing.assert_allclose(found[same], expected[same], atol=1e-6)
    assert BALLS[ball].norm(found - images)[4] <= 2 * radius * (1 + 1e-5)
    if name in RANDOM:
        assert np.any(found[4] != expected[4])
    attack(images, labels, KEYS, radii[::-1])
    assert attack._cache_size() == 1


@every_ball
@pytest.mark.parametrize("name", [*SCALED, "fgsm", "fab_minimal"])
def test_a_traced_radius_and_radii_of_another_precision_keep_shape_and_dtype(
    name, ball
):
    images, labels = make_problem()
    for radius in (jnp.float32(0.1), np.full(5, 0.1), jnp.full(5, 0.1, jnp.float16)):
        attack = functools.partial(attack_of_radius, name, ball)
        with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
            of = jax.eval_shape(attack, images, labels, KEYS, radius)
        assert (of.shape, of.dtype) == (images.shape, images.dtype)


def test_fgsm_goes_as_far_as_each_radius():
    images, labels = make_problem()
    radii = jnp.array([0.0, 0.01, 0.02, 0.03, 0.0])
    for make in (linf, l2):
        found = fgsm(make(radii))(logits_fn, images, labels, key=KEYS)
        np.testing.assert_allclose(make(1.0).norm(found - images), radii, atol=1e-6)


@pytest.mark.parametrize("make", [linf, l2])
def test_radii_of_another_batch_or_other_units_are_refused(make):
    attack = pgd(make(jnp.full(4, 0.1)), step_size=0.1, num_steps=1)
    message = r"one radius, or radii \[B\].*radius_shape=\(4,\), images_shape=\(5, 3"
    with pytest.raises(ValueError, match=message):
        attack(logits_fn, *make_problem(), key=KEYS)
    far = make(jnp.array([0.1, 0.1, 8.0, 0.1, 0.1]))
    with pytest.raises(ValueError, match=r"radius within.*mean 8 / 255\?"):
        fgsm(far)(logits_fn, *make_problem(), key=KEYS)
    for radii in ([0.1, -0.1], [0.1, np.nan], [0.1, np.inf]):
        with pytest.raises(ValueError, match=r"0 <= radius < inf, got radius="):
            make(jnp.array(radii))


def test_step_sizes_may_be_each_examples_own_and_are_looked_at():
    images, labels = make_problem()
    steps = jnp.array([0.0, 0.01, 0.02, 0.03, 0.04])
    options = {"num_steps": 1, "random_start": False}
    attack = pgd(linf(0.1), step_size=steps, **options)
    found = attack(logits_fn, images, labels, key=KEYS)
    np.testing.assert_allclose(linf(1.0).norm(found - images), steps, atol=1e-6)
    with pytest.raises(ValueError, match="0 < step_size < inf, got step_size="):
        pgd(linf(0.1), step_size=-steps, **options)
    attack = pgd(linf(0.1), step_size=steps[:4], **options)
    with pytest.raises(ValueError, match=r"numbers \[B\].*shape=\(4,\), images_shape="):
        attack(logits_fn, images, labels, key=KEYS)


def test_autoattack_and_random_starts_of_no_length_refuse_radii_by_name():
    with pytest.raises(ValueError, match=r"one radius that is known.*got radius=.*`ap"):
        autoattack(linf(jnp.full(5, 0.1)))
    with pytest.raises(ValueError, match=r"ball.radius > 0 when restarts > 1, got"):
        fab_minimal(l2(jnp.array([0.1, 0.0])), restarts=2)


# Losses and starts of one's own


@pytest.mark.parametrize("ball", [linf(0.1), l2(0.5)])
def test_autoattack_starts_as_the_ball_says(ball):
    drawn = []

    def sample(key, shape):
        drawn.append(shape)
        return ball.sample(key, shape)

    around = ball._replace(sample=sample)
    attack = autoattack(around, version="custom", members=("apgd-ce",))
    attack(logits_fn, *make_problem(), key=KEYS)
    assert drawn


def test_a_loss_may_close_over_traced_logits_and_a_ball_may_start_elsewhere():
    """A step of the attack of TRADES: on the divergence from the natural logits."""
    images, labels = make_problem()
    noise_of = 0.01 * np.random.default_rng(1).standard_normal(images.shape)
    drawn = jnp.asarray(noise_of, jnp.float32)
    ball = linf(0.03)._replace(sample=lambda *_: drawn)

    @jax.jit
    def attacked(images, weights):
        def logits_fn(images):
            return (images.reshape(len(images), -1) - 0.5) @ weights

        natural = jax.nn.log_softmax(logits_fn(images))

        def divergence(logits, _):
            ratio = natural - jax.nn.log_softmax(logits)
            return jnp.sum(jnp.exp(natural) * ratio, axis=-1)

        attack = pgd(ball, step_size=0.025, num_steps=1, loss=divergence)
        return attack(logits_fn, images, labels, key=KEYS)

    weights = make_weights().astype(np.float64)

    def odds(flat):
        exp = np.exp((flat - 0.5) @ weights)
        return exp / exp.sum(-1, keepdims=True)

    flat = images.reshape(5, -1).astype(np.float64)
    start = flat + np.clip(noise_of.reshape(5, -1), -0.03, 0.03)
    gradient = (odds(start) - odds(flat)) @ weights.T
    moved = start + 0.025 * np.sign(gradient)
    expected = flat + np.clip(moved - flat, -0.03, 0.03)
    found = attacked(images, make_weights()).reshape(5, -1)
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert np.abs(expected - flat).min() < 0.029  # not all at the surface


# Over devices


def one_device_is_done():
    """The problem, the images of the first of two devices misclassified already."""
    images, labels = make_problem()
    return images, np.where(np.arange(5) < 2, (labels + 1) % CLASSES, labels)


def communicating_logits_fn(images):
    """The same classifier, after a sum over all devices that changes nothing."""
    total = jax.lax.psum(jnp.sum(images), "batch")  # positive
    return logits_fn(images) + jnp.minimum(total, 0)


def work() -> None:
    """What a process of two devices does: every attack, over both, in three ways."""
    images, labels = (array[:4] for array in make_problem())
    keys = KEYS[:4]
    for kind in (jax.sharding.AxisType.Auto, jax.sharding.AxisType.Explicit):
        mesh = jax.make_mesh((2,), ("batch",), axis_types=(kind,))
        split, same = jax.P("batch"), jax.P()
        for name in ATTACKS:
            ball, classify = (
                ("l2", communicating_logits_fn)
                if kind.name == "Auto"
                else ("linf", logits_fn)
            )

            def attack(x, y, k, name=name, ball=ball, classify=classify):
                return make_attack(name, ball)(classify, x, y, key=k)

            with jax.set_mesh(mesh):
                batch = jax.device_put((images, labels, keys), split)
                if kind.name == "Auto":
                    mapped = functools.partial(
                        jax.shard_map, out_specs=split, check_vma=name != "noise"
                    )
                    one_key = mapped(attack, in_specs=(split, split, same))
                    jax.eval_shape(one_key, *batch[:2], KEYS[0])
                    # The same images on both devices, each with keys of its own.
                    keys_alone = mapped(attack, in_specs=(same, same, split))
                    jax.eval_shape(keys_alone, images[:2], labels[:2], keys)
                    if name in SCALED:
                        for spec, radius in ((split, jnp.full(4, 0.1)), (same, 0.1)):
                            own = mapped(
                                functools.partial(attack_of_radius, name, ball),
                                in_specs=(split, split, split, spec),
                            )
                            jax.eval_shape(own, *batch, radius)
                    attack = mapped(attack, in_specs=split)
                else:
                    jax.eval_shape(attack, *batch[:2], KEYS[0])
                if name not in PROGRAMS:
                    continue
                attack = jax.jit(attack)
                uneven = one_device_is_done()[1][:4]
                for case, y in (("all", labels), ("one device", uneven)):
                    found = attack(batch[0], jax.device_put(y, split), batch[2])
                    print(json.dumps([name, kind.name, case, found.tolist()]))


@functools.cache
def of_two_devices():
    lines = helpers.run_on_devices(__file__, count=2).splitlines()
    return {tuple(case): found for *case, found in map(json.loads, lines)}


@each_program
@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
def test_shard_map_and_explicit_meshes_take_it_and_change_nothing(name, kind):
    found = of_two_devices()[name, kind, "all"]
    ball = {"Auto": "l2", "Explicit": "linf"}[kind]
    np.testing.assert_allclose(found, outcome(name, ball)[:4], atol=1e-6)


@each_program
def test_a_device_with_nothing_left_to_do_still_communicates(name):
    found = of_two_devices()[name, "Auto", "one device"]
    alone = compiled(name, "l2")(logits_fn, *one_device_is_done(), key=KEYS)
    np.testing.assert_allclose(found, alone[:4], atol=1e-6)


# Random numbers


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


# Called wrongly

BAD_CALLS = {
    "one image": (
        {"images": make_problem()[0][0], "labels": np.int32(0), "key": KEYS[0]},
        r"labels \[B\], one an image.*`images\[None\]`",
    ),
    "an image of rows": (
        {"images": make_problem()[0][0, :, 0, 0], "labels": [0, 0, 0], "key": KEYS[0]},
        r"images \[B, \.\.\.\], a batch, got images_shape=\(3,\).*`images\[None\]`",
    ),
    "bytes": (
        {"images": np.full((5, *SHAPE), 128, np.uint8)},
        "float32 images with pixels in the box, got dtype='uint8'.*`/ 255`",
    ),
    "bytes as floats": (
        {"images": np.full((5, *SHAPE), 128, np.float32)},
        "pixels in the box, 0 to 1, got lowest=128.0, highest=128.0",
    ),
    "pixels of nan": (
        {"images": np.full((5, *SHAPE), np.nan, np.float32)},
        "pixels in the box, 0 to 1, got lowest=nan",
    ),
    "half precision": (
        {"images": np.full((5, *SHAPE), 0.5, np.float16)},
        "float32 images with pixels in the box, got dtype='float16'",
    ),
    "a column of labels": (
        {"labels": np.zeros([5, 1], np.int32)},
        r"labels \[B\].*got.*labels_shape=\(5, 1\)",
    ),
    "one-hot labels": (
        {"labels": np.eye(5, CLASSES, dtype=np.float32)},
        r"int labels \[B\], got labels_dtype='float32'.*`jnp.argmax\(labels, -1\)`",
    ),
    "labels of floats": (
        {"labels": np.zeros(5, np.float32)},
        r"int labels \[B\], got labels_dtype='float32'",
    ),
    "labels of another batch": (
        {"labels": np.zeros(4, np.int32)},
        r"got labels_shape=\(4,\), images_shape=\(5, 3, 2, 1\)",
    ),
    "no key": ({"key": 0}, "a key, as from `jax.random.key"),
    "keys of another batch": ({"key": KEYS[:4]}, r"got key_shape=\(4,\), batch=5"),
    "no function": ({"logits_fn": 1.0}, "logits_fn as a function of images"),
}
BAD_LOGITS = {
    "labels too high": (
        logits_fn,
        {"labels": np.full(5, CLASSES, np.int32)},
        r"labels in 0 \.\. K-1, got lowest=4, highest=4, classes=4",
    ),
    "labels below zero": (
        logits_fn,
        {"labels": np.full(5, -1, np.int32)},
        "got lowest=-1, highest=-1",
    ),
    "one number": (lambda x: jnp.zeros(len(x)), {}, r"got logits_shape=\(5,\)"),
    "one class": (lambda x: jnp.zeros([len(x), 1]), {}, r"logits_shape=\(5, 1\)"),
    "another batch": (
        lambda x: jnp.zeros_like(x, shape=[1, 4]),
        {},
        r"got logits_shape=\(1, 4\)",
    ),
    "more axes": (lambda x: jnp.zeros([len(x), 4, 1, 1]), {}, r"=\(5, 4, 1, 1\)"),
    "more than logits": (lambda x: (logits_fn(x), x), {}, "got logits='tuple'"),
    "classes": (lambda x: jnp.argmax(logits_fn(x), -1), {}, "logits_shape"),
}
every_real_attack = pytest.mark.parametrize("name", [*ATTACKS][1:])


def call(name, ball="linf", **changes):
    images, labels = make_problem()
    arguments = {"logits_fn": logits_fn, "images": images, "labels": labels}
    arguments |= {"key": KEYS, **changes}
    key, function = arguments.pop("key"), arguments.pop("logits_fn")
    make_attack(name, ball)(function, *arguments.values(), key=key)


@every_real_attack
def test_wrong_arguments_of_a_call_are_refused_by_name(name):
    for arguments, message in BAD_CALLS.values():
        with pytest.raises(ValueError, match=f"^Expected .*{message}"):
            call(name, **arguments)


@every_real_attack
def test_wrong_logits_and_labels_without_a_logit_are_refused(name):
    for function, arguments, message in BAD_LOGITS.values():
        with pytest.raises(ValueError, match=f"^Expected .*{message}"):
            call(name, logits_fn=function, **arguments)


@every_attack
def test_what_is_known_inside_jit_is_refused_there_too(name):
    if name == "identity":
        return
    images, labels = make_problem()
    with pytest.raises(ValueError, match=r"labels \[B\], one an image, got"):
        traced(make_attack(name, "l2"), images, labels[:4], KEYS)


MAKERS = {
    name: make
    for name, make in ATTACKS.items()
    if name not in ("identity", "staged_pgd", "ddn") and "part" not in name
}


@pytest.mark.parametrize("name", MAKERS)
def test_radii_of_other_units_and_what_is_no_ball_are_refused(name):
    make, images = MAKERS[name], make_problem()
    with pytest.raises(ValueError, match=r"radius within.*mean 8 / 255\?"):
        make(linf(8))
    make(linf(8), box=(0, 255))
    with pytest.raises(ValueError, match=r"l2 radius within.*radius=8.*mean 8 / 255"):
        make(l2(8))(logits_fn, *images, key=KEYS)
    for ball in (linf, 0.1, "linf"):
        with pytest.raises(ValueError, match="Expected a ball from `linf` or `l2`"):
            make(ball)
    for box in ("01", (0, 1, 2), (0, "1"), (0, np.inf), 1.0):
        with pytest.raises(ValueError, match=r"^Expected .*box"):
            make(linf(0.1), box=box)


@pytest.mark.parametrize("make", [linf, l2])
@pytest.mark.parametrize(
    "radius", ["8", None, True, np.ones((2, 2)), np.ones(2, int), 1j, np.nan, -1, "1/0"]
)
def test_a_radius_that_is_no_number_is_refused(make, radius):
    with pytest.raises(ValueError, match=r"^Expected .*radius.*, got radius="):
        make(radius)


@pytest.mark.parametrize(
    ("make", "options"),
    [
        (pgd, {"num_steps": 1, "step_size": "0.1"}),
        (pgd, {"step_size": 0.1, "num_steps": 1.0}),
        (pgd, {"step_size": 0.1, "num_steps": 1, "restarts": "2"}),
        (pgd, {"step_size": 0.1, "num_steps": 1, "loss": "margin"}),
        (pgd, {"step_size": 0.1, "num_steps": 1, "judge": ["any"]}),
        (noise, {"num_draws": "1"}),
        (apgd, {"rho": "1"}),
        (apgd, {"num_steps": True}),
        (apgd, {"loss": "dlr"}),
        (apgd_targeted, {"num_targets": 1.5}),
        (fab_targeted, {"eta": None}),
        (square, {"p_init": "1"}),
        (square, {"loss": None}),
        (autoattack, {"version": "custom", "members": "square"}),
        (autoattack, {"version": None}),
        (lambda _, **options: ddn(**options), {"gamma": "0.1"}),
    ],
)
def test_options_of_another_kind_are_refused_by_name(make, options):
    name = [*options][-1]
    with pytest.raises(ValueError, match=rf"^Expected .*{name}.*, got {name}="):
        make(linf(0.1), **options)


def test_a_loss_that_is_not_one_an_example_is_refused():
    attack = pgd(BALLS["l2"], step_size=0.1, num_steps=1, loss=lambda z, _: jnp.mean(z))
    with pytest.raises(ValueError, match=r"a loss \[B\] of each.*loss_shape=\(\)"):
        attack(logits_fn, *make_problem(), key=KEYS)


@pytest.mark.parametrize("loss", [cross_entropy, margin, dlr, targeted_dlr])
@pytest.mark.parametrize("shape", [(5, 1), (1,)])
def test_a_loss_of_labels_that_would_broadcast_is_refused(loss, shape):
    right, wrong = np.zeros(5, np.int32), np.zeros(shape, np.int32)
    cases = [("labels", [wrong, right])]
    cases += [("targets", [right, wrong])] if loss is targeted_dlr else []
    for name, (labels, targets) in cases:
        rest = (targets,) if loss is targeted_dlr else ()
        with pytest.raises(ValueError, match=rf"^Expected {name} \[B\] of.*=\(5, 4\)"):
            loss(jnp.zeros([5, CLASSES]), labels, *rest)


@pytest.mark.parametrize("make", [apgd_targeted, fab_targeted])
@pytest.mark.parametrize("first", [-1, 3])
def test_no_target_being_left_is_refused(make, first):
    attack = make(BALLS["linf"], first_target=first)
    with pytest.raises(ValueError, match=f"first_target.*first_target={first}, class"):
        attack(logits_fn, *make_problem(), key=KEYS)


# Logits that are no decision


@pytest.mark.parametrize("worst", [np.nan, np.inf])
def test_logits_that_are_not_finite_are_a_mistake_and_masked_classes_are_none(worst):
    logits = np.zeros([5, 3], np.float32)
    logits[1] = worst
    logits[2, 1] = worst
    logits[3, 1] = -np.inf
    wrong = misclassified(jnp.asarray(logits), jnp.zeros(5, jnp.int32))
    np.testing.assert_array_equal(wrong, [False, True, True, False, False])


@pytest.mark.parametrize("name", ["pgd, any", "noise", "square"])
def test_a_network_that_overflows_when_attacked_has_been_broken(name):
    def breaks(images):
        moved = jnp.max(jnp.abs(images - 0.5), (1, 2, 3)) > 0.01
        return jnp.where(moved[:, None], jnp.nan, jnp.array([[1.0, 0.0]]))

    images, labels = jnp.full([2, *SHAPE], 0.5), jnp.zeros(2, jnp.int32)
    attack = jax.jit(make_attack(name, "linf"), static_argnums=0)
    found = attack(breaks, images, labels, key=KEYS[:2])
    assert np.all(misclassified(breaks(found), labels))


if __name__ == "__main__":
    work()
