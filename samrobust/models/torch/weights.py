"""Files of weights: safetensors, and PyTorch's, read without running what they hold.

Both hold tensors by PyTorch's names, see `samrobust.models.torch.names`. The metadata
(mean and standard deviation of the pixels, classes, width, blocks, the run that the
network comes from) are in the header of a safetensors file, or in a JSON file next to
one of PyTorch, which holds the SHA-256 of the weights that it belongs to.
"""

import hashlib
import json
import math
import pathlib
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy

from samrobust.checks import check
from samrobust.models.torch.files import read_pytorch, torch_bytes
from samrobust.models.torch.wrapping import MOST_CHANNELS, Weights, listed, unwrapped
from samrobust.system.files import (
    WorkdirError,
    digest,
    glance,
    read_json,
    write_bytes,
    write_json,
)

__all__ = [
    "SUFFIXES",
    "Weights",
    "is_metadata",
    "read_weights",
    "write_pytorch",
    "write_safetensors",
]

SUFFIXES = {"safetensors": (".safetensors",), "pytorch": (".pth", ".pt")}
_FIELDS = ("mean", "std", "num_classes", "width", "blocks", "model", "origin")
_STORED = ("F16", "BF16", "F32", "F64", "I8", "U8", "I16", "I32", "I64")


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
    write_bytes(path, content)
    sha256 = hashlib.sha256(content).hexdigest()
    write_json(path.with_suffix(".json"), {**weights.metadata, "sha256": sha256})


def is_metadata(path: pathlib.Path) -> bool:
    """Returns whether a JSON file is of what `write_pytorch` writes beside weights."""
    return {"sha256", "origin"} <= glance(path).keys()


def read_weights(path: pathlib.Path) -> Weights:
    """Reads a file of weights: safetensors by its suffix, else PyTorch's.

    **Guarantees**: nothing in the file is run, and of a pickle nothing but tensors and
    plain containers is made. There is one network in the file, in whatever entry and
    behind whatever prefix. A normalization in front of it, as in RobustBench's bundles,
    is removed and becomes `mean` and `std` of the metadata. Floats of other sizes
    become float32; `notes` says so, and what else was chosen.

    Raises:
      ValueError: if there is no such file, it is damaged, holds anything but one
        network of plain tensors, or values beyond float32's; if PyTorch is needed and
        not installed; if the JSON file beside it belongs to another one; or if the file
        normalizes otherwise than its metadata says.
    """
    check(path.is_file(), "an existing file of weights", path=str(path))
    if path.suffix in SUFFIXES["safetensors"]:
        tensors, metadata = _read_safetensors(path)
        notes: tuple[str, ...] = ()
    else:
        metadata = _metadata_beside(path)
        tensors, notes = read_pytorch(path, is_whole="model" in metadata)
    tensors, of_types = _in_float32(tensors)
    weights = Weights(tensors, _checked(metadata), (*notes, *of_types))
    if "model" in metadata:  # of an export of another network, which nothing wraps
        return weights
    weights = unwrapped(weights)
    _checked(weights.metadata)
    return weights


def _read_safetensors(
    path: pathlib.Path,
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    try:
        with safetensors.safe_open(path, framework="np") as file:
            header = file.metadata() or {}
            names = file.keys()
            kinds = {name: file.get_slice(name).get_dtype() for name in names}
            others = {listed([n]): k for n, k in kinds.items() if k not in _STORED}
            check(not others, "tensors of floats", "Convert the file.", tensors=others)
            tensors = {name: file.get_tensor(name) for name in kinds}
    except safetensors.SafetensorError as error:
        raise _damaged(path, error) from error
    try:
        metadata = {n: json.loads(header[n]) for n in _FIELDS if n in header}
    except (ValueError, RecursionError) as error:
        raise _damaged(path, error) from error
    return tensors, metadata


def _damaged(path: pathlib.Path, error: Exception) -> ValueError:
    reason = " ".join(str(error).split())[:200]
    return ValueError(
        f"Expected a safetensors file, got path={str(path)!r} ({reason})."
    )


def _in_float32(
    tensors: Mapping[str, np.ndarray],
) -> tuple[dict[str, np.ndarray], list[str]]:
    """Returns floats as float32, integers as they are; and a sentence per other type.

    Raises:
      ValueError: if float32 cannot hold a value that is finite; names the tensor.
    """
    taken, notes = dict(tensors), []
    for dtype in sorted({t.dtype for t in tensors.values()}, key=str):
        if dtype == np.float32 or not jnp.issubdtype(dtype, np.floating):
            continue
        count = rounded = 0
        furthest = 0.0
        names = [name for name, tensor in tensors.items() if tensor.dtype == dtype]
        for name in names:
            before = tensors[name].astype(np.float64)
            with np.errstate(over="ignore"):
                taken[name] = tensors[name].astype(np.float32)
            beyond = np.isinf(taken[name]) & np.isfinite(before)
            check(
                not beyond.any(),
                "values that float32 holds",
                **{"tensor": listed([name]), "value": float(before[beyond][:1].sum())},
            )
            finite = np.isfinite(before)
            moved = np.abs(taken[name][finite] - before[finite])
            count, rounded = count + moved.size, rounded + np.count_nonzero(moved)
            furthest = max(furthest, float(moved.max(initial=0.0)))
        how = "which holds their values"
        if rounded:
            how = f"which moved {rounded} of {count} values, by {furthest:.2g} at most"
        notes.append(f"{len(names)} tensors of {dtype} became float32, {how}.")
    return taken, notes


def _metadata_beside(path: pathlib.Path) -> dict[str, Any]:
    """Reads the JSON file beside a PyTorch file; empty if none is ours."""
    beside = path.with_suffix(".json")
    try:
        found = read_json(beside)
    except (OSError, RecursionError, WorkdirError) as error:
        raise ValueError(
            f"Expected JSON in the file beside the weights, got {beside} "
            f"({' '.join(str(error).split())[:200]}). Restore it or move it away."
        ) from error
    if not isinstance(found, dict) or "sha256" not in found:
        return {}
    sha256 = digest(path)
    check(
        found["sha256"] == sha256,
        f"{beside.name} to belong to {path.name}",
        "Put the file of these weights beside them, or remove it.",
        sha256=str(found["sha256"])[:64],
        sha256_of_the_weights=sha256,
    )
    return {name: found[name] for name in _FIELDS if name in found}


def _checked(metadata: dict[str, Any]) -> dict[str, Any]:
    """Returns the metadata; refuses a `mean` or `std` of no numbers, or one alone."""
    for name in ("mean", "std"):
        values = metadata.get(name, [])
        check(
            isinstance(values, list)
            and len(values) <= MOST_CHANNELS
            and all(type(x) in (int, float) and abs(x) < math.inf for x in values),
            f"a list of numbers for {name} in the file's metadata",
            **{name: str(values)[:200]},
        )
    check(
        ("mean" in metadata) == ("std" in metadata),
        "mean and std in the file's metadata, or neither",
        names=sorted(metadata),
    )
    try:
        json.dumps(metadata, allow_nan=False)
    except ValueError as error:
        message = f"Expected finite numbers in the file's metadata, got {error}."
        raise ValueError(message) from error
    return metadata
