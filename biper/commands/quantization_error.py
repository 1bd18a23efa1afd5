"""The quantization error of checkpoints as tables, CSV and picture: compute_QE.py."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from biper.commands.arguments import Parser, add_published
from biper.errors import UsageError, run_command
from biper.files import require_different, require_free


def build_parser(prog: str) -> Parser:
    """Checkpoints of either stage, and what to write of them."""
    parser = Parser(prog=prog, description="The quantization error of checkpoints, in all and per layer.")
    parser.add_argument("checkpoints", nargs="+", type=Path, metavar="CHECKPOINT", help="a file of either stage")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw histograms and errors")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="write the layers as CSV")
    add_published(parser)
    return parser


def main(argv: Sequence[str] | None = None, prog: str = "compute_QE.py") -> None:
    """Print and write the quantization errors. Exits with 0 or 2 (bad input)."""
    run_command(lambda: _compute(build_parser(prog).read(argv)))


def _compute(given: dict[str, Any]) -> None:
    from biper.models.checkpoint import load_checkpoint
    from biper.nn.quantization_error import format_table, quantization_error, write_csv

    _require_outputs(given)
    rows = []
    for path in given["checkpoints"]:
        model = load_checkpoint(path, given.get("freq"), model=given.get("model"))
        m, error = model.metadata, quantization_error(model)
        if not error.layers:
            print(f"{path} is left out: {m.model} has no binarized layers", file=sys.stderr)
            continue
        rows.append((path, model, error))
        print(f"{path}: {m.model}, stage {m.stage}, {m.quantizer_text}\n{format_table(error)}\n")
    if not rows:
        raise UsageError("no checkpoint with binarized layers was given")
    if "csv" in given:
        write_csv([(str(path), error) for path, _, error in rows], given["csv"])
        print(f"wrote {given['csv']}")
    if "plot" in given:
        from biper.experiments.plots import plot_quantization_error

        plot_quantization_error([(path.absolute().parent.name, model) for path, model, _ in rows], given["plot"])
        print(f"wrote {given['plot']}")


def _require_outputs(given: dict[str, Any]) -> None:
    """Raise UsageError before work is done for what cannot be written, or would take the place of other files."""
    if "csv" in given:
        from biper.nn.quantization_error import is_table

        require_free(given["csv"], is_table)
    if "plot" in given:
        from biper.experiments.plots import require_picture

        require_picture(given["plot"])
    require_different({f"--{name}": given[name] for name in ("csv", "plot") if name in given})
