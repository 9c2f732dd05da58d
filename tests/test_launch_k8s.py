"""launch/k8s: what is rendered is a valid JobSet, and its pods run as one.

The JobSet is checked strictly against the schemas of Kubernetes and of JobSet, without
a cluster; then each pod's environment is resolved as a cluster would, and its command
runs here.
"""

import concurrent.futures
import re
import subprocess
import sys
from typing import Any

import helpers
import launch_runs
import pytest
import yaml

RENDER = helpers.ROOT / "launch" / "k8s" / "render.py"
GPU = ("--accelerator=gpu", "--nodes=2", "--gpus-per-node=8")
H100 = ("--accelerator=nvidia-h100-80gb", "--node-selector=pool=big")
TPU = ("--accelerator=tpu-v5-lite-podslice", "--topology=4x4")
ONE_HOST = ("--accelerator=tpu-v6e-slice", "--topology=2x4", "--chips-per-node=8")
# All that has no effect by default.
RICH = (
    *("--accelerator=gpu", "--cpus=12", "--memory=90Gi", "--queue=team"),
    *("--service-account=robot", "--pull-secret=registry"),
    *("--env=WANDB_MODE=offline", "--env=NOTE=a=$(b)"),
)
each_kind = pytest.mark.parametrize("options", [GPU, H100, TPU, ONE_HOST, RICH])
SWEEPS = [
    (*H100, "--sweep=12", "--at-once=4"),
    (*ONE_HOST, "--sweep=12", "--max-restarts=7"),
]


def call(*options: str, command: tuple[str, ...] = ("train",)) -> tuple[int, str, str]:
    words = [sys.executable, str(RENDER), "--image=example.org/samrobust:1", *options]
    done = subprocess.run([*words, "--", *command], capture_output=True, text=True)
    return done.returncode, done.stdout, done.stderr


def render(*options: str, command: tuple[str, ...] = ("train",)) -> dict[str, Any]:
    code, output, errors = call(*options, command=command)
    assert (code, errors) == (0, "")
    return yaml.safe_load(output)


def job_of(jobset: dict[str, Any]) -> dict[str, Any]:
    """The specification of the only Job."""
    (replicated,) = jobset["spec"]["replicatedJobs"]
    assert replicated["replicas"] == 1
    return replicated["template"]["spec"]


def container_of(jobset: dict[str, Any]) -> dict[str, Any]:
    (container,) = job_of(jobset)["template"]["spec"]["containers"]
    return container


def expand(text: str, known: dict[str, str]) -> str:
    """Kubernetes' rule: $(NAME) of a name defined before, $$ for a dollar."""
    rule = r"\$(?:(\$)|\((\w+)\))"
    return re.sub(rule, lambda m: m[1] or known.get(m[2], m[0]), text)


def resolve_pod(jobset: dict[str, Any], index: int) -> tuple[dict[str, str], list[str]]:
    """Environment and command of a pod, as the cluster makes them."""
    container = container_of(jobset)
    annotations = {
        "batch.kubernetes.io/job-completion-index": str(index),
        "jobset.sigs.k8s.io/jobset-name": jobset["metadata"]["name"],
    }
    known: dict[str, str] = {}
    for item in container["env"]:
        if "value" in item:
            known[item["name"]] = expand(item["value"], known)
        else:
            path = item["valueFrom"]["fieldRef"]["fieldPath"]
            known[item["name"]] = annotations[path.split("'")[1]]
    words = [*container["command"], *container["args"]]
    return known, [expand(word, known) for word in words]


def command_of(options: tuple[str, ...]) -> tuple[str, ...]:
    return ("table", "--seeds=3") if options in SWEEPS else ("train",)


@pytest.mark.parametrize("options", [GPU, H100, TPU, ONE_HOST, RICH, *SWEEPS])
def test_kubernetes_would_accept_the_job(options):
    validate = pytest.importorskip("kubernetes_validate").validate
    job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "worker"}}
    job["spec"] = job_of(render(*options, command=command_of(options)))
    validate(job, "1.33", strict=True)
    job["spec"]["template"]["spec"]["containers"][0]["comand"] = []
    with pytest.raises(Exception, match="comand"):
        validate(job, "1.33", strict=True)


@pytest.mark.parametrize("options", [GPU, H100, TPU, ONE_HOST, RICH, *SWEEPS])
def test_jobset_would_accept_the_jobset(options):
    models = pytest.importorskip("kubeflow_trainer_api.models")
    rendered = render(*options, command=command_of(options))
    model = models.JobsetV1alpha2JobSet.from_dict(rendered)
    assert model.to_dict() == rendered  # nothing unknown, nothing misspelt


def test_kubernetes_would_accept_the_volume():
    validate = pytest.importorskip("kubernetes_validate").validate
    volume = yaml.safe_load(RENDER.with_name("volume.yaml").read_text())
    validate(volume, "1.33", strict=True)
    spec = job_of(render(*GPU))["template"]["spec"]
    claims = [
        v["persistentVolumeClaim"] for v in spec["volumes"] if v["name"] == "work"
    ]
    assert claims == [{"claimName": volume["metadata"]["name"]}]


@each_kind
def test_a_rule_of_the_failure_policy_has_a_name_that_jobset_takes(options):
    policy = render(*options)["spec"]["failurePolicy"]
    for rule in policy["rules"]:
        assert re.fullmatch(r"[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?", rule["name"])


@each_kind
def test_what_would_fail_again_ends_the_jobset_and_all_else_starts_it_again(options):
    jobset = render(*options, "--max-restarts=7")
    job, policy = job_of(jobset), jobset["spec"]["failurePolicy"]
    (pod_rule,), (rule,) = job["podFailurePolicy"]["rules"], policy["rules"]
    assert pod_rule["action"] == "FailJob"
    assert pod_rule["onExitCodes"]["values"] == [1, 2]
    assert pod_rule["onExitCodes"]["containerName"] == container_of(jobset)["name"]
    assert rule["action"] == "FailJobSet"
    assert rule["onJobFailureReasons"] == ["PodFailurePolicy"]
    assert (job["backoffLimit"], policy["maxRestarts"]) == (0, 7)
    assert job["template"]["spec"]["restartPolicy"] == "Never"


@pytest.mark.parametrize("options", SWEEPS)
def test_each_share_of_a_table_is_a_pod_that_starts_again_alone(options):
    jobset = render(*options, command=("table", "--seeds=3"))
    job = job_of(jobset)
    at_once, restarts = (4, 50) if options is SWEEPS[0] else (12, 7)
    assert (job["completions"], job["parallelism"]) == (12, at_once)
    assert job["backoffLimitPerIndex"] == restarts
    assert "backoffLimit" not in job
    assert "failurePolicy" not in jobset["spec"]  # would start all of them again
    bad_input, failed, preempted = job["podFailurePolicy"]["rules"]
    assert (bad_input["action"], bad_input["onExitCodes"]["values"]) == ("FailJob", [2])
    assert (failed["action"], failed["onExitCodes"]["values"]) == ("FailIndex", [1])
    assert preempted["action"] == "Ignore"  # counts for nothing
    environment, command = resolve_pod(jobset, 3)
    assert command == ["samrobust", "table", "--seeds=3", "--shard=3/12"]
    assert not any(name.startswith("JAX_COORD") for name in environment)


def test_pods_that_judge_the_runs_of_a_table_take_what_none_holds():
    jobset = render(*H100, "--sweep=4", command=("recheck", "--workdir=runs/cifar10"))
    assert job_of(jobset)["completions"] == 4
    _, command = resolve_pod(jobset, 3)
    assert command == ["samrobust", "recheck", "--workdir=runs/cifar10"]


@each_kind
def test_a_pod_has_time_to_save_and_its_files_outlive_it(options):
    jobset = render(*options)
    spec, container = job_of(jobset)["template"]["spec"], container_of(jobset)
    assert spec["terminationGracePeriodSeconds"] >= 120
    mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
    volumes = {volume["name"]: volume for volume in spec["volumes"]}
    assert "persistentVolumeClaim" in volumes[mounts[container["workingDir"]]]
    shm = {"medium": "Memory", "sizeLimit": "4Gi"}
    assert volumes[mounts["/dev/shm"]]["emptyDir"] == shm
    environment, _ = resolve_pod(jobset, 0)
    for name in ("XDG_CACHE_HOME", "TFDS_DATA_DIR"):
        assert environment[name].startswith(container["workingDir"])


@pytest.mark.parametrize(
    ("options", "nodes", "limits"),
    [
        (GPU, 2, {"nvidia.com/gpu": 8}),
        (H100, 1, {"nvidia.com/gpu": 1}),
        (TPU, 4, {"google.com/tpu": 4}),
        (ONE_HOST, 1, {"google.com/tpu": 8}),
        ((TPU[0], "--topology=1x1"), 1, {"google.com/tpu": 1}),
        (
            ("--accelerator=tpu-v4-podslice", "--topology=2x2x4"),
            4,
            {"google.com/tpu": 4},
        ),
    ],
)
def test_every_node_gives_one_pod_all_its_devices(options, nodes, limits):
    jobset = render(*options)
    job = job_of(jobset)
    assert (job["completions"], job["parallelism"]) == (nodes, nodes)
    assert container_of(jobset)["resources"]["limits"] == limits


def test_the_nodes_are_chosen_by_their_labels():
    selectors = [
        job_of(render(*options))["template"]["spec"].get("nodeSelector", {})
        for options in (GPU, H100, TPU)
    ]
    gke = "cloud.google.com/gke"
    assert selectors == [
        {},
        {f"{gke}-accelerator": "nvidia-h100-80gb", "pool": "big"},
        {
            f"{gke}-tpu-accelerator": "tpu-v5-lite-podslice",
            f"{gke}-tpu-topology": "4x4",
        },
    ]


def test_what_a_cluster_wants_to_know_is_told():
    jobset = render(*RICH)
    spec, container = job_of(jobset)["template"]["spec"], container_of(jobset)
    assert jobset["metadata"]["labels"] == {"kueue.x-k8s.io/queue-name": "team"}
    assert spec["serviceAccountName"] == "robot"
    assert spec["imagePullSecrets"] == [{"name": "registry"}]
    assert container["resources"]["requests"] == {"cpu": 12, "memory": "90Gi"}
    environment, _ = resolve_pod(jobset, 0)
    assert environment["WANDB_MODE"] == "offline"
    assert environment["NOTE"] == "a=$(b)"


def test_a_pod_asks_for_what_its_devices_need_and_for_no_more():
    jobset = render(*GPU)
    requests = container_of(jobset)["resources"]["requests"]
    assert requests == {"cpu": 16, "memory": "64Gi"}
    assert jobset["spec"]["ttlSecondsAfterFinished"] > 0
    assert job_of(jobset)["template"]["spec"]["securityContext"] == {
        "runAsUser": 1000,
        "fsGroup": 1000,
        "fsGroupChangePolicy": "OnRootMismatch",
    }


@pytest.mark.parametrize(("options", "device"), [(GPU, "cuda"), (TPU, "tpu")])
def test_a_node_without_its_driver_is_an_error(options, device):
    environment, _ = resolve_pod(render(*options), 0)
    assert environment["JAX_PLATFORMS"] == f"{device},cpu"


def test_arguments_arrive_as_they_were_written():
    words = (
        "train",
        "--config=a.py:sam,rho=0.2",
        "a b",
        '"',
        "'",
        "$(HOME)",
        "$$",
        "é",
    )
    for options in (GPU, TPU):
        _, command = resolve_pod(render(*options, command=words), 0)
        assert command == ["samrobust", *words]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((*TPU, "--nodes=2"), "Expected no --nodes with --accelerator=tpu-v5"),
        ((*GPU, "--topology=2x2"), "Expected no --topology with --accelerator=gpu."),
        ((TPU[0],), "Expected --topology=AxB or AxBxC, got ''."),
        ((TPU[0], "--topology=4x"), "got '4x'."),
        ((*TPU, "--chips-per-node=3"), "Expected a divisor of the slice's 16 chips"),
        (("--accelerator=gpu", "--nodes=0"), "Expected --nodes >= 1, got 0."),
        ((*GPU, "--name=Sam"), "got --name=Sam."),
        ((*GPU, "--sweep=2"), "a node for each share, got 2 nodes and train."),
        ((*H100, "--sweep=2"), "Expected table, recheck, curves, sharpness with --sw"),
        ((*H100, "--at-once=2"), "Expected --sweep with --at-once."),
        ((*GPU, f"--name={'a' * 41}"), "Expected at most 40 small letters"),
        (
            (*GPU, "--node-selector=spot"),
            "Expected NAME=VALUE, got --node-selector=spot.",
        ),
        ((*GPU, "--env==1"), "Expected NAME=VALUE, got --env==1."),
    ],
)
def test_what_does_not_fit_together_is_refused(options, message):
    code, output, errors = call(*options)
    assert (code, output) == (2, "")
    assert message in errors


def test_the_pods_of_gpu_nodes_agree_on_the_coordinator():
    jobset = render(*GPU, "--name=sam")
    pods = [resolve_pod(jobset, index)[0] for index in range(2)]
    # The host name that JobSet gives the first pod of the first job.
    address = {"JAX_COORDINATOR_ADDRESS": "sam-worker-0-0.sam:1234"}
    for index, pod in enumerate(pods):
        told = {k: v for k, v in pod.items() if re.match("JAX_(CO|NUM|PRO)", k)}
        identity = {"JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": str(index)}
        assert told == {**address, **identity}


def test_the_workers_of_a_slice_find_each_other_as_jax_does_on_gke(monkeypatch):
    """GKE adds two variables to a pod that asks for chips: ours must not disturb."""
    clusters = pytest.importorskip("jax._src.clusters.cloud_tpu_cluster")
    jobset = render(*TPU)
    hosts = [f"samrobust-worker-0-{index}.samrobust" for index in range(4)]
    monkeypatch.setattr(clusters, "running_in_cloud_tpu_vm", True)
    monkeypatch.setattr(clusters.socket, "gethostbyname", lambda _: "127.0.0.1")
    # Set by GKE for a single slice: no MEGASCALE_*.
    monkeypatch.setattr(clusters, "get_tpu_env_value_from_metadata", lambda _: None)
    for index in range(4):
        pod, _ = resolve_pod(jobset, index)
        assert [name for name in pod if name.startswith("JAX_")] == ["JAX_PLATFORMS"]
        monkeypatch.setenv("TPU_WORKER_ID", str(index))
        monkeypatch.setenv("TPU_WORKER_HOSTNAMES", ",".join(hosts))
        for name, value in pod.items():
            monkeypatch.setenv(name, value)
        gke = clusters.GkeTpuCluster
        assert gke.is_env_present()
        assert gke.get_coordinator_address(1, None).startswith(f"{hosts[0]}:")
        assert (gke.get_process_count(), gke.get_process_id()) == (4, index)


@pytest.mark.slow
def test_the_pods_of_two_nodes_run_as_one(tmp_path):
    options = ("--accelerator=gpu", "--nodes=2")
    command = launch_runs.train("runs/at", checkpoint_minutes=10)
    jobset = render(*options, command=tuple(command))
    volume = helpers.make_folder(tmp_path / "work")
    path = launch_runs.write_command(tmp_path / "bin")
    port = launch_runs.free_port()

    def run_pod(index: int) -> tuple[int, str]:
        environment, command = resolve_pod(jobset, index)
        # The cluster's name service and the volume's mount, here on loopback.
        mounted = {k: v.replace("/work", f"{volume}") for k, v in environment.items()}
        mounted["JAX_COORDINATOR_ADDRESS"] = f"127.0.0.1:{port}"
        del mounted["JAX_PLATFORMS"]
        done = subprocess.run(
            command,
            env={
                **launch_runs.environment(),
                **mounted,
                "PATH": f"{path}:/usr/bin:/bin",
            },
            cwd=volume,
            capture_output=True,
            text=True,
            timeout=300,
        )
        return done.returncode, done.stderr

    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        assert [code for code, _ in pool.map(run_pod, range(2))] == [0, 0]
    launch_runs.assert_same_run(volume / "runs" / "at")
