"""The adversarial training family against its authors' steps, written out in PyTorch.

A toy network in float64: what differs is rounding. Where an attack starts at random,
the twin is handed the numbers that ours drew.
"""

import dataclasses
from typing import Any

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from test_methods_against_torch import (
    DECAY,
    Toy,
    Twin,
    batches,
    cross_entropy,
    given,
    make_sgd,
    train_ours,
)

from samrobust.attacks import draws
from samrobust.models import BatchNorm
from samrobust.sharpness import rwp
from samrobust.training import make_train_step
from samrobust.training.adversaries.at import at
from samrobust.training.adversaries.fgsm_rs import fgsm_rs
from samrobust.training.adversaries.free import free
from samrobust.training.adversaries.nfgsm import nfgsm
from samrobust.training.objectives.cfa_trades import regularized
from samrobust.training.objectives.label_smoothing import label_smoothing
from samrobust.training.objectives.mart import mart_loss
from samrobust.training.objectives.trades import trades_loss

torch = pytest.importorskip("torch")

KEY = jax.random.key(0)
RATE = 0.1


@pytest.fixture(autouse=True, scope="module")
def _in_float64():
    with jax.enable_x64(True):
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


def trades_of_torch(model: Any, images: Any, others: Any, labels: Any) -> Any:
    """yaodongyu's `trades_loss` on given images: three forward passes."""
    natural = cross_entropy(model(images.flatten(1)), labels)
    attacked = torch.log_softmax(model(others.flatten(1)), 1)
    again = torch.softmax(model(images.flatten(1)), 1)
    kl = torch.nn.KLDivLoss(reduction="sum")
    return natural + 6.0 * kl(attacked, again) / len(images)


@pytest.mark.parametrize(
    ("objective", "loss_of_torch"),
    [(mart_loss(5.0), mart_of_torch), (trades_loss(6.0), trades_of_torch)],
)
def test_running_statistics_are_those_of_the_authors_step(objective, loss_of_torch):
    init, _ = make_train_step(Normalized(), optax.sgd(RATE))
    state = init(KEY, jnp.zeros([6, 2, 2, 1]))
    model = make_normalized(state.params)
    optimizer = torch.optim.SGD(model.parameters(), RATE)
    for number in range(3):
        images, others, labels = make_batch(number)
        _, step = make_train_step(
            *(Normalized(), optax.sgd(RATE)),
            adversary=given(jnp.asarray(others)),
            objective=objective,
        )
        state, metrics = jax.jit(step)(state, images, labels, KEY)
        optimizer.zero_grad()
        batch = (as_torch(images), as_torch(others), as_torch(labels).long())
        loss = loss_of_torch(model, *batch)
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


def test_class_wise_regularization_is_the_authors_loss():
    """PKU-ML's `cw_trades_loss` in `attack.py`, and its gradients."""
    rng = np.random.default_rng(0)
    clean, attacked = rng.standard_normal((2, 6, 4))
    labels, rates = rng.integers(0, 4, 6), rng.random(4)
    betas = (0.5 + rates) * 6.0

    def ours(clean: Any, attacked: Any) -> Any:
        rest = jnp.asarray(labels), jnp.asarray(betas[labels])
        losses = regularized(clean, attacked, clean, *rest)
        return jnp.mean(losses)

    found = jax.grad(ours, (0, 1))(jnp.asarray(clean), jnp.asarray(attacked))
    pair = [as_torch(z).requires_grad_(True) for z in (clean, attacked)]
    share = as_torch((betas / (1 + betas))[labels])
    natural = torch.nn.functional.cross_entropy(
        pair[0], as_torch(labels), reduction="none"
    )
    robust = torch.nn.functional.kl_div(
        torch.log_softmax(pair[1], 1), torch.softmax(pair[0], 1), reduction="none"
    ).sum(1)
    (((1 - share) * natural + share * robust) / 6).sum().backward()
    for gradient, z in zip(found, pair, strict=True):
        np.testing.assert_allclose(gradient, z.grad, rtol=0, atol=1e-15)


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
    images, _, labels = map(jnp.asarray, make_batch(0))
    plain = at("linf", 32.0, 32.0, num_steps=1, random_start=False)
    params = jax.tree.map(jnp.asarray, Twin().params())

    def logits_fn(images: Any) -> Any:
        return Toy().apply({"params": params}, images, train=True)

    found = [
        adversary.perturb(logits_fn, images, labels, (), key=KEY)[0]
        for adversary in (nfgsm(32.0, noise=0.0), plain)
    ]
    helpers.assert_close(found[0], found[1], atol=1e-15)


def _exact(leaf: Any) -> Any:
    return leaf.astype(np.float64) if leaf.dtype == np.float32 else leaf


def train_by_learning(adversary: Any, num_steps: int, replays: int) -> Any:
    """The states after each step, replaying each batch."""
    init, step = make_train_step(Toy(), make_sgd(), adversary=adversary)
    state = init(KEY, jnp.zeros([6, 2, 2, 1]))
    params = jax.tree.map(jnp.asarray, Twin().params())
    state = dataclasses.replace(
        state,
        params=params,
        opt_state=make_sgd().init(params),
        adversary=jax.tree.map(_exact, state.adversary),
    )
    states = []
    for number in range(num_steps):
        images, _, labels = make_batch(number // replays)
        state, _ = jax.jit(step)(state, images, labels, KEY)
        states.append(state)
    return states


def test_free_adversarial_training_is_the_authors_step():
    """locuslab's `train_free.py`; at each new batch x + d is clipped into the box."""
    replays, model = 3, Twin()
    delta = torch.zeros(6, 2, 2, 1).double()
    for number in range(7):
        images, _, labels = map(as_torch, make_batch(number // replays))
        delta = torch.clamp(delta, 0 - images, 1 - images).requires_grad_(True)
        model.backward(cross_entropy(model(images + delta), labels.long()))
        with torch.no_grad():
            moved = delta + RADIUS * torch.sign(delta.grad)
            delta = torch.clamp(moved, -RADIUS, RADIUS)
            delta = torch.clamp(delta, 0 - images, 1 - images)
        model.optimizer.step()
    state = train_by_learning(free(32.0), 7, replays)[-1]
    helpers.assert_close(state.params, model.params(), atol=1e-12)
    np.testing.assert_allclose(state.adversary, delta, rtol=0, atol=1e-12)


@pytest.mark.parametrize("threshold", [0.8, 100.0])
def test_rwp_is_the_authors_step(threshold):
    """ChaojianYu's `utils_rwp.py`: decay acts at w + v, as with AWP."""
    gamma, model = 0.3, Twin()
    named = dict(model.named)
    kernels = [name for name, p in named.items() if p.dim() > 1]

    def norm(tensors: Any) -> Any:
        return torch.cat([t.flatten() for t in tensors]).norm()

    counts = []
    for _, images, labels in batches():
        weights = {name: named[name].detach().clone() for name in kernels}
        total = {name: torch.zeros_like(w) for name, w in weights.items()}
        moves = dict(total)
        for _ in range(4):
            with torch.no_grad():
                for name in kernels:
                    named[name].copy_(weights[name] + moves[name])
            losses = torch.nn.functional.cross_entropy(
                model(images), labels, reduction="none"
            )
            counts.append(int((losses < threshold).sum()))
            model.backward(losses.mul((losses < threshold).double()).mean())
            total = {n: total[n] + 0.01 * named[n].grad for n in kernels}
            ratio = norm(weights.values()) / (norm(total.values()) + 1e-20)
            moves = {n: gamma * ratio * total[n] for n in kernels}
        with torch.no_grad():
            for name in kernels:
                named[name].copy_(weights[name] + moves[name])
        model.backward(cross_entropy(model(images), labels))
        model.optimizer.step()
        with torch.no_grad():
            for name in kernels:
                named[name].sub_(moves[name])
    assert set(counts) == {6} or len(set(counts)) > 2
    ours = train_ours(rwp(gamma, threshold, 4, weight_decay=DECAY))
    helpers.assert_close(ours[-1].params, model.params(), atol=1e-11)


@pytest.mark.parametrize(
    ("off", "plain"),
    [
        ({"objective": label_smoothing(0.0)}, {}),
        ({"sharpness": rwp(0.0)}, {}),
        ({"sharpness": rwp(0.3, 0.0)}, {}),
    ],
)
def test_a_setting_that_does_nothing_is_the_method_without_it(off, plain):
    one, other = train_ours(**off)[-1], train_ours(**plain)[-1]
    helpers.assert_same_bits(one.params, other.params)
