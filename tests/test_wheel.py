"""A wheel, installed away from the repository: commands, recipes, weights and C code come with it."""

import os
import shutil
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
from conftest import ROOT, needs_compiler
from PIL import Image

from biper.places import list_recipes

AWAY = {"PYTHONPATH": "", "BIPER_DATA": "", "PIP_DISABLE_PIP_VERSION_CHECK": "1", "PIP_NO_CACHE_DIR": "1"}
LOOK = """
import biper
from biper.data.datasets import default_data_path
from biper.packed import runtime
assert biper.create_model("resnet20_1w1a", pretrained=True).metadata.stage == 2
print(biper.__file__, default_data_path("cifar10"), runtime.compiled() is not None)
"""


@pytest.fixture(scope="module")
def wheel(shell, tmp_path_factory):
    """The wheel of what is in the working tree, built beside it."""
    folder = tmp_path_factory.mktemp("wheel")
    built = shutil.ignore_patterns("__pycache__", "*.so")
    for name in ("biper", "cifar10/configs", "imagenet/configs", "pretrained_models"):
        shutil.copytree(ROOT / name, folder / "source" / name, ignore=built)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "MANIFEST.in"):
        shutil.copy(ROOT / name, folder / "source")
    compiler = folder / "cc"
    compiler.write_text('#!/bin/sh\nexec cc "$@" -O1\n')  # in a third of the time; the optimized code has its own tests
    compiler.chmod(0o755)
    build = ["--no-deps", "--no-build-isolation", "--no-index", "--quiet", "--wheel-dir", folder, folder / "source"]
    result = shell(sys.executable, "-m", "pip", "wheel", *build, env=AWAY | {"CC": str(compiler)})
    assert result.returncode == 0, result.stderr
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def environment(shell, wheel, tmp_path_factory):
    """An environment with the wheel, which sees the packages of this one, and not this one's biper."""
    folder = tmp_path_factory.mktemp("environment")
    assert shell(sys.executable, "-m", "venv", "--without-pip", folder).returncode == 0
    pip = [sys.executable, "-m", "pip", "--python", folder / "bin" / "python"]
    result = shell(*pip, "install", "--no-deps", "--no-index", "--quiet", wheel, env=AWAY)
    assert result.returncode == 0, result.stderr
    site = next(folder.glob("lib/python*/site-packages"))
    (site / "others.pth").write_text("\n".join({sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}))
    return folder


@needs_compiler
def test_what_a_wheel_holds(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    sources = ("cpu/training.c", "packed/packed.c", "packed/packed_instructions.h", "packed/c/files/kernels.c")
    for name in (*sources, "packed/web/web.c", "packed/web/files/index.html", "py.typed"):
        assert f"biper/{name}" in names
    assert any(name.startswith("biper/packed/_packed") and name.endswith(".so") for name in names)
    assert "biper/pretrained/resnet20_1w1a/model.pth.tar" in names
    assert {f"biper/recipes/{name}" for name in list_recipes()} <= set(names)


@needs_compiler
def test_a_wheel_away_from_the_repository(shell, environment, tmp_path):
    bin, away = environment / "bin", {"env": AWAY | {"XDG_DATA_HOME": str(tmp_path / "data")}, "cwd": tmp_path}
    look = shell(bin / "python", "-c", LOOK, **away)
    assert look.returncode == 0, look.stderr
    place, data, compiled = look.stdout.split()
    assert Path(place).is_relative_to(environment)
    assert (data, compiled) == (f"{tmp_path}/data/biper/cifar10", "True")

    recipe = ["--config", "cifar10/configs/quickstart.yaml", "--epochs", "1", "--image_size", "8", "-b", "256"]
    fresh = ["--stage", "2", "--from_scratch", "-a", "resnet20_1w1a", "--freq", "20", "--results_dir", "run"]
    train = shell(bin / "biper", "train", *recipe, *fresh, **away)
    assert train.returncode == 0, train.stderr
    assert f"taking the one that comes with biper, {environment}" in train.stderr
    export = shell(bin / "biper", "export", "run/model_best.pth.tar", "-o", "packed.safetensors", **away)
    assert export.returncode == 0, export.stderr
    Image.new("RGB", (8, 8), (200, 200, 200)).save(tmp_path / "image.png")
    predict = shell(bin / "biper", "predict", "packed.safetensors", "image.png", **away)
    assert predict.returncode == 0, predict.stderr
    assert predict.stdout.count("%") == 5
    missing = shell(bin / "biper", "reproduce", "none.yaml", **away)
    assert missing.returncode == 2
    assert "; with biper come cifar10/configs/quickstart.yaml, " in missing.stderr
    assert sorted(os.listdir(tmp_path)) == ["image.png", "packed.safetensors", "run"]
