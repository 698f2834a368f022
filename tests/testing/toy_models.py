"""Models without attention, so that these tests depend on few passes."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from autosp_ir.capture.program import capture
from autosp_ir.ir.program import Program

VOCAB = 11


class Tokenwise(nn.Module):
    """Embedding, a norm computed in float32 whatever the dtype, a head, and a mean loss."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, width)
        self.scale = nn.Parameter(torch.randn(width))
        self.head = nn.Linear(width, VOCAB)
        self.inv_freq = nn.Buffer(1.0 / torch.arange(1, width + 1).float())

    def forward(self, input_ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
        x = self.embed(input_ids)
        wide = x.to(torch.float32)
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
        position = torch.arange(input_ids.shape[1])[:, None] / 3
        angle = (position * self.inv_freq).cos().to(x.dtype)
        logits = self.head(self.scale * wide.to(x.dtype) * angle)
        return {"loss": F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten()), "logits": logits}


def tokenwise(dtype: torch.dtype = torch.float32, length: int = 12) -> tuple[nn.Module, dict[str, Tensor]]:
    torch.manual_seed(0)
    model = Tokenwise().to(dtype)
    ids = torch.randint(0, VOCAB, (2, length))
    labels = ids.roll(-1, 1)
    labels[:, -3:] = -100
    return model, {"input_ids": ids, "labels": labels}


def canonical(model: nn.Module, batch: dict[str, Tensor], outputs: list[str] | None = None) -> Program:
    """The captured program, which is canonical as it is: it holds no attention."""
    program = capture(model, batch, outputs=outputs)
    program.facts.add("canonical")
    return program
