"""Train a stage of a family (main.py, main_stage2.py), or evaluate a checkpoint by -e (they and eval.sh)."""

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from biper.commands.arguments import Parser, add_setting, read_options
from biper.commands.process import prepare_process
from biper.errors import UsageError, run_command
from biper.training.settings import FAMILY_DEFAULTS, GROUPS, SETTINGS

if TYPE_CHECKING:
    from biper.training.distributed import Processes

DESCRIPTIONS = {
    1: "BiPer, stage 1: train real weights sin(freq*w) with binary activations.",
    2: "BiPer, stage 2: start from stage 1 and make the weights binary.",
    None: "BiPer: evaluate a checkpoint. It knows its own network and data set.",
}
TAU_HELP = "weight of the periodic regularizer: sets --tau_min and --tau_max"


def build_parser(family: str | None = None, stage: int | None = None) -> Parser:
    """Every setting as a flag, with a family's defaults in its help; without a family and a stage that of eval.sh."""
    prog = Path(sys.argv[0]).name if family else "eval.sh"
    defaults = FAMILY_DEFAULTS[family or "cifar10"]
    parser = Parser(prog=prog, description=DESCRIPTIONS[stage])
    groups = {name: parser.add_argument_group(name) for name in GROUPS}
    groups["run"].add_argument("--config", metavar="FILE", help="YAML file with sections stage1 and stage2; flags win")
    for name, f in SETTINGS.items():
        add_setting(groups[f.metadata["group"]], name, defaults.get(name, f.default))
        if name == "tau_min":
            groups["training"].add_argument("--tau", type=float, metavar="X", help=TAU_HELP)
    return parser


def main(family: str | None = None, stage: int | None = None, argv: Sequence[str] | None = None) -> None:
    """Train a stage of a family, or evaluate with -e. Exits with 0, 1 (diverged), 2 (bad input) or 128 + signal."""
    run_command(lambda: _train_or_evaluate(family, stage, argv))


def _train_or_evaluate(family: str | None, stage: int | None, argv: Sequence[str] | None) -> None:
    given = read_options(build_parser(family, stage), argv, stage)
    from biper.training.distributed import restartable  # torch loads here, after --help and a wrong flag
    from biper.training.process import signals_interrupt

    processes = prepare_process()
    with signals_interrupt():
        if given.get("evaluate"):
            _evaluate(family, stage, given, processes)
        elif family is None or stage is None:
            raise UsageError("give the checkpoint to evaluate: -e FILE")
        else:
            _train(family, stage, given | ({"resume": True} if restartable() else {}), processes)


def _train(family: str, stage: int, given: dict[str, Any], processes: "Processes") -> None:
    from biper.training.inheritance import training_config
    from biper.training.train import train

    config = training_config(family, stage, given)
    try:
        train(config, processes)
    except KeyboardInterrupt as error:
        again = shlex.join([sys.executable, *(a for a in sys.argv if a != "--resume"), "--resume"])
        if processes.size > 1:
            again = "the same torchrun command with --resume"
        if processes.main:
            print(f"stopped by {error}; what is saved stays. To go on from there: {again}", file=sys.stderr)
        raise


def _evaluate(family: str | None, stage: int | None, given: dict[str, Any], processes: "Processes") -> None:
    from biper.training.evaluate import evaluate_checkpoint
    from biper.training.inheritance import evaluation

    network, config = evaluation(family, stage, given)
    evaluate_checkpoint(network, config, processes)
