"""Placement on devices: a one-dimensional mesh, the batch split, all else replicated.

Under `jax.jit` a computation on these arrays means the same on one device as on many:
sums and BatchNorm statistics run over the global batch.
"""

import contextlib
import contextvars
import math
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from samrobust.types import PyTree

__all__ = [
    "compiling_for",
    "data_mesh",
    "replicate",
    "replicated",
    "shard_batch",
    "sharded",
]

_AXIS = "data"
_DESCRIBED: contextvars.ContextVar[Sequence[Any]] = contextvars.ContextVar(
    "devices that are described and not there", default=()
)


@contextlib.contextmanager
def compiling_for(devices: Sequence[Any]) -> Iterator[None]:
    """Makes `data_mesh` span other devices than this process's, inside the context.

    Those of a topology that is only described, as by `jax.experimental.topologies`:
    what is lowered inside the context can be compiled for them, and not run.
    """
    token = _DESCRIBED.set(devices)
    try:
        yield
    finally:
        _DESCRIBED.reset(token)


def data_mesh() -> Mesh:
    """Returns a mesh over all devices of all processes."""
    devices = _DESCRIBED.get() or jax.devices()
    return jax.make_mesh(
        (len(devices),), (_AXIS,), devices=devices, axis_types=(AxisType.Auto,)
    )


def replicated(mesh: Mesh) -> NamedSharding:
    """Returns the sharding with the whole array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def replicate(tree: PyTree, mesh: Mesh) -> PyTree:
    """Puts a whole copy of every array on every device, of other processes too.

    Args:
      tree: arrays that are the same in all processes, which is not checked; those that
        lie there already are left alone. Of devices that are described and not there,
        their shapes, and shapes are returned.
      mesh: of all devices.
    """
    placement = replicated(mesh)
    if _DESCRIBED.get():
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=placement), tree
        )
    if placement.is_fully_addressable:
        return jax.device_put(tree, placement)

    def put(leaf: Any) -> jax.Array:
        if isinstance(leaf, jax.Array) and leaf.sharding == placement:
            return leaf
        host = np.asarray(leaf)
        return jax.make_array_from_callback(host.shape, placement, lambda i: host[i])

    return jax.tree.map(put, tree)


def sharded(mesh: Mesh) -> NamedSharding:
    """Returns the sharding with the first axis split over the devices."""
    return NamedSharding(mesh, PartitionSpec(_AXIS))


def shard_batch(batch: PyTree, mesh: Mesh) -> PyTree:
    """Splits the first axis of every array over the mesh; inside `jit`.

    An axis that the devices do not divide is split over as many of them as divide both,
    and the others hold copies: the same numbers, with less parallelism.

    Args:
      batch: arrays [B, ...] of one size B.
      mesh: of `data_mesh`.
    """
    size = len(jax.tree.leaves(batch)[0])
    parts = math.gcd(size, mesh.size)
    if parts < mesh.size:
        devices = mesh.devices.reshape(parts, mesh.size // parts)
        mesh = Mesh(devices, (_AXIS, "copy"), axis_types=(AxisType.Auto,) * 2)
    return jax.lax.with_sharding_constraint(batch, sharded(mesh))
