"""What JAX has no public name for: the one place where `jax._src` is touched.

- The coordination service's store: `jax.distributed` joins processes and offers them no
  place to leave a value; Orbax takes the client from the same object. The number of
  processes and of this one stand there too: `jax.process_count` and `process_index`
  would ask for a device first.
- Whether JAX has looked for devices already, after which processes cannot join.
- Whether this is a Cloud TPU VM: JAX knows as it is imported, without a device.
- The logger of errors in callbacks, which has the name of its module.
- What XLA's compiler knows of a device: `jax.experimental.topologies` takes such a
  description and hands none out.
"""

from typing import Any

import jax
from jax._src import cloud_tpu_init, distributed, xla_bridge
from jax._src.lib import xla_client  # pyright: ignore[reportPrivateImportUsage]

__all__ = [
    "CALLBACK_LOGGER",
    "has_backend",
    "in_cloud_tpu_vm",
    "is_joined",
    "look_for",
    "process_number",
    "store",
    "target_config",
]

CALLBACK_LOGGER = "jax._src.callback"


def store() -> Any:
    """Returns JAX's client of the coordination service; None for a single process."""
    return distributed.global_state.client


def look_for(key: str) -> bytes | None:
    """Returns the value of a key in the store; None if no process has set it."""
    # Not the blocking call: one that times out stays with the service forever.
    try:
        return store().key_value_try_get_bytes(key)
    except jax.errors.JaxRuntimeError as error:
        if "NOT_FOUND" in str(error):
            return None
        raise


def is_joined() -> bool:
    """Tells whether this process has joined others; asks JAX for no device."""
    return distributed.global_state.num_processes > 1


def process_number() -> int:
    """Returns which of them this process is; asks JAX for no device."""
    return distributed.global_state.process_id


def has_backend() -> bool:
    """Returns whether JAX has looked for devices; asks it for none."""
    return xla_bridge.backends_are_initialized()


def target_config() -> str:
    """Returns what XLA's compiler knows of this GPU, a `GpuTargetConfigProto` as text.

    Empty on other devices.
    """
    topology: Any = xla_client.get_topology_for_devices(jax.devices()[:1])
    return getattr(topology, "target_config", "")


def in_cloud_tpu_vm() -> bool:
    """Returns whether JAX runs on a TPU VM, alone or as one of several."""
    return cloud_tpu_init.running_in_cloud_tpu_vm
