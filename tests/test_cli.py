"""The command line: help, errors in one line, exit codes."""

import subprocess
import sys

import helpers
import pytest

from samrobust import configuration
from samrobust.cli import main


def samrobust(*arguments):
    command = [sys.executable, "-m", "samrobust.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_help_names_the_commands_and_loads_no_jax():
    script = (
        "import sys\nfrom samrobust.cli import main\n"
        "try:\n    main(['--help'])\nexcept SystemExit:\n    pass\n"
        "sys.exit('jax' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0
    for command in ("table", "train", "status", "evaluate", "export", "import"):
        assert command in done.stdout


@pytest.mark.parametrize(
    "command", ["table", "train", "status", "evaluate", "export", "import"]
)
def test_each_command_explains_its_flags(command, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([command, "--help"])
    assert stopped.value.code == 0
    assert "--workdir" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["tabel"], "invalid choice: 'tabel'"),
        (["table", "--sedes=3"], "unknown argument '--sedes=3'"),
        (["table", "--config.training.epochs", "2"], "--config.training.epochs=VALUE"),
        (["train", "--config=configs/digits.py:st"], "--workdir"),
        (["table", "--collect", "--list"], "not allowed with argument"),
        (["status", "--workdir=x", "--config.seed=1"], "status takes no config"),
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
        (["table", "--rows=sma,rho=1"], "method in {st, sam, at, at+sam}"),
        (["table", "--config.training.epoch=2"], "Did you mean"),
        (["table", "--config=configs/none.py"], "Expected an existing config file"),
        (
            ["train", "--config=configs/digits.py:sam,rho=-1"],
            "1e-05 <= rho, got rho=-1",
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
    assert code == 2
    assert "cifar-10-binary.tar.gz" in errors
    assert str(tmp_path) in errors
    assert {1, 2, 4, 8} <= set(pauses)  # tried again, five times in all
