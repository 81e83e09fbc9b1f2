"""A headless Chromium, where there is one, and Flower in a process of its own."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from selenium.common.exceptions import WebDriverException
from selenium.webdriver import Chrome, ChromeOptions
from selenium.webdriver.chrome.service import Service

from tests.brokers import free_port
from tests.processes import Process, warm_process
from tests.runtime.cluster import ROOT, Cluster
from tests.servers import report_missing
from tests.waiting import wait_until

from .serving import LOGIN

#: Nothing that asks for a display, a sandbox that containers lack, or the network.
FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--window-size=1280,1000",
)


def _find(*names: str) -> str:
    found = next(filter(None, map(shutil.which, names)), None)
    return found or report_missing("chromium", f"there is no {' or '.join(names)} in the PATH")


@contextmanager
def browser(profile: Path) -> Iterator[Chrome]:
    """Run a Chromium with a profile of its own; skip the test if there is none."""
    options = ChromeOptions()
    options.binary_location = _find("chromium", "chromium-browser", "google-chrome")
    for flag in (*FLAGS, f"--user-data-dir={profile}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    try:
        # both are named: selenium would look for others on the network
        driver = Chrome(options=options, service=Service(_find("chromedriver")))
    except WebDriverException as error:
        report_missing("chromium", f"it does not start: {error.msg}")
    try:
        yield driver
    finally:
        driver.quit()


class FlowerProcess:
    """``celery -A app orchestrator flower`` on a port of its own, with a login."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self.port = free_port()
        self.url = f"http://{':'.join(LOGIN)}@127.0.0.1:{self.port}"
        self.log = cluster.folder / "flower.log"
        self._process: Process | None = None

    def start(self) -> None:
        options = (f"--port={self.port}", "--address=127.0.0.1", f"--basic-auth={':'.join(LOGIN)}")
        environment = {name: value for name, value in os.environ.items() if not name.startswith("FLOWER_")}
        arguments = ("-m", "celery", "-A", self.cluster.module, "orchestrator", "flower", *options)
        count = self.log.read_text().count("Visit me at") if self.log.exists() else 0
        process = self._process = warm_process(arguments, ROOT, {**environment, **self.cluster.environment}, self.log)
        wait_until(
            lambda: self.log.read_text().count("Visit me at") > count or process.poll() is not None,
            f"Flower ({self.log})",
        )
        assert process.poll() is None, self.log.read_text()

    def stop(self) -> None:
        if self._process is not None:
            self._process.terminate()
            try:
                self._process.wait(20)
            except subprocess.TimeoutExpired:
                os.killpg(self._process.pid, signal.SIGKILL)
                self._process.wait()
            self._process = None
