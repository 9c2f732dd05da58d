"""`samrobust doctor`: a line each, exit code 1 where the main job cannot run."""

import os
import pathlib
import socket
import subprocess
import sys
import tomllib
from importlib import metadata

import helpers
import pytest

from samrobust.cli import doctor, main

NAMES = list(doctor._LOOKS)


def lines_of(capsys, code=0):
    assert main(["doctor"]) == code
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines] == NAMES
    return {line.split()[1]: line for line in lines}


def test_it_says_what_is_there_and_asks_no_network(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(socket.socket, "connect", lambda *_: pytest.fail("network"))
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    archive = tmp_path / "downloads" / "manual" / "cifar-100-binary.tar.gz"
    helpers.make_folder(archive.parent)
    archive.write_text("")
    lines = lines_of(capsys)
    assert all(line.startswith("ok  ") for line in lines.values())
    assert "all that JAX_PLATFORMS=cpu allows" in lines["devices"]
    assert "versions as tested" in lines["packages"]
    assert "cifar10 not there, 170 MB to be downloaded from https:" in lines["data"]
    assert f"cifar100 not prepared, to be made of {archive}" in lines["data"]
    assert "GB free" in lines["output"]


def test_memory_and_cores_are_counted_without_linux(monkeypatch):
    known = {"SC_PHYS_PAGES": 2**22, "SC_PAGE_SIZE": 2**12}
    monkeypatch.setattr(os, "sysconf", known.__getitem__)
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(pathlib.Path, "read_text", _absent)
    assert doctor._memory() == f"17.2 GB, {os.cpu_count()} cores for this process"


def _absent(*_: object, **__: object) -> str:
    raise FileNotFoundError


def test_versions_other_than_the_tested_ones_are_named(capsys, monkeypatch):
    monkeypatch.setattr(doctor, "_lock", lambda: "jax==0.0.1 \\\noptax==0.0.1\n")
    line = lines_of(capsys)["packages"]
    there = (f"{name} {metadata.version(name)} (0.0.1)" for name in ("jax", "optax"))
    assert line.endswith(f"versions other than tested: {', '.join(there)}")


def test_what_stops_the_main_job_is_marked_and_exits_with_1(capsys, monkeypatch):
    version = doctor._version
    monkeypatch.setattr(doctor, "_version", lambda n: version(n) * (n != "flax"))
    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    monkeypatch.setattr("jax.default_backend", lambda: "cpu")
    monkeypatch.setattr("os.access", lambda *_: False)
    lines = lines_of(capsys, code=1)
    marked = [name for name, line in lines.items() if line.startswith("!!  ")]
    assert marked == ["packages", "devices", "output"]
    assert "missing='flax'. Install them: pip install samrobust." in lines["packages"]
    assert "got JAX_PLATFORMS='cuda'" in lines["devices"]


def test_it_answers_where_jax_does_not_load():
    script = (
        "import sys\nsys.modules['jax'] = None\nfrom samrobust.cli import main\n"
        "sys.exit(main(['doctor']))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (1, "")
    assert "!!  devices   import of jax halted" in done.stdout


def test_every_extra_is_looked_for_by_a_package_of_its_own():
    project = tomllib.loads((helpers.ROOT / "pyproject.toml").read_text())["project"]
    assert doctor.EXTRAS.keys() == project["optional-dependencies"].keys()


def test_caches_are_measured_and_one_that_others_can_write_to_is_named(
    capsys, monkeypatch, tmp_path
):
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (helpers.make_folder(tmp_path / "samrobust" / "xla") / "a").write_bytes(
        bytes(10**6)
    )
    (tmp_path / "samrobust" / "data").mkdir(mode=0o700)
    (tmp_path / "samrobust" / "data").chmod(0o777)
    lines = lines_of(capsys)
    assert f"1 MB in {tmp_path}/samrobust/xla" in lines["programs"]
    assert "samrobust/data is not used: it can be written by others" in lines["images"]
    monkeypatch.setenv("SAMROBUST_COMPILATION_CACHE", "OFF")
    assert "compiled programs are not kept" in lines_of(capsys)["programs"]
