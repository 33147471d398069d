"""Prototypes by hand, their edge cases, their artifact, and what is refused."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest

from rayexpand.contract.errors import ModelError, UsageError
from rayexpand.contract.rng import RowRng
from rayexpand.diffusion import prototypes
from rayexpand.diffusion.prototypes import fit_class, fit_prototypes, load_prototypes, save_prototypes

KEYS = ("n01", "n02", "n03")
DEGREES = np.array([1, 5, 26, 50, 88])


def features(n, dim=6, name="x"):
    return RowRng(0, "test", "prototypes", 0).normals(name, (n, dim)) + 1


def fit(n=30, n_groups=3, order=None):
    labels = np.arange(n) % 3
    order = np.arange(n) if order is None else order
    return fit_prototypes(features(n)[order], labels[order], 3, n_groups, guide_hash="g" * 64, class_keys=KEYS)


def test_average_linkage_by_hand():
    rows = np.stack([np.cos(np.radians(DEGREES)), np.sin(np.radians(DEGREES))], axis=1).astype(np.float32)
    found = fit_class(rows, 2)
    assert found.count_G.tolist() == [3, 2]  # ward, complete and single linkage: 4 and 1
    np.testing.assert_allclose(found.group_GD, [[0.96495, 0.18099], [0.33884, 0.88272]], atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(found.group_GD, axis=1), [0.98177, 0.94552], atol=1e-5)
    np.testing.assert_allclose(found.class_D, [0.71450, 0.46168], atol=1e-5)
    assert np.linalg.norm(found.class_D) == pytest.approx(0.85069, abs=1e-5)
    np.testing.assert_allclose(np.linalg.norm(found.group_unit_GD, axis=1), 1, atol=1e-6)


def test_clusters_are_of_directions_and_means_of_the_features():
    lengths = np.array([[1], [9], [1], [9], [1]], np.float32)
    rows = np.stack([np.cos(np.radians(DEGREES)), np.sin(np.radians(DEGREES))], axis=1).astype(np.float32)
    plain, scaled = fit_class(rows, 2), fit_class(lengths * rows, 2)
    assert scaled.count_G.tolist() == [3, 2]
    np.testing.assert_allclose(scaled.group_unit_GD, plain.group_unit_GD, atol=1e-6)
    np.testing.assert_allclose(scaled.class_D, (lengths * rows).mean(axis=0), atol=1e-6)
    np.testing.assert_allclose(scaled.class_unit_D, plain.class_unit_D, atol=1e-6)  # unit rows, then unit means
    assert not np.allclose(scaled.class_unit_D, scaled.class_D / np.linalg.norm(scaled.class_D), atol=1e-3)


def test_one_group_is_the_class_and_as_many_as_images_are_the_images():
    rows = features(4)
    one, all_of_them = fit_class(rows, 1), fit_class(rows, 4)
    np.testing.assert_array_equal(one.group_GD[0], one.class_D)
    np.testing.assert_array_equal(one.group_unit_GD[0], one.class_unit_D)
    assert sorted(map(tuple, all_of_them.group_GD)) == sorted(map(tuple, rows))


@pytest.mark.parametrize("images", [1, 2])
def test_a_class_with_fewer_images_than_groups_repeats_its_mean_and_says_so(images):
    found = fit_class(features(images), 3)
    assert found.count_G.tolist() == [1] * images + [0] * (3 - images)
    np.testing.assert_array_equal(found.group_GD[images:], np.repeat(found.class_D[None], 3 - images, axis=0))
    assert np.isfinite(found.group_unit_GD).all()
    assert found.group_GD.shape == (3, 6)


def test_row_order_changes_nothing():
    plain, permuted = fit(), fit(order=np.random.Generator(np.random.Philox(7)).permutation(30))
    for name in ("class_KD", "group_KGD", "class_unit_KD", "group_unit_KGD"):
        np.testing.assert_allclose(getattr(permuted, name), getattr(plain, name), atol=1e-6)
    np.testing.assert_array_equal(permuted.count_KG, plain.count_KG)


def test_classes_one_at_a_time_give_the_same_numbers():
    whole, labels = fit(), np.arange(30) % 3
    joined = prototypes.join([fit_class(features(30)[labels == c], 3) for c in range(3)], "g" * 64, KEYS)
    assert prototypes.to_bytes(joined) == prototypes.to_bytes(whole)
    assert (whole.n_classes, whole.n_groups, whole.dim, int(whole.count_KG.sum())) == (3, 3, 6, 30)


def test_features_of_zero_length_have_prototypes():
    assert np.isfinite(fit_class(np.zeros((5, 3), np.float32), 2).group_unit_GD).all()


def test_bad_features_and_empty_classes_are_refused():
    rows = features(6)
    rows[2, 1] = np.nan
    with pytest.raises(UsageError, match="not finite for 1 of 6 images"):
        fit_class(rows, 2)
    with pytest.raises(UsageError, match="without images have no prototype: n02, n03"):
        fit_prototypes(features(4), np.zeros(4, int), 3, 2, guide_hash="", class_keys=KEYS)


def test_an_artifact_comes_back_whole_with_its_facts(tmp_path):
    from safetensors import safe_open

    saved = fit()
    save_prototypes(saved, tmp_path / "p.safetensors")
    loaded = load_prototypes(tmp_path / "p.safetensors", guide_hash="g" * 64, class_keys=KEYS)
    for name in ("class_KD", "group_KGD", "class_unit_KD", "group_unit_KGD", "count_KG", "valid_KG"):
        np.testing.assert_array_equal(getattr(loaded, name), getattr(saved, name))
    assert (loaded.guide_hash, loaded.classes_hash) == (saved.guide_hash, saved.classes_hash)
    with safe_open(str(tmp_path / "p.safetensors"), "np") as file:
        assert "scikit-learn" in json.loads(file.metadata()[prototypes.KIND])["versions"]


@pytest.mark.parametrize(("guide", "keys", "messages"), [
    ("h" * 64, KEYS, ["guide gggggggggggg, but this run loads guide hhhhhhhhhhhh"]),
    ("g" * 64, KEYS[:2], ["3 classes, the dataset has 2"]),
    ("g" * 64, ("n01", "n03", "n02"), ["other classes, or the same in another order"]),
    ("h" * 64, (*KEYS, "n04"), ["guide gggg", "3 classes, the dataset has 4", "rayexpand fit"])])
def test_prototypes_of_another_run_are_refused_with_every_reason(tmp_path, guide, keys, messages):
    save_prototypes(fit(), tmp_path / "p.safetensors")
    with pytest.raises(ModelError) as error:
        load_prototypes(tmp_path / "p.safetensors", guide_hash=guide, class_keys=keys)
    assert all(message in str(error.value) for message in messages)


def test_files_that_are_no_prototypes_are_refused(tmp_path):
    from safetensors.numpy import save_file

    with pytest.raises(ModelError, match="cannot be read"):
        load_prototypes(tmp_path / "gone.safetensors", guide_hash="", class_keys=KEYS)
    (tmp_path / "p.safetensors").write_bytes(b"nothing")
    with pytest.raises(ModelError, match="cannot be read"):
        load_prototypes(tmp_path / "p.safetensors", guide_hash="", class_keys=KEYS)
    save_file({"x": np.zeros(3)}, tmp_path / "p.safetensors")
    with pytest.raises(ModelError, match="holds no prototypes of this version"):
        load_prototypes(tmp_path / "p.safetensors", guide_hash="", class_keys=KEYS)


def test_the_module_needs_neither_torch_nor_sklearn_to_be_imported():
    code = ("import sys, rayexpand.diffusion.prototypes\n"
            "heavy = {'torch', 'sklearn', 'scipy', 'ray'} & set(sys.modules)\nassert not heavy, heavy")
    subprocess.run([sys.executable, "-c", code], check=True)
