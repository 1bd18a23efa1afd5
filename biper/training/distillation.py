"""A teacher: a trained network whose logits another one learns, beside the labels."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from biper.data.datasets import FOLDER
from biper.errors import UsageError
from biper.models import Network
from biper.models.checkpoint import build_network, read_checkpoint
from biper.models.metadata import Metadata
from biper.training.loss import LossTerm
from biper.training.run_folder import require_same_split, settings_of

OTHERS = ("", FOLDER)  # what a checkpoint may call a data set that has a name, too


@dataclass(frozen=True)
class Teacher:
    """A trained network, in evaluation mode, without gradients, and the SHA-256 of its file."""

    network: Network
    digest: str


def load_teacher(path: Path, student: Metadata) -> Teacher:
    """The network of a checkpoint.

    Raises UsageError unless it knows the student's classes, and sees its images normalized and as large as the student.
    """
    if path.is_dir():
        raise UsageError(f"--teacher {path}: that is a folder, give a checkpoint in it")
    if not path.is_file():
        raise UsageError(f"--teacher {path}: there is no such file")
    contents = read_checkpoint(path)
    network = build_network(contents, path).eval().requires_grad_(False)
    m = network.metadata
    for name in ("num_classes", "classes", "mean", "std", "image_size"):
        own, wanted = getattr(m, name), getattr(student, name)
        if own and own != wanted:  # a published checkpoint does not know all of them
            raise UsageError(f"--teacher {path} was trained with {name} {_few(own)}, this network has {_few(wanted)}")
    return Teacher(network, hashlib.sha256(path.read_bytes()).hexdigest())


def require_unseen(path: Path, dataset: str, *, validation: int, seed: int) -> None:
    """Raise UsageError if a teacher may have seen the images that its student's training holds out."""
    contents = read_checkpoint(path)
    own = settings_of(contents)
    known = own.get("dataset", "")
    if known == dataset or known in OTHERS or dataset in OTHERS:
        require_same_split({"validation": validation, "seed": seed}, own, path)


def distillation(teacher: nn.Module, *, temperature: float, weight: float, bf16: bool) -> LossTerm:
    """The loss's term of a teacher, on the images' device: T**2 times the divergence of the softened probabilities.

    KL(softmax(t/T) || softmax(s/T)) of the teacher's logits t (B, classes) and the network's s, a mean over the batch;
    T**2 makes its gradient independent of T. bf16: the teacher's convolutions in bfloat16. The teacher runs once a
    step, on the images as the network sees them. [Hinton et al. 2015, arXiv 1503.02531, section 2]
    """

    def value(_model: nn.Module, images: Tensor, logits: Tensor, _labels: Tensor) -> Tensor:
        with torch.no_grad(), torch.autocast(images.device.type, torch.bfloat16, enabled=bf16):
            wanted = teacher(images.contiguous(memory_format=torch.channels_last)).float()
        return soft_divergence(logits, wanted, temperature)

    return LossTerm(value, weight=weight)


def soft_divergence(logits: Tensor, wanted: Tensor, temperature: float) -> Tensor:
    """T**2 * KL(softmax(wanted/T) || softmax(logits/T)), a scalar: both (B, classes), the mean over B."""
    own, aim = F.log_softmax(logits / temperature, 1), F.log_softmax(wanted / temperature, 1)
    return temperature**2 * F.kl_div(own, aim, reduction="batchmean", log_target=True)


def _few(value: object) -> str:
    text = str(value)
    return text if len(text) < 60 else f"{text[:57]}..."
