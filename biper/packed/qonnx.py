"""A packed network as QONNX, for FPGA tools: ONNX whose nodes say which numbers are signs and which have few bits."""

import copy
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from biper import __version__
from biper.errors import UsageError, one_line
from biper.files import atomically
from biper.packed.network import PackedNetwork
from biper.packed.onnx import example_images, require_fit
from biper.packed.qonnx_nodes import WAYS
from biper.packed.qonnx_writer import DOMAIN, Record, Writer, round_weight

BITS = range(2, 17)
OPSET, FORMAT = 11, 8  # the operators that the package qonnx prefers; the format of files of 2022


def require_onnx() -> None:
    """Raise UsageError where the package is missing that writes the file."""
    try:
        import onnx  # noqa: F401
    except ImportError as error:
        raise UsageError("--qonnx needs the package onnx: pip install 'biper[onnx]'") from error


def require_bits(bits: int | None) -> None:
    """Raise UsageError unless a Quant node can have so many bits; None leaves real layers as they are."""
    if bits is not None and bits not in BITS:
        raise UsageError(f"--bits {bits}: weights of real layers are rounded to {BITS[0]} to {BITS[-1]} bits")


def export_qonnx(
    packed: PackedNetwork,
    path: str | os.PathLike[str],
    image_size: int | None = None,
    *,
    bits: int | None = None,
    example: Tensor | None = None,
) -> None:
    """Write a QONNX file with an input `images` (1, 3, S, S) and an output `logits` (1, classes), whole or not at all.

    Binary weights, and the signs of activations, come out of `BipolarQuant` nodes of scale 1; alpha is a product behind
    the sums. bits: how many the weights of real layers have, behind `Quant` nodes; None leaves them float32.
    image_size: S; by default that of the network's metadata. example: an input, for a network that takes others.
    Raises UsageError for a network with a layer that cannot be written, and where the package onnx is not installed.
    [QONNX: Pappalardo et al. 2022, arXiv 2206.07527]
    """
    contents = qonnx_contents(packed, image_size, bits=bits, example=example)
    with atomically(Path(path)) as temporary:
        temporary.write_bytes(contents)


def qonnx_contents(
    packed: PackedNetwork, image_size: int | None = None, *, bits: int | None = None, example: Tensor | None = None
) -> bytes:
    """What `export_qonnx` writes."""
    require_onnx()
    require_bits(bits)
    if not isinstance(packed, PackedNetwork):
        raise UsageError("QONNX files are written of packed networks: export_qonnx(biper.pack(model), path)")
    image = (example_images(packed, image_size) if example is None else example)[:1]
    network = copy.deepcopy(packed.network).cpu().eval()
    require_fit(network, image)
    try:
        writer = Writer(network, WAYS, bits)
    except Exception as error:  # of torch.fx, about a network of somebody's own
        raise UsageError(f"this network cannot be written as QONNX: its graph, {one_line(error)}") from error
    with torch.no_grad():
        logits = writer.run(image)
    if not isinstance(logits, Tensor):
        raise UsageError(f"this network cannot be written as QONNX: it gives a {type(logits).__name__}, not logits")
    return _file(writer.records, writer.constants, image.shape, logits.shape)


def rounded(packed: PackedNetwork, bits: int) -> PackedNetwork:
    """A copy of a network whose real layers have the weights that the Quant nodes of its QONNX file give."""
    result = copy.deepcopy(packed)
    for module in result.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.weight.data = round_weight(module.weight.data, bits)
    return result


def _file(
    records: Sequence[Record],
    constants: dict[str, npt.NDArray[np.generic]],
    images: Sequence[int],
    logits: Sequence[int],
) -> bytes:
    """Nodes in their order and constants as the bytes of a file."""
    from onnx import TensorProto, checker, helper, numpy_helper

    nodes = [
        helper.make_node(r.kind, r.inputs, [r.name], name=f"{r.name}_{r.kind}", domain=r.domain, **r.attributes)
        for r in records
    ]
    graph = helper.make_graph(
        nodes,
        "biper",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, list(images))],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, list(logits))],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(DOMAIN, 1)]
    model = helper.make_model(
        graph, opset_imports=opsets, ir_version=FORMAT, producer_name="biper", producer_version=__version__
    )
    checker.check_model(model)
    contents: bytes = model.SerializeToString()
    return contents
