"""FAWA and Generalist against their authors' steps, written out in PyTorch, float64."""

import dataclasses
from collections.abc import Generator
from typing import Any

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_adversarial_against_torch import Normalized, make_batch, make_normalized
from test_methods_against_torch import DECAY, MOMENTUM, RATE, given, make_sgd

from samrobust.training import make_train_step
from samrobust.training.averaging.fawa import fawa
from samrobust.training.averaging.generalist import generalist

torch = pytest.importorskip("torch")

KEY = jax.random.key(0)
PER_EPOCH = 2


@pytest.fixture(autouse=True, scope="module")
def _in_float64():
    with jax.enable_x64(True):
        yield


def train(averaging: Any, num_steps: int) -> Generator[Any, Any, None]:
    """The fresh state, then that after each step; goes on from a state that is sent."""
    natural = make_train_step(Normalized(), make_sgd(), averaging=averaging)

    def method(others: Any) -> Any:
        adversary = given(others)
        options = {"adversary": adversary, "averaging": averaging}
        robust = make_train_step(Normalized(), make_sgd(), **options)
        return averaging.join(robust, natural) if averaging.join else robust

    @jax.jit
    def take(state: Any, images: Any, others: Any, labels: Any) -> Any:
        return method(others).train_step(state, images, labels, KEY)[0]

    state = jax.jit(method(None).init)(KEY, jnp.zeros([6, 2, 2, 1]))
    sent = yield state
    for number in range(num_steps):
        state = take(sent or state, *make_batch(number))
        sent = yield state


class Expert:
    """A network in PyTorch that takes the steps of the reference code."""

    def __init__(self, params: Any) -> None:
        self.model = make_normalized(params)
        self.optimizer = torch.optim.SGD(
            self.model.parameters(), RATE, momentum=MOMENTUM, weight_decay=DECAY
        )

    def step(self, images: Any, labels: Any) -> None:
        logits = self.model(torch.tensor(images).flatten(1))
        loss = torch.nn.functional.cross_entropy(logits, torch.tensor(labels).long())
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()

    @property
    def state(self) -> dict[str, Any]:
        """All floats, buffers too."""
        found = self.model.state_dict().items()
        return {k: v.clone() for k, v in found if v.is_floating_point()}


def assert_equal(ours: Any, theirs: dict[str, Any]) -> None:
    params, (statistics,) = ours["params"], ours["batch_stats"].values()
    pairs = {
        "0.weight": params["Dense_0"]["kernel"].T,
        "0.bias": params["Dense_0"]["bias"],
        "1.weight": params["BatchNorm_0"]["scale"],
        "1.bias": params["BatchNorm_0"]["bias"],
        "1.running_mean": statistics["mean"],
        "1.running_var": statistics["var"],
        "3.weight": params["Dense_1"]["kernel"].T,
        "3.bias": params["Dense_1"]["bias"],
    }
    assert pairs.keys() == theirs.keys()
    for name, array in pairs.items():
        np.testing.assert_allclose(array, theirs[name], rtol=0, atol=1e-12)


def test_fawa_is_the_authors_average():
    """PKU-ML's `train.py` with `weight_average`; the first that counts is copied."""
    averaging, decay = fawa(0.24, 0.6), 0.6
    assert averaging.admit is not None
    admit, worst = jax.jit(averaging.admit), [0.1, 0.3, 0.2, 0.24, 0.5]
    states = train(averaging, PER_EPOCH * len(worst))
    expert = Expert(next(states).params)
    average: dict[str, Any] = {}
    state: Any = None
    for epoch, minimum in enumerate(worst):
        for number in range(PER_EPOCH * epoch, PER_EPOCH * (epoch + 1)):
            state = states.send(state)
            _, others, labels = make_batch(number)
            expert.step(others, labels)
            if not average:
                helpers.assert_same_bits(state.eval_variables, state.variables)
        admitted = admit(state.average, state.variables, minimum)
        state = dataclasses.replace(state, average=admitted)
        if minimum >= 0.24:
            kept = decay if average else 0.0
            new = expert.state
            average = {k: kept * average.get(k, 0) + (1 - kept) * new[k] for k in new}
        assert_equal(state.eval_variables, average or expert.state)


def test_generalist_is_the_authors_step():
    """PKU-ML's `main.py`: both experts, their averages and the mixture's."""
    epochs = 6
    averaging = generalist(
        *(0.4, 1.0, 0.3, 0.5, 0.5, 2),
        steps_per_epoch=PER_EPOCH,
        total_steps=PER_EPOCH * epochs,
    )
    states = train(averaging, PER_EPOCH * epochs)
    params = next(states).params
    experts = robust, natural = Expert(params), Expert(params)
    averages = [robust.state for _ in range(3)]
    beta = 1.0
    for number, state in enumerate(states):
        images, others, labels = make_batch(number)
        robust.step(others, labels)
        natural.step(images, labels)
        epoch = number // PER_EPOCH + 1
        beta = np.interp(epoch, [0, epochs // 2, epochs], [1.0, 1.0, 0.4])
        decay = min(0.3, (number + 1) / (number + 10))

        def update(shadow: Any, new: Any, decay: float = decay) -> None:
            for name in shadow:
                shadow[name] = decay * shadow[name] + (1 - decay) * new[name]

        update(averages[0], robust.state)
        update(averages[1], natural.state)
        one, other, mixture = averages
        update(mixture, {k: beta * one[k] + (1 - beta) * other[k] for k in one})
        if epoch >= epochs // 2 and epoch % 2 == 0:
            for expert in experts:
                expert.model.load_state_dict(mixture, strict=False)
        assert_equal(state.eval_variables, mixture)
        assert_equal(state.variables, robust.state)
        assert_equal(state.average["natural"].variables, natural.state)
    assert beta == pytest.approx(0.4)
