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
import pytest

SCRIPT = helpers.ROOT / "launch" / "tpu_vm.sh"
# What the script reads of the checkout that it brings to the VM.
BROUGHT = ("launch/tpu_vm.sh", "requirements.lock")
# Notes its arguments; a virtual environment that it makes has the command.
UV = """#!/bin/sh
echo "$@" >> ~/uv.log
if [ "$1" = venv ]; then mkdir -p venv/bin; ln -sf {command} venv/bin/samrobust; fi
"""
# Counts, as often as it is started: worker 0 in the bucket, others at home; not beyond
# $HOLD before it is let go. Ends with ~/exit_code once.
COUNT = """#!/bin/sh
folder=~/scratch
if [ "$JAX_PROCESS_ID" = 0 ]; then folder=$GCLOUD_STAND_IN/bucket/sam/a; fi
mkdir -p "$folder"
cd "$folder"
echo "it works"
echo "$@" > arguments
echo "$JAX_PLATFORMS $JAX_COMPILATION_CACHE_DIR $TFDS_DATA_DIR" > environment
echo "started after $(cat count 2>/dev/null)" >> starts
for k in $(seq $(( $(cat count 2>/dev/null || echo 0) + 1 )) $COUNT); do
  echo "$k" > count; sleep 0.04
  [ "$k" != "$HOLD" ] || until [ -e "$GCLOUD_STAND_IN/go" ]; do sleep 0.04; done
done
code=$(cat ~/exit_code 2>/dev/null || echo 0)
rm -f ~/exit_code
exit "$code"
"""
STAND_IN = gcloud_stand_in.__file__
FOLDER = "Expected --workdir=gs://BUCKET/FOLDER, got: "
RUN = ("train", "--config=a.py:sam,rho=0.2", "--workdir=gs://bucket/sam/a")

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
        "LOG_SECONDS": "0.3",
        "POLL_SECONDS": "0.1",
        "MAX_FAILURES": "3",
        "COUNT": "10",
        "HOLD": "",
        **dict.fromkeys(("JAX_PLATFORMS", "JAX_COMPILATION_CACHE_DIR"), ""),  # on a VM
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
    prepared = cloud.folder / "bucket" / "data" / "cifar10"
    prepared.parent.mkdir(parents=True)
    prepared.write_text("images")
    assert cloud.call("create")[0] == 0
    assert cloud.call("install", DATA="gs://bucket/data")[0] == 0
    assert [cloud.read(f"vm/{worker}/data/cifar10") for worker in "01"] == [
        *(["images"] * 2)
    ]
    assert cloud.call("run", *RUN)[0] == 0
    cloud.wait(lambda: cloud.read("vm/0/code") == "0")
    assert cloud.read("bucket/sam/a/count") == "10"
    code, output, _ = cloud.call("status")
    assert (code, output.splitlines()) == (0, ["sam: READY", "it works"])
    assert cloud.call("delete")[0] == 0
    assert cloud.call("status") == (0, "sam: no VM\n", "")


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
            "pip install -q --python venv -e samrobust[tpu,gcs]",
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
    cloud.wait(lambda: cloud.read("bucket/sam/a.vm/sam-w-0.log"))  # while it works
    process.kill()
    cloud.let_go()
    cloud.wait(lambda: not (cloud.folder / "state").exists())
    assert cloud.read("bucket/sam/a/count") == "10"
    assert cloud.call("up", *RUN)[0] == 0
    assert cloud.read("bucket/sam/a.vm/sam-w-0.log") == "it works"
    assert len(cloud.calls("queued-resources", "create")) == 1
    assert not cloud.read("bucket/sam/a.vm/ended")  # said once


def test_what_a_crash_left_is_ended_before_the_next_start(cloud):
    assert cloud.call("create")[0] == 0
    assert cloud.call("install")[0] == 0
    assert cloud.call("run", *RUN, COUNT="999")[0] == 0
    cloud.wait(lambda: cloud.count("vm/1/scratch/count") > 3)
    first = [cloud.read(f"vm/{worker}/pid") for worker in "01"]
    assert cloud.call("run", *RUN)[0] == 0
    for pid in first:
        path = Path(f"/proc/{pid}/cmdline")  # a zombie's is empty
        assert not (path.exists() and path.read_bytes())


def test_up_does_it_all_and_leaves_nothing_that_costs(finished):
    assert finished.read("bucket/sam/a/count") == "10"
    assert finished.read("bucket/sam/a/arguments") == " ".join(RUN)
    home = finished.folder / "vm" / "0"
    wanted = f"tpu,cpu gs://bucket/sam/a.vm/xla {home}/data"
    assert finished.read("bucket/sam/a/environment") == wanted
    assert not (finished.folder / "state").exists()


def test_up_asks_again_where_there_is_no_capacity(finished):
    assert len(finished.calls("queued-resources", "create")) == 5


def test_up_goes_on_after_the_vm_was_preempted(cloud):
    process = cloud.start("up", *RUN, HOLD="6")
    cloud.wait(lambda: cloud.count("bucket/sam/a/count") == 6)
    gcloud_stand_in.preempt(cloud.folder)
    cloud.let_go()
    _, errors = process.communicate(timeout=LONGEST)
    assert process.returncode == 0, errors
    assert len(cloud.calls("queued-resources", "create")) == 2
    assert cloud.read("bucket/sam/a/count") == "10"
    starts = cloud.read("bucket/sam/a/starts").splitlines()
    assert starts == ["started after ", "started after 6"]


def test_up_gives_up_in_the_end(cloud):
    (cloud.folder / "refuse_create").write_text("99")
    (cloud.folder / "refusal").write_text("Internal error")
    code, _, errors = cloud.call("up", *RUN)
    assert code == 1
    assert "error: 3 failures in a row, 0 crashes." in errors


@pytest.mark.parametrize(
    "refusal",
    [
        "PERMISSION_DENIED: Permission 'tpu.nodes.create' denied",
        "Quota limit 'TPUV6EPerProjectPerZone' has been exceeded. Limit: 0",
        "INVALID_ARGUMENT: unknown accelerator type",
    ],
)
def test_what_would_be_refused_again_ends_up_at_once(cloud, refusal):
    (cloud.folder / "refuse_create").write_text("99")
    (cloud.folder / "refusal").write_text(refusal)
    code, _, errors = cloud.call("up", *RUN)
    assert code == 2
    assert refusal in errors
    assert "error: Expected the right, the quota and the names for a VM" in errors
    assert len(cloud.calls("queued-resources", "create")) == 1


def test_up_that_is_called_again_finds_its_vm_at_work(cloud):
    process = cloud.start("up", *RUN, HOLD="3")
    cloud.wait(lambda: cloud.count("bucket/sam/a/count") == 3)
    process.kill()
    process = cloud.start("up", *RUN)
    assert process.stderr is not None
    while "running" not in (line := process.stderr.readline()):
        assert line
    cloud.let_go()
    assert process.wait(LONGEST) == 0
    assert cloud.read("bucket/sam/a/starts") == "started after"
    assert len(cloud.calls("queued-resources", "create")) == 1


def test_up_starts_what_a_restart_of_the_vm_has_ended_without_going_back(cloud):
    process = cloud.start("up", *RUN, HOLD="6")
    cloud.wait(lambda: cloud.count("bucket/sam/a/count") == 6)
    gcloud_stand_in.stop_processes(cloud.folder)
    cloud.let_go()
    _, errors = process.communicate(timeout=LONGEST)
    assert process.returncode == 0, errors
    assert len(cloud.calls("queued-resources", "create")) == 1
    starts = cloud.read("bucket/sam/a/starts").splitlines()
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
    starts = cloud.read("bucket/sam/a/starts").splitlines()
    assert starts == ["started after ", "started after 10"]


def test_a_run_that_crashes_again_and_again_is_given_up(cloud):
    """However long it worked each time."""
    crash = """#!/bin/sh
    until [ "$JAX_PROCESS_ID" != 0 ] || rm "$GCLOUD_STAND_IN/go"; do sleep 0.04; done
    exit 134
    """
    (cloud.folder / "bin" / "command").write_text(crash)
    process = cloud.start("up", *RUN)
    assert process.stderr is not None
    seen = []
    for line in process.stderr:
        if "sam: running" in line and "sam: running" not in seen[-1]:
            assert sum("sam: 134" in before for before in seen) < 3
            cloud.let_go()
        seen.append(line)
    assert process.wait(LONGEST) == 1
    assert "3 crashes" in seen[-1]
    assert sum("sam: 134" in line for line in seen) == 3


@pytest.mark.parametrize(
    ("arguments", "environment", "message"),
    [
        (
            (),
            {},
            "Expected up, create, install, run, status or delete, got ''.",
        ),
        (("dance",), {}, "or delete, got 'dance'."),
        (("up", "train", "--workdir=/tmp/a"), {}, f"{FOLDER}train --workdir=/tmp/a"),
        (("up", "train", "--workdir=gs://bucket"), {}, f"{FOLDER}train --workdir=gs"),
        (("run", "train"), {}, f"{FOLDER}train"),
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
        *("up", *launch_runs.train("gs://bucket/sam/at")),
        **launch_runs.environment(),
        SAMROBUST_TEST_ADDRESS=address,
        GCS_STAND_IN=str(cloud.folder),
        POLL_SECONDS="0.5",
    )


def sums_in_the_bucket(cloud):
    """Of the last checkpoints, which count by them; one being written does not."""
    folder = cloud.folder / "bucket" / "sam" / "at" / "checkpoints" / "last"
    found = folder.glob("*/metadata/metadata")
    return [path for path in found if path.parents[1].name.isdigit()]


def hang_at(cloud, pattern):
    """No upload gets beyond such an object; gives what lets all of them pass again."""
    (cloud.folder / "hang_at").write_text(pattern)
    return (cloud.folder / "hang_at").unlink


@pytest.mark.slow
@pytest.mark.parametrize(
    "pattern",
    [r".*/result\.json", r".*/last/\d+/metadata/metadata"],
    ids=["before-the-result", "in-the-first-checkpoint"],
)
def test_a_real_run_whose_vm_was_preempted_ends_bit_identical(cloud, pattern):
    release = hang_at(cloud, pattern)  # it cannot end before
    process = start_real_run(cloud)
    cloud.wait(lambda: (cloud.folder / "hanging").exists())
    gcloud_stand_in.preempt(cloud.folder)
    bucket = cloud.folder / "bucket" / "sam" / "at"
    assert helpers.checkpoint_steps(bucket)
    assert bool(sums_in_the_bucket(cloud)) == ("result" in pattern)
    release()
    _, errors = process.communicate(timeout=LONGEST)
    assert process.returncode == 0, errors
    assert len(cloud.calls("queued-resources", "create")) == 2
    launch_runs.assert_same_run(bucket)


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
