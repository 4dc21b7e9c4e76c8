from __future__ import annotations

import copy
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pytest
import torch
from timm.layers import DropPath
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.utils.checkpoint import checkpoint

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
    state = torch.get_rng_state()
    model = augsub.patch(any_model).train(training)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(seeded(model, images), expected)
    if training:
        expected.sum().backward()
        seeded(model, images).sum().backward()
        for name, parameter in expected_model.named_parameters():
            assert torch.equal(model.get_parameter(name).grad, parameter.grad), name


def test_unpatch_gives_back_the_plain_model(any_model, images):
    plain = copy.deepcopy(any_model)
    model = augsub.unpatch(augsub.patch(any_model))
    assert type(model) is type(plain) and str(model) == str(plain)
    assert list(model.state_dict()) == list(plain.state_dict())
    before, after = ({name: set(vars(module)) for name, module in each.named_modules()} for each in (plain, model))
    assert after == before
    assert torch.equal(seeded(model, images), seeded(plain, images))
    with pytest.raises(TypeError, match="augsub"):
        model(images, augsub="masking")


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
    twin = clone(patched_model.eval()).eval()
    cell = {} if augsub.supports(patched_model)["masking"] == "tokens" else {"cell": 8}
    masking = augsub.build({"name": "masking", "ratio": 0.5, **cell})
    expected = seeded(patched_model, images, augsub=masking)
    assert torch.equal(seeded(twin, images, augsub=masking), expected)
    assert torch.equal(seeded(twin, images), seeded(patched_model, images))  # nothing is left active in either
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert not torch.equal(seeded(twin, images, augsub=masking), expected)
    augsub.unpatch(twin)
    assert torch.equal(seeded(patched_model, images, augsub=masking), expected)


def test_a_copy_of_a_compiled_model_has_its_own_weights(make_model, images):
    model = augsub.patch(make_model("vit")).eval()
    model.compile(backend="eager")
    expected = model(images)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(images), expected)
        torch.nn.init.zeros_(twin.head.weight)
        assert not torch.equal(twin(images), expected)


def test_swin_gets_a_mask_token_without_weight_decay(make_model):
    model = augsub.patch(make_model("swin"))
    assert model.mask_token.shape == (1, 1, 16)
    assert 0.01 < model.mask_token.std() < 0.03
    assert "mask_token" in model.no_weight_decay()


def test_batch_norm_keeps_the_statistics_of_the_main_model_alone_if_it_shall(make_model):
    plain = make_model("resnet").train()
    shared = augsub.patch(copy.deepcopy(plain))
    own = copy.deepcopy(augsub.patch(copy.deepcopy(plain), update_batch_norm=False))
    images = images_for("resnet")
    plain(images), shared(images), own(images)
    for name, augmentation in (("masking", 0.5), ("random_crop", 0.5)):
        logits = seeded(own, images, augsub=name, augsub_ratio=augmentation)
        assert torch.equal(logits, seeded(shared, images, augsub=name, augsub_ratio=augmentation))
        logits.sum().backward()
    for name, buffer in plain.named_buffers():
        assert torch.equal(own.get_buffer(name), buffer) and not torch.equal(shared.get_buffer(name), buffer), name
    plain(images), own(images)  # it goes on
    assert all(torch.equal(own.get_buffer(name), buffer) for name, buffer in plain.named_buffers())
    labels_alone = [augsub.SubModel("masking", ratio=0.5, learn_from="labels")]
    with pytest.raises(ValueError, match=r"^update_batch_norm = False: no main model is computed"):
        augsub.SubModelObjective(torch.nn.CrossEntropyLoss(), labels_alone, main_weight=0).prepare(own)
    vit = make_model("vit")
    with pytest.raises(ValueError, match=r"^update_batch_norm: VisionTransformer has no BatchNorm"):
        augsub.patch(vit, update_batch_norm=False)
    assert type(augsub.patch(vit).eval()(torch.randn(1, 3, 32, 32))) is torch.Tensor  # it was not left half patched


@pytest.mark.slow
def test_batch_norm_keeps_its_statistics_when_compiled(make_model):
    torch._dynamo.reset()
    images, model = images_for("resnet"), augsub.patch(make_model("resnet"), update_batch_norm=False).train()
    compiled, before = torch.compile(model, fullgraph=True), copy.deepcopy(dict(model.named_buffers()))
    compiled(images, augsub="masking", augsub_ratio=0.5).sum().backward()
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())
    compiled(images)
    assert not any(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())


@dataclass
class Output:
    logits: torch.Tensor


class Recomputing(nn.Module):
    """Computes its residual branches again in backward, by torch alone: no attribute tells of it."""

    def __init__(self, is_reentrant: bool, has_own_output: bool = False) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 8, 8)
        self.branches = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))
        self.drop_path = nn.ModuleList(DropPath(0.1) for _ in range(4))
        self.head = nn.Linear(8, 10)
        self.is_reentrant, self.has_own_output, self.recomputes = is_reentrant, has_own_output, False

    def set_grad_checkpointing(self, recomputes: bool) -> None:
        self.recomputes = recomputes

    def forward(self, images):
        tokens = self.stem(images).flatten(2).mT
        for branch, drop_path in zip(self.branches, self.drop_path, strict=True):
            block = lambda tokens, a=branch, b=drop_path: tokens + b(a(tokens).tanh())  # noqa: E731
            tokens = checkpoint(block, tokens, use_reentrant=self.is_reentrant) if self.recomputes else block(tokens)
        logits = self.head(tokens.mean(1))
        return Output(logits) if self.has_own_output else logits


@pytest.mark.parametrize(
    ("name", "model"),
    [
        *(("drop_path", family) for family in ("vit", "swin", "resnet")),
        ("random_crop", "swin"),
        *(("drop_path", Recomputing(*how)) for how in ((False,), (True,), (False, True))),
    ],
    ids=str,
)
@pytest.mark.parametrize("one_graph", [True, False])
def test_gradient_checkpointing_runs_blocks_again_in_the_same_state(name, model, one_graph, make_model, images, labels):
    objective = augsub.SubModelObjective(nn.CrossEntropyLoss(), [augsub.SubModel(name, ratio=0.5)])
    model = augsub.patch(make_model(model) if isinstance(model, str) else copy.deepcopy(model)).train()
    start, gradients = copy.deepcopy(model.state_dict()), []
    for checkpointing in (False, True):
        model.load_state_dict(start)  # BatchNorm's statistics move
        model.zero_grad()
        model.set_grad_checkpointing(checkpointing)
        if one_graph:
            seeded(objective, model, images, labels).loss.backward()
        else:
            seeded(objective.backward, model, images, labels)
        gradients.append([parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None])
    for plain, checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, checkpointed, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("name", "family"), SLOW_BUT_ONE_PER_FAMILY)
def test_compiles_into_two_graphs_without_a_break(name, family, make_model):
    images = images_for(family)
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


@pytest.mark.parametrize(
    ("name", "family"), [("masking", "vit"), ("drop_path", "resnet"), ("masking", "swin"), ("random_crop", "swin")]
)
def test_a_main_forward_is_not_touched_by_another_threads_sub_forward(name, family, make_model):
    model, images, stop = augsub.patch(make_model(family)).eval(), images_for(family), threading.Event()

    @torch.no_grad()
    def sub_forwards() -> int:
        count = 0
        while not stop.is_set():
            model(images, augsub=sub_model(name, family))
            count += 1
        return count

    with torch.no_grad(), ThreadPoolExecutor(1) as thread:
        alone = model(images)
        counting = thread.submit(sub_forwards)
        try:
            are_equal = [torch.equal(model(images), alone) for _ in range(60)]
        finally:
            stop.set()
    assert counting.result() > 1 and all(are_equal)


def test_sub_forwards_of_different_kinds_do_not_mix(make_model, images):
    """Each at a ratio of its own: the number of tokens that the blocks see tells them apart."""
    model = augsub.patch(make_model("vit")).eval()
    lengths = threading.local()
    model.blocks[0].register_forward_pre_hook(lambda module, args: setattr(lengths, "tokens", args[0].shape[1]))

    @torch.no_grad()
    def tokens_at(ratio: float) -> list[int]:
        return [model(images, augsub="masking", augsub_ratio=ratio) is not None and lengths.tokens for _ in range(60)]

    with ThreadPoolExecutor(3) as threads:
        found = list(threads.map(tokens_at, [0.25, 0.5, 0.75]))
    assert found == [[1 + 12] * 60, [1 + 8] * 60, [1 + 4] * 60]


def test_an_error_in_a_sub_forward_and_a_copy_made_in_one_keep_nobody_waiting(make_model, images):
    model, copies = augsub.patch(make_model("vit")).eval(), []
    with pytest.raises(ValueError, match="leaves none"):
        model(images, augsub="masking", augsub_ratio=0.99)
    handle = model.blocks[0].register_forward_pre_hook(lambda *_: copies.append(copy.deepcopy(model)))
    model(images, augsub="masking", augsub_ratio=0.5)
    handle.remove()
    with ThreadPoolExecutor(1) as thread:
        for each in (model, *copies):
            assert thread.submit(each, images, augsub="masking").result(timeout=60).shape == (len(images), 10)


def swap(place: str, make=copy.deepcopy):
    """Replaces the module at that place."""
    return lambda model: model.set_submodule(place, make(model.get_submodule(place)))


REPLACED = {
    "patch_drop": ("vit", swap("patch_drop", lambda _: nn.Identity()), "masking", "patch_drop was replaced"),
    "block, drop_path": ("vit", swap("blocks.1"), "drop_path", r"blocks\.1\.drop_path1 was replaced"),
    "block, dropout": ("vit", swap("blocks.1"), "dropout", r"blocks\.1\.[\w.]+ was replaced"),
    "dropout": ("vit", swap("blocks.2.mlp.drop1"), "dropout", r"blocks\.2\.mlp\.drop1 was replaced"),
    "stem": ("swin", swap("patch_embed"), "masking", "patch_embed was replaced"),
    "added": ("vit", lambda model: model.blocks.append(copy.deepcopy(model.blocks[0])), None, r"blocks\.3.* was added"),
}


@pytest.mark.parametrize("case", REPLACED)
def test_a_site_that_is_gone_or_new_is_noticed_until_the_model_is_patched_again(case, make_model, images):
    family, change, name, problem = REPLACED[case]
    model = augsub.patch(make_model(family)).eval()
    change(model)
    augmentation = sub_model(name or "drop_path", family)
    objective = augsub.SubModelObjective(nn.CrossEntropyLoss(), [augsub.SubModel(augmentation)])
    forward = [lambda model: model(images, augsub=augmentation)] if name else []  # does not look for what is new
    for use in (objective.prepare, augsub.supports, *forward):
        with pytest.raises(ValueError, match=rf"{problem} after augsub\.patch.*unpatch the model and patch it again"):
            use(model)
    assert torch.isfinite(model(images)).all()  # the main model has no site
    augsub.patch(augsub.unpatch(model)).eval()
    assert not torch.equal(objective.prepare(model)(images, augsub=augmentation), model(images))


def test_other_parts_may_be_replaced(make_model, images):
    model = augsub.patch(make_model("vit"))
    model.reset_classifier(3)
    model.blocks[0] = torch.compile(model.blocks[0], backend="eager")  # a wrapper, with the same modules inside
    for augmentation in augsub.supports(model):
        assert model(images, augsub=augmentation, augsub_ratio=0.5).shape == (len(images), 3)
