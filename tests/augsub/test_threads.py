"""One model in several threads: a sub-forward is its own thread's affair."""

from __future__ import annotations

import copy
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import augsub

FORWARDS = 60
SUB_MODELS = {
    "vit": ("masking", "drop_path", "dropout", "random_crop"),
    "swin": ("masking", "drop_path", "random_crop"),  # a crop of the image changes the windows of all blocks
    "resnet": ("masking", "drop_path"),
}
CASES = [(model, augmentation) for model, augmentations in SUB_MODELS.items() for augmentation in augmentations]


@pytest.mark.parametrize(("variant", "augmentation"), CASES)
def test_a_main_forward_is_not_touched_by_another_threads_sub_forward(variant, augmentation, make_model, images):
    model, stop = augsub.patch(make_model(variant)).eval(), threading.Event()
    cell = {"cell": 8} if augmentation == "masking" and variant != "vit" else {}
    augmentation = augsub.build({"name": augmentation, "ratio": 0.5, **cell})

    @torch.no_grad()
    def sub_forwards() -> int:
        count = 0
        while not stop.is_set():
            model(images, augsub=augmentation)
            count += 1
        return count

    with torch.no_grad(), ThreadPoolExecutor(1) as thread:
        alone = model(images)
        counting = thread.submit(sub_forwards)
        try:
            are_equal = [torch.equal(model(images), alone) for _ in range(FORWARDS)]
        finally:
            stop.set()
    assert counting.result() > 1 and all(are_equal)


def test_sub_forwards_of_different_kinds_do_not_mix(make_model, images):
    """Each at a ratio of its own: the number of tokens that the blocks see tells them apart."""
    model = augsub.patch(make_model("vit")).eval()
    lengths = threading.local()
    model.blocks[0].register_forward_pre_hook(lambda module, args: setattr(lengths, "tokens", args[0].shape[1]))

    def tokens_at(ratio: float) -> list[int]:
        seen = []
        with torch.no_grad():
            for _ in range(FORWARDS):
                model(images, augsub="masking", augsub_ratio=ratio)
                seen.append(lengths.tokens)
        return seen

    ratios = [0.25, 0.5, 0.75]
    with ThreadPoolExecutor(len(ratios)) as threads:
        found = list(threads.map(tokens_at, ratios))
    assert found == [[1 + int(16 * (1 - ratio))] * FORWARDS for ratio in ratios]


def test_an_error_in_a_sub_forward_keeps_nobody_waiting(make_model, images):
    model = augsub.patch(make_model("vit")).eval()
    with pytest.raises(ValueError, match="leaves none"):
        model(images, augsub="masking", augsub_ratio=0.99)
    with ThreadPoolExecutor(1) as thread:
        assert thread.submit(model, images).result(timeout=60).shape == (len(images), 10)


def test_copies_do_not_wait_for_each_other(make_model, images):
    """Also one that is made while a sub-forward is under way."""
    model = augsub.patch(make_model("vit")).eval()
    copies = []
    handle = model.blocks[0].register_forward_pre_hook(
        lambda module, args: copies.extend([copy.deepcopy(model), pickle.loads(pickle.dumps(model.state_dict()))])
    )
    model(images, augsub="masking", augsub_ratio=0.5)
    handle.remove()
    with ThreadPoolExecutor(1) as thread:
        assert thread.submit(copies[0], images, augsub="masking").result(timeout=60).shape == (len(images), 10)
