"""A PyTorch module as two functions of NumPy arrays: logits, and pulled-back gradients.

A module that an attack cannot use is refused in one line: logits that depend on the
batch or are not [B, K], a gradient that is cut off.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from samrobust.checks import check
from samrobust.models.torch.files import import_torch
from samrobust.models.torch.wrapping import listed

__all__ = ["TorchModule", "channels_first", "channels_last"]

_REASON = 300  # characters of a module's own error


class TorchModule:
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
        return channels_last(gradient).astype(images.dtype)

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
        return self._torch.from_numpy(channels_first(wide)).to(self._place()[0])

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


def channels_last(images: Any) -> np.ndarray:
    """Returns a PyTorch batch [B, C, H, W] as [B, H, W, C]; halves in float32."""
    return np.array(np.moveaxis(_wide(images).numpy(), 1, -1), order="C")


def channels_first(images: np.ndarray) -> np.ndarray:
    """Returns a batch [B, H, W, C] as [B, C, H, W]."""
    return np.array(np.moveaxis(images, -1, 1), order="C")
