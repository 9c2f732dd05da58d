"""The command line: help, errors in one line, exit codes."""

import errno
import os
import re
import shlex
import signal
import subprocess
import sys

import helpers
import pytest

from samrobust import __version__
from samrobust.cli import main, running
from samrobust.data import DatasetUnavailableError
from samrobust.experiments import config_files, configuration
from samrobust.experiments.explaining import explain
from samrobust.experiments.reporting.console import make_console
from samrobust.experiments.reporting.progress import ProgressDisplay
from samrobust.experiments.workdir import settle_config
from samrobust.models import MODELS
from samrobust.system.claims.lease import ClaimedError
from samrobust.system.distributed import DistributedError, agreement
from samrobust.system.files import WorkdirError, write_json
from samrobust.training import TrainingDivergedError
from samrobust.training.checkpoint import CheckpointError


def samrobust(*arguments):
    command = [sys.executable, "-m", "samrobust.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


COMMANDS = ("table", "train", "status", "evaluate", "recheck", "curves", "bench")
COMMANDS += ("theory", "sharpness", "export", "import", "config")
COMMANDS += ("report", "leaderboard")
COMMANDS += ("doctor", "completion", "estimate")
HEAVY = {"jax", "numpy", "rich", "matplotlib", "ml_collections"}


def test_help_names_the_commands_and_loads_nothing_heavy():
    script = (
        "import sys\nfrom samrobust.cli import main\n"
        "try:\n    main(['--help'])\nexcept SystemExit:\n    pass\n"
        f"sys.exit(len({HEAVY} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0
    listed = re.findall(r"^    (\w+)\b", done.stdout, re.MULTILINE)
    assert set(COMMANDS) <= set(listed)


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_explains_its_flags(command, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([command, "--help"])
    assert stopped.value.code == 0
    shown = capsys.readouterr().out
    own = {"config": "--config", "doctor": "Exit code 1", "completion": "{bash,zsh}"}
    assert own.get(command, "--workdir") in shown


@pytest.mark.parametrize("arguments", [[], ["help"], ["--help"]])
def test_without_a_command_the_help_is_shown(arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 0
    assert "COMMAND\n    table " in capsys.readouterr().out


def test_help_of_a_command_and_the_version_have_their_names(capsys):
    for arguments, begin in (
        (["help", "train"], "usage: samrobust train "),
        (["--version"], f"samrobust {__version__}\n"),
    ):
        with pytest.raises(SystemExit) as stopped:
            main(arguments)
        assert stopped.value.code == 0
        assert capsys.readouterr().out.startswith(begin)


def test_a_config_is_shown_with_the_meaning_of_every_field(capsys):
    row = "at,norm=linf,eps=8+sam,rho=0.2+ema,decay=0.9"
    assert main(["config", f"--config=digits:{row}", "--config.training.epochs=3"]) == 0
    shown = capsys.readouterr().out
    assert "  training.epochs = 3\n      passes over the training images\n" in shown
    assert "  sam.rho = 0.2\n      the radius in the l2 norm of all" in shown
    assert "  attack.epsilon = 8.0\n      radius in 1/255 units" in shown
    assert "trades." not in shown


def test_no_field_of_a_shipped_config_lacks_a_meaning():
    files = ("cifar10", "sharpness", "adversarial", "sharpness:GRID")
    for name in files:
        file, _, rows = name.partition(":")
        for row in config_files.load_rows(file, rows or "ROWS"):
            config = configuration.load_config(f"{file}:{row}")
            lacking = [x.name for x in explain(config) if not x.meaning]
            assert lacking == []
    for model in MODELS:
        config = configuration.load_config(
            "cifar10:st", [f"--config.model.name={model}"]
        )
        assert [x.name for x in explain(config) if not x.meaning] == []


def test_fields_are_explained_by_the_packages_own_base_config(tmp_path, monkeypatch):
    config = configuration.load_config("digits:st")
    said = list(explain(config))
    (helpers.make_folder(tmp_path / "configs") / "base.py").write_text("LR = 3")
    monkeypatch.chdir(tmp_path)
    assert list(explain(config)) == said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["tabel"], "unknown command 'tabel'. Did you mean table?"),
        (["help", "tabel"], "unknown command 'tabel'. Did you mean table?"),
        (["table", "--sedes=3"], "argument '--sedes=3'. Did you mean --seeds?"),
        (["config", "digits:st"], "'digits:st'. Did you mean --config=digits:st?"),
        (
            ["table", "--epochs=3"],
            "--config.SECTION.NAME=VALUE (see `samrobust t",
        ),
        (["table", "--config.training.epochs", "2"], "--config.training.epochs=VALUE"),
        (["train", "--config=configs/digits.py:st"], "--workdir"),
        (["table", "--collect", "--list"], "not allowed with argument"),
        (["status", "--workdir=x", "--config.seed=1"], "status takes no --config, got"),
        (
            ["evaluate", "--epsilon=8/255"],
            "got value='8/255'. Radii are in 1/255 units",
        ),
        (["table", "--seeds=0"], "--seeds: Expected 1 <= value, got value=0"),
    ],
)
def test_wrong_flags_are_refused_with_exit_code_2(arguments, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("samrobust: error: ")
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["table", "--shard=4/4"], "--shard=I/N with 0 <= I < N, got shard='4/4'"),
        (["table", "--shard=1"], "--shard=I/N with 0 <= I < N, got shard='1'"),
        (["table", "--shard=-1/4"], "The first of four shards is --shard=0/4"),
        (["table", "--collect", "--shard=0/2"], "--collect without --shard"),
        (["table", "--collect"], "Expected a finished run in"),
        (["status"], "Expected the directory of a table or of a run"),
        (
            ["table", "--rows=zap,rho=1"],
            "parts in {st, at, fgsm_rs, nfgsm, free, dynamic, cfa, ",
        ),
        (["table", "--rows=sma,rho=1"], "Did you mean sam? Examples: "),
        (["table", "--rows=asma,rho=1"], "Did you mean asam? Examples: "),
        (["table", "--config=cifar1"], "Did you mean configs/cifar10.py?"),
        (["table", "--config.training.epoch=2"], "Did you mean"),
        (["table", "--config=configs/none.py"], "Expected an existing config file"),
        (
            ["train", "--config=configs/digits.py:sam,rho=-1"],
            "0 <= rho, got rho=-1",
        ),
        (
            ["train", "--config=configs/digits.py:st", "--config.data.train_size=9999"],
            "train_size",
        ),
        (
            [
                "train",
                "--config=configs/digits.py:st",
                "--config.training.batch_size=2000",
            ],
            "training.batch_size <= 1297",
        ),
        (["evaluate"], "a run's --workdir"),
        (["evaluate", "--epsilon=8"], "Expected"),
    ],
)
def test_bad_input_gives_one_line_and_exit_code_2(arguments, message, tmp_path, capsys):
    workdir = tmp_path / "run"
    assert main([*arguments, f"--workdir={workdir}"]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("samrobust: error: ")
    assert error.count("\n") == 1
    assert not (workdir / "checkpoints").exists()


def test_a_table_begins_at_the_given_seed(tmp_path, capsys):
    arguments = ["table", "--list", "--rows=st", f"--workdir={tmp_path}"]
    assert main([*arguments, "--seeds=2", "--config.seed=5"]) == 0
    runs = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    assert [run[1:3] for run in runs] == [["st", "5"], ["st", "6"]]
    assert main([*arguments, "--seeds=2", "--config.seed=4294967295"]) == 2
    assert "seed <= 4294967295, got seed=4294967296" in capsys.readouterr().err


def test_pgd_may_follow_on_autoattack_of_chosen_members(tmp_path, capsys):
    overrides = ("attack=autoattack", "version=custom", "members=('square',)")
    config = configuration.load_config(
        "configs/digits.py:st", [f"--config.evaluation.{item}" for item in overrides]
    )
    (tmp_path / "config.json").write_text(config.to_json_best_effort())
    assert main(["evaluate", "--attack=pgd", f"--workdir={tmp_path}"]) == 1
    assert "checkpoint" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("overrides", "flag"),
    [
        (
            ("attack=autoattack", "version=custom", "members=('square',)"),
            "--version=standard",
        ),
        (("judge=any", "early_stop=True"), "--judge=final"),
    ],
)
def test_a_flag_takes_away_what_its_choice_cannot_have(
    overrides, flag, tmp_path, capsys
):
    config = configuration.load_config(
        "configs/digits.py:st", [f"--config.evaluation.{item}" for item in overrides]
    )
    (tmp_path / "config.json").write_text(config.to_json_best_effort())
    assert main(["evaluate", flag, f"--workdir={tmp_path}"]) == 1
    assert "checkpoint" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [
        ["train", "--config=configs/digits.py:st"],
        ["table"],
        ["evaluate"],
        ["theory"],
        ["import", "--input=weights.safetensors"],
    ],
)
def test_a_jax_without_a_device_is_one_line_before_any_work(
    arguments, tmp_path, capsys, monkeypatch
):
    def devices():
        raise AssertionError  # as JAX does with JAX_PLATFORMS=cuda and no GPU

    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    monkeypatch.setattr("jax.devices", devices)
    assert main([*arguments, f"--workdir={tmp_path / 'new'}"]) == 2
    out, error = capsys.readouterr()
    assert "Expected a device that JAX can use, got JAX_PLATFORMS='cuda'" in error
    assert (out, error.count("\n")) == ("", 1)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("SAMROBUST_CLAIM_LEASE", value) for value in ("inf", "-1", "soon")),
        *(("SAMROBUST_HEARTBEAT_SECONDS", value) for value in ("0", "1e3", "9" * 99)),
        *(("SAMROBUST_MEETING_SECONDS", value) for value in ("-1", "\u0663", "[red]")),
        ("SAMROBUST_DISTRIBUTED", "never"),
        ("SAMROBUST_COMPILATION_CACHE", "/tmp"),
    ],
)
def test_a_variable_without_sense_is_named_in_one_line_before_any_work(
    name, value, tmp_path, capsys, monkeypatch
):
    monkeypatch.setenv(name, value)
    assert main(["table", f"--workdir={tmp_path / 'new'}"]) == 2
    output, error = capsys.readouterr()
    assert f"got {name}=" in error
    assert (output, error.count("\n")) == ("", 1)
    assert not (tmp_path / "new").exists()


def test_a_jax_that_does_not_load_is_one_line(tmp_path):
    code, output, errors = helpers.run_command(
        "train", f"--workdir={tmp_path}", "--config=x.py:st", JAX_ENABLE_X64="maybe"
    )
    assert (code, output) == (2, "")
    expected = "samrobust: error: Expected a JAX that loads, got: invalid truth value"
    assert errors.startswith(expected)


def test_a_package_that_is_missing_is_named_with_the_line_that_installs_it(tmp_path):
    script = (
        "import sys\nsys.modules['flax'] = None\nfrom samrobust.cli import main\n"
        f"sys.exit(main(['train', '--config=digits:st', '--workdir={tmp_path}']))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stderr == (
        "samrobust: error: Expected the package flax for `samrobust train`, got none. "
        "Install all: pip install samrobust\n"
    )


def test_evaluate_names_the_runs_of_a_tables_folder(tmp_path, capsys):
    runs = [{"path": f"st/seed{i}"} for i in range(2)]
    write_json(tmp_path / "plan.json", {"runs": runs})
    assert main(["evaluate", f"--workdir={tmp_path}"]) == 2
    assert "Its runs: st/seed0, st/seed1." in capsys.readouterr().err
    (tmp_path / "seed7").mkdir()  # as a row's folder has them
    (tmp_path / "plan.json").rename(tmp_path / "seed7" / "config.json")
    assert main(["evaluate", f"--workdir={tmp_path}"]) == 2
    assert "Its runs: seed7." in capsys.readouterr().err


def caused(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ClaimedError("another works here"), 69),
        (DistributedError("a peer is late"), 69),
        (OSError(errno.EIO, "the disk is away"), 69),
        (caused(WorkdirError("not writable"), OSError(errno.ESTALE, "NFS")), 69),
        (caused(CheckpointError("not written"), OSError(errno.ENETUNREACH, "")), 69),
        (caused(DatasetUnavailableError("no download"), ConnectionError()), 69),
        (caused(WorkdirError("not writable"), OSError(errno.EACCES, "mine")), 2),
        (caused(DatasetUnavailableError("404"), OSError("404")), 2),
        (OSError(errno.ENOSPC, "full"), 1),
        (TrainingDivergedError("not finite"), 1),
        (ValueError("rho=-1"), 2),
    ],
)
def test_what_may_be_gone_next_time_is_told_from_what_would_fail_again(error, code):
    """In the other processes, too, which get the error without its cause."""
    assert running._code_of(error) == code
    with pytest.raises(type(error)) as shared:
        agreement._unpack(agreement._pack(None, error))
    assert running._code_of(shared.value) == code


def test_a_lack_of_memory_is_one_line(tmp_path, capsys, monkeypatch):
    def load_config(*_):
        raise MemoryError

    monkeypatch.setattr("samrobust.experiments.configuration.load_config", load_config)
    assert main(["train", "--config=x.py:st", f"--workdir={tmp_path}"]) == 1
    assert capsys.readouterr().err == "samrobust: error: MemoryError\n"


@pytest.fixture
def a_run(tmp_path):
    """A run's workdir with a label that Rich would take for markup."""
    folder = helpers.make_folder(tmp_path / "[red]a[/blue]")
    config = {"label": "[red]x[/blue] :smile:", "seed": 0, "training": {"epochs": 8}}
    write_json(folder / "config.json", config)
    return folder


def test_names_are_shown_as_they_are(a_run, capsys):
    assert main(["status", f"--workdir={a_run}"]) == 0
    assert "[red]x[/blue] :smile:, seed 0" in capsys.readouterr().out
    assert main(["status", f"--workdir={a_run}/[/none]"]) == 2
    assert "[red]a[/blue]/[/none]" in capsys.readouterr().err
    console = make_console()
    console.print(f"Written to {a_run}")
    ProgressDisplay(console, 1.0).show("[/red] :smile:", 0.0)
    out = capsys.readouterr().out.replace("\n", "")
    assert str(a_run) in out
    assert "[/red] :smile:" in out


FULL = "samrobust: error: standard output cannot be written: [Errno 28] No space"


@pytest.mark.parametrize("buffered", ["", "1"])
@pytest.mark.parametrize(
    ("redirection", "code", "errors"),
    [
        ("> /dev/full", 1, FULL),
        ("| true", 1, ""),
        (">&-", 0, ""),
        ("2> /dev/full", 0, ""),
        ("> /dev/null 2>&- --bad", 2, ""),
        ("2> /dev/full --bad", 2, ""),
    ],
)
def test_output_that_cannot_be_written_is_said_once_or_not_at_all(
    a_run, redirection, code, errors, buffered
):
    command = [sys.executable, "-m", "samrobust.cli", "status", f"--workdir={a_run}"]
    script = f"{shlex.join(command)} {redirection}; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(
        ["bash", "-c", script],
        env={**os.environ, "PYTHONUNBUFFERED": buffered},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr[: len(FULL)]) == (code, errors)
    assert done.stderr.count("\n") <= 1


def test_closed_streams_do_not_give_their_numbers_to_a_runs_files(tmp_path):
    script = (
        "import sys, os\nfrom samrobust import cli\n"
        "cli._run = lambda _: os.open(sys.argv[1], os.O_CREAT | os.O_WRONLY) <= 2\n"
        "sys.exit(cli.main())"
    )
    command = shlex.join([sys.executable, "-c", script, str(tmp_path / "file")])
    closed = f"{command} <&- >&- 2>&-"
    assert subprocess.run(["bash", "-c", closed], check=False).returncode == 0


@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGINT, 130), (signal.SIGTERM, 75), (signal.SIGUSR1, 75)],
)
@pytest.mark.parametrize("when", ["loads", "ends"])
def test_a_signal_as_it_loads_or_ends_leaves_no_traceback(number, code, when):
    # As Python joins threads at its end, a handler of its own would print a traceback.
    script = (
        "import sys, threading, time\nfrom samrobust import cli\n"
        "def wait():\n    print('now', flush=True)\n    time.sleep(600)\n"
        "loads = lambda _: wait()\n"
        "ends = lambda _: threading.Thread(target=wait).start()\n"
        f"cli._run = {when}\nsys.exit(cli.main())"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "now\n"
    process.send_signal(number)
    assert process.communicate(timeout=300) == ("", "")
    assert process.returncode == code


@pytest.mark.parametrize(
    "command", ["evaluate", "recheck", "curves", "sharpness", "theory"]
)
def test_what_cannot_be_written_is_refused_before_the_work(
    tmp_path, capsys, monkeypatch, command
):
    config, workdir = helpers.make_config("st"), tmp_path / "run"
    for folder in (workdir, workdir / "st" / "seed0"):
        settle_config(helpers.make_folder(folder), config)
    (workdir / "st" / "seed0" / "result.json").write_text("{}")
    # Its own method: a module that is loaded meanwhile would keep another class.
    monkeypatch.setattr(
        "samrobust.experiments.reporting.progress.ProgressDisplay.__init__",
        lambda *_: pytest.fail("works"),
    )

    def fsync(_):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr("os.fsync", fsync)
    assert helpers.main(command, f"--workdir={workdir}") == 2
    output, errors = capsys.readouterr()
    assert "Expected a writable directory, got workdir=" in errors
    assert "Read-only file system" in errors
    assert (output, errors.count("\n")) == ("", 1)


def test_unprepared_data_offline_says_what_to_put_where(tmp_path, capsys, monkeypatch):
    for name in ("https_proxy", "HTTPS_PROXY"):  # nobody listens there
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    pauses = []
    monkeypatch.setattr("samrobust.data.archive.time.sleep", pauses.append)
    code = helpers.main(
        "train",
        "--config=configs/cifar10.py:st",
        f"--workdir={tmp_path / 'run'}",
        f"--config.data.data_dir={tmp_path}",
    )
    errors = capsys.readouterr().err
    assert code == 69
    assert "cifar-10-binary.tar.gz" in errors
    assert str(tmp_path) in errors
    assert {1, 2, 4, 8} <= set(pauses)  # tried again, five times in all
