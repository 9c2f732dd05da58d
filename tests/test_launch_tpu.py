"""launch/tpu_vm.sh, with a stand-in for gcloud and for the machines behind it."""

import contextlib
import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import gcloud_stand_in
import helpers
import launch_runs
import numpy as np
import pytest

from samrobust.training.checkpoint import Checkpoints

SCRIPT = helpers.ROOT / "launch" / "tpu_vm.sh"
# What the script reads of the checkout that it brings to the VM.
BROUGHT = ("launch/tpu_vm.sh", "requirements.lock")
# Notes its arguments; a virtual environment that it makes has the command.
UV = """#!/bin/sh
echo "$@" >> ~/uv.log
if [ "$1" = venv ]; then mkdir -p venv/bin; ln -sf {command} venv/bin/samrobust; fi
"""
# Counts in runs/a/count, as often as it is started; not beyond $HOLD before it is let
# go. Ends with ~/exit_code once.
COUNT = """#!/bin/sh
mkdir -p runs/a/checkpoints
cd runs/a
echo "$@" > arguments
echo "$JAX_PLATFORMS" > platforms
echo "started after $(cat count 2>/dev/null)" >> starts
for k in $(seq $(( $(cat count 2>/dev/null || echo 0) + 1 )) $COUNT); do
  echo "$k" > count; echo "$k" > checkpoints/newest; sleep 0.04
  [ "$k" != "$HOLD" ] || until [ -e "$GCLOUD_STAND_IN/go" ]; do sleep 0.04; done
done
code=$(cat ~/exit_code 2>/dev/null || echo 0)
rm -f ~/exit_code
exit "$code"
"""
STAND_IN = gcloud_stand_in.__file__
BUCKET = "gs://bucket/sam"
RUN = ("train", "--config=a.py:sam,rho=0.2", "--workdir=runs/a")
LONGEST = 300  # seconds, on however busy a machine

pytestmark = pytest.mark.skipif(
    shutil.which("git") is None, reason="brings a git checkout to the VM"
)


@dataclasses.dataclass
class Cloud:
    """The stand-in's folder, and how to call the script."""

    folder: Path
    checkout: Path
    environment: dict[str, str]
    started: list[subprocess.Popen[str]] = dataclasses.field(default_factory=list)

    def start(self, *arguments: str, **environment: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [str(self.checkout / "launch" / SCRIPT.name), *arguments],
            env={**self.environment, **environment},
            cwd=self.folder / "here",
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.started.append(process)
        return process

    def call(self, *arguments: str, **environment: str) -> tuple[int, str, str]:
        process = self.start(*arguments, **environment)
        output, errors = process.communicate(timeout=LONGEST)
        return process.returncode, output, errors

    def calls(self, *words: str) -> list[list[str]]:
        """The recorded calls that have these words."""
        lines = (self.folder / "calls.jsonl").read_text().splitlines()
        return [call for call in map(json.loads, lines) if set(words) <= set(call)]

    def read(self, name: str) -> str:
        path = self.folder / name
        return path.read_text().strip() if path.exists() else ""

    def count(self, name: str) -> int:
        return int(self.read(name) or 0)

    def let_go(self) -> None:
        """What was started with HOLD counts on."""
        (self.folder / "go").touch()

    def wait(self, condition: Callable[[], object]) -> None:
        end = time.monotonic() + LONGEST
        while True:
            with contextlib.suppress(OSError):  # as files come and go
                if condition():
                    return
            assert time.monotonic() < end, self.read("calls.jsonl")
            time.sleep(0.02)


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    """A small one: it is copied to every VM."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in BROUGHT:
        (folder / name).parent.mkdir(exist_ok=True)
        shutil.copy(helpers.ROOT / name, folder / name)
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b.c"]
    for words in ("init --quiet", "add .", "commit --quiet --message=all"):
        subprocess.run([*git, *words.split()], cwd=folder, check=True)
    return folder


@contextlib.contextmanager
def open_cloud(folder: Path, checkout: Path) -> Iterator[Cloud]:
    programs = launch_runs.write_command(folder / "bin")
    scripts = {
        "gcloud": f'#!/bin/sh\nexec {sys.executable} -IS {STAND_IN} "$@"\n',
        "uv": UV.format(command=programs / "command"),
        "command": COUNT,
    }
    for name, text in scripts.items():
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    helpers.make_folder(folder / "here")
    environment = {
        **os.environ,
        "PATH": f"{programs}:{os.environ['PATH']}",
        "GCLOUD_STAND_IN": str(folder),
        "NAME": "sam",
        "ZONE": "us-east5-a",
        "TYPE": "v6e-8",
        "VERSION": "v2-alpha-tpuv6e",
        "BUCKET": BUCKET,
        "SAVE_SECONDS": "0.3",
        "POLL_SECONDS": "0.1",
        "MAX_FAILURES": "3",
        "COUNT": "10",
        "HOLD": "",
        "JAX_PLATFORMS": "",  # none is set on a VM
    }
    cloud = Cloud(folder, checkout, environment)
    yield cloud
    for process in cloud.started:
        process.kill()
        process.communicate()
    gcloud_stand_in.stop_processes(folder)


@pytest.fixture
def cloud(tmp_path, checkout) -> Iterator[Cloud]:
    with open_cloud(tmp_path, checkout) as cloud:
        yield cloud


@pytest.fixture(scope="module")
def finished(tmp_path_factory, checkout) -> Iterator[Cloud]:
    """Where `up` has done its work, after it was refused a VM four times."""
    with open_cloud(tmp_path_factory.mktemp("cloud"), checkout) as cloud:
        (cloud.folder / "refuse_create").write_text("4")  # more often than it fails
        code, _, errors = cloud.call("up", *RUN)
        assert code == 0, errors
        yield cloud


def test_each_step_works_by_itself(cloud):
    assert cloud.call("create")[0] == 0
    assert cloud.call("install")[0] == 0
    assert cloud.call("run", *RUN)[0] == 0
    cloud.wait(lambda: cloud.read("vm/0/saved") == "0")
    assert cloud.read("vm/0/runs/a/count") == "10"
    assert cloud.read("bucket/sam/a/count") == "10"
    code, output, _ = cloud.call("status")
    assert (code, output.splitlines()[0]) == (0, "sam: READY")
    assert cloud.call("delete")[0] == 0
    assert cloud.call("status") == (0, "sam: no VM\n", "")
    assert cloud.call("collect")[0] == 0
    assert cloud.read("here/runs/a/count") == "10"


def test_the_vm_is_asked_for_as_the_variables_say(cloud):
    own = {"QUEUED": "no"}
    assert cloud.call("create", **own)[0] == 0
    assert cloud.call("delete", **own)[0] == 0
    flags = "--network=ours"
    assert cloud.call("create", SPOT="no", CREATE_FLAGS=flags, **own)[0] == 0
    spot, on_demand = cloud.calls("tpu-vm", "create")
    wanted = "compute tpus tpu-vm create sam --zone=us-east5-a --quiet"
    wanted += " --version=v2-alpha-tpuv6e --accelerator-type=v6e-8"
    assert spot == [*wanted.split(), "--spot"]
    assert on_demand == [*wanted.split(), "--network=ours"]


def test_a_vm_of_the_queue_is_asked_for_and_deleted_there(cloud):
    assert cloud.call("create", QUEUED="yes")[0] == 0
    assert cloud.call("delete", QUEUED="yes")[0] == 0
    (create,), (delete,) = (
        cloud.calls("queued-resources", verb) for verb in ("create", "delete")
    )
    assert {"--node-id=sam", "--runtime-version=v2-alpha-tpuv6e"} <= set(create)
    assert "--force" in delete
    assert not cloud.calls("tpu-vm", "create")


def test_the_last_commit_is_installed_on_every_worker_from_the_lock(cloud):
    assert cloud.call("create")[0] == 0
    assert cloud.call("install")[0] == 0
    head = ["git", "rev-parse", "HEAD"]
    wanted = subprocess.check_output(head, cwd=cloud.checkout, text=True)
    for worker in "01":
        home = cloud.folder / "vm" / worker
        there = home / "samrobust"
        assert subprocess.check_output(head, cwd=there, text=True) == wanted
        assert (home / "uv.log").read_text().splitlines() == [
            "venv -q --clear --python 3.12 venv",
            "pip install -q --python venv --require-hashes -r "
            "samrobust/requirements.lock",
            "pip install -q --python venv -e samrobust[tpu]",
        ]
    assert (cloud.folder / "vm" / "0" / "installed").exists()


def test_the_python_is_that_of_the_image():
    image = (helpers.ROOT / "launch" / "Dockerfile").read_text()
    (version,) = re.findall(r"^PYTHON=\$\{PYTHON:-(.*?)\}", SCRIPT.read_text(), re.M)
    assert f"FROM python:{version}-slim" in image


def test_one_worker_that_cannot_be_installed_leaves_it_to_the_next_attempt(cloud):
    assert cloud.call("create")[0] == 0
    programs = cloud.folder / "bin"
    uv = (programs / "uv").read_text()
    (programs / "uv").write_text(f"case $HOME in */1) exit 1 ;; esac\n{uv}")
    assert cloud.call("install", SSH_FLAGS="--internal-ip")[0] != 0
    assert not (cloud.folder / "vm" / "0" / "installed").exists()
    assert all("--internal-ip" in call for call in cloud.calls("ssh"))


def test_a_vm_that_nobody_waits_for_ends_by_itself_and_leaves_all_in_the_bucket(cloud):
    process = cloud.start("up", *RUN, HOLD="3")
    cloud.wait(lambda: (cloud.folder / "vm" / "0" / "save.pid").exists())
    process.kill()
    cloud.let_go()
    cloud.wait(lambda: not (cloud.folder / "state").exists())
    assert cloud.read("bucket/sam/a/count") == "10"
    assert cloud.call("up", *RUN)[0] == 0
    assert cloud.read("here/runs/a/count") == "10"
    assert (cloud.folder / "here" / "runs" / "worker0.log").exists()
    assert len(cloud.calls("queued-resources", "create")) == 1
    assert not (cloud.folder / "bucket" / "sam.ended").exists()  # said once


def test_what_a_crash_left_is_ended_before_the_next_start(cloud):
    assert cloud.call("create")[0] == 0
    assert cloud.call("install")[0] == 0
    assert cloud.call("run", *RUN, COUNT="999")[0] == 0
    cloud.wait(lambda: cloud.count("vm/1/runs/a/count") > 3)
    first = [cloud.read(f"vm/{worker}/pid") for worker in "01"]
    assert cloud.call("run", *RUN)[0] == 0
    for pid in first:
        path = Path(f"/proc/{pid}/cmdline")  # a zombie's is empty
        assert not (path.exists() and path.read_bytes())


def test_up_does_it_all_and_leaves_nothing_that_costs(finished):
    assert finished.read("here/runs/a/count") == "10"
    assert finished.read("here/runs/a/arguments") == " ".join(RUN)
    assert finished.read("here/runs/a/platforms") == "tpu,cpu"
    assert not (finished.folder / "state").exists()


def test_up_asks_again_where_there_is_no_capacity(finished):
    assert len(finished.calls("queued-resources", "create")) == 5


def test_what_makes_a_file_count_is_copied_after_it_and_removals_come_last(finished):
    copies = [call for call in finished.calls("rsync") if call[-1] == BUCKET]
    flags = [
        dict(word.partition("=")[::2] for word in call if word.startswith("--"))
        for call in copies
    ]
    kinds = {
        "log": "a/metrics.jsonl",
        "weights": "a/checkpoints/last/7/state/d/0",
        "sums of the best": "a/checkpoints/best/7/metadata/metadata",
        "sums of the last": "a/checkpoints/last/7/metadata/metadata",
        "result": "a/result.json",
    }
    assert len(flags) >= 4
    rounds = [flags[i : i + 4] for i in range(0, len(flags) - len(flags) % 4, 4)]
    for parts in rounds:
        arrived = [
            [
                kind
                for kind, name in kinds.items()
                if not re.match(part.get("--exclude", "(?!)"), name)
            ]
            for part in parts
        ]
        assert arrived == [list(kinds)[:end] for end in (2, 3, 4, 5)]
        removes = ["--delete-unmatched-destination-objects" in part for part in parts]
        assert removes == [False, False, False, True]


def test_the_sums_are_where_the_script_looks_for_them(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(7, {"w": np.arange(3.0, dtype=np.float32)}, wait=True)
    manifest = json.loads((tmp_path / "7" / "metadata" / "metadata").read_text())
    assert manifest.keys() == {"step", "leaves", "metadata", "crc32"}


def test_checkpoints_without_their_sums_are_left_out_on_a_new_vm(cloud):
    names = ["last/5/state/d", "last/4/state/d", "last/4/metadata/metadata", "best/5/x"]
    for name in names:
        path = cloud.folder / "bucket" / "sam" / "a" / "checkpoints" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    assert cloud.call("create")[0] == 0
    assert cloud.call("install")[0] == 0
    code, _, errors = cloud.call("run", *RUN)
    assert code == 0
    left_out = [line for line in errors.splitlines() if "left out" in line]
    assert left_out == [
        f"tpu_vm.sh: left out runs/a/checkpoints/{name}: its copy was cut off"
        for name in ("best/5", "last/5")
    ]
    folder = cloud.folder / "vm" / "0" / "runs" / "a" / "checkpoints"
    assert sorted(path.name for path in folder.glob("*/*")) == ["4"]
    assert (folder / "last" / "4" / "state" / "d").read_text() == "last/4/state/d"


def test_up_goes_on_after_the_vm_was_preempted(cloud):
    process = cloud.start("up", *RUN, HOLD="6")
    cloud.wait(lambda: cloud.count("bucket/sam/a/count") == 6)
    gcloud_stand_in.preempt(cloud.folder)
    cloud.let_go()
    _, errors = process.communicate(timeout=LONGEST)
    assert process.returncode == 0, errors
    assert len(cloud.calls("queued-resources", "create")) == 2
    assert cloud.read("here/runs/a/count") == "10"
    starts = cloud.read("here/runs/a/starts").splitlines()
    assert starts == ["started after ", "started after 6"]


def test_up_gives_up_in_the_end(cloud):
    (cloud.folder / "refuse_create").write_text("99")
    (cloud.folder / "refusal").write_text("Quota limit has been exceeded")
    code, _, errors = cloud.call("up", *RUN)
    assert code == 1
    assert "error: 3 failures in a row." in errors


def test_up_that_is_called_again_finds_its_vm_at_work(cloud):
    process = cloud.start("up", *RUN, HOLD="3")
    cloud.wait(lambda: (cloud.folder / "vm" / "0" / "save.pid").exists())
    process.kill()
    process = cloud.start("up", *RUN)
    assert process.stderr is not None
    while "running" not in (line := process.stderr.readline()):
        assert line
    cloud.let_go()
    assert process.wait(LONGEST) == 0
    assert cloud.read("here/runs/a/starts") == "started after"
    assert len(cloud.calls("queued-resources", "create")) == 1


def test_up_starts_what_a_restart_of_the_vm_has_ended_without_going_back(cloud):
    release = hang_at(cloud, ".*/a/count")  # on the VM's disk alone
    process = cloud.start("up", *RUN, HOLD="6")
    cloud.wait(lambda: cloud.count("vm/0/runs/a/count") == 6)
    cloud.wait((cloud.folder / "hanging").exists)
    gcloud_stand_in.stop_processes(cloud.folder)
    release()
    cloud.let_go()
    _, errors = process.communicate(timeout=LONGEST)
    assert process.returncode == 0, errors
    assert len(cloud.calls("queued-resources", "create")) == 1
    starts = cloud.read("here/runs/a/starts").splitlines()
    assert starts == ["started after ", "started after 6"]


def test_a_run_that_failed_ends_up_with_its_code(cloud):
    code = 2
    assert cloud.call("create")[0] == 0
    for worker in "01":
        (cloud.folder / "vm" / worker / "exit_code").write_text(str(code))
    assert cloud.call("up", *RUN)[0] == code
    assert not (cloud.folder / "state").exists()


@pytest.mark.parametrize("code", [75, 134])
def test_a_run_that_stopped_or_crashed_is_started_again(cloud, code):
    assert cloud.call("create")[0] == 0
    for worker in "01":
        (cloud.folder / "vm" / worker / "exit_code").write_text(str(code))
    code, _, errors = cloud.call("up", *RUN)
    assert code == 0, errors
    starts = cloud.read("here/runs/a/starts").splitlines()
    assert starts == ["started after ", "started after 10"]


@pytest.mark.parametrize(
    ("arguments", "environment", "message"),
    [
        (
            (),
            {},
            "Expected up, create, install, run, status, collect or delete, got ''.",
        ),
        (("dance",), {}, "or delete, got 'dance'."),
        (("create",), {"BUCKET": ""}, "Expected BUCKET=gs://BUCKET/FOLDER, got ''."),
        (("up", "train", "--workdir=/tmp/a"), {}, "Expected --workdir=runs/..., got: "),
        (("run", "train"), {}, "Expected --workdir=runs/..., got: train"),
    ],
)
def test_what_cannot_work_is_refused_before_any_call(
    cloud, arguments, environment, message
):
    code, _, errors = cloud.call(*arguments, **environment)
    assert code == 2
    assert errors.startswith("tpu_vm.sh: error: Expected ")
    assert message in errors
    assert not (cloud.folder / "calls.jsonl").exists()


def start_real_run(cloud):
    """`up` with the real command, which leaves the stand-ins little of the machine."""
    programs = cloud.folder / "bin"
    (programs / "command").unlink()
    (programs / "command").symlink_to(programs / "samrobust")
    address = f"127.0.0.1:{launch_runs.free_port()}"
    return cloud.start(
        *("up", *launch_runs.train("runs/at")),
        **launch_runs.environment(),
        SAMROBUST_TEST_ADDRESS=address,
        SAVE_SECONDS="1",
        POLL_SECONDS="0.5",
    )


def sums_in_the_bucket(cloud):
    """Of the last checkpoints, which count by them; one being written does not."""
    folder = cloud.folder / "bucket" / "sam" / "at" / "checkpoints" / "last"
    found = folder.glob("*/metadata/metadata")
    return [path for path in found if path.parents[1].name.isdigit()]


def hang_at(cloud, pattern):
    """No copy gets beyond such an object; gives what lets all of them pass again."""
    (cloud.folder / "hang_at").write_text(pattern)
    return (cloud.folder / "hang_at").unlink


@pytest.mark.slow
def test_a_real_run_whose_vm_is_preempted_again_and_again_ends_bit_identical(cloud):
    """It starts anew, as its first copy was cut off, and goes on from the second."""
    # Just before what makes the checkpoint count; all else has arrived.
    hang_at(cloud, r".*/last/\d+/metadata/metadata")
    process = start_real_run(cloud)
    cloud.wait((cloud.folder / "hanging").exists)
    assert helpers.checkpoint_steps(cloud.folder / "bucket" / "sam" / "at")
    assert not sums_in_the_bucket(cloud)
    gcloud_stand_in.preempt(cloud.folder)
    release = hang_at(cloud, r".*/result\.json")  # it cannot end before
    cloud.wait(lambda: sums_in_the_bucket(cloud))
    gcloud_stand_in.preempt(cloud.folder)
    release()
    _, errors = process.communicate(timeout=LONGEST)
    assert process.returncode == 0, errors
    assert "its copy was cut off" in errors
    assert len(cloud.calls("queued-resources", "create")) == 3
    launch_runs.assert_same_run(cloud.folder / "here" / "runs" / "at")


@pytest.mark.slow
def test_a_real_run_whose_only_checkpoint_is_damaged_is_refused(cloud):
    """It had arrived whole, so this is no copy that was cut off."""
    arrived = cloud.folder / "bucket" / "sam" / "at"
    claims = shutil.ignore_patterns(".claim")
    shutil.copytree(launch_runs.expected(2), arrived, ignore=claims)
    (arrived / "result.json").unlink()
    assert len(sums_in_the_bucket(cloud)) == 1
    for path in arrived.rglob("state/**/d/*"):
        path.write_bytes(path.read_bytes()[:-1])
    process = start_real_run(cloud)
    _, errors = process.communicate(timeout=LONGEST)
    assert process.returncode == 1, errors
    assert "its copy was cut off" not in errors
    failure = json.loads(cloud.read("here/runs/at/failure.json"))
    assert "got only damaged ones" in json.dumps(failure)


def test_every_shell_script_passes_shellcheck():
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed")
    launch = helpers.ROOT / "launch"
    scripts = [*launch.rglob("*.sh"), launch / "slurm" / "train.sbatch"]
    assert SCRIPT in scripts
    done = subprocess.run(
        ["shellcheck", *map(str, scripts)], capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (0, "")


def test_the_calls_are_those_of_the_documentation(cloud):
    """The stand-in knows the flags of gcloud; it refuses others."""
    home = {"GCLOUD_STAND_IN": str(cloud.folder), **os.environ}
    call = [sys.executable, gcloud_stand_in.__file__, "compute", "tpus", "tpu-vm"]
    done = subprocess.run(
        [*call, "create", "sam", "--colour=red"], env=home, capture_output=True
    )
    assert done.returncode == 1
    assert json.loads(cloud.read("calls.jsonl"))[-1] == "--colour=red"
