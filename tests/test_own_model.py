"""examples/own_model.py, as a user runs it."""

import onnxruntime
import torch
import torchvision
from conftest import ROOT

import biper


def test_the_example_runs_and_its_files_agree(shell, tmp_path):
    done = shell("python", ROOT / "examples" / "own_model.py", tmp_path)
    assert done.returncode == 0, done.stderr
    assert "layer1.0.relu: ReLU -> Hardtanh" in done.stdout
    assert "step 8, binary weights" in done.stdout
    model = biper.convert(torchvision.models.resnet18(num_classes=10), weight_quantizer=biper.Sine(20.0), verbose=False)
    packed = biper.load_packed(tmp_path / "resnet18.safetensors", model=model)
    session = onnxruntime.InferenceSession(str(tmp_path / "resnet18.onnx"))
    x = torch.randn(3, 3, 32, 32)
    theirs = torch.from_numpy(session.run(None, {"images": x.numpy()})[0])
    with torch.no_grad():
        ours = packed(x)
    torch.testing.assert_close(theirs, ours, rtol=1e-3, atol=1e-2)
    assert len((ROOT / "examples" / "own_model.py").read_text().splitlines()) <= 60
