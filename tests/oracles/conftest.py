"""What is not collected for doctests, which would import it without PyTorch."""

collect_ignore = ["torch_twin.py"]
