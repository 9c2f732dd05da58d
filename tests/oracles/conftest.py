"""Keeps doctest collection away from the module that needs PyTorch to be imported."""

collect_ignore = ["torch_twin.py"]
