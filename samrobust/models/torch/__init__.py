"""To PyTorch and back: names and layouts of weights, their files, calls across.

`samrobust export` and `samrobust import` are the commands; docs/interchange.md shows
all of it. PyTorch is imported where it is used, and is no dependency.
"""

from samrobust.models.torch.bridge import as_torch, from_torch
from samrobust.models.torch.names import from_tensors, infer_architecture, to_tensors
from samrobust.models.torch.weights import (
    Weights,
    read_weights,
    write_pytorch,
    write_safetensors,
)

__all__ = [
    "Weights",
    "as_torch",
    "from_tensors",
    "from_torch",
    "infer_architecture",
    "read_weights",
    "to_tensors",
    "write_pytorch",
    "write_safetensors",
]
