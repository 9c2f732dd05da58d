"""launch/local.py: several processes on this machine, told and ended together."""

import glob
import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import helpers
import launch_runs
import pytest

LOCAL = helpers.ROOT / "launch" / "local.py"
one_device_each = runpy.run_path(str(LOCAL))["_one_device_each"]
NAMES = (
    "JAX_COORDINATOR_ADDRESS",
    "JAX_NUM_PROCESSES",
    "JAX_PROCESS_ID",
    "JAX_LOCAL_DEVICE_IDS",
    "JAX_NUM_CPU_DEVICES",
    "JAX_PLATFORMS",
    "CUDA_VISIBLE_DEVICES",
    "SAMROBUST_DISTRIBUTED",
    "XLA_PYTHON_CLIENT_MEM_FRACTION",
)
SHOW = f"""
import json, os, sys
own = {{name: os.environ[name] for name in {NAMES} if name in os.environ}}
name = own.get("JAX_PROCESS_ID", os.getpid())
open(f"{{sys.argv[1]}}/{{name}}", "w").write(json.dumps(own))
"""
# Notes its process id and every signal; stops half a second after the first SIGTERM.
LISTEN = """
import os, signal, sys, time
path = f"{sys.argv[1]}/{os.environ['JAX_PROCESS_ID']}"
def note(text):
    with open(path, "a") as file:
        file.write(f"{text}\\n")
def hear(number, frame):
    note(signal.Signals(number).name)
for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, hear)
note(os.getpid())
while "SIGTERM" not in open(path).read():
    time.sleep(0.01)
time.sleep(float(sys.argv[2]))
sys.exit(75)
"""


def start(
    *options: str, script: str, arguments: tuple[object, ...] = (), **environment: str
) -> subprocess.Popen[str]:
    """Starts a Python script several times, as a leader of its own process group."""
    command = [sys.executable, "-c", script, *map(str, arguments)]
    return subprocess.Popen(
        [sys.executable, str(LOCAL), *options, "--", *command],
        env={**{k: v for k, v in os.environ.items() if k not in NAMES}, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def finish(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    output, errors = process.communicate(timeout=300)
    return process.returncode, output, errors


def environments(folder: Path, *options: str, **environment: str) -> list[dict]:
    """What each process is told, in order."""
    process = start(*options, script=SHOW, arguments=(folder,), **environment)
    assert finish(process) == (0, "", "")
    return [json.loads(path.read_text()) for path in sorted(folder.iterdir())]


def wait_until(condition: Callable[[], object]) -> None:
    end = time.monotonic() + 300
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


@pytest.fixture
def listeners(tmp_path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts two processes that listen, and waits until they do."""
    started = []

    def listen(seconds: float = 0.3) -> subprocess.Popen[str]:
        process = start("--cpu", script=LISTEN, arguments=(tmp_path, seconds))
        started.append(process)
        wait_until(lambda: all(lines(tmp_path / name) for name in "01"))
        return process

    yield listen
    for process in started:
        process.kill()
        process.communicate()


def test_the_processes_know_their_number_and_one_address(tmp_path):
    told = environments(tmp_path, "--cpu", "--processes=3", "--devices-per-process=2")
    assert [own["JAX_PROCESS_ID"] for own in told] == ["0", "1", "2"]
    assert {own["JAX_NUM_PROCESSES"] for own in told} == {"3"}
    assert {own["JAX_NUM_CPU_DEVICES"] for own in told} == {"2"}
    assert {own["JAX_PLATFORMS"] for own in told} == {"cpu"}
    (address,) = {own["JAX_COORDINATOR_ADDRESS"] for own in told}
    assert address.startswith("127.0.0.1:")


@pytest.mark.parametrize(
    ("options", "expected"),
    [((), ["0,1", "2,3"]), (("--devices-per-process=1",), ["0", "1"])],
)
def test_the_gpus_are_shared_out_and_stay_visible_to_all(tmp_path, options, expected):
    told = environments(tmp_path, *options, CUDA_VISIBLE_DEVICES="4,5,6,7")
    assert [own["JAX_LOCAL_DEVICE_IDS"] for own in told] == expected
    assert {own["CUDA_VISIBLE_DEVICES"] for own in told} == {"4,5,6,7"}
    assert {own["JAX_PLATFORMS"] for own in told} == {"cuda,cpu"}


def test_a_process_by_itself_sees_no_more_gpus_than_it_was_given(tmp_path):
    options = ("--processes=1", "--devices-per-process=2")
    (own,) = environments(tmp_path, *options, CUDA_VISIBLE_DEVICES="4,5,6,7")
    assert own["CUDA_VISIBLE_DEVICES"] == "4,5"
    assert "JAX_LOCAL_DEVICE_IDS" not in own


def test_the_gpus_are_counted_by_the_driver(tmp_path):
    listing = tmp_path / "bin" / "nvidia-smi"
    listing.parent.mkdir()
    cards = "".join(f"GPU {k}: NVIDIA H100 (UUID: GPU-{k})\\n" for k in range(2))
    listing.write_text(f"#!/bin/sh\n[ $1 = -L ] && printf '{cards}'\n")
    listing.chmod(0o755)
    path = f"{listing.parent}:{os.environ['PATH']}"
    told = environments(helpers.make_folder(tmp_path / "told"), PATH=path)
    assert [own["JAX_LOCAL_DEVICE_IDS"] for own in told] == ["0", "1"]


@pytest.mark.parametrize(
    ("flag", "gpus", "memory"),
    [
        ("--each", ["4", "7"], {}),
        (
            "--each=2",
            ["4", "4", "7", "7"],
            {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.45"},
        ),
    ],
)
def test_each_gpu_has_workers_that_see_it_alone(tmp_path, flag, gpus, memory):
    told = environments(tmp_path, flag, CUDA_VISIBLE_DEVICES="4,7", JAX_PLATFORMS="cpu")
    assert sorted(own["CUDA_VISIBLE_DEVICES"] for own in told) == gpus
    own = {
        "JAX_PLATFORMS": "cuda,cpu",
        "SAMROBUST_DISTRIBUTED": "off",
        **memory,
    }
    for each in told:
        assert each == {**own, "CUDA_VISIBLE_DEVICES": each["CUDA_VISIBLE_DEVICES"]}


def test_each_tpu_chip_has_a_worker(monkeypatch):
    chips = {"/dev/vfio/[0-9]*": ["/dev/vfio/3", "/dev/vfio/11"]}
    monkeypatch.setattr(glob, "glob", lambda pattern: chips.get(pattern, []))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    told = one_device_each(1, cpu=False)
    assert [own["TPU_VISIBLE_CHIPS"] for own in told] == ["0", "1"]
    assert {own["TPU_PROCESS_BOUNDS"] for own in told} == {"1,1,1"}
    assert {own["JAX_PLATFORMS"] for own in told} == {"tpu,cpu"}
    with pytest.raises(ValueError, match="--each=1, got 2 chips"):
        one_device_each(2, cpu=False)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--each",), "Expected GPUs, or TPU chips with --each=1, got 0 chips."),
        (("--each", "--processes=2"), "Expected --each or --processes"),
        (("--each=0",), "Expected --each >= 1, got 0."),
    ],
)
def test_each_without_a_device_or_beside_a_count_is_refused(options, message):
    code, _, errors = finish(start(*options, script="", CUDA_VISIBLE_DEVICES=""))
    assert code == 2
    assert message in errors


def test_a_worker_that_dies_leaves_the_others_at_work_and_gives_its_code():
    script = (
        "import os, sys, time\n"
        "first = os.open(sys.argv[1], os.O_CREAT | os.O_WRONLY)\n"
        "try: os.mkdir(sys.argv[1] + '.taken')\n"
        "except FileExistsError: time.sleep(1.5); print('done', file=sys.stderr)\n"
        "else: os.kill(os.getpid(), 9)"
    )
    with tempfile.TemporaryDirectory() as folder:
        process = start(
            *("--each=2", "--cpu", "--grace=0"),
            script=script,
            arguments=(f"{folder}/file",),
        )
        code, _, errors = finish(process)
    assert code == 128 + signal.SIGKILL
    assert errors.splitlines()[-1].endswith("done")


@pytest.mark.slow
def test_a_table_by_two_workers_has_all_runs_and_is_printed_once(tmp_path):
    script = "import sys; from samrobust import cli; sys.exit(cli.main())"
    config = f"--config={helpers.ROOT}/configs/digits.py"
    sizes = {"training.epochs": 1, "data.train_size": 64, "evaluation.linf": ()}
    flags = helpers.make_flags(sizes)
    arguments = ("table", config, "--rows=st", "--seeds=3", f"--workdir={tmp_path}")
    process = start(
        *("--each=2", "--cpu"),
        script=script,
        arguments=(*arguments, *flags),
        **launch_runs.environment(),
        PYTHONPATH=str(helpers.ROOT),
    )
    code, output, errors = finish(process)
    assert code == 0, errors
    assert len(list(tmp_path.rglob("result.json"))) == 3
    assert output.count("natural") == 1
    hosts = {json.loads(p.read_text())["pid"] for p in tmp_path.rglob(".claim/*.json")}
    assert len(hosts) == 2


def test_more_processes_than_gpus_are_refused(tmp_path):
    process = start(script=SHOW, arguments=(tmp_path,), CUDA_VISIBLE_DEVICES="0")
    code, _, errors = finish(process)
    assert code == 2
    assert errors.startswith("local.py: error: Expected 2 x 1 GPUs, got 1. Ask for")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("flag", ["--processes=0", "--devices-per-process=-1"])
def test_a_count_below_one_is_refused(flag):
    code, _, errors = finish(start(flag, script="", CUDA_VISIBLE_DEVICES="0"))
    name, _, value = flag.partition("=")
    assert code == 2
    assert f"Expected {name} >= 1, got {value}." in errors


def test_a_command_that_does_not_exist_is_named():
    command = [sys.executable, str(LOCAL), "--cpu", "--", "no-such-command"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2
    assert "no-such-command" in done.stderr


def test_the_others_speak_with_their_number_in_front():
    script = (
        "import os, sys; own = os.environ['JAX_PROCESS_ID']\n"
        "print('out', own, flush=True)\n"
        "print('err', own, file=sys.stderr, flush=True)\n"
        "print('no end', own, end='')"
    )
    code, output, errors = finish(start("--cpu", script=script))
    assert (code, output) == (0, "out 0\nno end 0")
    assert sorted(errors.splitlines()) == [
        *("[1] err 1", "[1] no end 1", "[1] out 1", "err 0")
    ]


def test_sigterm_reaches_each_process_once(tmp_path, listeners):
    process = listeners()
    process.send_signal(signal.SIGTERM)
    time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    assert finish(process)[0] == 75
    for name in "01":
        assert lines(tmp_path / name)[1:] == ["SIGTERM"]


def test_ctrl_c_asks_all_to_stop_and_the_second_one_kills(tmp_path, listeners):
    process = listeners(60.0)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does it
    wait_until(lambda: all(len(lines(tmp_path / name)) > 1 for name in "01"))
    assert process.poll() is None
    os.killpg(process.pid, signal.SIGINT)
    assert finish(process)[0] == 130
    for name in "01":
        pid, *heard = lines(tmp_path / name)
        assert heard == ["SIGTERM"]
        assert not helpers.is_alive(pid)


def test_a_process_that_dies_ends_the_others_and_gives_its_code(tmp_path):
    script = LISTEN + "\n"
    die = (
        "if path.endswith('1'):\n"
        "    while not os.path.exists(path[:-1] + '0'): time.sleep(0.01)\n"
        "    os.kill(os.getpid(), 9)\n"
    )
    script = script.replace("while", f"{die}while", 1)
    process = start("--cpu", "--grace=0.5", script=script, arguments=(tmp_path, 0))
    assert finish(process)[0] == 128 + signal.SIGKILL
    (pid,) = lines(tmp_path / "0")
    assert not helpers.is_alive(pid)


def test_the_code_is_that_of_the_first_failure(tmp_path):
    script = (
        "import os, pathlib, signal, sys, time; ready = pathlib.Path(sys.argv[1])\n"
        "if os.environ['JAX_PROCESS_ID'] == '1':\n"
        "    while not ready.exists(): time.sleep(0.01)\n"
        "    sys.exit(3)\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(2))\n"
        "ready.touch()\n"
        "while True: signal.pause()\n"
    )
    process = start("--cpu", script=script, arguments=(tmp_path / "ready",))
    assert finish(process)[0] == 3


def test_a_process_that_stopped_leaves_the_others_their_time():
    script = (
        "import os, sys, time; own = int(os.environ['JAX_PROCESS_ID'])\n"
        "time.sleep(1 - own); print('saved', own); sys.exit(75)"
    )
    code, output, _ = finish(start("--cpu", "--grace=0", script=script))
    assert (code, output) == (75, "saved 0\n")


@pytest.mark.skipif(sys.platform != "linux", reason="prctl is Linux's")
def test_no_process_outlives_a_launcher_that_is_killed(tmp_path, listeners):
    process = listeners(60.0)
    process.kill()
    process.communicate()
    pids = [lines(tmp_path / name)[0] for name in "01"]
    wait_until(lambda: not any(map(helpers.is_alive, pids)))


def children_of(pid: int) -> list[int]:
    """The processes that a process has started, in order."""
    text = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    return [int(word) for word in text.split()]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="asks /proc for the processes")
def test_a_run_that_lost_a_process_goes_on_and_stops_as_it_is_told(tmp_path):
    """What it ends with is in test_processes_end."""

    def start_run() -> subprocess.Popen[str]:
        script = "import sys; from samrobust import cli; sys.exit(cli.main())"
        return start(
            "--cpu",
            script=script,
            arguments=tuple(launch_runs.train(tmp_path, epochs=8)),
            **launch_runs.environment(),
            PYTHONPATH=str(helpers.ROOT),
        )

    killed = start_run()
    launch_runs.wait_for_checkpoint(tmp_path)
    os.kill(children_of(killed.pid)[1], signal.SIGKILL)
    assert finish(killed)[0] == 128 + signal.SIGKILL
    began_at = launch_runs.wait_for_checkpoint(tmp_path)

    stopped = start_run()
    launch_runs.wait_for_checkpoint(tmp_path, after=began_at)
    stopped.send_signal(signal.SIGTERM)
    code, _, errors = finish(stopped)
    assert code == 75, errors
    step = helpers.checkpoint_steps(tmp_path)[-1]
    assert step > began_at
    assert f"Stopped at step {step} of" in errors


# A process that prints all the time; asked to stop, it shows so, and saves.
CHATTY = """
import os, pathlib, signal, sys, time
asked = []
signal.signal(signal.SIGTERM, lambda *_: asked.append(True))
print("ready", flush=True)
while not asked:
    time.sleep(0.01)
for _ in range(20):
    if int(os.environ["JAX_PROCESS_ID"]):
        print("stopping", flush=True)
    time.sleep(0.01)
pathlib.Path(sys.argv[1], os.environ["JAX_PROCESS_ID"]).write_text("saved")
sys.exit(75)
"""


def test_a_closed_terminal_stops_all_as_sigterm_does(tmp_path):
    local = (str(LOCAL), "--processes=2", "--cpu", "--")
    chatty = (sys.executable, "-c", CHATTY, str(tmp_path))
    process, ours = helpers.start_in_a_terminal(*local, *chatty)
    shown = b""
    while min(shown.count(b"ready"), shown.count(b"\n")) < 2:
        shown += os.read(ours, 1000)
    time.sleep(0.2)  # a write that is cut would fail
    os.close(ours)
    assert process.wait(60) == 75
    assert [(tmp_path / name).read_text() for name in "01"] == ["saved"] * 2
