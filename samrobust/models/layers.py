"""Layers that the networks share, and their normalization of pixels.

Conventions: images and activations are [B, H, W, C]. Layers compute in `dtype`;
parameters and statistics are kept and taken in `exact_dtype(dtype)`.
"""

from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from samrobust.checks import check, check_whole
from samrobust.models.conv import conv2d
from samrobust.types import Array

__all__ = [
    "Conv",
    "ImageClassifier",
    "StagedClassifier",
    "exact_dtype",
    "residual_stages",
    "torch_init",
    "torch_linear",
]

# U(-1/sqrt(fan_in), 1/sqrt(fan_in)): the default of torch.nn.Conv2d and Linear.
torch_init = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


def torch_linear(features: int, fan_in: int, dtype: Any, name: str) -> nn.Dense:
    """Builds `torch.nn.Linear`, its bias drawn with the bound of its kernel."""
    bound = fan_in**-0.5

    def bias_init(key: Array, shape: Any, dtype: Any = jnp.float32, **_: Any) -> Array:
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return nn.Dense(
        features,
        dtype=dtype,
        param_dtype=exact_dtype(dtype),
        kernel_init=torch_init,
        bias_init=bias_init,
        name=name,
    )


def exact_dtype(dtype: Any) -> Any:
    """Returns the dtype of parameters and statistics: float32, or float64."""
    return jnp.promote_types(dtype, jnp.float32)


class ImageClassifier(nn.Module):
    """A network that normalizes pixels itself: the base of all `MODELS`.

    Attributes:
      num_classes: number of logits K.
      mean: of the pixels, per channel, in [0, 1]; subtracted first.
      std: of the pixels, per channel, > 0; divided by.
      dtype: of layers and activations, float32 or bfloat16. Parameters, running
        statistics, their computation and the logits are float32 all the same. Or
        float64, where JAX has it switched on: then everything is.

    `init(key, images, train=False)` makes `{"params": ...}`, with BatchNorm also
    `"batch_stats"`; `apply(variables, images, train=True, mutable=["batch_stats"])`
    then returns the updated statistics too, and without `mutable` it normalizes by the
    batch and updates nothing. Dropout, where there is any, draws from
    `rngs={"dropout": key}` in training alone.

    Raises:
      ValueError: at construction, for a field out of its range.
    """

    num_classes: int = 10
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    dtype: Any = jnp.float32

    def __post_init__(self) -> None:
        check_whole(1, num_classes=self.num_classes)
        check(all(s > 0 for s in self.std), "std > 0", std=self.std)
        check(
            jax.dtypes.canonicalize_dtype(self.dtype) == jnp.dtype(self.dtype),
            "a dtype that JAX computes in",
            "Set jax_enable_x64 for float64.",
            dtype=jnp.dtype(self.dtype).name,
        )
        is_real = jnp.issubdtype(self.dtype, jnp.floating)
        check(is_real, "a floating dtype", dtype=jnp.dtype(self.dtype).name)
        super().__post_init__()

    def normalize(self, images: Array) -> Array:
        """Returns `(images - mean) / std` in `exact_dtype`.

        Raises:
          ValueError: if `mean` or `std` has neither one value nor one a channel.
        """
        channels = images.shape[-1]
        for name, values in (("mean", self.mean), ("std", self.std)):
            check(
                len(values) in (1, channels),
                f"one {name} or one a channel ({channels})",
                **{name: values},
            )
        exact = exact_dtype(self.dtype)
        mean, std = jnp.asarray(self.mean, exact), jnp.asarray(self.std, exact)
        return (images.astype(exact) - mean) / std


class StagedClassifier(ImageClassifier):
    """A ResNet's fields; see `ImageClassifier` for the other attributes.

    Attributes:
      width: channels of the first stage; each further stage has twice as many.
      blocks: blocks in each stage; every stage but the first halves the resolution.
      batch_norm_group: examples over which BatchNorm normalizes in training; 0: the
        whole batch. See `BatchNorm`.
    """

    width: int = 64
    blocks: tuple[int, ...] = (2, 2, 2, 2)
    batch_norm_group: int = 0

    def __post_init__(self) -> None:
        check_whole(1, 2**16, width=self.width)
        holds = isinstance(self.blocks, tuple) and 1 <= len(self.blocks) <= 10
        check(holds, "a tuple of 1 to 10 numbers of blocks", blocks=self.blocks)
        for count in self.blocks:
            check_whole(1, 1000, blocks=count)
        check_whole(0, batch_norm_group=self.batch_norm_group)
        super().__post_init__()

    @property
    def widths(self) -> list[int]:
        """Channels of each stage."""
        return [self.width * 2**i for i in range(len(self.blocks))]


def residual_stages(
    block: Callable[..., nn.Module],
    widths: Sequence[int],
    blocks: Sequence[int],
    hidden: Array,
    *,
    train: bool,
) -> Array:
    """Applies the stages of a ResNet, within a compact method of a module.

    Args:
      block: builds a block from its features, its stride and a `name`.
      widths: features of each stage.
      blocks: blocks in each stage; every stage but the first halves the resolution.
      hidden: [B, H, W, C].
      train: passed to the blocks.
    """
    for i, (features, count) in enumerate(zip(widths, blocks, strict=True)):
        for j in range(count):
            stride = 2 if i > 0 and j == 0 else 1
            layer = block(features, stride, name=f"stage{i + 1}_block{j + 1}")
            hidden = layer(hidden, train=train)
    return hidden


class Conv(nn.Module):
    """A convolution without bias, computed in `dtype`; its kernel is exact.

    Attributes:
      features: number of output channels.
      window: side of the square kernel, odd; padded by `window // 2` on every side.
      stride: along both axes.
      dtype: of the computation.
      kernel_init: of the kernel.
    """

    features: int
    window: int = 3
    stride: int = 1
    dtype: Any = jnp.float32
    kernel_init: nn.initializers.Initializer = torch_init

    @nn.compact
    def __call__(self, images: Array) -> Array:
        """Maps [B, H, W, C] to [B, H', W', features]."""
        shape = (self.window, self.window, images.shape[-1], self.features)
        kernel = self.param("kernel", self.kernel_init, shape, exact_dtype(self.dtype))
        kernel = kernel.astype(self.dtype)
        return conv2d(images.astype(self.dtype), kernel, self.stride, self.window // 2)
