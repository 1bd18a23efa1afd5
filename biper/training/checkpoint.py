"""Checkpoints of a run, written atomically, and the best one published."""

import io
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

import biper
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
    whole = io.BytesIO()
    torch.save(dict(contents), whole)  # not into the file: of a full disk torch's writer says nothing that can be told
    with atomically(path) as temporary:
        temporary.write_bytes(whole.getbuffer())
        seal(temporary)


def publish_best(folder: Path) -> None:
    """Make the latest checkpoint of a run its best one, as atomically as it was saved."""
    latest = (folder / LATEST).read_bytes()
    with atomically(folder / BEST) as temporary:
        temporary.write_bytes(latest)
