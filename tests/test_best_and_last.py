"""A run that is judged by its last and its best checkpoint: two columns of each."""

import json
import shutil
from contextlib import nullcontext
from pathlib import Path

import helpers
import pytest

from samrobust.attacks import ATTACKS_VERSION
from samrobust.cli import sharpness
from samrobust.experiments import reporting
from samrobust.experiments.networks import checkpoints_of, load, load_network
from samrobust.experiments.reporting.names import checkpoint_in_words
from samrobust.experiments.reporting.results import makers
from samrobust.experiments.run import run, train
from samrobust.experiments.scoring import Score, as_result, evaluation_work
from samrobust.experiments.workdir import settle_config
from samrobust.training import InterruptedRunError
from samrobust.training.checkpoint import CheckpointError

pytestmark = pytest.mark.usefixtures("programs_made_once")

FIELDS = {
    "data.validation_size": 40,
    "training.learning_rate": 0.3,
    "training.epochs": 6,
    "evaluation.batch_size": 24,  # two batches
    "evaluation.checkpoint": "both",
}
COLUMNS = ["natural", "natural best", "linf 16/255", "linf 16/255 best"]


class Counting(helpers.Silent):
    """An observer that counts the batches of the evaluation, and stops after some."""

    def __init__(self, stop_after=None):
        self.batches, self._stop_after = 0, stop_after

    def on_batch(self, done, num_examples, doing=""):
        del done, num_examples, doing
        self.batches += 1

    def should_stop(self):
        return self.batches == self._stop_after


def run_of(workdir, observer, best=2, checkpoint="both"):
    fields = {**FIELDS, "evaluation.checkpoint": checkpoint}
    config = helpers.make_config("st", fields)
    dataset = helpers.load_data(config)
    if not workdir.exists():
        settle_config(helpers.make_folder(workdir), config)
        epochs = iter(range(1, 7))
        judge = lambda _: {"score": -float(abs(next(epochs) - best))}  # noqa: E731
        train(config, dataset, workdir, validate=judge)
    stop = {"should_stop": observer.should_stop}
    return run(config, workdir, observer, dataset=dataset, **stop)


@pytest.fixture(scope="module")
def table(tmp_path_factory) -> Path:
    """The directory of a table of one run."""
    folder = tmp_path_factory.mktemp("table")
    run_of(folder / "st" / "seed0", Counting())
    return folder


@pytest.fixture
def workdir(table) -> Path:
    return table / "st" / "seed0"


def read(folder, name):
    return json.loads((folder / name).read_text())


def test_each_checkpoint_has_a_column_of_each_attack(workdir):
    config, result = helpers.make_config("st", FIELDS), read(workdir, "result.json")
    dataset = helpers.load_data(config)
    assert sorted(result["accuracy"]) == sorted(COLUMNS)
    for which, name in (("last", "natural"), ("best", "natural best")):
        network = load_network(config, dataset, workdir, which)
        natural = helpers.plain_accuracy(config, dataset, network.variables)
        assert result["accuracy"][name] == pytest.approx(natural)
    assert result["accuracy"]["natural"] != result["accuracy"]["natural best"]
    assert (result["checkpoint"], result["step"], result["best"]["step"]) == (
        *("both", 18),
        6,
    )
    assert result["best"]["identity"] == result["identity"]
    assert result["training_steps"] == 18


def test_the_last_column_is_that_of_a_run_judged_by_its_last_checkpoint(workdir):
    fields = {**FIELDS, "evaluation.checkpoint": "last"}
    last, both = (helpers.make_config("st", f) for f in (fields, FIELDS))
    dataset = helpers.load_data(last)
    alone = run(last, workdir.parent / "last", helpers.Silent(), dataset=dataset)
    together = read(workdir, "result.json")["accuracy"]
    assert list(alone["accuracy"]) == ["natural", "linf 16/255"]
    assert alone["accuracy"].items() <= together.items()
    assert "best" not in alone
    assert evaluation_work(both, dataset) == 2 * evaluation_work(last, dataset)


@pytest.mark.parametrize(("version", "left"), [(ATTACKS_VERSION, 2), (1, 4)])
def test_a_stop_between_both_evaluations_costs_nothing_unless_attacks_change(
    workdir, tmp_path, monkeypatch, version, left
):
    stopped, resumed = Counting(stop_after=3), Counting()
    with monkeypatch.context() as patch:
        patch.setattr("samrobust.experiments.scoring.ATTACKS_VERSION", version)
        with pytest.raises(InterruptedRunError, match="during evaluation"):
            run_of(tmp_path / "run", stopped)
    assert (tmp_path / "run" / "scores.json").exists()
    result = run_of(tmp_path / "run", resumed)
    assert (stopped.batches, resumed.batches) == (3, left)
    assert result["attacks_version"] == result["best"]["attacks_version"]
    assert result["attacks_version"] == ATTACKS_VERSION
    assert result["accuracy"] == read(workdir, "result.json")["accuracy"]
    assert not (tmp_path / "run" / "scores.json").exists()


def test_columns_that_an_earlier_process_judged_name_it(tmp_path, monkeypatch):
    stopped = Counting(stop_after=3)  # in the evaluation of the best
    for who, observer in (("first", stopped), ("second", Counting())):
        for module in ("run", "scoring"):
            made = lambda who=who: {"commit": who}  # noqa: E731
            monkeypatch.setattr(f"samrobust.experiments.{module}.provenance", made)
        expected = (
            pytest.raises(InterruptedRunError) if who == "first" else nullcontext()
        )
        with expected:
            result = run_of(tmp_path / "run", observer)
    made = {name: who["commit"] for name, who in makers(result).items()}
    assert made == {
        **{"": "second", "best": "second"},
        **{"natural": "first", "linf 16/255": "first"},
    }


def test_scores_that_a_kill_left_beside_a_result_are_removed(workdir, tmp_path):
    copy = Path(shutil.copytree(workdir, tmp_path / "run"))
    (copy / "scores.json").write_text("{}")
    assert (
        run_of(copy, Counting())["accuracy"] == read(workdir, "result.json")["accuracy"]
    )
    assert not (copy / "scores.json").exists()


def test_the_columns_of_both_leave_each_score_as_it_is():
    score = Score({"natural": 50.0}, 1, "", "", 1, {}, {})
    found = as_result({"last": score, "best": score})
    assert found["accuracy"] == {"natural": 50.0, "natural best": 50.0}
    assert score.accuracy == {"natural": 50.0}


def test_a_last_checkpoint_that_is_the_best_is_judged_once(tmp_path):
    observer = Counting()
    result = run_of(tmp_path / "run", observer, best=6)
    assert observer.batches == 2
    assert result["step"] == result["best"]["step"] == 18
    assert result["accuracy"]["natural"] == result["accuracy"]["natural best"]


def test_one_network_of_such_a_run_is_the_last_unless_the_best_is_asked_for(workdir):
    assert [load(workdir).step, load(workdir, checkpoint="best").step] == [18, 6]
    flags = (f"--workdir={workdir}", "--norm=linf", "--epsilon=16", "--num-steps=2")
    result = read(workdir, "result.json")
    for which, suffix in (((), ""), (("--checkpoint=best",), " best")):
        assert helpers.main("evaluate", *flags, *which) == 0
        line = helpers.read_lines(workdir / "evaluations.jsonl")[-1]
        wanted = result["accuracy"][f"linf 16/255{suffix}"]
        assert line["accuracy"]["linf 16/255"] == wanted
    assert line["evaluation"]["checkpoint"] == "best"


def test_what_explains_robustness_is_measured_on_the_last_checkpoint(workdir):
    result = read(workdir, "result.json")
    found = sharpness._accuracy(result, {})
    accuracy = result["accuracy"]
    assert {"natural", "linf 16/255"} <= found.keys()
    assert not [name for name in found if name.endswith(" best")]
    assert all(accuracy[name] == found[name] for name in accuracy.keys() & found.keys())


def test_a_best_checkpoint_that_the_result_is_not_of_is_refused(workdir, tmp_path):
    result = read(workdir, "result.json")
    (tmp_path / "checkpoints").symlink_to(workdir / "checkpoints")
    (tmp_path / "config.json").write_text((workdir / "config.json").read_text())
    result["best"]["step"] = 3
    (tmp_path / "result.json").write_text(json.dumps(result))
    assert load(tmp_path).step == 18
    with pytest.raises(CheckpointError, match=r"Expected step 3 in .*, got step 6"):
        load(tmp_path, checkpoint="best")


def test_the_passes_of_a_row_are_those_of_its_training(tmp_path):
    run_of(tmp_path / "st" / "seed0", Counting(), checkpoint="best")
    flags = ("--version=custom", "--members=apgd-ce", "--num-examples=24")
    assert helpers.main("recheck", f"--workdir={tmp_path}", *flags) == 0
    (judged,) = read(tmp_path, "autoattack.json")["runs"]
    assert (judged["step"], judged["training_steps"]) == (6, 18)


def test_autoattack_judges_both_checkpoints_too(table):
    flags = ("--version=custom", "--members=apgd-ce", "--num-examples=24")
    assert helpers.main("recheck", f"--workdir={table}", "--rows=st", *flags) == 0
    found = read(table, "autoattack.json")
    middle = ["linf 16/255", "linf 16/255 AA", "linf 16/255 AA best"]
    assert found["columns"] == [*COLUMNS[:2], *middle, COLUMNS[3]]
    (cells,) = (row["cells"] for row in found["rows"])
    for suffix in ("", " best"):
        weak, strong = (cells[f"linf 16/255{a}{suffix}"]["mean"] for a in ("", " AA"))
        assert strong <= weak
    assert "last and best checkpoint" in (table / "autoattack.md").read_text()


def test_a_table_shows_both_side_by_side(workdir, tmp_path):
    result, rows = read(workdir, "result.json"), {"st": "ST", "sam,rho=0.2": "SAM"}
    table = reporting.summarize(
        [{**result, "row": row} for row in rows],
        rows=list(rows.items()),
        passes={"st": 1.0, "sam,rho=0.2": 2.0},
    )
    assert list(table.columns) == COLUMNS
    assert table.runs[0]["best"]["step"] == 6
    markdown, *others = reporting.write_table(table, tmp_path)
    assert "table-cost.png" in [path.name for path in others]
    assert f"| {' | '.join(COLUMNS)} |" in markdown.read_text()
    evaluation = helpers.make_config("st", FIELDS).evaluation
    assert checkpoints_of(helpers.make_config("st", FIELDS)) == ("last", "best")
    assert checkpoint_in_words(evaluation) == "last and best checkpoint"
