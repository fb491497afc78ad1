"""The server of the page: what it serves, as what, to whom; and the page's own tests, where Node and Chromium are."""

import importlib.util
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pytest

from mambavision.cli import demo, main
from mambavision.inference.picture_files import SAMPLES

ROOT = Path(__file__).parents[1]
WEB = ROOT / "web"


FILES = ("index.html", "main.js", "style.css", "ort.mjs", "ort.wasm", "model.onnx", "model.json", "samples/a.jpg")


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """A folder that looks like the built page, beside a file that is not part of it."""
    folder = tmp_path_factory.mktemp("web") / "dist"
    (folder / "samples").mkdir(parents=True)
    for name in FILES:
        (folder / name).write_bytes(name.encode())
    (folder.parent / "secret.txt").write_text("not for the web")
    return folder


@pytest.fixture(scope="module")
def address(page):
    with demo.open_server(page, 0) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield "http://{}:{}".format(*server.server_address)
        server.shutdown()
        thread.join()


def get(url):
    try:
        with urllib.request.urlopen(url, timeout=10) as answer:
            return answer.status, answer.headers, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.headers, error.read()


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("", "text/html; charset=utf-8"),
        ("main.js", "text/javascript"),
        ("style.css", "text/css"),
        ("ort.mjs", "text/javascript"),
        ("ort.wasm", "application/wasm"),
        ("model.onnx", "application/octet-stream"),
        ("model.json", "application/json"),
        ("samples/a.jpg", "image/jpeg"),
    ],
)
def test_files_come_with_their_types_and_the_headers_that_threads_need(address, name, kind):
    status, headers, body = get(f"{address}/{name}")
    assert (status, headers["Content-Type"], body) == (200, kind, (name or "index.html").encode())
    assert headers["Cross-Origin-Opener-Policy"] == "same-origin"
    assert headers["Cross-Origin-Embedder-Policy"] == "require-corp"


@pytest.mark.parametrize("name", ["missing.js", "samples/", "../secret.txt", "%2e%2e/secret.txt", "..%2fsecret.txt"])
def test_nothing_else_is_served(address, name, capsys):
    status, _, body = get(f"{address}/{name}")
    assert status == 404
    assert b"not for the web" not in body
    assert "404" in capsys.readouterr().err


def test_it_listens_to_this_machine_alone(page):
    with demo.open_server(page, 0) as server:
        assert server.server_address[0] == "127.0.0.1"


def test_good_answers_are_not_told(address, capsys):
    get(address)
    assert capsys.readouterr().err == ""


def test_a_checkout_knows_where_its_page_is_built():
    assert demo.BUILT == WEB / "dist"
    scripts = json.loads((WEB / "package.json").read_text())["scripts"]
    assert {"build", "test"} <= set(scripts)


@pytest.mark.parametrize("arguments", [[], ["--dir", "nowhere"]])
def test_without_a_built_page_one_sentence_says_how_to_build_it(arguments, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(demo, "BUILT", tmp_path / "none")
    assert main(["demo", *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert "npm --prefix web ci && npm --prefix web run build" in err


def test_a_port_in_use_is_named(page, capsys):
    with socket.create_server(("127.0.0.1", 0)) as other:
        taken = other.getsockname()[1]
        assert main(["demo", "--dir", str(page), "--port", str(taken), "--no-browser"]) == 2
    assert capsys.readouterr().err == (
        f"mambavision: Port {taken} is in use; --port names another, --port 0 takes a free one.\n"
    )
    assert main(["demo", "--port", "65536"]) == 2


@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
def test_the_command_serves_until_control_c(page):
    command = [sys.executable, "-m", "mambavision", "demo", "--dir", str(page), "--port", "0", "--no-browser"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    address = process.stdout.readline().split()[0]
    assert get(address)[0] == 200
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert (process.returncode, err.strip()) == (0, "")


def test_a_browser_is_opened_where_it_is_wanted(page, monkeypatch):
    opened = []
    monkeypatch.setattr("webbrowser.open", opened.append)
    monkeypatch.setattr(demo.ThreadingHTTPServer, "serve_forever", lambda _: None)
    assert main(["demo", "--dir", str(page), "--port", "0"]) == 0
    assert main(["demo", "--dir", str(page), "--port", "0", "--no-browser"]) == 0
    assert len(opened) == 1
    assert opened[0].startswith("http://127.0.0.1:")


def test_what_the_page_is_compared_with_is_what_pytorch_and_pillow_give():
    """`web/test/expected.json` is as fresh as the weights and the sample photographs."""
    spec = importlib.util.spec_from_file_location("make_expected", WEB / "test" / "make_expected.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    stored, now = json.loads(module.EXPECTED.read_text()), module.expected()
    assert stored["resized"] == now["resized"]
    assert set(stored["samples"]) == set(now["samples"])
    for name, entry in stored["samples"].items():
        assert set(entry["probabilities"]) == set(now["samples"][name]["probabilities"])
        for label, probability in entry["probabilities"].items():
            np.testing.assert_allclose(probability, now["samples"][name]["probabilities"][label], atol=2e-3)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(shutil.which("npm") is None, reason="needs Node.js")
@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs Chromium")
def test_the_page_in_chromium(tmp_path):
    """Installed, built and tested from a copy as `docs/demo.md` says."""
    pytest.importorskip("onnxscript")
    ignored = shutil.ignore_patterns("node_modules", "dist")
    shutil.copytree(WEB, tmp_path / "web", ignore=ignored)
    shutil.copytree(SAMPLES, tmp_path / "src" / "mambavision" / "assets" / "samples")
    environment = {**os.environ, "PYTHON": sys.executable}
    for command in (["ci"], ["run", "build"], ["test"]):
        done = subprocess.run(
            ["npm", "--prefix", str(tmp_path / "web"), *command],
            env=environment,
            cwd=tmp_path / "web",
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
