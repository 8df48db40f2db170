"""Tokenizers with one token per letter or byte, and text encoders of two layers."""

from __future__ import annotations

import string
from typing import Any

from batchgen.models.tiny.parts import HIDDEN

LETTERS = string.ascii_letters + string.digits + string.punctuation
LONGEST = 4096  # tokens; Sana's instruction before a prompt also takes one for each letter
CHAT = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n'"
    " + message['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

WITHIN = (
    "the image by detailing color shape size texture quantity text spatial relationships of objects"
    " and background"
)
FIRST = "system Describe user assistant"


def t5_tokenizer() -> Any:
    """One token for each letter; a word begins with a space, a text ends with ``</s>``."""
    from transformers import T5Tokenizer

    words = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    words += [(letter, -3.0) for letter in LETTERS]
    return T5Tokenizer(vocab=words, extra_ids=0, model_max_length=512)


def t5_encoder(tokenizer: Any, width: int = HIDDEN) -> Any:
    """T5's encoder; ``width`` is that of its embeddings."""
    from transformers import T5Config, T5EncoderModel

    return T5EncoderModel(
        T5Config(
            vocab_size=len(tokenizer),
            d_model=width,
            d_kv=8,
            d_ff=48,
            num_layers=2,
            num_heads=4,
            feed_forward_proj="gated-gelu",
        )
    )


def gemma_tokenizer() -> Any:
    """One token for each letter; a text begins with ``<bos>``."""
    from tokenizers.processors import TemplateProcessing
    from transformers import GemmaTokenizer

    words = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "▁", "\n", *LETTERS]
    numbers = {word: number for number, word in enumerate(words)}
    tokenizer = GemmaTokenizer(vocab=numbers, model_max_length=LONGEST)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", numbers["<bos>"])]
    )
    return tokenizer


def gemma_encoder(tokenizer: Any) -> Any:
    from transformers import Gemma2Config, Gemma2Model

    return Gemma2Model(
        Gemma2Config(
            **_decoder_only(tokenizer),
            head_dim=8,
            query_pre_attn_scalar=8,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def qwen_tokenizer() -> Any:
    """One token for each byte, with the special tokens and the template of a chat.

    The words of Qwen-Image's own template are one token each, since the pipeline relies on that.
    """
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import Qwen2Tokenizer

    words = [*(f"Ġ{word}" for word in WITHIN.split()), *FIRST.split()]
    merges = dict.fromkeys(
        (word[:place], word[place]) for word in words for place in range(1, len(word))
    )
    tokens = [*sorted(ByteLevel.alphabet()), *(head + letter for head, letter in merges)]
    return Qwen2Tokenizer(
        vocab={token: number for number, token in enumerate(tokens)},
        merges=list(merges),
        extra_special_tokens=["<|im_start|>", "<|im_end|>"],
        model_max_length=LONGEST,
        chat_template=CHAT,
    )


def qwen_encoder(tokenizer: Any) -> Any:
    """The text encoder of Z-Image."""
    from transformers import Qwen3Config, Qwen3Model

    return Qwen3Model(Qwen3Config(**_decoder_only(tokenizer), head_dim=8))


def qwen_vl_encoder(tokenizer: Any) -> Any:
    """The text encoder of Qwen-Image, a model for text and images."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    text = {
        **_decoder_only(tokenizer),
        "bos_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "rope_parameters": {
            "mrope_section": [1, 1, 2],
            "rope_type": "default",
            "rope_theta": 1000000.0,
        },
    }
    vision = {
        "depth": 1,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_heads": 2,
        "out_hidden_size": HIDDEN,
        "fullatt_block_indexes": [0],
    }
    return Qwen2_5_VLForConditionalGeneration(
        Qwen2_5_VLConfig(text_config=text, vision_config=vision)
    )


def _decoder_only(tokenizer: Any) -> dict[str, Any]:
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": HIDDEN,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": LONGEST,
    }
