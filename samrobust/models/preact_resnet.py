"""The pre-activation ResNet of the paper; the default is PreActResNet-18.

As in the paper's PyTorch code: 11,172,170 parameters for 10 classes, symmetric padding,
a 1x1 shortcut convolution on the already activated input, PyTorch's initialization.

Reference: He et al. (2016), "Identity Mappings in Deep Residual Networks",
arXiv 1603.05027.
"""

import functools
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from samrobust.models.batch_norm import BatchNorm
from samrobust.models.layers import (
    Conv,
    StagedClassifier,
    exact_dtype,
    residual_stages,
    torch_init,
    torch_linear,
)
from samrobust.types import Array

__all__ = ["PreActResNet", "preact_features"]


class PreActBlock(nn.Module):
    """A pre-activation basic block: (BN, ReLU, 3x3) twice, plus the shortcut."""

    features: int
    stride: int
    dtype: Any
    batch_norm_group: int
    dropout: float
    kernel_init: nn.initializers.Initializer

    @nn.compact
    def __call__(self, inputs: Array, *, train: bool) -> Array:
        """Maps [B, H, W, C] to [B, H / stride, W / stride, features]."""
        norm = functools.partial(
            BatchNorm,
            dtype=self.dtype,
            batch_norm_group=self.batch_norm_group,
            relu=True,
        )
        conv = functools.partial(Conv, dtype=self.dtype, kernel_init=self.kernel_init)
        hidden = norm(name="norm1")(inputs, train=train)
        # The identity skips BN and ReLU too; only a change of shape needs a projection.
        shortcut = inputs
        if self.stride != 1 or inputs.shape[-1] != self.features:
            shortcut = conv(self.features, 1, self.stride, name="shortcut")(hidden)
        hidden = conv(self.features, 3, self.stride, name="conv1")(hidden)
        hidden = norm(name="norm2")(hidden, train=train)
        hidden = nn.Dropout(self.dropout, deterministic=not train)(hidden)
        return conv(self.features, name="conv2")(hidden) + shortcut


def preact_features(
    hidden: Array,
    *,
    stem: int,
    widths: Sequence[int],
    blocks: Sequence[int],
    train: bool,
    dtype: Any,
    batch_norm_group: int,
    dropout: float = 0.0,
    kernel_init: nn.initializers.Initializer = torch_init,
) -> Array:
    """Applies a pre-activation ResNet without its head, within a compact method.

    Args:
      hidden: normalized images [B, H, W, C].
      stem: channels of the first convolution.
      widths: channels of each stage.
      blocks: blocks in each stage.
      train: as for the network.
      dtype: as for the network.
      batch_norm_group: as for the network.
      dropout: share of the activations before each block's second convolution.
      kernel_init: of all convolutions.

    Returns:
      [B, widths[-1]], the mean over the pixels, exact.
    """
    conv = {"dtype": dtype, "kernel_init": kernel_init}
    norm = {"dtype": dtype, "batch_norm_group": batch_norm_group}
    hidden = Conv(stem, **conv, name="stem")(hidden)
    block = functools.partial(PreActBlock, **conv | norm, dropout=dropout)
    hidden = residual_stages(block, widths, blocks, hidden, train=train)
    hidden = BatchNorm(**norm, relu=True, name="norm")(hidden, train=train)
    return jnp.mean(hidden.astype(exact_dtype(dtype)), axis=(1, 2))


class PreActResNet(StagedClassifier):
    """A pre-activation ResNet; see `StagedClassifier` for the attributes."""

    @nn.compact
    def __call__(self, images: Array, *, train: bool) -> Array:
        """Returns logits [B, K] of images [B, H, W, C] with pixels in [0, 1]."""
        features = preact_features(
            self.normalize(images),
            stem=self.width,
            widths=self.widths,
            blocks=self.blocks,
            train=train,
            dtype=self.dtype,
            batch_norm_group=self.batch_norm_group,
        )
        head = torch_linear(
            self.num_classes, features.shape[-1], features.dtype, name="head"
        )
        return head(features)
