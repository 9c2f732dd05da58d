"""Configs: the paper's rows, overrides, and what is refused before any work."""

import json

import pytest

from samrobust import building, configuration

SHIPPED = ["configs/digits.py", "configs/cifar10.py", "configs/cifar100.py"]
PAPER_ROWS = [
    "st",
    *(f"sam,rho={rho}" for rho in (0.1, 0.2, 0.4)),
    *(f"at,norm=linf,eps={eps}" for eps in (1, 2, 4, 8)),
    *(f"at,norm=l2,eps={eps}" for eps in (16, 32, 64, 128)),
]


@pytest.mark.parametrize("name", SHIPPED)
def test_every_row_of_every_config_is_valid_and_locked(name):
    for row in configuration.load_rows(name):
        config = configuration.load_config(f"{name}:{row}")
        assert config.row == row
        assert config.is_locked


@pytest.mark.parametrize("name", SHIPPED[1:])
def test_the_paper_tables_have_the_papers_twelve_rows_in_order(name):
    assert configuration.load_rows(name) == PAPER_ROWS


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


def test_a_row_outside_the_papers_table_has_no_number_of_the_paper():
    assert not configuration.load_config("configs/cifar10.py:sam,rho=0.3").paper


@pytest.mark.parametrize(
    ("row", "label"),
    [
        ("st", "ST"),
        ("sam,rho=0.2", "SAM (rho = 0.2)"),
        ("at,norm=linf,eps=8", "AT (linf, eps = 8/255)"),
        (
            "at+sam,norm=l2,eps=64,rho=0.1",
            "AT (l2, eps = 64/255) + SAM (rho = 0.1)",
        ),
    ],
)
def test_a_rows_label_says_what_it_is(row, label):
    assert configuration.parse_row(row).label == label


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("sgd", "method in {st, sam, at, at\\+sam}, got method='sgd'"),
        ("sam", "the options rho for the method sam, got row='sam'"),
        ("sam,rho=", "a number for rho"),
        ("sam,rho=0.1,rho=0.2", "the options rho for the method sam"),
        ("st,rho=0.1", "the options \\(none\\) for the method st"),
        ("at,norm=l1,eps=8", "norm in {linf, l2}, got norm='l1'"),
        ("at,norm=linf", "the options norm, eps for the method at"),
    ],
)
def test_a_wrong_row_is_refused_with_the_reason(row, message):
    with pytest.raises(ValueError, match=message):
        configuration.parse_row(row)


def load(*overrides, row="st"):
    return configuration.load_config(
        f"configs/digits.py:{row}", [f"--config.{item}" for item in overrides]
    )


def test_overrides_reach_the_fields():
    config = load("training.epochs=7", "training.milestones=(0.5,0.8)", "seed=3")
    assert config.training.epochs == 7
    assert tuple(config.training.milestones) == (0.5, 0.8)
    assert config.seed == 3


def test_the_step_size_follows_the_rows_radius():
    assert load(row="at,norm=linf,eps=16").attack.step_size == 4.0
    assert load(row="at,norm=l2,eps=128").attack.step_size == 16.0
    assert (
        load("attack.step_size=1.5", row="at,norm=linf,eps=8").attack.step_size == 1.5
    )


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["training.epoch=3"], "epoch.*Did you mean.*epochs"),
        (["training.epochs=2.5"], "training.epochs"),
        (["training.epochs=0"], "1 <= training.epochs, got training.epochs=0"),
        (["training.learning_rate=-1.0"], "0 < training.learning_rate"),
        (["training.momentum=1.0"], "0 <= momentum < 1, got training.momentum=1.0"),
        (["training.schedule=linear"], "training.schedule in {step, cosine}"),
        (["training.milestones=(0.9,0.5)"], "increasing fractions"),
        (["model.dtype=float16"], "model.dtype in {float32, bfloat16}"),
        (["model.blocks=()"], "at least one block"),
        (["data.name=mnist"], "data.name in {cifar10, cifar100, digits}"),
        (["data.validation_size=-1"], "0 <= data.validation_size"),
        (["attack.num_steps=0"], "1 <= attack.num_steps"),
        (["attack.batch_norm=both"], "attack.batch_norm in {train, eval}"),
        (["attack.restarts=2", "attack.random_start=False"], "random_start when"),
        (["sam.batch_stats=none"], "sam.batch_stats in {first, second, both}"),
        (["sam.rho_end=0.1"], "sam.rho > 0 when sam.rho_end is set"),
        (["sam.m=-1"], "0 <= sam.m, got sam.m=-1"),
        (["sam.m=16"], "sam.rho > 0 when sam.m is set, .*sam.m=16. Use a SAM row"),
        (["model.batch_norm_group=-1"], "0 <= model.batch_norm_group"),
        (
            ["model.batch_norm_group=48"],
            "model.batch_norm_group to divide training.batch_size, got "
            "model.batch_norm_group=48, training.batch_size=64. 0 means the global",
        ),
        (["evaluation.linf=(2.0,2.0)"], "different radii > 0 in evaluation.linf"),
        (["evaluation.linf=(300.0,)"], "evaluation.linf <= 255"),
        (["evaluation.checkpoint=best"], "data.validation_size > 0"),
        (["evaluation.split=validation"], "data.validation_size > 0"),
        (["checkpoint.keep=0"], "1 <= checkpoint.keep"),
        (["seed=-1"], "0 <= seed"),
        (["training.weight_decay=nan"], "0 <= training.weight_decay"),
        (["sam.rho=0.2"], "sam.rho=0.0 as the row 'st' says"),
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
    with pytest.raises(ValueError, match=r"0 <= sam\.rho, got sam\.rho=-0\.1"):
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
        "from samrobust.configuration import base_config, finish\n"
        'ROWS = ["st"]\n'
        "def get_config(row='st'):\n"
        "    config = base_config()\n"
        "    config.training.epochs = 3\n"
        "    return finish(config, row)\n"
    )
    assert configuration.load_rows(str(own)) == ["st"]
    assert configuration.load_config(f"{own}:sam,rho=0.1").training.epochs == 3


def test_a_config_file_without_rows_is_refused_by_name(tmp_path):
    own = tmp_path / "mine.py"
    own.write_text("def get_config(row='st'): ...\n")
    with pytest.raises(ValueError, match=r"a list ROWS in .*mine.py"):
        configuration.load_rows(str(own))


def test_differences_names_changed_missing_and_new_fields():
    one = {"a": {"b": 1, "c": (1, 2)}, "d": None}
    other = {"a": {"b": 2, "c": [1, 2]}, "e": 0}
    assert configuration.differences(one, other) == {"a.b": (1, 2), "e": (None, 0)}


def test_a_config_survives_json():
    config = load(row="at,norm=linf,eps=16")
    stored = json.loads(config.to_json_best_effort())
    assert configuration.differences(stored, json.loads(json.dumps(stored))) == {}
