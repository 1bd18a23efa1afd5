"""Packed networks beside what one would use instead: OpenVINO, onnxruntime and torch.compile.

python benchmarks/peers.py -a resnet18_1w1a: every peer is a process of its own, so that thread pools don't meet; they
run for a moment in turn, and the medians are printed. What a peer's package is not installed for is named in the table.
"""

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from tempfile import TemporaryDirectory, TemporaryFile
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from benchmarks import variants
from benchmarks.inference import LAST, figure, forward, networks, row, timing_parser
from benchmarks.openvino_network import compiled, openvino_model
from benchmarks.variants import Case, Step, machine, run
from biper.errors import UsageError
from biper.training.process import flush_denormals, keep_memory

SECONDS = 0.3  # that a peer runs in a round
CALIBRATION = 32  # batches that int8 networks are calibrated with
READY = "ready"
PACKAGES = "openvino", "nncf", "onnxruntime"


def packed(case: Case, folder: Path) -> Step:
    """Ours."""
    return forward(networks(case)["packed"], case.images())


def openvino_binary(case: Case, folder: Path) -> Step:
    """The packed network with OpenVINO's BinaryConvolution. Raises UsageError unless it predicts what ours does."""
    network, images = networks(case)["packed"], case.images()
    model, bits = openvino_model(network, images)
    infer, given = compiled(model, torch.get_num_threads()), images.numpy()
    theirs, ours = torch.from_numpy(infer(given).copy()), network(images)
    worst = float((theirs - ours).abs().max() / ours.abs().max())
    if not torch.equal(theirs.argmax(1), ours.argmax(1)):
        raise UsageError(f"OpenVINO's network predicts other classes; logits differ by {worst:.1g}, relatively")
    print(
        f"OpenVINO's binary network predicts what ours does; logits differ by {worst:.1g}, relatively", file=sys.stderr
    )

    def step(kept: object = bits) -> None:  # the bits live as long as what runs them
        infer(given)

    return step


def _openvino_twin(case: Case) -> Any:  # noqa: ANN401
    import openvino

    return openvino.convert_model(networks(case)["twin"], example_input=case.images(), input=list(case.images().shape))


def openvino_bf16(case: Case, folder: Path) -> Step:
    """The full-precision twin in OpenVINO with the hint for bf16."""
    infer, given = compiled(_openvino_twin(case), torch.get_num_threads(), "bf16"), case.images().numpy()
    return lambda: infer(given)


def openvino_int8(case: Case, folder: Path) -> Step:
    """The twin after nncf's post-training quantization."""
    import nncf

    given = case.images().numpy()
    model = nncf.quantize(_openvino_twin(case), nncf.Dataset([given] * CALIBRATION), subset_size=CALIBRATION)
    infer = compiled(model, torch.get_num_threads())
    return lambda: infer(given)


def onnxruntime_float32(case: Case, folder: Path) -> Step:
    """The twin in onnxruntime."""
    return variants.through_onnxruntime(networks(case)["twin"], case.images(), folder)


def onnxruntime_int8(case: Case, folder: Path) -> Step:
    """The twin after onnxruntime's static quantization."""
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    images, twin, path = case.images(), networks(case)["twin"], folder / f"{case.batch}.onnx"
    variants.through_onnxruntime(twin, images, folder)  # writes the file
    name = f"{case.batch}_prepared.onnx"

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        left = CALIBRATION

        def get_next(self) -> dict[str, Any] | None:
            self.left -= 1
            return {"x": images.numpy()} if self.left >= 0 else None

    quant_pre_process(path, folder / name)
    target = folder / "int8" / path.name
    target.parent.mkdir()
    quantize_static(folder / name, target, Reader(), quant_format=QuantFormat.QDQ, per_channel=True)
    return variants.through_onnxruntime(twin, images, target.parent)


def _torch_compiled(case: Case, half: bool) -> Step:
    last = networks(case)["twin"].to(memory_format=LAST)
    return forward(torch.compile(last, dynamic=False), case.images().contiguous(memory_format=LAST), half=half)


def torch_float32(case: Case, folder: Path) -> Step:
    """The twin through torch.compile."""
    return _torch_compiled(case, half=False)


def torch_bf16(case: Case, folder: Path) -> Step:
    """The twin through torch.compile, under autocast."""
    return _torch_compiled(case, half=True)


PEERS: dict[str, Callable[[Case, Path], Step]] = {
    "packed": packed,
    "OpenVINO BinaryConvolution": openvino_binary,
    "OpenVINO int8": openvino_int8,
    "OpenVINO bf16": openvino_bf16,
    "onnxruntime int8": onnxruntime_int8,
    "onnxruntime float32": onnxruntime_float32,
    "torch.compile bf16": torch_bf16,
    "torch.compile float32": torch_float32,
}


def arguments() -> argparse.Namespace:
    """The flags."""
    parser = timing_parser(__doc__)
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=list(PEERS), metavar="NAME", help=", ".join(PEERS))
    parser.add_argument("--serve", nargs=3, help=argparse.SUPPRESS)  # a peer, a batch, threads: this is its process
    return parser.parse_args()


def serve(case: Case, peer: str) -> None:
    """Run a peer whenever a line comes, and answer with the seconds of a call."""
    with TemporaryDirectory() as folder, torch.inference_mode():
        step = PEERS[peer](case, Path(folder))
        for _ in range(3):
            step()
        print(READY, flush=True)
        for _ in sys.stdin:
            step()
            calls, start = 0, time.perf_counter()
            while time.perf_counter() - start < SECONDS or not calls:
                step()
                calls += 1
            print((time.perf_counter() - start) / calls, flush=True)


class Process:
    """A peer in a process of its own; `failed` says why there is none."""

    def __init__(self, args: argparse.Namespace, peer: str, batch: int, threads: int) -> None:
        given = ["-a", args.model, "--family", args.family, "--serve", peer, str(batch), str(threads)]
        self.errors = TemporaryFile("w+")  # noqa: SIM115, libraries may say more than a pipe holds
        pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self.errors, "text": True}
        self.process = subprocess.Popen([sys.executable, __file__, *given], **pipes)
        self.failed = ""
        if not self._said(READY):
            self._fail()

    def _said(self, word: str) -> bool:
        """Whether the word came; libraries may say something before."""
        assert self.process.stdout
        return any(line.strip() == word for line in iter(self.process.stdout.readline, ""))

    def _fail(self) -> None:
        code = self.process.wait()
        self.errors.seek(0)
        self.failed = next(reversed(self.errors.read().split("\n")[:-1]), f"it ended with {code}")

    def seconds(self) -> float | None:
        """Those of a call; None from when it has ended."""
        assert self.process.stdin
        assert self.process.stdout
        if not self.failed:
            self.process.stdin.write("\n")
            self.process.stdin.flush()
            if answer := self.process.stdout.readline():
                return float(answer)
            self._fail()
        return None

    def end(self) -> None:
        """Let it go."""
        self.process.communicate()
        self.errors.close()


def compared(args: argparse.Namespace, batch: int, threads: int) -> str:
    """A table of the peers, as Markdown: medians, and how many times as long as ours each takes."""
    processes = {peer: Process(args, peer, batch, threads) for peer in args.peers}
    taken: dict[str, list[float]] = {peer: [] for peer in processes}
    for _ in range(args.rounds):
        for peer, process in processes.items():
            if (seconds := process.seconds()) is not None:
                taken[peer].append(seconds)
    for process in processes.values():
        process.end()
    lines = [row("", "ms", "quickest, ms", "times packed"), row(*["---"] * 4)]
    ours = statistics.median(taken["packed"]) if taken.get("packed") else None
    for peer, process in processes.items():
        if process.failed:
            lines.append(row(peer, f"not run: {process.failed}", "", ""))
            continue
        median = statistics.median(taken[peer])
        ratio = f"{median / ours:.2f}" if ours else ""
        lines.append(row(peer, figure(1000 * median), figure(1000 * min(taken[peer])), ratio))
    return "\n".join(lines)


def installed() -> str:
    """The versions of the peers' packages."""
    found = []
    for name in PACKAGES:
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            found.append(f"no {name}")
    return ", ".join(found)


def main() -> None:
    """Print the tables."""
    flush_denormals()
    keep_memory()
    args = arguments()
    if args.serve:
        peer, batch, threads = args.serve
        torch.set_num_threads(int(threads))
        serve(Case(args.model, args.family, 2, int(batch), torch.device("cpu")), peer)
        return
    print(f"# {args.model}\n\n{machine()}; {installed()}", flush=True)
    for threads in sorted(set(args.threads)):
        for batch in sorted(set(args.batches)):
            print(f"\n## Batch {batch}, threads: {threads}\n\n{compared(args, batch, threads)}", flush=True)


if __name__ == "__main__":
    run(main)
