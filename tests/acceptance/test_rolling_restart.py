"""Replicas behind a balancer are replaced under load, and nobody who sends notices.

`python -m tests.faults rolling --requests 10000` does the same at length.
"""

import os

import pytest

from tests.faults.rolling import BalancerMissing, Rolling, local, roll
from tests.faults.soak import own_site

DEPLOYED = """\
resolvers docker
    nameserver embedded 127.0.0.11:53

frontend public
    bind :8080

backend webhooks
    default-server check inter 2s resolvers docker init-addr none
    server-template webhooks 8 webhooks:8000
"""


@pytest.mark.timeout(300)
def test_two_replicas_are_replaced_and_no_request_fails() -> None:
    """Case 54, too: a connection that a replica closes is not used any more."""
    try:
        with own_site(workers=0) as site:
            rolled = roll(site, Rolling(requests=1500, restarts=2, rate=100))
    except BalancerMissing as missing:
        if os.environ.get("CI") == "true":
            raise
        pytest.skip(str(missing))

    assert {} == rolled.failed
    assert 2 == rolled.restarts
    assert rolled.requests >= 1500


def test_the_deployed_settings_are_used_with_other_addresses() -> None:
    ours = local(DEPLOYED, 9000, [9001, 9002])

    assert (
        """\

frontend public
    bind 127.0.0.1:9000

backend webhooks
    default-server check inter 2s
    server replica0 127.0.0.1:9001
    server replica1 127.0.0.1:9002
"""
        == ours
    )
