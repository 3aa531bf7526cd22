"""A headless Chromium, driven over the pipe of its DevTools protocol: nothing to install beside the browser."""

import json
import os
import select
import shutil
import subprocess
import time
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FLAGS = ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run", "--mute-audio",
         "--disable-background-networking", "--disable-component-update", "--force-color-profile=srgb",
         "--remote-debugging-pipe")  # fmt: skip
PATIENCE = 60  # seconds for one answer


def find() -> str | None:
    """The browser's path, if one is there and starts."""
    for name in NAMES:
        path = shutil.which(name)
        if path and subprocess.run([path, "--version"], capture_output=True, check=False).returncode == 0:
            return path
    return None


class Chromium:
    """One browser with one page. `errors` holds what the page's scripts and its security policy complained of."""

    def __init__(self, profile: str) -> None:
        page_reads, self._out = os.pipe()
        self._in, page_writes = os.pipe()
        # The browser reads from descriptor 3 and writes to 4; a shell puts them there, whichever numbers they have.
        command = [str(find()), *FLAGS, f"--user-data-dir={profile}", "about:blank"]
        self._process = subprocess.Popen(
            ["bash", "-c", f'exec "$@" 3<&{page_reads} 4>&{page_writes}', "chromium", *command],
            pass_fds=(page_reads, page_writes),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(page_reads)
        os.close(page_writes)
        self._left, self._number, self._session = b"", 0, None
        self.errors: list[str] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "DOM", "Network"):
            self.call(f"{domain}.enable")

    def close(self) -> None:
        """End the browser."""
        try:
            self._session = None
            self.call("Browser.close")
            self._process.wait(10)
        except (OSError, TimeoutError, subprocess.TimeoutExpired):
            self._process.kill()
            self._process.wait()
        os.close(self._in)
        os.close(self._out)

    def call(self, method: str, **params: Any) -> Any:
        """One command and its result."""
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        until = time.monotonic() + PATIENCE
        while time.monotonic() < until:
            said = self._read(until)
            if said.get("id") == self._number:
                assert "error" not in said, f"{method}: {said['error']}"
                return said["result"]
            self._note(said)
        raise TimeoutError(method)

    def _read(self, until: float) -> Any:
        while b"\0" not in self._left:
            if not select.select([self._in], [], [], max(until - time.monotonic(), 0))[0]:
                raise TimeoutError("Chromium said nothing")
            part = os.read(self._in, 1 << 16)
            if not part:
                raise OSError("Chromium ended")
            self._left += part
        said, _, self._left = self._left.partition(b"\0")
        return json.loads(said)

    def _note(self, event: Any) -> None:
        params = event.get("params", {})
        if event.get("method") == "Runtime.exceptionThrown":
            self.errors.append(params["exceptionDetails"].get("exception", {}).get("description", "an exception"))
        elif event.get("method") == "Log.entryAdded" and params["entry"]["level"] == "error":
            self.errors.append(f"{params['entry']['text']} {params['entry'].get('url', '')}")

    def open(self, url: str, width: int = 1280, height: int = 800, **features: str) -> None:
        """Load a page into a window of that size; `features` are media features, such as prefers_color_scheme."""
        media = [{"name": name.replace("_", "-"), "value": value} for name, value in features.items()]
        self.call("Emulation.setEmulatedMedia", features=media)
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self.call("Emulation.setDeviceMetricsOverride", **size)
        self.errors.clear()
        self.call("Page.navigate", url=url)
        self.wait("document.readyState === 'complete'")

    def run(self, expression: str) -> Any:
        """The value of a JavaScript expression in the page, awaited."""
        done = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in done, done["exceptionDetails"]
        return done["result"].get("value")

    def wait(self, expression: str, seconds: float = PATIENCE) -> None:
        """Until a JavaScript expression is true.

        Raises:
            TimeoutError: it stayed false; the page's text and errors are in the message.
        """
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            if self.run(f"Boolean({expression})"):
                return
            time.sleep(0.05)
        raise TimeoutError(f"{expression}: {self.run('document.body.innerText')!r}, {self.errors}")

    def choose(self, selector: str, *files: str) -> None:
        """Put files into an <input type=file>."""
        root = self.call("DOM.getDocument")["root"]["nodeId"]
        node = self.call("DOM.querySelector", nodeId=root, selector=selector)["nodeId"]
        self.call("DOM.setFileInputFiles", nodeId=node, files=[str(file) for file in files])

    def press(self, key: str, code: int, text: str = "") -> None:
        """One key, down and up."""
        for kind in ("keyDown", "keyUp"):
            extra = {"text": text} if text and kind == "keyDown" else {}
            self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code, **extra)

    def picture(self) -> str:
        """The whole page as base64 PNG."""
        shot = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=True)
        data: str = shot["data"]
        return data
