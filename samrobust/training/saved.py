"""What of a run lies in its checkpoints: read back, compared with the run, written.

A checkpoint holds a `Carry` and, as metadata, the identity of its run, the log so far
and what else a training that goes on must know.
"""

import dataclasses
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from samrobust.data import Dataset
from samrobust.files import glance
from samrobust.identity import Identity, identity_of, imported
from samrobust.parallel import broadcast, data_mesh, from_primary
from samrobust.training.checkpoint import CheckpointError, Checkpoints, Restored
from samrobust.training.epoch import Carry
from samrobust.training.setup import make_parts, make_plan
from samrobust.types import Array, Config, PyTree
from samrobust.workdir import stored_config

__all__ = [
    "Network",
    "checkpoint_folder",
    "checkpoint_metadata",
    "identity_in",
    "load_network",
    "restore",
    "save_variables",
]


def checkpoint_folder(workdir: pathlib.Path, which: str) -> pathlib.Path:
    """Where the checkpoints of a kind, `last` or `best`, lie."""
    return workdir / "checkpoints" / which


class Network(NamedTuple):
    """A trained network, and whose it is.

    Attributes:
      variables: parameters and statistics, for `model.apply`.
      step: after which it was saved.
      identity: of the run that trained it.
    """

    variables: dict[str, PyTree]
    step: int
    identity: Identity


def load_network(
    config: Config,
    dataset: Dataset,
    workdir: pathlib.Path,
    which: str,
    *,
    step: int | None = None,
) -> Network:
    """Returns the trained network of a run.

    Args:
      config: of the run; what an evaluation changes in it does not matter.
      dataset: that of `config.data`.
      workdir: of the run; the `config.json` there says whose checkpoints they must be.
      which: `last`, or `best` on the validation images.
      step: of the checkpoint; None for the newest.

    Raises:
      CheckpointError: if there is none, or if it is damaged or of another run. An older
        one never takes its place.
    """
    key = jax.eval_shape(lambda: jax.random.key(0))
    like = jax.eval_shape(_make_init(config, dataset), key)
    folder = checkpoint_folder(workdir, which)
    own = from_primary(lambda: stored_config(workdir)) or config
    expected = identity_of(own, dataset)
    digest = from_primary(lambda: glance(workdir / "import.json").get("sha256"))
    if digest is not None:
        expected = dataclasses.replace(expected, data=imported(str(digest)))
    refuse = _of_another_run(expected, draws=False)
    restored = _read_and_spread(
        folder, like, data_mesh(), lambda c: c.restore(step, like, refuse=refuse)
    )
    assert restored is not None  # `Checkpoints.restore` raises
    if step is None:
        from_primary(lambda: _check_is_final(own, dataset, folder, restored.step))
    return Network(
        restored.state.state.variables,
        restored.step,
        identity_in(restored.metadata),
    )


def _check_is_final(
    config: Config, dataset: Dataset, folder: pathlib.Path, step: int
) -> None:
    """Refuses an older step of a run that has finished."""
    result = glance(folder.parent.parent / "result.json")
    if not result:
        return
    final = result.get("step") if result.get("checkpoint") == folder.name else step
    if folder.name == "last":
        steps_per_epoch = make_plan(config, len(dataset.train)).num_steps
        final = config.training.epochs * steps_per_epoch
    if step != final:
        raise CheckpointError(
            f"Expected step {final} in {folder}, with which the run finished, got step "
            f"{step}. An older one is used only where --step names it."
        )


def checkpoint_metadata(
    identity: Identity,
    *,
    epoch_seconds: float = 0.0,
    best_score: float | None = None,
    lines: Sequence[dict[str, Any]] = (),
) -> dict[str, Any]:
    """Returns what a checkpoint holds beside the state.

    Args:
      identity: of the run.
      epoch_seconds: of the epoch in progress.
      best_score: so far.
      lines: of `metrics.jsonl`, which can so be written again.
    """
    return {
        "identity": identity.as_dict(),
        "epoch_seconds": epoch_seconds,
        "best_score": best_score,
        "lines": list(lines),
    }


def _of_another_run(
    identity: Identity, *, draws: bool = True
) -> Callable[[dict[str, Any]], str]:
    """Says of a checkpoint's metadata why it is not of this run; empty if it is."""

    def refuse(metadata: dict[str, Any]) -> str:
        stored = Identity.from_dict(metadata.get("identity"))
        if stored is None:
            return "it does not say of which, as those of older versions of samrobust"
        return stored.unlike(identity, draws=draws)

    return refuse


def identity_in(metadata: dict[str, Any]) -> Identity:
    """Returns the identity that a checkpoint of this run names."""
    identity = Identity.from_dict(metadata["identity"])
    assert identity is not None  # `_of_another_run` was asked
    return identity


def save_variables(
    config: Config,
    dataset: Dataset,
    workdir: pathlib.Path,
    variables: dict[str, PyTree],
    digest: str | None = None,
) -> None:
    """Makes a network the last checkpoint of a run that has taken no step yet.

    The optimizer is that of a fresh run.

    Args:
      config: of the run; validated.
      dataset: that of `config.data`.
      workdir: of the run, without checkpoints; claimed by the caller.
      variables: `{"params": ..., "batch_stats": ...}`, arrays that fit the network.
      digest: SHA-256 of the file that they come from, if they do.

    Raises:
      CheckpointError: if it cannot be written.
    """
    init = _make_init(config, dataset)

    @jax.jit
    def make(key: Array, variables: dict[str, PyTree]) -> Carry:
        carry = init(key)
        state = dataclasses.replace(carry.state, **variables)
        return Carry(state, carry.totals)

    carry = make(jax.random.key(config.seed), variables)
    identity = identity_of(config, None)
    if digest is not None:
        identity = dataclasses.replace(identity, data=imported(digest))
    metadata = checkpoint_metadata(identity)
    with Checkpoints(checkpoint_folder(workdir, "last")) as checkpoints:
        checkpoints.save(0, carry, metadata, wait=True)


def _make_init(config: Config, dataset: Dataset) -> Callable[[Array], Carry]:
    """From a key to what a checkpoint holds, before the first step."""
    parts = make_parts(config, dataset, make_plan(config, len(dataset.train)).num_steps)
    return lambda key: Carry(parts.init(key), parts.zero_totals)


def restore(
    folder: pathlib.Path, like: PyTree, mesh: Mesh, identity: Identity
) -> Restored | None:
    """The newest intact checkpoint, read by process 0 and replicated over all devices.

    Args:
      folder: of the checkpoints; process 0 alone needs to see it.
      like: the structure, shapes and dtypes of the state.
      mesh: of all devices, whatever their number was when the state was saved.
      identity: of the run that goes on.

    Raises:
      CheckpointError: as `Checkpoints.restore_latest`; also for one of another run.
    """
    refuse = _of_another_run(identity)
    return _read_and_spread(
        folder, like, mesh, lambda c: c.restore_latest(like, refuse=refuse)
    )


def _read_and_spread(
    folder: pathlib.Path,
    like: PyTree,
    mesh: Mesh,
    read_from: Callable[[Checkpoints], Restored | None],
) -> Restored | None:
    """What process 0 reads, in all processes."""
    found: list[Restored] = []

    def read() -> tuple[int, dict[str, Any]] | None:
        with Checkpoints(folder) as checkpoints:
            restored = read_from(checkpoints)
        found.extend([] if restored is None else [restored])
        return None if restored is None else (restored.step, restored.metadata)

    known = from_primary(read)
    if known is None:
        return None
    here = found[0].state if found else jax.tree.map(_zeros, like)
    return Restored(known[0], broadcast(here, mesh), known[1])


def _zeros(model: jax.ShapeDtypeStruct) -> np.ndarray:
    return np.zeros(model.shape, model.dtype)
