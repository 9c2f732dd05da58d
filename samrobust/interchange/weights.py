"""Files of weights: safetensors, and PyTorch's, read without running what they hold.

Both hold tensors by PyTorch's names, see `samrobust.interchange.names`. What else one
must know of a network (mean and standard deviation of the pixels, classes, width,
blocks) stands in the header of a safetensors file, and in a JSON file beside one of
PyTorch, which keeps the SHA-256 of the weights it belongs to.
"""

import hashlib
import io
import json
import pathlib
import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy

from samrobust.checks import check
from samrobust.files import read_json, write_bytes, write_json
from samrobust.interchange.wrapping import Weights, unwrapped

__all__ = [
    "SUFFIXES",
    "Weights",
    "import_torch",
    "read_weights",
    "torch_bytes",
    "write_pytorch",
    "write_safetensors",
]

SUFFIXES = {"safetensors": (".safetensors",), "pytorch": (".pth", ".pt")}
_FIELDS = ("mean", "std", "num_classes", "width", "blocks")
_ENTRIES = ("state_dict", "model_state_dict", "net", "model")  # of a checkpoint
_PREFIX = "module."  # of `torch.nn.DataParallel`


def import_torch(purpose: str) -> Any:
    """PyTorch, which is no dependency of this package.

    Raises:
      ValueError: if it is not installed; says what is to be done.
    """
    try:
        import torch
    except ImportError:
        message = (
            f"Expected PyTorch, to {purpose}, got no package torch. Run `pip install "
            "torch`; or use safetensors files, which do not need it."
        )
        raise ValueError(message) from None
    return torch


def write_safetensors(path: pathlib.Path, weights: Weights) -> None:
    """Writes a safetensors file in one step."""
    header = {name: json.dumps(value) for name, value in weights.metadata.items()}
    write_bytes(
        path, safetensors.numpy.save(weights.tensors, {"format": "pt", **header})
    )


def write_pytorch(path: pathlib.Path, weights: Weights) -> None:
    """Writes a state dict for `torch.load`, and the JSON file beside it.

    Raises:
      ValueError: if PyTorch is not installed.
    """
    content = torch_bytes(weights.tensors)
    digest = hashlib.sha256(content).hexdigest()
    write_bytes(path, content)
    write_json(path.with_suffix(".json"), {**weights.metadata, "sha256": digest})


def torch_bytes(tensors: Mapping[str, np.ndarray]) -> bytes:
    """What `torch.save` makes of a state dict with these tensors."""
    torch = import_torch("write its files")
    buffer = io.BytesIO()
    torch.save({n: torch.from_numpy(np.array(t)) for n, t in tensors.items()}, buffer)
    return buffer.getvalue()


def read_weights(path: pathlib.Path) -> Weights:
    """Reads a file of weights: safetensors by its suffix, else PyTorch's.

    **Guarantees**: nothing in the file is run, and of a pickle nothing but tensors and
    plain containers is made. A prefix `module.` is dropped; of a checkpoint that holds
    more, the entry `state_dict`, `model_state_dict`, `net` or `model` is taken. Where
    the network stands behind a normalisation, as in a bundle for RobustBench, that is
    taken off and becomes `mean` and `std` of the metadata.

    Raises:
      ValueError: if there is no such file, it is damaged, holds anything but tensors,
        or PyTorch is needed and not installed; if the JSON file beside it belongs to
        another one; or if the file normalises otherwise than its metadata says.
    """
    check(path.is_file(), "an existing file of weights", path=str(path))
    if path.suffix in SUFFIXES["safetensors"]:
        weights = _read_safetensors(path)
    else:
        weights = Weights(_read_pytorch(path), _metadata_beside(path))
    return unwrapped(weights)


def _read_safetensors(path: pathlib.Path) -> Weights:
    try:
        with safetensors.safe_open(path, framework="np") as file:
            header = file.metadata() or {}
            names = file.keys()
            kinds = {name: file.get_slice(name).get_dtype() for name in names}
            _check_kinds({n: k for n, k in kinds.items() if k not in ("F32", "I64")})
            tensors = {name: file.get_tensor(name) for name in names}
        metadata = {n: json.loads(header[n]) for n in _FIELDS if n in header}
    except (safetensors.SafetensorError, json.JSONDecodeError) as error:
        message = f"Expected a safetensors file, got path={str(path)!r} ({error})."
        raise ValueError(message) from error
    return Weights(_without_prefix(tensors), _checked(metadata))


def _read_pytorch(path: pathlib.Path) -> dict[str, np.ndarray]:
    torch = import_torch("read its files")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of old protocols; what counts is raised
            loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # PyTorch raises many kinds on damaged files
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        message = (
            f"Expected a PyTorch file of tensors alone, got path={str(path)!r}, which "
            f"is damaged or holds other objects ({reason}). Nothing in it was run. "
            "Save `model.state_dict()` where you trust the file, and import that."
        )
        raise ValueError(message) from error
    state = _state_dict(loaded, path, torch)
    float32, int64 = torch.float32, torch.int64
    _check_kinds(
        {n: str(t.dtype) for n, t in state.items() if t.dtype not in (float32, int64)}
    )
    return _without_prefix({n: t.detach().numpy() for n, t in state.items()})


def _state_dict(loaded: Any, path: pathlib.Path, torch: Any) -> dict[str, Any]:
    """The tensors by name, of a state dict or of a checkpoint that has one."""
    candidates = [loaded]
    if isinstance(loaded, Mapping):
        candidates += [loaded[entry] for entry in _ENTRIES if entry in loaded]
    for candidate in candidates:
        if isinstance(candidate, Mapping) and all(
            isinstance(name, str) and isinstance(tensor, torch.Tensor)
            for name, tensor in candidate.items()
        ):
            return dict(candidate)
    message = (
        "Expected a state dict, or a checkpoint with one as its "
        f"{', '.join(_ENTRIES[:-1])} or {_ENTRIES[-1]}, got path={str(path)!r}."
    )
    raise ValueError(message)


def _check_kinds(others: Mapping[str, str]) -> None:
    check(not others, "float32 tensors", "Convert the file first.", tensors=others)


def _without_prefix(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name.removeprefix(_PREFIX): tensor for name, tensor in tensors.items()}


def _metadata_beside(path: pathlib.Path) -> dict[str, Any]:
    """What the JSON file beside a PyTorch file says; empty if there is none of ours."""
    beside = path.with_suffix(".json")
    found = read_json(beside)
    if not isinstance(found, dict) or "sha256" not in found:
        return {}
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    check(
        found["sha256"] == digest,
        f"{beside.name} to belong to {path.name}",
        "Put the file of these weights beside them, or remove it.",
        sha256=found["sha256"],
        sha256_of_the_weights=digest,
    )
    return _checked({name: found[name] for name in _FIELDS if name in found})


def _checked(metadata: dict[str, Any]) -> dict[str, Any]:
    """The metadata, if `mean` and `std` are lists of numbers and both or none there."""
    for name in ("mean", "std"):
        values = metadata.get(name, [])
        check(
            isinstance(values, list) and all(type(x) in (int, float) for x in values),
            f"a list of numbers for {name} in the file's metadata",
            **{name: values},
        )
    check(
        ("mean" in metadata) == ("std" in metadata),
        "mean and std in the file's metadata, or neither",
        metadata=metadata,
    )
    return metadata
