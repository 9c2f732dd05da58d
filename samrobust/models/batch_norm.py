"""Batch normalization with the ReLU after it, in few passes over memory.

The time that BatchNorm takes on an accelerator is that of reading and writing
activations, X of them in a layer. Autodiff of the formulas moves about 12 X, the
functions here 8 X, and a byte each twice where XLA stores the ReLU's mask:

* Forward, 3 X: one pass sums x and x^2, the next normalizes. The sums are of x shifted
  by the running mean; of x itself, E[x^2] - E[x]^2 would cancel where |mean| >> std.
* Backward, 5 X, of y = relu(scale xhat + bias) with xhat = (x - mean) / std and n
  inputs a channel: with g = dy where y > 0, else 0, one pass sums g and g xhat, and the
  next gives

      dx = scale / std (g - sum(g) / n - xhat sum(g xhat) / n).

  xhat and the mask are computed again from x, so nothing else is kept.

On the CPU, whose compiler makes slower loops of these, the formulas are differentiated
as they stand, with the variance in two passes.

Reference: Ioffe and Szegedy (2015), arXiv 1502.03167, Section 3.
"""

import dataclasses
import functools
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from samrobust.checks import check
from samrobust.models.layers import exact_dtype
from samrobust.system.distributed import data_mesh
from samrobust.types import Array

__all__ = ["BatchNorm"]


class BatchNorm(nn.Module):
    """Batch normalization over all axes but the last, as in PyTorch.

    Statistics are taken in float32 (float64 if that is `dtype`) over the whole batch,
    over all devices under `jit`, or over groups of consecutive examples of it, each
    normalized by its own. The running variance is the unbiased one, as PyTorch keeps
    it and Flax does not. With groups, running statistics move toward the mean over
    groups of the means and of the unbiased variances: what the average over
    devices gives when each keeps the statistics of one group.

    Differentiable in reverse mode, to any order. On accelerators statistics are taken
    around the running mean: while the mean lies k standard deviations from it, the
    variance has a relative error of about k^2 / 10^7 in float32.

    Attributes:
      momentum: share of the old running statistics kept in an update.
      epsilon: added to the variance.
      dtype: of the result.
      batch_norm_group: examples over which a batch is normalized in training; 0: all.
      relu: whether a ReLU follows.
    """

    momentum: float = 0.9
    epsilon: float = 1e-5
    dtype: Any = jnp.float32
    batch_norm_group: int = 0
    relu: bool = False

    @nn.compact
    def __call__(self, inputs: Array, *, train: bool) -> Array:
        """Normalizes with the batch's statistics if `train`, else the running ones.

        Raises:
          ValueError: in training, if the groups do not divide the batch.
        """
        channels, exact = inputs.shape[-1:], exact_dtype(self.dtype)
        zeros, ones = nn.initializers.zeros, nn.initializers.ones
        scale = self.param("scale", ones, channels, exact)
        bias = self.param("bias", zeros, channels, exact)
        running_mean = self.variable(
            "batch_stats", "mean", zeros, None, channels, exact
        )
        running_var = self.variable("batch_stats", "var", ones, None, channels, exact)
        form = _Form(self.epsilon, self.relu, self.dtype)
        mean, var = running_mean.value, running_var.value
        # Variables that were given may be less exact.
        scale, bias, mean, var = (x.astype(exact) for x in (scale, bias, mean, var))
        if not train:
            return _affine(form, inputs, mean, var, scale, bias)

        def normalize(inputs: Array) -> tuple[Array, Array, Array]:
            return _batch_norm(form, inputs, mean, scale, bias)

        num_groups = self._num_groups(len(inputs))
        if num_groups == 1:
            outputs, mean, var = normalize(inputs)
            self._update(running_mean, running_var, mean, var, inputs.size)
            return outputs
        groups = inputs.reshape(num_groups, -1, *inputs.shape[1:])
        outputs, means, variances = jax.vmap(normalize)(groups)
        # Not the variance of the batch: that has the spread of the means in it, too.
        mean, var = jnp.mean(means, axis=0), jnp.mean(variances, axis=0)
        self._update(running_mean, running_var, mean, var, groups[0].size)
        return outputs.reshape(inputs.shape)

    def _num_groups(self, size: int) -> int:
        group = self.batch_norm_group
        if group == 0 or self.is_initializing():
            return 1
        check(
            group > 0 and size % group == 0,
            "a batch divisible by batch_norm_group",
            "Choose a group that divides every batch, or 0 for the whole batch.",
            batch_norm_group=group,
            batch_size=size,
        )
        return size // group

    def _update(
        self, running_mean: Any, running_var: Any, mean: Array, var: Array, size: int
    ) -> None:
        """Moves the running statistics toward those of `size` inputs."""
        if self.is_initializing() or not self.is_mutable_collection("batch_stats"):
            return
        count = size // mean.size
        unbiased = var * (count / max(count - 1, 1))  # Bessel's correction
        old, new = self.momentum, 1 - self.momentum
        running_mean.value = old * running_mean.value + new * mean
        running_var.value = old * running_var.value + new * unbiased


@dataclasses.dataclass(frozen=True)
class _Form:
    """Configuration of a layer, known when it is traced; see `BatchNorm`."""

    epsilon: float
    relu: bool
    dtype: Any


def _affine(
    form: _Form, inputs: Array, mean: Array, var: Array, scale: Array, bias: Array
) -> Array:
    """Returns scale (x - mean) / std + bias, or its ReLU: a multiply-add a pixel."""
    multiplier = scale * lax.rsqrt(var + form.epsilon)
    outputs = inputs.astype(scale.dtype) * multiplier + (bias - mean * multiplier)
    return (jax.nn.relu(outputs) if form.relu else outputs).astype(form.dtype)


# The same object for the same form: JAX traces it once for all layers of a shape.
_branch = functools.cache(functools.partial)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _batch_norm(
    form: _Form, inputs: Array, shift: Array, scale: Array, bias: Array
) -> tuple[Array, Array, Array]:
    """Normalizes inputs [..., C] by their own statistics.

    Args:
      form: of the layer.
      inputs: of any floating dtype.
      shift: [C], near the mean; the result depends on it by its rounding alone.
      scale: [C].
      bias: [C].

    Returns:
      Outputs [..., C], the mean [C] and the biased variance [C].
    """
    return lax.platform_dependent(
        inputs,
        shift,
        scale,
        bias,
        cpu=_branch(_unshifted, form),
        default=_branch(_fused, form),
    )


def _unshifted(
    form: _Form, inputs: Array, shift: Array, scale: Array, bias: Array
) -> tuple[Array, Array, Array]:
    del shift
    return _plain(form, inputs, scale, bias)


def _plain(
    form: _Form, inputs: Array, scale: Array, bias: Array
) -> tuple[Array, Array, Array]:
    axes = tuple(range(inputs.ndim - 1))
    exact = inputs.astype(scale.dtype)
    mean = jnp.mean(exact, axes)
    var = jnp.mean(jnp.square(exact - mean), axes)
    return _affine(form, inputs, mean, var, scale, bias), mean, var


def _fused(
    form: _Form, inputs: Array, shift: Array, scale: Array, bias: Array
) -> tuple[Array, Array, Array]:
    count = inputs.size // inputs.shape[-1]
    shifted = inputs.astype(scale.dtype) - shift
    total, squares = _sums(shifted, jnp.square(shifted))
    offset = total / count
    var = jnp.maximum(squares / count - jnp.square(offset), 0.0)
    mean = shift + offset
    return _affine(form, inputs, mean, var, scale, bias), mean, var


def _forward(
    form: _Form, inputs: Array, shift: Array, scale: Array, bias: Array
) -> tuple[tuple[Array, Array, Array], tuple[Array, ...]]:
    found: Any = _batch_norm(form, inputs, shift, scale, bias)
    return found, (inputs, *found[1:], scale, bias)


def _backward(
    form: _Form, residuals: tuple[Array, ...], cotangents: tuple[Array, Array, Array]
) -> tuple[Array, Array, Array, Array]:
    gradients: Any = lax.platform_dependent(
        *residuals,
        *cotangents,
        cpu=_branch(_plain_backward, form),
        default=_branch(_fused_backward, form),
    )
    of_inputs, of_scale, of_bias = gradients
    return of_inputs, jnp.zeros_like(of_bias), of_scale, of_bias


def _plain_backward(
    form: _Form,
    inputs: Array,
    mean: Array,
    var: Array,
    scale: Array,
    bias: Array,
    *cotangents: Array,
) -> tuple[Array, Array, Array]:
    # Computed again, so XLA finds them in the forward pass.
    del mean, var
    _, vjp = jax.vjp(functools.partial(_plain, form), inputs, scale, bias)
    return vjp(cotangents)


def _fused_backward(
    form: _Form,
    inputs: Array,
    mean: Array,
    var: Array,
    scale: Array,
    bias: Array,
    of_outputs: Array,
    of_mean: Array,
    of_var: Array,
) -> tuple[Array, Array, Array]:
    count = inputs.size // inputs.shape[-1]

    def both(mean: Array, rstd: Array) -> tuple[Array, Array]:
        """Returns x - mean, and g."""
        centered = inputs.astype(scale.dtype) - mean
        passed = of_outputs.astype(scale.dtype)
        if form.relu:
            passed = jnp.where(centered * (scale * rstd) + bias > 0, passed, 0.0)
        return centered, passed

    rstd = lax.rsqrt(var + form.epsilon)
    centered, passed = both(mean, rstd)
    of_bias, product = _sums(passed, passed * centered)  # sum(g), std sum(g xhat)
    # Behind the barrier XLA takes the mask for another one, and computes it where it is
    # used; else it would store it in the first pass for this one.
    mean, rstd = lax.optimization_barrier((mean, rstd))
    centered, passed = both(mean, rstd)
    multiplier = scale * rstd
    slope = (multiplier * jnp.square(rstd) * product - 2 * of_var) / count
    level = (multiplier * of_bias - of_mean) / count
    of_inputs = multiplier * passed - centered * slope - level
    return of_inputs.astype(inputs.dtype), product * rstd, of_bias


_batch_norm.defvjp(_forward, _backward)


_PARTIAL_SUMS = 2**16  # of a layer: enough to keep a GPU busy


@jax.custom_vjp
def _sums(one: Array, other: Array) -> tuple[Array, Array]:
    """Sums two arrays over all axes but the last, in one pass over what both are of.

    Runs of pixels of an example first. Sums over all pixels at once, of which there are
    no more than channels, would leave most of a GPU idle; XLA expects that, and stores
    what it sums, ReLU's mask too, to have less to compute in them. Over several devices
    both are summed as one array, and so in one all-reduce; on one device that would
    cost a kernel more.
    """

    def add(sums: tuple[Array, ...], terms: tuple[Array, ...]) -> tuple[Array, ...]:
        return sums[0] + terms[0], sums[1] + terms[1]

    pixels, longest = math.prod(one.shape[1:-1]), max(one.size // _PARTIAL_SUMS, 16)
    run = max(n for n in range(1, longest + 1) if pixels % n == 0)
    zero = jnp.zeros([], one.dtype)
    terms: Any = tuple(x.reshape(-1, run, x.shape[-1]) for x in (one, other))
    terms = lax.reduce(terms, (zero, zero), add, (1,))
    if data_mesh().size == 1:
        return lax.reduce(terms, (zero, zero), add, (0,))
    first, second = jnp.sum(jnp.stack(terms, axis=1), axis=0)
    return first, second


def _spread(terms: tuple[Array, Array], sums: Any) -> tuple[Array, Array]:
    one, other = (jnp.broadcast_to(sum_, terms[0].shape) for sum_ in sums)
    return one, other


_sums.defvjp(lambda one, other: (_sums(one, other), (one, other)), _spread)
