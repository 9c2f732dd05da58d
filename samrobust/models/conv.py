"""A 2-D convolution whose gradients are fast on the CPU, inside loops and outside.

XLA's CPU compiler brings convolutions into its fast form in the entry computation
alone, and merges the transpositions that this takes with the elementwise work around
them, into loops that stride through memory. So the gradients as JAX derives them are
slow in the entry computation, and naive loops inside `lax.fori_loop`, `scan` or `cond`:
where PGD computes them. Here both gradients, and theirs in turn, are written as forward
convolutions, fast everywhere, and their transpositions stand in functions of their own,
which XLA neither merges nor repeats: those of the kernels leave the loop of an attack
altogether. Images smaller than the window, the last stage of a network for digits, XLA
leaves to a naive loop as well (25 to 100 times as slow); they are multiplied by the
matrix that the convolution is. The choice is made when a function is lowered for its
platform: on GPU and TPU the convolution and its gradients are JAX's own.

Conventions: NHWC images, HWIO kernels, symmetric padding as in PyTorch.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.xla_metadata import set_xla_metadata

from samrobust.types import Array

__all__ = ["conv2d"]

_DIMENSIONS = ("NHWC", "HWIO", "NHWC")


def conv2d(images: Array, kernel: Array, stride: int, padding: int) -> Array:
    """Correlates images with a kernel, as `torch.nn.functional.conv2d`.

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


# With C the convolution of images x with a kernel k, the form <y, C(x, k)> is linear in
# x, k and y; I(y, k) and K(y, x) below are its gradients in x and in k. So each of the
# three has the other two as its gradients, and all orders are as fast as the first.


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _conv2d(images: Array, kernel: Array, stride: int, padding: int) -> Array:
    """Returns C(x, k)."""
    convolve = functools.partial(_convolve, stride=stride, padding=padding)
    if not _is_smaller(images, kernel):
        return convolve(images, kernel)
    multiply = functools.partial(_multiply, stride=stride, padding=padding)
    return lax.platform_dependent(images, kernel, cpu=multiply, default=convolve)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _to_images(
    cotangent: Array, kernel: Array, shape: tuple[int, ...], stride: int, padding: int
) -> Array:
    """Returns I(y, k), of the shape of the images."""

    def native(y: Array, kernel: Array) -> Array:
        return _transpose_at(y, lambda x: _convolve(x, kernel, stride, padding), shape)

    own = functools.partial(
        _image_gradient, shape=shape, stride=stride, padding=padding
    )
    return lax.platform_dependent(cotangent, kernel, cpu=own, default=native)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _to_kernel(
    cotangent: Array, images: Array, shape: tuple[int, ...], stride: int, padding: int
) -> Array:
    """Returns K(y, x), of the shape of the kernel."""

    def native(y: Array, images: Array) -> Array:
        return _transpose_at(y, lambda k: _convolve(images, k, stride, padding), shape)

    own = functools.partial(
        _kernel_gradient, window=shape[:2], stride=stride, padding=padding
    )
    return lax.platform_dependent(cotangent, images, cpu=own, default=native)


def _transpose_at(
    y: Array, linear: Callable[[Array], Array], shape: tuple[int, ...]
) -> Array:
    """Applies the transpose of a linear map of arrays of a shape."""
    return jax.linear_transpose(linear, jax.ShapeDtypeStruct(shape, y.dtype))(y)[0]


def _keep(function: Callable[..., Any]) -> Callable[..., Any]:
    """Returns the forward rule: both arrays are kept."""
    return lambda one, other, *rest: (function(one, other, *rest), (one, other))


def _backward(stride: int, padding: int, kept: Any, cotangent: Array) -> Any:
    images, kernel = kept
    return (
        _to_images(cotangent, kernel, images.shape, stride, padding),
        _to_kernel(cotangent, images, kernel.shape, stride, padding),
    )


def _images_backward(
    shape: tuple[int, ...], stride: int, padding: int, kept: Any, images: Array
) -> Any:
    del shape
    cotangent, kernel = kept
    return (
        _conv2d(images, kernel, stride, padding),
        _to_kernel(cotangent, images, kernel.shape, stride, padding),
    )


def _kernel_backward(
    shape: tuple[int, ...], stride: int, padding: int, kept: Any, kernel: Array
) -> Any:
    del shape
    cotangent, images = kept
    return (
        _conv2d(images, kernel, stride, padding),
        _to_images(cotangent, kernel, images.shape, stride, padding),
    )


_conv2d.defvjp(_keep(_conv2d), _backward)
_to_images.defvjp(_keep(_to_images), _images_backward)
_to_kernel.defvjp(_keep(_to_kernel), _kernel_backward)


def _convolve(images: Array, kernel: Array, stride: int, padding: int) -> Array:
    return lax.conv_general_dilated(
        images,
        kernel,
        window_strides=(stride, stride),
        padding=((padding, padding), (padding, padding)),
        dimension_numbers=_DIMENSIONS,
    )


def _apart(function: Callable[..., Array]) -> Callable[..., Array]:
    """Returns a function that XLA keeps as a computation of its own."""
    jitted = jax.jit(function)

    def call(*arrays: Array) -> Array:
        with set_xla_metadata(inlineable="false"):
            return jitted(*arrays)

    return call


def _image_gradient(
    cotangent: Array,
    kernel: Array,
    *,
    shape: tuple[int, ...],
    stride: int,
    padding: int,
) -> Array:
    """Transposes `_convolve` in its first argument, as a forward convolution."""
    if _is_smaller(cotangent, kernel):
        matrix = _matrix(kernel, shape[1:3], stride, padding)
        return jnp.einsum("bijk,hwcijk->bhwc", cotangent, matrix)
    flipped = _apart(_flip)(kernel)

    def pads(axis: int) -> tuple[int, int]:
        window = kernel.shape[axis - 1]
        # A transposed convolution: the cotangent spread by the stride, full padding.
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


def _is_smaller(images: Array, kernel: Array) -> bool:
    """Tells whether images [B, H, W, C] are smaller than the window along an axis."""
    return images.shape[1] < kernel.shape[0] or images.shape[2] < kernel.shape[1]


def _multiply(images: Array, kernel: Array, *, stride: int, padding: int) -> Array:
    """Computes `_convolve` as a matrix product."""
    # Most taps fall into the padding here: the whole matrix is small.
    matrix = _matrix(kernel, images.shape[1:3], stride, padding)
    return jnp.einsum("bhwc,hwcijk->bijk", images, matrix)


def _matrix(kernel: Array, size: tuple[int, ...], stride: int, padding: int) -> Array:
    """Returns the linear map that `_convolve` is, [H, W, C, H', W', K]."""

    def taps(size: int, window: int) -> np.ndarray:
        """Tells by 0 or 1 which tap of the window joins a pixel and an output."""
        num_outputs = (size + 2 * padding - window) // stride + 1
        pixel, output, tap = np.ix_(range(size), range(num_outputs), range(window))
        return pixel == output * stride - padding + tap

    rows, columns = map(taps, size, kernel.shape[:2])
    return jnp.einsum(
        "hiu,wjv,uvck->hwcijk",
        rows.astype(kernel.dtype),
        columns.astype(kernel.dtype),
        kernel,
        precision=lax.Precision.HIGHEST,
    )


def _flip(kernel: Array) -> Array:
    return jnp.flip(kernel, (0, 1)).swapaxes(2, 3)


def _kernel_gradient(
    cotangent: Array,
    images: Array,
    *,
    window: tuple[int, ...],
    stride: int,
    padding: int,
) -> Array:
    """Transposes `_convolve` in its second argument, as a forward convolution.

    The channels take the place of the batch, and the batch that of the channels.
    """
    if window == (1, 1):  # so no padding: a matrix product over all pixels
        images = images[:, ::stride, ::stride]
        examples = (0, 1, 2)
        return jnp.tensordot(images, cotangent, (examples, examples))[None, None]

    def pads(axis: int) -> tuple[int, int]:
        dilated = (cotangent.shape[axis] - 1) * stride + 1
        return padding, window[axis - 1] + dilated - 1 - images.shape[axis] - padding

    # The convolution itself is not apart: summed over a batch that is split over
    # processes it ends in a message, and gloo needs all messages in one order, which
    # the CPU's executor keeps within a computation only. Its window is reversed twice:
    # XLA leaves a convolution with a reversed window to Eigen, where it otherwise uses
    # oneDNN, which takes up to 1.7 times as long for windows as large as images.
    upside_down = _apart(lambda y: lax.rev(y.transpose(1, 2, 0, 3), (0,)))(cotangent)
    gradient = lax.conv_general_dilated(
        _transpose(images, 3, 1, 2, 0),
        lax.rev(upside_down, (0,)),
        window_strides=(1, 1),
        padding=(pads(1), pads(2)),
        rhs_dilation=(stride, stride),
        dimension_numbers=_DIMENSIONS,
    )
    return _transpose(gradient, 1, 2, 0, 3)


def _transpose(array: Array, *axes: int) -> Array:
    return _apart(lambda x: x.transpose(axes))(array)
