"""What predict.py does: which model reads images how, which images are left, and what is written of them."""

from __future__ import annotations

import json
import os
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tabulate import tabulate
from timm.data import ImageNetInfo
from torch import Tensor, nn
from tqdm import tqdm

from engine import atomic
from engine.checkpoint import load
from engine.checkpoint_file import EXPORTED
from engine.command_line import as_path
from engine.config import UNTRANSFORMED, Config, image_channels
from engine.data.files import ImageFiles, images_below, natural_order, parquet, read_table
from engine.data.images import IGNORED, Images
from engine.data.loaders import BadFiles, Batches
from engine.data.remote import alone, expand, is_remote
from engine.data.shards import Shards, shards_at
from engine.data.source import DataSource
from engine.data.transforms import build_transform
from engine.defaults import build_precision, complete
from engine.distributed import Process
from engine.errors import InputError, first_line, input_errors, writing_errors
from engine.evaluation.run import find_target, saved_config
from engine.text import to_csv, to_json
from models.build import create_model
from models.weights import head_tensors, load_weights
from tools.exporting import SEVERAL_LABELS, load_exported

TABLES = (".csv", ".parquet")
SHARD = ".tar"
IMAGENET_CLASSES = 1000
Row = dict[str, Any]  # path, class_1, probability_1, class_2 …, model


@dataclass(frozen=True)
class Predictor:
    """A model, and how images become its input.

    Attributes:
        source: the model's file, or its name in timm.
        model: gives logits (B, K).
        config: complete, of which data, transform, evaluation and train.amp matter.
        class_names: K names.
        flips: whether predictions are means over each image and its mirror image.
    """

    source: Path | str
    model: nn.Module
    config: Config
    class_names: Sequence[str]
    flips: bool

    @cached_property
    def name(self) -> str:
        """The source with a checksum, CRC-32, of what predictions follow from: the model, and how images are read."""
        config, data = self.config, self.config.data
        reading = [data.image_size, data.in_chans, data.draft_decoding, data.exif_orientation]
        settings = [config.model.name, config.model.kwargs, asdict(config.transform), reading, config.loss.name]
        checksum = zlib.crc32(to_json([*settings, self.flips]).encode())
        for part in self._content():
            checksum = zlib.crc32(part, checksum)
        return f"{self.source} {checksum:08x}"

    def _content(self) -> Iterator[bytes | np.ndarray]:
        """The model's tensors with their names, or its program."""
        if isinstance(self.model, OnnxModel):
            yield Path(self.source).read_bytes()
        for name, tensor in self.model.state_dict().items():
            yield name.encode()
            yield tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy()

    def __call__(self, images: Tensor) -> Tensor:
        """Probabilities (B, K) of images (B, C, H, W)."""
        views = [images, images.flip(-1)] if self.flips else [images]
        probabilities = torch.sigmoid if self.config.loss.name == "bce" else partial(torch.softmax, dim=1)
        return torch.stack([probabilities(self.model(view).float()) for view in views]).mean(dim=0)


class OnnxModel(nn.Module):
    """A file of ONNX as a module, computed by onnxruntime on the CPU."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        with input_errors("ONNX needs another package, pip install 'augsub[onnx]'"):
            import onnxruntime
        try:
            self.session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
        except Exception as error:  # its classes have no common base
            raise InputError(f"{file}: {first_line(error)}") from error

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, K) of images (B, C, H, W)."""
        name = self.session.get_inputs()[0].name
        return torch.from_numpy(self.session.run(None, {name: images.cpu().numpy()})[0])


def load_predictor(what: str, model_name: str | None, overrides: Sequence[str], flips: bool = False) -> Predictor:
    """What a command line means.

    Args:
        what: a run's folder, a checkpoint, a file of weights or of ONNX, or the name of a timm model.
        model_name: the timm model of a file of weights that holds no configuration.
        overrides: `key=value` for the configuration.
        flips: see Predictor.

    Raises:
        InputError: nothing of that name, weights of which the model is unknown, or a model of other than photographs.
    """
    if what.endswith(".onnx"):
        return _of_onnx(Path(what), overrides, flips)
    config, file = find_target(what, model_name, overrides)
    config = complete(config)
    if config.data.dataset in UNTRANSFORMED:
        raise InputError(f"{what}: was trained on {config.data.dataset}, which are no files of images")
    if file is not None and model_name is None:
        exported = load_exported(file, overrides=overrides)
        return Predictor(file, exported.model, config, exported.state["class_names"], flips)
    content = None if file is None else load(file)
    with input_errors(what):
        model = create_model(
            config.model.name,
            num_classes=None if content is None else _classes_of(content, config.model.name),
            in_chans=image_channels(config.data),
            image_size=config.data.image_size,
            pretrained=content is None,
        )
        if content is not None:
            load_weights(model, content, what, complete=True)
    if SEVERAL_LABELS in (model.pretrained_cfg.get("notes") or ()):
        config = replace(config, loss=replace(config.loss, name="bce"))
    return Predictor(file or config.model.name, model, config, _names_of(model), flips)


def _of_onnx(file: Path, overrides: Sequence[str], flips: bool) -> Predictor:
    """A file that was exported here says what a checkpoint does; of others the shape of their input is known."""
    model = OnnxModel(file)
    said = json.loads(model.session.get_modelmeta().custom_metadata_map.get(EXPORTED, "{}"))
    channels, *size = model.session.get_inputs()[0].shape[1:]
    own = [] if "config" in said else [f"data.in_chans={channels}", f"data.image_size={to_json(size)}"]
    config = complete(saved_config(file, said.get("config", ""), [*own, *overrides]))
    classes = model.session.get_outputs()[0].shape[-1]
    names = said.get("class_names") or [str(number) for number in range(classes)]
    return Predictor(file, model, config, names, flips)


def _classes_of(content: Any, name: str) -> int | None:
    """As many as the head in a file of weights has outputs; None if it has none of that name."""
    with torch.device("meta"):
        head = head_tensors(create_model(name))
    return next((len(content[tensor]) for tensor in sorted(head) if tensor in content), None)


def _names_of(model: nn.Module) -> list[str]:
    """The classes of a timm model, as far as timm knows them."""
    known = model.pretrained_cfg.get("label_names")
    if known:
        return list(known)
    if model.num_classes == IMAGENET_CLASSES:
        info = ImageNetInfo()
        return [info.index_to_description(number).partition(",")[0] for number in range(IMAGENET_CLASSES)]
    return [str(number) for number in range(model.num_classes)]


def open_images(places: Sequence[str], patience: float) -> ImageFiles | Shards:
    """The images that a command line names, each once: files, those in folders at any depth, in tables, or in shards.

    The label of each is its number.

    Args:
        patience: seconds without a byte after which the URL of a shard is tried again.

    Raises:
        InputError: nothing of that name, no image there, or shards beside something else.
    """
    are_shards = [place.endswith(SHARD) or is_remote(place) for place in places]
    if any(are_shards):
        if not all(are_shards):
            raise InputError(f"{', '.join(places)}: shards go by themselves, without other files")
        shards = [name for place in places for name in expand(place)]
        if not shards:
            raise InputError(f"{', '.join(places)}: matches nothing")
        images = shards_at(shards, patience, needs_labels=False)
        images.labels = range(len(images))
        return images
    found: dict[str, None] = {}
    for place in map(as_path, places):
        if place.is_dir():
            found |= dict.fromkeys(sorted(images_below(place, Counter()), key=natural_order))
        elif not place.exists():
            raise InputError(f"{place}: no such file or folder")
        elif place.suffix.lower() in TABLES:
            found |= dict.fromkeys(str(place.parent / row["path"]) for row in read_table(place, ("path",)))
        else:
            found[str(place)] = None
    if not found:
        raise InputError(f"{', '.join(places) or 'IMAGES'}: no image there")
    return ImageFiles("", [(path, number) for number, path in enumerate(found)], {})


class Predictions:
    """The rows of images, in one file at the end; until then each process adds to a file of its own beside it.

    Args:
        file: .csv, .jsonl or .parquet; None: rows are printed, and an interrupted command begins anew.
        top_k: classes of each image.
        paths: of all images, in their order.
        model: that predicts them, by its name.

    Raises:
        InputError: the file is there, and is none of such rows, or has some of another model or of other settings.
    """

    def __init__(self, file: Path | None, top_k: int, paths: Sequence[str], model: str) -> None:
        self.top_k, self.paths, self.model, self._file = top_k, paths, model, file
        self._hidden = "" if file is None else f".{file.name}"
        self._rows: dict[str, Row] = {}
        if file is not None:
            with writing_errors(file), alone(file):
                self._take_what_is_there(file)
        self._already = len(self.paths) - len(self.missing())

    def missing(self) -> list[int]:
        """Numbers of the images of which there is no row yet."""
        return [number for number, path in enumerate(self.paths) if path not in self._rows]

    def add(self, rows: Sequence[Row], process: Process) -> None:
        """Keep some more rows."""
        self._rows |= {row["path"]: row for row in rows}
        if self._file is not None:
            part = self._file.with_name(f"{self._hidden}.part-{process.rank}-{os.getpid()}.jsonl")
            with writing_errors(part), alone(self._file), open(part, "a") as opened:
                opened.writelines(f"{to_json(row)}\n" for row in rows)

    def gather(self, process: Process) -> None:
        """Give every process the rows of all, of which a file would have them. All processes must call it together."""
        if self._file is None:
            for rows in process.gather(self._rows):
                self._rows |= rows

    def finish(self) -> str:
        """Write all rows in the order of their paths; what to print."""
        if self._file is None:
            found = [self._rows[path] for path in self.paths if path in self._rows]
            table = [
                [row["path"], *(f"{row[f'class_{k}']} {row[f'probability_{k}']:.3f}" for k in self._ranks(row))]
                for row in found
            ]
            return tabulate(table, headers=["path", *range(1, self.top_k + 1)])
        with writing_errors(self._file), alone(self._file):
            there_first = self._take_what_is_there(self._file)  # by other commands too, since this one began
            order = dict.fromkeys([*there_first, *self.paths, *self._rows])
            rows = [self._rows[path] for path in order if path in self._rows]
            columns = dict.fromkeys(["path", *(name for row in rows for name in row)])
            if self._file.suffix == ".parquet":
                import pyarrow

                content = pyarrow.table({name: [row.get(name) for row in rows] for name in columns})
                with atomic.new_content(self._file) as opened:
                    parquet().write_table(content, opened)
            else:
                text = to_csv(rows, columns) if self._file.suffix == ".csv" else _as_lines(rows)
                atomic.write_text(self._file, text)
            for part in self._parts():
                part.unlink()
        left = len(self.missing())
        there = "all" if self._already == len(self.paths) else self._already
        notes = [f"{there} of them were there"] * bool(self._already) + [f"{left} could not be read"] * bool(left)
        return ", ".join([f"{len(self.paths) - left} images in {self._file}", *notes])

    @staticmethod
    def _ranks(row: Row) -> range:
        return range(1, 1 + sum(name.startswith("class_") for name in row))

    def _take_what_is_there(self, file: Path) -> list[str]:
        """Read the file, whose paths are returned, and what processes have added beside it: whole lines."""
        rows = read_table(file, ("path",)) if file.exists() else []
        there_first = [row["path"] for row in rows]
        for part in self._parts():
            rows += [json.loads(line) for line in part.read_text().splitlines(keepends=True) if line.endswith("\n")]
        counts = {len(self._ranks(row)) for row in rows}
        if counts - {self.top_k}:
            raise InputError(f"--output {file}: has {max(counts)} classes of each image, not {self.top_k}")
        for other in (row["model"] for row in rows if row.get("model")):
            if other.split()[-1] != self.model.split()[-1]:  # the checksum, wherever the file lies
                raise InputError(
                    f"--output {file}: has predictions of {other}, not of {self.model}: the checksums differ with "
                    "weights, image size, transform and --flips; name another file"
                )
        self._rows |= {row["path"]: row for row in rows}
        return there_first

    def _parts(self) -> list[Path]:
        return sorted(path for path in self._file.parent.iterdir() if path.name.startswith(f"{self._hidden}.part-"))


def _as_lines(rows: Sequence[Row]) -> str:
    return "".join(f"{to_json(row)}\n" for row in rows)


@torch.inference_mode()
def predict(predictor: Predictor, images: ImageFiles | Shards, predictions: Predictions, process: Process) -> None:
    """Predict this process's share of the images of which there are no rows. All processes must call it together.

    Raises:
        InputError: more unreadable images than `data.bad_files` allows.
    """
    config, names, chosen = predictor.config, predictor.class_names, predictions.missing()
    if not chosen:
        return
    held_out = Images(images, build_transform(config, is_training=False), "held-out", chosen, data=config.data)
    source = DataSource(None, held_out, len(names), in_chans=image_channels(config.data), class_names=names)
    batches = Batches(config, source, process, BadFiles(config.data.bad_files))
    predictor.model.to(process.device).eval()
    precision = build_precision(config, process)
    for batch, numbers in tqdm(batches, unit="batch", disable=None if process.is_main else True):
        with precision.autocast():
            probabilities = predictor(batch)
        best = probabilities.topk(min(predictions.top_k, len(names)), dim=1)
        rows = []
        for number, values, classes in zip(numbers.tolist(), best.values.tolist(), best.indices.tolist(), strict=True):
            if number != IGNORED:
                row: Row = {"path": predictions.paths[number]}
                for rank, (value, label) in enumerate(zip(values, classes, strict=True), start=1):
                    row |= {f"class_{rank}": names[label], f"probability_{rank}": round(value, 6)}
                rows.append({**row, "model": predictions.model})
        predictions.add(rows, process)
