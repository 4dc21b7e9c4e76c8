"""ImageNet's relatives: every folder gets the class that the benchmark means, and every other folder is refused."""

from __future__ import annotations

import json
import logging
import os
from importlib.resources import files
from pathlib import Path

import pytest
import timm.data
import torch
from PIL import Image
from torchvision.transforms.functional import to_pil_image

from engine.config import Config
from engine.data.imagenet_family import VARIANT_SETTINGS, clean_images, open_variant
from engine.data.images import IGNORED
from engine.data.loaders import BadFiles, Batches
from engine.data.source import DataSource
from engine.data.transforms import Normalise
from engine.distributed import Process
from engine.errors import InputError
from engine.evaluation.metrics import Metrics, evaluate
from engine.evaluation.run import find_target
from engine.precision import Precision

INFO = files("timm.data") / "_info"
SYNSETS = (INFO / "imagenet_synsets.txt").read_text().split()
FOLDERS = {
    "v2": [str(number) for number in range(1000)],
    "a": (INFO / "imagenet_a_synsets.txt").read_text().split(),
    "r": (INFO / "imagenet_r_synsets.txt").read_text().split(),
    "sketch": SYNSETS,
}


@pytest.fixture
def picture(tmp_path) -> Path:
    path = tmp_path / "picture.png"
    Image.new("RGB", (8, 8), "red").save(path)
    return path


def make(folder: Path, names: list[str], picture: Path) -> Path:
    """A folder for each name, with links to one picture."""
    for name in names:
        (folder / name).mkdir(parents=True)
        os.link(picture, folder / name / "0.png")
    return folder


def configuration(root: Path) -> Config:
    config = Config()
    config.data.root, config.data.image_size, config.data.workers = str(root), 8, 0
    return config


def labels_by_file(source: DataSource) -> dict[Path, int]:
    """As the data set gives them, by the file that it reads."""
    images = source.held_out
    return {Path(path): images[index][1] for index, (path, _) in enumerate(images._items.samples)}


@pytest.mark.parametrize(("variant", "inside"), [*((variant, "") for variant in FOLDERS), ("a", "val")])
def test_labels_and_candidates_lead_to_the_right_class(variant, inside, tmp_path, picture):
    make(tmp_path / "data" / inside, FOLDERS[variant], picture)
    source = open_variant(variant, configuration(tmp_path / "data"))[""]
    labels = {path.parent.name: label for path, label in labels_by_file(source).items()}
    candidates = source.candidates or range(1000)
    assert labels.keys() == set(FOLDERS[variant])
    for name, label in labels.items():
        class_number = int(name) if variant == "v2" else SYNSETS.index(name)
        assert candidates[label] == class_number and source.class_names[label].startswith(SYNSETS[class_number])
    assert len(source.class_names) == len(FOLDERS[variant]) and source.num_classes == 1000


def test_real_labels_are_looked_up_by_the_image_number_behind_links_and_not_in_hidden_folders(
    tmp_path, picture, caplog
):
    right, root = json.loads((INFO / "imagenet_real_labels.json").read_text()), tmp_path / "data"
    (root / "val").mkdir(parents=True)
    for number in (1, 2, 3, 10, 50000):
        folder = tmp_path / "elsewhere" / SYNSETS[number % 3]
        (folder / ".ipynb_checkpoints").mkdir(parents=True, exist_ok=True)
        os.link(picture, folder / f"ILSVRC2012_val_{number:08d}.png")
        os.link(picture, folder / ".ipynb_checkpoints" / f"ILSVRC2012_val_{number:08d}-checkpoint.png")
    (root / "val" / "link").symlink_to(tmp_path / "elsewhere")
    with caplog.at_level(logging.WARNING):
        source = open_variant("real", configuration(root))[""]
    assert "only 5 of the 50000 images" in caplog.text and source.accepted.shape[0] == 50000
    labels = labels_by_file(source)
    assert len(labels) == 5
    for path, label in labels.items():
        if expected := right[int(path.stem.rpartition("_")[2]) - 1]:
            assert source.accepted[label][source.accepted[label] != IGNORED].tolist() == expected
        else:
            assert label == IGNORED
    (root / "stray.png").write_bytes(picture.read_bytes())
    with pytest.raises(InputError, match=r"stray.png: --variant real knows the images ILSVRC2012_val_00000001.JPEG"):
        open_variant("real", configuration(root))


def test_real_accuracy_is_that_of_timm(tmp_path):
    """timm's own evaluator on the first images; it wants to be told of all 50000."""
    right = json.loads((INFO / "imagenet_real_labels.json").read_text())
    (tmp_path / "data").mkdir()
    for number in range(1, 31):
        image = to_pil_image(torch.rand(3, 8, 8, generator=torch.Generator().manual_seed(number)))
        image.save(tmp_path / "data" / f"ILSVRC2012_val_{number:08d}.PNG")
    config, process = configuration(tmp_path / "data"), Process(0, 1, torch.device("cpu"))
    config.evaluation.batch, source = 7, open_variant("real", config)[""]
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 1000))
    with torch.no_grad():  # the first right label of most images is likely
        for labels in right[:30]:
            for label in labels[:1]:
                model[1].bias[label] += 1.5
    loader = Batches(config, source, process, BadFiles(0))
    precision = Precision("off", process.device)
    figures = evaluate(model, loader, precision, process, metrics=Metrics(process.device, source))

    evaluator = timm.data.RealLabelsImagenet([f"ILSVRC2012_val_{number:08d}.JPEG" for number in range(1, 50001)])
    images = torch.stack([source.held_out[index][0] for index in range(30)])
    evaluator.add_result(model(Normalise(config.transform.mean, config.transform.std)(images)))
    assert figures["images"] == sum(map(bool, right[:30]))
    assert 0 < figures["top1"] < figures["top5"]
    assert figures["top1"] == pytest.approx(evaluator.get_accuracy(1))
    assert figures["top5"] == pytest.approx(evaluator.get_accuracy(5))


def pictures(folder: Path, names: list[str]) -> None:
    """A picture of its own for each name, with a red border of two pixels."""
    for number, name in enumerate(names):
        pixels = torch.rand(3, 12, 12, generator=torch.Generator().manual_seed(number))
        pixels[:, [0, 1, -2, -1]] = pixels[:, :, [0, 1, -2, -1]] = torch.tensor([1.0, 0, 0])[:, None, None]
        (folder / name).mkdir(parents=True)
        to_pil_image(pixels).save(folder / name / "0.png")


def test_objectnet_has_the_classes_of_imagenet_and_no_border(tmp_path):
    """Of a bicycle two classes are right; an argmax over all that may be right somewhere says which is meant."""
    root, config = tmp_path / "objectnet", configuration(tmp_path / "objectnet")
    pictures(root / "images", ["bicycle", "beer_bottle", "air_freshener"])
    (root / "mappings").mkdir()
    labels = {"bicycle": "Bicycle", "air_freshener": "Air freshener", "beer_bottle": "Beer bottle"}
    bicycles = "mountain bike, all-terrain bike, off-roader; bicycle-built-for-two, tandem bicycle, tandem"
    (root / "mappings" / "folder_to_objectnet_label.json").write_text(json.dumps(labels))
    right = {"Bicycle": bicycles, "Beer bottle": "beer bottle"}
    (root / "mappings" / "objectnet_to_imagenet_1k.json").write_text(json.dumps(right))
    source = open_variant("objectnet", config)[""]
    assert source.candidates == [440, 444, 671] and len(source.held_out) == 2
    assert 255 not in source.held_out[0][0][0, :, 0] or not (source.held_out[0][0][1:, :, 0] == 0).all()
    bicycle = {Path(path).parent.name: number for number, (path, _) in enumerate(source.held_out._items.samples)}[
        "bicycle"
    ]
    for best, is_right in ((671, True), (444, True), (440, False), (0, True)):
        logits = torch.zeros(1, 1000)
        logits[0, 671], logits[0, best] = 1.0, 2.0  # class 0 is right nowhere: it is not asked for
        metrics = Metrics(torch.device("cpu"), source)
        metrics.update(logits, torch.tensor([source.held_out[bicycle][1]]))
        assert metrics.totals[2].item() == is_right
    (root / "mappings" / "objectnet_to_imagenet_1k.json").write_text(json.dumps({"Bicycle": "velocipede"}))
    with pytest.raises(InputError, match="no class of ImageNet: velocipede"):
        open_variant("objectnet", config)
    (root / "mappings" / "objectnet_to_imagenet_1k.json").unlink()
    with pytest.raises(InputError, match=r"--variant objectnet: .*objectnet_to_imagenet_1k.json is missing"):
        open_variant("objectnet", config)


@pytest.mark.parametrize("variant", ["a", "sketch"])
def test_clean_images_are_of_the_same_classes_chosen_among_the_same(variant, tmp_path, picture):
    make(tmp_path / "variant", FOLDERS[variant], picture)
    make(tmp_path / "imagenet" / "val", SYNSETS, picture)
    config = configuration(tmp_path / "variant")
    source = open_variant(variant, config)[""]
    clean = clean_images(variant, source, str(tmp_path / "imagenet"), config)
    assert len(clean.held_out) == len(FOLDERS[variant]) and clean.candidates == source.candidates
    own, theirs = labels_by_file(source), labels_by_file(clean)
    assert {path.parent.name: label for path, label in own.items()} == {
        path.parent.name: label for path, label in theirs.items()
    }
    for wrong, folder, complaint in ((variant, "nowhere", "no such folder"), ("c", "imagenet", "not with c")):
        with pytest.raises(InputError, match=complaint):
            clean_images(wrong, source, str(tmp_path / folder), config)


def test_corruptions_are_sets_of_their_own_of_which_nothing_is_cut(tmp_path, caplog):
    root, pixels = tmp_path / "data", torch.arange(3 * 64, dtype=torch.uint8).reshape(3, 8, 8)
    to_pil_image(pixels).save(tmp_path / "picture.png")
    for severity in "12345":
        make(root / "fog" / severity, SYNSETS, tmp_path / "picture.png")
    for hidden in (root, root / "fog", root / "fog" / "1"):
        (hidden / ".ipynb_checkpoints").mkdir()
    whole = [f"data.root={root}", "data.image_size=8", *VARIANT_SETTINGS["c"]]
    for overrides, is_whole in ((whole, True), ([*whole, "transform.eval_crop=0.5"], False)):
        config, _ = find_target("test_vit", None, overrides)
        config.transform.eval_interpolation = "bicubic"
        config.transform.mean, config.transform.std = [0.5] * 3, [0.5] * 3
        with caplog.at_level(logging.WARNING):
            sources = open_variant("c", config)
        assert torch.equal(sources["fog/1"].held_out[0][0], pixels) == is_whole
    assert list(sources) == [f"fog/{severity}" for severity in "12345"]
    assert "means are over 1 of 15 corruptions, without gaussian_noise, " in caplog.text
    labels = {path.parent.name: label for path, label in labels_by_file(sources["fog/3"]).items()}
    assert labels == {name: number for number, name in enumerate(SYNSETS)}

    (root / "fog" / "5" / "n01440764" / "0.png").unlink()
    with pytest.raises(InputError, match="fog/5/n01440764: the class folder holds no image"):
        open_variant("c", config)


@pytest.mark.parametrize(
    ("variant", "names", "message"),
    [
        ("a", FOLDERS["a"][:-2], "data/n12144580: the class folder holds no image"),
        ("a", [*FOLDERS["a"], "n00000000"], "n00000000/0.png: an image must lie directly in a class folder of"),
        ("v2", FOLDERS["v2"][1:], "data/0: the class folder holds no image"),
        ("sketch", ["cat"], "data/cat/0.png: an image must lie directly in a class folder of"),
        ("b", ["cat"], "--variant b: allowed is real, v2, a, r, sketch, objectnet, c"),
        ("c", [], "no such folder"),
        ("c", ["fogg"], "--variant c needs the folders of corruptions: gaussian_noise, "),
        ("c", ["fog"], "fog/1/n01440764: the class folder holds no image"),
    ],
)
def test_other_folders_are_refused(variant, names, message, tmp_path, picture):
    make(tmp_path / "data", names, picture)
    with pytest.raises(InputError) as error:
        open_variant(variant, configuration(tmp_path / "data"))
    assert message in str(error.value) and "\n" not in str(error.value)
