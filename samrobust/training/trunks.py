"""Trunks: what runs have in common that differ in late parts alone, trained once.

Until a part begins, a run with it is the run without it, bit for bit. The first run
that comes to the end of such a common part leaves its state there, as the run without
the late parts would have it; the others go on from that, each with its own late parts
as they are at the beginning.

A trunk is never needed and never waited for: where there is none, or none that can be
read, a run trains from its beginning and ends with the same bits. Which runs share one
is out of scope, see `samrobust.experiments.trunks`.
"""

import dataclasses
import pathlib
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import jax

from samrobust.sharpness import last_metrics
from samrobust.system.claims.lease import ClaimedError, claim
from samrobust.system.distributed import broadcast_from_primary
from samrobust.system.files import WorkdirError
from samrobust.training.checkpoint import CheckpointError, Checkpoints, Restored
from samrobust.training.epoch import LoopState
from samrobust.training.log import RunFolder, RunIdentity, checkpoint_folder
from samrobust.training.manifest import named_leaves
from samrobust.training.restoring import abstract, read_and_spread

__all__ = ["TRAINED_BY", "BranchFolder", "Trunk"]

# In lines of `metrics.jsonl`: the hash of the run that trained that epoch, if another.
TRAINED_BY = "trained_by"


@dataclasses.dataclass(frozen=True)
class Trunk:
    """A common part of several runs, and where it lies.

    Attributes:
      folder: receives `checkpoints/`, as the workdir of a run.
      step: the last one in common, at the end of an epoch.
      identity: of the run that has no other parts than the common ones.
      make_like: builds that run's state, of shapes alone.
      is_wanted: tells process 0 whether other runs are to go on from it.
    """

    folder: pathlib.Path
    step: int
    identity: RunIdentity
    make_like: Callable[[], LoopState]
    is_wanted: Callable[[], bool]


class BranchFolder(RunFolder):
    """A `RunFolder` that begins with a trunk where there is one, and leaves trunks.

    Args:
      workdir: as of `RunFolder`.
      identity: of the run.
      trunks: that the run passes through.
      **options: of `RunFolder`.

    **Guarantees**: the run ends with the same bits, and its log with the same numbers
    except for times; the epochs of a trunk are marked `trained_by`. A workdir with
    checkpoints goes on from them alone.
    """

    identity: RunIdentity

    def __init__(
        self,
        workdir: pathlib.Path,
        *,
        identity: RunIdentity,
        trunks: Sequence[Trunk] = (),
        **options: Any,
    ):
        super().__init__(workdir, identity=identity, **options)
        self._trunks = sorted(trunks, key=lambda trunk: -trunk.step)
        self.trunk_steps = [trunk.step for trunk in self._trunks]

    def pass_on(self, carry: LoopState, step: int) -> None:
        """Leaves the trunk that ends with this step, unless nobody wants it."""
        for trunk in self._trunks:
            if trunk.step == step:
                broadcast_from_primary(lambda trunk=trunk: self._leave(trunk, carry))

    def _leave(self, trunk: Trunk, carry: LoopState) -> None:
        """Writes a trunk in process 0; a failure costs the others time alone."""
        if not trunk.is_wanted():
            return
        try:
            with claim(trunk.folder):
                self._write(trunk, carry)
        except ClaimedError:  # another run leaves the same
            pass
        except (CheckpointError, WorkdirError) as error:
            message = f"Other runs will train their common part again: {error}"
            warnings.warn(message, stacklevel=2)

    def _write(self, trunk: Trunk, carry: LoopState) -> None:
        like, there = trunk.make_like(), checkpoint_folder(trunk.folder, "last")

        def read(which: str, step: int | None) -> Restored | None:
            with Checkpoints(checkpoint_folder(trunk.folder, which)) as checkpoints:
                return _restore(checkpoints, step, like, trunk.identity)

        if there.is_dir():
            if _pair(read, trunk.step):  # another run has left it meanwhile
                return
            with Checkpoints(there) as checkpoints:  # no best of ours beside its last
                checkpoints.retain(lambda _: False)
        late = carry.totals["sums"].keys() - like.totals["sums"].keys()
        identity = trunk.identity.branched(self.identity.as_dict()).as_dict()

        def write(which: str, step: int, state: LoopState, metadata: dict) -> None:
            lines = [
                {TRAINED_BY: self.identity.hash}
                | {name: value for name, value in line.items() if name not in late}
                for line in metadata["lines"]
            ]
            metadata |= {"identity": identity, "lines": lines}
            with Checkpoints(checkpoint_folder(trunk.folder, which)) as checkpoints:
                checkpoints.save(step, _without(state, like), metadata, wait=True)

        if self._best_score is not None:
            best = self._best.restore(None, abstract(carry))
            write("best", best.step, best.state, best.metadata)
        write("last", trunk.step, carry, self._metadata())  # now there is a trunk

    def _find(self, fresh: LoopState) -> Restored | None:
        """Returns the run's own checkpoint, or else the longest trunk."""
        found = super()._find(fresh)
        for trunk in self._trunks if found is None else ():
            there = checkpoint_folder(trunk.folder, "last")
            if broadcast_from_primary(there.is_dir):
                found = self._take(trunk, fresh)
            if found is not None:
                break
        return found

    def _take(self, trunk: Trunk, fresh: LoopState) -> Restored | None:
        """Returns the trunk as a checkpoint of this run; None where it is none."""
        like = trunk.make_like()

        def read(which: str, step: int | None) -> Restored | None:
            folder = checkpoint_folder(trunk.folder, which)
            restored = read_and_spread(
                folder, like, lambda c: _restore(c, step, like, trunk.identity)
            )
            return restored and self._as_own(restored, fresh)

        last, best = _pair(read, trunk.step) or (None, None)

        def keep(best: Restored) -> None:
            self._may_write()
            self._best.save(best.step, best.state, best.metadata, wait=True)

        if best is not None:
            broadcast_from_primary(lambda: keep(best))
        return last

    def _as_own(self, restored: Restored, fresh: LoopState) -> Restored:
        """Returns a checkpoint of a trunk as this run would have saved it."""
        waiting = last_metrics(fresh.state.opt_state)
        shown = {name: float(value) for name, value in waiting.items()}
        metadata = {
            **restored.metadata,
            "identity": self.identity.branched(restored.metadata["identity"]).as_dict(),
            "lines": [{**shown, **line} for line in restored.metadata["lines"]],
        }
        return Restored(restored.step, _with(fresh, restored.state), metadata)


def _pair(
    read: Callable[[str, int | None], Restored | None], step: int
) -> tuple[Restored, Restored | None] | None:
    """Returns a trunk's last checkpoint and the best one that it names, if any.

    None where one of them is missing: the best one may be of another run.
    """
    last = read("last", step)
    if last is None or last.metadata["best_score"] is None:
        return last and (last, None)
    best = read("best", last.metadata.get("best_step"))  # of older versions the newest
    return best and (last, best)


def _restore(
    checkpoints: Checkpoints, step: int | None, like: LoopState, identity: RunIdentity
) -> Restored | None:
    """Returns the checkpoint of a trunk; None with a warning where it is unfit."""

    def refuse(metadata: dict[str, Any]) -> str:
        return identity.refuse(metadata.get("identity"))

    if checkpoints.latest_step() is None:
        return None
    try:
        return checkpoints.restore(step, like, refuse=refuse)
    except CheckpointError as error:
        message = f"The common part of several runs is trained again: {error}"
        warnings.warn(message, stacklevel=2)
        return None


def _without(state: LoopState, like: LoopState) -> LoopState:
    """Returns a run's state without what its late parts keep in it."""
    leaves = named_leaves(state)
    common = [leaves[name] for name in named_leaves(like)]
    return jax.tree.unflatten(jax.tree.structure(like), common)


def _with(fresh: LoopState, common: LoopState) -> LoopState:
    """Returns a run's fresh state with everything that it has in common."""
    known = named_leaves(common)
    leaves = [known.get(name, leaf) for name, leaf in named_leaves(fresh).items()]
    return jax.tree.unflatten(jax.tree.structure(fresh), leaves)
