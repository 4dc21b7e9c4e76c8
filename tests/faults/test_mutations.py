"""Five hundred spoilt configurations: each one runs, or ends in one line that names what is wrong."""

from __future__ import annotations

import copy
import json
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

from engine import checkpoint_file
from engine.config_file import load_config, to_yaml

DIGITS = Path(__file__).parents[2] / "configs" / "digits_vit.yaml"
CHEAP = ("model.kwargs.depth=1", "model.kwargs.embed_dim=16", "model.kwargs.num_heads=1", "evaluation.batch=800")
SHORT = "train.max_iters=1"  # given on the command line to every mutant
TIMEOUT = 60  # seconds
MEMORY = 12 << 30  # bytes: what is too large for it must not take the machine down
REFUSED = re.compile(r"error: [^\n]+\n")
NOT_FORESEEN = ("Traceback", "unforeseen")  # the second word marks the last resort of tools/train_net.py

NUMBERS = (-1, 0, 1, 2, 3, -0.5, 0.5, 1.5, 1e-12, 10**6, 10**9, 1e30, 1e38, float("nan"), float("inf"), -float("inf"))
WORDS = ("", "text", "0", "ünïçødé ✓", "a\nb\tc\0d".replace("\0", "\x7f"), "x" * 200, "../..", "off", "1e400", "null")
SHAPES = (None, True, False, [], {}, [[1], [2, [3]]], {"a": {"b": 1}}, [None], ["x", 1, None], [1, 2], {1: 2}, [{}])
# What is legal, and takes minutes to build or to draw
TOO_SLOW = {"depth": (3, 3), "compile": (0, "text"), "image_size": (float("inf"), -1)}  # up to that, or else that

Path_ = tuple[Any, ...]  # the keys that lead to a value
Kind = Callable[[random.Random, dict], "Mutant"]


class Mutant(NamedTuple):
    """A configuration file, what is added on the command line, and words of which an error must name one."""

    content: bytes
    overrides: list[str]
    places: tuple[str, ...] = ()


def leaves(content: Any, path: Path_ = ()) -> list[Path_]:
    """All paths to what is neither a mapping nor a list."""
    if isinstance(content, dict | list) and content:
        pairs = content.items() if isinstance(content, dict) else enumerate(content)
        return [leaf for key, value in pairs for leaf in leaves(value, (*path, key))]
    return [path]


def parent(content: Any, path: Path_) -> Any:
    """What holds the value at a path."""
    for key in path[:-1]:
        content = content[key]
    return content


def text(content: Any) -> bytes:
    """YAML; infinite numbers as somebody may write them."""
    return yaml.safe_dump(content, sort_keys=False, allow_unicode=True).encode()


def names(path: Path_) -> tuple[str, ...]:
    """Words that an error at this path may name."""
    return tuple(key for key in path if isinstance(key, str))


def odd_value(rng: random.Random, path: Path_) -> Any:
    """Something else; never what would only be slow."""
    value = copy.deepcopy(rng.choice(rng.choice((NUMBERS, NUMBERS, WORDS, SHAPES))))
    if path[-1] not in TOO_SLOW:
        return value
    most, instead = TOO_SLOW[path[-1]]
    return instead if value is None or (isinstance(value, int | float) and not value <= most) else value


def wrong_value(rng: random.Random, content: dict) -> Mutant:
    """Another type, another range."""
    path = rng.choice(leaves(content))
    parent(content, path)[path[-1]] = odd_value(rng, path)
    return Mutant(text(content), [], names(path))


def wrong_section(rng: random.Random, content: dict) -> Mutant:
    """A scalar or a list for a mapping, or the other way round."""
    path = rng.choice([path[:length] for path in leaves(content) for length in (1, 2, 3) if len(path) >= length])
    parent(content, path)[path[-1]] = copy.deepcopy(rng.choice(rng.choice((SHAPES, SHAPES, WORDS, (5, -0.5, 10**9)))))
    return Mutant(text(content), [], names(path))


def typo(rng: random.Random, content: dict) -> Mutant:
    """Letters of a key swapped, dropped, doubled or replaced."""
    path = rng.choice([path for path in leaves(content) if isinstance(path[-1], str)])
    path = path[: rng.randint(1, len(path))]
    if not isinstance(path[-1], str):
        path = path[:1]
    key, at = path[-1], rng.randrange(len(path[-1]))
    wrong = rng.choice((key[:at] + key[at + 1 :], key[:at] + key[at] * 2 + key[at + 1 :], key[:at] + "é" + key[at:],
                        key[:at] + key[at + 1 : at + 2] + key[at] + key[at + 2 :], key.upper(), key + "."))  # fmt: skip
    holder = parent(content, path)
    holder[wrong] = holder.pop(key)
    return Mutant(text(content), [], (wrong, *names(path)))


def missing(rng: random.Random, content: dict) -> Mutant:
    """Keys and sections that are not there."""
    for _ in range(rng.randint(1, 4)):
        path = rng.choice([path for path in leaves(content) if path[-1] != "image_size"])
        path = path[: rng.randint(1, len(path))]
        del parent(content, path)[path[-1]]
    return Mutant(text(content), [])


def broken_syntax(rng: random.Random, content: dict) -> Mutant:
    """What is no YAML, or YAML of something else."""
    whole = text(content)
    at = rng.randrange(len(whole))
    junk = rng.choice((b"\t", b"{", b"}", b"[", b"]", b": :", b"&a", b"*b", b"\xff\xfe\x00", b"\0", b"!!", b"%", b"'",
                       b'"', b"- ", b"\n\t- ", b"|", b"@", b"<<: x\n", b"\nseed: 1\nseed: 2\n", b"? ", b"---\n",
                       b"\n---\na: 1\n", b"[" * 3000, b"9" * 5000, b"!!timestamp 2001-99-99",
                       b"\xe2\x80\xa8"))  # fmt: skip
    start, end = whole[:at], whole[at:]
    damaged = rng.choice((start, start + junk + end, start + junk + end[len(junk) :], whole + b"\n" + junk,
                          whole + b"seed: " + junk, rng.randbytes(at), junk, whole.replace(b"  ", b"\t", 1),
                          start + whole))  # fmt: skip
    return Mutant(damaged, [])


BASES = (
    "nowhere.yaml", "mutant.yaml", "../", ".", "", "/etc", "~", "binary.yaml", "list.yaml", [1, 2], ["nowhere.yaml"],
    [["mutant.yaml"]], [None], None, 5, 0.5, True, {"a": "b"}, [{"a": 1}], {}, [], "${nowhere}", "${seed}",
    "x" * 5000, "a\nb", ["."], "second.yaml", "${oc.env:NOPE}",
)  # fmt: skip


def bad_base(rng: random.Random, content: dict) -> Mutant:
    """`_base_` that is no file, no text, or leads back."""
    content["_base_"] = copy.deepcopy(rng.choice(BASES))
    return Mutant(text(content), [])


def bad_interpolation(rng: random.Random, content: dict) -> Mutant:
    """References to nothing, to themselves, to what has another type; resolvers that fail."""
    path = rng.choice(leaves(content))
    path = path[: rng.randint(1, len(path))]
    itself = "${" + ".".join(map(str, path)) + "}"
    parent(content, path)[path[-1]] = rng.choice(
        ("${nowhere}", "${oc.env:NOPE}", "${oc.env:HOME}", itself, "${model}", "${model.name}", "${", "${}", "${seed",
         "${oc.create:[1,2]}", "${oc.decode:'{a: ['}", "${oc.select:nowhere}", "${oc.nothing:1}", "${.}", "${..}",
         "${augsub.sub_models[5]}", "???", "${oc.deprecated:seed}", "${oc.dict.keys:seed}",
         "a${nowhere}b"))  # fmt: skip
    return Mutant(text(content), [], (*names(path), "mutant.yaml"))


AUGMENTATIONS = (
    ["maskin"], ["masking", "nothing"], [{"name": "masking", "ration": 0.5}], [{"name": "masking", "ratio": "half"}],
    [{"name": "masking", "ratio": [0.5]}], [{"name": "masking", "ratio": None}], [{"ratio": 0.5}], [{}], [[]], [[[[]]]],
    [None], [5], [True], "masking", {"name": "masking"}, [], [{"name": None}], [{"name": 5}], [{"name": ["masking"]}],
    [{"name": {"name": "masking"}}], [{1: 2}], [{"name": "masking", "ratio": float("nan")}],
    [{"name": "masking", 1: 2}],
    [{"name": "masking", "ratio": 0.5, "cell": 0}], [{"name": "masking", "ratio": 0.5, "cell": 10**9}],
    [["masking", [5]]],
    [{"name": "masking", "ratio": 0.5, "mode": ["a"]}], [{"name": "masking", "mode": {}}], [{"name": "drop_path"}],
    [{"name": "masking", "ratio": 1e9}], [{"name": "drop_path", "ratio": 0.999999}], [{"name": "masking", "ratio": 1}],
    [{"name": "random_crop", "ratio": 0.99}], [{"name": "masking", "ratio": 0.99}], [{"name": "dropout", "ratio": -1}],
    ["é"], [""], [{"name": "masking", "self": 1}], [{"name": "compose", "members": []}], [["masking", "masking"]],
)  # fmt: skip


def bad_augmentation(rng: random.Random, content: dict) -> Mutant:
    """Sub-models that cannot be built."""
    sub_models = content["augsub"]["sub_models"]
    sub_models[0]["augmentations"] = copy.deepcopy(rng.choice(AUGMENTATIONS))
    if rng.random() < 0.2:
        sub_models.append(copy.deepcopy(rng.choice((None, 5, "masking", [], {"weight": 10**9}, {"weigth": 1}, {}))))
    return Mutant(text(content), [], ("augsub", "sub_models", "masking"))


def override(rng: random.Random, content: dict) -> Mutant:
    """The same on the command line."""
    kind = rng.choice((wrong_value, wrong_section, bad_interpolation, typo))
    before, whole = dict(flat(content)), text(content)
    after = dict(flat(yaml.safe_load(kind(rng, copy.deepcopy(content)).content)))
    changed = [key for key in after if key not in before or repr(after[key]) != repr(before[key])]
    key = rng.choice(changed or ["seed"])
    value = rng.choice((as_flow(after.get(key, "")), as_flow(after.get(key, "")), rng.choice(WORDS), "[", "{a: ]", "'"))
    malformed = (
        key, f"={value}", f"{key}==", f".{key}={value}", f"{key}..a={value}", f"{key}[0]={value}", f"{key}.a.b={value}",
        "=", f"model[{key}=1",
    )  # fmt: skip
    word = rng.choice((f"{key}={value}",) * 5 + malformed)
    return Mutant(whole, [word], (*key.split("."), "override"))


def flat(content: dict, prefix: str = "") -> list[tuple[str, Any]]:
    """Keys with dots, and values."""
    pairs = []
    for key, value in content.items():
        nested = isinstance(value, dict) and value
        pairs += flat(value, f"{prefix}{key}.") if nested else [(f"{prefix}{key}", value)]
    return pairs


def as_flow(value: Any) -> str:
    """YAML in one line, as it stands on a command line."""
    return yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=10**6).removesuffix("...\n").strip()


ARGUMENTS = {
    "model": (
        "patch_size", "embed_dim", "num_heads", "mlp_ratio", "qkv_bias", "class_token", "global_pool", "act_layer",
        "norm_layer", "init_values", "reg_tokens", "img_size", "pretrained_cfg", "weight_init", "drop_rate",
        "num_classes", "block_fn", "fc_norm", "dynamic_img_size", "proj_drop_rate", "checkpoint_path", "features_only",
        "é", "",
    ),
    "optimizer": (
        "momentum", "amsgrad", "foreach", "maximize", "capturable", "fused", "lr", "betas", "eps", "params",
        "weight_decay", "differentiable", "opt", "é",
    ),
}  # fmt: skip


def wrong_argument(rng: random.Random, content: dict) -> Mutant:
    """What goes to timm as it is."""
    section = rng.choice(("model", "model", "optimizer"))
    name = rng.choice(ARGUMENTS[section])
    content[section]["kwargs"][name] = odd_value(rng, (name,))
    return Mutant(text(content), [], (section,))


KINDS: dict[Kind, int] = {
    wrong_value: 90, wrong_argument: 40, wrong_section: 50, typo: 40, missing: 40, broken_syntax: 70, bad_base: 30,
    bad_interpolation: 45, bad_augmentation: 45, override: 50,
}  # fmt: skip


@pytest.fixture(scope="session")
def complete() -> dict:
    """The digits configuration with every key of the schema, as cheap as it can be."""
    content = yaml.safe_load(to_yaml(load_config(DIGITS, CHEAP)))
    size = content["data"].pop("image_size")
    return {**content, "data": {"image_size": size, **content["data"]}}  # wherever the file is cut, never 224 px


@pytest.fixture
def neighbours(tmp_path) -> None:
    """Files that a mutant may name as its base."""
    (tmp_path / "binary.yaml").write_bytes(bytes(range(256)))
    (tmp_path / "list.yaml").write_text("[1, 2]")
    (tmp_path / "second.yaml").write_text("_base_: mutant.yaml\n")


def problem_of(ended, mutant: Mutant, folder: Path) -> str | None:
    """How a run breaks the promise, or None."""
    if any(word in ended.err for word in NOT_FORESEEN) or ended.code not in (0, 2):
        return f"exit code {ended.code}"
    if ended.code == 2:
        if not REFUSED.fullmatch(ended.err):
            return "not one line"
        if mutant.places and not any(place in ended.err for place in mutant.places):
            return f"names none of {mutant.places}"
        return "a half-written result" if [*folder.rglob("*.pt"), *folder.rglob("summary.json")] else None
    summary = json.loads((folder / "summary.json").read_text())
    state = checkpoint_file.load(folder / "checkpoints" / "last.pt")
    return None if summary["iterations"] == state["iteration"] == 1 else "not one iteration"


@pytest.mark.faults(
    fault="a spoilt configuration: types, ranges, typos, syntax, references, augmentations",
    promise="it runs, or ends in one line that names the place, and leaves no half-written result",
)
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_a_spoilt_configuration(server, complete, neighbours, tmp_path, kind):
    rng, problems = random.Random(kind.__name__), []
    for number in range(KINDS[kind]):
        mutant, folder = kind(rng, copy.deepcopy(complete)), tmp_path / f"run{number}"
        path = tmp_path / "mutant.yaml"
        path.write_bytes(mutant.content)
        run = server.start("--config", path, *mutant.overrides, SHORT, f"output_dir={folder}", memory=MEMORY)
        ended = server.wait(run, TIMEOUT)
        if (problem := problem_of(ended, mutant, folder)) is not None:
            path.rename(tmp_path / f"mutant{number}.yaml")
            problems.append((problem, tmp_path / f"mutant{number}.yaml", mutant.overrides, ended.err[-600:]))
    assert not problems, "\n".join(map(repr, problems))
