"""Flower's own application with our pages in it, in a thread of the test's process."""

from __future__ import annotations

import asyncio
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any
from urllib.parse import quote

import httpx
from flower import urls
from flower.app import Flower
from flower.options import default_options
from tornado.httpserver import HTTPServer
from tornado.ioloop import IOLoop
from tornado.netutil import bind_sockets

from orchestrator import Orchestrator
from orchestrator.flower.extension import extend

LOGIN = ("ada", "secret")


@dataclass
class Site:
    """A Flower that is being served; ``options`` are its own, and may be changed while it is."""

    url: str
    options: Any
    client: httpx.Client = field(init=False)

    def __post_init__(self) -> None:
        self.client = httpx.Client(base_url=self.url, auth=LOGIN, timeout=30)

    def path_of(self, instance_id: str) -> str:
        return f"/workflow/{quote(instance_id, safe='')}"

    def read(self, instance_id: str, query: str = "") -> str:
        """Return the page of an instance."""
        answer = self.client.get(self.path_of(instance_id) + query)
        assert answer.status_code == 200, answer.text
        return answer.text

    def list(self, query: str = "") -> str:
        answer = self.client.get(f"/workflows{query}")
        assert answer.status_code == 200, answer.text
        return answer.text

    def act(self, instance_id: str, action: str, **form: str) -> httpx.Response:
        """Send the form of an action, with the token of its page."""
        token = re.search(r'name="_xsrf" value="([^"]+)"', self.read(instance_id))
        data = {"action": action, **form, "_xsrf": token[1] if token else self.client.cookies.get("_xsrf") or ""}
        return self.client.post(self.path_of(instance_id), data=data)


@contextmanager
def serving(orchestrator: Orchestrator, **options: Any) -> Iterator[Site]:
    """Serve Flower with pages about the workflows of ``orchestrator``."""
    own = SimpleNamespace(**{**dict(default_options.items()), "basic_auth": [":".join(LOGIN)], **options})
    settings, handlers = dict(urls.settings), list(urls.handlers)
    sockets = bind_sockets(0, "127.0.0.1")
    source = extend(urls.handlers, settings, orchestrator)
    started = threading.Event()
    running: dict[str, Any] = {}

    def serve() -> None:
        asyncio.set_event_loop(asyncio.new_event_loop())
        loop = running["loop"] = IOLoop.current()
        application = Flower(capp=orchestrator.app, options=own, io_loop=loop, **settings)
        server = running["server"] = HTTPServer(application)
        server.add_sockets(sockets)
        loop.add_callback(started.set)
        loop.start()
        application.executor.shutdown(wait=False)
        loop.close()

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    try:
        assert started.wait(30)
        site = Site(f"http://127.0.0.1:{sockets[0].getsockname()[1]}", own)
        yield site
        site.client.close()
    finally:
        urls.handlers[:] = handlers

        async def stop() -> None:
            running["server"].stop()
            await running["server"].close_all_connections()
            running["loop"].stop()

        running["loop"].add_callback(stop)
        thread.join(30)
        source.close()
