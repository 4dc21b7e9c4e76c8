"""Five hundred spoilt configurations: each one runs, or ends in one line that names what is wrong."""

from __future__ import annotations

import copy
import json
import random
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

from engine.checkpoint import load
from engine.config_file import load_config, to_yaml
from tests.faults.conftest import DIGITS, REFUSED

CHEAP = ("model.kwargs.depth=1", "model.kwargs.embed_dim=16", "model.kwargs.num_heads=1", "evaluation.batch=800")
SHORT = "train.max_iters=1"  # given on the command line to every mutant
MEMORY = 12 << 30  # bytes: what is too large for it must not take the machine down

NUMBERS = (-1, 0, 1, 2, 3, -0.5, 0.5, 1.5, 1e-12, 10**6, 10**9, 1e30, 1e38, float("nan"), float("inf"), -float("inf"))
WORDS = ("", "text", "0", "ünïçødé ✓", "a\nb\tc\x7f", "x" * 200, "../..", "off", "1e400", "null", "[", "{a: ]", "'")
SHAPES = (None, True, False, [], {}, [[1], [2, [3]]], {"a": {"b": 1}}, [None], ["x", 1, None], [1, 2], {1: 2}, [{}])
REFERENCES = (
    "${nowhere}", "${oc.env:NOPE}", "${oc.env:HOME}", "${model}", "${model.name}", "${", "${}", "${seed", "${.}",
    "${..}", "${oc.create:[1,2]}", "${oc.decode:'{a: ['}", "${oc.select:nowhere}", "${oc.nothing:1}", "a${nowhere}b",
    "${augsub.sub_models[5]}", "???", "${oc.dict.keys:seed}",
)  # fmt: skip
AUGMENTATIONS = (
    "maskin", {"ratio": 0.5}, {}, [], [[[]]], None, 5, True, {1: 2}, ["masking", [5]], "é", "", ["masking", "masking"],
    {"name": "compose", "members": []}, {"name": "drop_path"}, {"name": "drop_path", "ratio": 0.999999},
    {"name": "dropout", "ratio": -1}, {"name": "random_crop", "ratio": 0.99}, {"name": "masking", "mode": ["a"]},
    *({"name": name} for name in (None, 5, ["masking"], {"name": "masking"})),
    *({"name": "masking", "ratio": 0.5, "cell": cell} for cell in (0, 10**9)),
    *({"name": "masking", "ratio": ratio} for ratio in ("half", [0.5], None, float("nan"), 1e9, 1, 0.99)),
    *({"name": "masking", argument: 2} for argument in ("ration", 1, "self")),
)  # fmt: skip
BASES = (
    "nowhere.yaml", "mutant.yaml", "../", ".", "", "/etc", "~", "binary.yaml", "list.yaml", [1, 2], ["nowhere.yaml"],
    [["mutant.yaml"]], [None], None, 5, 0.5, True, {"a": "b"}, [{"a": 1}], {}, [], "${nowhere}", "${seed}",
    "x" * 5000, "a\nb", ["."], "second.yaml", "${oc.env:NOPE}",
)  # fmt: skip
ARGUMENTS = (  # of timm's models and optimisers, to which they go as they are
    "patch_size", "embed_dim", "num_heads", "mlp_ratio", "qkv_bias", "class_token", "global_pool", "act_layer", "opt",
    "norm_layer", "init_values", "reg_tokens", "img_size", "pretrained_cfg", "weight_init", "drop_rate", "fc_norm",
    "num_classes", "block_fn", "dynamic_img_size", "proj_drop_rate", "checkpoint_path", "features_only", "é", "",
    "momentum", "amsgrad", "foreach", "maximize", "capturable", "fused", "lr", "betas", "eps", "params",
    "weight_decay", "differentiable",
)  # fmt: skip
# What is legal, and takes minutes to build or to draw
TOO_SLOW = {"depth": (3, 3), "compile": (0, "text"), "image_size": (float("inf"), -1)}  # up to that, or else that


class Mutant(NamedTuple):
    """A configuration file, what is added on the command line, and words of which an error must name one."""

    content: bytes
    overrides: tuple[str, ...] = ()
    places: tuple[str, ...] = ()


def leaves(content: Any, path: tuple = ()) -> list[tuple]:
    """All paths, keys and indices, to what is neither a mapping nor a list."""
    if isinstance(content, dict | list) and content:
        pairs = content.items() if isinstance(content, dict) else enumerate(content)
        return [leaf for key, value in pairs for leaf in leaves(value, (*path, key))]
    return [path]


def parent(content: Any, path: tuple) -> Any:
    """What holds the value at a path."""
    for key in path[:-1]:
        content = content[key]
    return content


def text(content: Any, flow: bool = False) -> str:
    """YAML; in one line as it stands on a command line."""
    written = yaml.safe_dump(content, default_flow_style=flow, sort_keys=False, allow_unicode=True, width=10**6)
    return written.removesuffix("...\n").strip() if flow else written


def changed(content: dict, path: tuple, value: Any) -> Mutant:
    """Another value at a path."""
    parent(content, path)[path[-1]] = copy.deepcopy(value)
    places = (*(key for key in path if isinstance(key, str)), "mutant.yaml")
    return Mutant(text(content).encode(), (), places)


def wrong_value(rng: random.Random, content: dict) -> Mutant:
    """Another type, another range, a scalar for a mapping, a list for a scalar, a reference to nothing or itself."""
    path = rng.choice(leaves(content))
    path = rng.choice((path, path, path[: rng.randint(1, len(path))]))
    if rng.random() < 0.2:
        path = (rng.choice(("model", "optimizer")), "kwargs", rng.choice(ARGUMENTS))
    itself = "${" + ".".join(map(str, path)) + "}"
    value = rng.choice(rng.choice((NUMBERS, NUMBERS, WORDS, SHAPES, SHAPES, (itself, *REFERENCES))))
    most, instead = TOO_SLOW.get(path[-1], (float("inf"), value))
    is_slow = path[-1] in TOO_SLOW and (value is None or (isinstance(value, int | float) and not value <= most))
    return changed(content, path, instead if is_slow else value)


def override(rng: random.Random, content: dict) -> Mutant:
    """The same on the command line, some of it malformed."""
    whole, changes = text(content).encode(), copy.deepcopy(content)
    *_, places = wrong_value(rng, changes)
    path = rng.choice([leaf for leaf in leaves(changes) if leaf not in leaves(content)] or leaves(content))
    key, value = ".".join(map(str, path)), text(parent(changes, path)[path[-1]], flow=True)
    malformed = (
        key, f"={value}", f"{key}==", f".{key}={value}", f"{key}..a={value}", f"{key}[0]={value}", f"{key}.a.b={value}",
        "=", f"model[{key}=1",
    )  # fmt: skip
    word = rng.choice((f"{key}={value}",) * 5 + malformed)
    return Mutant(whole, (word,), (*places, *map(str, path), "override"))


def bad_augmentation(rng: random.Random, content: dict) -> Mutant:
    """Sub-models that cannot be built."""
    if rng.random() < 0.2:
        other = rng.choice((None, 5, "masking", [], {"weight": 10**9}, {"weigth": 1}, {}))
        content["augsub"]["sub_models"].append(other)
    augmentation = rng.choice(AUGMENTATIONS)
    return changed(content, ("augsub", "sub_models", 0, "augmentations"), rng.choice(([augmentation], augmentation)))


def bad_base(rng: random.Random, content: dict) -> Mutant:
    """`_base_` that is no file, no text, or leads back."""
    return changed(content, ("_base_",), rng.choice(BASES))._replace(places=())


def typo(rng: random.Random, content: dict) -> Mutant:
    """Letters of a key swapped, dropped, doubled or replaced."""
    path = rng.choice([path for path in leaves(content) if isinstance(path[-1], str)])
    path = rng.choice((path, path[:1]))
    key, at = path[-1], rng.randrange(len(path[-1]))
    wrong = rng.choice((key[:at] + key[at + 1 :], key[:at] + key[at] * 2 + key[at + 1 :], key[:at] + "é" + key[at:],
                        key[:at] + key[at + 1 : at + 2] + key[at] + key[at + 2 :], key.upper(), key + "."))  # fmt: skip
    value = parent(content, path).pop(key)
    return changed(content, (*path[:-1], wrong), value)._replace(places=(wrong, *path))


def missing(rng: random.Random, content: dict) -> Mutant:
    """Keys and sections that are not there."""
    for _ in range(rng.randint(1, 4)):
        path = rng.choice([path for path in leaves(content) if path[-1] != "image_size"])
        path = path[: rng.randint(1, len(path))]
        del parent(content, path)[path[-1]]
    return Mutant(text(content).encode())


def broken_syntax(rng: random.Random, content: dict) -> Mutant:
    """What is no YAML, or YAML of something else."""
    whole = text(content).encode()
    at = rng.randrange(len(whole))
    junk = rng.choice((b"\t", b"{", b"}", b"[", b"]", b": :", b"&a", b"*b", b"\xff\xfe\x00", b"\0", b"!!", b"%", b"'",
                       b'"', b"- ", b"\n\t- ", b"|", b"@", b"<<: x\n", b"\nseed: 1\nseed: 2\n", b"? ", b"---\n",
                       b"\n---\na: 1\n", b"[" * 3000, b"9" * 5000, b"!!timestamp 2001-99-99",
                       b"\xe2\x80\xa8"))  # fmt: skip
    start, end = whole[:at], whole[at:]
    return Mutant(rng.choice((start, start + junk + end, start + junk + end[len(junk) :], whole + b"\n" + junk,
                              whole + b"seed: " + junk, rng.randbytes(at), junk, whole.replace(b"  ", b"\t", 1),
                              start + whole)))  # fmt: skip


KINDS = {wrong_value: 220, override: 60, bad_augmentation: 45, bad_base: 30, typo: 40, missing: 40, broken_syntax: 70}


@pytest.fixture(scope="session")
def complete() -> dict:
    """The digits configuration with every key of the schema, as cheap as it can be."""
    content = yaml.safe_load(to_yaml(load_config(DIGITS, CHEAP)))
    size = content["data"].pop("image_size")
    return {**content, "data": {"image_size": size, **content["data"]}}  # wherever the file is cut, never 224 px


def problem_of(ended, mutant: Mutant, folder: Path) -> str | None:
    """How a run breaks the promise, or None."""
    if "Traceback" in ended.err or "unforeseen" in ended.err or ended.code not in (0, 2):
        return f"exit code {ended.code}"
    if ended.code == 2:
        if not REFUSED.fullmatch(ended.err):
            return "not one line"
        diverged = "are NaN or infinite" in ended.err  # as with a learning rate of 1e9, which is a number like others
        if mutant.places and not diverged and not any(place in ended.err for place in mutant.places):
            return f"names none of {mutant.places}"
        return "a half-written result" if [*folder.rglob("*.pt"), *folder.rglob("summary.json")] else None
    summary = json.loads((folder / "summary.json").read_text())
    state = load(folder / "checkpoints" / "last.pt")
    return None if summary["iterations"] == state["iteration"] == 1 else "not one iteration"


@pytest.mark.faults(
    fault="a spoilt configuration: types, ranges, typos, syntax, references, augmentations",
    promise="it runs, or ends in one line that names the place, and leaves no half-written result",
)
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_a_spoilt_configuration(server, complete, tmp_path, kind):
    (tmp_path / "binary.yaml").write_bytes(bytes(range(256)))  # that a mutant may name as its base, as these two
    (tmp_path / "list.yaml").write_text("[1, 2]")
    (tmp_path / "second.yaml").write_text("_base_: mutant.yaml\n")
    rng, problems, path = random.Random(kind.__name__), [], tmp_path / "mutant.yaml"
    for number in range(KINDS[kind]):
        mutant, folder = kind(rng, copy.deepcopy(complete)), tmp_path / f"run{number}"
        path.write_bytes(mutant.content)
        run = server.start("--config", path, *mutant.overrides, SHORT, f"output_dir={folder}", memory=MEMORY)
        ended = server.wait(run, timeout=60)
        if (problem := problem_of(ended, mutant, folder)) is not None:
            kept = path.rename(tmp_path / f"mutant{number}.yaml")
            problems.append((problem, kept, mutant.overrides, ended.err[-600:]))
    assert not problems, "\n".join(map(repr, problems))
