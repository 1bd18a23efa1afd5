"""Checkpoints of a run, written atomically, and the best one published."""

import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

import biper
from biper.errors import one_line
from biper.files import atomically
from biper.models.checksum import seal

LATEST, BEST = "checkpoint.pth.tar", "model_best.pth.tar"


def versions() -> dict[str, str]:
    """The versions that a result depends on."""
    return {
        "biper": biper.__version__,
        "torch": str(torch.__version__),
        "numpy": np.__version__,
        "python": platform.python_version(),
    }


def save_checkpoint(contents: Mapping[str, Any], path: Path) -> None:
    """Write a checkpoint so that a crash at any moment leaves the old file or the new one, whole, with its checksum."""
    with atomically(path) as temporary:
        try:
            torch.save(dict(contents), temporary)
            seal(temporary)
        except RuntimeError as error:
            if "PytorchStreamWriter" not in str(error):
                raise
            raise OSError(one_line(error)) from error  # a full disk, in torch's words


def publish_best(folder: Path) -> None:
    """Make the latest checkpoint of a run its best one, as atomically as it was saved."""
    with atomically(folder / BEST) as temporary:
        temporary.write_bytes((folder / LATEST).read_bytes())
