"""Entries: what the names of training methods stand for, and their config fields.

A name is one of the registries', or `package.module:name`, a constructor (or an
`Entry`) outside of this package.
"""

import collections
import contextlib
import functools
import inspect
import re
import types
from collections.abc import Callable, Iterator, Mapping
from typing import (
    Annotated,
    Any,
    Literal,
    NamedTuple,
    TypeVar,
    Union,
    get_args,
    get_origin,
)

import optax

from samrobust.checks import (
    BATCH_STATS,
    LARGEST_REAL,
    CheckError,
    Rule,
    check,
    check_real,
    check_whole,
    each,
    maybe,
    one_of,
    switch,
    text,
)
from samrobust.sharpness import SHARPNESS
from samrobust.system.resolve import is_reference, resolve, running
from samrobust.training.adversaries import ADVERSARIES
from samrobust.training.averaging import AVERAGES
from samrobust.training.objectives import OBJECTIVES
from samrobust.training.phases import START
from samrobust.types import Entry, Field

__all__ = [
    "REGISTRIES",
    "REGISTRY",
    "Given",
    "fields_of_parameters",
    "find",
    "has_parameter",
    "is_optimizer",
    "look_up",
    "of_training",
    "options",
    "renamed",
    "replaces_optimizer",
    "section_fields",
    "section_of",
    "strength_of",
]

_T = TypeVar("_T")

# In the order of the parts of a row.
REGISTRIES = (ADVERSARIES, OBJECTIVES, SHARPNESS, AVERAGES)
REGISTRY: Mapping[str, str] = collections.ChainMap(*reversed(REGISTRIES))
_PLAIN = (bool, int, float, str, tuple)  # what a field of a config can hold


class Given(NamedTuple):
    """Values from the training; a constructor gets those that are parameters of it.

    Attributes:
      aux: the structure of BatchNorm's statistics, which leave a second pass.
      grouped: whether groups of examples have an ascent direction of their own.
      optimizer: of the training, for a method that wraps one.
      learning_rate: its schedule, for a method that is the optimizer.
      momentum: of the optimizer.
      weight_decay: of the optimizer.
      num_classes: of the data.
      total_steps: of the training.
      steps_per_epoch: of it.
    """

    aux: Any = None
    grouped: bool = False
    optimizer: optax.GradientTransformation = optax.identity()
    learning_rate: optax.Schedule = optax.constant_schedule(0.1)
    momentum: float = 0.0
    weight_decay: float = 0.0
    num_classes: int = 10
    total_steps: int = 1
    steps_per_epoch: int = 1


def look_up(name: str, registry: Mapping[str, Any], what: str, field: str) -> Any:
    """Returns the constructor, or the `Entry`, that a name stands for.

    Args:
      name: one of the registry's, or `package.module:name`.
      registry: constructors, or where they are.
      what: is looked for, for messages, as in `the model`.
      field: that holds the name.

    Raises:
      ValueError: if there is none, or it is not a constructor.
    """
    wanted = f"{field} in {{{', '.join(registry)}}} or package.module:name"
    check(name in registry or is_reference(name), wanted, **{field: name})
    found: Any = registry.get(name, name)
    found = resolve(found, what) if isinstance(found, str) else found
    holds = callable(found) or isinstance(found, Entry)
    check(holds, f"{what}'s constructor", **{field: name})
    return found


@functools.cache
def find(name: str) -> Entry:
    """Returns the entry of a name in rows.

    Raises:
      ValueError: as `look_up`.
    """
    found = look_up(name, REGISTRY, "a method", "method")
    return found if isinstance(found, Entry) else Entry(found)


def _parameters_of(make: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    """Returns a constructor's parameters; annotations as types where they can be."""
    try:
        return inspect.signature(make, eval_str=True).parameters
    except (NameError, SyntaxError, TypeError, AttributeError):  # for checkers alone
        return inspect.signature(make).parameters


def options(name: str) -> Mapping[str, str]:
    """Returns a part's options, in order, and the fields they are written to."""
    entry = find(name)
    if entry.options is not None:
        return entry.options
    parameters = _parameters_of(entry.make)
    fields = fields_of_parameters(entry.make, Given._fields)
    return {n: n for n in fields if parameters[n].default is parameters[n].empty}


def fields_of_parameters(
    make: Callable[..., Any], provided: tuple[str, ...]
) -> dict[str, Field]:
    """Returns a constructor's parameters as fields of a config, by default and type.

    Those that are not provided, and that can be given in a config; one without a
    default has to be given a value. The constructor checks the rest.
    """
    fields = {}
    for name, parameter in _parameters_of(make).items():
        default = parameter.default
        several = parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL)
        if name in provided or several:
            continue
        if default is None or default is parameter.empty:
            kind = _kind_of(parameter.annotation)
            rule = _rule_of(kind)
            rule = maybe(rule) if default is None else rule
            fields[name] = Field(None, rule, kind)
        elif isinstance(default, _PLAIN):
            fields[name] = Field(default, _rule_of(type(default)))
    return fields


def _kind_of(annotation: Any) -> type:
    """Returns the plain type that an annotation names first; float if it names none."""
    if isinstance(annotation, str):  # which could not be evaluated
        named = re.match(r"(?:(?:typing\.)?Optional\[)?(\w*)", annotation)
        kinds = {kind.__name__: kind for kind in _PLAIN}
        return kinds.get(named[1] if named else "", float)
    kind, inside = get_origin(annotation) or annotation, get_args(annotation)
    if kind is Literal:
        return type(next((one for one in inside if one is not None), 0.0))
    if kind is Annotated:
        return _kind_of(inside[0])
    if kind in (Union, types.UnionType):
        return _kind_of(next(one for one in inside if one is not types.NoneType))
    return kind if kind in _PLAIN else float


def _rule_of(kind: type) -> Rule:
    rules: dict[type, Rule] = {
        bool: switch,
        int: functools.partial(check_whole, -(2**31)),
        float: functools.partial(check_real, -LARGEST_REAL, LARGEST_REAL),
        str: text,
    }
    return rules.get(kind, each(lambda **_: None))


def strength_of(name: str) -> str | None:
    """Returns the field that says how far weights move: the first option, a number."""
    parameters = _parameters_of(find(name).make)
    named = (parameters[field] for field in options(name).values())
    return next((p.name for p in named if _kind_of(p.annotation) is float), None)


@functools.cache
def section_fields(name: str) -> Mapping[str, Field]:
    """Returns the fields of a part's config section, by dotted names."""
    entry = find(name)
    fields = fields_of_parameters(entry.make, Given._fields)
    if has_parameter(name, "aux"):  # sharpness; `explaining` says what these mean
        strength = strength_of(name)
        if strength is not None:
            end = maybe(functools.partial(check_real, 0, 1e3))
            fields.setdefault(f"{strength}_end", Field(None, end, float))
        fields.setdefault("batch_stats", Field("both", one_of(*BATCH_STATS)))
        fields.setdefault("m", Field(0, functools.partial(check_whole, 0)))
        if not is_optimizer(name):  # without which there is no training before it
            fields.setdefault("start", START)
    own = {
        key: given if isinstance(given, Field) else _ruled(fields[key], given)
        for key, given in entry.fields.items()
    }
    return own | fields | own  # own rules come first, and win


def _ruled(field: Field, rule: Rule) -> Field:
    """Returns the field of a parameter with another rule; it is off by default."""
    default = field.kind() if field.kind else field.default
    return Field(default, rule)


def section_of(name: str) -> str:
    """Returns the name of a part's config section."""
    return find(name).section or name.rpartition(":")[2]


@contextlib.contextmanager
def renamed(names: Mapping[str, str], maker: str = "") -> Iterator[None]:
    """Puts fields' full names into the messages of checks that fail inside.

    Args:
      names: see `CheckError.renamed`.
      maker: name of the constructor that runs inside; what goes wrong in somebody's own
        is said as `running` says it.
    """
    try:
        with running(maker) if is_reference(maker) else contextlib.nullcontext():
            yield
    except CheckError as error:
        raise error.renamed(names) from error


def of_training(name: str, field: str, values: Mapping[str, Any], default: _T) -> _T:
    """Returns a field that the training reads, as `start`, `m` or `replays`.

    Args:
      name: of the part; a parameter of that name is its constructor's own affair.
      field: of the part's section.
      values: of the section.
      default: where the part has no such field.
    """
    return default if has_parameter(name, field) else values.get(field, default)


def is_optimizer(name: str) -> bool:
    """Returns whether a part wraps the training's optimizer, or is one itself."""
    return replaces_optimizer(name) or has_parameter(name, "optimizer")


def replaces_optimizer(name: str) -> bool:
    """Returns whether a part is an optimizer itself."""
    return has_parameter(name, "learning_rate")


def has_parameter(name: str, parameter: str) -> bool:
    """Returns whether a part's constructor has a parameter, such as `weight_decay`."""
    return parameter in _parameters_of(find(name).make)
