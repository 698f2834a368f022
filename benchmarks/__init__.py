"""Benchmarks: compile time on any machine, training steps on GPUs."""
