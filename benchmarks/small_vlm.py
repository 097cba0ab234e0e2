"""A random LLaVA of any width with a byte-level processor: what benchmarks measure cost on where weights do not matter."""

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import CLIPImageProcessorPil, CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor
from transformers import PreTrainedTokenizerFast as FastTokenizer

SPECIAL = ("<pad>", "<s>", "</s>", "<image>", "<|im_start|>", "<|im_end|>")
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}{% endfor %}"
    "{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
IMAGE_SIZE, PATCH_SIZE = 56, 14


def make_processor() -> LlavaProcessor:
    """One token per byte, sixteen per image."""
    vocabulary = {token: index for index, token in enumerate([*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    table = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    table.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    table.decoder = decoders.ByteLevel()
    table.add_special_tokens(list(SPECIAL))
    tokenizer = FastTokenizer(
        tokenizer_object=table, pad_token="<pad>", bos_token="<s>", eos_token="</s>", extra_special_tokens={"image_token": "<image>"}
    )
    images = CLIPImageProcessorPil(size={"shortest_edge": IMAGE_SIZE}, crop_size={"height": IMAGE_SIZE, "width": IMAGE_SIZE})
    return LlavaProcessor(
        image_processor=images, tokenizer=tokenizer, chat_template=TEMPLATE, patch_size=PATCH_SIZE,
        vision_feature_select_strategy="default", num_additional_image_tokens=1,
    )  # fmt: skip


def make_model(*, hidden: int, num_layers: int, seed: int = 0) -> LlavaForConditionalGeneration:
    """The model in evaluation mode; the same arguments give the same weights.

    Args:
        hidden: width of the decoder, a multiple of 16; heads are 64 wide where that divides it, else 16.
    """
    head = 64 if hidden % 64 == 0 else 16
    text = LlamaConfig(
        vocab_size=len(SPECIAL) + 256, hidden_size=hidden, intermediate_size=hidden * 8 // 3, num_hidden_layers=num_layers,
        num_attention_heads=hidden // head, num_key_value_heads=hidden // head, max_position_embeddings=4096,
        bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, image_size=IMAGE_SIZE, patch_size=PATCH_SIZE
    )
    config = LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=SPECIAL.index("<image>"), vision_feature_select_strategy="default",
        image_seq_length=(IMAGE_SIZE // PATCH_SIZE) ** 2,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return LlavaForConditionalGeneration(config).eval()
