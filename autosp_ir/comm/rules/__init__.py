"""Layout rules, one file per family of operations; importing this package attaches them."""

from autosp_ir.comm.rules import (
    attention,
    chunk_loop,
    chunks,
    collectives,
    creation,
    host_memory,
    indexing,
    loss,
    matmul,
    normalisation,
    parts,
    pointwise,
    random,
    reductions,
    views,
)

__all__ = [
    "attention",
    "chunk_loop",
    "chunks",
    "collectives",
    "creation",
    "host_memory",
    "indexing",
    "loss",
    "matmul",
    "normalisation",
    "parts",
    "pointwise",
    "random",
    "reductions",
    "views",
]
