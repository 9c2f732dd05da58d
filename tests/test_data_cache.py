"""The cache of decoded arrays: kept apart by source, damaged, shared, done without."""

import hashlib
import threading
import warnings

import numpy as np
import pytest

from samrobust.data.cache import cached_arrays

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
