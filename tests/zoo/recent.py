"""Families of 2025 and 2026: experts fused in one tensor, linear attention in most layers, shared keys, embeddings per layer."""

from collections.abc import Callable

import pytest
import transformers
from transformers import PreTrainedModel, ProcessorMixin

from alula.models.processors import MissingVideo, images_only

from .parts import HIDDEN_SIZE, SIGLIP, TEXT, VISION, VOCAB_SIZE, chat_template, make_tokenizer
from .qwen import PATCHES, ROPE, make_processor, special_ids

QWEN_VISION = dict(PATCHES, depth=2, hidden_size=32, intermediate_size=64, out_hidden_size=HIDDEN_SIZE, num_position_embeddings=16)


def qwen3_vl_moe() -> tuple[PreTrainedModel, ProcessorMixin]:
    """Each layer's feed-forward network is a mixture of its own, whose experts are one tensor of three axes."""
    tokenizer = make_tokenizer(image_token="<|image_pad|>", video_token="<|video_pad|>")
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    config = transformers.Qwen3VLMoeConfig(
        text_config={**TEXT, **experts, "head_dim": 16, "rope_parameters": {**ROPE, "mrope_interleaved": True}},
        vision_config=dict(QWEN_VISION, deepstack_visual_indexes=[0]),
        **special_ids(tokenizer),
    )
    processor = make_processor(transformers.Qwen3VLProcessor, "Qwen3VLVideoProcessor", tokenizer)
    return transformers.Qwen3VLMoeForConditionalGeneration(config), processor


def qwen3_5() -> tuple[PreTrainedModel, ProcessorMixin]:
    """Three layers of linear attention, then one of softmax attention."""
    tokenizer = make_tokenizer(image_token="<|image_pad|>", video_token="<|video_pad|>")
    linear = {"linear_key_head_dim": 16, "linear_value_head_dim": 16, "linear_num_key_heads": 2, "linear_num_value_heads": 4}
    rope = {**ROPE, "mrope_interleaved": True, "partial_rotary_factor": 1.0}
    config = transformers.Qwen3_5Config(
        text_config={**TEXT, **linear, "head_dim": 16, "rope_parameters": rope}, vision_config=QWEN_VISION, **special_ids(tokenizer)
    )
    processor = make_processor(transformers.Qwen3VLProcessor, "Qwen3VLVideoProcessor", tokenizer)
    return transformers.Qwen3_5ForConditionalGeneration(config), processor


def glm4v() -> tuple[PreTrainedModel, ProcessorMixin]:
    """Norms behind attention and behind the MLP, whose first two linears are fused."""
    tokenizer = make_tokenizer(image_token="<|image|>", video_token="<video>")
    ids = tokenizer.convert_tokens_to_ids
    size = {"shortest_edge": 56 * 56, "longest_edge": 112 * 112}
    config = transformers.Glm4vConfig(
        text_config={**TEXT, "rope_parameters": {**ROPE, "partial_rotary_factor": 1.0}},
        vision_config=dict(PATCHES, depth=2, hidden_size=32, intermediate_size=64, out_hidden_size=HIDDEN_SIZE, image_size=112),
        image_token_id=ids("<|image|>"),
        video_token_id=ids("<video>"),
        image_start_token_id=ids("<img>"),
        image_end_token_id=ids("</img>"),
        video_start_token_id=ids("<IMG_START>"),
        video_end_token_id=ids("<IMG_END>"),
    )
    processor = images_only(transformers.Glm4vProcessor)(
        image_processor=transformers.Glm4vImageProcessorPil(patch_size=14, merge_size=2, temporal_patch_size=2, size=size),
        tokenizer=tokenizer,
        video_processor=MissingVideo({"video_processor_type": "Glm4vVideoProcessor"}),
        chat_template=chat_template("<img><|image|></img>"),
    )
    return transformers.Glm4vForConditionalGeneration(config), processor


def aya_vision() -> tuple[PreTrainedModel, ProcessorMixin]:
    """Attention and MLP side by side, from one norm; tiles whose edges are marked in plain words."""
    tokenizer = make_tokenizer(image_token="<IMG_CONTEXT>")
    config = transformers.AyaVisionConfig(
        text_config={"model_type": "cohere2", **TEXT, "sliding_window": 32},
        vision_config={**SIGLIP, "image_size": 56, "vision_use_head": False},
        image_token_index=tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"),
        vision_feature_layer=-1,
        alignment_intermediate_size=64,
    )
    processor = transformers.AyaVisionProcessor(
        image_processor=transformers.GotOcr2ImageProcessorPil(
            size={"height": 56, "width": 56}, crop_to_patches=True, min_patches=1, max_patches=4
        ),
        tokenizer=tokenizer,
        patch_size=14,
        img_size=56,
        downsample_factor=2,
        start_of_img_token="<img>",
        end_of_img_token="</img>",
        img_patch_token="<IMG_CONTEXT>",
        chat_template=chat_template("<image>"),
    )
    return transformers.AyaVisionForConditionalGeneration(config), processor


def gemma4() -> tuple[PreTrainedModel, ProcessorMixin]:
    """The last two layers take the keys and values of earlier ones; heads differ by layer; each layer has embeddings of its own."""
    try:
        kind = transformers.Gemma4Processor
    except ModuleNotFoundError:  # transformers 5.20
        pytest.skip("in this transformers the processor of Gemma 4 needs torchvision")
    tokenizer = make_tokenizer(
        boi_token="<start_of_image>",
        eoi_token="<end_of_image>",
        image_token="<image_soft_token>",
        audio_token="<IMG_ATOM>",
        boa_token="<IMG_START>",
        eoa_token="<IMG_END>",
    )
    ids = tokenizer.convert_tokens_to_ids
    own = {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": VOCAB_SIZE, "num_kv_shared_layers": 2}
    text = {**TEXT, **own, "head_dim": 16, "global_head_dim": 32, "sliding_window": 32}
    config = transformers.Gemma4Config(
        text_config={**text, "layer_types": ["sliding_attention", "full_attention"] * 2},
        vision_config=dict(VISION, num_key_value_heads=2, head_dim=16, patch_size=4, pooling_kernel_size=3, position_embedding_size=64),
        boi_token_id=ids("<start_of_image>"),
        eoi_token_id=ids("<end_of_image>"),
        image_token_id=ids("<image_soft_token>"),
        video_token_id=ids("<video>"),
        audio_token_id=ids("<IMG_ATOM>"),
        boa_token_id=ids("<IMG_START>"),
        eoa_token_index=ids("<IMG_END>"),
    )
    processor = images_only(kind)(
        feature_extractor=transformers.Gemma4AudioFeatureExtractor(),
        image_processor=transformers.Gemma4ImageProcessorPil(patch_size=4, pooling_kernel_size=3, max_soft_tokens=70),
        tokenizer=tokenizer,
        video_processor=MissingVideo({"video_processor_type": "Gemma4VideoProcessor"}),
        image_seq_length=70,
        chat_template=chat_template("<image_soft_token>"),
    )
    return transformers.Gemma4ForConditionalGeneration(config), processor


recent_builders: dict[str, Callable[[], tuple[PreTrainedModel, ProcessorMixin]]] = {
    builder.__name__: builder for builder in (qwen3_vl_moe, qwen3_5, glm4v, aya_vision, gemma4)
}
