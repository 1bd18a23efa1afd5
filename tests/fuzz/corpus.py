"""Good files of every kind, made without training: what is spoiled."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from PIL import Image
from torch import Tensor, nn

from biper.models import Network, registry
from biper.models.checkpoint import load_checkpoint, read_checkpoint
from biper.models.registry import Precision
from biper.packed.file import save_packed
from biper.packed.pack import pack
from biper.training.build import build_trainer
from biper.training.checkpoint import LATEST, save_checkpoint
from biper.training.inheritance import training_config
from biper.training.process import ALONE

MODEL = {"model": "fuzzed_1w1a", "dataset": "digits", "image_size": 8, "freq": 20.0, "compile": False, "epochs": 2}
RECIPE = {
    "stage1": {**MODEL, "lr_decay_step": [1, 2], "tau": 0.1, "warm_up": True, "seed": 1, "data_path": "data"},
    "stage2": {"epochs": 3, "lr": 0.01, "batch_size": 64, "optimizer": "adam", "quantizer": "biper"},
}
CHOICES = {
    "smooth": {"both": {"label_smoothing": 0.1}},
    "long": {"stage1": {"epochs": 3, "lr_type": "onecycle", "warm_up": False}},
}
IMAGES = {
    "png": "RGB",
    "jpg": "L",
    "gif": "P",
    "bmp": "RGB",
    "webp": "RGBA",
    "tiff": "I;16",
    "ppm": "RGB",
    "ico": "RGBA",
}


@dataclass(frozen=True)
class Corpus:
    """The contents of checkpoints by stage, and paths of files that are good."""

    contents: dict[int, dict[str, Any]]
    checkpoints: dict[int, Path]
    network: Network
    packed: Path
    images: list[Path]


class Fuzzed(Network):
    """As small as a network of BiPer's can be, so that many cases take little time."""

    def __init__(self, num_classes: int, precision: Precision) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = precision.conv(8, 8, 3, 1, 1), nn.BatchNorm2d(8)
        self.act2, self.linear = precision.activation(8), nn.Linear(8, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Images (N, 3, H, W) to logits (N, classes)."""
        x = self.bn1(self.conv1(x))
        return self.linear(self.act2(self.bn2(self.conv2(x))).mean((2, 3)))


@contextmanager
def fuzzed_model() -> Iterator[None]:
    """Context: there is a model `fuzzed`."""
    key = ("cifar10", "fuzzed")
    there = key in registry._ARCHITECTURES
    registry.register_model(*key)(Fuzzed)
    try:
        yield
    finally:
        if not there:
            del registry._ARCHITECTURES[key]  # tests run over all that are registered


def make_corpus(folder: Path) -> Corpus:
    """Write it into a folder; to be called, and used, inside `fuzzed_model`."""
    first = _checkpoint(1, {**MODEL, "ema": 0.9}, folder / "stage1")
    second = _checkpoint(2, {"optimizer": "adam", "load_ckpt_stage1": str(first)}, folder / "stage2")
    packed = folder / "packed.safetensors"
    save_packed(pack(load_checkpoint(second)), packed, top1=12.5)
    images = []
    for suffix, mode in IMAGES.items():
        images.append(folder / f"image.{suffix}")
        Image.linear_gradient("L").resize((20, 16)).convert(mode if mode != "I;16" else "I").convert(mode).save(
            images[-1]
        )
    checkpoints = {1: first, 2: second}
    return Corpus(
        {stage: read_checkpoint(path) for stage, path in checkpoints.items()},
        checkpoints,
        load_checkpoint(second),
        packed,
        images,
    )


def _checkpoint(stage: int, given: dict[str, Any], folder: Path) -> Path:
    """A run's latest checkpoint after an epoch in which nothing was learned."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = build_trainer(training_config("cifar10", stage, {**given, "results_dir": str(folder)}), ALONE)
    for parameter in trainer.network.parameters():
        parameter.grad = torch.zeros_like(parameter)
    trainer.optimizer.step()
    row = {
        "epoch": 1,
        "lr": 0.1,
        "tau": 0.0,
        "test_loss": 2.3,
        "test_top1": 10.0,
        "test_top5": 50.0,
        "qe": 1.0,
        "b": None,
    }
    trainer.epoch, trainer.history, trainer.seconds = 1, [row], [1.0]
    folder.mkdir()
    save_checkpoint(trainer.contents(), folder / LATEST)
    return folder / LATEST


def yaml_text(value: Any) -> str:
    """As YAML, also what PyYAML does not write."""
    try:
        return yaml.safe_dump(value, allow_unicode=True)
    except (ValueError, yaml.YAMLError):  # whole numbers of 5,000 digits
        return "stage1: {seed: 0x" + "f" * 5000 + "}\n"
