"""The one command `biper`: its sub-commands, files of one's own, recipes and data away from the repository."""

import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, TINY

from biper import places
from biper.commands import evaluate, train
from biper.commands.arguments import choose_recipe
from biper.commands.main import COMMANDS
from biper.commands.main import main as biper_main
from biper.commands.process import called_as
from biper.commands.reproduce import build_parser
from biper.commands.reproduce import main as reproduce_main
from biper.commands.summary import main as summary_main
from biper.commands.train import _family
from biper.data.datasets import default_data_path
from biper.errors import UsageError
from biper.experiments.plan import planned
from biper.models.registry import _ARCHITECTURES
from biper.training.checkpoint import BEST

BIPER = (sys.executable, "-m", "biper")
OWN = '''
import biper
from biper.nn.functional import straight_through_sign
from beside import NAME

@biper.register_quantizer(NAME)
class Clipped(biper.WeightQuantizer):
    """A sign."""

    def forward(self, w):
        return straight_through_sign(w)

@biper.register_model("cifar10", "tiny")
def build(num_classes, precision):
    network = biper.Network()
    network.conv = precision.conv(3, 10, 3, 1, 1)
    network.forward = lambda x: network.conv(x).mean((2, 3))
    return network
'''


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_every_command_does_not_wait_for_torch(shell, name):
    helped = shell(sys.executable, "-X", "importtime", "-m", "biper", name, "--help")
    assert helped.returncode == 0
    assert helped.stdout.startswith(f"usage: biper {name} ")
    assert "--import FILE.py" in helped.stdout
    assert "torch" not in {line.split("|")[-1].strip() for line in helped.stderr.splitlines()}


def test_the_list_of_commands_comes_at_once(shell):
    seconds = []
    for _ in range(3):
        start = time.monotonic()
        helped = shell(*BIPER, "--help")
        seconds.append(time.monotonic() - start)
    assert helped.returncode == 0
    for name, (_, text) in COMMANDS.items():
        assert any(line.split() == [name, *text.split()] for line in helped.stdout.splitlines())
    assert min(seconds) < 0.5


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["trian"], "unknown command 'trian'; choose from train, evaluate"),
        (["--trian"], "unknown command '--trian'"),
        ([], "give a command: train, evaluate"),
        (["train", "--nonsense"], "unrecognized arguments: --nonsense (see biper train --help)"),
        (["train", "--stage", "3"], "argument --stage: invalid choice"),
        (["train", "--stage", "2", "--dataset", "digits"], "give --load_ckpt_stage1 FILE"),
        (["train", "-a", "resnet34_1w1a", "--family", "imagenet", "--dataset", "digits", "--lr", "0"], "--lr 0.0"),
        (["evaluate"], "required: FILE (see biper evaluate --help)"),
        (["evaluate", "none"], "no checkpoint at none"),
        (["-e", "none"], "no checkpoint at none"),
        (["--dataset", "digits", "--evaluate", "none"], "no checkpoint at none"),
        (["-e", "none", "--nonsense"], "unrecognized arguments: --nonsense (see biper --help)"),
        (["completion", "fish"], "invalid choice: 'fish'"),
        (["ablate", "none.yaml"], "no recipe at none.yaml; with biper come cifar10/configs/quickstart.yaml, "),
        (["train", "--config", "none.yaml"], "cannot read --config none.yaml: there is no such file; with biper come"),
    ],
)
def test_bad_input(refused, tmp_path, monkeypatch, argv, message):
    monkeypatch.chdir(tmp_path)
    assert message in refused(*argv, entry=biper_main)
    assert not list(tmp_path.iterdir())


def test_help_of_train_names_the_models_of_each_family():
    ours = {key for key, made in _ARCHITECTURES.items() if made.build.__module__.startswith("biper.")}
    named = {(family, name) for family, names in train.ARCHITECTURES.items() for name in names.split()}
    assert named == ours
    shown = {family: train.build_parser(family, 1).format_help().split() for family in train.ARCHITECTURES}
    for family, name in ours:
        assert name in shown[family]
        assert name in train.build_parser().format_help().split()
    assert "mobilenet" not in shown["cifar10"]
    assert all("DIR/train/<class>/*.jpg" in words for words in shown.values())


def test_help_of_evaluate_leaves_out_what_changes_nothing():
    shown = evaluate.build_parser("biper evaluate").format_help()
    assert "--batch_size_test" in shown
    assert "--data_path" in shown
    assert "(default cifar10)" not in shown  # the file's
    assert "--momentum" not in shown
    taken = evaluate.build_parser("eval.sh", named=True).parse_args(
        ["-e", "file", "--momentum", "0.5", "--no-regularizer"]
    )
    assert vars(taken) == {"evaluate": "file", "momentum": 0.5, "regularizer": False}


def test_help_of_train_says_both_families_defaults(capsys):
    with pytest.raises(SystemExit):
        biper_main(["train", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "(default 600, ImageNet's 200)" in text
    assert "--stage {1,2}" in text
    assert "--family {cifar10,imagenet}" in text


def test_the_page_of_commands_names_every_command():
    text = (ROOT / "docs" / "commands.md").read_text()
    assert all(f"`biper {name}" in text for name in COMMANDS)


def test_version(capsys):
    biper_main(["--version"])
    assert capsys.readouterr().out.startswith("biper 0.")


def test_train_and_both_ways_to_evaluate(command, trained, tmp_path):
    start = ["--load_ckpt_stage1", trained / "stage1" / BEST, "-b", "256", "--epochs", "1"]
    code, out, err = command("train", "--stage", "2", *start, "--results_dir", tmp_path, entry=biper_main)
    assert code == 0, err
    assert "BiPer stage 2: resnet20_1w1a" in out
    for argv in (["evaluate", "-bt", "100", tmp_path / BEST], ["-e", tmp_path / BEST, "-bt", "100"]):
        code, out, err = command(*argv, entry=biper_main)
        assert code == 0, err
        assert "top-1" in out


def test_the_family_of_a_run(trained):
    assert _family(1, {}, {}) == "cifar10"
    assert _family(1, {}, {"dataset": "tinyimagenet"}) == "imagenet"
    assert _family(1, {"dataset": "imagenet"}, {"dataset": "folder"}) == "imagenet"  # a recipe keeps its networks
    assert _family(1, {"dataset": "cifar10"}, {"dataset": "imagenet"}) == "cifar10"
    given = {"dataset": "imagenet", "load_ckpt_stage1": str(trained / "stage1" / BEST)}
    assert [_family(stage, {}, given) for stage in (1, 2)] == ["imagenet", "cifar10"]
    given = {"dataset": "imagenet", "results_dir": str(trained), "save": "stage1", "resume": True}
    assert _family(1, {}, given) == "cifar10"
    assert _family(1, {}, given | {"save": "new"}) == "imagenet"


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["cifar10/main.py", "--import", "own.py"], [sys.executable, "cifar10/main.py", "--import", "own.py"]),
        (["/x/biper/__main__.py", "train"], [sys.executable, "-m", "biper", "train"]),
        (["/no/such/bin/biper", "train"], ["/no/such/bin/biper", "train"]),
    ],
)
def test_how_a_process_was_called(monkeypatch, argv, words):
    monkeypatch.setattr(sys, "argv", argv)
    assert called_as() == words


def test_an_interrupted_run_says_how_to_go_on_with_what_was_imported(tmp_path):
    (tmp_path / "empty.py").write_text("")
    argv = [*BIPER, "train", *TINY, "--epochs", "1000", "--results_dir", tmp_path / "run", "--import", "empty.py"]
    process = subprocess.Popen([str(a) for a in argv], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert any(b"epoch 1/1000  lr" in line for line in iter(process.stdout.readline, b""))
    process.terminate()
    _, err = process.communicate(timeout=60)
    words = shlex.join([*BIPER, "train", *TINY, "--epochs", "1000", "--results_dir", f"{tmp_path}/run"])
    assert f"To go on from there: {words} --import empty.py --resume\n" in err.decode()


@pytest.fixture(scope="module")
def own(shell, tmp_path_factory):
    """A folder with own.py, which registers a quantizer, and the checkpoint of a run with it."""
    folder = tmp_path_factory.mktemp("own")
    (folder / "own.py").write_text(OWN)
    (folder / "beside.py").write_text("NAME = 'clipped'\n")
    flags = [*TINY[:-4], "--epochs", 1, "--quantizer", "clipped", "--from_scratch", "--results_dir", "run"]
    argv = ["train", "--stage", 2, *flags, "--import", "own.py", "--import", folder / "own.py"]
    trained = shell(*BIPER, *argv, cwd=folder)
    assert trained.returncode == 0, trained.stderr
    return folder


def test_commands_know_what_was_imported(shell, own):
    flags = ["--import", "own.py"]
    for argv in (
        ["bash", ROOT / "eval.sh", *flags, f"run/{BEST}"],
        [sys.executable, ROOT / "export.py", f"run/{BEST}", "-o", "packed.safetensors", *flags],
        [sys.executable, ROOT / "compute_QE.py", f"run/{BEST}", *flags],
        [*BIPER, "summary", "tiny_1w1a", *flags],
    ):
        result = shell(*argv, cwd=own)
        assert result.returncode == 0, result.stderr


def test_a_quantizer_that_was_not_imported_says_how(shell, own):
    result = shell("bash", ROOT / "eval.sh", f"run/{BEST}", cwd=own)
    assert (result.returncode, result.stderr.count("\n")) == (2, 1)
    assert "unknown quantizer 'clipped'" in result.stderr
    assert "--import FILE.py" in result.stderr


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("import biper\n\n1 / 0\n", ", line 3: ZeroDivisionError: division by zero"),
        ("def f():\n    raise ValueError('no\\nmore')\nf()\n", ", line 2: ValueError: no"),
        ("x = 1\ny = = 2\n", ", line 2: SyntaxError: invalid syntax"),
        ("stage1: {lr: 1}\nstage 2\n", ", line 2: SyntaxError"),
        ("import no_such_module\n", ", line 1: ModuleNotFoundError: No module named 'no_such_module'"),
        ("import sys\nsys.exit(0)\n", ", line 2: SystemExit: 0"),
        (
            "import biper\n@biper.register_quantizer('recu')\nclass A(biper.WeightQuantizer):\n    pass\n",
            "there is a quantizer 'recu' already",
        ),
        ("import beside_it\n", ", line 1: SyntaxError: invalid syntax (beside_it.py, line 1)"),
        (b"\x00\x01", "Error: source code string cannot contain null bytes"),
        (b"\xff\xfe = 3", "SyntaxError"),
    ],
)
def test_errors_of_an_imported_file_are_one_line(refused, tmp_path, text, message):
    file = tmp_path / "broken.py"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    (tmp_path / "beside_it.py").write_text("= 1\n")
    err = refused("resnet20_1w1a", "--import", file, entry=summary_main)
    assert err.startswith(f"error: --import {file}")
    assert message in err


def test_files_that_cannot_be_imported(refused, tmp_path):
    assert "there is no such file" in refused("resnet20_1w1a", "--import", "none.py", entry=summary_main)
    assert "that is a folder" in refused("resnet20_1w1a", "--import", tmp_path, entry=summary_main)


def test_an_imported_file_runs_once_shadows_nothing_and_not_before_it_is_needed(command, tmp_path):
    import random

    file, trace = tmp_path / "random.py", tmp_path / "trace"
    file.write_text(
        "from dataclasses import dataclass\nimport random\nrandom.randrange(2)\n"
        f"@dataclass\nclass A:\n    x: 'int' = 1\nwith open({str(trace)!r}, 'a') as file:\n    file.write('x')\n"
    )
    for argv in (["--help"], ["resnet20_1w1a", "--nonsense"]):
        command(*argv, "--import", file, entry=summary_main)
        assert not trace.exists()
    for _ in range(2):
        code, _, err = command("resnet20_1w1a", "--import", file, "--import", file, entry=summary_main)
        assert code == 0, err
    assert trace.read_text() == "x"
    assert sys.modules["random"] is random


def test_an_experiments_command_names_what_was_imported_and_how_it_was_called(tmp_path):
    given = vars(build_parser("biper reproduce").parse_args([str(ROOT / "cifar10/configs/resnet20.yaml")]))
    given["import"] = [tmp_path / "own.py"]
    command = planned("reproduce", given, "biper reproduce").command
    assert command == "biper reproduce cifar10/configs/resnet20.yaml --import own.py --seeds 0"
    assert planned("reproduce", given).command.startswith("python reproduce.py cifar10/configs/resnet20.yaml ")


def test_a_recipe_that_is_not_here_is_one_that_comes_with_biper(tmp_path, monkeypatch, capsys, refused):
    monkeypatch.chdir(tmp_path)
    path = Path("cifar10/configs/short/resnet20.yaml")
    assert choose_recipe(path, "nothing").samefile(ROOT / path)
    assert "taking the one that comes with biper, " in capsys.readouterr().err
    path.parent.mkdir(parents=True)
    path.write_text("stage1: {}")  # the user's own is taken in silence
    assert choose_recipe(path, "nothing") == path
    assert capsys.readouterr().err == ""
    assert "no settings for stage 2" in refused(path, entry=reproduce_main)
    with pytest.raises(UsageError, match=r"^nothing; with biper come cifar10/.*, imagenet/configs/resnet34\.yaml$"):
        choose_recipe(Path("../setup.py"), "nothing")


def test_where_data_lie(tmp_path, monkeypatch):
    monkeypatch.delenv("BIPER_DATA", raising=False)
    assert default_data_path("cifar10") == ROOT / "cifar10" / "data" / "CIFAR10"
    monkeypatch.setattr(places, "REPOSITORY", None)  # as in a wheel
    monkeypatch.setenv("HOME", str(tmp_path))
    for home in ("", "relative"):
        monkeypatch.setenv("XDG_DATA_HOME", home)
        assert default_data_path("cifar10") == tmp_path / ".local" / "share" / "biper" / "cifar10"
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    assert default_data_path("imagenet") == tmp_path / "data" / "biper" / "imagenet"
    monkeypatch.undo()
    monkeypatch.setenv("BIPER_DATA", str(tmp_path))
    assert default_data_path("tinyimagenet") == tmp_path / "tinyimagenet"


@pytest.mark.parametrize("name", ["bash", "zsh", "tcsh"])
def test_completion_knows_every_command_and_does_not_load_torch(shell, name):
    result = shell(sys.executable, "-X", "importtime", "-m", "biper", "completion", name)
    assert result.returncode == 0, result.stderr
    assert "torch" not in {line.split("|")[-1].strip() for line in result.stderr.splitlines()}
    assert all(command in result.stdout for command in COMMANDS)
    for flag in ("from_scratch", "regularizer_form", "studies", "onnx", "archives", "import"):
        assert flag in result.stdout
    if name == "bash":
        words = 'COMP_WORDS=(biper quant); COMP_CWORD=1; _shtab_biper; echo "${COMPREPLY[@]}"'
        done = shell("bash", "-c", f"{result.stdout}\n{words}")
        assert done.stdout.split() == ["quantization-error"]
