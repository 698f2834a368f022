"""The demonstration behind `autosp-ir demo`: the same training run, dense and sequence-parallel, side by side."""
