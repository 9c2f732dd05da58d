"""m-sharpness: an ascent direction for every m examples, on one device or many.

The oracle is a plain loop over the groups on one device. Devices are virtual ones on
the CPU, in processes of their own, which run this file as a script. There the step of
google-research/sam is written out too, by `jax.shard_map` over the devices: each with
its own part of the batch, BatchNorm, ascent direction and running statistics.
"""

import functools
import pathlib
import re
import sys
from typing import Any, NamedTuple

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from jax.sharding import PartitionSpec

from samrobust.attacks import identity, linf, pgd
from samrobust.attacks.losses import cross_entropy
from samrobust.models import BatchNorm, PreActResNet
from samrobust.sharpness import msam, sam
from samrobust.system.distributed import data_mesh, replicated, shard_batch
from samrobust.training import TrainState, make_train_step
from samrobust.types import Attack

RHO, BATCH_SIZE, NUM_STEPS = 0.3, 24, 3
# Sums over a batch are taken in another order; BatchNorm over few examples, a ReLU's
# kink and PGD's signs make the differences grow.
TOLERANCE = 2e-5


class Dense(nn.Module):
    """Two layers and a batch normalization: compiles faster than a convolution."""

    @nn.compact
    def __call__(self, images, *, train):
        hidden = nn.Dense(16)(images.reshape(len(images), -1) - 0.5)
        hidden = nn.relu(BatchNorm()(hidden, train=train))
        return nn.Dense(10)(hidden)


class Case(NamedTuple):
    """A training: m, and what else may go wrong with it."""

    m: int
    batch_stats: str = "both"
    model: nn.Module = Dense()
    attack: Attack = identity
    scan: bool = False


def convolutional(batch_norm_group: int) -> PreActResNet:
    return PreActResNet(width=2, blocks=(1,), batch_norm_group=batch_norm_group)


CASES = {
    "m=1": Case(1, model=convolutional(1)),
    "m=4": Case(4),
    "m=3": Case(3, "first"),
    "m=6": Case(6, "first"),
    "m=8": Case(8, "second"),
    "m=12": Case(12, "first", scan=True),
    "batch": Case(24),
    "AT, BatchNorm over 3": Case(
        12, model=convolutional(3), attack=pgd(linf(0.1), step_size=0.05, num_steps=2)
    ),
}
# By the number of devices. m is below the batch of a device, equal to it (that of
# google-research/sam too) and above; where m = 8 on any number of devices, and m = 4 on
# four, groups and devices divide the batch in ways that do not nest.
CASES_ON = {
    1: list(CASES),
    2: ["m=8", "m=12"],
    4: ["m=3", "m=4", "m=6", "m=8", "AT, BatchNorm over 3"],
    8: ["m=3", "m=8"],
}
GOOGLE = {2: "m=12", 4: "m=6", 8: "m=3"}


@functools.cache
def variables(model: nn.Module) -> Any:
    whole = model if isinstance(model, Dense) else model.clone(batch_norm_group=0)
    return helpers.init_variables(whole)


def make_batches() -> tuple[jax.Array, jax.Array]:
    """Images [steps, B, 8, 8, 1] and labels [steps, B]."""
    split = helpers.make_split(NUM_STEPS * BATCH_SIZE)
    images = (split.images / np.float32(255)).astype(np.float32)
    return (
        jnp.asarray(images.reshape(NUM_STEPS, BATCH_SIZE, *images.shape[1:])),
        jnp.asarray(split.labels.reshape(NUM_STEPS, BATCH_SIZE)),
    )


def descent() -> Any:
    return optax.chain(optax.add_decayed_weights(0.05), optax.sgd(0.1, momentum=0.9))


def step_key(step) -> jax.Array:
    return jax.random.fold_in(jax.random.key(0), step)


def flat(tree: Any) -> dict[str, np.ndarray]:
    """The leaves by their paths."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}


# The package


def make_step(case: Case, mesh: Any, *, rho: float = RHO, group_size: int) -> Any:
    """A step of the package's, its first state, and where it was traced."""
    start = variables(case.model)
    tx: Any = optax.chain(
        sam(rho, aux=start["batch_stats"], grouped=group_size > 0), descent()
    )
    _, train_step = make_train_step(
        case.model,
        tx,
        adversary=case.attack,
        batch_stats=case.batch_stats,
        group_size=group_size,
        mesh=mesh,
    )
    traces = []

    def step(state, images, labels):
        traces.append(images.shape)
        batch = shard_batch((images, labels), mesh)
        return train_step(state, batch[0], batch[1], step_key(state.step))

    params, batch_stats = start["params"], start["batch_stats"]
    state = TrainState(jnp.int32(0), params, batch_stats, tx.init(params))
    return step, jax.device_put(state, replicated(mesh)), traces


@functools.cache
def trained(case: Case, count: int = 1, **options: Any) -> dict[str, np.ndarray]:
    """Parameters, running statistics and metrics after three steps on some devices."""
    mesh = helpers.mesh_of(count)
    options = {"group_size": case.m} | options
    step, state, traces = make_step(case, mesh, **options)

    def loop(state, *batches):
        return jax.lax.scan(lambda state, batch: step(state, *batch), state, batches)

    run: Any = jax.jit(loop if case.scan else step, out_shardings=replicated(mesh))
    metrics: Any = None
    if case.scan:
        state, metrics = run(state, *make_batches())
        metrics = jax.tree.map(lambda leaf: leaf[-1], metrics)
    else:
        for batch in zip(*make_batches(), strict=True):
            state, metrics = run(state, *jax.device_put(batch, replicated(mesh)))
    assert len(traces) == 1
    assert run._cache_size() == 1  # not compiled again either
    return flat((state.variables, metrics))


def convolution_shapes(case: Case, count: int) -> set[str]:
    """The shapes of the convolutions that a device computes images with."""
    mesh = helpers.mesh_of(count)
    step, state, _ = make_step(case, mesh, group_size=case.m)
    batch = jax.tree.map(lambda leaf: leaf[0], make_batches())
    jitted = jax.jit(step, out_shardings=replicated(mesh))
    text = str(jitted.lower(state, *batch).compile().as_text())
    assert "feature_group_count" not in text
    assert "batch_group_count" not in text
    return set(re.findall(r"= f32\[(\d+,8,8,2)\]\S* convolution\(", text))


# By hand


def mean_of(trees: list[Any]) -> Any:
    return jax.tree.map(lambda *leaves: np.mean(leaves, axis=0), *trees)


def norm(tree: Any) -> float:
    leaves = [np.asarray(leaf, np.float64).ravel() for leaf in jax.tree.leaves(tree)]
    return float(np.linalg.norm(np.concatenate(leaves)))


def cosine(one: Any, other: Any) -> float:
    products = jax.tree.map(lambda a, b: np.vdot(np.float64(a), b), one, other)
    return sum(jax.tree.leaves(products)) / norm(one) / norm(other)


@functools.cache
def gradient_of(model: Any) -> Any:
    """(loss, (running statistics, logits)) and gradient of a group, jitted."""

    def mean_loss(params, batch_stats, images, labels):
        logits, updated = model.apply(
            {"params": params, "batch_stats": batch_stats},
            images,
            train=True,
            mutable=["batch_stats"],
        )
        loss = jnp.mean(cross_entropy(logits, labels))
        return loss, (updated["batch_stats"], logits)

    return jax.jit(jax.value_and_grad(mean_loss, has_aux=True))


def crafted(case: Case, params: Any, batch_stats: Any, images, labels, step: int):
    def logits_fn(images) -> Any:
        state = {"params": params, "batch_stats": batch_stats}
        return case.model.apply(state, images, train=True)

    attack = jax.jit(functools.partial(case.attack, logits_fn))
    return attack(images, labels, key=step_key(step))


def by_hand(case: Case, rho: float = RHO) -> dict[str, np.ndarray]:
    """The same training, a loop over the groups on one device."""
    params, stats = (variables(case.model)[k] for k in ("params", "batch_stats"))
    gradient = gradient_of(case.model)
    velocity = jax.tree.map(np.zeros_like, params)
    metrics = {}
    for step, (images, labels) in enumerate(zip(*make_batches(), strict=True)):
        images = crafted(case, params, stats, images, labels, step)
        seconds = []
        groups = [
            (images[i : i + case.m], labels[i : i + case.m])
            for i in range(0, BATCH_SIZE, case.m)
        ]
        firsts = [gradient(params, stats, *group) for group in groups]
        first_stats = mean_of([first for (_, (first, _)), _ in firsts])
        start = first_stats if case.batch_stats == "both" else stats
        for (_, g), group in zip(firsts, groups, strict=True):
            scale = rho / norm(g)
            point = jax.tree.map(lambda w, g, s=scale: w + s * g, params, g)
            seconds.append(gradient(point, start, *group))
        pairs = [(g, p) for (_, g), (_, p) in zip(firsts, seconds, strict=True)]
        descent = mean_of([p for _, p in pairs])
        velocity = jax.tree.map(
            lambda v, g, w: 0.9 * v + g + 0.05 * np.asarray(w),
            velocity,
            descent,
            params,
        )
        params = jax.tree.map(lambda w, v: np.float32(w - 0.1 * v), params, velocity)
        second_stats = mean_of([second for (_, (second, _)), _ in seconds])
        stats = first_stats if case.batch_stats == "first" else second_stats
        logits = np.concatenate([logits for (_, (_, logits)), _ in firsts])
        metrics = {
            "loss": np.mean([loss for (loss, _), _ in firsts]),
            "accuracy": np.mean(np.argmax(logits, -1) == labels),
            "rho": rho,
            "applied_rho": rho,
            "gradient_norm": np.mean([norm(g) for g, _ in pairs]),
            "perturbed_gradient_norm": np.mean([norm(p) for _, p in pairs]),
            "cosine": np.mean([cosine(g, p) for g, p in pairs]),
        }
    return flat(({"batch_stats": stats, "params": params}, metrics))


def by_google(model: Any, count: int) -> dict[str, np.ndarray]:
    """What google-research/sam does on some devices: all of it by each device alone.

    Only the gradients at the perturbed parameters are averaged in a step. Every device
    keeps its own running statistics, of the first pass, to be averaged at the end. Left
    out are its weight decay inside the loss and its clipping of the final gradient.
    """
    mesh = helpers.mesh_of(count)
    tx: Any = descent()
    gradient = gradient_of(model)

    def step(params, opt_state, stats, images, labels):
        stats = jax.tree.map(lambda leaf: leaf[0], stats)
        (_, (first_stats, _)), g = gradient(params, stats, images, labels)
        length = jnp.sqrt(sum(jnp.sum(jnp.square(x)) for x in jax.tree.leaves(g)))
        noised = jax.tree.map(lambda w, g: w + RHO * g / length, params, g)
        _, grads = gradient(noised, stats, images, labels)
        updates, opt_state = tx.update(jax.lax.pmean(grads, "data"), opt_state, params)
        stats = jax.tree.map(lambda leaf: leaf[None], first_stats)
        return optax.apply_updates(params, updates), opt_state, stats

    everywhere, apart = PartitionSpec(), PartitionSpec("data")
    run = jax.jit(
        jax.shard_map(
            step,
            mesh=mesh,
            in_specs=(everywhere, everywhere, apart, apart, apart),
            out_specs=(everywhere, everywhere, apart),
            check_vma=False,
        )
    )
    params, stats = (variables(model)[name] for name in ("params", "batch_stats"))
    opt_state = tx.init(params)
    stats = jax.tree.map(lambda leaf: jnp.stack([leaf] * mesh.size), stats)
    for images, labels in zip(*make_batches(), strict=True):
        params, opt_state, stats = run(params, opt_state, stats, images, labels)
    stats = jax.tree.map(lambda leaf: leaf.mean(0), stats)
    return flat(({"batch_stats": stats, "params": params},))


# A process of eight devices


def save(path: pathlib.Path, arrays: dict[str, Any]) -> None:
    np.savez(path, **arrays)


def work(folder: pathlib.Path) -> None:
    """What it does: all cases on two, four and eight, and google-research/sam's."""
    for count in (2, 4, 8):
        for name in CASES_ON[count]:
            save(folder / f"{count} {name}", trained(CASES[name], count))
        save(folder / f"{count} google", by_google(Dense(), count))
    shapes = sorted(convolution_shapes(CASES["AT, BatchNorm over 3"], 4))
    (folder / "shapes").write_text("; ".join(shapes))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> pathlib.Path:
    """The results on two, four and eight devices."""
    folder = tmp_path_factory.mktemp("groups")
    helpers.run_on_devices(__file__, str(folder), count=8)
    return folder


@functools.cache
def expected(name: str) -> dict[str, np.ndarray]:
    return by_hand(CASES[name])


def assert_close(found: Any, expected: Any) -> None:
    assert found.keys() == expected.keys()
    helpers.assert_close(dict(found), dict(expected), atol=TOLERANCE, rtol=TOLERANCE)


@pytest.mark.parametrize("name", CASES_ON[1])
def test_each_group_ascends_by_itself_and_their_mean_descends(name):
    assert_close(trained(CASES[name]), expected(name))


@pytest.mark.parametrize(
    ("count", "name"), [(n, name) for n in (2, 4, 8) for name in CASES_ON[n]]
)
def test_the_numbers_do_not_depend_on_how_the_groups_lie_on_devices(
    folder, count, name
):
    assert_close(np.load(folder / f"{count} {name}.npz"), expected(name))


@pytest.mark.parametrize(("count", "name"), GOOGLE.items())
def test_the_batch_of_a_device_as_a_group_is_google_researchs_sam(folder, count, name):
    google = np.load(folder / f"{count} google.npz")
    found = np.load(folder / f"{count} {name}.npz")
    assert CASES[name].m * count == BATCH_SIZE
    assert {name for name in found if "metrics" not in name} >= set(google)
    assert_close({name: found[name] for name in google}, google)


def test_devices_share_the_groups_evenly(folder):
    """Of two groups four devices compute a quarter each, in plain convolutions."""
    assert (folder / "shapes").read_text() == f"{BATCH_SIZE // 4},8,8,2"


def test_the_whole_batch_as_a_group_is_sam_without_groups():
    case = CASES["batch"]
    whole = trained(case, group_size=0)
    assert_close(trained(case), whole)
    with pytest.raises(AssertionError):  # the choice is visible
        assert_close(trained(CASES["m=4"]), whole)


def test_without_a_radius_the_groups_train_by_the_mean_of_their_gradients():
    case = CASES["m=6"]
    found = trained(case, rho=0.0)
    hand = by_hand(case, rho=0.0)
    assert_close(found, {name: hand[name] for name in found})
    assert "gradient_norm" in "".join(found)


def test_a_batch_that_the_groups_do_not_divide_is_refused():
    step, state, _ = make_step(CASES["m=8"], data_mesh(), group_size=7)
    message = (
        "Expected a batch divisible by group_size, got group_size=7, batch_size=24"
    )
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(step, state, *jax.tree.map(lambda x: x[0], make_batches()))


def test_a_negative_group_is_refused_when_the_step_is_made():
    with pytest.raises(ValueError, match="Expected 0 <= group_size, got group_size=-1"):
        make_step(CASES["m=8"], data_mesh(), group_size=-1)


@pytest.mark.parametrize("optimizer", [optax.sgd(0.1), msam(0.1, optax.adam(0.1))])
def test_groups_that_nothing_averages_are_refused(optimizer):
    """Else the parameters would become as many as there are groups."""
    case = CASES["m=8"]
    method = make_train_step(case.model, optimizer, group_size=8)
    batch = jax.tree.map(lambda x: x[0], make_batches())
    state = jax.eval_shape(method.init, jax.random.key(0), batch[0])
    message = r"begins with a two_pass of grouped=True, got group_size=8\."
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(method.train_step, state, *batch, jax.random.key(0))


@pytest.mark.parametrize("size", [2.0, True])
def test_a_group_is_a_whole_number_of_examples(size):
    with pytest.raises(ValueError, match="a whole number for group_size, got"):
        make_step(CASES["m=8"], data_mesh(), group_size=size)


if __name__ == "__main__":
    work(pathlib.Path(sys.argv[1]))
