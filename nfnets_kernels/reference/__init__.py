"""Every op in plain PyTorch: its definition, the oracle of its tests, and the backend that runs anywhere."""
