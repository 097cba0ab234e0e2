"""The others: Gemma's two (bidirectional image tokens), cross-attention, encoder-decoder, query tokens."""

from collections.abc import Callable

import transformers
from transformers import PreTrainedModel, ProcessorMixin

from .parts import HIDDEN_SIZE, SIGLIP, TEXT, VISION, VOCAB_SIZE, chat_template, make_tokenizer

SQUARE = {"image_size": 28, "patch_size": 14}
SEQ2SEQ = {
    "vocab_size": VOCAB_SIZE,
    "d_model": HIDDEN_SIZE,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 128,
    "decoder_ffn_dim": 128,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
    "forced_eos_token_id": 2,
}


def paligemma() -> tuple[PreTrainedModel, ProcessorMixin]:
    tokenizer = make_tokenizer(image_token="<image>")
    config = transformers.PaliGemmaConfig(
        text_config={"model_type": "gemma", **TEXT, "head_dim": 16},
        vision_config={**SIGLIP, "vision_use_head": False, "projection_dim": HIDDEN_SIZE},
        projection_dim=HIDDEN_SIZE,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
    )
    images = transformers.SiglipImageProcessorPil(size={"height": 28, "width": 28})
    images.image_seq_length = 4
    template = chat_template("<image>")
    processor = transformers.PaliGemmaProcessor(image_processor=images, tokenizer=tokenizer, chat_template=template)
    return transformers.PaliGemmaForConditionalGeneration(config), processor


def gemma3() -> tuple[PreTrainedModel, ProcessorMixin]:
    tokenizer = make_tokenizer(boi_token="<start_of_image>", eoi_token="<end_of_image>", image_token="<image_soft_token>")
    layers = ["sliding_attention", "full_attention"] * 2
    config = transformers.Gemma3Config(
        text_config={**TEXT, "head_dim": 16, "sliding_window": 32, "layer_types": layers},
        vision_config={**SIGLIP, "image_size": 56, "vision_use_head": False},
        mm_tokens_per_image=4,
        boi_token_index=tokenizer.convert_tokens_to_ids("<start_of_image>"),
        eoi_token_index=tokenizer.convert_tokens_to_ids("<end_of_image>"),
        image_token_index=tokenizer.convert_tokens_to_ids("<image_soft_token>"),
    )
    processor = transformers.Gemma3Processor(
        image_processor=transformers.Gemma3ImageProcessorPil(size={"height": 56, "width": 56}, image_seq_length=4),
        tokenizer=tokenizer,
        image_seq_length=4,
        chat_template=chat_template("<start_of_image>"),
    )
    return transformers.Gemma3ForConditionalGeneration(config), processor


def mllama() -> tuple[PreTrainedModel, ProcessorMixin]:
    tokenizer = make_tokenizer(image_token="<|image|>")
    vision = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_global_layers=1, attention_heads=2, **SQUARE)
    config = transformers.MllamaConfig(
        text_config={**TEXT, "cross_attention_layers": [1, 3]},
        vision_config=dict(vision, max_num_tiles=4, intermediate_layers_indices=[0, 1], vision_output_dim=96),
        image_token_index=tokenizer.convert_tokens_to_ids("<|image|>"),
    )
    images = transformers.MllamaImageProcessorPil(size={"height": 28, "width": 28}, max_image_tiles=4)
    template = chat_template("<|image|>")
    processor = transformers.MllamaProcessor(image_processor=images, tokenizer=tokenizer, chat_template=template)
    return transformers.MllamaForConditionalGeneration(config), processor


def florence2() -> tuple[PreTrainedModel, ProcessorMixin]:
    tokenizer = make_tokenizer(image_token="<image>")
    four = {"depths": [1] * 4, "embed_dim": [16, 16, 32, 32], "num_heads": [2] * 4, "num_groups": [2] * 4}
    config = transformers.Florence2Config(
        text_config=dict(SEQ2SEQ, model_type="bart"),
        vision_config=dict(four, window_size=4, projection_dim=HIDDEN_SIZE, max_position_embeddings=16),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
    )
    images = transformers.CLIPImageProcessorPil(size={"height": 64, "width": 64}, do_center_crop=False, resample=3)
    images.image_seq_length = 5
    processor = transformers.Florence2Processor(image_processor=images, tokenizer=tokenizer)
    return transformers.Florence2ForConditionalGeneration(config), processor


def blip_2() -> tuple[PreTrainedModel, ProcessorMixin]:
    tokenizer = make_tokenizer()
    config = transformers.Blip2Config(
        text_config={
            "model_type": "opt",
            "vocab_size": VOCAB_SIZE,
            "hidden_size": HIDDEN_SIZE,
            "ffn_dim": 128,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "max_position_embeddings": 256,
            "word_embed_proj_dim": HIDDEN_SIZE,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
        vision_config=dict(VISION, **SQUARE, initializer_range=0.02),  # its default of 1e-10 is blind
        qformer_config=dict(VISION, encoder_hidden_size=32, vocab_size=VOCAB_SIZE),
        num_query_tokens=4,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
    )
    images = transformers.BlipImageProcessorPil(size={"height": 28, "width": 28})
    processor = transformers.Blip2Processor(image_processor=images, tokenizer=tokenizer, num_query_tokens=4)
    return transformers.Blip2ForConditionalGeneration(config), processor


special_builders: dict[str, Callable[[], tuple[PreTrainedModel, ProcessorMixin]]] = {
    builder.__name__: builder for builder in (paligemma, gemma3, mllama, florence2, blip_2)
}
