"""Asking before what cannot be taken back."""

from __future__ import annotations

import sys

import click

from orchestrator.cli.group import Failed
from orchestrator.cli.output import clean


def confirm(question: str, *, is_sure: bool) -> None:
    """Ask, unless somebody is sure; refuse where there is nobody to ask."""
    if is_sure:
        return
    if not sys.stdin.isatty():
        raise Failed(f"{question} That cannot be taken back, and there is no terminal to ask at: give --yes")
    # the answer is a matter of the terminal: stdout may be going into a file
    click.confirm(clean(f"{question} That cannot be taken back."), abort=True, err=True)
