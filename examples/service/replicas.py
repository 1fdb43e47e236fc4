"""The processes that hold the model: they receive batches of requests, and one that ends is started again."""

from __future__ import annotations

import asyncio
import multiprocessing
import signal
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any

from service.settings import Settings

Answers = list[dict[str, Any]]
RESTART_S = 1.0  # before a replica is replaced, so that one that always ends does not keep the machine busy

# Replicas fork from a process that has imported torch and timm but has not used them: a new one starts in a second.
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["hierens.models.loading", "hierens.training.preprocessing", "timm.data"])


class ReplicaError(Exception):
    """The replica of a request ended before it answered, or there is none."""


@dataclass(eq=False)
class Request:
    """The images (N, C, H, W) of a request in bytes, and its answers when they are there."""

    images: Any
    arrived: float = field(default_factory=time.perf_counter)
    answers: asyncio.Future[Answers] = field(default_factory=lambda: asyncio.get_running_loop().create_future())

    def fail(self, error: Exception) -> None:
        """Raise an error where the answers are awaited."""
        if not self.answers.done():
            self.answers.set_exception(error)


class Replica:
    """A process with the model, and the other end of its pipe.

    If either of the two processes ends, the other one reads the end of the pipe.

    Attributes:
        max_batch: maximum requests of its next batch.
        metrics: numbers of its policy, by name.
    """

    metrics: dict[str, float]

    def __init__(self, settings: Settings) -> None:
        self.connection, theirs = CONTEXT.Pipe()
        self.process = CONTEXT.Process(target=work, args=(theirs, settings), daemon=True)
        self.process.start()
        theirs.close()
        self.max_batch, self.metrics = settings.max_batch, {}

    async def receive(self) -> Any:
        """The next message.

        Raises:
            EOFError, OSError: the process has ended.
        """
        await _readable(self.connection.fileno())
        return self.connection.recv()

    async def ended(self) -> None:
        """Wait for the end of the process.

        Raises:
            EOFError: the process has ended.
        """
        await _readable(self.process.sentinel)
        raise EOFError

    def kill(self) -> int | None:
        """End the process and return its exit code."""
        self.process.kill()
        self.process.join()
        self.connection.close()
        return self.process.exitcode

    def close(self) -> None:
        """Let the process end by itself, or kill it if it does not."""
        self.connection.close()
        self.process.join(2)
        self.kill()


class Replicas:
    """All replicas, and the queue of requests for them.

    Attributes:
        alive: number of replicas that have loaded the model.
        inputs: the inputs of the model (`service.network.Inputs`), once a replica has loaded it.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings, self.alive, self.inputs = settings, 0, None
        self.queue: asyncio.Queue[Request] = asyncio.Queue()
        self.running = {number: Replica(settings) for number in range(settings.replicas)}

    async def answer(self, images: Any) -> Answers:
        """Predictions for the images (N, C, H, W) of a request, in bytes.

        Raises:
            ReplicaError: no replica is alive, or the one that was working on the request ended.
        """
        if not self.alive:
            raise ReplicaError
        request = Request(images)
        self.queue.put_nowait(request)
        return await request.answers

    async def run(self) -> None:
        """Keep all replicas running until this is cancelled.

        Raises:
            ValueError: the model cannot be loaded.
        """
        tasks = [asyncio.create_task(self._keep(number)) for number in self.running]
        try:
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            self.close()

    def close(self) -> None:
        """End all replicas."""
        while self.running:
            self.running.popitem()[1].close()

    async def _keep(self, number: int) -> None:
        while True:
            replica = self.running[number]
            try:
                loaded = await replica.receive()
            except (EOFError, OSError):
                loaded = None
            if isinstance(loaded, ValueError):
                raise loaded
            self.inputs = loaded or self.inputs
            if loaded:
                await self._serve(replica)
            code = replica.kill()
            if self.inputs is None:
                memory = ": is there enough memory?" if code == -signal.SIGKILL else "; its message is above."
                raise ValueError(f"the replica ended with exit code {code} while it loaded the model{memory}")
            print(f"A replica ended with exit code {code}; a new one starts.", flush=True)
            await asyncio.sleep(RESTART_S)
            self.running[number] = await asyncio.to_thread(Replica, self.settings)

    async def _serve(self, replica: Replica) -> None:
        """Send batches to a replica until it ends, or takes so long that none of its clients waits any more."""
        try:
            async with self._counted(), asyncio.TaskGroup() as group:
                group.create_task(replica.ended())
                group.create_task(self._send_batches(replica))
        except* (EOFError, OSError):
            pass

    async def _send_batches(self, replica: Replica) -> None:
        observed: list[tuple[int, float | None]] = []  # queue and latency, for the replica's policy
        while True:
            async with self._batch(replica) as batch:
                observed.append((self._waiting(), None))
                async with asyncio.timeout(self.settings.timeout_s):
                    age_ms = 1e3 * (time.perf_counter() - min(request.arrived for request in batch))
                    message = [request.images for request in batch], observed, age_ms
                    await asyncio.to_thread(replica.connection.send, message)
                    found, (advised, replica.metrics) = await replica.receive()
                    replica.max_batch = min(advised or self.settings.max_batch, self.settings.max_batch)
                for request, answers in zip(batch, found, strict=True):
                    if isinstance(answers, Exception):
                        request.fail(answers)
                    elif not request.answers.done():
                        request.answers.set_result(answers)
                longest = time.perf_counter() - min(request.arrived for request in batch)
                observed = [(self._waiting(), 1e3 * longest)]

    def _waiting(self) -> int:
        """This replica's share of the waiting requests, rounded up."""
        return -(-self.queue.qsize() // self.alive)

    @asynccontextmanager
    async def _counted(self) -> AsyncIterator[None]:
        """Count a replica as alive; without any, nobody has to wait."""
        self.alive += 1
        try:
            yield
        finally:
            self.alive -= 1
            while not self.alive and not self.queue.empty():
                self.queue.get_nowait().fail(ReplicaError())

    @asynccontextmanager
    async def _batch(self, replica: Replica) -> AsyncIterator[list[Request]]:
        """The next requests: as many as have arrived within `batch_wait_ms` after the first one."""
        batch: list[Request] = []
        try:
            while not batch:
                await self._add(batch)
            with suppress(TimeoutError):
                async with asyncio.timeout(self.settings.batch_wait_ms / 1e3):
                    while len(batch) < replica.max_batch:
                        await self._add(batch)
            yield batch
        finally:
            for request in batch:
                request.fail(ReplicaError())

    async def _add(self, batch: list[Request]) -> None:
        request = await self.queue.get()
        if not request.answers.done():  # its client has not given up
            batch.append(request)


async def _readable(descriptor: int) -> None:
    loop = asyncio.get_running_loop()
    found = loop.create_future()
    loop.add_reader(descriptor, lambda: found.done() or found.set_result(None))
    try:
        await found
    finally:
        loop.remove_reader(descriptor)


def work(connection: Connection, settings: Settings) -> None:
    """Load the model and answer batches, in a process of its own, until the other end of the pipe is closed."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # a whole process group receives them: the gateway decides
    from service.network import Network

    with suppress(EOFError, OSError):
        try:
            network = Network(settings)
        except ValueError as error:
            connection.send(ValueError(str(error)))
            connection.recv()  # until the gateway has read it and closes the pipe
        connection.send(network.inputs)
        while True:
            connection.send((network.answer(*connection.recv()), network.advice()))
            while not connection.poll() and network.shadow():
                pass
