"""Values of flags: lists with commas."""

import argparse

__all__ = ["floats", "numbers", "words"]


def words(text: str) -> tuple[str, ...]:
    """`a,b` as ("a", "b")."""
    return tuple(filter(None, text.split(",")))


def floats(text: str) -> tuple[float, ...]:
    """`0.5,1` as (0.5, 1.0)."""
    try:
        return tuple(float(word) for word in words(text))
    except ValueError:
        message = f"expected numbers separated by commas, got {text!r}"
        raise argparse.ArgumentTypeError(message) from None


def numbers(text: str) -> tuple[int, ...]:
    """`1,2` as (1, 2)."""
    return tuple(int(word) for word in words(text))
