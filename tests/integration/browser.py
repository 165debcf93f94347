"""A headless browser through Chrome's DevTools protocol, over a pair of pipes."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
from pathlib import Path

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


class Browser:
    """One page. profile: an empty folder."""

    def __init__(self, profile: Path):
        commands, self._commands = os.pipe()
        self._replies, replies = os.pipe()
        options = ["--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe", "--window-size=760,760"]
        # Chrome reads its commands from descriptor 3 and writes to 4
        script = f'exec 3<&{commands} 4>&{replies}; exec "$0" "$@"'
        self._process = subprocess.Popen(
            ["bash", "-c", script, CHROMIUM, *options, f"--user-data-dir={profile}", "about:blank"],
            pass_fds=(commands, replies),
            stderr=subprocess.DEVNULL,
        )
        os.close(commands)
        os.close(replies)
        self._count, self._buffer, self._session = 0, b"", None
        page = next(each for each in self.call("Target.getTargets")["targetInfos"] if each["type"] == "page")
        attached = self.call("Target.attachToTarget", targetId=page["targetId"], flatten=True)
        self._session = attached["sessionId"]

    def call(self, method: str, **parameters) -> dict:
        """The result of a command; events are skipped."""
        self._count += 1
        command = {"id": self._count, "method": method, "params": parameters}
        if self._session:
            command["sessionId"] = self._session
        os.write(self._commands, json.dumps(command).encode() + b"\0")
        while True:
            while b"\0" not in self._buffer:
                received = os.read(self._replies, 2**16)
                assert received, "the browser has gone"
                self._buffer += received
            message, _, self._buffer = self._buffer.partition(b"\0")
            reply = json.loads(message)
            if reply.get("id") == self._count:
                assert "error" not in reply, reply
                return reply["result"]

    def open(self, url: str) -> None:
        """Go to a page and wait until it is loaded."""
        self.call("Page.navigate", url=url)
        self.run("new Promise(done => document.readyState == 'complete' ? done() : addEventListener('load', done))")

    def run(self, script: str) -> object:
        """The value of an expression, after its promise is settled."""
        found = self.call("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def picture(self, file: Path) -> None:
        """Write a screenshot of the page as PNG."""
        file.write_bytes(base64.b64decode(self.call("Page.captureScreenshot")["data"]))

    def close(self) -> None:
        self._process.terminate()
        self._process.wait(30)
        os.close(self._commands)
        os.close(self._replies)
