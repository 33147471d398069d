"""The folder of an adapter: what is written comes back, and nothing else is taken for one."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from rayexpand.artifacts.adapter import ADAPTER, LORA, TOKENS, AdapterFacts, load_lora, read_adapter, write_adapter
from rayexpand.contract.errors import ModelError
from rayexpand.models.folders import folder_hash
from rayexpand.models.prior import load_prior
from tests.diffusion.gaussian import point_at
from tests.tiny import tiny_adapter, tiny_pipeline

torch.set_num_threads(1)
KEYS = ("n02012849", "n03126707", "n01440764")
NAMES = ("crane", "crane", "tench")  # two ImageNet classes of one name


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny_pipeline(tmp_path_factory.mktemp("base") / "pipeline")


@pytest.fixture(scope="module")
def made(base, tmp_path_factory):
    return tiny_adapter(tmp_path_factory.mktemp("adapter") / "adapter", base, KEYS, names=NAMES,
                        metaclasses=("bird", "machine", "fish"), init_token_id=7)


@pytest.fixture
def folder(made, tmp_path):
    """A copy that a test may damage."""
    return Path(shutil.copytree(made, tmp_path / "adapter"))


def rewrite(folder: Path, **changes: object) -> None:
    raw = json.loads((folder / ADAPTER).read_text()) | changes
    (folder / ADAPTER).write_text(json.dumps(raw))


def test_facts_come_back_and_classes_of_one_name_stay_apart(made):
    facts = read_adapter(made)
    assert (facts.classes, facts.names) == (KEYS, NAMES)
    assert facts.metaclasses == ("bird", "machine", "fish")
    assert (facts.strategy, facts.rank, facts.alpha, facts.init_token_id) == ("ti_db", 2, 4.0, 7)
    assert [(one["label"], one["token"]) for one in json.loads((made / ADAPTER).read_text())["classes"]] == [
        (0, "<class_0>"), (1, "<class_1>"), (2, "<class_2>")]
    assert {file.name for file in made.iterdir()} == {ADAPTER, LORA, TOKENS}


def test_rows_of_classes_of_one_name_are_their_own(base, made):
    prior = load_prior(str(base), device="cpu")
    table = prior.with_adapter(made, base_sha256=None).text_encoder.get_input_embeddings().weight
    assert torch.equal(table[-3:], load_file(made / TOKENS)["tokens"])
    assert not torch.equal(table[-3], table[-2])


@torch.no_grad()
def test_a_fresh_pipeline_computes_what_the_trained_modules_did(base, tmp_path):
    """LoRA as peft trains it and rows in a table, written, and read into a pipeline that knows neither."""
    from peft import LoraConfig, get_peft_model_state_dict

    trained = load_prior(str(base), device="cpu")
    unet, rows_NE = trained.unet, torch.linspace(-1, 1, 48).view(3, 16)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        unet.add_adapter(LoraConfig(r=3, lora_alpha=2, init_lora_weights="gaussian",
                                    target_modules=["to_q", "to_k", "to_v", "to_out.0", "ff.net.2", "proj_in"]))
        for name, one in unet.named_parameters():
            if "lora_B" in name:
                one.normal_()
    before = len(trained.tokenizer)
    trained.tokenizer.add_tokens(["<class_0>", "<class_1>", "<class_2>"])
    trained.text_encoder.resize_token_embeddings(before + 3, mean_resizing=False).weight[before:] = rows_NE

    facts = AdapterFacts("b" * 64, "ti_db", KEYS, NAMES, ("",) * 3, "a {token}", before, "epsilon", rank=3, alpha=2.0)
    write_adapter(tmp_path / "adapter", facts, get_peft_model_state_dict(unet), rows_NE)
    fresh = load_prior(str(base), device="cpu").with_adapter(tmp_path / "adapter", fuse=False, base_sha256="b" * 64)

    prompts, negatives = [f"a photo of a <class_{label}>" for label in range(3)], ["", "blurred", "<class_1>"]
    cond, z = fresh.embed(prompts, negatives, 2.0), torch.ones(3, 4, 8, 8)
    expected, at = trained.embed(prompts, negatives, 2.0), point_at(trained.scheduler, 500)
    assert torch.equal(cond.tokens_BTE, expected.tokens_BTE)
    assert torch.equal(cond.negative_tokens_BTE, expected.negative_tokens_BTE)
    assert torch.equal(fresh.predict(z, at, cond).noise, trained.predict(z, at, expected).noise)
    assert len({row.numpy().tobytes() for row in cond.tokens_BTE}) == 3


@torch.no_grad()
def test_diffusers_reads_the_lora_with_its_alpha(base, made):
    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(base)
    pipe.load_lora_weights(made)
    ours = load_prior(str(base), device="cpu").with_adapter(made, fuse=False, base_sha256=None)
    z, text = torch.ones(1, 4, 8, 8), torch.linspace(-1, 1, 256).view(1, 16, 16)
    assert torch.equal(pipe.unet(z, 500, text).sample, ours.unet(z, 500, text).sample)


@pytest.mark.parametrize(("strategy", "files"), [("ti", {ADAPTER, TOKENS}), ("db", {ADAPTER, LORA})])
def test_each_strategy_leaves_its_own_files(base, tmp_path, strategy, files):
    facts = read_adapter(tiny_adapter(tmp_path / strategy, base, KEYS, strategy=strategy))
    assert {file.name for file in (tmp_path / strategy).iterdir()} == files
    assert (facts.has_tokens, facts.has_lora) == (strategy == "ti", strategy == "db")
    assert (facts.rank, facts.alpha) == ((None, None) if strategy == "ti" else (2, 4.0))


def test_the_hash_covers_every_file_but_how_it_was_made(folder):
    before = folder_hash(folder)
    (folder / "artifact.json").write_text("{}")
    (folder / "samples.png").write_bytes(b"1")
    assert folder_hash(folder) == before
    for name in (ADAPTER, LORA, TOKENS):
        with open(folder / name, "ab") as stream:
            stream.write(b" ")
        assert folder_hash(folder) != before
        before = folder_hash(folder)


def test_reading_facts_takes_neither_torch_nor_diffusers(made):
    code = ("import sys; from rayexpand.artifacts.adapter import read_adapter; read_adapter(sys.argv[1])\n"
            "assert not {'torch', 'diffusers', 'transformers'} & set(sys.modules)")
    subprocess.run([sys.executable, "-c", code, str(made)], check=True)


def swapped(folder):
    raw = json.loads((folder / ADAPTER).read_text())["classes"]
    rewrite(folder, classes=[raw[1], raw[0], raw[2]])


def renamed_after_swapping(folder):
    raw = json.loads((folder / ADAPTER).read_text())["classes"]
    rewrite(folder, classes=[{**raw[1], "label": 0}, {**raw[0], "label": 1}, raw[2]])


def fewer_rows(folder):
    save_file({"tokens": load_file(folder / TOKENS)["tokens"][:2]}, folder / TOKENS)
    trust(folder, TOKENS)


def other_rank(folder):
    state = load_lora(folder)
    name = next(name for name in state if "lora_A" in name)
    save_file(state | {name: torch.ones(5, state[name].shape[1])}, folder / LORA)
    trust(folder, LORA)


def half_a_pair(folder):
    state = load_lora(folder)
    del state[next(name for name in state if "lora_B" in name)]
    save_file(state, folder / LORA)
    trust(folder, LORA)


def of_a_text_encoder(folder):
    save_file({name.replace("unet.", "text_encoder."): one for name, one in load_lora(folder).items()}, folder / LORA)
    trust(folder, LORA)


def trust(folder, name):
    """adapter.json as if the changed file had been written so."""
    import hashlib

    hashes = json.loads((folder / ADAPTER).read_text())["files"]
    rewrite(folder, files=hashes | {name: hashlib.sha256((folder / name).read_bytes()).hexdigest()})


def pickled(folder):
    for name in (ADAPTER, TOKENS):
        (folder / name).unlink()
    (folder / "learned_embeds-steps-last.bin").write_bytes(b"\x80\x04.")


@pytest.mark.parametrize(("damage", "message"), [
    (swapped, r"place 0 of its classes holds label 1 with token <class_1> \('n03126707'\).*label order"),
    (renamed_after_swapping, "place 0 of its classes holds label 0 with token <class_1>"),
    (fewer_rows, r"tokens\.safetensors holds .*\(2, 16\).*one row for each of its 3 classes"),
    (other_rank, r"has LoRA of shapes \[5, \d+\] and \[\d+, 2\], not those of rank 2"),
    (half_a_pair, r"has LoRA of shapes .* and \[\], not those of rank 2"),
    (of_a_text_encoder, "is not a LoRA of a UNet"),
    (pickled, r"has no adapter\.json, and learned_embeds-steps-last\.bin is a pickle"),
    (lambda f: (f / TOKENS).unlink(), r"has no tokens\.safetensors, which strategy ti_db needs"),
    (lambda f: (f / LORA).unlink(), r"has no pytorch_lora_weights\.safetensors"),
    (lambda f: (f / TOKENS).write_bytes((f / TOKENS).read_bytes()[:-1] + b"\x01"), "belongs to another adapter"),
    (lambda f: (f / ADAPTER).write_text("{"), r"adapter\.json cannot be read as JSON"),
    (lambda f: (f / ADAPTER).unlink(), r"has no adapter\.json; give the folder"),
    (lambda f: (f / "model_index.json").write_text("{}") and (f / ADAPTER).unlink(), r"complete pipeline.*prior\.weig"),
    (lambda f: rewrite(f, version=2), "version: Input should be 1"),
    (lambda f: rewrite(f, strategy="full", rank=0), "strategy: Input should be 'ti'.*; rank: Input should be greater"),
    (lambda f: rewrite(f, token="x"), "token: Extra inputs"),
    (lambda f: rewrite(f, rank=None), "strategy ti_db does not go with rank None"),
    (lambda f: rewrite(f, alpha=None), "alpha None"),
    (lambda f: rewrite(f, visual_token="mean"), "visual_token: Input should be 'none'"),
])
def test_damage_is_named_with_what_to_do(folder, damage, message):
    damage(folder)
    with pytest.raises(ModelError, match=message) as error:
        read_adapter(folder)
    assert str(folder) in str(error.value)
    assert "rayexpand fit" in str(error.value) or "prior.weights" in str(error.value)


@pytest.mark.parametrize("part", ["lora", "tokens"])
def test_numbers_of_a_diverged_training_are_not_written(base, made, tmp_path, part):
    lora, tokens = load_lora(made), load_file(made / TOKENS)["tokens"]
    if part == "lora":
        next(iter(lora.values()))[0, 0] = torch.nan
    else:
        tokens[1, 1] = torch.inf
    with pytest.raises(ModelError, match="not finite: training diverged"):
        write_adapter(tmp_path / "x", replace(read_adapter(made)), lora, tokens)
    assert not (tmp_path / "x" / ADAPTER).exists()
