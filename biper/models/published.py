"""What the paper published: its figures, and checkpoints, what they hold and what they leave to the reader."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from biper.errors import UsageError
from biper.kinds import is_line
from biper.models.metadata import Metadata, biper_activation, biper_quantizers

TOP1 = {  # of stage 2 in percent, by family, which is the data set's name too, and model [BiPer, results]
    ("cifar10", "resnet18_1w1a"): 93.75,
    ("cifar10", "resnet20_1w1a"): 87.50,
    ("cifar10", "vgg_small_1w1a"): 92.46,
    ("imagenet", "resnet18_1w1a"): 61.40,
    ("imagenet", "resnet34_1w1a"): 65.73,
}
EPOCHS = {"cifar10": (600, 300), "imagenet": (200, 100)}  # of both stages of ResNet-18's recipes, by family


def weights(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights under our names: without DataParallel's `module.`, and without beta and tau, which nothing uses."""
    names = {name: name.removeprefix("module.") for name in state_dict}
    return {new: state_dict[name] for name, new in names.items() if new.rsplit(".", 1)[-1] not in ("beta", "tau")}


def read_config_txt(checkpoint: Path) -> dict[str, str]:
    """The settings of the `config.txt` beside a checkpoint, lines of `name:  value`; empty if there is none."""
    file = checkpoint.with_name("config.txt")
    if not file.is_file():
        return {}
    try:
        lines = file.read_text().splitlines()
    except (OSError, UnicodeDecodeError):
        return {}
    pairs = (line.split(":", 1) for line in lines if ":" in line)
    return {name.strip(): value.strip() for name, value in pairs}


def metadata(
    contents: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    path: Path,
    *,
    freq: float | None,
    model: str | None,
    family: str | None,
    stage: int,
) -> Metadata:
    """What the checkpoint, its config.txt and the caller together say. Raises UsageError if they do not suffice.

    The published files hold no freq, and another freq is another network: it is never guessed.
    """
    config = read_config_txt(path)
    saved = contents.get("model")
    if model and isinstance(saved, str) and saved != model:
        raise UsageError(f"--model {model} contradicts {path}, which has model {saved}")
    name = model or saved or config.get("model")
    if not isinstance(name, str):
        raise UsageError(f"{path} does not say its model: give --model")
    if not is_line(name) or not is_line(config.get("dataset", "")):
        raise UsageError(f"{path}: its model or its data set is no text of one line")
    head = next((tensors[key] for key in ("linear.weight", "fc.weight") if key in tensors), None)
    if head is None or head.ndim != 2 or not len(head):
        raise UsageError(f"{path} is no checkpoint of a BiPer network: it has no classifier linear.weight or fc.weight")
    weights, inputs = biper_quantizers(name, _freq(path, config, freq), stage)
    return Metadata(
        model=name,
        family=family or _family(tensors),
        num_classes=len(head),
        weight_quantizer=weights,
        input_quantizer=inputs,
        activation=biper_activation(name),
        dataset=config.get("dataset", ""),
    )


def _freq(path: Path, config: Mapping[str, str], given: float | None) -> float:
    try:
        found = float(config["freq"]) if "freq" in config else None
    except ValueError as error:
        raise UsageError(f"{path.with_name('config.txt')}: freq is {config['freq']!r}, not a number") from error
    if given is not None and found is not None and given != found:
        raise UsageError(f"--freq {given} contradicts {path.with_name('config.txt')}, which has freq {found}")
    freq = found if given is None else given
    if freq is None:
        raise UsageError(f"{path} is a published checkpoint and does not hold freq: give --freq or its config.txt")
    return freq


def _family(tensors: Mapping[str, Tensor]) -> str:
    """By the first convolution: ImageNet's ResNets have one of 7x7, MobileNet calls it model.0.0."""
    stem = tensors.get("conv1.weight")
    imagenet = "model.0.0.weight" in tensors or (stem is not None and stem.ndim == 4 and stem.shape[-1] == 7)
    return "imagenet" if imagenet else "cifar10"
