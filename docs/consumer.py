"""A reference consumer of the change feed: reads every item once it happens, and misses none.

    RECEIVER_URL=http://127.0.0.1:8000 RECEIVER_TOKEN=… python docs/consumer.py

It needs nothing but Python. What it has dealt with, it remembers in a file; killed at any
time, it goes on behind the last item that it remembers. An item it was just dealing with comes
again: so deal with an item in a way that does no harm twice, or keep the cursor in the same
transaction as your own work. Run one of these for each file.
"""
# ruff: noqa: INP001, S310  # a program by itself; the address is its operator's own

import json
import os
import sys
import time
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.parse import urlencode
from urllib.request import Request, urlopen

URL = os.environ.get("RECEIVER_URL", "http://127.0.0.1:8000")
TOKEN = os.environ["RECEIVER_TOKEN"]
PLACE = Path(os.environ.get("CONSUMER_PLACE", "consumer.cursor"))
TYPES = ["envelope.*", "contract.*"]
WAIT, LONGEST_PAUSE = 30, 60


def handle(item: dict[str, Any]) -> None:
    """Deal with one item: here is where your own work goes."""
    # In one piece: `print` may write each word by itself, and be killed in between.
    os.write(1, f"{item['at']} {item['type']} {item['envelope_id']}\n".encode())


def remember(cursor: str) -> None:
    """Write the cursor down so that the file holds the old one or the new one, never half."""
    new = PLACE.with_suffix(".new")
    with new.open("wb", buffering=0) as file:
        file.write(cursor.encode())
        os.fsync(file.fileno())
    new.replace(PLACE)


def ask(cursor: str | None) -> dict[str, Any]:
    """Ask for what comes behind the cursor, and wait for it if there is nothing yet."""
    query = {"wait": WAIT, "type": TYPES} | ({"after": cursor} if cursor else {})
    address = f"{URL}/api/events?{urlencode(query, doseq=True)}"
    request = Request(address, headers={"Authorization": f"Bearer {TOKEN}"})
    with urlopen(request, timeout=WAIT + 15) as answer:
        page: dict[str, Any] = json.load(answer)
        return page


def follow() -> None:
    """Deal with everything behind the cursor that is remembered, for ever."""
    cursor, pause = PLACE.read_text() if PLACE.exists() else None, 1.0
    while True:
        try:
            page = ask(cursor)
        except (OSError, HTTPException, ValueError) as error:
            # Nobody answers, or a 429 or 503 says when to come again. What is worse needs a
            # person: with a 410 the database was restored, and what was read is not in it.
            if isinstance(error, HTTPError) and error.code not in {429, 502, 503, 504}:
                sys.exit(f"{error.code}: {error.read().decode()}")
            after = error.headers.get("Retry-After", 0) if isinstance(error, HTTPError) else 0
            time.sleep(max(pause, float(after)))
            pause = min(pause * 2, LONGEST_PAUSE)
            continue
        pause = 1.0
        for item in page["items"]:
            handle(item)
            remember(item["cursor"])
        # Also of a page without items: it has moved on past what was not asked for.
        if page["next_cursor"] != cursor:
            remember(cursor := page["next_cursor"])


if __name__ == "__main__":
    follow()
