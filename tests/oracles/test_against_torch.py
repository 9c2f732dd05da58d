"""The network, its gradients, PGD and training steps against an own PyTorch twin.

Same weights, same batches, same starts; what differs is the library underneath. Signs
of gradients that are zero but for rounding may differ, so the pixels of linf attacks
are compared by the share that agrees.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy import stats

from samrobust.attacks import identity, l2, linf, pgd
from samrobust.attacks.losses import cross_entropy
from samrobust.experiments import building, entries, methods
from samrobust.experiments.components import make_optimizer
from samrobust.experiments.configuration import base_config, finish
from samrobust.models import PreActResNet
from samrobust.training import TrainState, as_adversary, make_train_step

torch = pytest.importorskip("torch")
twin = pytest.importorskip("torch_twin")

KEY = jax.random.key(0)
NUM_STEPS = 5
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
    "l2 with a floor": (l2(0.5, gradient_floor=1e-3), 0.5, 0.125, 1e-3),
}


@pytest.fixture(autouse=True)
def _exact_products():
    with jax.default_matmul_precision("highest"):
        yield


def make_pair(seed=0, *, off_kinks=False, **settings):
    """A twin with random affine parameters and running statistics, and ours.

    With `off_kinks` every channel's ReLU is far on its flat or on its steep side. Else
    an activation of 6e-7 may be rounded to below zero by one library alone, which was
    seen to change an input gradient of 0.1 by 0.006, and all steps that follow.
    """
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        torch_model = twin.TwinResNet(**settings).eval()
        for module in torch_model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.weight.uniform_(0.5, 1.5)
                module.bias.uniform_(-0.5, 0.5)
                module.running_mean.uniform_(-0.5, 0.5)
                module.running_var.uniform_(0.5, 2.0)
                if off_kinks:
                    module.weight.mul_(0.3)
                    module.bias.copy_(torch.sign(module.bias) * 2.0)
    return torch_model, PreActResNet(**settings), twin.to_jax(torch_model)


def make_batch(seed=0, size=16, side=16) -> tuple[Any, Any]:
    rng = np.random.default_rng(seed)
    images = rng.uniform(size=(size, side, side, 3)).astype(np.float32)
    return images, rng.integers(0, 10, size)


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
    theirs = sum(param.numel() for param in twin.TwinResNet().parameters())
    assert ours == theirs == 11_172_170


def test_the_variables_have_the_structure_of_the_twin():
    _, model, variables = make_pair(**SMALL)
    ours = jax.eval_shape(
        lambda: model.init(jax.random.key(0), jnp.zeros([1, 16, 16, 3]), train=False)
    )
    assert jax.tree.map(jnp.shape, ours) == jax.tree.map(np.shape, variables)


@pytest.mark.parametrize("network", NETWORKS)
def test_logits_in_eval_mode_equal_those_of_torch(network):
    torch_model, model, variables = make_pair(**NETWORKS[network])
    side = 32 if network == "PreActResNet-18" else 16
    images, _ = make_batch(size=4, side=side)
    ours = make_logits_fn(model, variables)(images)
    theirs = torch_model(to_torch(images)).detach().numpy()
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5)


def test_logits_in_train_mode_equal_those_of_torch():
    torch_model, model, variables = make_pair(**SMALL)
    images, _ = make_batch()
    ours = make_logits_fn(model, variables, train=True)(images)
    theirs = torch_model.train()(to_torch(images)).detach().numpy()
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("side", "train"), [(15, False), (16, True)])
def test_input_gradients_equal_those_of_torch(side, train):
    torch_model, model, variables = make_pair(**SMALL)
    # Few activations, so that none lies where rounding could carry it over a kink.
    images, labels = make_batch(size=4, side=side)

    def loss(images):
        logits: Any = model.apply(variables, images, train=train)
        return jnp.sum(cross_entropy(logits, labels))

    ours = jax.jit(jax.grad(loss))(images)
    leaf = to_torch(images).requires_grad_()
    torch.nn.functional.cross_entropy(
        torch_model.train(train)(leaf), torch.from_numpy(labels), reduction="sum"
    ).backward()
    theirs = to_numpy(leaf.grad)
    assert np.linalg.norm(ours - theirs) <= 1e-5 * np.linalg.norm(theirs)


WIDE_HEAD = {"width": 16, "blocks": (1, 1), "num_classes": 500}
LAYERS = {
    "stem": ("stem", "kernel"),
    "3x3 convolution": ("stage2_block1", "conv1", "kernel"),
    "1x1 shortcut": ("stage2_block1", "shortcut", "kernel"),
    "linear": ("head", "kernel"),
    "linear bias": ("head", "bias"),
}


@pytest.fixture(scope="module")
def initial():
    """Initial variables, ours and those of the twin, of a network with a wide head."""
    init = jax.jit(PreActResNet(**WIDE_HEAD).init, static_argnames="train")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        theirs = twin.to_jax(twin.TwinResNet(**WIDE_HEAD))
    return init(jax.random.key(0), jnp.zeros([1, 8, 8, 3]), train=False), theirs


@pytest.mark.parametrize("layer", LAYERS)
def test_initial_weights_have_the_distribution_of_torch(layer, initial):
    ours, theirs = (variables["params"] for variables in initial)
    for key in LAYERS[layer]:
        ours, theirs = ours[key], theirs[key]
    ours, theirs = np.ravel(ours), np.ravel(theirs)
    assert stats.kstest(ours, theirs)[1] > 1e-3  # the p-value
    assert np.std(ours) == pytest.approx(np.std(theirs), rel=0.1)
    assert np.max(np.abs(ours)) == pytest.approx(np.max(np.abs(theirs)), rel=0.02)


def test_initial_batch_norm_is_that_of_torch(initial):
    ours, theirs = initial
    jax.tree.map(
        np.testing.assert_array_equal, ours["batch_stats"], theirs["batch_stats"]
    )
    for norm in ("norm1", "norm2"):
        jax.tree.map(
            np.testing.assert_array_equal,
            ours["params"]["stage1_block1"][norm],
            theirs["params"]["stage1_block1"][norm],
        )


def test_weights_travel_to_torch_and_back(initial):
    variables, _ = initial
    torch_model, model, _ = make_pair(**WIDE_HEAD)
    twin.from_jax(torch_model, variables)
    jax.tree.map(np.testing.assert_array_equal, twin.to_jax(torch_model), variables)
    images, _ = make_batch(size=4)
    ours = make_logits_fn(model, variables)(images)
    theirs = torch_model(to_torch(images)).detach().numpy()
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5)


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
    """Ours, with the same settings."""
    set_, _, step_size, _ = BALLS[ball]
    return pgd(set_, step_size=step_size, num_steps=num_steps, random_start=False)


def assert_same_pixels(ours, theirs):
    assert np.mean(np.abs(ours - theirs) <= 1e-6) >= 0.999


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("ball", BALLS)
def test_pgd_reaches_the_pixels_of_torch(ball, train):
    torch_model, model, variables = make_pair(off_kinks=True, **SMALL)
    images, labels = make_batch()
    logits_fn = make_logits_fn(model, variables, train=train)
    ours = jax_attack(ball, 4)(logits_fn, images, labels, key=KEY)
    theirs = torch_attack(ball, 4, train=train)(
        torch_model, to_torch(images), torch.from_numpy(labels)
    )
    assert_same_pixels(ours, to_numpy(theirs))
    assert np.max(np.abs(ours - images)) > 1e-2


@pytest.mark.parametrize("ball", ["linf", "l2"])
def test_pgd_reaches_the_pixels_of_torch_from_another_start(ball):
    torch_model, model, variables = make_pair(off_kinks=True, **SMALL)
    images, labels = make_batch()
    set_, radius, step_size, _ = BALLS[ball]
    delta = np.asarray(set_.sample(jax.random.key(1), images.shape))
    attack = pgd(
        set_._replace(sample=lambda *_: jnp.asarray(delta)),
        step_size=step_size,
        num_steps=3,
    )
    ours = attack(make_logits_fn(model, variables), images, labels, key=KEY)
    start = to_torch(np.clip(images + delta, 0, 1))
    theirs = torch_attack(ball, 3, start=start)(
        torch_model, to_torch(images), torch.from_numpy(labels)
    )
    assert_same_pixels(ours, to_numpy(theirs))
    assert np.max(np.abs(delta)) > radius / 10


# --- training -------------------------------------------------------------------------

ROWS = [  # the attacks alone are a part of what the last two do
    "st",
    "sam,rho=0.2",
    "at,norm=linf,eps=8+sam,rho=0.2",
    "at,norm=l2,eps=128+sam,rho=0.2",
]
FLOOR = 128e-10  # the reference's 1e-10 on the mean gradient of a batch of 128


def make_config(row):
    config = base_config()
    config.attack.num_steps = 3
    config.attack.random_start = False
    return finish(config, row)


@functools.cache
def train_ours(row, batch_norm=None, **options):
    """Variables after five steps of the row's method, and the loss of every step."""
    config = make_config(row)
    _, model, variables = make_pair(off_kinks=True, **SMALL)
    parts = methods.build(config, entries.Given(aux=variables["batch_stats"]))
    schedule = building.learning_rate_schedule(config, 1)
    tx = optax.chain(
        parts.get("sharpness", optax.identity()), *make_optimizer(config, schedule)
    )
    adversary = parts.get("adversary", as_adversary(identity))
    if batch_norm is not None:
        adversary = adversary._replace(batch_norm=batch_norm)
    train_step = jax.jit(
        make_train_step(model, tx, adversary=adversary, **options).train_step
    )
    params = jax.tree.map(jnp.asarray, variables["params"])
    batch_stats = jax.tree.map(jnp.asarray, variables["batch_stats"])
    state = TrainState(jnp.zeros([], jnp.int32), params, batch_stats, tx.init(params))
    losses = []
    for seed in range(NUM_STEPS):
        state, metrics = train_step(state, *make_batch(seed), KEY)
        losses.append(float(metrics["loss"]))
    return state.variables, losses


def train_theirs(
    row,
    *,
    batch_stats="both",
    batch_norm="train",
    update_statistics=False,
):
    """The same by the twin, which takes nothing from the config but these numbers."""
    config = make_config(row)
    torch_model, _, _ = make_pair(off_kinks=True, **SMALL)
    rho, epsilon = config.sam.rho, config.attack.epsilon / 255
    optimizer = twin.sgd(torch_model.parameters(), 0.1, 0.9, 5e-4)

    def attack(model, images, labels):
        options = {
            "train": batch_norm == "train",
            "update_statistics": update_statistics,
        }
        if config.attack.norm == "linf":
            return twin.pgd_linf(
                model, images, labels, epsilon, epsilon / 4, 3, **options
            )
        return twin.pgd_l2(
            model, images, labels, epsilon, epsilon / 8, 3, floor=FLOOR, **options
        )

    losses = []
    for seed in range(NUM_STEPS):
        images, labels = make_batch(seed)
        batch = (torch_model, optimizer, to_torch(images), torch.from_numpy(labels))
        passes = {"batch_stats": batch_stats}
        if epsilon and rho:
            loss = twin.train_step_sam_at(*batch, rho, attack, **passes)
        elif epsilon:
            loss = twin.train_step_at(*batch, attack)
        elif rho:
            loss = twin.train_step_sam(*batch, rho, **passes)
        else:
            loss = twin.train_step_st(*batch)
        losses.append(loss)
    return twin.to_jax(torch_model), losses


def largest_difference(first, second):
    gaps = jax.tree.map(lambda a, b: np.max(np.abs(a - b)), first, second)
    return max(jax.tree.leaves(gaps))


def assert_same_training(row, **options):
    ours, our_losses = train_ours(row, **options)
    theirs, their_losses = train_theirs(row, **options)
    assert largest_difference(ours["params"], theirs["params"]) <= 1e-5
    assert largest_difference(ours["batch_stats"], theirs["batch_stats"]) <= 1e-5
    np.testing.assert_allclose(our_losses, their_losses, atol=1e-5)
    # The steps were long enough to tell methods apart.
    _, _, start = make_pair(off_kinks=True, **SMALL)
    assert largest_difference(ours["params"], start["params"]) > 0.1


@pytest.mark.parametrize("row", ROWS)
def test_five_training_steps_equal_those_of_torch(row):
    assert_same_training(row)


@pytest.mark.parametrize("passes", ["first", "second"])
def test_sam_updates_statistics_as_torch_in_the_passes_it_is_told(passes):
    assert_same_training("sam,rho=0.2", batch_stats=passes)


def test_training_against_the_network_in_eval_mode_equals_torch():
    assert_same_training("at,norm=l2,eps=128", batch_norm="eval")


def test_what_the_reference_does_to_statistics_in_the_attack_leaves_the_steps_alone():
    ours, _ = train_ours("at,norm=linf,eps=8")
    theirs, _ = train_theirs("at,norm=linf,eps=8", update_statistics=True)
    assert largest_difference(ours["params"], theirs["params"]) <= 1e-5
    assert largest_difference(ours["batch_stats"], theirs["batch_stats"]) > 1e-3


def test_the_learning_rate_of_every_epoch_equals_that_of_torch():
    config = make_config("st")
    schedule = building.learning_rate_schedule(config, steps_per_epoch=391)
    optimizer = twin.sgd([torch.nn.Parameter(torch.zeros(1))], 0.1, 0.9, 5e-4)
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [75, 90], gamma=0.1)
    for epoch in range(100):
        (expected,) = scheduler.get_last_lr()
        for step in (0, 390):
            assert schedule(391 * epoch + step) == pytest.approx(expected)
        optimizer.step()
        scheduler.step()


@pytest.mark.parametrize(
    ("name", "theirs"), [("adam", "Adam"), ("adamw", "AdamW"), ("sgd", "SGD")]
)
def test_every_optimizer_takes_the_steps_of_torchs(name, theirs):
    options = {"lr": 0.01, "weight_decay": 0.1}
    config = make_config(f"st,training.optimizer={name},training.weight_decay=0.1")
    ours = optax.chain(*make_optimizer(config, optax.constant_schedule(0.01)))
    weights = np.linspace(-1, 1, 7, dtype=np.float32)
    parameter = torch.nn.Parameter(torch.from_numpy(weights.copy()))
    options |= {"momentum": 0.9} if name == "sgd" else {"betas": (0.9, 0.999)}
    optimizer = getattr(torch.optim, theirs)([parameter], **options)
    state = ours.init(params := jnp.asarray(weights))
    for _ in range(NUM_STEPS):
        optimizer.zero_grad()
        torch.sum((parameter - 0.5) ** 4).backward()
        optimizer.step()
        gradient = jax.grad(lambda w: jnp.sum((w - 0.5) ** 4))(params)
        updates, state = ours.update(gradient, state, params)
        params = optax.apply_updates(params, updates)
    np.testing.assert_allclose(np.asarray(params), parameter.detach(), atol=1e-6)
