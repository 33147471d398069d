"""A pass over corrupted images: the answers of a plain loop, resumed to equal bytes, and only what is missing."""

from __future__ import annotations

import hashlib
import shutil
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from rayexpand.classifier.recipe import Recipe
from rayexpand.contract.errors import ConfigError, Interrupted, UsageError
from rayexpand.contract.schema import ClassTable
from rayexpand.data.corruptions.corruptor import Corruptor
from rayexpand.data.corruptions.tables import COMMON
from rayexpand.data.seeds import DataConfig
from rayexpand.data.subsets import fingerprint
from rayexpand.storage.tables import read_json, read_table, replace_json
from rayexpand.studies import robustness
from rayexpand.studies.config import parse_study, study_preflight
from rayexpand.studies.kept import load_classifier
from rayexpand.studies.parts import Study, Trial, read_result
from rayexpand.studies.results import read_study
from rayexpand.studies.robustness import CorruptedPass, in_process, show_corrupted
from rayexpand.studies.study import prepare_study
from rayexpand.studies.summary import further_scores, summary
from rayexpand.studies.trial import run_trials
from rayexpand.studies.trials import make_trials
from tests.commands import process
from tests.data.seeds.test_cifar_c import arrays
from tests.studies.test_study import SMALL, raw_study

TEST = {"source": "digits", "split": "test", "per_class": 3}
TESTS: dict[str, Any] = {"c": {"data": TEST, "corrupt": {"table": "cifar", "types": ["fog", "gaussian_noise", "snow"],
                                                         "severities": [1, 5]}}}
ARMS = [{"name": "original"}, {"name": "larger", "recipe": {"size": 20}}]


def raw_with(out: Path, **changes: Any) -> dict[str, Any]:
    return raw_study(out, **{"arms": ARMS, "expansions": {}, "seeds": [0, 1], "training": {"keep": "weights"},
                             "extra_tests": TESTS, **changes})


def trained(raw: dict[str, Any]) -> tuple[Study, list[Trial]]:
    study = prepare_study(parse_study(raw))
    trials = make_trials(study)
    assert [why for _, why in run_trials(study.files, trials, study.config.training) if why] == []
    return study, trials


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Study, list[Trial]]:
    """Trials that are trained and shown nothing yet."""
    return trained(raw_with(tmp_path_factory.mktemp("robustness")))


@pytest.fixture
def ready(finished: tuple[Study, list[Trial]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
          ) -> tuple[Study, list[Trial]]:
    """A copy of them, in blocks of seven images."""
    monkeypatch.setattr(robustness, "BLOCK", 7)
    out = finished[0].config.out
    shutil.copytree(Path(out, "small"), tmp_path / "small")
    study = prepare_study(parse_study(raw_with(tmp_path)))
    return study, make_trials(study)


def left_by(study: Study) -> dict[str, str]:
    folder = Path(str(study.files.root), "robustness")
    return {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()
            for file in sorted(folder.rglob("*")) if file.is_file()}


def test_answers_are_those_of_a_plain_loop(ready: tuple[Study, list[Trial]]) -> None:
    study, trials = ready
    assert show_corrupted(study, trials, in_process) == []
    index, data = study.opened.index(study.config.test), DataConfig(**TEST)
    config = study.config.extra_tests["c"].corrupt
    assert config is not None
    made = Corruptor(config, fingerprint(index, data))
    for trial in trials:
        kept, found = load_classifier(study.files, trial), read_json(study.files, f"robustness/c/{trial.name}.json")
        table = read_table(study.files, f"robustness/c/{trial.name}.parquet")
        assert found is not None
        clean = robustness.CorruptedImages(_opened(study), kept.view)._sets[0].at(np.arange(30)).x_BHWC
        assert clean.shape[1] == found["side"] == kept.view.size
        for kind in ("gaussian_noise", "snow", "fog"):
            for severity in (1, 5):
                x = np.stack([made(one, name, kind, severity) for one, name in zip(clean, index.seed_ids, strict=True)])
                right = kept.answering.logits(x).argmax(axis=1) == index.labels
                assert table[f"{kind}/{severity}"].to_pylist() == right.tolist()
                assert found["top1"][kind][str(severity)] == right.mean()
        assert table["item"].to_pylist() == list(range(30))
        assert found["mean"] == pytest.approx(np.mean([value for one in found["top1"].values()
                                                       for value in one.values()]))
        assert (found["name"], found["images"], "mce" in found) == ("corrupted-v1", 30, False)


def _opened(study: Study) -> Any:
    classes = next(iter(study.subsets.values()))[1].classes
    return robustness.open_corrupted("c", study.config.extra_tests["c"], classes)


def test_images_do_not_depend_on_what_is_trained(ready: tuple[Study, list[Trial]], tmp_path: Path) -> None:
    """Other numbers of the classes, or fewer of them by a class map: an image stays as it is."""
    test, rows = ready[0].config.extra_tests["c"], np.arange(3)
    (tmp_path / "map.csv").write_text("key,train_key\n0,a\n1,b\n2,a\n")
    some = test.model_copy(update={"class_map": str(tmp_path / "map.csv")})
    view, ten = Recipe(size=16), ClassTable.of([str(digit) for digit in reversed(range(10))])
    sets = [robustness.open_corrupted("c", test, ten), robustness.open_corrupted("c", some, ClassTable.of(["a", "b"]))]

    assert len(sets[1].rows) < len(sets[0].rows)
    assert sets[0].sha256 != sets[1].sha256
    places = [[one.first.index.seed_ids.index(name) for name in sets[1].first.index.seed_ids[:3]] for one in sets]
    first, second = ([x for _, x in robustness.CorruptedImages(one, view).made(np.array(at))]
                     for one, at in zip(sets, places, strict=True))
    assert rows.tolist() == places[1]
    for one, other in zip(first, second, strict=True):
        assert np.array_equal(one, other)


def test_a_pass_goes_on_after_the_last_block_to_the_same_bytes(ready: tuple[Study, list[Trial]], tmp_path: Path,
                                                               caplog: pytest.LogCaptureFixture) -> None:
    study, trials = ready
    shown: list[int] = []

    def stops(study: Study, one: CorruptedPass, blocks: Sequence[int]) -> Iterator[tuple[int, np.ndarray]]:
        for number, found in in_process(study, one, list(reversed(blocks))):
            if len(shown) == 3:
                raise Interrupted("stopped")
            shown.append(number)
            yield number, found

    def counted(study: Study, one: CorruptedPass, blocks: Sequence[int]) -> Iterator[tuple[int, np.ndarray]]:
        shown.extend(blocks)
        return in_process(study, one, blocks)

    with pytest.raises(Interrupted):
        show_corrupted(study, trials, stops)
    blocks = sorted(Path(str(study.files.root), "robustness/c/blocks").iterdir())
    assert len(blocks) == 3
    assert read_json(study.files, f"robustness/c/{trials[0].name}.json") is None
    blocks[0].write_bytes(blocks[0].read_bytes()[:-9])
    shown.clear()
    assert show_corrupted(study, trials, counted) == []
    assert len(shown) == 2 * 5 - 2, "two views of five blocks, of which two were whole"
    assert "is damaged" in caplog.text
    resumed = left_by(study)

    shutil.rmtree(Path(str(study.files.root), "robustness"))
    assert show_corrupted(study, trials, in_process) == []
    assert left_by(study) == resumed
    assert len(resumed) == 2 * len(trials), "no block is left"


def test_only_what_is_missing_is_shown(ready: tuple[Study, list[Trial]], caplog: pytest.LogCaptureFixture) -> None:
    study, trials = ready
    asked: list[list[str]] = []

    def show(study: Study, one: CorruptedPass, blocks: Sequence[int]) -> Iterator[tuple[int, np.ndarray]]:
        asked.append([trial.name for trial in one.trials])
        return in_process(study, one, blocks)

    assert show_corrupted(study, trials, show) == []
    assert sorted(name for one in asked for name in one) == sorted(trial.name for trial in trials)
    assert [len(one) for one in asked] == [2, 2], "one pass for all that see images in the same way"
    whole = left_by(study)
    asked.clear()
    assert show_corrupted(study, trials, show) == []
    assert asked == []
    study.files.delete(f"robustness/c/{trials[0].name}.json")
    assert show_corrupted(study, trials, show) == []
    assert asked == [[trials[0].name]]
    assert left_by(study) == whole, "answers do not depend on who else is shown an image"
    study.files.delete(f"weights/{trials[0].name}.safetensors")
    study.files.delete(f"robustness/c/{trials[0].name}.json")
    (line,) = show_corrupted(study, trials, show)
    assert line.startswith(f"extra_tests.c: the weights of trial {trials[0].name} were not kept")


def test_they_are_in_the_summary_and_nowhere_in_the_trials(ready: tuple[Study, list[Trial]]) -> None:
    study, trials = ready
    plain = prepare_study(parse_study(raw_with(Path(study.config.out), extra_tests={})))
    assert [one.digest for one in make_trials(plain)] == [one.digest for one in trials]
    study = prepare_study(study.config)
    trials = make_trials(study)
    assert show_corrupted(study, trials, in_process) == []
    found = summary(str(study.files.root))
    arm = found["arms"][0]["robustness"]["c"]
    values = [read_json(study.files, f"robustness/c/{name}.json") for name in found["arms"][0]["trials"]]

    assert list(arm["type"]) == ["gaussian_noise", "snow", "fog"]
    assert arm["mean"]["values"] == [one["mean"] for one in values if one is not None]
    assert arm["cell"]["snow/5"]["values"] == [one["top1"]["snow"]["5"] for one in values if one is not None]
    assert arm["mce"] is None
    heads, lines = further_scores(found) or ((), [])
    assert heads[2] == "c corrupted-v1, mean of 3 types %"
    assert len(lines) == 2
    result = read_result(study.files, trials[0].name)
    assert result is not None
    assert result["also"] == {}
    config = read_json(study.files, "study.json") or {}
    changed = {**config, "config": {**config["config"], "extra_tests": {"c": {**config["config"]["extra_tests"]["c"],
                                                                              "restrict": True}}}}
    robustness.replace_json(study.files, "study.json", changed)
    other = read_study(str(study.files.root))
    assert other.corrupted == {}
    assert sum("was made with other settings of extra_tests.c" in line for line in other.problems) == len(trials)
    robustness.replace_json(study.files, "study.json", config)
    stale = read_json(study.files, f"robustness/c/{trials[0].name}.json") or {}
    robustness.replace_json(study.files, f"robustness/c/{trials[0].name}.json", {**stale, "trial_digest": "other"})
    view = read_study(str(study.files.root))
    assert trials[0].name not in view.corrupted["c"]
    assert any("is of another classifier" in line for line in view.problems)


@pytest.mark.parametrize(("test", "words"), [
    ({"data": TEST, "corrupt": {"table": "cifar", "types": ["fgo"]}}, "types: 'fgo': no corruption of this name"),
    ({"data": TEST, "corrupt": {"table": "cifar"}, "group_of": "(.)"}, "group_of: corrupted images are counted by"),
    ({"data": TEST, "corrupt": {"table": "cifar"}, "layout": "imagenet_c"}, "corrupted already"),
    ({"data": TEST, "layout": "imagenet_c"}, "read as folders, not as source digits"),
    ({"data": {"source": "cifar_c", "path": "nowhere"}}, "nowhere' does not exist"),
    ({"data": TEST, "class_map": "nowhere.csv"}, "class_map: 'nowhere.csv' does not exist")])
def test_mistakes_are_said_before_anything_runs(tmp_path: Path, test: dict[str, Any], words: str) -> None:
    config = parse_study(raw_with(tmp_path, extra_tests={"c": test}))
    with pytest.raises(AssertionError, match=words):
        raise AssertionError("\n".join(study_preflight(config)))


def test_weights_must_be_kept(tmp_path: Path) -> None:
    config = parse_study(raw_with(tmp_path, training={}))
    with pytest.raises(ConfigError, match=r"extra_tests\.c: corrupted images are shown to the finished class"):
        prepare_study(config)
    with pytest.raises(ConfigError, match="give one of them"):
        parse_study(raw_with(tmp_path, extra_tests={"c": {"layout": "imagenet_c", "path": "a", "data": TEST}}))


def test_a_digit_that_is_trained_on_is_not_corrupted_for_a_test(tmp_path: Path) -> None:
    raw = raw_with(tmp_path, extra_tests={"c": {"data": {"source": "digits"}, "corrupt": {"table": "cifar"}}})
    with pytest.raises(UsageError, match=r"extra_tests\.c: .* of its images are training images of seed 0"):
        prepare_study(parse_study(raw))


def test_a_baseline_without_weights_is_shown_them_as_it_sees_images(tmp_path: Path) -> None:
    study, trials = trained(raw_with(tmp_path, arms=ARMS[:1], seeds=[0], baselines=["clip_zero_shot"],
                                     recipe={**SMALL, "updates": 2, "epochs": 1}))
    assert show_corrupted(study, trials, in_process) == []
    found = {trial.arm: read_json(study.files, f"robustness/c/{trial.name}.json") or {} for trial in trials}
    zero_shot = load_classifier(study.files, trials[-1])
    x = next(robustness.CorruptedImages(_opened(study), zero_shot.view).made(np.arange(30)))[1]
    right = zero_shot.answering.logits(x).argmax(axis=1) == study.opened.index(study.config.test).labels

    assert zero_shot.module is None
    assert found["clip_zero_shot"]["top1"]["gaussian_noise"]["1"] == right.mean() > 0.5
    assert found["clip_zero_shot"]["side"] == zero_shot.view.size


@pytest.mark.slow
def test_a_process_that_is_killed_leaves_what_the_next_one_goes_on_with(tmp_path: Path,
                                                                        monkeypatch: pytest.MonkeyPatch) -> None:
    """SIGKILL after the first block of four; the next command writes the bytes of one that was left alone."""
    test = {"source": "digits", "split": "test"}
    raw = {**raw_with(tmp_path, arms=ARMS[:1], seeds=[0]), "extra_tests": {"c": {**TESTS["c"], "data": test}}}
    left = []
    for name, killed in (("alone", False), ("killed", True)):
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump({**raw, "name": name}))
        if killed:
            with monkeypatch.context() as patch:
                patch.setenv("RAYEXPAND_FAILPOINT", "after_corrupted:kill")
                assert process("train", tmp_path / f"{name}.yaml", "--no-ray").returncode == -signal.SIGKILL
            assert len(list((tmp_path / name / "robustness/c/blocks").iterdir())) == 1
            assert not list((tmp_path / name / "robustness/c").glob("*.json"))
        ended = process("train", tmp_path / f"{name}.yaml", "--no-ray")
        assert ended.returncode == 0, ended.stderr
        folder = tmp_path / name / "robustness"
        left.append({str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()})
    assert left[0] == left[1]
    assert len(left[0]) == 2


def test_a_set_that_was_moved_keeps_its_scores(ready: tuple[Study, list[Trial]], tmp_path: Path) -> None:
    """Nothing is shown again, and results are not left out for ever because they name another folder."""
    study, trials = ready
    assert show_corrupted(study, trials, in_process) == []
    name = f"robustness/c/{trials[0].name}.json"
    before = read_json(study.files, name) or {}
    elsewhere = {**before, "settings": {**before["settings"], "data": {**before["settings"]["data"], "path": "old"}}}
    replace_json(study.files, name, elsewhere)
    assert trials[0].name not in read_study(str(study.files.root)).corrupted["c"]

    def nothing(study: Study, one: CorruptedPass, blocks: Sequence[int]) -> Iterator[tuple[int, np.ndarray]]:
        raise AssertionError("images are shown again")
        yield 0, np.empty(0)

    assert show_corrupted(study, trials, nothing) == []
    assert read_json(study.files, name) == before
    assert trials[0].name in read_study(str(study.files.root)).corrupted["c"]


def test_files_of_imagenet_c_are_shown_whole(ready: tuple[Study, list[Trial]], tmp_path: Path) -> None:
    """They are the middle squares already; a recipe that cuts its tests does not cut these again."""
    test = parse_study(raw_with(tmp_path / "out", extra_tests={"c": {
        "layout": "imagenet_c", "path": str(imagenet_c(tmp_path / "in-c", COMMON[:1]))}})).extra_tests["c"]
    classes = next(iter(ready[0].subsets.values()))[1].classes
    shown, cut = robustness.open_corrupted("c", test, classes), Recipe(size=16, resize=20)
    file = tmp_path / "in-c" / COMMON[0] / "1" / "0" / "0.png"
    pixels = np.zeros((16, 16, 3), np.uint8)
    pixels[0], pixels[:, 0] = 255, 200
    Image.fromarray(pixels).save(file)
    number, x_BHWC = next(robustness.CorruptedImages(shown, shown.view_of(cut)).made(np.array([0])))

    assert (number, x_BHWC[0].tolist()) == (0, pixels.tolist())
    assert _opened(ready[0]).view_of(cut) == cut, "images that are corrupted here are cut as others"


def imagenet_c(folder: Path, kinds: Sequence[str] = COMMON) -> Path:
    """Two images of three digits, in folders by type, severity and class."""
    for number, kind in enumerate(kinds):
        for severity in range(1, 6):
            for digit in (0, 3, 7):
                place = folder / kind / str(severity) / str(digit)
                place.mkdir(parents=True)
                for image in range(2):
                    level = np.full((16, 16, 3), (40 * severity + 11 * number + 7 * digit + image) % 256, np.uint8)
                    Image.fromarray(level).save(place / f"{image}.png")
    return folder


def test_published_files_have_the_known_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """ImageNet-C by folders, with mCE; CIFAR-C by arrays, whose classes are numbers, without."""
    monkeypatch.setattr(robustness, "BLOCK", 3)
    monkeypatch.setattr("rayexpand.evaluation.robustness.WHOLE", (6, 3))
    tests = {"in-c": {"layout": "imagenet_c", "path": str(imagenet_c(tmp_path / "imagenet-c"))},
             "some": {"layout": "imagenet_c", "path": str(imagenet_c(tmp_path / "some", COMMON[:4]))},
             "cifar-c": {"data": {"source": "cifar_c", "path": str(arrays(tmp_path / "cifar-c")), "split": "3"},
                         "class_map": "numbers", "restrict": True}}
    study, trials = trained(raw_with(tmp_path / "out", arms=ARMS[:1], seeds=[0], extra_tests=tests,
                                     recipe={**SMALL, "updates": 2, "epochs": 1}))
    assert show_corrupted(study, trials, in_process) == []
    found = {name: read_json(study.files, f"robustness/{name}/original-s0.json") or {} for name in tests}

    assert {name: one["name"] for name, one in found.items()} == {"in-c": "ImageNet-C", "some": "ImageNet-C",
                                                                  "cifar-c": "CIFAR-C"}
    assert [name for name, one in found.items() if "mce" in one] == ["in-c"]
    assert (found["in-c"]["images"], found["cifar-c"]["images"], found["cifar-c"]["classes"]) == (6, 4, 3)
    assert found["some"]["note"] == "4 of 15 types, in 5 severities"
    assert {tuple(one) for one in found["cifar-c"]["top1"].values()} == {("3",)}
    shown = robustness.open_corrupted("c", study.config.extra_tests["cifar-c"],
                                      next(iter(study.subsets.values()))[1].classes)
    kept = load_classifier(study.files, trials[0])
    (fog,) = [x for number, x in robustness.CorruptedImages(shown, kept.view).made(np.arange(4))
              if shown.cells[number] == ("fog", 3)]
    chosen = np.array([0, 3, 7])[kept.answering.logits(fog)[:, [0, 3, 7]].argmax(axis=1)]
    table = read_table(study.files, "robustness/cifar-c/original-s0.parquet")
    assert table["fog/3"].to_pylist() == (chosen == [7, 3, 0, 3]).tolist(), "among the classes of the set alone"
    shutil.rmtree(tmp_path / "some" / COMMON[0] / "2")
    with pytest.raises(UsageError, match=r"extra_tests\.some: .* do not have the same severities"):
        prepare_study(study.config)
    shutil.rmtree(tmp_path / "some")
    (imagenet_c(tmp_path / "some", COMMON[:4]) / "shot_noise/4/7/1.png").unlink()
    with pytest.raises(UsageError, match="shot_noise/4 has other images or labels than gaussian_noise/1"):
        prepare_study(study.config)
