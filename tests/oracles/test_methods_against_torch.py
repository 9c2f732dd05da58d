"""Methods of the composition against their authors' steps, written out in PyTorch.

A toy network without BatchNorm in float64, seven steps: what differs is rounding.
"""

import functools
from typing import Any

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

from samrobust.sharpness import asam, awp, sam
from samrobust.training import Objective, make_train_step
from samrobust.training.averaging.ema import ema
from samrobust.training.objectives.trades import trades_loss
from samrobust.training.parts import Adversary

torch = pytest.importorskip("torch")

RATE, MOMENTUM, DECAY, STEPS = 0.1, 0.9, 5e-3, 7
KEY = jax.random.key(0)


class Toy(nn.Module):
    """Two dense layers; a convolution would tell no more."""

    @nn.compact
    def __call__(self, images, *, train):
        del train
        dense = functools.partial(nn.Dense, dtype=jnp.float64, param_dtype=jnp.float64)
        hidden = jnp.tanh(dense(5, name="hidden")(images.reshape(len(images), -1)))
        return dense(3, name="head")(hidden)


@pytest.fixture(autouse=True, scope="module")
def _in_float64():
    with jax.enable_x64(True), helpers.quick_compilation():
        yield


def make_weights() -> dict[str, dict[str, np.ndarray]]:
    rng = np.random.default_rng(0)
    shapes = {"hidden": (4, 5), "head": (5, 3)}
    return {
        name: {
            "kernel": rng.standard_normal(shape),
            "bias": 0.1 * rng.standard_normal(shape[1:]),
        }
        for name, shape in shapes.items()
    }


def make_batch(step: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Images, other images in their place, and labels."""
    rng = np.random.default_rng(100 + step)
    images = rng.uniform(0.2, 0.8, (6, 2, 2, 1))
    noise = rng.uniform(-0.1, 0.1, images.shape)
    return images, images + noise, rng.integers(0, 3, 6).astype(np.int32)


def given(images: Any) -> Adversary:
    """The adversary that hands these images in."""

    def perturb(logits_fn, natural, labels, state, *, key):
        del logits_fn, natural, labels, key
        return images, state

    return Adversary(perturb)


def train_ours(sharpness: Any = None, objective: Any = None, averaging: Any = None):
    """The states after each step."""
    tx = optax.chain(
        sharpness or optax.identity(),
        optax.add_decayed_weights(DECAY),
        optax.sgd(RATE, momentum=MOMENTUM),
    )
    init, _ = make_train_step(Toy(), tx, averaging=averaging)
    state = init(KEY, jnp.zeros([6, 2, 2, 1]))
    params = jax.tree.map(jnp.asarray, make_weights())
    state = type(state)(
        **{**vars(state), "params": params, "opt_state": tx.init(params)}
    )
    if averaging is not None:
        average = averaging.init(state.variables)
        state = type(state)(**{**vars(state), "average": average})
    states = []
    for number in range(STEPS):
        images, others, labels = make_batch(number)
        _, step = make_train_step(
            Toy(),
            tx,
            adversary=given(others),
            averaging=averaging,
            **({} if objective is None else {"objective": objective}),
        )
        state, _ = jax.jit(step)(state, jnp.asarray(images), labels, KEY)
        states.append(state)
    return states


class Twin:
    """The toy network in PyTorch, with SGD as the reference code has it."""

    def __init__(self) -> None:
        self.hidden, self.head = (
            torch.nn.Linear(*shape).double() for shape in ((4, 5), (5, 3))
        )
        with torch.no_grad():
            for name, values in make_weights().items():
                layer = getattr(self, name)
                layer.weight.copy_(torch.from_numpy(values["kernel"].T))
                layer.bias.copy_(torch.from_numpy(values["bias"]))
        self.named = [
            (f"{name}.{kind}", getattr(getattr(self, name), kind))
            for name in ("hidden", "head")
            for kind in ("weight", "bias")
        ]
        self.optimizer = torch.optim.SGD(
            [p for _, p in self.named], RATE, MOMENTUM, weight_decay=DECAY
        )

    def __call__(self, images):
        return self.head(torch.tanh(self.hidden(images.reshape(len(images), -1))))

    def backward(self, loss):
        self.optimizer.zero_grad()
        loss.backward()

    def params(self):
        return {
            name: {
                "kernel": getattr(self, name).weight.detach().numpy().T.copy(),
                "bias": getattr(self, name).bias.detach().numpy().copy(),
            }
            for name in ("hidden", "head")
        }


def batches():
    for number in range(STEPS):
        images, others, labels = make_batch(number)
        yield (
            torch.from_numpy(images),
            torch.from_numpy(others),
            torch.from_numpy(labels).long(),
        )


def cross_entropy(logits, labels):
    return torch.nn.functional.cross_entropy(logits, labels)


def assert_close(state: Any, expected: Any, tolerance: float = 1e-12) -> None:
    helpers.assert_close(state, expected, atol=tolerance)


def test_asam_is_the_authors_step():
    """SamsungLabs' `asam.py`: T = |w| + eta for weights, 1 for biases."""
    rho, eta, model = 0.5, 0.01, Twin()
    for _, images, labels in batches():
        model.backward(cross_entropy(model(images), labels))
        with torch.no_grad():
            scales = {
                n: p.abs() + eta if "weight" in n else torch.ones_like(p)
                for n, p in model.named
            }
            norm = torch.stack([(scales[n] * p.grad).norm() for n, p in model.named])
            moves = {
                n: rho * scales[n] ** 2 * p.grad / (norm.norm() + 1e-16)
                for n, p in model.named
            }
            for n, p in model.named:
                p.add_(moves[n])
        model.backward(cross_entropy(model(images), labels))
        with torch.no_grad():
            for n, p in model.named:
                p.sub_(moves[n])
        model.optimizer.step()
    assert_close(train_ours(asam(rho, eta))[-1].params, model.params())


def test_awp_is_the_authors_step():
    """csdongxian's `utils_awp.py` and training loop: decay acts at w + v."""
    gamma, model = 0.3, Twin()
    for _, images, labels in batches():
        model.backward(cross_entropy(model(images), labels))
        with torch.no_grad():
            moves = {
                n: gamma * p.norm() * p.grad / (p.grad.norm() + 1e-20)
                for n, p in model.named
                if p.dim() > 1
            }
            for n, p in model.named:
                p.add_(moves.get(n, 0))
        model.backward(cross_entropy(model(images), labels))
        model.optimizer.step()
        with torch.no_grad():
            for n, p in model.named:
                p.sub_(moves.get(n, 0))
    ours = train_ours(awp(gamma, weight_decay=DECAY))
    assert_close(ours[-1].params, model.params())


@pytest.mark.parametrize("with_awp", [False, True])
def test_trades_is_the_authors_step(with_awp):
    """yaodongyu's `trades.py` on given images; TRADES-AWP ascends on the same loss."""
    beta, gamma, model = 6.0, 0.3, Twin()
    kl = torch.nn.KLDivLoss(reduction="sum")

    def loss(images, others, labels):
        natural = model(images)
        robust = kl(
            torch.log_softmax(model(others), 1), torch.softmax(model(images), 1)
        )
        return cross_entropy(natural, labels) + beta * robust / len(images)

    for batch in batches():
        moves: dict[str, Any] = {}
        if with_awp:
            model.backward(loss(*batch))
            with torch.no_grad():
                for n, p in model.named:
                    if p.dim() > 1:
                        moves[n] = gamma * p.norm() * p.grad / p.grad.norm()
                        p.add_(moves[n])
        model.backward(loss(*batch))
        model.optimizer.step()
        with torch.no_grad():
            for n, p in model.named:
                p.sub_(moves.get(n, 0))
    sharpness = awp(gamma, weight_decay=DECAY) if with_awp else None
    ours = train_ours(sharpness, trades_loss(beta))
    assert_close(ours[-1].params, model.params())


def test_ema_is_that_of_torch():
    """`AveragedModel`: the first update copies."""
    decay, model = 0.9, Twin()
    tree = torch.nn.ModuleDict({"hidden": model.hidden, "head": model.head})
    averaged = torch.optim.swa_utils.AveragedModel(
        tree, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(decay)
    )
    for _, images, labels in batches():
        model.backward(cross_entropy(model(images), labels))
        model.optimizer.step()
        averaged.update_parameters(tree)
    average = train_ours(averaging=ema(decay))[-1].average["params"]
    model.hidden, model.head = averaged.module["hidden"], averaged.module["head"]
    assert_close(average, model.params())


@pytest.mark.parametrize(
    ("off", "plain"),
    [
        ({"sharpness": asam(0.0)}, {}),
        ({"sharpness": awp(0.0)}, {}),
        ({"sharpness": sam(0.0)}, {}),
        ({"averaging": ema(0.0)}, {}),
        (
            {"objective": trades_loss(0.0)},
            {"objective": Objective(trades_loss(0.0).loss, ("natural",))},
        ),
    ],
)
def test_strength_zero_is_standard_training_bit_for_bit(off, plain):
    last = train_ours(**off)[-1]
    helpers.assert_same_bits(last.params, train_ours(**plain)[-1].params)
    if last.average:
        helpers.assert_same_bits(last.average["params"], last.params)
