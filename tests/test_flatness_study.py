"""`samrobust sharpness`: what is measured of runs, kept, correlated, written, drawn."""

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from flax import linen as nn

from samrobust.attacks import cross_entropy
from samrobust.cli.measuring import RunMeasurements
from samrobust.experiments.networks import load
from samrobust.sharpness.measures import hessian_trace, logit_gap, relative_flatness
from samrobust.studies.sharpness import ranks
from samrobust.studies.sharpness.findings import (
    MeasuredRun,
    choose_column,
    explain,
    to_sheet,
)
from samrobust.studies.sharpness.picture import draw_scatter
from samrobust.studies.sharpness.probe import (
    KINDS,
    QUANTITIES,
    ProbeSettings,
    _head,
    _sample_loss,
    make_probe,
)
from samrobust.studies.sharpness.ranks import rank_correlation
from samrobust.system.files import read_sealed, write_sealed

ROWS = ("sam,rho=0.2", "st")  # in the order of their folders
LITTLE = ProbeSettings(
    *("linf", 8.0),
    num_examples=20,
    ascent_steps=2,
    noise_draws=2,
    lanczos_steps=3,
    trace_draws=2,
    num_targets=1,
    fab_steps=3,
)
KEY = jax.random.key(0, impl="threefry2x32")


@pytest.fixture(scope="module")
def table(tmp_path_factory) -> Path:
    """Two rows, one seed each, as `samrobust table` leaves them."""
    return helpers.make_table(tmp_path_factory.mktemp("table"), ROWS)


class Linear(nn.Module):
    """One layer: all of its measures have a closed form."""

    doubled: bool = False

    @nn.compact
    def __call__(self, images, *, train):
        del train
        logits = nn.Dense(3)(images.reshape(len(images), -1))
        return 2 * logits if self.doubled else logits


def measure(model):
    split = helpers.make_split(20, side=2)
    split = type(split)(split.images, split.labels % 3)
    variables = model.init(KEY, jnp.zeros([1, 2, 2, 1]), train=False)
    told = []
    probe = make_probe(model, LITTLE, batch_size=20)
    found = probe(
        *(variables, split, split, KEY), on_batch=lambda *args: told.append(args)
    )
    layer: Any = variables["params"]["Dense_0"]
    return found, layer, split, told


# --- a network ------------------------------------------------------------------------


def test_a_linear_network_is_measured_as_its_formulas_say():
    found, layer, split, told = measure(Linear())
    assert found.keys() == QUANTITIES.keys()
    assert {quantity.kind for quantity in QUANTITIES.values()} == set(KINDS)
    features = split.images.reshape(20, -1) / 255
    logits = features @ layer["kernel"] + layer["bias"]
    kappa = jnp.mean(relative_flatness(logits, jnp.asarray(features), layer["kernel"]))
    np.testing.assert_allclose(found["relative_flatness"], kappa, rtol=1e-5)

    def loss(layer):
        logits = features @ layer["kernel"] + layer["bias"]
        return jnp.mean(cross_entropy(logits, jnp.asarray(split.labels)))

    own_key = jax.random.fold_in(KEY, 3)
    trace = hessian_trace(loss, layer, num_samples=2, key=own_key)
    np.testing.assert_allclose(found["trace"], trace, rtol=1e-5)
    one_hot = np.eye(3)[split.labels]
    gradients = (jax.nn.softmax(logits) - one_hot) @ layer["kernel"].T
    for order in (1, 2):
        norms = np.linalg.norm(gradients, order, axis=1)
        np.testing.assert_allclose(found[f"gradient_l{order}"], norms.mean(), rtol=1e-5)
    assert found["worst"] > 0 < found["distance_linf"] < found["distance_l2"]
    shares = [done / total for done, total, _ in told]
    assert shares == sorted(shares)
    assert shares[-1] == 1


def test_the_loss_of_a_sample_is_the_mean_however_it_is_cut_into_batches():
    model, variables = helpers.make_network()
    split = helpers.make_split(20)
    images = split.images / np.float32(255)
    logits = jax.jit(lambda x: model.apply(variables, x, train=False))(images)
    expected = jnp.mean(cross_entropy(logits, jnp.asarray(split.labels)))
    for batch_size in (20, 8):  # the last of 8 is padded
        arrays = jnp.asarray(split.images), jnp.asarray(split.labels)
        loss = jax.jit(_sample_loss(model, variables, *arrays, batch_size))
        np.testing.assert_allclose(loss(variables["params"]), expected, rtol=1e-5)


def test_a_last_layer_that_is_not_dense_has_no_relative_flatness():
    images = jnp.ones([1, 2, 2, 1])
    for doubled in (False, True):
        model = Linear(doubled)
        variables = model.init(KEY, images, train=False)
        assert (_head(model, variables, images) is None) == doubled


# --- correlations ---------------------------------------------------------------------


def test_the_rank_correlation_is_scipys_and_its_interval_covers_it():
    rng = np.random.default_rng(1)
    one = rng.normal(size=30).round(1)  # with ties
    other = one + rng.normal(size=30)
    found = rank_correlation(list(one), list(other), range(30))
    expected: Any = scipy.stats.spearmanr(one, other)
    assert found.rho == pytest.approx(expected.statistic)
    assert found.rho is not None
    assert found.interval is not None
    low, high = found.interval
    # As wide as the normal approximation of Fisher's z has it (Bonett and Wright).
    width = 1.96 * np.sqrt((1 + found.rho**2 / 2) / 27)
    near = np.tanh(np.arctanh(found.rho) + np.array([-width, width]))
    assert (low, high) == pytest.approx(tuple(near), abs=0.12)
    assert found.is_sure == (low > 0)


def test_few_methods_have_no_interval_and_equal_runs_no_correlation():
    rising = [float(i) for i in range(8)]
    few = rank_correlation(rising, rising, "abcdefgg")
    assert (few.n, few.rho, few.interval) == (8, pytest.approx(1), None)
    assert rank_correlation(rising, rising, "abcdefgh").interval == pytest.approx(
        (1, 1)
    )
    assert rank_correlation(rising[:2], rising[:2], "ab").rho is None
    assert rank_correlation(rising, [3.0] * 8, "abcdefgh").rho is None
    assert rank_correlation([], [], []).rho is None


def test_copies_of_a_run_make_no_correlation_surer():
    """A bootstrap over runs would make its interval half as wide."""
    rng = np.random.default_rng(2)
    one = rng.normal(size=20)
    other = one + 2 * rng.normal(size=20)
    groups = range(20)
    once = rank_correlation(list(one), list(other), groups)
    copies = (np.tile(array, 4).tolist() for array in (one, other, groups))
    found = rank_correlation(*copies)
    assert found.n == 4 * once.n
    assert found.rho == pytest.approx(once.rho)
    assert found.interval == pytest.approx(once.interval)


def test_a_sample_of_groups_has_the_correlation_of_scipy():
    rng = np.random.default_rng(3)
    pairs = rng.integers(5, size=(2, 12)).astype(float)  # with ties
    times = rng.integers(3, size=(6, 12))
    for row, found in zip(times, ranks._correlate(pairs, times), strict=True):
        expected: Any = scipy.stats.spearmanr(*np.repeat(pairs, row, axis=1))
        assert found == pytest.approx(expected.statistic)


def made_runs(count):
    """Runs whose robustness rises with the distance and falls with the sharpness."""
    return [
        MeasuredRun(
            *(f"sam,rho={number // 2}", f"SAM (rho = {number // 2})", number % 2),
            {
                "worst": 1.0 / (1 + number),
                "distance_linf": float(number),
                "trace": None,
            },
            {"natural": 99.0, "linf 8/255": 5.0 * number, "linf 8/255 AA": 5.0},
        )
        for number in range(count)
    ]


def test_the_sheet_answers_and_says_how_far_it_can_be_believed():
    found = explain(made_runs(16), "linf 8/255")
    assert found.correlations["worst"]["linf 8/255"].rho == pytest.approx(-1)
    assert found.correlations["distance_linf"]["linf 8/255"].rho == pytest.approx(1)
    assert found.correlations["trace"]["linf 8/255"].n == 0
    text = to_sheet(found, LITTLE, (20, 20)).to_markdown()
    assert "| SAM (rho = 0) | 2 | 0.750 ±0.35 |" in text
    assert "| worst-case sharpness | - | **-1.00 [-1.00, -1.00]** | - |" in text
    assert "linf 8/255 and flatness: -1.00 [-1.00, -1.00] for worst-case" in text
    assert "linf 8/255 and confidence: nothing can be said." in text
    assert "over the methods of 16 runs of 8 methods" in text
    few = explain(made_runs(4), "linf 8/255")
    text = to_sheet(few, LITTLE, (20, 20)).to_markdown()
    assert "4 runs of 2 methods: too few for intervals, which take 8 methods" in text


def test_it_is_said_what_is_known_of_some_runs_alone():
    *runs, last = made_runs(9)
    without = {"natural": 99.0, "linf 8/255": 50.0}  # AutoAttack
    runs[:6] = [run._replace(accuracy=without) for run in runs[:6]]
    found = explain([*runs, last._replace(values={"worst": 0.5})], "natural")
    assert found.correlations["distance_linf"]["linf 8/255"].n == 8
    text = to_sheet(found, LITTLE, (20, 20)).to_markdown()
    said = "Known of fewer than all 9 runs: linf 8/255 AA (3), linf distance (8). "
    assert said in text


def test_the_column_is_the_last_of_linf_unless_it_is_named():
    found = [run.accuracy for run in made_runs(2)]
    assert choose_column(found) == "linf 8/255 AA"
    assert choose_column(found, "natural") == "natural"
    with pytest.raises(ValueError, match=r"column in \{natural, linf 8/255, "):
        choose_column(found, "linf 9/255")


def test_the_picture_has_a_panel_a_measure_and_a_dot_a_run():
    found = explain(made_runs(16), "linf 8/255")
    figure = draw_scatter(found, "digits")
    panels = [panel for panel in figure.axes if panel.get_title()]
    assert len(panels) == len(QUANTITIES)
    worst, distance = panels[0], panels[list(QUANTITIES).index("distance_linf")]
    assert (worst.get_xscale(), distance.get_xscale()) == ("log", "linear")
    dot = worst.get_lines()[0]
    assert (dot.get_xdata(), dot.get_ydata()) == ([1.0], [0.0])
    assert worst.get_title() == (
        "worst-case sharpness\nr = \N{MINUS SIGN}1.00 [\N{MINUS SIGN}1.00, "
        "\N{MINUS SIGN}1.00]"
    )


def test_the_legend_of_many_methods_is_no_wider_than_the_picture():
    runs = [
        run._replace(label=f"AT (linf, eps = 16/255) + {run.label}")
        for run in made_runs(70)
    ]
    figure = draw_scatter(explain(runs, "linf 8/255"), "digits")
    figure.draw_without_rendering()
    (legend,) = figure.legends
    assert len(legend.get_texts()) == 35
    place = legend.get_window_extent()
    assert place.x0 >= 0
    assert place.x1 <= figure.bbox.width


# --- the command ----------------------------------------------------------------------


def test_the_command_measures_writes_and_does_not_measure_twice(
    table, tmp_path, capsys, monkeypatch
):
    workdir = Path(shutil.copytree(table, tmp_path / "table"))
    made = []

    def make(*_, **__):
        def probe(*_, on_batch):
            on_batch(1, 2, "half")
            made.append(1)
            return {name: float(len(made)) for name in QUANTITIES} | {
                "distance_l2": float("inf")
            }

        return probe

    monkeypatch.setattr("samrobust.studies.sharpness.probe.make_probe", make)
    flags = (f"--workdir={workdir}", "--num-examples=20", "--rho=0.3")
    assert helpers.main("sharpness", *flags) == 0
    assert "2 runs of 2 methods: too few for intervals" in capsys.readouterr().out
    stored = json.loads((workdir / "sharpness.json").read_text())
    assert stored["settings"]["rho"] == 0.3
    assert stored["settings"]["linearity_radius"] == 16
    own = stored["runs"]["st/seed0"]
    assert (own["values"]["trace"], own["values"]["distance_l2"]) == (2.0, None)
    result = json.loads((workdir / "st/seed0/result.json").read_text())
    assert own["identity"] == result["identity"]
    assert own["num_images"] == [20, 20]
    assert stored["accuracy"]["st/seed0"] == result["accuracy"]
    lines = list(csv.DictReader((workdir / "sharpness.csv").read_text().splitlines()))
    assert [line["row"] for line in lines] == list(ROWS)
    assert float(lines[1]["linf 16/255"]) == result["accuracy"]["linf 16/255"]
    assert (workdir / "sharpness.png").stat().st_size > 1000
    assert helpers.main("sharpness", *flags) == 0
    assert len(made) == 2
    # Only what a kill left out, or another network of the same name, is measured again.
    content = read_sealed(workdir / "sharpness.json") or {}
    del content["runs"]["st/seed0"]
    write_sealed(workdir / "sharpness.json", content)
    assert helpers.main("sharpness", *flags) == 0
    assert len(made) == 3
    with pytest.warns(UserWarning, match=r"It is kept as sharpness\.json\.aside"):
        assert helpers.main("sharpness", *flags, "--sigma=0.5") == 0
    assert len(made) == 5


def test_autoattack_stands_beside_pgd_where_the_network_is_the_same(
    table, tmp_path, monkeypatch
):
    workdir = Path(shutil.copytree(table, tmp_path / "table"))
    monkeypatch.setattr(
        "samrobust.studies.sharpness.probe.make_probe",
        lambda *_, **__: lambda *_, **__: dict.fromkeys(QUANTITIES, 1.0),
    )
    results = [
        json.loads((workdir / row / "seed0/result.json").read_text()) for row in ROWS
    ]
    own = ("row", "seed", "identity", "step", "network")
    runs = [{name: result[name] for name in own} for result in results]
    runs[1]["step"] = 1  # of a network that is no more
    cells = {"linf 16/255": {"values": [1.0]}, "linf 16/255 AA": {"values": [7.0]}}
    content = {
        "rows": [{"name": row, "seeds": [0], "cells": cells} for row in ROWS],
        "runs": runs,
        "num_test": 17,
        "caption": "digits, test images. AA: AutoAttack, custom.",
    }
    (workdir / "autoattack.json").write_text(json.dumps(content))
    assert helpers.main("sharpness", f"--workdir={workdir}") == 0
    accuracy = json.loads((workdir / "sharpness.json").read_text())["accuracy"]
    assert accuracy["sam,rho=0.2/seed0"]["linf 16/255 AA"] == 7.0
    assert accuracy["sam,rho=0.2/seed0"]["linf 16/255"] != 1.0
    assert "linf 16/255 AA" not in accuracy["st/seed0"]
    said = (
        "AA: by `samrobust recheck` on 17 images: digits, test images. AA: AutoAttack"
    )
    assert said in (workdir / "sharpness.md").read_text()

    class Meanwhile(RunMeasurements):
        """`recheck` ends while the runs are measured."""

        def measure(self, prepare):
            super().measure(prepare)
            for row in content["rows"]:
                row["cells"] = {"linf 16/255 AA": {"values": [5.0]}}
            again = content | {"num_test": 18}
            (workdir / "autoattack.json").write_text(json.dumps(again))

    monkeypatch.setattr("samrobust.cli.measuring.RunMeasurements", Meanwhile)
    assert helpers.main("sharpness", f"--workdir={workdir}") == 0
    accuracy = json.loads((workdir / "sharpness.json").read_text())["accuracy"]
    assert accuracy["sam,rho=0.2/seed0"]["linf 16/255 AA"] == 5.0
    assert "on 18 images" in (workdir / "sharpness.md").read_text()


def test_a_damaged_recheck_is_no_absent_one(table, tmp_path, capsys):
    workdir = Path(shutil.copytree(table, tmp_path / "table"))
    (workdir / "autoattack.json").write_text('{"runs": [')
    assert helpers.main("sharpness", f"--workdir={workdir}") == 2
    assert "autoattack.json, got a damaged file" in capsys.readouterr().err


@pytest.mark.slow
def test_a_trained_network_with_batch_norm_is_measured_as_a_whole(table):
    network = load(table / "st" / "seed0")
    train = helpers.make_split(6)
    found = make_probe(network.model, LITTLE, batch_size=6)(
        *(network.variables, train, train, KEY), on_batch=lambda *_: None
    )
    assert found["worst"] > 0 < found["lambda_max"]
    gap = jnp.mean(logit_gap(network.logits_fn(jnp.asarray(train.images) / 255)))
    assert found["logit_gap"] == pytest.approx(float(gap), rel=1e-4)


def test_directories_and_columns_that_are_none_are_refused(table, tmp_path, capsys):
    assert helpers.main("sharpness", f"--workdir={tmp_path}") == 2
    assert "Expected finished runs" in capsys.readouterr().err
    flags = (f"--workdir={table}", "--column=linf 99/255")
    assert helpers.main("sharpness", *flags) == 2
    assert "Expected column in {natural, linf 16/255}" in capsys.readouterr().err
    with pytest.raises(ValueError, match="1 <= lanczos_steps"):
        ProbeSettings("linf", 8.0, lanczos_steps=0)
