"""Many devices, many processes: the data mesh, and agreement among processes."""

from samrobust.system.distributed.agreement import (
    AgreedStop,
    broadcast,
    from_primary,
    is_shared,
    join,
    met_by_all,
)
from samrobust.system.distributed.ending import leave, lost_a_peer, part
from samrobust.system.distributed.environment import starts_first
from samrobust.system.distributed.groups import map_groups
from samrobust.system.distributed.mesh import (
    data_mesh,
    replicate,
    replicated,
    shard_batch,
    sharded,
)
from samrobust.system.distributed.start import (
    DistributedError,
    check_platform,
    initialize,
)
from samrobust.system.distributed.store import is_joined, is_primary

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
