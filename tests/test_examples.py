"""The examples run as they are, made tiny: scripts imported, notebooks by the cell."""

import importlib
import json
import pathlib
import re
import shlex
import sys

import helpers
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
import pytest
from flax import nnx
from jax.flatten_util import ravel_pytree

import samrobust.attacks
import samrobust.data
from samrobust import cli
from samrobust.data import fingerprint, load_dataset
from samrobust.experiments.configuration import load_config
from samrobust.sharpness import sam

EXAMPLES = helpers.ROOT / "examples"
SCRIPTS = sorted(path.stem for path in EXAMPLES.glob("*.py"))
NOTEBOOKS = sorted(path.stem for path in EXAMPLES.glob("*.ipynb"))
# What a notebook's first cell of code says, smaller.
CONSTANTS = {
    "autoattack": {"STEPS": 2, "NUM_IMAGES": 4},
    "sam_against_at": {"EPOCHS": 1, "WIDTH": 2, "BLOCKS": (1,), "NUM_IMAGES": 4},
    "theory": {"SAMPLES": 2000, "BATCH_SIZE": 200, "SEEDS": 2, "NUM_POINTS": 3},
}


@pytest.fixture(autouse=True)
def _tiny(monkeypatch, tmp_path):
    """In an empty folder, with a batch of digits and the first attack of four."""
    few = load_dataset("digits", train_size=64, test_size=8)
    ensemble, made = samrobust.attacks.autoattack, {}

    def autoattack(ball, *, version="standard", members=()):
        assert ensemble(ball, version=version, members=members).members
        first = ensemble(ball, version="custom", members=["apgd-ce"])
        return made.setdefault(ball.radius, first)  # compiled once

    monkeypatch.setattr(samrobust.data, "load_dataset", lambda *_, **__: few)
    monkeypatch.setattr(samrobust.attacks, "autoattack", autoattack)
    monkeypatch.syspath_prepend(EXAMPLES)
    monkeypatch.chdir(tmp_path)
    yield
    for name in SCRIPTS:
        sys.modules.pop(name, None)


# --- scripts --------------------------------------------------------------------------


def accuracies(text):
    return [float(found) for found in re.findall(r"([\d.]+)%", text)]


def test_sam_trains_an_nnx_network(capsys):
    importlib.import_module("nnx_sam").main(0.1, epochs=1)
    text = capsys.readouterr().out
    assert "applied_rho: 0.100" in text
    natural, robust = accuracies(text)
    assert 0 <= robust <= natural <= 100


def test_an_nnx_step_is_that_of_sam_and_moves_the_statistics_once():
    example = importlib.import_module("nnx_sam")
    digits = load_dataset("digits", train_size=8)
    images, labels = jnp.float32(digits.train.images / 255), digits.train.labels
    model = example.CNN(nnx.Rngs(0))
    graph, *states = nnx.split(model, nnx.Param, ...)
    params, statistics = nnx.as_pure(states)

    @jax.jit
    def grad_at(params):
        def loss_fn(params):
            moved = nnx.merge(graph, params, statistics)
            return example.loss_fn(moved, images, labels)

        return jax.grad(loss_fn)(params)

    grads = grad_at(params)
    scale = 0.1 / jnp.linalg.norm(ravel_pytree(grads)[0])
    grads = grad_at(jax.tree.map(lambda w, g: w + scale * g, params, grads))
    expected = jax.tree.map(lambda w, g: w - 0.5 * g, params, grads)
    mean = model.norm.momentum * model.norm.mean[...]
    mean += (1 - model.norm.momentum) * model.conv(images).mean((0, 1, 2))

    tx = optax.chain(sam(0.1), optax.sgd(0.5))
    example.step(model, nnx.Optimizer(model, tx, wrt=nnx.Param), images, labels)
    helpers.assert_close(nnx.as_pure(nnx.state(model, nnx.Param)), expected, atol=1e-5)
    np.testing.assert_allclose(model.norm.mean[...], mean, atol=1e-6)


def test_autoattack_takes_an_equinox_model(capsys):
    pytest.importorskip("equinox")
    importlib.import_module("equinox_autoattack").main(steps=3, epsilon=1.0)
    natural, _, robust = accuracies(capsys.readouterr().out)
    assert natural > robust == 0


def command_of(name):
    text = str(importlib.import_module(name).__doc__).replace("\\\n", " ")
    (command,) = re.findall(r"^ {4}samrobust (.*)$", text, re.MULTILINE)
    return shlex.split(command)


def test_a_table_of_own_rows_and_network_on_own_images():
    images, methods = (command_of(name) for name in ("own_data", "own_method"))
    accepted = cli._parse(images)
    assert load_config(accepted.config, accepted.overrides).is_locked
    network = {"training.epochs": 1, "model.hidden": 4}
    tiny = [
        f for f in helpers.make_flags(network) if "width" not in f if "blocks" not in f
    ]
    data, workdir = "--config.data.name=own_data:shapes", "--workdir=runs/own"
    assert workdir in methods
    longer = "--config.training.epochs=5"
    assert cli.main([f for f in methods if f != longer] + [data, *tiny]) == 0
    table = json.loads(pathlib.Path("runs", "own", "table.json").read_text())
    assert table["dataset"] == "own_data:shapes"
    assert [row["name"] for row in table["rows"]] == [
        "st",
        "own_method:smoothed,share=0.1",
        "own_method:noisy,std=0.1+sam,rho=0.2",
    ]


def test_the_file_of_own_images_holds_what_the_function_returns():
    np.savez("shapes.npz", **importlib.import_module("own_data").shapes())
    kept, made = load_dataset("shapes.npz"), load_dataset("own_data:shapes")
    assert kept.num_classes == 3
    assert fingerprint(kept.train) == fingerprint(made.train)
    assert fingerprint(kept.test) == fingerprint(made.test)


def test_docs_show_the_parts_of_the_example_word_for_word():
    page = (helpers.ROOT / "docs" / "own.md").read_text()
    *shown, _ = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    example = (EXAMPLES / "own_method.py").read_text()
    assert len(shown) == 3
    for block in shown:
        assert block[block.index("\n\n\n") :].strip() in example


# --- notebooks ------------------------------------------------------------------------


def cells_of(name):
    notebook = json.loads((EXAMPLES / f"{name}.ipynb").read_text())
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebook_runs_from_top_to_bottom(name, monkeypatch):
    shown = []
    monkeypatch.setattr(plt, "show", lambda: shown.append(plt.gcf()))
    names = {}
    constants, *cells = cells_of(name)
    exec("".join(constants["source"]), names)
    assert CONSTANTS[name].keys() <= names.keys()
    names |= CONSTANTS[name]
    for number, cell in enumerate(cells, 2):
        exec(compile("".join(cell["source"]), f"{name}, cell {number}", "exec"), names)
    assert len(shown) == "".join(map(str, cells)).count("plt.show()") > 0
    plt.close("all")


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebook_holds_what_it_printed_in_order(name):
    cells = cells_of(name)
    assert [cell["execution_count"] for cell in cells] == [*range(1, len(cells) + 1)]
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert {output["output_type"] for output in outputs} == {"stream", "display_data"}
    assert all(output.get("name", "stdout") == "stdout" for output in outputs)
