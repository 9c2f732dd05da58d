"""Bridges: a JAX classifier as a PyTorch module, a PyTorch module as `logits_fn`.

No weights move, so any network will do on either side; images and gradients do, through
the host's memory. Here images are [B, H, W, C], in PyTorch [B, C, H, W], both with
pixels in [0, 1]. Only gradients with respect to the images cross, of first order.

A module that an attack cannot use is refused in one line: logits that depend on the
batch or are not [B, K], a gradient that is cut off.
"""

import functools
import logging
import types
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from samrobust.checks import check
from samrobust.models.torch.files import import_torch
from samrobust.models.torch.wrapping import listed
from samrobust.system.jax_internals import CALLBACK_LOGGER
from samrobust.types import Array, LogitsFn

__all__ = ["as_torch", "from_torch"]

_X64 = "jax_enable_x64"
_REASON = 300  # characters of a module's own error


def as_torch(logits_fn: LogitsFn, *, device: Any = "cpu") -> Any:
    """Returns a `torch.nn.Module` that computes what `logits_fn` does, gradients too.

    For attack libraries written for PyTorch. Another batch shape is compiled again.

    Args:
      logits_fn: images [B, H, W, C] in [0, 1] to logits [B, K].
      device: PyTorch's, where the attack library is to put its images.

    Returns:
      A module in evaluation mode: images [B, C, H, W] to logits [B, K], on the images'
      device. Its one parameter is empty and says which `device` the module is on, as
      attack libraries ask of a model; `module.to` changes it. Images are float32;
      bfloat16 is computed in float32; float64 needs JAX's x64. **Guarantees**: the
      gradient is that of `jax.vjp`; the network runs once when a gradient is needed.

    Raises:
      ValueError: if PyTorch is not installed; by the module, for images of another
        type and for logits that are no [B, K].
    """
    torch = import_torch("make a module of a JAX classifier")
    predict = jax.jit(logits_fn)
    predict_and_pull_back = jax.jit(functools.partial(jax.vjp, logits_fn))
    pull_back = jax.jit(lambda vjp, cotangent: vjp(cotangent)[0])

    def to_jax(images: Any) -> Array:
        wide = images.dtype == torch.float64
        check(
            images.is_floating_point() and (not wide or jax.config.read(_X64)),
            "images of float32",
            f"For float64 set `jax.config.update({_X64!r}, True)`; else convert them.",
            dtype=images.dtype,
        )
        return jnp.asarray(_channels_last(images))

    def to_torch(array: Array, device: Any) -> Any:
        dtype = array.dtype if array.dtype == np.float64 else np.float32
        return torch.from_numpy(np.array(array, dtype, order="C")).to(device)

    def check_logits(logits: Array, images: Array) -> Array:
        check(
            logits.ndim == 2 and len(logits) == len(images),
            f"logits [{len(images)}, K] from logits_fn",
            shape=logits.shape,
        )
        return logits

    class Bridge(torch.autograd.Function):
        @staticmethod
        def forward(context: Any, images: Any) -> Any:
            ours = to_jax(images)
            if not context.needs_input_grad[0]:
                return to_torch(check_logits(predict(ours), ours), images.device)
            logits, context.vjp = predict_and_pull_back(ours)
            context.logits_dtype = logits.dtype
            return to_torch(check_logits(logits, ours), images.device)

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(context: Any, cotangent: Any) -> Any:
            ours = jnp.asarray(cotangent.cpu().numpy(), context.logits_dtype)
            gradient = _channels_first(np.asarray(pull_back(context.vjp, ours)))
            return torch.from_numpy(gradient).to(cotangent.device)

    class Classifier(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            nothing = torch.empty(0, device=device)
            self.placement = torch.nn.Parameter(nothing, requires_grad=False)

        def forward(self, images: Any) -> Any:
            return Bridge.apply(images)

    return Classifier().eval()


def from_torch(module: Callable[[Any], Any]) -> LogitsFn:
    """Returns a `logits_fn` that calls a PyTorch module, gradients included.

    For `samrobust.attacks` on a network in PyTorch: inside `jit` and its loops too. The
    module is run on the device that its weights are on, with images of their type.

    Args:
      module: a `torch.nn.Module` in evaluation mode: images [B, C, H, W] to logits
        [B, K]. Each call uses its current parameters. A module from `torch.export`
        takes the batch sizes that it was exported for.

    Returns:
      Images [B, H, W, C] to logits [B, K] in float32, or float64 where the images are;
      differentiable once, in reverse mode. **Guarantees**: the gradient is that of
      `torch.autograd.grad`; the parameters' gradients are left alone.

    Raises:
      ValueError: if PyTorch is not installed, or a part of the module is in training
        mode, where its answer for an image would depend on the others; by `logits_fn`
        also if the module fails, its logits are no [B, K], or a gradient is needed
        but cut off. JAX raises what shows only while a compiled program runs as its own
        error, which ends in the same line.
    """
    called = _TorchModule(module)

    @functools.cache
    def count_classes(shape: tuple[int, ...], dtype: Any) -> int:
        return called.predict(np.zeros(shape, dtype)).shape[1]

    @functools.cache
    def try_gradient(shape: tuple[int, ...], dtype: Any) -> None:
        images = np.zeros(shape, dtype)
        called.pull_back(images, np.ones_like(called.predict(images)))

    def predict(images: Array) -> Array:
        check(
            jnp.issubdtype(images.dtype, jnp.floating),
            "images of floats in [0, 1]",
            dtype=images.dtype,
        )
        if not isinstance(images, Tracer):
            return jnp.asarray(called.predict(np.asarray(images)))
        called.check_mode()
        dtype = jnp.float64 if images.dtype == jnp.float64 else jnp.float32
        num_classes = count_classes(images.shape, images.dtype)
        shape = jax.ShapeDtypeStruct((images.shape[0], num_classes), dtype)
        return _callback(called.predict, shape, images)

    @jax.custom_vjp
    def logits_fn(images: Array) -> Array:
        return predict(images)

    def forward(images: Array) -> tuple[Array, Array]:
        try_gradient(images.shape, images.dtype)
        return predict(images), images

    def backward(images: Array, cotangent: Array) -> tuple[Array]:
        shape = jax.ShapeDtypeStruct(images.shape, images.dtype)
        return (_callback(called.pull_back, shape, images, cotangent),)

    logits_fn.defvjp(forward, backward)
    return logits_fn


class _TorchModule:
    """A module that is called with images [B, H, W, C] and gives logits [B, K].

    Each call uses the module's current parameters, dtype, device and mode.

    Args:
      module: a `torch.nn.Module`, or a function, of images [B, C, H, W].

    Raises:
      ValueError: if PyTorch is not installed; here and by every method, if a part of
        the module is in training mode.
    """

    def __init__(self, module: Callable[[Any], Any]):
        self._torch = import_torch("call a module")
        self._module = module
        self.check_mode()

    def check_mode(self) -> None:
        """Refuses a module of which any part trains.

        An image's logits then depend on the others, and its running statistics move.
        """
        training = self._in_training()
        check(
            not training,
            "a module in evaluation mode, and all its parts",
            "Call `module.eval()`, before `torch.export` if it is an exported one.",
            training=listed(name or "the module itself" for name in training),
        )

    def predict(self, images: np.ndarray) -> np.ndarray:
        """Returns logits [B, K] of images [B, H, W, C], in float32 or float64."""
        torch = self._torch
        self.check_mode()
        with torch.inference_mode(mode=False), torch.no_grad():
            logits = self._call(self._to_torch(images))
            return _wide(logits).numpy().astype(_logits_dtype(images))

    def pull_back(self, images: np.ndarray, cotangent: np.ndarray) -> np.ndarray:
        """Returns the gradient of `sum(logits * cotangent)`, like the images."""
        torch = self._torch
        self.check_mode()
        with torch.inference_mode(mode=False), torch.enable_grad():
            leaf = self._to_torch(images).requires_grad_()
            logits = self._call(leaf)
            weights = torch.from_numpy(np.array(cotangent)).to(logits)
            gradient = self._gradient(logits, leaf, weights)
        return _channels_last(gradient).astype(images.dtype)

    def _in_training(self) -> list[str]:
        found, exported = [], []
        named = getattr(self._module, "named_modules", None)
        for name, part in () if named is None else named():
            if any(f"{name}.".startswith(root) for root in exported):
                continue
            if isinstance(part, self._torch.fx.GraphModule) and "eval" in vars(part):
                # `torch.export` freezes the mode into the operations; the flag of the
                # module says nothing, and cannot be changed.
                exported.append(f"{name}." if name else "")
                if any(self._trains(node) for node in part.graph.nodes):
                    found.append(name)
            elif part.training:
                found.append(name)
        return found

    def _trains(self, node: Any) -> bool:
        schema = getattr(node.target, "_schema", None)
        if schema is None:
            return False
        names = [argument.name for argument in schema.arguments]
        given = dict(zip(names, node.args, strict=False)) | dict(node.kwargs)
        for name in ("training", "train"):
            if name in given:
                return given[name] is True
        return self._torch.Tag.nondeterministic_seeded in node.target.tags

    def _to_torch(self, images: np.ndarray) -> Any:
        """Returns a copy on the module's device, in float32 or float64."""
        wide = np.array(images, _logits_dtype(images))
        return self._torch.from_numpy(_channels_first(wide)).to(self._place()[0])

    def _place(self) -> tuple[Any, Any]:
        """Returns device and dtype of the first weights; "cpu" and None without any."""
        for name in ("parameters", "buffers"):
            for tensor in getattr(self._module, name, tuple)():
                if tensor.is_floating_point():
                    return tensor.device, tensor.dtype
        return "cpu", None

    def _call(self, images: Any) -> Any:
        """Returns logits [B, K] of the module, which may overwrite its input."""
        own = images.to(self._place()[1] or images.dtype).clone()
        try:
            logits = self._module(own)
        except Exception as error:  # whatever a module raises
            raise self._failed("takes", images, error) from error
        is_tensor = isinstance(logits, self._torch.Tensor)
        shape = list(logits.shape) if is_tensor else type(logits).__name__
        check(
            is_tensor
            and logits.is_floating_point()
            and logits.layout is self._torch.strided
            and logits.ndim == 2
            and len(logits) == len(images),
            f"logits [{len(images)}, K] of floats from the module",
            "Give a function that picks or reshapes them: `lambda x: module(x)[0]`.",
            logits=f"{shape} {logits.dtype}" if is_tensor else shape,
        )
        return logits

    def _gradient(self, logits: Any, leaf: Any, weights: Any) -> Any:
        grad = self._torch.autograd.grad
        gradient = None
        if logits.requires_grad:
            try:
                (gradient,) = grad(logits, leaf, weights, allow_unused=True)
            except Exception as error:  # of a hook, or of an operation without gradient
                raise self._failed("is differentiable at", leaf, error) from error
        check(
            gradient is not None,
            "logits with a gradient with respect to the images",
            "Does the module detach them, or use no_grad or inference_mode?",
            gradient=gradient,
        )
        return gradient

    def _failed(self, does: str, images: Any, error: Exception) -> ValueError:
        lines = str(error).strip().splitlines() or [""]
        return ValueError(
            f"Expected a module that {does} images {list(images.shape)}, got "
            f"{type(error).__name__}: {lines[0][:_REASON]}"
        )


def _logits_dtype(images: np.ndarray) -> type:
    return np.float64 if images.dtype == np.float64 else np.float32


def _wide(tensor: Any) -> Any:
    """Returns the tensor on the host, in a type that NumPy has."""
    tensor = tensor.detach().cpu()
    return tensor if tensor.element_size() == 8 else tensor.float()


def _channels_last(images: Any) -> np.ndarray:
    """Returns a PyTorch batch [B, C, H, W] as [B, H, W, C]; halves in float32."""
    return np.array(np.moveaxis(_wide(images).numpy(), 1, -1), order="C")


def _channels_first(images: np.ndarray) -> np.ndarray:
    """Returns a batch [B, H, W, C] as [B, C, H, W]."""
    return np.array(np.moveaxis(images, -1, 1), order="C")


class _CallError(ValueError):
    """Error of a module while a compiled program ran."""


# JAX logs the errors of callbacks with their traceback before it raises them.
logging.getLogger(CALLBACK_LOGGER).addFilter(
    lambda record: not (record.exc_info and record.exc_info[0] is _CallError)
)


def _callback(
    function: Callable[..., np.ndarray], like: jax.ShapeDtypeStruct, *arrays: Array
) -> Array:
    """Calls `jax.pure_callback`; an error is one line, without the program's frames."""

    def call(*arrays: Any) -> np.ndarray:
        try:
            result = function(*map(np.asarray, arrays))
            check(
                result.shape == like.shape,
                f"{list(like.shape)} from the module, as when it was compiled",
                shape=list(result.shape),
            )
        except ValueError as error:
            message = str(error)
        else:
            return result
        # XLA prints the callers of the innermost frame; this one has none.
        frame = _nowhere().gi_frame
        alone = types.TracebackType(None, frame, 0, frame.f_lineno)
        raise _CallError(message).with_traceback(alone)

    return jax.pure_callback(call, like, *arrays, vmap_method="sequential")


def _nowhere() -> Any:
    """Yields never: what counts is its frame, which has no caller."""
    yield
