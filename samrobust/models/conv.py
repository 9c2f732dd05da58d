"""A 2-D convolution whose input gradient stays fast inside loops on the CPU.

XLA's CPU compiler brings convolutions into its fast form in the entry computation
alone. The input gradient as JAX derives it needs that rewriting, and so it falls to a
naive loop inside `lax.fori_loop`, `scan` or `cond`: where PGD computes it. Written as
a forward convolution of the output gradient with the flipped kernel it is fast
everywhere. The choice is made when a function is lowered for its platform: on GPU and
TPU nothing changes. The weight gradient stays native on all platforms: no attack needs
it, and in the entry computation native is the fastest.

Conventions: NHWC images, HWIO kernels, symmetric padding as in PyTorch.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from samrobust.types import Array

__all__ = ["conv2d"]

_DIMENSIONS = ("NHWC", "HWIO", "NHWC")


def conv2d(images: Array, kernel: Array, stride: int, padding: int) -> Array:
    """Cross-correlation of images with a kernel, as `torch.nn.functional.conv2d`.

    Args:
      images: [B, H, W, C].
      kernel: [h, w, C, K], of the images' dtype; `padding < min(h, w)`.
      stride: along both axes, >= 1.
      padding: zeros on every side, >= 0. Flax's "SAME" differs from PyTorch at stride
        2: it pads (0, 1).

    Returns:
      [B, H', W', K] with H' = (H + 2 padding - h) // stride + 1.

    Differentiable in reverse mode, to any order; forward mode (`jax.jvp`) is not
    supported.
    """
    return _conv2d(images, kernel, stride, padding)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _conv2d(images: Array, kernel: Array, stride: int, padding: int) -> Array:
    return _convolve(images, kernel, stride, padding)


def _convolve(images: Array, kernel: Array, stride: int, padding: int) -> Array:
    return lax.conv_general_dilated(
        images,
        kernel,
        window_strides=(stride, stride),
        padding=((padding, padding), (padding, padding)),
        dimension_numbers=_DIMENSIONS,
    )


def _forward(
    images: Array, kernel: Array, stride: int, padding: int
) -> tuple[Array, tuple[Array, Array]]:
    return _convolve(images, kernel, stride, padding), (images, kernel)


def _backward(
    stride: int, padding: int, residuals: tuple[Array, Array], cotangent: Array
) -> tuple[Array, Array]:
    images, kernel = residuals

    def native(cotangent: Array, kernel: Array) -> Array:
        _, vjp = jax.vjp(lambda x: _convolve(x, kernel, stride, padding), images)
        return vjp(cotangent)[0]

    def canonical(cotangent: Array, kernel: Array) -> Array:
        return _input_gradient(cotangent, kernel, images.shape, stride, padding)

    image_gradient = lax.platform_dependent(
        cotangent, kernel, cpu=canonical, default=native
    )
    _, vjp = jax.vjp(lambda k: _convolve(images, k, stride, padding), kernel)
    return image_gradient, vjp(cotangent)[0]


def _input_gradient(
    cotangent: Array, kernel: Array, shape: tuple[int, ...], stride: int, padding: int
) -> Array:
    """The transpose of `_convolve` in its first argument, as a forward convolution."""
    flipped = jnp.flip(kernel, (0, 1)).swapaxes(2, 3)

    def pads(axis: int) -> tuple[int, int]:
        window = kernel.shape[axis - 1]
        low = window - 1 - padding
        dilated = (cotangent.shape[axis] - 1) * stride + 1
        return low, shape[axis] + window - 1 - dilated - low

    return lax.conv_general_dilated(
        cotangent,
        flipped,
        window_strides=(1, 1),
        padding=(pads(1), pads(2)),
        lhs_dilation=(stride, stride),
        dimension_numbers=_DIMENSIONS,
    )


_conv2d.defvjp(_forward, _backward)
