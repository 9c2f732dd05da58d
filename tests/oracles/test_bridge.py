"""The bridge: the same logits and gradients on both sides, and attacks across it."""

import functools
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from samrobust.attacks import linf, pgd
from samrobust.interchange import as_torch, from_torch
from samrobust.objectives import cross_entropy

torch = pytest.importorskip("torch")
twin = pytest.importorskip("torch_twin")

SHAPE = (3, 4, 5, 2)  # [B, H, W, C], no two sides equal
RNG = np.random.default_rng(0)
WEIGHTS = (RNG.normal(size=(40, 6)) / 4).astype(np.float32)
HEAD = RNG.normal(size=(6, 7)).astype(np.float32)
IMAGES = jnp.asarray(RNG.uniform(size=SHAPE), jnp.float32)
LABELS = jnp.array([1, 0, 6])


def ours(images):
    return jnp.tanh(images.reshape(len(images), -1) @ WEIGHTS) @ HEAD


class Theirs(torch.nn.Module):
    """The same function of the same pixels, laid out the PyTorch way."""

    def __init__(self):
        super().__init__()
        self.weights = torch.nn.Parameter(torch.from_numpy(WEIGHTS))

    def forward(self, images):
        flat = images.permute(0, 2, 3, 1).flatten(1)
        return torch.tanh(flat @ self.weights) @ torch.from_numpy(HEAD)


def to_torch(images):
    return torch.from_numpy(np.moveaxis(np.asarray(images), -1, 1).copy())


def to_jax(images):
    return np.moveaxis(images.detach().numpy(), 1, -1)


def our_gradient(logits_fn, images):
    return jax.grad(lambda x: jnp.sum(cross_entropy(logits_fn(x), LABELS)))(images)


def their_gradient(module, images):
    images = images.clone().requires_grad_()
    loss = torch.nn.functional.cross_entropy(
        module(images), torch.tensor([1, 0, 6]), reduction="sum"
    )
    return torch.autograd.grad(loss, images)[0]


def test_a_jax_classifier_has_the_same_logits_and_gradients_in_pytorch():
    module = as_torch(ours)
    logits = module(to_torch(IMAGES))
    np.testing.assert_allclose(logits.numpy(), ours(IMAGES), atol=1e-5)
    gradient = to_jax(their_gradient(module, to_torch(IMAGES)))
    np.testing.assert_allclose(gradient, our_gradient(ours, IMAGES), atol=1e-5)
    assert np.abs(gradient).max() > 0.1
    assert isinstance(module, torch.nn.Module)
    assert not module.training
    assert not logits.requires_grad


def test_a_pytorch_module_has_the_same_logits_and_gradients_in_jax():
    module = Theirs().eval()
    logits_fn = from_torch(module)
    np.testing.assert_allclose(logits_fn(IMAGES), ours(IMAGES), atol=1e-5)
    np.testing.assert_allclose(jax.jit(logits_fn)(IMAGES), ours(IMAGES), atol=1e-5)
    gradient = jax.jit(functools.partial(our_gradient, logits_fn))(IMAGES)
    expected = to_jax(their_gradient(module, to_torch(IMAGES)))
    np.testing.assert_allclose(gradient, expected, atol=1e-5)
    assert np.abs(gradient).max() > 0.1
    assert module.weights.grad is None


def test_both_bridges_one_after_the_other_change_nothing():
    across = from_torch(as_torch(ours))
    np.testing.assert_allclose(across(IMAGES), ours(IMAGES), atol=1e-6)
    np.testing.assert_allclose(
        our_gradient(across, IMAGES), our_gradient(ours, IMAGES), atol=1e-5
    )


def test_a_second_call_compiles_nothing_and_keeps_an_earlier_gradient():
    traced = []

    def counting(images):
        traced.append(images.shape)
        return ours(images)

    module = as_torch(counting)
    first, second = (to_torch(x).requires_grad_() for x in (IMAGES, 1 - IMAGES))
    outputs = [module(first).sum(), module(second).sum()]
    count = len(traced)
    for images, output in zip((first, second), outputs, strict=True):
        (gradient,) = torch.autograd.grad(output, images)
        expected = jax.grad(lambda x: jnp.sum(ours(x)))(to_jax(images))
        np.testing.assert_allclose(to_jax(gradient), expected, atol=1e-5)
    their_gradient(module, first.detach())
    assert len(traced) == count == 1


def test_vmap_over_a_pytorch_module_is_a_loop():
    logits_fn = from_torch(Theirs().eval())
    stacked = jnp.stack([IMAGES, 1 - IMAGES])
    gradients = jax.vmap(functools.partial(our_gradient, logits_fn))(stacked)
    for images, gradient in zip(stacked, gradients, strict=True):
        np.testing.assert_allclose(gradient, our_gradient(ours, images), atol=1e-5)


def test_our_pgd_attacks_a_pytorch_module_as_it_does_the_same_network_in_jax():
    attack = pgd(linf(0.1), step_size=0.03, num_steps=5)
    key = jax.random.key(0)
    adversarial = [
        jax.jit(lambda x, f=f: attack(f, x, LABELS, key=key))(IMAGES)
        for f in (from_torch(Theirs().eval()), ours)
    ]
    np.testing.assert_allclose(adversarial[0], adversarial[1], atol=1e-5)
    assert np.abs(adversarial[0] - IMAGES).max() == pytest.approx(0.1, abs=1e-6)


def test_a_pytorch_attack_runs_on_a_jax_classifier_as_on_the_same_module():
    options = {"eps": 0.1, "step_size": 0.03, "num_steps": 5}
    labels = torch.tensor([1, 0, 6])
    adversarial = [
        twin.pgd_linf(module, to_torch(IMAGES), labels, **options).numpy()
        for module in (as_torch(ours), Theirs().eval())
    ]
    np.testing.assert_allclose(adversarial[0], adversarial[1], atol=1e-5)
    assert np.abs(adversarial[0] - to_torch(IMAGES).numpy()).max() > 0.09


def test_a_module_in_training_mode_is_refused():
    with pytest.raises(ValueError, match=r"Expected a module in evaluation mode"):
        from_torch(Theirs())


DOCS = pathlib.Path(__file__).parents[2] / "docs/interchange.md"
SNIPPETS = re.findall(r"```python\n(.*?)```", DOCS.read_text(), re.DOTALL)


def run_snippet(index):
    names: dict = {}
    exec(compile(SNIPPETS[index], f"snippet {index} of {DOCS.name}", "exec"), names)
    return names


def test_the_documented_lines_for_pytorch_attacks_run():
    gradient = run_snippet(0)["gradient"].numpy()
    np.testing.assert_allclose(gradient, 1 / (3 * 8 * 8), rtol=1e-5)


def test_the_documented_lines_for_our_attacks_run():
    names = run_snippet(1)
    moved = np.abs(names["adversarial"] - names["images"])
    assert moved.max() == pytest.approx(8 / 255, abs=1e-6)
