"""The manifest of a checkpoint, and reading a checkpoint by it.

A manifest is a JSON value: the step, the caller's metadata, for each leaf its dtype,
shape and CRC-32, and a CRC-32 of all that. Orbax restores a file with a flipped byte
silently; the checksums find it.
"""

import asyncio
import json
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from samrobust.types import PyTree

__all__ = [
    "ALONE",
    "DamagedError",
    "Reader",
    "find_mismatch",
    "make_manifest",
    "named_leaves",
    "place",
]

# Process 0 reads and writes without waiting for the others.
ALONE = ocp.options.MultiprocessingOptions(primary_host=0, active_processes={0})


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


def _describe(leaf: np.ndarray) -> dict[str, Any]:
    """Describes a leaf by its dtype, its shape and the CRC-32 of its bytes."""
    flat = np.ascontiguousarray(leaf).reshape(-1).view(np.uint8)
    crc32 = zlib.crc32(flat.data)
    return {"dtype": leaf.dtype.name, "shape": list(leaf.shape), "crc32": crc32}


def _json_crc32(value: Any) -> int:
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
    described = {name: _describe(leaf) for name, leaf in leaves.items()}
    manifest = {"step": int(step), "leaves": described, "metadata": plain_metadata}
    return {**manifest, "crc32": _json_crc32(manifest)}


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


class DamagedError(RuntimeError):
    """A checkpoint differs from what was written; the message says where."""


class Reader(ocp.Checkpointer):
    """Verifying reader; made before the `try`, so that no bug passes for damage."""

    def __init__(self):
        handlers = ocp.type_handlers.create_type_handler_registry(
            (np.ndarray, _PatientNumpyHandler()),
            (jax.Array, ocp.type_handlers.ArrayHandler()),  # else Orbax logs a warning
        )
        super().__init__(
            ocp.CompositeCheckpointHandler(
                state=ocp.PyTreeCheckpointHandler(type_handler_registry=handlers),
                metadata=ocp.JsonCheckpointHandler(),
            ),
            multiprocessing_options=ALONE,
        )

    def read_manifest(self, path: str, step: int) -> dict[str, Any]:
        """Returns the verified JSON item."""
        args = ocp.args.Composite(metadata=ocp.args.JsonRestore())
        manifest = self.restore(path, args=args)["metadata"]
        crc32 = manifest.pop("crc32")
        if crc32 != _json_crc32(manifest):
            raise DamagedError("the checksum of its metadata does not match.")
        if manifest["step"] != step:
            raise DamagedError(f"it was saved as step {manifest['step']}.")
        return manifest

    def read_leaves(self, path: str, manifest: dict[str, Any]) -> dict[str, Any]:
        """Returns the leaves as NumPy arrays, each verified against the manifest."""
        args = ocp.args.Composite(state=ocp.args.PyTreeRestore())
        leaves = self.restore(path, args=args)["state"]
        for name, expected in manifest["leaves"].items():
            if 0 in expected["shape"]:
                leaves[name] = np.empty(expected["shape"], expected["dtype"])
            if _describe(leaves[name]) != expected:
                raise DamagedError(f"the checksum of {name} does not match.")
        return leaves


class _PatientNumpyHandler(ocp.type_handlers.NumpyHandler):
    """Handler that lets all reads end before it raises the error of one.

    Orbax closes the event loop at the first error; a read that outlives its loop
    raises once more, in a thread where nobody can catch it.
    """

    async def deserialize(self, infos: Sequence[Any], args: Any = None):
        """Reads the arrays one by one, concurrently."""
        read = super().deserialize
        args = args or [None] * len(infos)
        reads = [
            read([info], None if arg is None else [arg])
            for info, arg in zip(infos, args, strict=True)
        ]
        arrays: list[np.ndarray] = []
        for result in await asyncio.gather(*reads, return_exceptions=True):
            if isinstance(result, BaseException):
                raise result
            arrays += result
        return arrays
