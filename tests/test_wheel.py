"""The wheel: what it holds and says, and that it works where nothing else of the project is."""

from __future__ import annotations

import re
import subprocess
import sys
import sysconfig
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

import augsub

ROOT = Path(__file__).parents[1]
SMOKE = """
import importlib.util, timm, torch, augsub
assert {site!r} in augsub.__file__, augsub.__file__
assert not [name for name in ("models", "engine", "tools") if importlib.util.find_spec(name)]
model = augsub.patch(timm.create_model("test_vit", num_classes=10))
objective = augsub.SubModelObjective(torch.nn.CrossEntropyLoss(), [augsub.SubModel("masking", ratio=0.5)])
objective.prepare(model)
out = objective.backward(model, torch.randn(2, 3, 160, 160), torch.tensor([1, 2]))
assert out.loss.isfinite() and model.head.weight.grad.any()
augsub.unpatch(model)
import augsub.integrations.timm, augsub.integrations.lightning
print(augsub.__version__)
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-q", "-w", folder, ROOT]
    subprocess.run(build, check=True)
    (path,) = folder.glob("*.whl")
    return path


def test_it_ships_augsub_alone(wheel):
    files = zipfile.ZipFile(wheel).namelist()
    assert {file.split("/")[0] for file in files if ".dist-info" not in file} == {"augsub"}
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "augsub").rglob("*.py")}
    assert modules | {"augsub/py.typed"} == {file for file in files if ".dist-info" not in file}


def test_it_says_what_it_is(wheel):
    archive = zipfile.ZipFile(wheel)
    (name,) = [name for name in archive.namelist() if name.endswith("/METADATA")]
    facts = Parser().parsestr(archive.read(name).decode())
    assert facts["Version"] == augsub.__version__ and facts["Requires-Python"] == ">=3.10"
    assert {"timm", "lightning", "accelerate", "transformers", "onnx", "train"} <= set(facts.get_all("Provides-Extra"))
    needed = {re.match(r"[\w-]+", line)[0] for line in facts.get_all("Requires-Dist") if "extra ==" not in line}
    assert needed == {"torch", "timm", "fvcore", "typing_extensions"}
    assert f"## {augsub.__version__}" in (ROOT / "CHANGELOG.md").read_text()


def test_nothing_optional_is_imported_with_it():
    code = "import sys, augsub; print([name for name in sys.modules if name.split('.')[0] in sys.argv[1:]])"
    optional = ["lightning", "pytorch_lightning", "accelerate", "transformers", "onnx", "omegaconf", "matplotlib"]
    done = subprocess.run([sys.executable, "-c", code, *optional], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_it_works_in_an_environment_of_its_own(wheel, tmp_path):
    """Its dependencies are those installed here; the project's own folders are out of reach."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "env"], check=True)
    (site,) = (tmp_path / "env" / "lib").glob("python*/site-packages")
    zipfile.ZipFile(wheel).extractall(site)  # what installing a pure wheel does
    (site / "dependencies.pth").write_text(sysconfig.get_paths()["purelib"])  # without the .pth files in there
    command = [tmp_path / "env" / "bin" / "python", "-I", "-c", SMOKE.format(site=str(site))]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().endswith(augsub.__version__)
