"""The web page and the module of `biper export --web`: in Node, and in a Chromium."""

import json
import os
import re
import shutil
import subprocess
from functools import partial
from pathlib import Path

import browser as chromium
import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image
from torch import nn

import biper
from benchmarks.variants import randomized
from biper.commands.export import main as export_main
from biper.data.crops import Centre, Whole, cut
from biper.data.folder import decode
from biper.errors import UsageError
from biper.models.checkpoint import read_checkpoint
from biper.packed.c.export import export_c
from biper.packed.file import load_packed
from biper.packed.layers import PackedConv2d, PackedLinear
from biper.packed.pack import pack
from biper.packed.web import export
from biper.packed.web.export import export_web, find_clang
from biper.training.predict import predict

PRETRAINED = ROOT / "pretrained_models" / "resnet20_1w1a"
DEMO = ROOT / "docs" / "demo"
SIMD = pytest.mark.parametrize("simd", [True, False], ids=["simd", "plain"])


def _missing():
    try:
        find_clang()
    except UsageError as error:
        return str(error)
    return "" if shutil.which("node") else "there is no Node (Debian: nodejs)"


MISSING = _missing()
pytestmark = pytest.mark.skipif(bool(MISSING), reason=MISSING or "all is here")
IN_CHROMIUM = pytest.mark.skipif(bool(chromium.missing()), reason=chromium.missing() or "all is here")


@pytest.fixture(scope="module")
def packed():
    return load_packed(PRETRAINED / "packed.safetensors")


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    folder = tmp_path_factory.mktemp("web") / "page"
    export_main([str(PRETRAINED / "packed.safetensors"), "--web", str(folder)])
    return folder


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Fifty image files of 32 x 32 pixels, coarse and noisy."""
    folder, random, files = tmp_path_factory.mktemp("images"), np.random.default_rng(0), []
    for i in range(50):
        coarse = Image.fromarray(random.integers(0, 256, (2 + i % 5, 3 + i % 4, 3), np.uint8)).resize((32, 32))
        noisy = np.asarray(coarse, np.int64) + random.integers(-15, 16, (32, 32, 3))
        files.append(folder / f"image{i}.png")
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(files[-1])
    return files


def node(script, folder, *arguments):
    """What a script, which has `load` and `arguments`, prints as JSON."""
    text = f"import {{ hasSimd, load }} from {json.dumps((folder / 'biper.mjs').as_uri())};\n"
    text += f"const arguments_ = {json.dumps(arguments)};\n{script}"
    done = subprocess.run(["node", "--input-type=module", "-e", text], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


RUN = """
import { readFileSync } from "node:fs";
const [file, simd] = arguments_;
const network = await load(undefined, { simd });
const size = 3 * network.height * network.width, bytes = readFileSync(file), answers = [];
for (let at = 0; at < bytes.length; at += size) {
  const logits = network.run(new Uint8Array(bytes.subarray(at, at + size)));
  const bits = Array.from(new Uint32Array(logits.buffer), (word) => word.toString(16).padStart(8, "0"));
  answers.push([network.classes.indexOf(network.likeliest(logits)[0].name), ...bits].join(" "));
}
console.log(JSON.stringify({ simd: network.simd, answers }));
"""


def compiled(packed, folder, **options):
    """The program of a network's C."""
    export_c(packed, folder, **options)
    done = subprocess.run(["make", "-C", folder], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder / "network"


class Odd(nn.Module):
    """Groups, a pool, a binary linear layer, and channels that fill no word."""

    def __init__(self):
        super().__init__()
        square = biper.SquareWave(20.0)
        self.stem = nn.Conv2d(3, 40, 3, stride=2, padding=1)
        self.norm = nn.BatchNorm2d(40)
        self.grouped = biper.BinaryConv2d(40, 72, 3, padding=1, groups=2, weight_quantizer=square)
        self.other = nn.BatchNorm2d(72)
        self.pooled = biper.BinaryConv2d(72, 20, 1, weight_quantizer=square)
        self.pool = nn.MaxPool2d(2)
        self.last = nn.BatchNorm2d(20)
        self.dense = biper.BinaryLinear(20 * 16, 7, weight_quantizer=square)

    def forward(self, x):
        x = nn.functional.hardtanh(self.norm(self.stem(x)))
        x = nn.functional.hardtanh(self.other(self.grouped(x)))
        return self.dense(self.last(self.pool(self.pooled(x))).flatten(1))


@pytest.fixture(scope="module")
def odd(tmp_path_factory):
    torch.manual_seed(0)
    network = pack(randomized(Odd()).eval())
    folder = tmp_path_factory.mktemp("odd") / "page"
    export_web(network, folder, image_size=16)
    return network, folder


def test_logits_in_node_are_those_of_the_native_program_to_the_bit(packed, page, odd, tmp_path):
    cases = [(packed, page, {}), (*odd, {"image_size": 16})]
    for number, (network, folder, options) in enumerate(cases):
        size = options.get("image_size", 32)
        pixels = np.random.default_rng(1).integers(0, 256, (8, size, size, 3), np.uint8).tobytes()
        program = compiled(network, tmp_path / f"c{number}", **options)
        expected = subprocess.run([program], input=pixels, capture_output=True).stdout.decode().splitlines()
        (tmp_path / "pixels").write_bytes(pixels)
        for simd in (True, False):
            found = node(RUN, folder, str(tmp_path / "pixels"), simd)
            assert found == {"simd": simd, "answers": expected}
            assert len(expected) == 8


LOOK = """
const network = await load(arguments_[0]);
network.run(Uint8Array.from({ length: 3 * network.height * network.width }, (_, i) => (i * i * 7) % 256));
const seen = network.layers.map((_, i) => network.look(i));
for (const { maps, filters } of seen) {
  maps.bits = Array.from(maps.bits);
  filters.bits = Array.from(filters.bits);
}
console.log(JSON.stringify(seen));
"""


@torch.no_grad()
def test_maps_and_filters_are_those_of_the_network(packed, page, odd):
    for network, folder, size in ((packed, page, 32), (*odd, 16)):
        inputs = _inputs(network, size)
        seen = node(LOOK, folder, str(folder))
        assert [layer["name"] for layer in seen] == list(inputs)
        for layer in seen:
            found = torch.tensor(layer["maps"]["bits"]) > 0
            module, x = network.network.get_submodule(layer["name"]), inputs[layer["name"]]
            signs = x >= (0 if module.threshold is None else module.threshold)
            # sums of floats differ in their last digits from torch's, and a few signs with them
            assert (found == signs.flatten()).float().mean() > 0.995, layer["name"]
            assert torch.equal(torch.tensor(layer["filters"]["bits"]) > 0, _weights(module)), layer["name"]


def _inputs(network, size):
    """What each packed layer is given of the image of LOOK, by its name."""
    inputs, hooks, m = {}, [], network.metadata
    for name, layer in network.network.named_modules():
        if isinstance(layer, PackedConv2d | PackedLinear):
            keep = partial(lambda name, _, given: inputs.setdefault(name, given[0]), name)
            hooks.append(layer.register_forward_pre_hook(keep))
    pixels = torch.tensor([i * i * 7 % 256 for i in range(3 * size * size)]).view(size, size, 3) / 255
    mean, std = (torch.tensor(m.mean), torch.tensor(m.std)) if m else (0.0, 1.0)
    network.network(((pixels - mean) / std).permute(2, 0, 1)[None])
    for hook in hooks:
        hook.remove()
    return inputs


def _weights(layer):
    """A layer's weights as bits; where a maximum of sums is taken first, those of negative alphas are turned."""
    w = layer.binary_weight()
    if getattr(layer, "kernel_size", None) == (1, 1):
        w = torch.where(layer.alpha.view(-1, 1, 1, 1) < 0, -w, w)
    return w.flatten() > 0


WRONG = """
import { readFileSync } from "node:fs";
const [folder] = arguments_;
const network = await load(new URL(folder));
const told = async (doing) => {
  try {
    await doing();
    return "";
  } catch (error) {
    return `${error.name}: ${error.message}`;
  }
};
const whole = Buffer.concat(["plain.wasm", "network.bin"].map((name) => readFileSync(new URL(name, folder))));
const same = await load(whole);
console.log(JSON.stringify([
  await told(() => network.run(new Uint8Array(5))),
  await told(() => network.run([1, 2, 3])),
  await told(() => network.look(18)),
  await told(() => network.look("stem")),
  await told(() => load(new Uint8Array(5))),
  await told(() => load(whole.subarray(0, whole.length - 3))),
  await told(() => load(new Uint8Array([0, 97, 115, 109, 1, 0, 0, 0]))),
  await told(() => load(7)),
  await told(() => load("nowhere")),
  { simd: same.simd, height: same.height, width: same.width, bytes: same.bytes, classes: same.classes },
]));
"""


def test_what_node_is_told_of_bad_input(page, packed):
    *told, facts = node(WRONG, page, f"{page.as_uri()}/")
    size = "RangeError: an image is a Uint8Array of 32 x 32 x 3 = 3072 bytes"
    assert told[:2] == [size, size]
    assert told[2] == "RangeError: this network has binary layers 0 to 17, not 18"
    assert told[3].endswith("not stem")
    assert "this is no network" in told[4]
    assert "this is no network" in told[5]
    assert told[6] == "Error: this is WebAssembly, but no network of biper"
    assert told[7] == "TypeError: load takes the URL of a folder, or bytes"
    assert "nowhere" in told[8]
    size = (page / "plain.wasm").stat().st_size + (page / "network.bin").stat().st_size
    expected = {"simd": False, "height": 32, "width": 32, "bytes": size, "classes": list(packed.metadata.class_names)}
    assert facts == expected


FIT = """
import { readFileSync } from "node:fs";
const { fit } = await import(arguments_[0]);
const pixels = arguments_[1].map(([file, width, height, shorter]) => {
  return Array.from(fit({ data: readFileSync(file), width, height }, { shorter, height: 32, width: 32 }));
});
console.log(JSON.stringify(pixels));
"""


def test_images_are_resized_as_pillow_resizes_them(page, tmp_path):
    """To the bit; high ones to one level of 255, as Pillow 13 resizes rows before columns there, and rounds between."""
    random, asked, expected = np.random.default_rng(2), [], []
    sizes = ((32, 32), (50, 40), (20, 31), (33, 32), (31, 90), (320, 201), (7, 9), (1, 3), (65, 64))
    for width, height in sizes:
        pixels = random.integers(0, 256, (height, width, 3), np.uint8)
        image, file = Image.fromarray(pixels), tmp_path / f"{width}x{height}"
        image.convert("RGBA").save(f"{file}.png")
        file.write_bytes(np.dstack([pixels, np.full((height, width), 255, np.uint8)]).tobytes())
        ways = {32: decode(Path(f"{file}.png"), 32)}
        for shorter, view in ((40, Centre(32, 40)), (0, Whole(32))):
            ways[shorter] = cut(image, view.window(width, height, random))
        for shorter, found in ways.items():
            asked.append([str(file), width, height, shorter])
            expected.append(found.flatten().tolist())
    for case, found, wanted in zip(asked, node(FIT, page, f"{page.as_uri()}/image.js", asked), expected, strict=True):
        _, width, height, _ = case
        assert np.abs(np.subtract(found, wanted)).max() <= (height > width), case


@pytest.mark.parametrize("number", [0, 1, 127, 128, 300, 16383, 16384, 2**21])
def test_numbers_of_webassembly(number):
    written = export._unsigned(number)
    assert export._read_unsigned(b"\xff" + written + b"\xff", 1) == (number, 1 + len(written))
    assert len(written) == max(1, -(-number.bit_length() // 7))


def test_the_size_of_the_page(page):
    assert sum(path.stat().st_size for path in page.iterdir()) < 150_000
    text = "".join(path.read_text() for path in page.iterdir() if path.suffix not in (".wasm", ".bin"))
    assert not re.findall(r"https?://", text), "the page needs something from elsewhere"


def test_the_demo_is_what_the_command_writes(packed, page, tmp_path):
    """But compilers differ: of what they wrote the answers are compared."""
    assert {path.name for path in DEMO.iterdir()} == {path.name for path in page.iterdir()}
    for path in page.iterdir():
        if path.suffix not in (".wasm", ".bin") and path.name != "offline.js":
            assert path.read_bytes() == (DEMO / path.name).read_bytes(), f"{path.name}: docs/edge_web.md, the demo"
    (tmp_path / "pixels").write_bytes(bytes(i * i * 7 % 256 for i in range(3 * 32 * 32)))
    for simd in (True, False):
        assert node(RUN, DEMO, str(tmp_path / "pixels"), simd) == node(RUN, page, str(tmp_path / "pixels"), simd)


@pytest.fixture(scope="module")
def window():
    with chromium.Browser() as browser:
        yield browser


@pytest.fixture
def opened(window, page):
    """opened(query) -> a browser with the page."""
    with chromium.Served(page) as address:

        def go(query=""):
            window.open(address + query)
            window.wait(chromium.READY)
            return window

        yield go
        assert [text for text in window.complaints() if "favicon" not in text] == []


@IN_CHROMIUM
@SIMD
def test_answers_are_those_of_predict(opened, images, packed, simd, capsys):
    browser, times = opened("" if simd else "?plain"), []
    version = "with SIMD" if simd else "without SIMD"
    assert browser.run("return document.getElementById('version').textContent") == version
    for image, guesses in zip(images, predict(packed, images), strict=True):
        lines = chromium.answer_to(browser, image)
        assert [name for name, _ in lines] == [guess.name for guess in guesses], image
        for (_, share), guess in zip(lines, guesses, strict=True):
            assert float(share.split()[0]) == pytest.approx(100 * guess.probability, abs=0.011), image
        text = browser.run("return document.getElementById('time').textContent")
        times.append(float(re.match(r"[\d.]+", text)[0]))
    with capsys.disabled():
        told = f"median {np.median(times):.2f} ms, least {min(times):.2f} ms"
        print(f"\nResNet-20 in Chromium {browser.version}, {version}: {told}")


@IN_CHROMIUM
def test_images_of_other_sizes(opened, packed, tmp_path):
    browser, random = opened(), np.random.default_rng(3)
    for i, size in enumerate(((300, 200), (21, 17), (32, 90))):
        file = tmp_path / f"other{i}.png"
        Image.fromarray(random.integers(0, 256, (3, 4, 3), np.uint8)).resize(size).save(file)
        ((guess, *_),) = predict(packed, [file])
        name, share = chromium.answer_to(browser, file)[0]
        assert (name, float(share.split()[0])) == (guess.name, pytest.approx(100 * guess.probability, abs=0.011))


@IN_CHROMIUM
def test_what_is_wrong_with_an_image_is_told(opened, images, tmp_path):
    browser = opened()
    cases = {"text.png": b"no image", "empty.png": b"", "half.png": images[0].read_bytes()[:1500]}
    for name, contents in cases.items():
        (tmp_path / name).write_bytes(contents)
        browser.press("file", str(tmp_path / name))
        text = browser.wait("return document.getElementById('problem').textContent")
        why = "it is empty" if not contents else "it is damaged, or no image that this browser knows"
        assert text == f"{name} cannot be read: {why}."
        assert browser.run("return document.getElementById('problem').getAttribute('role')") == "alert"
        chromium.answer_to(browser, images[0])
        assert browser.run("return document.getElementById('problem').hidden")
        browser.run("document.getElementById('shown-text').textContent = ''")


@IN_CHROMIUM
def test_drop(opened):
    browser = opened()
    script = """
        const files = arguments[0], transfer = new DataTransfer();
        for (const name of files) transfer.items.add(new File(["x"], name));
        document.dispatchEvent(new DragEvent("drop", { dataTransfer: transfer, bubbles: true, cancelable: true }));"""
    for files, told in (([], "is no file"), (["a", "b"], "2 files"), (["a.txt"], "a.txt cannot be read")):
        browser.run(script.replace("document.dispatch", "document.body.dispatch"), files)
        browser.wait(f"return document.getElementById('problem').textContent.includes({json.dumps(told)})")


@IN_CHROMIUM
def test_the_keyboard_is_enough_to_draw_and_to_look(opened):
    browser = opened()
    browser.press("draw", "\ue007")  # Enter, which opens the paper and goes there
    assert browser.run("return document.activeElement.id") == "paper"
    browser.press("paper", " " + 9 * "\ue014" + " ")  # down, to the right, up
    browser.wait(chromium.SHOWN, "your drawing")
    assert not browser.run("return document.getElementById('tip').hidden")
    assert len(browser.run(chromium.ANSWER)) == 5
    assert browser.wait("return document.getElementById('spoken').textContent")
    before = browser.run("return document.getElementById('maps').toDataURL()")
    browser.press("layer", "\ue015")
    texts = browser.run("return ['maps', 'filters'].map(id => document.getElementById(id + '-text').textContent)")
    assert re.match(r"What it sees: 16 maps of 32 x 32 signs\. \d+ % of all are \+1\.", texts[0])
    assert texts[1] == "Its filters of 3 x 3 signs, 16 outputs in rows and 16 inputs in columns."
    assert browser.run("return document.getElementById('layer').value") == "layer1.0.conv2"
    assert browser.run("return document.getElementById('maps').toDataURL()") != before
    names = browser.run("""return [...document.querySelectorAll('button, input, select, canvas, a[href]')]
        .filter(e => !(e.getAttribute('aria-label') || e.getAttribute('aria-labelledby') || e.labels?.length ||
                       e.textContent.trim())).map(e => e.id)""")
    assert names == []


@IN_CHROMIUM
def test_a_camera(opened):
    browser = opened()
    browser.press("camera", "\ue007")
    browser.wait(chromium.SHOWN, "the camera")
    browser.press("camera", "\ue007")
    assert browser.run("return document.getElementById('camera').getAttribute('aria-pressed')") == "false"
    browser.run("navigator.mediaDevices.getUserMedia = () => Promise.reject(new Error('it is in use'))")
    browser.press("camera", "\ue007")
    text = browser.wait("return document.getElementById('problem').textContent")
    assert text == "There is no camera to be had: it is in use."


@IN_CHROMIUM
def test_it_opens_without_a_network(window, page, images):
    with chromium.Served(page) as address:
        window.open(address)
        window.wait(chromium.READY)
        window.wait("return navigator.serviceWorker.ready.then(() => true)")
    window.open(address)  # whose server has gone
    window.wait(chromium.READY)
    assert len(chromium.answer_to(window, images[0])) == 5
    window.open(f"{address}?plain")
    window.wait(chromium.READY)
    assert window.run("return document.getElementById('version').textContent") == "without SIMD"


@IN_CHROMIUM
def test_a_phone_and_darkness(opened, images):
    browser = opened()
    phone = {"width": 360, "height": 740, "deviceScaleFactor": 2, "mobile": True}
    dark = [{"name": "prefers-color-scheme", "value": "dark"}]
    try:
        browser.tell("Emulation.setDeviceMetricsOverride", **phone)
        browser.tell("Emulation.setEmulatedMedia", features=dark)
        chromium.answer_to(browser, images[0])
        browser.press("draw", "\ue007")
        assert browser.run("return document.documentElement.scrollWidth") <= 360
        colors = browser.run("const s = getComputedStyle(document.body); return [s.backgroundColor, s.color]")
        assert colors == ["rgb(20, 25, 28)", "rgb(232, 236, 238)"]
    finally:
        browser.tell("Emulation.clearDeviceMetricsOverride")
        browser.tell("Emulation.setEmulatedMedia", features=[])


@IN_CHROMIUM
def test_a_page_without_its_network(window, page, tmp_path):
    shutil.copytree(page, tmp_path / "page")
    (tmp_path / "page" / "network.bin").unlink()
    with chromium.Served(tmp_path / "page") as address:
        window.open(address)
        text = window.wait("return document.getElementById('problem').textContent")
    assert re.match(r"The network cannot be used: \S+network\.bin cannot be loaded: the server answers 404\.", text)
    window.complaints()


def test_the_page_of_a_checkpoint_is_that_of_its_packed_file(command, page, tmp_path):
    folder = tmp_path / "page"
    code, out, err = command(PRETRAINED / "model.pth.tar", "--web", folder, entry=export_main)
    assert code == 0, err
    size = sum(path.stat().st_size for path in folder.iterdir())
    assert f"{folder}: a page and biper.mjs, {size:,} bytes" in out + err
    for path in page.iterdir():
        assert path.read_bytes() == (folder / path.name).read_bytes(), path.name


def test_bad_input(refused, tmp_path, monkeypatch):
    contents = read_checkpoint(PRETRAINED / "model.pth.tar")
    contents["metadata"]["weight_quantizer"]["name"] = "sine"
    torch.save(contents, tmp_path / "stage1.pth.tar")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").touch()
    best, new = PRETRAINED / "model.pth.tar", tmp_path / "new"
    cases = {
        "full is not empty": [best, "--web", tmp_path / "full"],
        "is a file": [best, "--web", tmp_path / "stage1.pth.tar"],
        "no such folder": [best, "--web", tmp_path / "none" / "page"],
        "is of stage 1, whose weights are real": [tmp_path / "stage1.pth.tar", "--web", new],
        "no checkpoint at": [tmp_path / "none", "--web", new],
        "goes with the packed file": [best, "--web", new, "--facts", tmp_path / "a.json"],
        "net.safetensors is packed already": [
            shutil.copy(PRETRAINED / "packed.safetensors", tmp_path / "net.safetensors"),
            *("-o", tmp_path / "out.safetensors", "--web", new),
        ],
    }
    before = sorted(tmp_path.rglob("*"))
    for message, argv in cases.items():
        assert message in refused(*argv, entry=export_main)
    monkeypatch.setattr(export, "COMPILERS", ("no-such-clang",))
    assert "there is no clang" in refused(best, "--web", new, entry=export_main)
    wrong = tmp_path / "bin" / "wrong-clang"
    wrong.parent.mkdir()
    wrong.write_text("#!/bin/sh\necho 'error: no such target' >&2; exit 1\n")
    wrong.chmod(0o755)
    monkeypatch.setenv("PATH", str(wrong.parent), prepend=os.pathsep)
    monkeypatch.setattr(export, "COMPILERS", ("wrong-clang",))
    assert f"{wrong} says: error: no such target" in refused(best, "--web", new, entry=export_main)
    shutil.rmtree(wrong.parent)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_network_that_does_not_know_its_images(refused, tmp_path):
    fresh = pack(biper.create_model("resnet20_1w1a", stage=2).eval())
    biper.save_packed(fresh, tmp_path / "net.safetensors")
    told = refused(tmp_path / "net.safetensors", "--web", tmp_path / "page", entry=export_main)
    assert "does not say how its images are normalized" in told
    assert not (tmp_path / "page").exists()
