"""A method, a network and a data set outside of the package: one file of one's own."""

import importlib
import json
import pathlib
import re
import signal
import subprocess
import sys
import time
import typing

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import samrobust
from samrobust.experiments import building, configuration, entries, identity, methods
from samrobust.experiments.explaining import explain
from samrobust.experiments.scoring import check_alone
from samrobust.models import MODELS
from samrobust.models.torch import read_weights
from samrobust.system import files

MINE = '''
"""Adversarial training whose perturbations persist, a linear network, and stripes."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from samrobust.training import Adversary


def dimmed(images, *, key):
    return images * jax.random.uniform(key, (len(images), 1, 1, 1), minval=0.5)


def persistent(radius: float, shrink: float = 0.9) -> Adversary:
    """Steps on the perturbation that the batch before ended with."""
    radius = radius / 255

    def perturb(logits_fn, images, labels, state, *, key):
        return jnp.clip(images + state[: len(images)], 0, 1), state

    def learn(state, images, labels, gradients, correct):
        moved = shrink * state[: len(images)] + radius * jnp.sign(gradients)
        return state.at[: len(images)].set(jnp.clip(moved, -radius, radius))

    return Adversary(perturb, jnp.zeros_like, learn)


class Linear(nn.Module):
    num_classes: int = 2
    hidden: int = 3

    @nn.compact
    def __call__(self, images, *, train):
        hidden = nn.Dense(self.hidden)(images.reshape(len(images), -1))
        hidden = nn.LayerNorm()(nn.Dropout(0.1)(hidden, deterministic=not train))
        return nn.Dense(self.num_classes)(hidden)


def stripes():
    rng = np.random.default_rng(0)
    found = {}
    for split, size in (("train", 66), ("test", 24)):
        labels = np.arange(size) % 3
        images = rng.integers(0, 40, (size, 4, 6, 1))
        for i, label in enumerate(labels):
            images[i, label] += 200
        found[f"x_{split}"] = images.astype(np.uint8)
        found[f"y_{split}"] = labels
    return found
'''
ROW = "mine:persistent,radius=16+sam,rho=0.1+ema,decay=0.5"
FLAGS = [
    "--config.data.name=mine:stripes",
    "--config.data.padding=1",
    "--config.data.augmentation=mine:dimmed",
    "--config.model.name=mine:Linear",
    "--config.model.hidden=4",
    "--config.training.batch_size=16",
    "--config.training.drop_remainder=False",
    "--config.training.epochs=12",
    "--config.training.optimizer=adamw",
    "--config.training.learning_rate=0.01",
    "--config.evaluation.linf=(16.0,)",
    "--config.evaluation.l2=()",
    "--config.evaluation.num_steps=2",
    "--config.evaluation.batch_size=24",
]
CONFIG = f"--config={helpers.ROOT}/configs/digits.py:{ROW}"


def start(folder: pathlib.Path, *arguments: str) -> subprocess.Popen[str]:
    """The command in the folder of the file, which is on nobody's path.

    Compiled as on a user's machine, so that some runs of the tests are.
    """
    environment = {**helpers.USUAL_COMPILATION, "PYTHONPATH": str(helpers.ROOT)}
    return helpers.start_command(*arguments, folder=folder, **environment)


def do(folder: pathlib.Path, *arguments: str) -> str:
    code, output, errors = helpers.finish_command(start(folder, *arguments))
    assert code == 0, errors
    return output


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where `mine.py` lies, with a run of it that was never stopped."""
    folder = tmp_path_factory.mktemp("own")
    (folder / "mine.py").write_text(MINE)
    (folder / "odd.py").write_text(ODD)
    do(folder, "train", CONFIG, *FLAGS, f"--workdir=runs/{ROW}/seed0")
    return folder


@pytest.fixture
def own(folder, monkeypatch):
    """The same folder, and its file at hand in this process."""
    monkeypatch.chdir(folder)
    yield folder
    for name in ("mine", "odd"):
        sys.modules.pop(name, None)


def test_it_is_trained_with_what_it_remembers_and_its_own_fields(folder):
    workdir = folder / "runs" / ROW / "seed0"
    leaves = helpers.read_checkpoint(workdir)
    assert leaves["state.state.adversary"].shape == (16, 4, 6, 1)
    assert np.abs(leaves["state.state.adversary"]).max() == pytest.approx(16 / 255)
    kernel = "state.state.params['Dense_0']['kernel']"
    assert leaves[kernel].shape == (24, 4)
    average = leaves["state.state.average['params']['Dense_0']['kernel']"]
    assert np.abs(average - leaves[kernel]).max() > 0
    config = files.read_json(workdir / "config.json")
    assert config
    assert config["persistent"] == {"radius": 16.0, "shrink": 0.9}
    assert (
        config["label"]
        == "persistent (radius = 16) + SAM (rho = 0.1) + EMA (decay = 0.5)"
    )
    assert helpers.log_of(workdir)[-1]["accuracy"] > 60


NAMES = """
from samrobust.sharpness import sam as usual
from samrobust.training import Adversary
def still(m: int, replays: int, start: float) -> Adversary:
    assert (m, replays, start) == (4, 3, 0.5)
    return Adversary(lambda f, images, labels, state, *, key: (images, state))
def ascent(rho: float, m: float, batch_stats: float, rho_end: float, aux=None):
    assert (rho, m, batch_stats, rho_end) == (0.1, 2.5, 7.0, 1.0)
    return usual(rho, aux=aux)
"""


def test_an_own_parameter_is_its_own_though_the_training_has_one_of_that_name(
    tmp_path, monkeypatch
):
    """`m`, `replays`, `start`, `batch_stats`, `rho_end` shape a training elsewhere."""
    (tmp_path / "names_of_ours.py").write_text(NAMES)
    monkeypatch.syspath_prepend(tmp_path)
    still = "names_of_ours:still,m=4,replays=3,start=0.5"
    ascent = "names_of_ours:ascent,rho=0.1,m=2.5,batch_stats=7,rho_end=1"
    config = helpers.make_config(f"{still}+{ascent}")
    assert methods.group_field(config) == ("sam.m", 0)
    assert methods.replays(config) == 1
    assert [len(epochs) for epochs in methods.phases_of(config)] == [
        config.training.epochs
    ]
    built = methods.build(config, entries.Given(aux={}))
    assert built["starts"] == {}
    assert built["batch_stats"] == "both"
    assert methods.passes_at(config, 0).total == 2
    said = {field.name: field.meaning for field in explain(config)}
    assert said["still.replays"] == said["ascent.m"] == ""


TYPED = """
from typing import Literal, Optional
from samrobust.training import Adversary
def typed(
    share: float, few: Optional[int] = None, some: "int | None" = None,
    name: Optional[str] = None, which: Literal[None, "a"] = None,
    unknown: "Gone" = None,
) -> Adversary:
    found = few, some, name, which, unknown
    assert [type(x).__name__ for x in found] == ["int", "int", "str", "str", "float"]
    return Adversary(lambda f, images, labels, state, *, key: (images, state))
def counted(share: float) -> Adversary:
    return typed(share, few=int("x12"))
def checked(restarts: int, rate: float = 0.1) -> Adversary:
    from samrobust.checks import check
    check(False, "restarts > 3", "Without, all restarts are one.", restarts=restarts)
"""


def test_a_field_has_the_type_that_its_parameter_says(tmp_path, monkeypatch):
    (tmp_path / "typed_of_ours.py").write_text(TYPED)
    monkeypatch.syspath_prepend(tmp_path)
    texts = {"few": 5, "some": 6, "name": "x", "which": "a", "unknown": 1}
    flags = [f"--config.typed.{field}={value}" for field, value in texts.items()]
    row = "typed_of_ours:typed,share=1"
    config = configuration.load_config(f"digits.py:{row}", flags)
    methods.build(config, entries.Given())
    for wrong in ("few=1.5", "some=a"):
        with pytest.raises(ValueError, match=rf"typed\.{wrong[:3]}"):
            configuration.load_config(f"digits.py:{row}", [f"--config.typed.{wrong}"])


def test_an_error_of_a_constructor_is_said_with_its_line_and_a_check_by_its_field(
    tmp_path, monkeypatch
):
    (tmp_path / "typed_of_ours.py").write_text(TYPED)
    monkeypatch.syspath_prepend(tmp_path)
    for row, message in (
        (
            "typed_of_ours:counted,share=1",
            r"^Expected typed_of_ours:counted to run, got at .*typed_of_ours\.py, line "
            r"13: ValueError: invalid literal for int\(\) with base 10: 'x12'$",
        ),
        (
            "typed_of_ours:checked,restarts=2",
            r"^Expected checked\.restarts > 3, got checked\.restarts=2\. Without, all "
            r"restarts are one\.$",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            methods.build(helpers.make_config(row), entries.Given())


@pytest.mark.parametrize("config", ["digits", "adversarial"])  # which calls `digits`
def test_an_error_in_a_module_is_said_once_by_its_own_line(
    config, tmp_path, monkeypatch
):
    (tmp_path / "broken_of_ours.py").write_text("\n1 / 0\n")
    monkeypatch.syspath_prepend(tmp_path)
    message = (
        r"^Expected the module broken_of_ours with a method to run, got at "
        r".*broken_of_ours\.py, line 2: ZeroDivisionError: division by zero$"
    )
    with pytest.raises(ValueError, match=message):
        configuration.load_config(f"{config}.py:broken_of_ours:thing,a=1")


def test_a_killed_run_ends_with_the_same_bits(folder):
    killed = folder / "killed"
    flags = [*FLAGS, "--workdir=killed"]
    process = start(folder, "train", CONFIG, *flags, "--config.checkpoint.minutes=0")
    deadline = time.monotonic() + 120
    while not any(0 < step < 60 for step in helpers.checkpoint_steps(killed)):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    do(folder, "train", CONFIG, *flags)
    expected = helpers.read_checkpoint(folder / "runs" / ROW / "seed0")
    helpers.assert_same_bits(helpers.read_checkpoint(killed), expected)


def test_it_is_evaluated_rechecked_and_exported(own, capsys):
    workdir = f"runs/{ROW}/seed0"

    def said(*arguments: str) -> str:
        assert helpers.main(*arguments) == 0
        return " ".join(capsys.readouterr().out.split())

    assert "natural" in said("evaluate", f"--workdir={workdir}", "--num-steps=3")
    flags = ["--linf=16", "--l2=", "--num-examples=6"]
    assert "persistent" in said("recheck", "--workdir=runs", *flags)
    flags = ["--format=safetensors", "--output=mine.safetensors"]
    said("export", f"--workdir={workdir}", *flags)
    # Its network knows no mean and std.
    assert (
        read_weights(own / "mine.safetensors")
        .metadata.keys()
        .isdisjoint({"mean", "std"})
    )
    flags = [*FLAGS, "--input=mine.safetensors", "--workdir=back"]
    assert "hidden 4, 3 classes." in said("import", CONFIG, *flags)
    average = "state.state.average"
    back, sent = map(helpers.read_checkpoint, (own / "back", own / workdir))
    names = [name for name in sent if name.startswith(average)]
    assert len(names) == 6
    for name in names:
        np.testing.assert_array_equal(back[name], sent[name])


def test_a_changed_file_is_not_taken_for_the_one_that_a_run_began_with(folder):
    """Neither to go on with the run nor to judge it; put back, it does both."""
    workdir = f"runs/{ROW}/seed0"
    (folder / "mine.py").write_text(MINE.replace("shrink *", "0.5 * shrink *"))
    evaluate = ["evaluate", f"--workdir={workdir}", "--num-steps=1"]
    train = ["train", CONFIG, *FLAGS, f"--workdir={workdir}"]
    for command in (evaluate, train):
        code, _, errors = helpers.finish_command(start(folder, *command))
        assert code != 0
        assert re.search(r"mine\.py has\s+changed", errors), errors
        assert "Traceback" not in errors
    (folder / "mine.py").write_text(MINE)
    do(folder, *evaluate)


def test_it_is_loaded_and_attacked(own):
    trained = samrobust.load(own / "runs" / ROW / "seed0")
    images = jnp.full([2, 4, 6, 1], 0.5)
    attack = samrobust.pgd(samrobust.linf(8 / 255), step_size=2 / 255, num_steps=2)
    attacked = attack(
        trained.logits_fn, images, jnp.array([0, 1]), key=jax.random.key(0)
    )
    assert attacked.shape == images.shape
    assert trained.logits_fn(images).shape == (2, 3)


MESSAGES = {
    "mine:nothing": r"^Expected a method nothing in .*mine\.py, got .*persistent",
    "mine:persistent": r"^Expected the options radius for mine:persistent, got row=",
    "mine:persistent,radius=x": r"^Expected a number for radius, got row=",
    "odd:counted,n=1.5,on=True": r"^Expected a whole number for n, got row='odd:count",
    "odd:counted,n=1,on=yes": r"^Expected True or False for on, got row='odd:counted",
    "other:persistent": r"^Expected a module other with a method, got .* Run in",
    "sam,rho=0.1+mine:stripes": r"^Expected mine:stripes to build one of adversary",
    "odd:data,share=1": r"^Expected another name than data, got part='odd:data'",
    "sam,rho=0.1+odd:sam,rho=1": r"^Expected another name than sam, got part=",
    "odd:fails,share=1": r"^Expected odd:fails to run, got at .*odd\.py, line 19: Type",
    "odd:by_place,share=1": r"^Expected odd:by_place to run, got: TypeError: .*share",
    "odd:called,kind=../up": r"^Expected letters, digits, _, \. and - for kind, got",
}
ODD = '''
import jax.numpy as jnp
import optax
from flax import linen as nn

from samrobust.training import Averaging


def data(share: float):
    return called("", share)


def sam(rho: float):
    return called("", rho)


def fails(share):
    if share != 0:
        raise TypeError("no")
    return called("", share)


def by_place(share, /):
    return share


def called(kind: str, power: float = 1.0, top: int | None = None, on: bool = False):
    return Averaging(lambda variables: variables, lambda average, variables, step: 0)


def counted(n: int, on: bool):
    return called("")


class Plain(nn.Module):
    """`width` and `blocks` are something else than those of our networks."""

    hidden: int
    num_classes: int = 2
    width: int = 3
    blocks: int = 1
    stages: tuple[int, ...] = (1, 2)


class Six(nn.Module):
    @nn.compact
    def __call__(self, images, *, train):
        return nn.Dense(6)(images.reshape(len(images), -1))


class NoTrain(nn.Module):
    @nn.compact
    def __call__(self, images):
        return images


class Forgets(nn.Module):
    @nn.compact
    def __call__(self, images, *, train):
        features = nn.BatchNorm(use_running_average=False)(images)
        return nn.Dense(10)(features.reshape(len(images), -1))


class Draws(nn.Module):
    @nn.compact
    def __call__(self, images, *, train):
        features = nn.Dropout(0.5, deterministic=False)(images)
        return nn.Dense(10)(features.reshape(len(images), -1))


class Counts(nn.Module):
    @nn.compact
    def __call__(self, images, *, train):
        n = self.param("n", lambda key: jnp.zeros((), int))
        return nn.Dense(10)(images.reshape(len(images), -1)) + n


class Mean(nn.Module):
    mean: tuple = ()

    @nn.compact
    def __call__(self, images, *, train):
        return nn.Dense(10)(images.reshape(len(images), -1))


def nothing(*_):
    return None


def breaks(*_):
    raise RuntimeError("no")


def plain(learning_rate, momentum):
    return optax.sgd(learning_rate, momentum)
'''


@pytest.mark.parametrize("row", MESSAGES)
def test_what_it_lacks_is_said_before_any_work(row, own, capsys):
    assert own
    arguments = ["train", f"--config={helpers.ROOT}/configs/digits.py:{row}"]
    assert helpers.main(*arguments, "--workdir=refused") == 2
    error = capsys.readouterr().err.removeprefix("samrobust: error: ").strip()
    assert re.search(MESSAGES[row], error), error
    assert not (own / "refused").exists()


OVERRIDES = {
    "model.name=odd:Plain": r"^Expected a whole number for model\.hidden, got .*None",
    "model.name=odd:nn": r"^Expected the model's constructor, got model\.name=",
    "training.optimizer=odd:nothing": r"^Expected training\.optimizer=odd:nothing to",
    "training.optimizer=odd:breaks": r"^Expected odd:breaks to run, got .*line ",
    "training.optimizer=odd:nn": r"^Expected the optimizer's constructor, got",
    "training.optimizer=odd:plain --config.training.weight_decay=0.002": (
        r"^Expected an optimizer with a parameter weight_decay when training\.weight_d"
    ),
    "model.name=mine:Linear --config.model.dtype=bfloat16": r"^Expected no model\.dt",
}


@pytest.mark.parametrize("overrides", OVERRIDES)
def test_what_a_network_or_an_optimizer_lacks_is_one_line(overrides, own):
    assert own
    with pytest.raises(ValueError, match=OVERRIDES[overrides]) as error:
        configuration.load_config("digits.py", f"--config.{overrides}".split())
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("odd:nothing", r"^Expected odd:nothing to build a Linen module, got"),
        ("odd:breaks", r"^Expected odd:breaks to run, got .*odd\.py, line "),
        ("odd:Six", r"^Expected odd:Six to return logits \(1, 10\), got .*\(1, 6\)"),
        ("odd:NoTrain", "^Expected odd:NoTrain to run, got.* argument 'train'"),
        ("odd:Forgets", "^Expected odd:Forgets to run, got.*batch_stats.*immutable"),
        ("odd:Draws", "^Expected odd:Draws to run, got.*InvalidRngError"),
        ("odd:Counts", "^Expected parameters of odd:Counts that .* got n='int32'"),
    ],
)
def test_a_network_that_cannot_classify_the_data_is_one_line(name, message, own):
    assert own
    config = configuration.load_config("digits.py", [f"--config.model.name={name}"])
    with pytest.raises(ValueError, match=message) as error:
        building.make_training(config, building.load_facts(config), 1)
    assert "\n" not in str(error.value)


def test_its_logits_of_an_image_depend_on_no_other_image():
    class Centers(nn.Module):
        by: bool

        @nn.compact
        def __call__(self, images, *, train):
            del train
            centered = images - self.by * jnp.mean(images, axis=0)
            return nn.Dense(3)(centered.reshape(len(images), -1))

    images = np.arange(5 * 12, dtype=np.uint8).reshape(5, 2, 2, 3)
    variables = Centers(by=True).init(jax.random.key(0), images[:1] / 255, train=False)
    check_alone(Centers(by=False), variables, images)
    check_alone(Centers(by=True), variables, images[:1])
    with pytest.raises(ValueError, match="do not depend on the other images"):
        check_alone(Centers(by=True), variables, images)


def test_it_is_given_a_mean_for_each_channel_or_one(own):
    assert own
    flags = ["--config.model.name=odd:Mean", "--config.model.mean=(0.1, 0.2, 0.3)"]
    config = configuration.load_config("digits.py", flags)
    with pytest.raises(ValueError, match=r"^Expected one model\.mean or one a channel"):
        building.make_training(config, building.load_facts(config), 1)


def test_its_options_may_be_of_any_plain_type_and_zero(own):
    assert own
    config = configuration.load_config(
        "digits.py:odd:called,kind=a-b", ["--config.called.top=3"]
    )
    expected = {"kind": "a-b", "power": 1.0, "top": 3, "on": False}
    assert config["called"].to_dict() == expected
    assert isinstance(config["called"].top, int)
    zero = "odd:fails,share=0"
    assert configuration.load_config(f"digits.py:{zero}").row == zero


def test_its_network_has_its_own_defaults_whatever_other_networks_are_told(own):
    overrides = ["--config.model.name=odd:Plain", "--config.model.hidden=4"]
    model = configuration.load_config("digits.py", overrides).model
    expected = {"hidden": 4, "width": 3, "blocks": 1, "stages": (1, 2)}
    assert {name: model[name] for name in expected} == expected
    (own / "own_config.py").write_text(
        "from samrobust.experiments.configuration import base_config, finish\n"
        "def get_config(row='st'):\n"
        "    config = base_config()\n"
        "    config.model.name = 'odd:Plain'\n"
        "    config.model.hidden = 4\n"
        "    return finish(config, row)\n"
    )
    model = configuration.load_config("own_config.py").model
    assert {name: model[name] for name in expected} == expected


def test_a_run_from_before_a_parameter_had_its_default(own):
    """As a field that a newer version of samrobust adds."""
    assert own
    row = "odd:called,kind=a"
    config = configuration.load_config(
        f"digits.py:{row}",
        ["--config.model.name=odd:Plain", "--config.model.hidden=4"],
    )
    stored = json.loads(config.to_json_best_effort())
    older = json.loads(config.to_json_best_effort())
    del older["called"]["power"], older["model"]["width"]
    assert identity.changed_fields(older, stored) == {}


def test_every_public_name_is_there():
    assert len(samrobust.__all__) > 50
    for name in samrobust.__all__:
        assert getattr(samrobust, name).__name__
    typing.assert_type(samrobust.linf(1), samrobust.Ball)  # a type checker sees it
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = samrobust.nothing  # pyright: ignore[reportAttributeAccessIssue]


def test_a_name_and_a_line_make_parts_and_a_network_built_in(own, monkeypatch):
    """What was another package's has a name of one word, a section and fields."""
    assert own
    parts = "samrobust.training.adversaries", "ADVERSARIES"
    names = getattr(importlib.import_module(parts[0]), parts[1])
    monkeypatch.setitem(names, "persistent", "mine:persistent")
    monkeypatch.setitem(MODELS, "linear", "mine:Linear")
    overrides = ["--config.model.name=linear", "--config.model.hidden=4"]
    row = "persistent,radius=16+sam,rho=0.1"
    config = configuration.load_config(f"digits.py:{row}", overrides)
    assert (config.persistent.shrink, config.model.hidden) == (0.9, 4)
    method = building.make_training(config, building.load_facts(config), 1).method
    images = jax.ShapeDtypeStruct((8, 8, 8, 1), jnp.float32)
    state = jax.eval_shape(method.init, jax.random.key(0), images)
    assert state.adversary.shape == images.shape
    assert state.params["Dense_0"]["kernel"].shape == (64, 4)


@pytest.mark.parametrize(
    "registry",
    [
        ("samrobust.sharpness", "SHARPNESS"),
        ("samrobust.training.adversaries", "ADVERSARIES"),
        ("samrobust.training.objectives", "OBJECTIVES"),
        ("samrobust.training.averaging", "AVERAGES"),
    ],
)
def test_a_name_of_a_registry_is_one_line_there(registry):
    """A new file and a line in the dict: nothing else knows a name."""
    module, name = registry
    names = getattr(importlib.import_module(module), name)
    for part in names:
        assert entries.find(part).make
        assert entries.section_of(part) in configuration.base_config()
