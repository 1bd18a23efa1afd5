"""Train a stage: biper train; main.py and main_stage2.py of a family. With -e they evaluate a checkpoint."""

import argparse
import shlex
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from biper.commands.arguments import Parser, add_setting, read_config, read_flags, with_config
from biper.commands.evaluate import evaluate
from biper.commands.process import called_as, prepare_process
from biper.errors import run_command, tell
from biper.training.settings import FAMILY_DEFAULTS, GROUPS, SETTINGS

if TYPE_CHECKING:
    from biper.training.distributed import Processes

DESCRIPTIONS = {
    1: "BiPer, stage 1: train real weights sin(freq*w) with binary activations.",
    2: "BiPer, stage 2: start from stage 1 and make the weights binary.",
    None: "BiPer: train a stage, 1: real weights sin(freq*w) with binary activations, 2: from there, binary weights.",
}
TAU_HELP = "weight of the periodic regularizer: sets --tau_min and --tau_max"
FREQ_SCALE_HELP = "instead: each layer's own freq, X / std of its fresh weights"
# of the models that come with biper; the registry has them too, but with torch, for which --help does not wait
ARCHITECTURES = {
    "cifar10": "resnet18 resnet18A resnet18B resnet18C resnet18_react resnet20 resnet20_react resnet34 vgg_small",
    "imagenet": "mobilenet mobilenet_react resnet18 resnet18_react resnet34",
}
FOLDER = """images of your own, for --dataset folder --data_path DIR:
  DIR/train/<class>/*.jpg    DIR/test/<class>/*.jpg (or val/); .png and others too
"""
FAMILY_HELP = "whose networks and defaults; if absent that of stage 1, of the recipe's or the given data set"


def build_parser(family: str | None = None, stage: int | None = None, prog: str | None = None) -> Parser:
    """Every setting as a flag, with a family's defaults in its help, and a flag for a family or a stage of None."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = Parser(prog=prog, description=DESCRIPTIONS[stage], epilog=_epilog(family), formatter_class=formatter)
    groups = {name: parser.add_argument_group(name) for name in GROUPS}
    if stage is None:
        groups["run"].add_argument("--stage", type=int, choices=(1, 2), help="default 1")
    if family is None:
        groups["run"].add_argument("--family", choices=tuple(FAMILY_DEFAULTS), help=FAMILY_HELP)
    groups["run"].add_argument("--config", metavar="FILE", help="YAML file with sections stage1 and stage2; flags win")
    for name in SETTINGS:
        add_setting(groups[SETTINGS[name].metadata["group"]], name, _default_text(family, name))
        if name == "freq":
            groups["network"].add_argument("--freq_scale", type=float, metavar="X", help=FREQ_SCALE_HELP)
        if name == "tau_min":
            groups["training"].add_argument("--tau", type=float, metavar="X", help=TAU_HELP)
    return parser


def _epilog(family: str | None) -> str:
    """Which models there are, and what a folder of images looks like."""
    lines = ["models, each with _1w1a, _1w32a or _32w32a behind its name:"]
    for name in [family] if family else ARCHITECTURES:
        indent = f"  {name:<10}"
        lines.append(textwrap.fill(ARCHITECTURES[name], 78, initial_indent=indent, subsequent_indent=" " * len(indent)))
    return "\n".join([*lines, "", FOLDER])


def _default_text(family: str | None, name: str) -> Any:  # noqa: ANN401
    """What the help says of a setting's default: a family's, or both families'."""
    common = SETTINGS[name].default
    if family:
        return FAMILY_DEFAULTS[family].get(name, common)
    imagenet = FAMILY_DEFAULTS["imagenet"].get(name, common)
    return common if imagenet == common else f"{common}, ImageNet's {imagenet}"


def main(
    family: str | None = None, stage: int | None = None, argv: Sequence[str] | None = None, prog: str | None = None
) -> None:
    """Train a stage of a family, which flags say if they are None, or evaluate with -e.

    Exits with 0, 1 (diverged), 2 (bad input) or 128 + signal.
    """
    run_command(lambda: _train_or_evaluate(family, stage, argv, prog))


def _train_or_evaluate(family: str | None, stage: int | None, argv: Sequence[str] | None, prog: str | None) -> None:
    flags = read_flags(build_parser(family, stage, prog), argv)
    family, stage = family or flags.pop("family", None), stage or flags.pop("stage", None)
    config = read_config(flags, stage or 1)
    given = with_config(flags, config)
    if given.get("evaluate"):
        evaluate(family, stage, given)
        return
    from biper.training.distributed import restartable  # torch loads here, after --help and a wrong flag
    from biper.training.process import signals_interrupt

    processes = prepare_process()
    with signals_interrupt():
        family = family or _family(stage or 1, config, given)
        _train(family, stage or 1, given | ({"resume": True} if restartable() else {}), processes)


def _family(stage: int, config: Mapping[str, Any], given: Mapping[str, Any]) -> str:
    """The family of a run that does not say it: of what it goes on from, of the recipe's data set, or of the given one.

    A recipe keeps its networks on other data, in experiments too.
    """
    from biper.data.datasets import find_dataset
    from biper.models.checkpoint import own_metadata, read_checkpoint
    from biper.training.checkpoint import LATEST

    run = Path(given.get("results_dir", ""), given.get("save", "")) / LATEST
    files = [run] if given.get("resume") else []
    files += [Path(given["load_ckpt_stage1"])] if stage == 2 and given.get("load_ckpt_stage1") else []
    for file in files:
        contents = read_checkpoint(file) if file.is_file() else {}
        if "format" in contents:
            return own_metadata(contents, file).family
    return find_dataset(config.get("dataset") or given.get("dataset", "cifar10")).family


def _train(family: str, stage: int, given: dict[str, Any], processes: "Processes") -> None:
    from biper.training.inheritance import training_config
    from biper.training.log import add_line
    from biper.training.run_folder import run_folder
    from biper.training.train import train

    config = training_config(family, stage, given)
    try:
        train(config, processes)
    except KeyboardInterrupt as error:
        again = shlex.join([*(word for word in called_as() if word != "--resume"), "--resume"])
        if processes.size > 1:
            again = "the same torchrun command with --resume"
        if processes.main:
            text = f"stopped by {error}; what is saved stays. To go on from there: {again}"
            add_line(run_folder(config), text)  # which is there when the terminal is not
            tell(text)
        raise
