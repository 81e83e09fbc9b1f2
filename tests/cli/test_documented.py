"""The page about the command line names every command and every option, and the codes that commands end with."""

from __future__ import annotations

import re
from pathlib import Path

import click
import pytest

from orchestrator.cli import group
from orchestrator.runtime.stuck import Reason

PAGE = (Path(__file__).parents[2] / "docs" / "how-to" / "command-line.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```console\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
CODE = " ".join([*re.findall(r"`([^`\n]+)`", PAGE), *BLOCKS])


def options() -> list[tuple[str, str]]:
    found = []
    for name, command in sorted(group.orchestrator.commands.items()):
        if name == "flower":  # that has a page of its own
            continue
        found.append((name, ""))
        for parameter in command.params:
            if isinstance(parameter, click.Option):
                found += [(name, option) for option in parameter.opts if option.startswith("--")]
    return found


@pytest.mark.parametrize(("command", "option"), options(), ids=lambda value: value or "itself")
def test_every_command_and_option_is_documented(command: str, option: str) -> None:
    assert re.search(rf"\borchestrator {command}\b", PAGE), f"no example of {command}"
    if option:
        assert re.search(rf"(?<!\S){option}(?![\w-])", CODE), f"{command} {option} is not explained"


@pytest.mark.parametrize("reason", Reason)
def test_every_reason_is_documented(reason: Reason) -> None:
    assert f"`{reason}`" in PAGE


@pytest.mark.parametrize("code", [group.FAILED, group.USAGE, group.NOT_FOUND, group.FOUND])
def test_every_exit_code_is_documented(code: int) -> None:
    assert re.search(rf"^\| {code} \|", PAGE, re.MULTILINE)


@pytest.mark.parametrize("name", sorted(group.orchestrator.commands))
def test_every_command_helps(name: str) -> None:
    command = group.orchestrator.commands[name]
    assert command.help
    for parameter in command.params:
        assert not isinstance(parameter, click.Option) or parameter.help, f"{name} {parameter.name}"
