import pytest
from sqlalchemy import select

from tasks.database import SentReceipt, transaction
from tasks.receipts import EmailBounced, send_receipt


def recipients() -> list[str]:
    with transaction() as connection:
        return list(connection.execute(select(SentReceipt.email)).scalars())


def test_a_receipt_is_sent_once() -> None:
    send_receipt("order-1", "rosa@example.com", 1450)
    send_receipt("order-1", "rosa@example.com", 1450)
    assert recipients() == ["rosa@example.com"]


def test_an_address_without_a_mailbox_bounces() -> None:
    with pytest.raises(EmailBounced):
        send_receipt("order-1", "rosa@mailbox.invalid", 1450)
    assert recipients() == []
