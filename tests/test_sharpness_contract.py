"""What every sharpness method promises, whatever it is called in.

A method is added to `METHODS`, its ascent in NumPy to `ASCENTS`, and is then held to
all of this; one that `oracles/test_methods_against_torch.py` holds step by step to
`FAMILY`, and to what does not depend on the formula. Groups are the halves of the
batch, and the auxiliary output is where the second pass took place.
"""

import contextlib
import functools
import types
from typing import Any, NamedTuple

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, PartitionSpec

from samrobust import sharpness
from samrobust.sharpness import (
    asam,
    awp,
    gradient_point,
    last_aux,
    last_metrics,
    sam,
    two_pass,
)
from samrobust.sharpness.trees import norm, of_length
from samrobust.training.checkpoint import Checkpoints

RHO, RATE, ETA, DECAY = 0.3, 0.1, 0.01, 0.05


def remembering(rho: Any, **options: Any) -> Any:
    """An ascent with a memory: along a sum of the gradients that fades by half."""

    def init(params: Any) -> Any:
        return jax.tree.map(jnp.zeros_like, params)

    def update(updates: Any, state: Any, params: Any = None, **extra_args: Any):
        del params
        memory = jax.tree.map(lambda m, g: 0.5 * m + g, state, updates)
        length = jnp.where(norm(updates) > 0, extra_args["rho"], 0.0)
        return of_length(length, memory, norm(memory)), memory

    ascent = optax.GradientTransformationExtraArgs(init, update)
    return two_pass(rho, ascent, **options)


MAKERS: dict[str, Any] = {
    "sam": sam,
    "asam": functools.partial(asam, eta=ETA),
    "awp": functools.partial(awp, weight_decay=DECAY),
    "remembering": remembering,
}


def select_kernel(params: Any) -> Any:
    return {name: name == "kernel" for name in params}


def around_sgd(make: Any, **options: Any) -> Any:
    """A method that is the optimizer; it has neither auxiliary output nor groups."""

    def made(rho: Any, aux: Any, grouped: bool) -> Any:
        assert aux is None
        assert not grouped
        return make(rho, **options)

    return made


KEY = jax.random.key(5)
MOMENTUM = optax.sgd(RATE, momentum=0.9)
# What `FAMILY` holds; two steps must meet each of their parts.
MAKERS |= {
    "asam_davda": sharpness.asam_davda,
    "gsam": sharpness.gsam,
    "friendly_sam": sharpness.friendly_sam,
    "looksam": functools.partial(sharpness.looksam, k=2),
    "sam_on": functools.partial(sharpness.sam_on, select=select_kernel),
    "fisher_sam": sharpness.fisher_sam,
    "fsam": functools.partial(sharpness.fsam, keep_ratio=0.5, every=1),
    "ssam, fisher": functools.partial(
        sharpness.ssam, "fisher", num_samples=2, steps_per_epoch=1, total_steps=2
    ),
    "ssam, dynamic": functools.partial(
        sharpness.ssam, "dynamic", steps_per_epoch=1, total_steps=2
    ),
    "esam": functools.partial(sharpness.esam, beta=0.7),
    "rwp": functools.partial(sharpness.rwp, threshold=2.5, num_steps=2),
    "msam": around_sgd(sharpness.msam, optimizer=MOMENTUM),
    "entropy_sgd": around_sgd(
        sharpness.entropy_sgd, inner_steps=2, learning_rate=1.0, noise=1e-2
    ),
}
OPTIMIZERS = ("msam", "entropy_sgd")
# They sort all entries together, or take examples, which JAX refuses of arrays that are
# split over an explicit mesh.
SORTING = ("fsam", "ssam, fisher", "ssam, dynamic", "esam")


class Method(NamedTuple):
    """How a transformation is made, and what it wants from `grad_fn`."""

    rho: Any = RHO
    aux: bool = False
    grouped: bool = False
    name: str = "sam"

    @property
    def tx(self) -> Any:
        aux = make_params() if self.aux else None
        return MAKERS[self.name](self.rho, aux=aux, grouped=self.grouped)


def schedule(step: Any) -> Any:
    return jnp.where(step == 0, RHO, RHO / 2)


ORACLES = ("sam", "asam", "awp", "remembering")
METHODS = {
    "constant": Method(),
    "array": Method(np.float32(0.25)),
    "schedule": Method(schedule),
    "aux": Method(aux=True),
    "grouped": Method(grouped=True),
    "grouped, schedule, aux": Method(schedule, aux=True, grouped=True),
    "asam, grouped": Method(grouped=True, name="asam"),
    "awp, schedule, grouped": Method(schedule, grouped=True, name="awp"),
    "remembering, aux": Method(aux=True, name="remembering"),
}
FAMILY = {
    **{name: Method(name=name) for name in MAKERS if name not in ORACLES},
    "gsam, grouped": Method(grouped=True, name="gsam"),
    "looksam, grouped, aux": Method(grouped=True, aux=True, name="looksam"),
    "fisher_sam, grouped": Method(grouped=True, name="fisher_sam"),
    "sam_on, grouped": Method(grouped=True, name="sam_on"),
    "esam, aux": Method(aux=True, name="esam"),
}
ALL = METHODS | FAMILY
OFF = {
    "zero": Method(0),
    "NumPy zero": Method(np.float32(0), aux=True),
    "array of zero": Method(jnp.zeros([])),
    "schedule of zero": Method(lambda _: 0.0),
    "grouped": Method(0.0, grouped=True),
    "asam": Method(lambda _: 0.0, name="asam"),
    "awp": Method(lambda _: 0.0, name="awp"),
    "remembering": Method(lambda _: 0.0, name="remembering"),
}
with_oracle = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
every_method = pytest.mark.parametrize("method", ALL.values(), ids=ALL)


def make_params(dtype: Any = np.float32) -> Any:
    rng = np.random.default_rng(0)
    values = {"kernel": rng.standard_normal((4, 2)), "bias": rng.standard_normal(2)}
    return jax.tree.map(lambda w: jnp.asarray(w.astype(np.float32), dtype), values)


def make_batch(size: int = 6, dtype: Any = np.float32) -> Any:
    rng = np.random.default_rng(1)
    inputs, targets = rng.standard_normal((size, 4)), rng.standard_normal((size, 2))
    return tuple(
        jnp.asarray(array.astype(np.float32), dtype) for array in (inputs, targets)
    )


def losses_of(params: Any, batch: Any) -> Any:
    inputs, targets = batch
    bias = jnp.broadcast_to(params["bias"][None], targets.shape)
    errors = jnp.tanh(inputs @ params["kernel"] + bias) - targets
    return jnp.sum(jnp.square(errors), axis=1)


def loss(params: Any, batch: Any) -> Any:
    return jnp.sum(losses_of(params, batch)) / len(batch[0])


gradient = jax.grad(loss)


def gradient_of_groups(params: Any, batch: Any, own: bool = False) -> Any:
    halves = jax.tree.map(lambda leaf: leaf.reshape(2, -1, leaf.shape[1]), batch)
    return jax.vmap(gradient, (0 if own else None, 0))(params, halves)


def update(
    method: Any, params: Any, state: Any, batch: Any, sync: Any = None, part: Any = None
):
    """One step of the method and SGD; `sync` averages gradients over devices.

    Of a micro-batch `part`, if given, with a `grad_fn` over the whole batch.
    """
    differentiate = gradient_of_groups if method.grouped else gradient
    sync = sync or (lambda grads: grads)

    def grad_fn(moved: Any, examples: Any = slice(None)) -> Any:
        options = {"own": True} if method.grouped else {}
        chosen = tuple(array[examples] for array in batch)
        grads = sync(differentiate(moved, chosen, **options))
        first = jax.tree.map(lambda w: w[0], moved) if method.grouped else moved
        return (grads, first) if method.aux else grads

    point = gradient_point(params, state)
    grads = sync(differentiate(point, batch if part is None else part))
    updates, state = method.tx.update(
        grads,
        state,
        params,
        grad_fn=grad_fn,
        **what_else_it_takes(method, params, point, batch),
    )
    rate = 1.0 if method.name in OPTIMIZERS else -RATE
    return jax.tree.map(lambda w, u: w + rate * u, params, updates), state


def what_else_it_takes(method: Any, params: Any, point: Any, batch: Any) -> Any:
    """Arguments of an update, beside `grad_fn`, that some methods want."""
    return {
        "loss_fn": lambda moved: losses_of(moved, batch),
        "losses": losses_of(point, batch),
        "aux": params if method.aux else None,
        "key": KEY,
    }


def train(method: Method, params: Any, batch: Any, sync: Any = None) -> Any:
    """Two steps in a loop on the device, from a fresh state."""

    def body(carry: Any, _: Any) -> Any:
        params, state = carry
        return update(method, params, state, batch, sync), None

    return jax.lax.scan(body, (params, method.tx.init(params)), length=2)[0]


train_of = jax.jit(train, static_argnums=0)


@functools.cache
def trained(method: Method) -> Any:
    return jax.tree.map(np.asarray, train_of(*three(method)))


def three(method: Method) -> Any:
    return method, make_params(), make_batch()


step_of = jax.jit(update, static_argnums=0)


@functools.cache
def stepped(method: Method) -> Any:
    """The parameters and the state after one step."""
    params = make_params()
    return step_of(method, params, method.tx.init(params), make_batch())


def moved_once(method: Method) -> Any:
    """The parameters after one step."""
    return stepped(method)[0]


def length_of(tree: Any) -> Any:
    return np.sqrt(sum(np.sum(v**2) for v in tree.values()))


def ascend_by_sam(g: Any, w: Any, rho: float, memory: Any) -> Any:
    del w, memory
    return {k: rho * g[k] / length_of(g) for k in g}


def ascend_by_asam(g: Any, w: Any, rho: float, memory: Any) -> Any:
    del memory
    scale = {"kernel": np.abs(w["kernel"]) + ETA, "bias": 1.0}
    length = length_of({k: scale[k] * g[k] for k in g})
    return {k: rho * scale[k] ** 2 * g[k] / length for k in g}


def ascend_by_awp(g: Any, w: Any, rho: float, memory: Any) -> Any:
    del memory
    length = rho * np.linalg.norm(w["kernel"]) / np.linalg.norm(g["kernel"])
    return {"kernel": length * g["kernel"], "bias": 0.0 * g["bias"]}


def ascend_by_memory(g: Any, w: Any, rho: float, memory: Any) -> Any:
    for k in g:
        memory[k] = memory.get(k, 0.0) / 2 + g[k]
    return ascend_by_sam(memory, w, rho, {})


ASCENTS = {
    "sam": ascend_by_sam,
    "asam": ascend_by_asam,
    "awp": ascend_by_awp,
    "remembering": ascend_by_memory,
}


def by_hand(method: Method, num_steps: int = 2) -> Any:
    """The same steps in NumPy and float64."""
    w = {k: np.asarray(v, np.float64) for k, v in make_params().items()}
    decay, memory = DECAY if method.name == "awp" else 0.0, {}
    batch = [np.asarray(array, np.float64) for array in make_batch()]

    def slope(w, inputs, targets):
        outputs = np.tanh(inputs @ w["kernel"] + w["bias"])
        delta = 2 * (outputs - targets) * (1 - outputs**2) / len(targets)
        return {"kernel": inputs.T @ delta, "bias": delta.sum(0)}

    parts = [[a[:3] for a in batch], [a[3:] for a in batch]]
    for step in range(num_steps):
        rho: Any = method.rho(step) if callable(method.rho) else method.rho
        rho = float(rho)
        ends = []
        for part in parts if method.grouped else [batch]:
            e = ASCENTS[method.name](slope(w, *part), w, rho, memory)
            end = slope({k: w[k] + e[k] for k in w}, *part)
            ends.append({k: end[k] + decay * e[k] for k in w})
        w = {k: w[k] - RATE * np.mean([end[k] for end in ends], axis=0) for k in w}
    return w


@with_oracle
def test_its_steps_are_those_of_numpy_in_float64(method):
    params, state = trained(method)
    helpers.assert_close(params, by_hand(method), atol=1e-6)
    assert last_metrics(state)["cosine"] < 0.9999
    if method.aux:
        assert jax.tree.structure(last_aux(state)) == jax.tree.structure(params)


@with_oracle
def test_in_float64_its_steps_are_exact(method):
    with jax.enable_x64(True):
        batch, params = make_batch(dtype=np.float64), make_params(np.float64)
        method = method._replace(aux=False)
        params, state = train_of(method, params, batch)
        helpers.assert_close(params, by_hand(method), atol=1e-15)
        dtypes = {
            str(leaf.dtype) for leaf in jax.tree.leaves(state._replace(ascent=()))
        }
        assert dtypes == {"int32", "float32"}
        assert all(leaf.dtype == np.float64 for leaf in jax.tree.leaves(state.ascent))


@contextlib.contextmanager
def strictly():
    with (
        jax.numpy_dtype_promotion("strict"),
        jax.numpy_rank_promotion("raise"),
        jax.debug_nans(True),
        jax.checking_leaks(),
    ):
        yield


@contextlib.contextmanager
def x64_and_explicit_axes():
    """Examples are split over one axis of the mesh, parameters over the other."""
    with (
        jax.enable_x64(True),
        jax.set_mesh(jax.make_mesh((1, 1), ("data", "model"))),
    ):
        yield


SETTINGS: dict[str, Any] = {
    "strict, ranks, NaNs, leaks": strictly,
    "x64, explicit axes": x64_and_explicit_axes,
    "x64": lambda: jax.enable_x64(True),
}


def every_setting(test: Any) -> Any:
    strict, explicit, x64 = SETTINGS
    cases = {
        f"{kind}-{name}": (method, name)
        for kind, method in ALL.items()
        for name in (strict, x64 if method.name in SORTING else explicit)
    }
    marked = pytest.mark.parametrize(("method", "name"), cases.values(), ids=cases)
    return marked(test)


@every_setting
def test_under_every_setting_it_takes_the_same_steps_and_is_traced_once(method, name):
    traces = []

    @jax.jit
    def step(params, state, batch):
        traces.append(1)
        return update(method, params, state, batch)

    with SETTINGS[name]():
        params, batch = make_params(), make_batch()
        if "explicit" in name:
            over = {"kernel": (None, "model"), "bias": ("model",)}
            specs = {name: PartitionSpec(*axes) for name, axes in over.items()}
            params = jax.tree.map(jax.device_put, params, specs)
            specs = PartitionSpec("data"), PartitionSpec("data", "model")
            batch = tuple(map(jax.device_put, batch, specs))
        state = method.tx.init(params)
        for _ in range(2):
            params, state = step(params, state, batch)
        # Fresh zeros are not yet split over an explicit mesh.
        assert len(traces) == 1 or ("explicit" in name and len(traces) == 2)
    expected = trained(method)
    helpers.assert_close((params, state), expected, atol=1e-6)
    assert dtypes_of((params, state)) == dtypes_of(expected)


def dtypes_of(tree: Any) -> list[str]:
    return [str(leaf.dtype) for leaf in jax.tree.leaves(tree)]


@pytest.mark.parametrize("method", [Method(schedule, aux=True, grouped=True)])
def test_jit_does_not_change_its_step(method):
    params, batch = make_params(), make_batch()
    state = method.tx.init(params)
    found = jax.jit(update, static_argnums=0)(method, params, state, batch)
    helpers.assert_close(found, update(method, params, state, batch), atol=1e-6)


@pytest.mark.parametrize(
    "method", [*METHODS.values(), FAMILY["looksam"], FAMILY["ssam, dynamic"]]
)
def test_vmap_over_parameters_and_radii_takes_each_ones_steps(method):
    params, batch = make_params(), make_batch()
    scales = jnp.array([1.0, -2.0])
    many = jax.tree.map(lambda w: scales.reshape(-1, *[1] * w.ndim) * w, params)

    def run(params: Any, rho: Any) -> Any:
        chosen = method if callable(method.rho) else method._replace(rho=rho)
        return train(chosen, params, batch)

    radii = jnp.array([method.rho, 0.0]) if not callable(method.rho) else scales
    found = jax.jit(jax.vmap(run))(many, radii)
    sgd = method if callable(method.rho) else Method(0.0, grouped=method.grouped)
    for i, own in enumerate((method, sgd)):
        one, moved = jax.tree.map(lambda leaf, i=i: leaf[i], (many, found))
        expected = train_of(own, one, batch)
        parts = slice(None if own is method else 1)  # the parameters, and the state
        helpers.assert_close(moved[parts], expected[parts], atol=1e-6)


@every_method
def test_in_shard_map_devices_may_share_a_step_or_train_apart(method):
    """Varying axes are checked: averaged gradients vary over none, networks apart do.

    A loop's carry, SAM's state in it, must not change in what it varies over.
    """
    if method.name == "esam":
        return  # chooses of the whole batch
    mesh = jax.make_mesh((1,), ("data",), axis_types=(AxisType.Auto,))
    everywhere, split = PartitionSpec(), PartitionSpec("data")

    def together(params: Any, batch: Any) -> Any:
        return train(method, params, batch, lambda g: jax.lax.pmean(g, "data"))

    def apart(params: Any, batch: Any) -> Any:
        outcome = train(method, jax.tree.map(lambda w: w[0], params), batch)
        return jax.tree.map(lambda leaf: leaf[None], outcome)

    def both(params: Any, stacked: Any, batch: Any) -> Any:
        return together(params, batch), apart(stacked, batch)

    mapped = jax.shard_map(
        both,
        mesh=mesh,
        in_specs=(everywhere, split, split),
        out_specs=(everywhere, split),
    )
    stacked = jax.tree.map(lambda w: w[None], make_params())
    shared, own = jax.jit(mapped)(make_params(), stacked, make_batch())
    helpers.assert_close(shared, trained(method), atol=1e-6)
    own = jax.tree.map(lambda leaf: leaf[0], own)
    helpers.assert_close(own, trained(method), atol=1e-6)


@every_method
def test_a_batch_of_one_is_enough(method):
    if method.grouped:
        return
    params, _ = update(
        method, make_params(), method.tx.init(make_params()), make_batch(1)
    )
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(params))


@every_method
def test_where_the_gradient_is_zero_nothing_moves(method):
    zeros = jax.tree.map(jnp.zeros_like, make_params())
    batch = (make_batch()[0], jnp.zeros((6, 2)))
    with jax.debug_nans(True):
        params, state = update(method, zeros, method.tx.init(zeros), batch)
    helpers.assert_same_bits(params, zeros)
    metrics = last_metrics(state)
    assert float(metrics.get("applied_rho", 0.0)) == 0.0
    if method.name in ASCENTS:
        assert [float(metrics[n]) for n in metrics if n != "rho"] == [0.0] * 4


@pytest.mark.parametrize("method", OFF.values(), ids=OFF)
def test_a_radius_of_zero_is_the_gradient_bit_for_bit(method):
    def plain(params: Any, batch: Any) -> Any:
        grads = gradient(params, batch)
        if method.grouped:
            grads = jax.tree.map(
                lambda g: jnp.mean(g, 0), gradient_of_groups(params, batch)
            )
        return jax.tree.map(lambda w, g: w - RATE * g, params, grads)

    params, batch = make_params(), make_batch()
    found, state = update(method, params, method.tx.init(params), batch)
    helpers.assert_same_bits(found, plain(params, batch))
    applied = last_metrics(state).get("applied_rho", 0.0)
    assert float(applied) == 0.0


def of_wrong_shape(grads: Any) -> Any:
    return grads | {"bias": grads["bias"][..., :1]}


WRONG = {
    "of other shapes": (of_wrong_shape, "shapes and dtypes"),
    "of another dtype": (
        lambda grads: jax.tree.map(lambda g: g.astype(jnp.bfloat16), grads),
        "shapes and dtypes",
    ),
    "without a leaf": (lambda grads: {"bias": grads["bias"]}, "of the structure"),
    "None": (lambda _: None, "of the structure"),
    "a pair too many": (lambda grads: (grads, {}, {}), "of the structure"),
    "a loss": (lambda _: 1.0, "of the structure"),
}


@every_method
def test_in_bfloat16_parameters_and_state_keep_their_dtypes(method):
    method = method._replace(aux=False)
    params, batch = make_params(jnp.bfloat16), make_batch(dtype=jnp.bfloat16)
    state = method.tx.init(params)
    found = jax.eval_shape(functools.partial(update, method), params, state, batch)
    assert dtypes_of(found) == dtypes_of((params, state))


# With arithmetic of their own.
HALF = ["gsam", "looksam", "fisher_sam", "esam", "msam", "entropy_sgd"]


@pytest.mark.parametrize("name", [*HALF, "awp, schedule, grouped"])
def test_in_bfloat16_its_steps_are_those_of_float32(name):
    """To a unit in the last place of 1 and 2, which SGD is twice as far away from."""
    method, params = ALL[name], make_params(jnp.bfloat16)
    found, state = params, method.tx.init(params)
    for _ in range(2):
        found, state = step_of(method, found, state, make_batch(dtype=jnp.bfloat16))
    expected, sgd = trained(method)[0], by_hand(Method(0.0))
    helpers.assert_close(found, expected, atol=0.01)
    assert max(np.abs(expected[k] - sgd[k]).max() for k in sgd) > 0.02


@every_method
def test_its_state_can_be_donated(method):
    """No buffer of it is there twice."""
    state = method.tx.init(make_params())
    leaves = [leaf for leaf in jax.tree.leaves(state) if leaf.size]
    assert len({leaf.unsafe_buffer_pointer() for leaf in leaves}) == len(leaves)


def test_from_a_checkpoint_the_next_step_is_the_same_bit_for_bit(tmp_path):
    """All methods in one checkpoint, after a step."""
    kept = {name: stepped(method) for name, method in FAMILY.items()}
    fresh = {n: (make_params(), m.tx.init(make_params())) for n, m in FAMILY.items()}
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(1, kept, {})
        checkpoints.wait()
        restored: Any = checkpoints.restore_latest(fresh)
    helpers.assert_same_bits(restored.state, kept)
    for name, method in FAMILY.items():
        found, expected = (
            step_of(method, *at, make_batch())
            for at in (restored.state[name], kept[name])
        )
        helpers.assert_same_bits(found, expected)


@pytest.mark.parametrize("method", FAMILY.values(), ids=FAMILY)
def test_a_parameter_without_a_gradient_changes_no_structure(method):
    """Or is refused by name, where the whole gradient is needed."""
    params, batch = make_params(), make_batch()
    differentiate = gradient_of_groups if method.grouped else gradient

    def without_bias(params: Any, examples: Any = slice(None), **options: Any) -> Any:
        chosen = tuple(array[examples] for array in batch)
        return {**differentiate(params, chosen, **options), "bias": None}

    def grad_fn(moved: Any, *examples: Any) -> Any:
        own = {"own": True} if method.grouped else {}
        grads = without_bias(moved, *examples, **own)
        return (grads, params) if method.aux else grads

    def step(state: Any) -> Any:
        return method.tx.update(
            without_bias(params),
            state,
            params,
            grad_fn=grad_fn,
            **what_else_it_takes(method, params, params, batch),
        )

    state = method.tx.init(params)
    if method.name in OPTIMIZERS:
        with pytest.raises(ValueError, match=r"a gradient of every param.*'bias'"):
            jax.eval_shape(step, state)
        return
    updates, following = jax.eval_shape(step, state)
    assert updates["bias"] is None
    assert jax.tree.structure(following) == jax.tree.structure(state)


@pytest.mark.parametrize("name", ["esam", "rwp", "ssam, dynamic", "entropy_sgd"])
def test_what_a_method_wants_of_an_update_is_in_the_call_that_is_advised(name):
    method, params = FAMILY[name], make_params()
    grads, wanted = gradient(params, make_batch()), "loss_fn" * (name == "rwp") or "key"
    with pytest.raises(ValueError, match=rf"grad_fn=grad_fn, {wanted}={wanted}\)`"):
        method.tx.update(grads, method.tx.init(params), params, grad_fn=lambda _: grads)


@pytest.mark.parametrize("name", ["esam", "rwp", "ssam, fisher"])
def test_a_mean_in_place_of_the_losses_of_examples_is_refused(name):
    """It would broadcast: ESAM would choose the examples of the smallest losses."""
    method, params, batch = FAMILY[name], make_params(), make_batch()
    wanted = what_else_it_takes(method, params, params, batch)
    if name == "ssam, fisher":
        wanted["losses"] = wanted["losses"].mean()
    else:
        wanted["loss_fn"] = lambda params: loss(params, batch)
    with pytest.raises(ValueError, match=r"^Expected a loss of each.*='float32\[\]'"):
        method.tx.update(
            gradient(params, batch),
            method.tx.init(params),
            params,
            grad_fn=lambda params, examples=slice(None): gradient(
                params, tuple(array[examples] for array in batch)
            ),
            **wanted,
        )


@pytest.mark.parametrize("method", FAMILY.values(), ids=FAMILY)
def test_within_optax_wrappers_it_takes_the_same_step(method):
    """A rho that is set between steps, a mask after it, accumulation around both."""
    inner = method.tx
    if method.name != "entropy_sgd":  # whose gamma is no schedule
        inner = optax.inject_hyperparams(lambda rho: method._replace(rho=rho).tx)(RHO)
    frozen = {"kernel": False, "bias": True}
    tx: Any = optax.chain(inner, optax.masked(optax.set_to_zero(), frozen))
    params, batch = make_params(), make_batch()
    parts = [batch]
    if not method.grouped:  # gradients of groups are not of the parameters' shapes
        tx = optax.MultiSteps(tx, 2)
        parts = [tuple(array[i::2] for array in batch) for i in range(2)]
    wrapped = types.SimpleNamespace(**method._asdict(), tx=tx)

    @jax.jit
    def step(params: Any, state: Any, part: Any) -> Any:
        return update(wrapped, params, state, batch, part=part)

    found, state = params, tx.init(params)
    for part in parts:
        found, state = step(found, state, part)
    expected = {**moved_once(method), "bias": params["bias"]}
    helpers.assert_close(found, expected, atol=1e-6)


@with_oracle
@pytest.mark.parametrize("name", WRONG)
def test_a_grad_fn_that_returns_something_else_is_refused_in_one_line(method, name):
    change, message = WRONG[name]
    grads = gradient_of_groups(*three(method)[1:]) if method.grouped else make_params()

    def grad_fn(params: Any) -> Any:
        del params
        return (change(grads), make_params()) if method.aux else change(grads)

    tx, params = method.tx, make_params()
    with pytest.raises(ValueError, match=rf"^Expected grad_fn to return .*{message}"):
        jax.eval_shape(
            lambda: tx.update(grads, tx.init(params), params, grad_fn=grad_fn)
        )


def test_a_step_of_looksam_with_one_pass_shows_what_the_last_with_two_found():
    method = FAMILY["looksam, grouped, aux"]
    state = trained(method)[1]  # after the second step, k is 2
    shown = last_metrics(state)
    assert shown["applied_rho"] == pytest.approx(float(method.rho), rel=1e-5)
    assert 0 < shown["cosine"] < 0.9999
    # But its own auxiliary output: the weights of its one pass.
    helpers.assert_close(last_aux(state), moved_once(method), atol=1e-6)


def test_a_gradient_norm_of_looksam_over_groups_is_the_mean_of_theirs_in_every_step():
    tx: Any = sharpness.looksam(0.1, k=2, grouped=True)
    w, slopes = jnp.ones(2), jnp.array([[3.0, 4.0], [-3.0, -2.9]])
    state = tx.init(w)
    for _ in range(2):
        _, state = tx.update(slopes, state, w, grad_fn=lambda _: slopes)
        expected = jnp.mean(jnp.linalg.norm(slopes, axis=1))
        assert last_metrics(state)["gradient_norm"] == pytest.approx(float(expected))
