"""Many devices, many processes: a data mesh, and what the processes agree upon."""

from samrobust.parallel.agreement import (
    AgreedStop,
    broadcast,
    from_primary,
    is_joined,
    is_primary,
    is_shared,
    join,
    leave,
    lost_a_peer,
    part,
    request_stop,
)
from samrobust.parallel.groups import map_groups
from samrobust.parallel.mesh import (
    data_mesh,
    replicate,
    replicated,
    shard_batch,
    sharded,
)
from samrobust.parallel.start import DistributedError, initialize

__all__ = [
    "AgreedStop",
    "DistributedError",
    "broadcast",
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
    "part",
    "replicate",
    "replicated",
    "request_stop",
    "shard_batch",
    "sharded",
]
