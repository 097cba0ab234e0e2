"""The models that `experts.py` measures: random Qwen2.5-VLs by width, and the embedded default."""

from typing import Any

import torch
from torch import Tensor
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

MODELS = {"512 wide": (512, 1376, 4), "2048 wide": (2048, 5504, 1), "2048 wide, short": (2048, 5504, 1), "tiny": (32, 64, 1)}
SIZES = {"2048 wide, short": (4, 128), "smol": (2, 128), "tiny": (1, 16)}
"""Samples and tokens of a batch, where they are not the options' own: peers must fit into memory, and `smol` has thirty layers."""


def make_model(name: str) -> Any:
    """A random Qwen2.5-VL by width, MLP and layers, or the embedded default."""
    if name == "smol":
        from alula.models import load_model

        return load_model("smol", dtype="float32")[0].eval()
    hidden, inner, layers = MODELS[name]
    heads = max(1, hidden // 64)
    head = hidden // heads
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [head // 2 - 2 * (head // 6), head // 6, head // 6]}
    text = {
        "hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers, "vocab_size": 2048, "rope_parameters": rope,
        "num_attention_heads": heads, "num_key_value_heads": max(1, heads // 2), "max_position_embeddings": 2048,
        "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    vision = {
        "depth": 1,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_heads": 2,
        "out_hidden_size": hidden,
        "fullatt_block_indexes": [0],
    }
    torch.manual_seed(0)
    return Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision)).eval()


def tokens_of(batch: int, length: int) -> dict[str, Tensor]:
    """Random words: batch x length; none of the special tokens, which come first in all of these vocabularies."""
    ids = torch.randint(100, 1000, (batch, length), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
