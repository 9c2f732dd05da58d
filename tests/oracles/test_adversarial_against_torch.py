"""The adversarial training family against its authors' steps, written out in PyTorch.

A toy network in float64: what differs is rounding. Where an attack starts at random,
the twin is handed the numbers that ours drew.
"""

from typing import Any

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from test_methods_against_torch import Toy, Twin, cross_entropy, given, train_ours

from samrobust.attacks import draws
from samrobust.models import BatchNorm
from samrobust.training import make_train_step
from samrobust.training.adversaries.at import at
from samrobust.training.adversaries.fgsm_rs import fgsm_rs
from samrobust.training.adversaries.nfgsm import nfgsm
from samrobust.training.objectives.label_smoothing import label_smoothing
from samrobust.training.objectives.mart import mart_loss

torch = pytest.importorskip("torch")

KEY = jax.random.key(0)
RATE = 0.1


@pytest.fixture(autouse=True, scope="module")
def _in_float64():
    with jax.enable_x64(True), helpers.quick_compilation():
        yield


class Normalized(nn.Module):
    """Two dense layers with BatchNorm between them."""

    @nn.compact
    def __call__(self, images, *, train):
        options: Any = {"dtype": jnp.float64, "param_dtype": jnp.float64}
        hidden = nn.Dense(5, **options)(images.reshape(len(images), -1))
        hidden = BatchNorm(dtype=jnp.float64)(hidden, train=train)
        return nn.Dense(3, **options)(jnp.tanh(hidden))


def make_normalized(params: Any) -> Any:
    """The same network in PyTorch, with these weights."""
    model = torch.nn.Sequential(
        torch.nn.Linear(4, 5), torch.nn.BatchNorm1d(5), torch.nn.Tanh()
    )
    model.append(torch.nn.Linear(5, 3)).double()
    with torch.no_grad():
        for layer, name in ((0, "Dense_0"), (3, "Dense_1")):
            model[layer].weight.copy_(torch.tensor(np.array(params[name]["kernel"]).T))
            model[layer].bias.copy_(torch.tensor(np.array(params[name]["bias"])))
    return model


def make_batch(number: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(number)
    images = rng.uniform(0.1, 0.9, (6, 2, 2, 1))
    others = images + rng.uniform(-0.1, 0.1, images.shape)
    return images, others, rng.integers(0, 3, 6).astype(np.int32)


def as_torch(array: Any) -> Any:
    return torch.tensor(np.array(array))


def mart_of_torch(model: Any, images: Any, others: Any, labels: Any) -> Any:
    """YisenWang's `mart_loss` on given images."""
    logits, attacked = model(images.flatten(1)), model(others.flatten(1))
    probabilities = torch.softmax(attacked, 1)
    highest = torch.argsort(probabilities, dim=1)[:, -2:]
    wrong = torch.where(highest[:, -1] == labels, highest[:, -2], highest[:, -1])
    boosted = torch.nn.functional.nll_loss(
        torch.log(1.0001 - probabilities + 1e-12), wrong
    )
    natural = torch.softmax(logits, 1)
    of_label = torch.gather(natural, 1, labels[:, None]).squeeze()
    kl = torch.nn.KLDivLoss(reduction="none")
    robust = kl(torch.log(probabilities + 1e-12), natural).sum(1)
    weighted = (robust * (1.0000001 - of_label)).sum() / len(images)
    return cross_entropy(attacked, labels) + boosted + 5.0 * weighted


def test_mart_is_the_authors_step_with_its_running_statistics():
    init, _ = make_train_step(Normalized(), optax.sgd(RATE))
    state = init(KEY, jnp.zeros([6, 2, 2, 1]))
    model = make_normalized(state.params)
    optimizer = torch.optim.SGD(model.parameters(), RATE)
    for number in range(3):
        images, others, labels = make_batch(number)
        _, step = make_train_step(
            *(Normalized(), optax.sgd(RATE)),
            adversary=given(jnp.asarray(others)),
            objective=mart_loss(5.0),
        )
        state, metrics = jax.jit(step)(state, images, labels, KEY)
        optimizer.zero_grad()
        batch = (as_torch(images), as_torch(others), as_torch(labels).long())
        loss = mart_of_torch(model, *batch)
        loss.backward()
        optimizer.step()
        assert float(metrics["loss"]) == pytest.approx(float(loss.detach()), rel=1e-6)
    (statistics,) = state.batch_stats.values()
    pairs = (
        (state.params["Dense_0"]["kernel"].T, model[0].weight),
        (state.params["Dense_1"]["kernel"].T, model[3].weight),
        (state.params["BatchNorm_0"]["scale"], model[1].weight),
        (statistics["mean"], model[1].running_mean),
        (statistics["var"], model[1].running_var),
    )
    for ours, theirs in pairs:
        np.testing.assert_allclose(ours, theirs.detach(), rtol=0, atol=1e-11)


def test_label_smoothing_is_that_of_torch():
    rng = np.random.default_rng(0)
    logits, labels = rng.standard_normal((6, 4)) * 3, rng.integers(0, 4, 6)
    ours = label_smoothing(0.1).loss(jnp.asarray(logits), jnp.asarray(labels))
    smooth = torch.nn.CrossEntropyLoss(reduction="none", label_smoothing=0.1)
    np.testing.assert_allclose(ours, smooth(as_torch(logits), as_torch(labels)))


RADIUS = 32 / 255


def of_fgsm_rs(x: Any, delta: Any, slope: Any) -> Any:
    """locuslab's `train_fgsm.py`."""
    delta = torch.clamp(torch.clamp(delta, -RADIUS, RADIUS), 0 - x, 1 - x)
    moved = delta + 1.25 * RADIUS * torch.sign(slope(x + delta))
    return torch.clamp(torch.clamp(moved, -RADIUS, RADIUS), 0 - x, 1 - x)


def of_nfgsm(x: Any, noise: Any, slope: Any) -> Any:
    """pdejorge's `train.py`."""
    eta = torch.clamp(noise, 0 - x, 1 - x)
    delta = eta + RADIUS * torch.sign(slope(x + eta))
    return torch.clamp(delta, 0 - x, 1 - x)


@pytest.mark.parametrize(
    ("adversary", "reach", "twin"),
    [
        (fgsm_rs(32.0), RADIUS, of_fgsm_rs),
        (nfgsm(32.0), 2 * RADIUS, of_nfgsm),
    ],
)
def test_one_step_from_noise_is_the_authors(adversary, reach, twin):
    images, _, labels = make_batch(0)
    model, key = Twin(), jax.random.key(1)
    params = jax.tree.map(jnp.asarray, model.params())

    def logits_fn(images: Any) -> Any:
        return Toy().apply({"params": params}, images, train=True)

    ours, memory = adversary.perturb(
        logits_fn, jnp.asarray(images), jnp.asarray(labels), (), key=key
    )
    assert memory == ()
    own = draws.fold_in(draws.one_an_example(key, jnp.asarray(images)), 0)
    noise = draws.uniform(own, images.shape, -reach, reach)

    def slope(x: Any) -> Any:
        x = x.clone().requires_grad_(True)
        cross_entropy(model(x), as_torch(labels).long()).backward()
        return x.grad

    x = as_torch(images)
    expected = x + twin(x, as_torch(noise).double(), slope)
    np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-15)
    assert np.abs(ours - images).max() > 0.9 * reach


def test_a_step_without_noise_is_pgd_of_one_step():
    images, _, labels = make_batch(0)
    plain = at("linf", 32.0, 32.0, num_steps=1, random_start=False)
    params = jax.tree.map(jnp.asarray, Twin().params())

    def logits_fn(images: Any) -> Any:
        return Toy().apply({"params": params}, images, train=True)

    found = [
        adversary.perturb(logits_fn, images, labels, (), key=KEY)[0]
        for adversary in (nfgsm(32.0, noise=0.0), plain)
    ]
    helpers.assert_close(found[0], found[1], atol=1e-15)


@pytest.mark.parametrize(
    ("off", "plain"),
    [({"objective": label_smoothing(0.0)}, {})],
)
def test_a_setting_that_does_nothing_is_the_method_without_it(off, plain):
    one, other = train_ours(**off)[-1], train_ours(**plain)[-1]
    helpers.assert_same_bits(one.params, other.params)
