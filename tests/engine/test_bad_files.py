"""Files that cannot be read: replaced in training, left out of evaluation, named, counted, limited; dying workers."""

from __future__ import annotations

import multiprocessing
import os
from collections import Counter
from itertools import chain
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import Dataset

from engine.config import Config
from engine.data import loaders
from engine.data.datasets import build_source
from engine.data.loaders import BadFiles, Batches, DataLoaders, worker_deaths
from engine.data.source import DataSource
from engine.data.stream import IGNORED
from engine.data.transforms import Normalise
from engine.distributed import Process
from engine.errors import InputError, RunError
from engine.evaluation import evaluate
from engine.precision import Precision
from engine.seeding import derive_seed, preserved_generators, seed_cpu

CPU = torch.device("cpu")
ALONE = Process(0, 1, CPU)
IMAGES = 24


def path_of(root: Path, index: int, split: str = "train") -> Path:
    return sorted((root / split).glob("*/*.jpg"))[index]


def spoil(path: Path, kind: str = "truncated") -> None:
    if kind == "vanished":
        path.unlink()
        path.symlink_to(path.with_name("nowhere"))
    elif kind == "no permission":
        path.chmod(0)
    else:
        path.write_bytes({"truncated": path.read_bytes()[:-500], "empty": b"", "text": b"404 not found"}[kind])


def train_batches(config: Config) -> list[tuple[Tensor, Tensor]]:
    return list(DataLoaders(config, build_source(config), ALONE).train_from(0))


REASONS = {
    "vanished": "No such file or directory",
    "no permission": "Permission denied",
    "truncated": "image file is truncated",
    "empty": "not an image that Pillow knows",
    "text": "not an image that Pillow knows",
}


@pytest.mark.parametrize("kind", REASONS)
@pytest.mark.parametrize("split", ["train", "val"])
def test_a_bad_file_ends_the_run_unless_it_is_allowed(image_folder, folder_config, kind, split, caplog):
    if kind == "no permission" and os.geteuid() == 0:
        pytest.skip("root may read everything")
    path = path_of(image_folder, 3, split)
    spoil(path, kind)

    def load(allowed: int) -> None:
        data = DataLoaders(config := folder_config(image_folder, bad_files=allowed), build_source(config), ALONE)
        list(data.train_from(0) if split == "train" else data.held_out)

    with pytest.raises(InputError) as error:
        load(allowed=0)
    message = str(error.value)
    assert message.startswith(f"data.bad_files = 0: {path} cannot be read: ") and REASONS[kind] in message
    assert message.endswith("with data.bad_files=1 or more") and "\n" not in message and not caplog.messages
    load(allowed=1)  # three epochs, one line
    (line,) = caplog.messages
    assert line.startswith(f"bad file 1 of 1 allowed (data.bad_files): {path}: ") and REASONS[kind] in line


def test_a_bad_file_is_replaced_by_the_next_readable_one_under_the_same_seed(image_folder, folder_config):
    config = folder_config(image_folder, bad_files=3)
    whole = [pair for batch in train_batches(config) for pair in zip(*batch, strict=True)]
    images, normalise = build_source(config).train, Normalise(config.transform.mean, config.transform.std)
    replacement = {3: 5, 4: 5, IMAGES - 1: 0}
    expected = []
    with preserved_generators():
        for epoch in range(3):
            shuffled = torch.randperm(IMAGES, generator=torch.Generator().manual_seed(derive_seed(0, epoch)))
            for position, index in enumerate(shuffled.tolist()):
                seed_cpu(derive_seed(0, epoch, position))
                expected.append((index, *images[replacement.get(index, index)]))
    for index in replacement:
        spoil(path_of(image_folder, index))
    batches = train_batches(config)
    assert [len(labels) for _, labels in batches] == [8] * 9
    found = [pair for batch in batches for pair in zip(*batch, strict=True)]
    for (index, image, label), (new_image, new_label), (old_image, _) in zip(expected, found, whole, strict=True):
        assert torch.equal(new_image, normalise(image)) and new_label == label
        assert torch.equal(new_image, old_image) == (index not in replacement)


def test_if_nothing_can_be_read_there_is_one_line_and_no_endless_search(image_folder, folder_config):
    for path in image_folder.glob("*/*/*.jpg"):
        spoil(path, "empty")
    config = folder_config(image_folder, bad_files=100)
    with pytest.raises(InputError, match="none of the training images can be read"):
        train_batches(config)
    with pytest.raises(InputError, match="none of the held-out images can be read"):
        evaluate(
            nn.Flatten(), Batches(config, build_source(config), ALONE, BadFiles(100)), Precision("off", CPU), ALONE
        )


@pytest.mark.parametrize("world_size", [1, 2, 3, 11])
@pytest.mark.parametrize("bad", [(), (2, 6)])
def test_each_readable_held_out_image_is_counted_once_in_shares_of_equal_length(
    image_folder, folder_config, world_size, bad
):
    config = folder_config(image_folder, bad_files=2)
    source, normalise = build_source(config), Normalise(config.transform.mean, config.transform.std)
    readable = [source.held_out[index] for index in range(9) if index not in bad]
    for index in bad:
        spoil(path_of(image_folder, index, "val"))
    processes = [Process(rank, world_size, CPU) for rank in range(world_size)]
    shares = [list(Batches(config, source, process, BadFiles(2))) for process in processes]
    (shapes,) = {tuple(images.shape for images, _ in share) for share in shares}
    assert sum(shape[0] for shape in shapes) == -(-9 // world_size)
    images, labels = (torch.cat(parts) for parts in zip(*chain(*shares), strict=True))
    black = normalise(torch.zeros(3, 16, 16, dtype=torch.uint8))
    assert all(torch.equal(image, black) for image in images[labels == IGNORED])
    expected = Counter((float(normalise(image).double().sum()), label) for image, label in readable)
    pairs = zip(images, labels.tolist(), strict=True)
    assert Counter((float(image.double().sum()), label) for image, label in pairs if label >= 0) == expected


def test_images_that_another_library_opens_are_named_by_their_index(image_folder, folder_config):
    spoil(path_of(image_folder, 4))
    config = folder_config(image_folder / "train", dataset="torch/image_folder", bad_files=1)
    data = DataLoaders(config, build_source(config), ALONE)
    assert sum(len(labels) for _, labels in data.train_from(0)) == 3 * IMAGES
    assert data.bad_files.state_dict()["reasons"].keys() == {"training image 4"}


def test_a_resumed_count_goes_on_and_forgives_what_was_repaired(caplog):
    first, resumed, stricter = BadFiles(allowed=2), BadFiles(allowed=2), BadFiles(allowed=0)
    first.record([("a", "x"), ("b", "y"), ("a", "x")])
    assert len(first) == len(caplog.messages) == 2
    caplog.clear()
    resumed.load_state_dict(first.state_dict())
    resumed.record([("b", "y")])
    assert len(resumed) == 2 and not caplog.messages
    with pytest.raises(InputError, match=r"data.bad_files = 2: c cannot be read: z; bad file number 3"):
        resumed.record([("c", "z")])
    stricter.load_state_dict(first.state_dict())
    stricter.record([])  # both were repaired
    with pytest.raises(InputError, match=r"data.bad_files = 0: a cannot be read"):
        stricter.record([("a", "x")])
    caplog.clear()
    BadFiles(allowed=1, logs=False).record([("a", "x")])  # of another process than the main one
    assert not caplog.messages


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("error", [OSError, ValueError, FileNotFoundError, EOFError, RuntimeError])
def test_an_error_of_a_transform_is_not_laid_on_the_file(image_folder, folder_config, error, workers, monkeypatch):
    def broken_transform(image: Image.Image) -> None:
        raise error("the overlay of this transform is missing")

    monkeypatch.setattr(loaders, "PATIENCE", 0.01)
    config = folder_config(image_folder, bad_files=5)
    config.data.workers, source = workers, build_source(config)
    source.train._transform = broken_transform
    with pytest.raises(error, match="the overlay of this transform is missing"), worker_deaths(workers):
        list(DataLoaders(config, source, ALONE).train_from(0))


class Dying(Dataset):
    """Sixteen images; the process that reads the fifteenth ends."""

    def __len__(self) -> int:
        return 16

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return torch.tensor(index) if index != 14 else os._exit(7), index


def test_a_worker_that_crashes_ends_in_one_line_and_closing_ends_the_others(folder_config):
    config = folder_config("nowhere", dataset="digits")
    config.data.workers, config.evaluation.batch = 2, 2
    source = DataSource(train=None, held_out=Dying(), num_classes=2, in_chans=3)
    started = iter(Batches(config, source, ALONE, BadFiles(0)))
    next(started)  # two workers, which heed no signal
    assert len(multiprocessing.active_children()) == 2
    started.close()
    assert not multiprocessing.active_children()
    with pytest.raises(RunError) as error, worker_deaths(2):
        list(Batches(config, source, ALONE, BadFiles(0)))
    message = str(error.value)
    assert message.startswith("a data loading worker died: DataLoader worker (pid") and "\n" not in message
    assert message.endswith("lower data.workers (now 2) or train.micro_batch")
    assert not multiprocessing.active_children()


@pytest.mark.parametrize("allowed", [3, 2])
def test_processes_unite_what_they_found(allowed):
    """Each of two processes knows a file of its own and one that both know."""
    known = [{"both": "x", f"{rank}.jpg": f"y{rank}"} for rank in range(2)]

    class Gathering(Process):
        def gather(self, value):
            return known

    for rank in range(2):
        bad_files = BadFiles(allowed)
        bad_files.load_state_dict({"reasons": known[rank]})
        if allowed == 3:
            bad_files.unite(Gathering(rank, 2, CPU))
            assert bad_files.state_dict()["reasons"] == {"both": "x", "0.jpg": "y0", "1.jpg": "y1"}
        else:
            with pytest.raises(InputError, match=rf"data.bad_files = 2: {1 - rank}.jpg cannot be read: y{1 - rank}"):
                bad_files.unite(Gathering(rank, 2, CPU))
