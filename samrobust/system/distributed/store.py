"""Small values that processes leave for each other, and who they are.

They go through the coordination service that the processes met at, so that one that
waits for another does so on the host, and not inside a collective operation.
"""

import time

import jax

from samrobust.system.jax_internals import joined_processes, store

__all__ = ["is_joined", "is_primary", "look_for", "wait_for"]

_LONGEST_PAUSE = 0.2  # seconds between two looks for a value


def is_primary() -> bool:
    """Whether this is process 0, the one that reads and writes the run's files."""
    return jax.process_index() == 0


def is_joined() -> bool:
    """Whether this process has joined others; asks JAX for no device."""
    return joined_processes() > 1


def wait_for(key: str) -> bytes:
    """The value of a key, as soon as another process has set it."""
    pause = 0.001
    while (value := look_for(key)) is None:
        time.sleep(pause)  # signals are handled meanwhile
        pause = min(2 * pause, _LONGEST_PAUSE)
    return value


def look_for(key: str) -> bytes | None:
    """The value of a key; None if none has set it."""
    # Not the call that waits: one that times out stays with the service for ever.
    try:
        return store().key_value_try_get_bytes(key)
    except jax.errors.JaxRuntimeError as error:
        if "NOT_FOUND" in str(error):
            return None
        raise
