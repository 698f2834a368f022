"""Passes for `autosp_ir` that live outside of it."""
