"""The house rules: who imports whom, how long files are, and what is public."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import augsub
from engine.config_file import load_config, to_yaml

ROOT = Path(__file__).parents[1]
LAYERS = ("augsub", "models", "engine", "tools")  # each may import those before it
FILES = sorted(path for folder in LAYERS for path in (ROOT / folder).rglob("*.py"))
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def imported_modules(path: Path) -> set[str]:
    modules = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            modules |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return modules


def own_imports(path: Path) -> set[Path]:
    """Files of this repository that a file imports."""
    candidates = (ROOT / module.replace(".", "/") for module in imported_modules(path))
    files = {file for path in candidates for file in (path.with_suffix(".py"), path / "__init__.py")}
    return files & set(FILES) - {path}


@pytest.mark.parametrize("path", FILES, ids=name)
def test_imports_go_one_way(path):
    layer = LAYERS.index(path.relative_to(ROOT).parts[0])
    above = {module for module in imported_modules(path) if module.split(".")[0] in LAYERS[layer + 1 :]}
    assert not above


def test_no_import_circles():
    imports = {path: own_imports(path) for path in FILES}
    while True:
        leaves = {path for path, imported in imports.items() if not imported & imports.keys() - {path}}
        if not leaves:
            break
        imports = {path: imported for path, imported in imports.items() if path not in leaves}
    assert not imports, sorted(map(name, imports))


@pytest.mark.parametrize("path", [*FILES, *sorted((ROOT / "tests").rglob("*.py"))], ids=name)
def test_files_and_functions_are_short(path):
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 500
    functions = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef)]
    lengths = {node.name: node.end_lineno - node.lineno + 1 for node in functions}
    assert {function: length for function, length in lengths.items() if length > 60} == {}


def test_one_writer_makes_all_json():
    """json.dumps by itself writes NaN, which is no JSON."""
    writers = [name(path) for path in FILES if re.search(r"\bjson\.dumps?\(|import dump", path.read_text())]
    assert writers == ["engine/text.py"]


@pytest.mark.parametrize("augmentation", augsub.list_augmentations())
def test_an_augmentation_is_named_in_its_own_file_and_one_import(augmentation):
    site_names = {"drop_path", "dropout"}  # augmentations that carry the name of the site where they act
    module, class_name = (getattr(augsub.AUGSUB_REGISTRY.get(augmentation), key) for key in ("__module__", "__name__"))
    for path in (ROOT / "augsub").rglob("*.py"):
        if path.name == "__init__.py" or name(path) == module.replace(".", "/") + ".py":
            continue
        strings = {
            node.value
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.Constant) and isinstance(node.value, str)
        }
        assert augmentation not in strings - site_names, path
        assert not {module, f"{module}.{class_name}"} & imported_modules(path), path


def test_the_public_names():
    assert augsub.__all__ == [
        "AUGSUB_REGISTRY",
        "LESSONS",
        "OBJECTIVES",
        "CoSubObjective",
        "Compose",
        "Lesson",
        "Objective",
        "ObjectiveOutput",
        "RDropObjective",
        "Ramp",
        "Step",
        "SubModel",
        "SubModelAugmentation",
        "SubModelObjective",
        "build",
        "is_patched",
        "list_augmentations",
        "patch",
        "register",
        "register_lesson",
        "register_objective",
        "supports",
        "unpatch",
    ]


def test_every_key_has_a_comment():
    """Behind it, or above; sections have a docstring instead."""
    lines = (ROOT / "engine" / "config.py").read_text().partition("\n@dataclass\nclass ModelConfig")[2].splitlines()
    keys = [number for number, line in enumerate(lines) if re.match(r"    \w+: (?!.*Config)", line)]
    assert len(keys) > 100
    assert [lines[n] for n in keys if "  # " not in lines[n] and not lines[n - 1].startswith("    # ")] == []


@pytest.mark.parametrize("path", CONFIGS, ids=name)
def test_every_config_loads_and_prints_itself(path, tmp_path):
    config = load_config(path)
    copy = tmp_path / path.name
    copy.write_text(to_yaml(config))
    assert load_config(copy) == config


def test_importing_the_project_changes_nothing_of_other_libraries():
    """In a process of its own: whatever a test has imported would be changed already."""
    modules = ", ".join(name(path).removesuffix(".py").replace("/", ".") for path in FILES if path.stem != "__init__")
    code = f"""
import importlib, PIL.ImageFile, PIL.Image, huggingface_hub.constants, timm.data.auto_augment
import timm, torch
def state():
    ops = dict(timm.data.auto_augment.NAME_TO_OP)
    return ops, PIL.ImageFile.LOAD_TRUNCATED_IMAGES, PIL.Image.MAX_IMAGE_PIXELS, vars(huggingface_hub.constants).copy()
before = state()
for name in "{modules}".split(", "):
    importlib.import_module(name)
assert state() == before
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
