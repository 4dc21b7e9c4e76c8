from __future__ import annotations

import pytest
import torch

import augsub


def test_build_takes_a_name_a_mapping_a_list_or_an_instance():
    assert augsub.list_augmentations() == ["downscale", "drop_path", "dropout", "masking", "random_crop"]
    masking = augsub.build("masking", ratio=0.25)
    assert (masking.ratio, augsub.build("masking").ratio) == (0.25, 0.5)
    assert augsub.build(masking) is masking
    composed = augsub.build([{"name": "masking", "ratio": 0.5}, augsub.build("drop_path", ratio=0.2)])
    assert str(composed) == "masking 0.5 + drop_path 0.2"
    unusual = [
        {"name": "masking", "strategy": "block", "cell": 16},
        {"name": "drop_path", "ratio": 0.1, "mode": "skip"},
    ]
    assert str(augsub.build(unusual)) == "masking 0.5 cell=16 strategy=block + drop_path 0.1 mode=skip"
    assert str(augsub.Compose([composed, masking])) == "masking 0.5 + drop_path 0.2 + masking 0.25"


@pytest.mark.parametrize(
    ("spec", "arguments", "message"),
    [
        (
            "maskin",
            {},
            "unknown augmentation 'maskin', did you mean 'masking'?; known: downscale, drop_path, dropout, ",
        ),
        ({"ratio": 0.5}, {}, "has no 'name'; known: downscale, drop_path, dropout"),
        ({"name": ["masking"]}, {}, "has no 'name'"),
        ({"name": "masking", "rato": 0.5}, {}, "unexpected keyword argument 'rato'"),
        ("drop_path", {}, "missing a required argument: 'ratio'"),
        *(
            ("masking", {"ratio": ratio}, f"masking: ratio = {ratio!r}, allowed is a number in [0, 1)")
            for ratio in (1.0, -0.1, "half", float("nan"), True)
        ),
        ("masking", {"cell": 0}, "cell = 0, allowed is a whole number of pixels"),
        ("masking", {"mode": "drop"}, "mode = 'drop', allowed are drop_tokens, drop_windows, mask_token, zero_pixels"),
        ({"name": "masking"}, {"ratio": 0.5}, "ratio can only be given beside an augmentation's name"),
        ([], {}, "at least one is needed"),
        (3, {}, "an instance, not 3"),
    ],
)
def test_bad_descriptions_are_refused(spec, arguments, message):
    with pytest.raises(TypeError if spec == 3 else ValueError) as error:
        augsub.build(spec, **arguments)
    assert message in str(error.value)


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


def test_registration_mistakes_are_refused():
    for register, base in ((augsub.register_lesson, "Lesson"), (augsub.register_objective, "Objective")):
        with pytest.raises(TypeError, match=f"no subclass of {base}"):
            register("mine")(dict)
    with pytest.raises(ValueError, match="lesson 'main' is registered already"):
        augsub.register_lesson("main")(type("Mine", (augsub.Lesson,), {}))

    def mine(**attributes):
        return type("Mine", (augsub.SubModelAugmentation,), attributes)

    with pytest.raises(ValueError, match="augmentation 'masking' is registered already"):
        augsub.register("masking")(mine(sites=("tokens",)))
    for attributes in ({}, {"sites": "tokens"}):
        with pytest.raises(TypeError, match="Mine must name its sites in a tuple"):
            augsub.register("siteless")(mine(**attributes))
    with pytest.raises(TypeError, match="no subclass of SubModelAugmentation"):
        augsub.register("function")(lambda x: x)
