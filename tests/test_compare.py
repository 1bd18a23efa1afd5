"""docs/compare.md: its class is the example's, and its commands run as they stand, from training to the packed file."""

import shlex
import shutil
from pathlib import Path
from unittest.mock import patch

import pytest
from recipes import rows

from biper.commands.main import main as biper_main
from biper.models.registry import _ARCHITECTURES
from biper.nn.quantizers import INPUT_QUANTIZERS, WEIGHT_QUANTIZERS

ROOT = Path(__file__).resolve().parents[1]
GUIDE = (ROOT / "docs" / "compare.md").read_text()
EXAMPLES = [ROOT / "examples" / name for name in ("own_quantizer.py", "own_method.py")]


def blocks(language):
    return [part.split("```")[0] for part in GUIDE.split(f"```{language}\n")[1:]]


def test_the_classes_are_the_examples():
    files = [path.read_text().split('"""', 2)[2].strip() for path in EXAMPLES]
    assert files == [shown.strip() for shown in blocks("python")]


@patch.dict(WEIGHT_QUANTIZERS)  # what the guide registers is there for this test alone
@patch.dict(INPUT_QUANTIZERS)
@patch.dict(_ARCHITECTURES)
def test_every_command_runs_as_it_stands(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for path in EXAMPLES:
        shutil.copy(path, tmp_path)
    (tmp_path / "recipe.yaml").write_text(blocks("yaml")[0])
    commands = [line for block in blocks("bash") for line in block.splitlines()]
    assert all(line.startswith("biper ") for line in commands)
    for line in commands:
        try:
            biper_main(shlex.split(line)[1:])
        except SystemExit as error:
            pytest.fail(f"{line}: {error.code}: {capsys.readouterr().err}")
    table = rows(tmp_path / "results" / "quantizers" / "quantizers.csv")
    variants = list(dict.fromkeys(row["variant"] for row in table))
    assert variants == ["biper", "biper, one stage", "irnet", "recu", "sign", "tanh", "xnor"]
    for name, most in (("tanh", 100_000), ("soft2", 20_000)):
        assert (tmp_path / "results" / name / "packed.safetensors").stat().st_size < most
