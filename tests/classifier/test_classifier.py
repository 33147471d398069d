"""The training step against torch's and timm's own optimisers and losses, slices against one batch, and resuming."""

from __future__ import annotations

import copy
import io
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import timm.loss
import timm.optim
import torch
from torch import nn

from rayexpand.classifier import classifier as module
from rayexpand.classifier.backbones import build_backbone
from rayexpand.classifier.classifier import (
    Classifier,
    TrainBatch,
    jensen_shannon,
    loss_of,
    make_optimiser,
    try_recipe,
)
from rayexpand.classifier.mixing import Mix, apply_mix, draw_mix, smooth, worker_rows
from rayexpand.classifier.recipe import Recipe, drw_weights, lr_at
from rayexpand.contract.errors import ConfigError, RayexpandError

CLASSES = 4


def recipe(**fields: Any) -> Recipe:
    return Recipe(**{"backbone_args": {"width": 8}, **fields})


def batches(count: int, size: int = 8, start: int = 0) -> list[TrainBatch]:
    found = []
    for step in range(start, count):
        rng = np.random.default_rng(step)
        labels = rng.integers(CLASSES, size=size)
        x = rng.integers(0, 120, (size, 8, 8, 3)) + 40 * labels[:, None, None, None]
        found.append(TrainBatch(x.astype(np.uint8), np.eye(CLASSES, dtype=np.float32)[labels], step))
    return found


def weights(classifier: Classifier) -> torch.Tensor:
    return nn.utils.parameters_to_vector(classifier.module.parameters()).detach().clone()


Make = Callable[[nn.Module], torch.optim.Optimizer]


@pytest.mark.parametrize(("fields", "theirs"), [
    ({"optimiser": "sgd", "decay_all": True},
     lambda m: torch.optim.SGD(m.parameters(), lr=0.05, momentum=0.9, weight_decay=0.01)),
    ({"optimiser": "nesterov", "decay_all": True},
     lambda m: torch.optim.SGD(m.parameters(), lr=0.05, momentum=0.9, weight_decay=0.01, nesterov=True)),
    ({"optimiser": "sgd"},
     lambda m: timm.optim.create_optimizer_v2(m, "momentum", lr=0.05, weight_decay=0.01, momentum=0.9)),
    ({"optimiser": "nesterov"},
     lambda m: timm.optim.create_optimizer_v2(m, "sgd", lr=0.05, weight_decay=0.01, momentum=0.9)),
    ({"optimiser": "sgd", "decay_all": True, "mixup": 1.0, "cutmix": 1.0, "smoothing_mode": "others"},
     lambda m: torch.optim.SGD(m.parameters(), lr=0.05, momentum=0.9, weight_decay=0.01)),
    ({"optimiser": "adamw"}, lambda m: timm.optim.create_optimizer_v2(m, "adamw", lr=0.05, weight_decay=0.01)),
    ({"optimiser": "lamb"}, lambda m: timm.optim.create_optimizer_v2(m, "lamb", lr=0.05, weight_decay=0.01)),
], ids=["sgd", "nesterov", "timm momentum", "timm sgd", "sgd mixed", "adamw", "lamb"])
def test_steps_equal_the_libraries(fields: dict[str, Any], theirs: Make) -> None:
    ours = Classifier(recipe(**fields, lr=0.05, weight_decay=0.01, schedule="constant"), CLASSES, 0, 5)
    net = copy.deepcopy(ours.module)
    optimiser = theirs(net)

    for batch in batches(5):
        ours.update(batch)
        x, y = torch.from_numpy(batch.x_BHWC).permute(0, 3, 1, 2).contiguous() / 255 - 0.5, torch.from_numpy(batch.y_BK)
        x, y = apply_mix(x, y, draw_mix(ours.recipe, 0, batch.step, 8))
        optimiser.zero_grad()
        loss_of(net(x), smooth(y, 0.1, ours.recipe.smoothing_mode), "ce").backward()
        optimiser.step()
        # Sums of norms differ in their last bits between instruction sets: 2e-7 was seen with LAMB.
        torch.testing.assert_close(weights(ours), nn.utils.parameters_to_vector(net.parameters()), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("nesterov", [False, True])
def test_momentum_by_hand(nesterov: bool) -> None:
    net = nn.Linear(1, 1, bias=False)
    net.weight.data.fill_(1.0)
    optimiser = make_optimiser(net, Recipe(optimiser="nesterov" if nesterov else "sgd", weight_decay=0, lr=0.1))
    weight, velocity = 1.0, 0.0

    for slope in (1.0, -2.0, 0.5):
        net.weight.grad = torch.full((1, 1), slope)
        optimiser.step()
        velocity = 0.9 * velocity + slope
        weight -= 0.1 * (slope + 0.9 * velocity if nesterov else velocity)
        assert net.weight.item() == pytest.approx(weight, rel=1e-6)


def test_decay_spares_biases_norms_and_tokens() -> None:
    tiny = {"img_size": 32, "depth": 1, "embed_dim": 32, "num_heads": 2}
    net = build_backbone(Recipe(backbone="vit_tiny_patch16_224", backbone_args=tiny), 3, 0)
    names = {id(p): name for name, p in net.named_parameters()}

    decays = {names[id(p)]: group["weight_decay"] for group in make_optimiser(net, recipe()).param_groups
              for p in group["params"]}
    assert set(decays) == set(names.values())
    assert decays["blocks.0.attn.qkv.weight"] == decays["head.weight"] == 5e-3
    for spared in ("blocks.0.norm1.weight", "blocks.0.attn.qkv.bias", "pos_embed", "cls_token"):
        assert decays[spared] == 0, spared
    assert {group["weight_decay"] for group in make_optimiser(net, recipe(decay_all=True)).param_groups} == {5e-3}


def test_the_schedule_reaches_every_group() -> None:
    ours = Classifier(recipe(optimiser="sgd"), CLASSES, 0, 6)
    rates = []
    for batch in batches(6):
        ours.update(batch)
        rates.append([group["lr"] for group in ours.optimiser.param_groups])

    assert rates == [[lr_at(ours.recipe, step, 6)] * 2 for step in range(6)]


def test_the_gradient_is_clipped_to_its_norm() -> None:
    one = Classifier(recipe(optimiser="sgd", momentum=0, weight_decay=0, lr=1.0, schedule="constant", clip_norm=0.01),
                     CLASSES, 0, 1)
    before = weights(one)
    one.update(batches(1)[0])

    assert float((weights(one) - before).norm()) == pytest.approx(0.01, rel=1e-3)


def test_losses_equal_timm_and_torch() -> None:
    rng = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(6, CLASSES, generator=rng), torch.tensor([0, 1, 2, 3, 0, 1])
    hard = nn.functional.one_hot(labels, CLASSES).float()
    soft = smooth(hard, 0.1, "all")

    torch.testing.assert_close(loss_of(logits, soft, "ce"),
                               nn.functional.cross_entropy(logits, labels, label_smoothing=0.1))
    theirs = timm.loss.BinaryCrossEntropy(smoothing=0.1)(logits, labels)
    torch.testing.assert_close(loss_of(logits, soft, "bce"), theirs)
    _, mixed = apply_mix(torch.zeros(6, 1, 1, 1), hard, Mix(0.25, None))
    torch.testing.assert_close(loss_of(logits, mixed, "ce"), 0.25 * nn.functional.cross_entropy(logits, labels)
                               + 0.75 * nn.functional.cross_entropy(logits, labels.flip(0)))


@pytest.mark.parametrize("mixed", [{}, {"mixup": 0.8}, {"cutmix": 1.0}], ids=["plain", "mixup", "cutmix"])
def test_two_workers_take_the_step_of_one(mixed: dict[str, float]) -> None:
    # one step of descent without momentum is linear in the gradient: the mean of the workers' weights is DDP's step
    fields = {"backbone_args": {"width": 8, "norm": "group"}, "optimiser": "sgd", "momentum": 0, "lr": 1.0, **mixed}
    batch = batches(1)[0]

    def stepped(rows: np.ndarray, world: int) -> tuple[torch.Tensor, float]:
        one = Classifier(recipe(**fields), CLASSES, 0, 4, world=world)
        loss = one.update(TrainBatch(batch.x_BHWC[rows], batch.y_BK[rows], 0))
        return weights(one), loss

    whole, loss = stepped(np.arange(8), 1)
    halves = [stepped(worker_rows(8, rank, 2), 2) for rank in range(2)]
    torch.testing.assert_close((halves[0][0] + halves[1][0]) / 2, whole, rtol=0, atol=1e-6)
    assert (halves[0][1] + halves[1][1]) / 2 == pytest.approx(loss, abs=1e-6)
    assert not torch.allclose(halves[0][0], halves[1][0], atol=1e-6)


def test_deferred_weights_are_those_of_torch_from_their_epoch_on() -> None:
    """Two epochs of plain cross-entropy, then torch's loss of class numbers with weights and label smoothing."""
    counts = np.array([29, 10, 1, 1])
    fields = {"optimiser": "sgd", "momentum": 0, "weight_decay": 0, "smoothing": 0.1, "epochs": 5, "drw_from": 2}
    ours = Classifier(recipe(**fields, drw=0.9999), CLASSES, 0, 10, class_counts=counts)
    plain = Classifier(recipe(**fields), CLASSES, 0, 10, class_counts=counts)
    weights_K = torch.tensor(drw_weights(counts, 0.9999), dtype=torch.float32)
    for batch in batches(6):
        net = copy.deepcopy(ours.module).train()
        x = torch.from_numpy(batch.x_BHWC).permute(0, 3, 1, 2) / 255 - 0.5
        theirs = nn.CrossEntropyLoss(weight=weights_K if batch.step >= 4 else None, label_smoothing=0.1)
        expected = theirs(net(x), torch.from_numpy(batch.y_BK).argmax(dim=1))
        loss, unweighted = ours.update(batch), plain.update(batch)
        assert loss == pytest.approx(float(expected.detach()), rel=1e-5)
        assert (loss == unweighted) == (batch.step < 4)


@pytest.mark.parametrize("share", [0.3, 1e-6])
def test_deferred_weights_of_soft_labels(share: float) -> None:
    """Divided by the weights of the labels: a vector that is nearly one class counts nearly as that class."""
    counts = np.array([29, 10, 1, 1])
    fields = {"optimiser": "sgd", "momentum": 0, "weight_decay": 0, "smoothing": 0, "epochs": 5, "drw_from": 0}
    ours = Classifier(recipe(**fields, drw=0.9999), CLASSES, 0, 10, class_counts=counts)
    weights_K = torch.tensor(drw_weights(counts, 0.9999), dtype=torch.float32)
    batch = batches(1)[0]
    soft = (1 - share) * batch.y_BK + share * np.roll(batch.y_BK, 1, axis=1)
    net = copy.deepcopy(ours.module).train()
    logits = net(torch.from_numpy(batch.x_BHWC).permute(0, 3, 1, 2) / 255 - 0.5)
    theirs = nn.CrossEntropyLoss(weight=weights_K)
    of_vectors, of_numbers = theirs(logits, torch.from_numpy(soft)), theirs(logits, torch.from_numpy(
        batch.y_BK).argmax(dim=1))
    loss = ours.update(TrainBatch(batch.x_BHWC, soft, 0))

    mean_weight = float((torch.from_numpy(soft) * weights_K).sum(dim=1).mean())
    assert loss == pytest.approx(float(of_vectors.detach()) / mean_weight, rel=1e-5)
    assert (loss == pytest.approx(float(of_numbers.detach()), rel=1e-4)) == (share < 0.1)


def test_two_workers_weigh_classes_as_one() -> None:
    fields = {"backbone_args": {"width": 8, "norm": "group"}, "optimiser": "sgd", "momentum": 0, "lr": 1.0, "drw": 0.99,
              "drw_from": 0}
    batch = batches(1)[0]

    counts = np.array([50, 20, 5, 1])
    mean_weight = torch.tensor(float((batch.y_BK * drw_weights(counts, 0.99)).sum(axis=1).mean()))
    of_slices = []

    def mean(value: torch.Tensor) -> torch.Tensor:
        of_slices.append(float(value))
        return mean_weight

    def stepped(rows: np.ndarray, world: int) -> torch.Tensor:
        one = Classifier(recipe(**fields), CLASSES, 0, 4, world=world, class_counts=counts,
                         **({"mean": mean} if world > 1 else {}))
        one.update(TrainBatch(batch.x_BHWC[rows], batch.y_BK[rows], 0))
        return weights(one)

    halves = [stepped(worker_rows(8, rank, 2), 2) for rank in range(2)]
    torch.testing.assert_close((halves[0] + halves[1]) / 2, stepped(np.arange(8), 1), rtol=0, atol=1e-6)
    assert of_slices[0] != of_slices[1]
    assert np.mean(of_slices) == pytest.approx(float(mean_weight), rel=1e-5)


@pytest.mark.parametrize("fields", [
    {}, {"optimiser": "nesterov", "mixup": 0.2, "cutmix": 1.0, "clip_norm": 0.5},
    {"optimiser": "lamb", "loss": "bce", "backbone": "preact_resnet18", "drop_path": 0.5}],
    ids=["adamw", "sgd mixed", "lamb stochastic depth"])
def test_resuming_changes_no_bit(fields: dict[str, Any]) -> None:
    straight = Classifier(recipe(**fields), CLASSES, 3, 6)
    losses = [straight.update(batch) for batch in batches(6)]

    first = Classifier(recipe(**fields), CLASSES, 3, 6)
    for batch in batches(3):
        first.update(batch)
    stored = io.BytesIO()
    kept = first.state()
    torch.save(kept, stored)
    first.update(batches(4)[3])  # what was kept does not move on
    stored.seek(0)
    for state in (kept, torch.load(stored, weights_only=True)):
        resumed = Classifier(recipe(**fields), CLASSES, 99, 6)
        resumed.seed = 3
        resumed.load(state)
        torch.manual_seed(17)  # global draws have no say
        assert [resumed.update(batch) for batch in batches(6, start=3)] == losses[3:]
        assert torch.equal(weights(resumed), weights(straight))


def test_masks_are_keyed_and_leave_the_global_generator_alone() -> None:
    fields = {"backbone": "preact_resnet18", "drop_path": 0.9}
    torch.manual_seed(5)
    before = torch.get_rng_state()
    losses = []
    for seed in (0, 0, 1):
        one = Classifier(recipe(**fields), CLASSES, 0, 2)
        one.seed = seed  # same weights, other masks
        losses.append(one.update(batches(1)[0]))

    assert torch.equal(torch.get_rng_state(), before)
    assert losses[0] == losses[1] != losses[2]


def test_logits_in_chunks_leave_training_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = (Classifier(recipe(), CLASSES, 0, 4) for _ in range(2))
    x = batches(1, 7)[0].x_BHWC
    whole = one.logits(x)
    monkeypatch.setattr(module, "CHUNK_IMAGES", 3)

    assert whole.shape == (7, CLASSES)
    assert whole.dtype == np.float32
    np.testing.assert_allclose(one.logits(x), whole, atol=1e-6)
    assert one.logits(x[:0]).shape == (0, CLASSES)
    for batch in batches(3):
        one.logits(x)
        assert one.update(batch) == other.update(batch)


def test_training_learns() -> None:
    one = Classifier(recipe(), CLASSES, 0, 25)
    losses = [one.update(batch) for batch in batches(25, 16)]

    assert losses[-1] < 0.8 < 1.1 < losses[0]
    test = batches(101, 64)[100]
    assert (one.logits(test.x_BHWC).argmax(1) == test.y_BK.argmax(1)).mean() > 0.9


def test_a_diverged_loss_stops_with_advice() -> None:
    one = Classifier(recipe(), CLASSES, 0, 2)
    one.module.get_parameter("head.bias").data.fill_(float("nan"))

    with pytest.raises(RayexpandError, match=r"diverged: the loss is nan at step 0 of 2.\s+Lower recipe.lr"):
        one.update(batches(1)[0])


VIT = {"backbone": "vit_tiny_patch16_224", "backbone_args": {"img_size": 32, "depth": 1, "embed_dim": 32,
                                                             "num_heads": 2}}


@pytest.mark.parametrize(("fields", "problems"), [
    ({}, []),
    ({"loss": "bce", "mixup": 0.2, "cutmix": 1.0, "size": 9, "test_size": 13}, []),
    ({**VIT, "size": 32}, []),
    ({**VIT, "size": 16}, [r"size: backbone vit_tiny\S+ cannot take 2 images of 16 x 16 pixels in training \(Input "
                           r"height .*\); .*backbone_args such as img_size", r"test_size: .* in tests"]),
    ({**VIT, "size": 32, "test_size": 48}, [r"test_size: .* 48 x 48 pixels in tests \(Input height"]),
    ({"backbone": "preact_resnet18", "size": 8, "batch": 1}, [r"size: .* 1 images .*Expected more than 1 value per "
                                                              r"channel.*raise batch to 2 or more"]),
    ({"backbone": "preact_resnet18", "size": 8, "batch": 2}, []),
], ids=["small", "mixed", "vit", "vit too small", "vit test", "batch of one", "batch of two"])
def test_a_recipe_the_network_cannot_take_is_refused(fields: dict[str, Any], problems: list[str]) -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    if not problems:
        try_recipe(recipe(**fields), CLASSES, 0)
    else:
        with pytest.raises(ConfigError) as refused:
            try_recipe(recipe(**fields), CLASSES, 0)
        assert len(refused.value.problems) == len(problems)
        assert all(re.match(*pair) for pair in zip(problems, refused.value.problems, strict=True)), refused.value
    assert torch.equal(torch.get_rng_state(), before)


ANSWERS = torch.tensor([[0.7, 0.2, 0.1], [0.5, 0.3, 0.2], [0.6, 0.1, 0.3]])


def test_jensen_shannon_divergence_by_hand() -> None:
    """Of three answers, in nats and any order; 12 times it is 0.485577. Logits may be shifted."""
    logits = [one.log()[None] for one in ANSWERS]
    for shuffled in (logits, logits[::-1], [one + 5 for one in logits]):
        assert float(jensen_shannon(*shuffled)) == pytest.approx(0.0404648, abs=1e-6)
    assert float(jensen_shannon(*[logits[0]] * 3)) == pytest.approx(0, abs=1e-7)
    both = [torch.cat([one, logits[0]]) for one in logits]
    assert float(jensen_shannon(*both)) == pytest.approx((0.0404648 + float(jensen_shannon(
        logits[0], logits[0], logits[0]))) / 2, abs=1e-6)


def test_views_are_compared_with_the_image_and_not_labelled() -> None:
    """The loss is that of the image alone plus 12 times the divergence; views equal to the image add nothing to it."""
    chosen = recipe(augment="augmix", jsd=12.0, smoothing=0.0, backbone_args={"width": 8, "norm": "group"})
    (batch,), rng = batches(1), np.random.default_rng(0)
    other = rng.integers(0, 256, (8, 2, 8, 8, 3)).astype(np.uint8)
    same = np.repeat(batch.x_BHWC[:, None], 2, 1)

    def loss(views: np.ndarray | None) -> float:
        return float(Classifier(chosen, CLASSES, 0, 5)._backward(batch._replace(views_BVHWC=views)))

    ours = Classifier(chosen, CLASSES, 0, 5)
    ours.module.train()
    logits = [ours.module(ours._images(x)) for x in (batch.x_BHWC, other[:, 0], other[:, 1])]
    wanted = (loss_of(logits[0], torch.from_numpy(batch.y_BK), "ce") + 12 * jensen_shannon(*logits)).item()
    assert loss(other) == pytest.approx(wanted, abs=1e-5)
    assert loss(same) == pytest.approx(loss(None), abs=1e-5)
    assert loss(other) > loss(None) + 0.001


def test_an_image_has_a_mix_of_its_own() -> None:
    """A step with one mix for each image is the step on images and labels that were mixed one by one."""
    chosen = recipe(mixup=1.0, cutmix=1.0, mix_per="image")
    (batch,) = batches(1)
    mixes = np.array([[0.3, 0, 0, 0, 0], [0.75, 0, 4, 2, 6], [1, 0, 0, 0, 0], [0.9375, 7, 8, 0, 4]] * 2, np.float32)
    x, y = batch.x_BHWC.astype(np.float64), batch.y_BK.copy()
    for i, (lam, top, bottom, left, right) in enumerate(mixes):
        y[i] = lam * batch.y_BK[i] + (1 - lam) * batch.y_BK[7 - i]
        if bottom > top:
            at = slice(int(top), int(bottom)), slice(int(left), int(right))
            x[i][at] = batch.x_BHWC[7 - i][at]
        else:
            x[i] = lam * x[i] + (1 - lam) * batch.x_BHWC[7 - i]

    ours, theirs = (Classifier(chosen, CLASSES, 0, 5) for _ in range(2))
    theirs._images = lambda _: torch.from_numpy(x).float().permute(0, 3, 1, 2).div(255).sub(0.5)  # type: ignore[method-assign]
    loss = ours.update(batch._replace(mix_B5=mixes))
    assert loss == pytest.approx(theirs.update(TrainBatch(batch.x_BHWC, y.astype(np.float32), 0)), abs=1e-6)
    torch.testing.assert_close(weights(ours), weights(theirs), atol=1e-5, rtol=0)
