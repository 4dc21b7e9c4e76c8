"""Text arrives as it was typed, numbers as numbers: on the command line, in files and from saved configurations."""

from __future__ import annotations

from dataclasses import replace
from functools import reduce

import pytest
import yaml

from engine.config import Config
from engine.config_file import load_config, parse_config, to_yaml
from engine.errors import InputError
from tools.comparison.runs import override_text
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
def test_text_on_the_command_line_is_what_was_typed(unchecked, word):
    for typed in (word, f" {word} "):
        config = parse_config("", "here", [f"{key}={typed}" for key in TEXT_KEYS])
        assert {value(config, key) for key in TEXT_KEYS} == {word}


@pytest.mark.parametrize("word", WORDS)
def test_text_in_a_file_is_what_was_typed(unchecked, word):
    block = parse_config(f"output_dir: {word}\ndata:\n  train_split: {word}  # here\n", "here")
    assert (block.output_dir, block.data.train_split) == (word, word)
    if "," not in word:  # ends a word in brackets
        text = f"{{output_dir: {word}, model: {{restart: [{word}, a]}}, plugins: [{word}]}}"
        flow = parse_config(text, "here", [f"model.frozen=[{word}]"])
        assert (flow.output_dir, flow.model.restart, flow.plugins) == (word, [word, "a"], [word])
        assert flow.model.frozen == [word]


def test_words_of_a_key_with_a_few_allowed_ones():
    assert parse_config("train: {amp: off}", "here").train.amp == "off"
    assert parse_config("train: {amp: bf16}", "here", ["train.amp=off"]).train.amp == "off"
    for word in ("true", "True", "FALSE", "if_available"):
        expected = {"true": True, "false": False}.get(word.lower(), word)
        assert parse_config("", "here", [f"model.pretrained={word}"]).model.pretrained == expected
    for word in ("1", "off", "1.10"):
        with pytest.raises(InputError, match=f"model.pretrained = {word}: allowed is one of true, false, if_available"):
            parse_config("", "here", [f"model.pretrained={word}"])


@pytest.mark.parametrize("word", ["null", "~", "Null", ""])
def test_null_is_null_where_a_key_may_have_it_and_quotes_make_text_of_it(word):
    key = "transform.auto_augment"
    assert parse_config(f"transform: {{auto_augment: {word}}}", "here").transform.auto_augment is None
    assert value(parse_config("transform: {auto_augment: x}", "here", [f"{key}={word}"]), key) is None
    assert value(parse_config("", "here", [f"{key}='{word}'"]), key) == word
    assert parse_config(f'transform: {{auto_augment: "{word}"}}', "here").transform.auto_augment == word


def test_nothing_is_no_text():
    for text, overrides in (("model: {name: }", []), ("", ["model.name="]), ("", ["seed= "])):
        with pytest.raises(InputError, match=r"model\.name: |seed: "):
            parse_config(text, "here", overrides)


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
        f"model: {{kwargs: {{a: {word}}}}}\noptimizer:\n  kwargs:\n    a: {word}\n", "here",
        [f"model.kwargs.b={word}", f"optimizer.kwargs={{b: {word}}}", f"augsub.sub_models=[{{augmentations: {spec}}}]",
         f"hooks=[{{a: {word}}}]"],
    )  # fmt: skip
    found = [
        config.model.kwargs["a"], config.model.kwargs["b"], config.optimizer.kwargs["b"], config.hooks[0]["a"],
        config.augsub.sub_models[0].augmentations[0]["a"][0],
    ]  # fmt: skip
    assert [(item, type(item)) for item in found] == [(expected, type(expected))] * 5


def test_numbers_stay_numbers():
    for word, expected in {"1e-3": 1e-3, "1e3": 1e3, "5": 5.0, "1_000": 1000.0}.items():
        assert parse_config(f"optimizer: {{lr: {word}}}", "here").optimizer.lr == expected
        assert parse_config("", "here", [f"optimizer.lr={word}"]).optimizer.lr == expected
    assert parse_config("", "here", ["train.compile=off", "ema.enabled=yes"]).ema.enabled is True
    with pytest.raises(InputError, match=r"seed: Value '20:30' of type 'str' could not be converted to Integer"):
        parse_config("", "here", ["seed=20:30"])


def test_interpolation_works_beside_text():
    config = parse_config("seed: 7\noutput_dir: runs/${seed}", "here", ["data.root=${output_dir}_007", "seed=8"])
    assert (config.output_dir, config.data.root) == ("runs/8", "runs/8_007")
    assert parse_config("output_dir: ${nothing}", "here", ["output_dir=off"]).output_dir == "off"


@pytest.mark.parametrize("text", NASTY)
def test_a_saved_configuration_is_read_back_unchanged(unchecked, tmp_path, text):
    config = Config(output_dir="x", plugins=[text, "b"], hooks=[{"name": text, text: [text]}])
    config.loss = replace(config.loss, name=text)
    config.log = replace(config.log, wandb=text)
    config.model = replace(config.model, kwargs={"a": text, "b": {"c": [text]}})
    saved = tmp_path / "config.yaml"
    saved.write_text(to_yaml(config), encoding="utf-8")
    assert load_config(saved) == config
    keys = ("log.wandb", "loss.name", "plugins", "hooks", "model.kwargs")  # and from what a table of runs calls them
    again = parse_config("", "here", [override_text(key, value(config, key)) for key in keys])
    assert [value(again, key) for key in keys] == [value(config, key) for key in keys]


def test_files_of_other_editors_are_read(tmp_path):
    path = tmp_path / "run.yaml"
    text = "seed: 3\r\ntrain: {amp: off}  \r\noutput_dir: ünï  \r\n"
    for encoding in ("utf-8", "utf-8-sig", "utf-16"):
        path.write_bytes(text.encode(encoding))
        config = load_config(path)
        assert (config.seed, config.train.amp, config.output_dir) == (3, "off", "ünï")
    path.write_bytes(b"seed: 3\noutput_dir: caf\xe9\n")
    with pytest.raises(InputError, match=r"run.yaml: not a readable YAML file: byte \d+: .*UTF-8"):
        load_config(path)


ALIASES = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 10)
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seed: 1\ntrain: {epochs: 2}\nseed: 3\n", "line 3: found duplicate key seed"),
        ("model:\n  kwargs:\n    a: 1\n    'a': 2\n", "line 4: found duplicate key a"),
        ("train:\n\tepochs: 3\n", "line 2: found character that cannot start any token"),
        (ALIASES, "more than 10000 values"),
        ("model: {kwargs: {a: &a [*a]}}", "recursion"),
        ("hello", "the top level must be keys with values"),
    ],
)
def test_what_is_no_good_yaml_ends_in_one_line(text, message):
    with pytest.raises(InputError, match=message) as error:
        parse_config(text, "here")
    assert "\n" not in str(error.value)


def test_aliases_and_merged_keys():
    text = "model: {kwargs: {a: &a {q: 007, r: 1}, b: {<<: *a, r: 2}, c: *a}}"
    first = {"q": 7, "r": 1}
    assert parse_config(text, "here").model.kwargs == {"a": first, "b": {"q": 7, "r": 2}, "c": first}


def test_one_value_of_a_list_can_be_set():
    text = "augsub: {sub_models: [{augmentations: [{name: masking}]}, {weight: 0.1}]}"
    overrides = ["augsub.sub_models.1.weight=0.3", "augsub.sub_models[0].augmentations[0].mode=off", "plugins=[a, b]"]
    config = parse_config(text, "here", [*overrides, "plugins.1=007"])
    assert config.augsub.sub_models[0].augmentations == [{"name": "masking", "mode": "off"}]
    assert config.augsub.sub_models[1].weight == 0.3
    assert config.plugins == ["a", "007"]


def test_the_same_rule_holds_in_a_study(tmp_path):
    path = tmp_path / "study.yaml"
    path.write_text(
        "title: 2024_01_01\nconfigs: [1.10, 007]\nseeds: [0x10, 010]\nreport: off\n"
        "ways: {off: [], 1.10: [train.amp=off, yes], 1.1: [output_dir=007]}\n"
    )
    study = load_study(path)
    assert (study.title, study.configs, study.seeds, study.report) == ("2024_01_01", ["1.10", "007"], [16, 10], "off")
    assert study.ways == {"off": [], "1.10": ["train.amp=off", "yes"], "1.1": ["output_dir=007"]}


def test_what_older_versions_saved_means_the_same():
    """They wrote for YAML 1.1, with quotes around what that takes for something else."""
    saved = (
        "model:\n  kwargs: {a: 1.0e-05, b: .inf, c: 'off', d: '1.10', e: '2024-01-01', f: 10, g: true, h: null}\n"
        "train:\n  amp: 'off'\noutput_dir: '20240101'\n"
    )
    config = parse_config(saved, "here")
    assert config.model.kwargs == yaml.safe_load(saved)["model"]["kwargs"] and config.model.kwargs["a"] == 1e-5
    assert (config.train.amp, config.output_dir) == ("off", "20240101")
