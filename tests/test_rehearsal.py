"""Code of one's own is built with the numbers of the data, and fails before any row."""

import helpers
import pytest

from samrobust.experiments import building, methods
from samrobust.experiments.configuration import load_config
from samrobust.experiments.rehearsal import rehearse
from samrobust.sharpness import sam
from samrobust.sharpness.two_pass import TwoPass

OURS = """
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn

from samrobust.attacks import linf, pgd
from samrobust.sharpness import esam, sam, two_pass
from samrobust.training import Adversary, Averaging, Objective, as_adversary
from samrobust.types import Entry


def late(begin: int, *, total_steps: int, steps_per_epoch: int):
    if not steps_per_epoch < begin < total_steps:
        raise ValueError(f"Expected begin < {total_steps}, got begin={begin}.")
    return Averaging(init=lambda variables: variables, update=lambda a, w, step: a)


def weighted(power: float, *, num_classes: int):
    weights = jnp.array([1.0, 2.0, 3.0])
    if num_classes != len(weights):
        raise ValueError(f"Expected 3 classes, got num_classes={num_classes}.")
    entropy = optax.softmax_cross_entropy_with_integer_labels
    return Objective(lambda z, y: weights[y] ** power * entropy(z, y))


class Maxout(nn.Module):
    num_classes: int = 3
    hidden: int = 12

    def __post_init__(self):
        if self.hidden % self.num_classes:
            raise ValueError(f"Expected another hidden, got hidden={self.hidden}.")
        super().__post_init__()

    @nn.compact
    def __call__(self, images, *, train):
        hidden = nn.Dense(self.hidden)(images.reshape(len(images), -1))
        return hidden.reshape(len(images), self.num_classes, -1).max(-1)


class Normalized(nn.Module):
    parts: tuple = ()
    wrong: bool = False

    @nn.compact
    def __call__(self, images, *, train):
        assert not (train and self.wrong), "in training"
        features = nn.BatchNorm(use_running_average=not train)(images)
        return nn.Dense(3)(features.reshape(len(images), -1))


def three():
    labels = np.arange(36) % 3
    images = np.zeros((36, 4, 4, 1), np.uint8) + labels[:, None, None, None]
    images = images.astype(np.uint8)
    return {"x_train": images, "y_train": labels, "x_test": images, "y_test": labels}


def unshaped(a: float):
    return Objective(lambda logits, labels: optax.softmax_cross_entropy(logits, labels))


def full_batches(a: float):
    entropy = optax.softmax_cross_entropy_with_integer_labels
    return Objective(lambda logits, labels: entropy(logits, labels) * jnp.ones(16))


def unseen(a: float):
    return Objective(lambda labels: 0.0 * labels, views=())


def keyless(a: float):
    return Adversary(lambda logits_fn, images, labels, state: (images, state))


def weighs(a: float):
    def perturb(logits_fn, images, labels, state, *, key):
        return images, state

    return Adversary(perturb, weigh=lambda state, labels: jnp.ones(len(labels)))


def plain(eps: float):
    return pgd(linf(eps / 255), step_size=eps / 510, num_steps=2)


def attacked(eps: float):
    return as_adversary(plain(eps))


known = Entry(attacked, attack_passes=4 / 3)


def both(eps: float, rho: float, *, aux=None, grouped=False):
    return [attacked(eps), sam(rho, aux=aux, grouped=grouped)]


def signed(rho: float, **options):
    return two_pass(rho, lambda g, w, rho: jax.tree.map(lambda g: rho * jnp.sign(g), g))


def ungrouped(rho: float, *, aux=None):
    return sam(rho, aux=aux)


def nothing(a: float):
    return []


def judged(a: float):
    def admit(average, variables, worst):
        raise KeyError("begun")

    return Averaging(lambda variables: variables, lambda a, w, step: a, admit=admit)


def half(rho: float, *, aux=None):
    return esam(rho, gamma=0.5, aux=aux)


def spied(eps: float, *, total_steps: int):
    assert total_steps == 6, total_steps
    return attacked(eps)


stated = Entry(spied, attack_passes=4 / 3)


def plainly(learning_rate, momentum):
    return optax.sgd(learning_rate, momentum)


def clipped(norm: float):
    return optax.clip_by_global_norm(norm)


def decayed(learning_rate, momentum, weight_decay):
    decay = optax.add_decayed_weights(weight_decay)
    return optax.chain(decay, optax.sgd(learning_rate, momentum))


def fine(images, *, key):
    noise = jax.random.uniform(key, images.shape)
    return (images + noise) / 2


def impure(images, *, key):
    return images * np.float32(np.random.default_rng().random())


def mixed(images, *, key):
    return (images + images[::-1]) / 2


def bright(images, *, key):
    return images + 1


def narrow(images, *, key):
    return images[:, 1:]


def full(images, *, key):
    return images * jnp.ones([16, 1, 1, 1])


def lost(images, *, key):
    return images / 0
"""
SMALL = {
    "data.name": "ours:three",
    "data.padding": 0,
    "model.name": "ours:Maxout",
    "training.batch_size": 16,
    "training.drop_remainder": False,
    "training.epochs": 2,
}
NETWORK = {"model.name": "ours:Normalized"}


@pytest.fixture(autouse=True, scope="module")
def _ours(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ours")
    (folder / "ours.py").write_text(OURS)
    with pytest.MonkeyPatch.context() as patched:
        patched.syspath_prepend(folder)
        yield


def flags_of(overrides: dict | None = None) -> list[str]:
    given = {**SMALL, **(overrides or {})}
    return [f"--config.{name}={value}" for name, value in given.items()]


def config_of(row: str, overrides: dict | None = None):
    return load_config(f"{helpers.ROOT}/configs/digits.py:{row}", flags_of(overrides))


def try_out(row: str, overrides: dict | None = None) -> None:
    config = config_of(row, overrides)
    rehearse(config, building.load_data(config))


@pytest.mark.parametrize("row", ["ours:late,begin=5", "ours:weighted,power=1", "st"])
def test_it_is_built_with_the_numbers_of_the_data(row):
    """6 steps, 3 to an epoch, 3 classes: nothing else would do."""
    try_out(row)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("ours:late,begin=6", r"^Expected ours:late to run, got at .*ours\.py, line 16"
         r": ValueError: Expected begin < 6, got begin=6\.$"),
        ("ours:unshaped,a=1", r"^Expected ours:unshaped with ours:Maxout to run, got "
         r"at .*ours\.py, line \d+: ValueError: Incompatible shapes"),
        ("ours:full_batches,a=1", r"to run, got at .*ours\.py.*TypeError: "),
        ("ours:unseen,a=1", r"^Expected views of {natural, adversarial}, got views="),
        ("ours:keyless,a=1", r"to run, got: TypeError: .*argument 'key'"),
        ("ours:weighs,a=1", r"to run, got: TypeError: .* positional arguments"),
        ("ours:plain,eps=8", r"build one of adversary, .* got built='function'\. "
         r"samrobust\.training\.as_adversary makes one of an attack"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line(row, message):
    with pytest.raises(ValueError, match=message) as error:
        try_out(row)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("row", "overrides", "message"),
    [
        (
            "ours:nothing,a=1",
            {},
            r"^Expected ours:nothing to build one of .* built=\[\]",
        ),
        ("st", {"data.padding": 4}, r"^Expected 0 <= data\.padding < 4, got data"),
        (
            "ours:judged,a=1",
            {"data.validation_size": 9},
            r"^Expected ours:judged .* to run, got at .*: KeyError: 'begun'",
        ),
    ],
)
def test_what_would_fail_between_rows_or_epochs_fails_before(row, overrides, message):
    with pytest.raises(ValueError, match=message):
        try_out(row, overrides)


def test_what_is_built_in_is_refused_before_the_data_are_known():
    for row in ("sam,rho=0.1+asam,rho=0.1", "at,norm=linf,eps=8+free,eps=8,m=2"):
        with pytest.raises(ValueError, match=r"^Expected one (sharpness|adversary)"):
            config_of(f"{row}+ours:clipped,norm=1")


def test_a_network_that_fails_in_training_alone_is_one_line():
    with pytest.raises(
        ValueError, match=r"ours:Normalized to run, got at .*: in train"
    ):
        try_out("st", {**NETWORK, "model.wrong": True})


def test_no_row_of_a_table_is_trained_if_one_cannot_be(tmp_path, capsys):
    rows = "--rows=st;ours:unshaped,a=1"
    code = helpers.main("table", rows, *flags_of(), f"--workdir={tmp_path / 'table'}")
    assert code == 2
    assert "error: unshaped (a = 1): Expected ours:unshaped" in capsys.readouterr().err
    assert not list((tmp_path / "table").iterdir())


@pytest.mark.parametrize(
    ("row", "overrides", "lacking"),
    [
        ("ours:signed,rho=0.1", NETWORK, "aux"),
        ("ours:ungrouped,rho=0.1", {"ungrouped.m": 4}, "grouped"),
    ],
)
def test_what_a_second_pass_would_lose_is_refused(row, overrides, lacking):
    message = (
        rf"^Expected ours:\w+ with a parameter {lacking} that it hands to two_pass"
    )
    with pytest.raises(ValueError, match=message):
        try_out(row, overrides)


def test_without_statistics_or_groups_it_needs_no_parameter_for_them():
    try_out("ours:signed,rho=0.1")
    try_out("ours:ungrouped,rho=0.1", NETWORK)


def test_parts_may_be_a_list():
    try_out("ours:both,eps=8,rho=0.1", NETWORK)


def test_an_augmentation_is_of_each_image_and_the_key():
    try_out("st", {"data.augmentation": "ours:fine"})


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("impure", r"^Expected an augmentation that is a function of images and key, g"
         r"ot data\.augmentation='ours:impure'\. Draw random numbers from the key\.$"),
        ("mixed", r"^Expected an augmentation of each image by itself, got data\."),
        ("bright", r"^Expected ours:bright to return pixels in \[0, 1\], got least=1"),
        ("lost", r"^Expected ours:lost to return pixels in \[0, 1\], got least=nan"),
        ("narrow", r"return float32\[36, 4, 4, 1\], got .* shape=\(36, 3, 4, 1\)"),
        ("full", r"^Expected ours:full .*to run, got at .*ours\.py, line \d+: "),
        ("keyless", r"^Expected ours:keyless to run, got: TypeError: "),
        ("known", r"^Expected a function of images and a key, got data\.augmentation="),
        ("there", r"^Expected an augmentation there in .*ours\.py, got reference="),
    ],
)  # fmt: skip
def test_what_is_no_augmentation_is_refused_before_any_work(name, message):
    with pytest.raises(ValueError, match=message) as error:
        try_out("st", {"data.augmentation": f"ours:{name}"})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("row", "passes"),
    [
        ("ours:signed,rho=0.1", 2.0),
        ("ours:both,eps=8,rho=0.1", None),
        ("ours:attacked,eps=8+sam,rho=0.1", None),
        ("ours:known,eps=8+sam,rho=0.1", 2 + 4 / 3),
        ("ours:stated,eps=8", 1 + 4 / 3),  # it wants other data than are supposed
        ("ours:half,rho=0.1", 2 - 1 / 6),
        ("ours:clipped,norm=1", None),
        ("ours:late,begin=1500", 1.0),
        ("ours:weighted,power=1", None),
        ("free,eps=8,m=2", 1.0),
    ],
)
def test_passes_that_nobody_says_are_not_made_up(row, passes):
    config = config_of(row, {"training.drop_remainder": True})
    found = methods.training_passes(config, num_steps=6)
    assert found == (None if passes is None else pytest.approx(6 * 16 * passes))


def test_a_two_pass_says_what_it_costs():
    for built, passes in ((sam(0.1), 1), (sam(0.0), 0), (sam(0, grouped=True), 0)):
        assert isinstance(built, TwoPass)
        assert built.passes == passes


def test_who_has_to_know_what_decays_refuses_an_optimizer_of_ones_own():
    own = {"training.optimizer": "ours:decayed", "training.weight_decay": 0.01}
    with pytest.raises(
        ValueError, match=r"^Expected training\.weight_decay=0 with our"
    ):
        try_out("awp,gamma=0.01", own)
    try_out("sam,rho=0.1", own)
    try_out("awp,gamma=0.01", own | {"training.weight_decay": 0.0})
    try_out("awp,gamma=0.01", {"training.optimizer": "ours:plainly"})


def test_a_network_whose_fields_have_no_hash_is_traced_too():
    config = config_of("st", NETWORK)
    model = building.make_model(config, building.load_facts(config)).clone(parts=[1])
    with pytest.raises(TypeError):
        hash(model)
    assert "params" in building._variables_of(model, "m", building.load_facts(config))
