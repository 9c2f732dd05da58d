"""Our SAM against `optax.contrib.sam`, which is written quite differently.

Optax wraps two optimizers, of which the adversarial one descends by -rho along the
normalized gradient; ours is one transformation that comes first in a chain.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax import contrib

from samrobust.attacks.losses import cross_entropy
from samrobust.sharpness import sam

NUM_STEPS = 5
DESCENTS = {
    "SGD": lambda: optax.sgd(0.1),
    "SGD with momentum": lambda: optax.sgd(0.1, momentum=0.9),
    "SGD with weight decay": lambda: optax.chain(
        optax.add_decayed_weights(5e-4), optax.sgd(0.1, momentum=0.9)
    ),
}


def loss(params, images, labels):
    hidden = jax.nn.tanh(images @ params["hidden"]["kernel"] + params["hidden"]["bias"])
    return jnp.mean(cross_entropy(hidden @ params["head"], labels))


def initial_params(dtype):
    rng = np.random.default_rng(1)
    hidden = {"kernel": rng.normal(size=(8, 16)) / 3, "bias": np.zeros(16)}
    params = {"hidden": hidden, "head": rng.normal(size=(16, 3)) / 4}
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), params)


def batches(dtype):
    rng = np.random.default_rng(0)
    for _ in range(NUM_STEPS):
        yield (
            jnp.asarray(rng.standard_normal((32, 8)), dtype),
            jnp.asarray(rng.integers(0, 3, 32)),
        )


def train(tx, dtype=np.float32):
    """Parameters after the steps."""
    tx = optax.with_extra_args_support(tx)
    params = initial_params(dtype)
    opt_state = tx.init(params)

    @jax.jit
    def step(params, opt_state, batch):
        def grad_fn(params, _=None):  # optax also passes the pass's number
            return jax.grad(loss)(params, *batch)

        grads = grad_fn(params)
        updates, opt_state = tx.update(grads, opt_state, params, grad_fn=grad_fn)
        return optax.apply_updates(params, updates), opt_state

    for batch in batches(dtype):
        params, opt_state = step(params, opt_state, batch)
    return params


def largest_difference(first, second):
    gaps = jax.tree.map(lambda a, b: np.max(np.abs(np.subtract(a, b))), first, second)
    return max(map(float, jax.tree.leaves(gaps)))


# Two units in the last place.
PRECISIONS = {np.float32: 2.5e-7, np.float64: 5e-16}


@pytest.mark.parametrize("rho", [0.05, 1.0])
@pytest.mark.parametrize("descent", DESCENTS)
@pytest.mark.parametrize(("dtype", "tolerance"), PRECISIONS.items())
def test_sam_takes_the_steps_of_optax_opaque_sam(descent, rho, dtype, tolerance):
    with jax.enable_x64(dtype is np.float64):
        ours = train(optax.chain(sam(rho), DESCENTS[descent]()), dtype)
        theirs = train(
            contrib.sam(
                DESCENTS[descent](),
                optax.chain(contrib.normalize(), optax.sgd(rho)),
                sync_period=2,
                opaque_mode=True,
            ),
            dtype,
        )
        assert largest_difference(ours, theirs) <= tolerance


def test_sam_of_radius_zero_takes_the_steps_of_its_descent():
    descent = DESCENTS["SGD with momentum"]
    ours = train(optax.chain(sam(0.0), descent()))
    assert largest_difference(ours, train(descent())) == 0.0


def test_the_steps_differ_from_those_of_the_descent_alone():
    descent = DESCENTS["SGD with momentum"]
    ours = train(optax.chain(sam(0.2), descent()))
    assert largest_difference(ours, train(descent())) > 1e-3
