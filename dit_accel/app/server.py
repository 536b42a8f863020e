"""Serves the page: what a browser may ask for, and nothing else."""

from __future__ import annotations

import inspect
import ipaddress
import logging
import socket
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import gradio as gr
import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import FileResponse, PlainTextResponse, Response
from starlette.middleware.trustedhost import TrustedHostMiddleware

from dit_accel.app.page import build_page, theme
from dit_accel.app.settings import AppSettings
from dit_accel.app.site import Site
from dit_accel.app.views import RESULTS
from dit_accel.errors import OptionError

STATIC = Path(__file__).parent / "static"
API = "/gradio_api/"
OPEN_API = ("queue/join", "queue/data", "heartbeat/", "startup-events", "app_id", "cancel", "reset")
"""What the page needs of gradio's own interface. Its routes for files, uploads, proxied pages and
the like stay shut."""
MAX_BODY = 2**20
POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; "
    "style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; media-src 'self' blob:; "
    "font-src 'self' data:; connect-src 'self'; object-src 'none'; base-uri 'self'; "
    "form-action 'self'; frame-ancestors 'self'"
)
"""Nothing is loaded from anywhere else, so the page works offline."""
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}


def make_app(site: Site) -> FastAPI:
    """Return the web application of a site."""
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)

    @app.get(f"/{RESULTS}/{{name}}/{{file:path}}")
    def result(name: str, file: str) -> Response:
        path = site.store.file(name, file)
        if path is None:
            return PlainTextResponse("There is no such file.", 404)
        return FileResponse(path)

    @app.get("/page/{file}")
    def static(file: str) -> Response:
        if file not in ("page.js", "page.css"):
            return PlainTextResponse("There is no such file.", 404)
        return FileResponse(STATIC / file)

    @app.middleware("http")
    async def guard(request: Request, answer: Callable[[Request], Awaitable[Response]]) -> Response:
        path = request.url.path
        wanted = path.removeprefix(API)
        if path.startswith(API) and not wanted.startswith(OPEN_API):
            return PlainTextResponse("This page does not offer that.", 403)
        origin = request.headers.get("origin")
        if origin is not None and urlsplit(origin).netloc != request.headers.get("host"):
            return PlainTextResponse("Other pages may not use this one.", 403)
        if int(request.headers.get("content-length") or 0) > MAX_BODY:
            return PlainTextResponse("This request is too large.", 413)
        response = await answer(request)
        response.headers.update(HEADERS)
        return response

    if site.settings.is_local:
        # A page elsewhere could have its own name point here, and then talk to this one.
        hosts = ["localhost", "127.0.0.1", "[::1]", "::1"]
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=hosts)
    options: dict[str, Any] = {
        "path": "/",
        "server_name": site.settings.host,
        "server_port": site.settings.port,
        "footer_links": [],
        "blocked_paths": ["/"],
        "show_error": False,
        "ssr_mode": False,
        "theme": theme(),
        "css_paths": [STATIC / "page.css"],
        "head": '<script src="page/page.js" defer></script>',
        "run_history": False,
        "enable_monitoring": False,
    }
    known = inspect.signature(gr.mount_gradio_app).parameters  # older ones have no run history
    return gr.mount_gradio_app(
        app, build_page(site), **{name: options[name] for name in options if name in known}
    )


@contextmanager
def serving(settings: AppSettings) -> Iterator[tuple[uvicorn.Server, str]]:
    """Yield a server that is ready to ``run``, and the page's address.

    Raises:
        OptionError: if the address can't be listened on, or the folder of results can't be made.
    """
    site = Site(settings)
    listener = _listen(settings)
    port = listener.getsockname()[1]
    app = make_app(site)
    server = uvicorn.Server(
        uvicorn.Config(app, log_level="warning", fd=listener.fileno(), timeout_graceful_shutdown=1)
    )
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    logging.getLogger("httpx").setLevel(logging.WARNING)
    try:
        yield server, f"http://{host}:{port}"
    finally:
        site.jobs.close()
        listener.close()


def _listen(settings: AppSettings) -> socket.socket:
    try:
        version = ipaddress.ip_address(settings.host).version
    except ValueError:
        version = 4
    family = socket.AF_INET6 if version == 6 else socket.AF_INET
    listener = socket.socket(family)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((settings.host, settings.port))
    except OSError as error:
        listener.close()
        raise OptionError(
            f"can't listen on {settings.host}, port {settings.port} ({error.strerror}): give "
            "another --port, or --port 0 for any that is free."
        ) from error
    listener.listen()
    return listener
