"""What tells a data set from a changed one, in seconds for a million images: no image is opened."""

from __future__ import annotations

import hashlib
from typing import Any

from torch.utils.data import Dataset


def fingerprint(dataset: Dataset) -> dict[str, Any]:
    """The number of `images`, and a `sha256` over what the data set lists of them.

    Of a folder these are the paths from its root on and the labels, in their order; of a data set of torchvision or
    Hugging Face the labels; of others nothing, so that their number alone counts. Pixels are not part of it, nor is the
    place where the data lie.
    """
    digest = hashlib.sha256()
    for line in getattr(dataset, "listing", tuple)():
        digest.update(line.encode(errors="surrogateescape") + b"\0")  # which no path contains
    return {"images": len(dataset), "sha256": digest.hexdigest()}
