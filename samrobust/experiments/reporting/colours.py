"""What pictures of methods share: a colour a family, symbols for the names' words."""

from collections.abc import Iterable

__all__ = ["escape", "family_colours", "in_symbols", "norm_symbol"]

# Okabe and Ito, Color Universal Design (2008): distinct for colour-blind readers.
_COLOURS = {"ST": "#000000", "SAM": "#D55E00", "AT linf": "#0072B2", "AT l2": "#009E73"}
_OTHER_COLOURS = ("#CC79A7", "#E69F00", "#56B4E9")
_SYMBOLS = {  # script small l; Greek rho and epsilon
    "linf": "\u2113∞",
    "l2": "\u21132",
    "rho": "\u03c1",
    "eps": "ε",
    "epsilon": "ε",
}


def family_colours(families: Iterable[str]) -> dict[str, str]:
    """A colour for every family, and for those that the paper has."""
    others = [f for f in dict.fromkeys(families) if f not in _COLOURS]
    cycle = {f: _OTHER_COLOURS[i % 3] for i, f in enumerate(others)}
    return _COLOURS | cycle


def norm_symbol(norm: str) -> str:
    """A norm as it is written in a picture."""
    return _SYMBOLS.get(norm, norm)


def in_symbols(label: str) -> str:
    """A row's label with symbols for names of norms and parameters."""
    words = label.replace("(", "( ").replace(",", " ,").split()
    text = " ".join(_SYMBOLS.get(word, word) for word in words)
    return escape(text.replace("( ", "(").replace(" ,", ","))


def escape(text: str) -> str:
    """Text in which Matplotlib sees no formula."""
    return text.replace("$", r"\$")
