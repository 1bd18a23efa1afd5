"""The results that are committed: every number in a table is that of the metrics.csv or result.json beside it."""

import csv
import json
import os
import re
import statistics
import subprocess
from pathlib import Path

import pytest
import yaml
from conftest import ROOT

from biper.models.checkpoint import read_checkpoint
from biper.packed.file import read

REPRODUCED = sorted(path.parent for path in ROOT.glob("docs/results/*/results.csv"))
ABLATIONS = sorted(path.parent for path in ROOT.glob("docs/results/ablation_*/metrics.csv"))
MODELS = sorted(path.parent for path in ROOT.glob("pretrained_models/*/result.json"))
REAL = os.environ.get("BIPER_TEST_CIFAR10")
RUNS = {  # of the variants of a study, where the folder of their runs is not named like them
    "biper": "freq_20",
    "biper, one stage": "binary_from_start",
    "two stages": "freq_20",
    "warm start": "freq_20",
    "sin², published": "freq_20",
    "off": "regularizer_off",
    "cos², opposite": "regularizer_cos2",
    "binary from the start": "binary_from_start",
    "fresh start": "fresh_start",
}
METHODS = {"quantizers": "quantizer", "input_quantizers": "input_quantizer", "activations": "activation"}


def rows(path):
    return list(csv.DictReader(path.read_text().splitlines()))


def tables(text):
    """The lines of the tables in a Markdown text that hold a number with a decimal point."""
    return [line for line in text.splitlines() if line.startswith("|") and re.search(r"\d\.\d", line)]


def cells(line):
    return [cell.strip() for cell in line.strip("|").split("|")]


def named_rows(text):
    """The rows of the tables in a Markdown text that hold a number with a decimal point: (title, cell) pairs."""
    titles, lines = [], text.splitlines()
    for line, following in zip(lines, [*lines[1:], ""], strict=True):
        if re.match(r"\|( -+ \|)+$", following):
            titles = cells(line)
        elif line.startswith("|") and re.search(r"\d\.\d", line):
            yield set(zip(titles, cells(line), strict=True))


def best(metrics, **labels):
    return max(float(row["test_top1"]) for row in metrics if all(row[k] == v for k, v in labels.items()))


def run_of(row, base, study):
    """The folder of the runs of a variant; `base` is the first variant of its table."""
    if study == "recipe":  # a user's choices, of which those of stage 2 alone have the recipe's stage 1
        return "freq_20" if row["variant"] == base else "choice_" + re.sub(r"[^\w.]+", "_", row["variant"]).strip("_")
    if row["variant"] == base and study in METHODS:
        return "freq_20"
    if study in METHODS and row["variant"] not in RUNS:
        return f"{METHODS[study]}_{row['variant']}"
    if fitted := re.fullmatch(r"freq ([\d.]+) / std\(w\)", row["variant"]):
        return f"freq_scale_{fitted[1]}"
    if not re.fullmatch(r"[\d.]+, [\d.]+", row["variant"]):
        return RUNS.get(row["variant"], row["variant"].replace(" ", "_"))
    (one, two), (own_one, own_two) = (name.split(", ") for name in (row["variant"], base))  # learning rates
    if one != own_one:
        return f"stage1_lr_{one}"
    return f"stage2_lr_{two}" if two != own_two and row["stage"] == "2" else "freq_20"


def require_equal(row, values, digits=2):
    """A row of a CSV table is made of these values, one a seed."""
    found = [float(row[name]) for name in row if name.startswith("seed_")]
    assert found == pytest.approx(values, rel=1e-9)
    assert float(row["mean"]) == pytest.approx(statistics.fmean(values), rel=1e-9)
    assert int(row["n"]) == len(values)
    if len(values) > 1:
        assert float(row["std"]) == pytest.approx(statistics.stdev(values), rel=1e-9, abs=1e-12)
    else:
        assert row["std"] == ""
    return f"{statistics.fmean(values):,.{digits}f}"


def test_there_are_results():
    assert REPRODUCED
    assert ABLATIONS
    assert MODELS


@pytest.mark.parametrize("folder", REPRODUCED, ids=lambda p: p.name)
def test_tables_of_recipes(folder):
    metrics, text = rows(folder / "metrics.csv"), (folder / "results.md").read_text()
    table = {row["quantity"]: row for row in rows(folder / "results.csv")}
    seeds = list(dict.fromkeys(row["seed"] for row in metrics))
    for stage in "12":
        own = [[r for r in metrics if (r["seed"], r["stage"]) == (seed, stage)] for seed in seeds]
        shown = require_equal(table[f"stage{stage}_top1"], [best(history) for history in own])
        assert re.search(rf"stage {stage}, .*best top-1.* \| {shown} \|", text)
        require_equal(table[f"stage{stage}_last_top1"], [float(history[-1]["test_top1"]) for history in own])
    bests = [max((r for r in metrics if (r["seed"], r["stage"]) == (s, "2")), key=_top1) for s in seeds]
    require_equal(table["qe"], [float(row["qe"]) for row in bests], 3)
    require_equal(table["float_top1"], [float(row["test_top1"]) for row in bests])
    require_equal(table["packed_top1"], [float(row["test_top1"]) for row in bests])


def _top1(row):
    return float(row["test_top1"])


def _relative(layer):
    squared = float(layer["squared"])
    return squared / (squared + float(layer["scale"]) ** 2)


@pytest.mark.parametrize("folder", ABLATIONS, ids=lambda p: p.name)
def test_tables_of_ablations(folder):
    metrics, layers = rows(folder / "metrics.csv"), rows(folder / "layers.csv")
    seeds = list(dict.fromkeys(row["seed"] for row in metrics))
    studies = [path for path in folder.glob("*.csv") if path.stem not in ("metrics", "layers")]
    assert studies
    for path in studies:
        text = path.with_suffix(".md").read_text()
        table = rows(path)
        for row in table:
            if not row["mean"]:  # of weights without a frequency
                assert row["quantity"] == "freq·std(w)"
                continue
            run = run_of(row, table[0]["variant"], path.stem)
            own = [[r for r in metrics if (r["run"], r["seed"], r["stage"]) == (run, s, row["stage"])] for s in seeds]
            if row["quantity"] == "last top-1 (%)":
                values = [_top1(history[-1]) for history in own]
                shown = require_equal(row, values) if row["stage"] == "2" else ""  # the table has stage 2's
            elif row["quantity"].startswith("top-1"):
                values = [max(map(_top1, history)) for history in own]
                shown = require_equal(row, values)
            elif row["quantity"] in ("QE", "squared error", "freq·std(w)"):
                column = {"QE": "l1", "squared error": "squared", "freq·std(w)": "freq_std"}[row["quantity"]]
                of_run = [r for r in layers if (r["run"], r["stage"]) == (run, row["stage"])]
                by_seed = [[float(r[column]) for r in of_run if r["seed"] == seed] for seed in seeds]
                values = [sum(layer) if column != "freq_std" else statistics.fmean(layer) for layer in by_seed]
                shown = require_equal(row, values, 3)
            elif row["quantity"] == "relative error":
                of_run = [r for r in layers if (r["run"], r["stage"]) == (run, row["stage"])]
                values = [statistics.fmean(map(_relative, (r for r in of_run if r["seed"] == seed))) for seed in seeds]
                shown = require_equal(row, values, 3)
            assert re.search(rf"^\| {re.escape(row['variant'])} \|.* {re.escape(shown)}", text, re.MULTILINE)


def test_documents_show_what_the_results_say():
    """Every row of a table with results is one that reproduce.py or ablation.py wrote, or some columns of it."""
    pages = [*ROOT.glob("docs/results/*/*.md"), *(folder / "README.md" for folder in MODELS)]
    written = [row for page in pages for row in named_rows(page.read_text())]
    for name in ("results.md", "recipes.md"):
        shown = list(named_rows((ROOT / "docs" / name).read_text().split("\n## Earlier checks")[0]))
        assert shown
        for row in shown:
            assert any(row <= whole for whole in written), row


def test_recipes_tell_what_the_stopped_run_logged():
    logged = rows(ROOT / "docs" / "results" / "adamw_saturates" / "metrics.csv")
    first, last = (max((r for r in logged if r["stage"] == s), key=lambda r: int(r["epoch"])) for s in "12")
    text = " ".join((ROOT / "docs" / "recipes.md").read_text().split())
    assert f"{first['epoch']} + {last['epoch']} were trained" in text
    assert f"Training top-1 was {float(last['train_top1']):.2f} %" in text
    assert f"from {float(first['qe']):.3f} after stage 1 to {float(last['qe']):.3f}" in text


def test_what_each_part_brings_is_what_the_runs_on_the_gpu_logged():
    folder = ROOT / "docs" / "results" / "recipe_parts_h200"
    ended, logged = {}, rows(folder / "metrics.csv")
    for row in logged:
        if row["stage"] == "2":
            ended[row["run"]] = row
    shown = [line.strip("| ").split(" | ") for line in tables((folder / "parts.md").read_text())]
    base = _top1(ended["freq_20"])
    ran = ["freq_20", "cosine", "published_regularizer", "lr_0.1", "hardtanh", "hardtanh_and_BiPer_s_own_input_sign"]
    for run, (_, top1, difference, train, error) in zip(ran, shown, strict=True):
        row = ended.get(run) or ended[f"choice_{run}"]
        assert int(row["epoch"]) == 15
        assert _top1(row) == max(_top1(r) for r in logged if (r["run"], r["stage"]) == (row["run"], "2"))
        assert (top1, train) == (f"{_top1(row):.2f}", f"{float(row['train_top1']):.2f}")
        assert difference.strip() == ("" if run == "freq_20" else f"{_top1(row) - base:+.2f}")
        assert error == f"{float(row['qe']):.3f}"


def test_the_guide_shows_what_the_studies_say():
    shown = re.findall(
        r"^\| (\w+) \| ([\w, ]+) \| ([\d.]+ ± [\d.]+) \|$", (ROOT / "docs" / "compare.md").read_text(), re.M
    )
    found = []
    for study, part in (("quantizers", "weights"), ("input_quantizers", "inputs"), ("activations", "activation")):
        for row in rows(ROOT / "docs" / "results" / "ablation_methods_cifar10" / f"{study}.csv"):
            if (row["stage"], row["quantity"]) == ("2", "top-1 (%)"):
                found.append((part, row["variant"], f"{float(row['mean']):.2f} ± {float(row['std']):.2f}"))
    assert shown == found


@pytest.mark.parametrize("folder", MODELS, ids=lambda p: p.name)
def test_model_cards(folder):
    facts, card = json.loads((folder / "result.json").read_text()), (folder / "README.md").read_text()
    metrics = rows(folder / "metrics.csv")
    top1 = best(metrics, stage="2")
    assert facts["float_top1"] == facts["packed_top1"] == pytest.approx(top1)
    assert f"**{top1:.2f} %**" in card
    (entry,) = yaml.safe_load(card.split("---\n")[1])["model-index"]
    assert (entry["name"], entry["results"][0]["metrics"][0]["value"]) == (facts["model"], round(top1, 2))
    assert read(folder / "packed.safetensors").top1 == pytest.approx(top1)
    contents = read_checkpoint(folder / "model.pth.tar")
    assert contents["history"][-1]["test_top1"] == pytest.approx(top1)
    assert "optimizer" not in contents
    assert facts["packed_bytes"] == (folder / "packed.safetensors").stat().st_size
    readme = (ROOT / "README.md").read_text()
    assert f"{top1:.2f}" in readme
    assert f"{top1:.2f}" in (ROOT / "pretrained_models" / "README.md").read_text()


@pytest.mark.skipif(not REAL, reason="BIPER_TEST_CIFAR10 is not set")
@pytest.mark.parametrize("name", ["model.pth.tar", "packed.safetensors"])
@pytest.mark.parametrize("folder", MODELS, ids=lambda p: p.name)
def test_eval_gives_the_number_on_the_card(folder, name, shell):
    top1 = json.loads((folder / "result.json").read_text())["float_top1"]
    result = shell("bash", ROOT / "eval.sh", folder / name, "--data_path", REAL)
    assert result.returncode == 0, result.stderr
    assert f"top-1 {top1:.2f} %" in result.stdout


def test_the_repository_is_small():
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("not a git checkout")
    sizes = [
        (Path(name), (ROOT / name).stat().st_size) for name in listed.stdout.split("\0") if (ROOT / name).is_file()
    ]
    folder = {
        name: sum(size for path, size in sizes if path.parts[0] == name) for name in ("unfinished", "pretrained_models")
    }
    # A training under way keeps one checkpoint, with its optimizer, in unfinished/; it is replaced and not added to.
    assert [(path, size) for path, size in sizes if size > 2_000_000 and path.parts[0] != "unfinished"] == []
    assert folder["unfinished"] < 3_000_000
    assert folder["pretrained_models"] < 8_000_000
