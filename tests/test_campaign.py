"""A campaign on a borrowed GPU: its plan, its blocks and timeouts, its files."""

import gzip
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
import zipfile

import helpers
import numpy as np
import pytest
from test_layering import modules_after

from launch.gpu_measure import (
    __main__,
    archive,
    blocks,
    epochs as epochs_module,
    lenient,
    machine,
    pieces,
    summary,
    trace,
    wheels,
)
from launch.gpu_measure.blocks import (
    Block,
    Campaign,
    Command,
    left_out,
    plan,
)
from launch.gpu_measure.runner import run
from samrobust import cli
from samrobust.cli import flags
from samrobust.cli.bench import check_read
from samrobust.data import load_dataset
from samrobust.data.splits import fingerprint
from samrobust.studies.bench import plan as bench_plan
from samrobust.system.compiler import parse_compiler_options

SCRIPT = helpers.ROOT / "launch" / "gpu_measure.sh"


def python(script, *arguments, **options):
    return Command((sys.executable, "-c", script, *map(str, arguments)), **options)


# The plan.


def make_bundle(folder):
    (folder / "before" / "samrobust").mkdir(parents=True)
    for name in ("cifar10", "cifar100"):
        (folder / "data" / name).mkdir(parents=True)
        (folder / "data" / name / blocks.MANIFEST).touch()
    return folder


def names(campaign):
    return [block.name for block in plan(campaign)]


def test_the_order_is_that_of_what_is_missed_most(tmp_path):
    campaign = Campaign(tmp_path / "out", make_bundle(tmp_path / "bundle"))
    assert names(campaign) == [
        *("install", "machine", "st", "st-carried", "before-after", "flags"),
        *("methods", "pytorch-st", "pytorch-at", "profile", "seeds-in-one-program"),
        *("rows-cifar10-sam", "deterministic", "seeds-alone", "seeds-two-at-once"),
        *("more-st", "more-flags", "rows-cifar100-sam", "rows-cifar10-at"),
    ]
    assert list(left_out(campaign)) == []


def test_only_rows_may_take_all_the_time_and_the_first_ones_begin_within_half_an_hour(
    tmp_path,
):
    found = plan(Campaign(tmp_path / "out", make_bundle(tmp_path / "bundle")))
    limits = {block.name: block.seconds for block in found}
    rows = [name for name, limit in limits.items() if limit == float("inf")]
    assert rows == [name for name in limits if name.startswith("rows")]
    before = list(limits)[: list(limits).index(rows[0])]
    assert sum(limits[name] for name in before) <= 1800  # if all else takes its limit
    # Each has its whole limit in one command, whose machine ends it after ten minutes.
    assert max(limits[name] for name in limits if name not in rows) <= 560 - 15
    assert limits["before-after"] >= 3 * (77 + 20)  # three first compilations


def test_what_is_compiled_cold_begins_with_an_empty_cache(tmp_path):
    found = plan(Campaign(tmp_path / "out", tmp_path / "bundle"))
    (block,) = (one for one in found if one.name == "st")
    cache = tmp_path / "out" / "cache"
    (cache / "autotune").mkdir(parents=True)
    for _ in range(2):
        subprocess.run(block.commands[0].words, check=True)
        assert not cache.exists()


def test_the_ceilings_are_measured_once(tmp_path):
    commands = [b.commands for b in plan(Campaign(tmp_path, tmp_path))]
    benches = [c.words for each in commands for c in each if "bench" in c.words]
    file = f"--ceilings={tmp_path / 'machine' / 'machine.json'}"
    for words in benches:
        assert ("--no-rates" in words or "--profile" in words) != (file in words)


def test_what_the_bundle_lacks_is_left_out_and_said(tmp_path):
    campaign = Campaign(tmp_path / "out", tmp_path)
    assert not [n for n in names(campaign) if n.startswith(("rows", "before"))]
    folder = tmp_path / "data" / "cifar10"
    folder.mkdir(parents=True)
    (folder / blocks.MANIFEST).write_text("facts.npz\ntrain-0.webp\n")
    (folder / "facts.npz").touch()
    assert "rows-cifar10-sam" not in names(campaign)
    assert list(left_out(campaign)) == [
        f"before-after: no folder {tmp_path / 'before'}.",
        f"rows-cifar10-sam: no train-0.webp in {folder}.",
        f"rows-cifar100-sam: no files.txt in {tmp_path / 'data' / 'cifar100'}.",
        f"rows-cifar10-at: no train-0.webp in {folder}.",
    ]
    (folder / "train-0.webp").touch()  # brought later
    assert "rows-cifar10-sam" in names(campaign)


def test_a_row_is_the_same_run_in_a_workdir_of_another_name(tmp_path):
    bundle = make_bundle(tmp_path / "bundle")
    commands = [
        [block.commands[-1] for block in plan(Campaign(tmp_path / name, bundle))]
        for name in ("one", "other")
    ]
    trained = [[c for c in each if "table" in c.words] for each in commands]
    assert [c.words for c in trained[0]] == [c.words for c in trained[1]]
    assert {c.folder for c in trained[1]} == {str(tmp_path / "other")}
    assert len(trained[0]) == len(blocks.ROWS)


def test_a_command_runs_in_its_folder(tmp_path):
    there = helpers.make_folder(tmp_path / "there")
    write = "import pathlib; pathlib.Path('here').touch()"
    some = [Block("row", 9, (python(write, folder=str(there)),))]
    assert run_quickly(some, tmp_path) == {"row": "done"}
    assert (there / "here").exists()


def test_its_flags_rows_and_fields_are_those_of_the_package(tmp_path):
    several = blocks._SIDE_BY_SIDE
    for options in (*blocks.FLAGS, *blocks.MORE_FLAGS, several):
        assert parse_compiler_options(options)
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


def test_options_that_xla_does_not_know_are_left_out_and_said(tmp_path, monkeypatch):
    campaign = Campaign(tmp_path, make_bundle(tmp_path / "bundle"))
    known, unknown = "--xla_cpu_enable_fast_math=false", "--xla_no_such_option=1"
    file = tmp_path / "flags" / blocks.LEFT_OUT
    ends = "--xla_cpu_enable_fast_math=false --xla_ends_it=1"
    several = ("", unknown, ends, known)
    words = ["bench", *(f"--xla-flags={flags}" for flags in several)]
    words += [f"--ceilings={tmp_path}/none.json"]
    end = "    if 'ends_it' in flags: __import__('os')._exit(6)\n    try:"
    monkeypatch.setattr(lenient, "_ASK", lenient._ASK.replace("    try:", end))
    became = []
    monkeypatch.setattr(os, "execv", lambda *them: became.append(them))
    monkeypatch.setattr(sys, "argv", ["lenient", str(file), *words])
    lenient.main()
    kept = ["bench", "--xla-flags=", f"--xla-flags={known}"]
    wanted = [sys.executable, "-m", "samrobust.cli", *kept]
    assert became == [(sys.executable, wanted)]
    text = summary.write_summary(plan(campaign), tmp_path).read_text()
    assert "| flags | left out: Expected options that XLA knows, got --xla-f" in text
    assert f"| --xla-flags={unknown} |" in text
    assert "| flags | left out: It ends XLA with exit code 6: " in text
    assert "left out: Nothing wrote any: ceilings are measured again. | --ceil" in text


@pytest.mark.parametrize("trial", [True, False])
def test_a_bench_reads_every_flag_that_it_is_given(tmp_path, trial):
    campaign = Campaign(tmp_path, make_bundle(tmp_path / "bundle"), trial, trial)
    commands = [command for block in plan(campaign) for command in block.commands]
    read = 0
    for words in (command.words for command in commands if "bench" in command.words):
        check_read(cli._parse(list(words[words.index("bench") :])))
        read += 1
    assert read > 8


def test_it_begins_with_nothing_but_the_standard_library():
    room = "launch.gpu_measure"
    loaded = modules_after(f"import {room}.__main__, {room}.wheels")
    assert loaded.isdisjoint({"jax", "numpy", "ml_collections", "rich"})


def test_the_command_lists_its_blocks():
    environment = {**os.environ, "PYTHON": sys.executable}
    command = [str(SCRIPT), "--list"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("install (at most 90 s)\nmachine (at most 60 s)\n")


def test_nothing_is_measured_where_jax_finds_no_gpu(tmp_path):
    environment = {**os.environ, "PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": ""}
    environment.pop("JAX_PLATFORMS", None)
    command = [str(SCRIPT), f"--workdir={tmp_path / 'out'}", f"--bundle={tmp_path}"]
    command.append("--budget=60")  # where it measures after all
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    assert statuses(tmp_path / "out") == {"install": "failed"}
    assert (
        "Expected a device that JAX can use, got JAX_PLATFORMS='cuda,c" in done.stdout
    )


def test_a_trial_on_a_cpu_asks_for_nothing_that_only_a_gpu_has(tmp_path, monkeypatch):
    pytest.importorskip("torch")
    from samrobust.studies.bench.suite import Launcher
    from samrobust.studies.bench.twin.steps import TwinSpec

    specs = []
    there = {"platform": "cpu", "num_devices": 1}
    monkeypatch.setattr(Launcher, "__call__", lambda *_: there)
    monkeypatch.setattr(Launcher, "_run", lambda _, __, spec: specs.append(spec))
    campaign = Campaign(tmp_path, make_bundle(tmp_path / "bundle"), True, on_cpu=True)
    ceilings = helpers.make_folder(tmp_path / "machine") / "machine.json"
    ceilings.write_text('{"bfloat16": {"matmul": 1e12, "copy": 1e10}}')
    for block in plan(campaign):
        for command in block.commands:
            if "bench" not in command.words:
                continue
            words = command.words[command.words.index("bench") :]
            options = flags.build(bench_plan.Options, cli._parse(list(words)))
            for task in bench_plan.plan(options):
                if task.kind == "pytorch":
                    Launcher(options, tmp_path, lambda: False)._pytorch(task)
    made = [TwinSpec(**{n: v for n, v in s.items() if n != "parity"}) for s in specs]
    assert [(one.method, one.variant) for one in made] == [
        *(("st", "tuned"), ("st", "compiled"), ("at", "tuned"), ("at", "compiled")),
        *(("st", "pure"), ("st", "autotuned")),
    ]


# In place of the package's commands: writes what a command was asked to write.
STAND_IN = """#!{python}
import json, os, pathlib, signal, sys
words = dict(word.partition("=")[::2] for word in sys.argv)
row = dict(method="st", kind="step", variant="", xla_flags="", step_seconds=0.002,
           images_per_second=64e3)
run = dict(step_seconds=0.002, images_per_second=64e3, digest="ab12")
if "bench" in sys.argv:
    folder = pathlib.Path(words["--workdir"])
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "bench.json").write_text(json.dumps(dict(rows=[row], failures=[])))
elif "--kill" in sys.argv:
    os.kill(os.getpid(), signal.SIGKILL)
elif "--output" in words:
    path = pathlib.Path(words["--output"])
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(run))
"""


def test_a_trial_goes_through_all_blocks_and_tells_what_each_found(
    tmp_path, monkeypatch, capsys
):
    stand_in = tmp_path / "python"
    stand_in.write_text(STAND_IN.format(python=sys.executable))
    stand_in.chmod(0o755)
    workdir, bundle = tmp_path / "out", make_bundle(tmp_path / "bundle")
    monkeypatch.setattr(blocks.sys, "executable", str(stand_in))
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setenv("PYTHONPATH", "")  # it is changed
    words = ["--trial", f"--workdir={workdir}", f"--bundle={bundle}"]
    monkeypatch.setattr(sys, "argv", ["gpu_measure.sh", *words])
    assert __main__.main() == 0
    found = names(Campaign(workdir, bundle, True, on_cpu=True))
    assert statuses(workdir) == dict.fromkeys(sorted(found), "done")
    text = capsys.readouterr().out
    for name in found:
        assert f"| {name} | done |" in text
    assert "| st-carried | st step |  | 2.000 |" in text
    assert "deterministic, usual: same bits after a kill: yes" in text
    assert (workdir / "results.tar.gz").exists()


# The packages of the bundle.


def make_wheel(folder, name, tag="py3-none-any", content=""):
    path = folder / f"{name}-1.0-{tag}.whl"
    info = f"{name}-1.0.dist-info"
    files = {
        f"{name}/__init__.py": content,
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n",
        f"{info}/WHEEL": f"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: {tag}\n",
        f"{info}/RECORD": "",
    }
    with zipfile.ZipFile(path, "w") as file:
        for each, text in files.items():
            file.writestr(each, text)
    return path.name


def install(folder, monkeypatch, *needed):
    site, file = folder / "site", folder / "install.json"
    monkeypatch.setattr(wheels, "NEEDED", needed)
    monkeypatch.setattr(sys, "argv", ["wheels", *map(str, (folder, site, file))])
    try:
        wheels.main()
    except SystemExit as end:
        return str(end.code), json.loads(file.read_text())
    return "", json.loads(file.read_text())


def test_one_wheel_that_is_refused_stops_no_other(tmp_path, monkeypatch):
    pure = make_wheel(tmp_path, "of_campaign_pure")
    foreign = make_wheel(tmp_path, "of_campaign_foreign", "cp27-cp27m-win32")
    broken = make_wheel(tmp_path, "of_campaign_broken", content="import no_such_module")
    make_wheel(tmp_path, "numpy")  # is there, in another version
    complaint, found = install(tmp_path, monkeypatch, "of_campaign_pure")
    assert (complaint, found["installed"]) == ("", [pure])
    missing = found["missing"]
    assert list(missing) == [broken, foreign]
    assert "No module named 'no_such_module'" in missing[broken]
    assert "not a supported wheel" in missing[foreign]
    assert not (tmp_path / "site" / "numpy").exists()


def test_a_package_without_which_nothing_runs_is_asked_for(tmp_path, monkeypatch):
    complaint, found = install(tmp_path, monkeypatch, "of_campaign_no_such")
    assert complaint.startswith("Expected of_campaign_no_such, which all blocks want")
    assert "No module named" in found["missing"]["of_campaign_no_such"]


def test_packages_are_installed_again_where_their_folder_was_left_behind(
    tmp_path, monkeypatch
):
    wheel = make_wheel(tmp_path, "of_campaign_pure")
    for _ in range(2):  # on one machine, and from its results on the next
        assert install(tmp_path, monkeypatch)[1]["installed"] == [wheel]
        assert install(tmp_path, monkeypatch)[1]["installed"] == []
        shutil.rmtree(tmp_path / "site")


def test_what_is_required_runs_at_every_start_and_without_it_nothing(tmp_path):
    ready = tmp_path / "ready"
    script = "import pathlib, sys; sys.exit(not pathlib.Path(sys.argv[1]).exists())"
    some = [
        Block("install", 9, (python(script, ready),), required=True),
        Block("st", 9, (python("1"),)),
    ]
    assert run_quickly(some, tmp_path) == {"install": "failed"}
    ready.touch()
    assert run_quickly(some, tmp_path) == {"install": "done", "st": "done"}
    ready.unlink()  # another machine, with the notes of this one
    assert run_quickly(some, tmp_path) == {"install": "failed", "st": "done"}


# The machine.


def test_ceilings_are_known_where_the_target_config_is_not(tmp_path, monkeypatch):
    def fail():
        raise RuntimeError("no such method")

    ceiling = {"matmul": 8e14, "copy": 4e12}
    monkeypatch.setattr(machine, "target_config", fail)
    monkeypatch.setattr(machine, "roofline", lambda *_: ceiling)
    words = [f"--config={helpers.ROOT}/configs/cifar10.py", f"--workdir={tmp_path}"]
    monkeypatch.setattr(sys, "argv", ["machine", *words])
    machine.main()
    found = json.loads((tmp_path / "machine.json").read_text())
    assert found["bfloat16"] == found["float32"] == ceiling
    assert found["target_config"] == "RuntimeError: no such method"
    (tmp_path / "machine").mkdir()
    (tmp_path / "machine.json").rename(tmp_path / "machine" / "machine.json")
    text = summary.write_summary([], tmp_path).read_text()
    assert "bfloat16: matmul 800 TFLOP/s, copy 4e+03 GB/s." in text
    assert "No target config: RuntimeError: no such method" in text


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
    assert (tmp_path / "logs" / "good" / "0.log").read_text() == "fine\n"
    assert [len(call) for call in calls] == [1, 2, 3]  # written at once


def test_a_summary_that_cannot_be_written_ends_no_campaign(tmp_path, capfd):
    def after():
        raise OSError("disk full")

    some = [Block(name, 9, (python("1"),)) for name in ("one", "two")]
    assert run_quickly(some, tmp_path, after=after) == {"one": "done", "two": "done"}
    assert capfd.readouterr().err == "After one: disk full\nAfter two: disk full\n"


def test_a_block_that_takes_too_long_is_ended(tmp_path):
    some = [
        Block("long", 0.5, (python("import time; time.sleep(600)"), python("1"))),
        Block("good", 9, (python("1"),)),
    ]
    assert run_quickly(some, tmp_path) == {"long": "out of time", "good": "done"}
    outcome = json.loads((tmp_path / "blocks" / "long.json").read_text())
    assert outcome["codes"] == [None]  # the second command was not begun
    assert outcome["message"].startswith("command 1 of 2 ended at ")
    assert outcome["limit"] == 0.5


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
        Block(name, 9, (python(count, tmp_path / f"starts-{name}", code),))
        for name, code in (("done", 0), ("failed", 1))
    ]
    for _ in range(2):
        run_quickly(some, tmp_path)
    paths = [tmp_path / f"starts-{block.name}" for block in some]
    starts = [len(path.read_text().splitlines()) for path in paths]
    assert starts == [1, 2]


def test_what_was_never_reached_comes_before_what_failed_and_what_was_cut_short_first(
    tmp_path,
):
    sleep = python("import time; time.sleep(600)")
    some = {
        "failed": Block("failed", 60, (python("import sys; sys.exit(1)"),)),
        "long": Block("long", 0.1, (sleep,)),
        "killed": Block("killed", 60, (python("1"),)),
        "cut": Block("cut", 60, (sleep,)),
        "never": Block("never", 60, (python("1"),)),
    }
    (tmp_path / "blocks").mkdir()  # its machine went away in the midst of it
    (tmp_path / "blocks" / "killed.json").write_text('{"status": "begun"}')
    found = run_quickly([some["failed"], some["long"]], tmp_path)
    found |= run_quickly([some["cut"]], tmp_path, budget=1.5)
    assert found == {"failed": "failed", "long": "out of time", "cut": "stopped"}
    some["cut"] = Block("cut", 60, (python("1"),))
    found = run_quickly(list(some.values()), tmp_path)
    assert list(found) == ["cut", "never", "failed", "long", "killed"]


def test_what_no_budget_of_this_length_suffices_for_does_not_keep_the_others_waiting(
    tmp_path,
):
    sleep = python("import time; time.sleep(600)")
    some = [Block("long", 60, (sleep,)), Block("quick", 60, (python("1"),))]
    assert run_quickly(some, tmp_path, budget=6.0) == {"long": "stopped"}
    found = run_quickly(some, tmp_path, budget=6.0)
    assert list(found.items()) == [("quick", "done"), ("long", "stopped")]
    row = Block("row", float("inf"), (sleep,))  # goes on from its last checkpoint
    for _ in range(2):
        assert run_quickly([row, some[1]], tmp_path / "rows", 6.0) == {"row": "stopped"}


def test_a_second_attempt_leaves_what_the_first_one_measured(tmp_path):
    write = (
        "import json, pathlib, sys\n"
        "path = pathlib.Path(sys.argv[1])\n"
        "path.parent.mkdir()\n"
        "rows = [dict(method='st', kind='pytorch', variant=one, xla_flags='')\n"
        "        for one in sys.argv[2:]]\n"
        "path.write_text(json.dumps(dict(rows=rows)))\n"
        "print(len(rows), 'rows')\n"
        "sys.exit(1)\n"
    )
    path = tmp_path / "st" / "bench.json"
    for variants in (["graphed", "compiled"], ["graphed"]):
        some = [Block("st", 9, (python(write, path, *variants),))]
        run_quickly(some, tmp_path)
    text = summary.write_summary(some, tmp_path).read_text()
    assert "| st | st pytorch graphed |" in text
    assert "| st.aside | st pytorch compiled |" in text
    assert (tmp_path / "logs" / "st.aside" / "0.log").read_text() == "2 rows\n"


def test_no_block_begins_without_time_for_it(tmp_path):
    some = [Block(name, 9, (python("import time; time.sleep(1)"),)) for name in "ab"]
    assert run_quickly(some, tmp_path, budget=1.5) == {"a": "stopped"}


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
    there = {path.name for path in (tmp_path / "pieces").iterdir()}
    assert len([name for name in there if name.endswith(".webp")]) == 3
    told = (tmp_path / "pieces" / blocks.MANIFEST).read_text().split()
    assert {*told, blocks.MANIFEST} == there
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
    script = helpers.ROOT / "launch" / "gpu_measure" / "epochs.py"
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
    assert (whole["began_at"], resumed["began_at"] > 0) == (0, True)
    assert "images_per_second" not in resumed  # it saves after each call
    assert whole["provenance"].keys() >= {"commit", "device", "jax", "command", "date"}


def test_the_commit_of_the_other_version_is_the_one_that_the_bundle_tells(
    tmp_path, monkeypatch
):
    package = helpers.make_folder(tmp_path / "samrobust" / "experiments")
    monkeypatch.setattr(epochs_module.building, "__file__", str(package / "building"))
    own = epochs_module._provenance()["commit"]
    (tmp_path / epochs_module.COMMIT).write_text("ab12\n")
    assert (own == "ab12", epochs_module._provenance()["commit"]) == (False, "ab12")


def test_a_bundle_tells_the_commit_of_the_other_version(tmp_path):
    git = ["git", "-C", str(helpers.ROOT), "rev-parse", "HEAD"]
    head = subprocess.run(git, capture_output=True, text=True)
    if head.returncode:
        pytest.skip("no checkout")
    stand_in = tmp_path / "python"  # builds no wheels
    stand_in.write_text(f'#!/bin/sh\n[ "$1" = -m ] || exec {sys.executable} "$@"\n')
    stand_in.chmod(0o755)
    words = [f"--bundle={tmp_path / 'bundle'}", "--data=", "--before=HEAD"]
    done = subprocess.run(
        [str(SCRIPT.with_name("gpu_bundle.sh")), *words],
        env={**os.environ, "PYTHON": str(stand_in)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    told = (tmp_path / "bundle" / "before" / epochs_module.COMMIT).read_text()
    assert told == head.stdout


def test_an_older_package_makes_its_method_by_another_name(monkeypatch):
    monkeypatch.delattr(epochs_module.building, "make_training")
    make = lambda *arguments: arguments  # noqa: E731
    monkeypatch.setattr(epochs_module.building, "make_method", make, raising=False)
    assert epochs_module._make_method("config", "data", 3) == ("config", "data", 3)


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


def test_a_profile_tells_where_it_was_measured(tmp_path, monkeypatch):
    with gzip.open(tmp_path / "perfetto_trace.json.gz", "wt") as file:
        event = {"ph": "X", "name": "conv", "pid": 1, "tid": 0, "dur": 2.0}
        json.dump({"traceEvents": [event]}, file)
    monkeypatch.setattr(sys, "argv", ["trace", str(tmp_path)])
    trace.main()
    first, _, *rest = (tmp_path / "profile.md").read_text().splitlines()
    assert re.fullmatch(r"Measured at commit .+ on .+ with jax [\d.]+\.", first)
    assert "| conv | 1 | 2 | 100.0 |" in rest


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
    left = ("cache/program", "rows/st/checkpoints/1/state", "st-carried/cache/program")
    for path in ("cache/autotune/a", *left):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text("content")
    text = summary.write_summary(some, tmp_path).read_text()
    assert re.search(r"\| st \| done \| [0-9.]+ \|  \|", text)
    assert "| never | - | - | - |" in text
    assert "| st | st step | --xla_a=1 | 1.900 | 67,368 | 1.00 |  |  |  |  |" in text
    assert "failed: sam step: out / of memory" in text
    assert "| seeds/0 | 2.000 | 64,000 | ab12 |" in text
    archive.write_archive(tmp_path, tmp_path / "no" / "folder" / "results.tar.gz")
    with tarfile.open(tmp_path / "no" / "folder" / "results.tar.gz") as file:
        packed = set(file.getnames())
    assert {"summary.md", "st/bench.json", "cache/autotune/a"} <= packed
    assert packed.isdisjoint(left)


def test_the_summary_says_what_is_left_out_missing_and_whether_bits_are_the_same(
    tmp_path,
):
    ends = {"usual-whole": "ab", "usual-resumed": "cd"}
    ends |= {"deterministic-whole": "ef", "deterministic-resumed": "ef"}
    for name, digest in ends.items():
        run = {"step_seconds": 0.002, "images_per_second": 64_000.0, "digest": digest}
        (tmp_path / "deterministic").mkdir(exist_ok=True)
        (tmp_path / "deterministic" / f"{name}.json").write_text(json.dumps(run))
    (tmp_path / "install").mkdir()
    missing = {"missing": {"pillow.whl": "not a supported wheel"}}
    (tmp_path / "install" / "install.json").write_text(json.dumps(missing))
    some = [Block("deterministic", 9, ())]
    text = summary.write_summary(some, tmp_path, ["rows: no data."]).read_text()
    assert "\nLeft out: rows: no data.\n" in text
    assert "\nMissing: pillow.whl: not a supported wheel\n" in text
    assert "deterministic, usual: same bits after a kill: no" in text
    assert "deterministic, deterministic: same bits after a kill: yes" in text
    anew = {"digest": "ef", "began_at": 0}  # and no time, as of any with checkpoints
    (tmp_path / "deterministic" / "deterministic-resumed.json").write_text(
        json.dumps(anew)
    )
    text = summary.write_summary(some, tmp_path).read_text()
    assert (
        "deterministic: same bits after a kill: not known, it resumed nothing" in text
    )
    assert "| deterministic/deterministic-resumed |  |  | ef |" in text


def test_the_summary_tells_commit_and_machine_and_what_is_of_another(tmp_path):
    here = {"commit": "ab12", "device": "NVIDIA H200", "jax": "0.12.0"}
    there = here | {"commit": "cd34"}
    for path, content in (
        ("machine/machine.json", here | {"date": "2026-11-30"}),
        ("st/bench.json", {"rows": [], "failures": [], "provenance": here}),
        ("flags/bench.json", {"rows": [], "failures": [], "provenance": there}),
    ):
        (tmp_path / path).parent.mkdir()
        (tmp_path / path).write_text(json.dumps(content))
    some = [Block(name, 9, ()) for name in ("machine", "st", "flags")]
    text = summary.write_summary(some, tmp_path).read_text()
    told = "on NVIDIA H200 with jax 0.12.0"
    assert f"\nMeasured at commit ab12 {told}; 2026-11-30.\n" in text
    assert f"\nBut flags/bench.json at commit cd34 {told}.\n" in text
    assert "st/bench.json" not in text


def test_of_a_cache_what_the_archive_carries_is_copied(tmp_path, monkeypatch):
    cache, copy = tmp_path / "cache", tmp_path / "copy"
    words = ["archive", str(cache), str(copy), "--needed"]
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit, match="Expected files of autotuning"):
        archive.main()
    for path in ("of_autotune/a", "program"):
        (cache / path).parent.mkdir(parents=True, exist_ok=True)
        (cache / path).write_text("content")
    archive.main()
    assert [p.name for p in copy.rglob("*") if p.is_file()] == ["a"]
