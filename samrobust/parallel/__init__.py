"""Many devices, many processes: a data mesh, and what the processes agree upon."""

from samrobust.parallel.groups import map_groups
from samrobust.parallel.mesh import data_mesh, replicated, shard_batch, sharded

__all__ = ["data_mesh", "map_groups", "replicated", "shard_batch", "sharded"]
