"""Methods of the composition against their authors' steps, written out in PyTorch.

A toy network without BatchNorm in float64, seven steps: what differs is rounding.
"""

import functools
import math
from typing import Any, NamedTuple

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

from samrobust.sharpness import (
    asam,
    asam_davda,
    awp,
    entropy_sgd,
    esam,
    fisher_sam,
    friendly_sam,
    fsam,
    gsam,
    looksam,
    msam,
    sam,
    sam_on,
    ssam,
)
from samrobust.training import Objective, make_train_step
from samrobust.training.averaging.ema import ema
from samrobust.training.averaging.swa import swa
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
    with jax.enable_x64(True):
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


def make_sgd():
    return optax.chain(
        optax.add_decayed_weights(DECAY), optax.sgd(RATE, momentum=MOMENTUM)
    )


def train_ours(
    sharpness: Any = None, objective: Any = None, averaging: Any = None, tx: Any = None
):
    """The states after each step; `tx` takes the place of sharpness and SGD."""
    tx = tx or optax.chain(sharpness or optax.identity(), make_sgd())
    init, _ = make_train_step(Toy(), tx, averaging=averaging)
    state = init(KEY, jnp.zeros([6, 2, 2, 1]))
    params = jax.tree.map(jnp.asarray, make_weights())
    state = type(state)(
        **{**vars(state), "params": params, "opt_state": tx.init(params)}
    )
    if averaging is not None:
        average = averaging.init(state.variables)
        state = type(state)(**{**vars(state), "average": average})

    @jax.jit
    def take(state: Any, images: Any, others: Any, *labels_and_key: Any) -> Any:
        options = {} if objective is None else {"objective": objective}
        _, step = make_train_step(
            Toy(), tx, adversary=given(others), averaging=averaging, **options
        )
        return step(state, images, *labels_and_key)[0]

    states = []
    for number in range(STEPS):
        state = take(state, *make_batch(number), jax.random.fold_in(KEY, number))
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


RHO = 0.3


def length(tensors: Any) -> Any:
    return torch.stack([t.norm() for t in tensors]).norm()


def along(tensors: Any, rho: float = RHO) -> Any:
    """SAM's ascent: rho times the direction of these."""
    return [rho * t / (length(tensors) + 1e-12) for t in tensors]


def flat(tensors: Any) -> Any:
    return torch.cat([t.flatten() for t in tensors])


def split_like(vector: Any, tensors: Any) -> list[Any]:
    parts = vector.split([t.numel() for t in tensors])
    return [part.reshape(t.shape) for part, t in zip(parts, tensors, strict=True)]


def mask_of_largest(scores: Any, count: int) -> Any:
    mask = torch.zeros_like(scores)
    mask[torch.topk(scores, count)[1]] = 1.0
    return mask


def random_numbers(step: int, draw: Any) -> list[Any]:
    """What a method draws from the optimizer's key of a step, as PyTorch's weights."""
    key = jax.random.fold_in(jax.random.fold_in(KEY, step), 0xFFFFFFFE)
    drawn = draw(key, make_weights())
    return [
        torch.from_numpy(np.array(drawn[name][kind]).T.copy()).double()
        for name in ("hidden", "head")
        for kind in ("kernel", "bias")
    ]


def draw_each(keys: Any, draw: Any) -> Any:
    """Draws for each leaf, whose keys are `keys(key, number of leaves)`."""

    def tree(key: Any, weights: Any) -> Any:
        leaves, structure = jax.tree.flatten(weights)
        drawn = [
            draw(k, w) for k, w in zip(keys(key, len(leaves)), leaves, strict=True)
        ]
        return jax.tree.unflatten(structure, drawn)

    return tree


def folded(key: Any, count: int) -> Any:
    return [jax.random.fold_in(key, i) for i in range(count)]


uniform = draw_each(folded, lambda k, w: jax.random.uniform(k, w.shape, jnp.float32))
normal = draw_each(
    jax.random.split, lambda k, w: jax.random.normal(k, w.shape, jnp.float64)
)


class Step(NamedTuple):
    """What a method's twin may look at."""

    number: int
    model: Any
    weights: list[Any]
    grads: list[Any]
    images: Any
    labels: Any
    memory: dict[str, Any]


def train_twin(ascend: Any, combine: Any = None, choose: Any = None) -> Any:
    """Two passes a step, SGD at the restored weights."""
    model, memory = Twin(), {}
    weights = [p for _, p in model.named]
    for number, (_, images, labels) in enumerate(batches()):
        losses = torch.nn.functional.cross_entropy(
            model(images), labels, reduction="none"
        )
        model.backward(losses.mean())
        grads = [p.grad.clone() for p in weights]
        step = Step(number, model, weights, grads, images, labels, memory)
        with torch.no_grad():
            moves = ascend(step)
            for p, e in zip(weights, moves, strict=True):
                p.add_(e)
            chosen = slice(None)
            if choose is not None:
                after = torch.nn.functional.cross_entropy(
                    model(images), labels, reduction="none"
                )
                chosen = choose(after - losses)
        model.backward(cross_entropy(model(images[chosen]), labels[chosen]))
        with torch.no_grad():
            for p, e in zip(weights, moves, strict=True):
                p.sub_(e)
            if combine is not None:
                found = combine(step, [p.grad.clone() for p in weights])
                for p, g in zip(weights, found, strict=True):
                    p.grad.copy_(g)
        model.optimizer.step()
    return model


def decompose(step: Step, second: Any) -> Any:
    """juntang-zhuang's `gradient_decompose`."""
    first, (one, other) = step.grads, (length(step.grads), length(second))
    cosine = (flat(first) @ flat(second)) / (one * other + 1e-12)
    return [
        p - 0.4 * (g - cosine * one * p / (other + 1e-12))
        for g, p in zip(first, second, strict=True)
    ]


def ascend_from_common(step: Step) -> Any:
    """nblt's `FriendlySAM.first_step`."""
    sigma, lmbda, memory, grads = 0.9, 0.6, step.memory, step.grads
    if "m" not in memory:
        memory["m"] = [g.clone() for g in grads]
        return along(grads)
    pairs = list(zip(grads, memory["m"], strict=True))
    memory["m"] = [m * lmbda + g * (1 - lmbda) for g, m in pairs]
    return along([g - sigma * m for g, m in pairs])


def ascend_along_weights(step: Step) -> Any:
    """davda54's `sam.py` with `adaptive=True`."""
    pairs = list(zip(step.weights, step.grads, strict=True))
    scale = RHO / (length([p.abs() * g for p, g in pairs]) + 1e-12)
    return [p.pow(2) * g * scale for p, g in pairs]


def ascend_at_the_head(step: Step) -> Any:
    """mueller-mp's `SAM_ON`, with the head for the normalization layers."""
    hidden, head = step.grads[:2], step.grads[2:]
    return [torch.zeros_like(g) for g in hidden] + along(head)


def ascend_by_fisher_information(step: Step) -> Any:
    """Kim et al., equation (9), with the diagonal 1 / (1 + eta g^2)."""
    raised = [g / (1 + 20.0 * g**2) for g in step.grads]
    return [RHO * r / (flat(step.grads) @ flat(raised)).sqrt() for r in raised]


def ascend_where_gradients_are_large(step: Step) -> Any:
    """WHU-ZQH's `SAM_Mask`: biases are outside of the mask."""
    kernels = step.grads[::2]
    if step.number % 3 == 0:
        scores = flat(kernels) ** 2
        mask = mask_of_largest(scores, int(0.4 * len(scores)))
        step.memory["mask"] = split_like(mask, kernels)
    moves = along(step.grads)
    moves[::2] = [m * e for m, e in zip(step.memory["mask"], moves[::2], strict=True)]
    return moves


def ascend_by_examples(step: Step) -> Any:
    """Mi-Peng's `SSAMF`, its samples the first of the next batch."""
    memory = step.memory
    if step.number % 3 == 1:
        total = torch.zeros_like(flat(step.grads))
        for i in range(4):
            with torch.enable_grad():
                logits = step.model(step.images[i : i + 1])
                loss = cross_entropy(logits, step.labels[i : i + 1])
                total += flat(torch.autograd.grad(loss, step.weights)) ** 2
        memory["mask"] = mask_of_largest(total, int(len(total) * (1 - 0.3)))
    mask = memory.get("mask", torch.zeros_like(flat(step.grads)))
    return split_like(mask * flat(along(step.grads)), step.grads)


def ascend_by_a_moving_mask(step: Step) -> Any:
    """Mi-Peng's `SSAMD`: the ascent takes the mask as it was before it moves."""
    memory, total, sparsity = step.memory, flat(step.grads).numel(), 0.3
    if step.number == 0:
        scores = flat(random_numbers(0, uniform))
        count = total - math.ceil(total * sparsity)
        memory["mask"] = mask_of_largest(scores, count)
    moves = split_like(memory["mask"] * flat(along(step.grads)), step.grads)
    if step.number % 4 == 0:  # every second epoch of two steps
        rate = 0.5 * (1 + math.cos(math.pi * step.number / STEPS)) / 2
        kept = total - total * sparsity
        death = (flat(step.grads).abs() + 1e-7) * memory["mask"]
        chance = flat(
            random_numbers(
                step.number,
                lambda key, weights: uniform(jax.random.fold_in(key, 1), weights),
            )
        )
        growth = (chance + 1e-7) * (1 - memory["mask"])
        grown = int(min(kept * rate, total * sparsity))
        memory["mask"] = mask_of_largest(death, int(kept * (1 - rate)))
        memory["mask"] += mask_of_largest(growth, grown)
    return moves


def ascend_with_some_tensors(step: Step) -> Any:
    """dydjw9's `Esam.py`: tensors whose gradients are kept with probability beta."""
    beta = 0.6
    kept = random_numbers(
        step.number,
        lambda key, weights: jax.tree.unflatten(
            jax.tree.structure(weights),
            list(jax.random.uniform(key, (4,), jnp.float32) < beta),
        ),
    )
    grads = [k * g for k, g in zip(kept, step.grads, strict=True)]
    return [e / beta for e in along(grads)]


def choose_by_rise(rises: Any) -> Any:
    """Those at the cutoff are in, as in the paper; the code's are above it."""
    cutoff = torch.topk(rises, int(0.5 * len(rises)))[0][-1]
    return rises >= cutoff


def ascend_every_third(step: Step) -> Any:
    if step.number % 3 == 0:
        return along(step.grads)
    return [torch.zeros_like(g) for g in step.grads]


def reuse(step: Step, second: Any) -> Any:
    """Liu et al., Algorithm 1, with one projection over all parameters."""
    g, memory = flat(step.grads), step.memory
    if step.number % 3 == 0:
        g_s = flat(second)
        memory["v"] = g_s - (g_s @ g) / g.norm() * g / g.norm()
        return second
    v = memory["v"]
    return split_like(g + 0.7 * g.norm() / v.norm() * v, step.grads)


TWINS: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "asam_davda": (asam_davda(RHO), (ascend_along_weights,)),
    "gsam": (gsam(RHO, 0.4), (lambda step: along(step.grads), decompose)),
    "friendly_sam": (friendly_sam(RHO, 0.9, 0.6), (ascend_from_common,)),
    "sam_on": (
        sam_on(
            RHO,
            select=lambda w: {
                k: jax.tree.map(lambda _, k=k: k == "head", w[k]) for k in w
            },
        ),
        (ascend_at_the_head,),
    ),
    "fisher_sam": (fisher_sam(RHO, 20.0), (ascend_by_fisher_information,)),
    "fsam": (fsam(RHO, 0.4, 3), (ascend_where_gradients_are_large,)),
    "ssam, fisher": (
        ssam(
            *("fisher", RHO, 0.3),
            num_samples=4,
            steps_per_epoch=3,
            total_steps=STEPS,
        ),
        (ascend_by_examples,),
    ),
    "ssam, dynamic": (
        ssam("dynamic", RHO, 0.3, every=2, steps_per_epoch=2, total_steps=STEPS),
        (ascend_by_a_moving_mask,),
    ),
    "esam": (esam(RHO, 0.6, 0.5), (ascend_with_some_tensors, None, choose_by_rise)),
    "looksam": (looksam(RHO, 3, 0.7), (ascend_every_third, reuse)),
}


@pytest.mark.parametrize("name", TWINS)
def test_two_passes_are_the_authors(name):
    """What each twin is written after stands with its ascent."""
    ours, twin = TWINS[name]
    assert_close(train_ours(ours)[-1].params, train_twin(*twin).params(), 1e-11)


def test_msam_is_the_authors_step():
    """MarlonBecker's `msam.py`, weights moved back at the end."""
    model = Twin()
    weights = [p for _, p in model.named]
    buffers, inverse = [torch.zeros_like(p) for p in weights], 0.0
    for _, images, labels in batches():
        model.backward(cross_entropy(model(images), labels))
        with torch.no_grad():
            for p, v in zip(weights, buffers, strict=True):
                decayed = p.grad + DECAY * p
                p.add_(v, alpha=RHO * inverse)
                v.mul_(MOMENTUM).add_(decayed)
                p.add_(v, alpha=-RATE)
            inverse = float(1 / (length(buffers) + 1e-12))
            for p, v in zip(weights, buffers, strict=True):
                p.sub_(v, alpha=RHO * inverse)
    with torch.no_grad():
        for p, v in zip(weights, buffers, strict=True):
            p.add_(v, alpha=RHO * inverse)
    assert_close(train_ours(tx=msam(RHO, make_sgd()))[-1].params, model.params())


def test_entropy_sgd_is_the_authors_step():
    """ucla-vision's `entropyoptim.lua`, without its evaluation of f(x) and df/dx."""
    gamma, rounds, rate, noise, scoping, model = 0.3, 3, 0.2, 0.05, 0.1, Twin()
    weights = [p for _, p in model.named]
    given = list(batches())
    with torch.no_grad():
        for begin in range(0, STEPS - rounds + 1, rounds):
            start = [p.clone() for p in weights]
            mean, buffers = ([t.clone() for t in start] for _ in range(2))
            strength = gamma * (1 + scoping) ** (begin // rounds + 1)
            for number in range(begin, begin + rounds):
                _, images, labels = given[number]
                with torch.enable_grad():
                    model.backward(cross_entropy(model(images), labels))
                drawn = random_numbers(number, normal)
                for i, p in enumerate(weights):
                    kept = MOMENTUM * buffers[i] if number > begin else 0.0
                    buffers[i] = kept + p.grad
                    slope = p.grad + MOMENTUM * buffers[i] - strength * (start[i] - p)
                    slope += DECAY * p + noise / math.sqrt(0.5 * rate) * drawn[i]
                    p.sub_(rate * slope)
                    mean[i] = 0.75 * mean[i] + 0.25 * p
            for p, w, mu in zip(weights, start, mean, strict=True):
                p.copy_(w - 0.8 * (w - mu))
    tx = entropy_sgd(
        gamma,
        rounds,
        rate,
        noise,
        scoping,
        learning_rate=0.8,
        momentum=MOMENTUM,
        weight_decay=DECAY,
    )
    states = train_ours(tx=tx)
    assert_close(states[-1].params, model.params())
    helpers.assert_same_bits(states[0].params, states[1].params)


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


def test_swa_is_that_of_torch():
    """`AveragedModel` at the ends of the second epoch of two steps and the third."""
    model = Twin()
    tree = torch.nn.ModuleDict({"hidden": model.hidden, "head": model.head})
    averaged = torch.optim.swa_utils.AveragedModel(tree)
    for number, (_, images, labels) in enumerate(batches()):
        model.backward(cross_entropy(model(images), labels))
        model.optimizer.step()
        if number in (3, 5):
            averaged.update_parameters(tree)
    states = train_ours(averaging=swa(0.3, steps_per_epoch=2, total_steps=STEPS))
    helpers.assert_same_bits(states[3].average["params"], states[3].params)
    model.hidden, model.head = averaged.module["hidden"], averaged.module["head"]
    assert_close(states[-1].average["params"], model.params())


SAM = {"sharpness": sam(RHO)}
trained = functools.cache(train_ours)


@pytest.mark.parametrize(
    ("off", "plain"),
    [
        ({"sharpness": asam(0.0)}, {}),
        ({"sharpness": awp(0.0)}, {}),
        ({"sharpness": sam(0.0)}, {}),
        ({"sharpness": looksam(0.0)}, {}),
        ({"tx": msam(0.0, make_sgd())}, {}),
        ({"sharpness": gsam(RHO, 0.0)}, SAM),
        ({"sharpness": friendly_sam(RHO, 0.0)}, SAM),
        ({"sharpness": looksam(RHO, 1)}, SAM),
        ({"sharpness": esam(RHO, 1.0, 1.0)}, SAM),
        (
            {
                "sharpness": sam_on(
                    RHO, select=lambda w: jax.tree.map(lambda _: True, w)
                )
            },
            SAM,
        ),
        ({"sharpness": fisher_sam(RHO, 0.0)}, SAM),
        ({"sharpness": fsam(RHO, 1.0)}, SAM),
        (
            {
                "sharpness": ssam(
                    *("dynamic", RHO, 0.0),
                    drop_rate=0.0,
                    steps_per_epoch=1,
                    total_steps=STEPS,
                )
            },
            SAM,
        ),
        ({"averaging": ema(0.0)}, {}),
        (
            {"objective": trades_loss(0.0)},
            {"objective": Objective(trades_loss(0.0).loss, ("natural",))},
        ),
    ],
)
def test_a_setting_that_does_nothing_is_the_method_without_it_bit_for_bit(off, plain):
    last = train_ours(**off)[-1]
    helpers.assert_same_bits(last.params, trained(**plain)[-1].params)
    if last.average:
        helpers.assert_same_bits(last.average["params"], last.params)
