"""Where checkpoints lie: in a folder of this machine, or in an object store.

Orbax writes to a folder and renames what is complete, which no object store can do. So
for a store it writes to a temporary folder here, and from there the files are uploaded
in the same layout, the manifest last: a step without one is none. It is the first to be
removed, too. That costs the state once on this machine's disk; training goes on during
the upload.
"""

import concurrent.futures
import contextlib
import os
import pathlib
import shutil
import tempfile
from collections.abc import Callable, Iterator

import orbax.checkpoint as ocp

from samrobust.checks import check
from samrobust.system.storage import ObjectPath, to_path

__all__ = ["DiskPlace", "StorePlace", "open_place"]

_MANIFEST = ("metadata", "metadata")


def open_place(directory: str | os.PathLike[str]) -> "DiskPlace":
    """Returns the place that a directory is.

    Raises:
      ValueError: for a path on a disk in which Orbax would see a pattern: it would find
        none of the files that it writes, and call such a checkpoint finished. Of an
        object store that path is of the folder for temporary files.
    """
    path = to_path(directory)
    if isinstance(path, ObjectPath):
        place, folder = StorePlace(path), tempfile.gettempdir()
        fix = "Set TMPDIR to another folder."
    else:
        place = DiskPlace(str(path))
        folder, fix = place.folder, "Rename the folder, or choose another --workdir."
    holds = not {*"[]\\"} & {*folder}
    check(holds, "a path for checkpoints without [, ] and \\", fix, path=folder)
    return place


class DiskPlace:
    """A folder of this machine with a directory for each step.

    Attributes:
      name: for messages.
      folder: where Orbax writes.
    """

    _pending: concurrent.futures.Future[None] | None = None

    def __init__(self, folder: str):
        self.name = self.folder = os.path.abspath(folder)

    def steps(self) -> list[int]:
        """Lists the finished steps, in increasing order."""
        if not os.path.isdir(self.folder):
            return []
        found = ocp.path.step.standard_name_format().find_all(self.folder)
        return sorted(item.step for item in found)

    def remove(self, step: int) -> None:
        """Removes a step, which no longer counts as finished from the first moment."""
        gone = os.path.join(self.folder, f".{step}.gone")
        shutil.rmtree(gone, ignore_errors=True)
        with contextlib.suppress(FileNotFoundError):  # by a process that took over
            os.rename(os.path.join(self.folder, str(step)), gone)
        self.remove_left_behind()

    def remove_left_behind(self) -> None:
        """Removes what is left of removed steps, of killed processes too."""
        for entry in os.scandir(self.folder):
            if entry.name.endswith(".gone"):
                shutil.rmtree(entry.path, ignore_errors=True)

    @contextlib.contextmanager
    def opened(self, step: int) -> Iterator[str]:
        """Yields a folder of this machine that holds a finished step."""
        yield os.path.join(self.folder, str(step))

    def publish(
        self,
        step: int,
        written: Callable[[], None],
        outdated: Callable[[list[int]], list[int]],
    ) -> None:
        """Brings a step from `folder` to the place, in the background.

        Args:
          step: the step.
          written: returns once it is complete in `folder`.
          outdated: of all finished steps there, those to remove then.
        """

        def bring() -> None:
            written()
            self._bring(step)
            for other in outdated(self.steps()):
                self.remove(other)

        self._pending = concurrent.futures.ThreadPoolExecutor(1).submit(bring)

    def _bring(self, step: int) -> None:
        """Does nothing: the folder is the place."""

    def wait(self) -> None:
        """Waits until all is published; raises what went wrong."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def close(self) -> None:
        """Frees what it took of this machine."""


class StorePlace(DiskPlace):
    """A folder of an object store."""

    def __init__(self, path: ObjectPath):
        self.name, self._path = str(path), path
        self._held = contextlib.ExitStack()

    @property
    def folder(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Where Orbax writes; made when it is asked for."""
        if "_folder" not in vars(self):
            make = tempfile.TemporaryDirectory(prefix="samrobust-checkpoints-")
            self._folder = self._held.enter_context(make)
        return self._folder

    def steps(self) -> list[int]:
        """Lists the steps that have a manifest."""
        return self._steps(finished=True)

    def _steps(self, *, finished: bool) -> list[int]:
        """Lists the steps that have a manifest, or all that anything is left of."""
        begin = len(self._path.parts)
        names = {path.parts[begin:] for path in self._path.walk_files()}
        found = {name[0] for name in names if not finished or name[1:] == _MANIFEST}
        return sorted(int(name) for name in found if name.isdigit())

    @contextlib.contextmanager
    def opened(self, step: int) -> Iterator[str]:
        """Yields a copy of a step, which is removed then."""
        with tempfile.TemporaryDirectory(prefix="samrobust-checkpoint-") as name:
            for path in (self._path / str(step)).walk_files():
                here = pathlib.Path(name, *path.parts[len(self._path.parts) :])
                here.parent.mkdir(parents=True, exist_ok=True)
                path.download(here)
            yield os.path.join(name, str(step))

    def _bring(self, step: int) -> None:
        """Uploads a step, then removes what a kill has left of others."""
        self.remove(step)
        folder = pathlib.Path(self.folder, str(step))
        files = {path.relative_to(folder).parts: path for path in folder.rglob("*")}
        for name in sorted(files, key=lambda name: (name == _MANIFEST, name)):
            if files[name].is_file():
                self._path.joinpath(folder.name, *name).upload(files[name])
        shutil.rmtree(folder)
        for other in set(self._steps(finished=False)) - set(self.steps()):
            self.remove(other)

    def remove(self, step: int) -> None:
        """Removes a step, its manifest first."""
        folder = self._path / str(step)
        files = folder.walk_files()
        manifest = folder.joinpath(*_MANIFEST)
        for path in sorted(files, key=lambda path: path != manifest):
            path.unlink(missing_ok=True)

    def close(self) -> None:
        """Removes the temporary folder."""
        self._held.close()
