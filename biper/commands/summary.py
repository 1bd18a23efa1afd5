"""What a network consists of and costs: summary.py."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from biper.commands.arguments import Parser, add_published, add_setting
from biper.errors import UsageError, run_command
from biper.training.settings import FAMILY_DEFAULTS, METHOD

if TYPE_CHECKING:
    from biper.models import Network
    from biper.packed.costs import LayerCost

COUNTED = """params: trainable ones; float32 and packed: bytes of these and of the batch norms' statistics (packed:
a bit a binary weight in whole words of 64, alpha, and a gain and a shift for each channel of a batch norm).
FLOPs and BOPs: multiply-adds for one image, of real and of binary layers; OPs = FLOPs + BOPs/64. Counted are
convolutions and the classifier; not counted are alpha, batch norm, skips, activations and pooling."""


def build_parser(prog: str) -> Parser:
    """A model by name, of any size, or a file."""
    text = "What a network consists of and costs: parameters, bytes and operations, per layer and in total."
    parser = Parser(prog=prog, description=text)
    parser.add_argument("network", metavar="MODEL|CHECKPOINT", help="a model's name, or a file")
    parser.add_argument("--family", choices=tuple(FAMILY_DEFAULTS), help="of a model's name; default cifar10")
    parser.add_argument("--num_classes", type=int, metavar="N", help="of a model's name; default 10, ImageNet's 1000")
    method = parser.add_argument_group("method of a model's name")
    for name in METHOD:
        add_setting(method, name)
    parser.add_argument("--image_size", type=int, metavar="N", help="default 32, ImageNet's 224, or the checkpoint's")
    add_published(parser)
    return parser


def main(argv: Sequence[str] | None = None, prog: str = "summary.py") -> None:
    """Print the table of a network. Exits with 0 or 2 (bad input)."""
    run_command(lambda: _summarize(build_parser(prog).read(argv)))


def _summarize(given: dict[str, Any]) -> None:
    from biper.models.registry import require_runs
    from biper.packed.costs import costs

    network, freqs, size = _of_file(given) if Path(given["network"]).exists() else _of_name(given)
    size = given.get("image_size", size)
    if size < 8:
        raise UsageError(f"--image_size {size} is too small: at least 8")
    require_runs(network, size)
    m = network.metadata
    print(f"{m.model} ({m.family}), {m.num_classes} classes, images of {size}x{size}\n")
    print(format_table(costs(network, size), freqs))


def _of_file(given: dict[str, Any]) -> tuple["Network", dict[str, float], int]:
    """A checkpoint's network or a fresh one like a packed file's, its frequencies, the side of its training images."""
    from biper.models import Network
    from biper.models.registry import network_like
    from biper.nn.quantization_error import own_frequencies
    from biper.training.inheritance import load_network

    for name in ("family", "num_classes", *METHOD):
        if name in given:
            raise UsageError(f"--{name} is for a model's name: {given['network']} is a file, which says it")
    network = load_network(Path(given["network"]), given)
    m = network.metadata
    assert m is not None
    if isinstance(network, Network):
        return network, own_frequencies(network), m.shown_size
    return network_like(m), {}, m.shown_size  # packed weights have lost their frequencies


def _of_name(given: dict[str, Any]) -> tuple["Network", dict[str, float], int]:
    """A fresh network by its model's name, its frequencies, and the side of its family's images."""
    from biper.models import list_models
    from biper.models.methods import network_of_method
    from biper.models.registry import unknown_model
    from biper.nn.quantization_error import own_frequencies

    name, family, classes = given["network"], given.get("family"), given.get("num_classes")
    if name not in list_models(family):
        raise UsageError(f"no file and no model {name!r}: {unknown_model(name, family)}")
    if classes is not None and classes < 1:
        raise UsageError(f"--num_classes {classes} is too small: at least 1")
    network = network_of_method(name, family, classes, **{name: given[name] for name in METHOD if name in given})
    return network, own_frequencies(network), network.metadata.shown_size


def format_table(layers: Sequence["LayerCost"], freqs: Mapping[str, float]) -> str:
    """The table that people read: a line a layer, the sums, and what is counted. freqs: of layers with their own."""
    from biper.packed.costs import total

    titles = ("layer", "kind", "output", "binary", "real", "float32 B", "packed B", "FLOPs", "BOPs", "OPs")
    whole = total(layers)
    rows = [titles, *(_row(layer) for layer in [*layers, whole])]
    if freqs:
        rows = [(*row, text) for row, text in zip(rows, _freq_column(layers, freqs), strict=True)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join(
            cell.ljust(w) if i < 3 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
    sizes = f"{_size(whole.float32)} in float32, {_size(whole.packed)} packed"
    return "\n".join(
        [
            *(line.rstrip() for line in lines),
            "",
            f"parameters: {whole.binary + whole.real:,}, of which {whole.binary:,} are binary",
            f"size: {sizes}: {whole.float32 / whole.packed:.1f} times smaller",
            f"operations for an image: {whole.flops:,} FLOPs + {whole.bops:,} BOPs / 64 = {whole.ops:,.0f} OPs",
            COUNTED,
        ]
    )


def _freq_column(layers: Sequence["LayerCost"], freqs: Mapping[str, float]) -> list[str]:
    """Title, layers and sum of the frequencies, which no sum has."""
    return ["freq", *(f"{freqs[layer.name]:.4g}" if layer.name in freqs else "" for layer in layers), ""]


def _row(layer: "LayerCost") -> tuple[str, ...]:
    numbers = (layer.binary, layer.real, layer.float32, layer.packed, layer.flops, layer.bops, round(layer.ops))
    return (layer.name, layer.kind, layer.output, *(f"{number:,}" for number in numbers))


def _size(count: int) -> str:
    return f"{count / 1e6:.3f} MB ({8 * count / 1e6:.1f} Mbit)"
