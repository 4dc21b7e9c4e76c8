from __future__ import annotations

import pytest
import torch

import augsub


def test_built_ins_are_listed():
    assert augsub.list_augmentations() == ["drop_path", "dropout", "masking", "random_crop"]


def test_build_takes_a_name_a_mapping_a_list_or_an_instance():
    masking = augsub.build("masking", ratio=0.25)
    assert masking.ratio == 0.25
    assert augsub.build("masking").ratio == 0.5
    assert augsub.build(masking) is masking
    assert type(augsub.build("droppath", ratio=0.1)) is type(augsub.build("drop_path", ratio=0.1))
    composed = augsub.build([{"name": "masking", "ratio": 0.5}, augsub.build("drop_path", ratio=0.2)])
    assert [member.name for member in composed.members] == ["masking", "drop_path"]
    assert [member.name for member in augsub.Compose([composed, masking]).members] == [
        "masking",
        "drop_path",
        "masking",
    ]


@pytest.mark.parametrize(
    ("spec", "arguments", "message"),
    [
        ("maskin", {}, "unknown augmentation 'maskin', did you mean 'masking'?; known: drop_path, dropout"),
        ({"ratio": 0.5}, {}, "has no 'name'"),
        ({"name": None, "ratio": 0.5}, {}, "has no 'name'"),
        ({"name": ["masking"]}, {}, "has no 'name'; known: drop_path, dropout"),
        ({"name": "masking", "rato": 0.5}, {}, "unexpected keyword argument 'rato'"),
        ("drop_path", {}, "missing a required argument: 'ratio'"),
        ("masking", {"ratio": 1.0}, "masking: ratio = 1.0, allowed is a number in [0, 1)"),
        ("masking", {"ratio": -0.1}, "ratio = -0.1"),
        ("masking", {"ratio": "half"}, "ratio = 'half'"),
        ("masking", {"ratio": float("nan")}, "ratio = nan"),
        ("masking", {"cell": 0}, "cell = 0, allowed is a whole number of pixels"),
        ("masking", {"mode": "drop"}, "mode = 'drop', allowed are drop_tokens, drop_windows, mask_token, zero_pixels"),
        ({"name": "masking"}, {"ratio": 0.5}, "ratio can only be given beside an augmentation's name"),
        ([], {}, "at least one is needed"),
    ],
)
def test_bad_descriptions_are_refused(spec, arguments, message):
    with pytest.raises(ValueError) as error:
        augsub.build(spec, **arguments)
    assert message in str(error.value)


def test_what_is_no_description_is_refused():
    with pytest.raises(TypeError, match="not 3"):
        augsub.build(3)


def test_a_new_augmentation_is_one_class(make_model, images):
    @augsub.register("token_noise")
    class TokenNoise(augsub.SubModelAugmentation):
        sites = ("tokens",)

        def tokens(self, tokens):
            tokens.values = tokens.values + self.ratio * torch.randn_like(tokens.values)
            return tokens

    assert "token_noise" in augsub.list_augmentations()
    model = augsub.patch(make_model("vit")).eval()
    torch.manual_seed(0)
    logits = model(images, augsub="token_noise", augsub_ratio=0.5)
    torch.manual_seed(0)
    tokens = model._pos_embed(model.patch_embed(images))
    tokens = tokens + 0.5 * torch.randn_like(tokens)
    torch.testing.assert_close(logits, model.forward_head(model.norm(model.blocks(tokens))))
    with pytest.raises(ValueError, match="token_noise has no site in ResNet: it acts at tokens"):
        augsub.patch(make_model("resnet"))(images, augsub="token_noise", augsub_ratio=0.5)


def test_registration_mistakes_are_refused():
    with pytest.raises(ValueError, match="'masking' is registered already"):
        augsub.register("masking")(type("Mine", (augsub.SubModelAugmentation,), {"sites": ("tokens",)}))
    with pytest.raises(ValueError, match="'droppath' is registered already"):
        augsub.register("droppath")(type("Mine", (augsub.SubModelAugmentation,), {"sites": ("tokens",)}))
    for attributes in ({}, {"sites": "tokens"}):
        with pytest.raises(TypeError, match="Mine must name its sites in a tuple"):
            augsub.register("siteless")(type("Mine", (augsub.SubModelAugmentation,), attributes))
    with pytest.raises(TypeError, match="no subclass of SubModelAugmentation"):
        augsub.register("function")(lambda x: x)


def test_an_augmentation_says_what_it_is_in_a_few_characters():
    composed = augsub.build([{"name": "random_crop", "ratio": 0.5}, {"name": "masking", "ratio": 0.25}])
    assert str(composed) == "random_crop 0.5 + masking 0.25" and f"{composed.members[1]}" == "masking 0.25"
