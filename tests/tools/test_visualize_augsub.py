"""tools/visualize_augsub.py, called in this process."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tools import analysis, seen_figure, visualize_augsub

ROOT = Path(__file__).parents[2]
DPI, PANEL, GAP, LEFT, TITLE, CAPTION, LEGEND = 130, 1.5, 0.2, 0.45, 0.4, 0.4, 0.3  # inches


@pytest.fixture
def visualize(call, monkeypatch, tmp_path):
    """Call the tool; returns (exit code, standard error, picture)."""
    monkeypatch.chdir(ROOT)
    picture = tmp_path / "picture.png"

    def run(*arguments: object) -> tuple[int, str, Path]:
        code, _, error = call(visualize_augsub, "--output", picture, *arguments)
        return code, error, picture

    return run


@pytest.fixture
def drawn(visualize):
    """The picture of arguments, which has room for so many panels, the main model's column included."""

    def run(*arguments: object, rows: int, columns: int, said: str = "") -> Path:
        code, error, picture = visualize(*arguments)
        assert code == 0 and error.rstrip() == said and [*picture.parent.glob("pic*")] == [picture]
        width, height = LEFT + columns * (PANEL + GAP), TITLE + rows * (PANEL + CAPTION) + LEGEND
        assert Image.open(picture).size == pytest.approx((width * DPI, height * DPI), abs=1)
        return picture

    return run


def panel(picture: Path, row: int, column: int) -> np.ndarray:
    """The pixels inside of a panel."""
    left, top = LEFT + column * (PANEL + GAP), TITLE + row * (PANEL + CAPTION)
    pixels = np.asarray(Image.open(picture).convert("RGB"))
    rows, columns = (slice(int(start * DPI) + 4, int((start + PANEL) * DPI) - 4) for start in (top, left))
    return pixels[rows, columns].astype(int)


@pytest.mark.slow
def test_the_picture_of_the_readme_is_the_one_of_its_command(drawn):
    picture, committed = drawn(rows=3, columns=6), ROOT / "docs" / "what_the_sub_model_sees.png"
    assert Image.open(committed).size == Image.open(picture).size and committed.stat().st_size < 400_000
    for row, column in product(range(3), range(6)):
        if row < 2 or column < 5:
            assert np.abs(panel(picture, row, column) - panel(committed, row, column)).mean() < 8


def test_ratios_of_one_model_on_images_of_a_folder(drawn, image_folder):
    folder, file = image_folder / "val" / "cat", image_folder / "val" / "dog" / "0.jpg"
    (folder / "2.jpg").unlink()
    arguments = ("--model", "test_resnet", "--augsub", "masking", "--ratio", 0, 0.75, "--images", folder, file)
    picture = drawn(*arguments, rows=3, columns=3)
    for row in range(3):
        main, whole, masked = (panel(picture, row, column) for column in range(3))
        assert np.abs(main - whole).mean() < 1  # columns are not aligned to whole pixels
        assert (np.abs(masked - 127.5).max(axis=-1) < 8).mean() > 0.7  # zero is grey for this model


def test_the_sub_models_of_a_configuration_and_the_seed(drawn):
    arguments = ("--config", "configs/digits_swin.yaml", "model.kwargs.embed_dim=16", "--seed")
    pictures = []
    for seed in (0, 0, 1):
        picture = drawn(*arguments, seed, rows=3, columns=2)
        token = np.abs(panel(picture, 0, 1) - [86, 180, 233]).max(axis=-1) < 8
        assert token.mean() == pytest.approx(0.5, abs=0.03)
        pictures.append(picture.read_bytes())
    assert pictures[0] == pictures[1] != pictures[2]


def test_an_augmentation_as_a_configuration_has_it(drawn):
    arguments = ("--config", "configs/digits_vit.yaml", "model.kwargs.depth=1", "--augsub", "masking")
    picture = drawn(*arguments, "{name: masking, strategy: grid}", rows=3, columns=3)
    at_random, grid = (panel(picture, 0, column).mean(axis=-1) for column in (1, 2))
    shifted = len(grid) // 2  # two patches of four: where a chequerboard is again what it was
    assert (np.abs(grid[shifted:] - grid[:-shifted]) > 20).mean() < (
        np.abs(at_random[shifted:] - at_random[:-shifted]) > 20
    ).mean()


def test_paths_and_activations_have_panels_of_their_own(drawn):
    sub_models = ("--augsub", "masking+drop_path", "dropout", "model.kwargs.depth=2", "--ratio", 0.3)
    picture = drawn("--config", "configs/digits_vit.yaml", *sub_models, rows=3, columns=4)
    for column in (2, 3):
        kept = np.abs(panel(picture, 0, column) - [0, 114, 178]).max(axis=-1) < 8
        assert 0.5 < kept.mean() < 0.9


def test_what_is_missing(drawn):
    """Data, for which stands the bundled image; and what a model does not offer, left open if nobody asked for it."""
    analysis.say_once.cache_clear()  # another test may have heard it
    of_config = ("--config", "resnet50", "model.name=test_resnet", "data.image_size=64")
    drawn(*of_config, rows=1, columns=2, said="data.root = imagenet: no such folder; taken to have 1000 classes")
    assert (panel(drawn("--model", "test_resnet", rows=1, columns=6), 0, 5) == 255).all(axis=-1).mean() > 0.9


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--augsub", "{name: masking"], "--augsub {name: masking: line 2: did not find expected ',' or '}'"),
        (["--augsub", "maskin"], "unknown augmentation 'maskin', did you mean 'masking'?"),
        (["--model", "test_vit", "--augsub", "masking", "--ratio", "0.999"], "leaves none of 100 cells"),
        (["--model", "test_resnet", "--augsub", "dropout"], "dropout has no site in ResNet"),
        (["--images", "nowhere.jpg"], "--images nowhere.jpg: cannot be read: [Errno 2] No such file or directory"),
        (["--images", "README.md"], "--images README.md: cannot be read: cannot identify image file"),
        (["--images", "configs"], "--images configs: the folder holds no image"),
        (["--output", "picture.jpg"], "--output picture.jpg: the name must end in .png"),
        (["--model", "test_resnet", "--augsub", "masking", "--output", "missing/picture.png"], "missing/picture.png"),
        (["--config", "digits_vit", "--ratio", "0.3"], "--ratio: belongs to --augsub"),
        (["--config", "configs/digits_vit.yaml", "augsub.sub_models=[]"], "augsub.sub_models is empty"),
    ],
)
def test_bad_input_ends_in_one_line(arguments, message, visualize):
    code, error, picture = visualize(*arguments)
    assert code == 2 and not picture.exists()
    assert message in error and error.startswith("error: ") and error.count("\n") == 1


def test_of_many_photographs_a_few_are_drawn_evenly_chosen(tmp_path, capsys):
    for number in range(41):
        Image.new("RGB", (8, 8), (number, 0, 0)).save(tmp_path / f"{number}.webp")
    (tmp_path / "notes.txt").write_text("")
    assert [file.name for file in seen_figure.chosen([tmp_path])] == ["0.webp", "20.webp", "40.webp"]
    assert capsys.readouterr().out == "--images: 3 of 41 images are drawn, evenly chosen\n"
    assert seen_figure.chosen([tmp_path / "7.webp"]) == [tmp_path / "7.webp"]
    assert capsys.readouterr().out == ""
