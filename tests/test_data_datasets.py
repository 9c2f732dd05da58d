"""Data sets: small archives in the official layout, a local server, a damaged cache."""

import dataclasses
import functools
import hashlib
import http.server
import io
import json
import pathlib
import pickle
import shutil
import subprocess
import sys
import tarfile
import threading
import warnings
from typing import Any

import numpy as np
import pytest
import sklearn.datasets

from samrobust.data import (
    DatasetEntry,
    DatasetUnavailableError,
    Split,
    archive,
    cifar,
    cifar_builder,
    fingerprint,
    folders,
    load_dataset,
    official,
    prepared,
)
from samrobust.data.archive import ArchiveFile, find_archive
from samrobust.data.cache import default_cache_dir
from samrobust.data.official import OfficialSplit, checksum
from samrobust.data.splits import spread

PER_FILE = 4
OFFICIAL = {"cifar10": official.CIFAR10, "cifar100": official.CIFAR100}
NOWHERE = "http://127.0.0.1:9/"  # nobody listens at the discard port


def add_file(tar, name, content):
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


def make_examples(spec):
    """Returns (images, labels, coarse) by split."""
    rng, arrays = np.random.default_rng(0), {}
    for split, members in spec.splits.items():
        count = PER_FILE * len(members)
        images = rng.integers(0, 256, (count, 32, 32, 3)).astype(np.uint8)
        labels = rng.integers(0, spec.labels[0][2], count)
        arrays[split] = images, labels, rng.integers(0, 20, count)
    return arrays


def make_archive(name, path, arrays=None):
    """Writes a small archive; returns its spec and (images, labels, coarse)."""
    spec = OFFICIAL[name]
    arrays = arrays or make_examples(spec)
    with tarfile.open(path, "w:gz") as tar:
        for split, members in spec.splits.items():
            images, labels, coarse = arrays[split]
            records = [
                bytes([c, label][-len(spec.label_bytes) :]) + planes.tobytes()
                for c, label, planes in zip(
                    coarse[: len(labels)],
                    labels,
                    images.transpose(0, 3, 1, 2),
                    strict=True,
                )
            ]
            for i, member in enumerate(members):
                add_file(tar, member, b"".join(records[PER_FILE * i :][:PER_FILE]))
        for key, member, number in spec.labels:
            names = "\n".join(f"{key}{i}" for i in range(number))
            add_file(tar, member, f"{names}\n\n".encode())
        add_file(tar, "readme.html", b"not for us")
    content = path.read_bytes()
    fake = ArchiveFile(
        name=spec.archive.name,
        url=NOWHERE + spec.archive.name,
        num_bytes=len(content),
        sha256=hashlib.sha256(content).hexdigest(),
    )
    checksums = {
        split: OfficialSplit(
            len(labels), spec.labels[0][2], checksum(labels), checksum(images)
        )
        for split, (images, labels, _) in arrays.items()
    }
    return dataclasses.replace(spec, archive=fake, official=checksums), arrays


@dataclasses.dataclass
class Place:
    """A small archive in a manual directory, and empty directories for the rest."""

    name: str
    spec: official.CifarSpec
    arrays: dict
    root: pathlib.Path

    def load(self, **options: Any):
        options = {"data_dir": self.root / "data"} | options
        options = {"cache_dir": self.root / "cache"} | options
        return load_dataset(self.name, **options)

    def prepare(self):
        return self.load(manual_dir=self.root / "manual")

    def check(self, dataset):
        for split in ("train", "test"):
            images, labels, _ = self.arrays[split]
            got = getattr(dataset, split)
            np.testing.assert_array_equal(got.images, images)
            np.testing.assert_array_equal(got.labels, labels)
            assert (got.images.dtype, got.labels.dtype) == (np.uint8, np.int32)


def register(monkeypatch, spec):
    entry = DatasetEntry(spec.facts, functools.partial(cifar.load_cifar, spec))
    monkeypatch.setattr(cifar, spec.name.upper(), entry)


@pytest.fixture
def make_place(tmp_path, monkeypatch):
    def make(name):
        (tmp_path / "manual").mkdir()
        path = tmp_path / "manual" / OFFICIAL[name].archive.name
        spec, arrays = make_archive(name, path)
        register(monkeypatch, spec)
        return Place(name, spec, arrays, tmp_path)

    monkeypatch.setattr(archive.time, "sleep", lambda _: None)
    return make


@pytest.fixture
def place(make_place):
    return make_place("cifar10")


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_an_archive_becomes_the_data_set_that_tfds_itself_can_read(make_place, name):
    import tensorflow_datasets as tfds

    place = make_place(name)
    dataset = place.prepare()
    place.check(dataset)
    assert dataset.image_shape == (32, 32, 3)
    assert len(dataset.validation) == 0
    for split in ("train", "test"):
        source: Any = tfds.data_source(name, split=split, data_dir=place.root / "data")
        images, labels, coarse = place.arrays[split]
        assert len(source) == len(labels)
        for record in source:
            prefix, index = record["id"].decode().split("_")
            assert prefix == split
            np.testing.assert_array_equal(record["image"], images[int(index)])
            assert record["label"] == labels[int(index)]
            assert record.get("coarse_label", coarse[int(index)]) == coarse[int(index)]
    written: Any = tfds.builder_from_directory(place.root / "data" / name / "3.0.2")
    stock: Any = tfds.builder(name, data_dir=place.root / "elsewhere")
    assert set(written.info.features) == set(stock.info.features)
    assert written.info.features["label"].names[:2] == ["label0", "label1"]
    assert written.info.features["label"].num_classes == dataset.num_classes


def test_the_archive_is_found_below_the_data_directory(place):
    downloads = place.root / "data" / "downloads"
    downloads.mkdir(parents=True)
    (place.root / "manual").rename(downloads / "manual")
    place.check(place.load())


def test_prepared_data_are_used_as_they_are(place, monkeypatch):
    place.prepare()
    monkeypatch.setenv("TFDS_DATA_DIR", str(place.root / "data"))
    monkeypatch.setattr(cifar, "_prepare", None)
    place.check(place.load(data_dir=None, cache_dir=place.root / "another"))


def test_another_prepared_version_is_used_if_there_is_no_3_0_2(place, monkeypatch):
    place.prepare()
    monkeypatch.setattr(cifar, "_prepare", None)
    directory = place.root / "data" / "cifar10"
    (directory / "3.0.2").rename(directory / "3.0.10")
    info = directory / "3.0.10" / "dataset_info.json"
    info.write_text(info.read_text().replace("3.0.2", "3.0.10"))
    place.check(place.load())
    assert len(list((place.root / "cache").glob("*.json"))) == 2  # by content


TFRECORD = json.dumps({"name": "cifar10", "fileFormat": "tfrecord"})


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (TFRECORD, r"got \S+/cifar10/3\.0\.2 in the format tfrecord\."),
        (TFRECORD[:-9], r"got a damaged \S+/3\.0\.2/dataset_info\.json\."),
        ("", "got a damaged"),
        ("[]", "got a damaged"),
        ("null", "got a damaged"),
        ("3", "got a damaged"),
        ("{}", "got a damaged"),
        ("[" * 100_000, "got a damaged"),
        ("\0\x80", "got a damaged"),
        ('{"fileFormat": 3, "alternativeFileFormats": null}', "got a damaged"),
        ('{"alternativeFileFormats": [{}, "tfrecord"]}', "in the format tfrecord"),
        (None, r"got \S+/3\.0\.2 without its dataset_info\.json\."),
    ],
)
def test_prepared_data_that_cannot_be_read_are_refused_and_kept(place, content, found):
    directory = place.root / "data" / "cifar10" / "3.0.2"
    directory.mkdir(parents=True)
    if content is not None:
        (directory / "dataset_info.json").write_text(content)
    with pytest.raises(DatasetUnavailableError, match=found) as error:
        place.prepare()
    assert "It is left as it is. Set data_dir (or TFDS_DATA_DIR)" in str(error.value)
    assert "elete" not in str(error.value)
    assert directory.exists()
    place.check(place.load(data_dir=place.root / "b", manual_dir=place.root / "manual"))


def damage_records(place, change):
    """Changes one file of the prepared data; returns the directory."""
    directory = place.root / "data" / "cifar10" / "3.0.2"
    change(directory / "cifar10-train.array_record-00000-of-00001", directory)
    return directory


@pytest.mark.parametrize(
    "change",
    [
        lambda records, _: records.write_bytes(records.read_bytes()[:1000]),
        lambda records, _: records.write_bytes(b""),
        lambda records, _: records.unlink(),
        lambda _, directory: (directory / "features.json").write_text("null"),
        lambda _, directory: (directory / "features.json").write_text("{"),
        lambda _, directory: (directory / "dataset_info.json").write_text(
            '{"fileFormat": "array_record", "splits": 3}'
        ),
        lambda records, directory: shutil.copy(
            directory / "cifar10-test.array_record-00000-of-00001", records
        ),
    ],
)
def test_damaged_prepared_data_are_refused_in_a_line(place, change):
    place.prepare()
    directory = damage_records(place, change)
    with pytest.raises(DatasetUnavailableError) as error:
        place.load(cache_dir=place.root / "another")
    message = str(error.value)
    assert message.startswith("Expected the train examples of CIFAR-10 in ")
    assert str(directory) in message
    assert "elete" not in message
    assert "\n" not in message
    assert not list((place.root / "another").glob("*train*"))


def write_other(place, split, change):
    """Prepares data as TFDS would, with other examples in one split."""
    images, labels, coarse = place.arrays[split]
    arrays = place.arrays | {split: (*change(images.copy(), labels.copy()), coarse)}
    data_dir = place.root / "other"
    path = place.root / place.spec.archive.name
    spec, _ = make_archive(place.name, path, arrays)
    builder = cifar_builder.CifarBuilder(spec, path, data_dir)
    builder.download_and_prepare()
    return data_dir


def test_preparing_leaves_nothing_among_the_temporary_files(place, monkeypatch):
    temporary = place.root / "temporary"
    temporary.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    place.prepare()
    assert list(temporary.iterdir()) == []


def relabel(images, labels):
    labels[3] = (labels[3] + 1) % 10
    return images, labels


def repaint(images, labels):
    images[2, 31, 31, 2] ^= 1
    return images, labels


@pytest.mark.parametrize(
    ("split", "change", "message"),
    [
        ("train", relabel, "Expected the official labels in the official order, sha"),
        ("test", relabel, "Expected the official labels in the official order, sha"),
        ("test", lambda *arrays: [array[::-1] for array in arrays], "official order"),
        (
            "test",
            lambda *arrays: [array[: PER_FILE - 1] for array in arrays],
            r"Expected images of shape \(4, 32, 32, 3\) .* got shape=\(3, 32, 32, 3\)",
        ),
    ],
)
def test_examples_that_are_not_the_official_ones_are_refused(
    place, split, change, message
):
    data_dir = write_other(place, split, change)
    expected = f"Expected the {split} examples of CIFAR-10 .*{message}.* Set data_dir"
    for _ in range(2):  # a cache of them does not make them true
        with pytest.raises(DatasetUnavailableError, match=expected):
            place.load(data_dir=data_dir)


def test_other_pixels_under_the_official_labels_are_warned_of(place):
    original = fingerprint(place.prepare().test)
    data_dir = write_other(place, "test", repaint)
    for _ in range(2):  # decoded, then out of the cache
        with pytest.warns(UserWarning, match="The test images in .* are not those of"):
            dataset = place.load(data_dir=data_dir)
        assert fingerprint(dataset.test) != original


def test_rows_left_out_of_a_checksum_may_be_anything():
    images = np.random.default_rng(0).integers(0, 256, (6, 2, 2, 3)).astype(np.uint8)
    for left_out in ((), (0,), (5,), (2, 3), (0, 1, 2, 3, 4, 5)):
        known = OfficialSplit(6, 10, "", checksum(images, left_out), left_out)
        for row in range(6):
            other = images.copy()
            other[row, 1, 1, 2] ^= 1
            assert known.has_images(other) == (row in left_out)
    assert not OfficialSplit(6, 10, "", checksum(images)).has_images(images[::-1])


def test_two_directories_of_the_same_data_share_a_cache(place, monkeypatch):
    place.prepare()
    shutil.copytree(place.root / "data", place.root / "copy")
    monkeypatch.setattr(prepared, "_decode", None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name in ("copy", "data", "copy"):
            place.check(place.load(data_dir=place.root / name))


def test_records_of_another_template_have_caches_of_their_own(place):
    def rename(folder):
        info = json.loads((folder / "dataset_info.json").read_text())
        for split in info["splits"]:
            split["filepathTemplate"] = "{SPLIT}-{SHARD_X_OF_Y}.{FILEFORMAT}"
        (folder / "dataset_info.json").write_text(json.dumps(info))
        for path in folder.glob("*.array_record*"):
            split, shard = path.name.partition("-")[2].split(".array_record-")
            path.rename(folder / f"{split}-{shard}.array_record")

    place.prepare()
    other = write_other(place, "test", repaint)
    for root in (place.root / "data", other):
        rename(root / "cifar10" / "3.0.2")
    place.check(place.load())
    with pytest.warns(UserWarning, match="not those of CIFAR-10"):
        place.load(data_dir=other)


def test_directories_of_different_data_do_not_rebuild_each_others_cache(
    place, monkeypatch
):
    place.prepare()
    other = write_other(place, "test", repaint)
    with pytest.warns(UserWarning, match="not those of CIFAR-10"):
        place.load(data_dir=other)
    monkeypatch.setattr(prepared, "_decode", None)
    place.check(place.load())
    with pytest.warns(UserWarning, match="not those of CIFAR-10"):
        place.load(data_dir=other)


def test_a_cache_that_others_can_write_to_is_not_read(place, monkeypatch):
    monkeypatch.setattr(prepared, "default_cache_dir", lambda: None)
    place.prepare()
    place.check(place.load(cache_dir=None))
    monkeypatch.undo()
    register(monkeypatch, place.spec)
    monkeypatch.setenv("XDG_CACHE_HOME", str(place.root / "shared"))
    (place.root / "shared" / "samrobust").mkdir(parents=True)
    (place.root / "shared" / "samrobust").chmod(0o777)
    with pytest.warns(UserWarning, match="can be written by others"):
        dataset = place.load(cache_dir=None)
    place.check(dataset)
    assert not isinstance(dataset.train.images, np.memmap)
    assert not dataset.train.images.flags.writeable
    assert not list((place.root / "shared" / "samrobust").iterdir())


def test_a_manual_archive_with_a_wrong_hash_is_refused(place):
    path = place.root / "manual" / place.spec.archive.name
    content = path.read_bytes()
    for wrong in (content[:-100], content[:-1] + b"?"):
        path.write_bytes(wrong)
        found = hashlib.sha256(wrong).hexdigest()
        with pytest.raises(DatasetUnavailableError) as error:
            place.prepare()
        for part in (
            str(path),
            place.spec.archive.sha256,
            found,
            f"{len(wrong)} bytes",
        ):
            assert part in str(error.value)
    assert not (place.root / "data" / "cifar10").exists()


def check_advice(place, error):
    wanted, message = place.spec.archive, str(error.value)
    for part in (
        *(wanted.name, wanted.url, wanted.sha256, f"{wanted.num_bytes} bytes"),
        *("data_dir", "TFDS_DATA_DIR", "cifar10/3.0.2"),
    ):
        assert part in message
    assert "\n" not in message


def test_without_data_and_network_the_error_says_what_to_put_where(place):
    manual = place.root / "data" / "downloads" / "manual"
    with pytest.raises(DatasetUnavailableError, match=f"Put .* into {manual}") as error:
        place.load()
    check_advice(place, error)
    (manual / "cifar-10-batches-py").mkdir(parents=True)
    found = rf"got cifar-10-batches-py/ in {manual} and no download\. Put .* Or set "
    found += r"data_dir .* to have it made\. The download failed: "
    with pytest.raises(DatasetUnavailableError, match=found):
        place.load()


def fill(*names):
    def make(folder):
        folder.mkdir()
        for name in names:
            if name.endswith("/"):
                (folder / name).mkdir()
            else:
                (folder / name).write_text("")
        return folder

    return make


@pytest.mark.parametrize(
    ("make", "found"),
    [
        (lambda folder: folder, r"no folder .*/here \(No such file or directory\)\."),
        (
            lambda folder: folder.parent / "manual" / "cifar-10-binary.tar.gz",
            "manual_dir='.*/cifar-10-binary.tar.gz', a file and not its folder",
        ),
        (fill(), "no such file in .*/here"),
        (fill("a", "b.tar"), "no such file in .*/here"),
        (fill("cifar-10-python.tar.gz", "x"), r"got cifar-10-python\.tar\.gz in"),
        (fill("cifar-10-batches-bin/"), "got cifar-10-batches-bin/ in .*/here"),
        (fill("cifar-10-binary.tar"), r"got cifar-10-binary\.tar in .*/here"),
        (fill("cifar-10-binary.tar.gz/"), r"got cifar-10-binary\.tar\.gz/ in"),
    ],
)
def test_a_manual_directory_without_the_archive_is_described_and_nothing_downloaded(
    place, monkeypatch, make, found
):
    monkeypatch.setattr(archive, "_download", lambda *_: pytest.fail("a download"))
    message = f"Expected cifar-10-binary.tar.gz in manual_dir, got {found}"
    if "got " in found:
        message = found
    with pytest.raises(DatasetUnavailableError, match=message) as error:
        place.load(manual_dir=make(place.root / "here"))
    check_advice(place, error)


def test_an_archive_that_cannot_be_read_is_named(place, monkeypatch):
    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(archive, "digest", refuse)
    with pytest.raises(DatasetUnavailableError, match=r"read .*gz, got: .*Permission"):
        place.prepare()


@pytest.mark.parametrize("inner", ["cifar10", "cifar10/3.0.2"])
def test_a_directory_within_the_prepared_data_is_told_from_the_one_above(place, inner):
    place.prepare()
    message = f"Expected .* as data_dir, got data_dir='.*/data/{inner}', .* Set it to "
    with pytest.raises(DatasetUnavailableError, match=message) as error:
        place.load(data_dir=place.root / "data" / inner)
    assert str(error.value).endswith(f"Set it to {place.root / 'data'}.")


def test_the_official_archives_are_the_known_ones():
    for spec in OFFICIAL.values():
        assert spec.archive.url.startswith("https://www.cs.toronto.edu/~kriz/cifar-10")
        assert spec.archive.url.endswith(spec.archive.name)
        assert len(spec.archive.sha256) == 64


def test_a_data_directory_that_cannot_be_written_is_reported(place):
    (place.root / "data").write_text("a file")
    with pytest.raises(DatasetUnavailableError, match=r"to write .* Set data_dir"):
        place.prepare()


def test_a_full_disk_during_the_preparation_is_reported(place, monkeypatch):
    full = RuntimeError("write() failed:\nNo space left on device")  # ArrayRecord's

    def fail(_):
        raise full

    monkeypatch.setattr(cifar_builder.CifarBuilder, "download_and_prepare", fail)
    message = r"write cifar10 to .*got: write\(\) failed: No space left .* Set data_dir"
    with pytest.raises(DatasetUnavailableError, match=message) as error:
        place.prepare()
    assert "\n" not in str(error.value)


def test_a_failed_preparation_leaves_nothing_behind(place, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(cifar_builder, "_encode_png", lambda _: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            place.prepare()
    assert not list((place.root / "data" / "cifar10").iterdir())
    place.check(place.prepare())


KILLED = """
import os, pickle, signal, sys
from samrobust.data import cifar, cifar_builder
spec, root = pickle.load(open(sys.argv[1], "rb"))
calls, encode = [], cifar_builder._encode_png
def encode_or_die(image):
    calls.append(None)
    if len(calls) > 5:
        os.kill(os.getpid(), signal.SIGKILL)
    return encode(image)
cifar_builder._encode_png = encode_or_die
cifar.load_cifar(spec, root / "data", root / "manual", root / "cache")
"""
PREPARE = """
import pickle, sys
from samrobust.data import cifar
spec, root = pickle.load(open(sys.argv[1], "rb"))
cifar.load_cifar(spec, root / "data", root / "manual", root / "cache")
"""


def start(place, script):
    path = place.root / "place.pickle"
    path.write_bytes(pickle.dumps((place.spec, place.root)))
    return subprocess.Popen(
        [sys.executable, "-c", script, str(path)], stderr=subprocess.PIPE, text=True
    )


def test_killed_and_simultaneous_preparations_do_no_harm(place):
    killed = start(place, KILLED)
    assert killed.communicate() is not None
    assert killed.returncode == -9
    assert not (place.root / "data" / "cifar10" / "3.0.2").exists()
    processes = [start(place, PREPARE) for _ in range(2)]
    for process in processes:
        _, output = process.communicate()
        assert process.returncode == 0, output
    place.check(place.load())


def test_a_preparation_that_loses_the_race_uses_the_winners_data(place, monkeypatch):
    place.prepare()
    calls = []

    def not_there_at_first(*args):
        calls.append(None)
        return None if len(calls) <= 2 else find_prepared(*args)

    def fail(_):
        (place.root / "data" / "cifar10" / "moved").rename(target)
        raise OSError("Directory not empty")

    find_prepared = cifar.find_prepared
    target = place.root / "data" / "cifar10" / "3.0.2"
    target.rename(target.with_name("moved"))
    monkeypatch.setattr(cifar, "find_prepared", not_there_at_first)
    monkeypatch.setattr(
        "samrobust.data.cifar_builder.CifarBuilder.download_and_prepare", fail
    )
    place.check(place.prepare())


class Server:
    """Serves bytes and loses the connection after so many bytes, as told."""

    def __init__(self, content):
        self.content = content
        self.drop_after = []  # one entry a request; None or no entry: all is sent
        self.ranges = []
        self.honors_range = True
        self.status = None
        server = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                server.answer(self)

            def log_message(self, format, *args):  # noqa: A002
                pass

        self.http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}/file.bin"

    def answer(self, request):
        wanted = request.headers.get("Range")
        self.ranges.append(wanted)
        if self.status is not None:
            request.send_error(self.status)
            return
        begin = 0
        if wanted and self.honors_range:
            begin = int(wanted.removeprefix("bytes=").removesuffix("-"))
        if begin >= len(self.content):
            request.send_error(416)
            return
        body = self.content[begin:]
        request.send_response(206 if begin else 200)
        request.send_header("Content-Length", str(len(body)))
        request.end_headers()
        drop = self.drop_after.pop(0) if self.drop_after else None
        request.wfile.write(body[:drop])


CONTENT = np.random.default_rng(5).bytes(300_000)


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(archive.time, "sleep", lambda _: None)
    server = Server(CONTENT)
    thread = threading.Thread(target=server.http.serve_forever, args=(0.01,))
    thread.start()
    yield server
    server.http.shutdown()
    thread.join()
    server.http.server_close()


def served(server):
    sha256 = hashlib.sha256(server.content).hexdigest()
    return ArchiveFile("file.bin", server.url, len(server.content), sha256)


def test_a_broken_download_goes_on_where_it_stopped(server, tmp_path):
    server.drop_after = [100_000, 0, 100_000]
    path = find_archive(served(server), tmp_path)
    assert path.read_bytes() == CONTENT
    starts = [int(r[6:-1]) if r else 0 for r in server.ranges]
    assert len(starts) == 4
    assert starts[0] == 0 < starts[1] == starts[2] < starts[3]
    assert [entry.name for entry in tmp_path.iterdir()] == ["file.bin"]


def test_a_download_goes_on_in_a_later_process(server, tmp_path):
    (tmp_path / "file.bin.part").write_bytes(CONTENT[:250_000])
    assert find_archive(served(server), tmp_path).read_bytes() == CONTENT
    assert server.ranges == ["bytes=250000-"]


def test_a_finished_download_is_not_repeated(server, tmp_path):
    find_archive(served(server), tmp_path)
    find_archive(served(server), tmp_path)
    assert len(server.ranges) == 1


def test_a_server_that_cannot_resume_sends_everything_anew(server, tmp_path):
    server.honors_range = False
    server.drop_after = [100_000]
    assert find_archive(served(server), tmp_path).read_bytes() == CONTENT
    assert len(server.ranges) == 2


@pytest.mark.parametrize("size", [1000, 300_000, 400_000])
def test_a_damaged_beginning_is_noticed_and_downloaded_anew(server, tmp_path, size):
    (tmp_path / "file.bin.part").write_bytes(b"?" * size)
    assert find_archive(served(server), tmp_path).read_bytes() == CONTENT
    assert len(server.ranges) == 2


def test_a_wrong_file_on_the_server_is_refused(server, tmp_path):
    expected = served(server)
    server.content = b"another file"
    with pytest.raises(DatasetUnavailableError, match="does not match the known hash"):
        find_archive(expected, tmp_path)
    assert not (tmp_path / "file.bin").exists()


def test_a_refusal_ends_the_download_at_once(server, tmp_path):
    server.status = 404
    with pytest.raises(DatasetUnavailableError, match="404"):
        find_archive(served(server), tmp_path)
    assert len(server.ranges) == 1


def test_attempts_that_bring_something_are_not_counted(server, tmp_path, monkeypatch):
    monkeypatch.setattr(archive, "_MAX_ATTEMPTS", 2)
    server.drop_after = [100_000, 100_000]
    assert find_archive(served(server), tmp_path).read_bytes() == CONTENT


def test_a_manual_directory_comes_before_that_of_all_data(server, tmp_path):
    for folder, content in (("data/manual", b"another file"), ("mine", CONTENT)):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "file.bin").write_bytes(content)
    found = find_archive(served(server), tmp_path / "data", tmp_path / "mine")
    assert found == tmp_path / "mine" / "file.bin"


def test_with_a_manual_directory_a_damaged_download_is_refused_and_kept(
    server, tmp_path
):
    (tmp_path / "mine").mkdir()
    damaged = tmp_path / "data" / "file.bin"
    damaged.parent.mkdir()
    damaged.write_bytes(CONTENT[:-1])
    with pytest.raises(DatasetUnavailableError, match=r"sha256=.* of .*data/file\.bin"):
        find_archive(served(server), tmp_path / "data", tmp_path / "mine")
    assert damaged.read_bytes() == CONTENT[:-1]
    damaged.write_bytes(CONTENT)
    assert find_archive(served(server), damaged.parent, tmp_path / "mine") == damaged


@pytest.mark.parametrize("status", [408, 425, 429, 503])
def test_the_download_gives_up_after_attempts_that_bring_nothing(
    status, server, tmp_path, monkeypatch
):
    pauses = []
    monkeypatch.setattr(archive.time, "sleep", pauses.append)
    server.status = status
    with pytest.raises(DatasetUnavailableError, match=f"{status}") as error:
        find_archive(served(server), tmp_path)
    assert isinstance(error.value.__cause__, ConnectionError)
    assert len(server.ranges) == 5
    assert pauses == [1.0, 2.0, 4.0, 8.0]


def test_a_cached_data_set_is_not_decoded_again(place, monkeypatch):
    place.prepare()
    monkeypatch.setattr(prepared, "_decode", None)
    place.check(place.load())


def test_the_cache_lies_where_the_system_keeps_caches(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_cache_dir() == tmp_path / "samrobust" / "data"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_cache_dir() == tmp_path / ".cache" / "samrobust" / "data"
    monkeypatch.delenv("TFDS_DATA_DIR", raising=False)
    assert folders.default_data_dir() == tmp_path / "tensorflow_datasets"


@pytest.fixture(scope="module")
def digits():
    return load_dataset("digits")


def rows(split: Split) -> list[bytes]:
    """Image and label of each example as one string of bytes."""
    pairs = zip(split.images, split.labels, strict=True)
    return [image.tobytes() + bytes([label]) for image, label in pairs]


def test_the_digits_splits_are_disjoint_and_hold_every_image_once(digits):
    pixels, targets = sklearn.datasets.load_digits(return_X_y=True)
    expected = [
        bytes(int(v * 255 / 16 + 0.5) for v in image) + bytes([label])
        for image, label in zip(pixels, targets, strict=True)
    ]
    train, test = rows(digits.train), rows(digits.test)
    assert sorted(train + test) == sorted(expected)
    assert not set(train) & set(test)
    assert (len(train), len(test)) == (1297, 500)
    positions = [expected.index(row) for row in train]
    assert positions == sorted(positions)


def test_the_digits_splits_are_stratified(digits):
    everything = np.concatenate([digits.train.labels, digits.test.labels])
    share = np.bincount(everything) * 500 / 1797
    assert (np.abs(np.bincount(digits.test.labels) - share) < 1).all()


def test_the_digits_have_the_mean_and_deviation_of_their_training_images(digits):
    pixels = digits.train.images.astype(np.float64).ravel() / 255
    assert digits.mean == pytest.approx((pixels.sum() / len(pixels),))
    assert digits.std == pytest.approx(
        (np.sqrt((pixels**2).mean() - pixels.mean() ** 2),)
    )
    assert digits.image_shape == (8, 8, 1)
    assert digits.num_classes == 10


def test_the_digits_split_never_changes(digits):
    content = digits.test.images.tobytes() + digits.test.labels.tobytes()
    digest = hashlib.sha256(content).hexdigest()
    assert digest.startswith("507318078759bb29")


def test_all_arrays_are_read_only(digits):
    some = load_dataset("digits", validation_size=10, train_size=20, test_size=30)
    for dataset in (digits, some):
        for split in (dataset.train, dataset.validation, dataset.test):
            assert not split.images.flags.writeable
            assert not split.labels.flags.writeable


def test_training_and_validation_share_no_example_and_keep_the_order(digits):
    order = {row: i for i, row in enumerate(rows(digits.train))}
    dataset = load_dataset("digits", validation_size=300)
    train, validation = rows(dataset.train), rows(dataset.validation)
    assert (len(train), len(validation)) == (997, 300)
    assert sorted(train + validation) == sorted(rows(digits.train))
    for part in (train, validation):
        positions = [order[row] for row in part]
        assert positions == sorted(positions)
    assert rows(dataset.test) == rows(digits.test)


def test_the_validation_examples_do_not_depend_on_the_training_size(digits):
    parts = {
        size: load_dataset("digits", validation_size=100, train_size=size)
        for size in (50, 500, None)
    }
    validation = {tuple(rows(part.validation)) for part in parts.values()}
    assert len(validation) == 1
    trains = [set(rows(part.train)) for part in parts.values()]
    assert [len(train) for train in trains] == [50, 500, 1197]
    assert trains[0] < trains[1] < trains[2] < set(rows(digits.train))


def test_the_test_subset_is_spread_over_the_order_and_depends_on_its_size_only(digits):
    positions = {row: i for i, row in enumerate(rows(digits.test))}
    alone = load_dataset("digits", test_size=120)
    other = load_dataset("digits", test_size=120, validation_size=7, train_size=9)
    assert rows(alone.test) == rows(other.test)
    chosen = [positions[row] for row in rows(alone.test)]
    stretches = [range(500 * i // 120, 500 * (i + 1) // 120) for i in range(120)]
    assert all(c in s for c, s in zip(chosen, stretches, strict=True))


def test_every_example_of_a_stretch_is_chosen_by_some_seed():
    chosen = np.array([spread(11, 4, seed) for seed in range(40)])
    stretches = [[0, 1], [2, 3, 4], [5, 6, 7], [8, 9, 10]]
    for places, stretch in zip(chosen.T, stretches, strict=True):
        np.testing.assert_array_equal(np.unique(places), stretch)


def test_the_split_seed_chooses_the_examples_and_nothing_else_does():
    def load(seed):
        dataset = load_dataset(
            "digits", validation_size=50, train_size=60, test_size=70, split_seed=seed
        )
        return [rows(s) for s in (dataset.train, dataset.validation, dataset.test)]

    assert load(3) == load(3)
    assert all(a != b for a, b in zip(load(3), load(4), strict=True))


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        (
            {"validation_size": -1},
            "0 <= validation_size < 1297, got validation_size=-1",
        ),
        ({"validation_size": 1297}, "0 <= validation_size < 1297"),
        ({"train_size": 0}, "1 <= train_size and .* got train_size=0"),
        ({"train_size": 1298}, "train_size \\+ validation_size <= 1297"),
        ({"train_size": 1000, "validation_size": 298}, "validation_size=298"),
        ({"test_size": 0}, "1 <= test_size <= 500, got test_size=0"),
        ({"test_size": 501}, "1 <= test_size <= 500"),
        ({"split_seed": -1}, "0 <= split_seed, got split_seed=-1"),
        *(
            ({name: value}, f"an integer as {name}, got {name}={value!r}")
            for name in ("validation_size", "train_size", "test_size", "split_seed")
            for value in (2.5, 10.0, True, "10")
        ),
        ({"validation_size": None}, "an integer as validation_size"),
    ],
)
def test_sizes_out_of_range_are_refused(sizes: Any, message):
    with pytest.raises(ValueError, match=f"Expected .*{message}"):
        load_dataset("digits", **sizes)


def test_sizes_are_refused_before_anything_is_read(monkeypatch):
    monkeypatch.setattr(cifar, "CIFAR10", cifar.CIFAR10._replace(load=None))
    wrong = {"train_size": 50_001, "test_size": 0, "validation_size": 50_000}
    for name, size in wrong.items():
        sizes: Any = {name: size}
        with pytest.raises(ValueError, match=name):
            load_dataset("cifar10", **sizes)


def test_numpy_integers_are_sizes_too():
    size: Any = np.int64(30)
    assert len(load_dataset("digits", train_size=size).train) == 30


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("", "the name of a folder as FIELD, got FIELD=''"),
        ("  ", "the name of a folder as FIELD"),
        ("a\0b", "the name of a folder as FIELD"),
        ("$SET_TO_NOTHING", "the name of a folder as FIELD"),
        ("gs://bucket/x", r"a path of the file system as FIELD, got FIELD='gs://"),
        ("s3://bucket/x", "a path of the file system as FIELD"),
        ("file:///x", "a path of the file system as FIELD"),
        (pathlib.Path("gs://bucket/x"), "a path of the file system as FIELD"),
        ("$NOT_SET/x", "variables that are known in FIELD, got FIELD='.NOT_SET/x'"),
        ("/a/${NOT_SET}", "variables that are known in FIELD"),
        ("~nobody-of-this-name/x", "users and variables that are known in FIELD"),
        (3, "a path as FIELD, got FIELD=3"),
        (b"/x", "a path as FIELD"),
    ],
)
def test_a_setting_that_is_no_folder_is_refused(value, message, monkeypatch, tmp_path):
    monkeypatch.setenv("SET_TO_NOTHING", "")
    monkeypatch.delenv("NOT_SET", raising=False)
    monkeypatch.chdir(tmp_path)
    for field in ("data_dir", "manual_dir", "cache_dir"):
        expected = f"Expected .*{message.replace('FIELD', field)}"
        with pytest.raises(ValueError, match=expected) as error:
            load_dataset("cifar10", **{field: value})
        assert "\n" not in str(error.value)
    if isinstance(value, str) and "\0" not in value and value:
        monkeypatch.setenv("TFDS_DATA_DIR", value)
        with pytest.raises(ValueError, match="TFDS_DATA_DIR"):
            load_dataset("cifar10")
    assert not list(tmp_path.iterdir())


def test_home_and_variables_are_expanded_in_every_folder(place, monkeypatch):
    monkeypatch.setenv("HOME", str(place.root))
    monkeypatch.setenv("PLACE", str(place.root))
    place.check(
        place.load(
            data_dir="~/data", manual_dir="$PLACE/manual", cache_dir="${PLACE}/cache"
        )
    )
    names = {path.name for path in place.root.iterdir()}
    assert names == {"data", "manual", "cache"}


def test_without_a_home_the_default_folder_is_refused(monkeypatch):
    monkeypatch.delenv("TFDS_DATA_DIR", raising=False)
    monkeypatch.setattr(folders.os.path, "expanduser", lambda path: path)
    with pytest.raises(
        ValueError, match=r"known in TFDS_DATA_DIR, got .*Write the path"
    ):
        folders.default_data_dir()


def test_the_digits_need_no_directory_and_no_warning(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_dataset("digits", data_dir=tmp_path / "a", cache_dir=tmp_path / "b")
    assert not list(tmp_path.iterdir())
