"""Checkpoints: atomic, verified, harmless; which ones of a run there are, and which one is used."""

from __future__ import annotations

import logging
import os
import pickle
import shutil
import stat
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from engine import atomic, checkpoint_file
from engine.checkpoint import CheckpointStore, check_structure, load, load_metadata, verify
from engine.checkpoint_file import join_tensors, split_tensors
from engine.distributed import Process
from engine.errors import InputError, RunError
from engine.run_folder import RunFolder

ROOT = Path(__file__).parents[2]
ALONE = Process(rank=0, world_size=1, device=torch.device("cpu"))


@pytest.fixture
def folder(tmp_path) -> RunFolder:
    (tmp_path / "checkpoints").mkdir()
    return RunFolder(tmp_path)


def state(iteration: int) -> dict:
    return {"iteration": iteration, "config": "", "model": {"weight": torch.full((500,), float(iteration))}}


def save_all(folder: RunFolder, count: int, **settings) -> CheckpointStore:
    """States 1 to `count`; every second one is numbered, the first one is the best."""
    store = CheckpointStore(folder, ALONE, **settings)
    for iteration in range(1, count + 1):
        store.save(state(iteration), is_best=iteration == 1, is_numbered=iteration % 2 == 0)
    store.wait()
    return store


def damage(path: Path) -> None:
    """Flip a bit in the middle of the weights, in the file itself, and so under all of its names."""
    content = bytearray(path.read_bytes())
    content[content.index(torch.tensor(load(path)["iteration"]).float().numpy().tobytes() * 3) + 5] ^= 1
    with open(path, "r+b") as file:
        file.write(content)


def test_a_failed_save_leaves_the_old_checkpoint(folder, monkeypatch):
    store = save_all(folder, 1)

    def full_disk(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full_disk)
    with pytest.raises(RunError, match=r"last.pt cannot be written: No space left on device.*still there"):
        store.save(state(2), is_best=False, is_numbered=False)
    assert load(folder.last)["iteration"] == 1
    assert {file.name for file in folder.checkpoints.iterdir()} == {"last.pt", "best.pt"}


def test_a_file_is_on_the_disk_before_it_takes_its_name_and_the_name_before_the_save_ends(tmp_path, monkeypatch):
    fsync, replace, calls = os.fsync, os.replace, []

    def synced(descriptor: int) -> None:
        found = os.fstat(descriptor)
        calls.append("folder" if stat.S_ISDIR(found.st_mode) else found.st_size)
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", lambda *paths: calls.append("rename") or replace(*paths))
    checkpoint_file.save({"weight": torch.zeros(100)}, tmp_path / "last.pt")
    whole = [(tmp_path / "last.pt").stat().st_size, "rename", "folder"]
    assert calls == whole
    calls.clear()
    monkeypatch.setattr(os, "link", lambda *paths: os.open("/no/links/here", os.O_RDONLY))  # a file system without
    atomic.link(tmp_path / "last.pt", tmp_path / "best.pt")
    assert calls == whole


class Harmful:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return (open, (str(self.path), "w"))


def test_damaged_and_dangerous_checkpoints_are_refused(tmp_path):
    path = tmp_path / "bad.pt"
    torch.save({"model": Harmful(tmp_path / "executed")}, path)
    with pytest.raises(InputError, match="holds more than tensors"):
        checkpoint_file.load(path)
    assert not (tmp_path / "executed").exists()
    checkpoint_file.save({"model": {"weight": torch.zeros(1000)}}, path)
    for size in (0, 10, 1000, path.stat().st_size - 100):
        path.write_bytes(path.read_bytes()[:size])
        with pytest.raises(InputError, match="is damaged"):
            checkpoint_file.load(path)
        checkpoint_file.save({"model": {"weight": torch.zeros(1000)}}, path)
    with pytest.raises(InputError, match="does not exist"):
        checkpoint_file.load(tmp_path / "none.pt")
    torch.jit.trace(nn.Linear(2, 2), torch.zeros(1, 2)).save(tmp_path / "ViT-B-16.pt")  # as OpenAI ships CLIP
    with pytest.raises(InputError, match=r"TorchScript archive, which holds code; .*jit\.load\(FILE\)\.state_dict"):
        checkpoint_file.load(tmp_path / "ViT-B-16.pt")
    (tmp_path / "page.pth").write_text("<html>not found</html>")
    with pytest.raises(InputError, match="is damaged or no checkpoint"):
        checkpoint_file.load(tmp_path / "page.pth")


@pytest.mark.parametrize("is_old", [False, True], ids=["now", "before torch 1.6"])
def test_plain_values_are_read_without_the_tensors(tmp_path, is_old):
    state = {"config": "seed: 1", "model": {"weight": torch.zeros(2)}}
    torch.save(state, tmp_path / "file.pth", _use_new_zipfile_serialization=not is_old)
    assert load_metadata(tmp_path / "file.pth") == {"config": "seed: 1", "model": {}}


@pytest.mark.parametrize(("keep", "in_background"), [(2, False), (2, True), (0, False)])
def test_last_previous_best_and_the_newest_numbered_ones(folder, keep, in_background):
    save_all(folder, 7, keep=keep, in_background=in_background)
    found = {path.name: load(path)["iteration"] for path in folder.checkpoints.iterdir()}
    numbered = {"iter_4.pt": 4, "iter_6.pt": 6} if keep else {}
    assert found == {"last.pt": 7, "previous.pt": 6, "best.pt": 1, **numbered}


def test_a_damaged_one_is_named_and_the_one_before_it_used(folder, caplog):
    store = save_all(folder, 9, keep=3)
    used_after = {"last.pt": "previous.pt", "previous.pt": "iter_6.pt", "iter_6.pt": "iter_4.pt"}
    used_after["iter_4.pt"] = "best.pt"
    for damaged, used in used_after.items():  # the previous one is iter_8.pt too
        damage(folder.checkpoints / damaged)
        with caplog.at_level(logging.WARNING, logger="engine"):
            assert store.newest() == folder.checkpoints / used
        assert f"{folder.checkpoints / damaged} is damaged: the checksum of" in caplog.text
        assert f"using {used} instead" in caplog.text
        caplog.clear()
    damage(folder.best)
    with pytest.raises(InputError, match=r"no intact checkpoint in .*last\.pt is damaged.*best\.pt is damaged"):
        store.newest()


def test_a_kill_in_the_first_save_after_a_damaged_last_one_leaves_the_one_that_was_used(folder, monkeypatch):
    store = save_all(folder, 3)
    damage(folder.last)
    assert store.newest() == folder.previous
    with monkeypatch.context() as killing, pytest.raises(KeyboardInterrupt):
        killing.setattr("engine.atomic.put_in_place", interrupt_at("last.pt"))
        store.save(state(4), is_best=False, is_numbered=False)
    assert load(CheckpointStore(folder, ALONE).newest())["iteration"] == 2
    store.save(state(4), is_best=False, is_numbered=False)
    store.save(state(5), is_best=False, is_numbered=False)
    assert [load(path)["iteration"] for path in (folder.last, folder.previous)] == [5, 4]


def interrupt_at(name: str):
    def put_in_place(temporary: Path, path: Path) -> None:
        if path.name == name:
            raise KeyboardInterrupt
        os.replace(temporary, path)

    return put_in_place


def test_only_checkpoints_of_a_run_are_continued(folder):
    assert CheckpointStore(folder, ALONE).newest() is None
    torch.save({"weight": torch.zeros(3)}, folder.last)
    with pytest.raises(InputError, match="is not one of a run"):
        CheckpointStore(folder, ALONE).newest()


def test_a_save_in_the_background_writes_the_state_of_its_moment_and_tells_its_error(folder):
    store = CheckpointStore(folder, ALONE, in_background=True)
    weights, groups, go_on = torch.zeros(500), [{"lr": 1.0}], threading.Event()
    store._thread.submit(go_on.wait)
    store.save({"iteration": 1, "config": "", "model": {"weight": weights}, "groups": groups}, False, False)
    weights.fill_(1)
    groups[0]["lr"] = 2.0
    go_on.set()
    store.wait()
    saved = load(folder.last)
    assert saved["model"]["weight"].sum() == 0 and saved["groups"] == [{"lr": 1.0}]
    folder.last.unlink()
    folder.checkpoints.rmdir()
    store.save(state(2), False, False)
    with pytest.raises(RunError, match=r"last\.pt cannot be written: No such file or directory"):
        store.wait()
    store.wait()  # told once


@pytest.fixture
def shards(tmp_path) -> Path:
    """A folder that an earlier version wrote, see its README.md."""
    return shutil.copytree(ROOT / "tests" / "data" / "shards_before_23", tmp_path / "shards.pt")


def test_a_folder_of_shards_is_read_as_the_version_did_that_wrote_it(shards):
    verify(shards)
    tensors, plain = split_tensors(load(shards))
    expected = load_file(shards / "expected.safetensors")
    assert {".".join(map(str, path)): tensor for path, tensor in tensors.items()}.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[".".join(map(str, path))]) for path, tensor in tensors.items())
    assert plain.keys() == load_metadata(shards).keys() and plain["iteration"] == 4


@pytest.mark.parametrize("name", [".metadata", "state.pt", "__0_0.distcp"])
def test_a_damaged_or_dangerous_folder_of_shards_is_refused(shards, tmp_path, name):
    content = bytearray((shards / name).read_bytes())
    content[len(content) // 2] ^= 1
    (shards / name).write_bytes(content)
    with pytest.raises(InputError, match="is damaged"):
        verify(shards)
    dangerous = pickle.dumps(Harmful(tmp_path / "executed"))
    (shards / name).write_bytes(dangerous + bytes(max(0, len(content) - len(dangerous))))  # the index fits
    with pytest.raises(InputError, match="is damaged or no checkpoint"):
        load(shards)
    assert not (tmp_path / "executed").exists()


def test_a_folder_of_shards_as_the_last_checkpoint_is_followed_by_files(folder, shards):
    shards.rename(folder.checkpoints / "4")
    for name in (folder.last, folder.best):
        name.symlink_to("4")
    store = CheckpointStore(folder, ALONE)
    assert store.newest() == folder.last
    for iteration in (5, 6):
        store.save(state(iteration), is_best=False, is_numbered=False)
    assert [load(path)["iteration"] for path in (folder.last, folder.previous, folder.best)] == [6, 5, 4]


def test_a_state_is_taken_apart_and_put_together_again():
    whole = {"a": torch.ones(2), "b": {0: {"c": torch.zeros(1), "d": 3}, "e": {}}, "f": [1, {"g": 2}]}
    tensors, plain = split_tensors(whole)
    assert set(tensors) == {("a",), ("b", 0, "c")}
    assert plain == {"b": {0: {"d": 3}, "e": {}}, "f": [1, {"g": 2}]}
    again = join_tensors(tensors, plain)
    assert again["b"][0]["c"] is whole["b"][0]["c"] and again["a"] is whole["a"] and again["f"] == whole["f"]


def test_what_makes_two_states_unlike():
    own = {"weights": {"a": torch.ones(2)}, "best": {}, "count": 3, "names": ["a"], "late": None}
    alike = {"weights": {"a": torch.zeros(2)}, "best": {"x": 1}, "count": 4.0, "names": [], "late": 1, "more": 2}
    check_structure(own, alike, "state")
    for key, value, said in (
        ("weights", {"a": torch.ones(3)}, r"state\.weights\.a has shape \(3,\), not \(2,\)"),
        ("weights", {}, r"state\.weights\.a is missing"),
        ("count", "3", r"state\.count is of type str, not int"),
        ("names", [1], r"state\.names\.0 is of type int, not str"),
    ):
        with pytest.raises(ValueError, match=f"^{said}$"):
            check_structure(own, {**alike, key: value}, "state")
