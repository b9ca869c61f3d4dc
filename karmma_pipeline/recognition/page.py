"""A page on this machine that shows what is recognised now, with switches for the sensors.

Plain HTTP of the standard library: answers come as server-sent events, a switch is a POST. Only
this machine is served, and only who knows the token in the address.
"""

import hmac
import json
import secrets
import threading
from collections.abc import Callable, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.resources import files as package_files
from typing import Any, Self

import cv2
import numpy as np
import numpy.typing as npt

from karmma_pipeline.errors import ConfigError

# Pictures are shown at most so wide, px.
_WIDTH = 640

# Longest body of a request that is read, bytes; and seconds after which a silent page hears
# something, so that a closed one is noticed.
_MOST, _QUIET_S = 1000, 5.0


class LivePage:
    """Serves the page; a context manager.

    Args:
        switch: called with a modality and whether it is to be let in.
        port: 0: a free one.

    Attributes:
        address: of the page, with its token.
    """

    def __init__(self, switch: Callable[[str, bool], None], port: int = 0) -> None:
        self.token, self.switch = secrets.token_urlsafe(16), switch
        self._changed = threading.Condition()
        self._answer, self._count, self._jpeg = "", 0, b""
        self.closed = False
        handler = type("Handler", (_Handler,), {"page": self})
        try:
            self._server = ThreadingHTTPServer(("127.0.0.1", port), handler)
        except OSError as error:
            raise ConfigError(f"--port {port}: cannot be opened ({error.strerror}).") from None
        self._server.daemon_threads = True
        self.port = int(self._server.server_address[1])
        self.address = f"http://127.0.0.1:{self.port}/{self.token}/"

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        with self._changed:
            self.closed = True
            self._changed.notify_all()
        self._server.shutdown()
        self._server.server_close()

    def show_picture(self, picture: npt.NDArray[np.uint8]) -> None:
        """Let this be the picture that is shown, uint8 [H, W, 3] in RGB."""
        height, width = picture.shape[:2]
        if width > _WIDTH:
            picture = cv2.resize(picture, (_WIDTH, max(1, height * _WIDTH // width)))  # type: ignore[assignment]
        _, jpeg = cv2.imencode(".jpg", cv2.cvtColor(picture, cv2.COLOR_RGB2BGR))
        self._jpeg = jpeg.tobytes()

    def show(self, answer: Mapping[str, Any]) -> None:
        """Let this be the newest answer, JSON-plain."""
        with self._changed:
            self._answer, self._count = json.dumps(answer), self._count + 1
            self._changed.notify_all()

    @property
    def picture(self) -> bytes:
        """The newest picture, JPEG; empty before the first."""
        return self._jpeg

    def after(self, count: int) -> tuple[int, str]:
        """Wait for an answer after the ``count``-th; return its number and JSON, or an old one."""
        with self._changed:
            self._changed.wait_for(lambda: self._count > count or self.closed, _QUIET_S)
            return self._count, self._answer


class _Handler(BaseHTTPRequestHandler):
    page: LivePage

    def log_message(self, *_: Any) -> None:
        """Say nothing: the terminal shows answers."""

    def _place(self) -> str | None:
        """Return what is asked for behind the token; None, with an answer sent, if nothing."""
        # Other names for this machine may be a foreign page's (DNS rebinding).
        hosts = {f"127.0.0.1:{self.page.port}", f"localhost:{self.page.port}"}
        _, _, rest = self.path.partition("/")
        token, _, place = rest.partition("/")
        known = hmac.compare_digest(token.encode(), self.page.token.encode())
        if self.headers.get("Host") in hosts and known:
            return place.partition("?")[0]
        self.send_error(404)
        return None

    def _send(self, kind: str, body: bytes) -> None:
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "no-store")
        self.send_header("Referrer-Policy", "no-referrer")
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self) -> None:
        """Serve the page, its answers or its picture."""
        place = self._place()
        if place == "":
            page = package_files("karmma_pipeline.recognition") / "live.html"
            self._send("text/html; charset=utf-8", page.read_bytes())
        elif place == "picture":
            self._send("image/jpeg", self.page.picture)
        elif place == "answers":
            self._answers()
        elif place is not None:
            self.send_error(404)

    def _answers(self) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Cache-Control", "no-store")
        self.end_headers()
        count = 0
        try:
            while not self.page.closed:
                now, answer = self.page.after(count)
                self.wfile.write(f"data: {answer}\n\n".encode() if now > count else b": quiet\n\n")
                self.wfile.flush()
                count = now
        except (BrokenPipeError, ConnectionResetError):
            return

    def do_POST(self) -> None:
        """Switch a modality: ``{"modality": "rgb", "on": false}``."""
        place = self._place()
        if place is None:
            return
        length = self.headers.get("Content-Length", "")
        body = self.rfile.read(min(int(length), _MOST)) if length.isdecimal() else b""
        try:
            if place != "switch":
                raise ConfigError(place)
            asked = json.loads(body)
            self.page.switch(str(asked["modality"]), bool(asked["on"]))
        except (ConfigError, ValueError, KeyError, TypeError):
            self.send_error(400)
        else:
            self._send("application/json", b"{}")
