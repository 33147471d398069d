"""What text encoders say of prompts, how much of it is kept, and the condition that is made of it."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from rayexpand.contract.errors import ModelError
from rayexpand.models import texts
from rayexpand.models.latent import StableDiffusionPrior
from rayexpand.models.prior import load_prior
from rayexpand.models.texts import States, TextCond, TextEncoders
from tests.tiny import tiny_pipeline

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_pipeline(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def prior(folder: Path) -> StableDiffusionPrior:
    return load_prior(str(folder), device="cpu")


class Counted:
    """An encoder whose states begin with the length of a text: 4 tokens of `width` numbers, `pooled` of them beside."""

    def __init__(self, width: int, pooled: int = 0) -> None:
        self.width, self.pooled, self.asked = width, pooled, list[str]()

    def __call__(self, text: str) -> States:
        self.asked.append(text)
        states = float(len(text)) + torch.arange(self.width).float()
        return States(states.repeat(4, 1), states[:self.pooled] if self.pooled else None)


def test_texts_are_encoded_once_and_alone(prior: StableDiffusionPrior, monkeypatch: pytest.MonkeyPatch,
                                          caplog: pytest.LogCaptureFixture) -> None:
    calls, forward = [], type(prior.text_encoder).forward
    monkeypatch.setattr(type(prior.text_encoder), "forward", lambda self, ids, **kwargs: (
        calls.append(len(ids)), forward(self, ids, **kwargs))[1])
    prior.embed(["a zero", "a one"] * 3, [""] * 6, 2.0)
    assert calls == [1, 1, 1]
    prior.embed(["a two", "a one"], ["", "a two"], [2.0, 3.0])
    assert calls == [1] * 4
    with caplog.at_level(logging.WARNING):
        prior.embed(["a zero " * 20], [""], 2.0)
    assert caplog.text == ""  # `prepare` says it, once a run


@pytest.fixture(params=[(8, 0), (6, 8)], ids=["tokens", "tokens and pooled"])
def encoder(request: pytest.FixtureRequest) -> Counted:
    """128 bytes a text, whether in hidden states alone or with pooled embeddings."""
    width, pooled = request.param
    return Counted(width, pooled)


def test_the_texts_used_last_are_kept_up_to_a_number_of_bytes(encoder: Counted,
                                                              monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(texts, "CACHED_BYTES", 3 * 128)
    kept = TextEncoders([encoder])
    for text in ("a", "bb", "ccc", "a", "dddd"):  # the last one takes the place of bb, which was used longest ago
        kept.text(text)
    assert encoder.asked == ["a", "bb", "ccc", "dddd"]
    for text in ("a", "ccc", "dddd"):
        kept.text(text)
    assert len(encoder.asked) == 4
    assert torch.equal(kept.text("bb").tokens, encoder("bb").tokens)
    assert encoder.asked[4:] == ["bb", "bb"]


def test_one_text_is_kept_whatever_its_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(texts, "CACHED_BYTES", 100)
    encoder = Counted(8)
    kept = TextEncoders([encoder])
    for text in ("a", "a", "bb", "bb", "a"):
        kept.text(text)
    assert encoder.asked == ["a", "bb", "a"]


def test_what_was_forgotten_is_encoded_anew_and_takes_no_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(texts, "CACHED_BYTES", 2 * 128)
    encoder = Counted(8)
    kept = TextEncoders([encoder])
    for text in ("a", "bb"):
        kept.text(text)
    kept.forget()
    for text in ("a", "bb", "a", "bb"):
        kept.text(text)
    assert encoder.asked == ["a", "bb", "a", "bb"]


def test_twice_the_bytes_are_half_the_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    def again(width: int) -> int:
        """How many of ten texts have to be encoded a second time, the latest ones first."""
        encoder = Counted(width)
        kept = TextEncoders([encoder])
        said = [str(number) for number in range(100, 110)]
        for text in (*said, *reversed(said)):
            kept.text(text)
        return len(encoder.asked) - 10

    monkeypatch.setattr(texts, "CACHED_BYTES", 8 * 128)
    assert [again(width) for width in (4, 8, 16, 32)] == [0, 2, 6, 8]


def two(zero: bool) -> Iterator[TextCond]:
    encoders = TextEncoders([Counted(2), Counted(3, pooled=2)], zero_empty_negative=zero)
    yield encoders.cond(["aa", "bbb"], ["", "c"], 2.0)
    yield encoders.cond(["", "bbb"], ["", "c"], [1.0, 5.0])


def test_two_encoders_are_one_sequence_and_the_second_one_pools() -> None:
    cond, other = two(zero=False)
    assert cond.tokens_BTE.shape == (2, 4, 5)
    assert cond.tokens_BTE[:, 0].tolist() == [[2, 3, 2, 3, 4], [3, 4, 3, 4, 5]]
    assert cond.pooled_BP is not None
    assert cond.pooled_BP.tolist() == [[2, 3], [3, 4]]
    assert cond.negative_tokens_BTE[0, 0].tolist() == [0, 1, 0, 1, 2]
    assert cond.guidance_B.tolist() == [2, 2]
    assert other.guidance_B.tolist() == [1, 5]
    assert cond.guidance_B.dtype == torch.float32


def test_no_negative_is_zeros_where_the_family_says_so_and_no_prompt_is_not() -> None:
    cond, other = two(zero=True)
    assert cond.negative_pooled_BP is not None
    assert cond.negative_tokens_BTE[0].abs().sum() == 0
    assert cond.negative_pooled_BP[0].tolist() == [0, 0]
    assert cond.negative_tokens_BTE[1, 0].tolist() == [1, 2, 1, 2, 3]
    assert other.tokens_BTE[0, 0].tolist() == [0, 1, 0, 1, 2], "only a negative is left out"


def test_a_condition_is_indexed_with_all_that_it_has() -> None:
    cond, _ = two(zero=False)
    picked = cond[[1, 0, 1]]
    assert len(picked) == 3
    assert picked.pooled_BP is not None
    assert picked.negative_pooled_BP is not None
    assert picked.pooled_BP.tolist() == [[3, 4], [2, 3], [3, 4]]
    assert picked.negative_pooled_BP.tolist() == [[1, 2], [0, 1], [1, 2]]
    assert torch.equal(picked.tokens_BTE, cond.tokens_BTE[[1, 0, 1]])
    assert len(cond[1]) == 1


def test_words_of_several_vectors_are_spelled_out() -> None:
    encoder = Counted(2)
    TextEncoders([encoder], spelled=lambda text: text.replace("<cat>", "<cat> <cat>_1")).text("a <cat>")
    assert encoder.asked == ["a <cat> <cat>_1"]


def test_the_last_slot_holds_the_visual_token_of_its_row() -> None:
    """Real-Fake, oracle 5.3: its code mixed the features of different images of a batch."""
    hidden = torch.arange(2 * 4 * 3, dtype=torch.float32).view(2, 4, 3)
    scales, v = torch.tensor([2.0, 3.0]), torch.tensor([[0.0, 1, 2], [10, 11, 12]])
    cond = TextCond(hidden, -hidden, scales)
    made = cond.with_last_slot(v)
    assert made.tokens_BTE[:, -1].tolist() == [[0, 1, 2], [10, 11, 12]]
    assert torch.equal(made.tokens_BTE[:, :-1], hidden[:, :-1])
    assert torch.equal(made.negative_tokens_BTE, -hidden)
    assert torch.equal(made.guidance_B, scales)
    assert torch.equal(cond.tokens_BTE, torch.arange(24.0).view(2, 4, 3)), "the cached texts are left alone"
    both = cond.with_last_slot(v, both=True)
    assert torch.equal(both.negative_tokens_BTE[:, -1], v)
    assert torch.equal(both.negative_tokens_BTE[:, :-1], -hidden[:, :-1])
    assert torch.equal(cond[[1, 0]].with_last_slot(v[[1, 0]]).tokens_BTE, made[[1, 0]].tokens_BTE)
    assert TextCond(hidden.bfloat16(), hidden.bfloat16(), scales).with_last_slot(v).tokens_BTE.dtype == torch.bfloat16
    for wrong in (v[:, :2], v[:1], v[0]):
        with pytest.raises(ModelError, match=r"do not fit 2 texts of width 3.*another encoder"):
            cond.with_last_slot(wrong)
