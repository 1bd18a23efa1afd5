"""What of a finished seed is given away: a checkpoint without its optimizer, a packed file, and the facts."""

import hashlib
import json
import logging
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from biper.experiments.run import Run
from biper.files import write_text
from biper.models.checkpoint import read_checkpoint
from biper.nn.quantization_error import quantization_error
from biper.packed.network import PackedNetwork
from biper.training.checkpoint import save_checkpoint
from biper.training.evaluate import evaluate_checkpoint
from biper.training.export import export
from biper.training.inheritance import evaluation
from biper.training.process import describe_devices, select_devices
from biper.training.settings import SETTINGS

log = logging.getLogger("biper")
MODEL, PACKED, FACTS = "model.pth.tar", "packed.safetensors", "result.json"
FOR_TRAINING = ("optimizer", "not_averaged", "lr_scheduler", "random_state", "partial", "step", "seconds")
PATHS = ("data_path", "load_ckpt_stage1")


@dataclass(frozen=True)
class Result:
    """The facts of a seed. top-1 in percent on the test images; the packed file's and the float one's are evaluated."""

    model: str
    data: str  # what they are called
    command: str  # that made it
    seed: int
    stage1_top1: float  # the best epoch's
    stage2_top1: float
    stage1_last_top1: float
    stage2_last_top1: float
    float_top1: float
    packed_top1: float
    qe: float  # of stage 2's best epoch, as published
    squared_error: float  # with each layer's best scale, summed likewise
    float_bytes: int  # of the parameters and statistics
    packed_bytes: int  # of the file
    stage1_seconds: float  # an epoch, median; NaN if unknown
    stage2_seconds: float
    classes: int
    image_size: int
    machine: str
    versions: dict[str, str]
    sha256: dict[str, str]  # of the two files, and of stage 2's best checkpoint, of which they are made

    def versions_text(self) -> str:
        """The versions that it was trained with, in words."""
        return ", ".join(f"{name} {version}" for name, version in self.versions.items())


def release(runs: Mapping[int, Run], folder: Path, data: str, command: str) -> Result:
    """Write model.pth.tar, packed.safetensors and result.json of both stages' runs, unless they are there already."""
    made = _read_result(folder)
    if made and made.sha256 == _digests(runs, folder):
        return made
    folder.mkdir(exist_ok=True)
    contents = read_checkpoint(runs[2].checkpoint)
    save_checkpoint(without_training_state(contents), folder / MODEL)
    c = runs[2].config
    (folder / PACKED).unlink(missing_ok=True)  # export replaces nothing that it cannot read
    export(runs[2].checkpoint, folder / PACKED, None, {"data_path": c.data_path} if c.data_path else {})
    result = _measured(runs, folder, data, command)
    write_text(json.dumps(asdict(result), indent=2), folder / FACTS)
    return result


def _read_result(folder: Path) -> Result | None:
    """What was released before; None if it is not whole."""
    if not all((folder / name).exists() for name in (MODEL, PACKED, FACTS)):
        return None
    try:
        return Result(**json.loads((folder / FACTS).read_text()))
    except (ValueError, TypeError):  # damaged, or of another version
        return None


def without_training_state(contents: Mapping[str, Any]) -> dict[str, Any]:
    """A checkpoint's contents without what only training needs, and without paths of the machine that trained it."""
    kept = {name: value for name, value in contents.items() if name not in FOR_TRAINING}
    kept["settings"] = {**contents["settings"], **dict.fromkeys(PATHS, "")}
    return kept


def _digests(runs: Mapping[int, Run], folder: Path) -> dict[str, str]:
    files = {MODEL: folder / MODEL, PACKED: folder / PACKED, runs[2].checkpoint.name: runs[2].checkpoint}
    return {name: hashlib.sha256(file.read_bytes()).hexdigest() for name, file in files.items()}


def _measured(runs: Mapping[int, Run], folder: Path, data: str, command: str) -> Result:
    c = runs[2].config
    used = {name: getattr(c, name) for name, f in SETTINGS.items() if f.metadata["group"] in ("data", "hardware")}
    used = {name: value for name, value in used.items() if value not in ("", None)}
    found = {}
    for name in (MODEL, PACKED):
        given = used | {"batch_size_test": c.batch_size_test, "evaluate": str(folder / name)}
        network, config = evaluation(None, 2, given)
        found[name] = evaluate_checkpoint(network, config).top1
        if name == MODEL:
            assert not isinstance(network, PackedNetwork)
            error, m = quantization_error(network), network.metadata
            floats = sum(tensor.nbytes for tensor in network.state_dict().values())
    return Result(
        model=c.model,
        data=data,
        command=command,
        seed=c.seed,
        stage1_top1=runs[1].best["test_top1"],
        stage2_top1=runs[2].best["test_top1"],
        stage1_last_top1=runs[1].last["test_top1"],
        stage2_last_top1=runs[2].last["test_top1"],
        float_top1=found[MODEL],
        packed_top1=found[PACKED],
        qe=error.qe,
        squared_error=error.squared,
        float_bytes=floats,
        packed_bytes=(folder / PACKED).stat().st_size,
        stage1_seconds=runs[1].seconds_per_epoch(),
        stage2_seconds=runs[2].seconds_per_epoch(),
        classes=m.num_classes,
        image_size=m.shown_size,
        machine=machine(runs[2]),
        versions=read_checkpoint(folder / MODEL)["versions"],
        sha256=_digests(runs, folder),
    )


def machine(run: Run) -> str:
    """What this machine computes with, in words."""
    c = run.config
    devices = select_devices(c.device, c.gpus, c.type)
    if devices[0].type == "cuda":
        return describe_devices(devices)
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    threads = torch.get_num_threads()
    return f"{names[0] if names else platform.machine()}, {threads} CPU thread{'s' if threads > 1 else ''}"
