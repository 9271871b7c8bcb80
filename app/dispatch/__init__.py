"""The engine: what is owed becomes calls of callbacks, again and again, until it is settled.

In the order of a delivery: `registry` says who asked, `worker` claims, `lanes` runs,
`attempt` calls once and names what happened, `schedule` says when to try again, and
`control` is what an operator may do about it.
"""
