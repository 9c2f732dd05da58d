"""Configs: the paper's rows, overrides, and what is refused before any work."""

import json
import re
import sys
from collections import Counter
from typing import Any

import pytest
from ml_collections import ConfigDict

from samrobust.experiments import building, config_files, configuration, methods
from samrobust.experiments.identity import changed_fields
from samrobust.experiments.reporting.results import unlike
from samrobust.experiments.rows import parse_row
from samrobust.system.fields import differences

SHIPPED = [
    *("configs/cifar10.py", "configs/cifar100.py", "configs/digits.py"),
    *("configs/small_radius.py", "configs/duality.py", "configs/cifar10_small.py"),
]
SHARPNESS = "configs/sharpness.py"
PAPER_ROWS = [
    "st",
    *(f"sam,rho={rho}" for rho in (0.1, 0.2, 0.4)),
    *(f"at,norm=linf,eps={eps}" for eps in (1, 2, 4, 8)),
    *(f"at,norm=l2,eps={eps}" for eps in (16, 32, 64, 128)),
]


@pytest.mark.parametrize(
    ("name", "rows"),
    [
        *((name, "ROWS") for name in (*SHIPPED, SHARPNESS, "configs/adversarial.py")),
        (SHARPNESS, "GRID"),
        ("configs/cifar10_small.py", "GRID"),
        ("configs/cifar10_small.py", "SMALL_RADIUS"),
        ("configs/cifar10_small.py", "ADVERSARIAL"),
    ],
)
def test_every_row_of_every_config_is_valid_and_locked(name, rows):
    for row in config_files.load_rows(name, rows):
        config = configuration.load_config(f"{name}:{row}")
        assert config.row == row
        assert config.is_locked


def test_overrides_are_read_without_writing_the_config_out(monkeypatch):
    monkeypatch.setattr("yaml.dump", lambda *_, **__: pytest.fail("written out"))
    config = configuration.load_config("digits.py", ["--config.seed=3"])
    assert (config.seed, type(config)) == (3, ConfigDict)


@pytest.mark.parametrize("name", SHIPPED[:2])
def test_the_paper_tables_have_the_papers_twelve_rows_in_order(name):
    assert config_files.load_rows(name) == PAPER_ROWS


def test_the_paper_configs_carry_the_papers_hyper_parameters():
    training = configuration.load_config("configs/cifar10.py:st").training
    assert (training.epochs, training.batch_size) == (100, 128)
    assert (training.learning_rate, training.momentum) == (0.1, 0.9)
    assert training.weight_decay == 5e-4
    assert tuple(training.milestones) == (0.75, 0.9)


@pytest.mark.parametrize(
    ("name", "row", "natural", "l2_32"),
    [
        ("configs/cifar10.py", "st", 94.6, 51.7),
        ("configs/cifar10.py", "sam,rho=0.4", 94.7, 64.4),
        ("configs/cifar10.py", "at,norm=l2,eps=128", 90.2, 87.1),
        ("configs/cifar100.py", "st", 76.9, 21.2),
        ("configs/cifar100.py", "at,norm=linf,eps=8", 60.4, 54.3),
    ],
)
def test_the_papers_numbers_stand_in_its_configs(name, row, natural, l2_32):
    config = configuration.load_config(f"{name}:{row}")
    assert config.paper["natural"] == natural
    assert config.paper["l2 32/255"] == l2_32
    assert set(config.paper) == set(building.evaluation_attacks(config))


def test_rows_at_small_radii_that_the_papers_table_has_are_the_same_runs():
    rows = config_files.load_rows("configs/small_radius.py")
    shared = [row for row in rows if row in PAPER_ROWS]
    assert len(shared) == 5
    for row in shared:
        one, other = (
            configuration.as_dict(configuration.load_config(f"configs/{name}.py:{row}"))
            for name in ("small_radius", "cifar10")
        )
        assert changed_fields(one, other) == {}


def test_rows_at_small_radii_come_baseline_first_and_long_attacks_last():
    rows = config_files.load_rows("configs/small_radius.py")
    configs = [configuration.load_config(f"configs/small_radius.py:{r}") for r in rows]
    costs = [methods.cost(config) for config in configs]
    assert costs[0] == 1
    cheap = [cost for cost in costs if cost <= 2]
    assert costs[: len(cheap)] == cheap
    assert costs[len(cheap) :] == pytest.approx([23 / 3] * 3 + [9])
    for config in configs:
        building.make_plan(config, 50_000)
        assert not unlike(config.to_dict(), configs[0].to_dict())


@pytest.mark.parametrize(
    ("override", "kept"),
    [
        ("training.epochs=2", False),
        ("model.width=16", False),
        ("evaluation.num_steps=20", False),
        ("evaluation.linf_step=0.1", False),
        ("seed=3", True),
        ("model.dtype=bfloat16", True),
        ("checkpoint.minutes=1", True),
        ("evaluation.linf=(1,)", True),
    ],
)
def test_another_experiment_has_no_number_of_the_paper(override, kept):
    path = "configs/cifar10.py:sam,rho=0.2"
    config = configuration.load_config(path, [f"--config.{override}"])
    assert bool(config.paper) == kept
    assert config.is_locked


def test_a_row_outside_the_papers_table_has_no_number_of_the_paper():
    assert not configuration.load_config("configs/cifar10.py:sam,rho=0.3").paper


@pytest.mark.parametrize(
    ("row", "label"),
    [
        ("st", "ST"),
        ("sam,rho=0.2", "SAM (rho = 0.2)"),
        ("at,norm=linf,eps=8", "AT (linf, eps = 8/255)"),
        (
            "at,norm=l2,eps=64+sam,rho=0.1",
            "AT (l2, eps = 64/255) + SAM (rho = 0.1)",
        ),
        ("st,training.epochs=40", "ST with epochs 40"),
        (
            "sam,rho=0.2,sam.m=16,training.weight_decay=0.002",
            "SAM (rho = 0.2) with m 16, weight decay 0.002",
        ),
        (
            "at,norm=linf,eps=8+sam,rho=0.1,sam.start=0.5",
            "AT (linf, eps = 8/255) + SAM (rho = 0.1) with sam start 0.5",
        ),
    ],
)
def test_a_rows_label_says_what_it_is(row, label):
    assert parse_row(row).label == label


@pytest.mark.parametrize(
    ("row", "message"),
    [
        *(
            (f"sam,rho={text}", "the row 'sam,rho=0.2'")
            for text in ("0.20", "+0.2", "2e-1", " 0.2", "0.2 ", "0.2\n", ".2", "00.2")
        ),
        ("sam, rho=0.2", "the row 'sam,rho=0.2'"),
        ("at,norm=l2,eps=8 + sam,rho=1", r"the row 'at,norm=l2,eps=8\+sam,rho=1'"),
        ("sam,rho=\uff10.2", "the row 'sam,rho=0.2'"),
        ("at,norm=linf,eps=1_0", "the row 'at,norm=linf,eps=10'"),
        ("at,norm=linf,eps=8.0", "the row 'at,norm=linf,eps=8'"),
        ("at,eps=8,norm=linf", "the row 'at,norm=linf,eps=8'"),
        ("sam,rho=0.1234567", "six digits for rho, got row='sam,rho=0.1234567'"),
        ("ema,decay=0.9999999", "six digits for decay"),
        ("sam,rho=0", "0 < rho, .* With rho=0 it is another row: st\\."),
        ("sam,rho=-0.0", "another row: st\\."),
        ("at,norm=l2,eps=0", "0 < eps, .* another row: st\\."),
        ("at,norm=l2,eps=0+sam,rho=0.1", "another row: sam,rho=0.1\\."),
        ("at,norm=l2,eps=8+sam,rho=0", "another row: at,norm=l2,eps=8\\."),
        ("sam,rho=1e-9", "1e-05 <= rho"),
        ("sam,rho=1e30", "rho <= 1000"),
        ("sam,rho=nan", "0 <= rho"),
        ("at,norm=linf,eps=nan", "0 <= eps"),
        ("at,norm=linf,eps=256", "eps <= 255, .* 8 means 8/255"),
        ("at,norm=l2,eps=1e30", "eps <= 1,000,000"),
        ("at,norm=linf,eps=0.0314", "did you mean 8\\?"),
        ("sgd", "parts in {st, at, .*} or package.*, got row='sgd'"),
        ("sam", "the options rho for sam, got row='sam'"),
        ("sam,rho=", "a number for rho"),
        ("sam,rho=0.1,rho=0.2", "the options rho for sam"),
        ("st,rho=0.1", "st alone, without options or parts, got row='st,rho=0.1'"),
        ("st+sam,rho=0.1", "st alone, without options or parts"),
        ("at,norm=l2,eps=8/255", "a number for eps, .* 8 means 8/255"),
        ("at,norm=l1,eps=8", "norm in {linf, l2}, got norm='l1'"),
        ("at,norm=linf", "the options norm, eps for at"),
        ("st,training.weight_decay=2e-3", "the row 'st,training.weight_decay=0.002'"),
        (
            "st,training.epochs=40,data.flip=True",
            "the row 'st,data.flip=True,training.epochs=40'",
        ),
        (
            "sam,rho=0.1,sam.m=16+ema,decay=0.9",
            r"the row 'sam,rho=0.1\+ema,decay=0.9,sam.m=16'",
        ),
        ("ema,decay=0.9+sam,rho=0.2", r"the row 'sam,rho=0.2\+ema,decay=0.9'"),
        ("sam,rho=0.1+sam,rho=0.2", "each part once"),
        ("st,training.epochs=4,training.epochs=5", "training.epochs once"),
        ("st,training.milestones=(1)", "letters, digits, .* for training.milestones"),
        ("st,evaluation.restarts=2", "no field of evaluation, .* in the config file"),
    ],
)
def test_a_wrong_row_is_refused_with_the_reason(row, message):
    with pytest.raises(ValueError, match=message):
        parse_row(row)


def test_a_row_sets_fields_of_its_training():
    row = "sam,rho=0.2,model.width=8,sam.m=16,training.schedule=cosine"
    config = load("model.batch_norm_group=16", row=row)
    assert (config.model.width, config.sam.m) == (8, 16)
    assert config.training.schedule == "cosine"
    network = load(row="st,model.name=vit").model
    assert network.name == "vit"
    assert "blocks" not in network


@pytest.mark.parametrize(
    ("row", "override", "message"),
    [
        ("st,training.epoch=4", None, 'Did you mean "epochs"'),
        ("st,training.epochs=a", None, "training.epochs=a: invalid literal"),
        ("st,sam.rho=0.1", None, "a row with sam when sam.rho is set"),
        ("st,attack.loss=margin", None, "a row with at when .* attack.loss='margin'"),
        (
            "trades,norm=linf,eps=16,beta=6,attack.num_steps=20",
            None,
            "a row with at when attack.num_steps is set, got attack.num_steps=20, row=",
        ),
        (
            "st,sam.batch_stats=first",
            "sam.batch_stats=first",
            "a row with sam when sam.batch_stats is set",
        ),
        ("st,training.epochs=4", "training.epochs=5", "training.epochs=4 as the row"),
        ("sam,rho=0.2,sam.rho=0.3", None, "sam.rho=0.2 as the row"),
    ],
)
def test_a_field_of_a_row_that_cannot_be_set_is_refused(row, override, message):
    with pytest.raises(ValueError, match=message):
        load(*filter(None, [override]), row=row)


def test_a_grid_has_as_many_settings_of_each_method():
    rows = config_files.load_rows(SHARPNESS, "GRID")
    assert {configuration.load_config(f"{SHARPNESS}:{row}").row for row in rows} == {
        *rows
    }
    kinds = Counter(
        re.sub(r"(rho|gamma|start|decay|alpha)=[\d.]+", "", row, count=1)
        for row in rows
    )
    assert set(kinds.values()) == {4}


def load(*overrides, row="st"):
    return configuration.load_config(
        f"configs/digits.py:{row}", [f"--config.{item}" for item in overrides]
    )


NOT_OF_A_METHOD = {
    "at,norm=linf,eps=8": (
        ["attack.restarts=2", "attack.random_start=False"],
        "random",
    ),
    "asam,rho=0.5": (["asam.eta=-1.0"], "0 <= asam.eta, got asam.eta=-1.0"),
    "asam,rho=0.6": (["sam.m=16"], "a row with sam when sam.m is set"),
    "ema,decay=0.5": (
        ["ema.decay=0.6"],
        "ema.decay=0.5 as the row 'ema,decay=0.5' says",
    ),
    "at,norm=linf,eps=9+trades,norm=linf,eps=8,beta=6": ([], "one adversary, got row="),
    "sam,rho=0.1+awp,gamma=0.1": ([], "one sharpness, got row="),
}


@pytest.mark.parametrize("row", NOT_OF_A_METHOD)
def test_what_a_method_cannot_mean_is_refused_by_its_fields_name(row):
    overrides, message = NOT_OF_A_METHOD[row]
    with pytest.raises(ValueError, match=message):
        load(*overrides, row=row)


def test_another_network_brings_its_own_fields():
    config = load("model.name=vit", "model.depth=2")
    assert (config.model.depth, config.model.patch) == (2, 4)
    assert "blocks" not in config.model
    with pytest.raises(ValueError, match=r"model\.blocks|blocks"):
        load("model.name=vit", "model.blocks=(1,)")
    stored = json.loads(config.to_json_best_effort())
    again = configuration.with_defaults(stored)
    assert json.loads(again.to_json_best_effort()) == stored


def test_a_row_of_an_older_version_is_read_as_what_it_is_called_now():
    stored = json.loads(load(row="at,norm=l2,eps=64+sam,rho=0.1").to_json_best_effort())
    older = {**stored, "row": "at+sam,norm=l2,eps=64,rho=0.1"}
    for field in ("name", "width"):
        older["model"] = {k: v for k, v in stored["model"].items() if k != field}
    del older["trades"], older["awp"]
    config = configuration.with_defaults(older)
    config.model.width = 16
    assert json.loads(config.to_json_best_effort()) == stored


def test_overrides_reach_the_fields():
    config = load("training.epochs=7", "training.milestones=(0.5,0.8)", "seed=3")
    assert config.training.epochs == 7
    assert tuple(config.training.milestones) == (0.5, 0.8)
    assert config.seed == 3


def test_a_name_may_have_any_letters():
    assert load("data.name=données/café 猫.npz").data.name == "données/café 猫.npz"


def test_of_several_values_of_a_field_the_last_one_counts():
    config = load(
        *("evaluation.linf=(16,)", "training.epochs=7"),
        *("evaluation.linf=(8,)", "training.epochs=2"),
    )
    assert tuple(config.evaluation.linf) == (8,)
    assert config.training.epochs == 2


def test_the_step_size_follows_the_rows_radius():
    assert load(row="at,norm=linf,eps=16").attack.step_size == 4.0
    assert load(row="at,norm=l2,eps=128").attack.step_size == 16.0
    assert (
        load("attack.step_size=1.5", row="at,norm=linf,eps=8").attack.step_size == 1.5
    )


@pytest.mark.parametrize(
    ("row", "relative", "step_size"),
    [
        ("at,norm=linf,eps=16", "linf=0.5", 8.0),
        ("at,norm=l2,eps=128", "l2=0.5", 64.0),
        ("at,norm=l2,eps=128", "linf=0.5", 16.0),
        ("st", "linf=0.5", 0.0),
    ],
)
def test_the_step_size_follows_its_fraction_of_the_radius(row, relative, step_size):
    config = load(f"attack.relative_step_size.{relative}", row=row)
    assert config.attack.step_size == step_size
    assert json.loads(config.to_json_best_effort())["attack"]["step_size"] == step_size


@pytest.mark.parametrize("order", [1, -1])
def test_a_step_size_and_its_fraction_together_are_refused(order):
    both = ["attack.step_size=2.0", "attack.relative_step_size.linf=0.5"]
    with pytest.raises(ValueError, match="not both"):
        load(*both[::order], row="at,norm=linf,eps=16")


@pytest.mark.parametrize(
    ("milestones", "epochs"),
    [
        ((0.75, 0.9), 1), ((0.75, 0.9), 2), ((0.75, 0.9), 10), ((0.75, 0.9), 30),
        ((0.75, 0.9), 100), ((0.5,), 7), ((0.55, 0.9), 20), ((0.01, 0.02), 50), ((), 3),
    ],
)  # fmt: skip
def test_the_rate_drops_in_the_same_epochs_as_in_the_reference_code(milestones, epochs):
    config = load(f"training.epochs={epochs}", f"training.milestones={milestones}")
    schedule: Any = building.learning_rate_schedule(config, steps_per_epoch=3)
    for epoch in range(epochs):
        passed = sum(not epoch < epochs * milestone for milestone in milestones)
        for step in (3 * epoch, 3 * epoch + 2):
            assert float(schedule(step)) == pytest.approx(0.1 * 0.1**passed)


def test_a_milestone_is_not_an_epoch_late_for_a_rounding_error():
    assert 0.55 * 100 > 55
    config = load("training.epochs=100", "training.milestones=(0.55,)")
    schedule: Any = building.learning_rate_schedule(config, steps_per_epoch=1)
    assert float(schedule(54)) == pytest.approx(0.1)
    assert float(schedule(55)) == pytest.approx(0.01)


def test_more_steps_than_are_counted_are_refused():
    config = load("training.epochs=2000000")
    with pytest.raises(ValueError, match=r"training\.epochs <= 1073741, got"):
        building.learning_rate_schedule(config, steps_per_epoch=2000)


@pytest.mark.parametrize(
    ("field", "radius", "meant"),
    [
        ("linf", 8 / 255, "did you mean 8"),
        ("linf", 0.03137, "did you mean 8"),
        ("linf", 0.03, "did you mean 7.6"),
        ("linf", 0.015686, "did you mean 4"),
        ("linf", 0.12549, "did you mean 32"),
        ("linf", 1e-9, "did you mean 8"),
        ("l2", 0.5, "did you mean 127.5"),
        ("l2", 0.062745, "did you mean 16"),
        ("l2", 0.502, "did you mean 128"),
    ],
)
def test_a_radius_in_pixel_units_is_recognised(field, radius, meant):
    with pytest.raises(ValueError, match=meant):
        load(f"evaluation.{field}=({radius},)")


@pytest.mark.parametrize("radius", [0.1, 0.125, 0.2, 0.25, 0.3, 0.5, 0.75, 1, 3.5, 255])
def test_a_small_radius_is_accepted(radius):
    assert load(f"evaluation.linf=({radius},)").evaluation.linf == (radius,)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["training.epoch=3"], ': \'epoch\' Did you mean "epochs" instead of "epoch"'),
        (["training.epochs=2.5"], "training.epochs"),
        (["training.epochs=0"], "1 <= training.epochs, got training.epochs=0"),
        (["training.learning_rate=-1.0"], "1e-30 <= training.learning_rate"),
        (["training.momentum=1.0"], "training.momentum < 1, got training.momentum=1.0"),
        (["training.schedule=linear"], "training.schedule in {step, cosine, cyclic}"),
        (["training.milestones=(0.9,0.5)"], "increasing fractions"),
        (["model.dtype=float16"], "model.dtype in {float32, bfloat16}"),
        (["model.blocks=()"], "got model.blocks=\\(\\)"),
        (["data.validation_size=-1"], "0 <= data.validation_size"),
        (["attack.num_steps=0"], "1 <= attack.num_steps"),
        (["attack.batch_norm=both"], "attack.batch_norm in {train, eval}"),
        (["sam.batch_stats=none"], "sam.batch_stats in {first, second, both}"),
        (["sam.rho_end=0.1"], "a row with sam when sam.rho_end is set"),
        (["sam.m=-1"], "0 <= sam.m, got sam.m=-1"),
        (["sam.m=16"], "a row with sam when sam.m is set, got sam.m=16, row='st'"),
        (["model.batch_norm_group=-1"], "0 <= model.batch_norm_group"),
        (
            ["model.batch_norm_group=48"],
            "model.batch_norm_group to divide training.batch_size, got "
            "model.batch_norm_group=48, training.batch_size=64. 0 means the global",
        ),
        (["evaluation.linf=(2.0,2.0)"], "different radii in evaluation.linf"),
        (["evaluation.linf=(300.0,)"], "evaluation.linf <= 255"),
        (["evaluation.checkpoint=best"], "data.validation_size > 0"),
        (["evaluation.split=validation"], "data.validation_size > 0"),
        (["checkpoint.keep=0"], "1 <= checkpoint.keep"),
        (["seed=-1"], "0 <= seed"),
        (["seed=4294967296"], "seed <= 4294967295, got seed=4294967296"),
        (["data.split_seed=4294967296"], "data.split_seed <= 4294967295"),
        (["training.milestones=(0.5,0.5)"], "increasing fractions"),
        (["evaluation.linf=(1.0,1.0000001)"], "six digits for evaluation.linf"),
        (["evaluation.l2=(1e30,)"], "evaluation.l2 <= 1,000,000"),
        (["evaluation.gradient_floor=1e20"], "evaluation.gradient_floor <= 0.001"),
        (["attack.gradient_floor=1e20"], "attack.gradient_floor <= 0.001"),
        (["evaluation.linf_step=1e20"], "evaluation.linf_step <= 10"),
        (["evaluation.l2_step=1e-20"], "0.0001 <= evaluation.l2_step"),
        (["evaluation.version=rand"], "attack=autoattack with evaluation.version"),
        (
            ["training.schedule=cosine", "training.milestones=(0.5,)"],
            "training.schedule=step when training.milestones is set, got "
            "training.milestones=\\(0.5,\\), training.schedule='cosine'",
        ),
        (
            ["training.schedule=cyclic", "training.decay_factor=0.2"],
            "training.schedule=step when training.decay_factor is set",
        ),
        (
            ["evaluation.attack=autoattack", "evaluation.num_steps=50"],
            "evaluation.attack=pgd when evaluation.num_steps is set",
        ),
        (
            ["evaluation.attack=autoattack", "evaluation.linf_step=0.1"],
            "evaluation.attack=pgd when evaluation.linf_step is set",
        ),
        (
            ["data.name=caf\udce9.npz"],  # Latin-1, as Python reads it from a shell
            r"printable text for data\.name, got data\.name='caf\\udce9\.npz'",
        ),
        (["tracking.wandb=a\tb"], "printable text for tracking.wandb"),
        (["label=SAM"], "label=ST as the row 'st' says, got label='SAM'"),
        (["row=sam,rho=0.1"], "a config of the row 'st', got row='sam,rho=0.1'"),
        (["training.learning_rate='0.1"], '"\'0.1"$'),
        (
            ["training.epochs=2", "model.widht=3", "seed=1"],
            r"^Expected valid fields and values, got --config\.model\.widht=3: .*width",
        ),
        (["training.weight_decay=nan"], "0 <= training.weight_decay"),
        (["sam.rho=0.2"], "a row with sam when sam.rho is set, got sam.rho=0.2"),
    ],
)
def test_a_wrong_value_is_refused_with_the_fields_name(overrides, message):
    with pytest.raises(ValueError, match=message):
        load(*overrides)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["sam.m=48"], "sam.m to divide training.batch_size, got sam.m=48"),
        (
            ["sam.m=16"],
            "model.batch_norm_group > 0 that divides sam.m, got "
            "model.batch_norm_group=0, sam.m=16. .*--config.model.batch_norm_group=16",
        ),
        (
            ["sam.m=16", "model.batch_norm_group=32"],
            "model.batch_norm_group > 0 that divides sam.m",
        ),
    ],
)
def test_groups_that_cannot_be_are_refused(overrides, message):
    with pytest.raises(ValueError, match=message):
        load(*overrides, row="sam,rho=0.2")


@pytest.mark.parametrize(
    ("row", "examples"),
    [("ssam,mask=fisher,rho=0.1", 1), ("esam,rho=0.1,esam.gamma=0.3", 19)],
)
def test_batch_norm_groups_that_a_choice_of_examples_does_not_fill_are_refused(
    row, examples
):
    overrides = ["model.batch_norm_group=16"]
    told = f"divides the {examples} of 64 examples that the method takes a pass over"
    with pytest.raises(ValueError, match=f"model.batch_norm_group that {told}"):
        load(*overrides, row=row)
    load("model.batch_norm_group=64", row=row)


@pytest.mark.parametrize("row", ["ssam,mask=dynamic,rho=0.1", "esam,rho=0.1"])
def test_batch_norm_groups_that_a_choice_of_examples_fills_are_accepted(row):
    load("model.batch_norm_group=16", row=row)


@pytest.mark.parametrize(
    "overrides",
    [
        ["sam.m=64"],
        ["sam.m=16", "model.batch_norm_group=16"],
        ["sam.m=16", "model.batch_norm_group=4"],
        ["sam.m=64", "model.batch_norm_group=32"],
        ["model.batch_norm_group=64"],
    ],
)
def test_groups_within_groups_are_accepted(overrides):
    load(*overrides, row="sam,rho=0.2")


def test_a_negative_rho_is_refused():
    with pytest.raises(ValueError, match=r"0 <= rho, got rho=-0\.1"):
        load(row="sam,rho=-0.1")


def test_a_radius_in_pixel_units_above_255_is_refused():
    with pytest.raises(ValueError, match="8 means 8/255"):
        load(row="at,norm=linf,eps=256")


def test_an_unknown_config_file_is_refused_and_the_known_ones_named():
    with pytest.raises(
        ValueError, match=r"got config='configs/svhn\.py'.*cifar100\.py"
    ):
        configuration.load_config("configs/svhn.py:st")


def test_shipped_configs_are_found_from_any_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert configuration.load_config("configs/digits.py:st").data.name == "digits"


def test_a_users_own_config_file_is_used_as_given(tmp_path):
    own = tmp_path / "mine.py"
    own.write_text(
        "from samrobust.experiments.configuration import base_config, finish\n"
        'ROWS = ["st"]\n'
        "def get_config(row='st'):\n"
        "    config = base_config()\n"
        "    config.training.epochs = 3\n"
        "    return finish(config, row)\n"
    )
    assert config_files.load_rows(str(own)) == ["st"]
    assert configuration.load_config(f"{own}:sam,rho=0.1").training.epochs == 3


@pytest.mark.parametrize(
    "override", ["training.epochs=3", "--training.epochs=3", "--config.data.flip", ""]
)
def test_an_override_without_its_prefix_or_value_is_refused(override):
    with pytest.raises(ValueError, match=r"--config\.FIELD=VALUE, got override="):
        configuration.load_config("configs/digits.py:st", [override])


def test_a_step_of_many_radii_is_refused():
    with pytest.raises(ValueError, match=r"0\.0001 to 10 radii, got attack\.step_size"):
        load("attack.step_size=1e20", row="at,norm=linf,eps=8")


@pytest.mark.parametrize("path", ["/etc/passwd", "configs/base", "", "configs/", "/"])
def test_what_is_no_config_file_is_refused(path):
    with pytest.raises(
        ValueError, match=r"an existing config file NAME\.py, got config="
    ):
        configuration.load_config(f"{path}:st")


OWN = """
from samrobust.experiments.configuration import base_config, finish
ROWS = ["st"]
def get_config(row="st"):
    config = base_config()
    {}
    return finish(config, row)
"""


def test_a_config_file_that_failed_is_no_module(tmp_path):
    own = tmp_path / "failing_of_ours.py"
    own.write_text("1 / 0\n")
    with pytest.raises(ValueError, match="ZeroDivisionError"):
        config_files.load_rows(str(own))
    assert not [name for name in sys.modules if "failing_of_ours" in name]


def test_a_config_file_may_define_dataclasses(tmp_path):
    own = tmp_path / "mine.py"
    lines = ["from __future__ import annotations", "import dataclasses"]
    lines += ["@dataclasses.dataclass", "class Sizes:", "    width: int = 4"]
    own.write_text("\n".join(lines) + '\nROWS = ["st"] * (Sizes().width == 4)\n')
    assert config_files.load_rows(str(own)) == ["st"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"a function get_config\(row\) in .*mine.py"),
        ("get_config = 3", r"a function get_config\(row\)"),
        ("def get_config(row): return {}", r"return finish\(config, row\), got"),
        ("def get_config(): ...", "TypeError: get_config"),
        ("def get_config(row):\n  return row.x", "line 2: AttributeError: 'str'"),
        ("import nothing_of_this_name", "line 1: ModuleNotFoundError"),
        ("def get_config(:", "SyntaxError"),
        ("1 / 0\n", "line 1: ZeroDivisionError"),
        (OWN.format("config.learning_rate = 0.5"), "Did you mean training.learning_r"),
        (OWN.format("config.training.epoch = 5"), "Did you mean training.epochs"),
        (OWN.format("del config.training.epochs"), "the field training.epochs"),
        (OWN.format("row = 'sam,rho=0.1'"), "a config of the row 'st', got row='sam"),
        (OWN.format("config = config.copy_and_resolve_references()"), None),
    ],
)
def test_a_config_file_that_cannot_be_used_is_refused_in_one_line(
    text, message, tmp_path
):
    own = tmp_path / "mine.py"
    own.write_text(text)
    if message is None:
        assert configuration.load_config(f"{own}:st").row == "st"
        return
    with pytest.raises(ValueError, match=message) as refused:
        configuration.load_config(f"{own}:st")
    assert "\n" not in str(refused.value)


def test_the_base_config_is_no_experiment():
    with pytest.raises(ValueError, match=r"configs/base\.py.*TypeError: get_config"):
        configuration.load_config("configs/base.py:st")
    with pytest.raises(ValueError, match=r"base\.py to return finish\("):
        configuration.load_config("configs/base.py")


@pytest.mark.parametrize(
    "rows", ["'st'", "['st', 'st']", "[]", "['st', 3]", "['sam,rho=0']", "{'st'}"]
)
def test_rows_that_make_no_table_are_refused(rows, tmp_path):
    own = tmp_path / "mine.py"
    own.write_text(f"ROWS = {rows}")
    with pytest.raises(
        ValueError, match=r"ROWS in .*mine.py|the name of a row|0 < rho"
    ):
        config_files.load_rows(str(own))


def test_a_config_file_without_rows_is_refused_by_name(tmp_path):
    own = tmp_path / "mine.py"
    own.write_text("def get_config(row='st'): ...\n")
    message = r"a list ROWS in .*mine.py, got lists=\[\]\. Define it there\."
    with pytest.raises(ValueError, match=message):
        config_files.load_rows(str(own))
    own.write_text("ROWS, FEW = ['st'], ('st',)\nNUMBER = 3\n")
    message = r"NO in .*mine.py, got lists=\['ROWS', 'FEW'\]\. Name one of these\."
    with pytest.raises(ValueError, match=message):
        config_files.load_rows(str(own), "NO")


def test_differences_names_changed_missing_and_new_fields():
    one = {"a": {"b": 1, "c": (1, 2)}, "d": None}
    other = {"a": {"b": 2, "c": [1, 2]}, "e": 0}
    assert differences(one, other) == {"a.b": (1, 2), "e": (None, 0)}


def test_a_config_survives_json():
    config = load(row="at,norm=linf,eps=16")
    stored = json.loads(config.to_json_best_effort())
    assert differences(stored, json.loads(json.dumps(stored))) == {}
