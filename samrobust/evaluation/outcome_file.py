"""The file of an outcome: what AutoAttack did so far, and whose it is.

The file is replaced whole every few seconds while the attack goes on: a killed
evaluation starts again where the file says. A file that is damaged, or that is of
something else, is moved aside, and its evaluation starts anew.
"""

import dataclasses
import hashlib
import io
import json
import pathlib
import time
import warnings
from typing import Any

import numpy as np

from samrobust.evaluation.examples import ExamplesFile
from samrobust.evaluation.outcome import Outcome, Place
from samrobust.files import set_aside, write_bytes
from samrobust.parallel import from_primary, is_primary

__all__ = ["OutcomeFile"]

_SECONDS_BETWEEN_WRITES = 5.0
_NAMES = ("broken_at", "non_finite")  # of the outcome's arrays


class OutcomeFile:
    """The file of an outcome, and of the adversarial images if they are kept.

    Of several processes 0 alone touches it.

    Args:
      folder: receives `NAME.npz`, with NAME made of `identity`; None keeps nothing.
      identity: all that the outcome depends on, in JSON's types: settings, the
        network's checksum. Another identity has another file.
    """

    def __init__(self, folder: pathlib.Path | None, identity: dict[str, Any]):
        self._about = json.dumps(identity, sort_keys=True)
        name = hashlib.sha256(self._about.encode()).hexdigest()[:12]
        self.path = None if folder is None else folder / f"{name}.npz"
        self._written = time.monotonic()
        self._examples: ExamplesFile | None = None

    def open(self, fresh: Outcome, images: np.ndarray | None = None) -> Outcome:
        """The stored outcome, or `fresh` if there is none that can be trusted.

        A file that cannot be is moved aside, with a warning.

        Args:
          fresh: the outcome before anything was done.
          images: uint8 [N, ...], of the split: adversarial ones are kept beside the
            file. None: are not.
        """
        stored = from_primary(lambda: self._open(fresh, images))
        return dataclasses.replace(stored or fresh, path=self.path)

    def _open(self, fresh: Outcome, images: np.ndarray | None) -> Outcome | None:
        if self.path is None:
            return None
        if images is not None:
            where, count = self._examples_path(self.path), len(fresh.stages)
            self._examples = ExamplesFile(where, images, count)
        try:
            return self._read(self.path, fresh)
        except FileNotFoundError:
            pass
        except _UnfitError as error:
            self._set_aside(self.path, str(error))
        if self._examples is not None:
            self._examples.create()
        self.write(fresh, now=True)  # what cannot be written is found out at once
        return None

    def _read(self, path: pathlib.Path, fresh: Outcome) -> Outcome:
        """What is stored.

        Raises:
          _UnfitError: if it is not whole, of something else, or makes no sense.
        """
        try:
            content = path.read_bytes()
        except IsADirectoryError as error:
            raise _UnfitError(f"{path} is a folder") from error
        try:
            with np.load(io.BytesIO(content), allow_pickle=False) as file:
                stored = {name: file[name] for name in file.files}
            is_ours = str(stored["about"]) == self._about
            place = Place(*map(int, stored["place"]))
            who = tuple(map(dict, json.loads(str(stored["provenance"]))))
            arrays = {
                name: _like(stored[name], getattr(fresh, name)) for name in _NAMES
            }
            found = dataclasses.replace(fresh, place=place, provenance=who, **arrays)
            is_possible = found.is_possible()
        except Exception as error:  # whatever a damaged file leads NumPy to
            text = " ".join(str(error).split()) or type(error).__name__
            raise _UnfitError(f"{path} is damaged ({text[:100]})") from error
        if not is_ours:
            message = (
                f"{path} is of another network, split or attack than its name says"
            )
            raise _UnfitError(message)
        if not is_possible:
            raise _UnfitError(f"{path} holds values that cannot be")
        if self._examples is not None:
            sums = stored.get("sums", np.zeros(0))
            problem = self._examples.reopen(found.broken_at >= 0, sums)
            if problem:
                raise _UnfitError(f"{self._examples.path} {problem}")
        return found

    @staticmethod
    def _examples_path(path: pathlib.Path) -> pathlib.Path:
        return path.with_name(f"{path.stem}-examples.npy")

    def _set_aside(self, path: pathlib.Path, problem: str) -> None:
        both = path, self._examples_path(path)
        moved = " and ".join(set_aside(p).name for p in both if p.exists())
        warnings.warn(
            f"{problem}. AutoAttack starts anew; what was there is kept as {moved}.",
            stacklevel=2,
        )

    @property
    def keeps_examples(self) -> bool:
        """Whether this process keeps adversarial images."""
        return self._examples is not None

    def put_examples(self, column: int, indices: np.ndarray, images: Any) -> None:
        """Keeps adversarial images, if `open` was told to."""
        if self._examples is not None:
            self._examples.put(column, indices, images)

    def write(self, outcome: Outcome, *, now: bool) -> None:
        """Replaces the file, unless it was written a moment ago and need not be now."""
        is_time = time.monotonic() - self._written > _SECONDS_BETWEEN_WRITES
        if self.path is None or not is_primary() or not (now or is_time):
            return
        content: dict[str, Any] = {
            "broken_at": outcome.broken_at,
            "non_finite": outcome.non_finite,
            "place": np.array(outcome.place),
            "columns": np.array(list(outcome.stages)),
            "stages": np.array(json.dumps(dict(outcome.stages))),
            "about": np.array(self._about),
            "provenance": np.array(json.dumps(outcome.provenance)),
        }
        if self._examples is not None:
            self._examples.flush()
            content["sums"] = self._examples.sums
        self.path.parent.mkdir(parents=True, exist_ok=True)
        buffer = io.BytesIO()
        np.savez(buffer, **content)
        write_bytes(self.path, buffer.getvalue())
        self._written = time.monotonic()


class _UnfitError(Exception):
    """Says which file cannot be gone on with, and why."""


def _like(array: np.ndarray, expected: np.ndarray) -> np.ndarray:
    """The array, if it has the shape and dtype that it is expected to have."""
    if array.shape != expected.shape or array.dtype != expected.dtype:
        raise ValueError(
            f"{array.dtype} {array.shape}, not {expected.dtype} {expected.shape}"
        )
    return array
