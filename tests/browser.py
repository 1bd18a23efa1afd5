"""A Chromium without a window, driven by the WebDriver protocol that chromedriver speaks: no package is needed.

`python tests/browser.py FOLDER PICTURE.png` serves a page that `biper export --web` wrote, gives it a ship that is
drawn here, and takes a picture of it: docs/demo.png.
"""

import base64
import json
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from PIL import Image, ImageDraw

FLAGS = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars"]
CAMERA = ["--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"]
NAMES = ("chromium", "chromium-browser", "google-chrome")
ELEMENT = "element-6066-11e4-a52e-4f735466cecf"  # by which the protocol calls what is an element
SECONDS = 30
DIRECTLY = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # whatever proxy the environment names


def missing():
    """What is missing for a browser, in words; empty if nothing is."""
    if not any(map(shutil.which, NAMES)):
        return "there is no Chromium (Debian: chromium)"
    return "" if shutil.which("chromedriver") else "there is no chromedriver (Debian: chromium-driver)"


class Refused(RuntimeError):
    """The browser's word on what did not work."""


class Browser:
    """Context: a browser's window of a size."""

    def __init__(self, width=1000, height=1100):
        self.size = width, height

    def __enter__(self):
        self.driver = subprocess.Popen(["chromedriver", "--port=0"], stdout=subprocess.PIPE, text=True)
        ready = next(line for line in self.driver.stdout if "started successfully on port" in line)
        port = ready.split("on port")[1].strip(" .\n")
        self.address = f"http://127.0.0.1:{port}/session"
        try:
            binary = next(filter(None, map(shutil.which, NAMES)))
            flags = [*FLAGS, *CAMERA, f"--window-size={self.size[0]},{self.size[1]}"]
            options = {"args": flags, "binary": binary}
            asked = {"browserName": "chrome", "goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}
            made = self._send("POST", "", {"capabilities": {"alwaysMatch": asked}})
        except BaseException:
            self.driver.kill()
            raise
        self.address += f"/{made['sessionId']}"
        self.version = made["capabilities"]["browserVersion"]
        return self

    def __exit__(self, *_):
        try:
            self._send("DELETE", "")
        finally:
            self.driver.terminate()
            self.driver.wait(SECONDS)
            self.driver.stdout.close()

    def _send(self, method, path, values=None):
        data = None if method != "POST" else json.dumps(values or {}).encode()
        request = urllib.request.Request(self.address + path, data, {"Content-Type": "application/json"}, method=method)
        try:
            with DIRECTLY.open(request, timeout=2 * SECONDS) as answer:
                return json.load(answer)["value"]
        except urllib.error.HTTPError as error:
            with error:
                raise Refused(json.load(error)["value"]["message"]) from None

    def open(self, address):
        """Go to a page."""
        self._send("POST", "/url", {"url": address})

    def run(self, script, *arguments):
        """What JavaScript returns; a promise is waited for."""
        return self._send("POST", "/execute/sync", {"script": script, "args": list(arguments)})

    def wait(self, script, *arguments):
        """What JavaScript returns as soon as that is something."""
        end = time.monotonic() + SECONDS
        while not (found := self.run(script, *arguments)):
            assert time.monotonic() < end, f"in vain: {script}"
            time.sleep(0.02)
        return found

    def press(self, identity, keys):
        """Type keys, or the path of a file, into the element of an id."""
        element = self._send("POST", "/element", {"using": "css selector", "value": f"#{identity}"})[ELEMENT]
        self._send("POST", f"/element/{element}/value", {"text": keys})

    def tell(self, command, **values):
        """A command of the DevTools protocol."""
        return self._send("POST", "/goog/cdp/execute", {"cmd": command, "params": values})

    def complaints(self):
        """What the browser wrote to its console since it was last asked."""
        return [entry["message"] for entry in self._send("POST", "/se/log", {"type": "browser"})]

    def picture(self):
        """The window as a PNG."""
        return base64.b64decode(self._send("GET", "/screenshot"))


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


class Served:
    """Context: the address at which a folder is served on this machine."""

    def __init__(self, folder):
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Quiet, directory=str(folder)))

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()
        return f"http://127.0.0.1:{self.server.server_port}/"

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()


READY = "return !document.getElementById('page').hidden"
ANSWER = "return [...document.querySelectorAll('#answer li')].map(li => [...li.children].map(part => part.textContent))"
SHOWN = "return document.getElementById('shown-text').textContent.includes(arguments[0])"


def answer_to(browser, image):
    """The page's lines for an image: names and shares."""
    browser.press("file", str(image))
    browser.wait(SHOWN, image.name)
    return browser.run(ANSWER)


def draw_ship(file):
    """A ship on the sea, of a few polygons."""
    image = Image.new("RGB", (640, 480), (120, 180, 235))
    draw = ImageDraw.Draw(image)
    draw.rectangle((0, 300, 640, 480), fill=(30, 80, 140))
    draw.polygon([(120, 290), (520, 290), (460, 360), (170, 360)], fill=(110, 50, 40))
    draw.rectangle((220, 230, 400, 290), fill=(240, 240, 235))
    draw.rectangle((330, 170, 370, 230), fill=(190, 40, 40))
    image.save(file)


def main(folder, picture):
    """Take the picture."""
    with tempfile.TemporaryDirectory() as place, Served(folder) as address, Browser(1000, 1400) as browser:
        ship = Path(place) / "ship.png"
        draw_ship(ship)
        browser.open(address)
        browser.wait(READY)
        answer_to(browser, ship)
        Path(picture).write_bytes(browser.picture())


if __name__ == "__main__":
    main(*sys.argv[1:])
