"""The bridge: the same logits and gradients on both sides, and attacks across it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import in_one_program

from samrobust.attacks import linf, pgd
from samrobust.attacks.losses import cross_entropy
from samrobust.models.torch import as_torch, from_torch

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


gradient_of_ours = jax.jit(functools.partial(our_gradient, ours))


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
    np.testing.assert_allclose(gradient, gradient_of_ours(IMAGES), atol=1e-5)
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
        our_gradient(across, IMAGES), gradient_of_ours(IMAGES), atol=1e-5
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
    stacked = np.stack([IMAGES, 1 - IMAGES])
    gradients = jax.vmap(functools.partial(our_gradient, logits_fn))(stacked)
    for images, gradient in zip(stacked, gradients, strict=True):
        np.testing.assert_allclose(gradient, gradient_of_ours(images), atol=1e-5)


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


def test_a_module_is_on_a_device_as_attack_libraries_ask_and_moves_to_another():
    def device(module):
        (only,) = module.parameters()
        assert only.numel() == 0
        assert not only.requires_grad
        return only.device.type

    assert device(as_torch(ours)) == "cpu"
    assert device(as_torch(ours, device="meta")) == "meta"
    assert device(as_torch(ours).to("meta")) == "meta"


def test_foolbox_attacks_a_jax_classifier_as_the_same_module_and_warns_of_nothing():
    foolbox = pytest.importorskip("foolbox")
    attack = foolbox.attacks.LinfPGD(rel_stepsize=0.3, steps=5, random_start=False)
    adversarial = [
        attack(
            foolbox.PyTorchModel(module, bounds=(0, 1), device="cpu"),
            *(to_torch(IMAGES), torch.tensor([1, 0, 6])),
            epsilons=[0.1],
        )[1][0].numpy()
        for module in (as_torch(ours), Theirs().eval())
    ]
    np.testing.assert_allclose(adversarial[0], adversarial[1], atol=1e-5)
    assert np.abs(adversarial[0] - to_torch(IMAGES).numpy()).max() > 0.09


def test_a_module_in_training_mode_is_refused():
    with pytest.raises(ValueError, match=r"Expected a module in evaluation mode"):
        from_torch(Theirs())


class Changed(torch.nn.Module):
    """A linear classifier with a change to what it is given or gives."""

    def __init__(self, before=lambda x: x, after=lambda x: x):
        super().__init__()
        self.head = torch.nn.Linear(40, 7, bias=False)
        with torch.no_grad():
            self.head.weight.copy_(torch.from_numpy((WEIGHTS @ HEAD).T))
        self.before, self.after = before, after

    def forward(self, images):
        flat = self.before(images).permute(0, 2, 3, 1).flatten(1)
        return self.after(self.head(flat))


def exported(module):
    return torch.export.export(module, (to_torch(IMAGES),)).module()


def with_hook(module):
    module.register_forward_hook(lambda *arguments: 2 * arguments[-1])
    return module


def make_frozen():
    """With weights that were made in inference mode, which can have no gradient."""
    with torch.inference_mode():
        return Changed().eval()


SERVED = {  # the module, and the largest error of its logits
    "bfloat16": (lambda: Changed().bfloat16(), 0.1),
    "float16": (lambda: Changed().half(), 0.02),
    "float64": (lambda: Changed().double(), 1e-5),
    "bfloat16 logits": (lambda: Changed(after=lambda x: x.bfloat16()), 0.1),
    "in place": (lambda: Changed(before=lambda x: x.mul_(1.0)), 1e-5),
    "in place on its logits": (lambda: Changed(after=lambda x: x.mul_(1.0)), 1e-5),
    "exported": (lambda: exported(Changed().eval()), 1e-5),
    "a function": (lambda: Changed().eval().forward, 1e-5),
}


@pytest.mark.parametrize(
    "mode", [torch.enable_grad, torch.no_grad, torch.inference_mode]
)
@pytest.mark.parametrize(("make", "atol"), SERVED.values(), ids=SERVED)
def test_modules_of_other_kinds_are_served(make, atol, mode):
    module = make()
    if isinstance(module, Changed):
        module.eval()
    images = jnp.array(IMAGES)
    with mode():
        logits_fn = from_torch(module)
        logits = jax.jit(logits_fn)(images)
        np.testing.assert_array_equal(logits_fn(images), logits)
        gradient = jax.jit(functools.partial(our_gradient, logits_fn))(images)
        eager = our_gradient(logits_fn, images)
    np.testing.assert_array_equal(images, IMAGES)
    assert logits.dtype == gradient.dtype == jnp.float32
    expected = IMAGES.reshape(3, -1) @ WEIGHTS @ HEAD
    np.testing.assert_allclose(logits, expected, atol=atol)
    np.testing.assert_allclose(gradient, eager, atol=1e-6)
    assert np.abs(gradient).max() > 0.1


def test_hooks_of_a_module_are_heard():
    module = Changed().eval()
    once = from_torch(module)(IMAGES)
    np.testing.assert_allclose(from_torch(with_hook(module))(IMAGES), 2 * once)


def fail(_):
    raise RuntimeError("no\nmany\nlines")


REFUSED = {
    "a tuple": (lambda: Changed(after=lambda x: (x, x)), "got logits='tuple'"),
    "a dictionary": (lambda: Changed(after=lambda x: {"a": x}), "got logits='dict'"),
    "no classes": (lambda: Changed(after=lambda x: x[:, 0]), "[3] torch.float32"),
    "maps": (lambda: Changed(after=lambda x: x[..., None, None]), "[3, 7, 1, 1]"),
    "another batch": (lambda: Changed(after=lambda x: x[:2]), "'[2, 7] torch.float32'"),
    "integers": (lambda: Changed(after=lambda x: x.long()), "[3, 7] torch.int64"),
    "sparse": (lambda: Changed(after=lambda x: x.to_sparse()), "[3, 7] torch.float32"),
    "an error": (lambda: Changed(before=fail), "[3, 2, 4, 5], got RuntimeError: no"),
}


@pytest.mark.parametrize("compile_", [lambda f: f, jax.jit], ids=["eager", "jit"])
@pytest.mark.parametrize(("make", "message"), REFUSED.values(), ids=REFUSED)
def test_a_module_without_logits_is_refused_in_one_line(make, message, compile_):
    logits_fn = from_torch(make().eval())
    with pytest.raises(ValueError, match=r"^Expected") as raised:
        compile_(logits_fn)(IMAGES)
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


@torch.no_grad()
def without_gradient(images):
    return 1 * images


CUT_OFF = {
    "detached": lambda: Changed(before=lambda x: x.detach()),
    "no_grad inside": lambda: Changed(before=without_gradient),
    "detached logits": lambda: Changed(after=lambda x: x.detach()),
    "inference mode inside": lambda: Changed(after=torch.inference_mode()(torch.neg)),
    "weights of inference mode": make_frozen,
}


@pytest.mark.parametrize("compile_", [lambda f: f, jax.jit], ids=["eager", "jit"])
@pytest.mark.parametrize("name", CUT_OFF)
def test_a_gradient_that_is_cut_off_is_refused_and_not_taken_for_zero(name, compile_):
    logits_fn = from_torch(CUT_OFF[name]().eval())
    assert compile_(logits_fn)(IMAGES).shape == (3, 7)
    with pytest.raises(ValueError, match=r"^Expected") as raised:
        compile_(functools.partial(our_gradient, logits_fn))(IMAGES)
    assert "\n" not in str(raised.value)


def make_normalized():
    return torch.nn.Sequential(
        torch.nn.Flatten(), torch.nn.BatchNorm1d(40), torch.nn.Linear(40, 7)
    ).eval()


def test_every_part_of_a_module_is_looked_at_at_every_call(caplog):
    module = make_normalized()
    logits_fn = from_torch(module)
    compiled = jax.jit(logits_fn)
    compiled(IMAGES)
    module[1].train()
    mean = module[1].running_mean.clone()
    for call in (logits_fn, compiled, jax.jit(lambda x: logits_fn(x))):
        with pytest.raises(ValueError, match=r"evaluation mode.* got training='1'\."):
            jax.block_until_ready(call(IMAGES))
    with pytest.raises(ValueError, match=r"evaluation mode.* got training='1'\."):
        from_torch(module)
    with pytest.raises(ValueError, match="evaluation mode") as raised:
        jax.block_until_ready(compiled(IMAGES))
    assert len(str(raised.value).splitlines()) <= 3
    assert caplog.text == ""
    assert torch.equal(module[1].running_mean, mean)
    module.eval()
    assert compiled(IMAGES).shape == (3, 7)


def test_an_exported_module_has_the_mode_that_it_was_exported_in():
    with pytest.raises(ValueError, match="got training='the module itself'"):
        from_torch(exported(make_normalized().train()))
    with pytest.raises(ValueError, match="got training='the module itself'"):
        from_torch(exported(torch.nn.Sequential(torch.nn.Dropout())))
    from_torch(exported(torch.nn.Sequential(torch.nn.Dropout()).eval()))
    logits_fn = from_torch(exported(make_normalized()))
    assert logits_fn(IMAGES).shape == (3, 7)
    with pytest.raises(ValueError, match=r"^Expected a module that takes images \[2"):
        logits_fn(IMAGES[:2])


def test_a_float64_module_is_attacked_in_float64():
    module = Changed().double().eval()
    with jax.enable_x64(True):
        images = jnp.asarray(np.asarray(IMAGES), jnp.float64)
        logits_fn = from_torch(module)
        weight = module.head.weight.detach().numpy()
        expected = np.asarray(images).reshape(3, -1) @ weight.T
        np.testing.assert_allclose(jax.jit(logits_fn)(images), expected, atol=1e-14)
        attack = pgd(linf(0.1), step_size=0.03, num_steps=2)
        moved = in_one_program(attack, logits_fn, images, LABELS, key=jax.random.key(0))
        assert moved.dtype == jnp.float64
        back = as_torch(logits_fn)
        pixels = torch.from_numpy(np.moveaxis(np.asarray(images), -1, 1).copy())
        np.testing.assert_array_equal(back(pixels).numpy(), logits_fn(images))
        assert their_gradient(back, pixels).dtype == torch.float64


def test_images_that_jax_would_round_or_read_otherwise_are_refused():
    module = as_torch(ours)
    for wrong in (to_torch(IMAGES).double(), to_torch(IMAGES).to(torch.uint8)):
        with pytest.raises(ValueError, match="Expected images of float32, got dtype="):
            module(wrong)
    with pytest.raises(ValueError, match="Expected images of floats"):
        from_torch(Changed().eval())(jnp.zeros(SHAPE, jnp.uint8))
    with pytest.raises(ValueError, match=r"Expected logits \[3, K\] from logits_fn"):
        as_torch(lambda x: x)(to_torch(IMAGES))


def test_halves_cross_to_a_jax_classifier_and_back():
    def halves(images):
        return ours(images.astype(jnp.float32)).astype(jnp.bfloat16)

    images = to_torch(IMAGES).bfloat16()
    logits = as_torch(halves)(images)
    np.testing.assert_allclose(logits.numpy(), ours(IMAGES), atol=0.1)
    assert their_gradient(as_torch(halves), images).dtype == torch.bfloat16
