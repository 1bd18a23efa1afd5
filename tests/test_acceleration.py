"""How a network is run: number formats, fallbacks, and the compiler."""

import logging
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import TINY, TORCH, needs_compiler

from biper.cpu import cache
from biper.cpu import compiler as native
from biper.models import create_model
from biper.nn.layers import BinaryConv2d
from biper.nn.quantizers import INPUT_QUANTIZERS, WEIGHT_QUANTIZERS
from biper.training import acceleration
from biper.training.acceleration import accelerate, chosen_amp
from biper.training.compilation import CompiledNetwork, require_surrogates

CPU = torch.device("cpu")
KINDS = [*((name, WEIGHT_QUANTIZERS) for name in WEIGHT_QUANTIZERS), *((n, INPUT_QUANTIZERS) for n in INPUT_QUANTIZERS)]
TRAIN = [*TINY, "--epochs", 1, "--results_dir"]


@pytest.fixture
def no_compiler(monkeypatch, tmp_path):
    """A machine without a C compiler, whose caches are empty."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(acceleration, "fuse", lambda network: native.load.__wrapped__("training"))


def test_amp_follows_the_hardware(monkeypatch):
    assert (chosen_amp("off", CPU), chosen_amp("bf16", CPU)) == ("off", "bf16")
    for facts, expected in (("flags : sse avx512f amx_bf16", "bf16"), ("flags : sse avx512f", "off")):
        monkeypatch.setattr(acceleration, "Path", lambda name, facts=facts: SimpleNamespace(read_text=lambda: facts))
        assert chosen_amp("auto", CPU) == expected
    gpu = torch.device("cuda")
    for capability, expected in (((9, 0), "bf16"), ((8, 0), "bf16"), ((7, 5), "off")):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, c=capability: c)
        assert chosen_amp("auto", gpu) == expected


@needs_compiler
@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("amp", [True, False])
def test_logits_are_float32_and_evaluation_is_not_under_autocast(compiled, amp):
    torch.manual_seed(0)
    network = create_model("resnet20_1w1a", stage=1)
    model = accelerate(network, CPU, amp=amp, compiled=compiled, steps=1).train()
    x = torch.randn(4, 3, 8, 8)
    assert model(x).dtype == torch.float32
    with torch.inference_mode():
        ours = model.eval()(x)
        torch.testing.assert_close(ours, network(x))
    assert model.describe() == f"{'bf16' if amp else 'float32'}, {'fused kernels' if compiled else 'plain torch'}"


def test_gradients_in_evaluation_mode_are_the_networks_own():
    network = create_model("resnet20_1w1a").eval()
    model = accelerate(network, CPU, amp=False, compiled=True, steps=1)
    x = torch.randn(2, 3, 8, 8).to(memory_format=torch.channels_last)
    ours, theirs = (torch.autograd.grad(f(x).sum(), network.layer1[0].conv1.weight)[0] for f in (model, network))
    assert torch.equal(ours, theirs)


def test_training_without_kernels_is_a_choice(command, tmp_path):
    code, out, err = command(*TRAIN, tmp_path / "run", "--no-compile")
    assert (code, err) == (0, "")
    assert "plain torch" in out


def test_without_a_compiler_training_goes_on_and_says_so_in_a_line(no_compiler, command, tmp_path):
    code, out, err = command(*TRAIN, tmp_path / "run")
    assert (code, err) == (0, "")
    assert out.count("last digits: no C compiler was found: install gcc\n") == 1
    assert "plain torch" in out


@pytest.mark.parametrize(
    "script",
    ["echo 'code.c:1: error: no such thing' >&2; exit 1", "exit 3", r"printf 'code.c:1: error \377' >&2; exit 1"],
)
def test_a_compiler_that_fails_is_named(monkeypatch, tmp_path, script):
    compiler = tmp_path / "cc"
    compiler.write_text(f"#!/bin/sh\n{script}\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CC", str(compiler))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with pytest.raises(
        native.CompilerMissing, match=r"cc does not work here: (code.c:1: error|exit status 3)"
    ) as caught:
        native.load.__wrapped__("training")
    assert "\n" not in str(caught.value)
    assert not list((tmp_path / "cache" / "biper").iterdir())


def test_a_library_is_compiled_once_even_by_several_processes(tmp_path):
    code = "from biper.cpu.compiler import load; load('training').biper_forward"
    environment = {"XDG_CACHE_HOME": str(tmp_path), "PATH": "/usr/local/bin:/usr/bin:/bin"}
    running = [subprocess.Popen([sys.executable, "-c", code], env=environment) for _ in range(2)]
    assert [process.wait() for process in running] == [0, 0]
    (library,) = (tmp_path / "biper").iterdir()
    before = library.stat().st_mtime_ns
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)
    assert library.stat().st_mtime_ns == before


@needs_compiler
def test_a_home_that_cannot_be_written_to(monkeypatch, tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(blocked))
    monkeypatch.setattr(cache.tempfile, "gettempdir", lambda: str(tmp_path))
    native.load.__wrapped__("training")
    (folder,) = tmp_path.glob("biper-*")
    assert folder.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("amp", ["off", "bf16"])
def test_the_chosen_format_is_saved_and_kept_by_resume(command, refused, tmp_path, amp):
    run = [*TINY, "--results_dir", tmp_path / "run"]
    assert command(*run, "--epochs", 1, "--amp", amp)[0] == 0
    assert f"amp: '{amp}'" in (tmp_path / "run" / "config.yaml").read_text().replace("amp: bf16", "amp: 'bf16'")
    other = {"off": "bf16", "bf16": "off"}[amp]
    assert f"amp: {other} (there {amp})" in refused(*run, "--epochs", 1, "--resume", "--amp", other)
    assert command(*run, "--epochs", 1, "--resume")[0] == 0


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # which torch 2.11 does
class TestCompiled:
    """torch.compile, which GPUs take; its default backend writes C++ for the CPU, so that it can be tested there."""

    def step(self, forward, x):
        F.cross_entropy(forward(x), torch.arange(len(x))).backward()

    @pytest.mark.skipif(TORCH < (2, 7), reason="torch 2.6's compiler fails on this network")
    @pytest.mark.parametrize("amp", [False, True])
    def test_gradients_and_the_last_batch(self, caplog, amp):
        caplog.set_level(logging.INFO, "biper")
        results = []
        for compiled in (True, False):
            torch.manual_seed(0)
            network = create_model("resnet20_1w1a", stage=2)
            network.layer1 = network.layer1[:1]  # a compiler takes its time
            network.layer2, network.layer3 = torch.nn.Identity(), torch.nn.Identity()
            network.bn2, network.linear = torch.nn.BatchNorm1d(16), torch.nn.Linear(16, 10)
            model = accelerate(network, CPU, amp=amp, compiled=False, steps=1).train()
            model.fast = CompiledNetwork(network) if compiled else None
            for size in (4, 3):
                self.step(model, torch.randn(size, 3, 8, 8, generator=torch.Generator().manual_seed(size)))
            results.append({n: p.grad for n, p in network.named_parameters()} | dict(network.named_buffers()))
        for name, one in results[0].items():
            if "alpha" not in name:  # next to nothing, and of that the most is rounding
                assert F.cosine_similarity(one.flatten().double(), results[1][name].flatten().double(), dim=0) > 0.999
        lines = [record.getMessage() for record in caplog.records if record.name == "biper"]
        assert [line.split(":")[0] for line in lines] == ["torch.compile"] * 2

    def test_where_it_does_not_work_training_goes_on(self, monkeypatch, caplog):
        def broken(network, **options):
            def call(*inputs):
                raise RuntimeError("no compiler\nand a long story")

            return call

        monkeypatch.setattr(torch, "compile", broken)
        network = create_model("resnet20_1w1a").train()
        forward = CompiledNetwork(network)
        self.step(forward, torch.randn(4, 3, 8, 8))
        self.step(forward, torch.randn(4, 3, 8, 8))
        network.eval()
        forward(torch.randn(4, 3, 8, 8))
        network.train()
        warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
        assert warnings == ["torch.compile does not work here: going on without it, as with --no-compile (no compiler)"]
        assert network.bn1.num_batches_tracked == 2

    def test_a_gradient_that_is_lost_is_noticed(self, monkeypatch, caplog):
        network = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 5)).train()
        first, norm, last = network
        monkeypatch.setattr(torch, "compile", lambda _, dynamic: lambda x: last(norm(first(x).detach())))
        forward = CompiledNetwork(network)
        self.step(forward, torch.randn(4, 3))
        assert "(it loses the gradient of 0.weight)" in caplog.text
        assert first.weight.grad.any()  # the step was one without it
        assert norm.num_batches_tracked == 1

    @pytest.mark.parametrize(("name", "registry"), KINDS)
    def test_quantizers_keep_their_gradients(self, name, registry):
        quantizer = registry[name](**({"freq": 3.0} if name in ("sine", "square_wave") else {}))
        kind = "weight_quantizer" if registry is WEIGHT_QUANTIZERS else "input_quantizer"
        require_surrogates(torch.nn.Sequential(BinaryConv2d(4, 3, 3, **{kind: quantizer}).train()))

    def test_a_surrogate_that_is_lost_is_noticed_where_skips_hide_it(self, monkeypatch, caplog):
        def losing(f, dynamic, backend=None):
            if backend is None:
                return f  # of the whole network, all of whose parameters have gradients
            return lambda w, a: (f(w, a)[0], f(w, a)[1].detach() + 0 * a)

        monkeypatch.setattr(torch, "compile", losing)
        forward = CompiledNetwork(create_model("resnet20_1w1a").train())
        self.step(forward, torch.randn(4, 3, 8, 8))
        assert "(it loses the gradient of PolynomialSign)" in caplog.text

    @pytest.mark.parametrize(("steps", "how"), [(999, "plain torch"), (1000, "torch.compile")])
    def test_a_gpu_gets_it_where_it_pays(self, monkeypatch, steps, how):
        network = create_model("resnet20_1w1a")
        monkeypatch.setattr(network, "to", lambda *args, **kwargs: network)
        assert accelerate(network, torch.device("cuda"), amp=True, compiled=True, steps=steps).how == how
