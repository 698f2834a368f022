"""Lowered programs of decoder layers with 8B shapes, on fake weights."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import LlamaConfig, LlamaModel

import autosp_ir as air

_PIPELINE = (
    "canonicalize,pad-tokens,token-partition,ulysses{heads},differentiate{{decompose=true}},remat{{aggressive=true}},"
    "grad-sync{{mode={sync}}},lower-comm"
)


class Layers(nn.Module):
    """Decoder layers of 8B shapes behind given hidden states, without embedding and head.

    Args:
        count: How many.
    """

    def __init__(self, count: int) -> None:
        super().__init__()
        self.model = LlamaModel(
            LlamaConfig(
                hidden_size=4096,
                intermediate_size=14336,
                num_hidden_layers=count,
                num_attention_heads=32,
                num_key_value_heads=8,
                vocab_size=8,
                max_position_embeddings=2**20,
                use_cache=False,
            )
        )

    def forward(self, hidden: Tensor) -> Tensor:
        """Hidden states `[B, S, 4096]` to a number that needs all of them."""
        out = self.model(inputs_embeds=hidden).last_hidden_state
        loss: Tensor = out.float().square().mean()
        return loss


def captured(layers: int, tokens: int) -> air.Program:
    """The forward of one sequence, in bf16."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with FakeTensorMode():
            model = Layers(layers)
            hidden = torch.zeros(1, tokens, 4096)
    finally:
        torch.set_default_dtype(default)
    return air.capture(model, {"hidden": hidden}, seq_dims={"hidden": 1})


def lowered(program: air.Program, ranks: int, chunks: int, sync: str) -> air.Program:
    """Partitioned, differentiated and lowered; nothing is ordered yet.

    Args:
        program: From `captured`.
        ranks: Ranks of the sequence.
        chunks: Groups of heads of each attention.
        sync: `in_graph` or `external`.
    """
    heads = f",head-chunk{{chunks={chunks}}}" if chunks > 1 else ""
    pipeline = _PIPELINE.format(heads=heads, sync=sync)
    return air.PassManager(pipeline, verify=False).run(program, mesh={"sp": ranks}).program
