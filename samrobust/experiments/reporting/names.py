"""What the names of rows and columns say, and the attack of a config in words.

A row is `"st"`, `"sam,rho=0.2"`, `"at,norm=linf,eps=8+sam,rho=0.1"`; a column is
`"natural"` or a norm and a radius in 1/255, `"linf 1/255"`, and where there are several
attacks the name of one, `"linf 1/255 AA"`, or several checkpoints, `"natural best"`.
"""

import re
from collections.abc import Mapping
from typing import Any

from samrobust.checks import NORMS, check
from samrobust.system.fields import split_fields

__all__ = [
    "attack_in_words",
    "attacked_in_words",
    "checkpoint_in_words",
    "column_norm",
    "column_of",
    "column_order",
    "family",
    "short_column",
    "short_label",
    "split_column",
]

_COLUMN = re.compile(r"(natural|\w+ \d+(?:\.\d+)?/255)(?: (\S.*))?")
_ORDER = ("natural", *NORMS)
_OF_PGD = ("linf_step", "l2_step", "random_start", "gradient_floor")


def family(row: str) -> str:
    """Returns the family of methods that a row belongs to.

    >>> [family(row) for row in ("st", "sam,rho=0.2", "at,norm=linf,eps=8")]
    ['ST', 'SAM', 'AT linf']
    >>> family("at,norm=l2,eps=64+awp,gamma=0.01"), family("mine:lookahead,k=5")
    ('AT+AWP l2', 'lookahead')
    >>> family("st,model.norm=group"), family("mine:clipped,clip_norm=1")
    ('ST', 'clipped')
    """
    method, _ = split_fields(row)
    names = re.findall(r"(?:^|\+)([A-Za-z_][\w.:]*)", method)
    own = [name.rpartition(":")[2] if ":" in name else name.upper() for name in names]
    return " ".join(["+".join(own), *re.findall(r",norm=(\w+)", method)])


def column_of(norm: str, radius: float) -> str:
    """Names the column of a ball, its radius in 1/255.

    >>> column_of("linf", 8.0)
    'linf 8/255'
    """
    return f"{norm} {radius:g}/255"


def split_column(column: str) -> tuple[str, str]:
    """Returns a column's perturbation, and the attack and checkpoint if it names them.

    >>> split_column("linf 8/255 AA best"), split_column("natural")
    (('linf 8/255', 'AA best'), ('natural', ''))

    Raises:
      ValueError: unless the column is `natural` or `<norm> <radius>/255`, and what
        follows either, such as ` AA`, is set off by a space.
    """
    condition = "a column named 'natural' or '<norm> <radius>/255'"
    fix = "Name it as in 'linf 8/255', or 'linf 8/255 AA' with the attack."
    match = _COLUMN.fullmatch(column)
    check(match is not None, condition, fix, column=column)
    assert match is not None
    return match[1], match[2] or ""


def column_norm(column: str) -> str:
    """Returns the group of a column: `"natural"`, or the norm of its attack.

    >>> column_norm("linf 8/255")
    'linf'
    """
    return column.partition(" ")[0]


def column_order(column: str) -> tuple[int, str, float, str]:
    """Returns the key that sorts columns: natural, linf, l2, others; radius; the rest.

    >>> sorted(["l2 32/255", "l2 4/255 AA", "natural", "l2 4/255"], key=column_order)
    ['natural', 'l2 4/255', 'l2 4/255 AA', 'l2 32/255']

    Raises:
      ValueError: as `split_column`.
    """
    ball, rest = split_column(column)
    norm, _, radius = ball.removesuffix("/255").partition(" ")
    rank = _ORDER.index(norm) if norm in _ORDER else len(_ORDER)
    return rank, norm, float(radius or 0), rest


def attack_in_words(evaluation: Mapping[str, Any]) -> str:
    """Names the attack of a config: `PGD-20 on the margin loss, any iterate judged`.

    Steps and starts are named where they are not those of the paper.
    """
    if evaluation["attack"] == "autoattack":
        members = ", ".join(evaluation["members"])
        return f"AutoAttack, {evaluation['version']}" + (members and f" ({members})")
    several = evaluation["restarts"] > 1
    restarts = f" x {evaluation['restarts']}" if several else ""
    from samrobust.experiments.configuration import base_config

    usual = base_config().evaluation
    own = [n for n in _OF_PGD if evaluation.get(n, usual[n]) != usual[n]]
    return ", ".join(
        [
            f"PGD-{evaluation['num_steps']}{restarts} on the {evaluation['loss']} loss",
            f"{evaluation['judge']} iterate judged",
            *(f"{name} {evaluation[name]}" for name in own),
        ]
    )


def checkpoint_in_words(evaluation: Mapping[str, Any]) -> str:
    """Names what is judged: `last checkpoint`, or `last and best checkpoint`."""
    which = evaluation["checkpoint"]
    return f"{'last and best' if which == 'both' else which} checkpoint"


def short_column(column: str) -> str:
    """Returns a column's name without the unit of its radius.

    >>> short_column("linf 8/255")
    'linf 8'
    """
    return column.replace("/255", "")


def short_label(label: str) -> str:
    """Returns a row's label without brackets, parameter names and units.

    >>> short_label("AT (linf, eps = 8/255)"), short_label("SAM (rho = 0.2)")
    ('AT linf 8', 'SAM 0.2')
    """
    label = re.sub(r"\w+ *= *", "", label.replace("/255", ""))
    return " ".join(re.sub(r"[(),]", " ", label).split())


def attacked_in_words(done: int, num_examples: int) -> str:
    """Returns how far an evaluation is, for progress.

    >>> attacked_in_words(500, 1000)
    'attacked 500 of 1,000 images'
    """
    return f"attacked {done:,} of {num_examples:,} images"
