import math
from dataclasses import dataclass, field

import pytest
import torch
import torch.nn.functional as F

from biper import create_model
from biper.data.digits import read_digits
from biper.data.memory import Images, MemoryLoader, RandomCrop
from biper.errors import TrainingDiverged
from biper.nn.losses import periodic_regularizer
from biper.training.loop import Totals, check_finite, evaluate, train_one_epoch
from biper.training.loss import LossTerm, make_loss_terms
from biper.training.process import DelayedRead
from biper.training.step import PlainStep

CPU = torch.device("cpu")


@dataclass
class Watch:
    print_freq: int = 1
    seen: list = field(default_factory=list)

    def advance(self, step, running):
        self.seen.append((step, running))


def loader(train, count=300, batch_size=128):
    images = read_digits(train, 8)
    images = Images(images.pixels[:count], images.labels[:count], images.classes)
    shown = {"mean": (0.3,) * 3, "std": (0.4,) * 3, "augmentation": RandomCrop(0, False) if train else None}
    return MemoryLoader(images, batch_size=batch_size, device=CPU, **shown)


def network(**options):
    torch.manual_seed(0)
    return create_model("resnet20_1w1a", freq=20.0, **options)


def sgd(model, lr=0.05):
    return torch.optim.SGD(model.parameters(), lr, momentum=0.9)


def test_evaluation_is_exact_over_an_uneven_last_batch():
    model, test = network(), loader(False)
    metrics = evaluate(model, test, Watch())
    with torch.no_grad():
        logits = torch.cat([model(x) for x, _ in test.epoch()])
    labels = test.labels
    best = logits.argsort(1, descending=True)
    assert metrics.count == 300
    assert metrics.top1 == 100 * (best[:, 0] == labels).double().mean().item()
    assert metrics.top5 == pytest.approx(100 * (best[:, :5] == labels[:, None]).any(1).double().mean().item())
    assert metrics.loss == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-6)
    assert metrics.regularizer == 0  # evaluation's loss is the cross-entropy alone
    assert not model.training


def test_evaluation_with_fewer_than_five_classes():
    images = Images(torch.zeros(6, 8, 8, 3, dtype=torch.uint8), torch.tensor([0, 1, 2] * 2), ("a", "b", "c"))
    test = MemoryLoader(images, batch_size=4, mean=(0.5,) * 3, std=(0.5,) * 3, device=CPU)
    assert evaluate(network(num_classes=3), test, Watch()).top5 == 100


@pytest.mark.parametrize("stage", [1, 2])
def test_training_learns(stage):
    """Against a network that does not look at the images: at best a loss of log(10), and 10 +- 0.8 % are right."""
    torch.set_num_threads(1)  # between two of them so small images are mostly waited for
    model, train, watch = network(stage=stage), loader(True, 1437, batch_size=32), Watch(print_freq=2)
    step = PlainStep(model, sgd(model, lr=0.01), make_loss_terms(0.037))
    epochs = [train_one_epoch(step, train, epoch=e, watcher=watch) for e in range(4)]
    assert epochs[-1].loss < 0.9 * math.log(10)
    assert epochs[-1].top1 > 25
    assert [step for step, running in watch.seen[:3] if running] == [2]
    assert watch.seen[1][1].count == 64


def test_regularizer_enters_the_gradient_and_is_reported():
    def weights(tau):
        model = network()
        step = PlainStep(model, sgd(model), make_loss_terms(tau))
        metrics = train_one_epoch(step, loader(True, 128), epoch=0, watcher=Watch())
        return model.layer1[0].conv1.weight.detach(), metrics.regularizer

    (without, none), (with_it, some) = weights(0.0), weights(10.0)
    assert none == 0
    assert some > 1
    assert torch.sin(20 * with_it).square().mean() < torch.sin(20 * without).square().mean()


def test_a_term_that_is_added_enters_loss_gradient_and_metrics():
    """A teacher's: its mean is over the images of the batch. And one of the parameters alone."""
    torch.manual_seed(1)
    teacher = create_model("resnet20_32w32a").eval()

    def distillation(model, images, logits, labels):
        with torch.no_grad():
            wanted = teacher(images)
        assert logits.shape == (len(labels), 10)
        return F.mse_loss(logits, wanted)

    def norm(model, images, logits, labels):
        return model.linear.weight.square().sum()

    def gradients(**more):
        model = network()
        optimizer = torch.optim.SGD(model.parameters(), 0.0)
        terms = make_loss_terms(0.1) | more
        metrics = train_one_epoch(PlainStep(model, optimizer, terms), Weighted(), epoch=0, watcher=Watch())
        return metrics, model.linear.weight.grad, model.linear.weight.detach()

    train = loader(True, 128)

    class Weighted:
        """One of several processes, whose images count twice."""

        device, epoch = CPU, train.epoch

        def weight(self, step):
            return 2.0

    plain, without, weight = gradients()
    one, with_norm, _ = gradients(norm=LossTerm(norm, of_images=False))
    torch.testing.assert_close(with_norm - without, 2 * weight, rtol=1e-4, atol=1e-5)
    assert one.terms["norm"] == pytest.approx(weight.square().sum().item(), rel=1e-6)
    assert (one.loss, one.regularizer) == (plain.loss, plain.regularizer)
    two, with_teacher, _ = gradients(teacher=LossTerm(distillation))
    alone, of_teacher, _ = gradients(loss=LossTerm(distillation))
    torch.testing.assert_close(with_teacher - without, of_teacher, rtol=1e-4, atol=1e-5)
    assert two.terms["teacher"] == alone.loss > 0
    assert list(two.terms) == ["loss", "regularizer", "teacher"]


def test_the_loss_is_the_papers():
    """Bit for bit: the cross-entropy, weighted by the process's images, plus tau times the regularizer."""
    model, train = network(), loader(True, 128)
    reference = network()
    train_one_epoch(PlainStep(model, sgd(model), make_loss_terms(0.1)), train, epoch=0, watcher=Watch())
    ((images, labels),) = train.epoch(0)
    loss = torch.add(F.cross_entropy(reference.train()(images), labels) * 1.0, periodic_regularizer(reference, 0.1))
    loss.backward()
    for (name, ours), theirs in zip(model.named_parameters(), reference.parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad), name


@pytest.mark.parametrize("print_freq", [1, 1000])  # found at once, or at the end of the epoch
def test_divergence_names_epoch_and_step(print_freq):
    model, train = network(), loader(True)

    class Poisoned:
        device, weight = CPU, train.weight

        def epoch(self, epoch, first_step):
            for i, (images, labels) in enumerate(train.epoch(epoch, first_step), 1):
                yield (images * math.nan if i == 2 else images), labels

    with pytest.raises(TrainingDiverged, match="the loss is nan in epoch 5, step 2"):
        train_one_epoch(
            PlainStep(model, sgd(model), make_loss_terms(0.0)), Poisoned(), epoch=4, watcher=Watch(print_freq)
        )


def test_a_weight_hidden_behind_a_sign_is_found_not_finite():
    """VGG-Small without skips: the sign after a NaN is a number, so the loss stays finite."""
    torch.manual_seed(0)
    model = create_model("vgg_small_1w1a")
    with torch.no_grad():
        model.conv0.weight[0, 0, 0, 0] = math.nan
    images = Images(torch.zeros(4, 32, 32, 3, dtype=torch.uint8), torch.arange(4), tuple("0123456789"))
    train = MemoryLoader(
        images, batch_size=4, mean=(0.5,) * 3, std=(0.5,) * 3, device=CPU, augmentation=RandomCrop(0, False)
    )
    train_one_epoch(PlainStep(model, sgd(model), make_loss_terms(0.0)), train, epoch=0, watcher=Watch(1000))
    with pytest.raises(TrainingDiverged, match=r"conv0\.weight is no longer finite at the end of epoch 1"):
        check_finite(model, "at the end of epoch 1")


@pytest.mark.parametrize("pass_over", ["train", "evaluate"])
def test_nothing_in_the_loop_reads_from_the_device(monkeypatch, pass_over):
    """The reads of a pass do not grow with its steps: on a GPU each would be a wait."""
    reads = []
    for name in ("item", "tolist", "cpu", "numpy", "__bool__", "__float__", "__int__", "__index__"):
        original = getattr(torch.Tensor, name)
        monkeypatch.setattr(
            torch.Tensor, name, lambda self, *a, _f=original, _n=name, **k: (reads.append(_n), _f(self, *a, **k))[1]
        )

    def count(steps):
        model, data = network(), loader(pass_over == "train", 128 * steps)
        reads.clear()
        if pass_over == "train":
            train_one_epoch(PlainStep(model, sgd(model), make_loss_terms(0.1)), data, epoch=0, watcher=Watch(1000))
        else:
            evaluate(model, data, Watch(1000))
        return len(reads)

    assert count(1) == count(2) > 0


def test_delayed_read_gives_the_value_of_when_it_was_asked():
    reader, value = DelayedRead(), torch.tensor([1.0, 2.0])
    assert reader.poll() is None
    reader.start(value)
    value += 1
    reader.start(value)  # passed over: one is under way
    assert reader.poll() == [1.0, 2.0]
    assert reader.poll() is None


def test_totals_weigh_batches_by_their_size():
    totals = Totals(CPU, "here", ("loss", "regularizer"))
    for step, (size, loss) in enumerate(((3, 1.0), (1, 5.0)), 1):
        logits, labels = torch.eye(10)[:size], torch.arange(size)
        totals.add(step, {"loss": torch.tensor(loss), "regularizer": torch.tensor(0.5)}, logits, labels)
    metrics = totals.all_reduce().metrics()
    assert (metrics.loss, metrics.regularizer, metrics.top1, metrics.count) == (2.0, 0.5, 100.0, 4)
