"""Which part of which attack broke which example, in memory and in its file.

The file is replaced whole every few seconds while the attack goes on: a killed
evaluation starts again where the file says.
"""

import dataclasses
import hashlib
import io
import json
import pathlib
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from samrobust.checks import check
from samrobust.files import write_bytes
from samrobust.parallel import from_primary, is_primary

__all__ = ["MISCLASSIFIED", "STANDING", "Outcome", "OutcomeFile", "Place"]

MISCLASSIFIED, STANDING = -2, -1
_SECONDS_BETWEEN_WRITES = 5.0


class Place(NamedTuple):
    """What comes next: a column, one of its stages, one of the stage's batches."""

    column: int = 0
    stage: int = 0
    batch: int = 0


@dataclasses.dataclass
class Outcome:
    """What became of every example under every attack.

    Attributes:
      stages: by column, the name of each stage's member, as in `("apgd-ce", "apgd-t",
        "apgd-t", ...)`: a member has a stage for each of its targets.
      broken_at: int16 [columns, N] in the order of the split: the stage that broke an
        example, `STANDING` (-1) where none did, `MISCLASSIFIED` (-2) where it was not
        right as it was.
      place: how far the attack has come.
      path: of the file that it is kept in, if it is.
    """

    stages: Mapping[str, tuple[str, ...]]
    broken_at: np.ndarray
    place: Place = dataclasses.field(default_factory=Place)
    path: pathlib.Path | None = None

    def correct(self) -> dict[str, np.ndarray]:
        """Bool [N] by column, `natural` first: what an `Evaluator` returns."""
        natural = self.broken_at[0] != MISCLASSIFIED
        columns = zip(self.stages, self.broken_at == STANDING, strict=True)
        return {"natural": natural, **dict(columns)}

    def broken_by(self, column: str) -> np.ndarray:
        """The names [N] of what broke each example: a member, `natural` or empty."""
        names = np.array([*self.stages[column], "natural", ""])
        return names[self.broken_at[list(self.stages).index(column)]]

    def after_each(self, column: str) -> dict[str, float]:
        """The accuracy in percent that each member left, by its name, in order."""
        row = self.broken_at[list(self.stages).index(column)]
        left = {}
        for stage, member in enumerate(self.stages[column]):
            standing = (row == STANDING) | (row > stage)
            left[member] = 100 * float(np.mean(standing))
        return left


class OutcomeFile:
    """The file of an outcome, and of the adversarial images if they are kept.

    Of several processes 0 alone touches it.

    Args:
      folder: receives `NAME.npz`, with NAME made of `identity`; None keeps nothing.
      identity: what the outcome depends on, in JSON's types: settings, the network's
        checksum; `examples`: whether adversarial images are kept beside it. Another
        identity has another file.
    """

    def __init__(self, folder: pathlib.Path | None, identity: dict[str, Any]):
        self._about = json.dumps(identity, sort_keys=True)
        name = hashlib.sha256(self._about.encode()).hexdigest()[:12]
        self.path = None if folder is None else folder / f"{name}.npz"
        self._written = time.monotonic()
        self._wants_examples = bool(identity.get("examples"))
        self._examples: np.ndarray | None = None

    def read(self, fresh: Outcome) -> Outcome:
        """The stored outcome; `fresh` if there is none, or its examples are lost."""
        stored = from_primary(self._stored)
        if stored is None:
            return dataclasses.replace(fresh, path=self.path)
        broken_at, place = stored
        check(
            broken_at.shape == fresh.broken_at.shape,
            "an outcome of this split",
            "Remove the file and start again.",
            path=str(self.path),
            shape=broken_at.shape,
        )
        return Outcome(fresh.stages, broken_at, Place(*place), self.path)

    def _stored(self) -> tuple[np.ndarray, list[int]] | None:
        if self.path is None or not self.path.exists():
            return None
        if self._wants_examples and not self._examples_path(self.path).exists():
            return None
        with np.load(self.path, allow_pickle=False) as file:
            return file["broken_at"], file["place"].tolist()

    def keep_examples(self, images: np.ndarray, num_columns: int) -> None:
        """Opens `NAME-examples.npy`, float32 [columns, N, ...]; first the originals."""
        if self.path is None or not is_primary():
            return
        path = self._examples_path(self.path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.path.exists() and path.exists():
            self._examples = np.lib.format.open_memmap(path, mode="r+")
            return
        shape = (num_columns, *images.shape)
        self._examples = np.lib.format.open_memmap(
            path, mode="w+", dtype=np.float32, shape=shape
        )
        for number, image in enumerate(images):
            self._examples[:, number] = image.astype(np.float32) / np.float32(255)

    @staticmethod
    def _examples_path(path: pathlib.Path) -> pathlib.Path:
        return path.with_name(f"{path.stem}-examples.npy")

    @property
    def keeps_examples(self) -> bool:
        """Whether this process keeps adversarial images."""
        return self._examples is not None

    def put_examples(self, column: int, indices: np.ndarray, images: Any) -> None:
        """Keeps adversarial images; `keep_examples` comes first."""
        if self._examples is not None:
            self._examples[column, indices] = images

    def write(self, outcome: Outcome, *, now: bool) -> None:
        """Replaces the file, unless it was written a moment ago and need not be now."""
        is_time = time.monotonic() - self._written > _SECONDS_BETWEEN_WRITES
        if self.path is None or not is_primary() or not (now or is_time):
            return
        if isinstance(self._examples, np.memmap):
            self._examples.flush()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        buffer = io.BytesIO()
        np.savez(
            buffer,
            broken_at=outcome.broken_at,
            place=np.array(outcome.place),
            columns=np.array(list(outcome.stages)),
            stages=np.array(json.dumps(dict(outcome.stages))),
            about=np.array(self._about),
        )
        write_bytes(self.path, buffer.getvalue())
        self._written = time.monotonic()
