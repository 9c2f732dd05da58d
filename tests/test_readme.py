"""README and docs tell the truth: their code runs, their commands and fields exist."""

import contextlib
import functools
import itertools
import pathlib
import re
import shlex
import sys
import tomllib
import types
from typing import Any

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn, nnx
from jax.flatten_util import ravel_pytree

from samrobust import cli
from samrobust.data import from_arrays, load_dataset
from samrobust.experiments import config_files, configuration
from samrobust.experiments.components import model_fields
from samrobust.experiments.entries import section_fields
from samrobust.models import MODELS
from samrobust.system import storage
from samrobust.training import make_train_step

KEY = jax.random.key(0)
ROOT = pathlib.Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
PAGES = ["README.md", "CONTRIBUTING.md"]
PAGES += [f"{folder}/README.md" for folder in ("examples", "launch", "results")]
PAGES += sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))
CONFIGS = sorted(f"configs/{path.name}" for path in (ROOT / "configs").glob("*.py"))
TEXTS = {page: (ROOT / page).read_text() for page in [*PAGES, *CONFIGS]}
SNIPPETS = {
    page: re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    for page, text in TEXTS.items()
    if "```python" in text
}


# --- code -----------------------------------------------------------------------------


def run_snippet(page, index, names=None, folder="."):
    """Runs a snippet as it is printed, by itself or after what gave the names."""
    code = SNIPPETS[page][index]
    if "import torch" in code or "as_torch" in code:
        pytest.importorskip("torch")
    names = {} if names is None else names
    with contextlib.chdir(folder):
        exec(compile(code, f"{page}, snippet {index}", "exec"), names)
    return names


def check_load(names):
    torch = pytest.importorskip("torch")
    images = jnp.full([2, 8, 8, 1], 0.5)
    logits = names["module"](torch.full((2, 1, 8, 8), 0.5)).numpy()
    np.testing.assert_allclose(logits, names["logits_fn"](images), atol=1e-5)


def check_sam(names):
    np.testing.assert_allclose(names["params"], jnp.array([1.0, 2.0, 3.0]), atol=0.1)


def check_nnx(names):
    begun = nnx.state(nnx.Linear(8, 3, rngs=nnx.Rngs(0)), nnx.Param)
    assert names["loss"](nnx.state(names["model"])) < 0.9 * names["loss"](begun)


def check_pgd(names):
    moved = jnp.abs(names["adversarial"] - names["images"])
    assert 0 < moved.max() <= 8 / 255 + 1e-6


def check_autoattack(names):
    moved = jnp.linalg.norm((names["broken"] - names["images"]).reshape(4, -1), axis=1)
    assert 0 < moved.max() <= 0.5 + 1e-5


def check_as_torch(names):
    np.testing.assert_allclose(names["gradient"], 1 / (3 * 8 * 8), rtol=1e-5)


def check_flowers(names):
    flowers = from_arrays("flowers", names["flowers"]())
    assert (flowers.num_classes, flowers.image_shape) == (5, (16, 12, 3))


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    """Snippets may write files."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture(autouse=True, scope="module")
def _mine():
    """The file of one's own that docs/own.md speaks of."""
    module: Any = types.ModuleType("mine")
    for index in range(2):
        run_snippet("docs/own.md", index, vars(module))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "mine", module)
        yield


def check_parts(names):
    """The constructors of the page build the parts that it says, and these train."""
    images, labels = jnp.full([4, 2, 2, 1], 0.5), jnp.array([0, 1, 2, 0])
    parts = [names[name](0.1) for name in ("smoothed", "signed", "noisy")]
    composition = dict(zip(("objective", "tx", "adversary"), parts, strict=True))
    tx = optax.chain(composition.pop("tx"), optax.sgd(0.1))

    class Plain(nn.Module):
        @nn.compact
        def __call__(self, images, *, train):
            del train
            return nn.Dense(3)(images.reshape(len(images), -1))

    init, step = make_train_step(
        Plain(), tx, averaging=names["tail"](1), batch_stats="first", **composition
    )
    state, _ = step(init(KEY, images), images, labels, KEY)
    first = state.params
    for _ in range(2):
        state, _ = step(state, images, labels, KEY)
    assert jax.tree.map(jnp.shape, state.average["params"]) == jax.tree.map(
        jnp.shape, first
    )


def check_network(names):
    model, images = names["MLP"](), jnp.zeros([2, 4, 4, 1])
    variables = model.init(KEY, images, train=False)
    assert model.apply(variables, images, train=True).shape == (2, 10)


def check_cutout(names):
    """Each image loses one square, of which the border may cut some off."""
    images = jnp.ones([40, 8, 6, 2])
    for size in (3, 4):
        found = names["cutout"](images, key=jax.random.key(0), size=size)
        is_black = np.asarray(found) == 0
        widths = [np.any(is_black, axes).sum(1) for axes in ((2, 3), (1, 3))]
        for width in widths:
            assert width.min() == size // 2 + size % 2
            assert width.max() == size
        np.testing.assert_array_equal(
            is_black.sum((1, 2, 3)), 2 * widths[0] * widths[1]
        )
        assert len({image.tobytes() for image in is_black}) > 20


def check_loop(names):
    assert int(names["outcome"].state.step) == len(names["data"].train) // 64


def check_family(names):
    np.testing.assert_allclose(names["updates"], [0.2] * 3, rtol=1e-6)


def check_flatness(names):
    w, loss_fn = names["w"], names["loss_fn"]
    flat, unravel = ravel_pytree(w)
    hessian = jax.hessian(lambda flat: loss_fn(unravel(flat)))(flat)
    largest = jnp.linalg.eigvalsh(hessian)[-1]
    np.testing.assert_allclose(names["lambda_max"], largest, rtol=1e-3)
    np.testing.assert_allclose(names["trace"], jnp.trace(hessian), rtol=0.5)
    assert names["sharpness"] > 0
    wrong = jnp.argmax(names["model"](w, names["x"]), axis=1) != names["y"]
    assert (names["distance"] == 0).tolist() == wrong.tolist()


def check_npz(names):
    flowers = load_dataset("flowers.npz")
    np.testing.assert_array_equal(flowers.train.images, names["data"].train.images)


def check_start(names):
    moved = jnp.abs(names["adversarial"] - names["images"])
    assert moved.max() <= 2 / 255 + 1e-6
    assert 0 < names["robust"].sum() < len(names["robust"])


def check_partial(names):
    length = jnp.linalg.norm((names["adversarial"] - 0.5).reshape(4, -1), axis=1)
    np.testing.assert_allclose(length, 0.5, rtol=1e-4)
    assert names["attack"]._cache_size() == 1


def check_linen(names):
    """Each pass moves the statistics by 1 % of the way to those of the batch."""
    begun = names["model"].init(KEY, names["images"], train=False)["params"]["Dense_0"]
    hidden = names["images"].reshape(8, -1) @ begun["kernel"] + begun["bias"]
    moved = names["batch_stats"]["BatchNorm_0"]["mean"]
    np.testing.assert_allclose(moved, (1 - 0.99**2) * hidden.mean(0), atol=1e-3)
    assert jnp.abs(moved).max() > 1e-2


def check_train_state(names):
    """One step of SAM, written out."""
    images, labels = names["images"], names["labels"]
    begun = names["model"].init(KEY, images)["params"]

    def loss(flat):
        logits = names["model"].apply({"params": unravel(flat)}, images)
        return -jnp.mean(jax.nn.log_softmax(logits)[jnp.arange(8), labels])

    flat, unravel = ravel_pytree(begun)
    first = jax.grad(loss)(flat)
    second = jax.grad(loss)(flat + 0.05 * first / jnp.linalg.norm(first))
    found, _ = ravel_pytree(names["state"].params)
    np.testing.assert_allclose(found, flat - 0.1 * second, atol=1e-6)
    assert names["state"].step == 1


CHECKS = {
    "README.md": [check_autoattack, check_sam, check_nnx],
    "docs/data.md": [check_flowers],
    "docs/flatness.md": [check_flatness],
    "docs/interchange.md": [check_load, check_as_torch, check_pgd],
    "docs/library.md": [check_pgd, check_partial, check_linen, check_train_state],
    "docs/own.md": [check_parts, check_network, check_cutout, check_loop],
    "docs/sharpness.md": [check_family],
    "docs/start.md": [check_npz, check_start],
}


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory):
    """Where to run a snippet: beside a run, where it speaks of one."""
    trained = functools.cache(
        lambda: helpers.make_table(tmp_path_factory.mktemp("trained"), ["st"])
    )

    def folder(page, index):
        if "runs/sam" not in SNIPPETS[page][index]:
            return "."
        run = trained() / "runs" / "sam"
        if not run.exists():
            run.parent.mkdir()
            run.symlink_to(trained() / "st" / "seed0")
        return trained()

    return folder


def test_every_snippet_is_run():
    assert {page: len(checks) for page, checks in CHECKS.items()} == {
        page: len(found) for page, found in SNIPPETS.items()
    }


@pytest.mark.parametrize(
    ("page", "index"),
    [(page, i) for page, found in SNIPPETS.items() for i in range(1, len(found))],
)
def test_a_later_snippet_runs_by_itself(page, index, folder_of):
    CHECKS[page][index](run_snippet(page, index, folder=folder_of(page, index)))


@pytest.mark.parametrize("page", SNIPPETS)
def test_snippets_run_one_after_the_other(page, folder_of):
    names: dict = {}
    for index, check in enumerate(CHECKS[page]):
        check(run_snippet(page, index, names, folder_of(page, index)))


# --- commands -------------------------------------------------------------------------


def commands(page):
    """The commands on lines of their own; what follows `#` is a remark."""
    joined = re.sub(r" *\\\n *", " ", TEXTS[page])
    pattern = r"^ {4,}(?:\.venv/bin/)?(samrobust [a-z].*?)(?: {2,}#.*)?$"
    found = re.findall(pattern, joined, re.MULTILINE)
    return [line for line in found if page != "CONTRIBUTING.md" or "--" in line]


def mentions(page):
    """The commands within the text, whole or in part."""
    found = re.findall(r"`(samrobust [a-z][^`]*)`", TEXTS[page])
    return [" ".join(command.split()) for command in found]


@pytest.fixture(autouse=True)
def _clients_of_buckets(monkeypatch):
    """Commands name buckets, whose packages are extras."""
    there = types.SimpleNamespace(find_spec=lambda name: name)
    monkeypatch.setattr(storage, "util", there)


def of_all_pages(find):
    return [pytest.param(c, id=f"{page}: {c}") for page in TEXTS for c in find(page)]


def accept(arguments):
    """Loads the config that a command names, with all that it overrides in it."""
    for value in getattr(arguments, "rows", None) or ():
        assert config_files.rows_named([value])
    if path := getattr(arguments, "config", None):
        assert configuration.load_config(path, arguments.overrides).is_locked


@pytest.mark.parametrize("command", of_all_pages(commands))
def test_every_command_line_is_accepted(command):
    accept(cli._parse(shlex.split(command)[1:]))


@pytest.mark.parametrize("command", of_all_pages(mentions))
def test_every_mentioned_command_has_what_is_said_of_it(command, monkeypatch):
    make_parser = cli._make_parser

    def lenient():
        parser, parsers = make_parser()
        for action in itertools.chain(*(own._actions for own in parsers.values())):
            action.required = False
        return parser, parsers

    monkeypatch.setattr(cli, "_make_parser", lenient)
    words = [word for word in shlex.split(command)[1:] if word != "..."]
    if words[0] == "help":
        assert words[1] in cli.COMMANDS
        return
    accept(cli._parse(words))


def test_commands_are_found():
    assert len(commands("README.md")) >= 9
    assert len(mentions("results/README.md")) >= 10
    assert all(commands(page) for page in ("docs/interchange.md", "docs/sanity.md"))
    assert all(commands(page) for page in CONFIGS if "base" not in page)


@pytest.mark.parametrize(
    "field",
    sorted(
        {f for text in TEXTS.values() for f in re.findall(r"--config\.([\w.]+)", text)}
    ),
)
def test_every_field_exists(field):
    section, _, name = field.partition(".")
    if section == "model" and any(name in model_fields(model) for model in MODELS):
        return
    own = {"smoothed": "mine:smoothed"}
    if section in own and name in section_fields(own[section]):
        return
    value = configuration.finish(configuration.base_config(), "st")
    for part in field.split("."):
        assert part in value
        value = value[part]


@pytest.mark.parametrize("target", re.findall(r"^ {4}make (\w+)", README, re.MULTILINE))
def test_every_make_target_exists(target):
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE)


def test_on_a_package_index_the_readme_has_no_link_that_leads_nowhere():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    text = README
    for rule in project["tool"]["hatch"]["metadata"]["hooks"]["custom"][
        "substitutions"
    ]:
        text = re.sub(rule["pattern"], rule["replacement"], text)
    assert all(link.startswith("https://") for link in re.findall(r"\]\((.*?)\)", text))
    assert "[arXiv 2305.05392](https://" in text
    assert re.findall("```python\n(.*?)```", text, re.DOTALL) == SNIPPETS["README.md"]


@pytest.mark.parametrize(
    ("page", "link"),
    [
        (page, link)
        for page in PAGES
        for link in re.findall(r"\]\((?!https?:)([^)#]+)\)", TEXTS[page])
    ],
)
def test_every_link_leads_somewhere(page, link):
    assert ((ROOT / page).parent / link).exists()


@pytest.mark.parametrize("page", PAGES)
def test_every_page_is_in_the_sites_navigation(page):
    assert f": {page}\n" in (ROOT / "mkdocs.yml").read_text()
