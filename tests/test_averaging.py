"""Averages of weights, whatever the weights are."""

import jax.numpy as jnp
import pytest

from samrobust.training.averaging.ema import ema


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_a_long_memory_forgets_in_every_precision(dtype):
    """In bfloat16 a decay of 0.999 is 1, and changes of a thousandth round away."""
    averaging = ema(0.999)
    ones, zeros = ({"w": jnp.full(2, value, dtype)} for value in (1, 0))
    average = averaging.update(averaging.init(ones), ones, jnp.int32(0))
    for step in range(1, 200):
        average = averaging.update(average, zeros, jnp.int32(step))
    assert average["w"] == pytest.approx(0.999**199, rel=1e-4)
    assert average["w"].dtype == jnp.float32


def test_whole_numbers_are_copied():
    averaging = ema(0.9)
    average = averaging.init({"count": jnp.int32(1)})
    average = averaging.update(average, {"count": jnp.int32(7)}, jnp.int32(3))
    assert (int(average["count"]), average["count"].dtype) == (7, jnp.int32)
