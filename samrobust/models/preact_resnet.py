"""The pre-activation ResNet of the paper, with normalisation of the pixels inside.

`PreActResNet()` is PreActResNet-18 as in the paper's PyTorch code: 11,172,170
parameters for 10 classes, symmetric padding, a 1x1 shortcut convolution on the already
activated input, PyTorch's initialisation. Images are [B, H, W, C] with pixels in
[0, 1]; logits are float32 [B, K].

Reference: He et al. (2016), "Identity Mappings in Deep Residual Networks",
arXiv 1603.05027.
"""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from samrobust.checks import check
from samrobust.models.conv import conv2d
from samrobust.types import Array

__all__ = ["BatchNorm", "PreActResNet"]

# U(-1/sqrt(fan_in), 1/sqrt(fan_in)): the default of torch.nn.Conv2d and Linear.
_torch_init = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


def _linear_bias_init(fan_in: int) -> nn.initializers.Initializer:
    bound = fan_in**-0.5

    def init(key: Array, shape: Any, dtype: Any = jnp.float32, **_: Any) -> Array:
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init


def _exact(dtype: Any) -> Any:
    """The dtype of parameters and statistics: float32, or float64 if told to."""
    return jnp.promote_types(dtype, jnp.float32)


class Conv(nn.Module):
    """A convolution without bias, computed in `dtype`; parameters in `_exact(dtype)`.

    Attributes:
      features: number of output channels.
      window: side of the square kernel, odd; padded by `window // 2` on every side.
      stride: along both axes.
      dtype: of the computation.
    """

    features: int
    window: int = 3
    stride: int = 1
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, images: Array) -> Array:
        """[B, H, W, C] to [B, H', W', features]."""
        shape = (self.window, self.window, images.shape[-1], self.features)
        kernel = self.param("kernel", _torch_init, shape, _exact(self.dtype))
        kernel = kernel.astype(self.dtype)
        return conv2d(images.astype(self.dtype), kernel, self.stride, self.window // 2)


class BatchNorm(nn.Module):
    """Batch normalisation over all axes but the last, as in PyTorch.

    Statistics are taken in float32 (float64 if that is `dtype`) over the whole batch,
    over all devices under `jit`, or over groups of consecutive examples of it, each
    normalised by its own. The
    running variance is the unbiased one, as PyTorch keeps it and Flax does not. With
    groups, running statistics move towards the mean over groups of the means and of
    the unbiased variances: what averaging the statistics of devices gives, that each
    keep those of one group.

    Attributes:
      momentum: share of the old running statistics kept in an update.
      epsilon: added to the variance.
      dtype: of the result.
      batch_norm_group: examples over which a batch is normalised in training; 0: all.
    """

    momentum: float = 0.9
    epsilon: float = 1e-5
    dtype: Any = jnp.float32
    batch_norm_group: int = 0

    @nn.compact
    def __call__(self, inputs: Array, *, train: bool) -> Array:
        """Normalises with the batch's statistics if `train`, else the running ones.

        Raises:
          ValueError: in training, if the groups do not divide the batch.
        """
        channels, exact = inputs.shape[-1:], _exact(self.dtype)
        zeros, ones = nn.initializers.zeros, nn.initializers.ones
        scale = self.param("scale", ones, channels, exact)
        bias = self.param("bias", zeros, channels, exact)
        running_mean = self.variable(
            "batch_stats", "mean", zeros, None, channels, exact
        )
        running_var = self.variable("batch_stats", "var", ones, None, channels, exact)

        def normalise(inputs: Array, mean: Array, var: Array) -> Array:
            multiplier = scale * jax.lax.rsqrt(var + self.epsilon)
            normalised = inputs.astype(exact) * multiplier + (bias - mean * multiplier)
            return normalised.astype(self.dtype)

        if not train:
            return normalise(inputs, running_mean.value, running_var.value)
        num_groups = self._num_groups(len(inputs))
        if num_groups == 1:
            mean, var = _statistics(inputs.astype(exact))
            self._update(running_mean, running_var, mean, var, inputs.size)
            return normalise(inputs, mean, var)
        groups = inputs.reshape(num_groups, -1, *inputs.shape[1:])
        means, variances = jax.vmap(_statistics)(groups.astype(exact))
        mean, var = jnp.mean(means, axis=0), jnp.mean(variances, axis=0)
        self._update(running_mean, running_var, mean, var, groups[0].size)
        return jax.vmap(normalise)(groups, means, variances).reshape(inputs.shape)

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
        """Moves the running statistics towards those of `size` inputs."""
        if self.is_initializing() or not self.is_mutable_collection("batch_stats"):
            return
        count = size // mean.size
        unbiased = var * (count / max(count - 1, 1))
        old, new = self.momentum, 1 - self.momentum
        running_mean.value = old * running_mean.value + new * mean
        running_var.value = old * running_var.value + new * unbiased


def _statistics(inputs: Array) -> tuple[Array, Array]:
    """Mean and biased variance over all axes but the last."""
    axes = tuple(range(inputs.ndim - 1))
    mean = jnp.mean(inputs, axes)
    return mean, jnp.mean(jnp.square(inputs - mean), axes)


class Block(nn.Module):
    """A pre-activation basic block: (BN, ReLU, 3x3) twice, plus the shortcut."""

    features: int
    stride: int
    dtype: Any
    batch_norm_group: int

    @nn.compact
    def __call__(self, inputs: Array, *, train: bool) -> Array:
        """[B, H, W, C] to [B, H / stride, W / stride, features]."""
        norm = functools.partial(
            BatchNorm, dtype=self.dtype, batch_norm_group=self.batch_norm_group
        )
        hidden = nn.relu(norm(name="norm1")(inputs, train=train))
        shortcut = inputs
        if self.stride != 1 or inputs.shape[-1] != self.features:
            project = Conv(self.features, 1, self.stride, self.dtype, name="shortcut")
            shortcut = project(hidden)
        conv1 = Conv(self.features, 3, self.stride, self.dtype, name="conv1")
        hidden = conv1(hidden)
        hidden = nn.relu(norm(name="norm2")(hidden, train=train))
        conv2 = Conv(self.features, 3, 1, self.dtype, name="conv2")
        return conv2(hidden) + shortcut


class PreActResNet(nn.Module):
    """A pre-activation ResNet of basic blocks; the default is PreActResNet-18.

    Attributes:
      num_classes: number of logits K.
      width: channels of the first stage; each further stage has twice as many.
      blocks: blocks in each stage; every stage but the first halves the resolution.
      mean: of the pixels, per channel, in [0, 1]; subtracted first.
      std: of the pixels, per channel, > 0; divided by.
      dtype: of convolutions and activations, float32 or bfloat16. Parameters, running
        statistics, their computation and the logits are float32 all the same. Or
        float64, where JAX has it switched on: then everything is.
      batch_norm_group: examples over which BatchNorm normalises in training; 0: the
        whole batch. See `BatchNorm`.

    `init(key, images, train=False)` makes `{"params": ..., "batch_stats": ...}`;
    `apply(variables, images, train=True, mutable=["batch_stats"])` also returns the
    updated statistics, and without `mutable` it normalises by the batch and updates
    nothing.
    """

    num_classes: int = 10
    width: int = 64
    blocks: tuple[int, ...] = (2, 2, 2, 2)
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    dtype: Any = jnp.float32
    batch_norm_group: int = 0

    @nn.compact
    def __call__(self, images: Array, *, train: bool) -> Array:
        """Logits [B, K] of images [B, H, W, C] with pixels in [0, 1]."""
        self._check(images.shape[-1])
        group, exact = self.batch_norm_group, _exact(self.dtype)
        mean, std = jnp.asarray(self.mean, exact), jnp.asarray(self.std, exact)
        hidden = (images.astype(exact) - mean) / std
        hidden = Conv(self.width, dtype=self.dtype, name="stem")(hidden)
        for i, count in enumerate(self.blocks):
            for j in range(count):
                stride = 2 if i > 0 and j == 0 else 1
                name = f"stage{i + 1}_block{j + 1}"
                block = Block(self.width * 2**i, stride, self.dtype, group, name=name)
                hidden = block(hidden, train=train)
        norm = BatchNorm(dtype=self.dtype, batch_norm_group=group, name="norm")
        hidden = norm(hidden, train=train)
        features = jnp.mean(nn.relu(hidden).astype(exact), axis=(1, 2))
        head = nn.Dense(
            self.num_classes,
            param_dtype=exact,
            kernel_init=_torch_init,
            bias_init=_linear_bias_init(features.shape[-1]),
            name="head",
        )
        return head(features)

    def _check(self, channels: int) -> None:
        check(
            jax.dtypes.canonicalize_dtype(self.dtype) == jnp.dtype(self.dtype),
            "a dtype that JAX computes in",
            "Set jax_enable_x64 for float64.",
            dtype=jnp.dtype(self.dtype).name,
        )
        for name, values in (("mean", self.mean), ("std", self.std)):
            check(
                len(values) in (1, channels),
                f"one {name} or one a channel ({channels})",
                **{name: values},
            )
        check(min(self.std) > 0, "std > 0", std=self.std)
