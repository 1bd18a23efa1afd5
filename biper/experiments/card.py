"""The model card of a trained network: what it is, how it was made, what it reaches, and what it is not."""

import math
import re
from collections.abc import Mapping

import yaml

from biper.experiments.plan import Experiment, epochs_text
from biper.experiments.recipe import decides
from biper.experiments.release import MODEL, PACKED, Result
from biper.experiments.run import Run
from biper.experiments.tables import markdown
from biper.training.run_folder import read_settings

LIMITS = """- The best epoch was chosen on the test images, as in the published code, so its top-1 is a
  little optimistic. The last epoch's was not chosen.
- It knows the {classes} classes of its data and nothing else: it gives any image one of them.
- Its accuracy is that on images of this kind and size ({size}x{size}); on others it was not measured."""


def model_card(experiment: Experiment, result: Result, runs: Mapping[int, Run]) -> str:
    """The card in Markdown, of one seed's result and the runs of both stages."""
    recipe, r = experiment.recipe, result
    bits = "weights and activations" if recipe.model.endswith("_1w1a") else "weights"
    images = " --data_path FOLDER" if recipe.dataset == "folder" else ""
    evaluated = "\n".join(f"bash eval.sh HERE/{name}{images}" for name in (MODEL, PACKED))
    rows = [
        ["data", r.data],
        ["epochs", f"{epochs_text(recipe.epochs)} (stage 1, real weights + stage 2, binary weights)"],
        ["seed", str(r.seed)],
        ["**top-1**, binary network, best epoch", f"**{r.float_top1:.2f} %**"],
        ["top-1 of the packed file", f"{r.packed_top1:.2f} %"],
        ["top-1 of the last epoch", f"{r.stage2_last_top1:.2f} %"],
        ["top-1 of stage 1, best epoch", f"{r.stage1_top1:.2f} %"],
        ["quantization error, as published", f"{r.qe:.3f}"],
        ["size", f"{r.float_bytes:,} bytes in float32, {r.packed_bytes:,} packed"],
        ["training time", _training_time(r, runs)],
        ["machine", r.machine],
        ["versions", r.versions_text()],
    ]
    parts = [
        f"---\n{_facts_for_hubs(experiment, result)}---",
        f"# {recipe.model} on {r.data}",
        f"A binary network of BiPer: {bits} of one bit. {experiment.short}".rstrip(),
        markdown(["", ""], rows),
        f"Trained by\n```bash\n{r.command}\n```",
        f"Evaluated, where HERE is this folder, by\n```bash\n{evaluated}\n```",
        "`metrics.csv` has every epoch of both stages. Their settings as a recipe, the defaults included:",
        f"```yaml\n{_settings(runs)}```",
        "Limits:\n\n" + LIMITS.format(classes=r.classes, size=r.image_size),
    ]
    return "\n\n".join(parts)


def _facts_for_hubs(experiment: Experiment, r: Result) -> str:
    """What collections of models read at the head of a card: YAML, by the names of Hugging Face's model cards."""
    named = experiment.recipe.dataset != "folder"
    dataset = experiment.recipe.dataset if named else re.sub(r"[^a-z0-9]+", "-", r.data.lower()).strip("-")
    top1 = {"type": "accuracy", "name": "top-1, test images, best epoch", "value": round(r.float_top1, 2)}
    found = {
        "task": {"type": "image-classification"},
        "dataset": {"name": r.data, "type": dataset},
        "metrics": [top1],
    }
    facts = {
        "license": "mit",
        "library_name": "biper",
        "pipeline_tag": "image-classification",
        "tags": ["binary-neural-network", "quantization", r.model],
        "datasets": [dataset],
        "metrics": ["accuracy"],
        "model-index": [{"name": r.model, "results": [found]}],
    }
    return yaml.safe_dump(facts, sort_keys=False)


def _training_time(r: Result, runs: Mapping[int, Run]) -> str:
    seconds = runs[1].config.epochs * r.stage1_seconds + runs[2].config.epochs * r.stage2_seconds
    if math.isnan(seconds):  # of a run that was begun by an earlier version of biper
        return "-"
    return f"about {seconds / 60:.1f} minutes ({r.stage1_seconds:.1f} s and {r.stage2_seconds:.1f} s an epoch)"


def _settings(runs: Mapping[int, Run]) -> str:
    """What decides what the stages computed, as a recipe: YAML that --config and reproduce.py read."""
    sections = {}
    for stage, run in runs.items():
        stored = read_settings(run.folder, stage)
        kept = {name: list(v) if isinstance(v, tuple) else v for name, v in stored.items() if decides(name)}
        sections[f"stage{stage}"] = kept
    return yaml.safe_dump(sections, sort_keys=False)
