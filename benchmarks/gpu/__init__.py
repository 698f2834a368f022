"""One training step on real GPUs: ours and what users would pick instead, in one run."""
