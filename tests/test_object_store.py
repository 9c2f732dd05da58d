"""Workdirs in object stores: what holds on a disk holds there, after any kill."""

import concurrent.futures
import contextlib
import errno
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time
import types
from importlib import util

import fake_gcs
import fsspec
import helpers
import numpy as np
import pytest
from fsspec.config import conf

from samrobust.experiments.run import run
from samrobust.experiments.workdir import add_evaluation
from samrobust.system import storage
from samrobust.system.claims import lease
from samrobust.system.claims.holder import read_holder
from samrobust.system.claims.lease import ClaimedError, claim
from samrobust.system.failures import is_transient
from samrobust.system.files import (
    WorkdirError,
    append_json_line,
    check_writable,
    read_json,
    read_json_lines,
    set_aside,
    write_json,
)
from samrobust.system.storage import ObjectPath, fuse_mount, to_path
from samrobust.training import InterruptedRunError
from samrobust.training.checkpoint import CheckpointError, Checkpoints

pytestmark = pytest.mark.usefixtures("programs_made_once")

STAND_INS = helpers.ROOT / "tests" / "stand_ins"
SHORT = {"training.epochs": 2, "checkpoint.minutes": 0.0}


@pytest.fixture
def memory():
    """A folder of `memory://`, which is empty."""
    store = fsspec.filesystem("memory")
    yield to_path("memory://bucket/runs")
    store.store.clear()
    store.pseudo_dirs[:] = [""]


@pytest.fixture
def gcs(monkeypatch):
    """A folder of `gs://`, behind the real client and a server of this machine."""
    monkeypatch.setenv("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
    client = pytest.importorskip("gcsfs").GCSFileSystem
    monkeypatch.setitem(conf, "gs", {"token": "anon"})
    with fake_gcs.serving() as server:
        address = f"http://127.0.0.1:{server.server_port}"
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", address)
        client.clear_instance_cache()
        yield to_path("gs://bucket/runs")
        client.clear_instance_cache()


@pytest.fixture(params=["memory", "gcs"])
def store(request):
    return request.getfixturevalue(request.param)


@pytest.fixture
def shared(tmp_path, monkeypatch):
    """A folder of `gs://` that all processes see; the client is a stand-in."""
    monkeypatch.setenv("GCS_STAND_IN", str(helpers.make_folder(tmp_path / "buckets")))
    paths = f"{STAND_INS}:{helpers.ROOT}"
    monkeypatch.setenv("PYTHONPATH", paths)
    return "gs://bucket/runs"


def names(path):
    return sorted(p.relative_to(path).as_posix() for p in path.walk_files())


def copied(path: ObjectPath, folder: pathlib.Path) -> pathlib.Path:
    """All objects below a path as files of a folder."""
    for each in path.walk_files():
        place = folder / each.relative_to(path).as_posix()
        place.parent.mkdir(parents=True, exist_ok=True)
        each.download(place)
    return folder


# Paths.


def test_a_url_is_a_path_whose_parts_and_parents_stay_in_the_store():
    path = ObjectPath("gs://bucket/runs") / "st" / "seed0"
    assert str(path) == "gs://bucket/runs/st/seed0"
    assert str(path.parent.with_name("sam,rho=0.2")) == "gs://bucket/runs/sam,rho=0.2"
    assert path.relative_to(ObjectPath("gs://bucket/runs")).as_posix() == "st/seed0"
    assert all(isinstance(each, ObjectPath) for each in path.parents)
    assert path == ObjectPath("gs://bucket/runs/st/seed0") == path.absolute()


def test_a_local_path_is_what_it_was():
    assert to_path("runs/st") == pathlib.Path("runs/st")
    assert type(to_path("runs/st")) is type(pathlib.Path())


def test_a_disk_that_is_full_is_named_by_the_file():
    with pytest.raises(OSError, match="No space left on device: '/dev/full'"):
        storage.append(pathlib.Path("/dev/full"), b"line")


def test_whoever_takes_it_for_a_local_path_is_refused(memory, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    uses = [open, os.fspath, os.stat, pathlib.Path.open, np.load]
    for use in uses:
        with pytest.raises(ValueError, match="a local path, got path='memory:"):
            use(memory / "x")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("place", "message"),
    [
        (
            "hdfs://host/x",
            r"a local path, or one of gs://, s3://, memory://, got path=",
        ),
        ("gs://", "gs://BUCKET/FOLDER, got path='gs://'"),
        ("s3:///x", "s3://BUCKET/FOLDER"),
    ],
)
def test_what_is_no_place_is_refused(place, message):
    with pytest.raises(ValueError, match=message):
        to_path(place)


@pytest.mark.parametrize(("protocol", "extra"), [("gs", "gcs"), ("s3", "s3")])
def test_a_missing_package_is_named_with_its_extra(
    monkeypatch, capsys, protocol, extra
):
    monkeypatch.setattr(util, "find_spec", lambda _: None)
    flags = ["--config=digits:st", f"--workdir={protocol}://bucket/x"]
    assert helpers.main("train", *flags) == 2
    message = f"pip install 'samrobust[{extra}]'"
    assert message in " ".join(capsys.readouterr().err.split())


# Files.


def test_files_are_there_whole_listed_and_removed_as_on_a_disk(store):
    write_json(store / "st" / "seed0" / "config.json", {"a": 1})
    write_json(store / "st" / "seed0" / "config.json", {"a": 2})
    write_json(store / "at+sam,x=1" / "seed1" / "config.json", {"b": [1]})
    assert read_json(store / "st" / "seed0" / "config.json") == {"a": 2}
    assert read_json(store / "none.json") is None
    found = [str(path.parent.parent.name) for path in store.glob("*/seed*/config.json")]
    assert sorted(found) == ["at+sam,x=1", "st"]
    assert [path.name for path in store.glob("at+sam,*")] == ["at+sam,x=1"]
    assert (store / "st").is_dir()
    assert not (store / "st").is_file()
    assert not (store / "s").exists()
    moved = set_aside(store / "st" / "seed0" / "config.json")
    assert names(store) == [
        "at+sam,x=1/seed1/config.json",
        "st/seed0/config.json.aside",
    ]
    moved.unlink()
    moved.unlink(missing_ok=True)
    assert not (store / "st").exists()
    storage.remove_tree(store)
    assert names(store) == []
    storage.remove_tree(store)


def test_lines_are_added_and_each_is_there(store):
    check_writable(store)
    for i in range(3):
        append_json_line(store / "metrics.jsonl", {"i": i})
    assert read_json_lines(store / "metrics.jsonl") == [{"i": i} for i in range(3)]
    assert names(store) == ["metrics.jsonl"]


@pytest.mark.filterwarnings("ignore:Sending a large body")  # gcsfs does
def test_a_large_file_is_uploaded_in_parts_and_comes_back(gcs, tmp_path):
    content = bytes(range(256)) * 24_000
    (tmp_path / "here").write_bytes(content)
    (gcs / "there").upload(tmp_path / "here")
    (gcs / "there").download(tmp_path / "back")
    assert (tmp_path / "back").read_bytes() == content


def test_a_second_name_is_given_once_and_time_is_that_of_the_store(store):
    storage.replace(store / "a", b"1")
    storage.replace(store / "b", b"2")
    storage.link(store / "a", store / "name")
    with pytest.raises(FileExistsError):
        storage.link(store / "b", store / "name")
    assert (store / "name").read_bytes() == b"1"
    before = storage.modified(store / "a")
    assert abs(before - time.time()) < 60
    assert storage.touch(store / "a") > before
    assert (store / "a").read_bytes() == b"1"
    for ask in (storage.touch, storage.modified):
        with pytest.raises(FileNotFoundError):
            ask(store / "none")


def test_two_that_add_evaluations_at_once_lose_none(memory, monkeypatch):
    write_json(memory / "config.json", {})
    monkeypatch.setattr(time, "sleep", lambda _: None)
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda i: add_evaluation(memory, {"i": i}), range(12)))
    lines = read_json_lines(memory / "evaluations.jsonl")
    assert sorted(line["i"] for line in lines) == list(range(12))


@pytest.mark.parametrize(
    ("module", "name", "code", "passes"),
    [
        ("gcsfs.retry", "HttpError", 503, True),
        ("gcsfs.retry", "HttpError", 401, False),
        ("aiohttp.client_exceptions", "ClientConnectorError", None, True),
        ("requests.exceptions", "ProxyError", None, True),
        ("botocore.exceptions", "ConnectTimeoutError", None, True),
        ("botocore.exceptions", "NoCredentialsError", None, False),
    ],
)
def test_errors_of_clients_are_those_of_a_disk(
    memory, monkeypatch, module, name, code, passes
):
    kind = type(name, (Exception,), {"__module__": module, "code": code})

    def fail(*_, **__):
        raise kind("no\nbucket")

    monkeypatch.setattr(type(fsspec.filesystem("memory")), "cat_file", fail)
    with pytest.raises(OSError, match=f"{name}: no bucket") as error:
        read_json(memory / "x.json")
    assert is_transient(error.value) is passes


# Claims.


def test_a_claim_is_held_released_and_taken_again(store):
    with claim(store) as held:
        held.check()
        with pytest.raises(ClaimedError, match=f"pid {os.getpid()}"):
            claim(store).__enter__()
    with claim(store):
        holder = read_holder(store)
        assert holder is not None
        assert (holder.generation, holder.released) == (2, False)
    assert names(store) == [".claim/1.json", ".claim/2.json"]


CONTEND = """
import contextlib, json, sys
from samrobust.system.claims.lease import ClaimedError, claim
from samrobust.system.storage import to_path
won = []
with contextlib.ExitStack() as stack:
    print("ready", flush=True)
    sys.stdin.readline()
    for folder in sys.argv[1:]:
        with contextlib.suppress(ClaimedError):
            stack.enter_context(claim(to_path(folder)))
            won.append(folder)
    print(json.dumps([won, "jax" in sys.modules]), flush=True)
    sys.stdin.readline()
"""


def test_of_processes_that_contend_exactly_one_wins(shared):
    folders = [f"{shared}/{i}" for i in range(12)]
    with contextlib.ExitStack() as stack:
        workers = []
        for _ in range(4):
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
            command = [sys.executable, "-c", CONTEND, *folders]
            workers.append(stack.enter_context(subprocess.Popen(command, **pipes)))
            stack.callback(workers[-1].kill)
        for worker in workers:
            assert worker.stdout.readline() == "ready\n"
        for worker in workers:
            worker.stdin.write("\n")
            worker.stdin.flush()
        answers = [json.loads(worker.stdout.readline()) for worker in workers]
    assert sorted(folder for won, _ in answers for folder in won) == sorted(folders)
    assert not any(with_jax for _, with_jax in answers)


def test_a_holder_elsewhere_is_dead_once_its_lease_is_over(memory, monkeypatch):
    monkeypatch.setenv("SAMROBUST_CLAIM_LEASE", "0.3")
    there = {"token": "x", "host": "elsewhere", "machine": "other", "lease": 0.3}
    write_json(memory / ".claim" / "4.json", there)
    with pytest.raises(ClaimedError, match="host elsewhere"):
        claim(memory).__enter__()
    while time.time() - storage.modified(memory / ".claim" / "4.json") < 0.3:
        time.sleep(0.01)
    with claim(memory) as held:
        write_json(memory / ".claim" / "6.json", there)  # took over as this one stood
        held._refresh()
        with pytest.raises(ClaimedError, match="took over memory://bucket/runs"):
            held.check()


def test_a_holder_whose_folder_was_removed_finds_out(memory):
    with claim(memory) as held:
        storage.remove_tree(memory)
        held._refresh()
        with pytest.raises(ClaimedError, match="was removed"):
            held.check()


MOUNTS = """\
overlay / overlay rw 0 0
bucket {0}/with\\040space fuse.gcsfuse rw 0 0
mountpoint-s3 {0}/s3 fuse rw 0 0
/dev/sdb1 {0}/ntfs fuseblk rw 0 0
server:/x {0}/s3/nfs nfs4 rw 0 0
"""


@pytest.mark.parametrize(
    ("folder", "found"),
    [
        ("with space/runs", "fuse.gcsfuse at {}/with space"),
        ("s3", "fuse at {}/s3"),
        ("s3/nfs/runs", ""),
        ("ntfs/runs", ""),
        ("runs", ""),
    ],
)
def test_a_mount_of_an_object_store_is_known_by_its_kind(tmp_path, folder, found):
    table = tmp_path / "mounts"
    table.write_text(MOUNTS.format(tmp_path))
    assert fuse_mount(tmp_path / folder, str(table)) == found.format(tmp_path)


@pytest.mark.parametrize("missing", ["link", "utime"])
def test_claims_on_such_a_mount_are_refused_with_the_path_and_the_fix(
    tmp_path, monkeypatch, missing
):
    def refuse(*_, **__):
        raise PermissionError(1, "Operation not permitted")

    mount = lambda *_: f"fuse.gcsfuse at {tmp_path}"  # noqa: E731
    monkeypatch.setattr(lease.storage, "fuse_mount", mount)
    monkeypatch.setattr(os, missing, refuse)
    message = (
        f"Expected a directory with hard links, which claims are made of, got workdir="
        f"'{tmp_path}/st' on fuse.gcsfuse at {tmp_path}. Give the bucket itself, "
        "--workdir=gs://... or s3://..., or a disk."
    )
    with pytest.raises(WorkdirError) as error:
        claim(tmp_path / "st").__enter__()
    assert str(error.value) == message


# Checkpoints.


def state(value: float) -> dict[str, np.ndarray]:
    return {"w": np.full(3, value, np.float32), "none": np.zeros((0, 2), np.float32)}


def test_a_checkpoint_comes_back_and_the_newest_ones_are_kept(store):
    with Checkpoints(store, keep=2) as checkpoints:
        for step in (1, 2, 3):
            checkpoints.save(step, state(step), {"epoch": step})
        restored = checkpoints.restore_latest(state(0))
        assert restored is not None
        assert (restored.step, restored.metadata) == (3, {"epoch": 3})
        helpers.assert_same_bits(restored.state, state(3))
        assert checkpoints.restore(2, state(0)).metadata == {"epoch": 2}
        with pytest.raises(CheckpointError, match=r"step 1 in .*://bucket/runs, got"):
            checkpoints.restore(1, state(0))


def test_an_upload_that_was_cut_off_is_no_checkpoint_and_is_removed(
    memory, monkeypatch, tmp_path
):
    upload = ObjectPath.upload

    def cut_off(path, file):
        if path.parts[-2:] == ("metadata", "metadata"):
            raise ConnectionError("the network is away")
        upload(path, file)

    with Checkpoints(memory) as checkpoints:
        checkpoints.save(1, state(1), wait=True)
        monkeypatch.setattr(ObjectPath, "upload", cut_off)
        with pytest.raises(CheckpointError, match="step 2 to memory://") as error:
            checkpoints.save(2, state(2), wait=True)
        assert is_transient(error.value)
        assert (memory / "2" / "state").is_dir()  # the manifest comes last
        assert checkpoints.latest_step() == 1
        monkeypatch.setattr(ObjectPath, "upload", upload)
        checkpoints.save(3, state(3), wait=True)
    assert {name.partition("/")[0] for name in names(memory)} == {"1", "3"}
    # On a disk it is a checkpoint as Orbax writes it there.
    with Checkpoints(copied(memory, tmp_path)) as here:
        helpers.assert_same_bits(here.restore(3, state(0)).state, state(3))


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EMFILE])
def test_a_full_disk_here_is_no_damage_there(memory, monkeypatch, number):
    def fail(path, file):
        del path
        raise OSError(number, os.strerror(number), str(file))

    with Checkpoints(memory) as checkpoints:
        checkpoints.save(1, state(1), wait=True)
        monkeypatch.setattr(ObjectPath, "download", fail)
        with pytest.raises(OSError, match=os.strerror(number)):
            checkpoints.restore_latest(state(0))
        with pytest.raises(OSError, match=os.strerror(number)):
            checkpoints.save(1, state(1))
        assert checkpoints.latest_step() == 1


def test_a_folder_for_temporary_files_that_looks_like_a_pattern_is_refused(
    memory, monkeypatch, tmp_path
):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "pbs.12[3].server"))
    with pytest.raises(ValueError, match=r"path='.*\[3\]\.server'. Set TMPDIR to"):
        Checkpoints(memory)


def test_of_a_removal_that_was_cut_off_nothing_counts(memory, monkeypatch):
    with Checkpoints(memory, keep=1) as checkpoints:
        checkpoints.save(1, state(1), wait=True)
        unlink, removed = ObjectPath.unlink, []

        def cut_off(path, missing_ok=False):
            if removed:
                raise ConnectionError("the network is away")
            removed.append(path)
            unlink(path, missing_ok)

        monkeypatch.setattr(ObjectPath, "unlink", cut_off)
        with pytest.raises(CheckpointError):
            checkpoints.save(2, state(2), wait=True)
        assert removed[0].parts[-2:] == ("metadata", "metadata")
        assert checkpoints.latest_step() == 2
        assert (memory / "1").is_dir()


def test_a_damaged_checkpoint_is_skipped_and_replaced(memory):
    with Checkpoints(memory) as checkpoints:
        checkpoints.save(1, state(1))
        checkpoints.save(2, state(2), wait=True)
        for path in (memory / "2" / "state").walk_files():
            path.unlink()
        with pytest.warns(UserWarning, match="Skipping the damaged checkpoint memory:"):
            restored = checkpoints.restore_latest(state(0))
        assert restored is not None
        assert restored.step == 1
        for name in ("2/left", "notes"):
            storage.replace(memory / name, b"")
        checkpoints.save(2, state(5), wait=True)
        helpers.assert_same_bits(checkpoints.restore(2, state(0)).state, state(5))
        assert not (memory / "2" / "left").exists()
        assert (memory / "notes").exists()


def test_what_is_brought_to_a_store_leaves_nothing_here(memory, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with Checkpoints(memory) as checkpoints:
        checkpoints.save(1, state(1), wait=True)
        checkpoints.restore(1, state(0))
        (folder,) = tmp_path.iterdir()
        assert list(folder.iterdir()) == []
    assert list(tmp_path.iterdir()) == []


# Runs.


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """A run on a disk, and the same config and data for others."""
    config = helpers.make_config("st", SHORT)
    dataset = helpers.load_data(config)
    workdir = tmp_path_factory.mktemp("disk") / "st"
    result = run(config, workdir, helpers.Silent(), dataset=dataset)
    return types.SimpleNamespace(
        config=config, dataset=dataset, workdir=workdir, result=result
    )


class Killed(BaseException):
    """What nobody is prepared for."""


@pytest.mark.parametrize("end", ["stop", "kill"])
def test_a_run_that_was_ended_resumes_bit_identical_to_one_on_a_disk(
    memory, undisturbed, tmp_path, monkeypatch, end
):
    workdir, args = memory / "st", (undisturbed.config, memory / "st", helpers.Silent())
    data = {"dataset": undisturbed.dataset}
    upload = ObjectPath.upload
    if end == "stop":
        asked = iter(range(1000))
        with pytest.raises(InterruptedRunError):
            run(*args, should_stop=lambda: next(asked) > 1, **data)
    else:

        def die(path, file):
            if path.parts[-3:] == ("4", "metadata", "metadata"):
                raise Killed
            upload(path, file)

        monkeypatch.setattr(ObjectPath, "upload", die)
        with pytest.raises(Killed):
            run(*args, **data)
        monkeypatch.setattr(ObjectPath, "upload", upload)
        assert (workdir / "checkpoints" / "last" / "4").is_dir()
    assert not (workdir / "result.json").exists()
    result = run(*args, **data)
    assert result["accuracy"] == undisturbed.result["accuracy"]
    assert run(*args, **data) == result
    here = copied(workdir, tmp_path / "copy")
    helpers.assert_same_bits(
        helpers.read_checkpoint(here), helpers.read_checkpoint(undisturbed.workdir)
    )
    assert helpers.log_of(here) == helpers.log_of(undisturbed.workdir)


def test_a_store_that_is_away_ends_a_run_as_what_passes(
    memory, undisturbed, monkeypatch
):
    def away(*_, **__):
        raise ConnectionError("the network is away")

    monkeypatch.setattr(ObjectPath, "upload", away)
    args = (undisturbed.config, memory / "st", helpers.Silent())
    with pytest.raises(CheckpointError) as error:
        run(*args, dataset=undisturbed.dataset)
    assert is_transient(error.value)
    assert not (memory / "st" / "failure.json").exists()


# Commands.


def test_every_command_takes_a_workdir_in_a_store(
    memory, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(helpers.make_folder(tmp_path / "here"))
    workdir, run_dir = f"--workdir={memory}", f"--workdir={memory}/st/seed0"
    few = ["--num-examples=8", "--num-steps=1"]
    config = f"--config={helpers.ROOT}/configs/digits.py"
    flags = helpers.make_flags({"training.epochs": 1})
    assert helpers.main("table", config, "--rows=st", workdir, *flags) == 0
    attack = ["--attack=autoattack", "--version=custom", "--members=square"]
    assert helpers.main("evaluate", run_dir, *attack, "--num-examples=8") == 0
    assert helpers.main("curves", workdir, *few, "--linf=8") == 0
    assert helpers.main("report", workdir) == 0
    weights = tmp_path / "weights.safetensors"
    output = ["--format=safetensors", f"--output={weights}"]
    assert helpers.main("export", run_dir, *output) == 0
    imported = ["import", f"--input={weights}", "--config=digits:st"]
    imported += ["--workdir=memory://bucket/imported", *flags]
    assert helpers.main(*imported) == helpers.main(*imported) == 0
    capsys.readouterr()
    assert helpers.main("status", workdir) == 0
    assert "1 run: 1 done." in capsys.readouterr().out
    assert helpers.main("table", config, "--rows=st", workdir, "--list", *flags) == 0
    assert capsys.readouterr().out == "0\tst\t0\tdone\n"
    found = {name for name in names(memory) if "checkpoints" not in name}
    assert {"plan.json", "table.md", "table.png", "curves.json", "report.html"} <= found
    assert len(read_json_lines(memory / "st" / "seed0" / "evaluations.jsonl")) == 1
    assert any(name.startswith("st/seed0/autoattack/") for name in found)
    assert weights.stat().st_size > 0
    assert list((tmp_path / "here").iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["train", "--config=digits:st", "--config.tracking.tensorboard=True"],
            "a workdir on a disk with tracking.tensorboard",
        ),
        (["evaluate", "--save-examples"], "a workdir on a disk with --save-examples"),
        (["bench"], "a local path for value, got value='memory://bucket/runs'"),
        (["theory"], "a local path for value, got value='memory://bucket/runs'"),
    ],
)
def test_what_a_store_cannot_do_is_refused_before_any_work(
    memory, capsys, arguments, message
):
    assert helpers.main(*arguments, f"--workdir={memory}") == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert names(memory) == []
