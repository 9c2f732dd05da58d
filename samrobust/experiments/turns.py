"""Work in turns: of what several workers share, each takes what no other holds.

What is held by another is put off and asked for again, until that one has done it, or
died and left it. So every worker ends when all is done, and one more of them is always
of use.
"""

import time
from collections.abc import Callable, Sequence
from typing import TypeVar

from samrobust.system.runtime import RESUME
from samrobust.training import InterruptedRunError

__all__ = ["take_turns"]

_T = TypeVar("_T")
_TICK, _LONGEST_PAUSE = 0.5, 5.0  # seconds


def take_turns(
    left: Sequence[_T],
    attempt: Callable[[Sequence[_T]], Sequence[_T]],
    *,
    on_wait: Callable[[Sequence[_T]], None],
    should_stop: Callable[[], bool],
) -> None:
    """Attempts what is left, again and again, until others hold none of it.

    Args:
      left: what there is to do.
      attempt: does what it can, and returns what others hold.
      on_wait: is told what others hold, when only that is left.
      should_stop: asked now and then.

    Raises:
      InterruptedRunError: after `should_stop`.
    """
    pause = _TICK
    while left:
        held = attempt(left)
        if len(held) == len(left):
            on_wait(held)
            _wait(pause, should_stop)
            pause = min(2 * pause, _LONGEST_PAUSE)
        else:
            pause = _TICK
        left = held


def _wait(seconds: float, should_stop: Callable[[], bool]) -> None:
    """Waits by counting and not by the clock: processes in step ask equally often."""
    for _ in range(round(seconds / _TICK)):
        if should_stop():
            message = f"Stopped while others held the last runs. {RESUME}"
            raise InterruptedRunError(message)
        time.sleep(_TICK)
