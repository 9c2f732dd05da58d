"""The page of a folder: whole by itself, and no number without what made it."""

import html.parser
import json
import re
from pathlib import Path

import helpers
import pytest

from samrobust.evaluation.diagnostics.finding import (
    PASSED,
    Finding,
    write_report as write_sanity,
)
from samrobust.experiments.report import draw_training, write_report
from samrobust.experiments.reporting import summarize
from samrobust.experiments.reporting.names import attack_in_words
from samrobust.experiments.reporting.render import to_json
from samrobust.system.files import (
    append_json_line,
    digest,
    read_sealed,
    write_json,
    write_sealed,
    write_text,
)

ROWS = [("st", "ST"), ("sam,rho=0.2", "SAM (rho = 0.2) <b>")]
MADE = {
    "commit": "abc123",
    "jax": "0.10.0",
    "device": "A <GPU>",
    "command": "samrobust",
    "date": "2026-11-28",
}
ACCURACY = {"natural": 95.25, "linf 1/255": 61.5}
VOID = {"meta", "img"}
PIXEL = b"\x89PNG\r\n\x1a\n" + b"\0" * 8 + b"\0\0\0\2" * 2  # the size of a PNG


class Page(html.parser.HTMLParser):
    """A page that is well formed, its text and what it refers to."""

    def __init__(self, path: Path):
        super().__init__()
        self.open, self.links, self.text = [], [], ""
        self.feed(path.read_text("utf-8"))
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        assert tag not in ("script", "link", "iframe")
        self.links += [value for name, value in attrs if name in ("src", "href")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def result(row: str, seed: int) -> dict:
    return {
        "dataset": "digits",
        "row": row,
        "label": dict(ROWS)[row],
        "seed": seed,
        "accuracy": ACCURACY,
        "num_test": 500,
        "identity": f"identity-{row}-{seed}",
        "step": 77,
        "provenance": MADE,
    }


def leave_run(folder: Path, found: dict) -> None:
    """What `samrobust train` leaves of a finished run, but for its checkpoints."""
    helpers.make_folder(folder)
    config = {
        "label": found["label"],
        "seed": found["seed"],
        "model": {"dtype": "bfloat16"},
        "training": {"epochs": 2},
        "evaluation": helpers.make_config().evaluation.to_dict(),
    }
    write_json(folder / "config.json", config)
    write_sealed(folder / "result.json", found)
    lines = [{"epoch": e, "loss": 1 / e, "accuracy": 90.0 + e} for e in (1, 2)]
    write_text(folder / "metrics.jsonl", "".join(json.dumps(x) + "\n" for x in lines))


def leave_table(folder: Path, results: list[dict], name: str = "table") -> None:
    text = to_json(summarize(results, rows=ROWS))
    write_text(folder / f"{name}.json", text)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """The folder of a table with all that a report may hold, and the report."""
    folder = tmp_path_factory.mktemp("whole")
    results = [result(row, seed) for row, _ in ROWS for seed in range(2)]
    for found in results:
        leave_run(folder / found["row"] / f"seed{found['seed']}", found)
    leave_table(folder, results)
    for found in results:
        found["accuracy"] = {**ACCURACY, "linf 1/255 AA": 50.5}
    leave_table(folder, results, "autoattack")
    leave_curves(folder)
    leave_flatness(folder)
    finding = Finding("zero gradients", PASSED, "None of 9 < 10.", {})
    about = {"num_examples": 9, "step": 5, "identity": "of-the-checks"}
    about |= {"provenance": MADE}
    write_sanity([finding], folder / "st" / "seed0", about=about)
    assert [path.name for path in write_report(folder)] == [
        "report.html",
        *("table.png", "autoattack.png", "curves.png", "training.png"),
    ]
    return folder


def leave_curves(folder: Path) -> None:
    curve = {"row": "st", "label": "ST", "norm": "linf", "radii": [0.0, 1.0]}
    curve |= {"mean": [95.0, 33.25], "std": [0.0, 0.0], "seeds": 1}
    runs = {"st/seed0": {"identity": "of-the-curve", "step": 5, "provenance": MADE}}
    content = {"runs": runs, "title": "Accuracy of curves", "curves": [curve]}
    write_sealed(folder / "curves.json", content)


def leave_flatness(folder: Path) -> None:
    runs = {"st/seed0": {"identity": "of-the-flatness", "step": 5, "provenance": MADE}}
    content = {"runs": runs, "column": "linf 1/255", "correlations": {}}
    write_sealed(folder / "sharpness.json", content)
    (folder / "sharpness.md").write_text("lambda max of ST is 12.25.")
    (folder / "sharpness.png").write_bytes(PIXEL)


def test_flatness_that_is_not_that_of_its_numbers_is_left_out(tmp_path):
    leave_flatness(tmp_path)
    leave_table(tmp_path, [result("st", 0)])
    content = read_sealed(tmp_path / "sharpness.json") or {}
    written = {n: digest(tmp_path / n) for n in ("sharpness.md", "sharpness.png")}
    write_sealed(tmp_path / "sharpness.json", content | {"files": written})
    assert helpers.main("report", f"--workdir={tmp_path}") == 0
    assert "lambda max of ST" in Page(tmp_path / "report.html").text
    (tmp_path / "sharpness.md").write_text("lambda max of ST is 99.")
    assert helpers.main("report", f"--workdir={tmp_path}") == 0
    text = Page(tmp_path / "report.html").text
    assert "lambda max of ST" not in text
    assert (
        "Left out: sharpness.md is of another conclusion than sharpness.json." in text
    )


def test_a_conclusion_names_the_runs_that_it_is_of_and_no_others(tmp_path):
    leave_flatness(tmp_path)
    leave_table(tmp_path, [result("st", 0)])
    content = read_sealed(tmp_path / "sharpness.json") or {}
    (own,) = content["runs"].values()
    removed = {"st/seed1": own | {"identity": "of-a-removed-run"}}
    concluded = {"runs": content["runs"] | removed, "concluded": ["st/seed0"]}
    write_sealed(tmp_path / "sharpness.json", content | concluded)
    assert helpers.main("report", f"--workdir={tmp_path}") == 0
    text = Page(tmp_path / "report.html").text
    assert "of-the-flatness" in text
    assert "of-a-removed-run" not in text


def test_a_page_needs_nothing_but_itself(whole):
    page = Page(whole / "report.html")
    assert all(re.match("data:image/png;base64,|#part", link) for link in page.links)
    assert "default-src 'none'" in (whole / "report.html").read_text()


def test_a_tables_page_has_every_part_and_names_what_made_each(whole):
    text = Page(whole / "report.html").text
    assert "Not measured here" not in text
    assert "not recorded" not in text
    for number in (
        "95.2 ±0.0",
        "61.5 ±0.0",
        "50.5 ±0.0",
        "33.2",
        "12.25",
        "None of 9 < 10.",
    ):
        assert number in text
    runs = [f"identity-{row}-{seed}" for row, _ in ROWS for seed in range(2)]
    for identity in (*runs, "of-the-curve", "of-the-flatness", "of-the-checks"):
        assert identity in text
    assert all(part in text for part in ("abc123", "1 x A <GPU>", "jax 0.10.0"))


def test_a_damaged_log_is_left_out_and_said(tmp_path):
    for seed in range(2):
        leave_run(tmp_path / "st" / f"seed{seed}", result("st", seed))
    leave_table(tmp_path, [result("st", 0)])
    log = tmp_path / "st" / "seed1" / "metrics.jsonl"
    log.write_bytes(log.read_bytes()[:-3])
    write_report(tmp_path)
    text = Page(tmp_path / "report.html").text
    assert f"Left out: Expected a line for each of 2 epochs in {log}, got 1." in text
    assert "identity-st-0" in text


def test_a_copy_of_a_run_is_no_other_seed(tmp_path, monkeypatch):
    drawn = {}
    monkeypatch.setattr(
        "samrobust.experiments.report.draw_training",
        lambda runs: drawn.update(runs) or draw_training(runs),
    )
    for row in ("st", "of-last-week"):
        leave_run(tmp_path / row / "seed0", result("st", 0))
    write_report(tmp_path)
    assert [len(own) for _, own in drawn.values()] == [1]
    text = Page(tmp_path / "report.html").text
    assert "Left out: of-last-week/seed0, which is not of the row" in text


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda text: text[:-3], "Expected JSON in {}, got a damaged file"),
        (lambda _: "[]", "Expected a JSON object in {}, got a damaged file (a list)"),
        (
            lambda text: text.replace('"evaluation"', '"evaluatiom"'),
            "Expected what `samrobust train` writes in {}, got KeyError: 'evaluation'.",
        ),
        (
            lambda text: text.replace('"dtype"', '"dtypf"'),
            "Expected what `samrobust train` writes in {}, got KeyError: 'dtype'.",
        ),
    ],
)
def test_a_damaged_config_is_left_out_and_said(damage, said, tmp_path):
    folder = tmp_path / "run"
    leave_run(folder, result("st", 0))
    path = folder / "config.json"
    path.write_text(damage(path.read_text()))
    write_report(folder)
    text = Page(folder / "report.html").text
    assert f"Left out: {said.format(path)}" in text
    assert "identity-st-0" in text  # of the training
    (folder / "metrics.jsonl").unlink()
    with pytest.raises(ValueError, match="Expected a workdir of") as error:
        write_report(folder)
    assert said.format(path) in str(error.value)


def test_a_damaged_evaluation_is_no_absent_one(tmp_path):
    folder = tmp_path / "run"
    leave_run(folder, result("st", 0))
    cut, lost = '{"a"', "{{}\n"
    (folder / "evaluations.jsonl").write_text(lost + cut)
    append_json_line(folder / "evaluations.jsonl", {"added": 1})
    assert (folder / "evaluations.jsonl").read_text() == lost + '{"added": 1}\n'
    for text, is_said in ((cut, False), (lost + cut, True)):
        (folder / "evaluations.jsonl").write_text(text)
        write_report(folder)
        said = "evaluations.jsonl, got a damaged file (see line 1)"
        assert (said in Page(folder / "report.html").text) == is_said


def test_what_is_not_there_or_not_as_it_was_written_is_left_out_and_said(tmp_path):
    found = result("st", 0)
    del found["identity"]
    leave_table(tmp_path, [found])
    leave_curves(tmp_path)
    path = tmp_path / "curves.json"
    path.write_text(path.read_text().replace("33.25", "99.25"))
    (tmp_path / "autoattack.json").write_text('{"rows": []}')
    write_report(tmp_path)
    text = Page(tmp_path / "report.html").text
    for command in ("curves", "train", "evaluate --sanity"):
        assert f"(samrobust {command})" in text
    assert re.search(
        "Left out: Expected the content that was written in .*curves", text
    )
    assert "Left out: Expected what `samrobust recheck` writes in" in text
    assert "of-the-curve" not in text
    assert "99.2" not in text
    assert "not recorded" in text  # of the table's run


def test_a_run_has_a_page_of_its_evaluations(tmp_path, capsys):
    folder = tmp_path / "run"
    leave_run(folder, result("sam,rho=0.2", 1))
    evaluation = helpers.make_config().evaluation.to_dict()
    evaluation |= {"attack": "autoattack", "version": "standard", "members": []}
    line = {"accuracy": {"linf 1/255": 12.345}, "evaluation": evaluation}
    line |= {"num_test": 1000, "identity": "of-the-evaluation", "provenance": MADE}
    evaluation |= {"checkpoint": "best", "split": "validation"}
    line |= {"step": 33, "dtype": "float32"}
    pgd = helpers.make_config().evaluation.to_dict()
    own = [
        line | {"evaluation": pgd | {"linf_step": 0.1}},
        line | {"evaluation": pgd | {"random_start": False}, "seed": 7},
    ]
    lines = [json.dumps(each) + "\n" for each in (line, *own)]
    (folder / "evaluations.jsonl").write_text("".join(lines))
    assert helpers.main("report", f"--workdir={folder}") == 0
    assert "report.html, training.png" in capsys.readouterr().out
    text = Page(folder / "report.html").text
    for said in ("AutoAttack, standard", "12.35", "61.50", "PGD-"):
        assert said in text
    for said in ("judged, linf_step 0.1last", "judged, random_start False, seed 7last"):
        assert said in text  # what sets an evaluation apart
    networks = ("best checkpoint, step 33float321,000 validation",)
    networks += ("last checkpoint, step 77bfloat16500 test",)
    for said in networks:  # cells one after the other
        assert said in text
    assert "Report: SAM (rho = 0.2) <b>, seed 1" in text
    assert "of-the-evaluation" in text
    assert "identity-sam,rho=0.2-1" in text


def test_an_attack_is_named_from_before_it_had_all_its_fields():
    evaluation = helpers.make_config().evaluation.to_dict()
    earlier = {n: x for n, x in evaluation.items() if n != "gradient_floor"}
    assert attack_in_words(earlier) == attack_in_words(evaluation)


def test_a_file_in_place_of_a_folder_is_refused(tmp_path, capsys):
    (tmp_path / "file").touch()
    assert helpers.main("report", f"--workdir={tmp_path / 'file'}") == 2
    assert "Expected a writable directory, got workdir=" in capsys.readouterr().err


def test_an_empty_folder_is_refused(tmp_path, capsys):
    assert helpers.main("report", f"--workdir={tmp_path}") == 2
    assert "Expected a workdir of a table or a run with" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
