"""From settings to a stage of training: its data, its network, fresh or saved, and how it is trained."""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from biper.data.loaders import Loaders, Shard, build_loaders, require_same_classes
from biper.errors import UsageError, naming
from biper.kinds import require
from biper.models import Network
from biper.models.checkpoint import load_checkpoint, own_metadata, read_checkpoint, rebuild
from biper.models.metadata import Metadata
from biper.models.methods import BIPER, network_of_method
from biper.models.registry import require_runs
from biper.nn.layers import binarize_
from biper.nn.losses import opposite
from biper.nn.quantizers import changes_over_training
from biper.training.acceleration import Accelerated, accelerate, chosen_amp
from biper.training.averaging import MovingAverage
from biper.training.checkpoint import LATEST
from biper.training.distillation import Teacher, distillation, load_teacher, require_unseen
from biper.training.distributed import Processes, all_gather_equal, replicated
from biper.training.loss import LossTerm, make_loss_terms
from biper.training.optimizer import Factors, build_optimizer, load_optimizer
from biper.training.process import seed_everything, select_devices, set_random_state
from biper.training.run_folder import check_folder, run_folder
from biper.training.settings import METHOD, Settings
from biper.training.step import GraphedStep, can_be_recorded
from biper.training.trainer import Trainer


def initial_network(config: Settings, num_classes: int) -> Network:
    """Stage 1: a fresh network. Stage 2: stage 1's network with binary weights (warm start).

    With from_scratch stage 2 gets a fresh network too, the one that stage 1 of the same seed begins with.
    """
    if config.stage == 1 or config.from_scratch:
        return fresh_network(config, num_classes)
    path = Path(config.load_ckpt_stage1)
    freq = config.freq if config.quantizer == BIPER else None  # which no other need have
    network = load_checkpoint(path, freq, model=config.model, family=config.family, stage=1)
    binarize_(network)
    return network


def fresh_network(config: Settings, num_classes: int) -> Network:
    """A network of the settings' model and method, whose weights are as the stage has them."""
    c = config
    method = {name: getattr(c, name) for name in METHOD}
    return network_of_method(c.model, c.family, num_classes, stage=c.stage, freq=c.freq, **method)


def attach_data(network: Network, loaders: Loaders, dataset: str) -> None:
    """Write into the network's metadata what it is trained on. Raises UsageError if it does not fit the data."""
    require_same_classes(network.metadata, loaders)
    network.metadata = replace(
        network.metadata,
        dataset=dataset,
        classes=loaders.classes,
        class_names=loaders.class_names,
        mean=loaders.mean,
        std=loaders.std,
        image_size=loaders.image_size,
    )
    require_runs(network, loaders.image_size)  # before anything is written


def build_trainer(settings: Settings, processes: Processes) -> Trainer:
    """The trainer of a run, from its latest checkpoint with --resume. Writes nothing; all processes call it together.

    Raises UsageError if the settings, the data or the folder are unfit.
    """
    latest = run_folder(settings) / LATEST
    check_folder(latest.parent, settings.resume)
    devices = select_devices(settings.device, settings.gpus, settings.type, processes)
    device = devices[0]
    seed_everything(settings.seed, settings.deterministic)
    shard = Shard(processes.rank, processes.size)
    loaders = build_loaders(settings, device, replicas=len(devices), shard=shard)
    settings = replace(settings, amp=chosen_amp(settings.amp, device))
    saved = read_checkpoint(latest) if settings.resume and latest.exists() else None
    if saved:
        network = rebuild(own_metadata(saved, latest), saved["state_dict"], latest)
    else:
        network = initial_network(settings, len(loaders.classes))
    attach_data(network, loaders, settings.dataset)
    _require_extendable(settings, network)
    with naming(latest):
        progress = saved_progress(saved) if saved else {"epoch": settings.start_epoch}
    steps = (settings.epochs - progress["epoch"]) * len(loaders.train or ())
    compiled = settings.compile and len(devices) == 1
    fast = accelerate(network, device, amp=settings.amp == "bf16", compiled=compiled, steps=steps)
    optimizer = _optimizer(settings, network)
    average = MovingAverage(network, settings.ema) if settings.ema else None
    teacher = _teacher(settings, network.metadata, saved or {})
    terms = choose_terms(settings, fast, teacher, device)
    if saved:
        with naming(latest):
            _require_place(progress, settings.epochs, len(loaders.train or ()))
            if average:
                average.go_on_from(saved.get("not_averaged", {}))
            load_optimizer(optimizer, saved["optimizer"])
            set_random_state(saved["random_state"])  # last: whatever is made draws from it
    all_gather_equal((progress["epoch"], progress.get("step", 0)), "where to go on")
    model = parallelize(fast, devices, processes)
    recorded = compiled and processes.size == 1 and device.type == "cuda" and can_be_recorded(network, optimizer)
    graphs = GraphedStep(optimizer, device) if recorded else None
    options = {"average": average, "graphs": graphs, "teacher": teacher.digest if teacher else "", **progress}
    return Trainer(settings, processes, devices, loaders, network, fast, model, optimizer, terms, **options)


def _require_extendable(settings: Settings, network: Network) -> None:
    """Raise UsageError for --extend where quantizers are told how much of the training is done."""
    if settings.extend and changes_over_training(network):
        text = "the quantizers change until the last epoch; with more epochs it is another run"
        raise UsageError(f"--extend {settings.extend}: {text}: start one with --epochs N and another --save")


def _teacher(settings: Settings, student: Metadata, saved: Mapping[str, Any]) -> Teacher | None:
    """The teacher, if any. Raises UsageError if it is unfit, or another one than that of a run that goes on."""
    if not settings.teacher:
        return None
    path = Path(settings.teacher)
    teacher = load_teacher(path, student)
    if not saved:
        require_unseen(path, settings.dataset, validation=settings.validation, seed=settings.seed)
    if saved.get("teacher", teacher.digest) != teacher.digest:
        text = f"--teacher {settings.teacher} is another file than the run began with"
        raise UsageError(f"{text}: put that one back, or start a new run")
    return teacher


def _optimizer(settings: Settings, network: Network) -> Optimizer:
    return build_optimizer(
        network,
        family=settings.family,
        name=settings.optimizer,
        lr=settings.lr,
        momentum=settings.momentum,
        weight_decay=settings.weight_decay,
        nesterov=settings.nesterov,
        factors=Factors(settings.lr_alpha, settings.lr_norm_bias),
    )


def saved_progress(saved: Mapping[str, Any]) -> dict[str, Any]:
    """How far a run has got, of its checkpoint, as arguments of Trainer.

    Raises UsageError if it lacks what training goes on from.
    """
    require(saved, {}, ("epoch", "history", "optimizer", "random_state"))
    history = saved["history"]
    return {
        "epoch": saved["epoch"],
        "history": history,
        "seconds": saved.get("seconds", [None] * len(history)),  # which earlier versions did not save
        "step": saved.get("step", 0),
        "partial": saved.get("partial", {}),
    }


def _require_place(progress: Mapping[str, Any], epochs: int, steps: int) -> None:
    """Raise UsageError for a place that a run of so many epochs, of so many steps each, does not come to."""
    epoch, step, history = progress["epoch"], progress["step"], progress["history"]
    rows = [row["epoch"] for row in history] == list(range(epoch - len(history) + 1, epoch + 1))
    if epoch > epochs or step > steps or (epoch == epochs and step) or not rows:
        raise UsageError(f"epoch {epoch}, step {step} and {len(history)} rows of history do not belong together")


def parallelize(fast: Accelerated, devices: Sequence[torch.device], processes: Processes) -> nn.Module:
    """The network as it is trained: in other processes too, or on other GPUs of this one, or as it is."""
    if processes.size > 1:
        return replicated(fast)
    return nn.DataParallel(fast, devices) if len(devices) > 1 else fast


def choose_terms(
    settings: Settings, fast: Accelerated, teacher: Teacher | None, device: torch.device
) -> Callable[[float], Mapping[str, LossTerm]]:
    """The terms of the loss, from tau: cross-entropy, the periodic regularizer in its form, and a teacher's if any."""
    c = settings
    regularizer = opposite(fast.regularizer) if c.regularizer_form == "cos2" else fast.regularizer
    term = None
    if teacher:
        network = teacher.network.to(device).to(memory_format=torch.channels_last)
        how = {"temperature": c.temperature, "weight": c.teacher_weight}
        term = distillation(network, **how, bf16=c.amp == "bf16")
    return functools.partial(make_loss_terms, regularizer=regularizer, label_smoothing=c.label_smoothing, teacher=term)
