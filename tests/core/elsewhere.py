"""Prints a digest of all that is decided for each of the seeds it is given; run in a process of its own."""

from __future__ import annotations

import hashlib
import sys
from random import Random

from .programs import Generator, shell_of


def digest_of(seed: int) -> str:
    """Return a digest of every decision that a program drawn from ``seed`` leads to."""
    shell, _, _ = shell_of(Generator(Random(seed)).program(), seed)
    shell.run()
    return hashlib.sha256(repr([run.decisions for run in shell.runs()]).encode()).hexdigest()


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        print(digest_of(int(argument)))
