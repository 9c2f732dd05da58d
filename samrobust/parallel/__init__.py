"""Many devices, many processes: a data mesh, and what the processes agree upon."""

from samrobust.parallel.agreement import (
    AgreedStop,
    broadcast,
    from_primary,
    is_shared,
    join,
    met_by_all,
)
from samrobust.parallel.ending import leave, lost_a_peer, part
from samrobust.parallel.environment import starts_first
from samrobust.parallel.groups import map_groups
from samrobust.parallel.mesh import (
    data_mesh,
    replicate,
    replicated,
    shard_batch,
    sharded,
)
from samrobust.parallel.start import DistributedError, check_platform, initialize
from samrobust.parallel.store import is_joined, is_primary

__all__ = [
    "AgreedStop",
    "DistributedError",
    "broadcast",
    "check_platform",
    "data_mesh",
    "from_primary",
    "initialize",
    "is_joined",
    "is_primary",
    "is_shared",
    "join",
    "leave",
    "lost_a_peer",
    "map_groups",
    "met_by_all",
    "part",
    "replicate",
    "replicated",
    "shard_batch",
    "sharded",
    "starts_first",
]
