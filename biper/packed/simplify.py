"""A packed network's graph for images of one size, in the form in which most of it is the instructions' to run."""

import operator

import torch
import torch.nn.functional as F
from torch import fx, nn

from biper.nn.graph import module_of
from biper.packed.layers import FoldedNorm
from biper.packed.steps import shape_of

FLATTENING = ("flatten", torch.flatten, "view", "reshape", torch.reshape)
SHAPES = ((getattr, "shape"), ("size",))  # a node that gives all sizes: its target, and what it has behind the tensor


def simplify(graph: fx.Graph, modules: dict[str, nn.Module]) -> None:
    """Change a graph in place, whose nodes have their shapes, to one that gives the same."""
    for node in list(graph.nodes):
        module = module_of(node, modules)
        if isinstance(module, nn.Identity):
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
        elif isinstance(module, FoldedNorm):
            _flatten_later(node)
        elif node.target is F.avg_pool2d:
            _put_numbers(node)


def _flatten_later(norm: fx.Node) -> None:
    """Let a norm come before the flattening of one pixel: there the instructions know it."""
    flat = norm.all_input_nodes[0]
    if flat.target not in FLATTENING or flat.op == "placeholder" or len(flat.users) > 1 or not flat.args or norm.kwargs:
        return
    source = flat.args[0]
    if not isinstance(source, fx.Node) or shape_of(source) != (*shape_of(norm), 1, 1):
        return
    norm.args = (source,)
    with norm.graph.inserting_after(norm):
        later = norm.graph.node_copy(flat, lambda node: norm if node is source else node)
    norm.replace_all_uses_with(later, lambda user: user is not later)
    norm.meta["shape"] = shape_of(source)
    norm.graph.erase_node(flat)


def _put_numbers(pool: fx.Node) -> None:
    """In the place of the sides of images that a pooling asks for: here all images have the same."""
    asked = [node for node in pool.all_input_nodes if _sides(node) is not None]
    pool.args, pool.kwargs = fx.node.map_arg((pool.args, pool.kwargs), lambda n: _sides(n) if n in asked else n)
    for node in asked:
        source = node.all_input_nodes[0]
        asked_too = (source.target, *source.args[1:]) in SHAPES
        for needless in (node, source) if asked_too else (node,):
            if not needless.users:
                needless.graph.erase_node(needless)


def _sides(node: fx.Node) -> int | tuple[int, ...] | None:
    """What x.size(2), x.size()[2:] or x.shape[-1] gives of images; None for other nodes, and for how many there are."""
    tensor, index = (*node.args, None, None)[:2]
    if node.target is operator.getitem and isinstance(tensor, fx.Node) and tensor.args:
        known = (tensor.target, *tensor.args[1:]) in SHAPES
        tensor = tensor.args[0]
    else:
        known = node.target == "size"
    if not known or not isinstance(tensor, fx.Node) or not isinstance(index, int | slice) or len(shape_of(tensor)) != 4:
        return None
    sizes = shape_of(tensor)
    places = range(len(sizes))[index]
    of_images = places == 0 if isinstance(places, int) else 0 in places
    return None if of_images else sizes[index]
