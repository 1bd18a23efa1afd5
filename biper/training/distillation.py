"""A teacher: a trained network whose logits another one learns, beside the labels."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from biper.errors import UsageError
from biper.models import Network
from biper.models.checkpoint import build_network, read_checkpoint
from biper.models.metadata import Metadata
from biper.training.loss import LossTerm
from biper.training.run_folder import require_same_split, settings_of


@dataclass(frozen=True)
class Teacher:
    """A trained network, in evaluation mode, without gradients, and the SHA-256 of its file."""

    network: Network
    digest: str


def load_teacher(path: Path, student: Metadata, *, validation: int, seed: int) -> Teacher:
    """The network of a checkpoint.

    Raises UsageError unless it knows the student's classes, sees its images normalized and as large as the student, and
    has not seen those that are held out of the student's training (validation, by seed).
    """
    if path.is_dir():
        raise UsageError(f"--teacher {path}: that is a folder, give a checkpoint in it")
    if not path.is_file():
        raise UsageError(f"--teacher {path}: there is no such file")
    contents = read_checkpoint(path)
    network = build_network(contents, path).eval().requires_grad_(False)
    m = network.metadata
    if m.dataset == student.dataset:
        require_same_split({"validation": validation, "seed": seed}, settings_of(contents), path)
    for name in ("num_classes", "classes", "mean", "std", "image_size"):
        own, wanted = getattr(m, name), getattr(student, name)
        if own and own != wanted:  # a published checkpoint does not know all of them
            raise UsageError(f"--teacher {path} was trained with {name} {_few(own)}, this network has {_few(wanted)}")
    return Teacher(network, hashlib.sha256(path.read_bytes()).hexdigest())


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
