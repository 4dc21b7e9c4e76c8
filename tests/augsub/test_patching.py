from __future__ import annotations

import copy
import pickle

import pytest
import torch

import augsub

# masks of 8-pixel cells fit the tiny images of every family; the ViT drops its 8-pixel patches
SUB_MODELS = {
    "masking": {"vit": {}, "swin": {"cell": 8}, "resnet": {"cell": 8}},
    "drop_path": {"vit": {}, "swin": {}, "resnet": {}},
    "dropout": {"vit": {}, "swin": {}},
    "random_crop": {"vit": {}, "swin": {}, "resnet": {}},
}
SUPPORTED = [(name, family) for name, families in SUB_MODELS.items() for family in families]
FIRST = [("masking", "vit"), ("random_crop", "swin"), ("drop_path", "resnet")]  # token, image and module state
SLOW_BUT_ONE_PER_FAMILY = [pytest.param(*case, marks=() if case in FIRST else pytest.mark.slow) for case in SUPPORTED]


def seeded(function, *args, **kwargs):
    torch.manual_seed(7)
    return function(*args, **kwargs)


def images_for(family):
    side = 64 if family == "resnet" else 32  # crops of a ResNet are multiples of its stride, 32
    return torch.randn(4, 3, side, side)


def sub_model(name, family):
    return augsub.build({"name": name, "ratio": 0.5, **SUB_MODELS[name][family]})


@pytest.mark.parametrize("training", [True, False])
def test_main_model_is_bit_identical(any_model, images, training):
    expected_model = copy.deepcopy(any_model).train(training)
    expected = seeded(expected_model, images)
    model = augsub.patch(any_model).train(training)
    assert torch.equal(seeded(model, images), expected)
    if training:
        expected.sum().backward()
        seeded(model, images).sum().backward()
        for name, parameter in expected_model.named_parameters():
            assert torch.equal(model.get_parameter(name).grad, parameter.grad), name


def test_unpatch_gives_back_the_plain_model(any_model, images):
    plain = copy.deepcopy(any_model)
    state = {name: dict(vars(module)) for name, module in any_model.named_modules()}
    model = augsub.unpatch(augsub.patch(any_model))
    assert type(model) is type(plain)
    assert str(model) == str(plain)
    assert list(model.state_dict()) == list(plain.state_dict())
    assert {name: set(vars(module)) for name, module in model.named_modules()} == {
        name: set(attributes) for name, attributes in state.items()
    }
    assert torch.equal(seeded(model, images), seeded(plain, images))
    with pytest.raises(TypeError, match="augsub"):
        model(images, augsub="masking")


def test_patching_draws_no_global_random_number(family_model):
    state = torch.get_rng_state()
    augsub.patch(family_model)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(("name", "family"), SUPPORTED)
def test_state_is_restored_after_the_sub_forward_and_after_an_error_in_it(name, family, make_model):
    images = images_for(family)

    class Stop(Exception):
        pass

    def stop(*_):
        raise Stop

    model = augsub.patch(make_model(family)).train()
    expected = seeded(model, images)
    seeded(model, images, augsub=sub_model(name, family))
    handle = list(model.modules())[-1].register_forward_hook(stop)
    with pytest.raises(Stop):
        model(images, augsub=sub_model(name, family))
    handle.remove()
    if family != "resnet":  # there every forward in training mode moves BatchNorm statistics, not the output
        assert torch.equal(seeded(model.eval(), images), seeded(model, images))
    assert torch.equal(seeded(model.train(), images), expected)


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_are_patched_and_independent(clone, patched_model, images):
    twin = clone(patched_model)
    assert augsub.is_patched(twin)
    cell = {} if augsub.supports(patched_model)["masking"] == "tokens" else {"cell": 8}
    masking = augsub.build({"name": "masking", "ratio": 0.5, **cell})
    expected = seeded(patched_model.eval(), images, augsub=masking)
    assert torch.equal(seeded(twin.eval(), images, augsub=masking), expected)
    assert torch.equal(seeded(twin, images), seeded(patched_model, images))  # nothing is left active in either
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert torch.equal(seeded(patched_model, images, augsub=masking), expected)
    assert not torch.equal(seeded(twin, images, augsub=masking), expected)
    augsub.unpatch(twin)
    assert augsub.is_patched(patched_model)
    assert torch.equal(seeded(patched_model, images, augsub=masking), expected)


def test_swin_gets_a_mask_token_without_weight_decay(make_model):
    model = augsub.patch(make_model("swin"))
    assert model.mask_token.shape == (1, 1, 16)
    assert 0.01 < model.mask_token.std() < 0.03
    assert "mask_token" in model.no_weight_decay()
    assert "mask_token" not in augsub.unpatch(model).state_dict()


@pytest.mark.parametrize(
    ("name", "family"),
    [("drop_path", "vit"), ("drop_path", "swin"), ("drop_path", "resnet"), ("random_crop", "swin")],
)
@pytest.mark.parametrize("one_graph", [True, False])
def test_gradient_checkpointing_runs_blocks_again_in_the_same_state(
    name, family, one_graph, make_model, images, labels
):
    objective = augsub.SubModelObjective(torch.nn.CrossEntropyLoss(), [augsub.SubModel(name, ratio=0.5)])
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = augsub.patch(make_model(family)).train()
        model.set_grad_checkpointing(checkpointing)
        torch.manual_seed(3)
        if one_graph:
            objective(model, images, labels).loss.backward()
        else:
            objective.backward(model, images, labels)
        gradients.append([parameter.grad for parameter in model.parameters() if parameter.grad is not None])
    for plain, checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, checkpointed, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("name", "family"), SLOW_BUT_ONE_PER_FAMILY)
def test_compiles_into_two_graphs_without_a_break(name, family, make_model):
    images = images_for(family)
    from torch._dynamo.testing import CompileCounter

    torch._dynamo.reset()
    counter = CompileCounter()
    model = augsub.patch(make_model(family)).train()
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    augmentation = sub_model(name, family)
    for _ in range(2):
        main, sub = seeded(compiled, images), seeded(compiled, images, augsub=augmentation)
    assert counter.frame_count == 2
    torch.testing.assert_close(main, seeded(model, images))
    torch.testing.assert_close(sub, seeded(model, images, augsub=augmentation))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "family"), SUPPORTED)
def test_compiled_code_computes_what_eager_mode_computes(name, family, make_model):
    torch._dynamo.reset()
    model, images, augmentation = augsub.patch(make_model(family)).eval(), images_for(family), sub_model(name, family)
    with torch._inductor.config.patch(fallback_random=True):  # draws the random numbers of eager mode
        compiled = torch.compile(model, fullgraph=True)
        torch.testing.assert_close(compiled(images), model(images), rtol=1e-4, atol=1e-5)
        sub = seeded(compiled, images, augsub=augmentation)
    torch.testing.assert_close(sub, seeded(model, images, augsub=augmentation), rtol=1e-4, atol=1e-5)


def test_misuse_is_refused(make_model, images):
    model = augsub.patch(make_model("vit"))
    with pytest.raises(ValueError, match="patched already"):
        augsub.patch(model)
    with pytest.raises(ValueError, match="without augsub"):
        model(images, augsub_ratio=0.5)
    with pytest.raises(ValueError, match="not patched"):
        augsub.unpatch(make_model("vit"))
    with pytest.raises(ValueError, match="before wrapping"):
        augsub.patch(torch.nn.DataParallel(make_model("vit")))
    with pytest.raises(TypeError, match="not 'resnet18'"):
        augsub.patch("resnet18")
