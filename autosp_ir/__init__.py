"""Sequence-parallel training as composable passes over a small dataflow IR."""
