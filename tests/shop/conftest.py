from pathlib import Path

import pytest

from tasks.database import create_tables, stock_up


@pytest.fixture(autouse=True)
def shop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A shop of its own for each test, with three mugs, and none of the latency."""
    monkeypatch.setenv("SHOP_DATABASE", f"sqlite:///{tmp_path / 'shop.db'}")
    monkeypatch.setenv("SHOP_LATENCY", "0")
    create_tables()
    stock_up({"mug": 3, "globe": 0})
