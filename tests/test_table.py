"""`samrobust table`, from the command to its files."""

import csv
import json
from pathlib import Path

import helpers
import pytest

ROWS = ["st", "sam,rho=0.2"]
COLUMNS = {"natural", "linf 16/255"}
# A radius of SAM that overflows in its second pass, at the first step.
DIVERGING = "sam,rho=1e30"


def make_arguments(workdir: Path, rows: list[str], *, seeds: int) -> list[str]:
    return [
        *("table", "--config=configs/digits.py", f"--workdir={workdir}"),
        f"--seeds={seeds}",
        *(f"--rows={row}" for row in rows),
        *helpers.make_flags(),
    ]


@pytest.fixture(autouse=True, scope="module")
def _compile_quickly():
    with helpers.quick_compilation():
        yield


@pytest.fixture(scope="module")
def table(tmp_path_factory) -> tuple[Path, tuple[int, str, str]]:
    """A table of two rows and two seeds, and what the command said."""
    workdir = tmp_path_factory.mktemp("table")
    environment = {**helpers.QUICK_COMPILATION, "COLUMNS": "200"}
    arguments = make_arguments(workdir, ROWS, seeds=2)
    return workdir, helpers.run_command(*arguments, **environment)


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
        assert flag.removeprefix("--config.") in text


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


def test_a_row_that_fails_does_not_stop_the_others(table, capsys, monkeypatch):
    workdir, _ = table
    monkeypatch.setenv("COLUMNS", "200")
    assert helpers.main(*make_arguments(workdir, [DIVERGING, *ROWS], seeds=1)) == 1
    output = " ".join(capsys.readouterr().out.split())
    assert "failed SAM (rho = 1e+30), seed 0: The loss, a gradient or" in output
    content = (workdir / "table.md").read_text()
    assert "| ST |" in content
    assert "| SAM (rho = 0.2) |" in content
    assert not (workdir / DIVERGING / "seed0" / "result.json").exists()
