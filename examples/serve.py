"""Serves a model over HTTP; reduces the depth under load to hold a latency target.

pip install -e ".[serve]"                                             # what it needs
python examples/serve.py --model DIR_OR_HUB_ID                        # serves http://127.0.0.1:8000
curl -F image=@shirt.png http://127.0.0.1:8000/predict                # or several: -F image=@a.png -F image=@b.png

One `Gateway` checks and decodes uploads and records metrics. It passes small arrays to the replicas, processes that
hold the model and predict in batches. There is only one gateway, so /metrics covers the whole service.
"""

from __future__ import annotations

import asyncio
import signal
import sys
import time
from multiprocessing import forkserver
from pathlib import Path

from service.replicas import Replicas
from service.settings import Settings


def main(settings: Settings) -> None:
    """Serve until SIGINT or SIGTERM; then answer the requests that have arrived, and return.

    Raises:
        ValueError: settings are out of range or do not fit the model, or the model cannot be loaded.
    """
    start = time.perf_counter()
    settings.check()
    token = settings.token()
    socket = settings.listen()
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the next process inherits this; all replicas would end with it
    forkserver.ensure_running()  # imports torch for the replicas while this process imports it for itself
    for number in (signal.SIGINT, signal.SIGTERM):  # uvicorn replaces both, and raises them once more at its end
        signal.signal(number, lambda *_: sys.exit(0))
    from service.gateway import Gateway
    from service.http_server import http_server

    say(f"Imports took {time.perf_counter() - start:.1f} s; the model is being loaded.")
    replicas = Replicas(settings)
    server = http_server(Gateway(replicas, settings).app(), settings, token)

    async def ready() -> None:
        while not replicas.alive:
            await asyncio.sleep(0.1)
        say(
            f"{Path(settings.model).name} is served on http://{settings.host}:{settings.port}/predict, "
            f"{time.perf_counter() - start:.1f} s after the start."
        )

    async def serve() -> None:
        keeping, saying = asyncio.create_task(replicas.run()), asyncio.create_task(ready())
        keeping.add_done_callback(lambda _: setattr(server, "should_exit", True))
        await server.serve([socket])
        saying.cancel()
        if keeping.done():
            keeping.result()

    try:
        asyncio.run(serve())
    finally:
        replicas.close()


def say(sentence: str) -> None:
    print(sentence, flush=True)


if __name__ == "__main__":
    try:
        import tyro

        main(tyro.cli(Settings, description=__doc__))
    except ValueError as error:
        sys.exit(f"error: {error}")
    except ModuleNotFoundError as error:
        from hierens.core.install import install_command

        sys.exit(f"error: the server needs {error.name}: {install_command('serve')}.")
