"""Our SAM against `optax.contrib.sam`, which is written quite differently.

Optax alternates or, in opaque mode, runs an adversarial chain `sgd(rho)` of normalised
gradients; ours is one gradient transformation that comes first in a chain.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax import contrib

from samrobust.objectives import cross_entropy
from samrobust.sharpness import sam

NUM_STEPS = 5
DESCENTS = {
    "SGD": lambda: optax.sgd(0.1),
    "SGD with momentum": lambda: optax.sgd(0.1, momentum=0.9),
    "SGD with weight decay": lambda: optax.chain(
        optax.add_decayed_weights(5e-4), optax.sgd(0.1, momentum=0.9)
    ),
    "Adam": lambda: optax.adam(1e-2),
}


def loss(params, images, labels):
    hidden = jax.nn.tanh(images @ params["hidden"]["kernel"] + params["hidden"]["bias"])
    return jnp.mean(cross_entropy(hidden @ params["head"], labels))


def initial_params():
    hidden, head = jax.random.split(jax.random.key(0))
    return {
        "hidden": {
            "kernel": jax.random.normal(hidden, [8, 16]) / 3,
            "bias": jnp.zeros(16),
        },
        "head": jax.random.normal(head, [16, 3]) / 4,
    }


def batches():
    rng = np.random.default_rng(0)
    for _ in range(NUM_STEPS):
        yield (
            jnp.asarray(rng.standard_normal((32, 8)), jnp.float32),
            jnp.asarray(rng.integers(0, 3, 32)),
        )


def train(tx, make_extra):
    """Parameters after the steps; `make_extra(grad_fn)` gives `update` its extras."""
    params = initial_params()
    opt_state = tx.init(params)
    for images, labels in batches():

        def grad_fn(params, _=None, batch=(images, labels)):
            return jax.grad(loss)(params, *batch)

        updates, opt_state = tx.update(
            grad_fn(params), opt_state, params, **make_extra(grad_fn)
        )
        params = optax.apply_updates(params, updates)
    return params


def largest_difference(first, second):
    gaps = jax.tree.map(lambda a, b: jnp.max(jnp.abs(a - b)), first, second)
    return max(map(float, jax.tree.leaves(gaps)))


@pytest.mark.parametrize("rho", [0.05, 0.2, 1.0])
@pytest.mark.parametrize("descent", DESCENTS)
def test_sam_takes_the_steps_of_optax_opaque_sam(descent, rho):
    ours = train(
        optax.chain(sam(rho), DESCENTS[descent]()), lambda grad_fn: {"grad_fn": grad_fn}
    )
    theirs = train(
        contrib.sam(
            DESCENTS[descent](),
            optax.chain(contrib.normalize(), optax.sgd(rho)),
            sync_period=2,
            opaque_mode=True,
        ),
        lambda grad_fn: {"grad_fn": grad_fn},
    )
    assert largest_difference(ours, theirs) <= 1e-7 * (10 if descent == "Adam" else 1)


def test_sam_of_radius_zero_takes_the_steps_of_its_descent():
    descent = DESCENTS["SGD with momentum"]
    ours = train(optax.chain(sam(0.0), descent()), lambda grad_fn: {"grad_fn": grad_fn})
    theirs = train(descent(), lambda _: {})
    assert largest_difference(ours, theirs) == 0.0


def test_the_steps_differ_from_those_of_the_descent_alone():
    descent = DESCENTS["SGD with momentum"]
    ours = train(optax.chain(sam(0.2), descent()), lambda grad_fn: {"grad_fn": grad_fn})
    theirs = train(descent(), lambda _: {})
    assert largest_difference(ours, theirs) > 1e-3
