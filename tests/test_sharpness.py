"""SAM on functions whose perturbed gradient is known, and in optax's machinery."""

import math
import warnings
from typing import Any

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from helpers import in_one_program

from samrobust.sharpness import (
    TwoPassMetrics,
    TwoPassState,
    esam,
    fisher_sam,
    friendly_sam,
    fsam,
    gradient_point,
    last_aux,
    last_metrics,
    looksam,
    msam,
    rwp,
    sam,
    sam_on,
    ssam,
    two_pass,
)
from samrobust.sharpness.masks import is_bias, largest, normalizations
from samrobust.sharpness.trees import norm

RHO = 0.3
ROOT = np.random.default_rng(0).standard_normal((4, 4))
A = (ROOT @ ROOT.T + np.eye(4)).astype(np.float32)
# A point where the perturbation turns the gradient: g(W) is not an eigenvector.
W = np.linalg.solve(A, np.array([1, -2, 0.5, 3], np.float32))


def quadratic(w):
    return 0.5 * w @ A @ w


gradient = jax.grad(quadratic)


def numpy_sam(w, rho, matrix=A):
    """g(w) and g(w + rho g / ||g||) of the quadratic, in float64."""
    matrix, w = matrix.astype(np.float64), np.asarray(w, np.float64)
    g = matrix @ w
    return g, matrix @ (w + rho * g / np.linalg.norm(g))


def never(params):
    raise AssertionError(params)


def apply_sam(tx: Any, w, state=None, grad_fn=gradient) -> tuple[Any, Any]:
    w = jnp.asarray(w)
    return tx.update(
        gradient(w), tx.init(w) if state is None else state, w, grad_fn=grad_fn
    )


def assert_same_bits(first, second):
    leaves, treedef = jax.tree.flatten(first)
    others, other_treedef = jax.tree.flatten(second)
    assert treedef == other_treedef
    for leaf, other in zip(leaves, others, strict=True):
        assert leaf.dtype == other.dtype
        assert np.asarray(leaf).tobytes() == np.asarray(other).tobytes()


def signature(tree):
    """All that jit compares: structure, shapes, dtypes and weak types."""
    return jax.tree.map(lambda leaf: jax.typeof(jnp.asarray(leaf)), tree)


# The update


@pytest.mark.parametrize("rho", [1e-3, 0.05, 1.0, 20.0])
def test_sam_gives_the_gradient_at_the_perturbed_point_of_a_quadratic(rho):
    updates, _ = apply_sam(sam(rho), W)
    np.testing.assert_allclose(updates, numpy_sam(W, rho)[1], rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("scale", [1e-12, 1e12])
def test_the_perturbation_does_not_depend_on_the_scale_of_the_loss(scale):
    tx: Any = sam(RHO)
    w = jnp.asarray(W)
    points = []

    def grad_fn(params):
        points.append(params)
        return params

    tx.update(gradient(w) * scale, tx.init(w), w, grad_fn=grad_fn)
    np.testing.assert_allclose(np.linalg.norm(points[0] - w), RHO, rtol=1e-5)
    g = numpy_sam(W, RHO)[0]
    np.testing.assert_allclose((points[0] - w) / RHO, g / np.linalg.norm(g), atol=1e-6)


def test_there_is_one_norm_over_all_leaves_of_any_pytree():
    params = {
        "kernel": (jnp.ones([2, 3]), 2 * jnp.ones(2)),
        "nothing": None,
        "scalar": jnp.float32(3.0),
    }

    def loss(params):
        return 0.5 * sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(params))

    tx: Any = sam(RHO)

    @jax.jit
    def update(params):
        grad_fn = jax.grad(loss)
        return tx.update(grad_fn(params), tx.init(params), params, grad_fn=grad_fn)

    updates, state = update(params)
    norm = np.sqrt(6 * 1 + 2 * 4 + 9)
    expected = jax.tree.map(lambda leaf: leaf * (1 + RHO / norm), params)
    assert signature(updates) == signature(params)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), updates, expected
    )
    np.testing.assert_allclose(state.metrics.gradient_norm, norm, rtol=1e-6)


def test_sam_of_zero_hands_the_gradient_through_and_never_calls_grad_fn():
    w = jnp.asarray(W)
    updates, _ = apply_sam(sam(0.0), w, grad_fn=never)
    assert_same_bits(updates, gradient(w))


def test_sam_of_zero_trains_as_no_sam_bit_for_bit():
    def train(tx, **extra):
        w, state = jnp.asarray(W), tx.init(jnp.asarray(W))
        for _ in range(3):
            updates, state = tx.update(gradient(w), state, w, **extra)
            w = optax.apply_updates(w, updates)
        return w

    descent = optax.sgd(0.05, momentum=0.9)
    assert_same_bits(
        train(optax.chain(sam(0.0), descent), grad_fn=never), train(descent)
    )


@pytest.mark.parametrize("jit", [False, True])
def test_a_zero_gradient_gives_a_zero_perturbation_and_no_nan(jit):
    tx: Any = sam(RHO)
    w = jnp.zeros(4)

    def update(w):
        return apply_sam(tx, w)

    updates, state = (jax.jit(update) if jit else update)(w)
    assert_same_bits(updates, jnp.zeros(4))
    assert_same_bits(
        state.metrics, TwoPassMetrics(*map(jnp.float32, (RHO, 0, 0, 0, 0)))
    )


def test_a_schedule_is_followed_by_the_number_of_updates():
    tx: Any = sam(lambda step: 0.1 * (step + 1))
    state = tx.init(jnp.asarray(W))
    for i in range(3):
        assert int(state.step) == i
        updates, state = apply_sam(tx, W, state)
        np.testing.assert_allclose(
            updates, numpy_sam(W, 0.1 * (i + 1))[1], rtol=2e-6, atol=1e-6
        )
        np.testing.assert_allclose(state.metrics.rho, 0.1 * (i + 1), rtol=1e-6)


def test_a_schedule_that_gives_zero_gives_the_plain_gradient_bit_for_bit():
    schedule: Any = optax.piecewise_constant_schedule(0.0, {2: 1.0})
    tx = sam(schedule)
    updates, state = jax.jit(lambda w: apply_sam(tx, w))(jnp.asarray(W))
    assert_same_bits(updates, jax.jit(gradient)(jnp.asarray(W)))
    assert float(state.metrics.rho) == 0


def test_where_a_schedule_gives_zero_the_second_pass_does_not_count():
    """Not even where it is random, as with dropout."""
    updates, _ = apply_sam(sam(lambda _: 0.0), W, grad_fn=lambda w: gradient(w) + 1)
    assert_same_bits(updates, gradient(jnp.asarray(W)))


def test_a_constant_schedule_equals_the_constant():
    constant, _ = apply_sam(sam(RHO), W)
    schedule: Any = optax.constant_schedule(RHO)
    scheduled, _ = apply_sam(sam(schedule), W)
    assert_same_bits(constant, scheduled)


def test_the_metrics_are_those_of_numpy():
    _, state = apply_sam(sam(RHO), W)
    g, perturbed = numpy_sam(W, RHO)
    norms = np.linalg.norm(g), np.linalg.norm(perturbed)
    cosine = float(g @ perturbed / np.prod(norms))
    expected = np.array([RHO, RHO, *norms, cosine])
    np.testing.assert_allclose(np.stack(state.metrics), expected, rtol=1e-6)
    assert 0.5 < cosine < 0.9999
    assert all(metric.dtype == jnp.float32 for metric in state.metrics)


def test_the_state_holds_no_copy_of_the_parameters():
    size = sum(leaf.size for leaf in jax.tree.leaves(sam(RHO).init(jnp.ones(1000))))
    assert size == 1 + len(TwoPassMetrics._fields)


def test_bfloat16_parameters_keep_their_dtype_and_the_norm_is_float32():
    w = jnp.ones(10000, jnp.bfloat16)  # a bfloat16 sum of 10000 ones ends at 256
    points = []

    def grad_fn(params):
        points.append(params)
        return params

    tx: Any = sam(100.0)
    updates, state = tx.update(w, tx.init(w), w, grad_fn=grad_fn)
    assert updates.dtype == points[0].dtype == jnp.bfloat16
    np.testing.assert_array_equal(points[0].astype(jnp.float32), 2.0)
    assert float(state.metrics.gradient_norm) == 100
    assert state.metrics.gradient_norm.dtype == jnp.float32


def test_mixed_dtypes_are_kept():
    params = {"low": jnp.ones(3, jnp.bfloat16), "high": jnp.ones(2)}
    tx: Any = sam(RHO)
    updates, _ = in_one_program(
        tx.update, params, tx.init(params), params, grad_fn=lambda p: p
    )
    assert signature(updates) == signature(params)


def test_unknown_extra_arguments_are_accepted():
    for rho in (RHO, 0.0):
        tx: Any = sam(rho)
        w = jnp.asarray(W)
        tx.update(
            gradient(w), tx.init(w), w, grad_fn=gradient, value=1.0, anything=None
        )


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize(
    ("value", "dtype", "applied"),
    [
        (1.0, jnp.bfloat16, 0.0),  # half a unit in the last place is 2^-9
        (1.0, jnp.float16, 2.0**-9),  # 2^-10.01 is rounded up to 2^-10
        (1e8, jnp.float32, 0.0),
        (0.0, jnp.bfloat16, 0.00194),
    ],
)
def test_a_perturbation_that_rounds_away_shows_in_the_metrics(
    value, dtype, applied, jit
):
    tx: Any = sam(0.00194)
    points = []

    def update(w):
        def grad_fn(params):
            points.append(params)
            return params

        return tx.update(jnp.ones_like(w), tx.init(w), w, grad_fn=grad_fn)[1].metrics

    w = jnp.full(4, value, dtype)
    metrics = (jax.jit(update) if jit else update)(w)
    np.testing.assert_allclose(metrics.applied_rho, applied, rtol=2e-3)
    assert metrics.rho == np.float32(0.00194)
    if not jit:
        moved = np.linalg.norm((points[0] - w).astype(jnp.float32))
        np.testing.assert_allclose(moved, applied, rtol=2e-3)


def test_a_half_precision_perturbation_is_rounded_once():
    """1 + 2^-8 + 2^-9 is 1 + 2^-7 in bfloat16; e alone rounded first is a tie."""
    points = []
    w = jnp.array([1.0], jnp.bfloat16)
    tx: Any = sam(2.0**-8 + 2.0**-17)
    tx.update(w, tx.init(w), w, grad_fn=lambda p: points.append(p) or p)
    assert float(points[0][0]) == 1 + 2.0**-7


@pytest.mark.parametrize(
    "make",
    [lambda: sam(0.1), lambda: rwp(0.1, threshold=99.0)],
    ids=["sam", "rwp"],
)
def test_uphill_is_uphill_for_a_complex_parameter_too(make):
    target = jnp.array([[1.0, 2.0], [-0.5, 0.25]])

    def losses(pair):
        return jnp.sum((pair - target) ** 4, axis=1)

    def as_pair(z):
        return jnp.stack([z["w"].real, z["w"].imag], axis=-1).reshape(2, 2)

    pair = jnp.array([[3.0, 3.5], [0.7, -1.0]])
    z = {"w": jax.lax.complex(pair[:, :1], pair[:, 1:])}
    found = []
    for params, measure in ((z, lambda z: losses(as_pair(z))), (pair, losses)):
        grad_fn = lambda p, measure=measure: jax.tree.map(  # noqa: E731
            jnp.conj, jax.grad(lambda p: jnp.mean(measure(p)))(p)
        )
        tx = make()
        extra = {"grad_fn": grad_fn, "loss_fn": measure}
        grads = in_one_program(grad_fn, params)
        updates, _ = in_one_program(tx.update, grads, tx.init(params), params, **extra)
        found.append(updates)
    np.testing.assert_allclose(as_pair(found[0]), found[1], rtol=1e-5)


def test_the_derivative_of_a_norm_at_zero_is_zero():
    derivative = jax.jit(jax.grad(norm))
    for point in ([0.0, 3.0, 4.0], [0.0, 0.0], [1e-30, 0.0], [3e30, 4e30]):
        length = math.hypot(*point)
        expected = [x / length if length else 0.0 for x in point]
        slope = derivative(np.array(point, np.float32))
        np.testing.assert_allclose(slope, expected, rtol=1e-6)
    assert np.isnan(norm(jnp.array([np.nan, 1.0])))


def test_a_complex_parameter_is_a_pair_of_real_ones():
    """Gradients are conjugated on their way to the optimizer, as optax has it."""
    matrix = jnp.asarray(A[:3] + 1j * ROOT[:3], jnp.complex64)

    def loss(params):
        return jnp.sum(jnp.abs(matrix @ params["z"] - 1) ** 2) + params["x"] ** 2

    def conjugate(params):
        return jax.tree.map(jnp.conj, jax.grad(loss)(params))

    def of_pair(pair):
        z = jax.lax.complex(pair["real"], pair["imaginary"])
        return loss({"z": z, "x": pair["x"]})

    z = jnp.asarray(W + 1j * W[::-1], jnp.complex64)
    params = {"z": z, "x": jnp.float32(0.5)}
    pair = {"real": z.real, "imaginary": z.imag, "x": jnp.float32(0.5)}
    tx: Any = sam(RHO)

    def update(w, grad_fn):
        return tx.update(grad_fn(w), tx.init(w), w, grad_fn=grad_fn)

    found, state = in_one_program(update, params, conjugate)
    expected, other = in_one_program(update, pair, jax.grad(of_pair))
    assert found["z"].dtype == jnp.complex64
    np.testing.assert_allclose(found["z"].real, expected["real"], rtol=1e-5)
    np.testing.assert_allclose(found["z"].imag, expected["imaginary"], rtol=1e-5)
    np.testing.assert_allclose(found["x"], expected["x"], rtol=1e-5)
    np.testing.assert_allclose(np.stack(state.metrics), np.stack(other.metrics), 1e-5)


# Frozen parameters

LABELS = {"a": "train", "b": "freeze"}


def of_pair(params):
    return jnp.sum(jnp.cos(params["a"])) * jnp.sum(params["b"] ** 2)


def pair_gradient(params):
    return jax.grad(of_pair)(params)


def step_of_pair(tx: Any, grads, grad_fn) -> Any:
    return tx.update(grads, tx.init(PAIR), PAIR, grad_fn=grad_fn)[0]


def frozen_by_hand():
    """The step of `a` alone, with `b` a constant."""

    def own(a):
        return pair_gradient(PAIR | {"a": a})["a"]

    tx: Any = optax.chain(sam(RHO), optax.sgd(0.1))
    a = PAIR["a"]
    return tx.update(own(a), tx.init(a), a, grad_fn=own)[0]


def test_frozen_parameters_stay_out_of_sam_where_their_gradients_are_none():
    def grad_fn(params):
        np.testing.assert_array_equal(params["b"], PAIR["b"])
        return pair_gradient(params) | {"b": None}

    tx = optax.chain(sam(RHO), optax.sgd(0.1))
    updates = step_of_pair(tx, grad_fn(PAIR), grad_fn)
    assert updates["b"] is None
    np.testing.assert_allclose(updates["a"], frozen_by_hand(), rtol=1e-6)


def test_frozen_parameters_stay_out_of_sam_where_their_gradients_are_zero():
    tx = optax.chain(
        optax.masked(optax.set_to_zero(), {"a": False, "b": True}),
        sam(RHO),
        optax.partition(
            {"train": optax.sgd(0.1), "freeze": optax.set_to_zero()}, LABELS
        ),
    )
    updates = step_of_pair(tx, pair_gradient(PAIR), pair_gradient)
    np.testing.assert_array_equal(updates["b"], 0)
    np.testing.assert_allclose(updates["a"], frozen_by_hand(), rtol=1e-6)


@pytest.mark.parametrize(
    "tx",
    [
        optax.masked(sam(RHO), {"a": True, "b": False}),
        optax.partition(
            {
                "train": optax.chain(sam(RHO), optax.sgd(0.1)),
                "freeze": optax.set_to_zero(),
            },
            LABELS,
        ),
    ],
)
def test_sam_inside_of_a_mask_says_where_it_belongs(tx):
    message = r"^Expected the gradients of all .*leaf=\"\['b'\]\".* after the sharp"
    with pytest.raises(ValueError, match=message):
        step_of_pair(tx, pair_gradient(PAIR), pair_gradient)


# The auxiliary output

AUX = {"mean": np.zeros(4, np.float32), "steps": np.int32(0)}


def grad_and_aux(w):
    return gradient(w), {"mean": w, "steps": jnp.int32(7)}


def test_the_last_aux_is_that_of_the_perturbed_point():
    tx: Any = sam(RHO, aux=AUX)
    updates, state = apply_sam(tx, W, grad_fn=grad_and_aux)
    g, perturbed = numpy_sam(W, RHO)
    np.testing.assert_allclose(updates, perturbed, rtol=2e-6)
    aux = last_aux(state)
    np.testing.assert_allclose(aux["mean"], W + RHO * g / np.linalg.norm(g), rtol=1e-6)
    assert int(aux["steps"]) == 7


@pytest.mark.parametrize("abstract", [False, True])
def test_the_state_has_the_same_signature_before_and_after_an_update(abstract):
    aux = jax.eval_shape(lambda: AUX) if abstract else AUX
    tx: Any = sam(RHO, aux=aux)
    state = tx.init(jnp.asarray(W))
    _, after = apply_sam(tx, W, state, lambda w: (gradient(w), AUX | {"steps": 7}))
    assert signature(state) == signature(after)


def test_metrics_and_aux_are_found_in_a_nested_chain():
    w = jnp.asarray(W)
    inner = optax.chain(sam(RHO, aux=AUX), optax.sgd(0.1, momentum=0.9))
    masked = optax.masked(optax.add_decayed_weights(1e-3), mask=True)
    tx: Any = optax.chain(optax.chain(optax.identity(), inner), masked)
    _, state = tx.update(gradient(w), tx.init(w), w, grad_fn=grad_and_aux)
    g, _ = numpy_sam(W, RHO)
    metrics = last_metrics(state)
    assert list(metrics) == list(TwoPassMetrics._fields)
    np.testing.assert_allclose(metrics["gradient_norm"], np.linalg.norm(g), rtol=1e-6)
    assert int(last_aux(state)["steps"]) == 7


def test_without_sam_there_are_no_metrics_and_the_default_aux():
    for tx in (optax.sgd(0.1), sam(0.0), optax.chain(sam(0.0), optax.sgd(0.1))):
        state = tx.init(jnp.asarray(W))
        assert last_metrics(state) == {}
        assert last_aux(state) is None
        assert last_aux(state, default="clean") == "clean"
    assert last_aux(sam(RHO).init(jnp.asarray(W)), default="clean") == "clean"


# In optax's and JAX's machinery


def momentum_loop(num_steps, rho, decay=0.01, rate=0.05, clip=np.inf):
    """SAM, clipping, weight decay at w, momentum and the learning rate, in NumPy."""
    w, trace = W.astype(np.float64), 0
    for _ in range(num_steps):
        perturbed = numpy_sam(w, rho)[1]
        perturbed = perturbed * min(1, clip / np.linalg.norm(perturbed))
        trace = 0.9 * trace + perturbed + decay * w
        w = w - rate * trace
    return w


def full_chain(clip=1e9, aux=None) -> Any:
    return optax.chain(
        sam(RHO, aux=aux),
        optax.clip_by_global_norm(clip),
        optax.add_decayed_weights(0.01),
        optax.sgd(0.05, momentum=0.9),
    )


def make_step(tx: Any, grad_fn=gradient) -> Any:
    def step(w, state):
        updates, state = tx.update(gradient(w), state, w, grad_fn=grad_fn)
        return optax.apply_updates(w, updates), state

    return step


@pytest.mark.parametrize("clip", [1.0, 1e9])
def test_a_chain_with_clipping_decay_and_momentum_acts_at_the_restored_weights(clip):
    tx: Any = full_chain(clip)
    step = jax.jit(make_step(tx))
    w, state = jnp.asarray(W), tx.init(jnp.asarray(W))
    for _ in range(4):
        w, state = step(w, state)
    np.testing.assert_allclose(w, momentum_loop(4, RHO, clip=clip), rtol=2e-5)


def test_a_chain_with_adam_gets_the_perturbed_gradient():
    tx: Any = optax.chain(sam(RHO), optax.adam(0.1))
    adam = optax.adam(0.1)
    w = jnp.asarray(W)
    updates, _ = tx.update(gradient(w), tx.init(w), w, grad_fn=gradient)
    perturbed = jnp.asarray(numpy_sam(W, RHO)[1], jnp.float32)
    expected: Any = adam.update(perturbed, adam.init(w), w)[0]
    np.testing.assert_allclose(updates, expected, rtol=1e-5)


def test_parameter_groups_after_sam_get_their_part_of_one_perturbed_gradient():
    w = {"fast": jnp.asarray(W[:2]), "slow": jnp.asarray(W[2:])}

    def loss(w):
        return quadratic(jnp.concatenate([w["fast"], w["slow"]]))

    groups = optax.multi_transform(
        {"a": optax.sgd(1.0), "b": optax.sgd(0.1)}, {"fast": "a", "slow": "b"}
    )
    tx: Any = optax.chain(sam(RHO), groups)
    updates, _ = tx.update(jax.grad(loss)(w), tx.init(w), w, grad_fn=jax.grad(loss))
    _, perturbed = numpy_sam(W, RHO)
    np.testing.assert_allclose(updates["fast"], -perturbed[:2], rtol=2e-6)
    np.testing.assert_allclose(updates["slow"], -0.1 * perturbed[2:], rtol=2e-6)


class MicroBatches:
    """Two micro-batches of a loss whose gradients differ, and steps over them."""

    batches = np.random.default_rng(0).standard_normal([2, 6, 4]).astype(np.float32)

    @staticmethod
    def gradient(w, batch):
        def loss(w):
            return quadratic(w) + jnp.mean(jnp.sum(jnp.cos(batch * w), -1))

        return jax.grad(loss)(w)

    def in_one_step(self, tx: Any, grad_fn) -> Any:
        @jax.jit
        def step(w):
            updates, _ = tx.update(grad_fn(w), tx.init(w), w, grad_fn=grad_fn)
            return optax.apply_updates(w, updates)

        return step(W)

    def whole(self, w):
        return self.gradient(w, self.batches.reshape(12, 4))

    def of_groups(self, w):
        own = jnp.broadcast_to(w, (2, 4))
        return jax.vmap(self.gradient)(own, self.batches)

    def one_by_one(self, tx: Any, *, spanning: bool = False) -> tuple[Any, Any]:
        """Of `MultiSteps`; `grad_fn` is of the micro-batch, or spans both."""
        current, state = jnp.asarray(W), tx.init(jnp.asarray(W))

        @jax.jit
        def step(current, state, batch):
            def own(w):
                return self.gradient(w, batch)

            grad_fn = self.whole if spanning else own
            updates, state = tx.update(own(current), state, current, grad_fn=grad_fn)
            return optax.apply_updates(current, updates), state

        for i, batch in enumerate(self.batches):
            assert_same_bits(current, jnp.asarray(W))
            current, state = step(current, state, batch)
            assert int(last_metrics(state)["rho"] > 0) or i == 0
        return current, state


def descent() -> Any:
    return optax.chain(optax.add_decayed_weights(0.01), optax.sgd(0.05, momentum=0.9))


def test_sam_outside_of_accumulation_is_the_large_batch_in_groups():
    micro = MicroBatches()
    accumulated = optax.MultiSteps(descent(), every_k_schedule=2)
    tx = optax.chain(sam(RHO), accumulated.gradient_transformation())
    found, state = micro.one_by_one(tx)
    grouped = optax.chain(sam(RHO, grouped=True), descent())
    expected = micro.in_one_step(grouped, micro.of_groups)
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    assert int(state[0].step) == 2  # a schedule counts micro-batches


def test_sam_inside_of_accumulation_is_the_large_batch_if_grad_fn_spans_all_of_it():
    micro = MicroBatches()
    inner = optax.chain(sam(RHO), descent())
    tx = optax.MultiSteps(inner, every_k_schedule=2)
    found, _ = micro.one_by_one(tx, spanning=True)
    expected = micro.in_one_step(inner, micro.whole)
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    wrong, _ = micro.one_by_one(tx)  # a silent other step: the last micro-batch's
    assert np.abs(wrong - expected).max() > 1e-2


def test_msam_inside_of_accumulation_takes_all_gradients_at_the_moved_weights():
    """In NumPy's float64: three updates of two micro-batches each."""
    batches, (lr, momentum, decay) = np.asarray(MicroBatches.batches), (0.05, 0.9, 0.01)
    w, v, e = W.astype(np.float64), np.zeros(4), np.zeros(4)
    for _ in range(3):
        grads = [A @ (w + e) - np.mean(b * np.sin(b * (w + e)), 0) for b in batches]
        v = momentum * v + np.mean(grads, 0) + decay * (w + e)
        w, e = w - lr * v, -RHO * v / np.linalg.norm(v)

    tx: Any = optax.MultiSteps(msam(RHO, descent()), every_k_schedule=2)
    found: Any = jnp.asarray(W)
    state = tx.init(found)

    @jax.jit
    def step(w, state, batch):
        grads = MicroBatches.gradient(gradient_point(w, state), batch)
        updates, state = tx.update(grads, state, w)
        return optax.apply_updates(w, updates), state

    for batch in np.tile(batches, (3, 1, 1)):
        found, state = step(found, state, batch)
    np.testing.assert_allclose(found, w, rtol=1e-5)
    np.testing.assert_allclose(gradient_point(found, state), w + e, rtol=1e-5)


def far_from_one(params: Any) -> Any:
    return sum(jnp.sum(jnp.square(leaf - 1)) for leaf in jax.tree.leaves(params))


@pytest.mark.parametrize("wrap", ["masked", "partition"])
def test_a_method_that_looks_ahead_leaves_frozen_weights_where_they_are(wrap):
    params: Any = {"a": jnp.arange(3.0), "b": jnp.ones(2) * 5}
    method: Any = msam(RHO, optax.sgd(0.1, momentum=0.9))
    if wrap == "masked":
        trained, frozen = {"a": True, "b": False}, {"a": False, "b": True}
        tx: Any = optax.chain(
            optax.masked(method, trained), optax.masked(optax.set_to_zero(), frozen)
        )
    else:
        kinds: Any = {"x": method, "y": optax.set_to_zero()}
        tx = optax.partition(kinds, {"a": "x", "b": "y"})
    alone, state, alone_state = params["a"], tx.init(params), method.init(params["a"])
    for _ in range(3):
        point = gradient_point(params, state)
        updates, state = tx.update(jax.grad(far_from_one)(point), state, params)
        params = optax.apply_updates(params, updates)
        grad = jax.grad(far_from_one)(gradient_point(alone, alone_state))
        update, alone_state = method.update(grad, alone_state, alone)
        alone = optax.apply_updates(alone, update)
    np.testing.assert_array_equal(params["a"], alone)
    np.testing.assert_array_equal(params["b"], 5)


def test_a_method_that_looks_ahead_works_in_flax_nnx_and_with_leaves_of_any_kind():
    model = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
    method: Any = msam(RHO, optax.sgd(0.1, momentum=0.9))
    optimizer = nnx.Optimizer(model, method, wrt=nnx.Param)
    for _ in range(2):
        optimizer.update(model, nnx.grad(lambda m: jnp.sum(m.kernel[...] ** 2))(model))
    point = gradient_point(nnx.state(model, nnx.Param), optimizer.opt_state)
    moved = (
        jax.tree.leaves(point)[-1] - jax.tree.leaves(nnx.state(model, nnx.Param))[-1]
    )
    np.testing.assert_allclose(jnp.linalg.norm(moved), RHO, rtol=1e-5)

    weights: Any = {"w": jnp.ones(2), "activation": jnp.tanh}
    arrays: Any = {"w": weights["w"], "activation": None}
    state = method.init(arrays)
    _, state = method.update(arrays, state, arrays)
    point = gradient_point(weights, state)
    assert point["activation"] is jnp.tanh
    assert np.all(point["w"] != weights["w"])


def test_an_ascent_may_have_a_memory_of_named_parameters():
    def init(params):
        return jnp.zeros_like(params["a"])

    def update(updates, state, _=None, **extra_args):
        return jax.tree.map(lambda g: extra_args["rho"] * g, updates), state + 1

    advance: Any = update
    ascent: Any = optax.GradientTransformationExtraArgs(init, advance)
    params = {"a": jnp.ones(3)}
    tx: Any = two_pass(0.1, ascent)
    grad = jax.grad(far_from_one)
    _, state = tx.update(grad(params), tx.init(params), params, grad_fn=grad)
    np.testing.assert_array_equal(state.ascent, 1)


def test_msam_outside_of_accumulation_is_refused():
    steps = optax.MultiSteps(descent(), every_k_schedule=2)
    inner = optax.chain(optax.clip(1.0), steps.gradient_transformation())
    with pytest.raises(ValueError, match=r"moves at every update.*MultiSteps\(msam"):
        msam(RHO, inner).init(jnp.asarray(W))


def test_a_constructor_in_place_of_an_optimizer_is_refused():
    constructor: Any = optax.sgd
    with pytest.raises(ValueError, match=r"transformation, got optimizer=<.*sgd\(0\.1"):
        msam(RHO, constructor)


def test_jit_does_not_change_the_step_and_traces_it_once():
    tx: Any = full_chain(aux=AUX)
    traces = []

    def step(w, state):
        traces.append(1)
        return make_step(tx, grad_and_aux)(w, state)

    w, state = jnp.asarray(W), tx.init(jnp.asarray(W))
    eager, _ = step(w, state)
    jitted = jax.jit(step)
    traces.clear()
    first, state = jitted(w, state)
    np.testing.assert_allclose(first, eager, rtol=1e-6)
    jitted(*jitted(first, state))
    assert len(traces) == 1


def test_a_scan_over_steps_equals_the_loop():
    tx: Any = full_chain(aux=AUX)
    step = make_step(tx, grad_and_aux)

    @jax.jit
    def train(w):
        def body(carry, _):
            return step(*carry), last_metrics(carry[1])["cosine"]

        return jax.lax.scan(body, (w, tx.init(w)), length=4)

    (w, state), cosines = train(jnp.asarray(W))
    np.testing.assert_allclose(w, momentum_loop(4, RHO), rtol=2e-5)
    assert int(state[0].step) == 4
    assert np.all(np.asarray(cosines[1:]) > 0)


def test_an_ascent_with_a_memory_keeps_it_in_the_precision_of_its_gradients():
    """Half precision, so that a scan finds the types of the carry again."""

    def init(params):
        return optax.tree.zeros_like(params)

    def update(updates, state, params=None, **extra):
        del params
        state = jax.tree.map(lambda m, g: 0.5 * m + g, state, updates)
        return jax.tree.map(lambda m: extra["rho"] * jnp.sign(m), state), state

    tx: Any = two_pass(0.25, optax.GradientTransformationExtraArgs(init, update))
    w = {"half": jnp.ones(2, jnp.bfloat16), "full": jnp.ones(3)}

    def grad_fn(w):
        return jax.tree.map(lambda leaf: 2 * leaf, w)

    def step(state, _):
        updates, state = tx.update(grad_fn(w), state, w, grad_fn=grad_fn)
        return state, updates

    state: Any
    updates: Any
    state, updates = jax.lax.scan(step, tx.init(w), length=2)
    assert state.ascent["half"].dtype == jnp.float32
    np.testing.assert_array_equal(state.ascent["full"], 3.0)
    np.testing.assert_array_equal(updates["half"], 2.5)


def test_the_biases_of_asam_are_found_on_the_paths_of_every_library():
    layer = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    linen = {"bias_free": {"bias": 0, "kernel": 0}}
    for tree in (nnx.state(layer), nnx.to_pure_dict(nnx.state(layer)), linen):
        paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(tree)]
        found = [is_bias(path) for path in paths]
        assert found == [True, False], paths
    for attribute in ("value", "raw_value"):  # as versions of Flax name it
        path = jax.tree_util.DictKey("bias"), jax.tree_util.GetAttrKey(attribute)
        assert is_bias(path)
    assert not is_bias(())


def test_the_step_may_be_donated_its_parameters_and_state():
    """JAX warns of donated buffers that it cannot use."""
    tx: Any = full_chain(aux=AUX)
    w = jnp.array(W)
    state = tx.init(w)
    step = jax.jit(make_step(tx, grad_and_aux), donate_argnums=(0, 1))
    donated = (w, state[0].step, state[-1])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        w, state = step(w, state)
        w, state = step(w, state)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(donated))
    np.testing.assert_allclose(w, momentum_loop(2, RHO), rtol=2e-5)


def test_the_state_survives_flax_serialization_bit_for_bit():
    tx: Any = full_chain(aux=AUX)
    w, state = make_step(tx, grad_and_aux)(jnp.asarray(W), tx.init(jnp.asarray(W)))
    stored = flax.serialization.to_bytes(state)
    restored: Any = flax.serialization.from_bytes(tx.init(w), stored)
    assert isinstance(restored[0], TwoPassState)
    assert_same_bits(restored, state)


def test_training_resumes_from_an_orbax_checkpoint_bit_for_bit(tmp_path):
    tx: Any = full_chain(aux=AUX)
    step = jax.jit(make_step(tx, grad_and_aux))
    w, state = step(jnp.asarray(W), tx.init(jnp.asarray(W)))
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", (w, state))
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "state", (w, tx.init(w)))
    assert_same_bits(restored, (w, state))
    assert_same_bits(step(*restored), step(w, state))


# Messages


@pytest.mark.parametrize(
    "rho",
    [-0.1, float("inf"), jnp.nan, np.float32(-1), np.array(-1), jnp.array(jnp.nan)],
    ids=repr,
)
def test_a_negative_or_infinite_rho_is_refused_whatever_holds_it(rho):
    with pytest.raises(ValueError, match=r"^Expected 0 <= rho < inf, got rho=[-\w.]+$"):
        sam(rho)


@pytest.mark.parametrize(
    "rho", ["0.1", None, True, 1j, np.array([0.1]), jnp.zeros([2, 1]), np.bool_(1)]
)
def test_a_rho_that_is_no_real_scalar_is_refused(rho):
    message = (
        "^Expected rho to be a real number, an array of rank 0, or a schedule, got"
    )
    with pytest.raises(ValueError, match=message):
        sam(rho)

    def schedule(_) -> Any:
        return rho

    with pytest.raises(
        ValueError, match=r"^Expected a schedule of rho to return a real"
    ):
        apply_sam(sam(schedule), W)


def test_a_traced_rho_is_a_radius_and_its_rank_is_known():
    found = jax.jit(lambda rho: apply_sam(sam(rho), W)[0])(RHO)
    np.testing.assert_allclose(found, apply_sam(sam(RHO), W)[0], rtol=1e-6)
    with pytest.raises(
        ValueError, match=r"Expected rho to be .* got rho='float32\[2\]'"
    ):
        jax.jit(lambda rho: apply_sam(sam(rho), W)[0])(jnp.ones(2))


def test_rho_may_be_a_hyperparameter_that_is_set_between_steps():
    tx: Any = optax.inject_hyperparams(sam)(rho=0.0)
    state = tx.init(jnp.asarray(W))
    step = jax.jit(lambda state: apply_sam(tx, W, state))
    np.testing.assert_allclose(step(state)[0], gradient(W), rtol=1e-6)
    state.hyperparams["rho"] = jnp.float32(RHO)
    np.testing.assert_allclose(step(state)[0], numpy_sam(W, RHO)[1], rtol=2e-6)


def test_a_nan_from_a_schedule_does_not_pass_for_no_sam():
    updates, state = apply_sam(sam(lambda _: jnp.nan), W)
    assert np.all(np.isnan(updates))
    assert np.isnan(state.metrics.rho)


PAIR = {"a": np.ones(4, np.float32), "b": np.ones([2, 3], np.float32)}
NOT_OF_PAIR = {
    "without a leaf": ({"a": PAIR["a"]}, "of the structure of the parameters"),
    "of another shape": (
        PAIR | {"a": PAIR["a"][:3]},
        r"leaf=\"\['a'\]\", .*float32\[3\]",
    ),
    "that would broadcast": (PAIR | {"a": np.float32(1)}, r"gradient='float32\[\]'"),
    "of groups": (
        PAIR | {"b": np.stack([PAIR["b"]] * 5)},
        r"float32\[5,2,3\].*grouped=True",
    ),
    "complex of real": (PAIR | {"b": 1j * PAIR["b"]}, "both real or both complex"),
    "integers": (PAIR | {"a": np.arange(4, dtype=np.int32)}, r"gradient='int32\[4\]'"),
    "of integers": (PAIR | {"a": np.zeros(4, jax.dtypes.float0)}, "float0"),
    "a string": (PAIR | {"a": "x"}, "gradient='str'"),
    "masked": (
        PAIR | {"a": optax.MaskedNode()},
        "optax.masked.* after the sharpness .* not around",
    ),
}


@pytest.mark.parametrize("name", NOT_OF_PAIR)
def test_gradients_that_are_not_those_of_the_parameters_are_refused(name):
    grads, message = NOT_OF_PAIR[name]
    tx: Any = sam(RHO)
    with pytest.raises(ValueError, match=rf"^Expected .*{message}.*$"):
        tx.update(grads, tx.init(PAIR), PAIR, grad_fn=never)


def test_an_update_without_params_or_grad_fn_says_how_to_call_it():
    tx: Any = sam(RHO)
    w = jnp.asarray(W)
    fix = r"Call `tx\.update\(grads, opt_state, params, grad_fn=grad_fn\)`\. Flax's"
    with pytest.raises(ValueError, match=rf"params in the update, .*None\. {fix}"):
        tx.update(gradient(w), tx.init(w), grad_fn=gradient)
    with pytest.raises(ValueError, match=rf"grad_fn in the update, .*None\. {fix}"):
        tx.update(gradient(w), tx.init(w), w)


# Groups: m-sharpness

MATRICES = np.stack([A, A @ A / 4, np.eye(4, dtype=np.float32)])


def group_gradients(w):
    """Of the quadratics of three groups; w is [4], or [3, 4]: of each its own."""
    return jnp.einsum("gij,gj->gi", MATRICES, jnp.broadcast_to(w, (3, 4)))


def apply_grouped(tx: Any, w, grad_fn=group_gradients, grads=None) -> tuple[Any, Any]:
    w = jnp.asarray(w)
    grads = group_gradients(w) if grads is None else grads
    return tx.update(grads, tx.init(w), w, grad_fn=grad_fn)


def numpy_groups(w, rho):
    """What `numpy_sam` says of each group, stacked."""
    pairs = [numpy_sam(w, rho, matrix) for matrix in MATRICES]
    return tuple(np.stack(each) for each in zip(*pairs, strict=True))


@pytest.mark.parametrize("rho", [1e-3, 1.0])
def test_every_group_is_perturbed_along_its_own_gradient_and_the_mean_descends(rho):
    updates, state = in_one_program(apply_grouped, sam(rho, grouped=True), W)
    g, perturbed = numpy_groups(W, rho)
    np.testing.assert_allclose(updates, perturbed.mean(0), rtol=2e-6, atol=1e-6)
    norms = np.linalg.norm(g, axis=1), np.linalg.norm(perturbed, axis=1)
    cosines = np.sum(g * perturbed, axis=1) / np.prod(norms, axis=0)
    expected = [rho, rho, norms[0].mean(), norms[1].mean(), cosines.mean()]
    np.testing.assert_allclose(np.stack(state.metrics), expected, rtol=1e-6, atol=1e-7)


def test_a_single_group_is_sam_without_groups():
    grouped, state = in_one_program(
        *(apply_grouped, sam(RHO, grouped=True), W),
        grad_fn=lambda w: gradient(w[0])[None],
        grads=gradient(jnp.asarray(W))[None],
    )
    plain, plain_state = apply_sam(sam(RHO), W)
    np.testing.assert_allclose(grouped, plain, rtol=1e-6)
    np.testing.assert_allclose(
        np.stack(state.metrics), np.stack(plain_state.metrics), rtol=1e-6
    )


def test_sam_of_zero_hands_the_mean_of_the_groups_through():
    updates, _ = apply_grouped(sam(0.0, grouped=True), W, grad_fn=never)
    assert_same_bits(updates, jnp.mean(group_gradients(jnp.asarray(W)), axis=0))


def test_where_a_schedule_gives_zero_the_mean_of_the_groups_descends():
    tx = sam(lambda _: 0.0, grouped=True)
    updates, _ = in_one_program(
        apply_grouped, tx, W, grad_fn=lambda w: group_gradients(w) + 1
    )
    assert_same_bits(updates, jnp.mean(group_gradients(jnp.asarray(W)), axis=0))


def test_a_group_whose_gradient_is_zero_stays_where_it_is():
    grads = group_gradients(jnp.asarray(W)).at[1].set(0)
    points = []

    def grad_fn(params):
        points.append(params)
        return group_gradients(params).at[1].set(jnp.nan)

    updates, _ = apply_grouped(sam(RHO, grouped=True), W, grad_fn, grads)
    np.testing.assert_array_equal(points[0][1], W)
    _, perturbed = numpy_groups(W, RHO)
    expected = (perturbed[0] + perturbed[2]) / 3
    np.testing.assert_allclose(updates, expected, rtol=2e-6)
    lengths = np.linalg.norm(points[0] - W, axis=1)
    np.testing.assert_allclose(lengths, [RHO, 0, RHO], rtol=1e-5)


def test_a_group_has_one_norm_over_all_leaves_and_keeps_their_dtypes():
    params = {"a": jnp.ones([2, 3]), "b": jnp.ones(4, jnp.bfloat16)}
    tx: Any = sam(RHO, grouped=True)

    @jax.jit
    def update(params):
        grads = jax.tree.map(lambda w: jnp.stack([w, 3 * w]), params)
        points = []

        def grad_fn(params):
            points.append(params)
            return params

        return points, tx.update(grads, tx.init(params), params, grad_fn=grad_fn)

    points, (updates, state) = update(params)
    step = 1 + RHO / np.sqrt(
        10
    )  # of both groups: the length of a gradient is no matter
    np.testing.assert_allclose(points[0]["a"], np.full([2, 2, 3], step), rtol=1e-6)
    np.testing.assert_allclose(points[0]["b"].astype(float), step, rtol=1e-2)
    assert signature(updates) == signature(params)
    np.testing.assert_allclose(state.metrics.gradient_norm, 2 * np.sqrt(10), rtol=1e-6)


def test_the_aux_of_groups_is_kept_as_it_comes():
    tx: Any = sam(RHO, aux=AUX, grouped=True)

    def grad_fn(params):
        return group_gradients(params), {"mean": params[2], "steps": jnp.int32(7)}

    _, state = apply_grouped(tx, W, grad_fn)
    assert signature(state) == signature(tx.init(jnp.asarray(W)))
    g = numpy_groups(W, RHO)[0][2]
    expected = W + RHO * g / np.linalg.norm(g)
    np.testing.assert_allclose(last_aux(state)["mean"], expected, rtol=1e-6)


def test_a_chain_over_groups_decays_and_moves_the_parameters_themselves():
    tx: Any = optax.chain(
        sam(RHO, grouped=True),
        optax.add_decayed_weights(0.01),
        optax.sgd(0.05, momentum=0.9),
    )

    @jax.jit
    def step(w, state):
        updates, state = tx.update(
            group_gradients(w), state, w, grad_fn=group_gradients
        )
        return optax.apply_updates(w, updates), state

    w, state = jnp.asarray(W), tx.init(jnp.asarray(W))
    expected, trace = W.astype(np.float64), 0
    for _ in range(4):
        w, state = step(w, state)
        descent = numpy_groups(expected, RHO)[1].mean(0)
        trace = 0.9 * trace + descent + 0.01 * expected
        expected = expected - 0.05 * trace
    np.testing.assert_allclose(w, expected, rtol=2e-5)


def test_gradients_without_an_axis_of_groups_are_refused():
    message = (
        r"Expected a gradient \[G, \.\.\.\] of G groups for every parameter \[\.\.\.\] "
        r"with grouped=True, got .*gradient='float32\[4\]'.* Stack the gradients"
    )
    with pytest.raises(ValueError, match=message):
        apply_sam(sam(RHO, grouped=True), W)


def test_a_layer_with_weights_of_other_shapes_is_no_normalization():
    vector, kernel = jnp.ones(4), jnp.ones((4, 2))
    params = {
        "norm": {"scale": vector, "bias": vector},
        "own": {"scale": vector, "kernel": kernel},
        "dense": {"kernel": kernel, "bias": vector},
    }
    of = normalizations(params)
    assert {n: set(layer.values()) for n, layer in of.items()} == {
        "norm": {True},
        "own": {False},
        "dense": {False},
    }
    only = {"norm": params["norm"]}
    tx = fsam(0.1)
    with pytest.raises(ValueError, match=r"^Expected weights besides biases, .* fsam"):
        tx.update(only, tx.init(only), only, grad_fn=lambda params: params)


def test_where_no_layer_has_a_scale_sam_on_asks_which_are_meant():
    """As in Equinox, whose LayerNorm has a weight and a bias."""
    params = {"norm": {"weight": jnp.ones(4), "bias": jnp.ones(4)}}
    tx = sam_on(0.1)
    with pytest.raises(ValueError, match=r"^Expected .* normal.*say.* by `select`"):
        tx.update(params, tx.init(params), params, grad_fn=lambda params: params)


# Edges of the family


@pytest.mark.parametrize(("gamma", "size", "count"), [(0.5, 7, 3), (0.01, 6, 1)])
def test_esam_passes_again_over_the_whole_part_of_its_share_and_over_one_at_least(
    gamma, size, count
):
    inputs = np.random.default_rng(2).standard_normal((size, 4)).astype(np.float32)
    tx: Any = esam(RHO, beta=1.0, gamma=gamma)
    w, seen = jnp.asarray(W), []

    def losses(w):
        return 0.5 * (inputs @ w) ** 2

    def grad_fn(w, examples):
        seen.append(np.sort(examples))
        return jax.grad(lambda w: losses(w)[examples].mean())(w)

    grads = jax.grad(lambda w: losses(w).mean())(w)
    options = {"grad_fn": grad_fn, "loss_fn": losses, "losses": losses(w)}
    _, state = tx.update(grads, tx.init(w), w, **options)
    g = np.asarray(grads, np.float64)
    moved = W + RHO * g / np.linalg.norm(g)
    rises = 0.5 * (inputs @ moved) ** 2 - 0.5 * (inputs @ W) ** 2
    np.testing.assert_array_equal(seen[0], np.sort(np.argsort(-rises)[:count]))
    assert last_metrics(state)["chosen"] == count


def test_friendly_sam_stays_where_the_gradient_is_zero_whatever_it_remembers():
    tx: Any = friendly_sam(RHO)
    w, points = jnp.asarray(W), []

    def grad_fn(w):
        points.append(w)
        return jnp.full_like(w, jnp.nan)

    _, state = apply_sam(tx, w)
    updates, state = tx.update(jnp.zeros_like(w), state, w, grad_fn=grad_fn)
    assert_same_bits(points, [w])
    np.testing.assert_array_equal(updates, np.zeros(4))
    np.testing.assert_allclose(state.ascent, 0.9 * gradient(w), rtol=1e-6)


def test_a_mask_of_fsam_keeps_the_whole_part_of_its_share():
    w = {"kernel": jnp.array([[1.0, -5.0, 2.0, 4.0, 3.0]])}
    tx: Any = fsam(RHO, keep_ratio=0.5)
    points = []
    _, state = tx.update(w, tx.init(w), w, grad_fn=lambda w: points.append(w) or w)
    expected = RHO * np.array([[0.0, -5.0, 0.0, 4.0, 0.0]]) / np.sqrt(55)
    found = points[0]["kernel"] - w["kernel"]
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert last_metrics(state)["live"] == np.float32(2 / 5)


def test_looksam_remembers_no_direction_from_a_step_that_did_not_move():
    """The difference of equal gradients is rounding, and would be made as long."""
    tx: Any = looksam(lambda step: jnp.where(step == 0, 0.0, RHO), k=2)
    w = jnp.sin(jnp.arange(1.0, 100.0))
    state = tx.init(w)
    for _ in range(2):
        updates, state = tx.update(w, state, w, grad_fn=lambda w: w)
        np.testing.assert_array_equal(state.vertical, np.zeros(99))
        assert_same_bits(updates, w)


def test_the_metric_of_fisher_sam_is_that_of_its_ascent_in_half_precision():
    w, slope = jnp.ones(4, jnp.bfloat16), jnp.full(4, 0.05, jnp.bfloat16)
    tx: Any = fisher_sam(RHO)
    _, state = tx.update(slope, tx.init(w), w, grad_fn=lambda _: slope)
    expected = 1 / (1 + float(slope[0]) ** 2)
    assert last_metrics(state)["inverse_fisher"] == pytest.approx(expected, abs=1e-6)


def test_a_mask_that_ssam_draws_keeps_all_that_its_sparsity_leaves():
    """Ten times 1 - 0.9 is less than one, of which the whole part is none."""
    tx: Any = ssam("dynamic", RHO, sparsity=0.9, steps_per_epoch=2, total_steps=4)
    w = jnp.linspace(1, 2, 10)
    key = jax.random.key(0)
    _, state = tx.update(w, tx.init(w), w, grad_fn=lambda w: w, key=key)
    assert last_metrics(state)["live"] == np.float32(1 / 10)


def test_the_fisher_mask_of_a_batch_below_its_samples_counts_each_example_once():
    slopes = jnp.array([[3.0, 0.0], [0.0, 1.0]])  # of the losses, by example
    tx: Any = ssam("fisher", RHO, num_samples=16, steps_per_epoch=1, total_steps=2)
    w, points = jnp.ones(2), []

    def grad_fn(w, examples=slice(None)):
        points.append(w)
        return slopes[examples].mean(0)

    state = tx.init(w)
    for _ in range(2):  # the first mask is made in the second update
        options = {"grad_fn": grad_fn, "losses": slopes @ w}
        _, state = tx.update(slopes.mean(0), state, w, **options)
    expected = [1 + RHO * 3 / np.sqrt(10), 1.0]
    np.testing.assert_allclose(points[-1], expected, rtol=1e-6)


def test_a_loss_at_the_threshold_of_rwp_is_not_below_it():
    w, points = jnp.array([[2.0, 1.0]]), []
    tx: Any = rwp(RHO, threshold=2.0, num_steps=1)

    def grad_fn(w):
        points.append(w)
        return jnp.ones_like(w)

    options = {"grad_fn": grad_fn, "loss_fn": lambda w: w[0]}
    tx.update(jnp.ones_like(w), tx.init(w), w, **options)
    moved = RHO * np.sqrt(5)  # along the gradient of the second loss
    np.testing.assert_allclose(points[0], [[2.0, 1 + moved]], rtol=1e-6)


def test_a_negative_number_from_a_schedule_counts_as_zero():
    updates, state = apply_sam(sam(lambda _: -RHO), W)
    assert_same_bits(updates, gradient(jnp.asarray(W)))
    tx: Any = msam(lambda _: -RHO, optax.sgd(0.1))
    w = jnp.asarray(W)
    _, after = tx.update(gradient(w), tx.init(w), w)
    np.testing.assert_array_equal(after.offset, np.zeros(4))
    for measured in (state.metrics._asdict(), after.measured):
        assert (measured["rho"], measured["applied_rho"]) == (0, 0)


def test_msam_moves_on_by_what_its_schedule_says_of_the_updates_before():
    tx: Any = msam(lambda step: 0.1 * (step + 1), optax.sgd(0.1))
    w = jnp.asarray(W)
    state = tx.init(w)
    for radius in (0.1, 0.2):
        updates, state = tx.update(gradient(w), state, w)
        expected = radius * updates / np.linalg.norm(updates)
        np.testing.assert_allclose(state.offset, expected, rtol=1e-6)


def test_of_equal_scores_the_first_are_the_largest_and_nan_is_the_smallest():
    scores = {"a": jnp.array([jnp.nan, 1.0]), "b": jnp.array([2.0, 1.0])}
    masks = [largest(scores, count) for count in (1, 2, 3)]
    found = [[*mask["a"].tolist(), *mask["b"].tolist()] for mask in masks]
    no, yes = False, True
    assert found == [[no, no, yes, no], [no, yes, yes, no], [no, yes, yes, yes]]
