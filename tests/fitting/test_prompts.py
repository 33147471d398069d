"""Sentences by tiny random text models of both kinds, and `fit` around them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rayexpand.contract.errors import ConfigError, ModelError, UsageError
from rayexpand.contract.schema import ClassTable
from rayexpand.fitting.config import parse_fit
from rayexpand.fitting.fit import fit
from rayexpand.fitting.prompts import PromptsFit, _Drawn, _line, check_generator, write_prompts
from rayexpand.methods.lecf import Lecf
from rayexpand.models.folders import quiet_libraries
from rayexpand.models.tiny import digits
from rayexpand.runs.config import parse

CLASSES = ClassTable.of(["3", "7"], ["three", "seven"])


@pytest.fixture(scope="module", params=["decoder", "encoder-decoder"])
def generator(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    from transformers import GPT2Config, GPT2LMHeadModel, T5Config, T5ForConditionalGeneration

    folder = tmp_path_factory.mktemp("text") / request.param
    tokenizer = digits.build_tokenizer()
    special = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    with torch.random.fork_rng(), quiet_libraries():
        torch.manual_seed(0)
        if request.param == "decoder":
            model = GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), n_positions=64, n_embd=16, n_layer=1,
                                               n_head=2, **special))
        else:
            model = T5ForConditionalGeneration(T5Config(vocab_size=len(tokenizer), d_model=16, d_kv=8, d_ff=16,
                                                        num_layers=1, num_heads=2, decoder_start_token_id=0, **special))
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return str(folder)


def written(folder: Path, classes: ClassTable = CLASSES, seed: int = 0, **fields: Any) -> dict[str, list[str]]:
    folder.mkdir()
    made = PromptsFit(**{"per_class": 6, "batch": 4, "max_tokens": 5, "must_name": False, **fields})
    facts = write_prompts(made, classes, seed, "cpu", lambda *said: None, folder)
    lists = json.loads((folder / "prompts.json").read_text())
    assert facts == {"device": "cpu", "sentences": sum(map(len, lists.values())),
                     "fewest_of_a_class": min(map(len, lists.values()))}
    return lists


def test_sentences_depend_on_class_number_and_seed_alone(tmp_path: Path, generator: str) -> None:
    first = written(tmp_path / "a", generator=generator)
    torch.manual_seed(1)

    assert {key: len(set(found)) for key, found in first.items()} == {"3": 6, "7": 6}
    assert written(tmp_path / "b", generator=generator) == first
    alone = written(tmp_path / "c", ClassTable.of(["7"], ["seven"]), generator=generator)
    assert alone["7"] == first["7"]
    more = written(tmp_path / "d", generator=generator, per_class=9)
    assert all(more[key][:6] == first[key] for key in first)
    assert written(tmp_path / "e", generator=generator, seed=1)["3"] != first["3"]
    unnamed = written(tmp_path / "g", generator=generator, instruction="a digit")
    assert unnamed["3"] != unnamed["7"], "each class has numbers of its own"
    if not generator.endswith("encoder-decoder"):  # whose likeliest first token is the end
        assert len(written(tmp_path / "f", generator=generator, top_k=1)["3"]) == 1, "the likeliest sentence only"
    assert Lecf(prompts=str(tmp_path / "a")).prompts["3"] == tuple(first["3"])


def test_a_model_that_never_names_the_class_is_refused(tmp_path: Path, generator: str) -> None:
    strange = ClassTable.of(["x"], ["xylophone quartet"])
    with pytest.raises(UsageError, match=r"of 24 sentences about class 'x' none holds 'xylophone quartet'"):
        written(tmp_path / "a", strange, generator=generator, must_name=True)


def test_tokens_follow_their_probability() -> None:
    """A token is taken where the cumulative probability first exceeds u: (0.2, 0, 0.5, 0.3)."""
    p = torch.tensor([[0.2, 0.0, 0.5, 0.3]])
    u = torch.tensor([[0.0], [0.19], [0.21], [0.69], [0.71], [0.9999999]])
    chosen = _Drawn(u)(torch.zeros(6, 1), p.log().repeat(6, 1)).argmax(1).tolist()

    assert chosen == [0, 0, 2, 2, 3, 3]
    assert _Drawn(torch.zeros(1, 1))(torch.zeros(1, 1), p.roll(2).log()).argmax(1).tolist() == [0]
    assert _Drawn(torch.zeros(1, 1))(torch.zeros(1, 1), p.roll(3).log()).argmax(1).tolist() == [1], "never one of p = 0"
    two = _Drawn(torch.tensor([[0.1, 0.9]]))
    assert [two(torch.zeros(1, step), p.log()).argmax(1).tolist() for step in (1, 2)] == [[0], [3]], "a number a token"
    uniforms = np.random.Generator(np.random.Philox(key=1)).random((20_000, 1), dtype=np.float32)
    many = _Drawn(torch.from_numpy(uniforms))(torch.zeros(20_000, 1), p.log().repeat(20_000, 1)).argmax(1)
    np.testing.assert_allclose(np.bincount(many, minlength=4) / 20_000, p[0], atol=0.01)


@pytest.mark.parametrize(("text", "line"), [("  a  cat\nmore", "a cat"), ('"A cat."', "A cat."), ("\n", ""), ("", "")])
def test_lines(text: str, line: str) -> None:
    assert _line(text) == line


def test_fit_makes_it_once_and_a_run_takes_it(tmp_path: Path, generator: str) -> None:
    raw = {"name": "d", "out": str(tmp_path), "data": {"source": "digits", "per_class": 1}, "device": "cpu",
           "fit": {"kind": "prompts", "generator": generator, "per_class": 2, "batch": 2, "max_tokens": 3,
                   "must_name": False}}
    made = fit(parse_fit(raw), lambda *said: None)["prompts"]
    written_at = (made / "prompts.json").stat().st_mtime_ns

    assert fit(parse_fit(raw), lambda *said: None)["prompts"] == made
    assert (made / "prompts.json").stat().st_mtime_ns == written_at
    facts = json.loads((made / "artifact.json").read_text())
    assert (facts["sentences"], len(facts["made_from"]["generator_sha256"])) == (20, 64)
    method = {"name": "lecf", "prompts": str(tmp_path / "d-prompts")}
    config = parse({"name": "x", "data": raw["data"], "method": method})
    assert len(config.method.prompts) == 10  # type: ignore[attr-defined]


def test_folders_that_cannot_be_used(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_text("")

    assert "nothing is downloaded" in check_generator(str(tmp_path / "gone"))[0]
    problems = check_generator(str(tmp_path))
    assert ["tokenizer.json is missing" in problems[0], "is a pickle" in problems[1]] == [True, True]
    (tmp_path / "model-00002-of-00002.safetensors").write_bytes(b"half")
    assert "model-00002-of-00002.safetensors cannot be read: it is cut off" in check_generator(str(tmp_path))[1]
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"fit\.prompts\.generator: .* is a pickle"):
        fit(parse_fit({"name": "d", "out": str(tmp_path), "data": {"source": "digits"},
                       "fit": {"prompts": {"generator": str(tmp_path)}}}), lambda *said: None)
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "model.safetensors").write_text("no")
    with pytest.raises(ModelError, match="cannot be read: it is cut off"):
        write_prompts(PromptsFit(generator=str(tmp_path)), CLASSES, 0, "cpu", lambda *said: None, tmp_path)
