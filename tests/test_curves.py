"""Accuracy against the radius: what is measured, kept and drawn."""

import json
import shutil
from pathlib import Path

import helpers
import jax
import numpy as np
import pytest

from samrobust import cli
from samrobust.cli import curves as curves_command
from samrobust.evaluation import Outcome
from samrobust.experiments.curves import (
    Curve,
    CurveSettings,
    curves_of,
    draw_curves,
    measure_run,
)
from samrobust.system.files import read_sealed, write_sealed

SETTINGS = CurveSettings({"linf": (8.0, 16.0)})
ROWS = ("st", "sam,rho=0.2")


@pytest.fixture(scope="module")
def table(tmp_path_factory) -> Path:
    """Two rows, one seed each, as `samrobust table` leaves them."""
    return helpers.make_table(tmp_path_factory.mktemp("table"), ROWS)


def test_the_mean_and_the_spread_are_over_the_seeds_of_a_row():
    found = [
        ("st", "ST", {"linf": [100.0, 50.0, 10.0]}),
        ("st", "ST", {"linf": [98.0, 54.0, 10.0]}),
        ("sam,rho=0.2", "SAM (rho = 0.2)", {"linf": [99.0, 60.0, 20.0]}),
    ]
    st, sam = curves_of(found, SETTINGS)
    assert (st.radii, st.mean, st.seeds) == ((0.0, 8.0, 16.0), (99.0, 52.0, 10.0), 2)
    np.testing.assert_allclose(st.std, [2**0.5, 8**0.5, 0.0])
    assert (sam.label, sam.std, sam.seeds) == ("SAM (rho = 0.2)", (0.0, 0.0, 0.0), 1)


def test_what_breaks_in_a_ball_is_broken_in_a_larger_one():
    correct = {
        "natural": np.array([True, True, True, False]),
        "linf 8/255": np.array([True, False, True, False]),
        "linf 16/255": np.array([True, True, False, True]),
    }
    found = measure_run(
        *(lambda *_, **__: Outcome(correct, {}), {}, helpers.make_split(4), SETTINGS),
        key=jax.random.key(0),
        on_batch=lambda *_: None,
    )
    assert found == {"linf": [75.0, 50.0, 25.0]}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"radii": {}}, "radii of at least one norm"),
        ({"radii": {"linf": (8.0, 4.0)}}, "rising radii > 0"),
        ({"radii": {"l1": (8.0,)}}, "norm in {linf, l2}"),
        ({"radii": {"linf": (8.0,)}, "num_steps": 0}, "1 <= num_steps"),
        ({"radii": {"linf": (8.0,)}, "num_examples": 1.5}, "num_examples=1.5"),
    ],
)
def test_settings_that_mean_no_curve_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        CurveSettings(**fields)


def test_the_picture_has_a_panel_a_norm_and_a_line_a_row():
    rows = [("st", "ST"), ("sam,rho=0.2", "SAM"), ("sam,rho=0.4", "SAM 4")]
    curves = [
        Curve(row, label, norm, (0.0, 8.0), (99.0, 50.0), (0.5, 1.0), 3)
        for norm in ("linf", "l2")
        for row, label in rows
    ]
    panels = draw_curves(curves, "digits").axes
    assert len(panels) == 2
    lines = panels[0].get_lines()
    assert [np.asarray(line.get_ydata()).tolist() for line in lines] == [
        [99.0, 50.0]
    ] * 3
    looks = [(line.get_color(), line.get_linestyle()) for line in lines]
    assert len(set(looks)) == 3
    assert looks[1][0] == looks[2][0] != looks[0][0]


def test_the_command_measures_draws_and_does_not_measure_twice(
    table, tmp_path, capsys, monkeypatch
):
    workdir = Path(shutil.copytree(table, tmp_path / "table"))
    flags = ("--linf=8,255", "--num-steps=2", "--num-examples=20")
    assert helpers.main("curves", f"--workdir={workdir}", *flags) == 0
    assert "curves.png" in capsys.readouterr().out
    stored = json.loads((workdir / "curves.json").read_text())
    assert stored["runs"].keys() == {"st/seed0", "sam,rho=0.2/seed0"}
    assert [curve["radii"] for curve in stored["curves"]] == [[0.0, 8.0, 255.0]] * 2
    for name in ("curves.png", "curves.pdf"):
        assert (workdir / name).stat().st_size > 1000
    measured = []
    monkeypatch.setattr(
        "samrobust.experiments.curves.measure_run",
        lambda *_, **__: measured.append(1) or {"linf": [0.0, 0.0, 0.0]},
    )
    assert helpers.main("curves", f"--workdir={workdir}", *flags) == 0
    assert measured == []
    again = json.loads((workdir / "curves.json").read_text())
    assert again["curves"] == stored["curves"]
    # Curves of another network are measured again, even if a run of the same identity
    # led to it.
    for count, field in enumerate(("identity", "network"), 1):
        content = read_sealed(workdir / "curves.json") or {}
        content["runs"]["st/seed0"][field] = "0" * 16
        write_sealed(workdir / "curves.json", content)
        assert helpers.main("curves", f"--workdir={workdir}", *flags) == 0
        assert len(measured) == count


def test_curves_that_are_damaged_or_of_other_settings_are_kept_aside(
    table, tmp_path, monkeypatch
):
    workdir = Path(shutil.copytree(table, tmp_path / "table"))
    monkeypatch.setattr(
        "samrobust.experiments.curves.measure_run",
        lambda *_, **__: {"linf": [50.0, 9.0]},
    )
    path = workdir / "curves.json"
    contents = ["{damaged", '{"settings": {}}']
    for content in contents:
        path.write_text(content)
        with pytest.warns(UserWarning, match=r"It is kept as curves\.json\.aside"):
            assert helpers.main("curves", f"--workdir={workdir}", "--linf=8") == 0
    aside = sorted(workdir.glob("curves.json.aside*"))
    assert [path.read_text() for path in aside] == contents
    content = read_sealed(path) or {}
    assert content["runs"]["st/seed0"]["num_images"] == 48
    assert content["title"].endswith("48 test images, last checkpoint")


def test_a_worker_with_other_settings_is_named_and_nothing_of_it_overwritten(
    table, tmp_path, monkeypatch, capsys
):
    workdir = Path(shutil.copytree(table, tmp_path / "table"))
    path, flags = workdir / "curves.json", (f"--workdir={workdir}", "--linf=8")

    def measure(*_, **__):
        write_sealed(path, {"settings": {"num_steps": 50}, "runs": {}})
        return {"linf": [50.0, 9.0]}

    monkeypatch.setattr("samrobust.experiments.curves.measure_run", measure)
    assert helpers.main("curves", *flags) != 0
    assert "curves.json of other ones, which another worker" in capsys.readouterr().err
    assert (read_sealed(path) or {})["settings"] == {"num_steps": 50}
    assert not list(workdir.glob("curves.json.aside*"))


def test_a_radius_that_holds_all_images_is_refused_before_any_attack(
    table, tmp_path, monkeypatch, capsys
):
    workdir = Path(shutil.copytree(table, tmp_path / "table"))
    monkeypatch.setattr("samrobust.experiments.curves.measure_run", None)
    assert helpers.main("curves", f"--workdir={workdir}", "--l2=64,2041") == 2
    assert "Expected --l2 <= 2040, the diagonal of" in capsys.readouterr().err
    assert not (workdir / "curves.json").exists()


@pytest.mark.parametrize(("radius", "largest"), [(128.0, 256.0), (1500.0, 2040.0)])
def test_a_curve_goes_to_twice_the_tables_radius_as_far_as_images_do(radius, largest):
    config = helpers.make_config("st", {"evaluation.l2": (radius,)})
    arguments = cli._parse(["curves", "--workdir=none"])
    radii = curves_command._settings(config, arguments).radii
    assert (max(radii["l2"]), len(radii["l2"])) == (largest, 8)
    assert max(radii["linf"]) == 32


def test_rows_are_named_as_in_table(table, tmp_path, monkeypatch):
    workdir = Path(shutil.copytree(table, tmp_path / "table"))
    (tmp_path / "mine.py").write_text('MINE = ["sam,rho=0.2"]\n')
    measured = []
    monkeypatch.setattr(
        "samrobust.experiments.curves.measure_run",
        lambda *_, **__: measured.append(1) or {"linf": [50.0, 9.0]},
    )
    for rows in (f"{tmp_path}/mine.py:MINE", f" st ; {tmp_path}/mine.py:MINE;"):
        flags = ("--linf=8", f"--rows={rows}")
        assert helpers.main("curves", f"--workdir={workdir}", *flags) == 0
    stored = json.loads((workdir / "curves.json").read_text())["runs"]
    assert list(stored) == ["sam,rho=0.2/seed0", "st/seed0"]
    assert len(measured) == 2


def test_a_directory_without_finished_runs_is_refused(tmp_path, capsys):
    assert helpers.main("curves", f"--workdir={tmp_path}") == 2
    assert "Expected finished runs" in capsys.readouterr().err
