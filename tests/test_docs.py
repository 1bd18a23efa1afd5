"""The documentation site: it builds without a warning, its links lead somewhere, and what its pages show works."""

import re
import shlex
import shutil
import sys
from html.parser import HTMLParser
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from unittest.mock import patch
from urllib.parse import unquote, urlsplit

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image

import biper
from biper.commands.main import COMMANDS
from biper.models.registry import _ARCHITECTURES
from biper.nn.quantizers import INPUT_QUANTIZERS, WEIGHT_QUANTIZERS

DOCS = ROOT / "docs"
PAGES = sorted(ROOT.glob("*.md")) + sorted(DOCS.glob("*.md")) + sorted(ROOT.glob("*/dataset/*.md"))
RUN = (  # pages whose Python is run here
    "method",
    "first_training",
    "own_model",
    "own_quantizer",
    "microcontroller",
    "evaluation",
    "deployment",
    "api",
)
SCRIPTS = {file: file for file in ("export", "predict", "summary", "reproduce", "ablation", "download", "prepare")}
SCRIPTS |= {"compute_QE": "quantization_error", "eval": "evaluate", "main": "train", "main_stage2": "train"}
SCRIPTS |= {"run_stage1": "train", "run_stage2": "train"}


class Links(HTMLParser):
    """What a page of HTML refers to, and the places in it that can be referred to."""

    def __init__(self, page):
        super().__init__()
        self.targets, self.ids = set(), set()
        self.feed(page.read_text())

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.ids |= {attrs["id"]} if attrs.get("id") else set()
        self.targets |= {attrs[name] for name in ("href", "src") if attrs.get(name)}


@pytest.fixture(scope="module")
def site(shell, tmp_path_factory):
    """The folder of the built site."""
    missing = [name for name in ("sphinx", "myst_parser", "furo", "latex2mathml") if find_spec(name) is None]
    if missing:
        pytest.skip(f"the site needs {', '.join(missing)}: pip install -e '.[docs]'")
    folder = tmp_path_factory.mktemp("site")
    flags = ["-W", "--keep-going", "-q", "-d", folder / "cache"]
    built = shell(sys.executable, "-m", "sphinx", *flags, DOCS, folder / "html")
    assert (built.returncode, built.stderr) == (0, "")
    return folder / "html"


def blocks(page, language):
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)


def test_links_within_the_site_lead_to_pages_and_places_that_are_there(site):
    pages = {page: Links(page) for page in site.rglob("*.html")}
    assert site / "demo" / "index.html" in pages
    for page, links in pages.items():
        for target in links.targets:
            parts = urlsplit(target)
            if parts.scheme or parts.netloc:
                continue
            there = (page.parent / unquote(parts.path)).resolve() if parts.path else page
            assert there.is_file(), f"{page.relative_to(site)}: {target}"
            if parts.fragment and there.suffix == ".html":
                assert unquote(parts.fragment) in pages[there].ids, f"{page.relative_to(site)}: {target}"


def test_every_public_name_has_its_place(site):
    ids = Links(site / "api.html").ids
    assert {name for name in biper.__all__ if f"biper.{name}" not in ids} == set()


def test_every_command_shows_its_flags(site):
    page = (site / "commands.html").read_text()
    text = re.sub("<[^>]*>", "", page)
    for name in COMMANDS:
        assert f"usage: biper {name} " in text
    assert "--regularizer_form {sin2,cos2}" in text
    assert 'id="biper-quantization-error"' in page


@pytest.mark.parametrize("name", RUN)
@patch.dict(WEIGHT_QUANTIZERS)  # what a page registers is there for this test alone
@patch.dict(INPUT_QUANTIZERS)
@patch.dict(_ARCHITECTURES)
def test_the_python_of_a_page_runs(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if name == "first_training":  # another training's files are in the place of those that the page's commands leave
        run = Path(shutil.copytree(ROOT / "pretrained_models" / "resnet20_1w1a", "digits/stage2"))
        shutil.move(run / "model.pth.tar", run / "model_best.pth.tar")
    if name == "microcontroller":
        Image.fromarray(np.zeros((40, 50, 3), np.uint8)).save("photo.png")
    code = blocks(DOCS / f"{name}.md", "python")
    assert code
    namespace = {"__name__": name}
    for block in code:
        exec(compile(block, f"{name}.md", "exec"), namespace)


def commands(page):
    """(words of a line, the command's module, its arguments) of what a page's shell blocks call of ours."""
    for block in blocks(page, "bash"):
        for line in block.replace("\\\n", " ").splitlines():
            if not re.match(r"(biper|python|bash|torchrun|srun) (?!- )", line):
                continue
            words = shlex.split(line, comments=True)
            for i, word in enumerate(words):
                path = Path(word)
                if word == "biper":
                    yield line, COMMANDS[words[i + 1]][0], words[i + 2 :]
                    break
                if path.suffix in (".py", ".sh") and path.stem in SCRIPTS:
                    assert (ROOT / path).is_file(), line
                    yield line, SCRIPTS[path.stem], words[i + 1 :]
                    break


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.stem)
def test_commands_of_a_page_have_the_flags_that_it_gives_them(page):
    for line, module, arguments in commands(page):
        if arguments[:1] in (["cifar10"], ["imagenet"]):  # run_stage1.sh FAMILY
            arguments = arguments[1:]
        if "--help" in arguments:
            continue
        given = vars(import_module(f"biper.commands.{module}").build_parser(prog=line).parse_args(arguments))
        recipe = str(given.get("config") or given.get("recipe") or "")
        assert "configs/" not in recipe or (ROOT / recipe).is_file(), line


def test_the_list_of_results_has_every_folder():
    text = (DOCS / "results" / "README.md").read_text()
    assert [path.name for path in (DOCS / "results").iterdir() if path.is_dir() and f"`{path.name}`" not in text] == []
