"""Learning rates against the published numbers, torch's and timm's schedules; the presets against their tables."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler, MultiStepLRScheduler

from rayexpand.classifier.classifier import make_optimiser
from rayexpand.classifier.recipe import PRESETS, Recipe, cmo_is_on, drw_is_on, lr_at, make_recipe

PER_EPOCH = 10


def preset(name: str, **fields: Any) -> Recipe:
    needs = {"checkpoint": "weights.safetensors"} if PRESETS[name].get("pretrained") else {}
    return make_recipe({"preset": name, **needs, **fields})


def lr_of_epoch(recipe: Recipe, epoch: float) -> float:
    return lr_at(recipe, round(epoch * PER_EPOCH), recipe.epochs * PER_EPOCH)


@pytest.mark.parametrize(("name", "rates"), [
    ("realfake/in10", {0: 0.1, 49: 0.1, 49.9: 0.1, 50: 0.02, 99: 0.02, 100: 0.004, 149: 0.004, 150: 0.0008,
                       199: 0.0008}),
    ("realfake/official_train_sh", {0: 1e-5, 1: 0.020008, 4: 0.080002, 5: 0.1, 48.9: 0.1, 49: 0.02, 50: 0.02,
                                    99: 0.004, 149: 0.0008}),
    ("realfake/celeba", {0: 0.1, 7.4: 0.1, 7.5: 0.02, 14.9: 0.02, 15: 0.004, 22.4: 0.004, 22.5: 0.0008, 29.9: 0.0008}),
    ("diffcoremix", {0: 0.01, 149.9: 0.01, 150: 0.001, 224.9: 0.001, 225: 0.0001, 299.9: 0.0001}),
    ("diffcoremix/in1k", {0: 0.0, 2.5: 0.32, 5: 0.64, 149: 0.64, 150: 0.064, 225: 0.0064}),
    ("diffmix/long-tail", {0: 0.001, 0.9: 0.001, 1: 0.002, 3: 0.004, 4: 0.005, 5: 0.005, 159.9: 0.005, 160: 5e-5,
                           179.9: 5e-5, 180: 5e-7, 199: 5e-7}),
    ("gif/caltech101", {0: 0.01, 20.9: 0.01, 21: 0.001, 30.9: 0.001, 31: 0.0001, 99: 0.0001}),
    ("gif/flowers", {20: 0.1, 21: 0.01, 31: 0.001}),
    ("gif/pathmnist", {0: 0.01, 50: 0.005, 50.9: 0.005, 99: 0.01 * 0.5 * (1 + math.cos(math.pi * 0.99))}),
    ("gif", {0: 0.1, 25: 0.05 * (1 + math.sqrt(0.5)), 50: 0.05}),
    ("distdiff", {0: 0.1, 0.9: 0.1, 50: 0.05, 75: 0.05 * (1 - math.sqrt(0.5))}),
])
def test_published_learning_rates(name: str, rates: dict[float, float]) -> None:
    recipe = preset(name)

    for epoch, rate in rates.items():
        assert lr_of_epoch(recipe, epoch) == pytest.approx(rate, rel=1e-9), f"epoch {epoch}"


@pytest.mark.parametrize(("name", "peak"), [("diffmix/r50-224-cub", 0.05), ("diffmix/r50-448-dog", 0.005),
                                            ("diffmix/vit-384-flower", 5e-4)])
def test_diffmix_multiplies_warm_up_and_cosine(name: str, peak: float) -> None:
    recipe, total = preset(name), 1200

    assert lr_at(recipe, 0, total) == pytest.approx(peak / 120, rel=1e-12)
    assert lr_at(recipe, 59, total) == pytest.approx(peak / 2 * 0.5 * (1 + math.cos(math.pi * 59 / 1200)), rel=1e-12)
    assert lr_at(recipe, 119, total) == pytest.approx(peak * 0.5 * (1 + math.cos(math.pi * 119 / 1200)), rel=1e-12)
    assert lr_at(recipe, 600, total) == pytest.approx(peak / 2, rel=1e-12)
    assert lr_at(recipe, 1199, total) < 2e-6 * peak * 1.1


def _optimiser(lr: float) -> torch.optim.SGD:
    return torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=lr)


@pytest.mark.parametrize(("name", "schedule"), [
    ("realfake/in1k", lambda o: CosineLRScheduler(o, t_initial=300, warmup_t=5, warmup_lr_init=1e-5)),
    ("realfake/official_train_sh", lambda o: MultiStepLRScheduler(
        o, decay_t=[50, 100, 150], decay_rate=0.2, warmup_t=5, warmup_lr_init=1e-5, warmup_prefix=False)),
])
def test_the_released_command_in_timm(name: str, schedule: Any) -> None:
    recipe = preset(name)
    optimiser = _optimiser(recipe.lr)
    theirs = schedule(optimiser)

    for epoch in range(recipe.epochs):
        theirs.step(epoch)
        assert lr_of_epoch(recipe, epoch) == pytest.approx(optimiser.param_groups[0]["lr"], rel=1e-9), epoch


@pytest.mark.parametrize(("name", "schedule"), [
    ("realfake/in10", lambda o: torch.optim.lr_scheduler.MultiStepLR(o, [50, 100, 150], 0.2)),
    ("diffcoremix", lambda o: torch.optim.lr_scheduler.MultiStepLR(o, [150, 225], 0.1)),
    ("distdiff", lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 100)),
])
def test_schedules_by_epoch_equal_torch(name: str, schedule: Any) -> None:
    recipe = preset(name)
    optimiser = _optimiser(recipe.lr)
    theirs = schedule(optimiser)

    for epoch in range(recipe.epochs):
        assert lr_of_epoch(recipe, epoch) == pytest.approx(optimiser.param_groups[0]["lr"], rel=1e-9), epoch
        optimiser.step()
        theirs.step()


@pytest.mark.parametrize("total", [2, 3, 10, 33, 200, 1001])
def test_one_cycle_equals_torch_at_every_step(total: int) -> None:
    optimiser = _optimiser(0.01)
    theirs = torch.optim.lr_scheduler.OneCycleLR(optimiser, 0.01, total_steps=total, cycle_momentum=False)

    for step in range(total):
        assert abs(lr_at(Recipe(), step, total) - optimiser.param_groups[0]["lr"]) < 1e-12, step
        if step < total - 1:
            optimiser.step()
            theirs.step()


def test_updates_stretch_the_schedule() -> None:
    recipe = preset("realfake/in10", updates=1000)  # 5 steps an epoch

    assert [lr_at(recipe, step, 1000) for step in (249, 250)] == pytest.approx([0.1, 0.02])


def test_the_optimiser_of_table_8_is_that_of_timm() -> None:
    """Real-Fake names `sgd` of timm's training script, which has Nesterov momentum there."""
    theirs = create_optimizer_v2(torch.nn.Linear(2, 2), opt="sgd", lr=0.1, momentum=0.9, weight_decay=5e-4)
    ours = make_optimiser(torch.nn.Linear(2, 2), preset("realfake/in10"))

    for name in ("nesterov", "momentum", "dampening", "lr"):
        assert {group[name] for group in ours.param_groups} == {group[name] for group in theirs.param_groups}, name


PUBLISHED: list[tuple[str, dict[str, Any]]] = [
    ("distdiff", {"backbone": "resnet50", "size": 224, "resize": 256, "rotation": 15, "crop": "square_pad",
                  "crop_pad": 0, "epochs": 100, "batch": 64, "optimiser": "nesterov", "lr": 0.1, "weight_decay": 1e-4,
                  "hflip": 0.5, "smoothing": 0, "decay_all": True}),
    ("gif/cifar100s", {"batch": 256, "epochs": 100, "lr": 0.1, "optimiser": "nesterov", "schedule": "cosine",
                       "weight_decay": 1e-4, "size": 224, "resize": 224}),
    ("gif/organsmnist", {"lr": 0.1, "schedule": "cosine"}), ("gif/breastmnist", {"lr": 0.01, "schedule": "cosine"}),
    ("gif/cars", {"lr": 0.01, "optimiser": "sgd", "schedule": "multistep"}), ("gif/dtd", {"lr": 0.01}),
    ("gif/pets", {"lr": 0.01}), ("gif/flowers", {"lr": 0.1, "optimiser": "sgd"}),
    *[(f"diffmix/r50-224-{data}", {"lr": lr, "batch": 256, "size": 224, "resize": 256}) for data, lr in
      {"dog": 0.005, "cub": 0.05, "flower": 0.05, "car": 0.1, "aircraft": 0.1, "pet": 0.01}.items()],
    *[(f"diffmix/r50-448-{data}", {"lr": lr, "batch": 64, "size": 448, "resize": 512}) for data, lr in
      {"dog": 0.005, "cub": 0.025, "flower": 0.05, "car": 0.05, "aircraft": 0.05}.items()],
    *[(f"diffmix/vit-384-{data}", {"lr": lr, "batch": 32, "size": 384, "resize": 440}) for data, lr in
      {"dog": 1e-5, "cub": 1e-3, "flower": 5e-4, "car": 1e-3, "aircraft": 1e-3}.items()],
    ("diffmix/r50-448-cub", {"crop_pad": 8, "epochs": 120, "weight_decay": 5e-4, "momentum": 0.9, "smoothing": 0.1,
                             "smoothing_mode": "others", "optimiser": "sgd", "amp": True, "crop": "square_pad"}),
    ("diffmix/few-shot", {"size": 224, "lr": 0.05, "batch": 256}),
    ("gif/caltech101", {"crop": "resized", "crop_scale": (0.8, 1.0), "rotation": 0, "size": 224, "hflip": 0.5}),
    ("gif/dtd", {"crop": "none", "rotation": 0, "size": 224, "resize": None, "hflip": 0.5}),
    ("gif/cars", {"crop": "square_pad", "resize": 256, "crop_pad": 0, "rotation": 15, "size": 224}),
    ("diffmix/waterbird", {"epochs": 128, "lr": 0.05, "size": 224}),
    ("diffmix/long-tail", {"batch": 128, "epochs": 200, "weight_decay": 2e-4, "colour_jitter": 0.4, "smoothing": 0,
                           "crop": "resized", "resize": 256, "size": 224, "loss": "ce"}),
    *[(f"diffmix/long-tail{name}", {"optimiser": "sgd", "lr": 5e-3, "momentum": 0.9, "weight_decay": 2e-4,
                                    "milestones": (160, 180), "hflip": 0.5, "smoothing": 0, **fields})
      for name, fields in {"": {"cmo": 0, "drw": 0}, "-cmo": {"cmo": 0.5, "cmo_power": 1, "drw": 0},
                           "-drw": {"cmo": 0, "drw": 0.9999}, "-cmo-drw": {"cmo": 0.5, "drw": 0.9999}}.items()],
    ("realfake/celeba", {"epochs": 30, "pretrained": None, "lr": 0.1, "optimiser": "nesterov", "weight_decay": 5e-4}),
    *[(f"realfake/{data}", {"size": size, "epochs": 200, "batch": 1024, "lr": 0.1, "weight_decay": 5e-4,
                            "smoothing": 0, "augment": "none", "mixup": 0, "cutmix": 0, "drop_path": 0, "amp": True,
                            "loss": "ce", "optimiser": "nesterov", "milestones": (50, 100, 150), "decay_rate": 0.2})
      for data, size in {"in10": 224, "in100": 224, "cub": 448, "cars": 448, "pets": 224, "eurosat": 448}.items()],
    ("realfake/in1k", {"size": 224, "resize": 235, "epochs": 300, "batch": 4096, "optimiser": "lamb", "lr": 5e-3,
                       "weight_decay": 0.02, "warmup_epochs": 5, "smoothing": 0.1, "drop_path": 0.05, "hflip": 0.5,
                       "timm_augment": "rand-m7-mstd0.5-inc1", "mixup": 0.2, "cutmix": 1.0, "loss": "bce",
                       "colour_jitter": 0, "decay_all": False, "pretrained": None}),
    ("realfake/official_train_sh", {"batch": 512, "smoothing": 0.1, "smoothing_mode": "all", "optimiser": "nesterov",
                                    "colour_jitter": 0.4, "crop_scale": (0.08, 1.0), "warmup_lr": 1e-5, "hflip": 0.5,
                                    "resize": 235, "decay_all": False}),
    ("diffcoremix", {"epochs": 300, "batch": 16, "weight_decay": 5e-4, "momentum": 0.9, "optimiser": "sgd",
                     "decay_all": True, "smoothing": 0, "colour_jitter": 0, "hflip": 0.5, "size": 224}),
    ("diffcoremix/in1k", {"batch": 1024, "lr": 0.64, "warmup_epochs": 5}),
    ("diffcoremix/cifar100", {"backbone": "preact_resnet18", "size": 32}),
    ("diffcoremix/tiny-imagenet", {"backbone": "preact_resnet18", "size": 64}),
]


@pytest.mark.parametrize(("name", "fields"), PUBLISHED, ids=[name for name, _ in PUBLISHED])
def test_presets_hold_the_published_fields(name: str, fields: dict[str, Any]) -> None:
    recipe = preset(name).model_dump()

    assert {field: recipe[field] for field in fields} == fields


@pytest.mark.parametrize("name", [name for name in PRESETS if "timm/" in (PRESETS[name].get("pretrained") or "")])
def test_pretrained_weights_see_what_they_were_trained_on(name: str) -> None:
    from timm.models import get_pretrained_cfg

    found = re.search(r"timm/([\w.]+)", PRESETS[name]["pretrained"])
    assert found is not None
    theirs = get_pretrained_cfg(found[1])

    assert theirs is not None
    assert (preset(name).mean, preset(name).std) == (tuple(theirs.mean), tuple(theirs.std))


def test_diffmix_resizes_as_its_released_trainers() -> None:
    assert {preset(name).filter for name in PRESETS if name.startswith("diffmix/")} == {"bilinear"}


def test_recipes_of_before_keep_their_digests() -> None:
    """`filter` is written where it is no longer what it always was."""
    assert "filter" not in Recipe().model_dump(mode="json")
    assert Recipe(filter="bilinear").model_dump(mode="json")["filter"] == "bilinear"
    assert Recipe(**Recipe(filter="bilinear").model_dump(mode="json")).filter == "bilinear"


PRETRAINED = {name for name in PRESETS if name.startswith("diffmix/")} | {
    "realfake/cub", "realfake/cars", "realfake/pets", "diffcoremix/transfer"}


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_loads_and_asks_for_its_weights(name: str) -> None:
    recipe = preset(name)

    assert Recipe(**recipe.model_dump(mode="json")) == recipe
    if name in PRETRAINED:
        with pytest.raises(ValueError, match="checkpoint is missing: this recipe starts from"):
            make_recipe({"preset": name})
        assert make_recipe({"preset": name, "pretrained": None}).checkpoint is None
    else:
        assert make_recipe({"preset": name}) == recipe


@pytest.mark.parametrize("span", [(0.02, 0.985), (4, 197)])
def test_cmo_and_drw_begin_and_end_with_their_epochs(span: tuple[float, float]) -> None:
    """Of 200 epochs, boxes in 4 to 196 and class weights from 160 on, whatever the number of steps."""
    recipe = preset("diffmix/long-tail-cmo-drw", cmo_span=span, drw_from=0.8 if span[0] < 1 else 160)
    for per_epoch in (1, 7):
        total = 200 * per_epoch
        pasting = [step for step in range(total) if cmo_is_on(recipe, step, total)]
        assert (pasting[0], pasting[-1], len(pasting)) == (4 * per_epoch, 197 * per_epoch - 1, 193 * per_epoch)
        weighing = [step for step in range(total) if drw_is_on(recipe, step, total)]
        assert weighing == list(range(160 * per_epoch, total))
    assert not any(found(preset("diffmix/long-tail"), step, 200) for step in range(200)
                   for found in (cmo_is_on, drw_is_on))
    assert drw_is_on(Recipe(drw=0.9, drw_from=0), 0, 10)
    assert cmo_is_on(Recipe(cmo=1, cmo_span=(0, 1)), 9, 10)


def test_own_fields_override_a_preset() -> None:
    assert make_recipe({"preset": "diffcoremix", "lr": 0.5, "batch": 8}).model_dump() == {
        **preset("diffcoremix").model_dump(), "lr": 0.5, "batch": 8}


@pytest.mark.parametrize(("fields", "says"), [
    ({"preset": "difmix/r50-448-cub"}, "did you mean diffmix/r50-448-cub"),
    ({"schedule": "multistep"}, "needs milestones"),
    ({"schedule": "multistep", "milestones": [1, 2], "decay_rate": [0.1], "epochs": 3}, "1 factors for 2 milestones"),
    ({"crop": "square_pad"}, "needs resize"),
    ({"augment": "timm"}, "go together"),
    ({"warmup_epochs": 3, "epochs": 3}, "leaves nothing"),
    ({"optimiser": "nesterov", "momentum": 0}, "nesterov needs momentum"),
    ({"lr": 0}, "greater than 0"),
    ({"learning_rate": 1}, "Extra inputs"),
    ({"cmo": 0.5, "cutmix": 1.0}, "cmo pastes boxes itself"),
    ({"cmo_span": (0.9, 0.1)}, "is no part of"),
    ({"cmo_span": (1, 5), "epochs": 4}, "is no part of 4 epochs"),
    ({"drw": 0.9, "loss": "bce"}, "take loss ce"),
    ({"drw": 0.9, "drw_from": 6, "epochs": 5}, "drw_from 6 is behind the last of 5 epochs"),
    ({"drw": 1.0}, "less than 1"),
])
def test_mistakes_are_named(fields: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        make_recipe(fields)
