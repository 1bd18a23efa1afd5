"""Any torch model with binary layers in the place of its convolutions and linear layers."""

import fnmatch
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from biper.errors import UsageError
from biper.nn.graph import is_watched, module_of, trace
from biper.nn.layers import BIPER_INPUTS, BinaryConv2d, BinaryLinear, binary_layers, replace_modules
from biper.nn.quantizers import InputQuantizer, WeightQuantizer

Skip = Callable[[str, nn.Module], str | bool | None] | Iterable[str]
Rule = Callable[[str, nn.Module], str | None]  # why a layer stays real; None: it does not
DOWNSAMPLING = ("downsample", "shortcut", "skip", "proj")  # names under which networks keep the branch of a skip
NOT_NEGATIVE = (nn.ReLU, nn.ReLU6, nn.Sigmoid, nn.Softplus, nn.Hardsigmoid)
NOT_NEGATIVE_FUNCTIONS = ("relu", "relu_", "relu6", "sigmoid", "softplus", "hardsigmoid")
ADDING = ("add", "iadd", "add_")
KEPT = ("cat", "flatten", "view", "reshape", "contiguous", "dropout", "getitem", "permute")
Source = tuple[nn.Module | None, str]  # a module or None, and what it is in words
CONVERTED = (nn.Conv2d, nn.Linear)  # no class that is derived from them
KEEPING = (  # modules whose results are non-negative if their inputs are
    nn.Identity,
    nn.Hardtanh,
    nn.Flatten,
    nn.Upsample,
    nn.modules.dropout._DropoutNd,
    nn.modules.pooling._MaxPoolNd,
    nn.modules.pooling._AvgPoolNd,
    nn.modules.pooling._AdaptiveMaxPoolNd,
    nn.modules.pooling._AdaptiveAvgPoolNd,
)


@dataclass(frozen=True)
class Decision:
    """What became of a layer. became: the class that stands in its place now, '' if it stays; reason: why it does."""

    name: str
    layer: str
    became: str
    reason: str = ""

    def __str__(self) -> str:
        return f"{self.name}: {self.layer} -> {self.became}" if self.became else f"{self.name}: stays, {self.reason}"


def convert(
    model: nn.Module,
    *,
    weight_quantizer: WeightQuantizer,
    input_quantizer: InputQuantizer | None = BIPER_INPUTS,
    skip: Skip | None = None,
    verbose: bool = True,
) -> nn.Module:
    """Put binary layers in the place of a model's nn.Conv2d and nn.Linear, in place, and return it.

    Weights and biases are taken over; alpha starts where the new layer's weights are closest to the old, channel by
    channel. skip says what stays real: names (patterns such as 'layer1.*' too), or a function of name and module that
    gives the reason, or None; by default the first convolution (the first layer where there is none), the last linear
    layer and the 1x1 convolutions that adapt a skip. Subclasses, layers with hooks, those whose weights a module around
    them reads (attention), and padding modes other than zeros stay real.

    A ReLU whose result goes into a sign would make every activation +1: a hardtanh takes the place of such a module,
    and a warning names such functions. What was done is printed unless verbose is False, and kept as
    `model.conversion`. Raises UsageError if nothing would be converted.
    """
    for value, kind in ((weight_quantizer, WeightQuantizer), (input_quantizer, InputQuantizer)):
        if value is not None and not isinstance(value, kind):
            raise UsageError(f"expected a {kind.__name__} such as biper.Sign(), not {value!r}")
    layers: dict[str, nn.Module] = {n: m for n, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}
    reason_of = _skip_rule(skip, layers)
    read_outside = _read_by_others(model, layers)
    reasons = {name: reason_of(name, layer) or _obstacle(layer, read_outside) for name, layer in layers.items()}
    chosen = [layers[name] for name, reason in reasons.items() if not reason]
    if not chosen:
        known = "; ".join(f"{name}: {reason}" for name, reason in list(reasons.items())[:3])
        raise UsageError(f"there is nothing to convert: {known or 'the model has no nn.Conv2d and no nn.Linear'}")
    made: dict[nn.Module, nn.Module] = {m: _binary(m, weight_quantizer, input_quantizer) for m in chosen}
    decisions = [
        Decision(name, type(layer).__name__, "" if reasons[name] else type(made[layer]).__name__, reasons[name] or "")
        for name, layer in layers.items()
    ]
    model = replace_modules(model, made.get)
    if input_quantizer is not None:
        decisions += _open_signs(model)
    model.__dict__["conversion"] = tuple(decisions)
    if verbose:
        print("\n".join(map(str, decisions)))
    return model


def keep_real(layers: dict[str, nn.Module]) -> Rule:
    """The default rule of what stays real, as BiPer's networks have it. layers: by name, in the model's order."""
    first = next((m for m in layers.values() if isinstance(m, nn.Conv2d)), next(iter(layers.values()), None))
    last = next((m for m in reversed(layers.values()) if isinstance(m, nn.Linear)), None)

    def reason(name: str, layer: nn.Module) -> str | None:
        if layer is first:
            return "the first convolution" if isinstance(layer, nn.Conv2d) else "the first layer"
        if layer is last:
            return "the last linear layer"
        if isinstance(layer, nn.Conv2d) and layer.kernel_size == (1, 1):
            strided = max(layer.stride) > 1
            if strided or any(word in part for part in name.split(".") for word in DOWNSAMPLING):
                return "a 1x1 convolution that adapts a skip"
        return None

    return reason


def _skip_rule(skip: Skip | None, layers: dict[str, nn.Module]) -> Rule:
    if skip is None:
        return keep_real(layers)
    if callable(skip):
        chosen = skip

        def reason(name: str, layer: nn.Module) -> str | None:
            found = chosen(name, layer)
            return found if isinstance(found, str) and found else "skipped" if found else None

        return reason
    if not isinstance(skip, Iterable):
        raise UsageError(f"skip: names or a function, not {skip!r}")
    patterns = [skip] if isinstance(skip, str) else list(skip)
    for pattern in patterns:
        if not fnmatch.filter(layers, pattern):
            raise UsageError(
                f"skip: no convolution or linear layer is called {pattern!r}; they are {', '.join(layers)}"
            )
    return lambda name, layer: "skipped" if any(fnmatch.fnmatchcase(name, p) for p in patterns) else None


def _read_by_others(model: nn.Module, layers: dict[str, nn.Module]) -> set[nn.Module]:
    """Layers whose weights another module reads by itself, without calling them. layers: by name.

    Of a network that cannot be traced only torch's own are known.
    """
    parents = (nn.MultiheadAttention, nn.TransformerEncoderLayer)
    found = {child for parent in model.modules() if isinstance(parent, parents) for child in parent.children()}
    try:
        graph = trace(model, plain=False)
    except Exception:  # whatever a network of somebody's own may do
        return found
    read = {str(node.target).rpartition(".")[0] for node in graph.nodes if node.op == "get_attr" and _is_read(node)}
    return found | {layers[name] for name in read & layers.keys() if name and type(layers[name]) in CONVERTED}


def _is_read(node: fx.Node) -> bool:
    """Whether the numbers of a node's tensor are read, and not just its type, device or shape."""
    return any(user.target not in (getattr, "size", "dim", "numel") for user in node.users)


def _obstacle(layer: nn.Module, read_outside: set[nn.Module]) -> str | None:
    """Why a layer cannot be binary, whatever the rule says."""
    if layer in read_outside:
        return "the module around it reads its weights"
    if isinstance(layer, BinaryConv2d | BinaryLinear):
        return "it is binary already"
    if type(layer) not in CONVERTED:
        return f"a {type(layer).__name__} may compute in a way of its own"
    if is_watched(layer) or "weight" not in layer._parameters:
        return "it has hooks, or a weight that is computed"
    if isinstance(layer, nn.Conv2d) and layer.padding_mode != "zeros":
        return f"its padding mode is {layer.padding_mode!r}"
    return None


@torch.no_grad()
def _binary(layer: nn.Module, weights: WeightQuantizer, inputs: InputQuantizer | None) -> nn.Module:
    """The binary layer of a real one's shape, weights and bias."""
    new: BinaryConv2d | BinaryLinear
    assert isinstance(layer, nn.Conv2d | nn.Linear)
    options: dict[str, Any] = {"bias": layer.bias is not None, "weight_quantizer": weights, "input_quantizer": inputs}
    options |= {"device": layer.weight.device, "dtype": layer.weight.dtype}
    if isinstance(layer, nn.Conv2d):
        names = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups")
        new = BinaryConv2d(**{name: getattr(layer, name) for name in names}, **options)
    else:
        new = BinaryLinear(layer.in_features, layer.out_features, **options)
    new.weight, new.bias = layer.weight, layer.bias
    new.weight_quantizer.start(new.weight)
    new.alpha.copy_(_best_scale(layer.weight, new.effective_weight()).view_as(new.alpha))
    new.alpha.requires_grad_(layer.weight.requires_grad)
    return new.train(layer.training)


def _best_scale(real: Tensor, effective: Tensor) -> Tensor:
    """(C_out,): by what each channel's effective weights come closest to the real ones, in squares; 1 if they are 0."""
    dtype = torch.promote_types(real.dtype, torch.float32)  # sums of squares are too large for float16
    real, effective = real.flatten(1).to(dtype), effective.flatten(1).to(dtype)
    product, square = (real * effective).sum(1), effective.square().sum(1)
    scale = product / square.clamp(min=torch.finfo(square.dtype).tiny)
    return torch.where(product == 0, torch.ones_like(scale), scale)


def _open_signs(model: nn.Module) -> list[Decision]:
    """Put a hardtanh in the place of each ReLU in front of a sign; a warning names what cannot be replaced."""
    found = list(_blocking(model, guess=True))
    names = {module: name for name, module in model.named_modules()}
    relus = {m for _, m, _ in found if isinstance(m, nn.ReLU | nn.ReLU6) and not is_watched(m)}
    made: dict[nn.Module, nn.Module] = {relu: nn.Hardtanh(inplace=bool(relu.inplace)) for relu in relus}
    decisions = [
        Decision(names[relu], type(relu).__name__, "Hardtanh (a sign follows)") for relu in names if relu in relus
    ]
    replace_modules(model, made.get)
    for layer, module, what in found:
        if module not in relus:
            warnings.warn(
                f"{layer} sees no negative input, so all its activations are +1: put a hardtanh in the place of {what}",
                stacklevel=3,
            )
    return decisions


def find_blocked_signs(model: nn.Module) -> set[str]:
    """The names of the binary layers all of whose inputs come out of a ReLU or the like; none without a graph."""
    return {layer for layer, _, _ in _blocking(model, guess=False)}


def _blocking(model: nn.Module, guess: bool) -> Iterator[tuple[str, nn.Module | None, str]]:
    """Binary layers, each with what makes their inputs non-negative: a module or None, and what it is in words.

    Where a network cannot be traced, every ReLU that is a module counts if they are to be guessed, else none.
    """
    binary = {layer: name for name, layer in binary_layers(model) if layer.input_quantizer is not None}
    modules = dict(model.named_modules())
    try:
        graph = trace(model, plain=False)
    except Exception:  # whatever a network of somebody's own may do
        layer = next(iter(binary.values()), "")
        relus = [(name, m) for name, m in modules.items() if isinstance(m, nn.ReLU | nn.ReLU6) and guess and layer]
        yield from ((layer, relu, name) for name, relu in relus)
        return
    sources: dict[fx.Node, list[Source]] = {}  # by what makes a value non-negative; empty if it can be negative
    for node in graph.nodes:
        module = module_of(node, modules)
        sources[node] = _sources(node, module, [sources[n] for n in node.all_input_nodes])
        if module in binary and node.all_input_nodes:
            yield from ((binary[module], *source) for source in sources[node.all_input_nodes[0]])


def _sources(node: fx.Node, module: nn.Module | None, given: list[list[Source]]) -> list[Source]:
    """What makes a node's value non-negative, if it is: itself, or what makes all of its inputs so."""
    name = getattr(node.target, "__name__", str(node.target))
    if isinstance(module, NOT_NEGATIVE):
        return [(module, str(node.target))]
    if node.op in ("call_function", "call_method") and name in NOT_NEGATIVE_FUNCTIONS:
        return [(None, f"the function {name} ({node.name})")]
    if module is not None:
        kept = isinstance(module, KEEPING)
    elif name in ADDING:
        kept = len(given) == len(node.args)  # nothing is added but other nodes
    else:
        kept = "pool" in name or name.rstrip("_") in KEPT
    return [source for sources in given for source in sources] if kept and given and all(given) else []
