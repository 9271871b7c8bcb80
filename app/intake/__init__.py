"""Accept events: recognise, project, owe, in a single transaction.

This is the heart of the service. Everything before it (`app.web.webhooks`) may refuse a
request; everything after it (`app.dispatch`) may fail and try again. Here the promise is
made, and it is made once.
"""

from app.intake.announcement import Announcer
from app.intake.projection import Fact
from app.intake.queue import DATABASE_LIMITS, Intake, IntakeLimits
from app.intake.submission import OnAnswer, Outcome, Receipt
from app.intake.subscriptions import Subscriptions

__all__ = [
    "DATABASE_LIMITS",
    "Announcer",
    "Fact",
    "Intake",
    "IntakeLimits",
    "OnAnswer",
    "Outcome",
    "Receipt",
    "Subscriptions",
]
