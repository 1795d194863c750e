"""Serves the page: to this machine alone unless a password is demanded, from one folder, with limits.

Invariant: nothing leaves the machine (no public link, no telemetry, no font or script from elsewhere, which a policy in every
answer forbids the browser as well), and no file outside the page's folder is served.
"""

import os
from collections.abc import Awaitable, Callable, MutableMapping
from pathlib import Path
from typing import Any

from sora_jax.commands.web import gallery
from sora_jax.commands.web.studio import Studio

MAX_UPLOAD = "50mb"
MAX_WAITING = 64  # requests in the queue; one more is refused in words
# Gradio keeps a copy of the whole page for every session, 0.2 MB, and as many as 10,000 unless it is told otherwise; a session
# that it forgot begins anew with the next press.
_MAX_SESSIONS = 64
_POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; media-src 'self' data: blob:; font-src 'self' data:; connect-src 'self' data: blob:; "
    "worker-src 'self' blob:; frame-ancestors 'none'; base-uri 'self'; form-action 'self'"
)
_HEADERS = (
    (b"content-security-policy", _POLICY.encode()),
    (b"referrer-policy", b"no-referrer"),
    (b"x-content-type-options", b"nosniff"),
)
_SCOPE = MutableMapping[str, Any]


class Guard:
    """Adds the policy to every answer, refuses hosts of other names, and hides what a failure of the server says.

    A visitor without a secret gets one, as a cookie that no script reads and no other page sends.
    """

    def __init__(self, app: Callable[..., Awaitable[None]], hosts: frozenset[str] | None):
        self.app, self.hosts = app, hosts

    async def __call__(self, scope: _SCOPE, receive: Callable[..., Any], send: Callable[..., Any]) -> None:
        """Passes a request on."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        named = dict(scope["headers"]).get(b"host", b"").decode("latin-1").rpartition(":")[0] or ""
        if self.hosts is not None and named not in self.hosts:  # another name that leads to this machine: DNS rebinding
            await _answer(send, 421, b"this page answers to localhost only")
            return
        scope, added = _known(scope)
        started = False

        async def guarded(message: MutableMapping[str, Any]) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                message = {**message, "headers": [*message.get("headers", ()), *_HEADERS, *added]}
            await send(message)

        try:
            await self.app(scope, receive, guarded)
        except Exception:
            if started:  # the answer ends here
                await send({"type": "http.response.body", "body": b""})
                return
            await _answer(send, 400, b"the request cannot be read")


def _known(scope: _SCOPE) -> tuple[_SCOPE, list[tuple[bytes, bytes]]]:
    """Returns a request with the secret of its visitor, and the headers that tell the visitor a new one."""
    sent = "; ".join(value.decode("latin-1") for name, value in scope["headers"] if name == b"cookie")
    if gallery.secret_of(sent) is not None:
        return scope, []
    cookie = f"{gallery.COOKIE}={gallery.new_secret()}"
    others = [(name, value) for name, value in scope["headers"] if name != b"cookie"]
    cookies = cookie if not sent else f"{sent}; {cookie}"
    added = (b"set-cookie", f"{cookie}; Path=/; HttpOnly; SameSite=Strict".encode())
    return {**scope, "headers": [*others, (b"cookie", cookies.encode("latin-1"))]}, [added]


async def _answer(send: Callable[..., Any], status: int, text: bytes) -> None:
    headers = [(b"content-type", b"text/plain"), *_HEADERS]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": text})


def prepare(folder: Path) -> None:
    """Sets what Gradio reads when it is imported: its temporary files lie in ``folder``, and it reports to nobody."""
    os.environ |= {
        "GRADIO_TEMP_DIR": str(folder / gallery.SERVED),
        "GRADIO_ANALYTICS_ENABLED": "False",
        "GRADIO_ANALYTICS_MAX_EVENTS": "100",  # what its queue remembers of each request, for a page of figures that is off
        "GRADIO_SSR_MODE": "False",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "DO_NOT_TRACK": "1",
    }


def serve(studio: Studio, *, host: str, port: int, auth: tuple[str, str] | None) -> tuple[Any, str]:
    """Starts to serve, and returns the page with `close`, and its address.

    Raises:
      OSError: the port is taken, or the address not this machine's.
    """
    from starlette.middleware import Middleware

    from sora_jax.commands.web.layout import build, theme

    local = host in ("127.0.0.1", "localhost", "::1")
    hosts = frozenset({"127.0.0.1", "localhost", "[::1]"}) if local else None
    page = build(studio).queue(max_size=MAX_WAITING, default_concurrency_limit=4)
    _, address, _ = page.launch(
        server_name=host,
        server_port=port,
        share=False,
        inbrowser=False,
        prevent_thread_lock=True,
        quiet=True,
        show_error=False,
        auth=auth,
        max_file_size=MAX_UPLOAD,
        allowed_paths=[],  # only what lies in its folder of temporary files, under names that nobody can guess
        state_session_capacity=_MAX_SESSIONS,
        footer_links=[],
        enable_monitoring=False,
        ssr_mode=False,
        pwa=False,
        mcp_server=False,
        theme=theme(),
        app_kwargs={"middleware": [Middleware(Guard, hosts=hosts)], "docs_url": None, "redoc_url": None, "openapi_url": None},
    )
    return page, address
