"""Why an event was not published; each kind is a dead-letter group of its own.

NotPublished
├── BrokerAway    there is no connection, and a new one cannot be had
├── Unconfirmed   it was sent, perhaps, but the broker did not say in time that it has it
└── Refused       the broker answered, and does not take this message
"""


class NotPublished(Exception):
    """The event is not known to be with the broker; trying again may help."""


class BrokerAway(NotPublished):
    """No connection can be opened; the text says to which address, and why."""


class Unconfirmed(NotPublished):
    """The confirmation did not come. The broker may have the message all the same."""


class Refused(NotPublished):
    """The broker does not take this message; the text says what to change."""
