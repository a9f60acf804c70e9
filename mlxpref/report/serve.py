"""The page of a run that is still going on, on this machine alone: written anew when its metrics have grown."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from hashlib import blake2b
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Lock
from typing import Any
from urllib.parse import urlsplit

from mlxpref.errors import MlxprefError, RunError

HOST = "127.0.0.1"

LIVE = """<script>
const stateOf = page => page.querySelector("meta[name=state]").content;
let shown = stateOf(document);
async function look() {
  try {
    const state = await (await fetch("state")).text();
    if (state !== shown) {
      const answer = await fetch("./");
      const page = new DOMParser().parseFromString(await answer.text(), "text/html");
      const found = page.querySelector("main");
      if (answer.ok && found) {
        const open = [...document.querySelectorAll("details")].map(one => one.open);
        document.querySelector("main").replaceWith(found);
        document.querySelectorAll("details").forEach((one, at) => { if (at in open) one.open = open[at]; });
        shown = stateOf(page);
      }
    }
  } catch (gone) { return; }
  setTimeout(look, 3000);
}
look();
</script>
"""
"""Asks every three seconds whether there is something newer than what the page was made from, and ends when nobody
answers."""


def state_of(files: Sequence[Path]) -> str:
    """Changes when one of the files does."""
    found = blake2b(digest_size=8)
    for file in files:
        stat = file.stat() if file.exists() else None
        found.update(f"{file}:{stat and (stat.st_size, stat.st_mtime_ns)};".encode())
    return found.hexdigest()


def server(make: Callable[[], str], files: Sequence[Path], *, port: int = 0) -> ThreadingHTTPServer:
    """A server of one page, bound to this machine's own address; ``serve_forever`` starts it.

    Args:
        make: the page as it is now, with a head; called when one of the files has changed since.
        files: what the page is made from.
        port: 0 takes one that is free.

    Raises:
        RunError: the port is taken.
    """
    lock = Lock()
    known: dict[str, str] = {}

    def current() -> str:
        with lock:
            state = state_of(files)
            if state not in known:
                known.clear()
                known[state] = make().replace("<head>", f'<head>\n<meta name="state" content="{state}">', 1)
            return known[state]

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            where = urlsplit(self.path).path
            if self.headers.get("Host", "").partition(":")[0] not in (HOST, "localhost"):
                self._send(403, "text/plain", "this page is for this machine alone")  # another name leads here
            elif where == "/state":
                self._send(200, "text/plain", state_of(files))
            elif where == "/":
                try:
                    self._send(200, "text/html", current())
                except Exception as error:  # a file is being written, or is none of ours: the next look may do
                    self._send(503, "text/plain", str(error) if isinstance(error, MlxprefError) else repr(error))
            else:
                self._send(404, "text/plain", "there is one page here, /")

        def _send(self, code: int, kind: str, text: str) -> None:
            body = text.encode()
            with suppress(ConnectionError):  # the page was closed meanwhile
                self.send_response(code)
                self.send_header("Content-Type", f"{kind}; charset=utf-8")
                self.send_header("Content-Length", str(len(body)))
                self.send_header("Cache-Control", "no-store")
                self.end_headers()
                self.wfile.write(body)

        def log_message(self, format: str, *arguments: Any) -> None:
            """Say nothing: the terminal is the user's."""

    try:
        return ThreadingHTTPServer((HOST, port), Handler)
    except OSError as error:
        raise RunError(f"port {port}: {error.strerror}; choose another with --port") from error
