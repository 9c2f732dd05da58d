"""What `bench --compare=pytorch` can compare, and what PyTorch's side is told."""

import importlib.util
import json
import re

import helpers
import numpy as np
import pytest
from ml_collections import ConfigDict

from samrobust.experiments import building, configuration
from samrobust.studies.bench import comparison, parity as parity_file
from samrobust.studies.bench.plan import Options, Task, config_of, plan
from samrobust.studies.bench.suite import Launcher
from samrobust.system.fields import flatten

CIFAR = f"{helpers.ROOT}/configs/cifar10.py"
DIGITS = f"{helpers.ROOT}/configs/digits.py"
ROWS = ("st", "sam,rho=0.2", "at,norm=linf,eps=8")


@pytest.fixture(autouse=True)
def _with_pytorch(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: True)


def planned(config=CIFAR, **options):
    options = {"measure": ("step",), **options}
    return plan(Options(config, compare="pytorch", **options))


def refused(field, value, row, **others):
    overrides = tuple(
        f"--config.{name}={x}" for name, x in ({field: value} | others).items()
    )
    with pytest.raises(ValueError, match=rf"^Expected {re.escape(field)}=") as caught:
        planned(row=(row,), overrides=overrides)
    message = str(caught.value)
    assert f"{field}={value!r}" in message.partition(", got ")[2]
    assert "\n" not in message


@pytest.mark.parametrize(
    ("row", "field", "value"),
    [
        (ROWS[2], "attack.batch_norm", "eval"),
        (ROWS[2], "attack.random_start", False),
        (ROWS[2], "attack.restarts", 2),
        (ROWS[2], "attack.loss", "margin"),
        (ROWS[2], "attack.judge", "any"),
        (ROWS[2], "attack.gradient_floor", 1e-5),
        (ROWS[1], "sam.batch_stats", "first"),
        (ROWS[1], "sam.rho_end", 0.4),
        (ROWS[0], "training.optimizer", "adam"),
        (ROWS[0], "training.schedule", "cosine"),
        (ROWS[0], "training.deterministic", True),
        (ROWS[0], "model.name", "vit"),
        (ROWS[0], "data.augmentation", "optax:sgd"),
    ],
)
def test_a_step_that_pytorch_does_not_take_is_refused_by_its_field(row, field, value):
    refused(field, value, row)


def test_groups_of_a_batch_are_refused():
    refused("model.batch_norm_group", 32, "st", **{"training.drop_remainder": True})
    late = f"{ROWS[1]},start=0.5"
    with pytest.raises(ValueError, match=r"^Expected sam\.start=0\.0"):
        planned(row=(late,))


@pytest.mark.parametrize(
    ("row", "field"),
    [
        *((row, name) for row in ROWS for name in ("model.dropout", "training.clip")),
        *((ROWS[1], "sam.floor"), (ROWS[2], "attack.momentum"), (ROWS[0], "news.on")),
        (ROWS[0], "data.noise"),
    ],
)
def test_a_field_that_nobody_has_thought_of_is_refused(row, field):
    config = configuration.load_config(f"{CIFAR}:{row}").unlock()
    comparison.check_config(config)
    section, name = field.split(".")
    config[section] = ConfigDict({**config.get(section, {}), name: 0.5})
    with pytest.raises(ValueError, match=f"^Expected {re.escape(field)}=None, got"):
        comparison.check_config(config)


def test_fields_of_other_rows_are_of_no_concern():
    assert planned(row=("st",), overrides=("--config.attack.batch_norm=eval",))
    assert planned(overrides=("--config.evaluation.loss=margin",))


@pytest.mark.parametrize("config", [CIFAR, DIGITS])
def test_the_shipped_rows_of_three_methods_are_compared(config):
    tasks = planned(config, variants=("reference",))
    assert [task.kind for task in tasks] == ["step"] * 3 + ["pytorch"] * 3


def test_rows_of_the_three_methods_are_compared_by_their_own_names():
    rows = ("sam,rho=0.2", "at,norm=l2,eps=16,attack.num_steps=5", "st")
    tasks = planned(row=rows, variants=("tuned",))
    assert [task.method for task in tasks if task.kind == "pytorch"] == list(rows)


@pytest.mark.parametrize(
    ("options", "flag"),
    [
        ({"row": ("trades,norm=linf,eps=8,beta=6",)}, "--row=('trades"),
        ({"row": ("st", "label_smoothing,alpha=0.1")}, "--row=('st', 'label"),
        ({"row": ("at,norm=linf,eps=8+sam,rho=0.1",)}, "--row=('at"),
    ],
)
def test_a_row_of_another_method_is_refused_with_the_flag(options, flag):
    with pytest.raises(ValueError, match=r"^Expected rows of st") as caught:
        planned(**options)
    assert f"got {flag}" in str(caught.value)


@pytest.mark.parametrize(
    ("precisions", "variant"),
    [
        (("bfloat16",), "reference"),
        (("float32",), "pure"),
        (("bfloat16", "float32"), "resident"),
    ],
)
def test_a_precision_that_leaves_no_variant_is_refused(precisions, variant):
    message = rf"got --variants=\('{variant}',\), --precisions='{precisions[0]}'"
    with pytest.raises(ValueError, match=message):
        planned(precisions=precisions, variants=(variant,))


# What PyTorch's side is told.


def told(monkeypatch, tmp_path, row, *overrides):
    """The spec that the twin of a row is started with, and the parity file's task."""
    specs = []

    def run(_, __, spec, *___):
        specs.append(spec)
        return {}

    monkeypatch.setattr(Launcher, "_run", run)
    options = Options(CIFAR, tuple(f"--config.{x}" for x in overrides))
    launch = Launcher(options, tmp_path, lambda: False)
    launch(Task("pytorch", row, row, 32, "float32", variant="tuned"))
    ours = Task(**specs[0]["task"])
    assert ours.kind == "parity"
    assert specs[-1]["parity"] == specs[0]["path"]
    return specs[-1], config_of(ours, options)


CHANGES = {
    "model.width": 8,
    "model.blocks": (1, 1),
    "training.learning_rate": 0.05,
    "training.momentum": 0.8,
    "training.weight_decay": 0.001,
    "attack.norm": "l2",
    "attack.epsilon": 16.0,
    "attack.step_size": 3.0,
    "attack.num_steps": 3,
    "sam.rho": 0.5,
}


def test_each_carried_field_arrives():
    carried = {
        f: name for fields in comparison.CARRIED.values() for name, f in fields.items()
    }
    assert carried.keys() == CHANGES.keys()
    config = configuration.load_config(f"{CIFAR}:{ROWS[2]}")
    for field, value in CHANGES.items():
        other = configuration.load_config(f"{CIFAR}:{ROWS[2]}")
        other.update_from_flattened_dict({field: value})
        before, after = (
            dict(flatten(comparison.spec_fields(each))) for each in (config, other)
        )
        changed = {name for name in before if before[name] != after[name]}
        found = {name.rpartition(".")[2] for name in changed}
        assert carried[field] in found
        pixels = value / 255 if field in comparison._PIXELS else value
        (name,) = (n for n in changed if n.rpartition(".")[2] == carried[field])
        assert after[name] == pixels


def test_a_rows_own_network_and_optimizer_are_those_of_the_parity_file(
    monkeypatch, tmp_path
):
    own = "model.width=8,sam.batch_stats=both,training.learning_rate=0.05"
    spec, parity = told(monkeypatch, tmp_path, f"sam,rho=0.2,{own}")
    assert spec["network"]["width"] == parity.model.width == 8
    assert spec["sgd"]["lr"] == parity.training.learning_rate == 0.05
    assert (spec["method"], spec["rho"], parity.row.partition(",")[0]) == (
        *("sam", 0.2),
        "st",
    )


def test_rows_with_the_same_network_share_a_parity_file(monkeypatch, tmp_path):
    files = {
        row: told(monkeypatch, tmp_path, row)[0]["parity"]
        for row in (*ROWS, "st,model.width=8", "sam,rho=0.2,model.width=8")
    }
    assert files["st"] == files[ROWS[1]] == files[ROWS[2]]
    assert files["st"] != files["st,model.width=8"]
    assert files["st,model.width=8"] == files["sam,rho=0.2,model.width=8"]


def test_a_normalization_of_ones_own_comes_with_the_weights(tmp_path):
    """So a config with `model.mean` and `model.std` is compared like any other."""
    own = {"model.mean": (0.25,), "model.std": (0.75,)}
    config = helpers.make_config("st", own)
    path = tmp_path / "parity.npz"
    parity_file.parity(config, str(path))
    with np.load(path) as file:
        found = [file[f"network/{name}"].ravel().tolist() for name in ("mean", "std")]
    assert found == [[0.25], [0.75]]
    assert building.load_facts(config).mean != (0.25,)
    comparison.check_config(config)


def test_all_that_is_told_is_json(monkeypatch, tmp_path):
    spec, _ = told(monkeypatch, tmp_path, ROWS[2])
    assert json.loads(json.dumps(spec))["epsilon"] == 8 / 255
