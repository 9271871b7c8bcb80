"""procrastinate's worker with a task that does nothing."""

import os

import uvloop
from procrastinate import App, PsycopgConnector

from tests.bench.notes import notes

# The best of 3, 10 and 30, on two cores.
CONCURRENCY = 10

app = App(
    connector=PsycopgConnector(
        conninfo=os.environ["DATABASE_URL"], min_size=CONCURRENCY, max_size=CONCURRENCY + 2
    )
)


@app.task(name="noop")
async def do_nothing() -> None:
    notes.count()


async def main() -> None:
    async with app.open_async():
        await app.run_worker_async(concurrency=CONCURRENCY)


if __name__ == "__main__":
    uvloop.run(main())
