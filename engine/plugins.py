"""The user's own modules: the only code that a run executes and that does not come with this project.

Configurations, checkpoints and data never run code: YAML is read by a safe loader, checkpoints
with weights_only, and nothing is evaluated. Only what `plugins` names is imported.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

from engine.errors import InputError


def import_plugins(modules: Sequence[str]) -> None:
    """Import the user's modules, which register augmentations and hooks; the working folder is searched too.

    Raises:
        InputError: a module is missing, or cannot be imported.
    """
    sys.path.append("")
    try:
        for module in modules:
            importlib.import_module(module)
    except Exception as error:  # the user's code raises what it likes
        raise InputError(f"plugins: {module} cannot be imported: {error or type(error).__name__}") from error
    finally:
        sys.path.remove("")
