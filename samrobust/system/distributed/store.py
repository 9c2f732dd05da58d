"""A store of small values that processes share, and which process this is.

The values go through the coordination service that the processes met at, so that a
process waits for another on the host, and not inside a collective operation.
"""

import time

import jax

from samrobust.system.jax_internals import joined_processes, store

__all__ = ["is_joined", "is_primary", "look_for", "wait_for"]

_LONGEST_PAUSE = 0.2  # seconds between two looks for a value


def is_primary() -> bool:
    """Tells whether this is process 0, which reads and writes the run's files."""
    return jax.process_index() == 0


def is_joined() -> bool:
    """Tells whether this process has joined others; asks JAX for no device."""
    return joined_processes() > 1


def wait_for(key: str) -> bytes:
    """Returns the value of a key, as soon as another process has set it."""
    pause = 0.001
    while (value := look_for(key)) is None:
        time.sleep(pause)  # signals are handled meanwhile
        pause = min(2 * pause, _LONGEST_PAUSE)
    return value


def look_for(key: str) -> bytes | None:
    """Returns the value of a key; None if none has set it."""
    # Not the blocking call: one that times out stays with the service forever.
    try:
        return store().key_value_try_get_bytes(key)
    except jax.errors.JaxRuntimeError as error:
        if "NOT_FOUND" in str(error):
            return None
        raise
