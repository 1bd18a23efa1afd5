"""What several test files use: the commands in this process, and small real data."""

import gc
import os
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from biper.commands.evaluate import main as evaluate_main
from biper.commands.train import main
from biper.compilers import find_compiler
from biper.errors import CompilerMissing

ROOT = Path(__file__).resolve().parents[1]
WNIDS = {"n01440764": ("tench", "Tinca tinca"), "n01443537": ("goldfish",), "n02102040": ("English springer",)}
RUN = ["-a", "resnet18_1w1a", "--image_size", 32, "-b", 6, "-bt", 4, "--freq", 20, "--lr", 0.01, "--workers", 0]
TINY = ["--dataset", "digits", "--image_size", "8", "-a", "resnet20_1w1a", "-b", "256", "--freq", "20", "--lr", "0.05"]


TORCH = tuple(map(int, torch.__version__.split(".")[:2]))
THREADS = int(os.environ.get("OMP_NUM_THREADS", 2))
gc.freeze()  # torch and all else that is imported stays: the garbage collector need not look at it again and again


def has_compiler() -> bool:
    try:
        find_compiler()
    except CompilerMissing:
        return False
    return True


needs_compiler = pytest.mark.skipif(not has_compiler(), reason="no C compiler was found")


@pytest.fixture(autouse=True)
def _same_threads():
    """Sums depend on the number of threads; bit-exact comparisons keep it fixed."""
    torch.set_num_threads(THREADS)


@pytest.fixture
def command(capsys):
    """command(*argv, stage=1) -> (exit code, standard output, standard error) of main.py or main_stage2.py.

    entry: of another command; family=None: of eval.sh.
    """

    def run(*argv, family="cifar10", stage=1, entry=None):
        try:
            if entry or family is None:
                (entry or evaluate_main)([str(a) for a in argv])
            else:
                main(family, stage, [str(a) for a in argv])
            code = 0
        except SystemExit as error:
            code = error.code or 0
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


@pytest.fixture
def refused(command):
    """refused(*argv) -> the one line with which a command refuses bad input."""

    def run(*argv, **options):
        code, _, err = command(*argv, **options)
        assert code == 2, err
        assert err.startswith("error: ")
        assert err.count("\n") == 1, err
        return err

    return run


@pytest.fixture
def small_disk():
    """small_disk(bytes): a context in which no file of this process grows larger; as a full disk, for root too."""
    import resource

    @contextmanager
    def limited(size):
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    return limited


@pytest.fixture(scope="session")
def shell():
    """shell(*argv, cwd) -> CompletedProcess, with this Python first on the path."""

    def run(*argv, cwd=ROOT, **options):
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        environment = os.environ | {"PATH": path} | options.pop("env", {})
        return subprocess.run(
            [str(a) for a in argv], cwd=cwd, env=environment, capture_output=True, text=True, timeout=900, **options
        )

    return run


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """A folder with both stages of a short run on digits, 8x8."""
    folder = tmp_path_factory.mktemp("trained")
    main("cifar10", 1, [*TINY, "--epochs", "3", "--warm_up", "--results_dir", f"{folder}/stage1"])
    start = f"{folder}/stage1/model_best.pth.tar"
    flags = ["--epochs", "2", "--lr", "0.01", "-b", "256", "--results_dir", f"{folder}/stage2"]
    main("cifar10", 2, [*flags, "--load_ckpt_stage1", start])
    return folder


def photographs(path, train=8, test=4, names=("n01440764", "n01443537"), size=(50, 40)):
    """JPEG images of random colours with some noise, in class folders below path/train and path/val."""
    random = np.random.default_rng(0)
    for split, count in (("train", train), ("val", test)):
        for name in names:
            folder = path / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                width, height = size[0] + 3 * i, size[1] + 2 * i
                coarse = Image.fromarray(random.integers(0, 256, (4, 5, 3), np.uint8)).resize((width, height))
                noisy = np.asarray(coarse, np.int64) + random.integers(-20, 21, (height, width, 3))
                Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(folder / f"{name}_{i}.JPEG", quality=90)
    return path


@pytest.fixture
def image_folder(tmp_path):
    """A data set of two classes, eight training and four test images each, 12x10 pixels, in several formats."""
    formats = ("png", "jpg", "bmp", "gif")
    for split, count in (("train", 8), ("test", 4)):
        for label, name in enumerate(("dark", "light")):
            folder = tmp_path / "images" / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                mode = "L" if i % 2 else "RGB"
                grey = 40 + 150 * label + i
                color = grey if mode == "L" else (grey, grey, grey)
                Image.new(mode, (12, 10), color).save(folder / f"{i}.{formats[i % 4]}")
    return tmp_path / "images"
