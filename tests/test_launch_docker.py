"""launch/Dockerfile, as far as it can be checked without building it."""

import json
import os
import re
import subprocess
import tomllib
from pathlib import Path

import helpers
import pytest

DOCKERFILE = helpers.ROOT / "launch" / "Dockerfile"
PROJECT = tomllib.loads((helpers.ROOT / "pyproject.toml").read_text())
# Notes its arguments; `freeze` answers as the real one.
PIP = """#!/bin/sh
if [ "$1" = freeze ]; then printf 'flax==0.12.8\\njax==0.10.2\\njaxlib==0.10.2\\n'
else printf '%s\\n' "$*" >> {log}; fi
"""


def instructions() -> list[tuple[str, str]]:
    """The instructions in order: name and rest, continued lines joined."""
    text = re.sub(r"^#.*\n", "", DOCKERFILE.read_text(), flags=re.MULTILINE)
    lines = re.sub(r"\\\n", "", text).splitlines()
    parts = (line.partition(" ") for line in lines if line.strip())
    return [(name, rest) for name, _, rest in parts]


def values(name: str) -> list[str]:
    return [rest for word, rest in instructions() if word == name]


def sources() -> list[str]:
    """What is copied into the image from the checkout."""
    return [path for rest in values("COPY") for path in rest.split()[:-1]]


def run_steps(folder: Path, accelerator: str) -> tuple[int, str, list[str]]:
    """Runs the steps that call pip, with one that only takes notes."""
    log = folder / "pip.log"
    (folder / "pip").write_text(PIP.format(log=log))
    (folder / "pip").chmod(0o755)
    steps = [step for step in values("RUN") if "pip" in step]
    done = subprocess.run(
        ["sh", "-ec", "\n".join(steps)],
        cwd=folder,
        env={"PATH": f"{folder}:{os.environ['PATH']}", "ACCELERATOR": accelerator},
        capture_output=True,
        text=True,
    )
    calls = log.read_text().splitlines() if log.exists() else []
    return done.returncode, done.stderr, calls


def test_everything_that_is_copied_exists_and_is_sent_to_the_build():
    lines = DOCKERFILE.with_name("Dockerfile.dockerignore").read_text().splitlines()
    sent = {line[1:] for line in lines if line.startswith("!")}
    assert "*" in lines
    assert set(sources()) == sent
    for name in sources():
        assert (helpers.ROOT / name).exists()


def test_what_the_package_is_built_from_is_copied():
    project, build = PROJECT["project"], PROJECT["tool"]["hatch"]["build"]
    wheel = build["targets"]["wheel"]
    needed = {"README.md", "hatch_build.py", *project["license-files"]}
    needed |= {*wheel["packages"], *wheel["force-include"], "pyproject.toml"}
    assert needed <= set(sources())


@pytest.mark.parametrize("name", ["cuda12", "cuda13", "tpu"])
def test_each_accelerator_is_an_extra_of_the_project(tmp_path, name):
    code, errors, calls = run_steps(tmp_path, name)
    assert (code, errors) == (0, "")
    (wanted,) = PROJECT["project"]["optional-dependencies"][name]
    assert "jax==0.10.2" in (tmp_path / "locked.txt").read_text().splitlines()
    assert calls == [
        "install --no-cache-dir --require-hashes -r requirements.lock",
        "install --no-cache-dir -c locked.txt gcsfs s3fs",
        f"install --no-cache-dir -c locked.txt {wanted}",
        "install --no-cache-dir --no-deps .",
    ]


def test_without_an_accelerator_only_the_lock_is_installed(tmp_path):
    code, errors, calls = run_steps(tmp_path, "cpu")
    assert (code, errors) == (0, "")
    kinds = ["--require-hashes", "-c", "--no-deps"]
    assert [call.split()[2] for call in calls] == kinds


def test_drivers_and_fast_networks_are_found():
    (apt,) = [step for step in values("RUN") if "apt-get install" in step]
    assert {"libibverbs1", "ibverbs-providers", "librdmacm1"} <= set(apt.split())
    settings = dict(word.split("=") for rest in values("ENV") for word in rest.split())
    assert settings["LD_LIBRARY_PATH"] == "/usr/local/nvidia/lib64"  # GKE's mount
    assert settings["NVIDIA_DRIVER_CAPABILITIES"] == "compute,utility"


def test_an_unknown_accelerator_ends_the_build(tmp_path):
    code, errors, calls = run_steps(tmp_path, "abacus")
    assert code == 1
    assert "Expected ACCELERATOR of cuda13, cuda12, tpu, cpu, got abacus." in errors
    assert len(calls) == 2


def test_the_build_argument_has_a_value_and_is_used_after_it_is_declared():
    names = [name for name, _ in instructions()]
    (argument,) = values("ARG")
    assert argument == "ACCELERATOR=cuda13"
    assert names.index("FROM") < names.index("ARG") < names.index("RUN")


def test_the_python_of_the_image_is_one_that_the_project_supports():
    (image,) = values("FROM")
    version = re.fullmatch(r"python:3\.(\d+)-slim", image)
    assert version
    minor = int(version[1])
    assert minor >= int(PROJECT["project"]["requires-python"].rpartition(".")[2])
    assert any(c.endswith(f":: 3.{minor}") for c in PROJECT["project"]["classifiers"])


def test_the_command_is_process_1_and_not_root():
    names = [name for name, _ in instructions()]
    assert json.loads(values("ENTRYPOINT")[0]) == ["samrobust"]
    assert "samrobust" in PROJECT["project"]["scripts"]
    assert json.loads(values("CMD")[0]) == ["--help"]
    assert values("USER") == ["samrobust"]
    assert "RUN" not in names[names.index("USER") :]
    assert values("WORKDIR")[-1] == "/work"


def test_the_user_owns_what_kubernetes_mounts_for_it():
    (step,) = [step for step in values("RUN") if "useradd" in step]
    template = (helpers.ROOT / "launch" / "k8s" / "jobset.yaml").read_text()
    (user,) = re.findall(r"--uid (\d+)", step)
    assert f"fsGroup: {user}" in template
    assert "mountPath: /work}" in template
    assert "install -d -o samrobust /work" in step
