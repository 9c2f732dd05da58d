"""launch/slurm on a real SLURM: two nodes, arrays, preemption, requeue, exit codes."""

import dataclasses
import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path

import helpers
import launch_runs
import pytest
import slurm_cluster

from samrobust.system.distributed.environment import _first_host

FOLDER = helpers.ROOT / "launch" / "slurm"
TRAIN, SWEEP = FOLDER / "train.sbatch", FOLDER / "sweep.sh"
ROWS = ("st", "sam,rho=0.2")
# Ends with the code that a file says; SIGTERM gives 75, as samrobust does.
STAND_IN = """#!/bin/bash
show=(SLURM_PROCID SLURM_NTASKS CUDA_VISIBLE_DEVICES JAX_LOCAL_DEVICE_IDS JAX_PLATFORMS)
show+=(SAMROBUST_DISTRIBUTED)
for name in "${show[@]}"; do echo -n "$name=${!name-unset} "; done
trap 'kill $!; echo stopped; exit 75' TERM
echo "arguments=$*"
while [ "$1" = wait ]; do sleep 60 & wait; done # sleep may meet SIGTERM first
[[ "$1" != [a-z]* ]] || exit $((SLURM_PROCID == 3))
exit "$1"
"""


@dataclasses.dataclass
class Site:
    """A cluster with a shared folder, and a `samrobust` in it."""

    cluster: slurm_cluster.Cluster
    folder: Path
    stand_in: Path
    real: Path

    def submit(
        self, *options: str, arguments: tuple[str, ...], real: bool = False, **more: str
    ) -> str:
        """Submits train.sbatch; gives the job."""
        fixed = ("--parsable", "--output=%j.log", "--cpus-per-task=1")
        return self.cluster.run(
            *("sbatch", *fixed, *options, TRAIN, *arguments),
            cwd=self.folder,
            **{"SAMROBUST_ENV": str(self.real if real else self.stand_in), **more},
        )

    def log(self, job: str) -> str:
        path = self.folder / f"{job}.log"
        return path.read_text() if path.exists() else ""

    def end(self, job: str) -> str:
        """The exit code of a job that has ended for good."""
        states = ("COMPLETED", "FAILED", "CANCELLED")
        return self.cluster.wait(job, *states)["ExitCode"]

    def wait_for_log(self, job: str, text: str, count: int = 1) -> None:
        slurm_cluster.wait_until(
            lambda: self.log(job).count(text) >= count, self.cluster, self.log(job)
        )


def write_environment(folder: Path, text: str | None) -> Path:
    """A file to source, as of a virtual environment."""
    programs = launch_runs.write_command(folder)
    if text is not None:
        (programs / "samrobust").write_text(text)
    (folder / "activate").write_text(f'PATH="{programs}:$PATH"\n')
    return folder / "activate"


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Iterator[Site]:
    if reason := slurm_cluster.why_not():
        pytest.skip(reason)
    folder = tmp_path_factory.mktemp("shared")
    stand_in = write_environment(folder / "stand-in", STAND_IN)
    real = write_environment(folder / "real", None)
    with slurm_cluster.start_cluster(tmp_path_factory.mktemp("slurm")) as cluster:
        yield Site(cluster, folder, stand_in, real)


def fields(log: str) -> list[dict[str, str]]:
    """What each process of the stand-in saw."""
    lines = [line for line in log.splitlines() if line.startswith("SLURM_PROCID=")]
    return [dict(word.split("=", 1) for word in line.split()) for line in sorted(lines)]


def test_one_process_a_node_has_all_its_gpus(site):
    job = site.submit("--nodes=2", "--gpus-per-node=2", arguments=("0",))
    assert site.end(job) == "0:0"
    seen = fields(site.log(job))
    assert [one["SLURM_PROCID"] for one in seen] == ["0", "1"]
    assert {one["SLURM_NTASKS"] for one in seen} == {"2"}
    assert {one["JAX_LOCAL_DEVICE_IDS"] for one in seen} == {"0,1"}
    assert {one["CUDA_VISIBLE_DEVICES"] for one in seen} == {"0,1"}
    assert {one["JAX_PLATFORMS"] for one in seen} == {"cuda,cpu"}
    assert "1 CPUs for 2 GPUs: better --cpus-per-task=16" in site.log(job)


def test_one_process_a_gpu_sees_the_gpus_of_its_peers(site):
    job = site.submit(
        *("--nodes=2", "--gpus-per-node=2", "--cpus-per-task=2"),
        arguments=("0",),
        SAMROBUST_PROCESS_PER="gpu",
    )
    assert site.end(job) == "0:0"
    seen = fields(site.log(job))
    assert [one["SLURM_PROCID"] for one in seen] == ["0", "1", "2", "3"]
    assert {one["JAX_LOCAL_DEVICE_IDS"] for one in seen} == {"unset"}
    assert {one["CUDA_VISIBLE_DEVICES"] for one in seen} == {"0,1"}


@pytest.mark.parametrize("command", ["table", "recheck"])
def test_one_run_a_gpu_sees_that_one_alone(site, command):
    job = site.submit(
        *("--nodes=2", "--gpus-per-node=2", "--cpus-per-task=2"),
        arguments=(command,),
        SAMROBUST_PROCESS_PER="run",
    )
    assert site.end(job) == "1:0"
    seen = fields(site.log(job))
    assert sorted(one["CUDA_VISIBLE_DEVICES"] for one in seen) == ["0", "0", "1", "1"]
    assert {one["SAMROBUST_DISTRIBUTED"] for one in seen} == {"off"}


def test_nodes_without_gpus_need_no_other_script(site):
    options = ("--nodes=2", "--gpus-per-node=0")
    job = site.submit(*options, arguments=("0",), JAX_PLATFORMS="cpu")
    assert site.end(job) == "0:0"
    seen = fields(site.log(job))
    assert [one["JAX_LOCAL_DEVICE_IDS"] for one in seen] == ["unset", "unset"]
    assert [one["JAX_PLATFORMS"] for one in seen] == ["cpu", "cpu"]


def test_the_file_that_is_sourced_may_read_variables_that_are_not_set(site):
    conda = site.folder / "conda.sh"
    conda.write_text(f'[ -n "$CONDA_SHLVL_BACKUP" ]\n. {site.stand_in}\n')
    job = site.submit("--gpus-per-node=0", arguments=("0",), SAMROBUST_ENV=str(conda))
    assert site.end(job) == "0:0"
    assert len(fields(site.log(job))) == 1


def test_a_container_is_entered_by_srun_or_by_a_command(site):
    job = site.submit(
        "--gpus-per-node=0",
        arguments=("0",),
        SAMROBUST_ENV="none",
        SAMROBUST_SRUN="--export=ALL,INSIDE=yes",
        SAMROBUST_EXEC=f"env PATH={site.stand_in.parent}:/usr/bin:/bin",
    )
    assert site.end(job) == "0:0", site.log(job)
    assert len(fields(site.log(job))) == 1


@pytest.mark.parametrize("nodes", ["rack[1-2]node[3-4,9],rack7", "a[07-09],b", "n1"])
def test_the_first_host_is_the_one_that_slurm_names(site, nodes):
    names = site.cluster.run("scontrol", "show", "hostnames", nodes)
    assert _first_host(nodes) == names.split()[0]


@pytest.mark.parametrize(
    ("options", "environment", "message"),
    [
        (("--gpus-per-task=1",), {}, "Expected no --gpus-per-task"),
        ((), {"SAMROBUST_PROCESS_PER": "rack"}, "Expected node, gpu or run, got "),
        (
            ("--gpus-per-node=2",),
            {"SAMROBUST_PROCESS_PER": "run"},  # of no table
            "Expected --gpus-per-node and a table",
        ),
        (
            ("--gpus-per-node=2",),
            {"SAMROBUST_PROCESS_PER": "gpu"},
            "Expected --cpus-per-task >= 2",
        ),
    ],
)
def test_what_jax_cannot_use_is_refused(site, options, environment, message):
    job = site.submit("--nodes=1", *options, arguments=("0",), **environment)
    assert site.end(job) == "2:0"
    assert f"train.sbatch: error: {message}" in site.log(job)
    assert not fields(site.log(job))


@pytest.mark.parametrize("code", [0, 1, 2])
def test_a_run_that_is_done_or_failed_is_not_started_again(site, code):
    job = site.submit(arguments=(str(code),))
    assert site.end(job) == f"{code}:0"
    assert "requeued" not in site.log(job)


def test_a_crash_is_started_again_a_bounded_number_of_times(site):
    job = site.submit(arguments=("134",), SAMROBUST_MAX_RESTARTS="1")
    site.cluster.hasten(job)
    assert site.end(job) == "134:0"
    assert site.log(job).count("crashed (exit code 134); to be requeued") == 1
    assert len(fields(site.log(job))) == 2


def test_a_process_that_sigterm_met_before_it_listened_is_started_again(site):
    job = site.submit(arguments=("143",), SAMROBUST_MAX_RESTARTS="0")
    site.wait_for_log(job, "train.sbatch: stopped; to be requeued")
    assert site.cluster.wait(job, "PENDING")["Restarts"] == "1"
    site.cluster.run("scancel", job)


@pytest.mark.parametrize("whom", ["--batch", "--quiet"])
def test_sigterm_to_the_shell_or_the_processes_stops_and_requeues(site, whom):
    job = site.submit("--nodes=2", arguments=("wait",))
    site.wait_for_log(job, "arguments=wait", 2)
    site.cluster.run("scancel", "--signal=TERM", whom, job)
    site.cluster.hasten(job)
    site.wait_for_log(job, "arguments=wait", 4)
    assert site.log(job).count("stopped\n") == 2
    assert site.log(job).count("train.sbatch: stopped; to be requeued") == 1
    site.cluster.run("scancel", job)


def test_a_job_that_is_cancelled_stays_cancelled(site):
    job = site.submit("--nodes=2", arguments=("wait",))
    site.wait_for_log(job, "arguments=wait", 2)
    site.cluster.run("scancel", job)
    site.cluster.wait(job, "CANCELLED")  # and no longer COMPLETING: the script is over
    assert site.cluster.job(job)["JobState"] == "CANCELLED"
    assert "requeued" not in site.log(job)


def test_an_index_of_an_array_is_requeued_alone(site):
    job = site.submit("--array=3,5", arguments=("wait", "{index}/9"))
    logs = [job, f"{int(job) + 1}"]
    for each in logs:
        site.wait_for_log(each, "arguments=wait")
    text = "".join(map(site.log, logs))
    assert "arguments=wait 3/9" in text
    assert "arguments=wait 5/9" in text
    site.cluster.run("scancel", "--signal=TERM", f"{job}_5")
    site.cluster.wait(f"{job}_5", "PENDING")
    assert site.cluster.job(f"{job}_3")["JobState"] == "RUNNING"
    site.cluster.run("scancel", job)


def real_environment(*, port: bool = True) -> dict[str, str]:
    settings = launch_runs.environment()
    if port:  # JAX derives it from the job's number, which other tests use as well
        settings["JAX_COORDINATOR_PORT"] = str(launch_runs.free_port())
    return settings


@pytest.mark.slow
def test_a_job_of_two_nodes_that_is_preempted_ends_bit_identical(site):
    workdir = site.folder / "runs" / "at"
    job = site.submit(
        *("--nodes=2", "--gpus-per-node=0"),
        arguments=tuple(launch_runs.train(workdir, epochs=12)),  # SLURM takes its time
        real=True,
        **real_environment(),
    )
    launch_runs.wait_for_checkpoint(workdir)
    other = site.cluster.run(
        *("sbatch", "--parsable", "--partition=high", "--nodes=2", "--exclusive"),
        *("--output=/dev/null", "--wrap=true"),
    )
    site.end(other)
    assert site.log(job).count("train.sbatch: stopped; to be requeued") == 1
    stopped_at = helpers.checkpoint_steps(workdir)[-1]
    assert not (workdir / "result.json").exists()
    site.cluster.hasten(job)
    assert site.end(job) == "0:0", site.log(job)
    assert f"step {stopped_at} of" in site.log(job)
    launch_runs.assert_same_run(workdir)


@pytest.mark.slow
def test_a_table_as_an_array_equals_the_one_of_a_single_process(site):
    rows = [f"--rows={row}" for row in ROWS]
    config = f"--config={helpers.ROOT}/configs/digits.py"
    flags = helpers.make_flags({"training.epochs": 1, "evaluation.linf": ()})
    table = [config, "--seeds=2", *rows, *flags]
    folders = [site.folder / "tables" / name for name in ("array", "single")]
    said = site.cluster.run(
        *(SWEEP, "--gpus-per-node=0", "--cpus-per-task=1", "--array-limit=2", "--"),
        *(*table, f"--workdir={folders[0]}"),
        cwd=site.folder,
        SAMROBUST_ENV=str(site.real),
        **real_environment(port=False),
    )
    assert said.startswith("4 runs: job ")
    code, _, errors = helpers.run_command(
        "table", *table, f"--workdir={folders[1]}", **real_environment(port=False)
    )
    assert code == 0, errors
    last = said.split()[-1]
    assert site.end(last) == "0:0"
    assert "gres/gpu" not in site.cluster.job(last).get("TRES", "")
    array, single = ((f / "table.csv").read_text() for f in folders)
    assert array == single  # every mean and deviation; the costs are in table.md
    assert len(list(folders[0].rglob("result.json"))) == 4


def test_a_sweep_says_what_it_needs(site):
    def refused(*arguments: str) -> str:
        with pytest.raises(AssertionError) as caught:
            site.cluster.run(SWEEP, *arguments, SAMROBUST_ENV=str(site.real))
        return str(caught.value)

    assert "Expected '--' between the options" in refused("--workdir=/tmp/a")
    assert "Expected --workdir=DIR" in refused("--", "--seeds=2")


def test_the_scripts_can_be_started():
    assert os.stat(SWEEP).st_mode & stat.S_IXUSR
    assert json.dumps(TRAIN.read_text().splitlines()[0]) == '"#!/bin/bash"'
