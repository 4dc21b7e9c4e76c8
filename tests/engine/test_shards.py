"""Shards and Parquet files: the images of the folder they were made of, in an order that seed and epoch alone say."""

from __future__ import annotations

import http.server
import io
import json
import os
import shutil
import socketserver
import tarfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path

import numpy as np
import pyarrow
import pytest
import torch
from pyarrow import parquet

from engine.data import remote
from engine.data import shards as data_shards
from engine.data.loaders import DataLoaders
from engine.data.shards import INDEX, Index, scan
from engine.data.source import build_source
from engine.data.stream import STREAMS, TrainingOrder, order_by_shards
from engine.distributed import Process
from engine.errors import InputError
from tools import prepare_data

CPU = torch.device("cpu")
SAMPLES = 5  # of 24 and 9 images in a shard


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch) -> Path:
    """Indices and copies of this test alone."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(remote, "PAUSE", 0.01)
    return tmp_path / "cache" / "augsub"


@pytest.fixture
def shards(image_folder, tmp_path) -> Path:
    """The images of the folder in shards with an index."""
    target = tmp_path / "shards"
    assert prepare_data.main([str(image_folder), str(target), "--samples-per-shard", str(SAMPLES), "--jobs", "1"]) == 0
    return target


def items_of(images) -> list[tuple[bytes, int]]:
    """Bytes and label of every image, sorted."""
    found = [images._items[number] for number in range(len(images))]
    return sorted((file.read(), int(label)) for file, label in found)


def batches(config, rank: int = 0, world_size: int = 1, first: int = 0) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return list(DataLoaders(config, build_source(config), Process(rank, world_size, CPU)).train_from(first))


def test_shards_hold_the_images_of_the_folder(image_folder, shards, folder_config):
    folder, own = (
        build_source(folder_config(root, dataset=kind)) for root, kind in ((image_folder, "folder"), (shards, "wds"))
    )
    assert own.class_names == folder.class_names == ("cat", "dog", "fox") and own.num_classes == 3
    for split in ("train", "held_out"):
        assert items_of(getattr(own, split)) == items_of(getattr(folder, split))
    assert sorted(own.train.labels) == sorted(folder.train.labels)
    info = json.loads((shards / "_info.json").read_text())["splits"]["train"]
    assert info["shard_lengths"] == [5, 5, 5, 5, 4] and info["num_samples"] == 24


def test_timm_reads_the_shards_that_we_write(shards):
    from timm.data import create_dataset

    dataset = create_dataset("wds/x", root=str(shards), split="val", batch_size=1)
    assert sorted(target for _, target in dataset) == [0] * 3 + [1] * 3 + [2] * 3


def test_shards_made_by_others_are_counted_once(shards, folder_config, own_cache, monkeypatch):
    (shards / INDEX).unlink()
    config = folder_config(shards, dataset="wds")
    source = build_source(config)
    assert source.class_names == ("0", "1", "2") and len(source.train) == 24
    kept = sorted((own_cache / "indices").glob("*.npz"))
    assert len(kept) == 2  # of both splits
    monkeypatch.setattr("engine.data.shards.scan", None)  # would fail
    assert items_of(build_source(config).train) == items_of(source.train)
    os.utime(shards / "train-00000.tar", (1, 1))  # another file
    with pytest.raises(TypeError):
        build_source(config)


def test_processes_that_start_at_once_count_once(shards, folder_config, monkeypatch):
    """Here threads, each with a lock of its own, as processes have."""
    (shards / INDEX).unlink()
    config, counted, scan = folder_config(shards, dataset="wds"), [], data_shards.scan
    monkeypatch.setattr(data_shards, "scan", lambda *arguments: (counted.append(arguments[1]), scan(*arguments))[1])
    with ThreadPoolExecutor(6) as pool:
        sources = [*pool.map(lambda _: build_source(config), range(6))]
    assert len(counted) == len({*counted}) == len([*shards.glob("*.tar")])
    assert all(items_of(source.train) == items_of(sources[0].train) for source in sources)


def test_threads_read_what_one_does(shards, folder_config, monkeypatch):
    """With few files open at a time each thread closes those of others."""
    monkeypatch.setattr("engine.data.shards.STREAMS", 1)
    items = build_source(folder_config(shards, dataset="wds")).train._items

    def content(number: int) -> bytes:
        return items[number][0].read()

    numbers, alone = [*range(len(items))] * 40, [content(number) for number in range(len(items))]
    with ThreadPoolExecutor(16) as pool:
        assert [*pool.map(content, numbers)] == [alone[number] for number in numbers]


def test_the_order_is_the_same_for_any_workers_and_processes_and_after_a_break(shards, folder_config):
    def config(**data):
        return folder_config(shards, dataset="wds", **data)

    alone = batches(config())
    assert len(alone) == 9  # three epochs of 24 images
    for other in (batches(config(workers=2)), batches(config(), first=4)):
        for (images, labels), (own, answers) in zip(alone[-len(other) :], other, strict=True):
            torch.testing.assert_close(images, own, rtol=0, atol=0)
            assert torch.equal(labels, answers)
    halves = [batches(config(), rank, 2) for rank in range(2)]
    for (images, labels), *shares in zip(alone, *halves, strict=True):
        together = torch.stack([images for images, _ in shares], 1).flatten(
            0, 1
        )  # neighbours go to different processes
        assert torch.equal(images, together) and torch.equal(
            labels, torch.stack([own for _, own in shares], 1).flatten()
        )


def test_an_epoch_has_every_image_once_and_few_shards_at_a_time():
    lengths = [100] * 37 + [40, 1, 250]
    shards = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    order = TrainingOrder(len(shards), 1, 10, 1, 0, 1, seed=3, first_iteration=0, last_iteration=1, shards=shards)
    first, second = order.epoch_images(0), order.epoch_images(1)
    count = len(shards) // 10 * 10
    assert len(set(first)) == len(first) == count and first != second and first == order.epoch_images(0)

    generator = torch.Generator().manual_seed(0)
    shuffled = torch.randperm(len(shards), generator=generator)
    seen = shards[shuffled[order_by_shards(shards[shuffled], generator)]].tolist()
    assert sorted(seen) == shards.tolist()
    spans = {shard: (seen.index(shard), len(seen) - seen[::-1].index(shard)) for shard in set(seen)}
    open_at = [sum(start <= place < end for start, end in spans.values()) for place in range(len(seen))]
    assert (
        max(open_at) <= 2 * STREAMS and np.mean(open_at) <= STREAMS
    )  # where streams go on they may overlap for a turn
    inside = shuffled[order_by_shards(shards[shuffled], generator)]
    assert (inside[shards[inside] == 0].diff() < 0).any()  # images of a shard are shuffled too


def test_weights_draw_images_of_few_shards_at_a_time():
    shards = torch.arange(400) // 10
    weights = (torch.arange(400) % 2).double()  # the odd ones alone
    order = TrainingOrder(400, 1, 10, 1, 0, 1, 0, 0, 1, weights, shards)
    images = torch.tensor(order.epoch_images(0))
    assert (images % 2 == 1).all() and len(images) == 400
    assert len(shards[images][:100].unique()) <= 2 * STREAMS


def test_no_more_shards_are_open_than_there_are_streams(folder_config, tmp_path, monkeypatch):
    monkeypatch.setattr("engine.data.shards.STREAMS", 3)
    for number in range(8):
        write_tar(
            tmp_path / "s" / f"train-{number}.tar", {f"a{number}.jpg": b"x", f"a{number}.cls": str(number % 2).encode()}
        )
    images = build_source(folder_config(tmp_path / "s", dataset="wds", eval_split="train")).train._items
    for number in range(8):
        images[number]
        assert len(images._opened) == min(3, number + 1)
    assert not any(file.closed for file in images._opened.values())


def write_tar(path: Path, members: dict[str, bytes]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            about = tarfile.TarInfo(name)
            about.size = len(content)
            tar.addfile(about, io.BytesIO(content))


def test_samples_are_what_webdataset_takes_for_them(image_folder, tmp_path):
    import webdataset

    jpeg = (image_folder / "train" / "cat" / "0.jpg").read_bytes()
    members = {
        "a/x.1.jpg": jpeg,
        "a/x.cls": b"3",
        "b.json": b"{}",
        "b.JPG": jpeg,
        "b.cls": b"10\n",
        "c.txt": b"no image",
    }
    write_tar(tmp_path / "t.tar", members)
    shard = scan(tmp_path / "t.tar", "t.tar")
    theirs = [
        sample for sample in webdataset.WebDataset(str(tmp_path / "t.tar"), shardshuffle=False, empty_check=False)
    ]
    assert shard.labels.tolist() == [int(sample["cls"]) for sample in theirs if "cls" in sample] == [3, 10]
    content = (tmp_path / "t.tar").read_bytes()
    assert [content[start : start + size] for start, size in shard.images.tolist()] == [jpeg, jpeg]
    assert shard.problem == ""


def test_what_macos_puts_beside_each_file_is_no_part_of_a_sample(tmp_path):
    sample = {"._a.jpg": b"x", "a.jpg": b"12345", "d/._a.cls": b"x", "._a.cls": b"x", "a.cls": b"2"}
    write_tar(tmp_path / "t.tar", sample)
    shard = scan(tmp_path / "t.tar", "t.tar")
    assert shard.labels.tolist() == [2] and shard.images[:, 1].tolist() == [5]


def test_a_root_is_no_pattern(tmp_path, folder_config, image_folder):
    jpeg = (image_folder / "train" / "cat" / "0.jpg").read_bytes()
    root = tmp_path / "sh [1] {a,b}*"
    for split, labels in (("train", (0, 1, 2)), ("val", (0, 1))):
        members = {f"{n}.{end}": content for n in labels for end, content in (("jpg", jpeg), ("cls", b"%d" % n))}
        write_tar(root / f"{split}-000.tar", members)
    config = folder_config(root, dataset="wds", eval_split="val-{000..000}.tar")
    assert (len(build_source(config).train), len(build_source(config).held_out)) == (3, 2)
    # of held-out images alone the last class is not seen, which weights know
    assert build_source(config).num_classes == 3 and build_source(config, with_training=False).num_classes == 2
    known = build_source(config, with_training=False, known_classes=3)
    assert known.num_classes == 3 and known.class_names == ("0", "1", "2")


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"a.jpg": b"x", "b.cls": b"1"}, "t.tar: sample a has no label, a member a.cls"),
        ({"a.jpg": b"x", "a.cls": b"cat"}, "a.cls: 'cat' is no label: allowed are numbers of classes from 0 on"),
        ({"a.jpg": b"x", "a.cls": b"-1"}, "a.cls: '-1' is no label"),
    ],
)
def test_samples_without_a_label_are_refused(members, message, tmp_path):
    write_tar(tmp_path / "t.tar", members)
    with pytest.raises(InputError) as error:
        scan(tmp_path / "t.tar", "t.tar")
    assert message in str(error.value)


def test_wrong_names_labels_and_indices_are_refused_in_one_line(shards, folder_config, tmp_path):
    def refused(message: str, **data) -> None:
        with pytest.raises(InputError) as error:
            build_source(folder_config(data.pop("root", shards), dataset="wds", **data))
        assert message in str(error.value) and "\n" not in str(error.value)

    refused("data.dataset = wds: no file for the split train: ", root=tmp_path)
    refused(f"no file for the split other: {shards}/other-*.tar", train_split="other")
    refused(f"no file for the split x-*.tar: {shards}/x-*.tar", train_split="x-*.tar")
    refused(f"{shards}/train-00005.tar: No such file or directory", train_split="train-{00000..00009}.tar")
    index = Index.load(shards / INDEX)
    index.classes = ["cat", "dog"]
    index.save(shards / INDEX)
    refused("the label 2 is beyond the 2 classes of the index")
    (shards / INDEX).write_bytes(b"PK nothing")
    refused(f"{shards}/{INDEX}: is no index of shards: ")


@pytest.fixture
def others(image_folder, shards) -> Path:
    """Shards of fewer images with the names of the first ones."""
    (image_folder / "train" / "dog" / "0.jpg").unlink()
    target = shards.with_name("others")
    assert prepare_data.main([str(image_folder), str(target), "--samples-per-shard", str(SAMPLES), "--jobs", "1"]) == 0
    return target


def test_shards_of_several_folders_have_indices_of_their_own(shards, others, folder_config):
    expected = [items_of(build_source(folder_config(folder, dataset="wds")).train) for folder in (shards, others)]
    splits = {"train_split": "{shards,others}/train-*.tar", "eval_split": "{shards,others}/val-*.tar"}
    source = build_source(folder_config(shards.parent, dataset="wds", **splits))
    assert items_of(source.train) == sorted(chain(*expected)) and len(expected[0]) > len(expected[1])
    index = Index.load(others / INDEX)
    index.classes = ["a", "b", "c"]
    index.save(others / INDEX)
    with pytest.raises(InputError, match=r"others/.*: has other classes than .*shards/"):
        build_source(folder_config(shards.parent, dataset="wds", **splits))


def test_other_shards_under_the_same_url_are_fetched_anew(shards, others, folder_config):
    config = folder_config(shards.as_uri(), dataset="wds")
    first = items_of(build_source(config).train)
    expected = items_of(build_source(folder_config(others, dataset="wds")).train)
    for path in others.iterdir():
        shutil.copy(path, shards / path.name)
    assert first != items_of(build_source(config).train) == expected


def test_processes_that_begin_together_all_find_the_index_beside_a_url(shards, folder_config):
    config = folder_config(shards.as_uri(), dataset="wds")
    with ThreadPoolExecutor(4) as pool:
        sources = [*pool.map(lambda _: build_source(config), range(4))]
    assert all(list(source.class_names) == ["cat", "dog", "fox"] for source in sources)


@pytest.mark.parametrize("is_indexed", [True, False])
def test_a_shard_that_was_cut_short_is_one_bad_file(shards, folder_config, is_indexed):
    cut = shards / "train-00001.tar"
    cut.write_bytes(cut.read_bytes()[:-9000])
    if not is_indexed:
        (shards / INDEX).unlink()
    reason = "cut short, or changed since" if is_indexed else "ends early or is damaged after"
    with pytest.raises(InputError, match=rf"data.bad_files = 0: {cut} cannot be read: .*{reason}"):
        batches(folder_config(shards, dataset="wds"))
    config = folder_config(shards, dataset="wds", bad_files=1)
    loaders = DataLoaders(config, build_source(config), Process(0, 1, CPU))
    found = [*loaders.train_from(0)]
    assert len(loaders.bad_files) == 1 and all(len(labels) == 8 and (labels >= 0).all() for _, labels in found)


def test_an_image_in_a_shard_that_is_none_is_told_with_its_place(image_folder, folder_config, tmp_path):
    jpeg = (image_folder / "train" / "cat" / "0.jpg").read_bytes()
    names = [f"{number}" for number in range(8)]
    members = {
        f"{name}.{kind}": (jpeg if name != "5" else b"no") if kind == "jpg" else b"%d" % (int(name) % 2)
        for name in names
        for kind in ("jpg", "cls")
    }
    write_tar(tmp_path / "s" / "train-0.tar", members)
    with pytest.raises(InputError, match=r"train-0\.tar: image 5 cannot be read: not an image that Pillow knows"):
        batches(folder_config(tmp_path / "s", dataset="wds", eval_split="train"))


@pytest.fixture
def served(shards):
    """The shards under a URL; what is called slow.tar never comes to an end."""

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *arguments):
            super().__init__(*arguments, directory=str(shards))

        def do_GET(self):
            asked.append(self.path)
            if "slow" in self.path:
                self.send_response(200)
                self.end_headers()
                time.sleep(30)
                return
            super().do_GET()

        def log_message(self, *arguments):
            pass

    asked: list[str] = []
    server = socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}", asked
    server.shutdown()


def test_a_url_and_a_pipe_give_the_bits_of_the_files(served, shards, folder_config, own_cache):
    url, asked = served
    local = batches(folder_config(shards, dataset="wds"))
    patterns = {"train_split": "train-{00000..00004}.tar", "eval_split": "val-{00000..00001}.tar"}
    remote_ones = folder_config(None, dataset="wds", **{key: f"{url}/{name}" for key, name in patterns.items()})
    pipes = folder_config(None, dataset="wds", **{key: f"pipe:cat {shards}/{name}" for key, name in patterns.items()})
    remote_ones.data.root = pipes.data.root = None
    for config in (remote_ones, pipes):
        for (images, labels), (own, answers) in zip(local, batches(config), strict=True):
            assert torch.equal(images, own) and torch.equal(labels, answers)
    assert sum(path.endswith("train-00000.tar") for path in asked) <= 2  # HEAD and GET: copied once


def test_copies_are_kept_within_bounds(served, tmp_path):
    url, asked = served
    copies = remote.Copies.of([url], most=2, patience=20)
    for number in (0, 1, 2, 1, 2):
        assert copies.get(f"{url}/train-{number:05d}.tar").stat().st_size > 0
    assert len([path for path in copies.folder.iterdir() if not path.suffix]) == 2
    assert sum("train-00001" in path for path in asked) <= 2


@pytest.mark.parametrize(
    ("place", "patience", "reason"),
    [
        pytest.param("{url}/nothing.tar", 60, "nothing.tar", marks=pytest.mark.slow),
        pytest.param("{url}/slow.tar", 5, "no byte for 5 s", marks=pytest.mark.slow),
        pytest.param("http://127.0.0.1:9/x.tar", 60, "127.0.0.1:9/x.tar", marks=pytest.mark.slow),
        ("pipe:sleep 30", 0.2, "no byte for 0.2 s"),
        ("pipe:echo no such bucket >&2; exit 3", 60, "no such bucket, in 3 attempts"),
        ("pipe:exit 7", 60, "exit code 7, in 3 attempts"),
    ],
)
def test_what_fails_or_hangs_is_told_after_some_attempts(served, place, patience, reason, tmp_path):
    target = tmp_path / "copy"
    with pytest.raises(OSError, match="in 3 attempts") as error:
        remote.fetch(place.format(url=served[0]), target, patience)
    assert reason in str(error.value) and not target.exists()


@pytest.mark.slow
def test_a_shard_that_never_comes_is_one_bad_file(served, shards, folder_config):
    url, _ = served
    index = Index.load(shards / INDEX)
    index.shards["slow.tar"] = index.shards["train-00000.tar"]
    index.save(shards / INDEX)
    config = folder_config(
        None,
        dataset="wds",
        train_split=f"{url}/{{train-00001,slow}}.tar",
        eval_split=f"{url}/val-00000.tar",
        bad_files=1,
        patience=6.0,
    )
    config.data.root = None
    loaders = DataLoaders(config, build_source(config), Process(0, 1, CPU))
    assert len([*loaders.train_from(0)]) == 3 and len(loaders.bad_files) == 1


@pytest.fixture
def parquet_files(image_folder, tmp_path) -> Path:
    """The images as the hub of Hugging Face has them, in row groups of 5."""
    names = ["cat", "dog", "fox"]
    about = {"info": {"features": {"label": {"names": names, "_type": "ClassLabel"}}}}
    for split in ("train", "val"):
        files = sorted((image_folder / split).rglob("*.jpg"))
        rows = [
            {"image": {"bytes": path.read_bytes(), "path": path.name}, "label": names.index(path.parent.name)}
            for path in files
        ]
        table = pyarrow.Table.from_pylist(rows).replace_schema_metadata({"huggingface": json.dumps(about)})
        (tmp_path / "hub" / "data").mkdir(parents=True, exist_ok=True)
        parquet.write_table(table, tmp_path / "hub" / "data" / f"{split}-00000-of-00001.parquet", row_group_size=5)
    return tmp_path / "hub"


def test_parquet_holds_the_images_of_the_folder_in_an_order_of_its_own(image_folder, parquet_files, folder_config):
    folder, own = (
        build_source(folder_config(root, dataset=kind))
        for root, kind in ((image_folder, "folder"), (parquet_files, "parquet"))
    )
    assert own.class_names == folder.class_names
    for split in ("train", "held_out"):
        assert items_of(getattr(own, split)) == items_of(getattr(folder, split))
    alone = batches(folder_config(parquet_files, dataset="parquet"))
    for (images, labels), (others, answers) in zip(
        alone, batches(folder_config(parquet_files, dataset="parquet", workers=2)), strict=True
    ):
        assert torch.equal(images, others) and torch.equal(labels, answers)
    assert sorted(torch.bincount(own.train_shards).tolist()) == [4, 5, 5, 5, 5]


def test_parquet_without_names_or_with_wrong_columns(parquet_files, folder_config):
    file = next((parquet_files / "data").glob("train*"))
    rows = parquet.read_table(file).to_pylist()

    def write(**columns) -> None:
        for split in ("train", "val"):
            changed = [{**row, **{key: value(row) for key, value in columns.items()}} for row in rows]
            parquet.write_table(
                pyarrow.Table.from_pylist(changed), parquet_files / "data" / f"{split}-00000-of-00001.parquet"
            )

    def opened(**data):
        return build_source(folder_config(parquet_files, dataset="parquet", **data))

    write(label=lambda row: "abc"[row["label"]])
    assert opened().class_names == ("a", "b", "c")
    write(image=lambda row: row["image"]["bytes"])
    assert len(opened().train) == 24 and opened().class_names == ("0", "1", "2")
    with pytest.raises(InputError, match=r"has no column tag \(data.columns\), but image, label"):
        opened(columns={"label": "tag"})
    write(label=lambda row: -1)
    with pytest.raises(InputError, match="-1 is no label"):
        opened()
    write(label=lambda row: None)
    with pytest.raises(InputError, match="allowed are numbers of classes, their names, or lists of them"):
        opened()
    for broken in (parquet_files / "data").iterdir():
        broken.write_bytes(b"nothing")
    with pytest.raises(InputError, match="cannot be read as Parquet"):
        opened()
