"""Diff-Mix: labels, plans, strengths and images of the six variants against the numbers of the paper and its code."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, StableDiffusionImg2ImgPipeline, StableDiffusionPipeline
from pydantic import ValidationError
from scipy.stats import chi2_contingency

from rayexpand.contract.errors import ConfigError, UsageError
from rayexpand.contract.protocols import Tools
from rayexpand.contract.rng import PlanRng, RowRng
from rayexpand.contract.schema import SEED_INDEX, ClassTable, SeedIndex, Start
from rayexpand.data.subsets import long_tail_counts
from rayexpand.diffusion import sampling
from rayexpand.methods.diffmix import DiffMix, partners
from rayexpand.models.folders import quiet_libraries
from rayexpand.runs import run as runs
from rayexpand.runs.config import parse, semantic
from rayexpand.runs.plan import Plan
from tests.conftest import hashes
from tests.diffusion.gaussian import GaussianPrior, sd_scheduler
from tests.methods.conftest import CLASSES
from tests.methods.fakes import batch_of
from tests.methods.references import Watched
from tests.tiny import tiny_adapter

torch.set_num_threads(1)
VARIANTS = [f"{weights}_{kind}" for weights in ("real", "diff") for kind in ("gen", "aug", "mix")]
ROWS = [("a", 0, 0), ("b", 1, 0), ("a", 0, 1), ("c", 2, 0)]


def index_of(counts, metaclasses=()):
    """Seeds of classes c0, c1, ..., as many as `counts` says, in class order."""
    labels = np.repeat(np.arange(len(counts), dtype=np.int32), counts)
    n = len(labels)
    table = pa.table({"seed_id": [f"s{i}" for i in range(n)], "label": labels, "file": [0] * n, "member": [""] * n,
                      "group": [-1] * n, "offset": range(n), "fault": [""] * n}, schema=SEED_INDEX)
    keys = [f"c{label}" for label in range(len(counts))]
    return SeedIndex(table, ClassTable.of(keys, keys, counts, metaclasses or ["bird"] * len(keys)))


def planned(index, seed=0, **fields):
    """Source and target labels, strengths, and the draws of a whole plan."""
    method = DiffMix(**fields)
    copies = method.copies(index, PlanRng(seed, method.name))
    plan = Plan(index, method, seed, 8, copies, np.zeros(len(index), np.int32))
    draws = [draw for unit in plan.units(0) for draw in unit]
    assert [draw.row for draw in draws] == list(range(len(draws)))
    source, target, strength = (np.array([getattr(draw, name) for draw in draws]) for name in (
        "source_label", "target_label", "strength"))
    return SimpleNamespace(draws=draws, copies=copies, source=source, target=target, strength=strength, plan=plan)


def share(labels, k):
    return np.bincount(labels, minlength=k) / len(labels)


# Labels ----------------------------------------------------------------------------------------------------------

def label(source, target, strength, **recipe):
    return DiffMix().soft_label(np.array([source]), np.array([target]), np.array([strength]), 4, **recipe)[0]


@pytest.mark.parametrize(("strength", "gamma", "expected"), [
    (0.7, 0.5, 0.83666), (0.7, 0.1, 0.96496), (0.5, 1.5, 0.35355), (0.9, 0.3, 0.96889),
    (0.5, 1.0, 0.5000), (0.5, 0.8, 0.5743), (0.5, 0.5, 0.7071), (0.5, 0.3, 0.8123), (0.5, 0.1, 0.9330),
    (0.7, 1.5, 0.5857), (0.7, 0.8, 0.7518), (0.7, 0.3, 0.8985), (0.9, 1.5, 0.8538), (0.9, 0.8, 0.9192),
    (0.9, 0.1, 0.9895), (0.0, 0.0, 1.0), (0.0, 0.5, 0.0), (1.0, 1.5, 1.0), (0.3, 0.0, 1.0)])
def test_the_target_weighs_strength_to_the_gamma(strength, gamma, expected):
    np.testing.assert_allclose(label(1, 3, strength, gamma=gamma), [0, 1 - expected, 0, expected], atol=6e-5)


def test_labels_have_the_mass_of_the_scaler_and_one_half_is_the_default_gamma():
    np.testing.assert_allclose(label(1, 3, 0.7), [0, 0.16334, 0, 0.83666], atol=5e-6)
    np.testing.assert_allclose(label(1, 3, 0.7, soft_scaler=0.9), [0, 0.14701, 0, 0.75299], atol=5e-6)
    np.testing.assert_allclose(label(2, 2, 0.7, soft_scaler=0.9), [0, 0, 0.9, 0], atol=1e-7)


def test_labels_are_distributions_monotone_in_strength_and_gamma():
    numbers = RowRng(0, "test", "labels", 0).uniforms("x", (2, 200)).astype(float)
    source, target = np.arange(200) % 4, np.arange(200) // 4 % 4
    y = np.stack([DiffMix().soft_label(source[i:i + 1], target[i:i + 1], numbers[0, i:i + 1], 4,
                                       gamma=3 * numbers[1, i])[0] for i in range(200)])
    np.testing.assert_allclose(y.sum(axis=1), 1, atol=1e-6)
    np.testing.assert_array_equal(y[source == target], np.eye(4, dtype=np.float32)[source[source == target]])
    grid = np.linspace(0, 1, 11)
    weight = np.array([[label(0, 1, s, gamma=g)[1] for s in grid] for g in (0, 0.1, 0.5, 1, 1.5)])
    assert (np.diff(weight, axis=1) >= 0).all()
    assert (np.diff(weight, axis=0) <= 0).all()
    for one in ({"gamma": -0.1}, {"soft_scaler": 0.0}, {"soft_scaler": 1.1}):
        with pytest.raises(UsageError, match="soft_label"):
            label(0, 1, 0.5, **one)


# Plans -----------------------------------------------------------------------------------------------------------

def test_mix_pairs_every_class_with_every_other_as_often():
    """The spec's tolerances for 100,000 rows, wider by the root of the smaller number."""
    rows, k = 6000, 20
    for references in ("stratified", "class_uniform"):
        made = planned(index_of([60] * k), references=references)
        wide = 0.003 * (100_000 / rows) ** 0.5
        assert len(made.draws) == rows
        np.testing.assert_allclose(share(made.target, k), 0.05, atol=wide)
        assert (made.source == made.target).mean() == pytest.approx(0.05, abs=wide)
        np.testing.assert_allclose([(made.strength == s).mean() for s in (0.5, 0.7, 0.9)], 1 / 3, atol=3 * wide)
        pairs = np.zeros((k, k))
        np.add.at(pairs, (made.source, made.target), 1)
        assert chi2_contingency(pairs).pvalue > 1e-3
        drawn = [np.bincount(made.target[made.strength == s], minlength=k) for s in (0.5, 0.7, 0.9)]
        assert chi2_contingency(drawn).pvalue > 1e-3


def test_aug_keeps_the_class_and_gen_ignores_it():
    index = index_of([60, 40, 20])
    aug = planned(index, variant="diff_aug")
    np.testing.assert_array_equal(aug.source, aug.target)
    assert {draw.start for draw in aug.draws} == {Start.IMAGE}
    gen = planned(index, variant="diff_gen", strengths=[0.5])
    assert {(draw.start, draw.strength, draw.steps_run) for draw in gen.draws} == {(Start.NOISE, 1.0, 25)}
    np.testing.assert_allclose(share(gen.target, 3), 1 / 3, atol=0.07)
    own = planned(index, variant="diff_gen", targets="reference")
    np.testing.assert_array_equal(own.source, own.target)


@pytest.mark.parametrize(("references", "expected", "spread"), [
    ("stratified", (0.9, 0.09, 0.01), False), ("image_uniform", (0.9, 0.09, 0.01), True),
    ("class_uniform", (1 / 3, 1 / 3, 1 / 3), True)])
@pytest.mark.parametrize("variant", ["diff_mix", "diff_aug"])
def test_references_on_a_long_tail(references, expected, spread, variant):
    index = index_of([900, 90, 10])
    method = DiffMix(variant=variant, references=references, ratio=10)
    copies = method.copies(index, PlanRng(0, "diffmix"))
    assert copies.sum() == 10 * 1000
    np.testing.assert_allclose(np.bincount(index.labels, copies) / 10_000, expected, atol=0.02)
    assert (copies[:900].std() > 0) == spread
    assert copies[:900].max() < 30  # within a class, all images are as likely
    assert (copies[:900] > 0).mean() > 0.9
    np.testing.assert_array_equal(copies, method.copies(index, PlanRng(0, "diffmix")))


def test_long_tail_targets_are_uniform_whatever_the_references():
    made = planned(index_of([540, 54, 6]), references="image_uniform", strengths=[0.7])
    np.testing.assert_allclose(share(made.source, 3), (0.9, 0.09, 0.01), atol=0.02)
    np.testing.assert_allclose(share(made.target, 3), 1 / 3, atol=0.04)
    assert set(made.strength) == {0.7}
    assert {draw.steps_run for draw in made.draws} == {17}


@pytest.mark.parametrize("fields", [{}, {"references": "image_uniform"}, {"references": "class_uniform"},
                                    {"targets": "balanced"}, {"variant": "real_aug"}, {"variant": "real_gen"},
                                    {"variant": "diff_aug", "targets": "balanced"}])
def test_the_plan_has_m_rows_for_each_image(fields):
    for counts in ([12, 6, 2], [13, 5, 1, 1, 1], [7, 7, 7], [1] * 9, long_tail_counts(5994, 200, 100).tolist()):
        index = index_of(counts)
        for ratio in (0.5, 1.5, 2.5, 2.3, 3):
            copies = DiffMix(ratio=ratio, **fields).copies(index, PlanRng(1, "diffmix"))
            assert copies.sum() == round(ratio * len(index)), (counts, ratio)


@pytest.mark.parametrize("variant", ["diff_mix", "diff_aug", "real_gen"])
def test_a_fraction_of_a_long_tail_is_shared_out_exactly(variant):
    """CUB-LT: 1,242 images, 83 of 200 classes with one."""
    counts = long_tail_counts(5994, 200, 100)
    index, made = index_of(counts.tolist()), {}
    for ratio, rows in ((0.5, 621), (1.5, 1863), (2.3, 2857), (2.5, 3105)):
        made[ratio] = copies = DiffMix(variant=variant, ratio=ratio).copies(index, PlanRng(0, "diffmix")).astype(int)
        assert copies.sum() == rows
        assert set(copies) == {int(ratio), int(ratio) + 1}
        assert np.abs(np.bincount(index.labels, copies) - ratio * counts).max() < 1.2, "of each class its share"
    assert abs(made[0.5][-83:].mean() - 0.5) < 0.03, "classes of one image are neither all in nor all out"
    assert (made[2.3] <= made[2.5]).all(), "more contains fewer"


@pytest.mark.parametrize("variant", ["diff_mix", "diff_gen", "diff_aug"])
@pytest.mark.parametrize("references", ["stratified", "image_uniform", "class_uniform"])
@pytest.mark.parametrize(("fields", "expected"), [
    ({"targets": "balanced"}, {67, 66}), ({"targets": "balanced", "quota": 7}, {7}),
    ({"targets": "fill"}, [0, 19, 28])])
def test_exact_targets_are_exact(variant, references, fields, expected):
    made = planned(index_of([29, 10, 1]), variant=variant, references=references, **fields)
    counts = np.bincount(made.target, minlength=3).tolist()
    assert (counts == expected) if isinstance(expected, list) else (set(counts) == expected)
    if variant == "diff_aug":
        np.testing.assert_array_equal(made.source, made.target)
    elif fields == {"targets": "balanced"}:  # dealt out independently of the reference
        table = [np.bincount(made.target[made.source == j], minlength=3) for j in (0, 1)]
        assert chi2_contingency(table).pvalue > 1e-3
        other = planned(index_of([29, 10, 1]), variant=variant, references=references, seed=1, **fields)
        assert other.target.tolist() != made.target.tolist()


def test_where_nothing_is_missing_fill_is_refused():
    with pytest.raises(UsageError, match="nothing to fill"):
        planned(index_of([4, 4]), targets="fill")


def test_a_class_without_seeds_is_a_target_and_never_a_reference():
    index = index_of([20, 0, 20])
    for fields in ({}, {"references": "class_uniform"}, {"referable_classes": 2}, {"variant": "diff_gen"},
                   {"targets": "balanced"}, {"targets": "fill"}):
        made = planned(index, **fields)
        assert set(made.source) == {0, 2}
        assert 1 in made.target
    for fields in ({}, {"references": "class_uniform"}, {"targets": "balanced"}):
        assert set(planned(index, variant="diff_aug", **fields).target) == {0, 2}
    for references in ("stratified", "image_uniform"):
        with pytest.raises(UsageError, match=r"classes without seeds .* c1"):
            planned(index, variant="diff_aug", targets="fill", references=references)


def test_referable_classes_are_a_regular_random_graph():
    k, referable = 20, 5
    able = partners((3,) * k, None, referable, 0, "diffmix")
    sets = [frozenset(j for j in range(k) if i in able[j]) for i in range(k)]
    assert {len(found) for found in able} == {len(found) for found in sets} == {referable}
    assert len(set(sets)) > k / 2
    assert able != partners((3,) * k, None, referable, 1, "diffmix")
    rows = 20 * 60 * 5
    made = planned(index_of([60] * k), referable_classes=referable)
    assert all(j in sets[i] for i, j in zip(made.target, made.source, strict=True))
    np.testing.assert_allclose(share(made.target, k), 0.05, atol=0.003 * (100_000 / rows) ** 0.5)
    uneven = partners((1, 1, 0, 1, 1, 0, 1), None, 3, 0, "diffmix")  # 7 targets x 3 over 5 references
    assert sorted(map(len, uneven)) == [0, 0, 4, 4, 4, 4, 5]
    often = Counter(j for seed in range(300) for j in range(6) if 0 in partners((1,) * 6, None, 2, seed, "m")[j])
    np.testing.assert_allclose([often[j] / 300 for j in range(6)], 1 / 3, atol=0.1)


def test_pairs_of_one_metaclass():
    words = ["bird", "dog", "bird", "dog", "dog"]
    made = planned(index_of([20] * 5, words), pairing="same_metaclass")
    assert all(words[i] == words[j] for i, j in zip(made.source, made.target, strict=True))
    assert len(set(zip(made.source.tolist(), made.target.tolist(), strict=True))) == 2 * 2 + 3 * 3
    both = planned(index_of([20] * 5, words), pairing="same_metaclass", referable_classes=2)
    assert len(set(zip(both.source.tolist(), both.target.tolist(), strict=True))) == 2 * 2 + 3 * 2
    with pytest.raises(UsageError, match="1 classes without a metaclass, such as label 4"):
        planned(index_of([20] * 5, [*words[:4], ""]), pairing="same_metaclass", prompt="{token}")
    with pytest.raises(UsageError, match="'fish', which have no seed"):
        planned(index_of([20, 20, 0], ["bird", "bird", "fish"]), pairing="same_metaclass")
    with pytest.raises(UsageError, match="30 asked, but only 5"):
        planned(index_of([20] * 5, words), referable_classes=30)


# Settings --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("variant", VARIANTS)
def test_a_variant_is_its_weights_its_start_and_its_prompt(variant):
    method = DiffMix(variant=variant)
    fitted = variant.startswith("diff")
    assert method.needs() == ({"prior", "adapter"} if fitted else {"prior"})
    draw = method.draw("s", 1, 2, 9, CLASSES, RowRng(0, "diffmix", "s", 2))
    word = f"<class_{draw.target_label}>" if fitted else CLASSES.name[draw.target_label].replace("_", " ")
    assert draw.prompt == f"a photo of a {word} {CLASSES.metaclass[draw.target_label]}"
    assert draw.start == (Start.NOISE if variant.endswith("gen") else Start.IMAGE)
    assert (method.steps, method.guidance_scale, method.solver, method.ratio) == (25, 7.5, "dpmpp_2m", 5)


def test_prompts_with_tokens_captions_and_without_metaclass():
    method = DiffMix(prompt="{token} {name}, {caption}", strengths=[0.9])
    assert method.needs() == {"prior", "adapter", "captions"}
    draw = DiffMix(prompt="{token} {name}, {caption}", targets="reference").draw(
        "s", 2, 0, 0, CLASSES, RowRng(0, "diffmix", "s", 0))
    assert draw.prompt == "<class_2> rain boot, {caption}"
    pascal = index_of([3, 3], ["", ""])
    with pytest.raises(UsageError, match=r"\{metaclass\}, which class 'c0' does not have.* take it out of the prompt"):
        DiffMix().copies(pascal, PlanRng(0, "diffmix"))
    assert planned(pascal, prompt="a photo of a {token}").draws[0].prompt.startswith("a photo of a <class_")


@pytest.mark.parametrize(("fields", "words"), [
    ({"variant": "fake_mix"}, "real_gen"), ({"strengths": []}, "at least one"), ({"strengths": [1.1]}, "less than"),
    ({"strengths": [0.03]}, "runs no step"), ({"strengths": [0.5, 0.01]}, "runs no step"),
    ({"variant": "real_aug", "targets": "uniform"}, "class_uniform"), ({"targets": "fill", "quota": 3}, "leave quota"),
    ({"variant": "real_mix", "prompt": "a {token}"}, "know no"), ({"referable_classes": 0}, "greater than"),
    ({"variant": "diff_aug", "pairing": "same_metaclass"}, "only mix"),
    ({"targets": "balanced", "referable_classes": 3}, "only mix with targets: uniform"), ({"ratio": 0}, "greater"),
    ({"variant": "diff_gen", "referable_classes": 3}, "only mix")])
def test_settings_that_cannot_work_are_refused(fields, words):
    with pytest.raises(ValidationError, match=words):
        DiffMix(**fields)


@pytest.mark.parametrize(("fields", "wrong"), [
    ({"variant": "diffmix"}, ["method.variant"]), ({"steps": 1}, ["method.steps"]),
    ({"ratio": 0, "strengths": [2.0]}, ["method.ratio", "method.strengths.0"])])
def test_only_what_is_wrong_is_named(fields, wrong):
    """Not also the defaults that follow from it."""
    with pytest.raises(ConfigError) as refused:
        parse({"name": "job", "data": {"source": "digits"}, "method": {"name": "diffmix", **fields}})
    assert [line.partition(":")[0] for line in refused.value.problems] == wrong


def test_gamma_is_no_setting_of_a_run(make_config):
    with pytest.raises(ValidationError, match="gamma"):
        DiffMix(gamma=0.5)
    config = make_config("diffmix", variant="real_mix", prompt="a photo of a {name}")
    assert "gamma" not in str(semantic(config))


# Sampling --------------------------------------------------------------------------------------------------------

class Counted(GaussianPrior):
    """Keeps the first latent of a call, and takes the seed latent as given."""

    first = None

    def encode(self, x_BCHW, noise):
        return x_BCHW

    def predict(self, z_t, at, cond):
        self.first = z_t.clone() if self.first is None else self.first
        return super().predict(z_t, at, cond)


@pytest.mark.parametrize(("strength", "run", "linspace", "signal", "noise", "leading", "ddim"), [
    (0.1, 2, 80, 0.9583, 0.2858, 77, 41), (0.25, 6, 240, 0.8307, 0.5567, 229, 201),
    (0.3, 7, 280, 0.7900, 0.6131, 267, 241), (0.5, 12, 480, 0.5511, 0.8344, 457, 441),
    (0.7, 17, 679, 0.3098, 0.9508, 647, 641), (0.75, 18, 719, 0.2676, 0.9635, 685, 681),
    (0.9, 22, 879, 0.1324, 0.9912, 837, 841), (1.0, 25, 999, 0.0683, 0.9977, 951, 961)])
def test_a_strength_is_a_number_of_steps_and_a_start(monkeypatch, strength, run, linspace, signal, noise, leading,
                                                      ddim):
    for fields, first in (({}, linspace), ({"spacing": "leading"}, leading), ({"solver": "ddim"}, ddim),
                          ({"solver": "unipc"}, linspace)):
        prior, method = Counted(sd_scheduler()), DiffMix(strengths=[strength], prompt="", **fields)
        batch = batch_of(method, CLASSES, ROWS)
        assert {(d.strength, d.steps_run) for d in batch.draws} == {(strength, run)}
        method.expand(batch, Tools(CLASSES, prior=prior))
        assert (len(prior.timesteps), prior.timesteps[0]) == (run, first)
    for z0, eps, expected in ((255, 0.0, signal), (0, 1.0, noise)):  # of white, without noise; of black, with noise 1
        prior, method = Counted(sd_scheduler()), DiffMix(strengths=[strength], prompt="")
        batch = replace(batch_of(method, CLASSES, ROWS), images=(np.full((16, 16, 3), z0, np.uint8),) * 4)
        monkeypatch.setattr(sampling, "noise_batch", lambda *_, value=eps: torch.full((4, 3, 16, 16), value))
        method.expand(batch, Tools(CLASSES, prior=prior))
        np.testing.assert_allclose(prior.first, expected, atol=1e-4)


def test_unipc_of_30_steps_and_a_start_from_noise(monkeypatch):
    for spacing, first in ((None, 733), ("leading", 705)):
        prior, method = Counted(sd_scheduler()), DiffMix(strengths=[0.75], steps=30, solver="unipc", spacing=spacing,
                                                         prompt="")
        method.expand(batch_of(method, CLASSES, ROWS), Tools(CLASSES, prior=prior))
        assert (len(prior.timesteps), prior.timesteps[0]) == (22, first)
    prior, method = Counted(sd_scheduler()), DiffMix(variant="diff_gen", prompt="")
    batch = batch_of(method, CLASSES, ROWS)
    method.expand(replace(batch, images=(np.full((16, 16, 3), 255, np.uint8),) * 4), Tools(CLASSES, prior=prior))
    np.testing.assert_array_equal(prior.first, sampling.noise_batch(prior, batch))  # nothing of the white image
    assert (len(prior.timesteps), prior.timesteps[0]) == (25, 999)


@pytest.mark.parametrize("kind", ["gen", "aug", "mix"])
def test_variants_share_their_rows(tools, kind):
    """With equal prompts diff_ is real_ on the same weights; mix with the reference's class is aug."""
    fields = {"steps": 4, "strengths": [0.5], "prompt": "a photo of a {name}"}
    real, diff = (DiffMix(variant=f"{weights}_{kind}", **fields) for weights in ("real", "diff"))
    batches = [batch_of(method, CLASSES, ROWS) for method in (real, diff)]
    assert batches[0].draws == batches[1].draws
    images = [method.expand(batch, tools).images for method, batch in zip((real, diff), batches, strict=True)]
    np.testing.assert_array_equal(*images)
    if kind != "mix":
        return
    aug = DiffMix(variant="diff_aug", **fields)
    tied = DiffMix(variant="diff_mix", targets="reference", **fields)
    assert batch_of(tied, CLASSES, ROWS).draws == batch_of(aug, CLASSES, ROWS).draws
    own = aug.expand(batch_of(aug, CLASSES, ROWS), tools).images
    np.testing.assert_array_equal(tied.expand(batch_of(tied, CLASSES, ROWS), tools).images, own)
    same = [i for i, draw in enumerate(batches[1].draws) if draw.target_label == draw.source_label]
    assert 0 < len(same) < len(ROWS)  # a row of mix that happens to get its own class is the row of aug
    for i, image in enumerate(images[1]):
        assert np.array_equal(image, own[i]) == (i in same)


def test_calls_hold_one_number_of_steps_and_a_prompt_for_each_row():
    made = planned(index_of([20] * 4))
    calls = made.plan.calls(0)
    assert all(len({draw.steps_run for draw in call.slots if draw}) == 1 for call in calls)
    assert {draw.steps_run for call in calls for draw in call.slots if draw} == {12, 17, 22}
    assert max(len({draw.prompt for draw in call.slots if draw}) for call in calls) >= 3


@pytest.mark.slow
def test_through_the_expander_mix_of_the_own_class_is_aug(make_config, tools, tmp_path, image_folder):
    base = tools.prior.source.files.folder
    adapter = tiny_adapter(tmp_path / "adapter", base, sorted(folder.name for folder in image_folder.iterdir()))
    plain = {"prior": {"weights": str(base)}, "image": {"size": 16}}
    sections = {**plain, "artifacts": {"adapter": str(adapter)}}
    common = {"steps": 4, "prompt": "a {token}", "ratio": 1, "strengths": [0.5, 0.75], "sections": sections}
    found, drawn, loaded = {}, {}, None
    for name, fields in (("aug", {"variant": "diff_aug"}), ("tied", {"variant": "diff_mix", "targets": "reference"}),
                         ("mix", {"variant": "diff_mix"}),
                         ("real", {"variant": "real_aug", "prompt": "a {name}", "sections": plain})):
        run = runs.prepare(make_config("diffmix", name=name, **{**common, **fields}))
        expander = runs.start(run, (lambda tools=loaded: tools) if loaded and name != "real" else None)
        for shard in range(run.plan.n_shards):
            expander(shard)
            drawn |= {(name, draw.sample_id): draw for unit in run.plan.units(shard) for draw in unit}
        loaded, found[name] = expander.tools, hashes(run)
        expander.close()
    assert len(found["aug"]) == 20
    assert found["tied"] == found["aug"]
    same = {key for key in found["mix"] if drawn["mix", key].target_label == drawn["mix", key].source_label}
    assert 0 < len(same) < 20
    assert {key for key, value in found["mix"].items() if found["aug"][key] == value} == same
    assert not set(found["real"].values()) & set(found["aug"].values())


# The same, one row at a time, by the pipelines of diffusers ----------------------------------------------------------

@pytest.mark.parametrize("variant", ["diff_mix", "diff_gen"])
def test_images_are_those_of_the_pipelines_row_by_row(tools, monkeypatch, variant):
    method = DiffMix(variant=variant, steps=10, negative="blurry", guidance_scale=3.0)
    prior, image_to_image = tools.prior, variant == "diff_mix"
    with quiet_libraries():
        kind = StableDiffusionImg2ImgPipeline if image_to_image else StableDiffusionPipeline
        pipe = kind(prior.vae, prior.text_encoder, prior.tokenizer, prior.unet, DPMSolverMultistepScheduler.from_config(
            prior.scheduler.config, timestep_spacing="linspace", algorithm_type="dpmsolver++"), None, None,
            requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    rows = [(f"s{i}", i % 3, i // 3) for i in range(9)]
    everything = batch_of(method, CLASSES, rows)
    steps = np.array([draw.steps_run for draw in everything.draws])
    assert set(steps) == ({5, 7, 9} if image_to_image else {10})
    for run in set(steps):
        chosen = np.flatnonzero(steps == run)
        batch = type(everything)(*([getattr(everything, name)[i] for i in chosen] for name in (
            "draws", "images", "rngs", "filler")))
        watched = Watched(prior)
        method.expand(batch, replace(tools, prior=watched))
        for draw, image, rng, ours in zip(batch.draws, batch.images, batch.rngs, watched.decoded[-1][1], strict=True):
            shape = prior.latent_shape(*image.shape[:2])
            noise, posterior = (torch.from_numpy(rng.normals(name, shape))[None] for name in ("noise", "posterior"))
            common = {"num_inference_steps": 10, "guidance_scale": 3.0, "negative_prompt": "blurry",
                      "output_type": "pt"}
            if image_to_image:
                x = torch.from_numpy(image.copy()).permute(2, 0, 1)[None] / 127.5 - 1
                latents = prior.vae.encode(x).latent_dist
                z0 = (latents.mean + latents.std * posterior) * prior.vae.config.scaling_factor
                monkeypatch.setattr(f"{kind.__module__}.randn_tensor", lambda *_, _noise=noise, **__: _noise)
                theirs = pipe(draw.prompt, z0, strength=draw.strength, **common).images[0]
            else:
                theirs = pipe(draw.prompt, latents=noise, height=16, width=16, **common).images[0]
            torch.testing.assert_close(ours.clamp(0, 1), theirs, atol=1e-5, rtol=0)


