"""ImageNet's relatives: every folder gets the class that the benchmark means, and every other folder is refused."""

from __future__ import annotations

import json
import logging
import os
from functools import partial
from importlib.resources import files
from pathlib import Path

import pytest
import timm.data
import torch
from PIL import Image
from torchvision.transforms.functional import to_pil_image

from engine.config import Config
from engine.data.imagenet_family import CORRUPTIONS, VARIANT_SETTINGS, open_variant
from engine.data.loaders import build_held_out
from engine.data.stream import IGNORED
from engine.data.transforms import Normalise
from engine.distributed import Process
from engine.errors import InputError
from engine.evaluation import Metrics, measure
from engine.evaluation_run import find_target
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
    config.data.root, config.data.image_size = str(root), 8
    return config


def labels_by_folder(dataset) -> dict[str, int]:
    """As the data set gives them, by the folder of the file that it read."""
    return {Path(dataset._name(index)).parent.name: dataset[index][1] for index in range(len(dataset))}


@pytest.mark.parametrize("inside", ["", "val"])
@pytest.mark.parametrize("variant", FOLDERS)
def test_labels_and_candidates_lead_to_the_right_class(variant, inside, tmp_path, picture):
    make(tmp_path / "data" / inside, FOLDERS[variant], picture)
    benchmark = open_variant(variant, configuration(tmp_path / "data"))
    labels = labels_by_folder(benchmark.source.held_out)
    candidates = benchmark.candidates or range(1000)
    assert labels.keys() == set(FOLDERS[variant])
    for name, label in labels.items():
        class_number = int(name) if variant == "v2" else SYNSETS.index(name)
        assert candidates[label] == class_number
        assert benchmark.source.class_names[label].startswith(SYNSETS[class_number])
    assert len(benchmark.source.class_names) == len(FOLDERS[variant]) and benchmark.source.num_classes == 1000


def test_real_labels_are_looked_up_by_the_image_number(tmp_path, picture, caplog):
    right = json.loads((INFO / "imagenet_real_labels.json").read_text())
    numbers = [1, 2, 3, 10, 50000]
    for number in numbers:
        folder = tmp_path / "data" / "val" / SYNSETS[number % 3]
        folder.mkdir(parents=True, exist_ok=True)
        os.link(picture, folder / f"ILSVRC2012_val_{number:08d}.png")
    with caplog.at_level(logging.WARNING):
        benchmark = open_variant("real", configuration(tmp_path / "data"))
    assert "only 5 of the 50000 images" in caplog.text
    dataset = benchmark.source.held_out
    for index in range(len(dataset)):
        number = int(Path(dataset._name(index)).stem.rpartition("_")[2])
        label = dataset[index][1]
        if right[number - 1]:
            accepted = benchmark.accepted[label]
            assert accepted[accepted != IGNORED].tolist() == right[number - 1]
        else:
            assert label == IGNORED
    assert benchmark.accepted.shape[0] == 50000
    (tmp_path / "data" / "stray.png").write_bytes(picture.read_bytes())
    with pytest.raises(InputError, match=r"stray.png: --variant real knows the images ILSVRC2012_val_00000001.JPEG"):
        open_variant("real", configuration(tmp_path / "data"))


def test_real_images_lie_behind_links_and_not_in_hidden_folders(tmp_path, picture):
    place, root = tmp_path / "elsewhere" / SYNSETS[0], tmp_path / "data"
    (place / ".ipynb_checkpoints").mkdir(parents=True)
    root.mkdir()
    for name in ("ILSVRC2012_val_00000003.png", ".ipynb_checkpoints/ILSVRC2012_val_00000003-checkpoint.png"):
        os.link(picture, place / name)
    (root / SYNSETS[0]).symlink_to(place)
    assert len(open_variant("real", configuration(root)).source.held_out) == 1


def test_real_accuracy_is_that_of_timm(tmp_path):
    """timm's own evaluator on the first images; it wants to be told of all 50000."""
    right = json.loads((INFO / "imagenet_real_labels.json").read_text())
    (tmp_path / "data").mkdir()
    for number in range(1, 31):
        image = to_pil_image(torch.rand(3, 8, 8, generator=torch.Generator().manual_seed(number)))
        image.save(tmp_path / "data" / f"ILSVRC2012_val_{number:08d}.PNG")
    benchmark = open_variant("real", configuration(tmp_path / "data"))
    config, process = configuration(tmp_path / "data"), Process(0, 1, torch.device("cpu"))
    config.data.workers, config.evaluation.batch = 0, 7
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 1000))
    with torch.no_grad():  # the first right label of most images is likely
        for labels in right[:30]:
            for label in labels[:1]:
                model[1].bias[label] += 1.5
    loaders = {"": build_held_out(config, benchmark.source, process)}
    new_metrics = partial(Metrics, process.device, accepted=benchmark.accepted)
    metrics, _ = measure(model, loaders, new_metrics, Precision("off", process.device), process)
    figures = metrics.figures()

    names = [f"ILSVRC2012_val_{number:08d}.JPEG" for number in range(1, 50001)]
    evaluator = timm.data.RealLabelsImagenet(names)
    images = torch.stack([benchmark.source.held_out[index][0] for index in range(30)])
    images = Normalise(config.transform.mean, config.transform.std)(images)
    evaluator.add_result(model(images))
    assert figures["images"] == sum(map(bool, right[:30]))
    assert 0 < figures["top1"] < figures["top5"]
    assert figures["top1"] == pytest.approx(evaluator.get_accuracy(1))
    assert figures["top5"] == pytest.approx(evaluator.get_accuracy(5))


def test_of_images_that_are_cropped_already_nothing_is_cut(tmp_path):
    pixels = torch.arange(3 * 64, dtype=torch.uint8).reshape(3, 8, 8)
    to_pil_image(pixels).save(tmp_path / "picture.png")
    for severity in "12345":
        make(tmp_path / "data" / "fog" / severity, SYNSETS, tmp_path / "picture.png")
    whole = [f"data.root={tmp_path / 'data'}", "data.image_size=8", *VARIANT_SETTINGS["c"]]
    for overrides, is_whole in ((whole, True), ([*whole, "transform.eval_crop=0.5"], False)):
        config, _ = find_target("test_vit", None, overrides)
        config.transform.eval_interpolation = "bicubic"
        config.transform.mean, config.transform.std = [0.5] * 3, [0.5] * 3
        image, _ = open_variant("c", config).source.held_out[0]
        assert torch.equal(image, pixels) == is_whole


def test_corruptions_are_sets_of_their_own(tmp_path, picture, caplog):
    root = tmp_path / "data"
    for severity in "12345":
        make(root / "fog" / severity, SYNSETS, picture)
    for hidden in (root, root / "fog", root / "fog" / "1"):
        (hidden / ".ipynb_checkpoints").mkdir()
    with caplog.at_level(logging.WARNING):
        benchmark = open_variant("c", configuration(root))
    assert list(benchmark.sources) == [f"fog/{severity}" for severity in "12345"]
    assert "means are over 1 of 15 corruptions, without gaussian_noise, " in caplog.text and len(CORRUPTIONS) == 15
    labels = labels_by_folder(benchmark.sources["fog/3"].held_out)
    assert labels == {name: number for number, name in enumerate(SYNSETS)}

    def refused(message: str) -> None:
        with pytest.raises(InputError) as error:
            open_variant("c", configuration(root))
        assert message in str(error.value) and "\n" not in str(error.value)

    (root / "fog" / "5" / "n01440764" / "0.png").unlink()
    refused("n01440764: the class folder holds no image")
    (root / "fog" / "5" / "n01440764").rmdir()
    refused("fog/5: --variant c has 1000 class folders: 1 are missing (n01440764 …)")
    (root / "fog" / "5").rename(root / "fog" / "6")
    refused("needs the severities 1, 2, 3, 4, 5, here are 1, 2, 3, 4, 6")
    (root / "fogg").mkdir()
    refused("--variant c has no corruption fogg, only gaussian_noise, ")


@pytest.mark.parametrize(
    ("variant", "names", "message"),
    [
        ("a", FOLDERS["a"][:-2], "--variant a has 200 class folders: 2 are missing (n12144580, n12267677 …)"),
        ("a", [*FOLDERS["a"], "n00000000"], "1 are none of them (n00000000 …)"),
        ("a", FOLDERS["r"], "114 are missing (n01558993, n01580077, n01631663 …) and 114 are none of them"),
        ("v2", FOLDERS["v2"][1:], "--variant v2 has 1000 class folders: 1 are missing (0 …)"),
        ("sketch", ["cat", "dog"], "data: --variant sketch has 1000 class folders: 1000 are missing"),
        ("b", ["cat"], "--variant b: allowed is real, v2, a, r, sketch, c"),
        ("c", [], "no such folder"),
        ("c", ["fog"], "fog: --variant c needs the severities 1, 2, 3, 4, 5, here are none"),
    ],
)
def test_other_folders_are_refused(variant, names, message, tmp_path, picture):
    make(tmp_path / "data", names, picture)
    with pytest.raises(InputError) as error:
        open_variant(variant, configuration(tmp_path / "data"))
    assert message in str(error.value) and "\n" not in str(error.value)
