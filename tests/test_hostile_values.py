"""Values that nobody should give, in every field and every flag.

Whatever the value: no traceback, one line, the name of the field or flag, before any
work starts.
"""

import math
from typing import Any

import helpers
import numpy as np
import pytest
from ml_collections import ConfigDict

from samrobust import cli
from samrobust.experiments import configuration
from samrobust.experiments.validation import fields_of, validate

DIGITS = "configs/digits.py"
PARAGRAPH = "x" * 5_000

# What a config made in Python may hold: values of every kind, most of them wrong.
VALUES = [
    None, True, False, 0, -1, 1, 2.5, -0.5, math.nan, math.inf, -math.inf, 1e39, 2**31,
    2**32, 10**400, 10**5000, 1j, "", "x", "1", "nan", "st\n", PARAGRAPH, b"x",
    (), ("x",), (None,), (True,), (math.nan,), (-1.0,), (1e39,), ((1, 2),), (2**31,),
    [[]], tuple(range(5_000)), {}, {"a": 1}, {1}, object(), len, np.float32(1),
    np.arange(3), np.zeros((2, 2)), ConfigDict(), ConfigDict({"linf": "x"}),
]  # fmt: skip

# What the command line may hold; `ml_collections` reads it as the field's type.
TEXTS = [
    "", "x", " ", "nan", "inf", "-1", "1e39", "4294967296", "1_0.0.0", "True", "[]",
    "()", "(1,", "('x',)", "(None,)", "((1,),)", "(nan,)", "(1e39,)", "(-1,)", "{}",
    "None", "1" * 5_000, PARAGRAPH, "(" * 500, "a\nb", "\x1b[31m", "'", '"x', "x'",
]  # fmt: skip


def flatten(config, prefix=""):
    """The base config's fields and values; `paper` counts as one."""
    fields = {}
    for name, value in config.items():
        if isinstance(value, ConfigDict) and name != "paper":
            fields |= flatten(value, f"{prefix}{name}.")
        else:
            fields[f"{prefix}{name}"] = value
    return fields


BASE_CONFIG = configuration.finish(configuration.base_config(), "st")
BASE = flatten(BASE_CONFIG)
OPTIONAL = {
    **dict.fromkeys(("data.data_dir", "data.manual_dir"), "text"),
    **dict.fromkeys(("data.train_size", "data.test_size"), 1),
    **dict.fromkeys(("model.mean", "model.std"), (1.0,)),
    **{field: 1.0 for field in BASE if field.endswith("_end")},
}


def is_of_its_kind(field, value):
    """Whether a value has the field's type and is a number that float32 can hold."""
    if value is None:
        return field in OPTIONAL
    example = OPTIONAL.get(field, BASE[field])
    if isinstance(example, ConfigDict):
        return isinstance(value, dict | ConfigDict)
    if isinstance(example, tuple):
        return isinstance(value, tuple | list)
    if isinstance(example, float) and type(value) is int:
        return 0 <= value < 1e38
    return type(value) is type(example) and not (
        isinstance(value, int | float) and not 0 <= value < 1e38
    )


def assert_one_line(message, name):
    assert message.startswith("Expected ")
    assert name in message
    assert "\n" not in message
    assert message.isprintable()
    assert len(message) < 900


def test_every_field_of_the_base_config_has_its_rule():
    assert set(fields_of(BASE_CONFIG)) == set(BASE)


@pytest.mark.parametrize("field", BASE)
def test_a_hostile_value_in_python_is_refused_by_the_fields_name(field):
    valid = configuration.load_config(f"{DIGITS}:st").copy_and_resolve_references()
    config = ConfigDict(valid.to_dict(), type_safe=False)
    section: Any = config
    *path, name = field.split(".")
    for part in path:
        section = section[part]
    for value in VALUES:
        del section[name]  # or it would be cast to the type that is there
        section[name] = value
        try:
            validate(config)
        except ValueError as error:
            assert_one_line(str(error), field)
        else:
            assert is_of_its_kind(field, value), f"accepted: {value!r}"


@pytest.mark.parametrize("field", BASE)
def test_a_hostile_value_on_the_command_line_is_refused_by_the_fields_name(field):
    for text in TEXTS:
        try:
            config = configuration.load_config(
                f"{DIGITS}:st", [f"--config.{field}={text}"]
            )
        except ValueError as error:
            assert_one_line(str(error), field)
        else:
            value = flatten(config)[field]
            assert is_of_its_kind(field, value), f"accepted: {text!r} as {value!r}"


@pytest.mark.parametrize("section", ["data", "training", "attack.relative_step_size"])
@pytest.mark.parametrize("value", [None, 3, "x", {}, ()])
def test_a_section_that_is_none_is_refused_by_name(section, value):
    config = configuration.load_config(f"{DIGITS}:st").copy_and_resolve_references()
    fields = config.to_dict()
    *path, name = section.split(".")
    (fields[path[0]] if path else fields)[name] = value
    with pytest.raises(ValueError, match=f"the field {section}\\.") as refused:
        validate(ConfigDict(fields, type_safe=False))
    assert_one_line(str(refused.value), section)


NUMBERS = ["", "x", "nan", "inf", "-1", "1e400", "1" * 5_000, "1;2", "1,nan", "a\nb"]
PATHS = ["", " ", "a\0b", "a\nb", "ftp://a/b", "$HOME/x", "~nobody-at-all/x"]
NAMES = ["", "x", "sam,rho=0.20", "sam,rho=0", "st,", "st\n", "\x1b[31m", PARAGRAPH]
VALID = {"--config": f"{DIGITS}:st", "--format": "safetensors"}


def flags():
    """Every flag with a value, of every subcommand: command, flag, required ones."""
    _, parsers = cli._make_parser()
    for command, parser in parsers.items():
        actions = [a for a in parser._actions if a.option_strings and a.nargs != 0]
        required = [a.option_strings[0] for a in actions if a.required]
        for action in actions:
            yield command, action.option_strings[0], required


# Text for XLA, which alone knows its flags; '' adds none.
FLAGS = [flag for flag in flags() if flag[1] != "--xla-flags"]


def texts_for(flag):
    if flag in (
        "--add",
        "--workdir",
        "--input",
        "--output",
        "--transfer-from",
        "--cache",
    ):
        return [*PATHS, "gs://bucket/x" if flag != "--workdir" else "gs://"]
    if flag in ("--linf", "--l2"):  # '' is no radius of this norm
        return [*NUMBERS[1:], "0", "8/255", "0.0313725", "1e9", "8,,16"]
    names = ("--config", "--rows", "--shard", "--version", "--members", "--format")
    names += ("--methods", "--measure", "--variants", "--precisions", "--compare")
    names += ("--attack", "--norm", "--loss", "--judge", "--checkpoint", "--dtype")
    return NAMES if flag in (*names, "--dataset") else NUMBERS


@pytest.mark.parametrize(
    ("command", "flag", "required"), FLAGS, ids=lambda value: str(value)
)
def test_a_hostile_value_of_a_flag_is_refused_by_its_name(
    command, flag, required, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    for work in (
        "samrobust.experiments.building.load_data",
        "samrobust.studies.bench.suite.Launcher",
    ):
        monkeypatch.setattr(work, lambda *_, **__: pytest.fail("work has started"))
    others = [f"{name}={VALID.get(name, 'none')}" for name in required if name != flag]
    for text in texts_for(flag):
        code = helpers.main(command, *others, f"{flag}={text}")
        errors = capsys.readouterr().err
        assert code == 2, text
        assert errors.startswith("samrobust: error: "), text
        assert errors.count("\n") == 1, errors
        assert len(errors) < 900
        name = flag.removeprefix("--")
        # A file of weights is read before the config that it is put into.
        assert name.rstrip("s") in errors or (command, name) == ("import", "config")
        assert list(tmp_path.iterdir()) == []
