"""What reads files, as the commands do, and how a file is spoiled for it."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load as read_tensors
from safetensors.torch import save as written
from torch import Tensor

from biper.errors import UsageError
from biper.experiments.choices import recipe_choices
from biper.experiments.plan import planned
from biper.experiments.recipe import read_recipe
from biper.models.checkpoint import load_checkpoint, read_checkpoint
from biper.nn.quantization_error import quantization_error
from biper.packed.file import LENGTH, UNSUMMED
from biper.training.build import build_trainer, initial_network
from biper.training.checkpoint import save_checkpoint
from biper.training.export import top1_of
from biper.training.inheritance import evaluation, load_network, training_config
from biper.training.predict import predict
from biper.training.process import ALONE

from .corpus import CHOICES, RECIPE, Corpus, yaml_text
from .spoil import Draw, spoiled, spoiled_bytes

LAUGHS = "a0: &a0 [x]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12))
MERGES = "a0: &a0 {x: 1}\n" + "".join(f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 9)}]}}\n" for i in range(1, 12))
TEXTS = (
    LAUGHS,
    MERGES,
    "stage1: &a {more: *a}\n",
    "[" * 900,
    "stage1: {epochs: !!int ''}",
    "? [a]\n: 1\n",
    "stage1: !!bool x",
)


@dataclass(frozen=True)
class Reader:
    """spoil writes a file at a path, from the corpus; read reads it as a command does. good: what is to be spoiled."""

    name: str
    good: Callable[[Corpus], bytes]
    spoil: Callable[[Draw, Corpus, Path], None]
    read: Callable[[Corpus, Path], object]


def guessed(network, image):
    """What a network sees in an image. Raises what predict gives for one that cannot be read."""
    (found,) = predict(network, [image])
    if isinstance(found, UsageError):
        raise found


def _bytes_of_checkpoint(draw: Draw, corpus: Corpus, path: Path) -> None:
    path.write_bytes(spoiled_bytes(draw, corpus.checkpoints[1].read_bytes()))


def _contents(*stages: int) -> Callable[[Draw, Corpus, Path], None]:
    def spoil(draw: Draw, corpus: Corpus, path: Path) -> None:
        contents = spoiled(draw, corpus.contents[draw.choice(stages)])
        if isinstance(contents, dict) and draw.random() < 0.7:
            save_checkpoint(contents, path)
        else:
            torch.save(contents, path, _use_new_zipfile_serialization=draw.random() < 0.7)

    return spoil


def _packed(draw: Draw, corpus: Corpus, path: Path) -> None:
    contents = corpus.packed.read_bytes()
    if draw.random() < 0.3:
        path.write_bytes(spoiled_bytes(draw, contents))
        return
    length = int.from_bytes(contents[:LENGTH], "little")
    header = json.loads(contents[LENGTH : LENGTH + length])["__metadata__"]
    tensors = {**read_tensors(contents)}
    if draw.random() < 0.8:
        header["biper"] = json.dumps(spoiled(draw, json.loads(header["biper"]), tensors=False))
    else:
        tensors = spoiled(draw, tensors)
    contents = written(tensors, header | {"sha256": UNSUMMED})
    path.write_bytes(contents.replace(UNSUMMED.encode(), hashlib.sha256(contents).hexdigest().encode(), 1))


def _yaml(good: dict[str, Any]) -> Callable[[Draw, Corpus, Path], None]:
    def spoil(draw: Draw, corpus: Corpus, path: Path) -> None:
        text = yaml_text(spoiled(draw, good, tensors=False)).encode(errors="surrogatepass")
        kind = draw.random()
        path.write_bytes(
            draw.choice(TEXTS).encode() if kind < 0.1 else spoiled_bytes(draw, text) if kind < 0.5 else text
        )

    return spoil


def _image(draw: Draw, corpus: Corpus, path: Path) -> None:
    contents = draw.choice(corpus.images).read_bytes()
    for _ in range(draw.randint(1, 3)):
        contents = spoiled_bytes(draw, contents) or b"x"
    path.write_bytes(contents)


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return list(one) == list(other) and all(_same(one[key], other[key]) for key in one)
    return all(map(_same, one, other)) if isinstance(one, list | tuple) else bool(one == other)


def _unchanged(corpus: Corpus, path: Path) -> None:
    assert _same(read_checkpoint(path), corpus.contents[1]), "what was damaged was read as something else"


def _evaluated(corpus: Corpus, path: Path) -> None:
    evaluation(None, None, {"evaluate": str(path)})
    network = load_network(path, {})
    if path.read_bytes()[LENGTH : LENGTH + 1] != b"{":
        top1_of(read_checkpoint(path))
        quantization_error(load_checkpoint(path))
    guessed(network, corpus.images[0])


def _resumed(corpus: Corpus, path: Path) -> None:
    given = {"resume": True, "results_dir": str(path.parent)}
    build_trainer(training_config("cifar10", 1, given), ALONE)


def _warm_started(corpus: Corpus, path: Path) -> None:
    initial_network(training_config("cifar10", 2, {"load_ckpt_stage1": str(path)}), 10)


def _planned(corpus: Corpus, path: Path) -> None:
    planned("reproduce", {"recipe": path, "seeds": [0]})


def _chosen(corpus: Corpus, path: Path) -> None:
    good = corpus.packed.with_name("good.yaml")
    good.write_text(yaml_text(RECIPE))
    recipe_choices(read_recipe(good, {"validation": 100}), path)


READERS = (
    Reader("checkpoint, bytes", lambda c: c.checkpoints[1].read_bytes(), _bytes_of_checkpoint, _unchanged),
    Reader("checkpoint, evaluated", lambda c: c.checkpoints[2].read_bytes(), _contents(1, 2), _evaluated),
    Reader("checkpoint, resumed", lambda c: c.checkpoints[1].read_bytes(), _contents(1), _resumed),
    Reader("checkpoint, stage 2", lambda c: c.checkpoints[1].read_bytes(), _contents(1), _warm_started),
    Reader("packed file", lambda c: c.packed.read_bytes(), _packed, _evaluated),
    Reader("recipe", lambda c: yaml_text(RECIPE).encode(), _yaml(RECIPE), _planned),
    Reader("choices", lambda c: yaml_text(CHOICES).encode(), _yaml(CHOICES), _chosen),
    Reader(
        "image",
        lambda c: c.images[0].read_bytes(),
        _image,
        lambda corpus, path: guessed(corpus.network, path),
    ),
)
