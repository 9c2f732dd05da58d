"""Sanity checks: each warns of the very defect it looks for, and of nothing else."""

import functools
import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import flax.linen as nn
import helpers
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from rich.console import Console

from samrobust.attacks import fgsm, l2, linf
from samrobust.data import Split, load_dataset
from samrobust.evaluation import measure as measuring
from samrobust.evaluation.diagnostics import (
    PASSED,
    UNDECIDED,
    WARNING,
    Effort,
    Finding,
    Surrogate,
    allowance,
    checks,
    measures,
    run_sanity,
    some_of,
    to_json,
    to_sheet,
    verdicts,
    write_report,
)
from samrobust.evaluation.diagnostics.finding import is_mostly
from samrobust.experiments.run import run
from samrobust.experiments.scoring import until_stopped
from samrobust.models import PreActResNet
from samrobust.system.files import read_sealed
from samrobust.training import InterruptedRunError

KEY = jax.random.key(5)
EFFORT = Effort(apgd_steps=40, queries=300, restart_steps=10, radii=2)
LINF, L2 = "linf 24/255", "l2 128/255"
BALLS = {LINF: linf(24 / 255), L2: l2(128 / 255)}
ON_NETWORK = {"logits", "zero gradients", "randomness"}
ON_BALL = {
    *("steps", "restarts", "radius", "square", "transfer", "logit scale"),
    *("low precision", "noise", "finite logits"),
}


# The gray values that the images are rounded to, if any; a factor of the logits; and
# what is added to them, before they are rounded, and taken off again.
NO_DEFECTS = {"levels": 0.0, "factor": 1.0, "offset": 0.0}


class Network(nn.Module):
    """A perceptron, and the defects it can be given without being trained anew.

    Those that are numbers are variables: the same programs look at all of them.

    Attributes:
      softmax: the outputs are probabilities.
      noise: standard deviation of noise on the images, fresh in every pass.
      dtype: the logits are rounded to it.
    """

    softmax: bool = False
    noise: float = 0.0
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, images, *, train):
        del train
        levels, factor, offset = (
            self.variable("defects", name, lambda value=value: value).value
            for name, value in NO_DEFECTS.items()
        )
        rounded = jnp.round(images * levels) / jnp.maximum(levels, 1)
        images = jnp.where(levels > 0, rounded, images)
        if self.noise:
            draw = jax.random.normal(self.make_rng("noise"), images.shape)
            images = images + self.noise * draw
        hidden = nn.relu(nn.Dense(64)(images.reshape(len(images), -1)))
        logits = nn.Dense(10)(hidden) * factor
        logits = jax.nn.softmax(logits) if self.softmax else logits
        bits = jnp.finfo(self.dtype)
        # A cast to and fro would do, but XLA may leave that out.
        shifted = jax.lax.reduce_precision(logits + offset, bits.nexp, bits.nmant)
        return shifted - offset


PLAIN: Any = Network()
SOFTMAX: Any = Network(softmax=True)
RANDOM: Any = Network(noise=0.1)


@functools.cache
def digits():
    return load_dataset("digits")


@jax.jit
def train(key):
    """The parameters of a network that classifies digits."""
    split, model = digits().train, Network()
    images = jnp.asarray(split.images, jnp.float32) / 255
    tx = optax.adam(3e-3)

    def loss(params):
        logits: Any = model.apply(with_defects(params), images, train=False)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, split.labels)
        return jnp.mean(losses)

    def step(carry, _):
        params, state = carry
        updates, state = tx.update(jax.grad(loss)(params), state, params)
        return (optax.apply_updates(params, updates), state), None

    params = model.init(key, images[:1], train=False)["params"]
    return jax.lax.scan(step, (params, tx.init(params)), None, 250)[0][0]


def with_defects(params, **defects) -> Any:
    """The variables of a network, without a defect unless it is named."""
    assert defects.keys() <= NO_DEFECTS.keys()
    values = {name: np.float32(x) for name, x in (NO_DEFECTS | defects).items()}
    return {"params": params, "defects": values}


@functools.cache
def trained(seed: int = 0) -> Any:
    return with_defects(train(jax.random.key(seed)))


def look(
    *,
    surrogate=False,
    effort=EFFORT,
    balls=(LINF,),
    on_batch=None,
    model: Any = PLAIN,
    **defects,
) -> dict[tuple, Finding]:
    """The findings on a network with some defects, by check and ball."""
    transfer = {"plain": Surrogate(Network(), trained(1))} if surrogate else None
    numbers = itertools.count()

    def make_once(*arguments, **options):
        """One look is the same measurements as the next, in the same order."""
        key = model, surrogate, effort, balls, next(numbers)
        if key not in PROGRAMS:
            PROGRAMS[key] = measuring.make_measure(*arguments, **options)
        return PROGRAMS[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checks, "make_measure", make_once)
        found = run_sanity(
            *(model, with_defects(trained()["params"], **defects)),
            *(digits().test, {ball: BALLS[ball] for ball in balls}),
            transfer=transfer,
            num_examples=150,
            batch_size=75,
            effort=effort,
            key=KEY,
            on_batch=on_batch or (lambda *_: None),
        )
    return {(f.check, f.ball): f for f in found}


PROGRAMS: dict[tuple, Any] = {}
findings = functools.cache(look)


def verdict(check: str, ball: str = "", **options: Any) -> str:
    return findings(**options)[check, ball].verdict


# A network without a defect.


@pytest.mark.parametrize("ball", BALLS)
def test_a_plain_network_passes_every_check(ball):
    found = findings(surrogate=True, balls=(ball,))
    assert [f.text for f in found.values() if f.verdict != PASSED] == []
    expected = {(check, "") for check in ON_NETWORK}
    assert found.keys() == expected | {(check, ball) for check in ON_BALL}


def test_a_plain_network_is_not_robust_and_the_numbers_say_so():
    values = findings(surrogate=True)["steps", LINF].values
    assert values["accuracy"]["1"] > values["accuracy"]["100"] + 20


# Probabilities instead of logits.


def test_a_network_that_ends_in_a_softmax_is_exposed():
    found = findings(model=SOFTMAX, balls=())["logits", ""]
    assert (found.verdict, found.values["normalized"]) == (WARNING, 150)
    assert "Leave the softmax out" in found.text


# Masked gradients: gray values in steps.


@pytest.mark.parametrize("check", ["square", "transfer", "steps", "radius", "noise"])
def test_steps_in_the_input_are_exposed(check):
    assert verdict(check, LINF, surrogate=True, levels=16) == WARNING


def test_what_gradients_cannot_break_square_breaks():
    values = findings(surrogate=True, levels=16)["square", LINF].values
    assert values["accuracy_white_box"] > 60
    assert values["accuracy"] < values["accuracy_white_box"] - 20
    assert values["broken_by_it_alone"] > values["allowed"]


def test_a_flat_network_has_no_gradient_of_either_loss():
    found = findings(surrogate=True, levels=16)["zero gradients", ""]
    assert found.verdict == WARNING
    assert found.values["zero_margin"] == found.values["images"] > 100
    assert "masked" in found.text


# Large logits.


def test_a_saturated_loss_is_told_from_a_flat_network():
    found = findings(surrogate=True, factor=1e4)["zero gradients", ""]
    assert found.verdict == WARNING
    assert found.values["zero_cross_entropy"] > 100
    assert found.values["zero_margin"] == 0
    assert "saturated" in found.text


def test_large_logits_are_exposed_by_rescaling():
    assert verdict("logit scale", LINF, surrogate=True, factor=1e4) == WARNING


def test_large_logits_do_not_hide_from_a_loss_without_scale():
    assert verdict("square", LINF, surrogate=True, factor=1e4) == PASSED


# Attacks that are too weak.


QUICK: dict[str, Any] = {
    "apgd_steps": 2,
    "queries": 2,
    "restart_steps": 2,
    "radii": 2,
    "draws": 1,
}
# In whose low precision nothing changes.
WEAK: dict[str, Any] = {
    "effort": Effort(**QUICK | {"restart_steps": 1}, restarts=(1, 60), steps=(1, 2)),
    "model": Network(dtype=jnp.bfloat16),
}


def test_where_breaking_is_luck_more_restarts_break_more():
    assert verdict("restarts", LINF, **WEAK) == WARNING


def test_too_few_steps_are_found_out():
    assert verdict("steps", LINF, **WEAK) == WARNING


# Randomness and precision.


def test_noise_in_the_forward_pass_is_found_out():
    found = findings(model=RANDOM, balls=())["randomness", ""]
    assert found.verdict == WARNING
    assert found.values["changed"] > 0
    assert 'version="rand"' in found.text


@pytest.mark.parametrize(
    "judge",
    [
        lambda none: verdicts.judge_square(none, none, 100),
        lambda none: verdicts.judge_transfer(none, {"other": none}),
        lambda none: verdicts.judge_noise(none, none, (np.zeros(9), np.zeros(9)), 3),
        lambda none: verdicts.judge_logit_scale(none, none, np.ones(9)),
        lambda none: verdicts.judge_steps(
            (1, 2), np.stack([none] * 2, 1), np.ones([9, 2])
        ),
        lambda none: verdicts.judge_restarts((1, 2), np.stack([none] * 2, 1)),
        lambda none: verdicts.judge_radii({1.0: none, 255.0: none}),
    ],
)
def test_where_no_image_is_left_nothing_is_decided(judge):
    assert judge(np.zeros(9, bool)).verdict == UNDECIDED


def test_a_class_that_is_ruled_out_by_minus_infinity_is_no_randomness():
    logits = np.array([[2.0, -np.inf], [1.0, 0.0]])
    found = verdicts.judge_randomness(logits, logits)
    assert found.verdict == PASSED
    assert found.values["largest_logit"] == 2
    other = verdicts.judge_randomness(logits, logits[::-1])
    assert other.verdict == WARNING
    stands = np.ones(4, bool)
    scale = verdicts.judge_logit_scale(stands, stands, np.full(4, -np.inf))
    for finding in (found, other, scale):
        assert all(np.isfinite(value) for value in finding.values.values())


def test_logits_that_low_precision_rounds_away_are_found_out():
    found = findings(offset=4e4, **WEAK)
    assert found["low precision", LINF].verdict == WARNING
    assert found["low precision", LINF].values["changed"] > 7


def test_low_precision_that_changes_nothing_passes():
    found = findings(**WEAK)["low precision", LINF]
    assert found.verdict == PASSED
    assert found.values["dtype"] == "bfloat16"


class Dense(nn.Module):
    """A layer that names a precision of its own, and no dtype of the network."""

    options: Any

    @nn.compact
    def __call__(self, images, *, train):
        del train
        return nn.Dense(3, **dict(self.options))(images.reshape(len(images), -1))


@pytest.mark.parametrize(
    ("options", "precision", "expected"),
    [
        ({}, "float32", PASSED),
        ({"precision": "highest"}, "float32", PASSED),
        ({"precision": "default"}, "float32 rounded", UNDECIDED),
        ({"precision": "high"}, "float32 rounded", UNDECIDED),
        ({"dtype": jnp.bfloat16}, "bfloat16", UNDECIDED),
    ],
)
def test_what_the_products_of_a_network_are_taken_in_is_looked_up(
    options, precision, expected
):
    model = Dense(tuple(options.items()))
    variables = helpers.draw_variables(model, (2, 2, 1))
    products = measures.count_products(model, variables, (2, 2, 1))
    assert products == {precision: 1}
    found = verdicts.judge_products("float32", products)
    assert (found.verdict, found.values["products"]) == (expected, products)


def test_the_products_of_our_networks_keep_their_precision():
    model = PreActResNet(width=2, blocks=(1,))
    variables = helpers.draw_variables(model, (8, 8, 1))
    assert measures.count_products(model, variables, (8, 8, 1)).keys() == {"float32"}
    coarse = model.clone(dtype=jnp.bfloat16)
    assert "bfloat16" in measures.count_products(coarse, variables, (8, 8, 1))


def test_what_a_random_network_draws_does_not_depend_on_the_batch():
    model, variables, (images, _) = RANDOM, trained(), make_images(6)
    keys = jax.random.split(KEY, 6)

    def all_logits():
        return [
            measures.logits_of(model, variables, key)(shown)
            for shown, some in ((images, keys), (images[:2], keys[:2]))
            for key in (some, None)
        ]

    drawn, fixed, few_drawn, few_fixed = helpers.in_one_program(all_logits)
    np.testing.assert_allclose(few_drawn, drawn[:2], rtol=1e-5)
    np.testing.assert_allclose(few_fixed, fixed[:2], rtol=1e-5)
    assert np.any(drawn != fixed)


def test_a_random_network_is_attacked_and_judged_under_one_draw():
    """Whatever the keys that attacks draw by."""
    model, variables, (images, labels) = RANDOM, trained(), make_images(6)
    seen = []

    def attack(logits_fn, images, labels, *, key):
        del labels, key
        seen.append(logits_fn(images))
        seen.append(jax.grad(lambda x: jnp.sum(logits_fn(x)[:, 0]))(images))
        return images

    @jax.jit
    def attacked(key):
        crafts, keys = {"own": measures.Craft(attack, model)}, jax.random.split(key, 6)
        measure = measures.measure_crafts(model, crafts)
        measured = measure({"": variables}, images, labels, key=keys)
        return measured, list(seen)

    helpers.assert_same_bits(attacked(KEY), attacked(jax.random.key(6)))


def make_images(count):
    split = digits().test
    images = split.images[:count] / np.float32(255)
    return jnp.asarray(images), jnp.asarray(split.labels[:count])


# Logits that are not finite.


class Brittle:
    """A root of what may become negative."""

    def apply(self, variables, images, train):
        del variables, train
        bright = jnp.mean(images, axis=(1, 2, 3))
        return jnp.stack([jnp.sqrt(0.5 - bright), bright], axis=-1)


def test_images_without_finite_logits_count_as_wrong_and_are_reported():
    model: Any = Brittle()

    def brighten(logits_fn, images, labels, *, key):
        del logits_fn, labels, key
        return images + 0.2

    crafts = {"brighten": measures.Craft(brighten, model)}
    measure = jax.jit(measures.measure_crafts(model, crafts))
    images = jnp.asarray(np.reshape([0.1, 0.4], [2, 1, 1, 1]))
    keys, labels = jax.random.split(KEY, 2), jnp.asarray(np.array([0, 0]))
    outcome = measure({"": {}}, images, labels, key=keys)
    assert outcome["brighten"].tolist() == [True, False]
    assert outcome["brighten finite"].tolist() == [True, False]
    found = verdicts.judge_finite({"brighten": np.array([True, False])})
    assert (found.verdict, found.values) == (WARNING, {"brighten": 1})
    assert "1 under brighten" in found.text


def test_a_network_of_nan_is_refused():
    variables = jax.tree.map(lambda leaf: np.nan * np.asarray(leaf), trained())
    with pytest.raises(ValueError, match="Expected a network with finite logits"):
        run_sanity(Network(), variables, digits().test, {}, num_examples=4, key=KEY)


# Transfer, and the images that are looked at.


def test_without_another_run_the_transfer_check_says_that_it_was_not_done():
    found = findings(**WEAK)["transfer", LINF]
    assert found.verdict == UNDECIDED
    assert "Not done" in found.text


def test_the_images_are_spread_evenly_and_at_random_over_the_split():
    """Every second image of a split where two classes alternate would be of one."""
    split = Split(np.zeros([100, 1, 1, 1], np.uint8), np.arange(100))
    chosen = some_of(split, 50).labels
    assert (chosen // 2).tolist() == list(range(50))
    assert 15 < (chosen % 2).sum() < 35
    assert some_of(split, 100).labels.tolist() == split.labels.tolist()


def test_the_same_key_gives_the_same_findings_and_progress_reaches_its_end(monkeypatch):
    """In equal steps."""
    monkeypatch.setattr(measuring, "_SECONDS_UNTOLD", 1e9)
    reports: list[tuple[int, int]] = []
    again = look(**WEAK, on_batch=lambda *report: reports.append(report))
    assert again == findings(**WEAK)
    (total,) = {total for _, total in reports}
    assert [done for done, _ in reports] == list(range(75, total + 1, 75))


def test_a_stop_is_heard_after_a_batch():
    stop = until_stopped(lambda *_: None, lambda: True, "during the sanity checks")
    with pytest.raises(InterruptedRunError, match="sanity checks"):
        run_sanity(
            *(Network(), trained(), digits().test, BALLS),
            num_examples=20,
            key=KEY,
            on_batch=stop,
        )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_examples": 0}, "Expected num_examples >= 1, got num_examples=0"),
        ({"balls": {"linf 0/255": linf(0.0)}}, "Expected balls of radius > 0"),
        (
            {"split": Split(np.zeros([0, 8, 8, 1], np.uint8), np.zeros(0, np.int32))},
            "a split with examples",
        ),
        ({"transfer": {"": Surrogate(Network(), {})}}, "names for the networks"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(change, message):
    options = {"split": digits().test, "balls": BALLS, "key": KEY, **change}
    with pytest.raises(ValueError, match=message):
        run_sanity(Network(), trained(), **options)


@pytest.mark.parametrize("change", [{"steps": (10,)}, {"restarts": (5, 1)}])
def test_efforts_without_a_curve_are_refused(change):
    with pytest.raises(ValueError, match="two or more rising numbers"):
        Effort(**change)


# The rule, and the verdicts on made-up outcomes.


def test_the_allowance_is_what_luck_shows_once_in_a_hundred_samples():
    counts = np.random.default_rng(0).binomial(256, 0.01, 100_000)
    assert np.mean(counts > allowance(256)) < 0.01 < np.mean(counts >= allowance(256))


def test_most_needs_more_than_a_coin_shows():
    heads = np.random.default_rng(0).binomial(100, 0.5, 20_000)
    assert np.mean([is_mostly(int(h), 100) for h in np.unique(heads)]) < 0.5
    is_most = np.array([is_mostly(number, 100) for number in range(101)])
    assert np.mean(is_most[heads]) < 0.01


def standing(count: int, total: int = 256) -> np.ndarray:
    """The first `count` of all images."""
    return np.arange(total) < count


@pytest.mark.parametrize(("extra", "expected"), [(7, PASSED), (8, WARNING)])
def test_a_black_box_may_break_as_many_as_are_allowed_and_no_more(extra, expected):
    found = verdicts.judge_square(standing(100), standing(100 - extra), 1000)
    assert found.verdict == expected
    assert found.values["broken_by_it_alone"] == extra


@pytest.mark.parametrize(
    ("counts", "expected"),
    [((200, 90, 0), PASSED), ((200, 90, 8), WARNING), ((90, 98, 0), WARNING)],
)
def test_accuracy_must_fall_to_zero_and_never_rise_with_the_radius(counts, expected):
    radii = dict(zip((8.0, 64.0, 255.0), map(standing, counts), strict=True))
    assert verdicts.judge_radii(radii).verdict == expected


def test_a_small_radius_at_which_nothing_breaks_is_no_defect():
    """The loss climbs all the same."""
    steps = np.stack([standing(250)] * 3, axis=1)
    climbing = np.tile(np.array([-5.0, -4.0, -4.0]), (256, 1))
    assert verdicts.judge_steps((1, 10, 50), steps, climbing).verdict == PASSED
    still = np.full_like(climbing, -5.0)
    assert verdicts.judge_steps((1, 10, 50), steps, still).verdict == WARNING


@pytest.mark.parametrize(("both", "verdict"), [(6, PASSED), (7, PASSED), (12, WARNING)])
def test_a_finding_is_no_warning_where_too_few_images_could_show_better(both, verdict):
    """All of 6 or 7 come nearer to a mistake, and 6 of 12."""
    left = standing(both, total=50)
    under_attack = np.where(np.arange(50) < (both if both < 12 else 6), 0.0, -2.0)
    found = verdicts.judge_noise(left, left, (under_attack, np.full(50, -1.0)), 3)
    assert found.verdict == verdict


# The report.


def test_the_report_says_what_was_found_and_where_it_is_explained(tmp_path):
    found = [
        Finding("randomness", PASSED, "Nothing differs.", {"changed": 0}),
        Finding("square", WARNING, "Square breaks 90 | 100.", {"a": 1}, LINF),
    ]
    console = Console(width=100)
    with console.capture() as capture:
        console.print(to_sheet(found, "256 images.").to_rich())
    shown = capture.get()
    for text in ("docs/sanity.md#square", "1 warning", LINF, "256 images."):
        assert text in shown
    paths = write_report(found, tmp_path, note="256 images.", about={"seed": 3})
    assert [path.name for path in paths] == ["sanity.json", "sanity.md"]
    stored = read_sealed(paths[0]) or {}
    assert stored == to_json(found, seed=3)
    assert stored["verdicts"] == {PASSED: 1, WARNING: 1, UNDECIDED: 0}
    assert stored["findings"][1]["explained"] == "docs/sanity.md#square"
    cells = (
        "square | **warning** | Square breaks 90 \\| 100. See docs/sanity.md#square."
    )
    assert f"| {cells} |" in paths[1].read_text()


def test_every_check_is_explained_under_its_anchor():
    text = (helpers.ROOT / "docs" / "sanity.md").read_text()
    headings = {line.removeprefix("## ") for line in text.splitlines() if "## " in line}
    named = {name[0].upper() + name[1:] for name in ON_NETWORK | ON_BALL}
    assert named <= headings


# The command.

RUN = {
    "data.train_size": 320,
    "data.test_size": 60,
    "training.epochs": 2,
    "evaluation.linf": (8.0, 16.0),
    "evaluation.batch_size": 32,
}


@functools.cache
def finished() -> Path:
    """A run of standard training."""
    workdir = helpers.lasting_folder()
    config = helpers.make_config("st", RUN)
    run(config, workdir, helpers.Silent(), dataset=helpers.load_data(config))
    return workdir


def evaluate(workdir: Path, *flags: str) -> int:
    return helpers.main("evaluate", f"--workdir={workdir}", *flags)


@pytest.mark.usefixtures("programs_made_once")
def test_the_command_checks_a_run_and_writes_what_it_found(
    tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(checks, "Effort", functools.partial(Effort, **QUICK))
    # The strong attacks are those of the networks above; here one step will do.
    for strong in ("apgd", "square"):
        monkeypatch.setattr(checks.attacks, strong, lambda ball, **_: fgsm(ball))
    workdir = Path(shutil.copytree(finished(), tmp_path / "run"))
    flags = ("--sanity", f"--transfer-from={finished()}", "--sanity-examples=30")
    assert evaluate(workdir, *flags) == 0
    output = capsys.readouterr().out
    assert "30 of 60 images of the test set of digits, evenly spread" in output
    stored = json.loads((workdir / "sanity.json").read_text())
    by_check = {f["check"]: f for f in stored["findings"]}
    assert by_check.keys() == ON_NETWORK | ON_BALL
    assert {f["ball"] for f in stored["findings"]} == {"", "linf 16/255"}
    assert (stored["num_examples"], stored["seed"]) == (30, 0)
    # Images made on the same network are as good as its own.
    transfer = by_check["transfer"]["values"][str(finished())]
    assert transfer["broken_by_it_alone"] == 0
    assert transfer["accuracy"] == pytest.approx(transfer["accuracy_white_box"], abs=7)
    assert (workdir / "sanity.md").exists()
    assert len(helpers.read_lines(workdir / "evaluations.jsonl")) == 1


@pytest.mark.usefixtures("programs_made_once")
def test_a_surrogate_that_cannot_be_read_is_refused_before_the_evaluation(
    tmp_path, capsys
):
    workdir = Path(shutil.copytree(finished(), tmp_path / "run"))
    other = Path(shutil.copytree(finished(), tmp_path / "other"))
    shutil.rmtree(other / "checkpoints")
    assert evaluate(workdir, "--sanity", f"--transfer-from={other}") == 1
    assert str(other) in capsys.readouterr().err
    assert not (workdir / "evaluations.jsonl").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--transfer-from=."], "Expected --sanity with --transfer-from"),
        (["--sanity-examples=5"], "Expected --sanity with --transfer-from"),
        (["--sanity", "--sanity-examples=0"], "--sanity-examples: Expected 1 <= value"),
        (["--sanity", "--transfer-from=nowhere"], "with a config.json"),
        (["--sanity", "--norm=l2"], "a radius > 0 with --sanity"),
    ],
)
def test_flags_that_do_not_go_together_are_refused(flags, message, capsys):
    assert evaluate(finished(), *flags) == 2
    assert message in capsys.readouterr().err
    assert not (finished() / "sanity.json").exists()
