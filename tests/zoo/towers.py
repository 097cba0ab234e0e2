"""Encoder, connector, decoder: the LLaVA line, the Idefics3 line, InternVL and Ovis2."""

from collections.abc import Callable

import transformers
from transformers import PreTrainedModel, ProcessorMixin

from alula.models.processors import MissingVideo, images_only

from .parts import CLIP, HIDDEN_SIZE, SIGLIP, TEXT, VISION, VOCAB_SIZE, chat_template, make_tokenizer

GRIDS = [[28, 56], [56, 28], [56, 56]]
CROP = {"size": {"shortest_edge": 28}, "crop_size": {"height": 28, "width": 28}}
FEATURES = {"vision_feature_layer": -2, "vision_feature_select_strategy": "default"}
CLIP_TOKENS = {"patch_size": 14, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
TILED = dict(VISION, image_size=28, patch_size=7)


def llava() -> tuple[PreTrainedModel, ProcessorMixin]:
    tokenizer = make_tokenizer(image_token="<image>")
    config = transformers.LlavaConfig(
        text_config={"model_type": "llama", **TEXT},
        vision_config=CLIP,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=4,
        **FEATURES,
    )
    images = transformers.CLIPImageProcessorPil(**CROP)
    template = chat_template("<image>")
    processor = transformers.LlavaProcessor(image_processor=images, tokenizer=tokenizer, chat_template=template, **CLIP_TOKENS)
    return transformers.LlavaForConditionalGeneration(config), processor


def llava_next() -> tuple[PreTrainedModel, ProcessorMixin]:
    tokenizer = make_tokenizer(image_token="<image>")
    config = transformers.LlavaNextConfig(
        text_config={"model_type": "mistral", **TEXT},
        vision_config=CLIP,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_grid_pinpoints=GRIDS,
        image_seq_length=4,
        **FEATURES,
    )
    images = transformers.LlavaNextImageProcessorPil(image_grid_pinpoints=GRIDS, **CROP)
    template = chat_template("<image>")
    processor = transformers.LlavaNextProcessor(image_processor=images, tokenizer=tokenizer, chat_template=template, **CLIP_TOKENS)
    return transformers.LlavaNextForConditionalGeneration(config), processor


def llava_onevision() -> tuple[PreTrainedModel, ProcessorMixin]:
    tokenizer = make_tokenizer(image_token="<image>", video_token="<video>")
    grids = [[28, 28], *GRIDS]
    features = {"vision_feature_select_strategy": "full", "vision_aspect_ratio": "anyres_max_9"}
    config = transformers.LlavaOnevisionConfig(
        text_config={"model_type": "qwen2", **TEXT},
        vision_config=SIGLIP,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        video_token_index=tokenizer.convert_tokens_to_ids("<video>"),
        vision_feature_layer=-1,
        image_grid_pinpoints=grids,
        **features,
    )
    processor = images_only(transformers.LlavaOnevisionProcessor)(
        image_processor=transformers.LlavaOnevisionImageProcessorPil(size={"height": 28, "width": 28}, image_grid_pinpoints=grids),
        tokenizer=tokenizer,
        video_processor=MissingVideo({"video_processor_type": "LlavaOnevisionVideoProcessor"}),
        num_image_tokens=4,
        chat_template=chat_template("<image>"),
        **features,
    )
    return transformers.LlavaOnevisionForConditionalGeneration(config), processor


def idefics3() -> tuple[PreTrainedModel, ProcessorMixin]:
    tokenizer = make_tokenizer(image_token="<image>")
    config = transformers.Idefics3Config(
        text_config={"model_type": "llama", **TEXT},
        vision_config=TILED,
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        scale_factor=2,
    )
    images = transformers.Idefics3ImageProcessorPil(size={"longest_edge": 56}, max_image_size={"longest_edge": 28})
    template = chat_template("<image>")
    processor = transformers.Idefics3Processor(image_processor=images, tokenizer=tokenizer, image_seq_len=4, chat_template=template)
    return transformers.Idefics3ForConditionalGeneration(config), processor


def smolvlm() -> tuple[PreTrainedModel, ProcessorMixin]:
    tokenizer = make_tokenizer(
        image_token="<image>",
        fake_image_token="<fake_token_around_image>",
        global_image_token="<global-img>",
        end_of_utterance_token="<end_of_utterance>",
        video_token="<video>",
    )
    config = transformers.SmolVLMConfig(
        text_config={"model_type": "llama", **TEXT},
        vision_config=TILED,
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        scale_factor=2,
    )
    processor = images_only(transformers.SmolVLMProcessor)(
        image_processor=transformers.SmolVLMImageProcessorPil(size={"longest_edge": 56}, max_image_size={"longest_edge": 28}),
        tokenizer=tokenizer,
        video_processor=MissingVideo({"video_processor_type": "SmolVLMVideoProcessor"}),
        image_seq_len=4,
        chat_template=chat_template("<image>"),
    )
    return transformers.SmolVLMForConditionalGeneration(config), processor


def internvl() -> tuple[PreTrainedModel, ProcessorMixin]:
    tokenizer = make_tokenizer(
        start_image_token="<img>", end_image_token="</img>", context_image_token="<IMG_CONTEXT>", video_token="<video>"
    )
    config = transformers.InternVLConfig(
        text_config={"model_type": "qwen2", **TEXT},
        vision_config=dict(VISION, image_size=[56, 56], patch_size=[14, 14]),
        image_token_id=tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"),
        image_seq_length=4,
        downsample_ratio=0.5,
    )
    processor = images_only(transformers.InternVLProcessor)(
        image_processor=transformers.GotOcr2ImageProcessorPil(
            size={"height": 56, "width": 56}, crop_to_patches=True, min_patches=1, max_patches=4
        ),
        tokenizer=tokenizer,
        video_processor=MissingVideo({"video_processor_type": "InternVLVideoProcessor"}),
        image_seq_length=4,
        chat_template=chat_template("<IMG_CONTEXT>"),
    )
    return transformers.InternVLForConditionalGeneration(config), processor


def ovis2() -> tuple[PreTrainedModel, ProcessorMixin]:
    tokenizer = make_tokenizer(image_token="<IMG_ATOM>")
    indicators = ["<IMG_START>", "<IMG_GRID>", "<IMG_COL>", "<IMG_ROW>", "<IMG_END>"]
    config = transformers.Ovis2Config(
        text_config={"model_type": "qwen2", **TEXT},
        vision_config=dict(TILED, vocab_size=64, hidden_stride=2, num_visual_indicator_tokens=len(indicators)),
        image_token_id=tokenizer.convert_tokens_to_ids("<IMG_ATOM>"),
        visual_indicator_token_ids=tokenizer.convert_tokens_to_ids(indicators),
        vocab_size=VOCAB_SIZE,
        hidden_size=HIDDEN_SIZE,
    )
    processor = transformers.Ovis2Processor(
        image_processor=transformers.Ovis2ImageProcessorPil(
            size={"height": 28, "width": 28}, crop_to_patches=True, min_patches=1, max_patches=4
        ),
        tokenizer=tokenizer,
        image_seq_length=4,
        chat_template=chat_template("<image>"),
    )
    return transformers.Ovis2ForConditionalGeneration(config), processor


tower_builders: dict[str, Callable[[], tuple[PreTrainedModel, ProcessorMixin]]] = {
    builder.__name__: builder for builder in (llava, llava_next, llava_onevision, idefics3, smolvlm, internvl, ovis2)
}
