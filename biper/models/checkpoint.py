"""The networks of checkpoints: read without running what a file holds, rebuilt from what it says of itself."""

import os
import pickle
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor, nn

from biper.errors import UsageError, naming, one_line, shown
from biper.kinds import require
from biper.models import published
from biper.models.checksum import require_whole
from biper.models.fields import CHECKPOINT, PUBLISHED, is_tensor
from biper.models.metadata import Metadata, metadata_from
from biper.models.registry import Network, network_like
from biper.nn.quantizers import set_progress
from biper.places import PRETRAINED

RESTORE = "restore it from a copy, or give another one"
FORMAT = 3  # 2: may be of the middle of an epoch (step, partial); 3: quantizers by name and settings, progress


def _folder_in_words(path: Path) -> str:
    inside = sorted(p.name for pattern in ("*.pth.tar", "*.safetensors") for p in path.glob(pattern))
    return ": that is a folder" + (f", which has {', '.join(inside[:5])}" if inside else "")


def read_checkpoint(path: Path) -> dict[str, Any]:
    """The contents of a checkpoint, on the CPU: plain values and tensors only.

    Every value is of its kind in `fields.CHECKPOINT`. Raises UsageError if the file is missing, damaged, of a newer
    format, no checkpoint, or would run code.
    """
    if not path.is_file():
        what = _folder_in_words(path) if path.is_dir() else ": that is no file" if path.exists() else ""
        raise UsageError(f"no checkpoint at {path}{what}")
    if path.suffix == ".safetensors":
        raise UsageError(
            f"{path} is a packed network, for biper evaluate, biper predict and biper.load_packed; "
            "here its training checkpoint is needed"
        )
    with path.open("rb") as file:
        contents = _load(file, path)
    _require_sound(contents, path)
    return contents  # type: ignore[no-any-return]


def _load(file: BinaryIO, path: Path) -> Any:  # noqa: ANN401
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of old formats: whether we can read it is all that matters
            require_whole(file, path)
            return torch.load(file, map_location="cpu", weights_only=True)
    except UsageError:
        raise
    except pickle.UnpicklingError as error:
        if "GLOBAL" in str(error) or "unrecognized" in str(error):
            raise UsageError(f"{path} holds more than plain values and tensors and could run code: refused") from error
        raise UsageError(f"{path} is damaged or no checkpoint: {RESTORE}") from error
    except Exception as error:  # a foreign file can fail in any way
        raise UsageError(f"{path} is damaged or no checkpoint: {RESTORE}") from error


def _require_sound(contents: object, path: Path) -> None:
    """Raise UsageError unless the contents of a file are a checkpoint's that this code reads."""
    if not isinstance(contents, dict) or not isinstance(contents.get("state_dict"), Mapping):
        raise UsageError(f"{path} is no checkpoint of a BiPer network: it has no state_dict")
    if not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in contents["state_dict"].items()):
        raise UsageError(f"{path} is no checkpoint of a BiPer network: its state_dict holds more than named tensors")
    if odd := [name for name, tensor in contents["state_dict"].items() if not is_tensor(tensor)]:
        raise UsageError(f"{path}: {shown(odd[0])} is no dense tensor of real numbers")
    found = contents.get("format", FORMAT)
    if type(found) is not int or not 1 <= found <= FORMAT:
        raise UsageError(f"{path} has format {shown(found)}, newer than {FORMAT}: update biper to read it")
    with naming(path):
        require(contents, CHECKPOINT if "format" in contents else PUBLISHED)


def load_checkpoint(
    path: str | os.PathLike[str],
    freq: float | None = None,
    *,
    model: str | None = None,
    family: str | None = None,
    stage: int | None = None,
) -> Network:
    """The network of a checkpoint in eval mode, on the CPU, with its `metadata`.

    Our own files say everything. A published one lacks freq: it is read from a `config.txt` beside the file, or given
    (radians per unit weight); its stage is 2 unless given, and `stage` is of use there alone. A freq, model or family
    that contradicts the file raises UsageError (a ValueError), as does a file that cannot be loaded.
    """
    path = Path(path)
    return build_network(read_checkpoint(path), path, freq=freq, model=model, family=family, stage=stage)


def build_network(
    contents: Mapping[str, Any],
    path: Path,
    *,
    freq: float | None = None,
    model: str | None = None,
    family: str | None = None,
    stage: int | None = None,
) -> Network:
    """`load_checkpoint` for contents that have been read from path."""
    if "format" in contents:
        metadata, weights = own_metadata(contents, path), contents["state_dict"]
        for name, value in {"freq": freq, "model": model, "family": family}.items():
            if value is not None and value != getattr(metadata, name):
                raise UsageError(f"{name} {value} contradicts {path}, which has {name} {getattr(metadata, name)}")
    else:
        weights = published.weights(contents["state_dict"])
        metadata = published.metadata(contents, weights, path, freq=freq, model=model, family=family, stage=stage or 2)
    network = rebuild(metadata, weights, path).eval()
    set_progress(network, contents.get("progress", 1.0))
    return network


def load_model(
    name: str,
    path: str | os.PathLike[str] | None,
    *,
    family: str | None,
    num_classes: int | None,
    freq: float | None,
    stage: int | None,
) -> Network:
    """The network of a checkpoint, or of the file that comes with biper if there is no path, which must be that one.

    What is not None must agree with the file. Raises UsageError if it does not, or if there is no file.
    """
    if path is None:
        path = PRETRAINED / name / "model.pth.tar"
        if not path.is_file():
            there = sorted(file.parent.name for file in PRETRAINED.glob("*/model.pth.tar"))
            choices = f"there are some for {', '.join(there)}" if there else "none were installed"
            raise UsageError(f"no pretrained weights for {name}: {choices}; give checkpoint_path")
    network = load_checkpoint(path, freq, model=name, family=family, stage=stage)
    for key, value in {"num_classes": num_classes, "stage": stage}.items():
        found = getattr(network.metadata, key)
        if value not in (None, found):
            raise UsageError(f"{key} {value} contradicts {path}, which has {key} {found}")
    return network


def own_metadata(contents: Mapping[str, Any], path: Path) -> Metadata:
    """The metadata of one of our own checkpoints. Raises UsageError if they are damaged."""
    try:
        return metadata_from(contents.get("metadata", {}))
    except UsageError as error:
        raise UsageError(f"{path} has no readable metadata: {error}") from error


def rebuild(metadata: Metadata, weights: Mapping[str, Tensor], path: Path) -> Network:
    """The network that metadata describe, with these weights.

    Raises UsageError listing names that do not fit, or naming a weight that is not finite.
    """
    if metadata.num_classes > max((size for tensor in weights.values() for size in tensor.shape), default=0):
        text = (
            f"{metadata.num_classes} classes are more than any of its tensors has"  # nor does memory have to hold them
        )
        raise UsageError(f"{path} does not fit {metadata.model}: {text}")
    try:
        network = network_like(metadata)
    except UsageError:
        raise
    except (TypeError, ValueError, AttributeError, RuntimeError) as error:  # of damaged metadata
        raise UsageError(f"{path} has no readable metadata: {one_line(error)}") from error
    shapes = {name: tensor.shape for name, tensor in network.state_dict().items()}
    found = {name: tensor.shape for name, tensor in weights.items()}
    if shapes != found:
        missing = [name for name in shapes if name not in found]
        unexpected = [name for name in found if name not in shapes]
        others = [name for name in shapes if name in found and shapes[name] != found[name]]
        parts = {"missing": missing, "unexpected": unexpected, "of another shape": others}
        text = "; ".join(f"{', '.join(names[:3])} {what} ({len(names)})" for what, names in parts.items() if names)
        raise UsageError(f"{path} does not fit {metadata.model}: {text}")
    network.load_state_dict(weights)
    require_finite(network, path)
    return network


def require_finite(network: nn.Module, path: Path | str) -> None:
    """Raise UsageError naming a weight or statistic of a network, or a file's, with which it computes nothing.

    A sign makes a number of NaN, so the network's logits may well be finite. Buffers of somebody's own modules, such as
    masks, may hold infinity.
    """
    others = [
        (path, module) for path, module in network.named_modules()
        if type(module).__module__.partition(".")[0] not in ("biper", "torch")
    ]  # fmt: skip
    masks = {f"{path}.{name}".lstrip(".") for path, module in others for name in module._buffers}
    for name, tensor in network.state_dict().items():
        sound = ~tensor.isnan() if name in masks else tensor.isfinite()
        if tensor.is_floating_point() and not bool(sound.all()):
            raise UsageError(f"{path} holds no trained network: {name} is not finite (NaN or infinity)")
        if name.endswith("running_var") and bool((tensor < 0).any()):
            raise UsageError(f"{path} holds no trained network: {name} is negative")
