"""Runs of one method, of a seed each, whose steps are taken by one program.

A model of this size leaves much of a GPU idle; the steps of several, side by side in
one program, may fill it. All else of a run stays as it is: a thread of its own has the
code of a lone run, with its own state, keys, files and end. The threads take turns,
as coroutines would: one works at a time, until it ends or wants the device.

Out of scope: several processes, and several devices, which one batch can fill.
"""

import contextlib
import functools
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from samrobust.training.epoch import Chunk, EpochRunner, LoopState, Turn
from samrobust.types import Array

__all__ = ["Companion", "Lockstep"]

_COMPILE = -1  # a step before all others


class _Request(NamedTuple):
    """A wish of one run: a chunk that begins at a step, or a program compiled."""

    step: int
    chunk: Chunk
    turn: Turn


class Lockstep:
    """Meeting point of runs, which makes calls of the device that all wait for.

    One program serves all that are at the earliest step; the others wait until those
    have caught up, so runs that resume from different steps are together again soon.
    A run that ends, for whatever reason, is waited for no longer, and the rest goes on
    in a program of fewer.

    **Guarantees**: on CPUs each run ends at the bits of a lone one.

    Args:
      size: number of the runs, each of which joins once. They differ in their seeds
        alone: the steps taken are those of the first.
      should_stop: asked once a call, so that all stop at the same step.
    """

    def __init__(self, size: int, should_stop: Callable[[], bool] = lambda: False):
        self._size, self.should_stop = size, should_stop
        self._turn = threading.Condition()  # held by the run that works
        self._runner: EpochRunner | None = None
        self._requests: dict[Companion, _Request] = {}
        self._answers: dict[Companion, Any] = {}
        self._called_at = self._noted_at = time.monotonic()
        self._served: list[Companion] = []  # by the last call
        self._trains = False

    @contextlib.contextmanager
    def joined(self) -> Iterator["Companion"]:
        """Makes this thread that of one of the runs, inside the context."""
        companion = Companion(self)
        with self._turn:
            self.note(trains=False)
            try:
                yield companion
            finally:
                self.note(trains=False)
                self._served = [other for other in self._served if other != companion]
                self._size -= 1
                self._serve()

    def clock(self) -> float:
        """Returns when the last call was made: the same for all runs after it."""
        return self._called_at

    def note(self, *, trains: bool | None = None) -> None:
        """Shares the time since the last note, if in training, among the runs served.

        Args:
          trains: whether what the run at work does next is training; None: as before.
        """
        noted_at, self._noted_at = self._noted_at, time.monotonic()
        for companion in self._served if self._trains else ():
            companion.spent += (self._noted_at - noted_at) / len(self._served)
        self._trains = self._trains if trains is None else trains

    def runner_of(self, key: Array, make: Callable[..., EpochRunner]) -> EpochRunner:
        """Returns a run's own runner; all have the programs and data of the first."""
        if self._runner is None:
            self._runner = make(key=key)
            return self._runner
        return self._runner.reseeded(key)

    def ask(self, companion: "Companion", request: _Request) -> Any:
        """Waits until the request is served and returns, or raises, what came of it."""
        self._requests[companion] = request
        self._serve()
        while companion not in self._answers:
            self._turn.wait()
        self.note(trains=request.step != _COMPILE)  # others may have rested
        answer = self._answers.pop(companion)
        if isinstance(answer, Exception):
            raise answer
        return answer

    def _serve(self) -> None:
        """Makes a call, if all runs that are left have asked for one."""
        if not self._requests or len(self._requests) < self._size:
            return
        step, chunk, _ = min(self._requests.values(), key=lambda asked: asked.step)
        served = [c for c, r in self._requests.items() if r[:2] == (step, chunk)]
        turns = [self._requests.pop(companion).turn for companion in served]
        assert self._runner is not None  # made by the first that asked
        self.note(trains=False)
        answers: list[Any] = [None] * len(turns)
        try:
            # Beforehand, as of a lone run: no epoch's seconds are those of a compiler.
            self._runner.compile(chunk, [turn.carry for turn in turns])
            if step != _COMPILE:
                self.note(trains=True)
                self._served = served
                answers = [*self._runner.run_each(chunk, turns)]
        except Exception as error:
            answers = [error] * len(turns)
        self._called_at, stop = time.monotonic(), self.should_stop()
        for companion in served:
            companion.stop = stop
        self._answers |= zip(served, answers, strict=True)
        self._turn.notify_all()


class Companion:
    """One of the runs of a `Lockstep`, in the place of an `EpochRunner`.

    Attributes:
      spent: seconds of training, its share of those of calls with others.
      stop: whether to stop after that call, until it was asked; then None.
    """

    def __init__(self, lockstep: Lockstep):
        self._lockstep = lockstep
        self._runner: Any = None
        self._step: int | None = None
        self.spent = 0.0
        self.stop: bool | None = None
        self.clock = lockstep.clock

    def make_runner(self, *args: Any, key: Array, **options: Any) -> "Companion":
        """Prepares for the calls of a run; takes the arguments of `EpochRunner`."""
        make = functools.partial(EpochRunner, *args, **options)
        self._runner = self._lockstep.runner_of(key, make)
        return self

    def seconds(self) -> float:
        """Returns the run's share of the seconds of training so far."""
        self._lockstep.note()
        return self.spent

    def rest(self) -> None:
        """Stops the training clock until the next call."""
        self._lockstep.note(trains=False)

    def should_stop(self) -> bool:
        """Tells whether to stop; right after a call, all runs the same."""
        stop, self.stop = self.stop, None
        return self._lockstep.should_stop() if stop is None else stop

    def permutation(self, epoch: int) -> Array:
        """Returns the order of the examples in an epoch, int32 [N]."""
        return self._runner.permutation(epoch)

    def compile(self, chunk: Chunk, carries: Sequence[LoopState]) -> None:
        """Compiles a chunk for this run and all that also wait for it."""
        (carry,) = carries
        turn = self._runner.turn(carry, self.permutation(0))
        self._lockstep.ask(self, _Request(_COMPILE, chunk, turn))

    def run(
        self, chunk: Chunk, carry: LoopState, permutation: Array
    ) -> tuple[LoopState, Array]:
        """Runs a chunk together with others; as `EpochRunner.run`."""
        if self._step is None:
            self._step = int(carry.state.step)
        turn = self._runner.turn(carry, permutation)
        outcome = self._lockstep.ask(self, _Request(self._step, chunk, turn))
        self._step += chunk.num_steps
        return outcome
