"""Checkpoints come back bit for bit, or not at all and with a message."""

import dataclasses
import logging
import os
import pathlib
import resource
import shutil
import signal
import subprocess
import sys
import time
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from samrobust.cli import running
from samrobust.training.checkpoint import CheckpointError, Checkpoints, Restored


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    step: jax.Array
    params: dict
    opt_state: optax.OptState
    sums: tuple


def make_state(seed: int) -> State:
    """A state with f32, bf16, int32 and bool leaves, 0-d and empty ones."""
    rng = np.random.default_rng(seed)
    kernel = jnp.asarray(rng.normal(size=(64, 50)), jnp.float32)
    params = {
        "a/b.c['d']": {
            "kernel": kernel.at[0, :3].set(jnp.array([jnp.nan, -0.0, 1e-45]))
        },
        "bias": jnp.asarray(rng.normal(size=7), jnp.bfloat16),
        "mask": jnp.asarray(rng.integers(2, size=9), bool),
        "none": None,
    }
    tx = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.sgd(optax.linear_schedule(0.1, 0.0, 5), momentum=0.9),
    )
    return State(
        step=jnp.int32(seed),
        params=params,
        opt_state=tx.init({"kernel": kernel}),
        sums=(jnp.float32(seed) / 3, [jnp.zeros((0, 4)), jnp.arange(seed)]),
    )


def as_bits(tree):
    leaves, structure = jax.tree.flatten(tree)
    return structure, [(x.shape, x.dtype, np.asarray(x).tobytes()) for x in leaves]


def assert_same(tree, expected):
    assert as_bits(tree) == as_bits(expected)
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(tree))


def small(step: int) -> dict[str, jax.Array]:
    """A small state, incompressible and known from its step."""
    values = np.random.default_rng(step).normal(size=3000)
    return {"step": jnp.int32(step), "w": jnp.asarray(values, jnp.float32)}


def save_all(directory, *steps, keep=10):
    with Checkpoints(directory, keep=keep) as checkpoints:
        for step in steps:
            checkpoints.save(step, small(step), {"saved": step})


def restore(directory, like) -> Restored:
    restored = Checkpoints(directory).restore_latest(like)
    assert restored is not None
    return restored


def assert_restores(directory, step):
    restored = restore(directory, small(0))
    assert (restored.step, restored.metadata) == (step, {"saved": step})
    assert_same(restored.state, small(step))


def flip(path: pathlib.Path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def data_files(step_directory: pathlib.Path) -> list[pathlib.Path]:
    """The files that hold the arrays, of which Orbax leaves some without use."""
    return [path for path in step_directory.glob("**/d/*") if path.is_file()]


def names(directory: pathlib.Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def run_python(code: str, *args, **env) -> subprocess.Popen:
    env = {**os.environ, "JAX_PLATFORMS": "cpu", **env}
    command = [sys.executable, "-W", "error", "-c", code, *map(str, args)]
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True)


def read_line(process: subprocess.Popen) -> str:
    assert process.stdout is not None
    return process.stdout.readline()


def test_a_state_comes_back_bit_for_bit(tmp_path):
    state = make_state(3)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(3, state)
    restored = restore(tmp_path, state)
    assert restored.step == 3
    assert_same(restored.state, state)
    assert isinstance(restored.state, State)


def test_a_target_of_shapes_restores_the_same_state(tmp_path):
    state = make_state(3)
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(3, state, wait=True)
    assert_same(restore(tmp_path, like).state, state)


def test_metadata_comes_back(tmp_path):
    metadata = {
        "epoch": 2,
        "best": 0.1 + 0.2,
        "names": ["ü", None],
        "nan": float("inf"),
    }
    odd: Any = {3: ()}
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, small(1), metadata)
        checkpoints.save(2, small(2), odd)
    assert restore(tmp_path, small(0)).metadata == {"3": []}
    shutil.rmtree(tmp_path / "2")
    assert restore(tmp_path, small(0)).metadata == metadata


def test_metadata_that_json_cannot_hold_is_refused(tmp_path):
    with pytest.raises(TypeError, match="Expected metadata that JSON can hold, got"):
        Checkpoints(tmp_path).save(1, small(1), {"x": np.float32(1)})


@pytest.mark.parametrize("leaf", [1.5, jax.random.key(0), np.zeros(1)])
def test_a_leaf_that_would_not_come_back_as_it_was_is_refused(tmp_path, leaf):
    with pytest.raises(ValueError, match=r"got state\['x'\]="):
        Checkpoints(tmp_path).save(1, {"x": leaf})


def test_the_buffers_may_be_donated_right_after_save(tmp_path):
    overwrite = jax.jit(lambda s: jax.tree.map(lambda x: x * 0, s), donate_argnums=0)
    with Checkpoints(tmp_path) as checkpoints:
        state = jax.tree.map(jnp.copy, small(5))
        checkpoints.save(5, state, {"saved": 5})
        for _ in range(3):
            state = overwrite(state)
    assert_restores(tmp_path, 5)


def test_numpy_arrays_may_be_overwritten_right_after_save(tmp_path):
    # And need not lie in one piece.
    state = jax.tree.map(lambda leaf: np.stack([leaf, leaf], -1)[..., 0], small(5))
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(5, state, {"saved": 5})
        state["w"][:] = 0
    assert_restores(tmp_path, 5)


def test_a_restored_state_may_be_donated(tmp_path):
    save_all(tmp_path, 1)
    state = restore(tmp_path, small(0)).state
    step = jax.jit(lambda s: jax.tree.map(lambda x: x + 1, s), donate_argnums=0)
    expected = jax.tree.map(lambda x: x + 1, small(1))
    assert_same(step(state), expected)


def test_an_empty_or_absent_directory_has_no_checkpoint(tmp_path):
    for directory in (tmp_path, tmp_path / "absent"):
        with Checkpoints(directory) as checkpoints:
            assert checkpoints.restore_latest(small(0)) is None
            assert checkpoints.latest_step() is None
    assert names(tmp_path) == []


def test_a_flipped_byte_in_the_data_falls_back_with_a_warning(tmp_path):
    save_all(tmp_path, 1, 2)
    for path in data_files(tmp_path / "2"):
        flip(path)
    with pytest.warns(UserWarning, match=f"Skipping the damaged .*{tmp_path / '2'}: "):
        assert_restores(tmp_path, 1)


def test_a_flipped_byte_anywhere_never_restores_a_wrong_state(tmp_path):
    save_all(tmp_path / "good", 1, 2)
    reasons = []
    for path in sorted((tmp_path / "good" / "2").rglob("*")):
        if path.is_dir() or not path.stat().st_size:
            continue
        copy = tmp_path / "copy"
        shutil.copytree(tmp_path / "good", copy)
        flip(copy / path.relative_to(tmp_path / "good"))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            damaged = restore(copy, small(0)).step == 1
            assert_restores(copy, 1 if damaged else 2)
        skipped = [str(x.message) for x in caught if "Skipping" in str(x.message)]
        assert damaged == bool(skipped)
        reasons += skipped
        shutil.rmtree(copy)
    assert any("the checksum of state['w']" in reason for reason in reasons)


def truncate(step_directory):
    for path in data_files(step_directory):
        path.write_bytes(path.read_bytes()[:-20])


def change_metadata(step_directory):
    path = step_directory / "metadata" / "metadata"
    content = path.read_text()
    assert '"saved": 2' in content
    path.write_text(content.replace('"saved": 2', '"saved": 3'))


DAMAGES = {
    "truncated data": truncate,
    "no data file": lambda path: [file.unlink() for file in data_files(path)],
    "no manifest of the data": lambda path: (path / "state/manifest.ocdbt").unlink(),
    "no state": lambda path: shutil.rmtree(path / "state"),
    "no metadata": lambda path: shutil.rmtree(path / "metadata"),
    "metadata changed": change_metadata,
    "empty": lambda path: (shutil.rmtree(path), path.mkdir()),
    "of another step": lambda path: (
        shutil.rmtree(path),
        shutil.copytree(path.parent / "1", path),
    ),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_checkpoint_is_skipped_then_healed_by_saving_it(tmp_path, damage):
    save_all(tmp_path, 1, 2)
    damage(tmp_path / "2")
    with pytest.warns(UserWarning, match=f"Skipping the damaged .*{tmp_path / '2'}: "):
        assert_restores(tmp_path, 1)
    save_all(tmp_path, 2)
    assert_restores(tmp_path, 2)


def test_if_all_are_damaged_the_message_names_the_directory(tmp_path):
    save_all(tmp_path, 1, 2)
    for step in "12":
        truncate(tmp_path / step)
    message = rf"Expected an intact checkpoint in {tmp_path}, .*steps=\[1, 2\]"
    with (
        pytest.warns(UserWarning, match="Skipping"),
        pytest.raises(CheckpointError, match=message),
    ):
        Checkpoints(tmp_path).restore_latest(small(0))


def test_temporary_directories_are_ignored_and_only_a_writer_removes_them(tmp_path):
    save_all(tmp_path, 1)
    leftover = tmp_path / "2.orbax-checkpoint-tmp"
    shutil.copytree(tmp_path / "1", leftover)
    assert_restores(tmp_path, 1)
    assert leftover.exists()
    save_all(tmp_path, 2)
    assert_restores(tmp_path, 2)
    assert names(tmp_path) == ["1", "2"]


WRONG = {
    "shape": (lambda t: t | {"w": jnp.zeros(4)}, r"state\['w'\] of float32\[4\], got"),
    "dtype": (
        lambda t: t | {"w": t["w"].astype(jnp.bfloat16)},
        r"state\['w'\] of bfloat16\[3000\], got float32\[3000\]",
    ),
    "a leaf more": (lambda t: t | {"v": t["w"]}, r"missing=\[.*state\['v'\]"),
    "a leaf less": (lambda t: {"w": t["w"]}, r"unexpected=\[.*state\['step'\]"),
    "container": (lambda t: tuple(t.values()), r"missing=\['state\[0\]'"),
}


@pytest.mark.parametrize(("change", "message"), WRONG.values(), ids=WRONG)
def test_a_target_that_does_not_fit_is_refused_by_name(tmp_path, change, message):
    save_all(tmp_path, 1, 2)
    with pytest.raises(CheckpointError, match=message):
        Checkpoints(tmp_path).restore_latest(change(small(0)))


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_the_newest_are_kept(tmp_path, keep):
    save_all(tmp_path, 5, 8, 9, keep=keep)
    save_all(tmp_path, 10, 11, keep=keep)
    assert names(tmp_path) == sorted(["8", "9", "10", "11"][-keep:])[:keep]
    assert Checkpoints(tmp_path).latest_step() == 11


def test_what_a_kill_left_of_a_removed_step_goes_with_the_next(tmp_path):
    save_all(tmp_path, 5, 8, keep=2)
    (tmp_path / "5").rename(tmp_path / ".5.gone")
    save_all(tmp_path, 9, 10, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["10", "9"]


def test_keep_must_be_positive(tmp_path):
    with pytest.raises(ValueError, match="Expected 1 <= keep, got keep=0"):
        Checkpoints(tmp_path, keep=0)


@pytest.mark.parametrize("name", ["runs[2]", "a]", "a\\b"])
def test_a_path_that_would_be_a_pattern_is_refused(tmp_path, name):
    with pytest.raises(ValueError, match=r"without .*Rename the folder"):
        Checkpoints(tmp_path / name / "checkpoints")


def test_a_negative_step_is_refused(tmp_path):
    with pytest.raises(ValueError, match="Expected 0 <= step, got step=-1"):
        Checkpoints(tmp_path).save(-1, small(1))


def test_an_intact_checkpoint_of_the_same_step_stays(tmp_path):
    save_all(tmp_path, 1, 2)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(2, small(7), {"saved": 7})
    assert_restores(tmp_path, 2)


def test_later_steps_of_an_abandoned_run_are_removed_with_a_warning(tmp_path):
    save_all(tmp_path, 1, 5, 6)
    with pytest.warns(UserWarning, match=r"Steps \[5, 6\] in .* later than step 3"):
        save_all(tmp_path, 3)
    assert names(tmp_path) == ["1", "3"]


def test_a_best_checkpoint_may_lie_in_a_subdirectory(tmp_path):
    save_all(tmp_path, 1, 2, keep=2)
    save_all(tmp_path / "best", 1, 2, keep=1)
    save_all(tmp_path, 3, keep=2)
    assert names(tmp_path) == ["2", "3", "best"]
    assert_restores(tmp_path, 3)
    assert_restores(tmp_path / "best", 2)


@pytest.fixture
def full_disk():
    """Yields a function that lets no file grow beyond 4 kB, until the test ends."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


# Orbax closes its event loop while other writes are under way; they raise in threads
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("surfaces_at", ["wait", "save", "restore", "close"])
def test_a_failed_background_write_surfaces_and_loses_nothing(
    tmp_path, surfaces_at, full_disk, caplog, monkeypatch
):
    # The command's: the error is said once, and not by Orbax too.
    monkeypatch.setattr(logging.getLogger("absl"), "filters", [running._is_news])
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save(1, small(1), {"saved": 1}, wait=True)
    full_disk()
    checkpoints.save(2, small(2))
    calls = {
        "wait": checkpoints.wait,
        "save": lambda: checkpoints.save(3, small(3)),
        "restore": lambda: checkpoints.restore_latest(small(0)),
        "close": checkpoints.close,
    }
    message = f"Expected to write the checkpoint of step 2 to {tmp_path}, got .* kept"
    with pytest.raises(CheckpointError, match=message):
        calls[surfaces_at]()
    resource.setrlimit(
        resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
    )
    assert not [record for record in caplog.records if record.levelname == "ERROR"]
    assert_restores(tmp_path, 1)
    checkpoints.save(4, small(4), {"saved": 4})
    checkpoints.close()
    assert names(tmp_path) == ["4"]
    assert_restores(tmp_path, 4)


def test_a_directory_that_cannot_be_written_is_reported(tmp_path):
    (tmp_path / "file").write_text("")
    with (
        Checkpoints(tmp_path / "file") as checkpoints,
        pytest.raises(CheckpointError, match=r"Expected to write .* step 1 to .*file"),
    ):
        checkpoints.save(1, small(1))


WRITER = """
import sys
import numpy as np
from samrobust.training.checkpoint import Checkpoints

checkpoints = Checkpoints(sys.argv[1], keep=2)
step = (checkpoints.latest_step() or 0) + 1
while True:
    w = np.random.default_rng(step).normal(size=100_000).astype(np.float32)
    checkpoints.save(step, {"w": w}, {"saved": step})
    print(step, flush=True)
    step += 1
"""


def test_a_writer_killed_at_any_moment_leaves_an_intact_checkpoint(tmp_path):
    like = {"w": jax.ShapeDtypeStruct((100_000,), jnp.float32)}
    delays = np.random.default_rng(0).uniform(0.0, 0.3, size=4)
    for delay in delays.tolist():
        writer = run_python(WRITER, tmp_path)
        printed = [read_line(writer) for _ in range(3)]
        time.sleep(delay)
        writer.send_signal(signal.SIGKILL)
        writer.communicate()
        restored = restore(tmp_path, like)
        assert restored.step >= int(printed[1])  # save waits for the write before it
        assert restored.metadata == {"saved": restored.step}
        rng = np.random.default_rng(restored.step)
        expected = rng.normal(size=100_000).astype(np.float32)
        np.testing.assert_array_equal(restored.state["w"], expected)


READER = """
import sys
import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from samrobust.training.checkpoint import Checkpoints

mesh = jax.make_mesh((2,), ("data",))
split = NamedSharding(mesh, PartitionSpec("data"))
whole = NamedSharding(mesh, PartitionSpec())
like = {
    "step": jax.ShapeDtypeStruct((), np.int32, sharding=whole),
    "w": jax.ShapeDtypeStruct((3000,), np.float32, sharding=split),
}
restored = Checkpoints(sys.argv[1]).restore_latest(like)
assert restored.state["w"].sharding == split
assert restored.state["step"].sharding == whole
assert restored.state["w"].addressable_shards[1].data.shape == (1500,)
expected = np.random.default_rng(2).normal(size=3000).astype(np.float32)
np.testing.assert_array_equal(restored.state["w"], expected)
with Checkpoints(sys.argv[1]) as checkpoints:
    checkpoints.save(3, restored.state, {"saved": 3})
"""


def test_a_checkpoint_moves_between_one_device_and_two(tmp_path):
    save_all(tmp_path, 2)
    reader = run_python(READER, tmp_path, JAX_NUM_CPU_DEVICES="2")
    reader.communicate()
    assert reader.returncode == 0
    restored = restore(tmp_path, small(0))
    assert restored.step == 3
    assert_same(restored.state, small(2))


def test_an_uncommitted_target_stays_uncommitted(tmp_path):
    save_all(tmp_path, 1)
    like = small(0)
    pinned = jax.device_put(like, jax.devices()[0])
    for target in (like, pinned):
        state = restore(tmp_path, target).state
        assert state["w"].committed == target["w"].committed
