"""Folders of the real captioning models with random weights, small enough to be built in every test run.

What they write says nothing about images, but different images get different texts.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from rayexpand.models.folders import quiet_libraries

WORDS = ("a", "photo", "of", "dog", "cat", "red", "blue", "on", "the", "grass", "two", "birds", "near", "water")
SPREAD = 0.6  # of weights: with the usual small ones all images would get one text
_TINY = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
         "initializer_range": SPREAD}
_VISION = {**_TINY, "image_size": 16, "patch_size": 8}


def tiny_captioner(folder: Path, kind: str) -> Path:
    """Write a `blip`, `blip-2-opt` or `blip-2-t5` folder of 16-pixel images."""
    with torch.random.fork_rng(devices=[]), quiet_libraries():
        torch.manual_seed(3)
        model, processor = _blip() if kind == "blip" else _blip2(kind.removeprefix("blip-2-"))
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
    return folder


def _blip() -> tuple[Any, Any]:
    from transformers import BertTokenizer, BlipConfig, BlipForConditionalGeneration, BlipImageProcessor, BlipProcessor

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]", *WORDS]
    tokenizer = BertTokenizer(vocab={word: i for i, word in enumerate(words)}, bos_token="[DEC]")
    text = {**_TINY, "vocab_size": len(tokenizer), "encoder_hidden_size": 16, "max_position_embeddings": 32,
            "projection_dim": 8, "bos_token_id": 5, "eos_token_id": 3, "pad_token_id": 0, "sep_token_id": 3}
    config = BlipConfig(text_config=text, vision_config={**_VISION, "projection_dim": 8}, projection_dim=8)
    return BlipForConditionalGeneration(config), BlipProcessor(_images(BlipImageProcessor), tokenizer)


def _blip2(language: str) -> tuple[Any, Any]:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import (
        Blip2Config,
        Blip2ForConditionalGeneration,
        Blip2Processor,
        BlipImageProcessor,
        PreTrainedTokenizerFast,
    )

    words = ["<pad>", "<s>", "</s>", "<unk>", "<image>", *WORDS]
    table = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    table.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=table, bos_token="<s>", eos_token="</s>", unk_token="<unk>",
                                        pad_token="<pad>", additional_special_tokens=["<image>"])
    asks = {**_TINY, "vocab_size": len(words), "encoder_hidden_size": 16, "cross_attention_frequency": 1,
            "max_position_embeddings": 32}
    special = {"vocab_size": len(words), "pad_token_id": 0, "eos_token_id": 2}
    text = {"opt": {**special, **_TINY, "model_type": "opt", "ffn_dim": 16, "max_position_embeddings": 64,
                    "word_embed_proj_dim": 16, "bos_token_id": 1, "init_std": SPREAD},
            "t5": {**special, "model_type": "t5", "d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2,
                   "decoder_start_token_id": 0}}[language]
    config = Blip2Config(vision_config=_VISION, qformer_config=asks, text_config=text, num_query_tokens=4,
                         image_token_index=4)
    return Blip2ForConditionalGeneration(config), Blip2Processor(_images(BlipImageProcessor), tokenizer,
                                                                 num_query_tokens=4)


def _images(kind: Any) -> Any:
    return kind(size={"height": 16, "width": 16})
