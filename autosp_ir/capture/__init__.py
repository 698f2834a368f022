"""From PyTorch models and FX graphs into the IR."""
