"""Keeps doctest collection away from the modules that PyTorch must be there for."""

collect_ignore = ["torch_twin.py", "torch_reference_network.py"]
