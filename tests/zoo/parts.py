"""What the zoo's models share: one small tokenizer, one chat template, random pictures, small configurations."""

from typing import Any

import numpy as np
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

VOCAB_SIZE = 512
HIDDEN_SIZE = 64
NUM_LAYERS = 4

SPECIAL_TOKENS = [
    "<pad>",
    "<s>",
    "</s>",
    "<unk>",
    "<image>",
    "<|image_pad|>",
    "<|video_pad|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|im_start|>",
    "<|im_end|>",
    "<fake_token_around_image>",
    "<global-img>",
    "<end_of_utterance>",
    "<video>",
    "<IMG_CONTEXT>",
    "<img>",
    "</img>",
    "<start_of_image>",
    "<end_of_image>",
    "<image_soft_token>",
    "<|image|>",
    "<IMG_ATOM>",
    "<IMG_START>",
    "<IMG_GRID>",
    "<IMG_COL>",
    "<IMG_ROW>",
    "<IMG_END>",
] + [f"<row_{row}_col_{column}>" for row in range(1, 5) for column in range(1, 5)]

CORPUS = (
    "what colour is the square?",
    "the square is red, the circle is blue",
    "how many circles are there? one two three",
    "user assistant system image answer yes no left right",
    "describe the picture: a big blue triangle above a small green star",
)

# One turn is <|im_start|>role\ncontent<|im_end|>\n; IMAGE stands for the model's own placeholder.
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}IMAGE{% else %}{{ part['text'] }}{% endif %}{% endfor %}"
    "{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

TEXT: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": HIDDEN_SIZE,
    "intermediate_size": 128,
    "num_hidden_layers": NUM_LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
VISION: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
CLIP: dict[str, Any] = dict(VISION, model_type="clip_vision_model", num_hidden_layers=3, image_size=28, patch_size=14)
SIGLIP: dict[str, Any] = dict(VISION, model_type="siglip_vision_model", num_hidden_layers=3, image_size=28, patch_size=14)


def make_tokenizer(**roles: str) -> PreTrainedTokenizerFast:
    """A byte-level BPE of 512 entries; `roles` names special tokens as processors look for them (``image_token="<image>"``)."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS * 50, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        padding_side="left",
        model_max_length=4096,
        extra_special_tokens=roles or None,
    )


def chat_template(placeholder: str) -> str:
    """The zoo's chat template with a model's own image placeholder."""
    return CHAT_TEMPLATE.replace("IMAGE", placeholder)


def picture(seed: int, height: int = 28, width: int = 28) -> Image.Image:
    """Noise: the same seed and size give the same pixels."""
    return Image.fromarray(np.random.RandomState(seed).randint(0, 255, (height, width, 3), dtype=np.uint8))
