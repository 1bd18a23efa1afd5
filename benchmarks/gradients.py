"""Cosines between the gradients of our training step and those of the published formulation in float32.

python benchmarks/gradients.py -a resnet20_1w1a: each layer by itself, on what it gets in a step of a full batch, and
the whole network on a few images. A sign that rounding turns makes others turn behind it, so that whole networks differ
even between two float32 sums in another order; the last column counts on how many of the tries that happened.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.published import published_model
from benchmarks.variants import CLASSES, SIZES, machine, positive, run
from biper.cpu import functions as kernels
from biper.cpu.modules import BinarySums
from biper.models import create_model
from biper.nn.layers import BinaryConv2d, binary_layers
from biper.training.acceleration import accelerate
from biper.training.process import flush_denormals, keep_memory

TYPES = {"float32": torch.float32, "bf16": torch.bfloat16}
FEW, TRIES = 4, 8  # images of a whole network's step, and how many such steps


def arguments() -> argparse.Namespace:
    """The flags."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("-a", "--model", default="resnet20_1w1a", help="default resnet20_1w1a")
    parser.add_argument("--family", choices=("cifar10", "imagenet"), default="cifar10", help="default cifar10")
    parser.add_argument("-b", "--batch_size", type=positive, default=128, help="default 128")
    return parser.parse_args()


def batch(family: str, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Noise (N, 3, H, W) and classes (N,)."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(count, 3, SIZES[family], SIZES[family], generator=generator)
    return images, torch.randint(CLASSES[family], (count,), generator=generator)


def cosine(one: Tensor, two: Tensor) -> float:
    """Between two tensors of one shape."""
    return F.cosine_similarity(one.double().flatten(), two.double().flatten(), dim=0).item()


def layer_inputs(model: nn.Module, images: Tensor, labels: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """What every binary layer gets in a step: its activations, and the gradient of its output."""
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def watch(name: str, layer: nn.Module) -> None:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            output.register_hook(lambda grad: seen.__setitem__(name, (inputs[0].detach(), grad.detach())))

        layer.register_forward_hook(hook)

    for name, layer in binary_layers(model):
        watch(name, layer)
    F.cross_entropy(model(images), labels).backward()
    return seen


def layer_cosines(layer: BinaryConv2d, a: Tensor, grad: Tensor, dtype: torch.dtype) -> list[float]:
    """Of a layer's gradients with respect to its weights and to its activations, ours against the published ones."""
    a = a.requires_grad_()
    plain = torch.autograd.grad(layer(a), [layer.weight, a], grad)
    sums = BinarySums(layer, False)(kernels.signs_of(a, kernels.STANDARDIZED, dtype))
    ours = torch.autograd.grad(sums * layer.alpha, [layer.weight, a], grad)
    return [cosine(one, two) for one, two in zip(ours, plain, strict=True)]


def network_cosines(name: str, family: str, stage: int, half: bool, seed: int) -> list[float]:
    """Of the gradients of all convolutions in a step of a few images."""
    gradients = []
    images, labels = batch(family, FEW, seed)
    for ours in (False, True):
        torch.manual_seed(0)
        network = (
            create_model(name, family=family, num_classes=CLASSES[family], freq=20.0, stage=stage)
            if ours
            else published_model(name, family, CLASSES[family], stage)
        )
        model = accelerate(network, images.device, amp=half, compiled=True, steps=1) if ours else network
        F.cross_entropy(model.train()(images), labels).backward()
        gradients.append([p.grad for p in network.parameters() if p.dim() == 4])
    return [cosine(one, two) for one, two in zip(*gradients, strict=True)]


def main() -> None:
    """Print a row for each stage and number format."""
    flush_denormals()
    keep_memory()
    args = arguments()
    print(f"{args.model} ({args.family}), batch {args.batch_size}; least cosine of all layers\n{machine()}\n")
    print(f"| stage | type | weights, by layer | activations, by layer | whole network, {FEW} images | signs turned |")
    print("|" + " --- |" * 6)
    for stage in (1, 2):
        torch.manual_seed(0)
        model = published_model(args.model, args.family, CLASSES[args.family], stage).train()
        seen = layer_inputs(model, *batch(args.family, args.batch_size, 0))
        layers = dict(binary_layers(model))
        for label, dtype in TYPES.items():
            pairs = [layer_cosines(layers[name], a, grad, dtype) for name, (a, grad) in seen.items()]
            weights, activations = (min(values) for values in zip(*pairs, strict=True))
            half = dtype is torch.bfloat16
            tries = [min(network_cosines(args.model, args.family, stage, half, seed)) for seed in range(TRIES)]
            turned = f"{sum(value < 0.99 for value in tries)} of {TRIES}"
            print(
                f"| {stage} | {label} | {weights:.6f} | {activations:.6f} | {max(tries):.6f} | {turned} |", flush=True
            )


if __name__ == "__main__":
    run(main)
