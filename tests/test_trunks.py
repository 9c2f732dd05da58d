"""Runs that differ in late parts alone: their common part is trained once."""

import contextlib
import dataclasses
import json
import os
import shutil
from pathlib import Path
from typing import Any

import helpers
import jax
import numpy as np
import pytest
from flax import linen as nn
from rich.console import Console

from samrobust import cli
from samrobust.cli import table
from samrobust.cli.planning import make_plan
from samrobust.experiments import building, identity, sweep
from samrobust.experiments.configuration import as_dict, load_config
from samrobust.experiments.run import PlannedRun, train
from samrobust.experiments.trunks import plan_trunks, remove_finished, trained_by
from samrobust.system.claims.lease import claim
from samrobust.training import InterruptedRunError
from samrobust.training.checkpoint import Checkpoints
from samrobust.training.epoch import LoopState
from samrobust.training.state import TrainState
from samrobust.training.trunks import BranchFolder, Trunk

pytestmark = pytest.mark.usefixtures("programs_made_once")

SAM, LATER_SAM = "sam,rho=0.2,start=0.5", "sam,rho=0.2,start=0.75"
AT = "at,norm=linf,eps=16,start=0.5"
BOTH = "at,norm=linf,eps=16,start=0.25+sam,rho=0.2,start=0.5"
SAM_4, AT_SAM = "sam,rho=0.4,start=0.5", "at,norm=linf,eps=16+sam,rho=0.2,start=0.25"
EMA, SAM_EMA = "ema,decay=0.9", f"{SAM}+ema,decay=0.9"
PER_EPOCH = 3
HELD_OUT = {"data.validation_size": 48}


class Tiny(nn.Module):
    """A network that is traced and compiled at once."""

    num_classes: int = 10

    @nn.compact
    def __call__(self, images, *, train):
        hidden = nn.Dense(4)(images.reshape(len(images), -1))
        hidden = nn.BatchNorm(use_running_average=not train)(hidden)
        return nn.Dense(self.num_classes)(nn.relu(hidden))


FIELDS = {name: v for name, v in helpers.TINY.items() if not name.startswith("model.")}
FIELDS |= {"model.name": "test_trunks:Tiny"}


DIGITS = f"{helpers.ROOT}/configs/digits.py"


def make_flags(overrides):
    return [f"--config.{n}={value}" for n, value in (FIELDS | overrides).items()]


def make_config(row, overrides):
    return load_config(f"configs/digits.py:{row}", make_flags(overrides))


@dataclasses.dataclass
class Outcome:
    """A run's last state, its log, its best checkpoint, and where it began."""

    state: Any
    lines: list
    best: dict
    began: int


@dataclasses.dataclass
class Table:
    """Rows in one folder, trained one by one."""

    folder: Path
    rows: list
    overrides: dict = dataclasses.field(default_factory=dict)
    began: int = 0  # the last run

    def workdir(self, row):
        return self.folder / row / "seed0"

    def planned(self):
        configs = {
            self.workdir(row): make_config(row, self.overrides) for row in self.rows
        }
        shared = plan_trunks(self.folder, configs)
        return {
            config.row: PlannedRun(config, path, shared[path])
            for path, config in configs.items()
        }

    def train(self, row, stop_at=None):
        planned, steps = self.planned()[row], []

        def on_progress(progress):
            steps.append(progress.step)
            self.began = steps[0]

        outcome = train(
            planned.config,
            helpers.load_data(planned.config),
            planned.workdir,
            on_progress=on_progress,
            should_stop=lambda: steps[-1] == stop_at,
            shared=planned.shared,
        )
        lines = helpers.log_of(planned.workdir)
        best = {}
        if helpers.checkpoint_steps(planned.workdir, "best"):
            best = helpers.read_checkpoint(planned.workdir, "best")
        return Outcome(jax.device_get(outcome.state), lines, best, self.began)

    def stop(self, row, step):
        """Trains up to a step, and says from which on."""
        with pytest.raises(InterruptedRunError):
            self.train(row, stop_at=step)
        return self.began

    def trunks(self):
        found = self.folder.glob("trunks/*/*/*/checkpoints/last/[0-9]*")
        return {str(p.relative_to(self.folder / "trunks")) for p in found}


def trunk_of(row, epoch):
    step = PER_EPOCH * epoch
    return f"{row}/seed0/epoch{epoch}/checkpoints/last/{step}"


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """What a row is that shares nothing."""
    known = {}

    def find(row, overrides=None):
        key = row, json.dumps(overrides)
        if key not in known:
            table = Table(tmp_path_factory.mktemp("alone"), [row], overrides or {})
            known[key] = table.train(row)
            assert known[key].began == 0
            assert not table.trunks()
        return known[key]

    return find


def assert_same(outcome, expected, *, shared=0):
    """They are equal, and the epochs that another run has trained are marked."""
    helpers.assert_same_bits(outcome.state, expected.state)
    helpers.assert_same_bits(outcome.best, expected.best)
    lines = [dict(line) for line in outcome.lines]
    marks = [line.pop("trained_by", None) for line in lines]
    assert lines == expected.lines
    assert all(marks[:shared])
    assert not any(marks[shared:])


def test_each_common_part_is_trained_once_and_all_end_as_if_alone(tmp_path, alone):
    began = {LATER_SAM: 0, SAM: 2, "st": 3, AT: 2}  # epochs
    table = Table(tmp_path, list(began))
    for row, epochs in began.items():
        outcome = table.train(row)
        assert outcome.began == PER_EPOCH * epochs
        assert_same(outcome, alone(row), shared=epochs)
    assert table.trunks() == {trunk_of("st", 2), trunk_of("st", 3)}


def test_averages_and_the_best_checkpoint_on_held_out_images_go_along(tmp_path, alone):
    table = Table(tmp_path, [EMA, SAM_EMA], HELD_OUT)
    for row, epochs in {EMA: 0, SAM_EMA: 2}.items():
        outcome = table.train(row)
        assert outcome.best
        assert outcome.began == PER_EPOCH * epochs
        assert_same(outcome, alone(row, HELD_OUT), shared=epochs)


def test_a_trunk_is_what_its_row_leaves_alone(tmp_path):
    table, plain = Table(tmp_path, [SAM, AT]), Table(tmp_path / "plain", ["st"])
    table.stop(SAM, 7)
    plain.stop("st", 6)
    left = helpers.read_checkpoint(tmp_path / "trunks/st/seed0/epoch2")
    helpers.assert_same_bits(left, helpers.read_checkpoint(plain.workdir("st")))


def test_a_run_that_has_begun_goes_on_without_its_trunk(tmp_path, alone):
    table = Table(tmp_path, ["st", SAM])
    table.stop("st", 7)
    table.stop(SAM, 8)
    shutil.rmtree(tmp_path / "trunks")
    for row, step, epochs in ((SAM, 8, 2), ("st", 7, 0)):
        outcome = table.train(row)
        assert outcome.began == step
        assert_same(outcome, alone(row), shared=epochs)


class Killed(BaseException):
    pass


def test_a_run_that_is_killed_as_it_leaves_a_trunk_leaves_it_later(
    tmp_path, monkeypatch, alone
):
    every_step = HELD_OUT | {"checkpoint.minutes": 0}
    table, save = Table(tmp_path, [EMA, SAM_EMA], every_step), Checkpoints.save
    for which in ("best", "last"):

        def killed(self, *arguments, which=which, **options):
            if "trunks" in self._place.name and self._place.name.endswith(which):
                raise Killed
            save(self, *arguments, **options)

        monkeypatch.setattr(Checkpoints, "save", killed)
        with pytest.raises(Killed):
            table.train(EMA)
        assert not table.trunks()
    monkeypatch.undo()
    table.stop(EMA, 7)
    outcome = table.train(SAM_EMA)
    assert outcome.began == 6
    assert_same(outcome, alone(SAM_EMA, HELD_OUT), shared=2)


def damage(table):
    for path in (table.folder / "trunks").glob("**/state/**/d/*"):
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 4
        path.write_bytes(content)


def test_a_damaged_trunk_is_told_and_not_used_and_written_again(tmp_path):
    table = Table(tmp_path, ["st", SAM, AT])
    table.stop("st", 7)
    damage(table)
    with pytest.warns(UserWarning, match=r"trained again: .* intact .*epoch2"):
        table.stop(SAM, 7)
    shutil.rmtree(table.workdir(SAM))
    assert table.stop(SAM, 7) == 6


class AnyRun:
    """The identity of runs that are all taken for one."""

    hash = "any"

    def refuse(self, _):
        return ""

    def resumed(self, _):
        return self

    branched = resumed

    def as_dict(self):
        return {}


@pytest.mark.parametrize(("first", "second"), [(5, 7), (5, 3)])
def test_a_trunk_that_two_runs_leave_has_the_best_that_its_last_names(
    tmp_path, first, second
):
    """Each trained the common part, and rounding led them to other best epochs."""

    def at(step):
        count: Any = np.int32(step)
        state = TrainState(count, {"w": np.ones(1, np.float32)}, {}, ())
        totals = {"examples": np.float32(0), "first_bad_step": np.int32(-1), "sums": {}}
        return LoopState(state, totals)

    identity: Any = AnyRun()
    trunk = Trunk(tmp_path / "trunk", 8, identity, lambda: at(0), lambda: True)
    with contextlib.ExitStack() as both:  # that began before the trunk was there
        for name, best in (("a", first), ("b", second)):
            folder = BranchFolder(tmp_path / name, identity=identity, trunks=[trunk])
            both.enter_context(folder).restore(at(0), 20)
            folder.keep_best(at(best), best, {"score": 0.9})
            both.callback(folder.pass_on, at(8), 8)
    with BranchFolder(tmp_path / "c", identity=identity, trunks=[trunk]) as third:
        assert third.restore(at(0), 20).state.step == 8
        third.keep_best(at(12), 12, {"score": 0.5})
        third.save(at(20), 20, 0.0)
    (kept,) = helpers.checkpoint_steps(tmp_path / "c", "best")
    assert kept in (first, second)


def test_a_trunk_of_another_run_is_told_and_not_used(tmp_path):
    Table(tmp_path, ["st", SAM], {"data.split_seed": 1}).stop("st", 7)
    with pytest.warns(UserWarning, match=r"again: .*data\.split_seed is 1, not 0"):
        assert Table(tmp_path, ["st", SAM]).stop(SAM, 1) == 0


def test_a_trunk_that_another_worker_writes_is_left_to_that_one(tmp_path):
    table = Table(tmp_path, ["st", SAM])
    with claim(tmp_path / "trunks/st/seed0/epoch2"):
        table.stop("st", 7)
    assert not table.trunks()


def test_a_trunk_that_cannot_be_written_stops_no_run(tmp_path):
    (tmp_path / "trunks").write_text("in the way")
    with pytest.warns(UserWarning, match="their common part again: .* writable"):
        Table(tmp_path, ["st", SAM]).stop("st", 7)


def test_a_trunk_is_left_where_a_run_has_yet_to_begin(tmp_path):
    table = Table(tmp_path, [SAM, AT])
    helpers.make_folder(table.workdir(AT) / "checkpoints" / "last")
    table.stop(SAM, 7)
    assert not table.trunks()


def test_a_run_that_began_with_imported_weights_leaves_no_trunk(tmp_path):
    table = Table(tmp_path, ["st", SAM])
    helpers.make_folder(table.workdir("st")).joinpath("import.json").write_text("{}")
    table.stop("st", 7)
    assert not table.trunks()


def test_a_trunk_names_all_libraries_that_took_part_in_it(tmp_path, monkeypatch):
    table = Table(tmp_path, ["st", SAM])
    with monkeypatch.context() as patch:
        patch.setattr(identity, "_versions", lambda: {"jax": "older"})
        table.stop("st", 4)
    table.stop("st", 7)
    table.stop(SAM, 7)
    manifest = table.workdir(SAM) / "checkpoints/last/7/metadata/metadata"
    stored = json.loads(manifest.read_text())["metadata"]["identity"]
    assert stored["versions"] == [{"jax": "older"}, identity._versions()]


PLANS = {
    ("st", SAM): {"st": ["st 2"], SAM: ["st 2"]},
    ("st", SAM, LATER_SAM): {
        "st": ["st 2", "st 3"],
        SAM: ["st 2"],
        LATER_SAM: ["st 2", "st 3"],
    },
    ("st", "sam,rho=0.2", EMA): {"st": [], "sam,rho=0.2": [], EMA: []},
    (SAM, SAM_4, AT_SAM): {SAM: ["st 2"], SAM_4: ["st 2"], AT_SAM: []},
    (SAM, "st,training.momentum=0.5"): {SAM: [], "st,training.momentum=0.5": []},
    (BOTH, "st", "at,norm=linf,eps=16,start=0.25"): {
        BOTH: ["st 1", "at,norm=linf,eps=16,start=0.25 2"],
        "st": ["st 1"],
        "at,norm=linf,eps=16,start=0.25": [
            "st 1",
            "at,norm=linf,eps=16,start=0.25 2",
        ],
    },
}


def test_held_out_images_that_are_attacked_are_judged_from_the_first_epoch(tmp_path):
    planned = Table(tmp_path, ["st", SAM, AT], HELD_OUT).planned()
    assert {row for row, run in planned.items() if run.shared} == {"st", SAM}


@pytest.mark.parametrize("rows", PLANS)
def test_runs_share_what_they_are_before_their_late_parts_begin(rows, tmp_path):
    planned = Table(tmp_path, list(rows)).planned()
    found = {
        row: [f"{trunk.config.row} {trunk.epoch}" for trunk in run.shared]
        for row, run in planned.items()
    }
    assert found == PLANS[rows]


def test_numbers_of_the_paper_keep_no_runs_apart(tmp_path):
    configs = {
        tmp_path / row: load_config(f"configs/cifar10.py:{row}") for row in ("st", SAM)
    }
    assert configs[tmp_path / "st"].paper
    assert all(plan_trunks(tmp_path, configs).values())


def test_a_field_of_a_late_part_is_no_field_of_the_trunk(tmp_path):
    row = f"{SAM},sam.batch_stats=first"
    (trunk,) = Table(tmp_path, ["st", row]).planned()[row].shared
    assert trunk.config.row == "st"
    assert as_dict(trunk.config)["sam"]["batch_stats"] == "both"


def test_a_worker_first_does_what_does_not_begin_as_a_run_at_work(
    tmp_path, monkeypatch
):
    planned = Table(tmp_path, ["st", SAM, "sam,rho=0.2"]).planned()
    done = []
    monkeypatch.setattr(
        sweep, "run", lambda config, *_, **__: done.append(config.row) or {}
    )

    def follow():
        done.clear()
        sweep.run_all(
            list(planned.values())[1:],
            lambda _: None,  # type: ignore[arg-type,return-value]
            lambda group: [helpers.Silent()] * len(group),
            on_failure=lambda *failure: pytest.fail(str(failure)),
        )
        return done

    with claim(planned["st"].workdir):
        assert follow() == ["sam,rho=0.2", SAM]
        (trunk,) = planned["st"].shared
        helpers.make_folder(trunk.folder / "checkpoints" / "last")
        assert follow() == [SAM, "sam,rho=0.2"]
    shutil.rmtree(trunk.folder)
    assert follow() == [SAM, "sam,rho=0.2"]  # nobody makes it any more


def test_a_trunk_is_removed_when_all_of_its_runs_have_finished(tmp_path):
    planned = Table(tmp_path, ["st", SAM]).planned()
    (trunk,) = planned["st"].shared
    for folder in (trunk.folder, tmp_path / "trunks" / "another"):
        helpers.make_folder(folder)
    for run in planned.values():
        assert trunk.folder.exists()
        helpers.make_folder(run.workdir)
        (run.workdir / "result.json").touch()
        remove_finished([trunk])
    assert [path.name for path in (tmp_path / "trunks").iterdir()] == ["another"]
    remove_finished([trunk])


def test_of_several_trunks_the_last_is_what_a_run_went_on_from():
    lines = [{"step": step, "trained_by": f"run {step}"} for step in (3, 6)]
    assert trained_by([*lines, {"step": 9}]) == {"identity": "run 6", "step": 6}


def test_a_result_of_a_table_names_the_run_that_it_went_on_from(tmp_path):
    rows = ["st", SAM]
    code, _, errors = helpers.run_command(
        *("table", "--config=configs/digits.py", f"--workdir={tmp_path}"),
        *(f"--rows={row}" for row in rows),
        *make_flags({"evaluation.linf": (), "training.epochs": 2}),
        PYTHONPATH=os.pathsep.join((str(helpers.ROOT), str(Path(__file__).parent))),
    )
    assert (code, errors) == (0, "")
    assert not (tmp_path / "trunks").exists()
    folders = [tmp_path / row / "seed0" for row in rows]
    plain, late = (json.loads((f / "result.json").read_text()) for f in folders)
    assert "trunk" not in plain["provenance"]
    origin = {"identity": plain["identity"], "step": PER_EPOCH}
    assert late["provenance"]["trunk"] == origin
    logs = [helpers.read_lines(folder / "metrics.jsonl") for folder in folders]
    assert logs[0][0]["seconds"] == logs[1][0]["seconds"]
    total = sum(line["seconds"] for line in logs[1])
    assert late["training_seconds"] == pytest.approx(total)


def test_the_eta_of_a_table_counts_epochs_in_common_once(tmp_path, monkeypatch):
    rows = "st;sam,rho=0.4,start=0.5;sam,rho=0.8,start=0.5"
    flags = [f"--config={DIGITS}", f"--workdir={tmp_path}", f"--rows={rows}"]
    fields = ("training.epochs=2", "data.train_size=64", "training.batch_size=32")
    fields += ("evaluation.linf=()", "evaluation.l2=()", "data.test_size=30")
    flags += [f"--config.{field}" for field in fields]
    plan = make_plan(cli._parse(["table", *flags]))
    works = []

    def observe_all(runs, _, observe, **__):
        works.extend(d.training + d.evaluation - d.given for d in observe(runs))

    monkeypatch.setattr(sweep, "run_all", observe_all)
    load_data = building.load_data
    foreseen = table._foresee(plan.runs, [False] * len(plan.runs), load_data)
    how = Console(quiet=True), lambda: False, 1, lambda: None
    table._train(plan.runs, foreseen, load_data, *how)
    judged = 30 / 3  # a forward pass an image
    # ST trains the epoch that all begin with: half of the steps are left to SAM.
    assert works == pytest.approx([2 * 64 + judged, *[1.5 * 64 + judged] * 2])
