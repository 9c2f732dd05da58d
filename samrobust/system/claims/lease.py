"""Claims of a directory: taken, kept fresh, lost, released."""

import contextlib
import json
import os
import pathlib
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from typing import TypeAlias

from samrobust.checks import check
from samrobust.system import storage
from samrobust.system.claims.holder import (
    LEASE,
    LONGEST_LEASE,
    Holder,
    generations,
    is_lease,
    latest,
    myself,
    read_holder,
)
from samrobust.system.files import WorkdirError

__all__ = [
    "Claim",
    "ClaimedError",
    "await_verdict",
    "claim",
    "claim_in_turn",
    "lease_seconds",
]

_REFRESHES = 12  # in a lease
_KEPT = 16  # generations before the current one
_TURN = 0.2  # seconds


class ClaimedError(WorkdirError):
    """Another process works in the directory."""


def lost(folder: pathlib.Path) -> ClaimedError:
    """Returns the error over a directory that is not there any more."""
    return ClaimedError(f"Lost {folder}: the directory was removed or moved.")


class Claim:
    """A claim that this process holds; a thread keeps it fresh until it is released."""

    def __init__(self, workdir: pathlib.Path, generation: int, token: str):
        self._workdir, self._generation, self._token = workdir, generation, token
        self._path = workdir / ".claim" / f"{generation}.json"
        self._lease = lease_seconds()
        self._refreshed = time.monotonic()
        self._lost, self._released = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._keep, daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Refuses to go on if another process took over; cheap, to be called often.

        Raises:
          ClaimedError: if so, before anything is written; this process was stalled
            for longer than its lease.
        """
        if time.monotonic() - self._refreshed > self._lease / 2:
            self._refresh()  # after a stall we may wake before the thread does
        if self._lost.is_set():
            raise self._loss()

    def confirm(self) -> None:
        """Does as `check`, and looks; before anything is written."""
        if not isinstance(self._path, storage.ObjectPath):  # where nothing is moved
            self._refresh()
        self.check()

    def guard(self, should_stop: Callable[[], bool]) -> Callable[[], bool]:
        """Returns the same question, which raises `ClaimedError` after a loss."""

        def ask() -> bool:
            self.check()
            return should_stop()

        return ask

    def _loss(self) -> ClaimedError:
        holder = read_holder(self._workdir)
        if holder is None:
            return lost(self._workdir)
        with contextlib.suppress(OSError):
            if self._is_there():
                return ClaimedError(
                    f"Another process ({holder}) took over {self._workdir}: this one "
                    f"gave no sign of life for longer than {self._lease:g} s. Let that "
                    "one go on."
                )
        return ClaimedError(
            f"Lost {self._workdir}: the directory was removed or moved, and another "
            f"process ({holder}) began one of that name."
        )

    def release(self) -> None:
        """Frees the directory, unless it was lost."""
        self._released.set()
        self._thread.join()
        with contextlib.suppress(OSError):
            if self._is_ours():
                try:
                    content = _content(self._token, released=True)
                    storage.replace(self._path, content, durable=False)
                except OSError:
                    if isinstance(self._path, storage.ObjectPath):
                        raise
                    os.utime(self._path, (0, 0))  # a full disk: that needs no space

    def _is_ours(self) -> bool:
        """Tells whether the newest claim is this one; in a new directory it is not."""
        is_newest = latest(self._path.parent) == self._generation
        return is_newest and self._is_there()

    def _is_there(self) -> bool:
        return self._token.encode() in self._path.read_bytes()

    def _keep(self) -> None:
        while not self._released.wait(self._lease / _REFRESHES):
            self._refresh()

    def _refresh(self) -> None:
        try:
            if self._is_ours():
                storage.touch(self._path)
                self._refreshed = time.monotonic()
            else:
                self._lost.set()
        except FileNotFoundError:
            self._lost.set()
        except OSError:  # the file server is away; the next refresh tries again
            pass


@contextlib.contextmanager
def claim(workdir: pathlib.Path) -> Iterator[Claim]:
    """Makes the directory and holds it for this process; freed on exit, even by a kill.

    Files that a killed process left half written an hour ago are removed.

    Raises:
      ClaimedError: if another process holds it; names it.
      WorkdirError: if it cannot be written, or lies on a mount of an object store,
        where what one process creates others do not see at once.
    """
    try:
        (workdir / ".claim").mkdir(parents=True, exist_ok=True)
        generation, token = _acquire(workdir)
    except OSError as error:
        wanted, why = "a writable directory", f": {error}"
        if mount := storage.fuse_mount(workdir):
            wanted = "a directory with hard links, which claims are made of"
            why = f" on {mount}. Give the bucket itself, --workdir=gs://... or s3://..."
            why += ", or a disk"
        message = f"Expected {wanted}, got workdir={str(workdir)!r}{why}."
        raise WorkdirError(message) from error
    held = Claim(workdir, generation, token)
    try:
        yield held
    finally:
        held.release()


@contextlib.contextmanager
def claim_in_turn(workdir: pathlib.Path) -> Iterator[Claim]:
    """Does as `claim`, and waits for whoever holds the directory; for short work."""
    with contextlib.ExitStack() as held:
        while True:
            try:
                mine = held.enter_context(claim(workdir))
                break
            except ClaimedError:
                time.sleep(_TURN)
        yield mine


# A reason to wait, and the seconds until the next look.
Pending: TypeAlias = tuple[str, float]


def await_verdict(
    workdir: pathlib.Path,
    *,
    should_stop: Callable[[], bool],
    on_wait: Callable[[str], None],
    agree: Callable[[Callable[[], Pending | None]], Pending | None] = lambda look: (
        look()
    ),
) -> None:
    """Waits until it is certain whether a holder on another machine is alive.

    A job that was killed and restarts elsewhere finds a claim that looks alive, and
    must wait until its lease expires. Returns as soon as the holder gives a sign of
    life, is over, or there is none; the next `claim` tells which.

    Args:
      workdir: may not exist.
      should_stop: called about once a second; ends the waiting.
      on_wait: called once, with what is waited for.
      agree: calls a look on behalf of several processes that wait together.
    """
    first: Holder | None = None

    def look() -> Pending | None:
        nonlocal first
        holder = read_holder(workdir)
        first = first or holder
        if holder is None or holder.is_here or holder != first:
            return None
        try:
            with _contender(workdir, "") as contender:
                if _is_over(workdir, holder, storage.touch(contender)):
                    return None
        except OSError:  # read-only: `claim` will say so
            return None
        reason = (
            f"{workdir} was claimed by another process ({holder}). Waiting up to "
            f"{holder.lease:g} s for a sign of life."
        )
        return reason, min(1.0, holder.lease / _REFRESHES)

    told = False
    while (pending := agree(look)) is not None:
        reason, pause = pending
        if not told:
            on_wait(reason)
            told = True
        if should_stop():
            return
        time.sleep(pause)


def _acquire(workdir: pathlib.Path) -> tuple[int, str]:
    """Becomes the holder; returns the generation and its token."""
    token = uuid.uuid4().hex
    with _contender(workdir, token) as contender:
        while True:
            now = storage.touch(contender)
            holder = read_holder(workdir)
            if holder is not None and holder.token == token:
                _prune(contender.parent, holder.generation)
                storage.remove_left_behind(contender.parent, now)
                storage.remove_left_behind(workdir, now)
                return holder.generation, token
            if holder is not None and not _is_over(workdir, holder, now):
                raise ClaimedError(
                    f"Another process ({holder}) is working in {workdir}. Wait for "
                    "it, or choose another --workdir."
                )
            # Then look again: a pruned number can be made again, but only the highest
            # one counts, and NFS may report that a link failed although it was made.
            generation = 1 if holder is None else holder.generation + 1
            _create(contender, contender.with_name(f"{generation}.json"))


_watched: dict[pathlib.Path, tuple[Holder, float]] = {}


def _is_over(workdir: pathlib.Path, holder: Holder, now: float) -> bool:
    """Tells whether a holder is done, or has been silent for its lease.

    By the file server's clock, `now`; but whatever time a claim bears, nobody waits
    longer than its lease by the clock of this process.
    """
    seen, since = _watched.get(workdir, (None, 0.0))
    if seen != holder:
        since = time.monotonic()
        _watched[workdir] = holder, since
    return holder.is_over(now) or time.monotonic() - since > holder.lease


@contextlib.contextmanager
def _contender(workdir: pathlib.Path, token: str) -> Iterator[pathlib.Path]:
    """Yields a complete file in `.claim`, which can be linked as a generation."""
    path = workdir / ".claim" / f".{uuid.uuid4().hex}.tmp"
    try:
        storage.replace(path, _content(token), durable=False)
        yield path
    finally:
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)


def _create(contender: pathlib.Path, path: pathlib.Path) -> None:
    """Gives the file a second name, unless that is taken."""
    try:
        storage.link(contender, path)
    except FileExistsError:
        pass
    except OSError:
        if isinstance(path, storage.ObjectPath) or storage.fuse_mount(path):
            raise
        # No hard links on this disk: exclusive creation is as good.
        with contextlib.suppress(FileExistsError), path.open("xb") as file:
            file.write(contender.read_bytes())


def _prune(folder: pathlib.Path, generation: int) -> None:
    """Removes long-superseded generations."""
    for number in generations(folder):
        if number < generation - _KEPT:
            (folder / f"{number}.json").unlink(missing_ok=True)


def _content(token: str, *, released: bool = False) -> bytes:
    lease = {"lease": lease_seconds(), "released": released}
    return (json.dumps({"token": token, **myself(), **lease}) + "\n").encode()


def lease_seconds() -> float:
    """Returns the lease of this process's claims, `SAMROBUST_CLAIM_LEASE`.

    Raises:
      ValueError: if that is not a number of seconds, or more than an hour.
    """
    text = os.environ.get("SAMROBUST_CLAIM_LEASE", "") or str(LEASE)
    try:
        lease = float(text)
    except ValueError:
        lease = 0.0
    check(
        is_lease(lease),
        f"a number of seconds > 0, at most {LONGEST_LEASE:g}",
        f"The lease of a claim; {LEASE:g} by default.",
        SAMROBUST_CLAIM_LEASE=text,
    )
    return lease
