"""Text arrives as it was typed, numbers as numbers: on the command line, in files and from saved configurations."""

from __future__ import annotations

from dataclasses import replace
from functools import reduce

import pytest

from engine.config import Config
from engine.config_file import load_config, parse_config, to_yaml
from engine.errors import InputError
from tools.comparison.study import load_study

# what YAML 1.1 takes for something else
WORDS = ("off", "yes", "No", "y", "on", "true", "2024_01_01", "2024-01-01", "1.10", "007", "0x10", "0b1", "0o17",
         "20:30", "1_000", "1e5", ".5", "1.", "-3", ".inf", ".NaN", "=", "<<", "a,b", "ünïçødé ✓")  # fmt: skip
# what is text on a command line, where a file needs quotes
TYPED = ("#x", "a #b", "a: b", "[x]", "{a}", "@a", "%a", "&a", "*a", "!a", "- a", "? a", "`", "|", ">x", "---", "it's",
         "a=b", "=x", "x\\y")  # fmt: skip
NASTY = (*WORDS, *TYPED, "null", "~", "", " ", "a\nb", "'", '"', "'x'", "\t", "x" * 300, "é" * 100)
TEXT_KEYS = ("output_dir", "data.root", "data.train_split", "model.name", "model.checkpoint", "log.wandb")


def value(config: Config, key: str):
    return reduce(getattr, key.split("."), config)


@pytest.fixture
def unchecked(monkeypatch):
    """Any text for any key."""
    monkeypatch.setattr("engine.config_file.check", lambda config: None)


@pytest.mark.parametrize("word", [*WORDS, *TYPED])
def test_text_is_what_was_typed(unchecked, word):
    for typed in (word, f" {word} "):
        config = parse_config("", "here", [f"{key}={typed}" for key in TEXT_KEYS])
        assert {value(config, key) for key in TEXT_KEYS} == {word}
    if word in WORDS:
        block = parse_config(f"output_dir: {word}\ndata:\n  train_split: {word}  # here\n", "here")
        assert (block.output_dir, block.data.train_split) == (word, word)
    if word in WORDS and "," not in word:  # which ends a word in brackets
        text = f"{{output_dir: {word}, model: {{restart: [{word}, a]}}, plugins: [{word}]}}"
        flow = parse_config(text, "here", [f"model.frozen=[{word}]"])
        assert (flow.output_dir, flow.model.restart, flow.plugins) == (word, [word, "a"], [word])
        assert flow.model.frozen == [word]


@pytest.mark.parametrize("word", ["null", "~", "Null", ""])
def test_null_is_null_where_a_key_may_have_it_and_quotes_make_text_of_it(word):
    key = "transform.auto_augment"
    assert parse_config(f"transform: {{auto_augment: {word}}}", "here").transform.auto_augment is None
    assert value(parse_config("transform: {auto_augment: x}", "here", [f"{key}={word}"]), key) is None
    assert value(parse_config("", "here", [f"{key}='{word}'"]), key) == word


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("1e-3", 0.001), ("1E3", 1000.0), ("+.5", 0.5), ("3", 3), ("-0", 0), ("010", 10), ("0x1F", 31), ("1.", 1.0),
        (".inf", float("inf")), ("true", True), ("FALSE", False), ("null", None), ("~", None), ('"1"', "1"),
        ("off", "off"), ("yes", "yes"), ("1_000", "1_000"), ("20:30", "20:30"), ("2024-01-01", "2024-01-01"),
        ("0o17", "0o17"), ("1e", "1e"), ("tRue", "tRue"), ("nan", "nan"), ("=", "="),
    ],
)  # fmt: skip
def test_where_no_type_is_known_yaml_means_what_its_version_1_2_says(word, expected):
    spec = f"[{{name: masking, a: [{word}]}}]"
    config = parse_config(
        f"model: {{kwargs: {{a: {word}}}}}\n", "here",
        [f"model.kwargs.b={word}", f"optimizer.kwargs={{b: {word}}}", f"augsub.sub_models=[{{augmentations: {spec}}}]"],
    )  # fmt: skip
    found = [
        config.model.kwargs["a"], config.model.kwargs["b"], config.optimizer.kwargs["b"],
        config.augsub.sub_models[0].augmentations[0]["a"][0],
    ]  # fmt: skip
    assert [(item, type(item)) for item in found] == [(expected, type(expected))] * 4


def test_numbers_stay_numbers():
    for word, expected in {"1e-3": 1e-3, "1e3": 1e3, "5": 5.0, "1_000": 1000.0}.items():
        assert parse_config(f"optimizer: {{lr: {word}}}", "here").optimizer.lr == expected
        assert parse_config("", "here", [f"optimizer.lr={word}"]).optimizer.lr == expected
    assert parse_config("", "here", ["train.channels_last=off", "ema.enabled=yes"]).ema.enabled is True


@pytest.mark.parametrize("text", NASTY)
def test_a_saved_configuration_is_read_back_unchanged(unchecked, tmp_path, text):
    config = Config(output_dir="x", plugins=[text, "b"], hooks=[{"name": text, text: [text]}])
    config.loss = replace(config.loss, name=text)
    config.log = replace(config.log, wandb=text)
    config.model = replace(config.model, kwargs={"a": text, "b": {"c": [text]}})
    saved = tmp_path / "config.yaml"
    saved.write_text(to_yaml(config), encoding="utf-8")
    assert load_config(saved) == config


def test_files_of_other_editors_are_read(tmp_path):
    path = tmp_path / "run.yaml"
    for encoding in ("utf-8", "utf-8-sig", "utf-16"):
        path.write_bytes("seed: 3\r\ntrain: {amp: off}  \r\noutput_dir: ünï  \r\n".encode(encoding))
        config = load_config(path)
        assert (config.seed, config.train.amp, config.output_dir) == (3, "off", "ünï")


@pytest.mark.parametrize(
    ("text", "overrides", "message"),
    [
        ("seed: 1\ntrain: {epochs: 2}\nseed: 3\n", [], "line 3: found duplicate key seed"),
        ("train:\n\tepochs: 3\n", [], "line 2: found character that cannot start any token"),
        ("output_dir: caf\udce9", [], "UTF-8"),
        ("model: {kwargs: {a: &a [*a]}}", [], "recursion"),
        ("hello", [], "the top level must be keys with values"),
        ("model: {name: }", [], "model.name: "),
        ("", ["seed= "], "seed: "),
        ("", ["seed=20:30"], "seed: Value '20:30' of type 'str' could not be converted to Integer"),
        ("", ["model.pretrained=1.10"], "model.pretrained = 1.10: allowed is one of true, false, if_available"),
    ],
)
def test_what_is_no_good_yaml_ends_in_one_line(tmp_path, text, overrides, message):
    path = tmp_path / "run.yaml"
    path.write_text(text, encoding="utf-8", errors="surrogateescape")
    with pytest.raises(InputError, match=message) as error:
        load_config(path, overrides)
    assert "\n" not in str(error.value)


def test_aliases_merged_keys_interpolation_and_single_values_of_a_list():
    text = "model: {kwargs: {a: &a {q: 007, r: 1}, b: {<<: *a, r: 2}, c: *a}}"
    first = {"q": 7, "r": 1}
    assert parse_config(text, "here").model.kwargs == {"a": first, "b": {"q": 7, "r": 2}, "c": first}
    config = parse_config("seed: 7\noutput_dir: runs/${seed}", "here", ["data.root=${output_dir}_007", "seed=8"])
    assert (config.output_dir, config.data.root) == ("runs/8", "runs/8_007")
    text = "augsub: {sub_models: [{augmentations: [{name: masking}]}, {weight: 0.1}]}"
    overrides = ["augsub.sub_models.1.weight=0.3", "augsub.sub_models[0].augmentations[0].mode=off", "plugins=[a, b]"]
    config = parse_config(text, "here", [*overrides, "plugins.1=007"])
    assert config.augsub.sub_models[0].augmentations == [{"name": "masking", "mode": "off"}]
    assert (config.augsub.sub_models[1].weight, config.plugins) == (0.3, ["a", "007"])


def test_the_same_rule_holds_in_a_study(tmp_path):
    path = tmp_path / "study.yaml"
    path.write_text(
        "title: 2024_01_01\nconfigs: [1.10, 007]\nseeds: [0x10, 010]\nreport: off\n"
        "ways: {off: [], 1.10: [train.amp=off, yes], 1.1: [output_dir=007]}\n"
    )
    study = load_study(path)
    assert (study.title, study.configs, study.seeds, study.report) == ("2024_01_01", ["1.10", "007"], [16, 10], "off")
    assert study.ways == {"off": [], "1.10": ["train.amp=off", "yes"], "1.1": ["output_dir=007"]}
