"""Our PGD against foolbox's, on our model in JAX and on its twin in PyTorch.

Foolbox ascends the summed cross entropy from the images themselves when
`random_start=False`, as ours does; its steps are relative to the radius.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from samrobust.attacks import fgsm, l2, linf, pgd
from samrobust.models import PreActResNet

foolbox = pytest.importorskip("foolbox")
torch = pytest.importorskip("torch")
twin = pytest.importorskip("torch_twin")

NUM_STEPS = 5
SMALL = {"width": 8, "blocks": (1, 1)}
BALLS = {
    "linf 1/255": (linf, 1 / 255, 0.25),
    "linf 8/255": (linf, 8 / 255, 0.25),
    "l2 32/255": (l2, 32 / 255, 0.125),
    "l2 1": (l2, 1.0, 0.25),
}


@pytest.fixture(scope="module")
def torch_model():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return twin.TwinResNet(**SMALL).eval()


@pytest.fixture(scope="module")
def logits_fn(torch_model):
    model, variables = PreActResNet(**SMALL), twin.to_jax(torch_model)
    return jax.jit(lambda images: model.apply(variables, images, train=False))


@pytest.fixture(scope="module")
def batch():
    rng = np.random.default_rng(0)
    images = rng.uniform(size=(8, 8, 8, 3)).astype(np.float32)
    return jnp.asarray(images), jnp.asarray(rng.integers(0, 10, 8))


def ours(ball, logits_fn, images, labels):
    make_ball, radius, rel_step = BALLS[ball]
    attack = pgd(
        make_ball(radius),
        step_size=rel_step * radius,
        num_steps=NUM_STEPS,
        random_start=False,
    )
    return np.asarray(attack(logits_fn, images, labels, key=jax.random.key(0)))


def theirs(ball, model, images, labels):
    make_ball, radius, rel_step = BALLS[ball]
    attacks = {linf: foolbox.attacks.LinfPGD, l2: foolbox.attacks.L2PGD}
    attack = attacks[make_ball](
        rel_stepsize=rel_step, steps=NUM_STEPS, random_start=False
    )
    criterion = foolbox.criteria.Misclassification(labels)
    return attack.run(model, images, criterion, epsilon=radius)


@pytest.mark.parametrize("ball", BALLS)
def test_pgd_reaches_the_pixels_of_foolbox_on_the_jax_model(ball, logits_fn, batch):
    images, labels = batch
    model = foolbox.JAXModel(logits_fn, bounds=(0, 1))
    expected = np.asarray(theirs(ball, model, images, labels))
    gap = np.abs(ours(ball, logits_fn, images, labels) - expected)
    assert np.max(gap) <= 1e-6


@pytest.mark.parametrize("ball", BALLS)
def test_pgd_reaches_the_pixels_of_foolbox_on_the_torch_twin(
    ball, torch_model, logits_fn, batch
):
    images, labels = batch
    model = foolbox.PyTorchModel(torch_model, bounds=(0, 1), device="cpu")
    expected = theirs(
        ball,
        model,
        torch.from_numpy(np.array(images).transpose(0, 3, 1, 2).copy()),
        torch.from_numpy(np.array(labels)).long(),
    )
    gap = ours(ball, logits_fn, images, labels) - expected.numpy().transpose(0, 2, 3, 1)
    # Two libraries may round a gradient of almost zero to different signs.
    assert np.mean(np.abs(gap) <= 1e-6) >= 0.999


@pytest.mark.parametrize("ball", BALLS)
def test_the_fast_gradient_method_is_that_of_foolbox(ball, logits_fn, batch):
    images, labels = batch
    make_ball, radius, _ = BALLS[ball]
    kind = {linf: foolbox.attacks.FGSM, l2: foolbox.attacks.FGM}[make_ball]
    model = foolbox.JAXModel(logits_fn, bounds=(0, 1))
    criterion = foolbox.criteria.Misclassification(labels)
    expected = kind(random_start=False).run(model, images, criterion, epsilon=radius)
    attack = fgsm(make_ball(radius))
    found = attack(logits_fn, images, labels, key=jax.random.key(0))
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert np.abs(found - images).max() > 0
