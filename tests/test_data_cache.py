"""The cache of decoded arrays: kept apart by source, damaged, shared, done without."""

import hashlib
import json
import os
import subprocess
import sys
import threading
import warnings

import numpy as np
import pytest

from samrobust.data.cache import cached_arrays
from samrobust.system import storage

KEY = hashlib.sha256(b'{"a": 1}').hexdigest()[:16]
FILES = [f"name-{KEY}.json", f"name-{KEY}-images.npy", f"name-{KEY}-labels.npy"]


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
    assert names == set(FILES)


def test_what_a_killed_process_was_writing_is_removed_after_an_hour(tmp_path):
    left, new = (storage.temporary_beside(tmp_path / "name-images.npy") for _ in "ab")
    for path in (left, new):
        path.touch()
    os.utime(left, (0, 0))
    cached_arrays(tmp_path, "name", {"a": 1}, Decoder())
    assert {path.name for path in tmp_path.iterdir()} == {*FILES, new.name}


def flip_a_byte(path):
    content = bytearray(path.read_bytes())
    content[-7] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("file", FILES)
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
    (tmp_path / FILES[2]).unlink()
    with pytest.warns(UserWarning, match=r"rebuilt: .*No such file"):
        check_arrays(cached_arrays(tmp_path, "name", {"a": 1}, decode))
    (tmp_path / FILES[0]).unlink()
    check_arrays(cached_arrays(tmp_path, "name", {"a": 1}, decode))
    assert decode.calls == 3


def test_an_array_that_another_process_wrote_meanwhile_is_not_replaced(tmp_path):
    # It may be mapped on another machine, where a file that is replaced is lost.
    cached_arrays(tmp_path, "name", {"a": 1}, Decoder())
    before = {name: (tmp_path / name).stat().st_ino for name in FILES[1:]}

    def decode_slowly():
        cached_arrays(tmp_path, "name", {"a": 1}, Decoder())
        return Decoder()()

    for name in (FILES[0], FILES[1]):
        (tmp_path / name).unlink()
    check_arrays(cached_arrays(tmp_path, "name", {"a": 1}, decode_slowly))
    assert {path.name for path in tmp_path.iterdir()} == set(FILES)
    assert (tmp_path / FILES[2]).stat().st_ino == before[FILES[2]]


def test_each_source_has_its_own_cache(tmp_path):
    decode = Decoder()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for size in (1, 2, 1, 2):
            check_arrays(cached_arrays(tmp_path, "name", {"size": size}, decode))
    assert decode.calls == 2


def test_without_a_directory_there_is_no_cache():
    decode = Decoder()
    for _ in range(2):
        check_arrays(cached_arrays(None, "name", {"a": 1}, decode))
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


def rewrite(path, array, *, allow_pickle=False):
    """Replaces an array and its hash in the manifest, as no damage would."""
    np.save(path, array, allow_pickle=allow_pickle)
    manifest = path.with_name(FILES[0])
    content = json.loads(manifest.read_text())
    name = path.stem.rpartition("-")[2]
    content["sha256"][name] = hashlib.sha256(path.read_bytes()).hexdigest()
    manifest.write_text(json.dumps(content))


def drop_array(path):
    content = json.loads(path.with_name(FILES[0]).read_text())
    del content["sha256"]["labels"]
    path.with_name(FILES[0]).write_text(json.dumps(content))


def replace_by_a_folder(path):
    path.unlink()
    path.mkdir()


def verify(arrays):
    if {name: (a.shape, a.dtype) for name, a in arrays.items()} != {
        name: (a.shape, a.dtype) for name, a in Decoder()().items()
    }:
        raise ValueError("other shapes")


ARRAY_DAMAGE = {
    "emptied": lambda path: path.write_bytes(b""),
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-10]),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"0" * 50),
    "zeros": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "text": lambda path: path.write_text("null"),
    "header": lambda path: path.write_bytes(b"?" + path.read_bytes()[1:]),
    "folder": replace_by_a_folder,
    "gone": lambda path: path.unlink(),
    "shape": lambda path: rewrite(path, np.load(path)[1:]),
    "type": lambda path: rewrite(path, np.load(path).astype(np.float32)),
    "scalar": lambda path: rewrite(path, np.float32(3)),
    "objects": lambda path: rewrite(
        path, np.array([{}, print], dtype=object), allow_pickle=True
    ),
    "not in the manifest": drop_array,
}
MANIFEST_DAMAGE = {
    **{f"content {text[:9]}": text for text in ("[]", "3", "{}", "[" * 99_999, "NaN")},
    "no hashes": json.dumps({"source": {"a": 1}, "sha256": {}}),
    "null hashes": json.dumps({"source": {"a": 1}, "sha256": None}),
    "a list of hashes": json.dumps({"source": {"a": 1}, "sha256": ["images"]}),
    "other source": json.dumps({"source": {"a": 2}, "sha256": {}}),
    "way out": json.dumps({"source": {"a": 1}, "sha256": {"/../../x": "0"}}),
    "nul": "\0",
}


@pytest.mark.parametrize(
    "damage",
    [
        *ARRAY_DAMAGE.values(),
        *(
            lambda path, text=text: path.with_name(FILES[0]).write_text(text)
            for text in MANIFEST_DAMAGE.values()
        ),
    ],
    ids=[*ARRAY_DAMAGE, *MANIFEST_DAMAGE],
)
def test_no_damage_to_a_cache_is_believed(tmp_path, damage):
    cached_arrays(tmp_path, "name", {"a": 1}, Decoder(), verify)
    damage(tmp_path / FILES[2])
    with pytest.warns(UserWarning, match="cannot be"):
        check_arrays(cached_arrays(tmp_path, "name", {"a": 1}, Decoder(), verify))


def test_what_was_decoded_is_verified_before_it_is_written(tmp_path):
    with pytest.raises(ValueError, match="other shapes"):
        cached_arrays(tmp_path, "name", {}, lambda: {"x": np.zeros(2)}, verify)
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_said_once_for_all_arrays(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(f"{next(sizes)} requested and 7 written")  # as NumPy says it

    sizes = iter((10, 20))
    monkeypatch.setattr(np, "save", full)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        for stem in ("train", "test"):
            check_arrays(cached_arrays(tmp_path, stem, {}, Decoder()))
    assert [str(w.message).partition("):")[0] for w in caught] == [
        f"The cache {tmp_path} cannot be written (No space left"
    ]


RACE = """
import sys, numpy as np, pathlib
from samrobust.data.cache import cached_arrays
def decode():
    return {"images": np.arange(3_000_000, dtype=np.uint8), "labels": np.arange(9)}
for _ in range(4):
    arrays = cached_arrays(pathlib.Path(sys.argv[1]), "name", {"a": 1}, decode)
    assert np.array_equal(arrays["images"], decode()["images"])
    assert np.array_equal(arrays["labels"], decode()["labels"])
    pathlib.Path(sys.argv[1], sys.argv[2]).unlink(missing_ok=True)
"""


def test_processes_that_build_and_lose_one_cache_at_a_time_all_get_it(tmp_path):
    processes = [
        subprocess.Popen(
            [sys.executable, "-Wignore", "-c", RACE, tmp_path, name],
            stderr=subprocess.PIPE,
            text=True,
        )
        for name in FILES[:2]
    ]
    for process in processes:
        _, errors = process.communicate()
        assert process.returncode == 0, errors
    assert not list(tmp_path.glob("*.tmp"))
