"""The Qwen-VL family: dynamic resolution, three-axis rotary positions, ``mm_token_type_ids``."""

from collections.abc import Callable
from typing import Any

import transformers
from transformers import PreTrainedModel, ProcessorMixin

from alula.models.processors import MissingVideo, images_only

from .parts import HIDDEN_SIZE, TEXT, chat_template, make_tokenizer

ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
PATCHES = {"patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2, "num_heads": 2}


def special_ids(tokenizer: Any) -> dict[str, int]:
    """The configuration's ids of the special tokens."""
    names = {
        "image_token_id": "<|image_pad|>",
        "video_token_id": "<|video_pad|>",
        "vision_start_token_id": "<|vision_start|>",
        "vision_end_token_id": "<|vision_end|>",
    }
    return {name: tokenizer.convert_tokens_to_ids(token) for name, token in names.items()}


def make_processor(kind: type[ProcessorMixin], video: str, tokenizer: Any) -> ProcessorMixin:
    """A Qwen processor whose images become at most 16 tokens."""
    size = {"shortest_edge": 56 * 56, "longest_edge": 112 * 112}
    return images_only(kind)(
        image_processor=transformers.Qwen2VLImageProcessorPil(patch_size=14, merge_size=2, temporal_patch_size=2, size=size),
        tokenizer=tokenizer,
        video_processor=MissingVideo({"video_processor_type": video}),
        chat_template=chat_template("<|vision_start|><|image_pad|><|vision_end|>"),
    )


def qwen2_vl() -> tuple[PreTrainedModel, ProcessorMixin]:
    tokenizer = make_tokenizer(image_token="<|image_pad|>", video_token="<|video_pad|>")
    config = transformers.Qwen2VLConfig(
        text_config={**TEXT, "rope_parameters": ROPE},
        vision_config=dict(PATCHES, depth=2, embed_dim=32, hidden_size=HIDDEN_SIZE, mlp_ratio=2),
        **special_ids(tokenizer),
    )
    processor = make_processor(transformers.Qwen2VLProcessor, "Qwen2VLVideoProcessor", tokenizer)
    return transformers.Qwen2VLForConditionalGeneration(config), processor


def qwen2_5_vl() -> tuple[PreTrainedModel, ProcessorMixin]:
    tokenizer = make_tokenizer(image_token="<|image_pad|>", video_token="<|video_pad|>")
    vision = dict(PATCHES, depth=2, hidden_size=32, intermediate_size=64, out_hidden_size=HIDDEN_SIZE)
    config = transformers.Qwen2_5_VLConfig(
        text_config={**TEXT, "rope_parameters": ROPE},
        vision_config=dict(vision, window_size=56, fullatt_block_indexes=[1]),
        **special_ids(tokenizer),
    )
    processor = make_processor(transformers.Qwen2_5_VLProcessor, "Qwen2VLVideoProcessor", tokenizer)
    return transformers.Qwen2_5_VLForConditionalGeneration(config), processor


def qwen3_vl() -> tuple[PreTrainedModel, ProcessorMixin]:
    tokenizer = make_tokenizer(image_token="<|image_pad|>", video_token="<|video_pad|>")
    vision = dict(PATCHES, depth=3, hidden_size=32, intermediate_size=64, out_hidden_size=HIDDEN_SIZE)
    config = transformers.Qwen3VLConfig(
        text_config={**TEXT, "head_dim": 16, "rope_parameters": {**ROPE, "mrope_interleaved": True}},
        vision_config=dict(vision, num_position_embeddings=16, deepstack_visual_indexes=[0, 1]),
        **special_ids(tokenizer),
    )
    processor = make_processor(transformers.Qwen3VLProcessor, "Qwen3VLVideoProcessor", tokenizer)
    return transformers.Qwen3VLForConditionalGeneration(config), processor


qwen_builders: dict[str, Callable[[], tuple[PreTrainedModel, ProcessorMixin]]] = {
    "qwen2_vl": qwen2_vl,
    "qwen2_5_vl": qwen2_5_vl,
    "qwen3_vl": qwen3_vl,
}
