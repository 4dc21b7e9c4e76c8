"""The base class of every sub-model augmentation, and their composition."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import nn

from augsub.views import Images, StemFeatures, Tokens


class SubModelAugmentation:
    """What changes in the sub-model, at one kind of site of a model.

    A subclass names in `sites` the sites where it can act, best first, and overrides the method of
    each. In a given model it acts at the first of them that the model has:

    =============  ==================  ====================================================
    site           method              what it is
    =============  ==================  ====================================================
    ``image``      :meth:`image`       the input images
    ``tokens``     :meth:`tokens`      the token sequence after position embedding
    ``windows``    :meth:`windows`     groups of Swin's windows after the stem, each as one token
    ``stem``       :meth:`stem`        the feature map of the stem, with a learnable mask token
    ``drop_path``  :meth:`module_state`  every stochastic-depth module
    ``dropout``    :meth:`module_state`  every projection and MLP dropout
    =============  ==================  ====================================================

    Args:
        ratio: strength in [0, 1).

    Raises:
        ValueError: if `ratio` is outside [0, 1).
    """

    name: ClassVar[str] = ""
    sites: Sequence[str] = ()
    resizes_images: ClassVar[bool] = False  # whether `image` returns images of another size

    def __init__(self, ratio: float) -> None:
        if isinstance(ratio, bool) or not isinstance(ratio, (int, float)) or not 0 <= ratio < 1:
            raise ValueError(f"{self.name or type(self).__name__}: ratio = {ratio!r}, allowed is a number in [0, 1)")
        self.ratio = float(ratio)

    @property
    def members(self) -> tuple[SubModelAugmentation, ...]:
        """The augmentations to apply, in order: itself, unless it is composed of others."""
        return (self,)

    def image(self, images: Images) -> Images:
        """Change the input images of the sub-model."""
        return images

    def tokens(self, tokens: Tokens) -> Tokens:
        """Change or remove tokens of the sub-model."""
        return tokens

    def windows(self, groups: Tokens) -> Tokens:
        """Change or remove groups of windows of the sub-model."""
        return groups

    def stem(self, features: StemFeatures) -> StemFeatures:
        """Change the stem features of the sub-model."""
        return features

    def module_state(self, module: nn.Module) -> Mapping[str, Any]:
        """Attributes that `module` has during the sub-forward; afterwards its own are restored."""
        return {}

    def __str__(self) -> str:
        """In a few characters: "masking 0.5 + dropout 0.1"."""
        return " + ".join(f"{member.name or type(member).__name__} {member.ratio:g}" for member in self.members)

    def __repr__(self) -> str:
        arguments = ", ".join(f"{key}={value!r}" for key, value in vars(self).items() if key != "sites")
        return f"{type(self).__name__}({arguments})"


class Compose(SubModelAugmentation):
    """Several augmentations, applied in order to one sub-model.

    Args:
        members: at least one augmentation.

    Raises:
        ValueError: if `members` is empty.
    """

    name = "compose"

    def __init__(self, members: Sequence[SubModelAugmentation]) -> None:
        if not members:
            raise ValueError("Compose: no augmentation given, at least one is needed")
        self._members = tuple(member for composed in members for member in composed.members)

    @property
    def members(self) -> tuple[SubModelAugmentation, ...]:
        return self._members

    def __repr__(self) -> str:
        return f"Compose({list(self._members)!r})"
