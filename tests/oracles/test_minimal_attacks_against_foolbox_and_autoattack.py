"""FAB against pyautoattack's, DDN against foolbox's, on one network of digits.

FAB-T without restarts draws no random numbers, so it is compared image by image. The
two libraries round differently, and an iterate on the boundary may fall on either side;
what follows from there still ends at much the same distance.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from sklearn.datasets import load_digits

from samrobust.attacks import (
    cross_entropy,
    ddn,
    fab_minimal,
    fab_targeted,
    l2,
    linf,
    step_onto_hyperplane,
)

torch = pytest.importorskip("torch")

KEY = jax.random.key(0)
BALLS = {"linf": (linf, "Linf", np.inf), "l2": (l2, "L2", 2)}
RADII = {"linf": 0.08, "l2": 0.5}
NUM_IMAGES, NUM_STEPS = 60, 20


def classify(params, images):
    w1, b1, w2, b2 = params
    return jax.nn.relu(images.reshape(len(images), -1) @ w1 + b1) @ w2 + b2


@functools.cache
def trained():
    """The parameters of a small network, and test images [N, 1, 8, 8] with labels."""
    pixels, classes = load_digits(return_X_y=True)
    images = np.asarray(pixels, np.float32) / 16
    labels = np.asarray(classes, np.int32)
    rng = np.random.default_rng(0)
    params = [
        jnp.asarray(rng.standard_normal(shape) / 8, jnp.float32)
        for shape in [(64, 64), (64,), (64, 10), (10,)]
    ]
    tx = optax.adam(1e-2)

    def loss(params):
        logits = classify(params, images[NUM_IMAGES:])
        return jnp.mean(cross_entropy(logits, jnp.asarray(labels[NUM_IMAGES:])))

    def step(_, carry):
        params, opt_state = carry
        updates, opt_state = tx.update(jax.grad(loss)(params), opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    start = (params, tx.init(params))
    params = jax.jit(lambda: jax.lax.fori_loop(0, 60, step, start)[0])()
    return params, images[:NUM_IMAGES].reshape(-1, 1, 8, 8), labels[:NUM_IMAGES]


def torch_twin():
    w1, b1, w2, b2 = (torch.from_numpy(np.array(p)) for p in trained()[0])
    return lambda x: torch.relu(x.reshape(len(x), -1) @ w1 + b1) @ w2 + b2


def ours(attack):
    params, images, labels = trained()
    jitted = jax.jit(
        lambda x: attack(functools.partial(classify, params), x, labels, key=KEY)
    )
    return np.asarray(jitted(images))


@functools.cache
def theirs(ball, radius, *, restarts=1, seed=0):
    fab_pt = pytest.importorskip("pyautoattack.fab_pt")
    _, images, labels = trained()
    attack = fab_pt.FABAttack_PT(
        torch_twin(),
        norm=BALLS[ball][1],
        n_restarts=restarts,
        n_iter=NUM_STEPS,
        eps=radius,
        seed=seed,
        targeted=True,
        device="cpu",
    )
    pair = torch.from_numpy(images), torch.from_numpy(labels).long()
    return attack.perturb(*pair).numpy()


def is_robust(images):
    params, _, labels = trained()
    return np.asarray(jnp.argmax(classify(params, images), -1) == labels)


def distances(ball, images):
    delta = (images - trained()[1]).reshape(len(images), -1)
    return np.linalg.norm(delta.astype(np.float64), BALLS[ball][2], axis=1)


@pytest.mark.parametrize("ball", BALLS)
def test_fab_finds_the_images_of_upstream(ball):
    radius = RADII[ball]
    found = ours(fab_targeted(BALLS[ball][0](radius), num_steps=NUM_STEPS))
    expected = theirs(ball, radius)
    robust = is_robust(expected)
    assert 10 < robust.sum() < 50
    np.testing.assert_array_equal(is_robust(found), robust)
    gaps = np.abs(found - expected).max(axis=(1, 2, 3))
    assert np.mean(gaps < 1e-4) > 0.95
    np.testing.assert_allclose(
        distances(ball, found), distances(ball, expected), rtol=1e-2, atol=1e-6
    )


@pytest.mark.parametrize("ball", BALLS)
def test_fab_with_restarts_is_as_strong_as_upstream_whatever_the_seed(ball):
    radius = 0.8 * RADII[ball]
    attack = fab_targeted(BALLS[ball][0](radius), num_steps=NUM_STEPS, restarts=2)
    robust = is_robust(ours(attack))
    counts = [
        is_robust(theirs(ball, radius, restarts=2, seed=seed)).sum() for seed in (0, 1)
    ]
    assert min(counts) - 1 <= robust.sum() <= max(counts) + 1


@pytest.mark.parametrize("ball", BALLS)
def test_fab_without_a_radius_goes_no_farther_than_upstream_with_a_large_one(ball):
    """Upstream then ends at the first target, and ours takes the nearest."""
    attack = fab_minimal(BALLS[ball][0](1.0), num_steps=NUM_STEPS)
    found = ours(attack)
    expected = theirs(ball, 100.0)
    assert not is_robust(found).any()
    lengths = distances(ball, found)
    assert np.all(lengths <= distances(ball, expected) * 1.01 + 1e-6)
    first = ours(fab_minimal(BALLS[ball][0](1.0), num_steps=NUM_STEPS, num_targets=1))
    np.testing.assert_allclose(
        distances(ball, first), distances(ball, expected), rtol=1e-2, atol=1e-6
    )


@pytest.mark.parametrize("ball", BALLS)
def test_the_step_onto_a_hyperplane_is_that_of_upstream(ball):
    projections = pytest.importorskip("pyautoattack.fab_projections")
    rng = np.random.default_rng(0)
    points = np.clip(rng.uniform(-0.1, 1.1, (200, 50)), 0, 1).astype(np.float32)
    normal = rng.standard_normal((200, 50)).astype(np.float32)
    # From planes through the point to planes that the box does not reach.
    excess = (rng.standard_normal(200) * rng.uniform(0, 15, 200)).astype(np.float32)
    # In double precision, since theirs cancels digits that ours keeps.
    exact = [array.astype(np.float64) for array in (points, normal, excess)]
    exact[2] = np.einsum("bi,bi->b", *exact[:2]) - exact[2]
    project = getattr(projections, f"projection_{ball}")
    expected = project(*map(torch.from_numpy, exact))
    found = jax.jit(functools.partial(step_onto_hyperplane, BALLS[ball][0](1.0)))(
        points, normal, excess
    )
    np.testing.assert_allclose(found, expected.numpy(), atol=1e-5)


def test_ddn_finds_the_images_of_foolbox():
    gamma = 0.1
    foolbox = pytest.importorskip("foolbox")
    params, images, labels = trained()
    model = foolbox.JAXModel(functools.partial(classify, params), bounds=(0, 1))
    attack = foolbox.attacks.DDNAttack(steps=NUM_STEPS, gamma=gamma, init_epsilon=0.5)
    criterion = foolbox.criteria.Misclassification(jnp.asarray(labels))
    expected = np.asarray(attack.run(model, jnp.asarray(images), criterion))
    found = ours(ddn(num_steps=NUM_STEPS, gamma=gamma, init_epsilon=0.5))
    np.testing.assert_array_equal(is_robust(found), is_robust(expected))
    assert np.mean(np.abs(found - expected).max(axis=(1, 2, 3)) < 1e-4) > 0.95
    np.testing.assert_allclose(
        distances("l2", found), distances("l2", expected), rtol=gamma, atol=1e-6
    )
