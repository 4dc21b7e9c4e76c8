"""The order of images, how they are divided and delivered; unreadable files: replaced, left out, named, limited."""

from __future__ import annotations

import multiprocessing
import os
import random
import shutil
import time
from collections import Counter
from contextlib import closing
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits
from timm.data import auto_augment
from torch import Tensor, nn
from torch.utils.data import Dataset
from torchvision.transforms import Normalize, ToTensor
from torchvision.transforms.functional import to_pil_image

from engine.config import Config, TrainConfig, TransformConfig
from engine.data import loaders
from engine.data.images import IGNORED
from engine.data.loaders import BadFiles, Batches, DataLoaders, accumulation_for, batch_for, worker_deaths
from engine.data.source import DataSource, build_digits, build_source
from engine.data.stream import TrainingOrder, sampling_weights
from engine.data.transforms import Delivery, Normalise, build_transform
from engine.distributed import Process
from engine.errors import InputError, RunError
from engine.evaluation.metrics import evaluate
from engine.precision import Precision
from engine.seeding import derive_seed, preserved_generators, seed_cpu

CPU = torch.device("cpu")
ALONE = Process(0, 1, CPU)
IMAGES = 24  # for training in the folder


def order(**changes) -> TrainingOrder:
    settings = {"num_samples": 20, "repeats": 1, "micro_batch": 2, "accumulation": 1}
    settings |= {"rank": 0, "world_size": 1, "seed": 3}
    return TrainingOrder(**{**settings, "first_iteration": 0, "last_iteration": 25, **changes})


def digits(**train) -> Config:
    config = Config()
    config.data.dataset, config.data.image_size, config.data.workers = "digits", 8, 0
    vars(config.train).update(train)
    return config


def test_each_epoch_is_another_permutation_and_goes_on_where_it_stopped():
    batches = list(order())
    epochs = [[key.index for batch in batches[start : start + 10] for key in batch] for start in (0, 10)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(20)) and epochs[0] != epochs[1]
    assert len({key.seed for batch in batches for key in batch}) == 50
    assert list(order(first_iteration=13)) == batches[13:]


def micro_batches(world_size: int, accumulation: int, images: int, **changes) -> list[list]:
    """All processes' micro-batches, as many in a row as make a global batch of that many images."""
    shape = {"micro_batch": images // world_size // accumulation, "world_size": world_size}
    processes = [list(order(**shape, accumulation=accumulation, **changes, rank=rank)) for rank in range(world_size)]
    return [batch for side_by_side in zip(*processes, strict=True) for batch in side_by_side]


@pytest.mark.parametrize(("world_size", "accumulation"), [(2, 1), (1, 2), (2, 2), (4, 1)])
@pytest.mark.parametrize("repeats", [1, 3])
def test_processes_and_micro_batches_divide_the_same_global_batches(world_size, accumulation, repeats):
    whole = list(order(micro_batch=4, num_samples=22, repeats=repeats))
    parts = micro_batches(world_size, accumulation, images=4, num_samples=22, repeats=repeats)
    count = world_size * accumulation
    joined = [chain(*parts[start : start + count]) for start in range(0, len(parts), count)]
    assert [sorted(batch) for batch in joined] == [sorted(batch) for batch in whole]
    assert parts == micro_batches(1, count, images=4, num_samples=22, repeats=repeats)


def test_repeated_images_fill_an_epoch_of_the_same_length_in_different_micro_batches():
    batches = micro_batches(4, 1, images=12, num_samples=50, repeats=3, last_iteration=4)
    drawn = [key.index for batch in batches for key in batch]
    assert len(drawn) == 48 and len(set(drawn)) == 16
    assert all(drawn.count(index) == 3 for index in drawn)
    assert all(len({key.index for key in batch}) == len(batch) for batch in batches)
    assert len({key.seed for batch in batches for key in batch}) == 48  # each copy has its own transform


@pytest.mark.parametrize(("sampling", "expected"), [("balanced", [1, 1, 1]), ("sqrt", [9.49, 3.16, 31.6])])
def test_classes_are_drawn_by_a_power_of_their_size_in_an_order_of_their_own(sampling, expected):
    """Of 90, 10 and 1000 images."""
    labels = np.random.default_rng(0).permutation(np.repeat([0, 1, 2], [90, 10, 1000]))
    changes = {"weights": sampling_weights(labels, sampling), "num_samples": len(labels), "micro_batch": 50}
    batches = list(order(**changes, last_iteration=220))  # ten epochs
    counts = np.bincount(labels[[key.index for batch in batches for key in batch]])
    np.testing.assert_allclose(counts / 11_000, np.divide(expected, sum(expected)), atol=0.015)
    assert list(order(**changes, first_iteration=137, last_iteration=220)) == batches[137:]
    assert batches != list(order(**changes, last_iteration=220, seed=4))
    whole = list(order(**{**changes, "micro_batch": 4}))
    parts = micro_batches(2, 1, images=4, weights=changes["weights"], num_samples=len(labels))
    joined = [sorted(chain(*parts[start : start + 2])) for start in range(0, len(parts), 2)]
    assert joined == [sorted(batch) for batch in whole]


class RandomItems(Dataset):
    """Draws from every global generator, as transforms do."""

    def __len__(self) -> int:
        return 20

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return torch.tensor([random.random(), np.random.rand(), torch.rand(()).item()]), index


def test_samples_do_not_depend_on_workers_and_leave_the_process_generators_alone():
    source, config = DataSource(RandomItems(), RandomItems(), 2, 3), digits(global_batch=4, epochs=3)
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    state = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()
    data = DataLoaders(config, source, ALONE)
    alone = torch.cat([values for values, _ in data.train_from(0)])
    list(data.held_out)
    assert random.getstate() == state[0]
    assert (np.random.get_state()[1] == state[1]).all() and torch.equal(torch.get_rng_state(), state[2])
    config.data.workers = 2
    assert torch.equal(alone, torch.cat([values for values, _ in DataLoaders(config, source, ALONE).train_from(0)]))
    assert len(alone[:, 0].unique()) == len(alone) == 60


def test_digits_have_a_fixed_split_of_real_images():
    source = build_digits(8)
    assert (len(source.train), len(source.held_out), source.num_classes, source.in_chans) == (1000, 797, 10, 1)
    (train, train_labels), (held_out, held_out_labels) = source.train.tensors, source.held_out.tensors
    images = torch.cat([train, held_out]).flatten(1)
    pixels = ((images - images.min()) / (images.max() - images.min()) * 16).round()
    original, found = load_digits(), zip(pixels.tolist(), torch.cat([train_labels, held_out_labels]), strict=True)
    assert sorted(found) == sorted(zip(original.data.tolist(), original.target.tolist(), strict=True))
    assert torch.equal(build_digits(8).train.tensors[0], train)
    assert abs(train.mean()) < 1e-5 and abs(train.std() - 1) < 1e-3
    assert build_digits(32).train[0][0].shape == (1, 32, 32)


@pytest.mark.parametrize(
    ("train", "world_size", "message"),
    [
        ({"global_batch": 2000}, 1, "train.global_batch = 2000: more than the 1000 training images"),
        ({"global_batch": 100}, 3, "train.global_batch = 100: does not divide into 3 processes"),
        ({"global_batch": 96, "accumulation": 5}, 8, r"= 5: 12 images .* allowed is any of \[1, 2, 3, 4, 6, 12\]"),
    ],
)
def test_a_batch_that_does_not_fit_is_refused(train, world_size, message):
    with pytest.raises(InputError, match=message):
        DataLoaders(config := digits(**train), build_source(config), Process(0, world_size, CPU))


def test_examples_are_spread_over_the_held_out_images():
    held_out, whole = Batches(digits(), build_digits(8), ALONE, BadFiles(0)), build_digits(8).held_out.tensors[0]
    assert torch.equal(held_out.examples(8), whole[[0, 100, 200, 300, 400, 500, 600, 700]])
    assert torch.equal(held_out.examples(1000), whole)


@pytest.mark.parametrize(
    ("global_batch", "world_size", "micro_batch", "accumulation"),
    [(2048, 8, 256, 1), (2048, 2, 256, 4), (96, 2, 10, 6), (6, 1, 256, 1), (96, 2, None, 1)],
)
def test_accumulation_follows_from_the_batch_and_the_processes(global_batch, world_size, micro_batch, accumulation):
    """96 images make 48 a process: 8 at once, not 10."""
    settings = TrainConfig(global_batch=global_batch, micro_batch=micro_batch)
    assert accumulation_for(settings, world_size) == accumulation
    settings.accumulation = 2 * accumulation
    assert accumulation_for(settings, world_size) == 2 * accumulation


def test_a_batch_that_follows_from_the_data():
    cases = {
        (1, 1): 1,
        (5, 1): 4,
        (72, 1): 8,
        (300, 1): 16,
        (1024, 1): 64,
        (10**6, 1): 64,
        (100, 3): 24,
        (10**6, 8): 512,
    }
    assert {case: batch_for(*case) for case in cases} == cases


@pytest.mark.parametrize("policy", ["rand-m10-inc1", "original", "augmix-m10"])
def test_no_bits_of_a_pixel_are_black(policy):
    """RandAugment asks for them at the magnitude 10, which Pillow 13 refuses; timm's own table stays as it is."""
    parts = build_transform(Config(transform=TransformConfig(auto_augment=policy)), is_training=True).transforms
    policies = [*(getattr(part, "ops", ()) for part in parts), *chain(*(getattr(part, "policy", ()) for part in parts))]
    posterizing = [op for op in chain(*policies) if op.name.startswith("Posterize")]
    pixels = np.arange(192, dtype=np.uint8).reshape(8, 8, 3)
    for bits, mask in ((0, 0), (2, 0b11000000), (8, 0b11111111)):
        for op in posterizing:
            assert (np.asarray(op.aug_fn(Image.fromarray(pixels), bits)) == pixels & mask).all()
    assert posterizing and all(op.aug_fn is not auto_augment.NAME_TO_OP[op.name] for op in posterizing)


LABELS = torch.arange(16)
EVERY_BYTE = torch.arange(256, dtype=torch.uint8).view(16, 16).expand(16, 3, 16, 16)  # each value in each channel


def delivered(is_training: bool = True, channels_last: bool = False, **transform) -> Tensor:
    config = Config()
    vars(config.transform).update(transform)
    config.train.channels_last = channels_last
    images, labels = Delivery(config, CPU, is_training)(EVERY_BYTE.contiguous(), LABELS)
    assert torch.equal(labels, LABELS)
    return images


def test_bytes_become_what_torchvision_makes_of_them_to_the_bit_and_floats_are_ready_already():
    mean, std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    expected = Normalize(mean, std)(ToTensor()(to_pil_image(EVERY_BYTE[0]))).expand(16, 3, 16, 16)
    assert torch.equal(delivered(mean=mean, std=std), expected)
    last = delivered(mean=mean, std=std, channels_last=True)
    assert torch.equal(last, expected) and last.is_contiguous(memory_format=torch.channels_last)
    config, images = digits(), torch.randn(16, 1, 8, 8)
    config.transform.random_erase = 1.0
    assert torch.equal(Delivery(config, CPU, is_training=True)(images.clone(), LABELS)[0], images)


def test_rectangles_are_erased_from_normalised_training_images_alone_and_follow_the_seed():
    def erased(seed: int, is_training: bool = True, **transform) -> Tensor:
        random.seed(seed), torch.manual_seed(seed)
        return delivered(is_training, **transform)

    plain = delivered()
    every = erased(0, random_erase=1.0, erase_mode="const", erase_area=[0.25, 0.25], erase_aspect=[1, 1.0001])
    changed = (every != plain).any(dim=1)
    assert (every[:, 0][changed] == 0).all()  # the mean colour
    assert changed.flatten(1).sum(dim=1).tolist() == [64] * 16  # a quarter of 16 x 16 pixels
    assert len(changed.flatten(1).unique(dim=0)) > 1
    assert torch.equal(erased(0, is_training=False, random_erase=1.0), plain)
    assert torch.equal(erased(1, random_erase=0.5), erased(1, random_erase=0.5))
    assert 0 < (erased(1, random_erase=0.5) == plain).flatten(1).all(dim=1).sum() < 16


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


@pytest.mark.parametrize("workers", [0, 2])
def test_images_kept_in_memory_are_the_same_bits_and_are_decoded_once(image_folder, folder_config, workers):
    Image.new("L", (37, 21), 90).save(image_folder / "train" / "cat" / "grey.png")  # another size and mode
    expected = train_batches(folder_config(image_folder))
    config = folder_config(image_folder, cache="ram")
    config.data.workers = workers
    data = DataLoaders(config, build_source(config), ALONE)
    training = data.train_from(0)
    found, held_out = [next(training)], list(data.held_out)
    shutil.rmtree(image_folder)
    found += training
    assert len(found) == len(expected) and len(held_out) == len(list(data.held_out))
    for (images, labels), (others, other_labels) in zip(found, expected, strict=True):
        assert torch.equal(images, others) and torch.equal(labels, other_labels)


def test_images_that_would_fill_the_memory_are_not_kept(image_folder, folder_config, monkeypatch):
    monkeypatch.setattr(os, "sysconf", lambda name: {"SC_PHYS_PAGES": 300, "SC_PAGE_SIZE": 4096}[name])
    with pytest.raises(InputError, match=r"data.cache = ram: the training images: 24 of them need about 0.346 MB"):
        train_batches(folder_config(image_folder, cache="ram"))
    monkeypatch.setattr(os, "sysconf", lambda name: {"SC_PHYS_PAGES": 600, "SC_PAGE_SIZE": 4096}[name])
    assert train_batches(folder_config(image_folder, cache="ram"))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(InputError, match=r"need about 0.346 MB times 2 processes, a quarter of this machine's memory"):
        train_batches(folder_config(image_folder, cache="ram"))


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

    def load(allowed: int, **keys: object) -> None:
        config = folder_config(image_folder, bad_files=allowed, **keys)
        data = DataLoaders(config, build_source(config), ALONE)
        list(data.train_from(0) if split == "train" else data.held_out)

    with pytest.raises(InputError) as error:
        load(allowed=0)
    message = str(error.value)
    assert message.startswith(f"data.bad_files = 0: {path} cannot be read: ") and REASONS[kind] in message
    assert message.endswith("with data.bad_files=1 or more") and "\n" not in message and not caplog.messages
    load(allowed=1)  # three epochs, one line
    (line,) = caplog.messages
    assert line.startswith(f"bad file 1 of 1 allowed (data.bad_files): {path}: ") and REASONS[kind] in line
    load(allowed=1, cache="ram")
    assert caplog.messages == [line, line]


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
    """Sixteen images; the process that reads the thirteenth hangs, that of the fifteenth ends."""

    def __len__(self) -> int:
        return 16

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        if index == 12:
            time.sleep(60)
        return torch.tensor(index) if index != 14 else os._exit(7), index


def test_a_worker_that_crashes_ends_in_one_line_and_closing_ends_the_others():
    config = digits()
    config.data.workers, config.evaluation.batch = 2, 2
    source = DataSource(train=None, held_out=Dying(), num_classes=2, in_chans=3)
    with closing(iter(Batches(config, source, ALONE, BadFiles(0)))) as started:
        next(started), next(started)  # of either worker; they heed no signal
        workers = multiprocessing.active_children()
        for worker in workers:
            worker.terminate()
            worker.join(timeout=0.2)
        assert len(workers) == 2 and all(worker.is_alive() for worker in workers)
    assert not multiprocessing.active_children()
    with pytest.raises(RunError) as error, worker_deaths(2):
        list(Batches(config, source, ALONE, BadFiles(0)))
    message = str(error.value)
    assert message.startswith("a data loading worker died: DataLoader worker (pid") and "\n" not in message
    assert message.endswith("lower data.workers (now 2) or train.micro_batch")
    for worker in multiprocessing.active_children():  # the one that hangs is ended too
        worker.join(timeout=5)
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
