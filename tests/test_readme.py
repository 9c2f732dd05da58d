"""The README tells the truth: its code runs, its commands and fields exist."""

import pathlib
import re
import shlex

import jax.numpy as jnp
import numpy as np
import pytest

from samrobust import cli, configuration

ROOT = pathlib.Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
SNIPPETS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def run_snippet(index):
    names: dict = {}
    exec(compile(SNIPPETS[index], f"README snippet {index}", "exec"), names)
    return names


def test_sam_in_an_optax_loop_converges():
    params = run_snippet(0)["params"]
    np.testing.assert_allclose(params, jnp.array([1.0, 2.0, 3.0]), atol=0.1)


def test_pgd_on_any_logits_fn_attacks_within_the_ball():
    names = run_snippet(1)
    moved = jnp.abs(names["adversarial"] - names["images"])
    assert 0 < moved.max() <= 8 / 255 + 1e-6


def commands():
    joined = re.sub(r" *\\\n *", " ", README)
    lines = re.findall(r"^ {4}(samrobust .*?)(?: {2,}#.*)?$", joined, re.MULTILINE)
    assert len(lines) >= 5
    return lines


@pytest.mark.parametrize("command", commands())
def test_every_command_line_is_accepted(command):
    arguments, overrides = cli._parse(shlex.split(command)[1:])
    if getattr(arguments, "config", None):
        config = configuration.load_config(arguments.config, overrides)
        assert config.is_locked


@pytest.mark.parametrize("field", re.findall(r"--config\.([\w.]+)", README))
def test_every_field_exists(field):
    value = configuration.base_config()
    for name in field.split("."):
        assert name in value
        value = value[name]


@pytest.mark.parametrize("target", re.findall(r"^ {4}make (\w+)", README, re.MULTILINE))
def test_every_make_target_exists(target):
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE)


@pytest.mark.parametrize("link", re.findall(r"\]\((?!https?:)([^)#]+)\)", README))
def test_every_link_leads_somewhere(link):
    assert (ROOT / link).exists()
