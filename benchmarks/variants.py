"""The ways of taking a training step that the benchmarks compare."""

import contextlib
import importlib.util
import io
import os
import platform
import sys
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.published import published_model, published_regularizer
from biper.errors import UsageError
from biper.models import Network, create_model
from biper.nn.layers import BinaryConv2d, binary_layers
from biper.training.acceleration import accelerate, chosen_amp
from biper.training.optimizer import build_optimizer

TAU = {"cifar10": 0.0468, "imagenet": 0.0}  # ImageNet's regularizer is off
SIZES = {"cifar10": 32, "imagenet": 224}
CLASSES = {"cifar10": 10, "imagenet": 1000}
ONNX = ("onnx", "onnxscript", "onnxruntime")  # what the twin's way through onnxruntime needs
Step = Callable[[], None]


@dataclass(frozen=True)
class Case:
    """What is trained: a network of a family, its stage, and batches of so many images."""

    model: str
    family: str
    stage: int
    batch: int
    device: torch.device
    size: int | None = None  # side of the images in pixels; None: the family's

    def images(self) -> Tensor:
        """A batch of noise, (N, 3, H, W)."""
        size = self.size or SIZES[self.family]
        return torch.randn(self.batch, 3, size, size, generator=torch.Generator().manual_seed(0)).to(self.device)

    def labels(self) -> Tensor:
        """A batch of classes, (N,)."""
        generator = torch.Generator().manual_seed(1)
        return torch.randint(CLASSES[self.family], (self.batch,), generator=generator).to(self.device)


def optimizer_step(case: Case, network: nn.Module, loss_of: Callable[[], Tensor], fused: bool) -> Step:
    """One step of SGD on a loss."""
    settings = {"lr": 0.01, "momentum": 0.9, "weight_decay": 1e-4}
    if fused:
        optimizer = build_optimizer(network, family=case.family, name="sgd", **settings)
    else:
        optimizer = torch.optim.SGD(network.parameters(), **settings)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        loss_of().backward()
        optimizer.step()

    return step


def eager(case: Case) -> Step:
    """As published: float32, NCHW, every operation by itself, the regularizer layer by layer."""
    network = published_model(case.model, case.family, CLASSES[case.family], case.stage).to(case.device).train()
    images, labels, tau = case.images(), case.labels(), TAU[case.family]

    def loss() -> Tensor:
        penalty = published_regularizer(network, tau) if tau else 0.0
        return F.cross_entropy(network(images), labels) + penalty

    return optimizer_step(case, network, loss, fused=False)


def ours(case: Case, amp: str = "auto", compiled: bool = True) -> Step:
    """What the training command runs, by default or with --amp and --no-compile."""
    network = create_model(
        case.model, family=case.family, num_classes=CLASSES[case.family], freq=20.0, stage=case.stage
    )
    half = chosen_amp(amp, case.device) == "bf16"
    model = accelerate(network, case.device, amp=half, compiled=compiled, steps=10**6).train()
    images, labels, tau = case.images(), case.labels(), TAU[case.family]

    def loss() -> Tensor:
        value = F.cross_entropy(model(images), labels)
        return value + model.regularizer(model, tau) if tau else value

    return optimizer_step(case, network, loss, fused=True)


def twin_network(case: Case) -> Network:
    """The full-precision network of the same architecture, fresh."""
    return create_model(case.model.rsplit("_", 1)[0] + "_32w32a", family=case.family, num_classes=CLASSES[case.family])


def twin(case: Case, half: bool, channels_last: bool, compiled: bool) -> Step:
    """The full-precision twin as torch runs it, without anything of ours."""
    network = twin_network(case).to(case.device).train()
    images, labels = case.images(), case.labels()
    if channels_last:
        network, images = network.to(memory_format=torch.channels_last), images.to(memory_format=torch.channels_last)
    model = torch.compile(network) if compiled else network

    def loss() -> Tensor:
        with torch.autocast(case.device.type, torch.bfloat16, enabled=half):
            return F.cross_entropy(model(images), labels)

    return optimizer_step(case, network, loss, fused=True)


def bare_convolutions(case: Case) -> Step:
    """The network's convolutions alone, forward and backward, in ours' type and layout: what no trick can save."""
    network = create_model(
        case.model, family=case.family, num_classes=CLASSES[case.family], freq=20.0, stage=case.stage
    )
    half = chosen_amp("auto", case.device) == "bf16"
    shapes: list[tuple[nn.Conv2d, torch.Size]] = []
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(lambda layer, inputs, output: shapes.append((layer, inputs[0].shape)))
    with torch.no_grad():
        network.eval()(case.images()[:1].cpu())

    def tensor(*shape: int) -> Tensor:
        x = torch.randn(*shape, device=case.device, dtype=torch.bfloat16 if half else torch.float32)
        return x.to(memory_format=torch.channels_last)

    operands = [
        (tensor(case.batch, *shape[1:]).requires_grad_(number > 0), tensor(*layer.weight.shape).requires_grad_(), layer)
        for number, (layer, shape) in enumerate(shapes)
    ]

    def step() -> None:
        for x, w, layer in operands:
            out = F.conv2d(x, w, None, layer.stride, layer.padding, groups=layer.groups)
            torch.autograd.grad(out, [t for t in (x, w) if t.requires_grad], out.detach())

    return step


def randomized(network: Network) -> Network:
    """The network itself, in evaluation, with batch norms and alphas that are random, but the same in every run.

    Fresh batch norms, which change next to nothing, are a case of their own.
    """
    generator = torch.Generator().manual_seed(0)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, 0, 0.5, generator)
            nn.init.uniform_(module.running_var, 1, 21, generator)
            nn.init.normal_(module.weight, 0, 1, generator)
            nn.init.normal_(module.bias, 0, 0.3, generator)
        elif isinstance(module, BinaryConv2d):
            nn.init.normal_(module.alpha, 0, 1, generator)
    return network.eval()


@torch.inference_mode()
def distinct_layers(network: nn.Module, images: Tensor) -> Iterable[tuple[BinaryConv2d, Tensor, int]]:
    """The binary convolutions of different shape: layer, the activations that go into it, and how many are like it."""
    found: dict[object, tuple[BinaryConv2d, Tensor, int]] = {}

    def note(layer: BinaryConv2d, inputs: tuple[Tensor], output: Tensor) -> None:
        key = (layer.weight.shape, layer.stride, layer.padding, layer.groups, inputs[0].shape)
        first, x, count = found.get(key, (layer, inputs[0], 0))
        found[key] = (first, x, count + 1)

    handles = [layer.register_forward_hook(note) for _, layer in binary_layers(network)]
    network(images)
    for handle in handles:
        handle.remove()
    return found.values()


def lacking() -> list[str]:
    """Those of ONNX that are not installed."""
    return [name for name in ONNX if importlib.util.find_spec(name) is None]


def through_onnxruntime(twin: nn.Module, images: Tensor, folder: Path) -> Step:
    """The twin as onnxruntime runs it, with as many threads as torch has now. folder: where its file is kept."""
    import onnxruntime

    path = folder / f"{len(images)}.onnx"
    if not path.exists():
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            torch.onnx.export(twin, (images,), path, dynamo=True, verbose=False)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = torch.get_num_threads(), 1
    options.log_severity_level = 3  # errors
    options.add_session_config_entry("session.set_denormal_as_zero", "1")
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    feed = {session.get_inputs()[0].name: images.numpy()}
    return lambda: session.run(None, feed)


def variants(case: Case, compilers: bool) -> dict[str, Callable[[], Step]]:
    """Every way by name; calling one builds it. compilers: the ways through torch.compile too."""
    ways: dict[str, Callable[[], Step]] = {
        "eager": lambda: eager(case),
        "ours": lambda: ours(case),
        "ours, --no-compile": lambda: ours(case, compiled=False),
        "ours, --amp off": lambda: ours(case, amp="off"),
        "twin, eager": lambda: twin(case, False, False, False),
        "twin, eager, channels-last": lambda: twin(case, False, True, False),
        "twin, eager, bf16, channels-last": lambda: twin(case, True, True, False),
    }
    if compilers:
        ways["twin, compiled"] = lambda: twin(case, False, True, True)
        ways["twin, compiled, bf16"] = lambda: twin(case, True, True, True)
    return ways | {"bare convolutions": lambda: bare_convolutions(case)}


def positive(text: str) -> int:
    """A number of at least 1, of a flag."""
    number = int(text)
    if number < 1:
        raise ValueError(text)
    return number


def run(main: Callable[[], None]) -> None:
    """Run a benchmark; bad input is one line and exit code 2."""
    try:
        main()
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def machine() -> str:
    """What the figures were measured on, in a line."""
    processor = platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        processor = next((line.split(": ")[1] for line in lines if line.startswith("model name")), processor)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    versions = f"Python {platform.python_version()}, torch {torch.__version__}"
    cores = f"{os.cpu_count()} cores ({torch.get_num_threads()} threads)"
    return f"{processor}, {cores}, --amp auto is {chosen_amp('auto', torch.device('cpu'))}, {device}; {versions}"
