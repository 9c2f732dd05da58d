"""In which environments a process is one of several, and which one."""

import os
import signal
import socket
import sys
from unittest import mock

import helpers
import jax
import pytest
from jax._src import hardware_utils

from samrobust.system.distributed import environment, start as meeting
from samrobust.system.distributed.environment import Settings
from samrobust.system.distributed.start import DistributedError

EXPLICIT = {
    "JAX_COORDINATOR_ADDRESS": "node1:1234",
    "JAX_NUM_PROCESSES": "4",
    "JAX_PROCESS_ID": "3",
}
SLURM = {
    "SLURM_JOB_ID": "8193",
    "SLURM_STEP_NODELIST": "gpu[07-09]",
    "SLURM_STEP_NUM_TASKS": "6",
    "SLURM_STEP_TASKS_PER_NODE": "2(x3)",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
}
OPEN_MPI = {
    "JAX_COORDINATOR_ADDRESS": "node1:1234",
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_RANK": "3",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
}
SKYPILOT = {
    "SKYPILOT_NUM_NODES": "2",
    "SKYPILOT_NODE_RANK": "1",
    "SKYPILOT_NODE_IPS": "10.0.0.5\n10.0.0.6",
}
XPK = {
    "JAX_COORDINATOR_ADDRESS": "sam-slice-job-0-0.sam",
    "JAX_COORDINATOR_PORT": "6002",
    "NNODES": "2",
    "NODE_RANK": "1",
}


def find_settings(environ: dict[str, str]) -> Settings | None:
    with mock.patch.dict(os.environ, environ, clear=True):
        return environment.find_settings()


def starts_first(environ: dict[str, str]) -> bool:
    with mock.patch.dict(os.environ, environ, clear=True):
        return environment.starts_first()


def start(environ: dict[str, str]) -> None:
    with mock.patch.dict(os.environ, environ, clear=True):
        meeting.initialize()


@pytest.mark.parametrize(
    "environ",
    [
        {},
        {"SLURM_JOB_ID": "1", "SLURM_NTASKS": "4"},  # a batch script, outside srun
        {**SLURM, "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"},  # a shell
        {**EXPLICIT, "JAX_NUM_PROCESSES": "1", "JAX_PROCESS_ID": "0"},
        {**EXPLICIT, **SLURM, "SAMROBUST_DISTRIBUTED": "off"},
        {"KUBERNETES_SERVICE_HOST": "10.0.0.1"},
        {"NNODES": "2", "NODE_RANK": "1"},  # names that others use too
        {**SKYPILOT, "SKYPILOT_NUM_NODES": "1", "SKYPILOT_NODE_RANK": "0"},
    ],
)
def test_a_process_that_is_alone_stays_so(environ):
    assert find_settings(environ) is None


def test_explicit_variables_win():
    environ = {**SLURM, **EXPLICIT, "JAX_LOCAL_DEVICE_IDS": "0,2"}
    assert find_settings(environ) == Settings("node1:1234", 4, 3, (0, 2))


def test_a_slurm_step_needs_no_variable_of_ours():
    assert find_settings(SLURM) == Settings("gpu07:61441", 6, 3, (1,))


@pytest.mark.parametrize(
    ("environ", "settings"),
    [
        (OPEN_MPI, Settings("node1:1234", 4, 3, (1,))),
        ({**SLURM, **OPEN_MPI}, Settings("node1:1234", 4, 3, (1,))),  # mpirun in a job
        (SKYPILOT, Settings("10.0.0.5:8476", 2, 1, None)),
        (
            {**SKYPILOT, "JAX_COORDINATOR_PORT": "999"},
            Settings("10.0.0.5:999", 2, 1, None),
        ),
        (XPK, Settings("sam-slice-job-0-0.sam:6002", 2, 1, None)),
        ({**XPK, **EXPLICIT}, Settings("node1:1234", 4, 3, None)),
    ],
)
def test_what_other_launchers_say_is_understood(environ, settings):
    assert find_settings(environ) == settings


def test_two_slurm_jobs_meet_at_different_ports():
    addresses = {
        find_settings({**SLURM, "SLURM_JOB_ID": job}).address  # type: ignore[union-attr]
        for job in ("1", "2", "4095")
    }
    assert len(addresses) == 3
    assert all(61440 <= int(a.rpartition(":")[2]) < 65536 for a in addresses)


@pytest.mark.parametrize(
    ("more", "address"),
    [
        ({"JAX_COORDINATOR_PORT": "999"}, "gpu07:999"),
        ({"JAX_COORDINATOR_ADDRESS": "10.0.0.7:5"}, "10.0.0.7:5"),
        (
            {"JAX_COORDINATOR_ADDRESS": "gpu07-ib", "JAX_COORDINATOR_PORT": "5"},
            "gpu07-ib:5",
        ),
    ],
)
def test_where_slurm_tasks_meet_can_be_chosen(more, address):
    settings = find_settings({**SLURM, **more})
    assert settings is not None
    assert settings.address == address


@pytest.mark.parametrize(
    ("more", "devices"),
    [
        ({"SLURM_STEP_TASKS_PER_NODE": "1(x6)"}, None),  # a task a node: all GPUs
        ({"CUDA_VISIBLE_DEVICES": "0,1"}, (1,)),  # a GPU a task
        ({"CUDA_VISIBLE_DEVICES": "0,1,2,3"}, (2, 3)),
        ({"CUDA_VISIBLE_DEVICES": "5"}, (0,)),  # bound by --gpus-per-task
        ({"CUDA_VISIBLE_DEVICES": "0,1,2"}, (1,)),
        ({"JAX_LOCAL_DEVICE_IDS": "0,1,2,3"}, (0, 1, 2, 3)),
        ({"SLURM_STEP_TASKS_PER_NODE": "2,1,3"}, None),
        ({"SLURM_STEP_TASKS_PER_NODE": "1,4(x2)", "SLURM_LOCALID": "3"}, (3,)),
    ],
)
def test_the_gpus_of_a_node_are_shared_among_its_tasks(more, devices):
    settings = find_settings({**SLURM, **more})
    assert settings is not None
    assert settings.local_device_ids == devices


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        ({"JAX_NUM_PROCESSES": "2"}, r"Expected all of JAX_.*, got given=\['JAX_NUM"),
        ({"JAX_COORDINATOR_ADDRESS": "a:1"}, "or none outside a SLURM step"),
        (
            {**EXPLICIT, "JAX_PROCESS_ID": "4"},
            "0 <= process < processes, got process=4",
        ),
        ({**EXPLICIT, "JAX_PROCESS_ID": "x"}, "a whole number, got JAX_PROCESS_ID='x'"),
        ({**EXPLICIT, "JAX_COORDINATOR_ADDRESS": "node1"}, "Expected HOST:PORT"),
        ({**SLURM, "JAX_COORDINATOR_ADDRESS": "gpu07"}, "got JAX_COO.*='gpu07'"),
        ({**OPEN_MPI, "JAX_COORDINATOR_ADDRESS": ""}, "Expected HOST:PORT, of process"),
        ({**EXPLICIT, "JAX_LOCAL_DEVICE_IDS": "0;1"}, "numbers separated by commas"),
        ({"SAMROBUST_HEARTBEAT_SECONDS": "0"}, "1 <= SAMROBUST_HEARTBEAT_SECONDS"),
        ({"SAMROBUST_HEARTBEAT_SECONDS": "1.5"}, "a whole number"),
        ({"SAMROBUST_HEARTBEAT_SECONDS": "9" * 5000}, "a whole number, got SAMR"),
        ({"SAMROBUST_MEETING_SECONDS": "604801"}, "got SAMROBUST_MEETING_SECONDS=6048"),
        ({"SAMROBUST_DISTRIBUTED": "no"}, "got SAMROBUST_DISTRIBUTED='no'"),
    ],
)
def test_variables_that_contradict_each_other_are_refused(environ, message):
    with pytest.raises(ValueError, match=message):
        start(environ)


def test_no_second_meeting(monkeypatch):
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
    start({**EXPLICIT, "JAX_PROCESS_ID": "not read"})


def test_a_process_that_waits_in_vain_says_for_whom_and_what_to_check():
    group = helpers.start_command_group(
        2,
        *("train", "--config=configs/digits.py:st", "--workdir=/nowhere"),
        SAMROBUST_MEETING_SECONDS="4",
    )
    group[0].kill()
    code, _, errors = helpers.finish_group(group)[1]
    assert code != 0
    assert "Still waiting for the other processes at 127.0.0.1:" in errors
    assert "Check that all of them were started" in errors


def test_a_signal_ends_a_process_that_waits():
    group = helpers.start_command_group(
        2,
        *("train", "--config=configs/digits.py:st", "--workdir=/nowhere"),
        SAMROBUST_MEETING_SECONDS="10",
    )
    group[0].kill()
    lonely = group[1]
    assert lonely.stderr is not None
    while "Still waiting" not in lonely.stderr.readline():
        assert lonely.poll() is None
    lonely.terminate()
    assert lonely.wait(timeout=300) == -signal.SIGTERM
    for process in group:
        process.communicate()


def test_a_port_that_is_taken_is_named_before_jax_ends_without_a_word():
    with socket.create_server(("", 0)) as other:
        address = f"127.0.0.1:{other.getsockname()[1]}"
        environ = {**EXPLICIT, "JAX_COORDINATOR_ADDRESS": address}
        message = rf"at {address}, got: .*in use.*port is free"
        with pytest.raises(DistributedError, match=message):
            start({**environ, "JAX_PROCESS_ID": "0"})


def test_own_code_that_computes_while_it_is_imported_is_no_late_process():
    jax.devices()  # as an array at the top of a module does
    with pytest.raises(ValueError, match="Own code must not compute with JAX"):
        start(EXPLICIT)


@pytest.mark.parametrize("platforms", ["cuda,cpu", "cuda"])
def test_a_missing_driver_is_an_error_and_no_run_on_the_cpu(tmp_path, platforms):
    if hardware_utils.has_visible_nvidia_gpu():
        pytest.skip("there is a driver")
    code, _, errors = helpers.run_command(
        *("train", "--config=configs/digits.py:st", f"--workdir={tmp_path / 'run'}"),
        JAX_PLATFORMS=platforms,
    )
    assert code == 2
    assert "Expected a device that JAX can use, got JAX_PLATFORMS=" in errors
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("victim", [0, 1])
def test_a_process_without_a_device_ends_all_soon(tmp_path, victim):
    """The others wait for its devices, two minutes by JAX."""
    if hardware_utils.has_visible_nvidia_gpu():
        pytest.skip("there is a driver")
    program = [sys.executable, "-m", "samrobust.cli", "train"]
    program += ["--config=configs/digits.py:st", f"--workdir={tmp_path / 'run'}"]
    platforms = ["cuda" if number == victim else "cpu" for number in range(2)]
    outcomes = helpers.finish_group(
        helpers.start_group(
            [["env", f"JAX_PLATFORMS={p}", *program] for p in platforms]
        )
    )
    assert [code for code, *_ in outcomes] == [2, 2], outcomes
    assert "error: Expected a device that JAX can use" in outcomes[victim][2]
    assert f"process {victim} failed: Expected a device" in outcomes[1 - victim][2]


def test_devices_that_another_process_does_not_name_are_no_bad_input(monkeypatch):
    def fail():
        raise RuntimeError("Getting local topologies failed: GetKeyValue() timed out")

    monkeypatch.setattr(jax, "default_backend", fail)
    monkeypatch.setattr(meeting, "is_joined", lambda: True)
    with pytest.raises(
        DistributedError, match="devices of all processes, got: Getting"
    ):
        meeting.check_platform()


def test_what_one_process_does_alone_is_done_by_process_0():
    assert starts_first({})
    assert starts_first({**EXPLICIT, "JAX_PROCESS_ID": "0"})
    assert not starts_first(EXPLICIT)
    assert not starts_first(SLURM)
