from __future__ import annotations

import random
from itertools import chain
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits
from timm.data import create_transform
from torch.utils.data import DataLoader, Dataset

from engine.config import Config, TrainConfig, TransformConfig
from engine.data.datasets import build_source
from engine.data.loaders import accumulation_for, batch_for, build_held_out, build_loaders
from engine.data.source import build_digits
from engine.data.stream import IGNORED, SeededDataset, TrainingOrder
from engine.data.transforms import build_eval_transform, build_train_transform
from engine.errors import InputError


def order(**changes) -> TrainingOrder:
    settings = {"num_samples": 20, "repeats": 1, "micro_batch": 2, "accumulation": 1}
    settings |= {"rank": 0, "world_size": 1, "seed": 3}
    return TrainingOrder(**{**settings, "first_iteration": 0, "last_iteration": 25, **changes})


def test_each_epoch_is_another_permutation():
    batches = list(order())
    epochs = [[key.index for batch in batches[start : start + 10] for key in batch] for start in (0, 10)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(20))
    assert epochs[0] != epochs[1]
    seeds = [key.seed for batch in batches for key in batch]
    assert len(set(seeds)) == len(seeds)


def test_the_order_goes_on_where_it_stopped():
    assert list(order(first_iteration=13)) == list(order())[13:]


def micro_batches(world_size: int, accumulation: int, images: int, **changes) -> list[list]:
    """All processes' micro-batches, as many in a row as make a global batch of that many images."""
    shape = {
        "micro_batch": images // world_size // accumulation,
        "world_size": world_size,
        "accumulation": accumulation,
    }
    processes = [list(order(**shape, **changes, rank=rank)) for rank in range(world_size)]
    return [batch for side_by_side in zip(*processes, strict=True) for batch in side_by_side]


@pytest.mark.parametrize(("world_size", "accumulation"), [(2, 1), (1, 2), (2, 2), (4, 1)])
@pytest.mark.parametrize("repeats", [1, 3])
def test_processes_and_micro_batches_divide_the_same_global_batches(world_size, accumulation, repeats):
    whole = list(order(micro_batch=4, num_samples=22, repeats=repeats))
    parts = micro_batches(world_size, accumulation, images=4, num_samples=22, repeats=repeats)
    count = world_size * accumulation
    joined = [chain(*parts[start : start + count]) for start in range(0, len(parts), count)]
    assert [sorted(batch) for batch in joined] == [sorted(batch) for batch in whole]


def test_the_same_micro_batches_are_computed_side_by_side_or_one_after_the_other():
    assert micro_batches(8, 1, images=24, num_samples=50) == micro_batches(1, 8, images=24, num_samples=50)
    assert micro_batches(4, 2, images=24, num_samples=50) == micro_batches(2, 4, images=24, num_samples=50)


def test_repeated_images_fill_an_epoch_of_the_same_length_in_different_micro_batches():
    batches = micro_batches(4, 1, images=12, num_samples=50, repeats=3, last_iteration=4)
    drawn = [key.index for batch in batches for key in batch]
    assert len(drawn) == 48 and len(set(drawn)) == 16
    assert all(drawn.count(index) == 3 for index in drawn)
    assert all(len({key.index for key in batch}) == len(batch) for batch in batches)
    assert len({key.seed for batch in batches for key in batch}) == 48  # each copy has its own transform
    assert micro_batches(1, 1, images=12, num_samples=50, repeats=3, last_iteration=5)[4] != batches[:4]


class RandomItems(Dataset):
    """Draws from every global generator, as transforms do."""

    def __len__(self) -> int:
        return 20

    def __getitem__(self, index: int):
        return torch.tensor([index, random.random(), np.random.rand(), torch.rand(()).item()]), index


def test_samples_do_not_depend_on_workers_and_leave_the_process_generators_alone():
    def samples(workers: int):
        loader = DataLoader(SeededDataset(RandomItems()), batch_sampler=order(), num_workers=workers)
        return torch.cat([values for values, _ in loader])

    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    iterator = iter(DataLoader(SeededDataset(RandomItems()), batch_sampler=order()))
    state = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()
    next(iterator)
    assert random.getstate() == state[0]
    assert (np.random.get_state()[1] == state[1]).all()
    assert torch.equal(torch.get_rng_state(), state[2])
    alone = samples(0)
    assert torch.equal(alone, samples(2))
    assert len(alone[:, 1].unique()) == len(alone)


def test_digits_have_a_fixed_split_of_real_images():
    source = build_digits(8)
    assert (len(source.train), len(source.held_out), source.num_classes, source.in_chans) == (1000, 797, 10, 1)
    images = torch.cat([source.train.tensors[0], source.held_out.tensors[0]]).flatten(1)
    pixels = ((images - images.min()) / (images.max() - images.min()) * 16).round()
    labels = torch.cat([source.train.tensors[1], source.held_out.tensors[1]])
    original = load_digits()
    expected = sorted(zip(original.data.tolist(), original.target.tolist(), strict=True))
    assert sorted(zip(pixels.tolist(), labels.tolist(), strict=True)) == expected
    assert torch.equal(build_digits(8).train.tensors[0], source.train.tensors[0])
    assert abs(source.train.tensors[0].mean()) < 1e-5 and abs(source.train.tensors[0].std() - 1) < 1e-3
    assert build_digits(32).train[0][0].shape == (1, 32, 32)


@pytest.mark.parametrize(
    ("changes", "world_size", "message"),
    [
        ({"global_batch": 2000}, 1, "train.global_batch = 2000: more than the 1000 training images"),
        ({"global_batch": 100}, 3, "does not divide into 3 processes, .* use 2 or 4 processes"),
        (
            {"global_batch": 96, "accumulation": 5},
            8,
            r"= 5: 8 x 12 images .* train.accumulation = 3 or 4 or 6 would do",
        ),
    ],
)
def test_a_batch_that_does_not_fit_is_refused(changes, world_size, message):
    config = Config()
    config.data.dataset, config.data.image_size, config.data.workers = "digits", 8, 0
    vars(config.train).update(changes)
    process = SimpleNamespace(rank=0, world_size=world_size, device=torch.device("cpu"))
    with pytest.raises(InputError, match=message):
        build_loaders(config, build_source(config), process)


def test_every_held_out_image_is_in_exactly_one_share():
    config = Config()
    config.data.dataset, config.data.image_size, config.data.workers = "digits", 8, 0
    seen = []
    for rank in range(3):
        process = SimpleNamespace(rank=rank, world_size=3, device=torch.device("cpu"))
        share = build_held_out(config, build_source(config), process)
        seen += [image for images, labels in share for image in images[labels != IGNORED]]
    whole = build_digits(8).held_out.tensors[0]
    assert len(seen) == 797
    assert sorted(map(float, (image.double().sum() for image in seen))) == pytest.approx(
        sorted(map(float, (image.double().sum() for image in whole)))
    )


def test_examples_are_spread_over_the_held_out_images():
    config = Config()
    config.data.dataset, config.data.image_size, config.data.workers = "digits", 8, 0
    held_out = build_held_out(
        config, build_source(config), SimpleNamespace(rank=0, world_size=1, device=torch.device("cpu"))
    )
    whole = build_digits(8).held_out.tensors[0]
    assert torch.equal(held_out.examples(8), whole[[0, 100, 200, 300, 400, 500, 600, 700]])
    assert torch.equal(held_out.examples(1000), whole)


@pytest.mark.parametrize(
    ("changes", "world_size", "accumulation"),
    [
        ({"global_batch": 2048, "micro_batch": 256}, 8, 1),
        ({"global_batch": 2048, "micro_batch": 256}, 2, 4),
        ({"global_batch": 1024, "micro_batch": 32}, 8, 4),
        ({"global_batch": 96, "micro_batch": 10}, 2, 6),  # 48 images a process: 8 at once, not 10
        ({"global_batch": 6, "micro_batch": 256}, 1, 1),
        ({"global_batch": 96}, 2, 1),
        ({"global_batch": 96, "micro_batch": 48, "accumulation": 4}, 1, 4),
    ],
)
def test_accumulation_follows_from_the_batch_and_the_processes(changes, world_size, accumulation):
    assert accumulation_for(TrainConfig(**changes), world_size) == accumulation


@pytest.mark.parametrize(
    ("images", "processes", "batch"),
    [
        (1, 1, 1), (5, 1, 4), (9, 1, 8), (72, 1, 8), (300, 1, 16), (1000, 1, 32), (1024, 1, 64), (10**6, 1, 64),
        (100, 3, 24), (100, 16, 64), (10**6, 8, 512),
    ],
)  # fmt: skip
def test_a_batch_that_follows_from_the_data(images, processes, batch):
    assert batch_for(images, processes) == batch


def test_posterizing_to_no_bits_is_black_and_no_error():
    """As RandAugment asks for at its highest magnitude; Pillow 13 alone refuses it."""
    config = TransformConfig(auto_augment="rand-m10-inc1-n15", scale=[1, 1], color_jitter=0.0)
    (augment,) = [op for op in build_train_transform(config, 8).transforms if hasattr(op, "ops")]
    (posterize,) = [op for op in augment.ops if op.name == "PosterizeIncreasing"]
    posterize.prob = 1.0
    pixels = np.arange(192, dtype=np.uint8).reshape(8, 8, 3)
    assert not np.asarray(posterize(Image.fromarray(pixels))).any()
    posterize.magnitude = 5  # two bits stay
    assert (np.asarray(posterize(Image.fromarray(pixels))) == pixels & 0b11000000).all()


@pytest.mark.parametrize("eval_crop", [0.875, 1.0])
@pytest.mark.parametrize(
    "size", [(500, 375), (799, 100), (801, 100), (1101, 100), (100, 1250), (1000, 77), (777, 33), (20, 1999), (6001, 7)]
)
def test_long_images_are_evaluated_as_timm_does(size, eval_crop):
    pixels = np.random.default_rng(0).integers(0, 255, (size[1] // 5 + 1, size[0] // 5 + 1, 3), dtype=np.uint8)
    image = Image.fromarray(pixels).resize(size, Image.BICUBIC)
    config = TransformConfig(eval_crop=eval_crop)
    timms = create_transform(64, interpolation="bicubic", crop_pct=eval_crop, crop_mode="center", normalize=False)
    difference = build_eval_transform(config, 64)(image).int() - timms(image).int()
    assert difference.abs().max() <= 3


@pytest.mark.parametrize("size", [(60_000, 1), (1, 60_000)])
def test_a_strip_of_a_pixel_is_never_enlarged_as_a_whole(size, monkeypatch):
    largest, resize = [], Image.Image.resize

    def noting(image, size, *args, **kwargs):
        largest.append(size)
        return resize(image, size, *args, **kwargs)

    monkeypatch.setattr(Image.Image, "resize", noting)
    assert build_eval_transform(TransformConfig(), 224)(Image.new("RGB", size)).shape == (3, 224, 224)
    assert largest and max(width * height for width, height in largest) < 256 * 256 * 13
