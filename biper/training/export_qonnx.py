"""Write a packed network as QONNX, and say what fewer bits of its real layers change."""

import logging
from pathlib import Path
from typing import Any

from biper.files import atomically
from biper.packed.qonnx import qonnx_contents, rounded
from biper.training.export import asked_for_images, compared, images_of, packable
from biper.training.process import name_out_of_memory

log = logging.getLogger("biper")


@name_out_of_memory()
def write_qonnx(file: Path, target: Path, bits: int | None, given: dict[str, Any]) -> None:
    """Write the QONNX file of a checkpoint of stage 2 or of a packed file, and log what it came to.

    bits: of the weights of real layers; None: float32. given: data_path, dataset, freq and model, if the user gave
    them. Raises UsageError for bad input, among it a network with a layer that cannot be written.
    """
    packed, settings = packable(file, given)
    assert packed.metadata is not None
    contents = qonnx_contents(packed, packed.metadata.shown_size, bits=bits)
    with atomically(target) as temporary:
        temporary.write_bytes(contents)
    log.info("%s: %s bytes, QONNX for one image", target, f"{len(contents):,}")
    if bits:
        images, source = images_of(packed, settings, asked_for_images(given))
        found = compared(packed, rounded(packed, bits), images)
        text = "with real layers' weights of %d bits the predictions of %d of %d %s are equal"
        log.info(text + ", logits differ by at most %.1e", bits, found.equal, found.images, source, found.difference)
