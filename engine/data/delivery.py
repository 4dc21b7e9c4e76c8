"""From a loader to the device, and there from bytes to what a model takes.

Pixels travel as bytes: a quarter of what floats would take in the workers' shared memory and on the way to a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from engine.config import Config
from engine.data.transforms import normalisation, random_erasing

WHITE = 255


class Normalise:
    """8-bit images to floats, as torchvision's ToTensor and Normalize make them; floats stay as they are.

    Args:
        mean, std: one number per channel, of pixels between 0 and 1.
        device: where the images are.
    """

    def __init__(self, mean: Sequence[float], std: Sequence[float], device: torch.device | str = "cpu") -> None:
        self.mean, self.std = (torch.tensor(values, device=device)[:, None, None] for values in (mean, std))

    def __call__(self, images: Tensor) -> Tensor:
        """Images (…, C, H, W), uint8 in and float32 out."""
        if images.dtype != torch.uint8:
            return images
        return images.float().div_(WHITE).sub_(self.mean).div_(self.std)


class Delivery:
    """Brings batches to the device. A GPU copies a batch while it still computes with the one before.

    Args:
        device: of the model.
        transforms: of images (B, C, H, W), on the device, in their order.
    """

    def __init__(self, device: torch.device, transforms: Sequence[Callable[[Tensor], Tensor]] = ()) -> None:
        self._device = device
        self.transforms = transforms
        self._copying = torch.cuda.Stream(device) if device.type == "cuda" else None

    def __call__(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Images (B, C, H, W) and labels (B,) on the device, the images ready for the model."""
        images, labels = self._copy(images), self._copy(labels)
        for transform in self.transforms:
            images = transform(images)
        return images, labels

    def _copy(self, tensor: Tensor) -> Tensor:
        if self._copying is None:
            return tensor.to(self._device)
        computing = torch.cuda.current_stream(self._device)
        with torch.cuda.stream(self._copying):
            copy = tensor.to(self._device, non_blocking=True)
        computing.wait_stream(self._copying)
        copy.record_stream(computing)  # its memory is not for the next copy while it is computed with
        return copy


def build_delivery(config: Config, device: torch.device, is_training: bool) -> Delivery:
    """The delivery of a run's training or held-out images."""
    transforms: list[Callable[[Tensor], Tensor]] = []
    mean, std = normalisation(config)
    if mean is not None and std is not None:
        transforms.append(Normalise(mean, std, device))
        if is_training and config.transform.random_erase:
            transforms.append(random_erasing(config.transform, device))
    if config.train.channels_last:
        transforms.append(_channels_last)
    return Delivery(device, transforms)


def _channels_last(images: Tensor) -> Tensor:
    return images.contiguous(memory_format=torch.channels_last)
