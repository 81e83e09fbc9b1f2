"""``celery -A app orchestrator flower``: what it hands to Flower, and what it says where it cannot."""

from __future__ import annotations

import builtins
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest
from celery import Celery
from celery.bin.base import CLIContext
from click.testing import CliRunner, Result
from flower import command as flowers
from flower import urls
from flower.options import default_options

from orchestrator import Orchestrator
from orchestrator.cli import orchestrator as group
from orchestrator.flower.extension import add_link, make_loader


@pytest.fixture(autouse=True)
def kept() -> Iterator[None]:
    """Keep what the command changes in Flower's modules, which belong to the whole process."""
    handlers, settings = list(urls.handlers), dict(urls.settings)
    options = dict(default_options.items())
    yield
    urls.handlers[:] = handlers
    urls.settings.clear()
    urls.settings.update(settings)
    for name, value in options.items():
        setattr(default_options, name, value)


def call(app: Celery, *arguments: str) -> Result:
    """Run the command as celery does."""

    @click.group()
    @click.option("-A", "--app", "given")
    @click.pass_context
    def celery(ctx: click.Context, given: str) -> None:
        ctx.obj = CLIContext(app=app, no_color=True, workdir=None, quiet=True)

    celery.add_command(group)
    return CliRunner().invoke(celery, ["orchestrator", "flower", *arguments])


class Started:
    """What Flower's application would have been made of."""

    def __init__(self) -> None:
        self.made: dict[str, Any] = {}

    def __call__(self, **given: Any) -> Started:
        self.made = given
        return self

    def start_http_server(self) -> int:
        return 5555

    def start(self) -> None: ...

    def stop(self) -> None: ...


def test_flower_is_started_with_its_own_options_and_our_pages(sqlite_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    started = Started()
    monkeypatch.setattr(flowers, "Flower", started)
    monkeypatch.setattr(flowers.atexit, "register", lambda _stop: None)
    monkeypatch.setattr(flowers.signal, "signal", lambda *_arguments: None)
    app = Celery("shop", broker="memory://")
    Orchestrator(app, store=sqlite_url)
    ended = call(app, "--port=5999", "--url-prefix=monitor", "--basic_auth=ada:secret")
    assert ended.exit_code == 0, ended.output
    assert started.made["capp"] is app
    options = started.made["options"]
    assert (options.port, options.url_prefix, options.basic_auth) == (5999, "monitor", ["ada:secret"])
    assert [rule.name for rule in urls.handlers[:3]] == ["workflows", "workflow", "workflow_asset"]
    assert "template_loader" in started.made


def test_without_flower_it_says_what_to_install(sqlite_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *rest: Any) -> Any:
        if name.partition(".")[0] == "flower":
            raise ModuleNotFoundError("No module named 'flower'", name="flower")
        return real(name, *rest)

    app = Celery("shop", broker="memory://")
    Orchestrator(app, store=sqlite_url)
    monkeypatch.setattr(builtins, "__import__", without)
    ended = call(app)
    assert ended.exit_code == 1
    assert 'pip install "celery-orchestrator[flower]"' in ended.output


def test_an_app_without_an_orchestrator_or_a_store_is_told_so() -> None:
    plain = Celery("plain", broker="memory://")
    ended = call(plain)
    assert (ended.exit_code, "has no Orchestrator" in ended.output) == (1, True)
    app = Celery("shop", broker="memory://")
    Orchestrator(app)
    ended = call(app)
    assert (ended.exit_code, "no store is set" in ended.output) == (1, True)
    assert urls.handlers[0].name == "main"


def test_the_command_line_does_not_need_flower() -> None:
    script = "import orchestrator.cli, sys; print('flower' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", script], text=True).strip() == "False"


def test_a_flower_that_is_started_in_another_way_is_as_it_was() -> None:
    import orchestrator.flower.extension  # noqa: F401  (importing it changes nothing)

    assert urls.handlers[0].name == "main"
    assert "template_loader" not in urls.settings


# --- the navigation bar -------------------------------------------------------------------------------------------


def test_the_link_is_put_at_the_end_of_flowers_own_list() -> None:
    navbar = Path(urls.settings["template_path"], "navbar.html").read_text(encoding="utf-8")
    linked = add_link(navbar)
    first_list = linked.partition("</ul>")[0]
    assert first_list.index("reverse_url('workers')") < first_list.index("reverse_url('workflows')")
    assert linked.count("reverse_url('workflows')") == 1


def test_a_navigation_bar_that_says_nothing_of_the_active_page_is_given_a_link_too() -> None:
    assert "active_tab" not in add_link("<ul><li>Workers</li></ul>")
    assert "reverse_url('workflows')" in add_link("<nav>no list</nav>")


def test_templates_of_flower_are_found_beside_ours() -> None:
    loader = make_loader(Path(urls.settings["template_path"]))
    for name in ("base.html", "tasks.html", "orchestrator-list.html", "orchestrator-instance.html"):
        loader.load(name)
