"""A small recipe, and how tests read what experiments write."""

import csv
import logging
from contextlib import contextmanager

import yaml

RECIPE = {
    "stage1": {"model": "resnet20_1w1a", "dataset": "digits", "image_size": 8, "epochs": 4, "batch_size": 256},
    "stage2": {"dataset": "digits", "image_size": 8, "epochs": 2, "batch_size": 256, "lr": 0.01, "tau": 0.02},
}
RECIPE["stage1"] |= {"lr": 0.05, "freq": 20, "warm_up": True, "warm_up_epochs": 4, "tau": 0.03}
SEEDS = ["--seeds", 0, 3]


def write_recipe(folder, stage2=None, **stage1):
    path = folder / "tiny.yaml"
    sections = {"stage1": RECIPE["stage1"] | stage1, "stage2": RECIPE["stage2"] | (stage2 or {})}
    path.write_text(yaml.safe_dump(sections))
    return path


def rows(path):
    return list(csv.DictReader(path.read_text().splitlines()))


def best(metrics, **labels):
    """The best test top-1 of the rows of metrics.csv that have these labels."""
    return max(float(row["test_top1"]) for row in metrics if all(row[k] == str(v) for k, v in labels.items()))


def checkpoints(folder):
    """Every checkpoint in a folder, with when it was written."""
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*.pth.tar")}


@contextmanager
def interrupted_at(text):
    """Context: what runs in it is interrupted, as by Ctrl-C, when it logs a line that contains the text."""

    class Interrupt(logging.Handler):
        def emit(self, record):
            if text in record.getMessage():
                raise KeyboardInterrupt("SIGINT")

    handler = Interrupt()
    logging.getLogger("biper").addHandler(handler)
    try:
        yield
    finally:
        logging.getLogger("biper").removeHandler(handler)
