"""Claims: one process at a time, among many, over several machines, after any death."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from samrobust.system import storage
from samrobust.system.claims import lease
from samrobust.system.claims.holder import Holder, myself, read_holder
from samrobust.system.claims.lease import ClaimedError, await_verdict, claim
from samrobust.system.files import WorkdirError

ROOT = Path(__file__).resolve().parent.parent


# Each holds what it wins until its input ends; JAX must not be needed for any of it.
CONTEND = """
import contextlib, json, pathlib, sys
from samrobust.system.claims.lease import ClaimedError, claim
won = []
with contextlib.ExitStack() as stack:
    print("ready", flush=True)
    sys.stdin.readline()
    for folder in sys.argv[1:]:
        with contextlib.suppress(ClaimedError):
            stack.enter_context(claim(pathlib.Path(folder)))
            won.append(folder)
    print(json.dumps([won, "jax" in sys.modules]), flush=True)
    sys.stdin.readline()
"""

# Comes and goes; while inside it would meet whoever else is.
COME_AND_GO = """
import pathlib, sys, time
from samrobust.system.claims.lease import ClaimedError, claim
workdir, entered = pathlib.Path(sys.argv[1]), 0
while entered < 15:
    try:
        with claim(workdir):
            with (workdir / "inside").open("x"):
                time.sleep(0.002)
            (workdir / "inside").unlink()
            entered += 1
    except ClaimedError:
        time.sleep(0.001)
print(entered)
"""

# Asks whether it still has the claim whenever it is told to.
HOLD = """
import pathlib, sys
from samrobust.system.claims.lease import ClaimedError, claim
with claim(pathlib.Path(sys.argv[1])) as held:
    print("held", flush=True)
    for line in sys.stdin:
        try:
            held.check()
            print("mine", flush=True)
        except ClaimedError as error:
            print(error, flush=True)
"""


class Process(subprocess.Popen):
    """A Python process with a script; lines in, lines out."""

    def __init__(self, script: str, *arguments: object, lease: float = 120.0):
        super().__init__(
            [sys.executable, "-c", script, *map(str, arguments)],
            env={**os.environ, "SAMROBUST_CLAIM_LEASE": str(lease)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )

    def say(self) -> None:
        assert self.stdin is not None
        self.stdin.write("\n")
        self.stdin.flush()

    def hear(self) -> str:
        assert self.stdout is not None
        return self.stdout.readline().strip()


@pytest.fixture
def start():
    """Starts processes; none outlives the test."""
    with contextlib.ExitStack() as stack:

        def start(*arguments, **options) -> Process:
            process = stack.enter_context(Process(*arguments, **options))
            stack.callback(process.kill)
            return process

        yield start


def contend(start, folders: list[Path], count: int) -> list[list[str]]:
    """What each of many processes that begin together won."""
    processes = [start(CONTEND, *folders) for _ in range(count)]
    for process in processes:
        assert process.hear() == "ready"
    for process in processes:
        process.say()
    answers = [json.loads(process.hear()) for process in processes]
    assert not any(with_jax for _, with_jax in answers)
    return [won for won, _ in answers]


def write_claim(workdir: Path, generation: int, *, age: float = 0.0, **content) -> Path:
    """A claim as a process of another machine leaves it."""
    path = workdir / ".claim" / f"{generation}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    foreign = {"token": "x", "host": "elsewhere", "machine": "elsewhere 1 2", "pid": 7}
    path.write_text(json.dumps({**foreign, "started": "1", "lease": 1.0, **content}))
    make_older(path, age)
    return path


def make_older(path: Path, seconds: float) -> None:
    then = time.time() - seconds
    os.utime(path, (then, then))


def numbers(workdir: Path) -> list[int]:
    return sorted(int(path.stem) for path in (workdir / ".claim").glob("[0-9]*.json"))


class Clock:
    """A clock that only sleep moves on, and something that happens meanwhile."""

    def __init__(self):
        self.now = 0.0
        self.then: Callable[[], object] = lambda: None

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        self.then()


@pytest.fixture
def clock(monkeypatch) -> Clock:
    """The clock of this process's claims."""
    clock = Clock()
    monkeypatch.setattr(lease, "time", clock)
    return clock


# Races.


@pytest.mark.parametrize("stale", [False, True], ids=["fresh", "stale"])
def test_of_many_contenders_exactly_one_wins(tmp_path, start, stale):
    folders = [tmp_path / str(i) for i in range(40)]
    if stale:
        for folder in folders:
            write_claim(folder, 1, age=10.0)
    won = [folder for each in contend(start, folders, 8) for folder in each]
    assert sorted(won) == sorted(map(str, folders))
    assert all(numbers(folder) == [1, 2][: 1 + stale] for folder in folders)


def test_two_are_never_inside_at_once(tmp_path, start):
    processes = [start(COME_AND_GO, tmp_path) for _ in range(4)]
    entered = [process.hear() for process in processes]
    assert entered == ["15"] * 4, "one met another inside"
    assert len(numbers(tmp_path)) <= 18
    assert not list((tmp_path / ".claim").glob(".*"))


def test_a_killed_holder_has_exactly_one_successor_and_at_once(tmp_path, start):
    holder = start(HOLD, tmp_path)
    assert holder.hear() == "held"
    assert contend(start, [tmp_path], 2) == [[], []]
    holder.kill()
    holder.wait()
    assert sorted(contend(start, [tmp_path], 6)) == [*[[]] * 5, [str(tmp_path)]]


def test_a_killed_holder_that_nobody_has_buried_is_dead(tmp_path, start):
    holder = start(HOLD, tmp_path)
    assert holder.hear() == "held"
    os.kill(holder.pid, signal.SIGKILL)  # a zombie until it is waited for
    os.waitid(os.P_PID, holder.pid, os.WEXITED | os.WNOWAIT)
    with claim(tmp_path):
        pass


def test_a_holder_that_stood_still_too_long_finds_out(tmp_path, start):
    holder = start(HOLD, tmp_path, lease=0.5)
    assert holder.hear() == "held"
    os.kill(holder.pid, signal.SIGSTOP)
    os.waitid(os.P_PID, holder.pid, os.WSTOPPED | os.WNOWAIT)
    path = tmp_path / ".claim" / "1.json"
    make_older(path, -60.0)
    with pytest.raises(ClaimedError, match=rf"pid {holder.pid}\) is working"):
        claim(tmp_path).__enter__()
    make_older(path, 60.0)
    time.sleep(0.3)  # it asks again after half of its lease
    with claim(tmp_path) as held:
        os.kill(holder.pid, signal.SIGCONT)
        holder.say()
        answer = holder.hear()
        assert answer.startswith(f"Another process (host {os.uname().nodename}, pid")
        assert f"{os.getpid()}) took over {tmp_path}" in answer
        assert holder.stdin is not None
        holder.stdin.close()
        assert holder.wait() == 0
        # And does not mark as released what is not its own.
        old = json.loads((tmp_path / ".claim" / "1.json").read_text())
        assert not old["released"]
        held.check()
        with pytest.raises(ClaimedError):
            claim(tmp_path).__enter__()


def test_a_holder_awake_before_its_thread_is_finds_out_too(
    tmp_path, monkeypatch, clock
):
    monkeypatch.setenv("SAMROBUST_CLAIM_LEASE", "10")
    monkeypatch.setattr(lease, "_REFRESHES", 0.01)
    with claim(tmp_path) as held:
        held.check()
        write_claim(tmp_path, 2)
        held.check()  # it was fresh a moment ago
        clock.sleep(6.0)
        with pytest.raises(ClaimedError, match="host elsewhere, pid 7"):
            held.check()


def test_a_holder_that_lives_is_never_succeeded(tmp_path, start):
    often = "from samrobust.system.claims import lease\nlease._REFRESHES = 600\n"
    holder = start(often + HOLD, tmp_path, lease=60.0)
    assert holder.hear() == "held"
    path = tmp_path / ".claim" / "1.json"
    for _ in range(3):
        make_older(path, 100.0)
        while time.time() - path.stat().st_mtime > 60.0:  # until it is refreshed
            time.sleep(0.01)
        with pytest.raises(ClaimedError):
            claim(tmp_path).__enter__()
    holder.say()
    assert holder.hear() == "mine"


# Judgement.


def test_a_claim_of_another_machine_is_free_after_its_lease(tmp_path):
    path = write_claim(tmp_path, 3, lease=60.0)
    message = r"Another process \(host elsewhere, pid 7\) is working in .* Wait for it"
    with pytest.raises(ClaimedError, match=message):
        claim(tmp_path).__enter__()
    make_older(path, 61.0)
    with claim(tmp_path):
        assert numbers(tmp_path) == [3, 4]


def test_a_released_claim_is_free_on_any_machine(tmp_path):
    write_claim(tmp_path, 1, released=True)
    with claim(tmp_path):
        pass
    holder = read_holder(tmp_path)
    assert holder is not None
    assert (holder.generation, holder.released) == (2, True)


def test_a_process_with_the_number_of_the_dead_one_is_not_taken_for_it(tmp_path, start):
    holder = start(HOLD, tmp_path)
    assert holder.hear() == "held"
    dead = json.loads((tmp_path / ".claim" / "1.json").read_text())
    for generation, pid in ((2, os.getpid()), (4, 10**30)):
        write_claim(tmp_path, generation, **{**dead, "pid": pid})
        with claim(tmp_path):
            pass


def test_a_process_that_proc_does_not_show_lives_if_it_takes_signals(
    tmp_path, monkeypatch
):
    """As another user's does where /proc is mounted with `hidepid`."""
    with claim(tmp_path):
        mine = json.loads((tmp_path / ".claim" / "1.json").read_text())
    write_claim(tmp_path, 2, **{**mine, "started": "1", "released": False})
    read_text = Path.read_text

    def read_hidden(path, *args, **kwargs):
        if path.match("/proc/*/stat"):
            raise FileNotFoundError(path)
        return read_text(path, *args, **kwargs)

    def refuse(*_):
        raise PermissionError

    monkeypatch.setattr(Path, "read_text", read_hidden)
    monkeypatch.setattr(os, "kill", refuse)
    with pytest.raises(ClaimedError):
        claim(tmp_path).__enter__()
    monkeypatch.undo()
    with claim(tmp_path):
        pass


def test_an_unseen_process_of_another_container_is_judged_by_its_lease(tmp_path):
    with claim(tmp_path):
        mine = json.loads((tmp_path / ".claim" / "1.json").read_text())
    names = mine["machine"].split()  # host, boot, namespace of processes
    for i in range(3):
        machine = " ".join([*names[:i], "another", *names[i + 1 :]])
        there = {**mine, "machine": machine, "pid": 2**22 + 1, "released": False}
        write_claim(tmp_path, 2 + i, **there)
        with pytest.raises(ClaimedError):
            claim(tmp_path).__enter__()
    assert len(names) == 3


def test_the_name_of_a_process_may_hold_anything():
    name = Path("/proc/self/comm")
    mine, usual = myself(), name.read_text()
    try:
        name.write_text("a) Z 1")
        assert myself() == mine
    finally:
        name.write_text(usual)


def test_without_proc_the_lease_alone_decides(tmp_path, monkeypatch):
    monkeypatch.setattr("samrobust.system.claims.holder._machine", lambda: "")
    write_claim(tmp_path, 1, machine="", pid=2**22 + 1, lease=60.0)
    with pytest.raises(ClaimedError):
        claim(tmp_path).__enter__()


def test_a_claim_cut_off_as_it_was_written_is_judged_by_its_age(tmp_path):
    path = write_claim(tmp_path, 1)
    path.write_text('{"tok')
    with pytest.raises(ClaimedError, match="host unknown"):
        claim(tmp_path).__enter__()
    make_older(path, 200.0)
    with claim(tmp_path):
        pass


def test_the_clock_of_this_machine_does_not_matter(tmp_path, monkeypatch):
    write_claim(tmp_path, 1, lease=100.0)
    for wrong in (0.0, 1e11):
        monkeypatch.setattr(time, "time", lambda wrong=wrong: wrong)
        with pytest.raises(ClaimedError):
            claim(tmp_path).__enter__()


# File systems.


def test_a_slow_contender_that_makes_a_pruned_number_withdraws(tmp_path, monkeypatch):
    write_claim(tmp_path, 40)
    outdated = [Holder(10, released=True)]

    def read(workdir):
        return outdated.pop() if outdated else read_holder(workdir)

    monkeypatch.setattr(lease, "read_holder", read)
    with pytest.raises(ClaimedError, match="elsewhere"):
        claim(tmp_path).__enter__()
    assert numbers(tmp_path) == [11, 40]
    os.utime(tmp_path / ".claim" / "40.json", (0, 0))
    with claim(tmp_path):
        assert numbers(tmp_path) == [40, 41]


def test_without_hard_links_one_still_wins(tmp_path, monkeypatch):
    def link(*_):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", link)
    with claim(tmp_path) as held, pytest.raises(ClaimedError):
        claim(tmp_path).__enter__()
    del held
    with claim(tmp_path):
        assert numbers(tmp_path) == [1, 2]

    def link_too_late(_, path):
        if not path.exists():
            write_claim(tmp_path, 3, lease=60.0)
        link()

    monkeypatch.setattr(os, "link", link_too_late)
    with pytest.raises(ClaimedError):
        claim(tmp_path).__enter__()


def test_a_link_that_was_made_and_reported_as_failed_counts(tmp_path, monkeypatch):
    link = os.link

    def link_and_fail(*arguments):
        link(*arguments)
        raise FileExistsError(17, "File exists")

    monkeypatch.setattr(os, "link", link_and_fail)
    with claim(tmp_path):
        assert numbers(tmp_path) == [1]


def test_a_claim_is_released_on_a_full_disk_too(tmp_path, monkeypatch):
    def replace(*_):
        raise OSError(28, "No space left on device")

    with claim(tmp_path):
        monkeypatch.setattr(Path, "replace", replace)
    monkeypatch.undo()
    with claim(tmp_path):
        pass


def test_a_removed_workdir_is_lost(tmp_path, monkeypatch):
    monkeypatch.setenv("SAMROBUST_CLAIM_LEASE", "0.2")
    with claim(tmp_path / "run") as held:
        (tmp_path / "run").rename(tmp_path / "moved")
        time.sleep(0.2)
        with pytest.raises(ClaimedError, match="was removed or moved"):
            held.check()


def test_a_file_that_is_gone_is_lost_and_one_on_a_server_that_is_away_is_not(
    tmp_path, monkeypatch
):
    def read_bytes(_):
        raise error

    with claim(tmp_path) as held, monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", read_bytes)
        error = ConnectionError()
        held.confirm()
        error = FileNotFoundError()
        with pytest.raises(ClaimedError):
            held.confirm()


def test_another_workdir_of_the_same_name_is_not_taken_for_its_own(
    tmp_path, monkeypatch
):
    monkeypatch.setenv("SAMROBUST_CLAIM_LEASE", "60")
    workdir = tmp_path / "run"
    with contextlib.ExitStack() as old, contextlib.ExitStack() as new:
        mine = old.enter_context(claim(workdir))
        workdir.rename(tmp_path / "moved")
        other = new.enter_context(claim(workdir))
        with pytest.raises(ClaimedError, match="moved, and another process"):
            mine.confirm()
        old.close()
        other.confirm()  # and the old one has not released it
        with pytest.raises(ClaimedError, match="is working in"), claim(workdir):
            pass


def test_files_left_by_a_kill_are_removed_by_the_holder_alone(tmp_path):
    left, new = (storage.temporary_beside(tmp_path / "config.json") for _ in "ab")
    contender = storage.temporary_beside(tmp_path / ".claim" / "1.json")
    others = tmp_path / ".editor.tmp"
    others.touch()
    os.utime(others, (0, 0))
    with claim(tmp_path):
        new.touch()
        for path in (left, contender):
            path.touch()
            os.utime(path, (0, 0))
        with pytest.raises(ClaimedError):
            claim(tmp_path).__enter__()
        assert left.exists()
    with claim(tmp_path):
        assert not left.exists()
        assert not contender.exists()
        assert new.exists()  # another process may be about to rename it
        assert others.exists()


def test_a_claimed_workdir_is_refused_until_it_is_free(tmp_path):
    workdir = tmp_path / "a" / "b"
    with (
        claim(workdir),
        pytest.raises(ClaimedError, match=r"Another process .* in .*a/b\."),
        claim(workdir),
    ):
        pass
    with claim(workdir):
        pass


def test_a_claim_ends_with_an_error(tmp_path):
    with pytest.raises(KeyError), claim(tmp_path):
        raise KeyError
    with claim(tmp_path):
        pass


def test_a_file_in_place_of_the_workdir_is_refused(tmp_path):
    path = tmp_path / "file"
    path.touch()
    assert read_holder(path) is None
    message = "Expected a writable directory, got workdir=.*file"
    with pytest.raises(WorkdirError, match=message), claim(path):
        pass


@pytest.mark.parametrize("lease", ["soon", "0", "-1", "nan", "inf", "1e9"])
def test_a_lease_must_be_seconds(tmp_path, monkeypatch, lease):
    monkeypatch.setenv("SAMROBUST_CLAIM_LEASE", lease)
    message = f"seconds > 0, at most 3600, got SAMROBUST_CLAIM_LEASE='{lease}'"
    with pytest.raises(ValueError, match=message):
        claim(tmp_path).__enter__()
    monkeypatch.setenv("SAMROBUST_CLAIM_LEASE", "")  # as if there were none
    with claim(tmp_path):
        pass


# A job that was killed and starts again elsewhere.


def wait(workdir: Path, stop: Callable[[], bool] = lambda: False) -> list[str]:
    """What was said until the verdict."""
    said: list[str] = []
    await_verdict(workdir, should_stop=stop, on_wait=said.append)
    return said


def test_nothing_is_awaited_where_the_case_is_clear(tmp_path, monkeypatch):
    assert wait(tmp_path / "absent") == []
    write_claim(tmp_path / "old", 1, age=10.0)
    assert wait(tmp_path / "old") == []
    with claim(tmp_path / "mine"):
        assert wait(tmp_path / "mine") == []

    def refuse(*_, **__):
        raise PermissionError

    write_claim(tmp_path / "read-only", 1, lease=60.0)
    monkeypatch.setattr(storage, "replace", refuse)
    assert wait(tmp_path / "read-only", stop=lambda: True) == []


def test_a_silent_holder_elsewhere_is_awaited_until_its_lease_is_over(
    tmp_path, clock, monkeypatch
):
    path = write_claim(tmp_path, 1, lease=30.0)
    os.utime(path, (1000, 1000))
    monkeypatch.setattr(storage, "touch", lambda _: 1010 + clock.now)
    (text,) = wait(tmp_path)
    assert clock.now == 21.0
    assert "claimed by another process (host elsewhere, pid 7)" in text
    with claim(tmp_path):
        pass


def test_a_claim_from_the_future_is_awaited_for_its_lease_by_our_own_clock(
    tmp_path, clock
):
    write_claim(tmp_path, 1, lease=30.0, age=-1e6)
    with pytest.raises(ClaimedError):  # at first sight it may be alive
        claim(tmp_path).__enter__()
    assert len(wait(tmp_path)) == 1
    assert clock.now == 31.0
    with claim(tmp_path):
        pass


def test_a_claim_from_the_future_that_is_refreshed_is_alive(tmp_path, clock):
    path = write_claim(tmp_path, 1, lease=0.3, age=-1e6)
    for number in range(4):
        make_older(path, -1e6 - number)
        with pytest.raises(ClaimedError):
            claim(tmp_path).__enter__()
        clock.sleep(0.2)


@pytest.mark.parametrize(
    "content",
    [
        *({"lease": x} for x in (float("inf"), float("nan"), -1.0, 0, 1e300, "9", [])),
        *({n: {}} for n in ("token", "host", "machine", "pid", "started", "released")),
        {"pid": True, "refreshed": 1e300, "other": None},
    ],
    ids=repr,
)
def test_what_no_claim_would_say_of_its_holder_counts_as_unknown(tmp_path, content):
    write_claim(tmp_path, 1, age=100.0, **{"lease": 60.0, **content})
    holder = read_holder(tmp_path)
    assert holder is not None
    default = Holder(1)
    name = next(iter(content))
    assert getattr(holder, name) == getattr(default, name)
    assert (holder.generation, holder.refreshed < time.time()) == (1, True)
    make_older(tmp_path / ".claim" / "1.json", 200.0)
    with claim(tmp_path):
        pass


def test_a_claim_that_is_pruned_as_it_is_read_is_looked_for_again(
    tmp_path, monkeypatch
):
    path = write_claim(tmp_path, 1)

    def too_late(_):
        monkeypatch.undo()
        write_claim(tmp_path, 2)
        path.unlink()
        return storage.modified(path)

    monkeypatch.setattr("samrobust.system.claims.holder.modified", too_late)
    holder = read_holder(tmp_path)
    assert holder is not None
    assert holder.generation == 2


def test_names_that_no_claim_has_are_no_claims(tmp_path):
    folder = tmp_path / ".claim"
    folder.mkdir()
    for name in ("007", "²", "0", "-1", "1e3"):
        (folder / f"{name}.json").write_text("{}")
    assert read_holder(tmp_path) is None
    (folder / "3.json").symlink_to("nowhere")
    with claim(tmp_path):
        assert (folder / "4.json").exists()


def test_a_sign_of_life_ends_the_waiting(tmp_path, clock):
    path = write_claim(tmp_path, 1, lease=60.0, age=30.0)
    clock.then = lambda: os.utime(path)
    assert len(wait(tmp_path)) == 1
    assert clock.now == 1.0
    with pytest.raises(ClaimedError):
        claim(tmp_path).__enter__()


def test_a_stop_ends_the_waiting(tmp_path, clock):
    write_claim(tmp_path, 1, lease=60.0)
    assert len(wait(tmp_path, lambda: True)) == 1
    assert clock.now == 0.0
