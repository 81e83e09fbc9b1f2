"""What the pages show: the list, an instance, its timeline and its compensations; all of it escaped."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import httpx
import pytest
from celery import Celery
from sqlalchemy import event

from orchestrator import Context, Orchestrator
from orchestrator.errors import StoreUnreachable
from orchestrator.flower import review
from orchestrator.flower.review import Part
from orchestrator.store import reviewing
from orchestrator.store.instances import set_attributes
from tests.store.world import FAILS, LOST, World, step, succeeds
from tests.waiting import wait_until

from .serving import LOGIN, Site, serving

Worlds = Callable[..., World]
SCRIPT = "<script>document.title='owned'</script>"


def buy(ctx: Context, name: str = "") -> Any:
    ctx.set_attributes(customer="ada", note=name)
    ctx.set_progress(f"buying {name}")
    ctx.run(step("reserve", name), compensate=step("release"))
    ctx.run(step("charge"), compensate=step("refund"))
    return ctx.run(step("ship"), compensate=False)


def order(worlds: Worlds, instance_id: str, name: str = "mug") -> World:
    """An order whose shipment failed, and whose refund after it."""
    world = worlds(buy=buy)
    world.start("buy", name, instance_id=instance_id)
    world.clock.advance(5)
    world.run(0, succeeds("r-1"))
    world.run(1, succeeds({"charge": name}))
    world.run(2, FAILS)
    world.run(3, FAILS)
    return world


def words_of(page: str) -> str:
    """Return the text of a page, each run of white space as one."""
    return re.sub(r"\s+", " ", re.sub(r"<[^>]*>", " ", page))


# --- the list -----------------------------------------------------------------------------------------------------


def test_the_navigation_bar_of_every_page_of_flower_has_an_entry(site: Site) -> None:
    for path in ("/workers", "/tasks", "/broker", "/workflows"):
        page = site.client.get(path).text
        assert 'href="/workflows"' in page, path
        assert (re.search(r'active"[^>]*href="/workflows"', page) is not None) == (path == "/workflows")


def test_the_list_shows_status_workflow_attributes_and_progress(site: Site, worlds: Worlds) -> None:
    order(worlds, "listed-1", "globe")
    text = words_of(site.list("?id=listed-1"))
    for shown in ("COMPENSATING", "buy", "listed-1", "customer =ada", "buying globe"):
        assert shown in text


def test_the_list_is_searched_by_id_workflow_status_and_attribute(site: Site, worlds: Worlds) -> None:
    order(worlds, "search-1", "first")
    worlds(wait=lambda ctx: ctx.receive("paid")).start("wait", instance_id="search-2")

    def found(query: str) -> set[str]:
        return set(re.findall(r">(search-\d)</a>", site.list(query)))

    assert found("?id=search-") == {"search-1", "search-2"}
    assert found("?id=search-&workflow=wait") == {"search-2"}
    assert found("?id=search-&status=COMPENSATING") == {"search-1"}
    assert found("?id=search-&status=unfinished") == {"search-1", "search-2"}
    assert found("?attribute=note%3Dfirst") == {"search-1"}
    assert found("?attribute=note%3Dsecond") == set()


def test_a_search_that_means_nothing_is_answered_in_words(site: Site) -> None:
    for query, words in (
        ("status=HAPPY", "&#x27;HAPPY&#x27; is no status"),
        ("attribute=ada", "write its name and value"),
        ("after=xyz", "is not a link to a page of the list"),
        ("before=WyIyMDI0LTAxLTAxVDAwOjAwOjAwIiwgIngiXQ==", "is not a link to a page"),
    ):
        answer = site.client.get(f"/workflows?{query}")
        assert answer.status_code == 400
        assert words in answer.text, query


def test_the_list_is_paged_forwards_and_back(site: Site, worlds: Worlds) -> None:
    world = worlds(page=lambda ctx: None)
    for number in range(120):
        world.record("page", instance_id=f"page-{number:03}")
        world.clock.advance(1)

    def follow(page: str, rel: str) -> str:
        link = re.search(rf'rel="{rel}" href="([^"]+)"', page)
        assert link, rel
        answer = site.client.get(link[1].replace("&amp;", "&"))
        assert answer.status_code == 200
        return answer.text

    def shown(page: str) -> list[str]:
        return re.findall(r">(page-\d+)</a>", page)

    first = site.list("?workflow=page")
    second = follow(first, "next")
    third = follow(second, "next")
    newest_first = [f"page-{number:03}" for number in reversed(range(120))]
    assert shown(first) + shown(second) + shown(third) == newest_first
    assert 'rel="next"' not in third
    assert 'rel="prev"' not in first
    assert shown(follow(follow(third, "prev"), "prev")) == newest_first[:50]


def test_no_page_of_the_list_counts_or_skips_rows(site: Site, orchestrator: Orchestrator) -> None:
    statements: list[tuple[str, Any]] = []
    site.list()
    with orchestrator.store.read("listen") as connection:
        engine = connection.engine

    def note(_connection: Any, _cursor: Any, statement: str, parameters: Any, *_rest: Any) -> None:
        statements.append((statement.upper(), parameters))

    event.listen(engine, "before_cursor_execute", note)
    try:
        site.list("?status=unfinished&workflow=page")
        site.list("?attribute=customer%3Dada")
    finally:
        event.remove(engine, "before_cursor_execute", note)
    read = [(statement, given) for statement, given in statements if "FROM ORCHESTRATOR_INSTANCE" in statement]
    assert len(read) == 2
    for statement, given in read:
        assert "COUNT(" not in statement
        assert "LIMIT" in statement
        # SQLite is always told to skip some: none
        assert "OFFSET" not in statement or given[-1] == 0


# --- an instance --------------------------------------------------------------------------------------------------


def test_a_page_shows_what_an_instance_is_and_what_its_steps_came_to(site: Site, worlds: Worlds) -> None:
    world = order(worlds, "shown-1")
    world.run(4, succeeds())
    page = site.read("shown-1")
    text = words_of(page)
    assert "COMPENSATION_FAILED Some of what was done could not be undone" in text
    assert "refund was to undo step 1 : builtins.RuntimeError: declined" in text
    assert "builtins.RuntimeError : step 2 (ship) failed" in text
    for task_id in ("shown-1:0:0:1", "shown-1:0:3:1"):
        assert f'href="/task/{task_id.replace(":", "%3A")}"' in page
    assert re.findall(r'<details class="wf-record" id="record-(\d)"', page) == list("01234")
    assert 'data-live="no"' in page
    assert "at the right: how long all of it took, waiting included" in text
    assert page.count('class="wf-took small" title="from when it was asked for until it was settled, waiting') == 5


def test_the_compensations_are_in_the_order_in_which_they_ran(site: Site, worlds: Worlds) -> None:
    world = order(worlds, "stack-1")
    stack = words_of(site.read("stack-1").partition('id="compensations"')[2].partition('id="records"')[0])
    assert re.search(r"failed: not undone refund undoes step 1 .* waiting release undoes step 0", stack), stack
    world.run(4, succeeds())
    stack = words_of(site.read("stack-1").partition('id="compensations"')[2].partition('id="records"')[0])
    assert re.search(r"failed: not undone refund undoes step 1 .* undone release undoes step 0", stack), stack


def test_an_effect_that_came_after_its_undo_is_shown_as_not_undone(
    site: Site, worlds: Worlds, orchestrator: Orchestrator
) -> None:
    world = worlds(buy=lambda ctx: ctx.run(step("charge"), compensate=step("refund")))
    world.start("buy", instance_id="late")
    given_up = world.take(0)
    world.cancel()
    world.advance()
    world.lose(given_up)
    world.advance()
    world.run(1, succeeds())
    world.end(given_up, succeeds("c-1"))
    stack = words_of(site.read("late").partition('id="compensations"')[2].partition('id="records"')[0])
    assert "ran, and the step took effect after it had begun refund undoes step 0" in stack
    assert ">late</a>" in site.list("?status=attention")
    [stray] = orchestrator.get("late").history()[0].strays
    assert stray == {"attempt": 1, "ended": "succeeded", "at": world.clock()}
    assert "Given up, yet attempt 1 succeeded" in words_of(site.read("late"))


def test_what_would_be_undone_is_told_while_nothing_has_failed(site: Site, worlds: Worlds) -> None:
    world = worlds(buy=buy)
    world.start("buy", instance_id="would-1")
    world.run(0, succeeds("r-1"))
    world.clock.advance(1)
    world.take(1)
    text = words_of(site.read("would-1"))
    assert "If it failed or were cancelled now, these would run" in text
    assert (
        "refund undoes step 1 (charge, running): if it takes effect release undoes step 0 (reserve, succeeded)" in text
    )
    assert 'data-live="yes"' in site.read("would-1")


def test_attempts_and_lost_ones_are_told_with_bars(site: Site, worlds: Worlds) -> None:
    world = worlds(buy=buy)
    world.start("buy", instance_id="bars-1")
    world.clock.advance(2)
    lost = world.take(0)
    world.clock.advance(4)
    assert world.end(lost, LOST)
    world.clock.advance(2)
    row = world.take(0)
    world.clock.advance(2)
    assert world.end(row, succeeds("r-1"))
    record = site.read("bars-1").partition('id="record-0"')[2].partition("</summary>")[0]
    assert "2 attempts, 1 lost" in record
    assert re.findall(r"wf-(waiting|retrying|running)\"", record) == ["retrying", "running"]
    assert "waiting, and 1 attempt (1 lost): 8.0 s" in record
    assert "attempt 2 running: 2.0 s" in record


def test_why_an_instance_is_blocked_is_told_with_what_can_be_done(site: Site, worlds: Worlds) -> None:
    world = worlds(buy=lambda ctx: ctx.run(step("charge"), pivot=True) and nonsense)  # type: ignore[name-defined]  # noqa: F821
    world.start("buy", instance_id="blocked-1")
    world.run(0, succeeds("c-1"))
    text = words_of(site.read("blocked-1"))
    assert "BLOCKED" in text
    assert re.search(r"Why it is blocked: .*NameError", text)
    assert "Resume…" in text
    assert "Cancel…" not in text  # it is past its pivot


def test_what_an_instance_waits_for_is_told(site: Site, worlds: Worlds) -> None:
    worlds(wait=lambda ctx: ctx.receive("paid")).start("wait", instance_id="waits-1")
    assert "It waits for a message on the channel &#x27;paid&#x27;" in words_of(site.read("waits-1"))
    worlds(rest=lambda ctx: ctx.sleep(timedelta(days=10))).start("rest", instance_id="rests-1")
    assert "It waits for a timer, for another" in words_of(site.read("rests-1"))


def test_parent_and_children_are_linked(site: Site, worlds: Worlds) -> None:
    world = worlds(parent=lambda ctx: ctx.run(step("child")), child=lambda ctx: ctx.receive("go"))
    world.start("parent", instance_id="parent-1")
    world.go_on()
    child = world.child(0).instance_id
    assert f'href="{site.path_of(child)}"' in site.read("parent-1")
    assert 'href="/workflow/parent-1"' in site.read(child)


def test_a_fork_and_its_origin_are_linked(site: Site, worlds: Worlds, orchestrator: Orchestrator) -> None:
    order(worlds, "origin-1")
    orchestrator.get("origin-1").fork(1, "fork-1")
    assert 'href="/workflow/fork-1"' in site.read("origin-1")
    assert "Forked from origin-1" in words_of(site.read("fork-1"))


def test_runs_that_have_ended_in_recur_have_pages(site: Site, worlds: Worlds) -> None:
    def again(ctx: Context, number: int) -> None:
        ctx.run(step("work", f"number {number}"))
        if number < 2:
            ctx.recur(number + 1)

    world = worlds(again=again)
    world.start("again", 0, instance_id="again-1")
    world.run(0, succeeds())
    world.go_on()
    page = site.read("again-1")
    assert "number 1" in page
    assert 'href="/workflow/again-1?run=0"' in page
    assert "number 0" in site.read("again-1", "?run=0")


def test_a_long_history_is_shown_a_page_at_a_time(site: Site, worlds: Worlds) -> None:
    world = worlds(many=lambda ctx: ctx.gather(*(ctx.start(step("work"), compensate=step("undo")) for _ in range(250))))
    world.start("many", instance_id="many-1")

    def records(page: str) -> list[int]:
        return [int(seq) for seq in re.findall(r'class="wf-record" id="record-(-?\d+)"', page)]

    first = site.read("many-1")
    assert records(first) == list(range(100))
    assert "from=100#records" in first
    last = site.read("many-1", "?run=0&from=200")
    assert records(last) == list(range(200, 250))
    assert 'rel="next"' not in last
    assert "There are more than are shown here" in first


def test_a_large_value_is_cut_and_shown_whole_on_a_page_of_its_own(site: Site, worlds: Worlds) -> None:
    world = worlds(buy=buy)
    world.start("buy", instance_id="large-1")
    world.run(0, succeeds("x" * 10_000))
    assert "x" * 10_000 not in site.read("large-1")
    assert "/workflow/large-1?run=0&from=0&alone=1" in site.read("large-1")
    assert "x" * 10_000 in site.read("large-1", "?run=0&from=0&alone=1")


def test_the_page_of_an_instance_that_is_not_there_says_so(site: Site) -> None:
    answer = site.client.get("/workflow/nobody")
    assert answer.status_code == 404
    assert "there is no instance &#x27;nobody&#x27;" in answer.text


@pytest.mark.parametrize("query", ["run=x", "from=x", "from=99999999999", "run=-99999999999"])
def test_a_part_of_a_history_that_is_no_number_is_refused(site: Site, worlds: Worlds, query: str) -> None:
    assert site.client.get(f"/workflow/anything?{query}").status_code == 400


def test_a_path_that_no_database_takes_leads_nowhere(site: Site) -> None:
    for path in ("/workflow/a%00b", "/workflow/%0A"):
        assert site.client.get(path).status_code == 404


def test_values_that_are_masked_are_masked_here(worlds: Worlds, store_url: str) -> None:
    app = Celery("shop", broker="memory://")
    masking = Orchestrator(app, store=store_url, mask={name: ["card"] for name in ("reserve", "release", "buy")})
    world = worlds(buy=lambda ctx, card: ctx.run(step("reserve", card), compensate=step("release", card)))
    world.start("buy", "4111-1111", instance_id="masked-1")
    world.run(0, succeeds("r-1"))
    with serving(masking) as site:
        page = site.read("masked-1")
    assert "record-0" in page
    assert "4111-1111" not in page
    masking.store.dispose()
    app.close()


def test_a_page_asks_to_be_read_again_only_if_it_is_told_to(site: Site, worlds: Worlds) -> None:
    order(worlds, "refresh-1")
    assert "Refresh" not in site.client.get("/workflow/refresh-1").headers
    assert site.client.get("/workflow/refresh-1?refresh=5").headers["Refresh"] == "5"
    assert "Refresh" not in site.client.get("/workflow/refresh-1?refresh=0").headers


def test_the_part_that_is_polled_is_the_page_without_its_frame(site: Site, worlds: Worlds) -> None:
    order(worlds, "part-1")
    part = site.read("part-1", "?fragment=1")
    assert "<html" not in part
    assert part.strip() in site.read("part-1").replace("\n\n", "\n") or 'id="workflow-state"' in part


# --- the loop -------------------------------------------------------------------------------------------------------


def test_a_store_that_does_not_answer_holds_up_nobody_else(
    site: Site, orchestrator: Orchestrator, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers, read = threading.Event(), orchestrator.store.read
    waiting: list[str] = []

    def slow(purpose: str) -> Any:
        waiting.append(purpose)
        assert answers.wait(30)
        return read(purpose)

    monkeypatch.setattr(orchestrator.store, "read", slow)
    with ThreadPoolExecutor(8) as readers:
        try:
            # of its own: the site's client takes turns
            pages = [readers.submit(httpx.get, f"{site.url}/workflows", auth=LOGIN, timeout=60) for _ in range(8)]
            wait_until(lambda: len(waiting) == 4, "all threads being busy")
            assert site.client.get("/healthcheck").status_code == 200
            assert len(waiting) == 4
        finally:
            answers.set()
        assert [page.result().status_code for page in pages] == [200] * 8


def test_a_store_that_is_away_is_told_on_the_page(
    site: Site, orchestrator: Orchestrator, monkeypatch: pytest.MonkeyPatch
) -> None:
    def away(_purpose: str) -> Any:
        raise StoreUnreachable("postgresql://shop:***@db/shop", OSError("connection refused"))

    monkeypatch.setattr(orchestrator.store, "read", away)
    answer = site.client.get("/workflows")
    assert (answer.status_code, "shop:***@db/shop" in answer.text) == (503, True)


# --- safety -------------------------------------------------------------------------------------------------------


def test_nothing_that_a_workflow_holds_is_markup(site: Site, worlds: Worlds, orchestrator: Orchestrator) -> None:
    own_id = f"evil {SCRIPT}"
    world = order(worlds, own_id, SCRIPT)
    with world.store.begin("attribute") as connection:
        set_attributes(connection, own_id, {SCRIPT: SCRIPT})
    worlds(**{SCRIPT: lambda ctx: ctx.receive(SCRIPT)}).start(SCRIPT, instance_id="evil-workflow")
    orchestrator.get("evil-workflow").send(SCRIPT, SCRIPT)
    for page in (
        site.list("?id=evil"),
        site.list("?id=%22%3E%3Cscript%3Edocument&workflow=%22%3E%3Cscript%3Edocument"),
        site.read(own_id),
        site.read(own_id, "?done=%3Cscript%3Edocument"),
        site.read(own_id, "?fragment=1"),
        site.read("evil-workflow"),
        site.client.get("/workflow/%3Cscript%3Edocument").text,
        site.client.get("/workflows?status=%3Cscript%3Edocument").text,
    ):
        assert "<script>document" not in page
    assert "&lt;script&gt;document" in site.read(own_id)


def test_pages_are_not_read_or_framed_by_other_sites(site: Site) -> None:
    headers = site.client.get("/workflows").headers
    assert "script" not in headers["Content-Security-Policy"]  # default-src 'self': no inline ones
    assert "frame-ancestors 'none'" in headers["Content-Security-Policy"]
    assert "Access-Control-Allow-Origin" not in headers


def test_pages_are_behind_flowers_login(site: Site, worlds: Worlds) -> None:
    order(worlds, "login-1")
    for path in ("/workflows", "/workflow/login-1"):
        assert site.client.get(path, auth=("ada", "wrong")).status_code == 401
    site.options.basic_auth, site.options.auth = None, ".*@example.com"
    try:
        for path in ("/workflows", "/workflow/login-1"):
            answer = site.client.get(path, auth=None)
            assert (answer.status_code, answer.headers["Location"].partition("?")[0]) == (302, "/login")
    finally:
        site.options.basic_auth, site.options.auth = ["ada:secret"], ""


def test_flowers_url_prefix_is_put_before_our_pages(orchestrator: Orchestrator, worlds: Worlds) -> None:
    order(worlds, "prefixed-1")
    with serving(orchestrator, url_prefix="monitor") as site:
        assert site.client.get("/workflows").status_code == 404
        page = site.client.get("/monitor/workflows?id=prefixed-1").text
        assert 'href="/monitor/workflow/prefixed-1"' in page
        style = re.search(r'href="(/monitor/workflow-assets/workflows.css[^"]*)"', page)
        assert style
        assert site.client.get(style[1]).status_code == 200


@pytest.mark.parametrize("asset", ["workflows.css", "workflows.js"])
def test_what_pages_load_comes_from_flower_itself(site: Site, asset: str) -> None:
    assert site.client.get(f"/workflow-assets/{asset}").status_code == 200
    assert not re.findall(r'(?:src|href)="(?:https?:)?//(?!flower.readthedocs|github.com)', site.list())


@pytest.mark.parametrize("read", ["list_undoing", "list_letters"], ids=["before its records", "after them"])
def test_a_repair_that_ends_while_its_page_is_read_is_not_missed(
    orchestrator: Orchestrator, worlds: Worlds, monkeypatch: pytest.MonkeyPatch, read: str
) -> None:
    name = f"read-{read}"
    world = order(worlds, name)
    world.run(4, succeeds(None))
    orchestrator.get(name).retry_compensation(3)
    original = getattr(reviewing, read)

    def repaired_meanwhile(*args: Any) -> Any:
        monkeypatch.setattr(reviewing, read, original)
        world.run(-1, succeeds(None))
        return original(*args)

    monkeypatch.setattr(reviewing, read, repaired_meanwhile)
    shown = review.read(orchestrator, name, Part())
    # a page that neither shows the end nor goes on looking would stay as it is for ever
    assert (shown.description.status, shown.is_live) == ("COMPENSATED", False)
    # nor is it of any use where the compensation still runs though all is undone
    assert [undo.how for undo in shown.stack.undone if undo.seq == 1] == ["undone by the repeated compensation -1"]
