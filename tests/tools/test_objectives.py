"""What teaches sub-models, by one line of a configuration: every method runs and resumes to the bit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from engine.checkpoint import load
from engine.checkpoint_file import split_tensors

SHORT = ("--config", "digits_vit", "model.kwargs.depth=2", "train.global_batch=80", "log.period=4",
         "evaluation.period=100", "data.workers=0")  # fmt: skip
TWO = "augsub.sub_models=[{augmentations: [%s]}, {augmentations: [%s]}]"
PATHS, ACTIVATIONS = "{name: drop_path, ratio: 0.2, mode: skip}", "{name: dropout, ratio: 0.2}"
METHODS = {
    "everything": (
        "augsub.sub_models=[{weight: {from: 0.1, to: 0.5, epochs: 1}, share: 0.5, learn_from: ema, augmentations: "
        "[{name: downscale, ratio: 0.5}, {name: masking, ratio: {from: 0.1, to: 0.5, epochs: 1}, strategy: block}]}, "
        "{learn_from: labels, augmentations: [{name: masking, ratio: 0.5, strategy: grid}]}]",
        "ema.enabled=true", "ema.decay=0.9", "train.skip_dropped_paths=true", "model.drop_path_rate=0.5",
    ),
    "plain masking": (
        "augsub.main_weight=0",
        "augsub.sub_models=[{weight: 1.0, learn_from: labels, augmentations: [{name: masking, ratio: 0.5}]}]",
    ),
    "teacher": (
        "augsub.sub_models=[{learn_from: teacher, augmentations: [{name: masking, ratio: 0.5}]},"
        "{learn_from: augmented_teacher, augmentations: [{name: masking, ratio: 0.5}]}]",
        "augsub.teacher={name: vit_tiny_patch16_224, checkpoint: TEACHER, kwargs: "
        "{patch_size: 2, embed_dim: 64, depth: 2, num_heads: 4}}",
    ),
    "cosub": ("augsub.objective=cosub", TWO % (PATHS, PATHS)),
    "rdrop": ("augsub.objective=rdrop", "augsub.alpha=0.5", TWO % (ACTIVATIONS, ACTIVATIONS)),
}  # fmt: skip


@pytest.fixture(scope="session")
def teacher(tmp_path_factory) -> Path:
    """The checkpoint of a short run."""
    import tools.train_net

    folder = tmp_path_factory.mktemp("teacher") / "run"
    assert tools.train_net.main([*SHORT, "train.max_iters=4", f"output_dir={folder}"]) == 0
    return folder / "checkpoints" / "last.pt"


@pytest.mark.parametrize(
    "method",
    ["everything", "teacher", *(pytest.param(m, marks=pytest.mark.slow) for m in ("plain masking", "cosub", "rdrop"))],
)
def test_every_method_resumes_to_the_bit(train_net, tmp_path, teacher, method):
    run = (*SHORT, *(word.replace("TEACHER", str(teacher)) for word in METHODS[method]))
    assert train_net(*run, f"output_dir={tmp_path}/whole", "train.max_iters=14")[0] == 0
    for stop in (7, 14):
        assert train_net(*run, "--resume", f"output_dir={tmp_path}/parts", f"train.max_iters={stop}")[0] == 0
    whole, parts = (split_tensors(load(tmp_path / name / "checkpoints" / "last.pt"))[0] for name in ("whole", "parts"))
    assert whole.keys() == parts.keys() and all(torch.equal(whole[name], parts[name]) for name in whole)
    record = json.loads((tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()[-1])
    assert {"loss", "main_loss", "sub_loss"} <= record.keys()


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
@pytest.mark.parametrize("method", ["everything", "plain masking", "cosub"])
def test_two_processes_train_like_one_with_two_micro_batches(command, torchrun, train_net, tmp_path, method, strategy):
    """The same micro-batches side by side: weights are equal but for the order of sums."""
    run = (*SHORT, *METHODS[method], "train.max_iters=4")
    one, two = (f"output_dir={tmp_path}/{name}" for name in ("one", "two"))
    assert train_net(*run, one, "train.accumulation=2")[0] == 0
    done = command(*torchrun, "tools/train_net.py", *run, two, f"distributed.strategy={strategy}")
    assert done.returncode == 0, done.stderr[-2000:]
    expected, found = (load(tmp_path / name / "checkpoints" / "last.pt")["model"] for name in ("one", "two"))
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("overrides", "error"),
    [
        (["augsub.objective=cosubb"], "objective: unknown objective 'cosubb', did you mean 'cosub'?; known: cosub, "),
        (["augsub.objective=cosub"], "augsub.objective = cosub: CoSubObjective needs two sub-models or more, not 1"),
        (["augsub.sub_models.0.learn_from=ema"], "augsub.sub_models[0].learn_from = ema: needs ema.enabled"),
        (["augsub.sub_models.0.learn_from=teacher"], "learn_from = teacher: needs augsub.teacher.name"),
        (["augsub.sub_models.0.learn_from=mian"], "[0].learn_from: unknown lesson 'mian', did you mean 'main'?"),
        (["augsub.sub_models.0.share=0"], "share of a sub-model = 0.0, allowed is a number in (0, 1]"),
        (["augsub.sub_models.0.share=0.01"], "share of a sub-model = 0.01 leaves none of 80 images"),
        (["augsub.sub_models.0.weight={from: 0, to: 1}"], "is no ramp: allowed is {from: 0.1, to: 0.5, epochs: 20}"),
        (["augsub.sub_models.0.weight=-1"], "weight of a sub-model = -1"),
        (["augsub.sub_models=[{augmentations: [{name: random_crop, ratio: {from: 0, to: 0.5, epochs: 9}}]}]"],
         "allows no crop of 4 x 4"),
        (["augsub.main_weight=0", "augsub.sub_models.0.weight=0"], "nothing learns"),
        (["augsub.teacher={name: vit_tiny_patch16_242}"], "did you mean 'vit_tiny_patch16_224'"),
        (["train.skip_dropped_paths=true", "model.name=gcvit_xxtiny", "model.kwargs={}", "data.image_size=224"],
         "model.name = gcvit_xxtiny with train.skip_dropped_paths, augsub.update_batch_norm: skip_dropped_paths: "),
        (["augsub.update_batch_norm=false"], "update_batch_norm: VisionTransformer has no BatchNorm"),
        (["augsub.update_batch_norm=false", "model.name=resnet18", "model.kwargs={}",
          "augsub.main_weight=0", "augsub.sub_models.0.learn_from=labels"],
         "augsub.sub_models: update_batch_norm = False: no main model is computed"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line(train_net, tmp_path, overrides, error):
    code, _, said = train_net(*SHORT, *overrides, f"output_dir={tmp_path}/run")
    assert (code, said.count("\n")) == (2, 1) and error in said
    assert not (tmp_path / "run").exists()
