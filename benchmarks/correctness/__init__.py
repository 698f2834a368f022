"""DeepSpeed AutoSP and ours on the same small models, loss and gradients against the dense model."""
