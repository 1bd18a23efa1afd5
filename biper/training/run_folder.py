"""The folder of a run: where it is, whether it may be used, and the settings that it keeps."""

import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from biper.errors import UsageError, shown
from biper.files import atomically
from biper.models.checkpoint import own_metadata, read_checkpoint
from biper.training.checkpoint import BEST, LATEST
from biper.training.settings import SETTINGS, Settings, convert, read_yaml

CONFIG_FILE = "config.yaml"


def run_folder(config: Settings) -> Path:
    """Where a run keeps its files."""
    default = f"results/{config.dataset}_{config.model}_stage{config.stage}"
    return Path(config.results_dir or default) / config.save


def check_folder(folder: Path, resume: bool) -> None:
    """Raise UsageError if the folder cannot be written, or holds a run that is not to go on. Changes nothing."""
    held = [name for name in (CONFIG_FILE, LATEST, BEST) if (folder / name).exists()]
    if held and not resume:
        raise UsageError(
            f"{folder} holds another run ({held[0]}): go on with --resume, or give another --save or --results_dir"
        )
    if BEST in held and LATEST not in held:
        raise UsageError(f"{folder} holds a {BEST} but no {LATEST} to go on from: give another --save or --results_dir")
    ways = (folder, *folder.absolute().parents)
    if astray := [p for p in ways if p.is_symlink() and not p.exists()]:
        raise UsageError(f"the results folder {folder} cannot be made: {astray[0]} is a link that leads nowhere")
    there = next(p for p in ways if p.exists())
    if not there.is_dir():
        raise UsageError(f"the results folder {folder} cannot be made: {there} is a file")
    # root may write anywhere, but whoever took the write permission away meant it
    if not os.access(there, os.W_OK | os.X_OK) or not there.stat().st_mode & 0o222:
        raise UsageError(f"the results folder {folder} cannot be written: {there} is read-only")


def run_settings(config: Settings) -> dict[str, Any]:
    """The settings that belong to a run, as plain values; where it lies and what is done with it do not."""
    own = {"family", "stage", "results_dir", "save", "resume", "evaluate"}
    values = {name: value for name, value in asdict(config).items() if name not in own}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


def write_settings(config: Settings, folder: Path) -> None:
    """The whole configuration as YAML, in the form that --config reads: a run that it begins has all epochs."""
    values = {name: value for name, value in run_settings(config).items() if name != "extend"}
    with atomically(folder / CONFIG_FILE) as temporary:
        temporary.write_text(yaml.safe_dump({f"stage{config.stage}": values}, sort_keys=False))


def read_settings(folder: Path, stage: int) -> dict[str, Any]:
    """The settings of the run in a folder, from its checkpoint or, before there is one, its YAML file; {} if neither.

    Raises UsageError if the folder holds the other stage.
    """
    if (folder / LATEST).exists():
        contents = read_checkpoint(folder / LATEST)
        found = own_metadata(contents, folder / LATEST).stage if "format" in contents else None
        if found != stage:
            raise UsageError(f"{folder} holds no run of stage {stage}: its checkpoint is of stage {found}")
        return settings_of(contents)
    if (folder / CONFIG_FILE).exists():
        return read_yaml(folder / CONFIG_FILE, stage)
    return {}


def settings_of(contents: Mapping[str, Any]) -> dict[str, Any]:
    """The settings in a checkpoint, typed; {} for a published one."""
    settings = contents.get("settings", {})
    unknown = [name for name in settings if name not in SETTINGS]
    if unknown:
        raise UsageError(
            f"the checkpoint has a setting {shown(unknown[0])} that this biper does not know: update biper"
        )
    return {name: convert(name, value) for name, value in settings.items()}


def require_same_split(given: Mapping[str, Any], saved: Mapping[str, Any], path: Path) -> None:
    """Raise UsageError if a run would evaluate images that a network it builds on, the file's, was trained on."""
    own, there = ((values.get("validation", 0), values.get("seed", 0)) for values in (given, saved))
    if own[0] and own != there:
        held = f"{there[0]} images by seed {there[1]}" if there[0] else "none"
        text = f"--validation {own[0]} with --seed {own[1]}: {path} was trained with {held} held out"
        remedy = f"give --validation {there[0]} --seed {there[1]}" if there[0] else "train it with these flags too"
        raise UsageError(f"{text}, so it may have seen what is to be evaluated: {remedy}")
