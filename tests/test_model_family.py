"""Every network of `MODELS`: its size, its fields, its dtypes and its dropout."""

import functools
import inspect
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from samrobust.experiments.components import find_model
from samrobust.models import MODELS

KEY = jax.random.key(0)
SMALL: dict[str, dict[str, Any]] = {
    "preact_resnet": {"width": 2, "blocks": (1, 1)},
    "wide_resnet": {"depth": 10, "widen": 1},
    "resnet18": {"width": 2, "blocks": (1, 1)},
    "vit": {"patch": 2, "dim": 6, "depth": 1},
}
WITH_DROPOUT = ("wide_resnet", "vit")

every = pytest.mark.parametrize("name", MODELS)


def small(name: str, **fields: Any) -> Any:
    return find_model(name)(num_classes=3, **SMALL[name] | fields)


def images_of(num: int = 2) -> jax.Array:
    pixels = np.random.default_rng(0).uniform(size=(num, 4, 4, 1))
    return jnp.asarray(pixels, jnp.float32)


def shapes_of(model: Any, shape: tuple[int, ...] = (1, 32, 32, 3)) -> Any:
    return jax.eval_shape(lambda: model.init(KEY, jnp.zeros(shape), train=False))


@pytest.mark.parametrize(
    ("name", "fields", "expected"),
    [
        ("preact_resnet", {}, 11_172_170),
        ("wide_resnet", {}, 36_479_194),
        ("wide_resnet", {"depth": 34}, 46_160_474),
        ("wide_resnet", {"depth": 16, "widen": 4, "num_classes": 100}, 2_772_020),
        ("resnet18", {}, 11_173_962),
        ("resnet18", {"blocks": (3, 4, 6, 3)}, 21_282_122),
        ("vit", {}, 5_362_762),
    ],
)
def test_a_network_has_the_parameters_of_its_paper(name, fields, expected):
    leaves = jax.tree.leaves(shapes_of(find_model(name)(**fields))["params"])
    assert sum(leaf.size for leaf in leaves) == expected


@every
def test_the_fields_of_a_network_are_plain_values(name):
    fields = dict(inspect.signature(find_model(name)).parameters)
    for given in ("num_classes", "mean", "std", "dtype", "parent", "name"):
        del fields[given]
    fields.pop("batch_norm_group", None)
    assert set(SMALL[name]) <= set(fields)
    for field in fields.values():
        assert isinstance(field.default, int | float | str | bool | tuple)


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("preact_resnet", {"width": 0}, "1 <= width, got width=0."),
        ("preact_resnet", {"width": 2**17}, "width <= 65536, got width=131072."),
        ("preact_resnet", {"width": True}, "a whole number for width, got width=True."),
        ("preact_resnet", {"blocks": ()}, "a tuple of 1 to 10 numbers of blocks"),
        ("preact_resnet", {"blocks": (1,) * 11}, "a tuple of 1 to 10 numbers of bl"),
        ("preact_resnet", {"blocks": 2}, "a tuple of 1 to 10 numbers of blocks"),
        ("preact_resnet", {"blocks": (2, 0)}, "1 <= blocks, got blocks=0."),
        ("preact_resnet", {"num_classes": 0}, "1 <= num_classes, got num_classes=0."),
        ("preact_resnet", {"std": (0.2, 0.0)}, "std > 0, got std=(0.2, 0.0)."),
        ("preact_resnet", {"dtype": np.float64}, "a dtype that JAX computes in"),
        ("vit", {"dtype": np.int32}, "a floating dtype, got dtype='int32'."),
        ("resnet18", {"batch_norm_group": -3}, "0 <= batch_norm_group, got batch_nor"),
        ("wide_resnet", {"batch_norm_group": 2.0}, "a whole number for batch_norm_gr"),
        ("resnet18", {"blocks": (2.0,)}, "a whole number for blocks"),
        ("resnet18", {"blocks": (1001,)}, "blocks <= 1000, got blocks=1001."),
        ("wide_resnet", {"depth": 30}, "depth = 6n + 4, got depth=30."),
        ("wide_resnet", {"depth": 4}, "10 <= depth, got depth=4."),
        ("wide_resnet", {"widen": 0}, "1 <= widen, got widen=0."),
        ("wide_resnet", {"dropout": 1.0}, "dropout < 1, got dropout=1.0."),
        ("wide_resnet", {"dropout": -0.1}, "0 <= dropout, got dropout=-0.1."),
        ("vit", {"dropout": "0"}, "a number for dropout, got dropout='0'."),
        ("vit", {"dropout": 1}, "dropout < 1, got dropout=1."),
        ("vit", {"heads": 5}, "heads that divide dim, got heads=5, dim=192."),
        ("vit", {"patch": 0}, "1 <= patch, got patch=0."),
        ("vit", {"depth": 1001}, "depth <= 1000, got depth=1001."),
    ],
)
def test_a_field_out_of_its_range_is_refused_at_construction(name, fields, message):
    with pytest.raises(ValueError, match=f"^Expected {re.escape(message)}") as error:
        find_model(name)(**fields)
    assert "\n" not in str(error.value)


def test_a_patch_that_does_not_divide_the_images_is_refused():
    for height, width in ((33, 32), (32, 33)):
        message = rf"divides the images, got patch=3, image=\({height}, {width}\)\."
        with pytest.raises(ValueError, match=message):
            shapes_of(find_model("vit")(patch=3), (1, height, width, 3))


@every
@pytest.mark.parametrize("train", [False, True])
def test_in_bfloat16_the_variables_and_logits_are_float32(name, train):
    assert dtypes_of(small(name, dtype=jnp.bfloat16), train) == {"float32"}


@every
def test_a_network_of_float64_has_nothing_of_float32(name):
    with jax.enable_x64(True):
        model = small(name, dtype=jnp.float64)
        assert dtypes_of(model, train=True) == {"float64"}
        jaxpr = jax.make_jaxpr(
            lambda variables, images: model.apply(variables, images, train=False)
        )(shapes_of(model, (1, 4, 4, 1)), jnp.zeros((2, 4, 4, 1)))
        assert "f32" not in str(jaxpr)


def dtypes_of(model: Any, train: bool) -> set[str]:
    """Those of the variables, the logits and the updated statistics."""

    def run(images: jax.Array) -> Any:
        variables = model.init(KEY, images, train=False)
        rngs = {"dropout": KEY}
        return variables, model.apply(
            variables, images, train=train, mutable=["batch_stats"], rngs=rngs
        )

    leaves = jax.tree.leaves(jax.eval_shape(run, images_of()))
    return {leaf.dtype.name for leaf in leaves}


@every
def test_only_networks_with_batch_norm_have_statistics_and_groups(name):
    collections = shapes_of(small(name), (1, 4, 4, 1))
    has_groups = "batch_norm_group" in inspect.signature(find_model(name)).parameters
    assert set(collections) == {"params"} | ({"batch_stats"} if has_groups else set())
    assert has_groups == (name != "vit")
    if has_groups:
        apply = functools.partial(small(name, batch_norm_group=2).apply, train=True)
        with pytest.raises(ValueError, match="a batch divisible by batch_norm_group"):
            jax.eval_shape(apply, collections, images_of(3))


@pytest.mark.parametrize("name", WITH_DROPOUT)
def test_dropout_draws_from_its_own_key_in_training_alone(name):
    plain, model = small(name), small(name, dropout=0.5)
    images = images_of()

    @jax.jit
    def run(images: jax.Array) -> Any:
        variables = plain.init(KEY, images, train=False)

        def logits(model: Any, train: bool, seed: int) -> jax.Array:
            key = jax.random.key(seed)
            return model.apply(variables, images, train=train, rngs={"dropout": key})

        return (
            logits(plain, True, 0),
            [logits(model, True, seed) for seed in (1, 1, 2)],
            plain.apply(variables, images, train=False),
            model.apply(variables, images, train=False),
        )

    whole, (first, again, other), plain_evaluated, evaluated = run(images)
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - other).max() > 1e-3
    assert np.abs(first - whole).max() > 1e-3
    np.testing.assert_array_equal(evaluated, plain_evaluated)


def test_a_vit_drops_behind_positions_attention_and_both_layers_of_the_mlp():
    model, dropped = small("vit", dropout=0.5), []

    def note(function, args, kwargs, context):
        if isinstance(context.module, nn.Dropout):
            dropped.append((context.module.rate, args[0].shape))
        return function(*args, **kwargs)

    with nn.intercept_methods(note):
        shapes_of(model, (2, 4, 4, 1))
    tokens, wide = (2, 5, 6), (2, 5, 4 * 6)
    assert dropped == [(0.5, shape) for shape in (tokens, tokens, wide, tokens)]


def init(model):
    """The parameters, in NumPy."""
    variables = jax.jit(lambda: model.init(KEY, images_of(1), train=False))()
    return jax.device_get(variables["params"])


def test_the_kernels_of_a_wide_resnet_are_normal_with_the_scale_of_he():
    """N(0, 2 / fan_in), not truncated; the head as PyTorch's, its bias 0."""
    model = find_model("wide_resnet")(num_classes=50, depth=10, widen=1)
    params = init(model)
    drawn = {
        jax.tree_util.keystr(path): leaf / np.sqrt(2 / np.prod(leaf.shape[:-1]))
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
        if leaf.ndim == 4
    }
    assert len(drawn) == 1 + 3 * 2 + 2
    units = np.concatenate([np.ravel(leaf) for leaf in drawn.values()])
    np.testing.assert_allclose([units.mean(), units.std()], [0, 1], atol=0.01)
    assert np.abs(units).max() > 3
    for name, unit in drawn.items():
        np.testing.assert_allclose(np.std(unit), 1, atol=0.15, err_msg=name)
    head = params["head"]
    assert np.abs(head["kernel"]).max() <= 64**-0.5
    assert not head["bias"].any()


def test_the_kernels_of_a_vit_are_a_truncated_normal_and_its_biases_zero():
    model = find_model("vit")(patch=2, dim=48, depth=1)
    params = init(model)
    embedding = params.pop("embedding")
    assert 0 < np.abs(embedding["bias"]).max() <= 4**-0.5
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        name = jax.tree_util.keystr(path)
        if "bias" in name or "scale" in name:
            assert (leaf == ("scale" in name)).all(), name
        else:
            assert 0.02 < np.abs(leaf).max() <= 0.04, name
            np.testing.assert_allclose(np.std(leaf), 0.88 * 0.02, rtol=0.2)
