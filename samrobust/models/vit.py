"""The vision transformer; the default is DeiT-tiny at patch 4, for images of 32 x 32.

As in facebookresearch/deit, without its distillation: 5,362,762 parameters for 10
classes, LayerNorm before attention and MLP, exact GELU, learned positions, and a class
token whose features are classified. No BatchNorm, so no `batch_stats`.

Our deviations: N(0, 0.02^2) is truncated at two standard deviations (DeiT truncates at
+-2, which is none), and no stochastic depth (DeiT drops 0.1 of the branches). Dropout
stands where timm's `drop_rate` puts it: after the positions, the attention, and both
layers of the MLP.

Reference: Dosovitskiy et al. (2021), arXiv 2010.11929; Touvron et al. (2021), "Training
data-efficient image transformers & distillation through attention", arXiv 2012.12877.
"""

import functools
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from samrobust.checks import below_one, check, check_whole
from samrobust.models.layers import (
    ImageClassifier,
    exact_dtype,
    torch_linear,
)
from samrobust.types import Array

__all__ = ["ViT"]

_MLP_RATIO = 4
_init = nn.initializers.truncated_normal(0.02)


class EncoderBlock(nn.Module):
    """A pre-norm transformer block: tokens [B, N, D] to [B, N, D]."""

    heads: int
    dropout: float
    dtype: Any

    @nn.compact
    def __call__(self, tokens: Array, *, train: bool) -> Array:
        """Returns the tokens plus attention, plus the MLP of that."""
        dim, exact = tokens.shape[-1], exact_dtype(self.dtype)
        drop = nn.Dropout(self.dropout, deterministic=not train)
        dense = functools.partial(
            nn.Dense, dtype=self.dtype, param_dtype=exact, kernel_init=_init
        )
        hidden = _layer_norm(self.dtype, "norm1")(tokens)
        qkv = dense(3 * dim, name="qkv")(hidden)
        hidden = dense(dim, name="projection")(_attend(qkv, self.heads, exact))
        tokens = tokens + drop(hidden)
        hidden = _layer_norm(self.dtype, "norm2")(tokens)
        hidden = dense(_MLP_RATIO * dim, name="mlp1")(hidden)
        hidden = drop(nn.gelu(hidden, approximate=False))
        return tokens + drop(dense(dim, name="mlp2")(hidden))


def _attend(qkv: Array, heads: int, exact: Any) -> Array:
    """Computes the attention softmax(q k' / sqrt(d)) v, [B, N, 3D] to [B, N, D]."""
    batch, num_tokens, _ = qkv.shape
    split = qkv.reshape(batch, num_tokens, 3, heads, -1)
    query, key, value = (split[:, :, i] for i in range(3))
    # Softmax in exact precision: exp magnifies the rounding of bfloat16.
    scores = jnp.einsum("bqhd,bkhd->bhqk", query, key).astype(exact)
    weights = nn.softmax(scores * query.shape[-1] ** -0.5).astype(qkv.dtype)
    attended = jnp.einsum("bhqk,bkhd->bqhd", weights, value)
    return attended.reshape(batch, num_tokens, -1)


def _layer_norm(dtype: Any, name: str) -> nn.LayerNorm:
    # Flax's fast variance, E[x^2] - E[x]^2, loses digits to cancellation.
    return nn.LayerNorm(
        epsilon=1e-6,
        dtype=dtype,
        param_dtype=exact_dtype(dtype),
        use_fast_variance=False,
        name=name,
    )


class ViT(ImageClassifier):
    """A vision transformer; see `ImageClassifier` for the other attributes.

    Attributes:
      patch: side of the square patches, which divides the images' sides. Positions are
        learned for the images of `init`; those of another size are refused.
      dim: D, features of a token.
      depth: number of blocks.
      heads: attention heads, which divide `dim`.
      dropout: share of the activations dropped in training, in [0, 1).
    """

    patch: int = 4
    dim: int = 192
    depth: int = 12
    heads: int = 3
    dropout: float = 0.0

    def __post_init__(self) -> None:
        check_whole(1, 1024, patch=self.patch)
        check_whole(1, 2**16, dim=self.dim)
        check_whole(1, 1000, depth=self.depth)
        check_whole(1, heads=self.heads)
        holds = self.dim % self.heads == 0
        check(holds, "heads that divide dim", heads=self.heads, dim=self.dim)
        below_one(dropout=self.dropout)
        super().__post_init__()

    @nn.compact
    def __call__(self, images: Array, *, train: bool) -> Array:
        """Returns logits [B, K] of images [B, H, W, C] with pixels in [0, 1].

        Raises:
          ValueError: if `patch` does not divide the images' sides.
        """
        exact = exact_dtype(self.dtype)
        patches = self._patches(self.normalize(images))
        embed = torch_linear(self.dim, patches.shape[-1], self.dtype, "embedding")
        tokens = embed(patches)
        token = self.param("class_token", _init, (self.dim,), exact)
        token = jnp.broadcast_to(token, (len(tokens), 1, self.dim))
        tokens = jnp.concatenate([token.astype(self.dtype), tokens], axis=1)
        positions = self.param("positions", _init, tokens.shape[1:], exact)
        tokens = tokens + positions.astype(self.dtype)
        tokens = nn.Dropout(self.dropout, deterministic=not train)(tokens)
        for i in range(self.depth):
            block = EncoderBlock(
                self.heads, self.dropout, self.dtype, name=f"block{i + 1}"
            )
            tokens = block(tokens, train=train)
        features = _layer_norm(exact, "norm")(tokens[:, 0].astype(exact))
        head = nn.Dense(
            self.num_classes, param_dtype=exact, kernel_init=_init, name="head"
        )
        return head(features)

    def _patches(self, images: Array) -> Array:
        """Cuts images [B, H, W, C] into [B, N, patch * patch * C], row by row."""
        batch, height, width, channels = images.shape
        side = self.patch
        check(
            height % side == 0 and width % side == 0,
            "a patch that divides the images",
            patch=side,
            image=(height, width),
        )
        grid = images.reshape(
            batch, height // side, side, width // side, side, channels
        )
        return grid.swapaxes(2, 3).reshape(batch, -1, side * side * channels)
