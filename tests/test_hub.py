"""The repository as torch.hub sees it."""

import importlib

import pytest
import torch
from conftest import ROOT

from biper import create_model, list_models


def test_every_model_is_an_entry_point(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    import hubconf

    for name in list_models():
        assert "evaluation mode" in getattr(hubconf, name).__doc__
    assert callable(hubconf.resnet18_1w1a)
    for package in hubconf.dependencies:
        importlib.import_module(package)


def test_pretrained_weights_come_with_it():
    network = torch.hub.load(str(ROOT), "resnet20_1w1a", source="local", pretrained=True)
    ours = create_model("resnet20_1w1a", pretrained=True)
    assert network.metadata == ours.metadata
    images = torch.rand(2, 3, 32, 32)
    assert torch.equal(network(images), ours(images))


def test_arguments_are_passed_on():
    network = torch.hub.load(str(ROOT), "resnet18_1w1a", source="local", num_classes=7, freq=10.0)
    assert (network.metadata.num_classes, network.metadata.freq) == (7, 10.0)
    with pytest.raises(ValueError, match="no pretrained weights"):
        torch.hub.load(str(ROOT), "vgg_small_1w1a", source="local", pretrained=True)
