"""A packed network as OpenVINO runs it: binary convolutions as its BinaryConvolution, everything else in float32."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from biper.packed.compile import Shapes, traced
from biper.packed.layers import FoldedNorm, PackedConv2d
from biper.packed.network import PackedNetwork
from biper.packed.steps import shape_of


class Translation(fx.Interpreter):
    """Runs a packed network's graph on OpenVINO's nodes instead of tensors; numbers and shapes stay torch's."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        from openvino import opset8

        self.op = opset8
        self.kept: list[np.ndarray] = []

    def run_node(self, n: fx.Node) -> Any:  # noqa: ANN401
        """An OpenVINO node for each tensor; what follows a shape is what torch found."""
        args = tuple(self.env.get(a, a) if isinstance(a, fx.Node) else a for a in n.args)
        if n.op == "placeholder":
            return self.op.parameter(list(shape_of(n)), np.float32)
        if n.op == "output":
            return args[0]
        if n.op == "call_module":
            return self._layer(self.fetch_attr(str(n.target)), args[0], len(shape_of(n)))
        if n.meta.get("shape"):
            return self._function(n, args)
        return n.meta["value"]

    def _layer(self, layer: nn.Module, x: Any, dimensions: int) -> Any:  # noqa: ANN401
        if isinstance(layer, nn.Identity):
            return x
        if isinstance(layer, PackedConv2d):
            return self._binary(layer, x)
        if isinstance(layer, nn.Conv2d):
            return self._biased(self.op.convolution(x, _numbers(layer.weight), *_geometry(layer)), layer.bias)
        if isinstance(layer, FoldedNorm):
            gain, shift = (_numbers(t.reshape(-1, *[1] * (dimensions - 2))) for t in (layer.gain, layer.shift))
            return self.op.add(self.op.multiply(x, gain), shift)
        if isinstance(layer, nn.Linear):
            product = self.op.matmul(x, _numbers(layer.weight), False, True)
            return product if layer.bias is None else self.op.add(product, _numbers(layer.bias))
        raise ValueError(f"{type(layer).__name__} has no translation")

    def _binary(self, layer: PackedConv2d, x: Any) -> Any:  # noqa: ANN401
        """The layer as OpenVINO's documents have it: a quantization to two levels, and XNOR with popcount."""
        import openvino

        zero, one = np.float32(0), np.float32(1)
        below = np.nextafter(zero, -one, dtype=np.float32)  # what is above counts as 1, and 0 does in ours
        signs = self.op.fake_quantize(x, below, below, zero, one, 2)
        weight = layer.binary_weight()
        bits = np.packbits((weight.flatten() > 0).numpy(), bitorder="little")
        self.kept.append(bits)  # OpenVINO does not copy it
        filters = openvino.op.Constant(openvino.Tensor(bits, list(weight.shape), openvino.Type.u1))
        sums = self.op.binary_convolution(signs, filters, *_geometry(layer), "xnor-popcount", 0.0)
        return self._biased(self.op.multiply(sums, _numbers(layer.alpha[None])), layer.bias)

    def _biased(self, x: Any, bias: Tensor | None) -> Any:  # noqa: ANN401
        return x if bias is None else self.op.add(x, _numbers(bias.reshape(1, -1, 1, 1)))

    def _function(self, n: fx.Node, args: tuple[Any, ...]) -> Any:  # noqa: ANN401
        x, given = args[0], dict(n.kwargs)
        if n.target is F.hardtanh:
            return self.op.clamp(x, -1.0, 1.0)
        if n.target is F.max_pool2d:
            size = [args[1]] * 2
            stride, pad = [given.get("stride") or args[1]] * 2, [given.get("padding", 0)] * 2
            return self.op.max_pool(x, stride, [1, 1], pad, pad, size).output(0)
        if n.target is F.avg_pool2d:
            sides = shape_of(n.all_input_nodes[0])[2:], shape_of(n)[2:]
            size = [big // small for big, small in zip(*sides, strict=True)]
            return self.op.avg_pool(x, size, [0, 0], [0, 0], size, False)
        if n.target is torch.cat:
            return self.op.concat([self.env[a] for a in n.args[0]], 1)  # type: ignore[union-attr, index]
        if n.target is F.pad:
            width = args[1] if len(args) > 1 else given["pad"]
            before, behind = np.array([0, width[4], 0, 0]), np.array([0, width[5], 0, 0])
            return self.op.pad(x, before, behind, "constant", np.float32(0))
        if n.target == "flatten":
            return self.op.reshape(x, np.array([0, -1]), True)
        if getattr(n.target, "__name__", "") == "add":
            return self.op.add(x, args[1])
        if getattr(n.target, "__name__", "") == "of_our_size":
            return x
        raise ValueError(f"{n.target} has no translation")


def _numbers(tensor: Tensor) -> Any:  # noqa: ANN401
    return tensor.detach().float().contiguous().numpy()


def _geometry(layer: nn.Conv2d | PackedConv2d) -> list[list[int]]:
    """Strides, padding on both sides and dilations."""
    stride, pad, dilation = (list(pair) for pair in (layer.stride, layer.padding, layer.dilation))
    return [stride, pad, pad, dilation]


class _Values(Shapes):
    """Notes what is no tensor, too: sizes that poolings ask for."""

    def run_node(self, n: fx.Node) -> Any:  # noqa: ANN401
        result = super().run_node(n)
        n.meta["value"] = None if isinstance(result, Tensor) else result
        return result


def openvino_model(network: PackedNetwork, images: Tensor) -> tuple[Any, list[np.ndarray]]:
    """An openvino.Model for images of this shape, and the bits of its weights, which must live as long.

    Raises ValueError for what it has no operation for.
    """
    import openvino

    module = fx.GraphModule(network.network, traced(network.network))
    with torch.inference_mode():
        _Values(module).run(images)
    translation = Translation(module)
    translation.env = {}
    for node in module.graph.nodes:
        translation.env[node] = translation.run_node(node)
    entry, last = (next(n for n in module.graph.nodes if n.op == op) for op in ("placeholder", "output"))
    model = openvino.Model([translation.env[last]], [translation.env[entry]], "binary")
    return model, translation.kept


def compiled(model: Any, threads: int, precision: str = "f32") -> Callable[[np.ndarray], np.ndarray]:  # noqa: ANN401
    """What runs a model on the CPU."""
    import openvino

    hints = {"INFERENCE_PRECISION_HINT": precision, "INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": 1}
    request = openvino.Core().compile_model(model, "CPU", hints).create_infer_request()
    return lambda images: request.infer([images], share_inputs=True, share_outputs=True)[0]
