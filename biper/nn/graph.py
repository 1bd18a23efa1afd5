"""Reading a network's graph: traced, in one form for what modules and functions write in several ways, and followed.

Both who run a network fast, in training (cpu/) and packed (packed/), rewrite this graph, and conversion reads it.
"""

import inspect
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from biper.nn.layers import BinaryConv2d, BinaryLinear, RealConv2d, RealLinear

Modules = Mapping[str, nn.Module]
Part = tuple[str, fx.Node]  # of a chain: what a node is in it
FRESH = (nn.Conv2d, nn.Linear, nn.modules.batchnorm._BatchNorm, RealConv2d, RealLinear)  # their results are new tensors
FRESH_FUNCTIONS = (operator.add, torch.add, F.hardtanh, F.relu, F.relu6, F.avg_pool2d, F.max_pool2d, torch.cat)
AVERAGE = F.avg_pool2d
TRACES_SIZES = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 11)  # which is what was tried
ADDITIONS = (operator.add, torch.add)
IN_PLACE = {  # functions that write into their first argument, and those that do the same into a new tensor
    operator.iadd: operator.add,
    torch.relu_: F.relu,
    F.relu_: F.relu,
    F.hardtanh_: F.hardtanh,
}


class Tracer(fx.Tracer):
    """Stays out of our layers, and of `leaves`."""

    def __init__(self, leaves: tuple[type[nn.Module], ...] = ()) -> None:
        super().__init__()
        self.leaves = (BinaryConv2d, BinaryLinear, RealConv2d, RealLinear, *leaves)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Whether the tracer does not look inside."""
        return isinstance(m, self.leaves) or super().is_leaf_module(m, module_qualified_name)


def trace(
    network: nn.Module,
    leaves: tuple[type[nn.Module], ...] = (),
    fresh: tuple[type[nn.Module], ...] = (),
    *,
    plain: bool = True,
) -> fx.Graph:
    """The network's graph in its present mode; plain: activations and poolings as functions, out of place if equal.

    leaves: modules to stay out of; fresh: those of them whose results are new tensors. Raises what torch.fx raises for
    a network that it cannot trace. What a forward pass leaves in its modules is put back.
    """
    before = [(vars(module), dict(vars(module))) for module in network.modules()]
    try:
        with _pooling_over_traced_sizes():
            graph = Tracer(leaves).trace(network)
    finally:
        for now, then in before:
            for name in now.keys() - then.keys():
                del now[name]
            now.update({name: value for name, value in then.items() if now.get(name) is not value})
    modules = dict(network.named_modules())
    for node in graph.nodes:
        _by_place(node, module_of(node, modules))
    for node in list(graph.nodes) if plain else ():
        _as_function(node, modules)
        _out_of_place(node, modules, (*FRESH, BinaryConv2d, BinaryLinear, *fresh))
    return graph


@contextmanager
def _pooling_over_traced_sizes() -> Iterator[None]:
    """Context: `F.avg_pool2d`, called as that, takes sizes that are being traced by older versions of torch, too."""
    if TRACES_SIZES:
        yield
        return

    def traced(input: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        if isinstance(input, fx.Proxy):
            return input.tracer.create_proxy("call_function", AVERAGE, (input, *args), kwargs)
        return AVERAGE(input, *args, **kwargs)

    F.avg_pool2d = traced
    try:
        yield
    finally:
        F.avg_pool2d = AVERAGE


def module_of(node: fx.Node, modules: Modules) -> nn.Module | None:
    """The module that a node calls, if it calls one."""
    return modules.get(str(node.target)) if node.op == "call_module" else None


def described(node: fx.Node, module: nn.Module | None) -> str:
    """A node, which calls that module if any, in words for an error."""
    if module is not None:
        return f"layer {node.target} ({type(module).__name__})"
    return f"the operation {getattr(node.target, '__name__', node.target)} ({node.name})"


def _by_place(node: fx.Node, module: nn.Module | None) -> None:
    """What a layer or a function in Python is given by name alone, `norm(input=x)`: the first of it by its place.

    There it is looked for by whoever reads the graph. A function in C stays as it is, which is torch's to run.
    """
    called = module.forward if module else node.target
    if node.args or not node.kwargs or not callable(called) or (module and is_watched(module)):
        return
    try:
        first = next(iter(inspect.signature(called).parameters.values()), None)
    except (TypeError, ValueError):
        return
    if first and first.kind is first.POSITIONAL_OR_KEYWORD and first.name in node.kwargs:
        node.args = (node.kwargs[first.name],)
        node.kwargs = {name: value for name, value in node.kwargs.items() if name != first.name}


def _as_function(node: fx.Node, modules: Modules) -> None:
    """A plain activation or pooling that a module computes becomes the function that it calls."""
    m = module_of(node, modules)
    if m is None or is_watched(m) or len(node.args) != 1 or node.kwargs:
        return
    function: Callable[..., torch.Tensor] | None = None
    given: dict[str, Any] = {}
    if type(m) is nn.Hardtanh:
        function, given = F.hardtanh, {"min_val": m.min_val, "max_val": m.max_val, "inplace": m.inplace}
    elif type(m) is nn.ReLU:
        function, given = F.relu, {"inplace": m.inplace}
    elif type(m) is nn.MaxPool2d:
        names = ("kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices")
        function, given = F.max_pool2d, {name: _one_number(getattr(m, name)) for name in names}
    elif type(m) is nn.AvgPool2d:
        names = ("kernel_size", "stride", "padding", "ceil_mode", "count_include_pad", "divisor_override")
        function, given = F.avg_pool2d, {name: _one_number(getattr(m, name)) for name in names}
    if function is not None:
        node.op, node.target, node.kwargs = "call_function", function, given


def _one_number(value: Any) -> Any:  # noqa: ANN401
    """A pair of equal numbers as one, as functions are mostly given it."""
    return value[0] if isinstance(value, tuple) and len(set(value)) == 1 else value


def _out_of_place(node: fx.Node, modules: Modules, fresh: tuple[type[nn.Module], ...]) -> None:
    """A function that writes into a new tensor which nobody else reads gives the same as one that does not write."""
    if node.op != "call_function" or not node.args or not isinstance(node.args[0], fx.Node):
        return
    source = node.args[0]
    made = isinstance(module_of(source, modules), fresh) or source.target in FRESH_FUNCTIONS
    if sole_user(source) is not node or not made or mutates(source, module_of(source, modules)):
        return
    if node.kwargs.get("inplace") and node.target in (F.hardtanh, F.relu, F.relu6):
        node.kwargs = {**node.kwargs, "inplace": False}
    elif node.target in IN_PLACE:
        node.target = IN_PLACE[node.target]


def is_watched(module: nn.Module) -> bool:
    """Whether somebody's hooks see the module being called, or gradients passing it."""
    m = module
    return bool(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks or m._backward_pre_hooks)


def mutates(node: fx.Node, module: nn.Module | None) -> bool:
    """Whether a node, which calls that module if any, writes into what it is given."""
    if node.op == "call_method":
        return str(node.target).endswith("_") and not str(node.target).endswith("__")
    if node.op == "call_module":
        return bool(getattr(module, "inplace", False))
    if node.op != "call_function" or not callable(node.target):
        return False
    name = getattr(node.target, "__name__", "")
    try:
        given: Mapping[str, Any] = inspect.signature(node.target).bind(*node.args, **node.kwargs).arguments
    except (TypeError, ValueError):  # a function of C
        given = node.kwargs
    in_place = (operator.iadd, operator.isub, operator.imul, operator.itruediv)
    underscored = name.endswith("_") and not name.endswith("__")
    return node.target in in_place or underscored or bool(given.get("inplace")) or given.get("out") is not None


def is_plain_hardtanh(node: fx.Node) -> bool:
    """Whether a node is the hardtanh to [-1, 1], not in place."""
    given = dict(zip(("min_val", "max_val", "inplace"), node.args[1:], strict=False)) | node.kwargs
    plain = {"min_val": -1, "max_val": 1, "inplace": False}
    return node.target is F.hardtanh and plain | given == plain


def other_addend(node: fx.Node, one: fx.Node) -> fx.Node | None:
    """What a plain addition adds to `one`, if it is another node."""
    if node.target not in ADDITIONS or len(node.args) != 2 or node.kwargs:
        return None
    others = [a for a in node.args if a is not one]
    return others[0] if len(others) == 1 and isinstance(others[0], fx.Node) else None


def sole_user(node: fx.Node) -> fx.Node | None:
    """The node that alone uses another's result."""
    users = list(node.users)
    return users[0] if len(users) == 1 else None


def follow(
    start: fx.Node, parts: Sequence[str], part_of: Callable[[fx.Node, Sequence[Part]], Iterable[str]]
) -> list[Part]:
    """The chain of a node and the sole users behind it that take parts in this order, each part once; may be empty.

    part_of: what parts a node could take, given the chain so far; the first that is still to come is taken.
    """
    chain: list[Part] = []
    left, node = list(parts), start
    while True:
        part = next((p for p in part_of(node, chain) if p in left), None)
        if part is None:
            return chain
        chain.append((part, node))
        left = left[left.index(part) + 1 :]
        user = sole_user(node)
        if user is None:
            return chain
        node = user
