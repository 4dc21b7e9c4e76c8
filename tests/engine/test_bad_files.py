"""Files that cannot be read: replaced in training, left out of evaluation, named, counted, limited."""

from __future__ import annotations

import logging
import multiprocessing
import os
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from PIL import Image
from torch import nn
from torch.nn import functional as F

from engine.config import Config, DataConfig, TransformConfig
from engine.data.datasets import build_images
from engine.data.loaders import BadFiles, build_held_out, build_loaders
from engine.data.stream import IGNORED
from engine.data.transforms import Normalise
from engine.distributed import Process
from engine.errors import InputError
from engine.evaluation import evaluate
from engine.precision import Precision
from engine.seeding import derive_seed, preserved_generators, seed_cpu

CPU = torch.device("cpu")
NORMALISE = Normalise(TransformConfig().mean, TransformConfig().std)
ALONE = Process(rank=0, world_size=1, device=CPU)
CLASSES, TRAIN_IMAGES, HELD_OUT_IMAGES = ("cat", "dog"), 12, 7


@pytest.fixture
def root(tmp_path) -> Path:
    """12 training and 7 held-out images; files are 0.jpg, 1.jpg … in the order of their index."""
    rng = np.random.default_rng(0)
    for split, count in (("train", TRAIN_IMAGES), ("val", HELD_OUT_IMAGES)):
        for index in range(count):
            folder = tmp_path / split / CLASSES[index >= count // 2]
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 256, (24, 28, 3), dtype=np.uint8)).save(folder / f"{index}.jpg")
    return tmp_path


def path_of(root: Path, index: int, split: str = "train") -> Path:
    (path,) = (root / split).glob(f"*/{index}.jpg")
    return path


def configuration(root: Path, **data) -> Config:
    config = Config()
    settings = {"root": str(root), "image_size": 16, "workers": 0, **data}
    config.data = DataConfig(**settings)
    config.transform = TransformConfig(auto_augment="rand-m9-mstd0.5-inc1")
    config.train.global_batch, config.train.epochs, config.evaluation.batch = 4, 3, 4
    return config


def loaders(config: Config, process: Process = ALONE):
    return build_loaders(config, build_images(config.data, config.transform), process)


def spoil_by(kind: str, path: Path) -> None:
    if kind == "vanished":
        path.unlink()
        path.symlink_to(path.with_name("nowhere"))
    elif kind == "no permission":
        path.chmod(0)
    elif kind == "truncated":
        path.write_bytes(path.read_bytes()[:-100])
    else:
        path.write_bytes({"empty": b"", "text": b"404 not found"}[kind])


REASONS = {
    "vanished": "No such file or directory",
    "no permission": "Permission denied",
    "truncated": "image file is truncated",
    "empty": "the file is empty",
    "text": "not an image that Pillow knows",
}


@pytest.mark.parametrize("kind", REASONS)
@pytest.mark.parametrize("split", ["train", "val"])
def test_a_bad_file_ends_the_run_unless_it_is_allowed(root, kind, split, caplog):
    if kind == "no permission" and os.geteuid() == 0:
        pytest.skip("root may read everything")
    path = path_of(root, 3, split)
    spoil_by(kind, path)

    def all_batches(allowed: int) -> list:
        data = loaders(configuration(root, bad_files=allowed))
        return list(data.train_from(0)) if split == "train" else list(data.held_out)

    with pytest.raises(InputError) as error:
        all_batches(allowed=0)
    assert str(error.value).startswith(f"data.bad_files = 0: {path} cannot be read: {REASONS[kind]}")
    assert "\n" not in str(error.value) and not caplog.messages
    all_batches(allowed=1)  # three epochs, one line
    (message,) = caplog.messages
    assert message.startswith(f"bad file 1 of 1 allowed (data.bad_files): {path}: {REASONS[kind]}")


def test_one_more_than_allowed_ends_the_run(root, caplog):
    for index in (3, 5, 9):
        spoil_by("empty", path_of(root, index))
    assert len(list(loaders(configuration(root, bad_files=3)).train_from(0))) == 9
    assert len(caplog.messages) == 3
    with pytest.raises(InputError, match=r"data.bad_files = 2: .* bad file number 3: .* with data.bad_files=3 or more"):
        list(loaders(configuration(root, bad_files=2)).train_from(0))


def test_a_bad_file_is_replaced_by_the_next_readable_one_under_the_same_seed(root):
    config = configuration(root, bad_files=3)
    whole = [tensor for batch in loaders(config).train_from(0) for tensor in zip(*batch, strict=True)]
    source = build_images(config.data, config.transform).train
    replacement = {3: 5, 4: 5, 11: 0}
    with preserved_generators():
        expected = []
        for epoch in range(3):
            shuffled = torch.randperm(TRAIN_IMAGES, generator=torch.Generator().manual_seed(derive_seed(0, epoch)))
            for position, index in enumerate(shuffled.tolist()):
                seed_cpu(derive_seed(0, epoch, position))
                expected.append((index, *source[replacement.get(index, index)]))
    for index in replacement:
        spoil_by("truncated", path_of(root, index))
    batches = list(loaders(config).train_from(0))
    assert [len(labels) for _, labels in batches] == [4] * 9
    found = [tensor for batch in batches for tensor in zip(*batch, strict=True)]
    for (index, image, label), (new_image, new_label), (old_image, _) in zip(expected, found, whole, strict=True):
        assert torch.equal(new_image, NORMALISE(image)) and new_label == label
        assert torch.equal(new_image, old_image) == (index not in replacement)


def test_the_stream_depends_neither_on_workers_nor_on_processes_nor_on_resuming(root):
    for index in (0, 6, 7):
        spoil_by("text", path_of(root, index))
    alone = list(loaders(configuration(root, bad_files=3)).train_from(0))
    with_workers = list(loaders(configuration(root, bad_files=3, workers=2)).train_from(0))
    resumed = list(loaders(configuration(root, bad_files=3)).train_from(4))
    for (images, labels), (same_images, same_labels) in zip(alone + alone[4:], with_workers + resumed, strict=True):
        assert torch.equal(images, same_images) and torch.equal(labels, same_labels)
    processes = [Process(rank=rank, world_size=2, device=CPU) for rank in range(2)]
    shares = [loaders(configuration(root, bad_files=3), process).train_from(0) for process in processes]
    for (images, _), first, second in zip(alone, *shares, strict=True):
        for rank, (half, _) in enumerate((first, second)):
            assert torch.equal(half, images[rank::2])


def test_if_nothing_can_be_read_there_is_one_line_and_no_endless_search(root):
    for index in range(TRAIN_IMAGES):
        spoil_by("empty", path_of(root, index))
    with pytest.raises(InputError, match="no training image can be read in place of "):
        list(loaders(configuration(root, bad_files=100)).train_from(0))
    for index in range(HELD_OUT_IMAGES):
        spoil_by("empty", path_of(root, index, "val"))
    held_out = loaders(configuration(root, bad_files=100)).held_out
    with pytest.raises(InputError, match="none of the held-out images can be read"):
        evaluate(nn.Sequential(nn.Flatten(), nn.Linear(768, 2)), held_out, Precision("off", CPU, None), ALONE)


@pytest.mark.parametrize("world_size", [1, 2, 3, 9])
@pytest.mark.parametrize("bad", [(), (0,), (2, 6)])
def test_each_readable_held_out_image_is_counted_once_in_shares_of_equal_length(root, world_size, bad):
    config = configuration(root, bad_files=2)
    source = build_images(config.data, config.transform)
    readable = [source.held_out[index] for index in range(HELD_OUT_IMAGES) if index not in bad]
    for index in bad:
        spoil_by("truncated", path_of(root, index, "val"))
    shares = []
    for rank in range(world_size):
        process = Process(rank=rank, world_size=world_size, device=CPU)
        shares.append(list(build_held_out(config, source, process)))
    shapes = {tuple(images.shape for images, _ in share) for share in shares}
    assert len(shapes) == 1 and sum(shape[0] for shape in shapes.pop()) == -(-HELD_OUT_IMAGES // world_size)
    images = torch.cat([images for share in shares for images, _ in share])
    labels = torch.cat([labels for share in shares for _, labels in share])
    black = NORMALISE(torch.zeros(3, 16, 16, dtype=torch.uint8))
    assert all(torch.equal(image, black) for image in images[labels == IGNORED])
    key = [(float(NORMALISE(image).double().sum()), int(label)) for image, label in readable]
    assert sorted(key) == sorted(
        (float(image.double().sum()), int(label)) for image, label in zip(images, labels, strict=True) if label >= 0
    )


def test_what_is_ignored_changes_no_figure(root):
    config = configuration(root, bad_files=2)
    source = build_images(config.data, config.transform)
    images, labels = zip(*[source.held_out[index] for index in (0, 1, 3, 4, 6)], strict=True)
    images, labels = NORMALISE(torch.stack(images)), torch.tensor(labels)
    for index in (2, 5):
        spoil_by("empty", path_of(root, index, "val"))
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(768, 6))
    found = evaluate(model, build_held_out(config, source, ALONE), Precision("off", CPU, None), ALONE)
    logits = model(images).detach()
    assert found["images"] == 5
    assert found["top1"] == pytest.approx(100 * float((logits.argmax(1) == labels).double().mean()))
    in_top5 = (logits >= logits.topk(5).values[:, -1:]).gather(1, labels[:, None])
    assert found["top5"] == pytest.approx(100 * float(in_top5.double().mean()))
    assert found["eval_loss"] == pytest.approx(float(F.cross_entropy(logits, labels)), rel=1e-5)


def test_images_that_another_library_opens_are_named_by_their_index(root):
    spoil_by("text", path_of(root, 4))
    config = configuration(root / "train", dataset="torch/image_folder", bad_files=1)
    data = loaders(config)
    assert sum(len(labels) for _, labels in data.train_from(0)) == 36
    folder = build_images(config.data, config.transform).train
    assert len(folder) == TRAIN_IMAGES
    (name,) = data.bad_files.state_dict()["reasons"]
    (index,) = [i for i in range(12) if name == f"training image {i}"]  # torchvision sorts 10.jpg before 2.jpg
    with pytest.raises(InputError, match=f"{name} cannot be read: cannot identify image file"):
        list(loaders(configuration(root / "train", dataset="torch/image_folder")).train_from(0))
    assert sorted(str(path) for path in (root / "train").glob("*/*.jpg"))[index] == str(path_of(root, 4))


def test_a_resumed_count_goes_on_and_forgives_what_was_repaired(caplog):
    first = BadFiles(allowed=2)
    first.record([("a", "x"), ("b", "y"), ("a", "x")])
    resumed = BadFiles(allowed=2)
    resumed.load_state_dict(first.state_dict())
    caplog.clear()
    resumed.record([("b", "y")])
    assert len(resumed) == 2 and not caplog.messages
    with pytest.raises(InputError, match=r"data.bad_files = 2: c cannot be read: z; bad file number 3"):
        resumed.record([("c", "z")])
    stricter = BadFiles(allowed=0)
    stricter.load_state_dict(first.state_dict())
    stricter.record([])  # both were repaired
    with pytest.raises(InputError, match=r"data.bad_files = 0: a cannot be read"):
        stricter.record([("a", "x")])


def test_only_the_main_process_logs(caplog):
    BadFiles(allowed=1, logs=False).record([("a", "x")])
    assert not caplog.messages
    with caplog.at_level(logging.WARNING, "engine"):
        BadFiles(allowed=1).record([("a", "x")])
    assert caplog.messages == ["bad file 1 of 1 allowed (data.bad_files): a: x"]


@pytest.mark.parametrize("error", [OSError, ValueError])
def test_an_error_of_a_transform_is_not_laid_on_the_file(root, error):
    def broken_transform(image: Image.Image) -> None:
        raise error("the overlay of this transform is missing")

    config = configuration(root, bad_files=5)
    source = build_images(config.data, config.transform)
    source.train._transform = broken_transform
    with pytest.raises(error, match="the overlay of this transform is missing"):
        list(build_loaders(config, source, ALONE).train_from(0))


def united(rank: int, store: Path, allowed: int, answers: multiprocessing.Queue) -> None:
    """One of two processes, each of which knows a file of its own and one that both know."""
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    bad_files = BadFiles(allowed=allowed)
    bad_files.load_state_dict({"reasons": {"both": "x", f"{rank}.jpg": f"y{rank}"}})
    try:
        bad_files.unite(Process(rank=rank, world_size=2, device=CPU))
        answers.put((rank, bad_files.state_dict()["reasons"]))
    except InputError as error:
        answers.put((rank, str(error)))
    dist.destroy_process_group()


@pytest.mark.parametrize("allowed", [3, 2])
def test_processes_unite_what_they_found(tmp_path, allowed):
    context = multiprocessing.get_context("fork")
    answers = context.Queue()
    processes = [context.Process(target=united, args=(rank, tmp_path / "store", allowed, answers)) for rank in (0, 1)]
    for process in processes:
        process.start()
    found = dict(answers.get(timeout=60) for _ in processes)
    for process in processes:
        process.join()
    if allowed == 3:
        assert found[0] == found[1] == {"both": "x", "0.jpg": "y0", "1.jpg": "y1"}
    else:
        assert all(f"data.bad_files = 2: {1 - rank}.jpg cannot be read: y{1 - rank}" in found[rank] for rank in (0, 1))
