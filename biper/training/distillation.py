"""A teacher: a trained network whose logits another one learns, beside the labels."""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from biper.errors import UsageError
from biper.models import Network
from biper.models.checkpoint import load_checkpoint
from biper.models.metadata import Metadata
from biper.training.loss import LossTerm


def load_teacher(path: Path, student: Metadata) -> Network:
    """The network of a checkpoint, in evaluation mode, without gradients.

    Raises UsageError unless it knows the student's classes, and sees its images normalized and as large as the student.
    """
    if not path.is_file():
        raise UsageError(f"--teacher {path}: there is no such file")
    network = load_checkpoint(path).eval().requires_grad_(False)
    m = network.metadata
    for name in ("num_classes", "classes", "mean", "std", "image_size"):
        own, wanted = getattr(m, name), getattr(student, name)
        if own and own != wanted:  # a published checkpoint does not know all of them
            raise UsageError(f"--teacher {path} was trained with {name} {_few(own)}, this network has {_few(wanted)}")
    return network


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
