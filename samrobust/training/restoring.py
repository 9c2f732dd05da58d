"""Checkpoints that process 0 reads, replicated to all processes."""

import pathlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from samrobust.system.distributed import broadcast, broadcast_from_primary, data_mesh
from samrobust.training.checkpoint import Checkpoints, Restored
from samrobust.types import PyTree

__all__ = ["abstract", "read_and_spread"]


def read_and_spread(
    folder: pathlib.Path,
    like: PyTree,
    read: Callable[[Checkpoints], Restored | None],
) -> Restored | None:
    """Returns what process 0 reads, replicated over all devices there are now.

    Args:
      folder: of the checkpoints; process 0 alone needs to see it.
      like: the structure, shapes and dtypes of the state.
      read: of the checkpoints there.

    Raises:
      CheckpointError: as `read` does, in all processes.
    """
    found: list[Restored] = []

    def here() -> tuple[int, dict[str, Any]] | None:
        with Checkpoints(folder) as checkpoints:
            restored = read(checkpoints)
        found.extend([] if restored is None else [restored])
        return None if restored is None else (restored.step, restored.metadata)

    known = broadcast_from_primary(here)
    if known is None:
        return None
    state = found[0].state if found else jax.tree.map(_zeros, like)
    return Restored(known[0], broadcast(state, data_mesh()), known[1])


def _zeros(model: jax.ShapeDtypeStruct) -> np.ndarray:
    return np.zeros(model.shape, model.dtype)


def abstract(carry: PyTree) -> PyTree:
    """Returns the shapes and dtypes of a state."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), carry)
