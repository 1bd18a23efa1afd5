"""The file of a network as a web page that shows images as evaluation does."""

import logging
from pathlib import Path
from typing import Any

from biper.data.crops import Centre
from biper.data.datasets import DATASETS, MemorySet, find_dataset
from biper.errors import UsageError
from biper.models.metadata import Metadata
from biper.packed.web.export import export_web
from biper.training.export import as_packed
from biper.training.inheritance import load_network

log = logging.getLogger("biper")


def export_page(file: Path, folder: Path, given: dict[str, Any]) -> None:
    """Write a folder with the page of a packed network, or of a checkpoint of stage 2, and log what it came to.

    given: freq and model, if the user gave them. Raises UsageError for bad input, and then writes nothing.
    """
    network = load_network(file, given)
    packed = as_packed(network, file)
    export_web(packed, folder, shorter=_shorter(packed.metadata))
    size = sum(path.stat().st_size for path in folder.iterdir())
    log.info("%s: a page and biper.mjs, %s bytes: python -m http.server -d %s", folder, f"{size:,}", folder)


def _shorter(m: Metadata | None) -> int:
    """What `export_web` calls so: how evaluation on the network's data looks at an image."""
    if m is None or not m.mean:
        text = "this network does not say how its images are normalized"
        raise UsageError(f"{text}: train it by biper train, which saves it")
    if m.dataset not in DATASETS:
        raise UsageError(f"the data set {m.dataset!r} of this network is not known: its images cannot be shown alike")
    data = find_dataset(m.dataset, m.family)
    if isinstance(data, MemorySet):
        return m.shown_size
    view = data.view(m.shown_size, False)
    return view.shorter if isinstance(view, Centre) else 0
