"""Whatever is read is read or refused, in one line and soon. The long campaign is `python -m tests.fuzz`."""

import copy
import io
import os
import tarfile
import time
import warnings

import pytest
import torch
from fuzz.campaign import campaign
from fuzz.corpus import fuzzed_model, make_corpus
from fuzz.readers import LAUGHS, MERGES, READERS, guessed
from fuzz.spoil import nest
from PIL import Image

from biper.commands.export import main as export_main
from biper.commands.predict import main as predict_main
from biper.commands.quantization_error import main as quantization_error_main
from biper.data.folder import list_classes, open_image
from biper.data.imagenet import unpack_train
from biper.errors import UsageError, printable, shown
from biper.training.checkpoint import LATEST, save_checkpoint
from biper.training.settings import load_yaml, make_settings, read_yaml

RESUMED, EVALUATED = (next(r for r in READERS if r.name == f"checkpoint, {what}") for what in ("resumed", "evaluated"))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    with fuzzed_model():
        yield make_corpus(tmp_path_factory.mktemp("corpus"))


def test_spoiled_files_are_read_or_refused(tmp_path):
    for name, tally in campaign(240, 0, tmp_path).items():
        assert not tally.tracebacks, name
        assert tally.refused, name


@pytest.mark.parametrize("reader", READERS, ids=lambda reader: reader.name)
def test_good_files_are_read(reader, corpus, tmp_path):
    (tmp_path / LATEST).write_bytes(reader.good(corpus))
    reader.read(corpus, tmp_path / LATEST)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(settings=None), "its settings is None, not a mapping"),
        (lambda c: c.update(epoch=-1), "its epoch is -1, not a whole number from 0"),
        (lambda c: c.update(epoch=7), "do not belong together"),
        (lambda c: c.update(step=10**6), "do not belong together"),
        (lambda c: c.update(history=[{"epoch": 1}]), "its history is"),
        (lambda c: c.update(history=nest(50)), "its history is"),
        (lambda c: c.pop("history"), "its history is missing"),
        (lambda c: c.update(optimizer={"state": {}}), "its optimizer is"),
        (lambda c: c["optimizer"]["param_groups"][0].update(lr="fast"), "optimizer's lr is 'fast', here it is 0.1"),
        (lambda c: c["optimizer"]["param_groups"].pop(), "other parameters"),
        (
            lambda c: c["optimizer"]["state"][0].update(momentum_buffer=torch.zeros(3)),
            "'momentum_buffer' of parameter 0",
        ),
        (lambda c: c["optimizer"]["state"][0]["momentum_buffer"].fill_(torch.nan), "'momentum_buffer' of parameter 0"),
        (lambda c: c["random_state"].update(torch=torch.zeros(3, dtype=torch.uint8)), "its random_state is none"),
        (lambda c: c["random_state"].update(python="x"), "its random_state is"),
        (lambda c: c["not_averaged"].clear(), "what is not averaged of"),
        (lambda c: c["metadata"].update(num_classes="ten"), "its num_classes is 'ten', not a whole number"),
        (
            lambda c: c["metadata"].update(num_classes=10**5, classes=[], class_names=[]),
            "100000 classes are more than any of its tensors has",
        ),
        (lambda c: c["metadata"]["weight_quantizer"].update(freq="20"), "its weight_quantizer is"),
        (lambda c: c["metadata"].update(mean=[0.5, 0.5]), "its mean is"),
        (lambda c: c["metadata"].update(image_size=2**31), "its image_size is 2147483648"),
        (lambda c: c["metadata"].update(model="a\nb"), r"its model is 'a\nb', not a text of one line"),
        (lambda c: c["settings"].update(data_path="a\0b"), r"its settings is"),
        (lambda c: c["settings"].update(seed=10**5000), "is damaged"),
        (
            lambda c: c["state_dict"].update({"bn1.bias": torch.empty(8, device="meta")}),
            "'bn1.bias' is no dense tensor",
        ),
        (lambda c: c["state_dict"].update({"bn1.bias": torch.ones(8).to_sparse()}), "'bn1.bias' is no dense tensor"),
        (lambda c: c["state_dict"].update({"bn1.bias": torch.ones(8) * 1j}), "'bn1.bias' is no dense tensor"),
        (lambda c: c["state_dict"].update({"bn1.bias": torch.ones(1).expand(10**9)}), "'bn1.bias' is no dense tensor"),
        (lambda c: c["state_dict"]["bn1.running_var"].fill_(-1.0), "bn1.running_var is negative"),
        (lambda c: c["metadata"].update(std=[1e-300] * 3), "std"),
        (lambda c: c["metadata"].update(mean=[1e308] * 3), "mean"),
    ],
)
def test_what_a_checkpoint_says_is_checked_before_a_run_goes_on(corpus, tmp_path, change, message):
    contents = copy.deepcopy(corpus.contents[1])
    change(contents)
    save_checkpoint(contents, tmp_path / LATEST)
    with pytest.raises(UsageError) as caught:
        RESUMED.read(corpus, tmp_path / LATEST)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("stage", [1, 2])
def test_weights_that_are_not_finite_are_refused_by_name_everywhere(corpus, tmp_path, refused, stage):
    contents, path = copy.deepcopy(corpus.contents[stage]), tmp_path / LATEST
    contents["state_dict"]["conv2.weight"][0] = torch.nan
    save_checkpoint(contents, path)
    name = "conv2.weight is not finite"
    assert name in refused(path, corpus.images[0], entry=predict_main)
    assert name in refused(path, entry=quantization_error_main)
    assert name in refused("-e", path, family=None, stage=None)
    assert name in refused(path, "-o", tmp_path / "net.safetensors", entry=export_main)
    if stage == 1:
        assert name in refused("--load_ckpt_stage1", path, "--results_dir", tmp_path / "run", stage=2)
        assert name in refused("--resume", "--results_dir", tmp_path)


@pytest.mark.parametrize("text", [LAUGHS, MERGES, "stage1: &a {x: *a}", "[" * 900, "stage1: !!bool x", "# " * 10**6])
def test_yaml_that_is_no_recipe_is_refused_soon(tmp_path, text):
    (tmp_path / "c.yaml").write_text(text)
    start = time.process_time()
    with pytest.raises(UsageError, match=r"c\.yaml") as caught:
        load_yaml(tmp_path / "c.yaml")
    assert time.process_time() - start < 3
    assert "\n" not in str(caught.value)


def test_yaml_may_use_aliases(tmp_path):
    (tmp_path / "c.yaml").write_text("stage1: &a {epochs: 3}\nstage2: {<<: *a, lr: 0.1}\n")
    assert read_yaml(tmp_path / "c.yaml", 2) == {"epochs": 3, "lr": 0.1}


def test_values_that_python_does_not_show(tmp_path):
    (tmp_path / "c.yaml").write_text("stage1: {seed: 0x" + "f" * 5000 + "}")
    with pytest.raises(UsageError, match="seed a value of type int is too large"):
        make_settings("cifar10", 1, read_yaml(tmp_path / "c.yaml", 1))
    with pytest.raises(UsageError, match=r"--data_path 'a\\x00b' is no text of one line"):
        make_settings("cifar10", 1, {"data_path": "a\0b"})
    assert printable("a\nb\udcff") == r"a\nb\udcff"
    assert "\n" not in shown(nest(900)) + shown(torch.ones(50, 50))


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no named pipes")
def test_a_pipe_is_refused_and_not_waited_for(corpus, tmp_path, refused):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    assert "that is no file" in refused(pipe, corpus.images[0], entry=predict_main)
    assert "it is no file" in refused(corpus.packed, pipe, entry=predict_main)
    assert "it is no file" in refused("--config", pipe)
    os.mkfifo(tmp_path / "net.safetensors")
    assert "it is no file" in refused("-e", tmp_path / "net.safetensors", family=None, stage=None)


def test_an_image_that_is_too_long(corpus, tmp_path):
    path = tmp_path / "long.png"
    Image.new("L", (100_000, 1)).save(path)
    with pytest.raises(UsageError, match=r"cannot read the image .*long\.png: it has 100,000 x 1 pixels"):
        open_image(path)


def test_warnings_of_pillow_do_not_stand_around_a_prediction(corpus, tmp_path):
    path = tmp_path / "palette.png"
    Image.new("P", (8, 8)).save(path, transparency=bytes(range(200)))  # of which Pillow warns
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        guessed(corpus.network, path)


def test_a_class_whose_name_is_no_text(tmp_path):
    try:
        (tmp_path / os.fsdecode(b"\xff")).mkdir()
    except OSError:
        pytest.skip("this file system has names in UTF-8 alone")
    with pytest.raises(UsageError, match=r"the class '\\udcff' has a name that is no text"):
        list_classes(tmp_path)


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE])
def test_links_in_an_archive_of_a_class(tmp_path, kind):
    inner, link = io.BytesIO(), tarfile.TarInfo("a.JPEG")
    link.type, link.linkname = kind, "/etc/passwd"
    with tarfile.open(fileobj=inner, mode="w") as images:
        images.addfile(link)
    with tarfile.open(tmp_path / "train.tar", "w") as archive:
        member = tarfile.TarInfo("n01440764.tar")
        member.size = len(inner.getvalue())
        archive.addfile(member, io.BytesIO(inner.getvalue()))
    with pytest.raises(UsageError, match=r"a\.JPEG .* is a link"):
        unpack_train(tmp_path / "train.tar", tmp_path / "train")
