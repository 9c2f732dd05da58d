"""One training step, against the formulas written out by hand."""

import dataclasses
import functools
from typing import Any

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

from samrobust.attacks import cross_entropy, identity, linf, pgd
from samrobust.models import BatchNorm
from samrobust.sharpness import entropy_sgd, msam, sam
from samrobust.training import Adversary, TrainState, as_adversary, make_train_step
from samrobust.training.step import metric_names

LEARNING_RATE, MOMENTUM, WEIGHT_DECAY, RHO = 0.1, 0.9, 0.05, 0.3
BATCH_SIZE, NUM_STEPS = 8, 4
BN_MOMENTUM = 0.9  # share of the old running statistics that an update keeps
KEY = jax.random.key(0)


class Network(nn.Module):
    """Two layers and a batch normalization: compiles faster than a convolution."""

    @nn.compact
    def __call__(self, images, *, train):
        hidden = nn.Dense(16)(images.reshape(len(images), -1) - 0.5)
        hidden = nn.relu(BatchNorm()(hidden, train=train))
        return nn.Dense(10)(hidden)


model = Network()
variables = helpers.draw_variables(model, (8, 8, 1))


def make_tx(*sharpness: optax.GradientTransformationExtraArgs):
    return optax.chain(
        *sharpness,
        optax.add_decayed_weights(WEIGHT_DECAY),
        optax.sgd(LEARNING_RATE, momentum=MOMENTUM),
    )


def make_sam(rho: Any = RHO):
    return sam(rho, aux=variables["batch_stats"])


def make_state(tx) -> TrainState:
    state = TrainState(
        step=jnp.int32(0),
        params=variables["params"],
        batch_stats=variables["batch_stats"],
        opt_state=tx.init(variables["params"]),
    )
    return jax.tree.map(jnp.copy, state)  # may be donated


def make_batches(count=NUM_STEPS):
    split = helpers.make_split(count * BATCH_SIZE)
    images = (split.images / np.float32(255)).astype(np.float32)
    return [
        (jnp.asarray(images[i::count]), jnp.asarray(split.labels[i::count]))
        for i in range(count)
    ]


def noise(logits_fn, images, labels, *, key):
    """An attack that depends on the key alone."""
    del logits_fn, labels
    return jnp.clip(images + jax.random.uniform(key, images.shape) / 4, 0, 1)


def logits_and_stats(params, batch_stats, images):
    logits, updated = model.apply(
        {"params": params, "batch_stats": batch_stats},
        images,
        train=True,
        mutable=["batch_stats"],
    )
    return logits, updated["batch_stats"]


def mean_cross_entropy(params, images, labels):
    logits, _ = logits_and_stats(params, variables["batch_stats"], images)
    return -jnp.mean(jax.nn.log_softmax(logits)[jnp.arange(len(labels)), labels])


loss_and_gradient = jax.jit(jax.value_and_grad(mean_cross_entropy))


@jax.jit
def batch_statistics(params, images):
    """Mean and unbiased variance of every layer's inputs on one batch."""
    zeros = jax.tree.map(jnp.zeros_like, variables["batch_stats"])
    _, stats = logits_and_stats(params, zeros, images)
    return jax.tree.map(lambda x: x / (1 - BN_MOMENTUM), stats)


def moved_toward(old, new):
    return jax.tree.map(lambda o, n: BN_MOMENTUM * o + (1 - BN_MOMENTUM) * n, old, new)


def norm(tree) -> float:
    leaves = [np.asarray(leaf, np.float64).ravel() for leaf in jax.tree.leaves(tree)]
    return float(np.linalg.norm(np.concatenate(leaves)))


def perturbed(params, gradient, rho=RHO):
    scale = rho / norm(gradient)
    return jax.tree.map(lambda w, g: w + scale * g, params, gradient)


def descend_by_hand(batches, gradient_fn):
    """SGD with momentum and coupled weight decay, in NumPy."""
    params = jax.tree.map(np.asarray, variables["params"])
    velocity = jax.tree.map(np.zeros_like, params)
    history = []
    for images, labels in batches:
        gradient = gradient_fn(params, images, labels)
        velocity = jax.tree.map(
            lambda v, g, w: MOMENTUM * v + np.asarray(g) + WEIGHT_DECAY * w,
            velocity,
            gradient,
            params,
        )
        params = jax.tree.map(
            lambda w, v: np.asarray(w - LEARNING_RATE * v, np.float32), params, velocity
        )
        history.append(params)
    return history


@functools.cache
def trained(name: str):
    """States, metrics and traces of four jitted steps, by the name of the method."""
    choices: dict[str, tuple[tuple, dict[str, Any]]] = {
        "st": ((), {}),
        "sam(0)": ((sam(0.0, aux=variables["batch_stats"]),), {}),
        "radius 0": ((), {"attack": pgd(linf(0.0), step_size=0.1, num_steps=3)}),
        "sam": ((make_sam(),), {}),
        "sam, first": ((make_sam(),), {"batch_stats": "first"}),
        "sam, second": ((make_sam(),), {"batch_stats": "second"}),
        "sam, no radius": ((make_sam(lambda _: 0.0),), {"batch_stats": "first"}),
        "at": ((), {"attack": pgd(linf(0.1), step_size=0.05, num_steps=2)}),
    }
    transformations, options = choices[name]
    tx = make_tx(*transformations)
    traces = []
    chosen = options.pop("attack", identity)

    def attack(logits_fn, images, labels, *, key):
        traces.append(images.shape)
        return chosen(logits_fn, images, labels, key=key)

    step = make_train_step(model, tx, adversary=attack, **options).train_step
    step = jax.jit(step, donate_argnums=0)
    states, metrics = [], []
    state = make_state(tx)
    for i, (images, labels) in enumerate(make_batches()):
        state, last = step(state, images, labels, jax.random.fold_in(KEY, i))
        states.append(jax.tree.map(np.array, state))  # a copy: the next step donates
        metrics.append(jax.tree.map(float, last))
    return states, metrics, traces


def test_standard_training_is_sgd_with_momentum_and_coupled_weight_decay():
    def gradient_fn(params, images, labels):
        return loss_and_gradient(params, images, labels)[1]

    expected = descend_by_hand(make_batches(), gradient_fn)
    for state, params in zip(trained("st")[0], expected, strict=True):
        helpers.assert_close(state.params, params, atol=2e-6)


def test_sam_descends_by_the_gradient_at_the_perturbed_parameters():
    def gradient_fn(params, images, labels):
        gradient = loss_and_gradient(params, images, labels)[1]
        return loss_and_gradient(perturbed(params, gradient), images, labels)[1]

    expected = descend_by_hand(make_batches(), gradient_fn)
    for state, params in zip(trained("sam")[0], expected, strict=True):
        helpers.assert_close(state.params, params, atol=1e-5)


@pytest.mark.parametrize("name", ["sam(0)", "radius 0"])
def test_a_method_of_no_strength_is_standard_training_bit_for_bit(name):
    states, metrics, _ = trained(name)
    expected_states, expected_metrics, _ = trained("st")
    for state, expected in zip(states, expected_states, strict=True):
        helpers.assert_same_bits(state.params, expected.params)
        helpers.assert_same_bits(state.batch_stats, expected.batch_stats)
        helpers.assert_same_bits(
            jax.tree.leaves(state.opt_state), jax.tree.leaves(expected.opt_state)
        )
    assert metrics == expected_metrics


def test_a_schedule_of_rho_at_zero_is_standard_training():
    state, expected = trained("sam, no radius")[0][-1], trained("st")[0][-1]
    helpers.assert_close(state.params, expected.params, atol=1e-6)
    helpers.assert_close(state.batch_stats, expected.batch_stats, atol=1e-6)


@pytest.mark.parametrize("passes", ["first", "second", "both"])
def test_the_running_statistics_are_those_of_the_chosen_passes_of_sam(passes):
    images, labels = make_batches()[0]
    params, old = variables["params"], variables["batch_stats"]
    _, gradient = loss_and_gradient(params, images, labels)
    first = batch_statistics(params, images)
    second = batch_statistics(perturbed(params, gradient), images)
    expected = {
        "first": moved_toward(old, first),
        "second": moved_toward(old, second),
        "both": moved_toward(moved_toward(old, first), second),
    }
    name = "sam" if passes == "both" else f"sam, {passes}"
    batch_stats = trained(name)[0][0].batch_stats
    helpers.assert_close(batch_stats, expected[passes], atol=1e-6)
    for other in expected.keys() - {passes}:  # they differ: the choice is visible
        with pytest.raises(AssertionError):
            helpers.assert_close(batch_stats, expected[other], atol=1e-4)


@pytest.mark.parametrize("wrap", ["conditionally_transform", "apply_if_finite"])
def test_a_second_pass_that_the_optimizer_left_out_moves_no_statistics(wrap):
    """The statistics are those of the only pass: not what none has given yet."""
    images, labels = make_batches()[0]
    options: dict[str, Any] = {}
    if wrap == "apply_if_finite":
        tx = optax.apply_if_finite(make_tx(make_sam()), 5)
        options["objective"] = lambda z, y: jnp.nan * cross_entropy(z, y)
    else:
        never: Any = lambda step: step >= 100  # noqa: E731
        tx = make_tx(optax.conditionally_transform(make_sam(), never))
    step = jax.jit(make_train_step(model, tx, **options).train_step)
    state = make_state(tx)
    found, _ = step(state, images, labels, KEY)
    first = batch_statistics(state.params, images)
    expected = moved_toward(state.batch_stats, first)
    helpers.assert_close(found.batch_stats, expected, atol=1e-6)


def test_accumulation_of_gradients_is_given_what_the_step_gives():
    images, labels = make_batches()[0]
    tx: Any = optax.MultiSteps(entropy_sgd(0.1, 2, learning_rate=1.0), 2)
    method = make_train_step(model, tx)
    state = method.init(KEY, images)
    for _ in range(2):
        state, _ = method.train_step(state, images, labels, KEY)
    assert int(state.step) == 2


def test_which_pass_updates_the_statistics_does_not_touch_the_parameters():
    for first, second in zip(trained("sam")[0], trained("sam, first")[0], strict=True):
        helpers.assert_close(first.params, second.params, atol=1e-6)


class Recorder:
    """Stands in for the model and remembers the images of passes that train."""

    def __init__(self):
        self.images: list[Any] = []

    def apply(self, variables, images, **options):
        if "mutable" in options:
            self.images.append(images)
        return model.apply(variables, images, **options)


def test_both_passes_of_sam_see_the_images_that_were_crafted_once():
    crafted = []

    def attack(logits_fn, images, labels, *, key):
        crafted.append(noise(logits_fn, images, labels, key=key))
        return crafted[-1]

    recorder: Any = Recorder()
    tx = make_tx(make_sam())
    step = make_train_step(recorder, tx, adversary=attack).train_step

    @jax.jit
    def record(state, images, labels):
        step(state, images, labels, KEY)
        return crafted, recorder.images

    images, labels = make_batches(1)[0]
    (made,), seen = record(make_state(tx), images, labels)
    assert np.any(made != images)
    assert len(seen) == 2
    for of_pass in seen:
        np.testing.assert_array_equal(of_pass, made)


def step_that_records(logits, tx, mode):
    """A step that appends the logits of the network that it attacks."""

    def attack(logits_fn, images, labels, *, key):
        del labels, key
        logits.append(logits_fn(images))
        return images

    adversary = as_adversary(attack, batch_norm=mode)
    return make_train_step(model, tx, adversary=adversary).train_step


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_the_attacked_network_normalizes_as_it_is_told(mode):
    tx, logits = make_tx(), []
    step = step_that_records(logits, tx, mode)

    @jax.jit
    def record(state, images, labels):
        step(state, images, labels, KEY)
        by_batch, _ = logits_and_stats(state.params, state.batch_stats, images)
        return logits, by_batch, model.apply(variables, images, train=False)

    (found,), by_batch, by_running = record(make_state(tx), *make_batches(1)[0])
    expected = by_batch if mode == "train" else by_running
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert np.abs(by_batch - by_running).max() > 0.01


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_the_network_is_attacked_at_the_weights_that_the_gradient_is_taken_at(mode):
    tx, logits = msam(RHO, optax.sgd(LEARNING_RATE)), []
    step = step_that_records(logits, tx, mode)

    @jax.jit
    def record(state, images, labels):
        offset = jax.tree.map(lambda w: jnp.full_like(w, 0.1), state.params)
        opt_state = state.opt_state._replace(offset=offset)
        step(dataclasses.replace(state, opt_state=opt_state), images, labels, KEY)
        moved = jax.tree.map(jnp.add, state.params, offset)
        by_batch, _ = logits_and_stats(moved, state.batch_stats, images)
        network = {"params": moved, "batch_stats": state.batch_stats}
        return logits, by_batch, model.apply(network, images, train=False)

    (found,), by_batch, by_running = record(make_state(tx), *make_batches(1)[0])
    expected = by_batch if mode == "train" else by_running
    np.testing.assert_allclose(found, expected, atol=1e-6)


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_the_attack_leaves_the_running_statistics_alone(mode):
    adversarial = []

    def attack(logits_fn, images, labels, *, key):
        inner = pgd(linf(0.1), step_size=0.05, num_steps=2)
        adversarial.append(inner(logits_fn, images, labels, key=key))
        return adversarial[-1]

    tx = make_tx()
    step = make_train_step(
        model, tx, adversary=as_adversary(attack, batch_norm=mode)
    ).train_step

    @jax.jit
    def record(state, images, labels):
        return step(state, images, labels, KEY)[0], adversarial

    state, (made,) = record(make_state(tx), *make_batches(1)[0])
    expected = moved_toward(
        variables["batch_stats"], batch_statistics(variables["params"], made)
    )
    helpers.assert_close(state.batch_stats, expected, atol=1e-6)


def test_the_metrics_are_those_of_the_images_trained_on():
    tx = make_tx(make_sam())
    step = jax.jit(make_train_step(model, tx, adversary=noise).train_step)
    images, labels = make_batches(1)[0]
    _, metrics = step(make_state(tx), images, labels, KEY)
    crafted = noise(None, images, labels, key=KEY)
    params = variables["params"]
    loss, gradient = loss_and_gradient(params, crafted, labels)
    _, second = loss_and_gradient(perturbed(params, gradient), crafted, labels)
    logits, _ = jax.jit(logits_and_stats)(params, variables["batch_stats"], crafted)
    product = sum(
        float(np.vdot(a, b))
        for a, b in zip(jax.tree.leaves(gradient), jax.tree.leaves(second), strict=True)
    )
    expected = {
        "loss": float(loss),
        "accuracy": float(np.mean(np.argmax(logits, axis=-1) == labels)),
        "gradient_norm": norm(gradient),
        "perturbed_gradient_norm": norm(second),
        "rho": RHO,
        "applied_rho": RHO,
        "cosine": product / norm(gradient) / norm(second),
    }
    assert metrics.keys() == expected.keys() == set(metric_names(make_state(tx)))
    for name, value in expected.items():
        assert metrics[name].dtype == jnp.float32
        np.testing.assert_allclose(metrics[name], value, rtol=1e-5, err_msg=name)


def test_without_sam_there_are_no_metrics_of_sam():
    states, metrics, _ = trained("st")
    names = {"loss", "accuracy", "gradient_norm"}
    assert metrics[0].keys() == set(metric_names(states[0])) == names


@pytest.mark.parametrize("name", ["st", "sam", "at"])
def test_the_step_counts_and_keeps_structure_shapes_and_dtypes(name):
    states, _, _ = trained(name)
    assert [int(state.step) for state in states] == [1, 2, 3, 4]
    shapes = [
        jax.tree.map(lambda leaf: (leaf.shape, str(leaf.dtype)), state)
        for state in states
    ]
    assert all(shape == shapes[0] for shape in shapes)


def test_the_step_is_traced_once_and_makes_its_images_once():
    for name in ("st", "sam", "at"):
        assert len(trained(name)[2]) == 1


def test_the_key_decides_the_adversarial_images_and_nothing_else_is_random():
    tx = make_tx()
    step = jax.jit(make_train_step(model, tx, adversary=noise).train_step)
    images, labels = make_batches(1)[0]
    one, again, other = (
        step(make_state(tx), images, labels, jax.random.key(seed))[0]
        for seed in (1, 1, 2)
    )
    helpers.assert_same_bits(one, again)
    assert helpers.as_bits(one.params) != helpers.as_bits(other.params)


def test_adversarial_training_has_a_higher_loss_than_standard_training():
    assert trained("at")[1][0]["loss"] > trained("st")[1][0]["loss"]


def test_a_loop_on_the_device_takes_the_same_steps():
    """Equal to 1e-6: XLA orders sums otherwise inside a loop."""
    tx = make_tx(make_sam())
    step = make_train_step(model, tx).train_step
    batches = make_batches()
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *batches)
    keys = jnp.stack([jax.random.fold_in(KEY, i) for i in range(NUM_STEPS)])

    @functools.partial(jax.jit, donate_argnums=0)
    def loop(state, stacked, keys):
        def body(state, inputs):
            (images, labels), key = inputs
            return step(state, images, labels, key)

        return jax.lax.scan(body, state, (stacked, keys))

    state, metrics = loop(make_state(tx), stacked, keys)
    states, expected, _ = trained("sam")
    helpers.assert_close(state.params, states[-1].params, atol=1e-6)
    helpers.assert_close(state.batch_stats, states[-1].batch_stats, atol=1e-6)
    losses = [line["loss"] for line in expected]
    np.testing.assert_allclose(metrics["loss"], losses, atol=1e-6)


def test_a_fresh_state_is_a_function_of_its_key():
    tx = make_tx(make_sam())
    make = jax.jit(
        lambda key: make_train_step(model, tx).init(key, jnp.zeros([1, 8, 8, 1]))
    )
    one, again, other = (make(jax.random.key(seed)) for seed in (1, 1, 2))
    helpers.assert_same_bits(one, again)
    assert helpers.as_bits(one.params) != helpers.as_bits(other.params)
    assert int(one.step) == 0
    assert one.variables.keys() == {"params", "batch_stats"}


def test_a_state_is_frozen():
    state = make_state(make_tx())
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(state, "step", 1)  # noqa: B010 - a type checker refuses the plain form


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"batch_stats": "third"},
            r"Expected batch_stats in \{first, second, both\}, got .*='third'\.",
        ),
        (
            {"adversary": as_adversary(identity)._replace(batch_norm="running")},
            r"Expected batch_norm in \{train, eval\}, got .*='running'\.",
        ),
    ],
)
def test_an_unknown_choice_is_refused_when_the_step_is_made(options, message):
    with pytest.raises(ValueError, match=message):
        make_train_step(model, make_tx(), **options)


def test_a_constructor_in_place_of_an_optimizer_is_refused():
    constructor: Any = optax.sgd
    with pytest.raises(ValueError, match=r"transformation, got tx=<function sgd"):
        make_train_step(model, constructor)


def half(_logits_fn, images, *_, **_key):
    return images[:, :4]


def coarse(_logits_fn, images, *_, **_key):
    return images.astype(jnp.bfloat16)


def mean_loss(logits, _labels):
    return jnp.mean(logits)


def no_pair(_logits_fn, images, *_, **_key):
    return images


def other_state(_logits_fn, images, *_, **_key):
    return images, {"images": images}


def same_state(_logits_fn, images, _labels, state, **_key):
    return images, state


def learn_another(state, *_):
    return {"moved": state}


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        (
            {"adversary": half},
            r"Expected an adversary that returns images float32\[8,8,8,1\], as it is "
            r"given, got \w+\.half='float32\[8,4,8,1\]'\.",
        ),
        (
            {"adversary": coarse},
            r"got \w+\.coarse='bfloat16\[8,8,8,1\]'\.",
        ),
        (
            {"adversary": Adversary(no_pair)},
            r"Expected an adversary that returns images and its next state, got "
            r"\w+\.no_pair='float32\[8,8,8,1\]'\. End with `return images, state`\.",
        ),
        (
            {"adversary": Adversary(other_state)},
            r"states are all like its first, \(\), got \w+\.other_state=",
        ),
        (
            {"adversary": Adversary(same_state, learn=learn_another)},
            r"states are all like its first, \(\), got \w+\.learn_another=\{'moved': ",
        ),
        (
            {"objective": mean_loss},
            r"a loss \[8\] to each example, got \w+\.mean_loss='float32\[\]'\.",
        ),
        (
            {"objective": lambda logits, labels: (labels, logits)},
            r"got \w+\.<lambda>=\('int32\[8\]', 'float32\[8,10\]'\)\.",
        ),
        ({"objective": lambda _, labels: labels}, r"got \w+\.<lambda>='int32\[8\]'\."),
    ],
)
def test_what_a_part_must_not_return_is_refused_by_its_name(parts, message):
    step = make_train_step(model, make_tx(), **parts).train_step
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(step, make_state(make_tx()), *make_batches(1)[0], KEY)


def test_a_network_without_parameters_is_refused():
    class Bare(nn.Module):
        @nn.compact
        def __call__(self, images, *, train):
            del train
            return images.reshape(len(images), -1)

    init = make_train_step(Bare(), make_tx()).init
    with pytest.raises(
        ValueError, match="Expected a network Bare with parameters, got"
    ):
        init(KEY, jnp.zeros([4, 8, 8, 1]))
