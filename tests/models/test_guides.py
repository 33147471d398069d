import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812

from rayexpand.classifier.backbones import build_backbone
from rayexpand.classifier.recipe import Recipe
from rayexpand.contract.errors import ModelError
from rayexpand.contract.rng import RowRng
from rayexpand.models.guide_files import check_guide, guide_classes, save_classifier
from rayexpand.models.guides import ClassifierGuide, ClipGuide, guide_hash, load_guide
from tests.tiny import tiny_clip

torch.set_num_threads(1)
NAMES = ("zero", "one", "two")


def images(n: int, side: int = 16, key: int = 0) -> np.ndarray:
    return (RowRng(key, "test", "guide", 0).uniforms("x", (n, side, side, 3)) * 256).astype(np.uint8)


def tensor(pixels: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return tiny_clip(tmp_path_factory.mktemp("tiny") / "clip")


@pytest.fixture(scope="module")
def guide(source):
    return load_guide(str(source), None, NAMES, device="cpu")


@pytest.fixture
def folder(source, tmp_path):
    return Path(shutil.copytree(source, tmp_path / "clip"))


@torch.no_grad()
def test_features_are_those_of_open_clip(source, guide):
    import open_clip
    from PIL import Image

    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{source}")
    pixels = images(3)
    x = torch.stack([preprocess(Image.fromarray(p)) for p in pixels])
    expected = model.eval().encode_image(x)
    assert torch.allclose(guide.features(tensor(pixels)), expected, atol=1e-5)
    assert not torch.allclose(expected.norm(dim=1), torch.ones(3), atol=0.05)  # not normalised

    tokens = open_clip.get_tokenizer(f"local-dir:{source}")([f"a photo of a {name}" for name in NAMES])
    cosine = F.normalize(expected, dim=1) @ F.normalize(model.encode_text(tokens), dim=1).T
    assert torch.allclose(guide.logits(tensor(pixels)), cosine * model.logit_scale.exp(), atol=1e-4)
    assert np.array_equal(guide.zero_shot(pixels), cosine.argmax(1).numpy())


@torch.no_grad()
def test_other_sizes_are_resized_bicubic_without_antialiasing(guide):
    x = tensor(images(2, side=40))
    expected = guide.features(F.interpolate(x, (16, 16), mode="bicubic", align_corners=False))
    assert torch.allclose(guide.features(x), expected, atol=1e-5)
    assert guide.zero_shot(images(5, side=8)).shape == (5,)


def test_gradients_reach_the_image_and_no_weight(guide):
    x = tensor(images(3, side=24)).requires_grad_()
    grad, = torch.autograd.grad(guide.logits(x).log_softmax(1)[:, 0].sum(), x)
    assert (grad.abs().amax((1, 2, 3)) > 0).all()
    assert not any(p.requires_grad for p in guide.model.parameters())
    assert not guide.model.training
    assert guide.differentiable


@torch.no_grad()
def test_rows_do_not_depend_on_their_batch_mates(guide):
    x, mixed = tensor(images(4)), tensor(images(4, key=1))
    mixed[2] = x[2]
    assert torch.equal(guide.logits(mixed)[2], guide.logits(x)[2])
    assert not torch.equal(guide.logits(mixed)[1], guide.logits(x)[1])


def test_zero_shot_does_not_depend_on_the_chunk(guide, monkeypatch):
    pixels = images(20)
    whole = guide.zero_shot(pixels)
    monkeypatch.setattr("rayexpand.models.guides.IMAGES_PER_CALL", 7)
    assert np.array_equal(guide.zero_shot(pixels), whole)


def test_an_incomplete_folder_lists_what_is_missing(folder):
    (folder / "open_clip_config.json").unlink()
    (folder / "open_clip_model.safetensors").rename(folder / "open_clip_model.pt")
    with pytest.raises(ModelError) as error:
        load_guide(str(folder), None, NAMES)
    assert "open_clip_config.json is missing" in str(error.value)
    assert "open_clip_model.pt is a pickle" in str(error.value)
    (folder / "open_clip_model.pt").unlink()
    with pytest.raises(ModelError, match=r"open_clip_model\.safetensors is missing"):
        guide_hash(str(folder), None)


def change_config(folder, **text):
    file = folder / "open_clip_config.json"
    config = json.loads(file.read_text())
    config["model_cfg"]["text_cfg"] |= text
    file.write_text(json.dumps(config))


DAMAGE = {
    "weights": (lambda f: (f / "open_clip_model.safetensors").write_bytes(b"nothing"),
                "open_clip_model.safetensors cannot be read: it is cut off"),
    "configuration": (lambda f: (f / "open_clip_config.json").write_text("{"),
                      "open_clip_config.json cannot be read as open_clip's configuration"),
    "no text tower": (lambda f: (f / "open_clip_config.json").write_text('{"model_cfg": {"vision_cfg": {}}}'),
                      "has no model_cfg.text_cfg"),
    "no tokenizer": (lambda f: [file.unlink() for file in f.glob("*token*")] + [file.unlink() for file in f.glob(
        "vocab*")], "tokenizer.json is missing"),
    "tokenizer of another tower": (lambda f: change_config(f, vocab_size=5000), "they do not belong together"),
    "weights without text": (lambda f: keep_weights(f, "visual."), "holds no text tower"),
}


def keep_weights(folder, prefix):
    from safetensors.torch import load_file, save_file

    file = folder / "open_clip_model.safetensors"
    save_file({name: one for name, one in load_file(file).items() if name.startswith(prefix)}, file)


@pytest.mark.parametrize(("damage", "words"), DAMAGE.values(), ids=DAMAGE)
def test_damage_is_named_by_validate_and_at_load(folder, damage, words):
    assert check_guide(str(folder), None) == []
    damage(folder)
    assert words in "".join(check_guide(str(folder), None))
    with pytest.raises(ModelError, match=words):
        load_guide(str(folder), None, NAMES)


def test_a_checkpoint_beside_a_folder_has_no_effect_and_is_refused(folder):
    assert "guide.checkpoint has no effect" in check_guide(str(folder), "weights.safetensors")[0]
    assert "neither a folder here" in check_guide("ViT-Z-99", None)[0]
    assert check_guide("acme/clip@v1", None) == []


def test_wrong_names_and_checkpoints_say_what_to_give(tmp_path):
    with pytest.raises(ModelError, match="neither a folder here nor an open_clip architecture"):
        load_guide("ViT-Z-99", None, NAMES)
    with pytest.raises(ModelError, match=r"set guide\.checkpoint"):
        load_guide("ViT-B-32", None, NAMES)
    (tmp_path / "weights.pt").write_bytes(b"")
    with pytest.raises(ModelError, match=r"weights\.pt is not a safetensors file"):
        load_guide("ViT-B-32", str(tmp_path / "weights.pt"), NAMES)
    with pytest.raises(ModelError, match=r"gone\.safetensors does not exist"):
        load_guide("ViT-B-32", str(tmp_path / "gone.safetensors"), NAMES)


def test_no_classes_is_an_error(source):
    with pytest.raises(ModelError, match="no classes"):
        load_guide(str(source), None, [])


def test_an_architecture_with_a_checkpoint(source, tmp_path):
    import open_clip
    from safetensors.torch import save_file

    config = json.loads((source / "open_clip_config.json").read_text())["model_cfg"]
    config["text_cfg"] = {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
    (tmp_path / "tiny-test-clip.json").write_text(json.dumps(config))
    open_clip.add_model_config(tmp_path / "tiny-test-clip.json")
    model = open_clip.CLIP(**config)
    hashes = []
    for value in (0.1, 0.2):
        model.visual.class_embedding.data.fill_(value)
        save_file(model.state_dict(), tmp_path / f"{value}.safetensors")
        guide = load_guide("tiny-test-clip", str(tmp_path / f"{value}.safetensors"), NAMES, device="cpu")
        assert isinstance(guide, ClipGuide)
        assert torch.equal(guide.model.visual.class_embedding, model.visual.class_embedding)
        hashes.append(guide_hash("tiny-test-clip", str(tmp_path / f"{value}.safetensors")))
    assert hashes[0] != hashes[1]


def tiny_architecture(source, folder, name="tiny-test-clip", width=16):
    """A model of an architecture of this name that open_clip knows from now on, and its settings."""
    import open_clip

    config = json.loads((source / "open_clip_config.json").read_text())["model_cfg"]
    config["text_cfg"] = {"context_length": 16, "vocab_size": 49408, "width": width, "heads": 2, "layers": 1}
    (folder / f"{name}.json").write_text(json.dumps(config))
    open_clip.add_model_config(folder / f"{name}.json")
    return open_clip.CLIP(**config), config


def test_a_checkpoint_of_another_architecture_is_refused_with_names_and_shapes(source, tmp_path):
    from safetensors.torch import save_file

    tiny_architecture(source, tmp_path, "tiny-wide-clip", 32)
    model, _ = tiny_architecture(source, tmp_path)
    state = model.state_dict()
    file = tmp_path / "weights.safetensors"
    save_file({f"module.{name}": one for name, one in state.items()}, file)
    assert check_guide("tiny-test-clip", str(file)) == []  # open_clip takes the prefix off
    assert load_guide("tiny-test-clip", str(file), NAMES, device="cpu").size == (16, 16)

    save_file(state, file)
    (problem,) = check_guide("tiny-wide-clip", str(file))
    assert f"{file} is of another architecture than tiny-wide-clip" in problem
    assert "in_proj_weight is [48, 16] there and [96, 32] in tiny-wide-clip" in problem
    with pytest.raises(ModelError, match=r"weights\.safetensors is of another architecture than tiny-wide-clip"):
        load_guide("tiny-wide-clip", str(file), NAMES)

    save_file({f"vision.{name}": one for name, one in state.items()}, file)
    assert "visual.class_embedding is not there" in check_guide("tiny-test-clip", str(file))[0]
    save_file({name: one for name, one in state.items() if name != "ln_final.bias"}, file)
    assert "ln_final.bias is not there" in check_guide("tiny-test-clip", str(file))[0]


def test_half_a_checkpoint_is_found_by_its_header(source, tmp_path):
    from safetensors.torch import save_file

    model, _ = tiny_architecture(source, tmp_path)
    file = tmp_path / "weights.safetensors"
    save_file(model.state_dict(), file)
    file.write_bytes(file.read_bytes()[:-1000])
    assert "weights.safetensors cannot be read: it is cut off" in check_guide("tiny-test-clip", str(file))[0]
    with pytest.raises(ModelError, match="it is cut off"):
        load_guide("tiny-test-clip", str(file), NAMES)


def test_a_folder_whose_weights_are_of_another_architecture(folder):
    config = json.loads((folder / "open_clip_config.json").read_text())
    config["model_cfg"]["vision_cfg"]["width"] = 32
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    (problem,) = check_guide(str(folder), None)
    assert "open_clip_model.safetensors is of another architecture than open_clip_config.json" in problem
    assert "visual.class_embedding is [16] there and [32] in open_clip_config.json" in problem


def test_a_classifier_whose_weights_are_cut_off_or_of_another_recipe(tmp_path):
    classifier(tmp_path / "guide", BACKBONES["small_resnet"])
    file = tmp_path / "guide/model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:-100])
    assert "model.safetensors cannot be read: it is cut off" in check_guide(str(tmp_path / "guide"), None)[0]


OTHER_KINDS = {
    "transformers CLIP": ({"config.json": '{"model_type": "clip"}', "model.safetensors": ""},
                          "is CLIP in transformers' layout.*open_clip's layout"),
    "another transformers model": ({"config.json": '{"model_type": "bert"}'}, "is a transformers model .bert"),
    "a generator": ({"model_index.json": "{}"}, "is a generator.*prior.weights"),
    "nothing": ({}, "is empty"),
}


@pytest.mark.parametrize(("files", "words"), OTHER_KINDS.values(), ids=OTHER_KINDS)
def test_a_folder_of_another_kind_is_named_as_what_it_is(tmp_path, files, words):
    (tmp_path / "other").mkdir()
    for name, content in files.items():
        (tmp_path / "other" / name).write_text(content)
    (problem,) = check_guide(str(tmp_path / "other"), None)
    with pytest.raises(AssertionError, match=words):
        raise AssertionError(problem)
    assert "missing" not in problem


def test_a_guide_by_url_or_beside_other_folders(tmp_path, monkeypatch):
    assert "is a URL" in check_guide("https://huggingface.co/acme/clip", None)[0]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models/clip-b").mkdir(parents=True)
    (problem,) = check_guide("models/clipb", None)
    assert "there is no folder models/clipb" in problem
    assert "did you mean models/clip-b" in problem


def test_a_hub_guide_that_is_not_cached_says_how_to_fetch_it(tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match=r"hf download acme/clip --revision v1"):
        load_guide("acme/clip@v1", None, NAMES)


def test_hash_of_a_folder_follows_its_weights(folder):
    before = guide_hash(str(folder), None)
    (folder / "README.md").write_text("hello")
    assert guide_hash(str(folder), None) == before
    tiny_clip(folder, seed=1)
    assert guide_hash(str(folder), None) != before


BACKBONES = {
    "small_resnet": {"backbone": "small_resnet", "backbone_args": {"width": 4}},
    "pre-activation, whose head is a convolution": {"backbone": "preact_resnet18", "backbone_args": {"width": 4}},
    "timm, convolutional": {"backbone": "test_resnet"},
    "timm, transformer": {"backbone": "test_vit", "backbone_args": {"img_size": 32}},
}


def classifier(folder, fields, keys=NAMES):
    """A classifier of random weights with batch statistics that matter, and its folder."""
    recipe = Recipe(**{"mean": (0.4, 0.5, 0.6), "std": (0.2, 0.3, 0.4), "test_size": 32, **fields})
    model = build_backbone(recipe, len(keys), seed=3)
    model.train()
    with torch.no_grad():
        model(torch.from_numpy(RowRng(0, "test", "statistics", 0).normals("x", (16, 3, 32, 32))))
    folder.mkdir()
    save_classifier(folder, model, recipe, keys)
    return model.eval(), recipe


@pytest.mark.parametrize("fields", BACKBONES.values(), ids=BACKBONES)
def test_a_classifier_guide_is_its_network_and_its_gradient(tmp_path, fields):
    model, recipe = classifier(tmp_path / "guide", fields)
    guide = load_guide(str(tmp_path / "guide"), None, NAMES, device="cpu", class_keys=NAMES)
    assert isinstance(guide, ClassifierGuide)
    assert (guide.size, guide.differentiable, guide.model.training) == ((32, 32), True, False)
    assert not any(p.requires_grad for p in guide.model.parameters())

    def reference(x):
        x = F.interpolate(x, (32, 32), mode="bicubic", align_corners=False)
        return model((x - torch.tensor(recipe.mean).view(3, 1, 1)) / torch.tensor(recipe.std).view(3, 1, 1))

    x = tensor(images(3, side=40)).requires_grad_()
    found, expected = guide.logits(x), reference(x)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    weights = torch.arange(1.0, 4.0)
    torch.testing.assert_close(*(torch.autograd.grad((out * weights).sum(), x)[0] for out in (found, expected)),
                               atol=1e-5, rtol=1e-4)
    assert guide.features(x).ndim == 2
    torch.testing.assert_close(guide.head(guide.features(x)), found)
    mates = tensor(images(3, side=40, key=1))
    mates[1] = x[1].detach()
    torch.testing.assert_close(guide.logits(mates)[1], found[1], msg="batch norm in training mode")


def test_a_guide_of_other_classes_is_refused(tmp_path):
    classifier(tmp_path / "guide", BACKBONES["small_resnet"])
    assert guide_classes(tmp_path / "guide") == NAMES
    for keys, words in ((("zero", "uno", "two"), "class 1 is 'one' there and 'uno' here"),
                        (("zero", "one"), "3 classes there and 2 here")):
        with pytest.raises(ModelError, match=words):
            load_guide(str(tmp_path / "guide"), None, keys, class_keys=keys)


def test_a_damaged_classifier_is_named(tmp_path):
    folder = tmp_path / "guide"
    classifier(folder, BACKBONES["small_resnet"])
    (folder / "model.safetensors").rename(folder / "other.safetensors")
    assert "model.safetensors is missing" in check_guide(str(folder), None)[0]
    (folder / "other.safetensors").rename(folder / "model.safetensors")
    about = json.loads((folder / "guide.json").read_text())
    (folder / "guide.json").write_text(json.dumps({**about, "recipe": {**about["recipe"], "backbone_args": {}}}))
    with pytest.raises(ModelError, match="guide cannot be loaded"):
        load_guide(str(folder), None, NAMES)
    (folder / "guide.json").write_text('{"kind": "wizard"}')
    assert "does not describe a guide" in check_guide(str(folder), None)[0]
    with pytest.raises(ModelError, match="does not describe a guide"):
        load_guide(str(folder), None, NAMES)


def test_seconds_of_the_making_are_no_part_of_a_guide(tmp_path):
    classifier(tmp_path / "guide", BACKBONES["small_resnet"])
    before = guide_hash(str(tmp_path / "guide"), None)
    (tmp_path / "guide" / "artifact.json").write_text('{"seconds": 3}')
    assert guide_hash(str(tmp_path / "guide"), None) == before


@pytest.mark.parametrize("other", ["model.safetensors", "a.safetensors"])
def test_weights_of_another_layout_beside_those_that_are_loaded(folder, other):
    from safetensors.torch import save_file

    save_file({"vision_model.post_layernorm.weight": torch.ones(3)}, folder / other)

    assert check_guide(str(folder), None) == []
    load_guide(str(folder), None, NAMES, device="cpu")
