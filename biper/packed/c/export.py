"""Writes the folder of a packed network's C."""

import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from biper.errors import UsageError
from biper.files import folder_atomically, require_empty
from biper.nn.graph import trace
from biper.packed.c.plan import Map, Plan, plan
from biper.packed.c.source import LIMITS, Source, literal
from biper.packed.compile import WHOLE
from biper.packed.network import PackedNetwork

FILES = Path(__file__).parent / "files"
KINDS = ("float32", *LIMITS)  # of the numbers along the skips


def export_c(
    packed: PackedNetwork,
    folder: str | os.PathLike[str],
    *,
    skips: str = "float32",
    calibration: Iterable[Tensor] = (),
    image_size: int | None = None,
) -> Plan:
    """Write a folder of C99 that computes a packed network, one image at a time; gives what was planned.

    skips: how the numbers between layers are stored, float32, int16 or int8; integers need `calibration`, batches of
    normalized images (N, 3, S, S), to find the largest number of every map. image_size: S, by default that of the
    network's metadata. Raises UsageError for a folder that is not empty, a network with a layer that C does not know,
    and integers without images.
    """
    target = Path(folder)
    require_empty(target)
    if skips not in KINDS:
        raise UsageError(f"skips are stored as {', '.join(KINDS)}, not as {skips!r}")
    size = image_size or (packed.metadata.shown_size if packed.metadata else None)
    if size is None:
        raise UsageError("this network does not say the size of its images: give image_size")
    made = plan(packed, size, skips)
    steps = _steps(made, calibration) if skips != "float32" else {}
    with folder_atomically(target) as place:
        _write(packed, made, steps, skips, place)
    return made


def name_of(packed: PackedNetwork) -> str:
    """What a network's functions in C begin with."""
    name = re.sub(r"\W", "_", packed.metadata.model if packed.metadata else type(packed.network).__name__.lower())
    return name if not name[:1].isdigit() else f"network_{name}"


class _Largest(fx.Interpreter):
    """The largest magnitude of some nodes' values, by name, over all that it is run on."""

    def __init__(self, network: nn.Module, names: set[str]) -> None:
        super().__init__(fx.GraphModule(network, trace(network, leaves=WHOLE, fresh=WHOLE)))
        self.found = dict.fromkeys(names, 0.0)

    def run_node(self, n: fx.Node) -> Any:  # noqa: ANN401
        """The node's value."""
        result = super().run_node(n)
        if n.name in self.found:
            self.found[n.name] = max(self.found[n.name], result.abs().max().item())
        return result


@torch.no_grad()
def _steps(made: Plan, calibration: Iterable[Tensor]) -> dict[Map, float]:
    """What one unit of each integer map stands for."""
    names = {call.out: call.last.name for call in made.calls if call.out is not None and call.out.kind in LIMITS}
    largest = _Largest(made.network, set(names.values()))
    seen = 0
    for images in calibration:
        largest.run(images)
        seen += len(images)
    if not seen:
        raise UsageError("integers along the skips need images to find their range: give --data_path, or calibration=")
    return {m: max(largest.found[name], 1e-6) / LIMITS[m.kind] for m, name in names.items()}


def _write(packed: PackedNetwork, made: Plan, steps: dict[Map, float], skips: str, folder: Path) -> None:
    metadata = packed.metadata
    name = name_of(packed)
    constants, body = Source(made, steps).text()
    _, height, width = made.image.shape
    facts: dict[str, object] = {"HEIGHT_": height, "WIDTH_": width}
    facts |= {"CLASSES_": made.logits.shape[0], "ARENA_": made.arena}
    mean, std = (metadata.mean, metadata.std) if metadata and metadata.mean else ((0.0,) * 3, (1.0,) * 3)
    facts |= {"OFFSET_": made.offsets[made.image], "MEAN_": _listed(mean), "STD_": _listed(std)}
    facts["SKIPS_"] = skips
    for path in sorted(FILES.iterdir()):
        text = path.read_text()
        if path.name == "network.h":
            text = text.replace("DESCRIPTION", f"A binary network, {name}, in C99.")
        elif path.name == "network.c":
            text = text.replace("CONSTANTS", constants).replace("BODY", body)
        if path.name in ("network.h", "network.c", "main.c", "README.md"):
            for key, value in facts.items():
                text = re.sub(rf"\b{key}", str(value), text)
            text = text.replace("NAME_", f"{name.upper()}_").replace("name_run", f"{name}_run")
        (folder / path.name).write_text(text)


def _listed(values: Sequence[float]) -> str:
    """Of bytes from 0 to 255, as the loaders have them."""
    return ", ".join(literal(value) for value in (torch.tensor(values) * 255).tolist())
