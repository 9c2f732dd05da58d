"""The manifest of a checkpoint: names, shapes and checksums of its arrays.

A manifest is a JSON value: the step, the caller's metadata, for each leaf its dtype,
shape and CRC-32, and a CRC-32 of all that.
"""

import json
import zlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from samrobust.types import PyTree

__all__ = [
    "describe",
    "find_mismatch",
    "json_crc32",
    "make_manifest",
    "named_leaves",
    "place",
]


def named_leaves(tree: PyTree) -> dict[str, Any]:
    """Returns the leaves by path.

    Raises:
      ValueError: for what would not be restored unchanged.
    """
    leaves = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        name = "state" + jax.tree_util.keystr(path)
        dtype = getattr(leaf, "dtype", None)
        is_key = dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key)
        if dtype is None or is_key or jax.dtypes.canonicalize_dtype(dtype) != dtype:
            raise ValueError(
                "Expected an array that is no typed PRNG key, and of 64 bits only with "
                f"jax_enable_x64, got {name}={leaf!r}. Convert it with `jnp.asarray` "
                "or `jax.random.key_data`."
            )
        leaves[name] = leaf
    return leaves


def describe(leaf: np.ndarray) -> dict[str, Any]:
    """Describes a leaf by its dtype, its shape and the CRC-32 of its bytes."""
    flat = np.ascontiguousarray(leaf).reshape(-1).view(np.uint8)
    crc32 = zlib.crc32(flat.data)
    return {"dtype": leaf.dtype.name, "shape": list(leaf.shape), "crc32": crc32}


def json_crc32(value: Any) -> int:
    """Returns the CRC-32 of a value's JSON form."""
    return zlib.crc32(json.dumps(value, sort_keys=True).encode())


def make_manifest(
    step: int, leaves: Mapping[str, np.ndarray], metadata: Mapping[str, Any]
) -> dict[str, Any]:
    """Makes the JSON item: step, metadata, description of the leaves, checksum."""
    try:
        # Once through JSON, so that it is now what it will be when read
        plain_metadata = json.loads(json.dumps(dict(metadata)))
    except (TypeError, ValueError) as error:
        raise TypeError(
            f"Expected metadata that JSON can hold, got metadata={metadata!r}. "
            "Convert arrays and NumPy scalars to Python numbers and lists."
        ) from error
    described = {name: describe(leaf) for name, leaf in leaves.items()}
    manifest = {"step": int(step), "leaves": described, "metadata": plain_metadata}
    return {**manifest, "crc32": json_crc32(manifest)}


def find_mismatch(saved: Mapping[str, Any], models: Mapping[str, Any]) -> str:
    """Says what in a checkpoint does not fit the target; empty if all does."""
    missing = [name for name in models if name not in saved]
    unknown = [name for name in saved if name not in models]
    if missing or unknown:
        return (
            f"the {len(models)} leaves of the target, got missing={missing[:3]} "
            f"({len(missing)}), unexpected={unknown[:3]} ({len(unknown)})"
        )
    for name, model in models.items():
        expected = f"{np.dtype(model.dtype).name}{list(model.shape)}"
        got = f"{saved[name]['dtype']}{saved[name]['shape']}"
        if expected != got:
            return f"{name} of {expected}, got {got}"
    return ""


def place(leaf: np.ndarray, model: Any) -> jax.Array:
    """Puts a leaf on its model's devices, else, uncommitted, on the default one."""
    committed = getattr(model, "committed", True)
    return jax.device_put(leaf, getattr(model, "sharding", None) if committed else None)
