"""What our pages have in common: Flower's login, and what protects a change from being asked for by another site."""

from __future__ import annotations

import logging
import os
from base64 import b64decode
from typing import Any
from urllib.parse import urlsplit

import tornado.web
from flower.utils import strtobool
from flower.views import BaseHandler
from sqlalchemy.exc import SQLAlchemyError

from orchestrator import errors
from orchestrator.flower.source import Source

logger = logging.getLogger("orchestrator.flower")

#: Should a value ever get onto a page unescaped, it is still no script that a browser would run.
_POLICY = "; ".join(
    (
        "default-src 'self'",
        "style-src 'self' 'unsafe-inline'",
        "img-src 'self' data:",
        "object-src 'none'",
        "base-uri 'none'",
        "form-action 'self'",
        "frame-ancestors 'none'",
    )
)


class Refused(tornado.web.HTTPError):
    """A request that is answered with a page that says why not."""

    def __init__(self, status_code: int, words: str) -> None:
        super().__init__(status_code)
        self.words = words


class WorkflowsHandler(BaseHandler):
    """A page behind Flower's login."""

    def initialize(self, source: Source) -> None:
        self.source = source

    def set_default_headers(self) -> None:
        # not Flower's own, which lets other sites read its pages where it has no login
        self.set_header("X-Content-Type-Options", "nosniff")
        self.set_header("Content-Security-Policy", _POLICY)
        self.set_header("X-Frame-Options", "DENY")
        self.set_header("Referrer-Policy", "same-origin")
        self.set_header("Cache-Control", "no-store")

    def check_xsrf_cookie(self) -> None:
        """Refuse what does not come from a form of ours, in whichever way Flower is protected.

        Flower itself asks for no token where its login is basic authentication, which browsers send along with whatever
        another site makes them send, and asks nothing at all where it has no login.
        """
        headers = self.request.headers
        sender = headers.get("Sec-Fetch-Site")
        if sender not in (None, "same-origin", "none"):
            raise Refused(403, "This was asked for by another site.")
        origin = headers.get("Origin")
        if sender is None and origin is not None and urlsplit(origin).netloc != self.request.host:
            raise Refused(403, "This was asked for by another site.")
        tornado.web.RequestHandler.check_xsrf_cookie(self)

    def find_objection(self) -> str | None:
        """Say why nothing may be changed; ``None`` where it may."""
        options = self.application.options
        if getattr(options, "read_only", False):
            return "Flower is read-only (--read-only): nothing can be changed here."
        if options.basic_auth or options.auth:
            return None
        if strtobool(os.environ.get("FLOWER_UNAUTHENTICATED_API") or "false"):
            return None
        return (
            "Flower has no login: workflows can be looked at, not changed. Start it with --basic-auth or --auth "
            "(or set FLOWER_UNAUTHENTICATED_API, which lets anybody who reaches it change anything)."
        )

    def name_user(self) -> str:
        """Return who is logged in, for the log."""
        if isinstance(self.current_user, str):
            return self.current_user
        basic, _, credentials = self.request.headers.get("Authorization", "").partition(" ")
        if basic == "Basic" and self.application.options.basic_auth:  # Flower has checked them
            return b64decode(credentials).decode(errors="replace").partition(":")[0]
        return "anybody"

    def log_exception(self, typ: Any, value: BaseException | None, tb: Any) -> None:
        if not isinstance(value, errors.UnknownInstance):
            super().log_exception(typ, value, tb)

    def write_error(self, status_code: int, **kwargs: Any) -> None:
        error = (kwargs.get("exc_info") or (None, None))[1]
        match error:
            case Refused():
                return self.explain(status_code, error.words)
            case errors.UnknownInstance():
                return self.explain(404, str(error))
            case errors.StoreUnreachable():
                return self.explain(503, str(error))
            case SQLAlchemyError():
                return self.explain(503, "The store could not be read; Flower's log says why. Try again.")
        super().write_error(status_code, **kwargs)
        return None

    def explain(self, status_code: int, words: str) -> None:
        """Answer with a page that holds a sentence."""
        self.set_status(status_code)
        self.render("orchestrator-refused.html", status_code=status_code, words=words)
