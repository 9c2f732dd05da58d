"""The network, its gradients, PGD and training steps against an own PyTorch twin.

Same weights, same batches, same starts; what differs is the library underneath. Signs
of gradients that are zero but for rounding may differ, so the pixels of linf attacks
are compared by the share that agrees.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from samrobust.attacks import l2, linf, pgd
from samrobust.models import PreActResNet
from samrobust.objectives import cross_entropy

torch = pytest.importorskip("torch")
twin = pytest.importorskip("torch_twin")

MEAN, STD = (0.49, 0.48, 0.45), (0.25, 0.24, 0.26)
SMALL = {"width": 8, "blocks": (1, 1, 1), "mean": MEAN, "std": STD}
NETWORKS = {
    "PreActResNet-18": {"mean": MEAN, "std": STD},
    "two blocks a stage": {"width": 4, "blocks": (2, 2)},
    "one stage": {"width": 8, "blocks": (1,), "mean": MEAN, "std": STD},
    "three classes": {**SMALL, "num_classes": 3},
}
BALLS = {  # radius, step size and floor of the gradient's norm
    "linf": (linf(8 / 255), 8 / 255, 2 / 255, None),
    "l2": (l2(0.5), 0.5, 0.125, 0.0),
    "l2 with a floor": (l2(0.5, gradient_floor=0.1), 0.5, 0.125, 0.1),
}


@pytest.fixture(autouse=True)
def _exact_products():
    with jax.default_matmul_precision("highest"):
        yield


def make_pair(seed=0, **settings):
    """A twin with random affine parameters and running statistics, and ours."""
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        torch_model = twin.PreActResNet(**settings).eval()
        for module in torch_model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.weight.uniform_(0.5, 1.5)
                module.bias.uniform_(-0.5, 0.5)
                module.running_mean.uniform_(-0.5, 0.5)
                module.running_var.uniform_(0.5, 2.0)
    return torch_model, PreActResNet(**settings), twin.to_jax(torch_model)


def make_batch(seed=0, size=16, side=16, num_classes=10):
    rng = np.random.default_rng(seed)
    images = rng.uniform(size=(size, side, side, 3)).astype(np.float32)
    return images, rng.integers(0, num_classes, size)


def to_torch(images):
    return torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))


def to_numpy(images):
    return images.detach().numpy().transpose(0, 2, 3, 1)


def make_logits_fn(model, variables, *, train=False):
    return jax.jit(lambda images: model.apply(variables, images, train=train))


# --- the network ----------------------------------------------------------------------


def test_the_default_network_has_the_parameters_of_preact_resnet_18():
    variables = jax.eval_shape(
        lambda: PreActResNet().init(
            jax.random.key(0), jnp.zeros([1, 32, 32, 3]), train=False
        )
    )
    ours = sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))
    theirs = sum(param.numel() for param in twin.PreActResNet().parameters())
    assert ours == theirs == 11_172_170


def test_the_variables_have_the_structure_of_the_twin():
    _, model, variables = make_pair(**SMALL)
    ours = model.init(jax.random.key(0), jnp.zeros([1, 16, 16, 3]), train=False)
    assert jax.tree.map(jnp.shape, ours) == jax.tree.map(np.shape, variables)


@pytest.mark.parametrize("network", NETWORKS)
def test_logits_in_eval_mode_equal_those_of_torch(network):
    torch_model, model, variables = make_pair(**NETWORKS[network])
    side = 32 if network == "PreActResNet-18" else 16
    images, _ = make_batch(size=4, side=side)
    ours = make_logits_fn(model, variables)(images)
    theirs = torch_model(to_torch(images)).detach().numpy()
    print(network, np.abs(ours - theirs).max(), np.abs(theirs).max())
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4)


def test_logits_in_train_mode_equal_those_of_torch():
    torch_model, model, variables = make_pair(**SMALL)
    images, _ = make_batch()
    ours = make_logits_fn(model, variables, train=True)(images)
    theirs = torch_model.train()(to_torch(images)).detach().numpy()
    print(np.abs(ours - theirs).max(), np.abs(theirs).max())
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4)


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("side", [15, 16])
def test_input_gradients_equal_those_of_torch(side, train):
    torch_model, model, variables = make_pair(**SMALL)
    images, labels = make_batch(side=side)

    def loss(images):
        logits = model.apply(variables, images, train=train)
        return jnp.sum(cross_entropy(logits, labels))

    ours = jax.jit(jax.grad(loss))(images)
    leaf = to_torch(images).requires_grad_()
    torch.nn.functional.cross_entropy(
        torch_model.train(train)(leaf), torch.from_numpy(labels), reduction="sum"
    ).backward()
    theirs = to_numpy(leaf.grad)
    print(side, train, np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))
    assert np.linalg.norm(ours - theirs) <= 1e-4 * np.linalg.norm(theirs)


def test_weights_travel_to_torch_and_back():
    _, model, _ = make_pair(**SMALL)
    images, _ = make_batch(size=4)
    variables = model.init(jax.random.key(1), images, train=False)
    torch_model, _, _ = make_pair(seed=1, **SMALL)
    twin.from_jax(torch_model, variables)
    jax.tree.map(np.testing.assert_array_equal, twin.to_jax(torch_model), variables)
    ours = make_logits_fn(model, variables)(images)
    theirs = torch_model(to_torch(images)).detach().numpy()
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4)


LAYERS = {
    "stem": ("stem", "kernel"),
    "3x3 convolution": ("stage2_block1", "conv1", "kernel"),
    "1x1 shortcut": ("stage2_block1", "shortcut", "kernel"),
    "linear": ("head", "kernel"),
    "linear bias": ("head", "bias"),
}


@pytest.mark.parametrize("layer", LAYERS)
def test_initial_weights_have_the_distribution_of_torch(layer):
    settings = {"width": 16, "blocks": (1, 1), "num_classes": 500}
    variables = jax.jit(PreActResNet(**settings).init, static_argnames="train")(
        jax.random.key(0), jnp.zeros([1, 8, 8, 3]), train=False
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        expected = twin.to_jax(twin.PreActResNet(**settings))
    ours, theirs = variables["params"], expected["params"]
    for key in LAYERS[layer]:
        ours, theirs = ours[key], theirs[key]
    ours, theirs = np.ravel(ours), np.ravel(theirs)
    print(
        layer,
        ours.size,
        stats.ks_2samp(ours, theirs).pvalue,
        ours.std() / theirs.std(),
        np.abs(ours).max() / np.abs(theirs).max(),
    )
    assert stats.ks_2samp(ours, theirs).pvalue > 1e-3
    assert np.std(ours) == pytest.approx(np.std(theirs), rel=0.1)
    assert np.max(np.abs(ours)) == pytest.approx(np.max(np.abs(theirs)), rel=0.02)


def test_initial_batch_norm_is_that_of_torch():
    variables = PreActResNet(**SMALL).init(
        jax.random.key(0), jnp.zeros([1, 16, 16, 3]), train=True
    )
    expected = twin.to_jax(twin.PreActResNet(**SMALL))
    np.testing.assert_array_equal(
        variables["params"]["norm"]["scale"], expected["params"]["norm"]["scale"]
    )
    np.testing.assert_array_equal(
        variables["params"]["norm"]["bias"], expected["params"]["norm"]["bias"]
    )
    jax.tree.map(
        np.testing.assert_array_equal, variables["batch_stats"], expected["batch_stats"]
    )


# --- attacks --------------------------------------------------------------------------


def torch_attack(ball, num_steps, *, train=False, start=None):
    """The twin's attack on the ball, as `attack(model, images, labels)`."""
    _, radius, step_size, floor = BALLS[ball]
    options = {"start": start, "train": train}
    if floor is None:
        return lambda model, images, labels: twin.pgd_linf(
            model, images, labels, radius, step_size, num_steps, **options
        )
    return lambda model, images, labels: twin.pgd_l2(
        model, images, labels, radius, step_size, num_steps, floor=floor, **options
    )


def jax_attack(ball, num_steps):
    return pgd(
        BALLS[ball][0],
        step_size=BALLS[ball][2],
        num_steps=num_steps,
        random_start=False,
    )


def assert_same_pixels(ours, theirs, *, share=0.999):
    gap = np.abs(np.asarray(ours) - theirs)
    print(gap.max(), (gap > 1e-6).sum(), gap.size)
    assert np.mean(gap <= 1e-6) >= share


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("ball", BALLS)
def test_pgd_reaches_the_pixels_of_torch(ball, train):
    torch_model, model, variables = make_pair(**SMALL)
    images, labels = make_batch()
    logits_fn = make_logits_fn(model, variables, train=train)
    ours = jax_attack(ball, 4)(logits_fn, images, labels, key=jax.random.key(0))
    theirs = torch_attack(ball, 4, train=train)(
        torch_model, to_torch(images), torch.from_numpy(labels)
    )
    assert_same_pixels(ours, to_numpy(theirs))
    assert np.max(np.abs(ours - images)) > 1e-2
