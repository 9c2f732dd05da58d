"""launch/README.md tells the truth: its files, commands and variables exist."""

import re
import shlex
import subprocess
import sys
import types

import helpers
import pytest

from samrobust import cli
from samrobust.experiments import configuration
from samrobust.system import storage

LAUNCH = helpers.ROOT / "launch"
README = re.sub(r" *\\\n *", " ", (LAUNCH / "README.md").read_text())
COMMANDS = [line.strip() for line in re.findall(r"^ {4}(\S.*)$", README, re.MULTILINE)]
SCRIPTS = "".join(
    path.read_text() for path in LAUNCH.rglob("*") if path.suffix in (".sh", ".sbatch")
)


@pytest.fixture(autouse=True)
def _clients_of_buckets(monkeypatch):
    """Commands name buckets, whose packages are extras."""
    there = types.SimpleNamespace(find_spec=lambda name: name)
    monkeypatch.setattr(storage, "util", there)


def samrobust_arguments(command: str) -> list[str]:
    """What of a launcher's command goes to samrobust; empty for other commands."""
    words = shlex.split(command.partition(" | ")[0])
    if words[0].endswith("sweep.sh"):
        return ["table", *words[words.index("--") + 1 :]]
    return words[words.index("train") :] if "train" in words else []


def test_there_is_a_command_for_every_launcher():
    for name in (
        *("local.py", "train.sbatch", "sweep.sh", "render.py", "tpu_vm.sh up"),
        *("gpu_bundle.sh", "gpu_measure.sh", "skypilot.yaml"),
    ):
        assert any(name in command for command in COMMANDS)


@pytest.mark.parametrize("command", [c for c in COMMANDS if samrobust_arguments(c)])
def test_what_goes_to_samrobust_is_accepted(command):
    arguments = cli._parse(samrobust_arguments(command))
    config = configuration.load_config(arguments.config, arguments.overrides)
    assert config.is_locked


@pytest.mark.parametrize("command", [c for c in COMMANDS if "render.py" in c])
def test_every_jobset_can_be_rendered(command):
    words = shlex.split(command.partition(" | ")[0])
    assert words[0] == "python"
    done = subprocess.run(
        [sys.executable, *words[1:]], cwd=helpers.ROOT, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    "path", sorted(set(re.findall(r"launch/[\w/.]*\w", README)) - {"launch"})
)
def test_every_file_exists(path):
    assert (helpers.ROOT / path).exists()


@pytest.mark.parametrize(
    "name",
    sorted(
        set(re.findall(r"(?:SAMROBUST_[A-Z_]+|[A-Z]+_FLAGS|QUEUED|SPOT|DATA)", README))
    ),
)
def test_every_variable_is_one_of_the_scripts(name):
    assert re.search(rf"^{name}=\$\{{{name}:-", SCRIPTS, re.MULTILINE)
    assert name in SCRIPTS


@pytest.mark.parametrize("field", re.findall(r"--config\.([\w.]+)=", README))
def test_every_field_exists(field):
    value = configuration.finish(configuration.base_config(), "st")
    for name in field.split("."):
        value = value[name]
