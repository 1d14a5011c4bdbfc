# SPDX-License-Identifier: Apache-2.0
"""Tiny text encoders and tokenizers of many architectures, made when they are asked for."""

from functools import cache
from typing import Any

import torch
from tiny_text_to_image import clip_tokenizer
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    Gemma2Config,
    Gemma2Model,
    GlmConfig,
    GlmForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
    Qwen3VLConfig,
    Qwen3VLModel,
    SmolLM3Config,
    SmolLM3ForCausalLM,
    T5Config,
    T5EncoderModel,
    UMT5Config,
    UMT5EncoderModel,
)


CHARACTERS = "abcdefghijklmnopqrstuvwxyz ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,:;!?'\"-_()[]{}<>|/\\\n&"
SPECIAL = ["<pad>", "</s>", "<unk>", "<s>", "<|im_start|>", "<|im_end|>", "<image>"]
TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


@cache
def letters(side: str = "right", end: bool = True) -> PreTrainedTokenizerFast:
    """A token for each letter, after each text an end if `end`; chat templates leave the contents."""
    vocabulary = {piece: i for i, piece in enumerate([*SPECIAL, *CHARACTERS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), behavior="isolated")  # pyright: ignore
    if end:
        tokenizer.post_processor = processors.TemplateProcessing("$A </s>", special_tokens=[("</s>", 1)])  # pyright: ignore
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        bos_token="<s>",
        model_max_length=128,
        padding_side=side,
        additional_special_tokens=SPECIAL[4:],
    )
    fast.chat_template = TEMPLATE
    return fast


VOCABULARY = len(SPECIAL) + len(CHARACTERS)


def _make(cls: type, config: Any, seed: int = 11) -> PreTrainedModel:
    torch.manual_seed(seed)
    return cls(config).eval()


def t5(width: int = 16, cls: type = T5EncoderModel) -> PreTrainedModel:
    """T5, or UMT5."""
    config = T5Config if cls is T5EncoderModel else UMT5Config
    return _make(
        cls,
        config(vocab_size=VOCABULARY, d_model=width, d_kv=8, d_ff=16, num_layers=1, num_heads=2, pad_token_id=0),
    )


def umt5(width: int = 16) -> PreTrainedModel:
    return t5(width, UMT5EncoderModel)


def clip(width: int = 16, projection: bool = False, length: int = 16) -> PreTrainedModel:
    """CLIP's text model, for the tokenizer of `tiny_text_to_image`."""
    config = CLIPTextConfig(
        vocab_size=len(clip_tokenizer()),
        hidden_size=width,
        intermediate_size=width,
        projection_dim=width,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=length,
        bos_token_id=clip_tokenizer().bos_token_id,
        eos_token_id=clip_tokenizer().eos_token_id,
        pad_token_id=clip_tokenizer().pad_token_id,
    )
    return _make(CLIPTextModelWithProjection if projection else CLIPTextModel, config)


def decoder(cls: type, config: type, width: int = 16, layers: int = 2, **others: Any) -> PreTrainedModel:
    """A small decoder of a language model's architecture."""
    return _make(
        cls,
        config(
            vocab_size=VOCABULARY,
            hidden_size=width,
            intermediate_size=width,
            num_hidden_layers=layers,
            num_attention_heads=2,
            num_key_value_heads=2,
            head_dim=8,
            pad_token_id=0,
            max_position_embeddings=512,
            **others,
        ),
    )


def gemma2(width: int = 16) -> PreTrainedModel:
    return decoder(Gemma2Model, Gemma2Config, width)


def glm(width: int = 16) -> PreTrainedModel:
    return decoder(GlmForCausalLM, GlmConfig, width)


def llama(width: int = 16, causal: bool = False) -> PreTrainedModel:
    return decoder(LlamaForCausalLM if causal else LlamaModel, LlamaConfig, width)


def qwen3(width: int = 16, causal: bool = False, layers: int = 2) -> PreTrainedModel:
    return decoder(Qwen3ForCausalLM if causal else Qwen3Model, Qwen3Config, width, layers)


def smollm3(width: int = 16) -> PreTrainedModel:
    return decoder(SmolLM3ForCausalLM, SmolLM3Config, width)


def qwen25_vl(width: int = 16) -> PreTrainedModel:
    """Qwen 2.5 with eyes, which captions do not open."""
    text = {
        "vocab_size": VOCABULARY,
        "hidden_size": width,
        "intermediate_size": width,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "rope_scaling": {"mrope_section": [1, 1, width // 4 - 2], "rope_type": "default", "type": "default"},
        "rope_theta": 1e6,
        "pad_token_id": 0,
    }
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": width}
    config = Qwen2_5_VLConfig(text_config=text, vision_config=vision, hidden_size=width, vocab_size=VOCABULARY)
    return _make(Qwen2_5_VLForConditionalGeneration, config)


def qwen3_vl(width: int = 16) -> PreTrainedModel:
    """Qwen 3 with eyes, which captions do not open."""
    text = {
        "vocab_size": VOCABULARY,
        "hidden_size": width,
        "intermediate_size": width,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "rope_scaling": {"mrope_section": [1, 1, 2], "rope_type": "default", "type": "default"},
        "rope_theta": 1e6,
    }
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": width}
    return _make(Qwen3VLModel, Qwen3VLConfig(text_config=text, vision_config=vision))
