"""The commands: from argv to a training run, an evaluation or a table."""

import logging
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from biper.commands.parsers import (
    STUDIES,
    ablation_parser,
    build_parser,
    checkpoints_parser,
    download_parser,
    export_parser,
    predict_parser,
    prepare_parser,
    read_options,
    reproduce_parser,
    summary_parser,
)
from biper.errors import UsageError, run_command

if TYPE_CHECKING:
    from biper.training.distributed import Processes

DESCRIPTIONS = {
    1: "BiPer, stage 1: train real weights sin(freq*w) with binary activations.",
    2: "BiPer, stage 2: start from stage 1 and make the weights binary.",
    None: "BiPer: evaluate a checkpoint. It knows its own network and data set.",
}


def main(family: str | None = None, stage: int | None = None, argv: Sequence[str] | None = None) -> None:
    """Train a stage of a family, or evaluate with -e. Exits with 0, 1 (diverged), 2 (bad input) or 128 + signal."""
    run_command(lambda: _train_or_evaluate(family, stage, argv))


def quantization_error_main(argv: Sequence[str] | None = None) -> None:
    """compute_QE.py: the quantization error of checkpoints as tables, CSV and picture."""
    run_command(lambda: _quantization_error(argv))


def download_main(argv: Sequence[str] | None = None) -> None:
    """cifar10/dataset/download.py: fetch a data set, or unpack an archive of it."""
    run_command(lambda: _download(argv))


def prepare_main(argv: Sequence[str] | None = None) -> None:
    """imagenet/dataset/prepare.py: ImageNet's archives to class folders."""
    run_command(lambda: _prepare(argv))


def export_main(argv: Sequence[str] | None = None) -> None:
    """export.py: a checkpoint to a packed file, and to ONNX."""
    run_command(lambda: _export(argv))


def predict_main(argv: Sequence[str] | None = None) -> None:
    """predict.py: the likeliest classes of images."""
    run_command(lambda: _predict(argv))


def summary_main(argv: Sequence[str] | None = None) -> None:
    """summary.py: parameters, bytes and operations of a network."""
    run_command(lambda: _summary(argv))


def reproduce_main(argv: Sequence[str] | None = None) -> None:
    """reproduce.py: a recipe over seeds, with its tables, pictures and model cards."""
    run_command(lambda: _reproduce(argv))


def ablation_main(argv: Sequence[str] | None = None) -> None:
    """ablation.py: variants of a recipe over seeds."""
    run_command(lambda: _ablation(argv))


def _train_or_evaluate(family: str | None, stage: int | None, argv: Sequence[str] | None) -> None:
    parser = build_parser(Path(sys.argv[0]).name if family else "eval.sh", DESCRIPTIONS[stage], family or "cifar10")
    given = read_options(parser, argv, stage)
    from biper.training.distributed import restartable  # torch loads here, after --help and a wrong flag
    from biper.training.process import signals_interrupt

    processes = _prepare_process()
    with signals_interrupt():
        if given.get("evaluate"):
            _evaluate(family, stage, given, processes)
        elif family is None or stage is None:
            raise UsageError("give the checkpoint to evaluate: -e FILE")
        else:
            _train(family, stage, given | ({"resume": True} if restartable() else {}), processes)


def _prepare_process() -> "Processes":
    """Make this process ready to compute and to log, before its first tensor, and find its place among others."""
    from biper.training.distributed import launched_processes
    from biper.training.log import log_to_console
    from biper.training.process import flush_denormals, keep_memory

    flush_denormals()
    keep_memory()
    processes = launched_processes()
    log_to_console(logging.INFO if processes.main else logging.WARNING)
    return processes


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


def _quantization_error(argv: Sequence[str] | None) -> None:
    args = checkpoints_parser().parse_args(argv)
    from biper.models.checkpoint import load_checkpoint
    from biper.nn.quantization_error import format_table, quantization_error, write_csv

    rows = []
    for path in args.checkpoints:
        model = load_checkpoint(path, args.freq, model=args.model)
        m, error = model.metadata, quantization_error(model)
        if not error.layers:
            print(f"{path} is left out: {m.model} has no binarized layers", file=sys.stderr)
            continue
        rows.append((path, model, error))
        print(f"{path}: {m.model}, stage {m.stage}, {m.quantizer_text}\n{format_table(error)}\n")
    if not rows:
        raise UsageError("no checkpoint with binarized layers was given")
    if args.csv:
        write_csv([(str(path), error) for path, _, error in rows], args.csv)
        print(f"wrote {args.csv}")
    if args.plot:
        from biper.experiments.plots import plot_quantization_error

        plot_quantization_error([(path.absolute().parent.name, model) for path, model, _ in rows], args.plot)
        print(f"wrote {args.plot}")


def _download(argv: Sequence[str] | None) -> None:
    args = download_parser().parse_args(argv)
    from biper.data.cifar import fetch_cifar
    from biper.data.datasets import default_data_path

    path = args.data_path or default_data_path(args.dataset)
    fetch_cifar(args.dataset, path, args.archive)
    print(f"{args.dataset} is in {path}")


def _prepare(argv: Sequence[str] | None) -> None:
    args = prepare_parser().parse_args(argv)
    from biper.data.datasets import default_data_path
    from biper.data.imagenet import prepare_imagenet

    path = args.data_path or default_data_path("imagenet")
    prepare_imagenet(args.archives, path)
    print(f"imagenet is in {path}")


def _export(argv: Sequence[str] | None) -> None:
    given = vars(export_parser().parse_args(argv))
    from biper.training.export import export
    from biper.training.log import log_to_console

    log_to_console(logging.INFO)
    export(given.pop("checkpoint"), given.pop("output"), given.pop("onnx", None), given)


def _predict(argv: Sequence[str] | None) -> None:
    given = vars(predict_parser().parse_args(argv))
    from biper.commands.predict import predict
    from biper.training.inheritance import load_network

    network = load_network(given["network"], given)
    for image, guesses in zip(given["images"], predict(network, given["images"]), strict=True):
        print(image)
        for guess in guesses:
            print(f"  {guess.probability:7.2%}  {guess.name}")


def _summary(argv: Sequence[str] | None) -> None:
    given = vars(summary_parser().parse_args(argv))
    from biper.commands.summary import described

    print(described(given.pop("network"), given))


def _reproduce(argv: Sequence[str] | None) -> None:
    given = vars(reproduce_parser().parse_args(argv))
    from biper.experiments.plan import planned
    from biper.experiments.reproduce import reproduce

    experiment = planned("reproduce", given)
    _experiment(lambda: reproduce(experiment))


def _ablation(argv: Sequence[str] | None) -> None:
    given = vars(ablation_parser().parse_args(argv))
    from biper.experiments.ablation import ablate
    from biper.experiments.plan import planned

    experiment = planned("ablation", given)
    _experiment(lambda: ablate(experiment, given.get("studies", STUDIES)))


def _experiment(conduct: Callable[[], None]) -> None:
    """Conduct an experiment in this process alone; one that is interrupted says how it goes on."""
    from biper.training.process import signals_interrupt

    if _prepare_process().size > 1:
        raise UsageError("an experiment runs in one process: train by torchrun with main.py, or give --gpus 0,1")
    try:
        with signals_interrupt():
            conduct()
    except KeyboardInterrupt as error:
        print(f"stopped by {error}; what is saved stays: the same command goes on from there", file=sys.stderr)
        raise
