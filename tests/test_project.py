"""The repository itself: sizes, dependencies, documents."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from biper.models import list_models

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]
CODE = [
    path
    for pattern in (
        "*.py",
        "*.sh",
        "biper/**/*.py",
        "cifar10/**/*.py",
        "imagenet/**/*.py",
        "benchmarks/*.py",
        "scripts/*",
        "tests/**/*.py",
    )
    for path in sorted(ROOT.glob(pattern))
    if path.is_file()
]


@pytest.mark.parametrize("path", CODE, ids=lambda p: str(p.relative_to(ROOT)))
def test_files_and_functions_are_short(path):
    text = path.read_text()
    assert len(text.splitlines()) <= 250
    if path.suffix == ".py":
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.lineno < 50, node.name


def test_environment_yml_equals_pyproject():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    *conda, pip = environment["dependencies"]
    assert pip["pip"] == [*project["dependencies"], "--editable ."]
    assert f"python{project['requires-python']}" in conda


def test_imports_run_one_way():
    layers = "errors exits binarize native kernels layers metadata loss units fusion acceleration schedule optim models"
    data = "distributed runtime config data published checkpoint quantization plots engine record options results"
    commands = "deploy stage evaluate resolve export predict summary train experiments cli"
    order = [*layers.split(), *data.split(), *commands.split()]
    for path in (ROOT / "biper").rglob("*.py"):
        parts = path.relative_to(ROOT / "biper").with_suffix("").parts
        if parts[0] in ("__init__", "__main__"):
            continue
        here = order.index(parts[0])
        text = path.read_text()
        imported = re.findall(r"^\s*(?:from|import) biper\.(\w+)", text, re.MULTILINE)
        imported += re.findall(r"^\s*from biper import (\w+)", text, re.MULTILINE)
        for name in imported:
            assert order.index(name) <= here, f"{path} imports biper.{name}"


def test_nothing_parses_prints_or_seeds_on_import():
    modules = [
        ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for path in (ROOT / "biper").rglob("*.py")
        if path.stem != "__init__"
    ]
    code = f"""
import random, signal, sys, numpy, torch
states = lambda: (random.getstate(), numpy.random.get_state()[1].tolist(), torch.get_rng_state().tolist())
sys.argv = ["x", "--nonsense"]
before, handlers = states(), (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM))
for name in {modules}:
    __import__(name)
assert states() == before
assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers
assert not torch.cuda.is_initialized()
"""
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (0, ""), result.stderr


def test_readme_names_what_exists():
    text = (ROOT / "README.md").read_text()
    ours = re.sub(r"^\| `[^|]*\|", "", text, flags=re.MULTILINE)  # without the column of the paper's commands
    ours = re.sub(r"cd (\w+); python (?:-u )?", r"python \1/", ours)
    for name in re.findall(r"(?:bash|python) ([\w/]+\.(?:sh|py))", ours) + re.findall(r"\]\((?!http)([^)]+)\)", text):
        assert (ROOT / name).exists(), name
    for name in re.findall(r"`(test_\w+)`", text):
        assert (ROOT / "tests" / f"{name}.py").exists(), name
    for model in {name.rsplit("_", 1)[0] for family in ("cifar10", "imagenet") for name in list_models(family)}:
        assert f"`{model}`" in text


def test_python_in_the_readme_runs():
    for block in re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL):
        exec(compile(block, "README.md", "exec"), {})
