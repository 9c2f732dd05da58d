"""Many devices, many processes: a data mesh, and what the processes agree upon."""

from samrobust.parallel.mesh import data_mesh, replicated, shard_batch, sharded

__all__ = ["data_mesh", "replicated", "shard_batch", "sharded"]
