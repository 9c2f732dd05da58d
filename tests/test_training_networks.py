"""The training step with Flax's own layers, and in either precision.

BatchNorm as in `flax.linen`, none at all, dropout, other random layers, LayerNorm.
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
from helpers import in_one_program

from samrobust.attacks import linf, pgd
from samrobust.attacks.losses import cross_entropy
from samrobust.experiments.building import make_plan, make_training
from samrobust.models import BatchNorm, PreActResNet
from samrobust.sharpness import sam
from samrobust.system.distributed import data_mesh
from samrobust.training import Objective, as_adversary, make_train_step
from samrobust.training.checkpoint import Checkpoints
from samrobust.training.epoch import Chunk, EpochRunner
from samrobust.training.passes import apply_in_training, make_passes

KEY = jax.random.key(0)
RATE, RHO = 0.1, 0.3


class Network(nn.Module):
    """A linear classifier behind one layer of a kind."""

    layer: str = "nothing"

    @nn.compact
    def __call__(self, images, *, train):
        hidden = nn.Dense(6)(images.reshape(len(images), -1) - 0.5)
        if self.layer == "stock BatchNorm":
            hidden = nn.BatchNorm(use_running_average=not train, momentum=0.9)(hidden)
        elif self.layer == "own BatchNorm":
            hidden = BatchNorm()(hidden, train=train)
        elif self.layer == "dropout":
            hidden = nn.Dropout(0.5, deterministic=not train)(hidden)
        elif self.layer == "noise" and train:
            key = self.make_rng("noise")
            hidden = hidden * jax.random.uniform(key, hidden.shape, hidden.dtype)
        elif self.layer == "LayerNorm":
            hidden = nn.LayerNorm()(hidden)
        return nn.Dense(3)(nn.tanh(hidden))


LAYERS = (
    "stock BatchNorm",
    "own BatchNorm",
    "dropout",
    "noise",
    "LayerNorm",
    "nothing",
)


def make_batch(size: int = 8) -> Any:
    rng = np.random.default_rng(0)
    images = jnp.asarray(rng.uniform(size=(size, 4, 4, 1)), jnp.float32)
    return images, jnp.asarray(rng.integers(0, 3, size), jnp.int32)


def make_state(model: Any, *transformations: Any) -> Any:
    tx = optax.chain(*transformations, optax.sgd(RATE))
    return tx, make_train_step(model, tx).init(KEY, jnp.zeros([1, 4, 4, 1]))


def statistics(model: Any) -> Any:
    """Their shapes and dtypes."""
    return jax.eval_shape(lambda: make_state(model)[1].batch_stats)


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("layer", LAYERS)
def test_every_network_trains_with_sam_under_an_attack(layer, mode):
    """The step is written out: the images, both passes, the statistics."""
    model = Network(layer)
    has_statistics = "BatchNorm" in layer
    aux = statistics(model) if has_statistics else None
    tx, state = make_state(model, sam(RHO, aux=aux))
    seen = []

    def attack(logits_fn, images, labels, *, key):
        crafted = pgd(linf(0.1), step_size=0.05, num_steps=2)(
            logits_fn, images, labels, key=key
        )
        seen.append((crafted, logits_fn(crafted), logits_fn(crafted)))
        return crafted

    images, labels = make_batch()
    step = make_train_step(
        model, tx, adversary=as_adversary(attack, batch_norm=mode)
    ).train_step
    after, metrics = step(state, images, labels, jax.random.key(7))
    ((crafted, logits, again),) = seen
    helpers.assert_same_bits(logits, again)  # no step of the attack sees another one
    assert np.any(crafted != images)

    key = jax.random.fold_in(jax.random.key(7), 0xFFFFFFFF)

    def loss(params, batch_stats):
        logits, updated = apply_in_training(model, params, batch_stats, crafted, key)
        return jnp.mean(cross_entropy(logits, labels)), (logits, updated)

    differentiate = jax.value_and_grad(loss, has_aux=True)
    (value, (trained, first)), g = differentiate(state.params, state.batch_stats)
    scale = RHO / optax.tree.norm(g)
    moved = jax.tree.map(lambda w, g: w + scale * g, state.params, g)
    (_, (_, second)), descent = differentiate(moved, first)
    expected = jax.tree.map(lambda w, g: w - RATE * g, state.params, descent)
    helpers.assert_close(after.params, expected, atol=1e-6)
    helpers.assert_close(after.batch_stats, second, atol=1e-6)
    np.testing.assert_allclose(metrics["loss"], value, rtol=1e-6)
    if mode == "train":  # the attacked network is the one that trains
        np.testing.assert_allclose(logits, trained, atol=1e-6)
    else:
        plain: Any = model.apply(state.variables, crafted, train=False)
        np.testing.assert_allclose(logits, plain, atol=1e-6)
    assert bool(after.batch_stats) == has_statistics


@pytest.mark.parametrize("layer", ["dropout", "noise"])
def test_both_passes_of_sam_drop_the_same_units_and_every_step_others(layer):
    model = Network(layer)
    tx, state = make_state(model, sam(1e-4))
    step: Any = make_train_step(model, tx).train_step
    batch = make_batch()
    (_, one), (_, again), (_, other) = (
        step(state, *batch, jax.random.key(seed)) for seed in (1, 1, 2)
    )
    assert one["cosine"] > 0.9999
    assert float(one["loss"]) == float(again["loss"]) != float(other["loss"])


def test_dropout_and_other_draws_of_a_layer_have_keys_of_their_own():
    class Drawing(nn.Module):
        @nn.compact
        def __call__(self, images, *, train):
            del images, train
            keys = map(self.make_rng, ("dropout", "noise"))
            return jnp.stack([jax.random.normal(key, [3]) for key in keys])

    logits, _ = apply_in_training(Drawing(), {}, {}, jnp.zeros([2, 1]), KEY)
    assert not np.array_equal(*logits)


def test_every_group_drops_units_of_its_own_in_both_passes():
    model = Network("dropout")
    images, labels = make_batch(4)
    views = {"adversarial": jnp.concatenate([images] * 2)}
    twice = (views, jnp.concatenate([labels] * 2), KEY)
    passes = make_passes(model, Objective(cross_entropy), group_size=4)
    params = make_state(model)[1].params
    first = in_one_program(passes.first, params, {}, *twice)
    stacked = jax.tree.map(lambda w: np.stack([w, w]), params)
    second = in_one_program(passes.second, stacked, {}, *twice)
    helpers.assert_close(first.grads, second.grads, atol=1e-6)
    kernel = first.grads["Dense_1"]["kernel"]
    assert np.abs(kernel[0] - kernel[1]).max() > 1e-3


@pytest.mark.parametrize("layer", ["stock BatchNorm", "nothing"])
def test_groups_need_no_layer_of_ours(layer):
    model = Network(layer)
    tx, state = make_state(model, sam(RHO, aux=statistics(model), grouped=True))
    step = jax.jit(make_train_step(model, tx, group_size=4).train_step)
    after, metrics = step(state, *make_batch(), KEY)
    assert metrics["cosine"] < 1
    helpers.assert_close(
        jax.tree.map(jnp.shape, after), jax.tree.map(jnp.shape, state), atol=0
    )


def test_the_outcome_over_groups_is_that_of_the_batch_in_its_order():
    model, (images, labels) = Network("LayerNorm"), make_batch()
    _, state = make_state(model)
    views = {"natural": images, "adversarial": images}

    @jax.jit
    def outcomes():
        of_groups = [
            make_passes(
                *(model, Objective(cross_entropy)), group_size=m, image_grads=True
            )
            for m in (0, 2)
        ]
        found = [p.first(state.params, {}, views, labels, KEY) for p in of_groups]
        return [(x.image_grads, x.losses, x.logits) for x in found]

    whole, grouped = outcomes()
    helpers.assert_close(grouped, whole, atol=1e-6)
    assert np.abs(whole[0]).max() > 1e-3


def test_statistics_that_sam_would_lose_are_refused_and_need_not_be_kept():
    model = Network("stock BatchNorm")
    tx, state = make_state(model, sam(RHO))
    batch = make_batch()
    message = r"^Expected sam\(rho, aux=batch_stats\) .* batch_stats='both'\. Or choo"
    step: Any = make_train_step(model, tx).train_step
    with pytest.raises(ValueError, match=message):
        step(state, *batch, KEY)
    step = make_train_step(model, tx, batch_stats="first").train_step
    after, _ = step(state, *batch, KEY)
    _, first = apply_in_training(model, state.params, state.batch_stats, batch[0], KEY)
    helpers.assert_close(after.batch_stats, first, atol=1e-6)


def test_a_network_with_further_variables_is_refused():
    class Counting(nn.Module):
        @nn.compact
        def __call__(self, images, *, train):
            del train
            self.variable("counts", "calls", jnp.zeros, ())
            return nn.Dense(3)(images.reshape(len(images), -1))

    message = r"are params and batch_stats, got collections=\['counts', 'params'\]"
    with pytest.raises(ValueError, match=message):
        make_state(Counting())


IMAGES: Any
LABELS: Any
IMAGES, LABELS = map(np.asarray, make_batch())
BATCHES = {
    "pixels as bytes": (IMAGES.astype(np.uint8), LABELS, "float images"),
    "one image": (IMAGES[0], LABELS, r"float images \[B, H, W, C\]"),
    "a column of labels": (IMAGES, LABELS[:, None], r"int labels \[8\].*\(8, 1\)"),
    "one-hot labels": (IMAGES, np.eye(3)[LABELS], r"int labels .*\(8, 3\)"),
    "float labels": (IMAGES, np.float32(LABELS), "int labels .*dtype='float32'"),
    "too few labels": (IMAGES, LABELS[:1], r"int labels \[8\].*\(1,\)"),
}


@pytest.mark.parametrize("name", BATCHES)
def test_a_batch_that_would_train_on_something_else_is_refused(name):
    images, labels, message = BATCHES[name]
    tx, state = make_state(Network())
    step = make_train_step(Network(), tx).train_step
    with pytest.raises(ValueError, match=f"^Expected {message}"):
        step(state, images, labels, KEY)


def test_logits_and_losses_of_other_shapes_are_refused():
    class Column(nn.Module):
        @nn.compact
        def __call__(self, images, *, train):
            del train
            return nn.Dense(1)(images.reshape(len(images), -1))

    tx, state = make_state(Column())
    with pytest.raises(ValueError, match=r"^Expected logits \[8, K\] .*\(8, 1\)"):
        make_train_step(Column(), tx).train_step(state, IMAGES, LABELS, KEY)
    tx, state = make_state(Network())

    for objective, kind in (
        (lambda logits, labels: logits - labels[:, None], r"float32\[8,3\]"),
        (lambda logits, labels: logits.argmax(1) - labels, r"int32\[8\]"),
    ):
        step = make_train_step(Network(), tx, objective=objective).train_step
        message = rf"^Expected an objective .*<lambda>='{kind}'"
        with pytest.raises(ValueError, match=message):
            step(state, IMAGES, LABELS, KEY)


# Precision


def dtypes_of(tree: Any) -> set[str]:
    return {str(leaf.dtype) for leaf in jax.tree.leaves(tree)}


@functools.cache
def tiny_run(x64: bool) -> tuple[Any, ...]:
    """Of AT with dropped 64-bit types or without: state, order, two steps, program."""
    with jax.enable_x64(x64):
        config = helpers.make_config("at,norm=l2,eps=128+sam,rho=0.1")
        data = helpers.load_data(config)
        plan = make_plan(config, len(data.train))
        built = make_training(config, data, plan.num_steps)
        runner = EpochRunner(
            built.method.train_step,
            plan,
            data.train,
            padding=1,
            flip=True,
            mesh=data_mesh(),
            key=KEY,
        )

        carry = jax.jit(built.begin)(KEY)
        start, order = jax.tree.map(np.asarray, carry), runner.permutation(1)
        call = Chunk(1, 32)
        for _ in range(2):
            carry, _ = runner.run(call, carry, order)
        with jax.enable_x64(False):  # as the runner lowers it
            program = runner.trace(call, [carry]).lower().as_text()
        return start, order, carry, program


def test_a_run_is_the_same_program_with_64_bit_types_and_without():
    *plain, program = tiny_run(False)
    *found, other = tiny_run(True)
    for tree, expected in zip(found, plain, strict=True):
        helpers.assert_same_bits(tree, expected)
    assert program == other
    assert dtypes_of(found[2]) == {"float32", "int32"}


def test_a_checkpoint_is_restored_whether_64_bit_types_are_on_or_off(tmp_path):
    with Checkpoints(tmp_path / "last") as checkpoints:
        checkpoints.save(2, tiny_run(False)[2], wait=True)
    like = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), tiny_run(True)[0]
    )
    with jax.enable_x64(True), Checkpoints(tmp_path / "last") as checkpoints:
        restored: Any = checkpoints.restore_latest(like)
        helpers.assert_same_bits(restored.state, tiny_run(False)[2])


@pytest.mark.parametrize("layer", LAYERS)
def test_64_bit_types_change_no_dtype_of_a_step(layer):
    def make() -> Any:
        model = Network(layer)

        def run() -> Any:
            tx, state = make_state(model, sam(RHO, aux=statistics(model)))
            step: Any = make_train_step(model, tx).train_step
            return state, step(state, *make_batch(), KEY)

        return jax.eval_shape(run)

    plain = make()
    with jax.enable_x64(True):
        assert dtypes_of(make()) == dtypes_of(plain) == {"float32", "int32"}


def test_a_network_of_float64_is_float64_in_all_its_parts():
    def make(dtype: Any) -> Any:
        return PreActResNet(num_classes=3, width=2, blocks=(1,), dtype=dtype)

    variables = helpers.draw_variables(make(jnp.float32), (4, 4, 1))
    images, labels = make_batch()
    single = in_one_program(make(jnp.float32).apply, variables, images, train=True)
    with pytest.raises(
        ValueError, match=r"^Expected a dtype that JAX .*'float64'\. Set"
    ):
        make(np.float64).apply(variables, images, train=True)
    with jax.enable_x64(True):
        model = make(np.float64)
        wide = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), variables)
        double = in_one_program(model.apply, wide, images, train=True)
        rounded = in_one_program(model.apply, variables, images, train=True)
        np.testing.assert_array_equal(double, rounded)

        def run() -> Any:
            tx, state = make_state(model, sam(RHO, aux=statistics(model)))
            return make_train_step(model, tx).train_step(state, images, labels, KEY)

        after, metrics = jax.eval_shape(run)
        assert dtypes_of((double, after.params, after.batch_stats)) == {"float64"}
        assert dtypes_of((metrics, after.opt_state[0].metrics)) == {"float32"}
    np.testing.assert_allclose(single, double, atol=1e-5)
