"""What the user asked for: flags and the YAML file of --config, as one mapping of the settings that were given."""

import argparse
from collections.abc import Sequence
from dataclasses import Field
from pathlib import Path
from typing import Any, NoReturn, get_args, get_origin, get_type_hints

from biper.errors import UsageError
from biper.training.settings import FAMILY_DEFAULTS, GROUPS, SETTINGS, Settings, expand_tau, read_yaml

STUDIES = ("frequency", "two_stages", "warm_start", "regularizer", "learning_rate")
TAU_HELP = "weight of the periodic regularizer: sets --tau_min and --tau_max"


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line."""

    def __init__(self, **kwargs: Any) -> None:  # noqa: ANN401
        super().__init__(allow_abbrev=False, argument_default=argparse.SUPPRESS, **kwargs)

    def error(self, message: str) -> NoReturn:
        """Raise UsageError with the message."""
        raise UsageError(f"{message} (see --help)")


def checkpoints_parser() -> Parser:
    """The parser of compute_QE.py."""
    parser = Parser(prog="compute_QE.py", description="The quantization error of checkpoints, in all and per layer.")
    parser.add_argument("checkpoints", nargs="+", type=Path, metavar="CHECKPOINT", help="a file of either stage")
    parser.add_argument("--plot", type=Path, default=None, metavar="FILE.png", help="draw histograms and errors")
    parser.add_argument("--csv", type=Path, default=None, metavar="FILE", help="write the layers as CSV")
    parser.add_argument("--freq", type=float, default=None, help="for a published checkpoint without its config.txt")
    parser.add_argument("--model", default=None, help="for a published checkpoint that does not say its model")
    return parser


def _add_published(parser: Parser) -> None:
    parser.add_argument("--freq", type=float, help="for a published checkpoint without its config.txt")
    parser.add_argument("--model", help="for a published checkpoint that does not say its model")


def export_parser() -> Parser:
    """The parser of export.py."""
    parser = Parser(prog="export.py", description="Pack a binary network: weights of one bit, in one small file.")
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="a file of stage 2")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="FILE", help="the packed file to write")
    parser.add_argument("--onnx", type=Path, metavar="FILE.onnx", help="write the network as ONNX too")
    parser.add_argument("--data_path", help="test images for the comparison; absent: where the checkpoint's were")
    _add_published(parser)
    return parser


def predict_parser() -> Parser:
    """The parser of predict.py."""
    parser = Parser(prog="predict.py", description="What a network sees in images: its five likeliest classes.")
    parser.add_argument("network", type=Path, metavar="FILE", help="a packed network or a checkpoint")
    parser.add_argument("images", type=Path, nargs="+", metavar="IMAGE", help="image files")
    _add_published(parser)
    return parser


def reproduce_parser() -> Parser:
    """The parser of reproduce.py."""
    text = "Both stages of a recipe for every seed, evaluated and packed, as a table, pictures and model cards."
    parser = Parser(prog="reproduce.py", description=text)
    _add_experiment(parser, "results/<recipe>_<data>_<epochs>")
    return parser


def ablation_parser() -> Parser:
    """The parser of ablation.py."""
    text = "Variants of a recipe over seeds: what frequency, stages, warm start, regularizer and learning rate do."
    parser = Parser(prog="ablation.py", description=text)
    _add_experiment(parser, "results/ablation_<recipe>_<data>_<epochs>")
    parser.add_argument("--studies", nargs="+", choices=STUDIES, help="default: all of them")
    return parser


def _add_experiment(parser: Parser, folder: str) -> None:
    """What experiments have in common: the recipe, its seeds, and every setting of data and hardware."""
    parser.add_argument("recipe", type=Path, metavar="RECIPE.yaml", help="with sections stage1 and stage2")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], metavar="N", help="default 0")
    parser.add_argument("--results_dir", type=Path, metavar="DIR", help=f"default {folder}")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--epochs_scale", type=float, metavar="X", help="shorten both stages to X of their epochs")
    length.add_argument("--epochs", type=int, nargs=2, metavar=("N1", "N2"), help="of stage 1 and of stage 2")
    parser.add_argument("--family", choices=tuple(FAMILY_DEFAULTS), help="of the model; by default after the data")
    parser.add_argument("--data_name", metavar="TEXT", help="what tables and cards call the data")
    for group in ("data", "hardware"):
        arguments = parser.add_argument_group(group)
        for name, f in SETTINGS.items():
            if f.metadata["group"] == group:
                _add_flag(arguments, name, f, None)


def summary_parser() -> Parser:
    """The parser of summary.py."""
    text = "What a network consists of and costs: parameters, bytes and operations, per layer and in total."
    parser = Parser(prog="summary.py", description=text)
    parser.add_argument("network", metavar="MODEL|CHECKPOINT", help="a model's name, or a file")
    parser.add_argument("--family", choices=tuple(FAMILY_DEFAULTS), help="of a model's name; default cifar10")
    parser.add_argument("--num_classes", type=int, metavar="N", help="of a model's name; default 10, ImageNet's 1000")
    parser.add_argument("--image_size", type=int, metavar="N", help="default 32, ImageNet's 224, or the checkpoint's")
    _add_published(parser)
    return parser


def download_parser() -> Parser:
    """The parser of cifar10/dataset/download.py."""
    parser = Parser(prog="download.py", description="Download CIFAR-10 or CIFAR-100, or unpack a local archive of it.")
    parser.add_argument("--dataset", choices=("cifar10", "cifar100"), default="cifar10", help="default cifar10")
    parser.add_argument("--data_path", type=Path, default=None, help="where to put it; absent: where training looks")
    parser.add_argument("--archive", type=Path, default=None, metavar="FILE", help="a cifar-10-python.tar.gz at hand")
    return parser


def prepare_parser() -> Parser:
    """The parser of imagenet/dataset/prepare.py."""
    parser = Parser(prog="prepare.py", description="Unpack the archives of ImageNet (ILSVRC 2012) into class folders.")
    parser.add_argument(
        "--archives", type=Path, required=True, metavar="DIR", help="where the downloaded .tar files lie"
    )
    parser.add_argument("--data_path", type=Path, default=None, help="where to put it; absent: where training looks")
    return parser


def build_parser(prog: str, description: str, family: str) -> Parser:
    """The parser of the training commands, made of Settings' fields, with a family's defaults in its help."""
    parser = Parser(prog=prog, description=description)
    groups = {name: parser.add_argument_group(name) for name in GROUPS}
    groups["run"].add_argument("--config", metavar="FILE", help="YAML file with sections stage1 and stage2; flags win")
    for name, f in SETTINGS.items():
        _add_flag(groups[f.metadata["group"]], name, f, FAMILY_DEFAULTS[family].get(name, f.default))
        if name == "tau_min":
            groups["training"].add_argument("--tau", type=float, metavar="X", help=TAU_HELP)
    return parser


def _add_flag(group: argparse._ArgumentGroup, name: str, f: Field[Any], default: Any) -> None:  # noqa: ANN401
    names = [*([f.metadata["short"]] if f.metadata["short"] else []), f"--{name}"]
    hint = get_type_hints(Settings)[name]
    text = f.metadata["text"].replace("%", "%%")
    if default not in ("", None, ()) and hint is not bool:
        text += f" (default {default})"
    if hint is bool:
        group.add_argument(*names, action=argparse.BooleanOptionalAction, help=text)
        return
    many = get_origin(hint) is tuple
    kind = get_args(hint)[0] if get_args(hint) else hint
    group.add_argument(
        *names,
        type=kind,
        nargs="+" if many else None,
        choices=f.metadata["choices"] or None,
        metavar=None if f.metadata["choices"] else {int: "N", float: "X", str: "NAME"}[kind],
        help=text,
    )


def read_options(parser: Parser, argv: Sequence[str] | None, stage: int | None) -> dict[str, Any]:
    """The settings given by flags and by --config, where flags win; defaults are not among them."""
    flags = vars(parser.parse_args(argv))
    file = flags.pop("config", None)
    flags = {name: tuple(value) if isinstance(value, list) else value for name, value in expand_tau(flags).items()}
    recipe = read_yaml(Path(file), stage or 2) if file else {}
    if flags.get("from_scratch"):
        recipe.pop("load_ckpt_stage1", None)  # flags win over the recipe
    return recipe | flags
