"""The file of a packed network: safetensors, with metadata. Nothing in it can run; a damaged one is told as such."""

import hashlib
import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as read_tensors
from safetensors.torch import save as written
from torch import Tensor

from biper.errors import UsageError, one_line
from biper.files import atomically
from biper.models import create_model
from biper.models.metadata import Metadata
from biper.packed.network import PackedNetwork, unfilled

FORMAT = 1
KIND = "biper packed network"
UNSUMMED = "0" * 64  # stands in the file where its SHA-256 is to go
LENGTH = 8  # bytes at the beginning of a safetensors file: the length of its header


@dataclass(frozen=True)
class Packed:
    """What a file holds. top1: of the test images, in percent, when it was packed; None if not known."""

    network: PackedNetwork
    metadata: Metadata
    top1: float | None


def is_packed(path: Path) -> bool:
    """Whether a file is a packed network by its name, or begins as one."""
    if path.suffix == ".safetensors":
        return True
    try:
        with path.open("rb") as file:
            return file.read(LENGTH + 1)[LENGTH:] == b"{"
    except OSError:
        return False


def save(packed: PackedNetwork, path: str | os.PathLike[str], top1: float | None = None) -> None:
    """Write a packed network, whole or not at all.

    top1: its accuracy in percent, to be kept in the file. Raises UsageError for a network that does not come from
    `create_model` or a checkpoint: it could not be rebuilt. Raises OSError if the file cannot be written.
    """
    if packed.metadata is None:
        raise UsageError("this network has no metadata: only networks of create_model or a checkpoint can be saved")
    _require_fit(_skeleton(packed.metadata), packed.network.state_dict(), "this network")
    facts = {"format": FORMAT, **asdict(packed.metadata), "top1": top1}
    header = {"kind": KIND, "biper": json.dumps(facts), "sha256": UNSUMMED}
    tensors = {name: tensor.cpu().contiguous() for name, tensor in packed.network.state_dict().items()}
    contents = written(tensors, header)
    contents = contents.replace(UNSUMMED.encode(), hashlib.sha256(contents).hexdigest().encode(), 1)
    with atomically(Path(path)) as temporary:
        temporary.write_bytes(contents)


def load(path: str | os.PathLike[str]) -> PackedNetwork:
    """The packed network of a file, ready to run on the CPU, with its `metadata`. Raises UsageError (a ValueError)."""
    return read(Path(path)).network


def read(path: Path) -> Packed:
    """A file's network and what is known of it. Raises UsageError if it is damaged, newer, or none of ours."""
    try:
        contents = path.read_bytes()
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from error
    facts = _facts(contents, path)
    top1 = facts.pop("top1", None)
    try:
        typed: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in facts.items()
        }
        metadata = Metadata(**typed)
        _require_sound(metadata)
        network = _skeleton(metadata)
        tensors = read_tensors(contents)
    except UsageError as error:
        raise UsageError(f"{path} cannot be rebuilt: {error}") from error
    except (SafetensorError, TypeError, ValueError, KeyError, RuntimeError, OverflowError) as error:
        raise UsageError(f"{path} is damaged: {one_line(error)}") from error
    _require_fit(network, tensors, path)
    network.network.load_state_dict(tensors, assign=True)
    return Packed(network, metadata, top1)


def _facts(contents: bytes, path: Path) -> dict[str, Any]:
    """The metadata, checked: of our kind, not newer than this code, and of these very contents."""
    try:
        length = int.from_bytes(contents[:LENGTH], "little")
        header = json.loads(contents[LENGTH : LENGTH + length].decode())["__metadata__"]
        kind, summed = header["kind"], header["sha256"]
        facts: dict[str, Any] = json.loads(header["biper"])
        newer = int(facts.pop("format")) > FORMAT
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError) as error:
        raise UsageError(f"{path} is damaged, or no packed network ({one_line(error)})") from error
    if kind != KIND:
        raise UsageError(f"{path} is no packed network: it is a {kind!r}")
    if newer:
        raise UsageError(f"{path} is of a newer format than {FORMAT}: update biper to read it")
    blank = contents.replace(str(summed).encode(errors="replace"), UNSUMMED.encode(), 1)
    if hashlib.sha256(blank).hexdigest() != summed:
        raise UsageError(f"{path} is damaged: its contents do not have the checksum that it states")
    return facts


def _skeleton(m: Metadata) -> PackedNetwork:
    """A packed network of that kind, in shape alone. Raises UsageError if there is none."""
    with torch.device("meta"):
        network = unfilled(create_model(m.model, m.family, m.num_classes, m.freq, m.stage))
    network.metadata = m
    return network


def _require_sound(m: Metadata) -> None:
    """Raise TypeError or ValueError for metadata that no saved network has."""
    texts = (m.model, m.family, m.dataset, *m.classes, *m.class_names)
    numbers = (m.freq, *m.mean, *m.std)
    if not all(isinstance(text, str) for text in texts) or not all(isinstance(n, int | float) for n in numbers):
        raise TypeError("its metadata are of other types")
    lengths = ({len(m.classes), len(m.class_names)} - {0, m.num_classes}) | ({len(m.mean), len(m.std)} - {0, 3})
    size = m.image_size is None or (isinstance(m.image_size, int) and m.image_size > 0)
    if lengths or not size or not all(math.isfinite(n) for n in numbers) or not all(s > 0 for s in m.std):
        raise ValueError("its metadata contradict themselves")


def _require_fit(network: PackedNetwork, tensors: Mapping[str, Tensor], path: Path | str) -> None:
    """Raise UsageError unless names, shapes and types are those of the network."""
    expected = {name: (tuple(t.shape), t.dtype) for name, t in network.network.state_dict().items()}
    found = {name: (tuple(t.shape), t.dtype) for name, t in tensors.items()}
    odd = [name for name in {**expected, **found} if expected.get(name) != found.get(name)]
    if odd:
        name, model = odd[0], network.metadata.model if network.metadata else ""
        text = f"{name} is {found.get(name, 'missing')}, expected {expected.get(name, 'nothing')}"
        raise UsageError(f"{path} does not fit {model}: {text} ({len(odd)} such)")
