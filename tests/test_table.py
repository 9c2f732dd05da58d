"""`samrobust table`, from the command to its files."""

import csv
import json
import shutil
from pathlib import Path

import helpers
import pytest

from samrobust.cli.table import _caption
from samrobust.data.splits import fingerprint
from samrobust.experiments import sweep
from samrobust.experiments.building import load_data
from samrobust.experiments.configuration import CHANGES_NO_RESULT, load_config
from samrobust.experiments.workdir import settle_config
from samrobust.system.claims.lease import ClaimedError, lost
from samrobust.system.files import read_sealed, write_sealed

ROWS = ["st", "sam,rho=0.2"]
COLUMNS = {"natural", "linf 16/255"}
DIVERGING = helpers.DIVERGING


def make_arguments(
    workdir: Path,
    rows: list[str],
    *others: str,
    seeds: int,
    config: str | Path = "configs/digits.py",
) -> list[str]:
    return [
        *("table", f"--config={config}", f"--workdir={workdir}"),
        f"--seeds={seeds}",
        *(f"--rows={row}" for row in rows),
        *others,
        *helpers.make_flags(),
    ]


@pytest.fixture(scope="module")
def table(tmp_path_factory) -> tuple[Path, tuple[int, str, str]]:
    """A table of two rows and two seeds, and what the command said."""
    workdir = tmp_path_factory.mktemp("table")
    environment = {"COLUMNS": "200"}
    arguments = make_arguments(workdir, ROWS, seeds=2)
    return workdir, helpers.run_command(*arguments, **environment)


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> tuple[Path, list[tuple[int, str, str]]]:
    """The same table by two workers at once, and what each said."""
    workdir = tmp_path_factory.mktemp("shards")
    environment = {"COLUMNS": "200"}
    processes = [
        helpers.start_command(
            *make_arguments(workdir, ROWS, f"--shard={i}/2", seeds=2), **environment
        )
        for i in range(2)
    ]
    return workdir, [helpers.finish_command(process) for process in processes]


@pytest.fixture
def copy(table, tmp_path) -> Path:
    """A copy of the finished table's runs, to be changed."""
    workdir = tmp_path / "copy"
    shutil.copytree(table[0], workdir, ignore=shutil.ignore_patterns("table.*"))
    return workdir


@pytest.mark.slow
def test_the_command_prints_the_table_and_says_where_it_is(table):
    workdir, (code, output, errors) = table
    assert (code, errors) == (0, "")
    for text in ("ST", "SAM", "natural", "Written to", "table.md", "table.png"):
        assert text in output
    assert str(workdir) in output


def test_each_row_and_seed_has_a_result_of_its_own(table):
    workdir, _ = table
    for row in ROWS:
        for seed in (0, 1):
            folder = workdir / row / f"seed{seed}"
            result = json.loads((folder / "result.json").read_text())
            assert (result["row"], result["seed"]) == (row, seed)
            assert result["accuracy"].keys() == COLUMNS
            assert len(helpers.read_lines(folder / "metrics.jsonl")) == 4


def test_the_files_of_the_table_agree_with_the_results(table):
    workdir, _ = table
    content = json.dumps(json.loads((workdir / "table.json").read_text()))
    for row in ROWS:
        assert row in content
        natural = [
            json.loads((workdir / row / f"seed{seed}" / "result.json").read_text())
            for seed in (0, 1)
        ]
        mean = sum(result["accuracy"]["natural"] for result in natural) / 2
        label = natural[0]["label"]
        line, *_ = [  # the first: a second table compares the rows
            line
            for line in (workdir / "table.md").read_text().splitlines()
            if line.startswith(f"| {label} |")
        ]
        assert f"{mean:.1f}" in line or f"{mean:.2f}" in line
    with (workdir / "table.csv").open() as file:
        assert len(list(csv.reader(file))) >= 1 + len(ROWS)
    assert (workdir / "table.png").read_bytes().startswith(b"\x89PNG")


def test_the_caption_says_what_was_changed_from_the_config(table):
    text = (table[0] / "table.md").read_text()
    assert "Changed from configs/digits.py: " in text
    for flag in helpers.make_flags():
        field = flag.removeprefix("--config.")
        assert (field in text) != field.startswith(CHANGES_NO_RESULT)


def test_the_caption_says_nothing_of_a_row_that_its_name_says_of_another():
    rows = ("st,model.width=8,training.epochs=40", "sam,rho=0.4", "st")
    configs = [load_config(f"configs/digits.py:{row}") for row in rows]
    assert "; preact_resnet of width 16, blocks 1-1-1, 20 epochs, float32; " in (
        _caption(configs)
    )
    assert "of width 8, blocks 1-1-1, 40 epochs, float32" in _caption(configs[:1])


def test_a_second_call_is_quick_and_gives_the_same_table(table, capsys):
    workdir, _ = table
    names = ["table.md", "table.csv"]
    before = {name: (workdir / name).read_bytes() for name in names}
    times = {path: path.stat().st_mtime_ns for path in workdir.rglob("result.json")}
    assert len(times) == 4
    assert helpers.main(*make_arguments(workdir, ROWS, seeds=2)) == 0
    output, errors = capsys.readouterr()
    assert errors == ""
    assert "compiling" not in output
    assert {name: (workdir / name).read_bytes() for name in names} == before
    assert times == {path: path.stat().st_mtime_ns for path in times}


def test_shards_at_once_give_the_table_of_a_single_process(table, shards):
    workdir, outcomes = shards
    assert [(code, errors) for code, _, errors in outcomes] == [(0, ""), (0, "")]
    for name in ("table.csv", "table.json"):
        contents = [(folder / name).read_text() for folder in (table[0], workdir)]
        if name == "table.json":  # all but the costs and where it was measured
            contents = [
                [row["cells"] for row in json.loads(text)["rows"]] for text in contents
            ]
        assert contents[0] == contents[1]


def test_each_shard_does_its_runs_and_the_last_one_builds_the_table(shards):
    workdir, outcomes = shards
    seeds = [("st", 0), ("sam,rho=0.2", 0), ("st", 1), ("sam,rho=0.2", 1)]
    for index, (row, seed) in enumerate(seeds):
        path = workdir / row / f"seed{seed}" / "result.json"
        command = json.loads(path.read_text())["provenance"]["command"]
        assert f"--shard={index % 2}/2" in command
    written = [output for _, output, _ in outcomes if "Written to" in output]
    assert written
    for _, output, _ in outcomes:
        assert "Written to" in output or "of the table's 4 runs are missing" in output


def test_the_list_of_runs_is_for_programs(table, tmp_path, capsys):
    assert helpers.main(*make_arguments(table[0], ROWS, "--list", seeds=3)) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "0\tst\t0\tdone"
    assert lines[3] == "3\tsam,rho=0.2\t1\tdone"
    assert lines[5] == "5\tsam,rho=0.2\t2\tnot started"
    assert len(lines) == 6
    absent = tmp_path / "absent"
    flags = make_arguments(absent, ROWS, "--list", "--shard=1/4", seeds=3)
    assert helpers.main(*flags) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("\t")[0] for line in lines] == ["1", "5"]
    assert not absent.exists()


@pytest.mark.parametrize("count", [1, 2, 3, 5, 9])
def test_shards_partition_the_runs(tmp_path, capsys, count):
    indices = []
    for i in range(count):
        flags = make_arguments(
            tmp_path, ROWS, "--list", f"--shard={i}/{count}", seeds=3
        )
        assert helpers.main(*flags) == 0
        lines = capsys.readouterr().out.splitlines()
        indices += [int(line.split("\t")[0]) for line in lines]
    assert sorted(indices) == list(range(6))


def test_a_share_without_a_run_says_what_is_missing(copy, capsys):
    (copy / "st" / "seed0" / "result.json").unlink()
    flags = make_arguments(copy, ROWS, "--shard=4/5", seeds=2)
    assert helpers.main(*flags) == 0
    output = " ".join(capsys.readouterr().out.split())
    assert "1 of the table's 4 runs are missing" in output
    assert "--collect instead of --shard=4/5" in output
    assert not (copy / "table.md").exists()


def test_runs_of_other_shares_with_another_config_are_refused_too(copy, capsys):
    other = "--config.training.momentum=0.5"
    flags = make_arguments(copy, ROWS, "--shard=4/5", other, seeds=2)
    assert helpers.main(*flags) == 2
    assert (
        "4 of the 4 runs of another config: training.momentum"
        in capsys.readouterr().err
    )


def test_collecting_a_finished_table_equals_making_it(table, copy, capsys):
    assert helpers.main(*make_arguments(copy, ROWS, "--collect", seeds=2)) == 0
    assert "missing" not in capsys.readouterr().out
    for name in ("table.md", "table.csv", "table.json"):
        assert (copy / name).read_bytes() == (table[0] / name).read_bytes()


def test_collecting_trains_nothing_and_says_what_is_missing(copy, capsys, monkeypatch):
    monkeypatch.setattr("samrobust.experiments.building.load_data", pytest.fail)
    (copy / "st" / "seed1" / "result.json").unlink()
    failed = copy / "sam,rho=0.2" / "seed1"
    (failed / "result.json").unlink()
    (failed / "failure.json").write_text('{"message": "The loss is not finite."}')
    assert helpers.main(*make_arguments(copy, ROWS, "--collect", seeds=3)) == 1
    output, errors = capsys.readouterr()
    assert errors == ""
    assert [line for line in output.splitlines() if line.startswith("missing ")] == [
        "missing ST, seed 1: waiting",
        "missing SAM (rho = 0.2), seed 1: failed: The loss is not finite.",
        "missing ST, seed 2; SAM (rho = 0.2), seed 2: not started",
    ]
    assert json.loads((copy / "table.json").read_text())["rows"][0]["seeds"] == [0]
    assert not (copy / "st" / "seed2").exists()


def test_runs_on_other_data_are_not_put_beside_the_first(copy, capsys):
    path = copy / "st" / "seed1" / "result.json"
    result = read_sealed(path) or {}
    result["run"]["data"] = "of another folder"
    write_sealed(path, result)
    assert helpers.main(*make_arguments(copy, ROWS, "--collect", seeds=2)) == 1
    assert (
        "missing ST, seed 1: not comparable with ST, seed 0: run.data is 'of another "
        "folder', not "
    ) in " ".join(capsys.readouterr().out.split())
    assert json.loads((copy / "table.json").read_text())["rows"][0]["seeds"] == [0]


def test_collecting_leaves_out_runs_of_another_config(copy, capsys):
    flags = make_arguments(copy, ROWS, "--collect", seeds=2)
    assert helpers.main(*flags, "--config.training.momentum=0.5") == 2
    output, errors = capsys.readouterr()
    assert "of another config, which differs in training.momentum" in output
    assert "samrobust: error: Expected a finished run in" in errors


def test_a_table_of_another_config_says_so_once_before_any_work(tmp_path, capsys):
    for seed in (0, 1):
        folder = helpers.make_folder(tmp_path / "st" / f"seed{seed}")
        settle_config(folder, helpers.make_config("st", {"seed": seed}))
        (folder / "metrics.jsonl").touch()
    flags = (*make_arguments(tmp_path, ROWS, seeds=2), "--config.training.momentum=0.5")
    assert helpers.main(*flags) == 2
    output, errors = capsys.readouterr()
    assert f"{tmp_path} holds 2 of the 4 runs of another config" in errors
    assert errors.count("training.momentum was 0.9, is 0.5") == 1
    assert (output, errors.count("\n")) == ("", 1)
    assert not (tmp_path / "plan.json").exists()
    assert helpers.main(*flags, "--collect") == 2
    output = " ".join(capsys.readouterr().out.split())
    assert "missing ST, seed 0; ST, seed 1: it is of another config" in output


def test_a_table_records_its_plan_for_status(table, capsys):
    assert helpers.main("status", f"--workdir={table[0]}") == 0
    assert "4 runs: 4 done." in capsys.readouterr().out


def test_a_row_may_be_trained_on_other_images_of_the_same_data(tmp_path):
    rows = ["st", "st,data.validation_size=1000"]
    flags = make_arguments(tmp_path, rows, seeds=1)
    flags = [flag for flag in flags if "train_size" not in flag]
    assert helpers.main(*flags) == 0
    steps = []
    for row in rows:
        result = json.loads((tmp_path / row / "seed0" / "result.json").read_text())
        config = load_config(f"configs/digits.py:{row}")
        dataset = load_data(config)
        images = map(fingerprint, (dataset.train, dataset.validation))
        assert result["run"]["data"] == "+".join(images)
        steps.append(len(dataset.train) // helpers.TINY["training.batch_size"])
    written = json.loads((tmp_path / "table.json").read_text())["rows"]
    assert written[1]["label"] == "ST with validation size 1000"
    assert [row["passes"] for row in written] == [1, steps[1] / steps[0]]


def test_a_row_whose_batches_cannot_be_cut_is_refused_before_any_work(tmp_path, capsys):
    rows = "--rows=st;free,eps=8,m=4"
    flags = [f"--workdir={tmp_path}", rows, "--config.training.drop_remainder=False"]
    assert helpers.main("table", "--config=digits", *flags) == 2
    message = capsys.readouterr().err
    assert "Free-AT (eps = 8/255, m = 4): Expected training.drop_remainder" in message
    assert not list(tmp_path.glob("*/seed0/metrics.jsonl"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["train", "--config=digits:st", "--config.evaluation.l2=(64, 5000)"],
            "error: Expected evaluation.l2 <= 2040, the diagonal of images (8, 8, 1), "
            "got evaluation.l2=5000. Radii are in 1/255 units: ",
        ),
        (
            ["train", "--config=digits:trades,norm=l2,eps=2041,beta=6"],
            "error: Expected trades.epsilon <= 2040, the diagonal of images",
        ),
        (
            ["table", "--config=digits", "--rows=st;at,norm=l2,eps=3000"],
            "AT (l2, eps = 3000/255): Expected attack.epsilon <= 2040, the diag",
        ),
    ],
)
def test_a_radius_that_holds_all_images_is_refused_before_any_work(
    arguments, message, tmp_path, capsys
):
    assert helpers.main(*arguments, f"--workdir={tmp_path}") == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.rglob("metrics.jsonl"))


@pytest.mark.parametrize(
    ("field", "value", "others"),
    [
        ("data.split_seed", "1", "(1, 0)"),  # by which test images are chosen, too
        ("model.dtype", "bfloat16", "('bfloat16', 'float32')"),
    ],
)
def test_rows_that_are_not_judged_alike_are_refused_before_any_work(
    field, value, others, tmp_path, capsys
):
    rows = ["st", f"st,{field}={value}"]
    assert helpers.main(*make_arguments(tmp_path / "new", rows, seeds=1)) == 2
    said = capsys.readouterr().err
    assert f"judged alike, as st, got run='st,{field}={value}'" in said
    assert f"{field}={others}. Make one table for each." in said
    assert not (tmp_path / "new").exists()


def test_a_row_that_fails_does_not_stop_the_others(
    table, tmp_path, capsys, monkeypatch
):
    workdir, _ = table
    monkeypatch.setenv("COLUMNS", "200")
    rows, config = [DIVERGING, *ROWS], helpers.write_diverging_config(tmp_path)
    assert helpers.main(*make_arguments(workdir, rows, seeds=1, config=config)) == 1
    output = " ".join(capsys.readouterr().out.split())
    assert "failed SAM (rho = 0.4), seed 0: The loss, a gradient or" in output
    content = (workdir / "table.md").read_text()
    assert "| ST |" in content
    assert "| SAM (rho = 0.2) |" in content
    assert not (workdir / DIVERGING / "seed0" / "result.json").exists()
    failure = json.loads((workdir / DIVERGING / "seed0" / "failure.json").read_text())
    assert failure["error"] == "TrainingDivergedError"
    assert failure["message"].startswith("The loss, a gradient or")
    assert helpers.main("status", f"--workdir={workdir}") == 0
    output = " ".join(capsys.readouterr().out.split())
    assert "5 runs: 4 done, 1 failed." in output
    assert "SAM (rho = 0.4), seed 0: The loss, a gradient or" in output


def test_a_run_that_failed_elsewhere_and_was_finished_since_is_in_the_table(
    copy, capsys, monkeypatch
):
    first, run, begun = copy / ROWS[0] / "seed0", sweep.run, []
    result, failure = first / "result.json", first / "failure.json"
    content = result.read_bytes()
    result.unlink()

    def among_others(config, *arguments, **options):
        begun.append(config.row)
        if len(begun) == 1:  # another worker is at it, and fails
            failure.write_text('{"message": "MemoryError", "host": "node7"}')
        if len(begun) <= 2:
            raise ClaimedError
        if len(begun) == 3:  # restarted, it finishes
            result.write_bytes(content)
            failure.unlink()
        return run(config, *arguments, **options)

    monkeypatch.setattr(sweep, "run", among_others)
    assert helpers.main(*make_arguments(copy, ROWS, seeds=1)) == 0
    assert begun == [*ROWS, ROWS[1], ROWS[0]]
    assert "failed ST" not in capsys.readouterr().out
    assert "| ST |" in (copy / "table.md").read_text()


@pytest.mark.parametrize("when", ["in a run", "after the last run"])
def test_a_table_that_is_moved_meanwhile_is_not_begun_again(
    tmp_path, capsys, monkeypatch, when
):
    workdir, run, begun = tmp_path / "table", sweep.run, []

    def moving(config, *arguments, **options):
        begun.append(config.row)
        if config.row == ROWS[-1] and when == "in a run":
            workdir.rename(tmp_path / "elsewhere")
            raise lost(workdir)
        result = run(config, *arguments, **options)
        if config.row == ROWS[-1]:
            workdir.rename(tmp_path / "elsewhere")
        return result

    monkeypatch.setattr(sweep, "run", moving)
    assert helpers.main(*make_arguments(workdir, ROWS, seeds=1)) == 69
    assert "the directory was removed or moved" in capsys.readouterr().err
    assert begun == ROWS
    assert not workdir.exists()
