"""Methods of the composition against their authors' steps, written out in PyTorch.

A toy network without running statistics in float64, seven steps: what differs is
rounding.
"""

import dataclasses
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
    last_metrics,
    looksam,
    msam,
    sam,
    sam_on,
    ssam,
)
from samrobust.training import Objective, make_train_step
from samrobust.training.adversaries.at import at
from samrobust.training.averaging.ema import ema
from samrobust.training.averaging.swa import swa
from samrobust.training.objectives.trades import trades_loss
from samrobust.training.parts import Adversary

torch = pytest.importorskip("torch")

RATE, MOMENTUM, DECAY, STEPS = 0.1, 0.9, 5e-3, 7
KEY = jax.random.key(0)


class Embedded(nn.Module):
    """An embedding of the places, added."""

    @nn.compact
    def __call__(self, x):
        return x + self.param("embedding", nn.initializers.ones, (1, 4), jnp.float64)


class Scaled(nn.Module):
    """What a normalization learns; statistics would tell no more."""

    @nn.compact
    def __call__(self, x):
        scale, bias = (
            self.param(name, nn.initializers.ones, x.shape[1:], jnp.float64)
            for name in ("scale", "bias")
        )
        return scale * x + bias


class Toy(nn.Module):
    """Two dense layers, and parameters that some methods know by their names."""

    @nn.compact
    def __call__(self, images, *, train):
        del train
        dense = functools.partial(nn.Dense, dtype=jnp.float64, param_dtype=jnp.float64)
        pixels = Embedded(name="embed")(images.reshape(len(images), -1))
        hidden = Scaled(name="norm")(dense(5, name="hidden", use_bias=False)(pixels))
        return dense(3, name="head")(jnp.tanh(hidden))


# The parameters in PyTorch's order and by its names, and where Flax has them.
NAMES = {
    "embed.weight": ("embed", "embedding"),
    "hidden.weight": ("hidden", "kernel"),
    "norm.weight": ("norm", "scale"),
    "norm.bias": ("norm", "bias"),
    "head.weight": ("head", "kernel"),
    "head.bias": ("head", "bias"),
}


def turned(kind: str, values: Any) -> Any:
    """A parameter as the other library has it."""
    return values.T if kind == "kernel" else values


@pytest.fixture(autouse=True, scope="module")
def _in_float64():
    with jax.enable_x64(True):
        yield


def make_weights() -> dict[str, dict[str, np.ndarray]]:
    rng = np.random.default_rng(0)
    return {
        "embed": {"embedding": 0.1 * rng.standard_normal((1, 4))},
        "hidden": {"kernel": rng.standard_normal((4, 5))},
        "norm": {
            "scale": rng.uniform(0.5, 1.5, 5),
            "bias": 0.1 * rng.standard_normal(5),
        },
        "head": {
            "kernel": rng.standard_normal((5, 3)),
            "bias": 0.1 * rng.standard_normal(3),
        },
    }


def make_batch(step: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Images, other images in their place, and labels."""
    rng = np.random.default_rng(100 + step)
    images = rng.uniform(0.2, 0.8, (6, 2, 2, 1))
    noise = rng.uniform(-0.1, 0.1, images.shape)
    return images, images + noise, rng.integers(0, 3, 6).astype(np.int32)


EPSILON = 32.0  # in 255ths
FGSM = at("linf", EPSILON, EPSILON, num_steps=1, random_start=False)


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
    sharpness: Any = None,
    objective: Any = None,
    averaging: Any = None,
    tx: Any = None,
    adversary: Any = None,
):
    """The states after each step; `tx` takes the place of sharpness and SGD.

    Without an adversary the other images of a batch are those.
    """
    tx = tx or optax.chain(sharpness or optax.identity(), make_sgd())
    init, _ = make_train_step(Toy(), tx, averaging=averaging)
    state = jax.eval_shape(init, KEY, jnp.zeros([6, 2, 2, 1]))
    params = jax.tree.map(jnp.asarray, make_weights())
    state = dataclasses.replace(
        state, step=jnp.zeros([], jnp.int32), params=params, opt_state=tx.init(params)
    )
    if averaging is not None:
        state = dataclasses.replace(state, average=averaging.init(state.variables))

    @jax.jit
    def take(state: Any, images: Any, others: Any, *labels_and_key: Any) -> Any:
        options = {} if objective is None else {"objective": objective}
        _, step = make_train_step(
            Toy(),
            tx,
            adversary=adversary or given(others),
            averaging=averaging,
            **options,
        )
        return step(state, images, *labels_and_key)[0]

    states = []
    for number in range(STEPS):
        state = take(state, *make_batch(number), jax.random.fold_in(KEY, number))
        states.append(state)
    return states


class Twin(torch.nn.Module):
    """The toy network in PyTorch, with SGD as the reference code has it."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(1, 4)
        self.hidden = torch.nn.Linear(4, 5, bias=False)
        self.head = torch.nn.Linear(5, 3)
        self.norm = torch.nn.LayerNorm(5)
        found, weights = dict(self.double().named_parameters()), make_weights()
        self.named = [(name, found[name]) for name in NAMES]
        with torch.no_grad():
            for name, p in self.named:
                layer, kind = NAMES[name]
                p.copy_(torch.from_numpy(turned(kind, weights[layer][kind])))
        self.optimizer = torch.optim.SGD(
            [p for _, p in self.named], RATE, MOMENTUM, weight_decay=DECAY
        )

    def forward(self, images):
        hidden = self.hidden(images.reshape(len(images), -1) + self.embed.weight)
        return self.head(torch.tanh(self.norm.weight * hidden + self.norm.bias))

    def attacked(self, images, labels):
        """Images by FGSM, at the weights of this moment."""
        with torch.enable_grad():
            x = images.clone().requires_grad_(True)
            (slope,) = torch.autograd.grad(cross_entropy(self(x), labels), x)
        return images + EPSILON / 255 * slope.sign()

    def backward(self, loss):
        self.optimizer.zero_grad()
        loss.backward()

    def params(self):
        tree: dict[str, dict[str, np.ndarray]] = {}
        for name, p in self.named_parameters():
            layer, kind = NAMES[name]
            tree.setdefault(layer, {})[kind] = turned(kind, p.detach().numpy()).copy()
        return tree


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


def test_awp_is_the_authors_step():
    """csdongxian's `utils_awp.py` and training loop: decay acts at w + v."""
    gamma, model = 0.3, Twin()
    for natural, _, labels in batches():
        images = model.attacked(natural, labels)
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
    ours = train_ours(awp(gamma, weight_decay=DECAY), adversary=FGSM)
    assert_close(ours[-1].params, model.params())


RHO = 0.3
ETA, FISHER = 0.01, 20.0  # eta of ASAM and of Fisher SAM


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
        torch.from_numpy(turned(kind, np.array(drawn[layer][kind])).copy()).double()
        for layer, kind in NAMES.values()
    ]


def draw_each(keys: Any, draw: Any) -> Any:
    """Draws for each leaf, whose keys are `keys(key, number of leaves)`."""

    def tree(key: Any, weights: Any) -> Any:
        leaves, structure = jax.tree.flatten(weights)
        drawn = [
            draw(k, w) for k, w in zip(keys(key, len(leaves)), leaves, strict=True)
        ]
        return jax.tree.unflatten(structure, drawn)

    return jax.jit(tree)


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


def measured(grads: Any, second: Any, moves: Any) -> dict[str, Any]:
    """The metrics of all methods with two passes."""
    g, e = flat(grads), flat(moves)
    return {
        "rho": RHO,
        "applied_rho": e.norm(),
        "gradient_norm": g.norm(),
        "perturbed_gradient_norm": length(second),
        "cosine": torch.cosine_similarity(g, flat(second), dim=0),
        "live": (e != 0).double().mean(),
        "inverse_fisher": (1 / (1 + FISHER * g**2)).mean(),
    }


def train_twin(ascend: Any, combine: Any = None, choose: Any = None) -> Any:
    """Two passes a step over the images that the attack made at w, SGD; and metrics."""
    model, memory, rises, shown = Twin(), {}, {}, {}
    weights = [p for _, p in model.named]
    for number, (natural, _, labels) in enumerate(batches()):
        images = model.attacked(natural, labels)
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
                rise = after - losses
                chosen = choose(rise)
                rises = {"rise": rise.mean(), "chosen_rise": rise[chosen].mean()}
                rises["chosen"] = chosen.sum()
        model.backward(cross_entropy(model(images[chosen]), labels[chosen]))
        second = [p.grad.clone() for p in weights]
        shown = measured(grads, second, moves) | rises
        with torch.no_grad():
            for p, e in zip(weights, moves, strict=True):
                p.sub_(e)
            if combine is not None:
                found = combine(step, second)
                for p, g in zip(weights, found, strict=True):
                    p.grad.copy_(g)
        model.optimizer.step()
    return model, shown


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


def ascend_by_sizes(step: Step) -> Any:
    """SamsungLabs' `asam.py`: T = |w| + eta for weights, 1 for biases."""
    scales = [
        w.abs() + ETA if "weight" in name else torch.ones_like(w)
        for name, w in zip(NAMES, step.weights, strict=True)
    ]
    pairs = list(zip(scales, step.grads, strict=True))
    scale = RHO / (length([t * g for t, g in pairs]) + 1e-16)
    return [scale * t**2 * g for t, g in pairs]


def ascend_along_weights(step: Step) -> Any:
    """davda54's `sam.py` with `adaptive=True`."""
    pairs = list(zip(step.weights, step.grads, strict=True))
    scale = RHO / (length([p.abs() * g for p, g in pairs]) + 1e-12)
    return [p.pow(2) * g * scale for p, g in pairs]


def ascend_at_the_normalization(step: Step) -> Any:
    """mueller-mp's `SAM_ON` with `only_norm`."""
    pairs = zip(NAMES, step.grads, strict=True)
    return along([g if "norm" in name else torch.zeros_like(g) for name, g in pairs])


def ascend_by_fisher_information(step: Step) -> Any:
    """Kim et al., equation (9), with the diagonal 1 / (1 + eta g^2)."""
    raised = [g / (1 + FISHER * g**2) for g in step.grads]
    return [RHO * r / (flat(step.grads) @ flat(raised)).sqrt() for r in raised]


def ascend_where_gradients_are_large(step: Step) -> Any:
    """WHU-ZQH's `SAM_Mask`: only these are under the mask."""
    named = dict(zip(NAMES, step.grads, strict=True))
    kernels = [named[name] for name in ("hidden.weight", "head.weight")]
    if step.number % 3 == 0:
        scores = flat(kernels) ** 2
        mask = mask_of_largest(scores, int(0.4 * len(scores)))
        step.memory["mask"] = split_like(mask, kernels)
    moves = dict(zip(NAMES, along(step.grads), strict=True))
    moves["hidden.weight"] *= step.memory["mask"][0]
    moves["head.weight"] *= step.memory["mask"][1]
    return list(moves.values())


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
            list(jax.random.uniform(key, (len(NAMES),), jnp.float32) < beta),
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
    "asam": (asam(RHO, ETA), (ascend_by_sizes,)),
    "asam_davda": (asam_davda(RHO), (ascend_along_weights,)),
    "gsam": (gsam(RHO, 0.4), (lambda step: along(step.grads), decompose)),
    "friendly_sam": (friendly_sam(RHO, 0.9, 0.6), (ascend_from_common,)),
    "sam_on": (sam_on(RHO), (ascend_at_the_normalization,)),
    "fisher_sam": (fisher_sam(RHO, FISHER), (ascend_by_fisher_information,)),
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
def test_two_passes_and_their_metrics_are_the_authors(name):
    """What each twin is written after stands with its ascent."""
    ours, twin = TWINS[name]
    last, (model, expected) = train_ours(ours, adversary=FGSM)[-1], train_twin(*twin)
    assert_close(last.params, model.params(), 1e-11)
    for metric, value in last_metrics(last.opt_state).items():
        assert float(value) == pytest.approx(float(expected[metric]), rel=1e-6), metric


def test_msam_is_the_authors_step():
    """MarlonBecker's `msam.py`, weights moved back at the end, after the attacks."""
    model = Twin()
    weights = [p for _, p in model.named]
    buffers, inverse = [torch.zeros_like(p) for p in weights], 0.0
    for natural, _, labels in batches():
        images = model.attacked(natural, labels)
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
    last = train_ours(tx=msam(RHO, make_sgd()), adversary=FGSM)[-1]
    assert_close(last.params, model.params())
    assert last_metrics(last.opt_state) == pytest.approx(
        {"rho": RHO, "applied_rho": RHO}
    )


def test_entropy_sgd_is_the_authors_step():
    """ucla-vision's `entropyoptim.lua`, without its evaluation of f(x) and df/dx."""
    gamma, rounds, rate, noise, scoping, model = 0.3, 3, 0.2, 0.05, 0.1, Twin()

    def schedule(step: Any) -> Any:
        return 1.0 - 0.1 * step

    weights = [p for _, p in model.named]
    given_batches, shown = list(batches()), []
    with torch.no_grad():
        for begin in range(0, STEPS - rounds + 1, rounds):
            start = [p.clone() for p in weights]
            mean, buffers = ([t.clone() for t in start] for _ in range(2))
            strength = gamma * (1 + scoping) ** (begin // rounds + 1)
            for number in range(begin, begin + rounds):
                natural, _, labels = given_batches[number]
                images = model.attacked(natural, labels)
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
                away = [length(map(torch.sub, t, start)) for t in (weights, mean)]
                shown.append([float(one) for one in away])
            for p, w, mu in zip(weights, start, mean, strict=True):
                p.copy_(w - schedule(begin + rounds - 1) * (w - mu))
    tx = entropy_sgd(
        gamma,
        rounds,
        rate,
        noise,
        scoping,
        learning_rate=schedule,
        momentum=MOMENTUM,
        weight_decay=DECAY,
    )
    states = train_ours(tx=tx, adversary=FGSM)
    assert_close(states[-1].params, model.params())
    for state, expected in zip(states, shown, strict=False):
        metrics = last_metrics(state.opt_state)
        found = [metrics["distance"], metrics["entropy_gradient_norm"]]
        np.testing.assert_allclose(found, expected, rtol=1e-6)
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
    averaged = torch.optim.swa_utils.AveragedModel(
        model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(decay)
    )
    for _, images, labels in batches():
        model.backward(cross_entropy(model(images), labels))
        model.optimizer.step()
        averaged.update_parameters(model)
    average = train_ours(averaging=ema(decay))[-1].average["params"]
    assert_close(average, averaged.module.params())


def test_swa_is_that_of_torch():
    """`AveragedModel` at the ends of the second epoch of two steps and the third."""
    model = Twin()
    averaged = torch.optim.swa_utils.AveragedModel(model)
    for number, (_, images, labels) in enumerate(batches()):
        model.backward(cross_entropy(model(images), labels))
        model.optimizer.step()
        if number in (3, 5):
            averaged.update_parameters(model)
    states = train_ours(averaging=swa(0.3, steps_per_epoch=2, total_steps=STEPS))
    helpers.assert_same_bits(states[3].average["params"], states[3].params)
    assert_close(states[-1].average["params"], averaged.module.params())


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
