"""Files made like the checkpoints of the paper's published code."""

import json
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from parity.fill import fill

from biper import create_model, load_checkpoint
from biper.errors import UsageError

KEYS = json.loads((Path(__file__).parent / "parity" / "state_dict_keys.json").read_text())
NAMES = [(family, name) for family, names in KEYS.items() for name in names]


@pytest.fixture
def published(tmp_path):
    """published(name, prefix, config) -> path of a file as published."""

    def make(name="resnet20_1w1a", prefix="", config=None, family="cifar10"):
        folder = tmp_path / "pretrained_models" / f"biper_{family}_{name}_stage2"
        folder.mkdir(parents=True, exist_ok=True)
        state = OrderedDict(
            (k, torch.zeros([1] if k.endswith("tau") else shape)) for k, shape in KEYS[family][name].items()
        )
        fill(state)
        state = OrderedDict((prefix + k, v) for k, v in state.items())
        optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], 0.1)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)
        contents = {"epoch": 300, "model": name, "state_dict": state, "best_prec1": torch.tensor(93.75)}
        contents |= {"optimizer": optimizer.state_dict(), "lr_scheduler": scheduler.state_dict()}
        torch.save(contents, folder / "model_best.pth.tar")
        if config is not None:
            (folder / "config.txt").write_text(config)
        return folder / "model_best.pth.tar"

    return make


@pytest.mark.parametrize(
    ("family", "name", "prefix"), [*((*name, "") for name in NAMES), ("cifar10", "resnet20_1w1a", "module.")]
)
def test_every_published_model_loads_with_the_freq_of_its_config(published, family, name, prefix):
    config = f"2024-04-01 10:00:00\n\nmodel:  x\nfreq:  20.0\ndataset:  {family}\ntau:  0.0468\n"
    model = load_checkpoint(published(name, prefix, config, family))
    expected = create_model(name, family=family, num_classes=10 if family == "cifar10" else 1000, freq=20.0, stage=2)
    fill(expected.state_dict())
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(model(images), expected.eval()(images))
    assert (model.metadata.freq, model.metadata.stage, model.metadata.dataset) == (20.0, 2, family)


def test_freq_is_never_guessed(published):
    path = published()
    with pytest.raises(UsageError, match=r"does not hold freq: give --freq or its config\.txt"):
        load_checkpoint(path)
    assert load_checkpoint(path, freq=20.0).metadata.freq == 20


def test_freq_that_contradicts_the_config_is_refused(published):
    with pytest.raises(UsageError, match=r"--freq 30\.0 contradicts"):
        load_checkpoint(published(config="freq:  20.0\n"), freq=30.0)


def test_config_without_or_with_a_broken_freq(published):
    with pytest.raises(UsageError, match="give --freq"):
        load_checkpoint(published(config="lr:  0.1\n"))
    with pytest.raises(UsageError, match="not a number"):
        load_checkpoint(published(config="freq:  high\n"))


def test_stage_and_model(published):
    path = published(config="freq:  20.0\n")
    assert load_checkpoint(path, stage=1).metadata.stage == 1
    with pytest.raises(UsageError, match="--model resnet18_1w1a contradicts"):
        load_checkpoint(path, model="resnet18_1w1a")
    contents = torch.load(path, weights_only=True)
    del contents["model"]
    torch.save(contents, path)
    with pytest.raises(UsageError, match="does not say its model: give --model"):
        load_checkpoint(path)
    assert load_checkpoint(path, model="resnet20_1w1a").metadata.model == "resnet20_1w1a"
    with pytest.raises(UsageError, match=r"does not fit resnet18_1w1a: .*missing"):
        load_checkpoint(path, model="resnet18_1w1a")


def test_evaluation_by_the_commands(published, command, refused):
    path = published(config="freq:  20.0\ndataset:  cifar10\n")
    data = ["--dataset", "digits"]
    assert "no intact cifar10" in refused("-e", path, "--data_path", path.parent, stage=2)  # as its config says
    code, out, _ = command("-e", path, *data, family=None, stage=None)
    assert code == 0
    assert "resnet20_1w1a, stage 2, freq 20, on digits" in out
    assert "read as stage 2" in out
    assert "(360 images)" in out
    assert "stage 1, freq 20" in command("-e", path, *data, stage=1)[1]
    path.with_name("config.txt").unlink()
    assert "give --freq" in refused("-e", path, *data, stage=2)
    assert "stage 2, freq 20" in command("-e", path, *data, "--freq", "20", stage=2)[1]
    assert "no intact cifar10" in refused("-e", path, "--freq", "20", "--data_path", path.parent, stage=2)


def test_stage_2_starts_from_a_published_stage_1(published, command, refused, tmp_path):
    path = published(config="freq:  20.0\ndataset:  cifar10\n")
    flags = ["--load_ckpt_stage1", path, "--dataset", "digits", "--image_size", 8, "--epochs", 1, "--lr", 1e-30]
    code, out, err = command(*flags, "--results_dir", tmp_path / "run", stage=2)
    assert code == 0, err
    assert "BiPer stage 2: resnet20_1w1a, freq 20" in out
    weight = load_checkpoint(tmp_path / "run" / "checkpoint.pth.tar").layer1[0].conv1.weight
    assert torch.allclose(weight, load_checkpoint(path).layer1[0].conv1.weight)
    path.with_name("config.txt").unlink()
    assert "give --freq" in refused(*flags, "--results_dir", tmp_path / "other", stage=2)
