"""Settings of the process: caches, signals, and where a number comes from."""

import json
import os
import pathlib
import signal
import subprocess
import sys

import jax
import pytest

from samrobust.provenance import provenance
from samrobust.runtime import StopRequest, cache_folder


def compilation_cache(**environment):
    script = (
        "import jax\nfrom samrobust.runtime import enable_compilation_cache\n"
        "enable_compilation_cache()\nprint(jax.config.jax_compilation_cache_dir)"
    )
    inherited = {
        name: value
        for name, value in os.environ.items()
        if name != "JAX_COMPILATION_CACHE_DIR"
    }
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**inherited, **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.strip()


def test_compiled_programs_are_kept_in_the_users_cache_folder(tmp_path):
    folder = compilation_cache(XDG_CACHE_HOME=str(tmp_path))
    assert folder == str(tmp_path / "samrobust" / "xla")


def test_the_compilation_cache_can_be_switched_off():
    assert compilation_cache(SAMROBUST_COMPILATION_CACHE="off") == "None"


def test_the_users_own_compilation_cache_wins(tmp_path):
    chosen = str(tmp_path / "mine")
    assert compilation_cache(JAX_COMPILATION_CACHE_DIR=chosen) == chosen


def test_the_cache_folder_is_in_the_home_by_default(monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", "/home/somebody")
    assert cache_folder() == pathlib.Path("/home/somebody/.cache/samrobust")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_becomes_a_question_and_the_old_handler_comes_back(number):
    before = signal.getsignal(number)
    with StopRequest().listening() as stop:
        assert not stop()
        signal.raise_signal(number)
        assert stop()
        assert stop.signal == number
    assert signal.getsignal(number) is before


def test_the_second_ctrl_c_interrupts_at_once():
    with StopRequest().listening():
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_provenance_names_commit_versions_device_and_command():
    found = provenance()
    assert json.loads(json.dumps(found)) == found
    assert found["jax"] == jax.__version__
    assert found["num_devices"] == jax.device_count()
    assert found["command"]
    assert found["commit"] is None or len(found["commit"].split("+")[0]) == 40
