"""Many devices, many processes: the data mesh, and agreement among processes."""

from samrobust.system.distributed.agreement import (
    broadcast,
    broadcast_from_primary,
    is_primary,
    is_shared,
    join,
    met_by_all,
)
from samrobust.system.distributed.ending import abort, lost_a_peer, shut_down
from samrobust.system.distributed.environment import starts_first
from samrobust.system.distributed.groups import map_groups
from samrobust.system.distributed.mesh import (
    compiling_for,
    data_mesh,
    replicate,
    replicated,
    shard_batch,
    sharded,
)
from samrobust.system.distributed.start import (
    DistributedError,
    check_platform,
)
from samrobust.system.jax_internals import is_joined, process_number

__all__ = [
    "DistributedError",
    "abort",
    "broadcast",
    "broadcast_from_primary",
    "check_platform",
    "compiling_for",
    "data_mesh",
    "is_joined",
    "is_primary",
    "is_shared",
    "join",
    "lost_a_peer",
    "map_groups",
    "met_by_all",
    "process_number",
    "replicate",
    "replicated",
    "shard_batch",
    "sharded",
    "shut_down",
    "starts_first",
]
