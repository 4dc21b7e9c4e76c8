"""The models that are trained: timm models from a config, patched for sub-model augmentation."""


def first_line(error: BaseException) -> str:
    """What an error of other code says, without the lines after its first one; its type if it says nothing."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
