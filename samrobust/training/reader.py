"""Reading a checkpoint and verifying every byte of it.

Orbax restores a file with a flipped byte silently; the checksums of the manifest find
it.
"""

import asyncio
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from samrobust.training.manifest import describe, json_crc32

__all__ = ["ALONE", "DamagedError", "Reader"]

# Process 0 reads and writes without waiting for the others.
ALONE = ocp.options.MultiprocessingOptions(primary_host=0, active_processes={0})


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
        if crc32 != json_crc32(manifest):
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
            if describe(leaves[name]) != expected:
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
