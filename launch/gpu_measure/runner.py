"""Runs blocks one after another, none longer than it may, and remembers what is done.

A block that fails or takes too long leaves the others as they are. Ended at any moment,
the next start skips what was finished, goes on with what was not reached, and comes to
what failed last. No attempt writes over an earlier one.
"""

import contextlib
import dataclasses
import math
import os
import pathlib
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from launch.gpu_measure.blocks import Block, Command
from samrobust.system.files import glance, set_aside, write_json

__all__ = ["DONE", "run"]

DONE = "done"
_STOPPED = "stopped"
_GRACE = 15.0  # seconds between SIGTERM, at which a run saves its state, and SIGKILL
_LEAST = 20.0  # seconds without which no block begins
_MOST = 0.8  # of a budget: what one that was stopped after that wants more
_PAUSE = 0.1


def run(
    blocks: Sequence[Block],
    workdir: pathlib.Path,
    budget: float,
    *,
    after: Callable[[], None] = lambda: None,
    should_stop: Callable[[], bool] = lambda: False,
    grace: float = _GRACE,
    least: float = _LEAST,
) -> dict[str, str]:
    """Runs the blocks that are not done yet.

    Args:
      blocks: in order.
      workdir: receives `blocks/NAME.json`, the outcome of each, and `logs/NAME/`. What
        an earlier attempt left in `NAME/` is set aside there, as `NAME.aside`.
      budget: seconds for all of them, the last SIGKILL included.
      after: called after each block; an OSError of it is told, and ends nothing.
      should_stop: asked all the while.
      grace: seconds that a process has to end after SIGTERM.
      least: seconds without which no block begins.

    Returns:
      What became of each block that was reached, now or earlier: `done`, `failed`,
      `out of time`, or `stopped` where the budget or a request ended it.
    """
    end = time.monotonic() + budget
    notes = {block: workdir / "blocks" / f"{block.name}.json" for block in blocks}
    known = {block: glance(path) for block, path in notes.items()}
    todo = [b for b in blocks if b.required or known[b].get("status") != DONE]
    found = {block.name: DONE for block in blocks if block not in todo}
    for block in sorted(todo, key=lambda one: _had_its_turn(one, known[one], budget)):
        left = end - time.monotonic() - grace
        if left < least or should_stop():
            break
        path = notes[block]
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, {"status": "begun"})
        for folder in (workdir / block.name, workdir / "logs" / block.name):
            if folder.exists() and not block.required:
                set_aside(folder)
        outcome = _run_block(
            block, workdir, min(block.seconds, left), grace, should_stop
        )
        write_json(path, outcome)
        found[block.name] = outcome["status"]
        try:
            after()
        except OSError as error:  # what comes may be measured all the same
            print(f"After {block.name}: {error}", file=sys.stderr, flush=True)
        if block.required and outcome["status"] != DONE:
            break
    return found


def _had_its_turn(block: Block, known: Mapping[str, Any], budget: float) -> bool:
    """Tells whether others come first: it failed, or began and left no outcome.

    What was stopped may have been cut short by what came before it, and keeps its
    place; unless it had about as long as there is now, so that it would be cut short
    again, where a row goes on.
    """
    if block.required or "status" not in known:
        return False
    if known["status"] != _STOPPED:
        return True
    return block.seconds < math.inf and known["seconds"] >= _MOST * budget


def _run_block(
    block: Block,
    workdir: pathlib.Path,
    seconds: float,
    grace: float,
    should_stop: Callable[[], bool],
) -> dict[str, Any]:
    """Runs the commands of a block; returns its outcome, ready for JSON."""
    started = time.monotonic()
    waves = [block.commands] if block.at_once else [(one,) for one in block.commands]
    codes: list[int | None] = []
    messages: list[str] = []
    for wave in waves:
        logs = [
            workdir / "logs" / block.name / f"{len(codes) + i}.log"
            for i in range(len(wave))
        ]
        deadline = started + seconds
        codes += _wait(
            [_start(one, log) for one, log in zip(wave, logs, strict=True)],
            lambda deadline=deadline: time.monotonic() > deadline or should_stop(),
            grace,
        )
        messages += [_last_line(log) for log in logs]
        if None in codes:
            break
    good = [
        code == (-signal.SIGKILL if one.killed else 0)
        for code, one in zip(codes, block.commands, strict=False)
    ]
    if None in codes:
        is_cut = seconds < block.seconds or should_stop()
        status = _STOPPED if is_cut else "out of time"
    else:
        status = DONE if all(good) else "failed"
    took = round(time.monotonic() - started, 1)
    bad = [text for text, is_good in zip(messages, good, strict=True) if not is_good]
    if None in codes:
        place = f"command {codes.index(None) + 1} of {len(block.commands)}"
        bad.insert(0, ": ".join(filter(None, (f"{place} ended at {took:.0f} s", *bad))))
    return {
        **dataclasses.asdict(block),
        "limit": round(seconds, 1),
        "seconds": took,
        "status": status,
        "codes": codes,
        "message": bad[0] if bad else "",
    }


def _start(command: Command, log: pathlib.Path) -> subprocess.Popen[bytes]:
    """Starts a command as the leader of a process group, its output in a file.

    In the same session: what ends that ends all.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as file:
        return subprocess.Popen(
            command.words,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            env={**os.environ, **dict(command.environment)},
            cwd=command.folder or None,
            process_group=0,
        )


def _wait(
    processes: Sequence[subprocess.Popen[bytes]],
    is_over: Callable[[], bool],
    grace: float,
) -> list[int | None]:
    """Returns the exit codes, None of those that were ended since it was over."""
    try:
        while any(one.poll() is None for one in processes) and not is_over():
            time.sleep(_PAUSE)
        return [one.poll() for one in processes]
    finally:
        _end(processes, grace)


def _end(processes: Sequence[subprocess.Popen[bytes]], grace: float) -> None:
    """Ends what is left of the process groups: SIGTERM, after a while SIGKILL."""
    for one in processes:
        if one.poll() is None:
            os.killpg(one.pid, signal.SIGTERM)
    until = time.monotonic() + grace
    for one in processes:
        with contextlib.suppress(subprocess.TimeoutExpired):
            one.wait(max(0.0, until - time.monotonic()))
        with contextlib.suppress(ProcessLookupError):  # children, too
            os.killpg(one.pid, signal.SIGKILL)
        one.wait()


def _last_line(log: pathlib.Path) -> str:
    lines = log.read_text(errors="replace").strip().splitlines()
    return lines[-1][-400:] if lines else ""
