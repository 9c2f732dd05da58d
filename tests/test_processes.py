"""One process or several: the same numbers.

Real processes that meet over loopback and run this file as a script. How they end is
tested in `test_processes_end.py`.
"""

import contextlib
import json
import pathlib
import sys

import helpers
import jax
import pytest

from samrobust.experiments.networks import load_network
from samrobust.experiments.run import run, train
from samrobust.experiments.scoring import Scorer
from samrobust.experiments.workdir import OtherConfigError
from samrobust.system import distributed
from samrobust.training import InterruptedRunError

SAM, AT = "sam,rho=0.2", "at,norm=linf,eps=16"
# Sums over a batch are taken in another order, and BatchNorm and the steps of PGD
# make the differences grow; over 12 steps they stay far below this.
TOLERANCE = 1e-4
# Of a run in which no image's gradient comes so near 0 that rounding decides its sign:
# then whole pixels of PGD's images differ.
SEED = {"seed": 1}
# Processes and devices of each. The first one is this process itself.
LAYOUTS = {"1x1": (1, 1), "1x2": (1, 2), "2x1": (2, 1), "2x2": (2, 2)}
SEVERAL = [layout for layout in LAYOUTS if layout != "1x1"]
ROWS = {layout: [AT] if layout == "2x2" else [SAM, AT] for layout in LAYOUTS}
VALIDATED = {"data.validation_size": 50, "evaluation.checkpoint": "best"}
# XLA splits sums over its threads, by default one a core but at least one a device: on
# one core 1x2 would have two threads and each process of 2x1 one.
THREADS = {"NPROC": "2"}
EARLY = {"evaluation.judge": "any", "evaluation.early_stop": True}


def work(folder: pathlib.Path, layout: str) -> None:
    """What every process of a layout does."""
    for row in ROWS[layout]:
        uneven = {"evaluation.batch_size": 13, **(VALIDATED if row == SAM else {})}
        config = helpers.make_config(row, uneven | SEED)
        dataset = helpers.load_data(config)
        run(config, folder / layout / row, helpers.Silent(), dataset=dataset)
    if layout == "2x1":
        move(folder / "1x1 to 2x1")
        start_to_move(folder / "2x1 to 1x1")
        come_again(folder / layout / AT)
    if layout == "1x2":
        return
    config = helpers.make_config(AT, EARLY | SEED)
    dataset = helpers.load_data(config)
    workdir = folder / layout / AT
    network = load_network(config, dataset, workdir, "last")
    accuracy = Scorer(config, dataset)(
        network, workdir, helpers.Silent().on_batch
    ).accuracy
    values = distributed.broadcast_from_primary(lambda: {"who": 0, "layout": layout})
    assert values == {"who": 0, "layout": layout}
    try:
        distributed.broadcast_from_primary(lambda: 1 // 0)
    except ZeroDivisionError as error:
        assert distributed.is_shared(error) == (jax.process_count() > 1)  # noqa: PT017
    if distributed.is_primary():
        (folder / layout / "early.json").write_text(json.dumps(accuracy))


def come_again(workdir: pathlib.Path) -> None:
    """What process 0 alone reads, of a finished run, is returned or raised in all."""
    config = helpers.make_config(AT, {"evaluation.batch_size": 13} | SEED)
    dataset = helpers.load_data(config)
    result = run(config, workdir, helpers.Silent(), dataset=dataset)
    stored = json.loads((workdir / "result.json").read_text())
    assert result["accuracy"] == stored["accuracy"]
    other = helpers.make_config(AT, {"training.momentum": 0.5} | SEED)
    try:
        run(other, workdir, helpers.Silent(), dataset=dataset)
    except OtherConfigError as error:
        assert "training.momentum was 0.9, is 0.5" in str(error)  # noqa: PT017
    else:
        raise AssertionError


def start_to_move(workdir: pathlib.Path) -> None:
    """The first steps of a run that will go on elsewhere."""
    config = helpers.make_config(SAM)
    answers = iter([False] * 4)
    with contextlib.suppress(InterruptedRunError):
        train(
            config,
            helpers.load_data(config),
            workdir,
            should_stop=lambda: next(answers, True),
        )


def move(workdir: pathlib.Path) -> None:
    """The rest of it."""
    config = helpers.make_config(SAM)
    train(config, helpers.load_data(config), workdir)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> pathlib.Path:
    """The runs in all layouts."""
    folder = tmp_path_factory.mktemp("processes")
    start_to_move(folder / "1x1 to 2x1")
    work(folder, "1x1")
    for layout, (count, devices) in LAYOUTS.items():
        if layout == "1x1":
            continue
        outcomes = helpers.finish_group(
            helpers.start_group(
                [[sys.executable, "-W", "error", __file__, str(folder), layout]]
                * count,
                devices=devices,
                **THREADS,
            )
        )
        for code, _, errors in outcomes:
            assert code == 0, errors
    move(folder / "2x1 to 1x1")
    return folder


def assert_equal_runs(workdir: pathlib.Path, expected: pathlib.Path) -> None:
    helpers.assert_equal_runs(workdir, expected, tolerance=TOLERANCE)


def result_of(folder: pathlib.Path, layout: str, row: str) -> dict:
    return json.loads((folder / layout / row / "result.json").read_text())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("layout", "row"),
    [(layout, row) for layout in SEVERAL for row in ROWS[layout] if row != SAM],
)
def test_every_layout_trains_to_the_same_numbers(folder, layout, row):
    assert_equal_runs(folder / layout / row, folder / "1x1" / row)


@pytest.mark.parametrize("which", ["last", "best"])
@pytest.mark.parametrize("row", [SAM, AT])
def test_two_processes_end_bit_identical_to_two_devices_of_one(folder, row, which):
    if which == "best" and row != SAM:
        pytest.skip("this row keeps no best checkpoint")
    one, two = (
        helpers.read_checkpoint(folder / layout / row, which)
        for layout in ("1x2", "2x1")
    )
    assert len(one) > 20
    helpers.assert_same_bits(two, one)
    assert helpers.log_of(folder / "2x1" / row) == helpers.log_of(folder / "1x2" / row)


@pytest.mark.parametrize(
    ("layout", "row"), [(layout, row) for layout in SEVERAL for row in ROWS[layout]]
)
def test_every_layout_measures_the_same_accuracies(folder, layout, row):
    """But for one of the 48 images, which may lie on the border of its class."""
    result, expected = (result_of(folder, name, row) for name in (layout, "1x1"))
    assert result["accuracy"] == pytest.approx(expected["accuracy"], abs=100.1 / 48)
    count, devices = LAYOUTS[layout]
    provenance = result["provenance"]
    assert provenance["num_processes"] == count
    assert provenance["num_devices"] == count * devices


@pytest.mark.parametrize("layout", ["2x1", "2x2"])  # 1x4: test_parallel
def test_evaluation_with_early_stop_too(folder, layout):
    accuracy, expected = (
        json.loads((folder / name / "early.json").read_text())
        for name in (layout, "1x1")
    )
    assert accuracy == pytest.approx(expected, abs=100.1 / 48)


@pytest.mark.parametrize("way", ["1x1 to 2x1", "2x1 to 1x1"])
def test_a_run_moves_to_another_number_of_processes(folder, way):
    config = helpers.make_config(SAM)
    train(config, helpers.load_data(config), folder / "unmoved")
    assert_equal_runs(folder / way, folder / "unmoved")


if __name__ == "__main__":
    distributed.join(lambda: False)
    work(pathlib.Path(sys.argv[1]), sys.argv[2])
    distributed.shut_down()
