"""A failed saga in a real browser: found in Flower's list, its compensation run again, and seen to be undone."""

from __future__ import annotations

import os
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from celery import shared_task
from selenium.common.exceptions import NoAlertPresentException
from selenium.webdriver import Chrome
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webelement import WebElement

from orchestrator import Context, Orchestrator, RetryPolicy, shared_workflow
from tests.runtime.cluster import Cluster
from tests.waiting import wait_until

from .browsing import FlowerProcess, browser

SCRIPT = "<script>document.title='owned';alert('owned')</script><img src=x onerror=\"alert('owned')\">"


@shared_task
def reserve(name: str) -> dict[str, str]:
    return {"reserved": name}


@shared_task
def release(reserved: Any) -> None:
    if not Path(os.environ["TEST_CRASHES"], "mended").exists():
        raise ConnectionError(f"the warehouse does not answer {SCRIPT}")


@shared_task
def ship(name: str) -> None:
    raise LookupError(f"no courier takes {name}")


def register(orchestrator: Orchestrator) -> None:
    orchestrator.activity(retry=RetryPolicy(max_attempts=2, initial_interval=timedelta(0)))(release)


@shared_workflow
def order(ctx: Context, name: str) -> None:
    ctx.set_attributes(name=name[:60])
    ctx.set_progress(f"shipping {name}")
    ctx.run(reserve.s(name), compensate=release.s())
    ctx.run(ship.s(name))


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chrome]:
    with browser(tmp_path_factory.mktemp("profile")) as driver:
        yield driver


@pytest.fixture(scope="module")
def cluster(driver: Chrome, tmp_path_factory: pytest.TempPathFactory, valkey_url: str) -> Iterator[Cluster]:
    """A worker for the orders; it is not started where there is no browser."""
    folder = tmp_path_factory.mktemp("cluster")
    cluster = Cluster(folder, f"sqlite:///{folder}/store.db", valkey_url, tasks=__name__)
    try:
        cluster.start_worker().wait_ready()
        yield cluster
    finally:
        cluster.close()


@pytest.fixture(scope="module")
def flower(cluster: Cluster) -> Iterator[FlowerProcess]:
    flower = FlowerProcess(cluster)
    try:
        flower.start()
        yield flower
    finally:
        flower.stop()


def find(driver: Chrome, selector: str) -> WebElement:
    return wait_until(lambda: driver.find_elements(By.CSS_SELECTOR, selector), f"{selector} on {driver.title}")[0]


def text_of(driver: Chrome, selector: str) -> str:
    """Return what an element says, in one step: the page may replace it at any time."""
    script = "const found = document.querySelector(arguments[0]); return found ? found.innerText : ''"
    return str(wait_until(lambda: driver.execute_script(script, selector), f"{selector} on {driver.title}"))


def click(driver: Chrome, selector: str) -> None:
    element = find(driver, selector)
    # the navigation bar stays at the top, over what lies there
    driver.execute_script("arguments[0].scrollIntoView({block: 'center', behavior: 'instant'})", element)
    element.click()


def follow(driver: Chrome, text: str) -> None:
    wait_until(lambda: driver.find_elements(By.LINK_TEXT, text), f"a link {text!r} on {driver.title}")[0].click()


def assert_harmless(driver: Chrome) -> None:
    """Check that nothing of what is shown was run."""
    with pytest.raises(NoAlertPresentException):
        _ = driver.switch_to.alert.text
    assert driver.title != "owned"
    assert not driver.find_elements(By.CSS_SELECTOR, "#main-content img, .wf script")
    # a script that got onto the page, and was kept from running by the policy alone, would be told here
    log: list[dict[str, Any]] = driver.get_log("browser")  # type: ignore[no-untyped-call]
    assert [entry["message"] for entry in log if entry["source"] != "network"] == []


def test_a_failed_saga_is_found_and_its_compensation_run_again(
    driver: Chrome, cluster: Cluster, flower: FlowerProcess
) -> None:
    handle = cluster.start("order", SCRIPT, instance_id="order-1")
    cluster.wait_status(handle, "COMPENSATION_FAILED")

    driver.get(f"{flower.url}/workers")
    follow(driver, "Workflows")
    follow(driver, "Need somebody")
    assert_harmless(driver)
    assert SCRIPT[:60] in text_of(driver, "#workflows")
    follow(driver, "order-1")
    assert_harmless(driver)
    assert text_of(driver, "#status") == "COMPENSATION_FAILED"
    assert SCRIPT in text_of(driver, "#not-undone")
    click(driver, "#record-2 > summary")
    assert "the warehouse does not answer" in text_of(driver, "#record-2 .wf-body")
    assert "Traceback" in text_of(driver, "#record-2 .wf-body")

    (cluster.crashes / "mended").touch()
    click(driver, "#not-undone .wf-action > summary")
    assert "Mend what made it fail first" in text_of(driver, "#not-undone")
    click(driver, "#not-undone button")
    assert text_of(driver, "#done") == "The compensation runs again."
    # the page follows by itself
    wait_until(
        lambda: text_of(driver, "#status") == "COMPENSATED",
        f"the page showing COMPENSATED\n{flower.log.read_text()[-3000:]}",
    )
    assert handle.instance_status == "COMPENSATED"
    assert "undone by the repeated compensation -1" in text_of(driver, "#compensations")
    assert not driver.find_elements(By.ID, "not-undone")
    assert_harmless(driver)


def test_what_is_refused_is_said_on_the_page(driver: Chrome, cluster: Cluster, flower: FlowerProcess) -> None:
    handle = cluster.start("order", "mug", instance_id="order-2")
    (cluster.crashes / "mended").unlink(missing_ok=True)
    cluster.wait_status(handle, "COMPENSATION_FAILED")
    driver.get(f"{flower.url}/workflow/order-2")
    click(driver, "#action-skip-compensation-2 > summary")
    find(driver, "#action-skip-compensation-2 input[name=reason]").send_keys(f"by hand {SCRIPT}")
    handle.skip_compensation(2, "somebody was quicker")
    click(driver, "#action-skip-compensation-2 button")
    assert "has been dealt with: skipped: somebody was quicker" in text_of(driver, "#refusal")
    assert_harmless(driver)


def test_a_flower_that_was_started_again_shows_the_same(
    driver: Chrome, cluster: Cluster, flower: FlowerProcess
) -> None:
    cluster.wait_status(cluster.start("order", "globe", instance_id="order-3"), "COMPENSATION_FAILED")
    driver.get(f"{flower.url}/workflow/order-3")
    before = text_of(driver, "#workflow-live")
    assert "globe" in before
    flower.stop()
    flower.start()
    driver.get(f"{flower.url}/workflow/order-3")
    assert text_of(driver, "#workflow-live") == before
