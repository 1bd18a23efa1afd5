"""A network of one's own, made binary: torchvision's ResNet-18, trained for a few steps, packed, saved and exported.

python examples/own_model.py [FOLDER]: writes resnet18.safetensors, and with onnx installed resnet18.onnx, to FOLDER
(own_model if absent).
"""

import sys
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.nn.functional as F
import torchvision

import biper


def main(folder: Path = Path("own_model"), steps: int = 4) -> None:
    """Every step is checked against the one before: all of them compute the same."""
    torch.manual_seed(0)
    images, labels = torch.randn(8, 3, 32, 32), torch.randint(10, (8,))

    model = biper.convert(torchvision.models.resnet18(num_classes=10), weight_quantizer=biper.Sine(freq=20.0))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    for step in range(2 * steps):
        if step == steps:
            biper.binarize_(model)  # BiPer's second stage: sin(freq*w) becomes its sign, the latent weights stay
        loss = F.cross_entropy(model.train()(images), labels) + biper.periodic_regularizer(model, tau=0.037)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        print(f"step {step + 1}, {'binary' if step >= steps else 'real'} weights: loss {loss.item():.3f}")

    with torch.no_grad():
        logits = model.eval()(images)
        packed = biper.pack(model)
        torch.testing.assert_close(packed(images), logits)
        folder.mkdir(parents=True, exist_ok=True)
        biper.save_packed(packed, folder / "resnet18.safetensors")
        loaded = biper.load_packed(folder / "resnet18.safetensors", model=model)
        assert torch.equal(loaded(images), packed(images))
    size, floats = (folder / "resnet18.safetensors").stat().st_size, sum(t.nbytes for t in model.state_dict().values())
    print(f"packed: {size:,} bytes instead of {floats:,}, {loaded.describe()}")
    if find_spec("onnx"):
        biper.export_onnx(loaded, folder / "resnet18.onnx", image_size=32)


if __name__ == "__main__":
    main(Path(*sys.argv[1:2]))
