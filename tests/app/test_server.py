"""What a browser may ask for: the page and its results, nothing else of this computer."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from dit_accel import app
from dit_accel.app.options import MethodControls, option_help
from dit_accel.app.page import build_page
from dit_accel.app.server import make_app, serving
from dit_accel.app.settings import AppSettings
from dit_accel.app.site import Site
from dit_accel.cli.options import GENERAL, method_hints
from dit_accel.errors import OptionError
from dit_accel.kinds import KINDS
from dit_accel.registry import list_methods, method_class

ROOT = Path(__file__).parents[2]
HERE = {"host": "localhost"}


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Site:
    return Site(AppSettings(output=tmp_path_factory.mktemp("results")))


@pytest.fixture(scope="module")
def client(site) -> TestClient:
    return TestClient(make_app(site), headers=HERE)


def test_only_files_of_results_are_served(client, site):
    name, folder = site.store.begin()
    (folder / "clip.mp4").write_bytes(bytes(range(100)))
    (folder / "secret.txt").write_text("secret")
    site.store.keep(name, {}, [folder / "clip.mp4"])
    assert client.get(f"/results/{name}/clip.mp4").status_code == 200
    part = client.get(f"/results/{name}/clip.mp4", headers={"range": "bytes=10-19"})
    assert (part.status_code, part.content) == (206, bytes(range(10, 20)))
    for path in (
        f"/results/{name}/secret.txt",
        f"/results/{name}/result.json",
        f"/results/{name}/../{name}/secret.txt",
        f"/results/{name}/%2e%2e/%2e%2e/%2e%2e/etc/passwd",
        f"/results/{name}//etc/passwd",
        "/results/..%2f..%2f..%2fetc/passwd/x",
        "/page/../settings.py",
        "/page/%2e%2e%2fserver.py",
    ):
        assert client.get(path).status_code in (403, 404), path


@pytest.mark.parametrize(
    "path",
    [
        "file=/etc/passwd",
        "file=pyproject.toml",
        f"file={ROOT / 'README.md'}",
        "file=https://example.com/x",
        "file/etc/passwd",
        "proxy=https://example.com",
        "info",
        "openapi.json",
        "runs",
        "stream/x/1/1/playlist.m3u8",
        "monitoring",
    ],
)
def test_gradio_serves_nothing_else(client, path):
    answer = client.get(f"/gradio_api/{path}")
    assert answer.status_code in (403, 404)


def test_nothing_can_be_uploaded(client):
    answer = client.post("/gradio_api/upload", files={"files": b"x"})
    assert answer.status_code == 403
    answer = client.post("/gradio_api/queue/join", content=b"x" * (2**20 + 1))
    assert answer.status_code == 413


def test_a_name_that_is_not_ours_is_refused(client):
    assert client.get("/", headers={"host": "evil.example"}).status_code == 400
    for origin in ("http://evil.example", "null"):
        answer = client.post("/gradio_api/queue/join", json={}, headers={"origin": origin})
        assert answer.status_code == 403
    answer = client.get("/")
    assert answer.status_code == 200
    assert "default-src 'self'" in answer.headers["content-security-policy"]


def test_nothing_of_the_page_comes_from_elsewhere(client):
    text = client.get("/").text
    assert "fonts.googleapis.com" not in text
    assert '"analytics_enabled":false' in text.replace(" ", "")


def test_it_listens_on_this_computer_alone_by_default():
    settings = AppSettings()
    assert settings.host == "127.0.0.1"
    assert settings.is_local
    assert not AppSettings(host="0.0.0.0").is_local


def test_a_port_in_use_is_told(tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        settings = AppSettings(port=taken.getsockname()[1], output=tmp_path)
        with pytest.raises(OptionError, match="--port 0 for any that is free"), serving(settings):
            pass


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"port": 70000}, "is no port"),
        ({"max_steps": 0}, "max_steps=0 must be at least 1"),
        ({"models": ("/no/such/folder",)}, "does not exist"),
        ({"output": Path(__file__)}, "is a file: name a folder"),
    ],
)
def test_wrong_settings_are_told(changes, message):
    with pytest.raises(OptionError, match=message):
        AppSettings(**changes)


def test_models_of_the_hub_need_leave(tmp_path, monkeypatch):
    with pytest.raises(OptionError, match="--allow-any-model"):
        AppSettings().check_model("Wan-AI/Wan2.1-T2V-1.3B-Diffusers")
    settings = AppSettings(allow_any_model=True)
    assert settings.check_model("Wan-AI/Wan2.1-T2V-1.3B-Diffusers").startswith("Wan-AI")
    (tmp_path / "org" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    for folder in ("org/name", "../x", "/etc", "a/b/c", "~/x", "a/..", "./a"):
        with pytest.raises(OptionError, match="is no hub id"):
            settings.check_model(folder)


def test_options_can_not_name_files():
    controls = MethodControls(["guidance", "cache"])
    given = {"guidance method": "softpag", "cache method": "profiling_cache"}
    for name, value in (
        ("softpag.heads", "/etc/passwd"),
        ("softpag.heads", "heads.json"),
        ("softpag.heads", "12"),
        ("profiling_cache.profile", "../profile.json"),
    ):
        with pytest.raises(OptionError, match="files can't be named in the page"):
            controls.assignments({**given, name: value})
    attention = MethodControls(["attention"])
    attention.boxes["backend"] = None
    with pytest.raises(OptionError, match="write a name or numbers"):
        attention.assignments({"attention method": "auto", "backend": "../x"})
    assert controls.assignments({**given, "softpag.heads": "1:2, 3:0"}) == ["heads=1:2, 3:0"]


def test_every_method_has_its_controls(site):
    import gradio as gr

    controls = MethodControls(list(KINDS))
    with gr.Blocks():
        controls.draw_choices({})
        controls.draw_options({})
    expected = {name for name in GENERAL if name != "density"}
    for method in list_methods():
        expected |= {f"{method}.{o}" for o in method_hints(method) if o not in GENERAL}
    assert set(controls.boxes) == expected
    labels = {getattr(block, "label", None) for block in build_page(site).blocks.values()}
    assert {"Model", "Prompt", "Method", "Feature cache", "Steps", "Seed"} <= labels


@pytest.mark.parametrize("method", list_methods())
def test_docstrings_explain_options(method):
    words = option_help(method_class(method))
    assert all(text and text[0].isupper() for text in words.values() if text[0].isalpha())


def test_missing_gradio_is_told(monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(OptionError, match=r"pip install 'dit-accel\[app\]'"):
        app.serve(AppSettings())


def test_app_without_gradio_prints_one_line():
    hide = "import runpy, sys; sys.modules['gradio'] = None; sys.argv = ['app.py']"
    script = f"{hide}; runpy.run_path('app.py', run_name='__main__')"
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: the page needs gradio")
    assert len(done.stderr.splitlines()) == 1
