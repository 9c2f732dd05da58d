"""Calls across: a JAX classifier as a PyTorch module, a PyTorch module as `logits_fn`.

No weights move, so any network will do on either side; images and gradients do, through
the host's memory. Here images are [B, H, W, C], in PyTorch [B, C, H, W], both with
pixels in [0, 1]. Only gradients with respect to the images cross, of first order.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from samrobust.checks import check
from samrobust.interchange.pytorch import import_torch
from samrobust.types import Array, LogitsFn

__all__ = ["as_torch", "from_torch"]


def as_torch(logits_fn: LogitsFn) -> Any:
    """A `torch.nn.Module` that computes what `logits_fn` does, gradients included.

    For attack libraries written for PyTorch. A batch of another shape compiles anew.

    Args:
      logits_fn: images [B, H, W, C] in [0, 1] to logits [B, K].

    Returns:
      A module in evaluation mode, without parameters: float32 images [B, C, H, W] to
      logits [B, K], on the images' device. **Guarantees**: the gradient is that of
      `jax.vjp`; the network is run once where a gradient is asked for.

    Raises:
      ValueError: if PyTorch is not installed.
    """
    torch = import_torch("make a module of a JAX classifier")
    predict = jax.jit(logits_fn)
    predict_and_pull_back = jax.jit(functools.partial(jax.vjp, logits_fn))
    pull_back = jax.jit(lambda vjp, cotangent: vjp(cotangent)[0])

    def to_torch(array: Any, device: Any) -> Any:
        return torch.from_numpy(np.array(array, order="C")).to(device)

    class Call(torch.autograd.Function):
        @staticmethod
        def forward(context: Any, images: Any) -> Any:
            ours = jnp.asarray(_channels_last(images))
            if not context.needs_input_grad[0]:
                return to_torch(predict(ours), images.device)
            logits, context.vjp = predict_and_pull_back(ours)
            context.logits_dtype = logits.dtype
            return to_torch(logits, images.device)

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(context: Any, cotangent: Any) -> Any:
            ours = jnp.asarray(cotangent.cpu().numpy(), context.logits_dtype)
            gradient = np.moveaxis(np.asarray(pull_back(context.vjp, ours)), -1, 1)
            return to_torch(gradient, cotangent.device)

    class Classifier(torch.nn.Module):
        def forward(self, images: Any) -> Any:
            return Call.apply(images)

    return Classifier().eval()


def from_torch(module: Callable[[Any], Any]) -> LogitsFn:
    """A `logits_fn` that calls a PyTorch module, gradients included.

    For `samrobust.attacks` on a network in PyTorch: inside `jit` and its loops too. The
    module is run on the device that its parameters are on.

    Args:
      module: a `torch.nn.Module` in evaluation mode: float32 images [B, C, H, W] to
        logits [B, K]. Its parameters are as they are at the time of each call.

    Returns:
      Images float32 [B, H, W, C] to logits float32 [B, K]; differentiable once, in
      reverse mode. **Guarantees**: the gradient is that of `torch.autograd.grad`; the
      parameters' gradients are left alone.

    Raises:
      ValueError: if PyTorch is not installed, or the module is in training mode, where
        its answer for an image would depend on the others.
    """
    torch = import_torch("call a module")
    training = getattr(module, "training", False)
    check(
        not training,
        "a module in evaluation mode",
        "Call `module.eval()` first.",
        training=training,
    )
    parameter = next(iter(getattr(module, "parameters", tuple)()), None)
    device = "cpu" if parameter is None else parameter.device

    def to_torch(images: Any) -> Any:
        return torch.from_numpy(np.moveaxis(np.array(images), -1, 1).copy()).to(device)

    def predict(images: Any) -> np.ndarray:
        with torch.no_grad():
            return module(to_torch(images)).cpu().numpy().astype(np.float32)

    def pull_back(images: Any, cotangent: Any) -> np.ndarray:
        with torch.enable_grad():
            leaf = to_torch(images).requires_grad_()
            logits = module(leaf)
            weights = torch.from_numpy(np.array(cotangent)).to(logits)
            (gradient,) = torch.autograd.grad(logits, leaf, weights)
        return _channels_last(gradient)

    @functools.cache
    def count_classes(shape: tuple[int, ...]) -> int:
        return predict(np.zeros((1, *shape), np.float32)).shape[-1]

    @jax.custom_vjp
    def logits_fn(images: Array) -> Array:
        num_classes = count_classes(images.shape[1:])
        shape = jax.ShapeDtypeStruct((images.shape[0], num_classes), jnp.float32)
        return jax.pure_callback(predict, shape, images, vmap_method="sequential")

    def forward(images: Array) -> tuple[Array, Array]:
        return logits_fn(images), images

    def backward(images: Array, cotangent: Array) -> tuple[Array]:
        shape = jax.ShapeDtypeStruct(images.shape, images.dtype)
        return (
            jax.pure_callback(
                pull_back, shape, images, cotangent, vmap_method="sequential"
            ),
        )

    logits_fn.defvjp(forward, backward)
    return logits_fn


def _channels_last(images: Any) -> np.ndarray:
    """A PyTorch batch [B, C, H, W] as a NumPy array [B, H, W, C]."""
    return np.array(np.moveaxis(images.detach().cpu().numpy(), 1, -1), order="C")
