"""launch/skypilot.yaml, as far as it can be checked without a cloud."""

import subprocess

import helpers
import pytest
import yaml

PATH = helpers.ROOT / "launch" / "skypilot.yaml"
TASK = yaml.safe_load(PATH.read_text())


def test_skypilot_would_accept_it():
    task = pytest.importorskip("sky").Task.from_yaml(str(PATH))
    (resources,) = task.resources
    assert resources.job_recovery["recover_on_exit_codes"] == [69, 75, 134, 137]


def test_what_would_fail_again_is_not_started_again():
    codes = TASK["resources"]["job_recovery"]["recover_on_exit_codes"]
    assert {69, 75} <= set(codes)
    assert not {0, 1, 2, 130} & set(codes)


def test_the_command_runs_in_the_environment_that_the_setup_made(tmp_path):
    """It gets the GPU by name, its files in the bucket, and its exit code through."""
    activate = helpers.make_folder(tmp_path / "venv" / "bin") / "activate"
    activate.write_text("made=yes\n")
    assert f"~/{activate.relative_to(tmp_path)}" in TASK["setup"]
    command = 'echo $made $JAX_PLATFORMS $TFDS_DATA_DIR "a  b"; exit 75'
    done = subprocess.run(
        ["bash", "-c", TASK["run"]],
        env={"HOME": str(tmp_path), "PATH": "/usr/bin:/bin", "COMMAND": command},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (75, "")
    assert done.stdout == "yes cuda,cpu /work/data a  b\n"
    assert list(TASK["file_mounts"]) == ["/work"]


def test_all_that_is_named_exists():
    for name in ("launch/local.py", "configs/cifar10.py", "requirements.lock"):
        assert name in PATH.read_text()
        assert (helpers.ROOT / name).exists()
    assert "cuda13" in TASK["setup"]
