"""The file of a packed network: safetensors, with metadata. Nothing in it can run; a damaged one is told as such."""

import copy
import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load as read_tensors
from safetensors.torch import save as written
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from biper.errors import UsageError, one_line, shown
from biper.files import atomically, require_file
from biper.kinds import require
from biper.models.checkpoint import require_finite
from biper.models.fields import PACKED
from biper.models.metadata import Metadata, metadata_from
from biper.models.registry import network_like
from biper.nn.layers import binary_layers
from biper.packed.layers import PackedConv2d, PackedLinear
from biper.packed.network import PackedNetwork
from biper.packed.pack import pack_shape

FORMAT = 2  # 2: networks of one's own, and quantizers other than BiPer's
KIND = "biper packed network"
UNSUMMED = "0" * 64  # stands in the file where its SHA-256 is to go
LENGTH = 8  # bytes at the beginning of a safetensors file: the length of its header


@dataclass(frozen=True)
class Packed:
    """What a file holds. metadata: None of a network of one's own. top1: in percent, when it was packed, if known."""

    network: PackedNetwork
    metadata: Metadata | None
    top1: float | None


def is_packed(path: Path) -> bool:
    """Whether a file is a packed network by its name, or begins as one."""
    if path.suffix == ".safetensors":
        return True
    if not path.is_file():  # a pipe would never end
        return False
    try:
        with path.open("rb") as file:
            return file.read(LENGTH + 1)[LENGTH:] == b"{"
    except OSError:
        return False


def is_ours(path: Path) -> bool:
    """Whether a file is a packed network by what it says of itself, and not some other one of safetensors."""
    try:
        with safe_open(path, framework="pt") as file:
            return (file.metadata() or {}).get("kind") == KIND
    except (SafetensorError, OSError):
        return False


def save_packed(packed: PackedNetwork, path: str | os.PathLike[str], top1: float | None = None) -> None:
    """Write a packed network, whole or not at all.

    top1: its accuracy in percent, to be kept in the file. A network of one's own is read back by
    `load_packed(path, model=...)`. Raises UsageError for a network that has diverged, OSError if the file cannot be
    written.
    """
    if not isinstance(packed, PackedNetwork):
        raise UsageError("only a packed network can be saved as one: save_packed(biper.pack(model), path)")
    require_finite(packed.network, "the network")
    state = packed.network.state_dict()
    if packed.metadata is not None:
        _require_fit(_skeleton(packed.metadata), state, "this network", packed.metadata.model)
    header = {"kind": KIND, "biper": json.dumps({**_known(packed), "top1": top1}), "sha256": UNSUMMED}
    tensors = {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for name, tensor in state.items()
    }
    contents = _in_one_order(written(tensors, header))  # copies: a layer may stand in several places
    contents = contents.replace(UNSUMMED.encode(), hashlib.sha256(contents).hexdigest().encode(), 1)
    with atomically(Path(path)) as temporary:
        temporary.write_bytes(contents)


def _in_one_order(contents: bytes) -> bytes:
    """The same file with the texts of its header sorted: safetensors writes them in another order each time."""
    start = LENGTH + int.from_bytes(contents[:LENGTH], "little")
    header = json.loads(contents[LENGTH:start])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % LENGTH)  # tensors begin at whole words
    return len(text).to_bytes(LENGTH, "little") + text + contents[start:]


def _known(packed: PackedNetwork) -> dict[str, Any]:
    """What the file says of the network; BiPer's own say it as they always did, so that older releases read them."""
    if packed.metadata is None:
        return {"format": FORMAT, "own": type(packed.network).__name__, "layers": _layers(packed)}
    biper = packed.metadata.to_biper()
    return {"format": FORMAT, **packed.metadata.to_plain()} if biper is None else {"format": 1, **biper}


def _layers(packed: PackedNetwork) -> dict[str, str]:
    """What the packed layers compute, in words, by name: shapes of tensors alone do not tell."""
    kinds = (PackedConv2d, PackedLinear)
    return {name: module.extra_repr() for name, module in packed.network.named_modules() if isinstance(module, kinds)}


def _require_same_layers(theirs: Mapping[str, str], ours: Mapping[str, str], path: Path) -> None:
    """Raise UsageError unless the file's layers compute what the model's do."""
    for name in {**theirs, **ours}:
        if theirs.get(name) != ours.get(name):
            raise UsageError(f"{path} does not fit the model: its {name} is {theirs.get(name)}, here {ours.get(name)}")


def load_packed(path: str | os.PathLike[str], model: nn.Module | None = None) -> PackedNetwork:
    """The packed network of a file, ready to run on the CPU, with its `metadata`.

    model: for a network of one's own, one of the same architecture with the same binary layers, whatever its weights
    (it is left as it is): the file holds tensors, no code. Raises UsageError (a ValueError) for a file that is damaged,
    newer, or does not fit, and if the model is missing.
    """
    return read(Path(path), model).network


def read(path: Path, model: nn.Module | None = None) -> Packed:
    """A file's network and what is known of it, as `load_packed`."""
    require_file(path)
    try:
        contents = path.read_bytes()
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from error
    facts = _facts(contents, path)
    rest = {name: value for name, value in facts.items() if name not in PACKED}
    top1, own, layers = facts.get("top1"), facts.get("own", ""), facts.get("layers")
    try:
        require(facts, PACKED)
        metadata = None if own else metadata_from(rest)
        if metadata is not None and model is not None:
            raise UsageError(f"it holds a {metadata.model}, which it describes itself: leave model out")
        network = _skeleton(metadata) if metadata is not None else _shape_of(model, own)
        tensors = read_tensors(contents)
    except UsageError as error:
        raise UsageError(f"{path} cannot be rebuilt: {error}") from error
    except (SafetensorError, TypeError, ValueError, KeyError, RuntimeError, OverflowError) as error:
        raise UsageError(f"{path} is damaged: {one_line(error)}") from error
    _require_fit(network, tensors, path, own if metadata is None else metadata.model)
    if layers is not None:
        _require_same_layers(layers, _layers(network), path)
    network.network.load_state_dict(tensors, assign=True)
    require_finite(network.network, path)
    return Packed(network, metadata, top1)


def _facts(contents: bytes, path: Path) -> dict[str, Any]:
    """The metadata, checked: of our kind, not newer than this code, and of these very contents."""
    try:
        length = int.from_bytes(contents[:LENGTH], "little")
        header = json.loads(contents[LENGTH : LENGTH + length].decode())["__metadata__"]
        kind, summed = header["kind"], header["sha256"]
        facts: dict[str, Any] = json.loads(header["biper"])
        newer = int(facts.pop("format")) > FORMAT
        if not isinstance(summed, str):
            raise TypeError("its checksum is no text")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError) as error:
        if contents[:2] == b"PK":
            raise UsageError(f"{path} is no packed network: a checkpoint is read by biper.load_checkpoint") from error
        raise UsageError(
            f"{path} is damaged, or no packed network: restore it from a copy, or export it again"
        ) from error
    if kind != KIND:
        raise UsageError(f"{path} is no packed network: it is a {shown(kind)}")
    if newer:
        raise UsageError(f"{path} is of a newer format than {FORMAT}: update biper to read it")
    blank = contents.replace(summed.encode(errors="replace"), UNSUMMED.encode(), 1)
    if hashlib.sha256(blank).hexdigest() != summed:
        raise UsageError(f"{path} is damaged: its contents do not have the checksum that it states")
    return facts


def _skeleton(m: Metadata) -> PackedNetwork:
    """A packed network of that kind, in shape alone. Raises UsageError if there is none."""
    with torch.device("meta"), _Unfilled():
        return pack_shape(network_like(m), m)


class _Unfilled(TorchFunctionMode):
    """Weights are not initialized: shapes have nothing to fill, and torch would load its compiler, for seconds."""

    def __torch_function__(
        self, func: Callable[..., Any], types: object, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:  # noqa: ANN401
        if func in (Tensor.normal_, Tensor.uniform_) or getattr(func, "__module__", "") == nn.init.__name__:
            return args[0] if args else (kwargs or {})["tensor"]
        return func(*args, **(kwargs or {}))


def _shape_of(model: nn.Module | None, own: str) -> PackedNetwork:
    """What a model like somebody's own looks like packed, in shape alone; the model is left as it is."""
    if model is None:
        text = f"it holds a network of somebody's own ({own}), which its code makes"
        raise UsageError(f"{text}: in Python load_packed(path, model=...) reads it; commands take registered models")
    if not any(True for _ in binary_layers(model)):
        raise UsageError("model has no binary layers: convert it as the one that was packed (see biper.convert)")
    return pack_shape(copy.deepcopy(model).cpu())


def _require_fit(network: PackedNetwork, tensors: Mapping[str, Tensor], path: Path | str, name: str) -> None:
    """Raise UsageError unless names, shapes and types are those of the network, which is called `name`."""
    expected = {key: (tuple(t.shape), t.dtype) for key, t in network.network.state_dict().items()}
    found = {key: (tuple(t.shape), t.dtype) for key, t in tensors.items()}
    odd = [key for key in {**expected, **found} if expected.get(key) != found.get(key)]
    if odd:
        text = f"{odd[0]} is {found.get(odd[0], 'missing')}, expected {expected.get(odd[0], 'nothing')}"
        raise UsageError(f"{path} does not fit {name}: {text} ({len(odd)} such)")
