"""A `gcloud` without a cloud: TPU VMs are folders, a bucket is a folder.

It writes down every call, refuses flags that the real one does not know, and runs what
is sent over ssh here, with the worker's folder as home. `$GCLOUD_STAND_IN` is where it
keeps all of that:

    calls.jsonl     the arguments of every call
    bucket/         what is in gs://bucket
    vm/0, vm/1      the homes of the two workers
    state           of the VM; no file, no VM
    refuse_create   how many creations fail from now on
    refusal         why; without it for want of capacity
"""

import contextlib
import fcntl
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

__all__ = ["main", "preempt", "stop_processes"]

NUM_WORKERS = 2
_ZONE = {"--zone", "--quiet"}
_FLAGS = {
    "compute tpus tpu-vm create": {
        *(_ZONE | {"--accelerator-type", "--version", "--spot", "--network"})
    },
    "compute tpus tpu-vm describe": {*_ZONE, "--format"},
    "compute tpus tpu-vm delete": _ZONE,
    "compute tpus tpu-vm ssh": {*_ZONE, "--worker", "--command", "--internal-ip"},
    "compute tpus tpu-vm scp": {*_ZONE, "--worker", "--recurse", "--internal-ip"},
    "compute tpus queued-resources create": {
        *(_ZONE | {"--accelerator-type", "--runtime-version", "--node-id", "--spot"})
    },
    "compute tpus queued-resources describe": {*_ZONE, "--format"},
    "compute tpus queued-resources delete": {*_ZONE, "--force"},
    "storage cp": {"--quiet"},
    "storage cat": set(),
    "storage rm": {"--quiet"},
    "storage rsync": {"--recursive"},
}


def main(arguments: list[str], folder: pathlib.Path) -> int:
    """Does what a call asks for; returns the exit code."""
    with (folder / "calls.jsonl").open("a") as file:
        file.write(json.dumps(arguments) + "\n")
    words = [word for word in arguments if not word.startswith("--")]
    flags = {}
    for word in set(arguments) - set(words):
        name, _, value = word.partition("=")
        flags[name] = value
    for verb, known in _FLAGS.items():
        if words[: verb.count(" ") + 1] == verb.split():
            rest = words[verb.count(" ") + 1 :]
            if flags.keys() - known:
                return _fail(f"unrecognized arguments: {flags.keys() - known}")
            handler = _HANDLERS[verb.split()[-1]]
            return handler(folder, rest, flags)
    return _fail(f"Invalid choice: {words}")


def preempt(folder: pathlib.Path) -> None:
    """Takes the VM away with all that is on it, before anybody is told."""
    with _locked(folder):
        (folder / "state").write_text("PREEMPTED")
        stop_processes(folder)
        shutil.rmtree(folder / "vm")


def stop_processes(folder: pathlib.Path) -> None:
    """Kills what runs on the VM, and waits until it is gone."""
    while running := list(_processes(folder)):
        for number in running:
            with contextlib.suppress(ProcessLookupError):
                os.kill(number, signal.SIGKILL)
        time.sleep(0.01)


def _processes(folder: pathlib.Path) -> Iterator[int]:
    mark = f"SAMROBUST_VM={folder}".encode()
    for process in pathlib.Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            # A zombie's is empty.
            # A VM may end itself: by a process of its own, which is this one.
            if process.name != str(os.getpid()) and mark in (
                process / "environ"
            ).read_bytes().split(b"\0"):
                yield int(process.name)


@contextlib.contextmanager
def _locked(folder: pathlib.Path) -> Iterator[None]:
    with (folder / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _create(folder: pathlib.Path, words: list[str], flags: dict[str, str]) -> int:
    del words, flags
    refusals = folder / "refuse_create"
    if (folder / "state").exists():
        return _fail("ALREADY_EXISTS")
    if refusals.exists() and (left := int(refusals.read_text())):
        refusals.write_text(str(left - 1))
        refusal = folder / "refusal"
        known = refusal.read_text() if refusal.exists() else "There is no more capacity"
        return _fail(known)
    for worker in range(NUM_WORKERS):
        (folder / "vm" / str(worker)).mkdir(parents=True)
    (folder / "state").write_text("READY")
    return 0


def _describe(folder: pathlib.Path, words: list[str], flags: dict[str, str]) -> int:
    del words, flags
    with _locked(folder):
        if not (folder / "state").exists():
            return _fail("NOT_FOUND")
        print((folder / "state").read_text())
    return 0


def _delete(folder: pathlib.Path, words: list[str], flags: dict[str, str]) -> int:
    del words, flags
    with _locked(folder):
        if not (folder / "state").exists():
            return _fail("NOT_FOUND")
        stop_processes(folder)
        shutil.rmtree(folder / "vm", ignore_errors=True)  # a preempted one has none
        (folder / "state").unlink()
    return 0


def _homes(folder: pathlib.Path, worker: str) -> list[pathlib.Path]:
    numbers = range(NUM_WORKERS) if worker == "all" else [int(worker)]
    return [folder / "vm" / str(number) for number in numbers]


def _ssh(folder: pathlib.Path, words: list[str], flags: dict[str, str]) -> int:
    del words
    if (folder / "state").read_text() != "READY":
        return _fail("connection refused")
    started = [
        subprocess.Popen(
            ["bash", "-c", flags["--command"]], env=_environment(folder, home), cwd=home
        )
        for home in _homes(folder, flags["--worker"])
    ]
    return max(process.wait() for process in started)


def _environment(folder: pathlib.Path, home: pathlib.Path) -> dict[str, str]:
    # On a TPU the workers find each other; here they are told.
    told = {
        "JAX_COORDINATOR_ADDRESS": os.environ.get("SAMROBUST_TEST_ADDRESS", ""),
        "JAX_NUM_PROCESSES": str(NUM_WORKERS),
        "JAX_PROCESS_ID": home.name,
        "HOSTNAME": f"sam-w-{home.name}",
    }
    return {**os.environ, **told, "HOME": str(home), "SAMROBUST_VM": str(folder)}


def _scp(folder: pathlib.Path, words: list[str], flags: dict[str, str]) -> int:
    source, target = words
    for home in _homes(folder, flags["--worker"]):
        shutil.copy(source, home / target.partition(":")[2])
    return 0


def _local(folder: pathlib.Path, path: str) -> pathlib.Path:
    return pathlib.Path(path.replace("gs://bucket", f"{folder}/bucket", 1))


def _cp(folder: pathlib.Path, words: list[str], flags: dict[str, str]) -> int:
    del flags
    source, target = words
    assert source == "-"
    path = _local(folder, target)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(sys.stdin.buffer.read())
    return 0


def _cat(folder: pathlib.Path, words: list[str], flags: dict[str, str]) -> int:
    del flags
    path = _local(folder, words[0])
    if not path.exists():
        return _fail("One or more URLs matched no objects.")
    print(path.read_text(), end="")
    return 0


def _rm(folder: pathlib.Path, words: list[str], flags: dict[str, str]) -> int:
    del flags
    path = _local(folder, words[0])
    if not path.exists():
        return _fail("One or more URLs matched no objects.")
    path.unlink()
    return 0


def _rsync(folder: pathlib.Path, words: list[str], flags: dict[str, str]) -> int:
    del flags
    source, target = (_local(folder, word) for word in words)
    if not source.is_dir():
        return _fail(f"did not match any objects: {source}")
    shutil.copytree(source, target, dirs_exist_ok=True)
    return 0


def _fail(message: str) -> int:
    print(f"ERROR: (gcloud) {message}", file=sys.stderr)
    return 1


_HANDLERS = {
    "create": _create,
    "describe": _describe,
    "delete": _delete,
    "ssh": _ssh,
    "scp": _scp,
    "cp": _cp,
    "cat": _cat,
    "rm": _rm,
    "rsync": _rsync,
}

if __name__ == "__main__":
    place = pathlib.Path(os.environ["GCLOUD_STAND_IN"])
    sys.exit(main(sys.argv[1:], place))
