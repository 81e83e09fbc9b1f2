"""The command line on a cluster whose worker runs the test module's own workflows."""

from __future__ import annotations

import pytest

from tests.runtime.cluster import Cluster
from tests.runtime.conftest import cluster

from .running import CommandLine

__all__ = ["cluster"]


@pytest.fixture
def run(cluster: Cluster) -> CommandLine:
    """Run ``orchestrator …`` in this process, on the cluster's store."""
    return CommandLine(cluster.app)
