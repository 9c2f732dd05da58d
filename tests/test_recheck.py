"""The runs of a table under AutoAttack, beside PGD."""

import contextlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import helpers
import numpy as np
import pytest

from samrobust.cli import measuring
from samrobust.experiments import curves, networks, scoring, turns
from samrobust.experiments.run import run
from samrobust.system.claims.lease import claim
from samrobust.system.distributed import ending
from samrobust.system.files import read_sealed

pytestmark = pytest.mark.usefixtures("programs_made_once")

VERSION = ("--version=custom", "--members=apgd-ce")
IMAGES = ("--num-examples=24", "--batch-size=24")
FLAGS = ("--linf=24", "--l2=", *IMAGES, *VERSION)
COLUMNS = ["natural", "linf 24/255", "linf 24/255 AA"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """Two rows, one seed each, as `samrobust table` leaves them."""
    folder = tmp_path_factory.mktemp("table")
    fields = {
        "training.epochs": 8,
        "data.train_size": 400,
        "training.batch_size": 20,
        "evaluation.num_steps": 1,
    }
    for row in ("st", "sam,rho=0.2"):
        config = helpers.make_config(row, fields)
        data = helpers.load_data(config)
        run(config, folder / row / "seed0", helpers.Silent(), dataset=data)
    return folder


@pytest.fixture(scope="module")
def rechecked(trained) -> Path:
    assert helpers.main("recheck", f"--workdir={trained}", *FLAGS) == 0
    return trained


def accuracies(workdir: Path) -> dict[str, dict[str, float]]:
    """Percentages by row and column."""
    table = json.loads((workdir / "autoattack.json").read_text())
    assert table["columns"] == COLUMNS
    return {
        row["name"]: {column: row["cells"][column]["mean"] for column in COLUMNS}
        for row in table["rows"]
    }


def test_both_attacks_stand_side_by_side_and_the_stronger_leaves_less(rechecked):
    found = accuracies(rechecked)
    assert found.keys() == {"st", "sam,rho=0.2"}
    for row in found.values():
        natural, pgd, autoattack = (row[column] for column in COLUMNS)
        assert autoattack <= pgd <= natural
    assert sum(row[COLUMNS[2]] for row in found.values()) < sum(
        row[COLUMNS[1]] for row in found.values()
    )


def test_the_numbers_are_those_of_evaluate(rechecked):
    workdir = rechecked / "st" / "seed0"
    flags = (f"--workdir={workdir}", "--norm=linf", "--epsilon=24", *IMAGES)
    for attack, column in (
        (("--attack=pgd",), COLUMNS[1]),
        (("--attack=autoattack", *VERSION), COLUMNS[2]),
    ):
        assert helpers.main("evaluate", *flags, *attack) == 0
        lines = (workdir / "evaluations.jsonl").read_text().splitlines()
        accuracy = json.loads(lines[-1])["accuracy"]
        assert accuracy["linf 24/255"] == accuracies(rechecked)["st"][column]


def test_networks_compute_in_the_precision_asked_for(trained, tmp_path):
    workdir = Path(shutil.copytree(trained, tmp_path / "table"))
    row = ("--rows=st", "--dtype=bfloat16")
    assert helpers.main("recheck", f"--workdir={workdir}", *FLAGS, *row) == 0
    coarse = next((workdir / "st/seed0/autoattack").glob("*.npz"))
    assert "bfloat16" in (workdir / "autoattack.md").read_text()
    assert helpers.main("recheck", f"--workdir={workdir}", *FLAGS, "--rows=st") == 0
    both = set((workdir / "st/seed0/autoattack").glob("*.npz"))
    assert coarse in both
    assert len(both) == 2
    assert "float32" in (workdir / "autoattack.md").read_text()


def test_the_table_is_written_for_people_too(rechecked):
    assert (rechecked / "autoattack.png").stat().st_size > 0
    text = (rechecked / "autoattack.md").read_text()
    assert "| method | seeds | natural | linf 24/255 | linf 24/255 AA |" in text
    assert "AA: AutoAttack, custom (apgd-ce)" in text
    assert "PGD-1 on the cross_entropy loss" in text
    rows = json.loads((rechecked / "autoattack.json").read_text())["rows"]
    assert {row["name"]: row["passes"] for row in rows} == {"st": 1, "sam,rho=0.2": 2}


def test_what_autoattack_found_is_not_looked_for_again(rechecked, tmp_path):
    workdir = Path(shutil.copytree(rechecked, tmp_path / "table"))
    before = (workdir / "autoattack.csv").read_text()
    for path in workdir.glob("*/seed0/autoattack/*.npz"):
        stored = dict(np.load(path))
        np.savez(path, **stored | {"broken_at": np.maximum(stored["broken_at"], 0)})
    assert helpers.main("recheck", f"--workdir={workdir}", *FLAGS) == 0
    after = (workdir / "autoattack.csv").read_text()
    assert after != before
    assert all(row[COLUMNS[2]] == 0 for row in accuracies(workdir).values())


def test_what_is_stored_of_a_run_does_not_depend_on_the_rows_beside_it(tmp_path):
    """Groups of BatchNorm that are one row's batch are none in its network alone."""
    rows = {"st": 20, "st,training.batch_size=40": 40}
    for row, size in rows.items():
        fields = {"training.batch_size": size, "model.batch_norm_group": 20}
        config = helpers.make_config(row, {"training.epochs": 1, **fields})
        data = helpers.load_data(config)
        run(config, tmp_path / row / "seed0", helpers.Silent(), dataset=data)
    command = ("recheck", f"--workdir={tmp_path}", *FLAGS)
    stored = []
    for others in (["--rows=st,training.batch_size=40"], []):
        assert helpers.main(*command, *others) == 0
        folder = tmp_path / "st,training.batch_size=40/seed0/autoattack"
        stored.append(sorted(path.name for path in folder.glob("*.npz")))
    assert stored[0] == stored[1]


def test_every_run_names_its_network_and_who_made_what(
    rechecked, tmp_path, monkeypatch
):
    """Also where an outcome is only read again, by another process at another time."""
    workdir = Path(shutil.copytree(rechecked, tmp_path / "table"))
    before = json.loads((workdir / "autoattack.json").read_text())["runs"]
    monkeypatch.setattr(
        "samrobust.experiments.scoring.provenance", lambda: {"commit": "later"}
    )
    assert helpers.main("recheck", f"--workdir={workdir}", *FLAGS) == 0
    after = json.loads((workdir / "autoattack.json").read_text())["runs"]
    for run_before, run_after in zip(before, after, strict=True):
        folder = workdir / run_after["row"] / "seed0"
        result = json.loads((folder / "result.json").read_text())
        for key in ("identity", "step"):
            assert run_before[key] == run_after[key] == result[key]
        for made in ("provenance", "training_provenance"):
            assert run_after[made] == run_before[made]
        assert run_after["training_provenance"] == result["provenance"]
        assert run_after["pgd_provenance"] == {"commit": "later"}


def test_another_radius_is_attacked_beside_those_that_are_stored(
    rechecked, tmp_path, monkeypatch
):
    workdir = Path(shutil.copytree(rechecked, tmp_path / "table"))
    runs = json.loads((workdir / "autoattack.json").read_text())["runs"]
    (before,) = (run for run in runs if run["row"] == "st")
    (stored,) = (workdir / "st/seed0/autoattack").glob("*.npz")
    untouched = stored.read_bytes()
    told = []
    monkeypatch.setattr(
        "samrobust.experiments.scoring.provenance",
        lambda: {"commit": "later", "date": "9999-12-31T00:00:00+00:00"},
    )
    until_stopped = scoring.until_stopped

    def listening(on_batch, *rest):
        def listen(done, total, doing=""):
            told.append(doing.split(":")[0])
            on_batch(done, total, doing)

        return until_stopped(listen, *rest)

    monkeypatch.setattr(scoring, "until_stopped", listening)
    flags = ("--rows=st", "--linf=24,4", *FLAGS[1:])
    assert helpers.main("recheck", f"--workdir={workdir}", *flags) == 0
    assert "linf 4/255" in told
    assert "linf 24/255" not in told
    assert "natural" not in told
    assert stored.read_bytes() == untouched
    assert len(list(stored.parent.glob("*.npz"))) == 2
    table = json.loads((workdir / "autoattack.json").read_text())
    (run,), (row,) = table["runs"], table["rows"]
    assert run["provenance"]["commit"] == "later"
    assert run["column_provenance"] == {COLUMNS[2]: before["provenance"]}
    cell = accuracies(rechecked)["st"][COLUMNS[2]]
    assert (
        row["cells"][COLUMNS[2]]["mean"]
        == cell
        <= row["cells"]["linf 4/255 AA"]["mean"]
    )
    (measured,) = (note for note in table["notes"] if note.startswith("Measured"))
    assert f"{before['provenance']['commit']}, later" in measured
    assert helpers.main("report", f"--workdir={workdir}") == 0
    page = (workdir / "report.html").read_text()
    assert f"AutoAttack, {COLUMNS[2]}" in page


@pytest.fixture
def another_worker(monkeypatch):
    """Holds the first run until this worker waits, and then acts."""

    @contextlib.contextmanager
    def at_work(workdir: Path, act: Callable[[], object] = lambda: None):
        with contextlib.ExitStack() as held:
            held.enter_context(claim(workdir / ".judging" / "sam,rho=0.2" / "seed0"))

            def wait(seconds, should_stop):
                del seconds, should_stop
                held.close()
                act()

            monkeypatch.setattr(turns, "_wait", wait)
            yield

    return at_work


def test_a_run_that_another_worker_judges_is_judged_last(
    rechecked, tmp_path, another_worker, monkeypatch
):
    workdir = Path(shutil.copytree(rechecked, tmp_path / "table"))
    judged = []
    score = scoring.Scorer.__call__

    def recorded(self, network, *args, **kwargs):
        judged.append(network.config.row)
        return score(self, network, *args, **kwargs)

    monkeypatch.setattr(scoring.Scorer, "__call__", recorded)
    with another_worker(workdir):
        assert helpers.main("recheck", f"--workdir={workdir}", *FLAGS) == 0
    assert judged == ["st"] * 2 + ["sam,rho=0.2"] * 2  # PGD and AutoAttack
    assert accuracies(workdir) == accuracies(rechecked)
    assert list(accuracies(workdir)) == list(accuracies(rechecked))


def test_what_another_worker_measured_meanwhile_is_kept_and_not_measured_again(
    trained, tmp_path, another_worker, monkeypatch
):
    workdir = Path(shutil.copytree(trained, tmp_path / "table"))
    flags = (f"--workdir={workdir}", "--linf=8", "--l2=", "--num-examples=16")
    row, measured = "--rows=sam,rho=0.2", []
    measure = curves.measure_run

    def counted(*args, **kwargs):
        measured.append(args)
        return measure(*args, **kwargs)

    monkeypatch.setattr(curves, "measure_run", counted)
    with another_worker(workdir, lambda: helpers.main("curves", *flags, row)):
        assert helpers.main("curves", *flags) == 0
    assert len(measured) == 2
    content = json.loads((workdir / "curves.json").read_text())
    assert content["runs"].keys() == {"st/seed0", "sam,rho=0.2/seed0"}
    assert {line["row"] for line in content["curves"]} == {"st", "sam,rho=0.2"}


def test_a_workdir_that_is_moved_in_an_attack_is_not_made_again(
    trained, tmp_path, capsys, monkeypatch
):
    workdir = Path(shutil.copytree(trained, tmp_path / "table"))
    until_stopped = scoring.until_stopped

    def moving(on_batch, *rest):
        def listen(done, total, doing=""):
            if "apgd-ce" in doing and workdir.exists():
                workdir.rename(tmp_path / "elsewhere")
            on_batch(done, total, doing)

        return until_stopped(listen, *rest)

    monkeypatch.setattr(scoring, "until_stopped", moving)
    flags = ("--linf=20", *FLAGS[1:])  # at which nothing is stored
    assert helpers.main("recheck", f"--workdir={workdir}", *flags) == 69
    assert "the directory was removed or moved" in capsys.readouterr().err
    assert not workdir.exists()


@pytest.mark.parametrize("command", ["recheck", "curves"])
def test_a_workdir_that_is_moved_meanwhile_is_not_made_again(
    trained, tmp_path, capsys, monkeypatch, command
):
    workdir = Path(shutil.copytree(trained, tmp_path / "table"))
    judge_each = measuring.FinishedRuns.judge_each

    def moving(self, judge, works):
        def move_then_judge(*arguments):
            found = judge(*arguments)
            if workdir.exists():
                workdir.rename(tmp_path / "elsewhere")
            return found

        return judge_each(self, move_then_judge, works)

    monkeypatch.setattr(measuring.FinishedRuns, "judge_each", moving)
    flags = [*FLAGS] if command == "recheck" else ["--linf=8", "--l2=", IMAGES[0]]
    assert helpers.main(command, f"--workdir={workdir}", *flags) == 69
    assert "the directory was removed or moved" in capsys.readouterr().err
    assert not workdir.exists()


@pytest.mark.parametrize("command", ["recheck", "curves"])
def test_a_run_whose_network_cannot_be_read_stops_no_other(
    trained, tmp_path, capsys, command
):
    workdir = Path(shutil.copytree(trained, tmp_path / "table"))
    flags = [*FLAGS] if command == "recheck" else ["--linf=8", "--l2=", IMAGES[0]]
    arguments = (command, f"--workdir={workdir}", *flags)
    shutil.rmtree(workdir / "st" / "seed0" / "checkpoints")
    assert helpers.main(*arguments) == 1
    said = " ".join(capsys.readouterr().out.split())
    assert "failed ST, seed 0: Expected" in said
    if command == "recheck":
        assert accuracies(workdir).keys() == {"sam,rho=0.2"}
        assert "st,ST," not in (workdir / "autoattack.csv").read_text()
    else:
        content = read_sealed(workdir / "curves.json") or {}
        assert content["concluded"] == ["sam,rho=0.2/seed0"]
    shutil.rmtree(workdir / "sam,rho=0.2" / "seed0" / "checkpoints")
    assert helpers.main(*arguments) == 1
    assert "error: Expected a checkpoint in" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["recheck", "curves"])
def test_a_broken_connection_leaves_no_run_out(
    trained, tmp_path, capsys, monkeypatch, command
):
    """All processes meet it alike; it is no fault of the run's network."""
    workdir = Path(shutil.copytree(trained, tmp_path / "table"))
    flags = [*FLAGS] if command == "recheck" else ["--linf=8", "--l2=", IMAGES[0]]

    load_network = networks.load_network

    def fail_last(config, *arguments):
        if config.row == "st":
            return load_network(config, *arguments)
        monkeypatch.setattr(ending, "is_joined", lambda: True)
        raise ValueError(helpers.BROKEN_CONNECTION)

    monkeypatch.setattr(networks, "load_network", fail_last)
    assert helpers.main(command, f"--workdir={workdir}", *flags) == 69
    assert "Another process of this run died" in capsys.readouterr().err


def test_a_damaged_result_is_refused_before_any_attack(rechecked, monkeypatch, capsys):
    path = rechecked / "st" / "seed0" / "result.json"
    content = path.read_text()
    path.write_text(content[:-9])
    monkeypatch.setattr(scoring, "Scorer", None)
    try:
        assert helpers.main("recheck", f"--workdir={rechecked}") == 2
    finally:
        path.write_text(content)
    assert "Expected JSON in" in capsys.readouterr().err


def test_a_folder_without_runs_and_flags_that_attack_nothing_are_refused(
    rechecked, tmp_path, capsys
):
    assert helpers.main("recheck", f"--workdir={tmp_path}") == 2
    assert "Expected finished runs in --workdir" in capsys.readouterr().err
    assert helpers.main("recheck", f"--workdir={rechecked}/st/seed0") == 2
    assert "It is a run's: give the directory of its" in capsys.readouterr().err
    nothing = ("--linf=", "--l2=")
    assert helpers.main("recheck", f"--workdir={rechecked}", *nothing) == 2
    assert "Expected radii to attack at" in capsys.readouterr().err
    assert helpers.main("recheck", f"--workdir={rechecked}", "--l2=5000") == 2
    assert "Expected evaluation.l2 <= 2040, the diag" in capsys.readouterr().err
    assert helpers.main("recheck", f"--workdir={rechecked}", "--num-examples=0") == 2
    assert "--num-examples: Expected 1 <= value" in capsys.readouterr().err
