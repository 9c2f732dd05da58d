"""A loop over steps gives what its steps give, and carries less between them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from samrobust.training.repeating import repeat

CARRY = {
    "weights": np.linspace(-1, 1, 12, dtype=np.float32).reshape(3, 4),
    "others": np.linspace(0, 1, 12, dtype=np.float32).reshape(4, 3),
    "bias": np.arange(4, dtype=np.float32),
    "scale": np.float32(2),
    "half": np.ones([3], jnp.bfloat16),
    "step": np.int32(0),
    "key": jax.random.key(0),
}


def step(carry):
    """Casts the same weights twice, others once, and a small array."""
    weights = carry["weights"].astype(jnp.bfloat16)
    again = carry["weights"].astype(jnp.bfloat16) * carry["half"][:, None]
    product = (weights + again) @ carry["others"].astype(jnp.bfloat16)
    drawn = jax.random.normal(carry["key"], [4])
    moved = carry["bias"].astype(jnp.bfloat16).astype(jnp.float32)
    return {
        "weights": carry["weights"] - 0.1 * jnp.sum(product).astype(jnp.float32),
        "others": carry["others"] * 0.9,
        "bias": moved + drawn,
        "scale": carry["scale"] * 1.5 + carry["step"],
        "half": carry["half"] * jnp.bfloat16(0.5),
        "step": carry["step"] + 1,
        "key": jax.random.fold_in(carry["key"], carry["step"]),
    }


def test_a_loop_gives_what_calls_of_its_step_give():
    expected = CARRY
    for _ in range(3):
        expected = jax.jit(step)(expected)
    found = jax.jit(lambda carry: repeat(step, carry, 3))(CARRY)
    key, expected_key = (jax.random.key_data(x.pop("key")) for x in (found, expected))
    np.testing.assert_array_equal(key, expected_key)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), found) == jax.tree.map(
        lambda x: (x.shape, x.dtype), expected
    )
    for name, leaf in expected.items():
        exact = np.asarray(leaf, np.float32)
        np.testing.assert_allclose(np.asarray(found[name], np.float32), exact, 1e-6)


def test_the_step_is_traced_once():
    calls = []
    jax.make_jaxpr(
        lambda carry: repeat(lambda x: calls.append(1) or step(x), carry, 3)
    )(CARRY)
    assert calls == [1]


def test_the_loop_carries_one_small_array_and_each_cast_once():
    jaxpr = jax.make_jaxpr(lambda carry: repeat(step, carry, 3))(CARRY)
    (loop,) = (one for one in jaxpr.eqns if one.primitive.name == "scan")
    num_carried = loop.params["num_carry"]
    carried = [str(x.aval) for x in loop.outvars[:num_carried]]
    # weights and others, exact and cast; bias and scale; half, step, key.
    cast = ["float32[3,4]", "bfloat16[3,4]", "float32[4,3]", "bfloat16[4,3]"]
    others = ["float32[5]", "bfloat16[3]", "int32[]", "key<fry>[]"]
    assert sorted(carried) == sorted([*cast, *others])


@pytest.mark.parametrize("loop", ["scan", "while"])
def test_nothing_is_joined_for_a_step_with_a_loop_in_it(loop):
    def looping(carry):
        end = 2 if loop == "scan" else carry["step"]
        add = lambda _, x: x + carry["scale"]  # noqa: E731
        grown = jax.lax.fori_loop(0, end, add, carry["bias"])
        return {**step(carry), "bias": grown}

    jaxpr = jax.make_jaxpr(lambda carry: repeat(looping, carry, 3))(CARRY)
    (outer,) = (one for one in jaxpr.eqns if one.primitive.name == "scan")
    carried = [str(x.aval) for x in outer.outvars[: outer.params["num_carry"]]]
    assert "float32[]" in carried
    assert "float32[4]" in carried
    assert "bfloat16[3,4]" in carried
