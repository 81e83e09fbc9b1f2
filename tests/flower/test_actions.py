"""What can be done on an instance's page: by whom, from where, and what is said when it is refused."""

from __future__ import annotations

import html
from collections.abc import Callable

import pytest

from orchestrator import Orchestrator
from tests.store.world import FAILS, World, step, succeeds

from .serving import Site
from .test_pages import SCRIPT, buy, order

Worlds = Callable[..., World]


def waiting(worlds: Worlds, instance_id: str) -> World:
    world = worlds(wait=lambda ctx: ctx.receive("paid"))
    world.start("wait", instance_id=instance_id)
    return world


def failed(worlds: Worlds, instance_id: str) -> World:
    """An order that could not be undone: its refund failed, as record 3."""
    world = order(worlds, instance_id)
    world.run(4, succeeds())
    return world


def blocked(worlds: Worlds, instance_id: str) -> World:
    world = worlds(pay=lambda ctx: ctx.run(step("charge"), pivot=True) and ctx.run(step("ship")))
    world.start("pay", instance_id=instance_id)
    world.run(0, succeeds("c-1"))
    world.run(1, FAILS)
    return world


# --- what is done -------------------------------------------------------------------------------------------------


def test_an_instance_is_cancelled_with_a_reason(site: Site, worlds: Worlds, orchestrator: Orchestrator) -> None:
    waiting(worlds, "cancel-1")
    answer = site.act("cancel-1", "cancel", reason="the customer's wish")
    assert (answer.status_code, answer.headers["Location"]) == (303, "/workflow/cancel-1?done=cancel")
    assert orchestrator.get("cancel-1").describe().cancel_reason == "the customer's wish"
    assert "It has been asked to cancel." in site.read("cancel-1", "?done=cancel")


def test_a_message_is_sent_once_however_often_its_form_is(
    site: Site, worlds: Worlds, orchestrator: Orchestrator
) -> None:
    world = waiting(worlds, "send-1")
    for _ in range(2):
        answer = site.act("send-1", "send", channel="paid", message='{"cents": 5}', message_id="form-1")
        assert answer.status_code == 303
    page = site.read("send-1")
    assert page.count("<b>paid</b> sent") == 1
    world.wake()
    world.advance()
    assert world.result() == {"cents": 5}


def test_a_failed_compensation_runs_again(site: Site, worlds: Worlds) -> None:
    world = failed(worlds, "retry-1")
    assert site.act("retry-1", "retry-compensation", seq="3").status_code == 303
    page = site.read("retry-1")
    assert "repeated by an operator as" in page
    assert 'data-live="yes"' in page
    world.run(-1, succeeds())
    page = site.read("retry-1")
    assert "undone by the repeated compensation -1" in page
    assert 'data-status="COMPENSATED"' in page


def test_a_failed_compensation_is_skipped_with_a_reason(site: Site, worlds: Worlds, orchestrator: Orchestrator) -> None:
    failed(worlds, "skip-1")
    answer = site.act("skip-1", "skip-compensation", seq="3", reason="  ")
    assert answer.status_code == 409
    assert "a reason, which is kept with the record, is needed" in answer.text
    assert orchestrator.get("skip-1").instance_status == "COMPENSATION_FAILED"
    assert site.act("skip-1", "skip-compensation", seq="3", reason="refunded by hand").status_code == 303
    assert orchestrator.get("skip-1").instance_status == "COMPENSATED"
    assert "skipped: refunded by hand" in site.read("skip-1")


def test_a_blocked_step_gets_another_attempt(site: Site, worlds: Worlds) -> None:
    world = blocked(worlds, "resume-1")
    assert site.act("resume-1", "resume").status_code == 303
    world.run(1, succeeds("t-1"))
    assert world.result() == "t-1"


def test_a_blocked_step_is_let_fail(site: Site, worlds: Worlds, orchestrator: Orchestrator) -> None:
    world = blocked(worlds, "fail-1")
    assert "waits for a decision" in site.read("fail-1")
    assert site.act("fail-1", "fail-step", seq="1").status_code == 303
    world.advance()
    assert orchestrator.get("fail-1").instance_status == "FAILED"


def test_what_has_completed_is_undone(site: Site, worlds: Worlds, orchestrator: Orchestrator) -> None:
    world = worlds(buy=buy)
    world.start("buy", instance_id="undo-1")
    for seq in range(3):
        world.run(seq, succeeds())
    assert "Undo would run these" in site.read("undo-1")
    assert site.act("undo-1", "undo").status_code == 303
    assert orchestrator.get("undo-1").instance_status == "COMPENSATING"


def test_an_instance_is_terminated_only_by_who_says_that_nothing_is_to_be_undone(
    site: Site, worlds: Worlds, orchestrator: Orchestrator
) -> None:
    waiting(worlds, "end-1")
    answer = site.act("end-1", "terminate")
    assert (answer.status_code, "was not confirmed" in answer.text) == (409, True)
    assert site.act("end-1", "terminate", sure="yes", reason="a test").status_code == 303
    assert orchestrator.get("end-1").instance_status == "TERMINATED"


@pytest.mark.parametrize(
    ("action", "form", "words"),
    [
        ("undo", {}, "only what has completed can be undone"),
        ("resume", {}, "only what is BLOCKED can be resumed"),
        ("fail-step", {"seq": "7"}, "has no step 7"),
        ("fail-step", {"seq": "x"}, "records and runs have numbers, 'x' is none of them"),
        ("retry-compensation", {"seq": "99999999999"}, "'99999999999' is none of them"),
        ("retry-compensation", {"seq": "0"}, "has no compensation 0"),
        ("send", {"channel": "paid", "message": "hello"}, "the message is not JSON"),
        ("send", {"channel": "", "message": "1"}, "a channel is needed"),
        ("send", {"channel": "x" * 200, "message": "1"}, "channel"),
    ],
)
def test_what_cannot_be_done_is_refused_in_words_on_the_page(
    site: Site, worlds: Worlds, orchestrator: Orchestrator, action: str, form: dict[str, str], words: str
) -> None:
    try:
        orchestrator.get("refused-1")
    except LookupError:
        waiting(worlds, "refused-1")
    answer = site.act("refused-1", action, **form)
    assert answer.status_code == 409
    alert = html.unescape(answer.text.partition('id="refusal">')[2].partition("</div>")[0])
    assert words in alert
    assert 'id="status">RUNNING' in answer.text


def test_what_a_refusal_repeats_is_no_markup(site: Site, worlds: Worlds) -> None:
    failed(worlds, "echo-1")
    for action, form in (("retry-compensation", {"seq": SCRIPT}), ("send", {"channel": SCRIPT * 5, "message": "1"})):
        answer = site.act("echo-1", action, **form)
        assert answer.status_code == 409
        assert SCRIPT in html.unescape(answer.text)
        assert SCRIPT not in answer.text


# --- who may ------------------------------------------------------------------------------------------------------


def unchanged(orchestrator: Orchestrator, instance_id: str) -> bool:
    return orchestrator.get(instance_id).describe().cancel_reason is None


def test_a_request_without_the_token_of_a_page_is_refused(
    site: Site, worlds: Worlds, orchestrator: Orchestrator
) -> None:
    waiting(worlds, "token-1")
    site.read("token-1")  # the cookie alone is what a browser sends with whatever another site makes it send
    form = {"action": "cancel", "reason": "forged"}
    for more in ({}, {"_xsrf": ""}, {"_xsrf": "2|00000000|00000000000000000000000000000000|1700000000"}):
        answer = site.client.post("/workflow/token-1", data={**form, **more})
        assert answer.status_code == 403
    assert unchanged(orchestrator, "token-1")


def test_the_token_is_asked_for_where_flower_itself_does_not_ask(
    site: Site, worlds: Worlds, orchestrator: Orchestrator, monkeypatch: pytest.MonkeyPatch
) -> None:
    waiting(worlds, "token-2")
    monkeypatch.setenv("FLOWER_UNAUTHENTICATED_API", "true")
    monkeypatch.setattr(site.options, "basic_auth", None)
    answer = site.client.post("/workflow/token-2", data={"action": "cancel", "reason": "forged"})
    assert answer.status_code == 403
    assert unchanged(orchestrator, "token-2")


def test_a_request_of_another_site_is_refused(site: Site, worlds: Worlds, orchestrator: Orchestrator) -> None:
    waiting(worlds, "site-1")
    for headers in ({"Sec-Fetch-Site": "cross-site"}, {"Origin": "https://evil.example"}):
        site.client.headers.update(headers)
        try:
            assert site.act("site-1", "cancel", reason="forged").status_code == 403
        finally:
            for name in headers:
                del site.client.headers[name]
    assert unchanged(orchestrator, "site-1")


def test_looking_changes_nothing(site: Site, worlds: Worlds, orchestrator: Orchestrator) -> None:
    waiting(worlds, "get-1")
    before = orchestrator.find_instance("get-1")
    site.read("get-1", "?action=cancel&reason=x&seq=1")
    site.read("get-1", "?done=cancel&fragment=1")
    assert orchestrator.find_instance("get-1") == before


def test_nobody_changes_anything_without_logging_in(site: Site, worlds: Worlds, orchestrator: Orchestrator) -> None:
    waiting(worlds, "auth-1")
    answer = site.client.post("/workflow/auth-1", data={"action": "cancel"}, auth=("ada", "wrong"))
    assert answer.status_code in (401, 403)
    assert unchanged(orchestrator, "auth-1")


def test_where_flower_has_no_login_workflows_can_be_looked_at_only(
    site: Site, worlds: Worlds, orchestrator: Orchestrator, monkeypatch: pytest.MonkeyPatch
) -> None:
    waiting(worlds, "open-1")
    monkeypatch.setattr(site.options, "basic_auth", None)
    page = site.read("open-1")
    assert "Flower has no login: workflows can be looked at, not changed." in page
    assert "<form" not in page
    answer = site.act("open-1", "cancel", reason="anybody")
    assert answer.status_code == 403
    assert "Flower has no login" in answer.text
    assert unchanged(orchestrator, "open-1")
    monkeypatch.setenv("FLOWER_UNAUTHENTICATED_API", "true")
    assert site.act("open-1", "cancel", reason="anybody").status_code == 303


def test_a_flower_that_is_read_only_changes_nothing(
    site: Site, worlds: Worlds, orchestrator: Orchestrator, monkeypatch: pytest.MonkeyPatch
) -> None:
    waiting(worlds, "read-only-1")
    monkeypatch.setattr(site.options, "read_only", True)
    assert "<form" not in site.read("read-only-1")
    answer = site.act("read-only-1", "cancel")
    assert (answer.status_code, "read-only" in answer.text) == (403, True)
    assert unchanged(orchestrator, "read-only-1")


def test_who_did_what_is_logged(site: Site, worlds: Worlds, caplog: pytest.LogCaptureFixture) -> None:
    waiting(worlds, "log-1")
    with caplog.at_level("INFO", "orchestrator.flower"):
        site.act("log-1", "undo")
        site.act("log-1", "cancel", reason="a test")
    said = [record.getMessage() for record in caplog.records if record.name == "orchestrator.flower"]
    assert said[0].startswith("ada asked to undo log-1: refused, ")
    assert said[1] == "ada asked to cancel log-1: done"
    assert not [line for line in said if "secret" in line]


def test_an_action_that_is_not_there_is_refused(site: Site, worlds: Worlds) -> None:
    waiting(worlds, "no-1")
    answer = site.act("no-1", "<script>")
    assert (answer.status_code, "there is no action" in answer.text) == (400, True)
    assert "<script>" not in answer.text.partition("alert-warning")[2].partition("</div>")[0]


def test_an_action_on_an_instance_that_is_not_there_says_so(site: Site, worlds: Worlds) -> None:
    waiting(worlds, "there-1")
    site.read("there-1")
    token = site.client.cookies["_xsrf"]
    answer = site.client.post("/workflow/nobody", data={"action": "cancel", "_xsrf": token})
    assert (answer.status_code, "there is no instance" in answer.text) == (404, True)
