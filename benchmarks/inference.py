"""Milliseconds of a forward pass: packed networks, the training network and the full-precision twin, in one process.

python benchmarks/inference.py -a resnet18_1w1a: every way runs for a moment in turn, and the medians are printed.
"""

import argparse
import copy
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import variants
from benchmarks.train_step import peak_memory
from benchmarks.variants import CLASSES, Case, Step, machine, positive, run
from biper.errors import UsageError
from biper.models import Network, create_model
from biper.nn.layers import BinaryConv2d
from biper.packed import runtime as kernels
from biper.packed.file import load_packed, save_packed
from biper.packed.layers import PackedConv2d
from biper.packed.network import PackedNetwork
from biper.packed.pack import pack
from biper.training.process import flush_denormals, keep_memory

SECONDS = 0.05  # that a way runs in a round, at least
LAST = torch.channels_last


def timing_parser(text: str | None) -> argparse.ArgumentParser:
    """A parser of what is timed: network, batches, threads and rounds. text: a module's, whose first line says it."""
    parser = argparse.ArgumentParser(description=text.splitlines()[0] if text else None)
    parser.add_argument("-a", "--model", default="resnet18_1w1a", help="default resnet18_1w1a")
    parser.add_argument("--family", choices=("cifar10", "imagenet"), default="cifar10", help="default cifar10")
    parser.add_argument("--batches", type=positive, nargs="+", default=[1, 64], help="images in each; default 1 64")
    parser.add_argument("--threads", type=positive, nargs="+", default=[1, 2], help="default 1 2")
    parser.add_argument("--rounds", type=positive, default=7, help="timed turns of each way; default 7")
    return parser


def arguments() -> argparse.Namespace:
    """The flags."""
    parser = timing_parser(__doc__)
    parser.add_argument("--image_size", type=positive, help="pixels a side; default 32, ImageNet's 224")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw the images per second too")
    flag = partial(parser.add_argument, action=argparse.BooleanOptionalAction, default=True)
    flag("--compilers", help="the twin through torch.compile and onnxruntime too")
    flag("--layers", help="each binary convolution alone too")
    flag("--memory", help="measure peak memory")
    # a network's name and file: its peak memory, in a process of its own
    parser.add_argument("--only", nargs=2, help=argparse.SUPPRESS)
    return parser.parse_args()


def forward(model: Callable[[Tensor], Tensor], images: Tensor, half: bool = False) -> Step:
    """A forward pass, in float32 or under autocast."""

    def step() -> None:
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=half):
            model(images)

    return step


def repeated(step: Step, seconds: float) -> float:
    """Seconds a call, of as many calls as fill these seconds."""
    calls, elapsed, start = 0, 0.0, time.perf_counter()
    while elapsed < seconds:
        step()
        calls, elapsed = calls + 1, time.perf_counter() - start
    return elapsed / calls


def timed(steps: dict[str, Step], rounds: int) -> dict[str, float]:
    """The median seconds of each way, taken in turn so that a slow moment of the machine strikes all of them."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            repeated(step, SECONDS / 2)  # caches, and cores that threads of the way before have left
            seconds[name].append(repeated(step, SECONDS))
    return {name: statistics.median(values) for name, values in seconds.items()}


def networks(case: Case) -> dict[str, nn.Module]:
    """What is compared, before layouts and compilers; the same at every call."""
    torch.manual_seed(0)
    network = variants.randomized(training_network(case))
    twin = variants.randomized(variants.twin_network(case))
    return {"packed": pack(network), "training network": network, "twin": twin}


def training_network(case: Case) -> Network:
    """The network of stage 2, fresh."""
    return create_model(case.model, family=case.family, num_classes=CLASSES[case.family], freq=20.0, stage=2)


def save(network: nn.Module, file: Path) -> None:
    """Write one of `networks`."""
    if isinstance(network, PackedNetwork):
        save_packed(network, file)
    else:
        torch.save(network.state_dict(), file)


def load(name: str, file: Path, case: Case) -> nn.Module:
    """That one of `networks` again, as a user loads it."""
    if name == "packed":
        return load_packed(file)
    network = variants.twin_network(case) if name == "twin" else training_network(case)
    network.load_state_dict(torch.load(file, weights_only=True), assign=True)
    return network.eval()


def ways(made: dict[str, nn.Module], images: Tensor, compilers: bool, folder: Path) -> dict[str, Step]:
    """Every way by name, for the threads that torch has now."""
    twin, images_last = made["twin"], images.contiguous(memory_format=LAST)
    last = copy.deepcopy(twin).to(memory_format=LAST)
    steps = {name: forward(network, images) for name, network in made.items()}
    steps["twin, channels-last"] = forward(last, images_last)
    steps["twin, bf16"] = forward(last, images_last, half=True)
    if compilers:
        torch.compiler.reset()  # what was compiled for other threads or images
        compiled = torch.compile(last, dynamic=False)
        steps["twin, compiled"] = forward(compiled, images_last)
        steps["twin, compiled, bf16"] = forward(compiled, images_last, half=True)
        if not variants.lacking():
            steps["twin, onnxruntime"] = variants.through_onnxruntime(twin, images, folder)
    return steps


@torch.inference_mode()
def agreement(made: dict[str, nn.Module], images: Tensor) -> str:
    """A line that says that packing changed no prediction. Raises UsageError if it changed one."""
    theirs, ours = made["training network"](images), made["packed"](images)
    if changed := int((ours.argmax(1) != theirs.argmax(1)).sum()):
        raise UsageError(f"the packed network predicts another class for {changed} of {len(images)} images")
    count, worst = len(images), float((ours - theirs).abs().max() / theirs.abs().max())
    return f"Packed and training network predict the same for {count} images; logits differ by {worst:.1g}, relatively."


def figure(value: float) -> str:
    """Three digits."""
    return f"{value:,.{max(0, 2 - math.floor(math.log10(value)))}f}"


def row(*cells: object) -> str:
    """A line of a Markdown table."""
    return f"| {' | '.join(map(str, cells))} |"


def table(batch: int, seconds: dict[str, float]) -> str:
    """A line for every way, as Markdown."""
    rates = ((name, figure(1000 * s), figure(batch / s), f"{seconds['twin'] / s:.2f}") for name, s in seconds.items())
    return "\n".join(row(*cells) for cells in [("", "ms", "images/s", "times the twin"), ["---"] * 4, *rates])


def shape(layer: BinaryConv2d, x: Tensor) -> str:
    """What a convolution is, in words: channels, kernel, stride and the size of what goes in."""
    groups = f" in {layer.groups} groups" if layer.groups > 1 else ""
    kernel, size = ("x".join(map(str, sides)) for sides in (layer.kernel_size, x.shape[2:]))
    return f"{layer.in_channels} -> {layer.out_channels}{groups}, {kernel}, stride {layer.stride[0]}, on {size}"


def layer_table(network: nn.Module, images: Tensor, rounds: int) -> str:
    """A line for every shape of binary convolution, packed and as the twin's, channels-last; the last: all layers."""
    names = ("packed", "float32", "bf16")
    cells = ("binary convolution", "layers", *(f"{n}, ms" for n in names), *(f"{n}, T/s" for n in names))
    lines = [row(*cells), row(*["---"] * len(cells))]
    all_layers, all_work, all_seconds = 0, 0.0, dict.fromkeys(names, 0.0)

    def add(label: str, count: int, work: float, seconds: dict[str, float]) -> None:
        times = [figure(1000 * seconds[name]) for name in names]
        lines.append(row(label, count, *times, *(figure(work / seconds[name]) for name in names)))

    for layer, activations, count in variants.distinct_layers(network, images):
        x, w = (t.detach().contiguous(memory_format=LAST) for t in (activations, layer.weight))
        packed, half = PackedConv2d.of(layer), x.bfloat16()
        options = {"stride": layer.stride, "padding": layer.padding, "groups": layer.groups}
        convolve, convolve_half = (partial(F.conv2d, weight=t, **options) for t in (w, w.bfloat16()))
        steps = [forward(packed, x), forward(convolve, x), forward(convolve_half, half)]
        seconds = timed(dict(zip(names, steps, strict=True)), rounds)
        work = packed(x).numel() * w[0].numel() / 1e12
        add(shape(layer, x), count, work, seconds)
        all_layers, all_work = all_layers + count, all_work + count * work
        all_seconds = {name: all_seconds[name] + count * seconds[name] for name in names}
    add("all", all_layers, all_work, all_seconds)
    note = "\nT/s: 10^12 multiply-adds a second. Packed starts from real activations: it packs their signs too."
    return "\n".join([*lines, note])


def sizes(made: dict[str, nn.Module]) -> str:
    """A line: MiB of the packed network and of the float32 one."""
    groups = (made["packed"].buffers(), made["packed"].parameters(), made["training network"].state_dict().values())
    buffers, real, whole = (sum(tensor.nbytes for tensor in group) / 2**20 for group in groups)
    ours = f"{figure(buffers)} MiB packed and {figure(real)} MiB that stay real"
    return f"Size: {ours}; in float32 {figure(whole)} MiB, {whole / (buffers + real):.1f} times as much."


def peak_memory_alone(name: str, network: nn.Module) -> float:
    """MiB that a process needs at most to load the network and to run it on the largest batch."""
    with TemporaryDirectory() as folder:
        file = Path(folder) / "network"
        save(network, file)
        command = [sys.executable, __file__, *sys.argv[1:], "--only", name, str(file)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(done.stdout.splitlines()[-1])


def plot(path: Path, title: str, results: dict[int, dict[str, float]]) -> None:
    """A panel for each batch, with the images per second of every way."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # a file, also where there is no screen
    from matplotlib.figure import Figure

    picture = Figure((6.5 * len(results), 1.5 + 0.4 * len(results[max(results)])), layout="constrained")
    axes = picture.subplots(1, len(results), sharey=True, squeeze=False)
    for axis, (batch, seconds) in zip(axes[0], results.items(), strict=True):
        rates = [batch / value for value in seconds.values()]
        colors = ["tab:red", "tab:gray"] + ["tab:blue"] * (len(rates) - 2)
        labels = [f"{figure(r)} ({figure(1000 * batch / r)} ms)" for r in rates]
        axis.bar_label(axis.barh(list(seconds), rates, color=colors), labels, padding=3)
        axis.set(title=f"batch {batch}", xlabel="images/s", xlim=(0, 1.35 * max(rates)))
    axes[0, 0].invert_yaxis()
    picture.suptitle(title)
    FigureCanvasAgg(picture).print_figure(path, dpi=120)


def tables(args: argparse.Namespace, case: Case, made: dict[str, nn.Module]) -> dict[int, dict[str, float]]:
    """Print those of the ways; the seconds by batch at the most threads."""
    results: dict[int, dict[str, float]] = {}
    with TemporaryDirectory() as folder:
        for threads in sorted(set(args.threads)):
            torch.set_num_threads(threads)
            for batch in sorted(set(args.batches)):
                images = replace(case, batch=batch).images()
                line = agreement(made, images)
                results[batch] = timed(ways(made, images, args.compilers, Path(folder)), args.rounds)
                print(f"\n## Batch {batch}, threads: {threads}\n\n{table(batch, results[batch])}\n\n{line}", flush=True)
    return results


def main() -> None:
    """Print the tables."""
    flush_denormals()
    keep_memory()
    args = arguments()
    case = Case(args.model, args.family, 2, max(args.batches), torch.device("cpu"), args.image_size)
    if args.only:
        name, file = args.only
        torch.set_num_threads(max(args.threads))
        print(peak_memory(lambda: forward(load(name, Path(file), case), case.images()), case))
        return
    if args.plot and (args.plot.suffix.lower() != ".png" or not args.plot.parent.is_dir()):
        raise UsageError(f"cannot write {args.plot}: it is no .png, or its folder is not there")
    made, size = networks(case), case.images().shape[-1]
    agreement(made, case.images()[:1])  # an image size that cannot be is said before anything else
    title = f"{case.model} ({case.family}), {size}x{size} images"
    print(f"{title}; median of {args.rounds} rounds\n{machine()}, popcount: {kernels.chosen()}")
    if args.compilers and variants.lacking():
        print(f"twin, onnxruntime is left out: {', '.join(variants.lacking())} not installed")
    results = tables(args, case, made)
    for batch in results if args.layers else ():
        text = layer_table(made["training network"], replace(case, batch=batch).images(), args.rounds)
        print(f"\n## Layers, batch {batch}, threads: {max(args.threads)}\n\n{text}", flush=True)
    print(f"\n## Size and memory, batch {case.batch}, threads: {max(args.threads)}\n\n{sizes(made)}")
    for name, network in made.items() if args.memory else ():
        print(f"Peak memory, {name}: {peak_memory_alone(name, network):,.0f} MiB", flush=True)
    if args.plot:
        chosen = {batch: results[batch] for batch in sorted({min(results), max(results)})}
        plot(args.plot, f"{title}, threads: {max(args.threads)}", chosen)


if __name__ == "__main__":
    run(main)
