"""A campaign on a borrowed GPU: its plan, its blocks and timeouts, its files."""

import json
import os
import re
import signal
import subprocess
import sys
import tarfile
import time

import helpers
import numpy as np
import pytest
from test_layering import modules_after

from samrobust.data import load_dataset
from samrobust.data.splits import fingerprint
from samrobust.studies.bench import plan as bench_plan
from samrobust.studies.campaign import blocks, pieces, summary, trace
from samrobust.studies.campaign.blocks import Block, Campaign, Command, plan
from samrobust.studies.campaign.runner import run
from samrobust.system.compiler import parse_compiler_options

SCRIPT = helpers.ROOT / "launch" / "gpu_measure.sh"


def python(script, *arguments, **options):
    return Command((sys.executable, "-c", script, *map(str, arguments)), **options)


# The plan.


def make_bundle(folder):
    for name in ("before/samrobust", "data/cifar10", "data/cifar100"):
        (folder / name).mkdir(parents=True)
    return folder


def names(campaign):
    return [block.name for block in plan(campaign)]


def test_the_order_is_that_of_what_is_missed_most(tmp_path):
    campaign = Campaign(tmp_path / "out", make_bundle(tmp_path / "bundle"))
    assert names(campaign) == [
        *("machine", "st", "before-after"),
        *(f"flag-{name}" for name in blocks.FLAGS),
        *("deterministic", "methods", "pytorch-st", "pytorch-at", "profile"),
        *("seeds-alone", "seeds-two-at-once", "seeds-in-one-program"),
        *(f"flag-{name}" for name in blocks.MORE_FLAGS),
        *("rows-cifar10-sam", "rows-cifar100-sam", "rows-cifar10-at"),
    ]
    last = [block.seconds == float("inf") for block in plan(campaign)]
    assert last == [False] * (len(last) - 3) + [True] * 3  # as the time allows


def test_what_the_bundle_lacks_is_left_out(tmp_path):
    found = names(Campaign(tmp_path / "out", tmp_path))
    assert not [
        name for name in found if name.startswith(("rows", "before", "install"))
    ]


def test_the_wheels_of_what_is_missing_alone_are_installed(tmp_path):
    folder = tmp_path / "wheels"
    folder.mkdir()
    for name in ("numpy-9.9-py3-none-any.whl", "no_such_thing-1-py3-none-any.whl"):
        (folder / name).touch()
    first = plan(Campaign(tmp_path / "out", tmp_path))[0]
    assert first.name == "install"
    words = first.commands[0].words
    assert [word for word in words if word.endswith(".whl")] == [
        str(folder / "no_such_thing-1-py3-none-any.whl")
    ]


def test_its_flags_rows_and_fields_are_those_of_the_package(tmp_path):
    several = blocks._SIDE_BY_SIDE
    for flags in (*blocks.FLAGS.values(), *blocks.MORE_FLAGS.values(), several):
        assert parse_compiler_options(flags)
    campaign = Campaign(tmp_path, make_bundle(tmp_path / "bundle"), trial=True)
    for config, rows in blocks.ROWS:
        path = f"{helpers.ROOT}/configs/{config}.py"
        overrides = tuple(
            word
            for word in plan(campaign)[-1].commands[-1].words
            if word.startswith("--config.") and ".data.name=" not in word
        )
        options = bench_plan.Options(path, overrides, row=rows, measure=("step",))
        assert len(bench_plan.plan(options)) == len(rows)


def test_it_begins_with_nothing_but_the_standard_library():
    loaded = modules_after("import samrobust.studies.campaign.__main__")
    assert loaded.isdisjoint({"jax", "numpy", "ml_collections", "rich"})


def test_the_command_lists_its_blocks():
    environment = {**os.environ, "PYTHON": sys.executable}
    command = [str(SCRIPT), "--list"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("machine (at most 90 s)\nst (at most 240 s)\n")


# Blocks.


def statuses(workdir):
    return {
        path.stem: json.loads(path.read_text())["status"]
        for path in sorted((workdir / "blocks").glob("*.json"))
    }


def run_quickly(some, workdir, budget=60.0, grace=1.0, **options):
    return run(some, workdir, budget, grace=grace, least=0.1, **options)


def test_a_block_that_fails_leaves_the_rest_running_and_says_why(tmp_path):
    some = [
        Block("bad", 9, (python("import sys; sys.exit('no memory')"), python("1"))),
        Block("absent", 9, (python("import no_such_module"),)),
        Block("good", 9, (python("print('fine')"),)),
    ]
    calls = []
    found = run_quickly(some, tmp_path, after=lambda: calls.append(statuses(tmp_path)))
    assert found == {"bad": "failed", "absent": "failed", "good": "done"}
    outcome = json.loads((tmp_path / "blocks" / "bad.json").read_text())
    assert (outcome["codes"], outcome["message"]) == ([1, 0], "no memory")
    assert (tmp_path / "logs" / "good-0.log").read_text() == "fine\n"
    assert [len(call) for call in calls] == [1, 2, 3]  # written at once


def test_a_block_that_takes_too_long_is_ended(tmp_path):
    some = [
        Block("long", 0.5, (python("import time; time.sleep(600)"), python("1"))),
        Block("good", 9, (python("1"),)),
    ]
    assert run_quickly(some, tmp_path) == {"long": "out of time", "good": "done"}
    outcome = json.loads((tmp_path / "blocks" / "long.json").read_text())
    assert outcome["codes"] == [None]  # the second command was not begun


def test_a_process_that_saves_its_state_at_sigterm_has_time_to(tmp_path):
    save = (
        "import pathlib, signal, sys, time\n"
        "ready, saved = map(pathlib.Path, sys.argv[1:])\n"
        "def save(*_):\n"
        "    time.sleep(0.3)\n"
        "    saved.touch()\n"
        "    sys.exit(75)\n"
        "signal.signal(signal.SIGTERM, save)\n"
        "ready.touch()\n"
        "time.sleep(600)\n"
    )
    ready, saved = tmp_path / "ready", tmp_path / "saved"
    some = [Block("row", 60, (python(save, ready, saved),))]
    found = run_quickly(some, tmp_path, grace=30.0, should_stop=ready.exists)
    assert found == {"row": "stopped"}
    assert saved.exists()


def test_a_second_start_takes_up_what_is_not_done(tmp_path):
    count = (
        "import sys; print(1, file=open(sys.argv[1], 'a')); sys.exit(int(sys.argv[2]))"
    )
    some = [
        Block(name, 9, (python(count, tmp_path / name, code),))
        for name, code in (("done", 0), ("failed", 1))
    ]
    for _ in range(2):
        run_quickly(some, tmp_path)
    starts = [len((tmp_path / b.name).read_text().splitlines()) for b in some]
    assert starts == [1, 2]


def test_no_block_begins_without_time_for_it(tmp_path):
    some = [Block(name, 9, (python("import time; time.sleep(1)"),)) for name in "ab"]
    assert run_quickly(some, tmp_path, budget=1.5) == {"a": "out of time"}


def test_a_request_to_stop_ends_the_block_and_its_children_and_begins_no_other(
    tmp_path,
):
    spawn = (
        "import pathlib, subprocess, sys\n"
        "child = subprocess.Popen(['sleep', '600'])\n"
        "path = pathlib.Path(sys.argv[1])\n"
        "path.with_suffix('.tmp').write_text(str(child.pid))\n"
        "path.with_suffix('.tmp').rename(path)\n"
        "child.wait()\n"
    )
    pid = tmp_path / "pid"
    some = [Block(name, 60, (python(spawn, pid),)) for name in "ab"]
    found = run_quickly(some, tmp_path, should_stop=pid.exists)
    assert found == {"a": "stopped"}
    while helpers.is_alive(pid.read_text()):
        time.sleep(0.01)


def test_a_process_may_be_meant_to_die_and_several_to_run_at_once(tmp_path):
    die = "import os; os.kill(os.getpid(), 9)"
    meet = (
        "import pathlib, sys, time\n"
        "pathlib.Path(sys.argv[1]).touch()\n"
        "while not pathlib.Path(sys.argv[2]).exists(): time.sleep(0.01)\n"
    )
    a, b = tmp_path / "a", tmp_path / "b"
    some = [
        Block("killed", 9, (python(die, killed=True), python("1"))),
        Block("survivor", 9, (python("1", killed=True),)),
        Block("two", 9, (python(meet, a, b), python(meet, b, a)), at_once=True),
    ]
    found = run_quickly(some, tmp_path)
    assert found == {"killed": "done", "survivor": "failed", "two": "done"}


# Data in pieces.


@pytest.mark.parametrize("channels", [1, 3])
def test_a_data_set_comes_back_from_its_pieces_bit_for_bit(
    channels, tmp_path, monkeypatch
):
    monkeypatch.setattr(pieces, "_SIZE", 150)  # two files of the training images
    rng = np.random.default_rng(0)
    shape = (4, 6, channels)
    np.savez(
        tmp_path / "own.npz",
        x_train=rng.integers(0, 256, (203, *shape), dtype=np.uint8),
        y_train=np.arange(203) % 5,
        x_test=rng.integers(0, 256, (7, *shape), dtype=np.uint8),
        y_test=np.arange(7) % 5,
        num_classes=9,
    )
    name = str(tmp_path / "own.npz")
    pieces.pack(name, tmp_path / "pieces")
    assert len(list((tmp_path / "pieces").glob("*.webp"))) == 3
    copy = tmp_path / "there" / "own.npz"
    pieces.unpack(tmp_path / "pieces", copy)
    own, again = load_dataset(name), load_dataset(str(copy))
    for split in ("train", "test"):
        found = fingerprint(getattr(again, split))
        assert found == fingerprint(getattr(own, split))
    facts = ("num_classes", "mean", "std")
    assert all(getattr(again, fact) == getattr(own, fact) for fact in facts)


# Epochs.

TINY = helpers.TINY | {"training.deterministic": True, "training.batch_size": 8}
TINY = {name: v for name, v in TINY.items() if not name.startswith("attack")}


def epochs(output, *flags):
    script = helpers.ROOT / "samrobust" / "studies" / "campaign" / "epochs.py"
    config = f"--config={helpers.ROOT}/configs/digits.py:st"
    own = [f"--config.{name}={value}" for name, value in TINY.items()]
    command = [sys.executable, "-P", str(script), config, "--epochs=2"]
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(helpers.ROOT),
    }
    done = subprocess.run(
        [*command, f"--output={output}", *own, *flags],
        env=environment,
        capture_output=True,
        text=True,
    )
    return done.returncode, done.stderr


def test_a_run_that_was_killed_ends_at_the_bits_of_one_that_was_not(tmp_path):
    kept = f"--workdir={tmp_path / 'kept'}"
    assert epochs(tmp_path / "whole.json")[0] == 0
    assert epochs(tmp_path / "killed.json", kept, "--kill")[0] == -signal.SIGKILL
    assert epochs(tmp_path / "resumed.json", kept) == (0, "")
    whole, resumed = (
        json.loads((tmp_path / f"{name}.json").read_text())
        for name in ("whole", "resumed")
    )
    assert not (tmp_path / "killed.json").exists()
    assert whole["digest"] == resumed["digest"]
    assert whole["images_per_second"] > 0


# What it found.


def test_a_profile_is_summed_by_kernel_on_the_streams_of_a_gpu():
    def event(name, thread, duration):
        return {"ph": "X", "name": name, "pid": 1, "tid": thread, "dur": duration}

    names_of = [
        {"ph": "M", "name": "thread_name", "pid": 1, "tid": i, "args": {"name": name}}
        for i, name in enumerate(("Stream #7(Compute)", "python"))
    ]
    events = [event("conv", 0, 2.0), event("conv", 0, 3.0), event("add", 0, 9.0)]
    found = trace.summarize({"traceEvents": [*names_of, *events, event("run", 1, 99)]})
    assert found == [("add", 1, 9.0), ("conv", 2, 5.0)]
    assert trace.summarize({"traceEvents": [event("run", 1, 99)]}) == [("run", 1, 99)]


def test_the_summary_has_every_block_and_the_archive_all_that_is_small(tmp_path):
    some = [Block(name, 9, (python("1"),)) for name in ("st", "seeds", "never")]
    run_quickly(some[:2], tmp_path)
    row = {"method": "st", "kind": "step", "variant": "", "xla_flags": "--xla_a=1"}
    row |= {"step_seconds": 0.0019, "images_per_second": 67_368.4, "cost": 1.0}
    report = {"rows": [row], "failures": [["sam step", "out | of memory"]]}
    found = {"step_seconds": 0.002, "images_per_second": 64_000.0, "digest": "ab12"}
    for path, content in (("st/bench.json", report), ("seeds/0.json", found)):
        (tmp_path / path).parent.mkdir()
        (tmp_path / path).write_text(json.dumps(content))
    for path in ("cache/autotune/a", "cache/program", "rows/st/checkpoints/1/state"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text("content")
    text = summary.write_summary(some, tmp_path).read_text()
    assert re.search(r"\| st \| done \| [0-9.]+ \|  \|", text)
    assert "| never | - | - | - |" in text
    assert "| st | st step | --xla_a=1 | 1.900 | 67,368 | 1.00 |  |  |  |  |" in text
    assert "failed: sam step: out / of memory" in text
    assert "| seeds/0 | 2.000 | 64,000 | ab12 |" in text
    summary.write_archive(tmp_path, tmp_path / "results.tar.gz")
    with tarfile.open(tmp_path / "results.tar.gz") as archive:
        packed = set(archive.getnames())
    assert {"summary.md", "st/bench.json", "cache/autotune/a"} <= packed
    assert packed.isdisjoint({"cache/program", "rows/st/checkpoints/1/state"})
