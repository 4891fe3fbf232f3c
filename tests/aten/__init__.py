"""torch's own operator samples (OpInfo) through the PyTorch route: the core ATen set."""
