"""NVIDIA DALI as a reader: decoding and resizing in its threads, on the GPU where there is one.

It is told what to do image by image, so that images, crops and rounding are those of the Pillow reader.
"""

import io
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import chain, islice
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from biper.data.folder import open_image
from biper.data.pillow import Batch, Request, Requests, Source, count_cores
from biper.errors import UsageError, reason

AHEAD = 3  # batches whose files are read before they are due
START_OF_SCAN, END_OF_IMAGE = 0xDA, 0xD9
# after 0xFF: what occurs inside a scan (stuffed zero, fill, restarts), and what begins a segment of a JPEG
IN_THE_SCAN, KNOWN_MARKERS = np.zeros(256, bool), np.zeros(256, bool)
IN_THE_SCAN[[0x00, 0xFF, *range(0xD0, 0xD8)]] = True
KNOWN_MARKERS[[0xC0, 0xC1, 0xC2, 0xC4, 0xDA, 0xDB, 0xDD, 0xFE, *range(0xE0, 0xF0)]] = True
Prepared = tuple[np.ndarray, ...]  # encoded bytes; start and shape of the region; resized size; start of the square


def require_dali() -> None:
    """Raise UsageError unless DALI is installed."""
    try:
        import nvidia.dali  # noqa: F401
    except ImportError as error:
        advice = "pip install -e '.[dali]' in the repository, or '.[dali-cuda130]' for CUDA 13"
        raise UsageError(f"--use_dali needs DALI: {advice}; or leave --use_dali out") from error


def has_dali() -> bool:
    """Whether DALI is installed."""
    try:
        require_dali()
    except UsageError:
        return False
    return True


class DaliReader:
    """Decodes in `workers` threads of DALI, at most one a CPU core, or on the GPU. A Reader."""

    def __init__(self, source: Source, workers: int, device: torch.device, batch_size: int) -> None:
        require_dali()
        self.source, self.device, self.batch_size = source, device, batch_size
        self.threads = max(1, min(workers, count_cores()))

    def read(self, batches: Iterator[Requests]) -> Iterator[Batch]:
        """One Batch for each that is asked for."""
        with ThreadPoolExecutor(self.threads) as pool:
            feed = _Feed(self.source, batches, pool)
            pipe = self._pipeline(feed)
            while True:
                try:
                    (output,) = pipe.run()
                except StopIteration:
                    if feed.error:
                        yield Batch(torch.empty(0), torch.empty(0), [], feed.error)
                    return
                except RuntimeError:  # DALI cannot decode one of them, and the pipeline is lost
                    if feed.careful:
                        raise
                    feed = feed.from_the_first_that_is_due()
                    pipe = self._pipeline(feed)
                    continue
                given = feed.given.popleft()
                yield Batch(self._to_torch(output), torch.tensor(given.labels), given.wrong)

    def _pipeline(self, feed: "_Feed") -> Any:  # noqa: ANN401  (DALI has no types)
        from nvidia.dali import Pipeline, fn, types

        on_gpu = self.device.type == "cuda"
        size = self.source.view.size
        device_id = (self.device.index or 0) if on_gpu else None
        pipe = Pipeline(self.batch_size, self.threads, device_id, prefetch_queue_depth=2)
        with pipe:
            encoded, start, shape, resized, corner = fn.external_source(feed, num_outputs=5, batch=True)
            region = fn.decoders.image_slice(
                encoded,
                start=start,
                shape=shape,
                axis_names="HW",
                output_type=types.RGB,
                adjust_orientation=False,  # as Pillow
                # both decoders: colours upsampled as libjpeg and so Pillow do
                **({"device": "mixed", "jpeg_fancy_upsampling": True} if on_gpu else {"device": "cpu"}),
            )
            image = fn.resize(region, size=resized, interp_type=types.INTERP_LINEAR, antialias=True)
            pipe.set_outputs(fn.slice(image, start=corner, shape=(size, size), axis_names="HW"))
        pipe.build()
        return pipe

    def _to_torch(self, output: Any) -> Tensor:  # noqa: ANN401
        from nvidia.dali.plugin.pytorch import feed_ndarray

        tensor = output.as_tensor()
        if self.device.type == "cpu":
            pixels = torch.empty(tensor.shape(), dtype=torch.uint8)
            feed_ndarray(tensor, pixels)
            return pixels
        # the copy is waited for, as DALI writes into its buffer again; on a stream of its own, so that nothing else is
        copying, computing = torch.cuda.Stream(self.device), torch.cuda.current_stream(self.device)
        with torch.cuda.stream(copying):
            pixels = torch.empty(tensor.shape(), dtype=torch.uint8, device=self.device)
            feed_ndarray(tensor, pixels, cuda_stream=copying)
        computing.wait_stream(copying)
        pixels.record_stream(computing)
        return pixels


class _Given(NamedTuple):
    """A batch that DALI has been given and has not returned yet."""

    requests: list[Request]
    labels: list[int]
    wrong: list[list[str]]


class _Feed:
    """Iterator that DALI draws its input from. careful: let Pillow decode every image."""

    def __init__(
        self, source: Source, batches: Iterator[Requests], pool: ThreadPoolExecutor, careful: bool = False
    ) -> None:
        self.source, self.batches, self.pool, self.careful = source, batches, pool, careful
        self.coming: deque[tuple[list[Request], list[Future[tuple[Prepared, int, list[str]]]]]] = deque()
        self.given: deque[_Given] = deque()
        self.error = ""

    def __iter__(self) -> "_Feed":
        return self

    def __next__(self) -> tuple[list[np.ndarray], ...]:
        for batch in islice(self.batches, AHEAD + 1 - len(self.coming)):
            requests = list(batch)
            self.coming.append(
                (requests, [self.pool.submit(self.source.read_intact, r, self._prepare) for r in requests])
            )
        if not self.coming or self.error:
            raise StopIteration
        requests, futures = self.coming.popleft()
        try:
            prepared, labels, wrong = zip(*(future.result() for future in futures), strict=True)
        except UsageError as error:
            self.error = str(error)
            self._cancel()
            raise StopIteration from error
        self.given.append(_Given(requests, list(labels), [w for w in wrong if w]))
        return tuple(list(column) for column in zip(*prepared, strict=True))

    def from_the_first_that_is_due(self) -> "_Feed":
        """A careful feed of all that DALI has not returned."""
        self._cancel()
        due = [*(given.requests for given in self.given), *(requests for requests, _ in self.coming)]
        return _Feed(self.source, chain(due, self.batches), self.pool, careful=True)

    def _cancel(self) -> None:
        for future in (f for _, futures in self.coming for f in futures):
            future.cancel()

    def _prepare(self, request: Request) -> Prepared:
        file = self.source.samples.path(request.image)
        encoded, (width, height) = encode_image(file, self.careful)
        window = self.source.view.window(width, height, self.source.random(request))
        left, top, region_width, region_height = window.region
        corner = np.array(window.corner[::-1], np.int32)
        start, shape = np.array([top, left], np.int32), np.array([region_height, region_width], np.int32)
        return encoded, start, shape, np.array(window.resized[::-1], np.float32), corner


def encode_image(file: str, careful: bool = False) -> tuple[np.ndarray, tuple[int, int]]:
    """An image's bytes for DALI, (N,) uint8, and its (width, height).

    A JPEG in grey or RGB whose parts are all there is given as it is. For everything else Pillow's word counts: it is
    decoded here and given as PNG. Raises UsageError naming a file that Pillow cannot read.
    """
    try:
        with Image.open(file) as image:
            size, mode, kind = image.size, image.mode, image.format
        data = np.fromfile(file, np.uint8)
    except Exception as error:  # decoders fail in their own ways
        raise UsageError(f"cannot read the image {file}: {reason(error)}") from error
    if kind == "JPEG" and mode in ("RGB", "L") and not careful and has_all_parts(data):
        return data, size
    lossless = io.BytesIO()
    open_image(file).save(lossless, "PNG", compress_level=0)
    return np.frombuffer(lossless.getvalue(), np.uint8), size


def has_all_parts(data: np.ndarray) -> bool:
    """Whether bytes (N,) are a JPEG from its start to its end without a marker that is out of place."""
    markers = np.flatnonzero((data[:-1] == 0xFF) & ~IN_THE_SCAN[data[1:]])
    place = 2
    while place + 4 <= len(data):
        kind = int(data[place + 1])
        if data[place] != 0xFF or not KNOWN_MARKERS[kind]:
            return False
        place += 2 + (int(data[place + 2]) << 8 | int(data[place + 3]))
        if kind == START_OF_SCAN:
            after = np.searchsorted(markers, place)
            place = int(markers[after]) if after < len(markers) else len(data)
    return place + 2 == len(data) and int(data[place + 1]) == END_OF_IMAGE
