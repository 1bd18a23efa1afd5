"""From what the user gave and what the files say to the settings of one run. A contradiction is an error."""

import os
from pathlib import Path
from typing import Any

from biper.data.datasets import DATASETS, FOLDER, find_dataset
from biper.data.loaders import has_dali
from biper.errors import UsageError
from biper.models import Network, list_models
from biper.models.checkpoint import build_network, read_checkpoint
from biper.models.metadata import REAL_INPUTS, Metadata
from biper.models.methods import (
    BIPER,
    is_of_method,
    method_of,
    require_second_stage,
    require_sound,
    require_sound_inputs,
)
from biper.models.registry import unknown_model
from biper.nn import DEFAULT_FREQ
from biper.nn.activations import ACTIVATIONS
from biper.packed.file import is_packed, read
from biper.packed.network import PackedNetwork
from biper.training.run_folder import read_settings, require_same_split, run_folder, settings_of
from biper.training.settings import METHOD, SETTINGS, Settings, differences, make_settings

Given = dict[str, Any]  # the settings that the user gave, by name
NAMED = tuple(name for name in DATASETS if name != FOLDER)
WHERE = ("dataset", "data_path", "accept_checksums")
OF_FOLDERS = ("dataset", "data_path", "image_size")
EARLIER = {"amp": "off", "quantizer": BIPER, "input_quantizer": "", "activation": ""}  # before there was a choice


def training_config(family: str, stage: int, given: Given) -> Settings:
    """The settings of a training run: the user's, then the run's that is resumed or stage 1's, then the defaults.

    Raises UsageError where the user's contradict the resumed run's or stage 1's.
    """
    given = given | {
        name: os.path.abspath(given[name]) for name in ("data_path", "load_ckpt_stage1", "teacher") if given.get(name)
    }
    if "model" in given and given["model"] not in list_models(family):
        raise unknown_model(given["model"], family)
    _require_method(given, stage)
    if stage == 1 and given.get("load_ckpt_stage1"):
        raise UsageError("--load_ckpt_stage1 is for stage 2 (main_stage2.py): stage 1 starts fresh")
    fresh = bool(given.get("from_scratch"))
    if fresh and stage == 1:
        raise UsageError("--from_scratch is for stage 2 (main_stage2.py): stage 1 always starts fresh")
    start = stage == 2 and bool(given.get("load_ckpt_stage1"))
    if fresh and start:
        raise UsageError("--from_scratch starts without stage 1: leave --load_ckpt_stage1 out")
    needed = {"model", "freq"} if given.get("quantizer", BIPER) == BIPER else {"model"}
    if fresh and not needed <= set(given):
        text = " and ".join(f"--{name}" for name in sorted(needed, reverse=True))
        raise UsageError(f"--from_scratch needs {text}, which stage 2 otherwise takes from stage 1")
    if fresh and given["model"].endswith("_32w32a"):
        raise UsageError(f"{given['model']} has no weights to binarize: stage 2 is for 1w1a and 1w32a")
    if given.get("resume"):
        # the default folder is named after data and model, which stage 2 may leave to stage 1's checkpoint
        named = start and not given.get("results_dir") and Path(given["load_ckpt_stage1"]).is_file()
        inherited = inherit_stage1(family, given) if named else {}
        stored = read_settings(run_folder(make_settings(family, stage, inherited | given)), stage)
        if stored:
            stored = _defaults(family, stage) | EARLIER | stored  # of an earlier version, which lacked some
            if given.get("amp") == "auto":
                given = given | {"amp": stored["amp"]}
            if given.get("extend"):
                given, stored = _extended(given, stored)
            return _resumed(make_settings(family, stage, stored | given), stored)
    if given.get("extend"):
        raise UsageError("--extend adds epochs to a run that is saved: give --resume and its --results_dir")
    if stage == 2 and not fresh:
        if not start:
            if "quantizer" in given and require_sound(given["quantizer"], DEFAULT_FREQ).binary:
                raise UsageError(f"--quantizer {given['quantizer']} has one stage: add --from_scratch")
            raise UsageError("stage 2 starts from stage 1: give --load_ckpt_stage1 FILE, stage 1's model_best.pth.tar")
        return make_settings(family, stage, inherit_stage1(family, given) | given)
    return make_settings(family, stage, given)


def _defaults(family: str, stage: int) -> Given:
    """What decides what a run computes, where nothing else is said."""
    defaults = make_settings(family, stage, {})
    return {name: getattr(defaults, name) for name, f in SETTINGS.items() if not f.metadata["runtime"]}


def _require_method(given: Given, stage: int) -> None:
    """Raise UsageError for quantizers or an activation that are unknown, or that stage or model do not have."""
    model = given.get("model", "")
    if given.get("input_quantizer"):
        require_sound_inputs(given["input_quantizer"])
        if model.endswith(REAL_INPUTS):
            raise UsageError(f"{model} has real activations: leave --input_quantizer out")
    if given.get("activation") and given["activation"] not in ACTIVATIONS:
        raise UsageError(f"--activation {given['activation']}: choose from {', '.join(ACTIVATIONS)}")
    name = given.get("quantizer", BIPER)
    quantizer = require_sound(name, DEFAULT_FREQ)
    if name != BIPER and model.endswith("_32w32a"):
        raise UsageError(f"{model} has real weights: leave --quantizer out")
    if stage == 1 and quantizer.binary:
        text = "is binary from the start and has one stage: train it by main_stage2.py --from_scratch"
        raise UsageError(f"--quantizer {name} {text} (biper train --stage 2 --from_scratch)")
    if stage == 2:
        require_second_stage(name, quantizer)


def _extended(given: Given, stored: Given) -> tuple[Given, Given]:
    """What the user gave and the settings of the run that goes on, with the epochs of --extend.

    They are counted from those that the run began with, so that the same command may be given again, by torchrun too.
    Raises UsageError where more epochs would have given another run from the start.
    """
    more, there = given["extend"], stored["extend"]
    began = stored["epochs"] - there
    if more < there:
        raise UsageError(f"--extend {more}: the run has been extended by {there} epochs already: give more")
    why = ""
    if stored["lr_type"] != "step":
        why = f"the learning rate of --lr_type {stored['lr_type']} follows from the last epoch, {began}, where it ends"
    elif stored["regularizer"] and stored["tau_min"] != stored["tau_max"]:
        why = f"tau follows from the last epoch, {began}, where it reaches --tau_max"
    if why:
        text = f"--extend {more}: {why}; with more epochs it is another run"
        raise UsageError(f"{text}: start one with --epochs {began + more} and another --save")
    if given.get("epochs") == began:  # the command that began the run
        given = {name: value for name, value in given.items() if name != "epochs"}
    return given, stored | {"epochs": began + more, "extend": more}


def _resumed(config: Settings, stored: Given) -> Settings:
    changed = differences(config, stored)
    if changed:
        text = f"--resume goes on with the settings of {run_folder(config)}, but {'; '.join(changed)}"
        raise UsageError(f"{text}: for other settings start a new run, in another --results_dir")
    return config


def inherit_stage1(family: str, given: Given) -> dict[str, Any]:
    """What stage 2 takes from stage 1's checkpoint unless told otherwise: model, freq and data."""
    path = Path(given["load_ckpt_stage1"])
    if not path.exists():
        raise UsageError(f"no checkpoint of stage 1 at {path}: run stage 1 first, or give --load_ckpt_stage1 FILE")
    contents = read_checkpoint(path)
    hints: Given = {name: given.get(name) for name in ("freq", "model")}
    start = build_network(contents, path, **hints, family=family, stage=1).metadata
    if start.stage != 1:
        raise UsageError(f"{path} is a checkpoint of stage {start.stage}: stage 2 starts from stage 1's")
    if start.model.endswith("_32w32a"):
        raise UsageError(f"{start.model} has no weights to binarize: stage 2 is for 1w1a and 1w32a")
    saved = settings_of(contents)
    inherited = _identity(start) | {name: saved[name] for name in METHOD if name in saved}
    _require_same_method(start, given, path)
    if given.get("dataset", saved.get("dataset")) == saved.get("dataset"):
        split = ("validation", "seed") if saved.get("validation") else ()
        inherited |= {name: saved[name] for name in (*WHERE, "image_size", *split) if name in saved}
    require_same_split(inherited | given, saved, path)
    return inherited


def evaluation(family: str | None, stage: int | None, given: Given) -> tuple[Network | PackedNetwork, Settings]:
    """The network of --evaluate's file, a checkpoint or packed, and the settings of its evaluation.

    The file decides; what the user gave may only add to it. Raises UsageError for a contradiction. family and stage are
    those of the script, for a published checkpoint, which knows neither.
    """
    if is_packed(Path(given["evaluate"])):
        return _packed_evaluation(family, given)
    path = Path(given["evaluate"])
    contents = read_checkpoint(path)
    hints: Given = {name: given.get(name) for name in ("freq", "model")}
    network = build_network(contents, path, **hints, family=family, stage=stage)
    m = network.metadata
    _require_same_method(m, given, path)
    saved = settings_of(contents)
    if saved and m.dataset == FOLDER and given.get("dataset", FOLDER) != FOLDER:
        size = {} if find_dataset(given["dataset"]).fixed_size else {"image_size": m.image_size}
        saved = {name: value for name, value in saved.items() if name not in OF_FOLDERS} | size
    for name in ("dataset", "image_size"):
        if name in saved and name in given and given[name] != getattr(m, name):
            raise UsageError(f"--{name} {given[name]} contradicts {path}, which has {name} {getattr(m, name)}")
    if not saved and m.dataset in DATASETS:
        saved = {"dataset": m.dataset}  # a published config.txt names where the authors' images lay, not what they are
    # the loader too: where images are resized DALI's differ a little, and a sign makes much of little
    kept = [*WHERE, "image_size", "batch_size_test", "deterministic", "use_dali"]
    kept += ["seed"] if given.get("validation") else []  # by which the training had chosen those that it held out
    taken = {name: saved[name] for name in kept if name in saved}
    taken["use_dali"] = taken.get("use_dali", False) and has_dali()
    return network, make_settings(m.family, m.stage, taken | given | _identity(m))


def _identity(m: Metadata) -> Given:
    """What a network's metadata say of the settings it was made with."""
    return {"model": m.model, **method_of(m)} | ({} if m.freq is None else {"freq": m.freq})


def _require_same_method(m: Metadata, given: Given, path: Path) -> None:
    """Raise UsageError if the user asks for other quantizers, or another activation, than a file's network has."""
    for name in METHOD:
        if given.get(name) and not is_of_method(m, name, given[name]):
            raise UsageError(
                f"--{name} {given[name]} contradicts {path}, which has {method_of(m)[name] or 'real inputs'}"
            )


def _packed_evaluation(family: str | None, given: Given) -> tuple[PackedNetwork, Settings]:
    path = Path(given["evaluate"])
    packed = read(path)
    network, m = packed.network, packed.metadata
    assert m is not None  # a network of somebody's own was refused
    _require_agreement(m, given | ({"family": family} if family else {}), path)
    known_data = m.dataset in DATASETS  # a published config.txt may name another
    if not known_data and "dataset" not in given:
        raise UsageError(f"{path} does not say what data it was trained on: give --dataset and --data_path")
    settings: Given = ({"dataset": m.dataset} if known_data else {}) | given
    if m.image_size and not find_dataset(settings["dataset"]).fixed_size:
        settings.setdefault("image_size", m.image_size)
    return network, make_settings(m.family, m.stage, settings | _identity(m))


def _require_agreement(m: Metadata, given: Given, path: Path) -> None:
    """Raise UsageError if what the user gave contradicts a packed file."""
    _require_same_method(m, given, path)
    for name, value in given.items():
        if name in METHOD:
            continue
        known = getattr(m, name, None) if name != "dataset" or m.dataset in NAMED else None
        if known not in (None, "") and value != known:
            raise UsageError(f"--{name} {value} contradicts {path}, which has {name} {known}")


def load_network(path: Path, given: Given) -> Network | PackedNetwork:
    """The network of a checkpoint or of a packed file, in eval mode. given: freq and model of a published one."""
    if is_packed(path):
        packed = read(path)
        assert packed.metadata is not None  # a network of somebody's own was refused
        _require_agreement(packed.metadata, given, path)
        return packed.network
    return build_network(read_checkpoint(path), path, freq=given.get("freq"), model=given.get("model"))
