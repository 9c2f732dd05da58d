"""A function mapped over the groups of a batch, whatever the devices.

G groups on D devices run in `gcd(G, D)` lanes side by side, each of D / lanes devices
(`jax.shard_map`, manual over the lanes); a lane takes its groups one after another.
Where a lane has several devices, they share each group, and sums over it run over all
of them, as under plain `jit`. So groups of any size stay plain convolutions (`vmap`
over parameters would make grouped ones), no device waits, and the numbers depend on the
devices only by rounding.
"""

import math
from collections.abc import Callable

import jax
from jax.sharding import AxisType, Mesh, PartitionSpec

from samrobust.checks import check
from samrobust.types import PyTree

__all__ = ["map_groups"]

_LANE, _PART, _COPY = "lane", "part", "copy"


def map_groups(
    function: Callable[[PyTree, PyTree, PyTree], PyTree],
    shared: PyTree,
    own: PyTree,
    batch: PyTree,
    *,
    num_groups: int,
    mesh: Mesh | None = None,
) -> PyTree:
    """Maps `function(shared, own[i], group i of the batch)` over groups; inside `jit`.

    Args:
      function: pure; closes over no traced array.
      shared: what all groups get, any pytree of arrays.
      own: arrays [G, ...] of which each group gets its own; may be empty.
      batch: arrays [B, ...]; group i is the i-th run of m = B / G examples.
      num_groups: G >= 1.
      mesh: of `data_mesh`, over which the groups are spread; None: one device.

    Returns:
      What `function` returned, stacked [G, ...] in the order of the groups.

    Raises:
      ValueError: if G does not divide B.
    """
    size = len(jax.tree.leaves(batch)[0])
    check(
        num_groups >= 1 and size % num_groups == 0,
        "a batch that is divisible by its number of groups",
        num_groups=num_groups,
        batch_size=size,
    )
    groups = jax.tree.map(
        lambda leaf: leaf.reshape(num_groups, -1, *leaf.shape[1:]), batch
    )
    if mesh is None or mesh.size == 1:
        return _one_after_another(function, shared, own, groups)

    def lane(shared: PyTree, own: PyTree, groups: PyTree) -> PyTree:
        split = jax.lax.with_sharding_constraint(groups, PartitionSpec(None, _PART))
        return _one_after_another(function, shared, own, split)

    lanes = PartitionSpec(_LANE)
    return jax.shard_map(
        lane,
        mesh=_lanes(mesh, num_groups, size // num_groups),
        axis_names={_LANE},
        in_specs=(PartitionSpec(), lanes, lanes),
        out_specs=lanes,
        # With it on, gradients of shared parameters would be summed over the lanes.
        check_vma=False,
    )(shared, own, groups)


def _lanes(mesh: Mesh, num_groups: int, group_size: int) -> Mesh:
    """Arranges devices in lanes, each split over a group as far as its size divides."""
    lanes = math.gcd(num_groups, mesh.size)
    parts = math.gcd(group_size, mesh.size // lanes)
    devices = mesh.devices.reshape(lanes, parts, mesh.size // lanes // parts)
    axes = (_LANE, _PART, _COPY)
    return Mesh(devices, axes, axis_types=(AxisType.Auto,) * 3)


def _one_after_another(
    function: Callable[[PyTree, PyTree, PyTree], PyTree],
    shared: PyTree,
    own: PyTree,
    groups: PyTree,
) -> PyTree:
    if len(jax.tree.leaves(groups)[0]) > 1:
        return jax.lax.map(lambda mine: function(shared, *mine), (own, groups))
    own, groups = jax.tree.map(lambda leaf: leaf[0], (own, groups))
    return jax.tree.map(lambda leaf: leaf[None], function(shared, own, groups))
