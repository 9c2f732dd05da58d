"""The post-activation ResNet for small images; the default is ResNet-18.

As in kuangliu/pytorch-cifar and the papers on adversarial training that take it from
there: 11,173,962 parameters for 10 classes, a 3x3 stem without pooling, symmetric
padding, a 1x1 convolution with BatchNorm as shortcut, PyTorch's initialization.

Reference: He et al. (2016), "Deep Residual Learning for Image Recognition",
arXiv 1512.03385. *Our deviation*: the stem, which has stride 2 and pools there.
"""

import functools
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from samrobust.models.batch_norm import BatchNorm
from samrobust.models.layers import (
    Conv,
    StagedClassifier,
    exact_dtype,
    residual_stages,
    torch_linear,
)
from samrobust.types import Array

__all__ = ["ResNet"]


class BasicBlock(nn.Module):
    """A basic block: 3x3, BN, ReLU, 3x3, BN, plus the shortcut, ReLU."""

    features: int
    stride: int
    dtype: Any
    batch_norm_group: int

    @nn.compact
    def __call__(self, inputs: Array, *, train: bool) -> Array:
        """Maps [B, H, W, C] to [B, H / stride, W / stride, features]."""

        def conv_norm(
            inputs: Array, window: int, stride: int, names: str, *, relu: bool = False
        ) -> Array:
            conv, norm = names.split()
            conv = Conv(self.features, window, stride, self.dtype, name=conv)
            norm = BatchNorm(
                dtype=self.dtype,
                batch_norm_group=self.batch_norm_group,
                relu=relu,
                name=norm,
            )
            return norm(conv(inputs), train=train)

        hidden = conv_norm(inputs, 3, self.stride, "conv1 norm1", relu=True)
        hidden = conv_norm(hidden, 3, 1, "conv2 norm2")
        shortcut = inputs
        if self.stride != 1 or inputs.shape[-1] != self.features:
            shortcut = conv_norm(inputs, 1, self.stride, "shortcut shortcut_norm")
        return nn.relu(hidden + shortcut)


class ResNet(StagedClassifier):
    """A ResNet of basic blocks; see `StagedClassifier` for the attributes."""

    @nn.compact
    def __call__(self, images: Array, *, train: bool) -> Array:
        """Returns logits [B, K] of images [B, H, W, C] with pixels in [0, 1]."""
        options = {"dtype": self.dtype, "batch_norm_group": self.batch_norm_group}
        hidden = Conv(self.width, dtype=self.dtype, name="stem")(self.normalize(images))
        hidden = BatchNorm(**options, relu=True, name="norm")(hidden, train=train)
        block = functools.partial(BasicBlock, **options)
        hidden = residual_stages(block, self.widths, self.blocks, hidden, train=train)
        features = jnp.mean(hidden.astype(exact_dtype(self.dtype)), axis=(1, 2))
        head = torch_linear(
            self.num_classes, features.shape[-1], features.dtype, name="head"
        )
        return head(features)
