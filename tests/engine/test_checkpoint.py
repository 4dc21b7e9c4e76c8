"""Checkpoint files: atomic, verified, harmless."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from engine import atomic
from engine.checkpoint import file as checkpoint
from engine.checkpoint.reading import load_facts, load_strictly
from engine.errors import InputError, RunError


def test_a_failed_save_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    path = tmp_path / "last.pt"
    checkpoint.save({"step": 1}, path)

    def full_disk(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full_disk)
    with pytest.raises(RunError, match=r"last.pt cannot be written: .*No space left.*still there"):
        checkpoint.save({"step": 2}, path)
    assert checkpoint.load(path) == {"step": 1}
    assert [file.name for file in tmp_path.iterdir()] == ["last.pt"]


def test_linked_checkpoints_are_independent_of_later_saves(tmp_path):
    checkpoint.save({"step": 1}, tmp_path / "last.pt")
    atomic.link(tmp_path / "last.pt", tmp_path / "best.pt")
    checkpoint.save({"step": 2}, tmp_path / "last.pt")
    assert checkpoint.load(tmp_path / "best.pt") == {"step": 1}


def test_damaged_and_dangerous_checkpoints_are_refused(tmp_path):
    class Harmful:
        def __reduce__(self):
            return (open, (str(tmp_path / "executed"), "w"))

    path = tmp_path / "bad.pt"
    torch.save({"model": Harmful()}, path)
    with pytest.raises(InputError, match="holds more than tensors"):
        checkpoint.load(path)
    assert not (tmp_path / "executed").exists()
    checkpoint.save({"model": {"weight": torch.zeros(1000)}}, path)
    for size in (0, 10, 1000, path.stat().st_size - 100):
        path.write_bytes(path.read_bytes()[:size])
        with pytest.raises(InputError, match="is damaged"):
            checkpoint.load(path)
        checkpoint.save({"model": {"weight": torch.zeros(1000)}}, path)
    with pytest.raises(InputError, match="does not exist"):
        checkpoint.load(tmp_path / "none.pt")
    torch.jit.trace(nn.Linear(2, 2), torch.zeros(1, 2)).save(tmp_path / "ViT-B-16.pt")  # as OpenAI ships CLIP
    with pytest.raises(InputError, match=r"TorchScript archive, which holds code; .*jit\.load\(FILE\)\.state_dict"):
        checkpoint.load(tmp_path / "ViT-B-16.pt")
    (tmp_path / "page.pth").write_text("<html>not found</html>")
    with pytest.raises(InputError, match="is damaged or no checkpoint"):
        checkpoint.load(tmp_path / "page.pth")


@pytest.mark.parametrize("is_old", [False, True], ids=["now", "before torch 1.6"])
def test_plain_values_are_read_without_the_tensors(tmp_path, is_old):
    state = {"config": "seed: 1", "model": {"weight": torch.zeros(2)}}
    torch.save(state, tmp_path / "file.pth", _use_new_zipfile_serialization=not is_old)
    assert load_facts(tmp_path / "file.pth") == {"config": "seed: 1", "model": {}}


def test_weights_of_another_model_are_refused_with_reasons(make_model, tmp_path):
    import augsub

    model = augsub.patch(make_model("swin"))
    with pytest.raises(InputError, match=r"of another model: .*and \d+ more"):
        load_strictly(model, make_model("vit").state_dict(), tmp_path)
    plain = make_model("swin").state_dict()
    token = model.mask_token.detach().clone()
    load_strictly(model, plain, tmp_path)
    assert torch.equal(model.mask_token, token)
    assert torch.equal(model.state_dict()["norm.weight"], plain["norm.weight"])
