"""Textual inversion files add the words and vectors that they hold, or are refused by file and reason."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from rayexpand.contract.errors import ModelError
from rayexpand.models.embedding_files import (
    EmbeddingFile,
    embedding_hash,
    embedding_problems,
    expand_prompt,
    token_counts,
)
from rayexpand.models.embeddings import add_embeddings
from rayexpand.models.tiny import digits

torch.set_num_threads(1)
Parts = dict[str, tuple[Any, Any]]
WIDTHS = {"text_encoder": 16}
SDXL_WIDTHS = {"text_encoder": 16, "text_encoder_2": 24}
WORDS = {"a", "photo</w>", "cat</w>", "<|endoftext|>"}
CONTEXT = 16


def text_encoder(width: int, kind: str, words: int) -> Any:
    import transformers

    config = transformers.CLIPTextConfig(
        vocab_size=words, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=CONTEXT, projection_dim=12, eos_token_id=2)  # as published configurations have it
    return getattr(transformers, kind)(config).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def sdxl() -> Parts:
    tokenizer = digits.build_tokenizer()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return {"text_encoder": (tokenizer, text_encoder(16, "CLIPTextModel", len(tokenizer))),
                "text_encoder_2": (tokenizer, text_encoder(24, "CLIPTextModelWithProjection", len(tokenizer)))}


@pytest.fixture
def sd(sdxl: Parts) -> Parts:
    return {"text_encoder": sdxl["text_encoder"]}


def normals(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def save(file: Path, token: str | None = None, **tensors: torch.Tensor) -> EmbeddingFile:
    save_file(tensors, file)
    return EmbeddingFile(file=str(file), token=token)


def ids(tokenizer: Any, text: str) -> torch.Tensor:
    return tokenizer(text, padding="max_length", max_length=CONTEXT, return_tensors="pt").input_ids


def hidden(parts: Parts, text: str, part: str = "text_encoder") -> torch.Tensor:
    tokenizer, encoder = parts[part]
    return encoder(ids(tokenizer, text)).last_hidden_state


def rows(parts: Parts, tokens: list[str], part: str = "text_encoder") -> torch.Tensor:
    tokenizer, encoder = parts[part]
    return encoder.get_input_embeddings().weight[tokenizer.convert_tokens_to_ids(tokens)]


def table(part: tuple[Any, Any]) -> torch.Tensor:
    return part[1].get_input_embeddings().weight


# ---------------------------------------------------------------------------------------------------------------- added


@pytest.mark.parametrize("shape", [(16,), (1, 16)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_one_vector_is_a_word_of_a_copy(sd: Parts, tmp_path: Path, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    vector = normals(*shape).to(dtype)
    before, length = table(sd["text_encoder"]).clone(), len(sd["text_encoder"][0])

    made = add_embeddings(sd, [save(tmp_path / "x.safetensors", **{"<Cat-Toy>": vector})])

    assert torch.equal(rows(made, ["<cat-toy>"]), vector.float().view(1, 16))
    assert torch.equal(table(made["text_encoder"])[:length], before)
    assert len(table(made["text_encoder"])) == len(made["text_encoder"][0]) == length + 1
    tokenizer, encoder = sd["text_encoder"]
    assert "<cat-toy>" not in tokenizer.get_vocab()
    assert torch.equal(encoder.get_input_embeddings().weight, before)
    assert torch.equal(hidden(made, "a photo of a zero"), hidden(sd, "a photo of a zero"))
    for text in ("a photo of <cat-toy>", "a photo of <CAT-TOY>"):
        assert not torch.allclose(hidden(made, text), hidden(made, "a photo of a zero"), atol=1e-3)
        assert tokenizer.eos_token_id in ids(made["text_encoder"][0], text)
        assert length in ids(made["text_encoder"][0], text)


def test_it_is_what_diffusers_loads(sd: Parts, tmp_path: Path) -> None:
    """With one vector and with many; the prompt is the one that diffusers' pipelines would make."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    one, many = save(tmp_path / "1.safetensors", **{"<one>": normals(16)}), save(
        tmp_path / "2.safetensors", **{"<many>": normals(3, 16, seed=1)})
    tokenizer, encoder = copy.deepcopy(sd["text_encoder"])
    pipe = StableDiffusionPipeline(
        vae=None, unet=None, tokenizer=tokenizer, text_encoder=encoder, safety_checker=None, feature_extractor=None,
        scheduler=DDIMScheduler(steps_offset=1, clip_sample=False), requires_safety_checker=False)
    for embedding in (one, many):
        pipe.load_textual_inversion(str(tmp_path), weight_name=Path(embedding.file).name)
    made, counts = add_embeddings(sd, [one, many]), token_counts([one, many])

    for text in ("a photo of <one>", "<many> and <one> and <many>"):
        assert expand_prompt(text, counts) == pipe.maybe_convert_prompt(text, pipe.tokenizer)
        assert torch.equal(hidden(made, expand_prompt(text, counts)),
                           hidden({"text_encoder": (pipe.tokenizer, pipe.text_encoder)}, expand_prompt(text, counts)))


def test_every_vector_of_a_token_reaches_the_prompt(sd: Parts, tmp_path: Path) -> None:
    embedding = save(tmp_path / "x.safetensors", "<t>", emb_params=normals(3, 16))
    made, counts = add_embeddings(sd, [embedding]), token_counts([embedding])
    assert counts == {"<t>": 3}
    assert torch.equal(rows(made, ["<t>", "<t>_1", "<t>_2"]), normals(3, 16))
    first = len(sd["text_encoder"][0])

    text = expand_prompt("a photo of <t>", counts)

    assert text == "a photo of <t> <t>_1 <t>_2"
    found = ids(made["text_encoder"][0], text)[0].tolist()
    assert found[4:7] == [first, first + 1, first + 2]
    assert not torch.allclose(hidden(made, text), hidden(made, "a photo of <t>"), atol=1e-3)


@pytest.mark.parametrize(("text", "expected"), [
    ("a cat", "a cat"), ("", ""), ("<T> here", "<t> <t>_1 here"), ("<t><t>", "<t> <t>_1<t> <t>_1"),
    ("<t> <t>_1 written out", "<t> <t>_1 written out"), ("only <t>_1", "only <t>_1"), ("<s> alone", "<s> alone"),
    ("birb", "birb birb_1 birb_2"), ("birb_x", "birb_x")])
def test_prompts_are_expanded(text: str, expected: str) -> None:
    """`birb_x` is another token, although it begins with `birb`: the tokenizer takes the longest too."""
    counts = {"<t>": 2, "<s>": 1, "birb": 3, "birb_x": 1}

    assert expand_prompt(text, counts) == expected
    assert expand_prompt(expected, counts) == expected
    assert expand_prompt(text, {}) == text


def test_sdxl_needs_both_encoders(sdxl: Parts, tmp_path: Path) -> None:
    both = save(tmp_path / "b.safetensors", "<b>", clip_l=normals(2, 16), clip_g=normals(2, 24, seed=1))
    first, second = save(tmp_path / "l.safetensors", "<t>", emb_params=normals(16)), save(
        tmp_path / "g.safetensors", **{"<t>": normals(24, seed=1)})

    made = add_embeddings(sdxl, [both, first, second])

    for part, width, seed in (("text_encoder", 16, 0), ("text_encoder_2", 24, 1)):
        assert torch.equal(rows(made, ["<b>", "<b>_1"], part), normals(2, width, seed=seed))
        assert torch.equal(rows(made, ["<t>"], part)[0], normals(width, seed=seed))
    assert token_counts([both, first, second]) == {"<b>": 2, "<t>": 1}
    assert "token <t> has 1 for text_encoder, 0 for text_encoder_2 vectors" in embedding_problems(
        [first], SDXL_WIDTHS, WORDS)[0]
    uneven = save(tmp_path / "u.safetensors", "<t>", emb_params=normals(3, 24))
    assert "1 for text_encoder, 3 for text_encoder_2" in embedding_problems([first, uneven], SDXL_WIDTHS, WORDS)[0]


def test_pooled_output_is_that_of_end_of_text(sdxl: Parts, tmp_path: Path) -> None:
    """With eos_token_id 2 the encoder pools at the largest id, which is that of a new word (the trap of section 8)."""
    tokenizer, encoder = sdxl["text_encoder_2"]
    vectors = {"clip_l": normals(16), "clip_g": normals(24)}
    made_tokenizer, made = add_embeddings(sdxl, [save(tmp_path / "x.safetensors", "<t>", **vectors)])["text_encoder_2"]
    found = ids(made_tokenizer, "a <t> photo")
    end = found[0].tolist().index(tokenizer.eos_token_id)
    assert int(found.argmax()) == 2 != end

    out = made(found, output_hidden_states=True)

    assert torch.allclose(out.text_embeds, made.text_projection(out.last_hidden_state[:, end]), atol=1e-6)
    assert not torch.allclose(out.text_embeds, made.text_projection(out.last_hidden_state[:, 2]), atol=1e-3)
    assert encoder.text_model.eos_token_id == 2  # of the base, which has no new words


# ------------------------------------------------------------------------------------------------------------- refusals


REFUSED: dict[str, tuple[str | None, dict[str, torch.Tensor], str]] = {
    "a word": ("cat", {"x": normals(16)}, "token cat is a word of the tokenizer already"),
    "part of a word": ("A", {"x": normals(16)}, "token a is a word of the tokenizer already"),
    "two words": ("cat toy", {"x": normals(16)}, "token 'cat toy' is empty or has a space"),
    "no word": ("", {"x": normals(16)}, "token '' is empty"),
    "a class token": ("<class_3>", {"x": normals(16)}, "that of a class in a fine-tuned adapter"),
    "a web interface without a token": (None, {"emb_params": normals(2, 16)}, r"emb_params.*set token.*<x>"),
    "SDXL without a token": (None, {"clip_l": normals(16), "clip_g": normals(24)}, "does not say the token"),
    "SDXL": ("<t>", {"clip_l": normals(16), "clip_g": normals(24)}, "clip_g is for a second text encoder"),
    "wrong width": (None, {"<t>": normals(768)}, r"<t> \[768\] does not fit.*text_encoder 16.*Stable Diffusion 1\.x"),
    "wrong width by name": ("<t>", {"clip_l": normals(24)}, r"clip_l \[24\] does not fit"),
    "three dimensions": (None, {"<t>": normals(1, 1, 16)}, r"<t> \[1, 1, 16\] does not fit"),
    "no vector": (None, {"<t>": normals(0, 16)}, r"<t> \[0, 16\] does not fit"),
    "not finite": (None, {"<t>": torch.full((16,), torch.nan)}, "<t> is not finite"),
    "two tokens": ("<t>", {"<a>": normals(16), "<b>": normals(16)}, "holds '<a>', '<b>'; a textual inversion has one"),
    "whole numbers": (None, {"<t>": torch.ones(16, dtype=torch.int8)}, "numbers of kind I8"),
}


@pytest.mark.parametrize(("token", "tensors", "words"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_added_is_refused(tmp_path: Path, token: str | None, tensors: dict[str, torch.Tensor],
                                         words: str) -> None:
    embedding = save(tmp_path / "x.safetensors", token, **tensors)

    problems = embedding_problems([embedding], WIDTHS, WORDS)

    assert len(problems) == 1, problems
    assert problems[0].startswith(f"prior.embeddings.0: {tmp_path / 'x.safetensors'}: ")
    assert re.search(words, problems[0]), problems[0]


def test_files_that_are_none(tmp_path: Path) -> None:
    for name in ("x.pt", "x.bin", "x.safetensors"):
        (tmp_path / name).write_bytes(b"12")
    files = [EmbeddingFile(file=str(tmp_path / name), token="<t>")
             for name in ("x.pt", "x.bin", "x.safetensors", "none.safetensors")]

    problems = embedding_problems(files, WIDTHS, WORDS)

    for line, words in zip(problems, ("is a pickle.*x.safetensors", "is a pickle", "cut off", "no such file"),
                           strict=True):
        assert re.search(words, line), line


def test_tokens_do_not_meet(tmp_path: Path) -> None:
    one = save(tmp_path / "1.safetensors", "<t>", emb_params=normals(2, 16))
    two = save(tmp_path / "2.safetensors", "<T>", emb_params=normals(16))
    three = save(tmp_path / "3.safetensors", "<t>_1", emb_params=normals(16))

    assert "prior.embeddings.1" in (line := embedding_problems([one, two], WIDTHS, WORDS)[0])
    assert "token <t> of text_encoder comes from an earlier entry already" in line
    assert "<t>_1, a vector of token <t>_1, is a word of token <t> too" in embedding_problems(
        [one, three], WIDTHS, WORDS)[0]
    assert "is a word of the tokenizer too" in embedding_problems([one], WIDTHS, {*WORDS, "<t>_1"})[0]


def test_a_table_that_fits_both_encoders_is_named(tmp_path: Path) -> None:
    same = dict.fromkeys(SDXL_WIDTHS, 16)
    assert "fits text_encoder and text_encoder_2; name its tensors clip_l and clip_g" in embedding_problems(
        [save(tmp_path / "x.safetensors", "<t>", emb_params=normals(16))], same, WORDS)[0]


def test_the_same_is_refused_when_loading(sd: Parts, tmp_path: Path) -> None:
    files = [save(tmp_path / f"{number}.safetensors", **tensors) for number, tensors in enumerate(
        ({"zero": normals(16)}, {"<t>": normals(24)}))]
    words = set(sd["text_encoder"][0].get_vocab())

    with pytest.raises(ModelError) as caught:
        add_embeddings(sd, files)

    assert str(caught.value).splitlines() == (lines := embedding_problems(files, WIDTHS, words))
    assert len(lines) == 2


def test_the_hash_is_that_of_the_content(tmp_path: Path) -> None:
    one = save(tmp_path / "1.safetensors", **{"<t>": normals(16)})
    again = save(tmp_path / "2.safetensors", "<other>", **{"<t>": normals(16)})
    other = save(tmp_path / "3.safetensors", **{"<t>": normals(16, seed=1)})
    assert embedding_hash(one) == embedding_hash(again) != embedding_hash(other)
    assert json.loads(one.model_dump_json()) == {"file": str(tmp_path / "1.safetensors"), "token": None}
