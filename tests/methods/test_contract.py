"""What every method promises. Parametrised over the methods folder: a new method is tested by being there."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import fields, replace
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pytest
from pydantic import ValidationError

from rayexpand.contract.errors import ConfigError
from rayexpand.contract.protocols import Batch, Expansion, Tools
from rayexpand.contract.rng import PlanRng, RowRng
from rayexpand.contract.schema import DRAW_FIELDS, SEED_INDEX, Reason, SeedIndex, Start
from rayexpand.methods import load_method, method_class, names
from rayexpand.methods._copies import MAX_COPIES
from tests.methods import fakes
from tests.methods.conftest import CLASSES, SmallestPrior
from tests.methods.fakes import batch_of

ROWS = [("a/1.png", 0, 0), ("b", 1, 0), ("a/1.png", 0, 1), ("ü n", 2, 3)]
OTHERS = [("other0", 2, 5), ("other1", 0, 1), ("other2", 1, 0), ("other3", 2, 2)]
# Few steps: the contract is about rows and bytes, not about image quality.
SMALL = {"steps": 4, "guide_step": 2, "strengths": [0.5]}
OWN = {"realguidance": {"strength": 0.5}, "vae": {"sample": True}}


def small(name, **changes):
    known = method_class(name).model_fields
    return load_method(name, {**{k: v for k, v in SMALL.items() if k in known}, **OWN.get(name, {}), **changes})


def index_of(labels):
    n = len(labels)
    table = pa.table({"seed_id": [f"s{i}" for i in range(n)], "label": np.asarray(labels, np.int32),
                      "file": np.zeros(n, np.int32), "member": [""] * n, "group": np.full(n, -1, np.int32),
                      "offset": np.arange(n, dtype=np.int32), "fault": [""] * n}, schema=SEED_INDEX)
    return SeedIndex(table, replace(CLASSES, count=tuple(np.bincount(labels, minlength=3).tolist())))


@pytest.fixture(params=names())
def method(request):
    return small(request.param)


def test_the_methods_of_this_package():
    assert {"classical", "dafusion", "diffcoremix", "diffmix", "distdiff", "gif", "img2img", "practice", "realguidance",
            "text2img", "vae"} <= {*names()}
    assert not [name for name in names() if name.startswith("_")]


def test_settings_are_frozen_known_and_described(method):
    with pytest.raises(ValidationError, match="frozen"):
        method.name = "other"
    with pytest.raises(ValidationError, match="extra"):
        load_method(method.name, {"no_such_field": 1})
    undescribed = [k for k, f in type(method).model_fields.items() if k != "name" and not f.description]
    assert undescribed == []
    assert load_method(method.name, method.model_dump()) == method
    assert type(method).model_validate_json(method.model_dump_json()) == method


def test_needs_are_fields_of_tools(method):
    of_prior_and_plan = {"adapter", "captions"}
    assert method.needs() <= {f.name for f in fields(Tools)} - {"classes"} | of_prior_and_plan


def test_copies(method):
    index = index_of([0] * 5 + [1] * 4 + [2] * 2)
    counts = method.copies(index, PlanRng(1, method.name))
    assert counts.dtype == np.uint16
    assert counts.shape == (11,)
    np.testing.assert_array_equal(counts, method.copies(index, PlanRng(1, method.name)))


def test_draws_are_pure_and_complete(method):
    def draw(row):
        seed_id, label, copy = ROWS[row]
        return method.draw(seed_id, label, copy, row, CLASSES, RowRng(5, method.name, seed_id, copy))

    forward = [draw(row) for row in range(len(ROWS))]
    assert forward == [draw(row) for row in reversed(range(len(ROWS)))][::-1]
    for drawn, (row, (seed_id, label, copy)) in zip(forward, enumerate(ROWS), strict=True):
        assert drawn.sample_id == f"{seed_id}/{copy}"
        assert (drawn.seed_id, drawn.copy, drawn.source_label, drawn.row) == (seed_id, copy, label, row)
        assert (drawn.attempt, drawn.start in (Start.IMAGE, Start.NOISE)) == (0, True)
        assert 0 <= drawn.target_label < len(CLASSES)
        assert 0 <= drawn.strength <= 1
        assert {type(getattr(drawn, name)) for name in DRAW_FIELDS} <= {str, int, float}
        assert hash(method.batch_key(drawn)) == hash(method.batch_key(drawn))
    assert len({drawn.sample_id for drawn in forward}) == len(ROWS)


def test_groups_are_positive(method):
    assert all(method.group(copies) >= 1 for copies in (1, 2, 5))


def test_soft_labels_are_distributions(method):
    source, target = np.array([0, 1, 2, 2]), np.array([0, 2, 1, 2])
    labels = method.soft_label(source, target, np.array([0.5, 0.7, 1.0, 0.0]), 3)
    assert labels.dtype == np.float32
    assert labels.shape == (4, 3)
    assert (labels >= 0).all()
    np.testing.assert_allclose(labels.sum(axis=1), 1, atol=1e-6)


def check_expansion(made: Expansion, batch: Batch):
    assert len(made.images) == len(made.reasons) == len(batch)
    assert len(made.details) in (0, len(batch))
    assert all(len(values) == len(batch) for values in made.scores.values())
    for i in range(len(batch)):
        assert (made.images[i] is None) == (made.reasons[i] is not None)


def expand(method, batch, tools):
    made = method.expand(batch, tools)
    check_expansion(made, batch)
    return made.images


def mixed(first, second, keep):
    """`first` in slots `keep`, `second` elsewhere."""
    def pick(name):
        return tuple((getattr(first, name) if i in keep else getattr(second, name))[i] for i in range(len(first)))
    return Batch(*(pick(f.name) for f in fields(Batch)))


def group_of(method, batch, slot):
    """Slots that share a call with `slot` by right; the others are its batch-mates."""
    if method.group(2) == 1:
        return {slot}
    of = batch.draws[slot]
    return {i for i, d in enumerate(batch.draws) if (d.seed_id, d.group) == (of.seed_id, of.group)}


SETTINGS = ({}, {"solver": "dpmpp_2m"}, {"solver": "unipc"}, {"guide_batch": 3}, {"recompute": True},
            {"guidance": "direct"}, {"guidance": "random"}, {"chunk": 3, "forward_chunk": 3}, {"level": "pixel"},
            {"visual_token": "instance", "negative_branch": "both"}, {"latent_prior": False},
            {"variant": "real_gen"},
            {"every": 1, "strength": 0.75, "omega": 4.0, "convention": "score", "criterion": "loss"},
            {"every": 2, "direction": "random"})


def variants():
    """Every method with every entry of SETTINGS it knows."""
    for name in names():
        for settings in SETTINGS:
            with suppress(ValidationError):
                yield pytest.param(small(name, **settings), not settings, id=f"{name}-{settings}")


@pytest.mark.parametrize(("method", "on_real_models"), variants())
@pytest.mark.fast_cases(14)
def test_batch_mates_never_change_a_row(method, on_real_models, tools):
    """Each method on models of the real classes once; with its other settings on the smallest prior there is."""
    tools = tools if on_real_models else replace(tools, prior=SmallestPrior(tools.prior.scheduler))
    batch = batch_of(method, CLASSES, ROWS)
    others = batch_of(method, CLASSES, OTHERS)
    fillers = replace(batch, images=(np.full((16, 16, 3), 128, np.uint8),) * 4, filler=(True,) * 4)
    alone = expand(method, batch, tools)
    assert all(image.shape == (16, 16, 3) and image.dtype == np.uint8 for image in alone)
    for slot in range(len(ROWS)):
        for mates in (others, fillers):
            changed = mixed(batch, mates, group_of(method, batch, slot))
            np.testing.assert_array_equal(expand(method, changed, tools)[slot], alone[slot])
    order = [2, 0, 3, 1]
    shuffled = Batch(*(tuple(getattr(batch, f.name)[i] for i in order) for f in fields(Batch)))
    for image, i in zip(expand(method, shuffled, tools), order, strict=True):
        np.testing.assert_array_equal(image, alone[i])
    assert not np.array_equal(alone[0], alone[2])  # two copies of one seed


@pytest.mark.parametrize("name", [name for name in names() if not small(name).needs() - {"captions"}])
def test_rows_of_methods_that_load_nothing_do_not_depend_on_the_shape_of_a_call(name):
    """So that a call may run in parts where its images are large."""
    method, batch = small(name), batch_of(small(name), CLASSES, ROWS, size=33)
    whole = expand(method, batch, Tools(CLASSES))
    for part in ([0], [3], [1, 2], [0, 1, 3]):
        few = Batch(*(tuple(getattr(batch, f.name)[i] for i in part) for f in fields(Batch)))
        for image, i in zip(expand(method, few, Tools(CLASSES)), part, strict=True):
            np.testing.assert_array_equal(image, whole[i])


class Poisoned:
    """A prior whose noise prediction, or decoded image where there is none, is not a number in one slot."""

    def __init__(self, prior, slot, predicts):
        self._prior, self._slot, self._predicts = prior, slot, predicts

    def __getattr__(self, name):
        return getattr(self._prior, name)

    def predict(self, z_BCHW, at, cond):
        p = self._prior.predict(z_BCHW, at, cond)
        p.clean[self._slot] = float("nan")
        return p

    def decode(self, z_BCHW, cond=None):
        x_BCHW = self._prior.decode(z_BCHW, cond)
        if not self._predicts:
            x_BCHW[self._slot] = float("nan")
        return x_BCHW


def test_a_failed_slot_is_named_and_its_mates_keep_their_bytes(method, tools):
    if "prior" not in method.needs():
        pytest.skip("no prior")
    batch = batch_of(method, CLASSES, ROWS)
    alone = expand(method, batch, tools)
    made = method.expand(batch, replace(tools, prior=Poisoned(tools.prior, 1, batch.draws[0].steps_run > 0)))
    check_expansion(made, batch)
    assert made.reasons == [None, Reason.NAN_LATENT, None, None]
    for i in (0, 2, 3):
        np.testing.assert_array_equal(made.images[i], alone[i])


@pytest.mark.fast_cases(6)
def test_run_seed_and_copy_change_the_image(method, tools):
    first = expand(method, batch_of(method, CLASSES, ROWS), tools)
    again = expand(method, batch_of(method, CLASSES, ROWS), tools)
    other = expand(method, batch_of(method, CLASSES, ROWS, run_seed=1), tools)
    for a, b, c in zip(first, again, other, strict=True):
        np.testing.assert_array_equal(a, b)
        assert not np.array_equal(a, c)


# The corners of the contract that no built-in method uses yet.

LABELS = [0] * 11 + [1] * 6 + [2] * 3


def fake(name, **fields_):
    return load_method(f"tests.methods.fakes.{name}", fields_)


def test_fractional_ratios_are_stratified_and_nested():
    index = index_of(LABELS)
    rng = PlanRng(3, "m")
    counts = {ratio: fake("FractionalRatio", ratio=ratio).copies(index, rng) for ratio in (2, 2.3, 2.5, 3, 0.5)}
    for ratio, per_class in {2.3: (22 + 3, 12 + 2, 6 + 1), 2.5: (22 + 6, 12 + 3, 6 + 2), 0.5: (6, 3, 2)}.items():
        np.testing.assert_array_equal(np.bincount(index.labels, counts[ratio]), per_class)
    chain = [counts[2], counts[2.3], counts[2.5], counts[3]]
    assert all((low <= high).all() for low, high in pairwise(chain))
    assert (counts[3] == 3).all()
    other = fake("FractionalRatio").copies(index, PlanRng(4, "m"))
    assert not np.array_equal(other, counts[2.5])


def test_class_quotas_are_exact_and_even():
    index = index_of(LABELS)
    counts = fake("ClassQuota", quota=7).copies(index, PlanRng(3, "m"))
    np.testing.assert_array_equal(np.bincount(index.labels, counts), [7, 7, 7])
    for label in range(3):
        assert np.ptp(counts[index.labels == label]) <= 1
    np.testing.assert_array_equal(counts, load_method("img2img", {"quota": 7}).copies(index, PlanRng(3, "m")))


def test_class_uniform_references_draw_as_much_from_every_class():
    index = index_of(LABELS)
    method = fake("ClassUniformReferences", per_class=40)
    counts = method.copies(index, PlanRng(3, "m"))
    np.testing.assert_array_equal(np.bincount(index.labels, counts), [40, 40, 40])
    assert counts[index.labels == 0].std() > 0  # drawn, not dealt out
    assert not np.array_equal(counts, method.copies(index, PlanRng(4, "m")))


def test_noise_start_is_independent_of_the_seed_image():
    assert fake("NoiseStart").draw("s", 0, 0, 0, CLASSES, RowRng(0, "m", "s", 0)).start == Start.NOISE


def test_group_members_share_their_mean_and_nothing_else():
    method = fake("Groups")
    rows = [("a", 0, copy) for copy in range(4)] + [("b", 1, 0), ("b", 1, 1)]
    batch = batch_of(method, CLASSES, rows)
    assert [d.group for d in batch.draws] == [0, 0, 1, 1, 0, 0]
    assert method.group(5) == 2
    images = expand(method, batch, None)
    other_mate = batch_of(method, CLASSES, [*rows[:1], ("a", 0, 7), *rows[2:]])
    other_mate = replace(other_mate, draws=(other_mate.draws[0], replace(other_mate.draws[1], group=0),
                                            *other_mate.draws[2:]))
    moved = expand(method, other_mate, None)
    assert not np.array_equal(moved[0], images[0])
    for i in (2, 3, 4, 5):
        np.testing.assert_array_equal(moved[i], images[i])


def test_failing_fakes_fail_where_told_and_only_there():
    rows = [("a", 0, 0), ("b", 0, 0)]
    method = fake("Failing", bad="a/0", nan="b/0")
    batch = batch_of(method, CLASSES, rows)
    with pytest.raises(RuntimeError, match="a/0"):
        method.expand(batch, None)
    made = method.expand(replace(batch, filler=(True, False)), None)
    assert np.isnan(made.images[1]).all()
    constant = fake("Failing", constant="a/0").expand(batch, None).images
    assert np.ptp(constant[0]) == 0 < np.ptp(constant[1])
    broken = fake("BrokenAfterFirst")
    broken.expand(batch, None)
    with pytest.raises(RuntimeError, match="device lost"):
        broken.expand(batch, None)


def test_every_fake_is_loadable_by_its_dotted_name():
    found = [key for key, value in vars(fakes).items() if isinstance(value, type) and issubclass(value, fakes.Fake)]
    assert len(found) >= 14
    for key in found:
        assert fake(key).name == f"tests.methods.fakes.{key}"


def test_names_that_are_no_method():
    with pytest.raises(ConfigError, match="did you mean 'img2img'"):
        load_method("img2image", {})
    with pytest.raises(ConfigError, match="cannot be imported"):
        load_method("tests.methods.fakes.NoSuchMethod", {})
    assert MAX_COPIES == 65535
