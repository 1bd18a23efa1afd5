"""Milliseconds of a training step and of packed inference with each quantizer and activation, in turn, in one process.

python benchmarks/method_speed.py -a resnet20_1w1a -b 128: BiPer first, then one thing that differs from it after the
other, then ReActNet's inputs and activation together. Medians, and how they compare with BiPer's.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.train_step import timed
from benchmarks.variants import CLASSES, Case, Step, machine, optimizer_step, positive
from biper.experiments.tables import markdown
from biper.models import Network, create_model
from biper.models.methods import BIPER, input_methods, input_quantizer_named, own_methods, weight_quantizer_named
from biper.nn.quantizers import set_progress
from biper.packed.pack import pack
from biper.training.acceleration import accelerate, chosen_amp
from biper.training.process import flush_denormals, keep_memory

Method = tuple[str, str, str]  # quantizers of weights and inputs, activation
OURS: Method = (BIPER, BIPER, "hardtanh")


def methods() -> list[Method]:
    """BiPer's, and those that differ from it in one thing; at the end ReActNet's activation half."""
    weights = [(name, BIPER, "hardtanh") for name, binary in own_methods().items() if binary]
    inputs = [(BIPER, name, "hardtanh") for name in input_methods()[1:]]
    return [OURS, *weights, *inputs, (BIPER, BIPER, "prelu"), (BIPER, BIPER, "rprelu"), (BIPER, "rsign", "rprelu")]


def network_of(case: Case, method: Method) -> Network:
    """A fresh network with binary weights."""
    weights, inputs, activation = method
    network = create_model(
        case.model,
        family=case.family,
        num_classes=CLASSES[case.family],
        weight_quantizer=weight_quantizer_named(weights, 20.0).binarized(),
        input_quantizer=input_quantizer_named(inputs),
        activation=activation,
    )
    set_progress(network, 0.5)
    return network


def training_step(case: Case, method: Method) -> Step:
    """A step as the training command takes it, without the regularizer, which BiPer alone has."""
    network = network_of(case, method)
    half = chosen_amp("auto", case.device) == "bf16"
    model = accelerate(network, case.device, amp=half, compiled=True, steps=10**6).train()
    images, labels = case.images(), case.labels()

    def loss() -> Tensor:
        return F.cross_entropy(model(images), labels)

    return optimizer_step(case, network, loss, fused=True)


def inference(case: Case, method: Method) -> Step:
    """A batch through the packed network."""
    packed, images = pack(network_of(case, method)), case.images()

    def step() -> None:
        with torch.inference_mode():
            packed(images)

    return step


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("-a", "--model", default="resnet20_1w1a", help="default resnet20_1w1a")
    parser.add_argument("--family", choices=tuple(CLASSES), default="cifar10", help="default cifar10")
    parser.add_argument("-b", "--batch_size", type=positive, default=128, help="default 128")
    parser.add_argument("--steps", type=positive, default=11, help="timed steps of each; default 11")
    a = parser.parse_args()
    flush_denormals()
    keep_memory()
    case = Case(a.model, a.family, 2, a.batch_size, torch.device("cpu"))
    chosen = methods()
    steps = timed({" ".join(m): training_step(case, m) for m in chosen}, case.device, a.steps)
    packed = timed({" ".join(m): inference(case, m) for m in chosen}, case.device, 3 * a.steps)
    rows = []
    for method in chosen:
        cells: list[str] = []
        for times in (steps, packed):
            ratio = times[" ".join(method)] / times[" ".join(OURS)]
            cells += [f"{1000 * times[' '.join(method)]:.2f}", f"{100 * (ratio - 1):+.1f} %"]
        rows.append([*method, *cells])
    print(f"{a.model}, batches of {a.batch_size}. {machine()}\n")
    print(markdown(["weights", "inputs", "activation", "step, ms", "", "packed, ms", ""], rows))


if __name__ == "__main__":
    main()
