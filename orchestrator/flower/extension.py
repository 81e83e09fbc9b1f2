"""Where our pages are put into Flower: in front of its handlers, and beside its templates."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tornado.template import DictLoader
from tornado.web import StaticFileHandler, url

from orchestrator.flower.handlers import InstanceHandler, ListHandler
from orchestrator.flower.source import Source
from orchestrator.runtime.app import Orchestrator

_HERE = Path(__file__).parent

#: An entry like those of Flower's navigation bar; ``active_tab`` is set by the page that shows it.
_LINK = """
<li class="nav-item">
  <a class="nav-link text-reset{% if active_tab == 'workflows' %} active{% end %}" href="{{ reverse_url('workflows') }}"
    {% if active_tab == 'workflows' %}aria-current="page"{% end %}>Workflows</a>
</li>
"""


def extend(handlers: list[Any], settings: dict[str, Any], orchestrator: Orchestrator) -> Source:
    """Add pages about the workflows of ``orchestrator`` to Flower's ``handlers`` and ``settings``.

    Done before Flower's application is made, which adds its ``url_prefix`` to them as to its own.
    """
    source = Source(orchestrator)
    handlers[:0] = [
        url(r"/workflows", ListHandler, {"source": source}, name="workflows"),
        url(r"/workflow/(.+)", InstanceHandler, {"source": source}, name="workflow"),
        url(r"/workflow-assets/(.*)", StaticFileHandler, {"path": str(_HERE / "assets")}, name="workflow_asset"),
    ]
    settings["template_loader"] = make_loader(Path(settings["template_path"]))
    return source


def make_loader(flowers: Path) -> DictLoader:
    """Return a loader of Flower's templates and ours; the navigation bar is Flower's, with a link of ours."""
    sources = {path.name: path.read_text(encoding="utf-8") for path in flowers.glob("*.html")}
    sources["navbar.html"] = add_link(sources["navbar.html"])
    sources |= {path.name: path.read_text(encoding="utf-8") for path in (_HERE / "templates").glob("*.html")}
    return DictLoader(sources)


def add_link(navbar: str) -> str:
    """Put our link behind Flower's own: at the end of the first list, or in a line of its own if there is none.

    Flower has no place for it, and a copy of its navigation bar would miss what the next version adds.  Other pages of
    Flower 2.0 do not say which of them is active.
    """
    link = _LINK if "active_tab" in navbar else _LINK.replace("active_tab == 'workflows'", "False")
    if "</ul>" in navbar:
        return navbar.replace("</ul>", f"{link}</ul>", 1)
    return navbar + f'<ul class="nav">{link}</ul>'
