"""Tiny random vision-language models of real transformers architectures, built offline with their real processors.

from zoo import BUILDERS, build, example_batch
model, processor = build("qwen2_vl")
model(**example_batch("qwen2_vl", processor))
"""

import copy
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, ProcessorMixin

from .parts import picture
from .qwen import qwen_builders
from .recent import recent_builders
from .special import special_builders
from .towers import tower_builders

# The fifteen that every seam is tested on, and those that only tests of architectures build besides.
BUILDERS = {**qwen_builders, **tower_builders, **special_builders}
EVERY = {**BUILDERS, **recent_builders}

# Processors that want one list of images for each text.
NESTED = ("idefics3", "smolvlm", "mllama", "gemma3", "gemma4")
# Processors that refuse a call without images: text goes to the tokenizer alone.
NEEDS_IMAGES = ("paligemma", "florence2")
# Models whose forward cannot do without an image.
NO_TEXT_ONLY = ("blip_2",)
QUESTIONS = ("what colour?", "how many red circles are there?", "is the star left of the square?")
# Layers that a fresh random model leaves (almost) blind to its image, and the spread that lets it see.
BLIND = {
    "gemma3": {"mm_input_projection_weight": 0.05},
    "gemma4": {"input_proj.weight": 0.5},
    "blip_2": {"query_tokens": 1.0, "crossattention.attention.value.weight": 0.5, "crossattention.output.dense.weight": 0.5},
    "florence2": {"encoder_attn.v_proj.weight": 0.5, "encoder_attn.out_proj.weight": 0.5},
}


def build(name: str, *, seed: int = 0) -> tuple[PreTrainedModel, ProcessorMixin]:
    """The model called `name` in eval mode and its processor; the same seed gives the same weights.

    Images matter to its logits: initialisations that hide them (zero gates, zero queries) are replaced.
    """
    return copy.deepcopy(_made(name, seed))


@cache
def _made(name: str, seed: int) -> tuple[PreTrainedModel, ProcessorMixin]:
    """Made once; a copy takes a third of the time."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model, processor = EVERY[name]()
        let_it_see(name, model)
    return model.eval(), processor


@torch.no_grad()
def let_it_see(name: str, model: nn.Module) -> None:
    """Replace those initial values of `model` that keep its image out of its logits."""
    for path, parameter in model.named_parameters():
        for ending, spread in BLIND.get(name, {}).items():
            if path.endswith(ending):
                parameter.normal_(std=spread)
        if path.endswith(("cross_attn_attn_gate", "cross_attn_mlp_gate")):
            parameter.fill_(1.0)


def prompts(name: str, processor: ProcessorMixin, *, text_only: bool, batch: int) -> list[str]:
    """`batch` prompts of different lengths, each with one image placeholder unless `text_only`."""
    questions = [QUESTIONS[index % len(QUESTIONS)] for index in range(batch)]
    if processor.chat_template is None:
        return questions
    media = [] if text_only else [{"type": "image"}]
    turns = [[{"role": "user", "content": [*media, {"type": "text", "text": question}]}] for question in questions]
    return [processor.apply_chat_template(turn, add_generation_prompt=True, tokenize=False) for turn in turns]


def example_batch(
    name: str, processor: ProcessorMixin, *, text_only: bool = False, batch: int = 2, image_seed: int = 0
) -> dict[str, Tensor]:
    """A left-padded batch of prompts that `model(**batch)` and `model.generate(**batch)` take.

    Args:
        text_only: no image and no image token.
        batch: samples; their texts differ in length (three lengths in turn).
        image_seed: other pixels of the same sizes, so with the same tokens.

    Raises:
        ValueError: `text_only` for a model in `NO_TEXT_ONLY`.
    """
    if text_only and name in NO_TEXT_ONLY:
        raise ValueError(f"{name} has no forward without an image")
    text = prompts(name, processor, text_only=text_only, batch=batch)
    options: dict[str, Any] = {"padding": True, "padding_side": "left", "return_tensors": "pt"}
    if text_only and name in NEEDS_IMAGES:
        inputs = processor.tokenizer(text, **options)
        if name == "paligemma":  # 0: prompt, read in both directions
            inputs["token_type_ids"] = torch.zeros_like(inputs["input_ids"])
    elif text_only:
        inputs = processor(text=text, **options)
    else:
        sizes = [(40, 60), (50, 30)]
        images = [picture(100 * image_seed + index, *sizes[index % 2]) for index in range(batch)]
        inputs = processor(text=text, images=[[image] for image in images] if name in NESTED else images, **options)
    return {key: value for key, value in inputs.items() if key != "labels"}
