"""What each field of a config means, in the words of the code that reads it.

The comments of `configs/base.py`, and of methods and networks the arguments in the
docstrings of their constructors.
"""

import inspect
import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from samrobust.experiments import components, entries, methods
from samrobust.experiments.config_files import base_file
from samrobust.system.fields import flatten
from samrobust.types import Config

__all__ = ["ExplainedField", "explain"]

# Fields of parts that no constructor has as a parameter.
_OF_PARTS = {
    "batch_stats": "which pass updates BatchNorm's running statistics: first (at w), "
    "second (at w + e) or both, as in the paper's code",
    "m": "of m-sharpness: every m consecutive examples of a batch have an ascent "
    "direction of their own; it divides training.batch_size, and "
    "model.batch_norm_group must divide it; 0: the whole batch",
    "rho_end": "reached linearly at the end of training; None: constant",
    "gamma_end": "reached linearly at the end of training; None: constant",
    "start": "the fraction of the epochs, rounded up to whole ones, after which the "
    "part is on",
    "replays": "steps in a row that each batch is trained on",
    "step_size": "in 1/255 units; unless set, the radius times relative_step_size",
    "relative_step_size.linf": "of an attack's step in l-inf, in radii",
    "relative_step_size.l2": "of an attack's step in l2, in radii",
}


class ExplainedField(NamedTuple):
    """A field of a config: its full name, its value, and what it means."""

    name: str
    value: Any
    meaning: str


def explain(config: Config) -> Iterator[ExplainedField]:
    """Yields the fields that count for a config's row, section by section.

    In the order of `configs/base.py`, parts of the row last; sections of methods that
    the row lacks are left out.
    """
    said = dict(_comments())
    order = [name for name in dict.fromkeys(map(_section, said)) if name != "paper"]
    make = components.find_model(config.model.name)
    said |= {f"model.{name}": text for name, text in _arguments(make).items()}
    for part in methods.parts_of(config):
        section = entries.section_of(part.name)
        make = entries.find(part.name).make
        own = inspect.signature(make).parameters
        told = {n: text for n, text in _OF_PARTS.items() if n not in own}
        told |= _arguments(make)
        names = entries.section_fields(part.name)
        said |= {f"{section}.{name}": told.get(name, "") for name in names}
        order.append(section)
    fields = [field for field in flatten(config) if _section(field[0]) in order]
    fields.sort(key=lambda field: order.index(_section(field[0])))
    for name, value in fields:
        yield ExplainedField(name, value, said.get(name, ""))


def _section(name: str) -> str:
    return name.partition(".")[0]


def _comments() -> Iterator[tuple[str, str]]:
    """Yields the fields of `configs/base.py`, each with its comment.

    That is the one on its line, after the one that stands above it; with neither, the
    one above the fields before it.
    """
    above: list[str] = []
    fresh = True  # whether the comment has had no field yet
    for line in base_file().read_text("utf-8").splitlines():
        if comment := re.fullmatch(r"\s+# (.*)", line):
            above = [*above, comment[1]] if fresh else [comment[1]]
            fresh = True
        elif field := re.match(r"\s+config\.([\w.]+) = [^#]*(?:# (.*))?", line):
            told = above if fresh or not field[2] else []
            yield field[1], " ".join(filter(None, [*told, field[2]]))
            fresh = False
        else:
            above, fresh = [], True


def _arguments(make: Callable[..., Any]) -> dict[str, str]:
    """Returns what a docstring of Google's style says of each argument."""
    said: dict[str, str] = {}
    for kind in reversed(inspect.getmro(make)) if inspect.isclass(make) else [make]:
        doc = inspect.cleandoc(kind.__doc__ or "")
        block = re.search(r"^(?:Args|Attributes):\n((?:  .*\n?|\n(?=  ))+)", doc, re.M)
        listed = r"^  (\w[\w, ]*): (.*(?:\n {4,}.*)*)"
        for names, text in re.findall(listed, block[1] if block else "", re.M):
            said |= dict.fromkeys(names.split(", "), " ".join(text.split()))
    return said
