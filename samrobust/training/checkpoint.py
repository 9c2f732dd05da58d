"""Checkpoints that are written in the background and verified when they are read.

A checkpoint is one directory per step, named by the step, written by Orbax. It holds
two items: `state`, the leaves of the training state in a flat dictionary keyed by
their paths, such as `state.params['conv']['kernel']`; and `metadata`, a JSON file with
the caller's metadata and, for each leaf, its dtype, shape and CRC-32. Orbax renames a
directory into place when all of it is written, so that a killed process leaves earlier
checkpoints as they were. The checksums find what Orbax misses: it silently
restores a file with a flipped byte.

The directory may be of an object store (`samrobust.training.places`).

Only process 0 uses this module: it holds a copy of the whole state.
Only one job at a time may write to a directory; others may read it. Typed PRNG keys are
out of scope: save `jax.random.key_data(key)`.
"""

import contextlib
import dataclasses
import errno
import os
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from samrobust.checks import check
from samrobust.system.failures import is_transient
from samrobust.training.manifest import (
    ALONE,
    DamagedError,
    Reader,
    find_mismatch,
    make_manifest,
    named_leaves,
    place,
)
from samrobust.training.places import open_place
from samrobust.types import PyTree

__all__ = ["CheckpointError", "Checkpoints", "Restored"]

# No space, no more files, no memory: what is read from a store is copied here first.
_EXHAUSTED = {errno.ENOSPC, errno.EDQUOT, errno.EMFILE, errno.ENFILE, errno.ENOMEM}


class CheckpointError(RuntimeError):
    """A checkpoint could not be written, or none could be restored."""


@dataclasses.dataclass(frozen=True)
class Restored:
    """An intact checkpoint: its step, the state as saved, and its metadata."""

    step: int
    state: PyTree
    metadata: dict[str, Any]


class Checkpoints(contextlib.AbstractContextManager["Checkpoints"]):
    """The checkpoints of one run in one directory; a context manager.

    **Guarantees**: what `restore_latest` returns is bit for bit what was saved at its
    step. A checkpoint is removed only after a newer one is committed, also with
    `keep=1`. A failed write leaves the finished checkpoints as they were.

    Args:
      directory: where the checkpoints lie, as of `samrobust.system.storage.to_path`;
        made by the first `save`.
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
        self._place = open_place(directory)
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
        needed: Collection[int] = (),
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
          needed: earlier steps that stay, beside the newest.

        Raises:
          CheckpointError: if this write, or the one before it, failed.
          TypeError: if JSON cannot hold the metadata.
          ValueError: if `step` is negative or a leaf no array that can be kept.
        """
        check(step >= 0, "0 <= step", step=step)
        self.wait()
        if step in self._place.steps() and self._is_intact(step):
            return
        leaves = jax.device_get(named_leaves(state))
        leaves = {name: np.asarray(leaf) for name, leaf in leaves.items()}
        manifest = make_manifest(step, leaves, metadata or {})
        later = [other for other in self._place.steps() if other > step]
        if later:
            warnings.warn(
                f"Steps {later} in {self._place.name} are later than step {step}, "
                "which is being saved; they are removed when it is committed.",
                stacklevel=2,
            )
        self._last_step, stay = step, frozenset(needed)

        def outdated(steps: Sequence[int]) -> list[int]:
            # Another that is later is of a process that took the run over meanwhile.
            earlier = [other for other in steps if other <= step][: -self._keep]
            gone = {*earlier} - stay | {*later}
            return [other for other in steps if other in gone]

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
            self._place.publish(step, manager.wait_until_finished, outdated)
        if wait:
            self.wait()

    def restore_latest(
        self, like: PyTree, *, refuse: Callable[[dict[str, Any]], str] = lambda _: ""
    ) -> Restored | None:
        """Restores the newest intact checkpoint; skips damaged ones with a warning.

        Args:
          like: a pytree of arrays or `jax.ShapeDtypeStruct` that gives the structure,
            the shapes, the dtypes and the placement of the state: a leaf goes where
            the `sharding` of its model says, else to the default device.
          refuse: says of a checkpoint's metadata why it is not to be restored; empty
            if it is.

        Returns:
          The checkpoint, or None if the directory holds none.

        Raises:
          CheckpointError: if the directory holds checkpoints but none is intact, or if
            the newest intact one does not fit `like` or is refused. Nothing is ever
            cast.
        """
        self.wait()
        named_leaves(like)  # refused before there is anything to restore, too
        steps = self._place.steps()
        with Reader() as reader:
            for step in reversed(steps):
                try:
                    return self._read(reader, step, like, refuse)
                except DamagedError as error:
                    message = f"Skipping the damaged checkpoint {self._path(step)}: "
                    warnings.warn(f"{message}{error}", stacklevel=2)
        if steps:
            raise CheckpointError(
                f"Expected an intact checkpoint in {self._place.name}, got only "
                f"damaged ones, steps={steps}. Restore the directory from a copy, or "
                "use another one."
            )
        return None

    def restore(
        self,
        step: int | None,
        like: PyTree,
        *,
        refuse: Callable[[dict[str, Any]], str] = lambda _: "",
    ) -> Restored:
        """Restores one checkpoint and no other; the arguments of `restore_latest`.

        Args:
          step: of the checkpoint; None for the newest.
          like: the structure, shapes and dtypes of the state.
          refuse: says why metadata are not to be restored.

        Raises:
          CheckpointError: if there is none, or if it is damaged, does not fit `like`
            or is refused.
        """
        self.wait()
        while steps := self._place.steps():
            wanted = steps[-1] if step is None else step
            if wanted not in steps:
                break
            with Reader() as reader:
                try:
                    return self._read(reader, wanted, like, refuse)
                except DamagedError as error:
                    if wanted not in self._place.steps():  # its writer has gone on
                        continue
                    raise CheckpointError(
                        f"Expected an intact checkpoint {self._path(wanted)}, got a "
                        f"damaged one: {str(error).rstrip('.')}. Steps beside it: "
                        f"{steps}; another one is used only where --step names it."
                    ) from error
        fix = "Choose one of these." if steps else "Run `samrobust train`."
        raise CheckpointError(
            f"Expected a checkpoint{'' if step is None else f' of step {step}'} in "
            f"{self._place.name}, got {steps or 'none'}. {fix}"
        )

    def _read(
        self,
        reader: Reader,
        step: int,
        like: PyTree,
        refuse: Callable[[dict[str, Any]], str],
    ) -> Restored:
        """Reads one checkpoint; raises `DamagedError` or `CheckpointError`."""
        path, models = self._path(step), named_leaves(like)
        try:
            with self._place.opened(step) as folder:
                manifest = reader.read_manifest(folder, step)
                reason = refuse(manifest["metadata"])
                mismatch = find_mismatch(manifest["leaves"], models)
                wanted = not (reason or mismatch)
                leaves = reader.read_leaves(folder, manifest) if wanted else {}
        except Exception as error:  # Orbax raises many kinds on damaged files
            _pass_on(error)
            raise DamagedError(_summary(error)) from error
        if reason:
            raise CheckpointError(
                f"Expected a checkpoint of this run, got {path}: {reason}. Use another "
                "directory, or start as that one was started."
            )
        if mismatch:
            raise CheckpointError(
                f"Expected {mismatch} in {path}. Resume with the configuration that "
                "wrote it, or use another directory."
            )
        placed = [place(leaves[name], model) for name, model in models.items()]
        state = jax.tree.unflatten(jax.tree.structure(like), placed)
        return Restored(step, state, manifest["metadata"])

    def retain(self, wanted: Callable[[int], bool]) -> None:
        """Removes the finished checkpoints of all other steps."""
        self.wait()
        for step in self._place.steps():
            if not wanted(step):
                self._place.remove(step)

    def latest_step(self) -> int | None:
        """Returns the newest finished step on disk, not verified, or None."""
        return max(self._place.steps(), default=None)

    def wait(self) -> None:
        """Waits for the pending write; raises `CheckpointError` if it failed."""
        if self._manager is not None:
            with self._reporting_errors():
                self._place.wait()

    def close(self) -> None:
        """Waits for the pending write, then frees the threads; may be called again."""
        try:
            self.wait()
        finally:
            if self._manager is not None:
                self._manager.close()
                self._manager = None
            self._place.close()

    def _path(self, step: int) -> str:
        return os.path.join(self._place.name, str(step))

    def _open_manager(self) -> ocp.CheckpointManager:
        """Returns the writer, with its list of steps read again from the disk."""
        if self._manager is None:
            # Made by the first save, for it removes the temporary directories of
            # killed writers: a reader must not do this to a run in progress.
            os.makedirs(self._place.folder, exist_ok=True)
            self._place.remove_left_behind()
            self._manager = _Manager(
                self._place.folder,
                options=ocp.CheckpointManagerOptions(
                    create=False,
                    multiprocessing_options=ALONE,
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
                f"{self._place.name}, got {_summary(error)}. Earlier checkpoints are "
                "kept. Check the free space and the permissions there, then save again."
            ) from error

    def _is_intact(self, step: int) -> bool:
        with Reader() as reader:
            try:
                with self._place.opened(step) as folder:
                    reader.read_leaves(folder, reader.read_manifest(folder, step))
            except Exception as error:  # Orbax raises many kinds on damaged files
                _pass_on(error)
                return False
        return True


class _Manager(ocp.CheckpointManager):
    """Manager that leaves JAX's preemption service to `AgreedStop`."""

    def reached_preemption(self, step: int) -> bool:
        del step
        return False


def _pass_on(error: Exception) -> None:
    """Raises an error that tells of this machine, and nothing of a checkpoint."""
    exhausted = getattr(error, "errno", None) in _EXHAUSTED
    if exhausted or isinstance(error, MemoryError) or is_transient(error):
        raise error


def _summary(error: Exception) -> str:
    """Names an error in one line."""
    lines = str(error).splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:300]}"
