"""Runs blocks one after another, none longer than it may, and remembers what is done.

A block that fails or takes too long leaves the others as they are. Ended at any moment,
the next start skips what was finished and takes up the rest again.
"""

import contextlib
import dataclasses
import os
import pathlib
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from typing import Any

from samrobust.studies.campaign.blocks import Block, Command
from samrobust.system.files import glance, write_json

__all__ = ["DONE", "run"]

DONE = "done"
_GRACE = 15.0  # seconds between SIGTERM, at which a run saves its state, and SIGKILL
_LEAST = 20.0  # seconds without which no block begins
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
      workdir: receives `blocks/NAME.json`, the outcome of each, and `logs/`.
      budget: seconds for all of them, the last SIGKILL included.
      after: called after each block.
      should_stop: asked all the while.
      grace: seconds that a process has to end after SIGTERM.
      least: seconds without which no block begins.

    Returns:
      What became of each block that was reached: `done`, `failed`, `out of time` or
      `stopped`.
    """
    end = time.monotonic() + budget
    found: dict[str, str] = {}
    for block in blocks:
        path = workdir / "blocks" / f"{block.name}.json"
        if glance(path).get("status") == DONE:
            found[block.name] = DONE
            continue
        left = end - time.monotonic() - grace
        if left < least or should_stop():
            break
        outcome = _run_block(
            block, workdir, min(block.seconds, left), grace, should_stop
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, outcome)
        found[block.name] = outcome["status"]
        after()
    return found


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
            workdir / "logs" / f"{block.name}-{len(codes) + i}.log"
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
        status = "stopped" if should_stop() else "out of time"
    else:
        status = DONE if all(good) else "failed"
    bad = [text for text, is_good in zip(messages, good, strict=True) if not is_good]
    return {
        **dataclasses.asdict(block),
        "seconds": round(time.monotonic() - started, 1),
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
