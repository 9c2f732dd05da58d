"""How a time is taken: warm-up, then repeats long enough to trust, each waited for.

A repeat is as many calls as fill `min_seconds`, started without waiting in between, and
one wait at the end for everything that the calls computed. Compilation is never in it.
"""

import dataclasses
import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax

from samrobust.checks import check

__all__ = ["Protocol", "measure", "spread"]


@dataclasses.dataclass(frozen=True)
class Protocol:
    """How long to measure.

    Attributes:
      repeats: number of repeats, >= 1.
      min_seconds: length of a repeat, as far as whole calls allow; > 0.
      warmup_calls: calls before, at least; and at least a second of them.
    """

    repeats: int = 5
    min_seconds: float = 2.0
    warmup_calls: int = 3

    def __post_init__(self) -> None:
        check(self.repeats >= 1, "repeats >= 1", repeats=self.repeats)
        check(self.min_seconds > 0, "min_seconds > 0", min_seconds=self.min_seconds)


def measure(call: Callable[[], Any], protocol: Protocol) -> list[float]:
    """Seconds of a call, one value a repeat.

    Args:
      call: starts the work and returns arrays that are ready when it is done.
      protocol: see there.
    """
    calls, started = 0, time.perf_counter()
    while calls < protocol.warmup_calls or time.perf_counter() - started < 1.0:
        jax.block_until_ready(call())
        calls += 1
    estimate = (time.perf_counter() - started) / calls
    per_repeat = max(1, math.ceil(protocol.min_seconds / estimate))
    seconds = []
    for _ in range(protocol.repeats):
        started = time.perf_counter()
        for _ in range(per_repeat - 1):
            call()
        jax.block_until_ready(call())
        seconds.append((time.perf_counter() - started) / per_repeat)
    return seconds


def spread(values: Sequence[float]) -> tuple[float, float]:
    """Median and interquartile range (0 for a single value).

    >>> spread([1.0, 2.0, 3.0, 4.0, 5.0])
    (3.0, 2.0)
    """
    if len(values) < 2:
        return statistics.median(values), 0.0
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return statistics.median(values), high - low
