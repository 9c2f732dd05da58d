"""Fates: which stage of an attack broke which example, and the file of them.

The file is replaced whole every few seconds during the attack: a killed evaluation
resumes where the file says. A file that is damaged, or of anything else, is moved
aside, and its attack starts over.
"""

import dataclasses
import hashlib
import io
import json
import pathlib
import re
import time
import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import linen as nn

from samrobust.attacks import ATTACKS_VERSION
from samrobust.data import Split, fingerprint
from samrobust.evaluation.examples import ExamplesFile
from samrobust.system.claims.lease import lost
from samrobust.system.distributed import broadcast_from_primary, is_primary
from samrobust.system.files import set_aside, write_bytes
from samrobust.system.provenance import checksum, random_bits
from samrobust.types import Array, PyTree

__all__ = ["MISCLASSIFIED", "STANDING", "Fates", "FatesFile", "Place", "identify"]

MISCLASSIFIED, STANDING = -2, -1

_VERSION = 2  # raised when the same attacks are given other images, keys or networks
_SECONDS_BETWEEN_WRITES = 5.0
_NAMES = ("broken_at", "non_finite")  # of the arrays


class Place(NamedTuple):
    """The next work item: a stage of the attack and one of the split's examples.

    All examples before that one are through with the stage.
    """

    stage: int = 0
    example: int = 0


@dataclasses.dataclass
class Fates:
    """The fate of every example under an attack.

    Attributes:
      stages: the name of each stage's member, as in `("apgd-ce", "apgd-t", "apgd-t",
        ...)`: a member has a stage for each of its targets.
      broken_at: int16 [N] in the order of the split: the stage that broke an example,
        `STANDING` (-1) where none did, `MISCLASSIFIED` (-2) where it was not right as
        it was.
      non_finite: bool [N]: broken by a highest logit that is NaN or infinite.
      place: how far the attack has come.
      provenance: of all processes that contributed, in order.
      path: of the file, if they are stored.
    """

    stages: Sequence[str]
    broken_at: np.ndarray
    non_finite: np.ndarray
    place: Place = dataclasses.field(default_factory=Place)
    provenance: tuple[dict[str, Any], ...] = ()
    path: pathlib.Path | None = None

    @classmethod
    def fresh(cls, stages: Sequence[str], num_examples: int) -> "Fates":
        """Returns the fates before the attack: all examples stand."""
        standing = np.full(num_examples, STANDING, np.int16)
        return cls(stages, standing, np.zeros(num_examples, bool))

    @property
    def is_begun(self) -> bool:
        """Says whether any example is through with a stage."""
        return self.place > Place()

    @property
    def is_whole(self) -> bool:
        """Says whether nothing is left to do."""
        return self.place.stage >= len(self.stages)

    def num_begun(self) -> tuple[int, int]:
        """Returns how many examples the current member began with, and the stage."""
        stage = self.place.stage
        first = list(self.stages).index(self.stages[stage])
        at_first, now = self._through(first - 1), self._through(stage - 1)
        return int(np.sum(at_first)), int(np.sum(now))

    def is_possible(self) -> bool:
        """Says whether an evaluation can produce these values."""
        begun = min(self.place.stage + 1, len(self.stages))
        return bool(
            min(self.place) >= 0
            and self.place <= Place(len(self.stages))
            and self.place.example <= len(self.broken_at)
            and np.all((self.broken_at >= MISCLASSIFIED) & (self.broken_at < begun))
            and not np.any(self.non_finite & (self.broken_at < 0))
        )

    def leave_out(self, wrong: np.ndarray) -> None:
        """Marks examples, bool [N], as misclassified before the attack."""
        self.broken_at[wrong] = MISCLASSIFIED
        self.non_finite[wrong] = False

    @property
    def correct(self) -> np.ndarray:
        """Returns which examples stand, bool [N]."""
        return self.broken_at == STANDING

    @property
    def num_non_finite(self) -> int:
        """Returns how many broke by a highest logit that is NaN or infinite."""
        return int(np.sum(self.non_finite))

    def broken_by(self) -> np.ndarray:
        """Returns the names [N] of what broke each: a member, `natural` or empty."""
        return np.array([*self.stages, "natural", ""])[self.broken_at]

    def after_each(self) -> dict[str, float]:
        """Returns the accuracy in percent that each member left, by name, in order."""
        return {
            member: 100 * float(np.mean(self._through(stage)))
            for stage, member in enumerate(self.stages)
        }

    def _through(self, stage: int) -> np.ndarray:
        """Returns which examples stand after a stage, bool [N]."""
        return self.correct | (self.broken_at > stage)


class FatesFile:
    """The file of the fates under an attack, and of its images if they are stored.

    Only process 0 touches it.

    Args:
      folder: receives `NAME.npz`, with NAME a hash of `identity`; made in a directory
        that is there. None stores nothing.
      identity: all that the fates depend on, from `identify`. Another identity has
        another file.
    """

    def __init__(self, folder: pathlib.Path | None, identity: dict[str, Any]):
        self._about = json.dumps(identity, sort_keys=True)
        name = hashlib.sha256(self._about.encode()).hexdigest()[:12]
        self.path = None if folder is None else folder / f"{name}.npz"
        self._written = time.monotonic()
        self._examples: ExamplesFile | None = None

    def open(self, fresh: Fates, images: np.ndarray | None = None) -> Fates:
        """Returns the stored fates, or `fresh` if there are none that can be trusted.

        A file that cannot be trusted is moved aside, with a warning.

        Args:
          fresh: the fates before any attack.
          images: uint8 [N, ...], of the split, to store the adversarial images next to
            the file; None: they are not stored.
        """
        stored = broadcast_from_primary(lambda: self._open(fresh, images))
        return dataclasses.replace(stored or fresh, path=self.path)

    def _open(self, fresh: Fates, images: np.ndarray | None) -> Fates | None:
        if self.path is None:
            return None
        if images is not None:
            self._examples = ExamplesFile(self._examples_path(self.path), images)
        try:
            return self._read(self.path, fresh)
        except FileNotFoundError:
            pass
        except _UnfitError as error:
            self._set_aside(self.path, str(error))
        self.path.parent.mkdir(exist_ok=True)
        if self._examples is not None:
            self._examples.create()
        self.write(fresh, now=True)  # a folder that cannot be written fails at once
        return None

    def _read(self, path: pathlib.Path, fresh: Fates) -> Fates:
        """Returns the stored fates.

        Raises:
          _UnfitError: if they are incomplete, of anything else, or impossible.
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
            raise _UnfitError(
                f"{path} is of another network, split or attack than its name says"
            )
        if not is_possible:
            raise _UnfitError(f"{path} holds impossible values")
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
            f"{problem}. AutoAttack starts over; what was there is kept as {moved}.",
            stacklevel=2,
        )

    def put_examples(
        self, indices: np.ndarray, images: Array, broken: np.ndarray
    ) -> None:
        """Stores the adversarial images that broke examples, if `open` got images.

        Args:
          indices: positions [n] of the examples in the split.
          images: what the attack made of them, [B, ...] with B >= n.
          broken: bool [n].
        """
        if self._examples is not None:
            found = jax.device_get(images)[: len(indices)][broken]
            self._examples.put(indices[broken], found)

    def write(self, fates: Fates, *, now: bool) -> None:
        """Replaces the file, if `now` or a few seconds after the last time."""
        is_time = time.monotonic() - self._written > _SECONDS_BETWEEN_WRITES
        if self.path is None or not is_primary() or not (now or is_time):
            return
        if self._is_behind(fates):
            return
        content: dict[str, Any] = {
            "broken_at": fates.broken_at,
            "non_finite": fates.non_finite,
            "place": np.array(fates.place),
            "stages": np.array(list(fates.stages)),
            "about": np.array(self._about),
            "provenance": np.array(json.dumps(fates.provenance)),
        }
        if self._examples is not None:
            self._examples.flush()
            content["sums"] = self._examples.sums
        buffer = io.BytesIO()
        np.savez(buffer, **content)
        try:
            write_bytes(self.path, buffer.getvalue())
        except FileNotFoundError as error:
            raise lost(self.path.parent) from error
        self._written = time.monotonic()

    def _is_behind(self, fates: Fates) -> bool:
        """Says whether another process has come further; its file is to stay."""
        assert self.path is not None
        if self._examples is not None:  # one process at a time has their file
            return False
        try:
            return self._read(self.path, fates).place > fates.place
        except (FileNotFoundError, _UnfitError):
            return False


class _UnfitError(Exception):
    """The reason why an evaluation cannot resume from a file, and which file."""


def identify(
    model: nn.Module, variables: PyTree, split: Split, key: Array, **settings: Any
) -> dict[str, Any]:
    """Returns all that fates depend on, except rounding, in JSON's types.

    Args:
      model: its fields count: another normalization is another network.
      variables: of the model.
      split: the images.
      key: of the random numbers.
      **settings: of the attacks, in JSON's types.
    """
    return {
        "version": [_VERSION, ATTACKS_VERSION],
        "model": re.sub(r" at 0x[0-9a-f]+", "", repr(model)),
        "network": checksum(variables),
        "split": fingerprint(split),
        "key": jax.random.key_data(key).tolist(),
        "random": random_bits(),
        **settings,
    }


def _like(array: np.ndarray, expected: np.ndarray) -> np.ndarray:
    """Returns the array, if it has the shape and dtype that are expected."""
    if array.shape != expected.shape or array.dtype != expected.dtype:
        raise ValueError(
            f"{array.dtype} {array.shape}, not {expected.dtype} {expected.shape}"
        )
    return array
