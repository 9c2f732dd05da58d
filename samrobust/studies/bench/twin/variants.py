"""The ways in which the paper's step is written in PyTorch; `reference` describes them.

Loads nothing, so that the command line can name them.
"""

from typing import NamedTuple

__all__ = ["VARIANTS", "Variant"]


class Variant(NamedTuple):
    """A way to write the step.

    Attributes:
      precisions: in which it is timed.
      mode: of `torch.compile` on CUDA; None: nothing is compiled.
      compiles_on_cpu: whether it is compiled on the CPU too.
    """

    precisions: tuple[str, ...]
    mode: str | None = None
    compiles_on_cpu: bool = False

    @property
    def is_tuned(self) -> bool:
        """Returns whether it is written for speed: published code has float32 alone."""
        return "bfloat16" in self.precisions


_PUBLISHED, _TUNED = ("float32",), ("float32", "bfloat16")
# Of "max-autotune" all but its graphs, which would replay the network alone: `capture`
# takes one graph of the whole step.
_SEARCHED = "max-autotune-no-cudagraphs"
VARIANTS = {
    "reference": Variant(_PUBLISHED),
    "resident": Variant(_PUBLISHED),
    "tuned": Variant(_TUNED, "default"),
    "graphed": Variant(_TUNED),
    "compiled": Variant(_TUNED, "default", compiles_on_cpu=True),
    "autotuned": Variant(_TUNED, _SEARCHED, compiles_on_cpu=True),
    "pure": Variant(("bfloat16",), "default", compiles_on_cpu=True),
}
