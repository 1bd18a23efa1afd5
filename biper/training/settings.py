"""One run's settings: a frozen dataclass whose fields are at once the flags, the YAML keys and their checks."""

import math
import types
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import yaml

from biper.data.datasets import DATASETS, FLIPS, PADDINGS
from biper.errors import UsageError, one_line, shown
from biper.files import require_file
from biper.kinds import LARGEST_SIDE, is_line
from biper.nn import DEFAULT_FREQ, fitted, is_fitted
from biper.training.schedule import CYCLES, LR_TYPES

REGULARIZERS = ("sin2", "cos2")
OPTIMIZERS = ("sgd", "adam", "adamw")
METHOD = ("quantizer", "input_quantizer", "activation")  # what stage 2 has of stage 1's network, as the file says
SHORTHANDS = ("tau", "freq_scale")  # numbers that stand for other settings
LONGEST_YAML = 100_000  # bytes of a file, and values that its aliases stand for
GROUPS = ("run", "network", "data", "training", "hardware")


def setting(
    default: Any,  # noqa: ANN401
    group: str,
    text: str,
    *,
    short: str = "",
    choices: Sequence[str] = (),
    low: float | None = None,
    above: float | None = None,
    below: float | None = None,
    high: float | None = None,
    runtime: bool = False,
    trains: bool | None = None,
) -> Any:  # noqa: ANN401
    """A field of Settings. low, above, below, high bound its value; runtime: it doesn't change what a run computes.

    trains: only training has a use for it, evaluation none; by default so for the group training.
    """
    facts = {"group": group, "text": text, "short": short, "choices": tuple(choices), "runtime": runtime}
    facts["trains"] = group == "training" if trains is None else trains
    return field(default=default, metadata=facts | {"low": low, "above": above, "below": below, "high": high})


@dataclass(frozen=True)
class Settings:
    """Every setting of one run of one stage. Units: epochs, images, radians per unit weight (freq)."""

    family: str
    stage: int

    results_dir: str = setting(
        "", "run", "folder of the run; results/<dataset>_<model>_stage<N> if absent", runtime=True, trains=True
    )
    save: str = setting("", "run", "subfolder of results_dir for the run's files", runtime=True, trains=True)
    resume: bool = setting(False, "run", "go on from the latest checkpoint of the run", runtime=True, trains=True)
    evaluate: str = setting("", "run", "evaluate the checkpoint FILE and end", short="-e", runtime=True)
    seed: int = setting(0, "run", "seed of weights, order and augmentation", low=0)
    deterministic: bool = setting(False, "run", "allow only deterministic algorithms, also on a GPU")
    print_freq: int = setting(100, "run", "steps between two progress lines", short="-p", low=1, runtime=True)
    checkpoint_minutes: float = setting(
        30.0,
        "run",
        "save within an epoch that often, to go on from there; 0: after epochs alone",
        low=0,
        runtime=True,
        trains=True,
    )
    time_estimate: int = setting(
        1, "run", "1: show the expected finish; 0: do not", low=0, below=2, runtime=True, trains=True
    )

    model: str = setting("resnet18_1w1a", "network", "<architecture>_<precision>", short="-a")
    freq: float = setting(
        DEFAULT_FREQ, "network", "frequency of sine and square wave; stage 2 takes stage 1's", above=0
    )
    quantizer: str = setting(
        "biper",
        "network",
        "of the weights: biper, sign, xnor, irnet, recu, or one of your own, with settings as in irnet:t_min=0.001; "
        "stage 2 takes stage 1's",
    )
    input_quantizer: str = setting(
        "", "network", "biper, bireal, sign, rsign, irnet, or one of your own; if absent biper, rsign for *_react"
    )
    activation: str = setting(
        "", "network", "hardtanh, relu, prelu or rprelu; if absent hardtanh, relu for 1w32a, rprelu for *_react"
    )
    load_ckpt_stage1: str = setting("", "network", "stage 2: the checkpoint of stage 1 to start from", trains=True)
    from_scratch: bool = setting(
        False,
        "network",
        "stage 2: start from fresh weights instead, for comparison, and for quantizers of one stage",
        trains=True,
    )

    dataset: str = setting("cifar10", "data", "data set", choices=tuple(DATASETS))
    data_path: str = setting(
        "", "data", "where the data lie; where download.py or prepare.py puts them if absent", runtime=True
    )
    accept_checksums: bool = setting(
        False, "data", "use CIFAR's files although their MD5 is not the published one", runtime=True
    )
    image_size: int | None = setting(
        None,
        "data",
        "show images as N x N; if absent 224 for ImageNet's data sets and networks, else as they are",
        low=8,
        high=LARGEST_SIDE,
    )
    validation: int = setting(
        0,
        "data",
        "hold out that many training images, of each class its share, by --seed, and evaluate them instead of the test "
        "images: for choices that the test images must not make",
        low=0,
    )
    workers: int = setting(
        8, "data", "processes or threads that decode images, a core each at most", low=0, runtime=True
    )
    use_dali: bool = setting(False, "data", "load with DALI; no effect on data that are held in memory", runtime=True)

    epochs: int = setting(600, "training", "epochs in all", low=1)
    extend: int = setting(
        0, "training", "with --resume and --lr_type step: so many epochs more than the run began with", low=0
    )
    start_epoch: int = setting(0, "training", "epoch to begin with, counted from 0; --resume knows it by itself", low=0)
    batch_size: int = setting(256, "training", "images a step, over all GPUs; batch norm needs 2", short="-b", low=2)
    batch_size_test: int = setting(128, "training", "images a step in evaluation", short="-bt", low=1, trains=False)
    optimizer: str = setting("sgd", "training", "optimizer", choices=OPTIMIZERS)
    nesterov: bool = setting(False, "training", "Nesterov's momentum, of SGD")
    lr: float = setting(0.1, "training", "learning rate", above=0)
    momentum: float = setting(0.9, "training", "momentum of SGD", low=0, below=1)
    weight_decay: float = setting(5e-4, "training", "weight decay", low=0)
    lr_type: str = setting("cos", "training", "learning-rate schedule", choices=LR_TYPES)
    lr_peak: float = setting(
        0.25, "training", "where 'onecycle' and 'triangular' reach lr, as a share of the epochs", above=0, below=1
    )
    lr_alpha: float = setting(1.0, "training", "times lr: of the binary layers' scales alpha", above=0)
    lr_norm_bias: float = setting(
        1.0, "training", "times lr: of batch norms' biases, which are the next binary layer's thresholds", above=0
    )
    ema: float = setting(
        0.0,
        "training",
        "decay of moving averages of all but the weights that become binary, which are evaluated and saved; 0: none",
        low=0,
        below=1,
    )
    lr_decay_step: tuple[int, ...] = setting((), "training", "epochs at which 'step' multiplies lr by 0.1", low=0)
    warm_up: bool = setting(False, "training", "raise lr linearly over the first epochs")
    warm_up_epochs: int = setting(5, "training", "epochs over which --warm_up raises lr", low=1)
    flip: str = setting(
        "random", "training", "mirror images half the time, or each in every other epoch", choices=FLIPS
    )
    padding: str = setting(
        "zeros", "training", "what random crops show beyond an image: black, or its reflection", choices=PADDINGS
    )
    cutout: int = setting(0, "training", "hide a square of N x N pixels of each training image", low=0)
    mixup: float = setting(
        0.0, "training", "alpha of MixUp: mean of two images each, weighted by Beta(alpha, alpha); 0: off", low=0
    )
    label_smoothing: float = setting(
        0.0, "training", "of the cross-entropy of training: the share of a label that all classes get", low=0, below=1
    )
    teacher: str = setting("", "training", "checkpoint FILE whose logits the network learns beside the labels")
    teacher_weight: float = setting(
        0.5, "training", "of the teacher in the loss; the labels have the rest", above=0, high=1
    )
    temperature: float = setting(
        4.0, "training", "by which the logits of teacher and network are divided", low=0.01, high=1000
    )
    tau_min: float = setting(0.001, "training", "weight of the periodic regularizer at the start", low=0)
    tau_max: float = setting(0.001, "training", "weight of the periodic regularizer at the end", low=0)
    regularizer: bool = setting(True, "training", "the periodic regularizer, on or off")
    regularizer_form: str = setting(
        "sin2",
        "training",
        "of sin(freq*w): sin2, as published, pulls it to 0; cos2, for comparison, to -1 and +1",
        choices=REGULARIZERS,
    )

    device: str = setting(
        "auto", "hardware", "auto, cpu, cuda, cuda:N; auto is --gpus, or the CPU without a GPU", runtime=True
    )
    gpus: str = setting("0", "hardware", "GPUs to use, such as 0 or 0,1,2,3", runtime=True)
    amp: str = setting(
        "auto",
        "hardware",
        "convolutions of training in bfloat16, where -1 and +1 are exact; auto: where the hardware is fast at it",
        choices=("auto", "off", "bf16"),
        trains=True,
    )
    compile: bool = setting(
        True,
        "hardware",
        "fused kernels on the CPU; on a GPU CUDA graphs, and torch.compile for 1,000 steps or more; on by default",
    )
    type: str = setting(
        "torch.cuda.FloatTensor",
        "hardware",
        "as published; torch.FloatTensor is --device cpu",
        choices=("torch.cuda.FloatTensor", "torch.FloatTensor"),
        runtime=True,
    )

    def __post_init__(self) -> None:
        for f in fields(self):
            if f.metadata:
                _check(f.name, getattr(self, f.name), f.metadata)
        if self.start_epoch >= self.epochs:
            raise UsageError(f"--start_epoch {self.start_epoch} leaves none of {self.epochs} epochs (counted from 0)")
        if self.lr_type == "step" and not self.lr_decay_step:
            raise UsageError("--lr_type step needs --lr_decay_step EPOCH [EPOCH ...]")
        if self.lr_type in CYCLES and self.warm_up:
            raise UsageError(f"--lr_type {self.lr_type} raises the learning rate by itself: leave --warm_up out")
        if self.nesterov and (self.optimizer != "sgd" or not self.momentum):
            raise UsageError("--nesterov is for --optimizer sgd with a --momentum above 0")


SETTINGS = {f.name: f for f in fields(Settings) if f.metadata}
FAMILY_DEFAULTS: dict[str, dict[str, Any]] = {  # as published, where they differ from Settings', which are CIFAR's
    "cifar10": {},
    "imagenet": {
        "dataset": "imagenet",
        "print_freq": 500,
        "epochs": 200,
        "batch_size": 512,
        "batch_size_test": 256,
        "weight_decay": 1e-4,
        "tau_min": 0.85,
        "tau_max": 0.99,
        "regularizer": False,  # the published code has it commented out, whatever tau says
    },
}


def make_settings(family: str, stage: int, given: Mapping[str, Any]) -> Settings:
    """The settings of a run: those given, then the family's defaults. Raises UsageError for values out of bounds."""
    return Settings(family, stage, **(FAMILY_DEFAULTS[family] | dict(given)))


def _check(name: str, value: Any, facts: Mapping[str, Any]) -> None:  # noqa: ANN401
    """Raise UsageError unless the value is one of the choices and within the bounds."""
    if isinstance(value, str) and not is_line(value):
        raise UsageError(f"--{name} {shown(value)} is no text of one line")
    if facts["choices"] and value not in facts["choices"]:
        raise UsageError(f"--{name} {value}: choose from {', '.join(facts['choices'])}")
    for number in value if isinstance(value, tuple) else (value,):
        if isinstance(number, str) or number is None:
            continue
        if isinstance(number, int) and number >= 2**63:
            raise UsageError(f"--{name} {shown(number)} is too large: below 2**63")
        if isinstance(number, int) and number < -(2**63):
            raise UsageError(f"--{name} {shown(number)} is too small: above -2**63")
        if not math.isfinite(number):
            raise UsageError(f"--{name} {number} is not a finite number")
        if facts["low"] is not None and number < facts["low"]:
            raise UsageError(f"--{name} {number} is too small: at least {facts['low']}")
        if facts["above"] is not None and number <= facts["above"]:
            raise UsageError(f"--{name} {number} is too small: above {facts['above']}")
        if facts["high"] is not None and number > facts["high"]:
            raise UsageError(f"--{name} {number} is too large: at most {facts['high']}")
        if facts["below"] is not None and number >= facts["below"]:
            raise UsageError(f"--{name} {number} is too large: below {facts['below']}")


def convert(name: str, value: Any) -> Any:  # noqa: ANN401
    """A value read from YAML or a checkpoint, as the type of the setting. Raises UsageError if it is of another."""
    if value is False and name == "amp":
        value = "off"  # which YAML 1.1 reads as false
    hint = float if name in SHORTHANDS else get_type_hints(Settings)[name]
    if get_origin(hint) is tuple:
        items = value if isinstance(value, list | tuple) else [value]
        return tuple(_scalar(name, item, get_args(hint)[0]) for item in items)
    if isinstance(hint, types.UnionType):
        if value is None:
            return None
        hint = get_args(hint)[0]
    return _scalar(name, value, hint)


def _scalar(name: str, value: Any, kind: type) -> Any:  # noqa: ANN401
    if isinstance(value, bool) == (kind is bool):
        try:  # YAML 1.1 reads 1e-4 as a string, and `gpus: 0` as a number
            if type(value) is kind:
                return value
            if kind is float and isinstance(value, int | str):
                return float(value)
            if kind is str and isinstance(value, int):
                return str(value)  # ValueError from 4,301 digits on
        except (ValueError, OverflowError):
            pass
    raise UsageError(f"{name}: expected {kind.__name__}, not {shown(value)}")


def expand_shorthands(values: Mapping[str, Any]) -> dict[str, Any]:
    """Replace `tau` by tau_min and tau_max, both of its value, and `freq_scale` by the quantizer that it means.

    Raises UsageError if what they set is there too, or a freq beside freq_scale.
    """
    rest = {key: value for key, value in values.items() if key not in SHORTHANDS}
    if "tau" in values:
        if "tau_min" in rest or "tau_max" in rest:
            raise UsageError("--tau sets both --tau_min and --tau_max: give it alone, or those two")
        rest |= dict.fromkeys(("tau_min", "tau_max"), values["tau"])
    if "freq_scale" in values:
        if "freq" in rest or "quantizer" in rest:
            raise UsageError("--freq_scale gives each layer of BiPer's its own freq: leave --freq and --quantizer out")
        if not values["freq_scale"] > 0:
            raise UsageError(f"--freq_scale {values['freq_scale']} is too small: above 0")
        rest["quantizer"] = fitted(values["freq_scale"])
    return rest


def changed(settings: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Settings with changes, which win: a freq also over a freq_scale that is there."""
    beaten = "freq" in changes and is_fitted(settings.get("quantizer", ""))
    return {name: value for name, value in settings.items() if not (beaten and name == "quantizer")} | dict(changes)


def differences(config: Settings, settings: Mapping[str, Any]) -> list[str]:
    """The settings that decide what a run computes and differ, as 'name: here (there)'."""
    return [
        f"{name}: {getattr(config, name)} (there {settings[name]})"
        for name, f in SETTINGS.items()
        if not f.metadata["runtime"] and name in settings and settings[name] != getattr(config, name)
    ]


def read_yaml(path: Path, stage: int) -> dict[str, Any]:
    """The settings of one stage's section. Raises UsageError naming what is wrong with the file."""
    sections = load_yaml(path)
    if not isinstance(sections, dict) or not set(sections) <= {"stage1", "stage2"}:
        raise UsageError(f"{path}: expected the sections stage1 and stage2, and nothing beside them")
    name = f"stage{stage}"
    if not isinstance(sections.get(name), dict):
        raise UsageError(f"{path} has no settings for stage {stage}: add a section {name}")
    return typed(sections[name], str(path), name)


class _Loader(yaml.SafeLoader):
    """YAML's plain types; a key that is there twice, of which the last would win, is refused."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """As the base class does."""
        counts = Counter(key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode))
        if twice := next((key for key, count in counts.items() if count > 1), None):
            raise yaml.constructor.ConstructorError(None, None, f"{shown(twice)} is there twice", node.start_mark)
        return super().construct_mapping(node, deep)

    def get_single_node(self) -> yaml.Node | None:
        """As the base class does; a file whose aliases stand for more than it could hold itself is refused."""
        node = super().get_single_node()
        if node is not None and _expanded(node, {}) > LONGEST_YAML:
            raise yaml.constructor.ConstructorError(
                None, None, "its aliases stand for too many values", node.start_mark
            )
        return node


def _expanded(node: yaml.Node, known: dict[int, float]) -> float:
    """How many values a node stands for, aliases written out; infinitely many if it holds itself. known: by id."""
    if id(node) not in known:
        known[id(node)] = math.inf
        parts = [part for pair in node.value for part in pair] if isinstance(node, yaml.MappingNode) else node.value
        own = parts if isinstance(node, yaml.CollectionNode) else ()
        known[id(node)] = 1 + sum(_expanded(part, known) for part in own)
    return known[id(node)]


def load_yaml(path: Path) -> Any:  # noqa: ANN401
    """What a YAML file holds. Raises UsageError if it cannot be read."""
    require_file(path)
    try:
        if path.stat().st_size > LONGEST_YAML:
            raise UsageError(f"{path} is larger than any recipe: {LONGEST_YAML:,} bytes at most")
        return yaml.load(path.read_text(), _Loader)
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from error
    except UsageError:
        raise
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        place = f" in line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise UsageError(f"{path} is no valid YAML{place}: {error.problem or one_line(error)}") from error
    except Exception as error:  # no UTF-8, a date that there is not, too deep: what PyYAML does not foresee
        raise UsageError(f"{path} is no valid YAML: {one_line(error)}") from error


def typed(section: Any, where: str, name: str) -> dict[str, Any]:  # noqa: ANN401
    """The settings of a section of a YAML file, as settings have them. Raises UsageError, which begins with `where`."""
    if not isinstance(section, dict):
        raise UsageError(f"{where}: section {name} has no settings: give some, or leave it out")
    for key in section:
        if key not in SETTINGS and key not in SHORTHANDS:
            raise UsageError(f"{where}: unknown key {shown(key)} in {name}; biper train --help lists the names")
    try:
        return expand_shorthands({key: convert(key, value) for key, value in section.items()})
    except UsageError as error:
        raise UsageError(f"{where}: {error}") from error
