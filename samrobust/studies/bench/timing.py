"""How a time is taken: warm-up, then repeats long enough to trust, each waited for.

A repeat is as many calls as fill `min_seconds`, started without waiting for each other,
and one wait at the end for everything that the calls computed. Compilation is never in
it. No JAX here: the twin in PyTorch is timed by the same stopwatch.
"""

import math
import resource
import sys
import time
from collections.abc import Callable
from typing import Any

__all__ = ["measure", "peak_resident_bytes"]

_WARMUP_SECONDS = 1.0
_STEADY, _PATIENCE = 1.1, 4


def measure(
    call: Callable[[], Any],
    *,
    repeats: int,
    min_seconds: float,
    warmup_calls: int,
    wait: Callable[[Any], object],
) -> list[float]:
    """Measures the seconds of a call, one value a repeat.

    Args:
      call: starts the work.
      repeats: number of repeats, >= 1.
      min_seconds: length of a repeat, as far as whole calls allow; > 0.
      warmup_calls: calls before, at least; and at least a repeat or a second of them,
        whichever is shorter; and until the last three are within 10 % of the fastest,
        for a heap may still grow after the first ones, but at most four times as many.
      wait: waits for the work, given what the last call returned.
    """

    def seconds_of(calls: int) -> float:
        started = time.perf_counter()
        for _ in range(calls - 1):
            call()
        wait(call())
        return (time.perf_counter() - started) / calls

    warmup, end = [], time.perf_counter() + min(min_seconds, _WARMUP_SECONDS)
    while (
        len(warmup) < warmup_calls
        or time.perf_counter() < end
        or (len(warmup) < _PATIENCE * warmup_calls and not _is_steady(warmup))
    ):
        warmup.append(seconds_of(1))
    calls = max(1, math.ceil(min_seconds / min(warmup)))
    return [seconds_of(calls) for _ in range(repeats)]


def _is_steady(seconds: list[float]) -> bool:
    return max(seconds[-3:]) <= _STEADY * min(seconds)


def peak_resident_bytes() -> int:
    """Returns the most memory that this process has had in the host."""
    unit = 1 if sys.platform == "darwin" else 1024  # kilobytes but on macOS
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
