"""Runs of the real command for the tests of the launchers, and what they must equal.

A few epochs of a tiny network, in two processes of one CPU device each.
Which machines they are on, and how often they were stopped, must not change a bit.
"""

import functools
import json
import os
import pathlib
import socket
import sys
import time

import helpers

__all__ = [
    "DISTRIBUTED",
    "assert_same_run",
    "environment",
    "expected",
    "free_port",
    "train",
    "wait_for_checkpoint",
    "write_command",
]

_SIZES = {
    "data.train_size": 256,
    "training.batch_size": 16,
    "evaluation.linf": (),
}
# A peer that dies is noticed soon.
DISTRIBUTED = {"SAMROBUST_HEARTBEAT_SECONDS": "10"}


def train(
    workdir: pathlib.Path | str, *, epochs: int = 2, checkpoint_minutes: float = 1e-3
) -> list[str]:
    """The arguments of the run; by default it saves whenever 60 ms have passed."""
    config = f"--config={helpers.ROOT}/configs/digits.py:st"
    own = {"training.epochs": epochs, "checkpoint.minutes": checkpoint_minutes}
    overrides = {**_SIZES, **own}
    return ["train", config, f"--workdir={workdir}", *helpers.make_flags(overrides)]


def environment() -> dict[str, str]:
    """What all processes share: one device each, and compiled programs."""
    compilation = ("XLA_FLAGS", "JAX_DISABLE_MOST_OPTIMIZATIONS")
    return {
        **DISTRIBUTED,
        **{name: os.environ[name] for name in compilation},
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": os.environ["JAX_COMPILATION_CACHE_DIR"],
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
    }


def write_command(folder: pathlib.Path) -> pathlib.Path:
    """A folder for PATH with a `samrobust` that is this tree's."""
    helpers.make_folder(folder)
    script = folder / "samrobust"
    command = f'{sys.executable} -m samrobust.cli "$@"'
    paths = f"{helpers.ROOT}:{helpers.ROOT}/tests/stand_ins"
    script.write_text(f"#!/bin/sh\nPYTHONPATH={paths} exec {command}\n")
    script.chmod(0o755)
    return folder


@functools.cache
def expected(epochs: int) -> pathlib.Path:
    """The workdir of the run in a single process of two devices, never disturbed."""
    folder = helpers.lasting_folder()
    code, _, errors = helpers.run_command(
        *train(folder, epochs=epochs, checkpoint_minutes=10),
        **environment(),
        JAX_NUM_CPU_DEVICES="2",
    )
    assert code == 0, errors
    return folder


def assert_same_run(workdir: pathlib.Path) -> None:
    """The last checkpoint, the log and the accuracies are those expected."""
    config = json.loads((workdir / "config.json").read_text())
    whole = expected(config["training"]["epochs"])
    helpers.assert_same_bits(
        helpers.read_checkpoint(workdir), helpers.read_checkpoint(whole)
    )
    logs = [helpers.read_lines(path / "metrics.jsonl") for path in (workdir, whole)]
    own, other = ([helpers.without_timings(line) for line in log] for log in logs)
    assert own == other
    own, other = (
        json.loads((path / "result.json").read_text()) for path in (workdir, whole)
    )
    assert own["accuracy"] == other["accuracy"]


def free_port() -> int:
    """A port of loopback that nobody uses now."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def wait_for_checkpoint(
    workdir: pathlib.Path, *, after: int = 0, seconds: float = 300
) -> int:
    """Waits for a checkpoint of a later step than `after`; gives its step."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        steps = helpers.checkpoint_steps(workdir)
        if steps and steps[-1] > after:
            return steps[-1]
        time.sleep(0.02)
    message = f"no checkpoint in {workdir} within {seconds} s"
    raise TimeoutError(message)
