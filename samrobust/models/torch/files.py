"""PyTorch's own files: written, and read without running what they hold.

A `.pth` file may hold anything. It is searched for networks, that is, for mappings with
the tensor of a last layer; there must be exactly one, so that an average of weights is
never mistaken for the weights, nor vice versa.
"""

import io
import pathlib
import re
import warnings
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from samrobust.models.torch.wrapping import first_of, is_head, listed

__all__ = ["import_torch", "read_pytorch", "torch_bytes"]

# A pickle's names for a NumPy scalar and its type: training loops save accuracies so.
_SCALARS = ("numpy.dtype", "numpy._core.multiarray.scalar")
_SCALARS_OF_OLD = ("numpy.core.multiarray.scalar",)
_FLOATS = ("float16", "bfloat16", "float32", "float64")
_COUNTS = ("int8", "uint8", "int16", "int32", "int64")
_REASON = 200  # characters of PyTorch's message


def import_torch(purpose: str) -> Any:
    """Imports PyTorch, which is no dependency of this package.

    Raises:
      ValueError: if it is not installed; names the fix.
    """
    try:
        import torch
    except ImportError:
        raise ValueError(
            f"Expected PyTorch, to {purpose}, got no package torch. Run `pip install "
            "torch`; or use safetensors files, which do not need it."
        ) from None
    return torch


def torch_bytes(tensors: Mapping[str, np.ndarray]) -> bytes:
    """Returns what `torch.save` makes of a state dict with these tensors."""
    torch = import_torch("write its files")
    buffer = io.BytesIO()
    torch.save({n: torch.from_numpy(np.array(t)) for n, t in tensors.items()}, buffer)
    return buffer.getvalue()


def read_pytorch(
    path: pathlib.Path, *, is_whole: bool = False
) -> tuple[dict[str, np.ndarray], tuple[str, ...]]:
    """Reads the one network of a file.

    Args:
      path: of the file.
      is_whole: whether the file is known to be one state dict, of any network.

    Returns:
      Arrays of floats or integers by the file's names; and a sentence for everything
      that was chosen or left out.

    Raises:
      ValueError: if the file is damaged or holds what is not loaded safely, or not one
        network of plain tensors; says what was found.
    """
    torch = import_torch("read its files")
    loaded = _load(path, torch)
    is_known = is_whole and isinstance(loaded, Mapping)
    place, state = ("", loaded) if is_known else _only_network(loaded, path, torch)
    notes = [f"Of the file its entry {place} was taken."] if place else []
    is_tensor = {name: isinstance(value, torch.Tensor) for name, value in state.items()}
    others = [name for name, tensor in is_tensor.items() if not tensor]
    if others:
        notes.append(f"Left out as no tensors: {listed(others)}.")
    tensors = {str(n): state[n] for n, tensor in is_tensor.items() if tensor}
    _check_kinds(tensors, path.stat().st_size, torch)
    return {n: _as_array(t, torch) for n, t in tensors.items()}, tuple(notes)


class _Inert:
    """A stand-in for a NumPy scalar or its type: accepts any state, does nothing."""

    def __init__(self, *_: object):
        pass

    def __setstate__(self, _: object) -> None:
        pass


def _load(path: pathlib.Path, torch: Any) -> Any:
    inert = [(_Inert, name) for name in (*_SCALARS, *_SCALARS_OF_OLD)]
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals(inert):
            warnings.simplefilter("ignore")  # of old protocols; what counts is raised
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # PyTorch raises many kinds on damaged files
        raise ValueError(
            f"Expected a PyTorch file of tensors alone, got path={str(path)!r}, which "
            f"is damaged or holds other objects ({_reason(error)}). Nothing in it was "
            "run. Save `model.state_dict()` where you trust the file, and import that."
        ) from None  # its own advice is to load it unsafely


def _reason(error: Exception) -> str:
    """Returns PyTorch's complaint in one line, without its advice to trust the file."""
    text = str(error)
    other = re.search(r"GLOBAL ([\w.]+)", text)
    if other:
        return f"{other[1][:_REASON]}"
    _, _, inner = text.partition("WeightsUnpickler error: ")
    line = (inner or text).strip().partition("\n")[0]
    if "TorchScript" in line:
        return "a TorchScript archive"
    if not line or "weights_only" in line or "trust" in line:
        return type(error).__name__
    return "".join(c for c in line if c.isprintable())[:_REASON]


def _only_network(
    loaded: Any, path: pathlib.Path, torch: Any
) -> tuple[str, Mapping[str, Any]]:
    """Returns the entry that holds the one state dict, and the state dict."""
    found = _networks(loaded, torch)
    if len(found) == 1:
        return found[0]
    if found:
        entries = listed(place or "the file itself" for place, _ in found)
        raise ValueError(
            f"Expected one network in the file, got path={str(path)!r} with "
            f"{len(found)}: {entries}. Save the one that is meant in a file of its own."
        )
    if isinstance(loaded, Mapping):
        what = f"the keys {listed(loaded)}" if loaded else "no key"
    else:
        what = f"a {type(loaded).__name__}"
    raise ValueError(
        "Expected a state dict, or a checkpoint with one, with a tensor linear.weight, "
        f"got path={str(path)!r} with {what}. Is it a pre-activation ResNet, with the "
        "names of the paper's code?"
    )


def _networks(loaded: Any, torch: Any) -> list[tuple[str, Mapping[str, Any]]]:
    """Finds all mappings with a last layer at any depth, each with its entry."""
    found, seen, waiting = [], set(), [("", loaded)]
    while waiting:
        place, value = waiting.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, Mapping):
            items = value.items()
            if any(is_head(n) and isinstance(t, torch.Tensor) for n, t in items):
                found.append((place, value))
        else:
            items = enumerate(value)
        for name, inner in items:
            if isinstance(inner, Mapping | list | tuple):
                # Cut, or the places of a deep file would take more room than the file.
                waiting.append((f"{place}.{listed([name])}".lstrip(".")[:80], inner))
    return found[::-1]


def _check_kinds(tensors: Mapping[str, Any], size: int, torch: Any) -> None:
    """Refuses tensors that are no plain arrays, before memory is taken for them."""
    problems = {name: _problem(tensor, size, torch) for name, tensor in tensors.items()}
    wrong = [f"{listed([n])} is {what}" for n, what in problems.items() if what]
    if wrong:
        raise ValueError(
            f"Expected plain tensors of floats, got {first_of(wrong)}. Convert the "
            "file first."
        )


def _problem(tensor: Any, size: int, torch: Any) -> str:
    if tensor.is_nested or tensor.layout is not torch.strided:
        return str(tensor.layout).removeprefix("torch.")
    if tensor.device.type != "cpu":
        return f"on the device {tensor.device.type}, without values"
    if tensor.numel() * tensor.element_size() > size:
        return f"{list(tensor.shape)[:8]}, more than the file holds"
    kind = str(tensor.dtype).removeprefix("torch.")
    return "" if kind in (*_FLOATS, *_COUNTS) else kind


def _as_array(tensor: Any, torch: Any) -> np.ndarray:
    tensor = tensor.detach().resolve_neg()
    if tensor.dtype == torch.bfloat16:  # which NumPy does not have
        return tensor.contiguous().view(torch.int16).numpy().view(jnp.bfloat16)
    return tensor.numpy()
