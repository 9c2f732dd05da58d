"""PyTorch for the oracles: where it must be there, and on how many threads it runs."""

from collections.abc import Iterator

import pytest

# Not collected for doctests, which would import them without PyTorch.
collect_ignore = ["torch_twin.py", "torch_reference_network.py"]


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Networks this small lose time to threads, much of it on a busy machine."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
