"""Run coroutines from code that is not asynchronous, also where an event loop already runs (notebooks)."""

import asyncio
from collections.abc import Coroutine
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

Result = TypeVar("Result")


def run_coroutine(coroutine: Coroutine[Any, Any, Result]) -> Result:
    """Run a coroutine to its end in an event loop of its own, in a thread of its own.

    An exception in the waiting thread (Ctrl-C) cancels the coroutine and is raised after it has ended.

    Args:
        coroutine: Its result is returned, its exception is raised.
    """
    started: Future[tuple[asyncio.AbstractEventLoop, asyncio.Task[Any] | None]] = Future()

    async def main() -> Result:
        started.set_result((asyncio.get_running_loop(), asyncio.current_task()))
        return await coroutine

    with ThreadPoolExecutor(1, thread_name_prefix="verifier-loop") as pool:
        result = pool.submit(asyncio.run, main())
        try:
            return result.result()
        except BaseException:
            if not result.done():
                loop, task = started.result()
                if task is not None:
                    loop.call_soon_threadsafe(task.cancel)
            raise
