"""The repository itself: rooms, dependencies, documents."""

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
        "biper/**/*.py",
        "cifar10/**/*.py",
        "imagenet/**/*.py",
        "benchmarks/*.py",
        "scripts/*.py",
        "docs/*.py",
        "tests/**/*.py",
    )
    for path in sorted(ROOT.glob(pattern))
]
ROOMS = ("commands", "experiments", "training", "packed", "cpu", "data", "models", "nn")  # imports run downwards
APART = {"packed": ("cpu", "data")}  # what a room could import by its place, and must not


@pytest.mark.parametrize("path", CODE, ids=lambda p: str(p.relative_to(ROOT)))
def test_functions_are_short(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < 50, node.name


def test_environment_yml_equals_pyproject():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    *conda, pip = environment["dependencies"]
    assert pip["pip"] == [*project["dependencies"], "--editable ."]
    assert f"python{project['requires-python']}" in conda


def imported(path):
    """The modules of biper that a file imports, wherever in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "biper":
            yield from (f"{node.module}.{name.name}" for name in node.names)
        elif isinstance(node, ast.Import):
            yield from (name.name for name in node.names if name.name.split(".")[0] == "biper")


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_from_the_rooms_below_alone(room):
    allowed = set(ROOMS[ROOMS.index(room) :]) - set(APART.get(room, ()))
    files = sorted((ROOT / "biper" / room).rglob("*.py"))
    assert files
    for path in files:
        rooms = {name.split(".")[1] for name in imported(path) if "." in name} & set(ROOMS)
        assert rooms <= allowed, f"{path} imports {rooms - allowed}"


def test_every_folder_is_a_room_and_what_lies_beside_them_imports_no_room():
    folders = {p.name for p in (ROOT / "biper").iterdir() if p.is_dir() and p.name != "__pycache__"}
    assert folders == set(ROOMS)
    for path in (ROOT / "biper").glob("*.py"):
        if path.stem not in ("__init__", "__main__"):  # of which one names the public API, the other is a command
            assert not {name.split(".")[1] for name in imported(path) if "." in name} & set(ROOMS), path


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


@pytest.mark.parametrize("page", [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))], ids=lambda p: p.stem)
def test_a_page_names_what_exists(page):
    text = page.read_text()
    ours = text
    if page.stem == "paper":
        ours = re.sub(r"^\| `[^|]*\|", "", text, flags=re.MULTILINE)  # without the column of the paper's commands
        ours = re.sub(r"cd (\w+); python (?:-u )?", r"python \1/", ours)
    for name in re.findall(r"(?:bash|python) ([\w/]+\.(?:sh|py))", ours):
        assert (ROOT / name).exists(), name
    prose = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    for name in re.findall(r"\]\((?!http|#)([^)#]+)[^)]*\)", prose):
        assert (page.parent / name).exists(), name
    for name in re.findall(r"`(test_\w+)`", text):
        assert (ROOT / "tests" / f"{name}.py").exists(), name


@pytest.mark.parametrize(("family", "page"), [("cifar10", "training"), ("imagenet", "imagenet")])
def test_the_page_of_a_family_names_every_model(family, page):
    text = (ROOT / "docs" / f"{page}.md").read_text()
    assert {model for name in list_models(family) if f"`{(model := name.rsplit('_', 1)[0])}`" not in text} == set()


def test_python_in_the_readme_runs():
    for block in re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL):
        exec(compile(block, "README.md", "exec"), {})


def test_every_dependency_has_a_version_that_was_tested():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    named = {re.split(r"[^\w-]", name)[0].lower() for name in project["dependencies"]}
    lines = (ROOT / "requirements-tested.txt").read_text().splitlines()
    tested = {line.split("==")[0].lower().replace("_", "-") for line in lines if not line.startswith("#")}
    assert named <= tested


def test_the_citation_is_that_of_the_readme():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()  # which the format asks for
    paper, text = citation["preferred-citation"], (ROOT / "README.md").read_text()
    authors = " and ".join(f"{a['family-names']}, {a['given-names']}" for a in paper["authors"])
    for name, value in {"title": paper["title"], "author": authors, "year": paper["year"]}.items():
        assert re.search(rf"{name} += \{{{re.escape(str(value))}\}}", text), name
    assert f"{{{paper['collection-title']}}}" in text


def test_hooks_before_a_commit_call_this_projects_own_tools():
    (local,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert local["repo"] == "local"
    for hook in local["hooks"]:
        assert {"id", "name", "entry", "language"} <= hook.keys()
        assert hook["entry"] in (ROOT / "test.sh").read_text()
