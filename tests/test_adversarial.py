"""The adversarial training family: what holds whatever the network is."""

import dataclasses
import functools
import inspect
from typing import Any

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

from samrobust.attacks import linf, pgd
from samrobust.attacks.losses import cross_entropy
from samrobust.experiments import building, methods
from samrobust.experiments.reporting.notes import overfitting_note
from samrobust.sharpness import awp, last_metrics, rwp, sam
from samrobust.training import Method, fit, make_train_step
from samrobust.training.adversaries.at import at
from samrobust.training.adversaries.cfa import cfa
from samrobust.training.adversaries.dynamic import dynamic, first_order_condition
from samrobust.training.adversaries.fgsm_rs import fgsm_rs
from samrobust.training.adversaries.free import free
from samrobust.training.adversaries.nfgsm import nfgsm
from samrobust.training.adversaries.radii import attack_passes
from samrobust.training.objectives.cfa_trades import cfa_trades
from samrobust.training.objectives.label_smoothing import label_smoothing
from samrobust.training.objectives.mart import mart, mart_loss
from samrobust.training.objectives.trades import trades
from samrobust.training.state import TrainState
from samrobust.training.step import metric_names

KEY = jax.random.key(0)
IMAGES = jax.random.uniform(jax.random.key(1), (6, 2, 2, 1), minval=0.3, maxval=0.7)
LABELS: Any = np.arange(6, dtype=np.int32) % 3


@functools.cache
def weights():
    with jax.ensure_compile_time_eval():
        hidden = jax.random.normal(jax.random.key(2), (4, 5))
        return hidden, jax.random.normal(jax.random.key(3), (5, 3))


def logits_fn(images):
    """A small smooth network."""
    hidden, head = weights()
    return jnp.tanh(3 * images.reshape(len(images), -1) @ hidden) @ head


def record(num_steps: int) -> Method:
    """A training that notes what each step is given, and learns nothing."""

    def init(key, images):
        del key, images
        notes = {"pixels": jnp.zeros([num_steps]), "draws": jnp.zeros([num_steps])}
        return TrainState(jnp.zeros([], jnp.int32), notes, {}, (), ())

    def step(state, images, labels, key):
        del labels
        # Other pixels, or the same ones at other places, have another sum.
        places = jnp.arange(images.size, dtype=jnp.float32).reshape(images.shape)
        noted = {"pixels": jnp.sum(images * places), "draws": jax.random.uniform(key)}
        notes = jax.tree.map(lambda n, x: n.at[state.step].set(x), state.params, noted)
        state = TrainState(state.step + 1, notes, {}, (), ())
        return state, dict.fromkeys(metric_names(state), jnp.zeros([]))

    return Method(init, step, lambda _, images: jnp.zeros([len(images), 10]))


def noted(replays: int, epochs: int, **options: Any) -> dict[str, np.ndarray]:
    options |= {"epochs": epochs, "batch_size": 4, "key": KEY, "flip": True}
    outcome = fit(record(2 * epochs), helpers.make_split(8), **options, replays=replays)
    return {name: np.asarray(note) for name, note in outcome.state.params.items()}


def dimmed(images, *, key):
    return images * jax.random.uniform(key, [len(images), 1, 1, 1])


@pytest.mark.parametrize("options", [{"padding": 2}, {"augment": dimmed}])
def test_a_batch_is_replayed_with_the_same_crop_and_other_random_numbers(options):
    plain, replayed = noted(1, epochs=2, **options), noted(3, epochs=4, **options)
    assert len(set(plain["pixels"])) == 4
    # The data of the first epoch in the steps of three, and two of the second's.
    expected = np.repeat(plain["pixels"], 3)[:8]
    np.testing.assert_array_equal(replayed["pixels"], expected)
    assert len(set(replayed["draws"])) == 8
    np.testing.assert_array_equal(replayed["draws"][:4], plain["draws"])


def test_incomplete_batches_are_not_replayed():
    message = r"training\.drop_remainder with replays, got .*False, replays=3"
    config = helpers.make_config("free,eps=16,m=3", {"training.drop_remainder": False})
    with pytest.raises(ValueError, match=message):
        building.make_plan(config, 33)
    assert building.make_plan(config, 64).replays == 3
    assert methods.replays(helpers.make_config("sam,rho=0.1")) == 1


def test_a_gradient_of_the_references_floor_takes_half_a_step_in_l2():
    """Its 1e-10 is of the mean over 128 examples: 128e-10 of each."""
    slope = np.zeros(4, np.float32)
    slope[1] = 2 * 128e-10  # of which cross entropy has half, where logits tie

    def faint(images):
        rise = (images.reshape(len(images), -1) - 0.5) @ slope
        return jnp.stack([jnp.zeros_like(rise), rise], -1)

    adversary = at("l2", 51.0, 25.5, num_steps=1, random_start=False)
    images, labels = jnp.full([1, 2, 2, 1], 0.5), jnp.zeros(1, jnp.int32)
    found, _ = adversary.perturb(faint, images, labels, (), key=KEY)
    np.testing.assert_allclose(jnp.ravel(found), [0.5, 0.55, 0.5, 0.5], atol=1e-6)
    for make in (trades, mart):
        default = inspect.signature(make).parameters["gradient_floor"].default
        assert default == 128e-10


def test_noise_may_reach_beyond_all_images():
    adversary = nfgsm(64.0, noise=10.0)
    made, _ = adversary.perturb(logits_fn, IMAGES, LABELS, (), key=KEY)
    assert (float(jnp.min(made)), float(jnp.max(made))) == (0.0, 1.0)


BATCH_NORMS = {
    "train": [
        lambda: at("linf", 8.0, 2.0),
        lambda: fgsm_rs(8.0),
        lambda: nfgsm(8.0),
        lambda: dynamic(8.0, **TIMES),
        lambda: cfa(8.0, **CALIBRATION),
    ],
    "eval": [
        lambda: trades("linf", 8.0, 6.0, 2.0)[0],
        lambda: mart("linf", 8.0, 6.0, 2.0)[0],
        lambda: cfa_trades(8.0, 6.0, **CALIBRATION)[0],
    ],
}


@pytest.mark.parametrize("mode", BATCH_NORMS)
def test_by_default_the_attacked_network_normalizes_as_in_the_authors_code(mode):
    for make in BATCH_NORMS[mode]:
        assert make().batch_norm == mode


def test_free_perturbations_stay_in_ball_and_box_and_belong_to_places():
    adversary, radius = free(64.0), np.float32(64 / 255)
    state = adversary.init(jnp.zeros([4, 2, 2, 1]))
    images = jnp.linspace(0, 1, 12).reshape(3, 2, 2, 1)
    labels, correct = jnp.zeros(3, jnp.int32), jnp.zeros(3, bool)
    for number in range(3):
        moved, state = adversary.perturb(
            lambda x: x.reshape(3, -1), images, labels, state, key=KEY
        )
        assert float(jnp.min(moved)) >= 0
        assert float(jnp.max(moved)) <= 1
        slope = jax.random.normal(jax.random.key(number), images.shape)
        assert adversary.learn is not None
        state = adversary.learn(state, moved, labels, slope, correct)
        assert 0 < float(jnp.max(jnp.abs(state))) <= radius
        images = jnp.flip(images)
    np.testing.assert_array_equal(state[3], 0.0)  # of no example so far


def dynamic_images(epoch=0, **options):
    adversary = dynamic(32.0, **options, steps_per_epoch=2, total_steps=12)
    images, following = jax.jit(
        lambda state: adversary.perturb(logits_fn, IMAGES, LABELS, state, key=KEY)
    )(jnp.int32(2 * epoch))
    assert int(following) == 2 * epoch + 1
    return np.asarray(images)


def pgd_images(num_steps):
    adversary = at("linf", 32.0, 8.0, num_steps=num_steps)
    made = jax.jit(
        lambda key: adversary.perturb(logits_fn, IMAGES, LABELS, (), key=key)[0]
    )
    return np.asarray(made(KEY))


def test_dynamic_training_is_pgd_without_a_bound_and_one_step_with_an_endless_one():
    np.testing.assert_array_equal(dynamic_images(c_max=0.0), pgd_images(10))
    np.testing.assert_array_equal(dynamic_images(c_max=1e6), pgd_images(1))
    # The bound falls to 0 at five sixths of six epochs.
    np.testing.assert_array_equal(dynamic_images(5, c_max=1e6), pgd_images(10))


def test_the_bound_of_dynamic_training_falls_linearly_from_epoch_to_epoch():
    """By a fifth of it in each of five epochs."""
    late, early = dynamic_images(4, c_max=0.25), dynamic_images(0, c_max=0.05)
    np.testing.assert_array_equal(late, early)
    assert np.any(late != pgd_images(10))


def test_an_example_stands_still_once_its_attack_has_converged():
    c_max, step = (
        0.05,
        jax.jit(jax.grad(lambda x: jnp.sum(cross_entropy(logits_fn(x), LABELS)))),
    )
    found = dynamic_images(c_max=c_max)
    free_running = [pgd_images(n) for n in range(1, 11)]
    expected = []
    for i in range(len(LABELS)):
        images = free_running[0]
        for images in free_running:
            gap = np.asarray(step(images), np.float64)[i]
            delta = np.asarray(images - IMAGES, np.float64)[i]
            fosc = 32 / 255 * np.abs(gap).sum() - (delta * gap).sum()
            if fosc <= c_max:
                break
        expected.append(images[i])
    np.testing.assert_array_equal(found, np.stack(expected))
    early = np.any(found != free_running[-1], axis=(1, 2, 3))
    assert 0 < early.sum() < len(early)


def test_the_condition_is_the_most_that_a_linear_loss_can_still_gain():
    gradients, delta = np.array([[2.0, -1.0, 0.5]]), np.array([[0.1, 0.3, -0.3]])
    corner = 0.3 * np.sign(gradients)
    expected = ((corner - delta) * gradients).sum(1)
    found = first_order_condition(jnp.asarray(gradients), jnp.asarray(delta), 0.3)
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    at_corner = first_order_condition(jnp.asarray(gradients), jnp.asarray(corner), 0.3)
    np.testing.assert_allclose(at_corner, 0.0, atol=1e-7)


def test_the_cyclic_schedule_is_that_of_torch():
    torch = pytest.importorskip("torch")
    config = helpers.make_config(
        "st", {"training.schedule": "cyclic", "training.learning_rate": 0.2}
    )
    schedule = building.learning_rate_schedule(config, 3)
    (weight,) = parameters = [torch.nn.Parameter(torch.zeros(1))]
    optimizer = torch.optim.SGD(parameters, 0.2)
    cyclic = torch.optim.lr_scheduler.CyclicLR(
        optimizer, base_lr=0, max_lr=0.2, step_size_up=6, step_size_down=6
    )
    for step in range(12):
        (rate,) = cyclic.get_last_lr()
        assert np.asarray(schedule(step)) == pytest.approx(rate, abs=1e-7)
        weight.grad = torch.zeros(1)
        optimizer.step()
        cyclic.step()


@pytest.mark.parametrize(
    ("row", "fields", "step", "num_steps"),
    [
        ("fgsm_rs,eps=16", {}, 4, 10),
        ("free,eps=16,m=2", {}, 4, 10),
        ("at,norm=linf,eps=16", {"attack.num_steps": 1}, 4, 10),
        ("at,norm=linf,eps=16", {"attack.num_steps": 2}, 4, 2),
        ("dynamic,eps=16", {"dynamic.num_steps": 3}, 4, 3),
        ("dynamic,eps=16", {"dynamic.num_steps": 3, "dynamic.alpha": 0.5}, 8, 3),
    ],
)
def test_held_out_images_are_attacked_as_in_training_or_where_that_is_one_step_in_ten(
    row, fields, step, num_steps
):
    config = helpers.make_config(row, fields)
    found = jax.jit(
        functools.partial(building.validation_attacks(config)["robust"], logits_fn)
    )(IMAGES, LABELS, key=KEY)
    usual = pgd(linf(16 / 255), step_size=step / 255, num_steps=num_steps)
    expected = jax.jit(functools.partial(usual, logits_fn))(IMAGES, LABELS, key=KEY)
    np.testing.assert_array_equal(found, expected)


def test_catastrophic_overfitting_is_said_with_its_epoch():
    def lines(*robust):
        return [
            {"epoch": i, "accuracy": 87.0, "validation_robust": r}
            for i, r in enumerate(robust, 1)
        ]

    assert overfitting_note(lines(30.0, 41.0, 21.5, 5.0)) == ""
    said = overfitting_note(lines(30.0, 41.0, 20.5, 41.0, 0.0))
    assert said.startswith(
        "Catastrophic overfitting in epoch 3: validation_robust fell"
    )
    assert (
        "from 41.0 to 20.5, accuracy under the attack of the training is 87.0" in said
    )
    assert overfitting_note([{"epoch": 1, "accuracy": 50.0}]) == ""


TIMES: Any = {"steps_per_epoch": 2, "total_steps": 8}
CALIBRATION: Any = {"begin": 0.3, "num_classes": 3, **TIMES}


def taught(adversary, answers):
    """The memory after steps in which these examples were right."""
    state = adversary.init(IMAGES)
    for correct in answers:
        state = adversary.learn(state, IMAGES, LABELS, IMAGES, jnp.array(correct))
    return state


def test_rates_are_those_of_the_classes_in_the_epoch_before():
    adversary = cfa(32.0, **CALIBRATION)
    answers = np.random.default_rng(0).random((5, 6)) < 0.5
    for num_steps, epoch in ((1, None), (3, answers[:2]), (5, answers[2:4])):
        rates = np.asarray(taught(adversary, answers[:num_steps]).rates)
        expected = np.zeros(3)
        if epoch is not None:
            expected = [epoch[:, k == LABELS].mean() for k in range(3)]
        np.testing.assert_allclose(rates, expected, rtol=1e-6)
    state = taught(adversary, answers)
    assert int(state.step) == 5
    np.testing.assert_array_equal(state.seen, [2, 2, 2])


def test_a_class_without_an_example_in_an_epoch_keeps_its_rate():
    adversary = cfa(32.0, **CALIBRATION)
    assert adversary.learn is not None
    state = taught(adversary, [[True] * 6, [True] * 3 + [False] * 3])
    np.testing.assert_allclose(state.rates, 0.75)
    for _ in range(2):  # of class 0 alone, and right
        labels, right = jnp.zeros(6, jnp.int32), jnp.ones(6, bool)
        state = adversary.learn(state, IMAGES, labels, IMAGES, right)
    np.testing.assert_allclose(state.rates, [1, 0.75, 0.75])


@pytest.mark.parametrize("num_classes", [2, 4])
def test_classes_that_are_not_the_networks_are_refused(num_classes):
    adversary = cfa(32.0, **{**CALIBRATION, "num_classes": num_classes})
    state = adversary.init(IMAGES)
    with pytest.raises(ValueError, match=r"^Expected num_classes=3, of the network's"):
        adversary.perturb(logits_fn, IMAGES, LABELS, state, key=KEY)


def test_no_class_is_attacked_by_its_rate_before_there_are_any():
    adversary = cfa(32.0, **{**CALIBRATION, "begin": 0.0})

    def length(num_steps):
        state = taught(adversary, [[True] * 6] * num_steps)
        made, _ = adversary.perturb(logits_fn, IMAGES, LABELS, state, key=KEY)
        return helpers.norms("linf", made - IMAGES) * 255

    np.testing.assert_allclose(length(0), 32, rtol=1e-5)
    np.testing.assert_allclose(length(2), 1.5 * 32, rtol=1e-5)


def test_each_class_is_attacked_as_far_as_its_rate_says_from_the_beginning_on():
    adversary = cfa(32.0, **CALIBRATION)
    answers = [
        [True, True, False, True, False, False]
    ] * 6  # of 0: 1, of 1: 1/2, of 2: 0

    def lengths(num_steps):
        state = taught(adversary, answers[:num_steps])
        made, _ = jax.jit(
            lambda s: adversary.perturb(logits_fn, IMAGES, LABELS, s, key=KEY)
        )(state)
        return helpers.norms("linf", made - IMAGES) * 255

    np.testing.assert_allclose(lengths(2), 32, rtol=1e-5)  # epoch 1 of 4: not yet
    expected = 32 * (0.5 + np.array([1, 0.5, 0] * 2))
    np.testing.assert_allclose(lengths(4), expected, rtol=1e-5)


def test_losses_are_weighed_by_what_the_adversary_remembers_of_each_class():
    adversary, objective = cfa_trades(32.0, 6.0, **CALIBRATION)
    state = taught(adversary, [[True] * 3 + [False] * 3] * 4)
    assert adversary.weigh is not None
    betas = adversary.weigh(state, LABELS)
    np.testing.assert_allclose(betas, 6 * (0.5 + 0.5), rtol=1e-6)
    seen = []

    def loss(natural, adversarial, again, labels, weights):
        del natural, adversarial, again
        seen.append(weights.shape)
        return weights * labels

    objective = objective._replace(loss=loss)
    for group_size in (0, 3):
        tx = optax.chain(sam(0.1, aux={}, grouped=group_size > 0), optax.sgd(0.1))
        options = {"adversary": adversary, "objective": objective}
        init, step = make_train_step(Linear(), tx, **options, group_size=group_size)
        start = dataclasses.replace(init(KEY, IMAGES), adversary=state)
        after, metrics = jax.jit(step)(start, IMAGES, LABELS, KEY)
        assert float(metrics["loss"]) == pytest.approx(6.0)
        assert int(after.adversary.step) == 5
    assert {shape[0] for shape in seen} == {6, 3}


def test_rwp_of_one_step_below_the_threshold_is_awp_on_one_weight_tensor():
    weights = {"kernel": jax.random.normal(KEY, (4, 3)), "bias": np.ones(3, "f4")}
    inputs = IMAGES.reshape(6, -1)

    def losses(params):
        return cross_entropy(inputs @ params["kernel"] + params["bias"][None], LABELS)

    gradient = jax.grad(lambda params: jnp.mean(losses(params)))

    @functools.partial(jax.jit, static_argnames=("tx", "loss_fn"))
    def updates(tx, **given):
        state = tx.init(weights)
        return tx.update(gradient(weights), state, weights, grad_fn=gradient, **given)

    (one, state), (other, _) = (
        updates(tx, loss_fn=losses) for tx in (rwp(0.5, 1e6, 1), awp(0.5))
    )
    helpers.assert_close(one, other, atol=1e-6)
    assert float(last_metrics(state)["applied_rho"]) > 0.1
    with pytest.raises(ValueError, match="loss_fn in the update, got loss_fn=None"):
        updates(rwp(0.5))


class Linear(nn.Module):
    """The least there is to train."""

    @nn.compact
    def __call__(self, images, *, train):
        del train
        return nn.Dense(3)(images.reshape(len(images), -1))


BAD = {
    "beta": (lambda: mart_loss(-1.0), "0 <= beta, got beta=-1"),
    "share": (lambda: label_smoothing(1.5), "alpha <= 1, got alpha=1.5"),
    "radius": (lambda: fgsm_rs(8 / 255), "epsilon=0.03.*did you mean 8"),
    "noise": (lambda: nfgsm(8.0, noise=-1.0), "0 <= noise, got noise=-1"),
    "bound": (lambda: dynamic(8.0, c_max=-1.0, **TIMES), "0 <= c_max, got c_max=-1"),
    "base": (lambda: cfa(8.0, base=-1.0, **CALIBRATION), "0 <= base, got base=-1"),
    "lambda": (
        lambda: cfa_trades(8.0, 6.0, base_beta=-1.0, **CALIBRATION),
        "0 <= base_beta, got",
    ),
    "steps of TRADES": (
        lambda: trades("linf", 8.0, 6.0, 2.0, num_steps=-1),
        "num_steps >= 0, got num_steps=-1",
    ),
    "steps of CFA": (
        lambda: cfa(8.0, **CALIBRATION | {"num_steps": 2.5}),
        "a whole number for num_steps, got num_steps=2.5",
    ),
    "classes": (
        lambda: cfa_trades(8.0, 6.0, **CALIBRATION | {"num_classes": 0}),
        "1 <= num_classes, got num_classes=0",
    ),
    "statistics of CFA": (
        lambda: cfa(8.0, batch_norm="off", **CALIBRATION),
        "batch_norm in .*, got batch_norm='off'",
    ),
    "statistics": (
        lambda: dynamic(8.0, batch_norm="off", **TIMES),
        "batch_norm in .*, got batch_norm='off'",
    ),
    "threshold": (lambda: rwp(0.1, -1.0), "0 <= threshold, got threshold=-1"),
    "groups": (lambda: rwp(0.1, grouped=True), "no groups of examples with rwp"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_a_method_cannot_mean_is_refused(name):
    make, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    "options",
    [
        {"num_steps": 3},
        {"num_steps": 1, "judge": "any"},
        {"num_steps": 3, "judge": "any"},
        {"num_steps": 3, "restarts": 2},
        {"num_steps": 1, "restarts": 4, "judge": "any"},
    ],
)
def test_the_cost_of_at_is_what_it_asks_of_the_network(options):
    """A forward or a backward pass is a third of a pass with weight gradients."""
    asked = []

    @jax.custom_vjp
    def pixels(images):
        jax.debug.callback(lambda: asked.append("forward"))
        return images

    def backward(_, gradients):
        jax.debug.callback(lambda: asked.append("backward"))
        return (gradients,)

    pixels.defvjp(lambda images: (pixels(images), None), backward)

    def logits_fn(images):
        return pixels(images).reshape(len(images), -1)

    adversary = at("linf", 8, step_size=2, **options)
    images, labels = jnp.full((2, 2, 2, 1), 0.5), jnp.zeros(2, jnp.int32)
    jax.jit(lambda key: adversary.perturb(logits_fn, images, labels, (), key=key))(
        jax.random.key(0)
    )
    jax.effects_barrier()
    assert len(asked) / 3 == pytest.approx(attack_passes(options))
