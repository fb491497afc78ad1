"""`mambavision demo`: the page in `web/`, served to this machine alone."""

from __future__ import annotations

import argparse
import errno
import sys
import webbrowser
from collections.abc import Sequence
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from mambavision.cli.arguments import UsageError

SUMMARY = "Serve the page that classifies photos in the browser, to this machine alone."
HOST = "127.0.0.1"
# Where a source checkout builds it.
BUILT = Path(__file__).parents[3] / "web" / "dist"
BUILD = "npm --prefix web ci && npm --prefix web run build"
_HEADERS = {
    # What WebAssembly threads need: nothing of another origin beside the page.
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Embedder-Policy": "require-corp",
    "Cross-Origin-Resource-Policy": "same-origin",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-cache",
}


def port(text: str) -> int:
    """A port number; 0 for a free one."""
    value = int(text)
    if not 0 <= value <= 65535:
        raise argparse.ArgumentTypeError(f"must be in 0..65535, got {value}")
    return value


def build_parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    parser = argparse.ArgumentParser(
        prog="mambavision demo",
        description="Serve the built page on 127.0.0.1 until Ctrl-C. The model runs in the browser; nothing is sent.",
        epilog=f"To build it, in a checkout of the source: {BUILD}",
    )
    parser.add_argument("--dir", type=Path, metavar="DIR", help="the built page (default: web/dist of the checkout)")
    parser.add_argument("--port", type=port, default=8000, metavar="N", help="default: 8000; 0 takes a free one")
    parser.add_argument("--no-browser", action="store_true", help="do not open a browser")
    return parser


def main(argv: Sequence[str]) -> int:
    """Run the command until it is interrupted."""
    options = build_parser().parse_args(argv)
    with open_server(find_page(options.dir), options.port) as server:
        address = f"http://{HOST}:{server.server_address[1]}/"
        print(f"{address} (Ctrl-C stops it)", flush=True)
        if not options.no_browser:
            webbrowser.open(address)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print(file=sys.stderr)
    return 0


def find_page(folder: Path | None) -> Path:
    """The folder with the built page; UsageError with the way to build it when there is none."""
    found = BUILT if folder is None else folder
    if not (found / "index.html").is_file() or not (found / "model.onnx").is_file():
        where = "here" if folder is None else f"in {folder}"
        raise UsageError(f"There is no built page {where}; in a checkout of the source, {BUILD} makes web/dist.")
    return found


def open_server(folder: Path, port: int) -> ThreadingHTTPServer:
    """A server of the files in `folder` on the loopback interface; UsageError when the port cannot be had."""
    try:
        return ThreadingHTTPServer((HOST, port), partial(_Handler, directory=str(folder)))
    except OSError as error:
        if error.errno not in (errno.EADDRINUSE, errno.EACCES):
            raise
        why = "is in use" if error.errno == errno.EADDRINUSE else "may not be used"
        raise UsageError(f"Port {port} {why}; --port names another, --port 0 takes a free one.") from error


class _Handler(SimpleHTTPRequestHandler):
    """Files with their types and headers; folders are not listed, and only failures are told."""

    # The system's own table may know these wrongly, and a browser takes no module or WebAssembly of another type.
    extensions_map = {  # noqa: RUF012  (as the base class declares it)
        **SimpleHTTPRequestHandler.extensions_map,
        ".css": "text/css",
        ".html": "text/html; charset=utf-8",
        ".js": "text/javascript",
        ".json": "application/json",
        ".mjs": "text/javascript",
        ".onnx": "application/octet-stream",
        ".wasm": "application/wasm",
    }

    def end_headers(self) -> None:
        for name, value in _HEADERS.items():
            self.send_header(name, value)
        super().end_headers()

    def list_directory(self, path: object) -> None:  # noqa: ARG002  (the signature of the base class)
        self.send_error(404, "File not found")

    def log_request(self, code: object = "-", size: object = "-") -> None:
        if str(getattr(code, "value", code)) >= "400":
            super().log_request(code, size)  # type: ignore[arg-type]


# What argparse calls it where it refuses the text.
port.__name__ = "port"
