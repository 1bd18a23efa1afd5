import math

import pytest
import torch
from torchvision import transforms

from biper.data.memory import Images, MemoryLoader, RandomCrop
from biper.data.sharding import smallest_share

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CPU = torch.device("cpu")


def numbered(count, size=8):
    """Images whose pixels are random and whose label is their number."""
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randint(256, (count, size, size, 3), dtype=torch.uint8, generator=generator)
    return Images(pixels, torch.arange(count), tuple(map(str, range(count))))


def loader(images, **options):
    return MemoryLoader(images, mean=MEAN, std=STD, device=CPU, **options)


def test_evaluation_gives_every_image_once_in_order_as_torchvision_normalizes():
    images = numbered(10)
    batches = list(loader(images, batch_size=4).epoch())
    assert [len(labels) for _, labels in batches] == [4, 4, 2]
    assert torch.cat([labels for _, labels in batches]).tolist() == list(range(10))
    normalize = transforms.Compose([transforms.ToTensor(), transforms.Normalize(MEAN, STD)])
    expected = torch.stack([normalize(image.numpy()) for image in images.pixels])
    torch.testing.assert_close(torch.cat([x for x, _ in batches]), expected)


def test_training_gives_every_image_once_in_an_order_of_seed_and_epoch():
    def order(seed, epoch):
        train = loader(numbered(50), batch_size=8, augmentation=RandomCrop(1, True), seed=seed)
        return torch.cat([labels for _, labels in train.epoch(epoch)]).tolist()

    orders = [order(seed, epoch) for seed in (0, 1) for epoch in (0, 1)]
    assert all(sorted(o) == list(range(50)) for o in orders)
    assert len({tuple(o) for o in orders}) == 4
    assert order(1, 1) == orders[-1]


def test_epochs_may_be_read_in_any_order():
    train = loader(numbered(20), batch_size=8, augmentation=RandomCrop(2, True), seed=3)
    later = [x for x, _ in train.epoch(5)]
    list(train.epoch(1))
    assert all(torch.equal(a, b) for a, b in zip(later, (x for x, _ in train.epoch(5)), strict=True))


@pytest.mark.parametrize("size", [6, 8])
def test_crops_have_the_distribution_of_torchvision(size):
    """Which of the crop's (2*pad+1)^2 corners and flips occurs: ours against torchvision's own, chi-squared."""
    pad, draws = 1, 20_000
    image = torch.arange(1, size * size + 1, dtype=torch.uint8).reshape(1, size, size)  # every pixel is its place
    theirs = transforms.Compose([transforms.RandomCrop(size, pad), transforms.RandomHorizontalFlip()])
    possible = set()
    torch.manual_seed(0)
    for _ in range(400):
        possible.add(tuple(theirs(image).flatten().tolist()))
    assert len(possible) == 2 * (2 * pad + 1) ** 2
    images = Images(image[0, :, :, None].expand(draws, size, size, 3), torch.zeros(draws).long(), ("a",))
    train = MemoryLoader(
        images,
        batch_size=draws,
        mean=(0, 0, 0),
        std=(1 / 255,) * 3,
        device=CPU,
        augmentation=RandomCrop(pad, True),
    )
    ((ours, _),) = train.epoch(0)
    found, counts = ours[:, 0].flatten(1).unique(dim=0, return_counts=True)
    assert {tuple(row) for row in found.int().tolist()} == possible
    expected = draws / len(possible)
    chi_squared = ((counts - expected) ** 2 / expected).sum().item()
    assert chi_squared < 17 + 5 * math.sqrt(2 * 17)  # 17 degrees of freedom, five standard deviations


def test_alternating_flips_take_each_image_in_turn():
    images = numbered(40)
    train = loader(images, batch_size=16, augmentation=RandomCrop(0, True, alternating=True), seed=5)
    ((plain, _),) = loader(images, batch_size=40).epoch()
    flipped = []
    for epoch in range(4):
        shown = {int(y): x for batch in train.epoch(epoch) for x, y in zip(*batch, strict=True)}
        flipped.append([torch.equal(shown[i], plain[i].flip(2)) for i in range(40)])
        assert all(f or torch.equal(shown[i], plain[i]) for i, f in enumerate(flipped[-1]))
    assert 8 < sum(flipped[0]) < 32
    assert flipped[0] == flipped[2] == [not f for f in flipped[1]] == [not f for f in flipped[3]]


def test_reflections_are_those_of_torchvision():
    images = numbered(3, size=6)
    train = loader(images, batch_size=3, augmentation=RandomCrop(2, False, reflect=True))
    padded = transforms.functional.pad(images.pixels.permute(0, 3, 1, 2), 2, padding_mode="reflect")
    assert torch.equal(train.pixels.permute(0, 3, 1, 2), padded)


def test_cutout_hides_a_square_whose_centre_is_anywhere():
    white = Images(torch.full((400, 8, 8, 3), 255, dtype=torch.uint8), torch.arange(400), ("a",) * 400)
    train = loader(white, batch_size=100, augmentation=RandomCrop(0, False, cutout=4))
    hidden = torch.cat([(x == 0).all(1) for x, _ in train.epoch(0)])  # (400, 8, 8)
    rows, columns = (hidden.any(axis) for axis in (2, 1))
    assert torch.equal(hidden, rows[:, :, None] & columns[:, None, :])
    heights = rows.sum(1)
    assert (heights.max(), heights.min()) == (4, 2)  # a square at the border is cut
    assert hidden.float().mean((1, 2)).gt(0).all()
    assert hidden.any(0).all()


def test_no_flips_where_they_are_off():
    train = loader(numbered(30), batch_size=30, augmentation=RandomCrop(0, False))
    ((x, labels),) = train.epoch(0)
    ((plain, _),) = loader(numbered(30), batch_size=30).epoch()
    torch.testing.assert_close(x, plain[labels])


def test_a_last_batch_too_small_for_batch_norm_is_left_out_of_training_only():
    images = numbered(9)
    train = loader(images, batch_size=4, augmentation=RandomCrop(1, True))
    assert (len(train), train.count, [len(y) for _, y in train.epoch(0)]) == (2, 8, [4, 4])
    assert loader(images, batch_size=4).count == 9
    assert loader(images, batch_size=5, augmentation=RandomCrop(1, True)).count == 9
    assert loader(numbered(17), batch_size=10, augmentation=RandomCrop(1, True), replicas=3).count == 10  # 3, 3, 1


@pytest.mark.parametrize("batch", range(1, 40))
@pytest.mark.parametrize("replicas", [1, 2, 3, 4, 7])
def test_smallest_share_is_that_of_chunk(batch, replicas):
    assert smallest_share(batch, replicas) == len(torch.arange(batch).chunk(replicas)[-1])
