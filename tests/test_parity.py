"""Against the numbers of the paper's published code, made by the rule of parity/fill.py.

Here in float64, which decides every sign as the reference's float32 does, on any CPU; in float32 another CPU's
rounding can flip the sign of an activation that is almost zero. Stage 2's numbers were made on stage 1's network after
its training pass, so batch norm's statistics have moved.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from parity.fill import fill, inputs

from biper import create_model
from biper.nn.losses import periodic_regularizer

FOLDER = Path(__file__).parent / "parity"
NETWORKS = [("cifar10", "resnet20_1w1a", 10), ("imagenet", "resnet18_1w1a", 1000)]
# gradients of alpha almost cancel under batch norm: what is left of the reference's float32 sum is partly its rounding
ROUNDING = 2e-6  # of the gradient of the same layer's weight


def networks(family, name, classes, images):
    """Stage 1 filled; stage 2 as the published code was measured. Both in float64."""
    first = create_model(name, family=family, num_classes=classes, freq=20.0, stage=1)
    fill(first.state_dict())
    moved = create_model(name, family=family, num_classes=classes, freq=20.0, stage=1)
    moved.load_state_dict(first.state_dict())
    moved.double().train()(images)
    second = create_model(name, family=family, num_classes=classes, freq=20.0, stage=2).double()
    second.load_state_dict(moved.state_dict())
    return {1: first.double(), 2: second}


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize(("family", "name", "classes"), NETWORKS)
def test_parity(family, name, classes, stage):
    numbers = np.load(FOLDER / f"{family}_{name}.npz")
    images, labels = inputs(family)
    images = images.double()
    model = networks(family, name, classes, images)[stage]
    with torch.no_grad():
        logits = model.eval()(images).numpy()
    np.testing.assert_allclose(logits, numbers[f"stage{stage}_logits"], atol=1e-4)
    loss = F.cross_entropy(model.train()(images), labels)
    regularizer = periodic_regularizer(model, 0.037)
    (loss + regularizer).backward()
    np.testing.assert_allclose([loss.item(), regularizer.item()], numbers[f"stage{stage}_train"], rtol=1e-5)
    norms = {key: p.grad.norm().item() for key, p in model.named_parameters()}
    expected = json.loads(str(numbers[f"stage{stage}_gradnorm"]))
    assert norms.keys() == expected.keys()
    for key, norm in norms.items():
        rounding = ROUNDING * expected[key.replace("alpha", "weight")] if key.endswith("alpha") else 0.0
        assert norm == pytest.approx(expected[key], rel=1e-3, abs=rounding), key
    assert sum(p.numel() for p in model.parameters()) == numbers["params"]


def test_float32_agrees_where_no_activation_is_almost_zero():
    numbers = np.load(FOLDER / "cifar10_resnet20_1w1a.npz")
    model = create_model("resnet20_1w1a", freq=20.0, stage=1)
    fill(model.state_dict())
    with torch.no_grad():
        np.testing.assert_allclose(model.eval()(inputs("cifar10")[0]), numbers["stage1_logits"], atol=1e-4)
