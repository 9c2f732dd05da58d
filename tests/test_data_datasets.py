"""Data sets: small archives in the official layout, a local server, a damaged cache."""

import dataclasses
import hashlib
import http.server
import io
import json
import pathlib
import pickle
import subprocess
import sys
import tarfile
import threading
import warnings
from typing import Any

import numpy as np
import pytest
import sklearn.datasets

from samrobust.data import DatasetUnavailableError, Split, archive, cifar, load_dataset
from samrobust.data.archive import Archive, ResumingDownloader, find_archive
from samrobust.data.cache import cached_arrays, default_cache_dir

PER_FILE = 4
OFFICIAL = {"cifar10": cifar.CIFAR10, "cifar100": cifar.CIFAR100}
NOWHERE = "http://127.0.0.1:9/"  # nobody listens at the discard port


def add_file(tar, name, content):
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


def make_archive(name, path):
    """Writes a small archive; returns its spec and (images, labels, coarse)."""
    rng = np.random.default_rng(0)
    spec, arrays = OFFICIAL[name], {}
    with tarfile.open(path, "w:gz") as tar:
        for split, members in spec.splits.items():
            count = PER_FILE * len(members)
            images = rng.integers(0, 256, (count, 32, 32, 3)).astype(np.uint8)
            labels = rng.integers(0, spec.labels[0][2], count)
            coarse = rng.integers(0, 20, count)
            arrays[split] = images, labels, coarse
            records = [
                bytes([c, label][-len(spec.label_bytes) :]) + planes.tobytes()
                for c, label, planes in zip(
                    coarse, labels, images.transpose(0, 3, 1, 2), strict=True
                )
            ]
            for i, member in enumerate(members):
                add_file(tar, member, b"".join(records[PER_FILE * i :][:PER_FILE]))
        for key, member, number in spec.labels:
            names = "\n".join(f"{key}{i}" for i in range(number))
            add_file(tar, member, f"{names}\n\n".encode())
        add_file(tar, "readme.html", b"not for us")
    content = path.read_bytes()
    fake = Archive(
        name=spec.archive.name,
        url=NOWHERE + spec.archive.name,
        num_bytes=len(content),
        sha256=hashlib.sha256(content).hexdigest(),
    )
    return dataclasses.replace(spec, archive=fake), arrays


@dataclasses.dataclass
class Place:
    """A small archive in a manual directory, and empty directories for the rest."""

    name: str
    spec: cifar.CifarSpec
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


@pytest.fixture
def make_place(tmp_path, monkeypatch):
    def make(name):
        (tmp_path / "manual").mkdir()
        path = tmp_path / "manual" / OFFICIAL[name].archive.name
        spec, arrays = make_archive(name, path)
        monkeypatch.setattr(f"samrobust.data.datasets.{name.upper()}", spec)
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
    assert (place.root / "cache" / "cifar10-3.0.10-train.json").exists()


def test_data_in_another_format_are_refused_with_advice(place):
    directory = place.root / "data" / "cifar10" / "3.0.2"
    directory.mkdir(parents=True)
    content = json.dumps({"name": "cifar10", "fileFormat": "tfrecord"})
    (directory / "dataset_info.json").write_text(content)
    with pytest.raises(DatasetUnavailableError, match="another format or unfinished"):
        place.prepare()


def test_damaged_prepared_data_are_reported(place):
    place.prepare()
    directory = place.root / "data" / "cifar10" / "3.0.2"
    records = directory / "cifar10-train.array_record-00000-of-00001"
    records.write_bytes(records.read_bytes()[:1000])
    with (
        pytest.warns(UserWarning, match="have changed"),
        pytest.raises(DatasetUnavailableError, match=r"3\.0\.2, got: .*Delete the"),
    ):
        place.load()


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


def test_without_data_and_network_the_error_says_what_to_put_where(place):
    with pytest.raises(DatasetUnavailableError) as error:
        place.load(manual_dir=place.root / "empty")
    official = place.spec.archive
    for part in (
        *(official.name, official.url, official.sha256, f"{official.num_bytes} bytes"),
        *(str(place.root / "empty"), "data_dir", "TFDS_DATA_DIR", "cifar10/3.0.2"),
    ):
        assert part in str(error.value)


def test_the_official_archives_are_the_known_ones():
    for spec in OFFICIAL.values():
        assert spec.archive.url.startswith("https://www.cs.toronto.edu/~kriz/cifar-10")
        assert spec.archive.url.endswith(spec.archive.name)
        assert len(spec.archive.sha256) == 64


def test_a_data_directory_that_cannot_be_written_is_reported(place):
    (place.root / "data").write_text("a file")
    with pytest.raises(DatasetUnavailableError, match="Set data_dir to a directory"):
        place.prepare()


def test_a_failed_preparation_leaves_nothing_behind(place, monkeypatch):
    from samrobust.data import cifar_builder

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

    def not_there_at_first(name, data_dir):
        calls.append(None)
        return None if len(calls) <= 2 else find_prepared(name, data_dir)

    def fail(_):
        (place.root / "data" / "cifar10" / "moved").rename(target)
        raise OSError("Directory not empty")

    find_prepared = cifar._find_prepared
    target = place.root / "data" / "cifar10" / "3.0.2"
    target.rename(target.with_name("moved"))
    monkeypatch.setattr(cifar, "_find_prepared", not_there_at_first)
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
        self.honours_range = True
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
        if wanted and self.honours_range:
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
    return Archive("file.bin", server.url, len(server.content), sha256)


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
    server.honours_range = False
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


def test_the_download_gives_up_after_attempts_that_bring_nothing(
    server, tmp_path, monkeypatch
):
    pauses = []
    monkeypatch.setattr(archive.time, "sleep", pauses.append)
    server.status = 503
    downloader = ResumingDownloader(tmp_path / "part", max_attempts=4, backoff=0.5)
    with pytest.raises(ConnectionError, match="503"):
        downloader(server.url, str(tmp_path / "file"), None)
    assert len(server.ranges) == 4
    assert pauses == [0.5, 1.0, 2.0]


def test_a_downloader_without_attempts_is_refused(tmp_path):
    with pytest.raises(
        ValueError, match=r"Expected 1 <= max_attempts, got max_attempts=0"
    ):
        ResumingDownloader(tmp_path / "part", max_attempts=0)


class Decoder:
    """Counts how often it is asked for its arrays."""

    calls = 0

    def __call__(self):
        self.calls += 1
        images = np.arange(2000, dtype=np.uint8).reshape(50, 5, 4, 2)
        return {"images": images, "labels": np.arange(50, dtype=np.int32)}


def check_arrays(arrays):
    for name, array in Decoder()().items():
        np.testing.assert_array_equal(arrays[name], array)
        assert arrays[name].dtype == array.dtype
        assert not arrays[name].flags.writeable


def test_the_second_read_is_mapped_from_the_cache(tmp_path):
    decode = Decoder()
    for _ in range(3):
        arrays = cached_arrays(tmp_path / "new" / "dir", "name", {"a": 1}, decode)
        check_arrays(arrays)
        assert isinstance(arrays["images"], np.memmap)
    assert decode.calls == 1
    names = {path.name for path in (tmp_path / "new" / "dir").iterdir()}
    assert names == {"name.json", "name-images.npy", "name-labels.npy"}


def flip_a_byte(path):
    content = bytearray(path.read_bytes())
    content[-7] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("file", ["name.json", "name-images.npy", "name-labels.npy"])
@pytest.mark.parametrize(
    "damage",
    [
        flip_a_byte,
        lambda path: path.write_bytes(path.read_bytes()[:-10]),
        lambda path: path.write_bytes(b""),
        lambda path: path.write_text("null"),
    ],
)
def test_a_damaged_cache_is_rebuilt_with_a_warning(tmp_path, file, damage):
    decode = Decoder()
    cached_arrays(tmp_path, "name", {"a": 1}, decode)
    damage(tmp_path / file)
    with pytest.warns(UserWarning, match="cannot be used and is rebuilt"):
        check_arrays(cached_arrays(tmp_path, "name", {"a": 1}, decode))
    check_arrays(cached_arrays(tmp_path, "name", {"a": 1}, decode))
    assert decode.calls == 2


def test_a_missing_array_is_rebuilt_and_a_missing_manifest_too(tmp_path):
    decode = Decoder()
    cached_arrays(tmp_path, "name", {"a": 1}, decode)
    (tmp_path / "name-labels.npy").unlink()
    with pytest.warns(UserWarning, match=r"rebuilt: .*No such file"):
        check_arrays(cached_arrays(tmp_path, "name", {"a": 1}, decode))
    (tmp_path / "name.json").unlink()
    check_arrays(cached_arrays(tmp_path, "name", {"a": 1}, decode))
    assert decode.calls == 3


def test_a_changed_source_is_decoded_anew(tmp_path):
    decode = Decoder()
    cached_arrays(tmp_path, "name", {"size": 1}, decode)
    with pytest.warns(UserWarning, match="have changed"):
        cached_arrays(tmp_path, "name", {"size": 2}, decode)
    cached_arrays(tmp_path, "name", {"size": 2}, decode)
    assert decode.calls == 2


def test_a_cache_that_cannot_be_written_is_done_without(tmp_path):
    (tmp_path / "file").write_text("not a directory")
    with pytest.warns(UserWarning, match="cannot be written .* Set cache_dir"):
        check_arrays(cached_arrays(tmp_path / "file" / "x", "name", {}, Decoder()))


def test_a_failed_write_leaves_no_temporary_file(tmp_path, monkeypatch):
    def full(file, _):
        file.write(b"some bytes")
        raise OSError("No space left on device")

    monkeypatch.setattr(np, "save", full)
    with pytest.warns(UserWarning, match="No space left"):
        check_arrays(cached_arrays(tmp_path, "name", {}, Decoder()))
    assert not list(tmp_path.iterdir())


def test_caches_filled_at_the_same_time_are_intact(tmp_path):
    results = []

    def fill():
        results.append(cached_arrays(tmp_path, "name", {}, Decoder()))

    threads = [threading.Thread(target=fill) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    decode = Decoder()
    for arrays in [*results, cached_arrays(tmp_path, "name", {}, decode)]:
        check_arrays(arrays)
    assert (len(results), decode.calls) == (8, 0)


def test_a_cached_data_set_is_not_decoded_again(place, monkeypatch):
    place.prepare()
    monkeypatch.setattr(cifar, "_decode", None)
    place.check(place.load())


def test_the_cache_lies_where_the_system_keeps_caches(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_cache_dir() == tmp_path / "samrobust" / "data"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_cache_dir() == tmp_path / ".cache" / "samrobust" / "data"
    monkeypatch.delenv("TFDS_DATA_DIR", raising=False)
    assert cifar.default_data_dir() == tmp_path / "tensorflow_datasets"


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
    ],
)
def test_sizes_out_of_range_are_refused(sizes, message):
    with pytest.raises(ValueError, match=f"Expected .*{message}"):
        load_dataset("digits", **sizes)


def test_an_unknown_data_set_is_refused_with_the_known_names():
    with pytest.raises(
        ValueError, match=r"\{cifar10, cifar100, digits\}, got name='mnist'"
    ):
        load_dataset("mnist")


def test_the_digits_need_no_directory_and_no_warning(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_dataset("digits", data_dir=tmp_path / "a", cache_dir=tmp_path / "b")
    assert not list(tmp_path.iterdir())
