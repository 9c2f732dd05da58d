"""An attack casts the parameters of a classifier once, and not in every step."""

import collections

import jax
import jax.numpy as jnp
import numpy as np
from test_attack_contract import ATTACKS, BALLS

from samrobust.attacks.casts import cast_once

IMAGES = jnp.asarray(np.random.default_rng(0).uniform(size=(3, 2, 2, 1)), jnp.float32)
WEIGHTS = jnp.asarray(np.random.default_rng(1).normal(size=(4, 5)), jnp.float32)
LABELS = jnp.array([0, 1, 2])


def half_precision(weights):
    def logits_fn(images):
        flat = images.reshape(len(images), -1).astype(jnp.bfloat16)
        return (flat @ weights.astype(jnp.bfloat16)).astype(jnp.float32)

    return logits_fn


def casts_by_depth(jaxpr, depth=0):
    """How often arrays of the weights' shape are cast, by the depth of the loops."""
    found = collections.Counter()
    for equation in jaxpr.eqns:
        if equation.primitive.name == "convert_element_type":
            found[depth] += equation.invars[0].aval.shape == WEIGHTS.shape
        loops = equation.primitive.name in ("while", "scan")
        for value in jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")
        ):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                found += casts_by_depth(inner, depth + loops)
    return found


def test_no_attack_casts_parameters_in_a_loop():
    for name, build in ATTACKS.items():
        attack = build(BALLS["linf"])

        def run(weights, images, key, attack=attack):
            return attack(half_precision(weights), images, LABELS, key=key)

        jaxpr = jax.make_jaxpr(run)(WEIGHTS, IMAGES, jax.random.key(0)).jaxpr
        loops_over_parts = int(name == "autoattack")
        assert max(casts_by_depth(jaxpr), default=0) <= loops_over_parts, name


def test_a_classifier_with_casts_taken_out_gives_the_same_logits_and_gradients():
    logits_fn = half_precision(WEIGHTS)
    found = cast_once(logits_fn, IMAGES)
    np.testing.assert_array_equal(found(IMAGES), logits_fn(IMAGES))
    gradients = [
        jax.grad(lambda x, f=f: jnp.sum(f(x) ** 2))(IMAGES) for f in (found, logits_fn)
    ]
    np.testing.assert_array_equal(*gradients)
    # Whatever else it computes from its own arrays stays where it was.
    traced = jax.make_jaxpr(cast_once(lambda x: x + jnp.sin(WEIGHTS[0, 0]), IMAGES))
    assert "sin" in str(traced(IMAGES))
