"""The streamed loaders: which images come when, and what is done to them. Both readers where they differ."""

import os
import shutil

import numpy as np
import pytest
import torch
from conftest import photographs
from PIL import Image
from torchvision import transforms

from biper.data.loaders import Shard, build_loaders
from biper.data.pillow import count_cores
from biper.data.sharding import Order
from biper.data.stream import Augmentation, StreamLoader, draw, rotate
from biper.errors import UsageError
from biper.training.settings import make_settings

CPU = torch.device("cpu")
WHOLE = Shard()


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """13 training and 5 test images in each of two classes, all of different sizes."""
    return photographs(tmp_path_factory.mktemp("photographs"), train=13, test=5)


@pytest.fixture(params=["pillow", "workers", "dali"])
def reader(request):
    """The settings that choose a reader."""
    if request.param == "dali":
        pytest.importorskip("nvidia.dali")
    return {"use_dali": request.param == "dali", "workers": 0 if request.param == "pillow" else 2}


def loaders(path, shard=WHOLE, dataset="folder", **given):
    given = {"image_size": 32, "batch_size": 8, "batch_size_test": 4, "seed": 5} | given
    config = make_settings("imagenet", 1, given | {"dataset": dataset, "data_path": str(path)})
    return build_loaders(config, CPU, shard=shard)


def same(a, b):
    """Whether two lists of batches are equal."""
    return len(a) == len(b) and all(
        torch.equal(x, y) and torch.equal(k, m) for (x, k), (y, m) in zip(a, b, strict=True)
    )


def merged(parts):
    """The batches of several shards, step by step; one that has no part in a step is passed over."""
    steps = max(len(part) for part in parts)
    chosen = [[part[step] for part in parts if step < len(part)] for step in range(steps)]
    return [(torch.cat([x for x, _ in step]), torch.cat([y for _, y in step])) for step in chosen]


@pytest.mark.parametrize("size", [1, 2, 3])
def test_shards_see_every_image_once_and_as_one_process_sees_them(data, reader, size):
    """26 training images in batches of 18, the last of 8 in uneven parts; 10 test images in batches of 4.

    The light is a matrix product: its rounding may turn the last place of a pixel near 256, 2**-15 of a std of 57.
    """
    shards = [loaders(data, Shard(rank, size), batch_size=18, **reader) for rank in range(size)]
    whole = loaders(data, batch_size=18)
    for epoch in (0, 1):
        expected = list(whole.train.epoch(epoch))[: len(shards[0].train)]
        parts = [list(part.train.epoch(epoch)) for part in shards]
        assert torch.equal(torch.cat([y for _, y in merged(parts)]), torch.cat([y for _, y in expected]))
        assert torch.cat([y for _, y in merged(parts)]).bincount().tolist() == [13, 13]
        for (x, _), (y, _) in zip(merged(parts), expected, strict=True):
            torch.testing.assert_close(x, y, atol=0.08 if reader["use_dali"] else 2e-6, rtol=0)
    test = merged([list(part.test.epoch()) for part in shards])
    assert sum(len(y) for _, y in test) == shards[0].test.count == 10
    assert torch.cat([y for _, y in test]).tolist() == [0] * 5 + [1] * 5
    assert [len(part.train) for part in shards] == [2] * size


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("shuffled", [True, False])
def test_every_image_once_an_epoch(size, shuffled):
    orders = [Order(31, 12, shuffled, seed=1, shard=Shard(rank, size)) for rank in range(size)]
    for epoch in (0, 1):
        seen = [o.batch(o.indices(epoch), step) for step in range(len(orders[0])) for o in orders]
        assert sorted(np.concatenate(seen)) == list(range(31))
    assert [o.weight(0) for o in orders] == [1.0] * size
    assert sum(o.weight(len(o) - 1) for o in orders) == pytest.approx(size)
    assert len({tuple(Order(31, 12, True, seed).indices(epoch)) for seed in (0, 1) for epoch in (0, 1)}) == 4


def test_an_epoch_is_taken_up_where_it_was_left(data, reader):
    train = loaders(data, **reader).train
    whole = list(train.epoch(2))
    assert same(list(train.epoch(2, first_step=1)), whole[1:])
    assert list(train.epoch(2, first_step=4)) == []
    assert same(list(train.epoch(2)), whole)


def test_reading_leaves_torchs_random_state_alone(data, reader):
    """A checkpoint keeps it, and an epoch that is taken up again is read in two passes."""
    before = torch.get_rng_state()
    list(loaders(data, **reader).train.epoch(0))
    assert torch.equal(torch.get_rng_state(), before)


def test_a_reader_may_be_left_in_the_middle(data, reader):
    train = loaders(data, **reader).train
    next(iter(train.epoch(0)))
    assert same(list(train.epoch(1)), list(loaders(data, **reader).train.epoch(1)))


def test_evaluation_is_torchvisions(data):
    """Against its transforms, which the published code uses, to the last digit."""
    normalize = transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    steps = [transforms.Resize(37), transforms.CenterCrop(32), transforms.ToTensor(), normalize]
    files = sorted((data / "val").glob("*/*"), key=lambda p: (p.parent.name, p.name))
    expected = torch.stack([transforms.Compose(steps)(Image.open(file).convert("RGB")) for file in files])
    ours = torch.cat([x for x, _ in loaders(data).test.epoch()])
    torch.testing.assert_close(ours, expected)


def test_flips_light_and_turns_have_their_distributions():
    augmentation = Augmentation(flip=True, degrees=20, lighting=0.1)
    draws = draw(augmentation, 20_000, slice(0, 20_000), np.random.default_rng(0), CPU)
    assert draws.flipped.float().mean().item() == pytest.approx(0.5, abs=0.02)
    assert draws.angle.abs().max().item() == pytest.approx(20, abs=0.1)
    assert draws.angle.std().item() == pytest.approx(20 / 3**0.5, rel=0.02)
    assert draws.light.std(0).tolist() == pytest.approx([0.1] * 3, rel=0.03)
    still = draw(Augmentation(flip=False), 100, slice(0, 100), np.random.default_rng(0), CPU)
    assert not still.flipped.any()
    assert still.angle.abs().sum() == still.light.abs().sum() == 0


def test_light_moves_along_the_colours_of_imagenet():
    """What torchvision-style PCA lighting adds: directions times (alpha times eigenvalues), before normalization."""
    loader = StreamLoader(None, Order(1, 1, True), mean=(0.0,) * 3, std=(1.0,) * 3, device=CPU, augmentation=None)
    vectors = np.array([[-0.5675, 0.7192, 0.4009], [-0.5808, -0.0045, -0.8140], [-0.5836, -0.6948, 0.4203]])
    assert vectors.T @ vectors == pytest.approx(np.eye(3), abs=1e-3)  # they are directions, at right angles
    alpha = np.array([0.1, -0.2, 0.05])
    expected = (vectors * alpha * np.array([0.2175, 0.0188, 0.0045])).sum(1)
    ours = torch.tensor(alpha).float() @ loader.colours.T / 255
    assert ours.numpy() == pytest.approx(expected, rel=1e-4)


def test_a_turn_is_torchvisions_rotation():
    square = torch.rand(1, 3, 33, 33, generator=torch.Generator().manual_seed(0))
    for angle in (-20.0, 0.0, 7.5, 20.0):
        expected = transforms.functional.rotate(square, angle)
        ours = rotate(square, torch.tensor([angle]))
        assert (ours == expected).float().mean() > 0.99  # nearest pixel: a tie may fall on the other side
    assert torch.equal(rotate(square, torch.zeros(1)), square)


@pytest.fixture
def damaged(tmp_path, data):
    """A copy of the data with a cut and a foreign file in training, and functions to damage the test images."""
    path = tmp_path / "damaged"
    shutil.copytree(data, path)
    first = path / "train" / "n01440764"
    cut = first / "n01440764_3.JPEG"
    cut.write_bytes(cut.read_bytes()[:700])
    (first / "notes.txt").write_text("no image")
    return path


def test_training_names_and_replaces_a_damaged_image(damaged, reader, caplog):
    caplog.set_level("INFO", "biper")
    train = loaders(damaged, **reader).train
    for epoch in (0, 1):
        assert sum(len(y) for _, y in train.epoch(epoch)) == 27
    told = [record.getMessage() for record in caplog.records]
    assert len(told) == 2  # once each
    for name in ("n01440764_3.JPEG", "notes.txt"):
        assert any(name in text and "another is taken" in text for text in told)
    assert train.replaced == 4  # in two epochs


def test_evaluation_names_a_damaged_image_and_fails(damaged, reader):
    victim = damaged / "val" / "n01443537" / "n01443537_2.JPEG"
    victim.write_bytes(victim.read_bytes()[:500])
    test = loaders(damaged, **reader).test
    with pytest.raises(UsageError, match=f"^cannot read the image {victim}"):
        list(test.epoch())
    victim.write_bytes(b"")
    with pytest.raises(UsageError, match=f"^cannot read the image {victim}"):
        list(test.epoch())


@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("damage", ["ff", "random", "start", "table", "end"])
def test_damage_in_the_middle_is_found_by_both(tmp_path, reader, damage, progressive):
    """Bytes of 0xFF, random bytes, a second start of image, a missing quantization table, a missing end."""
    data = photographs(tmp_path, train=6, test=2, names=("a", "b"), size=(200, 150))
    victim = data / "train" / "b" / "b_2.JPEG"
    Image.open(victim).save(victim, quality=95, progressive=progressive)
    content = bytearray(victim.read_bytes())
    middle, table = len(content) // 2, content.index(b"\xff\xdb")
    noise = np.random.default_rng(1).integers(0, 256, 400, np.uint8).tobytes()
    if damage == "table":
        del content[table : table + 2 + int.from_bytes(content[table + 2 : table + 4], "big")]
    elif damage == "end":
        del content[-2:]
    else:
        piece = {"ff": b"\xff" * 400, "random": noise, "start": b"\xff\xd8" * 200}[damage]
        content[middle : middle + 400] = piece
    victim.write_bytes(content)
    try:
        with Image.open(victim) as image:
            image.load()
        readable = True
    except Exception:
        readable = False
    train = loaders(data, **reader).train
    seen = list(train.epoch(0))
    assert sum(len(y) for _, y in seen) == 12
    assert train.replaced == (0 if readable else 1)
    expected = list(loaders(data).train.epoch(0))
    for (x, k), (y, m) in zip(seen, expected, strict=True):
        assert torch.equal(k, m)
        assert (x - y).abs().mean() < 0.01


def test_nothing_but_damaged_images(tmp_path, reader):
    for split in ("train", "val"):
        for name in ("a", "b"):
            (tmp_path / split / name).mkdir(parents=True)
            for i in range(20):
                (tmp_path / split / name / f"{i}.jpg").write_text("no image")
    with pytest.raises(UsageError, match="20 images in a row are damaged"):
        list(loaders(tmp_path, **reader).train.epoch())


@pytest.mark.parametrize("kind", ["png", "gif", "bmp", "webp", "grey.jpg", "cmyk.jpg", "progressive.jpg", "alpha.png"])
def test_both_readers_see_the_same_in_every_format(tmp_path, kind):
    pytest.importorskip("nvidia.dali")
    colours = Image.fromarray(np.random.default_rng(0).integers(0, 256, (6, 7, 3), np.uint8)).resize((90, 70))
    mode = {"grey": "L", "cmyk": "CMYK", "alpha": "RGBA", "gif": "P"}.get(kind.split(".")[0], "RGB")
    options = {"progressive": True} if kind.startswith("progressive") else {}
    for split in ("train", "val"):
        (tmp_path / split / "a").mkdir(parents=True)
        colours.convert(mode).save(tmp_path / split / "a" / f"0.{kind}", **options)
        colours.convert(mode).save(tmp_path / split / "a" / f"1.{kind}", **options)
    (pillow, _), (dali, _) = (next(iter(loaders(tmp_path, use_dali=d, workers=0).test.epoch())) for d in (False, True))
    assert (pillow - dali).abs().mean() < 0.01


def test_workers_are_no_more_than_the_cores(data):
    assert loaders(data, workers=64).train.reader.loader.num_workers == count_cores()


@pytest.mark.skipif("BIPER_TEST_IMAGENET" not in os.environ, reason="BIPER_TEST_IMAGENET: a folder of photographs")
def test_dali_agrees_with_torchvision_on_real_photographs(tmp_path):
    """200 photographs of all sizes, three of them grey: within 0.01 in normalized units, each of them."""
    pytest.importorskip("nvidia.dali")
    (tmp_path / "val").symlink_to(os.environ["BIPER_TEST_IMAGENET"])
    (tmp_path / "train").symlink_to(os.environ["BIPER_TEST_IMAGENET"])
    tests = [loaders(tmp_path, image_size=224, batch_size_test=32, use_dali=d, workers=2).test for d in (False, True)]
    apart = [(x - y).abs().mean((1, 2, 3)) for (x, _), (y, _) in zip(*(t.epoch() for t in tests), strict=True)]
    assert len(torch.cat(apart)) == 200
    assert torch.cat(apart).max() < 0.01
