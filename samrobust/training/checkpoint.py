"""Checkpoints that are written in the background and verified when they are read.

A checkpoint is one directory per step, named by the step, written by Orbax. It holds
two items: `state`, the leaves of the training state in a flat dictionary keyed by
their paths, such as `state.params['conv']['kernel']`; and `metadata`, a JSON file with
the caller's metadata and, for each leaf, its dtype, shape and CRC-32. Orbax renames a
directory into place when all of it is written, so that a killed process leaves earlier
checkpoints as they were. The checksums find what Orbax does not: it restores a file
with a flipped byte without a word.

Several processes may write one checkpoint together if each calls `save` with the same
replicated state on a shared file system: process 0 writes. Only one job at a time may
write to a directory; others may read it. Typed PRNG keys are out of scope: save
`jax.random.key_data(key)`.
"""

import asyncio
import contextlib
import dataclasses
import json
import logging
import os
import warnings
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from samrobust.checks import check

__all__ = ["CheckpointError", "Checkpoints", "Restored"]

PyTree = Any

# On a failed write Orbax logs the same traceback up to five times; `CheckpointError`
# has it as its cause.
logging.getLogger("absl").addFilter(
    lambda record: record.levelno != logging.ERROR or "orbax" not in record.pathname
)


class CheckpointError(RuntimeError):
    """A checkpoint could not be written, or none could be restored."""


@dataclasses.dataclass(frozen=True)
class Restored:
    """An intact checkpoint: its step, the state as saved, and its metadata."""

    step: int
    state: PyTree
    metadata: dict[str, Any]


class Checkpoints(contextlib.AbstractContextManager):
    """The checkpoints of one run in one directory; a context manager.

    **Guarantees**: what `restore_latest` returns is bit for bit what was saved at its
    step. A checkpoint is removed only after a newer one is committed, also with
    `keep=1`. A failed write leaves the finished checkpoints as they were.

    Args:
      directory: where the checkpoints lie; made by the first `save`.
      keep: how many checkpoints to keep, the newest ones; at least 1.

    Raises:
      ValueError: if `keep` is less than 1.

    >>> import tempfile
    >>> state = {"weights": jax.numpy.arange(3.0)}
    >>> with tempfile.TemporaryDirectory() as directory:
    ...     with Checkpoints(directory) as checkpoints:
    ...         checkpoints.save(100, state, {"epoch": 2})
    ...         restored = checkpoints.restore_latest(like=state)
    >>> restored
    Restored(step=100, state={'weights': Array([0., 1., 2.], dtype=float32)}, \
metadata={'epoch': 2})
    """

    def __init__(self, directory: str | os.PathLike[str], *, keep: int = 2):
        check(keep >= 1, "1 <= keep", "Keep at least one checkpoint.", keep=keep)
        self._directory = os.path.abspath(directory)
        self._keep = keep
        self._manager: ocp.CheckpointManager | None = None
        self._last_step: int | None = None

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def save(
        self,
        step: int,
        state: PyTree,
        metadata: Mapping[str, Any] | None = None,
        *,
        wait: bool = False,
    ) -> None:
        """Saves `state`; returns once it is copied to the host, or with `wait` written.

        The caller may donate or overwrite the state's buffers as soon as this returns.
        If the step is already saved and intact, that checkpoint stays and nothing is
        written; a damaged one is replaced. The step saved becomes the newest: later
        steps, left by a run that went on from an earlier checkpoint, are removed with
        a warning once it is committed. One write runs at a time, so a call may wait
        for the one before.

        Args:
          step: the number of the step, at least 0.
          state: a pytree of arrays, each fully replicated or on this process.
          metadata: whatever JSON can hold, returned by `restore_latest`.
          wait: whether to return only when the checkpoint is committed.

        Raises:
          CheckpointError: if this write, or the one before it, failed.
          TypeError: if a leaf is not an array or JSON cannot hold the metadata.
          ValueError: if `step` is negative.
        """
        check(step >= 0, "0 <= step", step=step)
        self.wait()
        if step in self._steps() and self._is_intact(step):
            return
        leaves = jax.device_get(_named_leaves(state))
        leaves = {name: np.asarray(leaf) for name, leaf in leaves.items()}
        manifest = _make_manifest(step, leaves, metadata or {})
        later = [other for other in self._steps() if other > step]
        if later:
            warnings.warn(
                f"Steps {later} in {self._directory} are later than step {step}, which "
                "is being saved; they are removed when it is committed.",
                stacklevel=2,
            )
        self._last_step = step
        with self._reporting_errors():
            manager = self._open_manager()
            if step in manager.all_steps():
                manager.delete(step)
            items = ocp.args.Composite(
                # Orbax cannot write arrays of size zero; the manifest suffices for them
                state=ocp.args.StandardSave(
                    {k: v for k, v in leaves.items() if v.size}
                ),
                metadata=ocp.args.JsonSave(manifest),
            )
            manager.save(step, args=items, force=True)
        if wait:
            self.wait()

    def restore_latest(self, like: PyTree) -> Restored | None:
        """Restores the newest intact checkpoint; skips damaged ones with a warning.

        Args:
          like: a pytree of arrays or `jax.ShapeDtypeStruct` that gives the structure,
            the shapes, the dtypes and the placement of the state: a leaf goes where
            the `sharding` of its model says, else to the default device.

        Returns:
          The checkpoint, or None if the directory holds none.

        Raises:
          CheckpointError: if the directory holds checkpoints but none is intact, or if
            the newest intact one does not fit `like`. Nothing is ever cast.
        """
        self.wait()
        steps = self._steps()
        models = _named_leaves(like)
        with _Reader() as reader:
            for step in reversed(steps):
                path = self._path(step)
                try:
                    manifest = reader.read_manifest(path, step)
                    mismatch = _find_mismatch(manifest["leaves"], models)
                    leaves = {} if mismatch else reader.read_leaves(path, manifest)
                except Exception as error:  # Orbax raises many kinds on damaged files
                    message = f"Skipping the damaged checkpoint {path}: "
                    warnings.warn(message + _summary(error), stacklevel=2)
                    continue
                if mismatch:
                    raise CheckpointError(
                        f"Expected {mismatch} in {path}. Resume with the "
                        "configuration that wrote it, or use another directory."
                    )
                placed = [_place(leaves[name], model) for name, model in models.items()]
                state = jax.tree.unflatten(jax.tree.structure(like), placed)
                return Restored(step, state, manifest["metadata"])
        if steps:
            raise CheckpointError(
                f"Expected an intact checkpoint in {self._directory}, got only damaged "
                f"ones, steps={steps}. Restore the directory from a copy, or remove it "
                "to start anew."
            )
        return None

    def latest_step(self) -> int | None:
        """Returns the newest finished step on disk, not verified, or None."""
        return max(self._steps(), default=None)

    def wait(self) -> None:
        """Waits for the pending write; raises `CheckpointError` if it failed."""
        if self._manager is not None:
            with self._reporting_errors():
                self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits for the pending write, then frees the threads; may be called again."""
        self.wait()
        if self._manager is not None:
            self._manager.close()
            self._manager = None

    def _path(self, step: int) -> str:
        return os.path.join(self._directory, str(step))

    def _steps(self) -> list[int]:
        """Lists the finished steps on disk, in increasing order."""
        if not os.path.isdir(self._directory):
            return []
        found = ocp.path.step.standard_name_format().find_all(self._directory)
        return sorted(item.step for item in found)

    def _open_manager(self) -> ocp.CheckpointManager:
        """Returns the writer, with its list of steps read afresh from the disk."""
        if self._manager is None:
            # Made by the first save, for it removes the temporary directories of
            # killed writers: a reader must not do this to a run in progress.
            self._manager = ocp.CheckpointManager(
                self._directory,
                options=ocp.CheckpointManagerOptions(
                    preservation_policy=_KeepNewest(self._keep),
                    cleanup_tmp_directories=True,
                    lightweight_initialize=True,
                    async_options=ocp.AsyncOptions(
                        create_directories_asynchronously=False
                    ),
                ),
            )
        self._manager.reload()
        return self._manager

    @contextlib.contextmanager
    def _reporting_errors(self):
        """Turns the errors of a write into `CheckpointError` and drops the writer."""
        try:
            yield
        except Exception as error:
            manager, self._manager = self._manager, None
            if manager is not None:
                with contextlib.suppress(Exception):  # it raises the same error again
                    manager.close()
            raise CheckpointError(
                f"Expected to write the checkpoint of step {self._last_step} to "
                f"{self._directory}, got {_summary(error)}. Earlier checkpoints are "
                "kept. Check the free space and the permissions there, then save again."
            ) from error

    def _is_intact(self, step: int) -> bool:
        with _Reader() as reader:
            try:
                path = self._path(step)
                reader.read_leaves(path, reader.read_manifest(path, step))
            except Exception:  # Orbax raises many kinds on damaged files
                return False
        return True


class _Reader(ocp.Checkpointer):
    """Reads and verifies; made before the `try`, so no bug passes for damage."""

    def __init__(self):
        handlers = ocp.type_handlers.create_type_handler_registry(
            (np.ndarray, _PatientNumpyHandler()),
            (jax.Array, ocp.type_handlers.ArrayHandler()),  # else Orbax logs a warning
        )
        super().__init__(
            ocp.CompositeCheckpointHandler(
                state=ocp.PyTreeCheckpointHandler(type_handler_registry=handlers),
                metadata=ocp.JsonCheckpointHandler(),
            )
        )

    def read_manifest(self, path: str, step: int) -> dict[str, Any]:
        """Returns the verified JSON item."""
        args = ocp.args.Composite(metadata=ocp.args.JsonRestore())
        manifest = self.restore(path, args=args)["metadata"]
        crc32 = manifest.pop("crc32")
        if crc32 != _json_crc32(manifest):
            raise CheckpointError("the checksum of its metadata does not match.")
        if manifest["step"] != step:
            raise CheckpointError(f"it was saved as step {manifest['step']}.")
        return manifest

    def read_leaves(self, path: str, manifest: dict[str, Any]) -> dict[str, Any]:
        """Returns the leaves as NumPy arrays, each verified against the manifest."""
        args = ocp.args.Composite(state=ocp.args.PyTreeRestore())
        leaves = self.restore(path, args=args)["state"]
        for name, expected in manifest["leaves"].items():
            if 0 in expected["shape"]:
                leaves[name] = np.empty(expected["shape"], expected["dtype"])
            if _describe(leaves[name]) != expected:
                raise CheckpointError(f"the checksum of {name} does not match.")
        return leaves


class _PatientNumpyHandler(ocp.type_handlers.NumpyHandler):
    """Lets all reads end before it raises the error of one.

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


@dataclasses.dataclass(frozen=True)
class _KeepNewest:
    """Keeps the step just saved and the `keep - 1` before it."""

    keep: int

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any):
        del context
        steps = [checkpoint.step for checkpoint in checkpoints]
        saved = steps[-1]  # Orbax appends it to what it found on disk
        kept = sorted(step for step in steps if step <= saved)[-self.keep :]
        return [step in kept for step in steps]


def _named_leaves(tree: PyTree) -> dict[str, Any]:
    """Keys the leaves by path; refuses what would not come back as it was."""
    leaves = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        name = "state" + jax.tree_util.keystr(path)
        dtype = getattr(leaf, "dtype", None)
        is_key = dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key)
        if dtype is None or is_key or jax.dtypes.canonicalize_dtype(dtype) != dtype:
            raise TypeError(
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
    return zlib.crc32(json.dumps(value, sort_keys=True).encode())


def _make_manifest(
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


def _find_mismatch(saved: Mapping[str, Any], models: Mapping[str, Any]) -> str:
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


def _place(leaf: np.ndarray, model: Any) -> jax.Array:
    """Puts a leaf where its model lies, else, uncommitted, on the default device."""
    committed = getattr(model, "committed", True)
    return jax.device_put(leaf, getattr(model, "sharding", None) if committed else None)


def _summary(error: Exception) -> str:
    """Names an error in one line."""
    lines = str(error).splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:300]}"
