"""The model zoo: tiny models with one example batch each, by name."""

from tests.models.plain import PlainDecoder, plain_decoder
from tests.models.transformers_zoo import gpt2, llama, mistral, qwen3
from tests.models.zoo import ZOO, build

__all__ = ["ZOO", "PlainDecoder", "build", "gpt2", "llama", "mistral", "plain_decoder", "qwen3"]
