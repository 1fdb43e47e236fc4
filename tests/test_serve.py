"""The server example: what strangers may send, and that its answers are the model's own."""

import asyncio
import contextlib
import io
import json
import multiprocessing
import os
import shutil
import signal
import socket
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:Image size")
pytest.importorskip("prometheus_client")
pytest.importorskip("starlette")
pytest.importorskip("uvicorn")
httpx = pytest.importorskip("httpx")
psutil = pytest.importorskip("psutil")

from service import replicas as processes
from service.gateway import Gateway
from service.http_server import PROTECTED, SECURITY_HEADERS, http_server
from service.network import Inputs, Network
from service.settings import Settings
from service.uploads import RefusedError, read_image

import hierens
from hierens.inference.calibration import collect
from hierens.inference.policies import LatencyObjective, save_policy
from support import hostile_uploads
from support.networks import tiny_tree

PORT = 8917
URL = f"http://127.0.0.1:{PORT}"
EXAMPLES = Path(__file__).parents[1] / "examples"


def encoded(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def picture(size=(12, 8), mode="L", seed=0):
    channels = () if mode == "L" else (len(mode),)
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], *channels), dtype=np.uint8)
    return Image.fromarray(pixels, mode)


# --- reading images, without a server -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "status", "sentence"),
    [
        (b"", 400, "empty"),
        (b"hello", 400, "no image of PNG, JPEG"),
        (encoded(picture(), "TIFF"), 400, "no image of PNG, JPEG"),
        (encoded(picture((300, 200)))[:2000], 400, "damaged or cut short"),
        (encoded(picture((300, 200), "RGB"), "JPEG")[:3000], 400, "damaged or cut short"),
        (hostile_uploads.png_header(10_000, 10_000), 413, "10000 x 10000 pixels, more than 1000000"),
        (hostile_uploads.png_header(60_000, 60_000), 413, "more than 1000000"),
        (hostile_uploads.png_bomb(4000, 4000), 413, "4000 x 4000 pixels"),
        (encoded(Image.new("P", (2000, 2000)), "GIF"), 413, "2000 x 2000"),
        (hostile_uploads.png_header(0, 5), 400, "no image of PNG"),
    ],
)
def test_what_is_no_whole_image_of_a_fair_size_is_refused(data, status, sentence):
    with pytest.raises(RefusedError, match=sentence) as refusal:
        read_image(data, "L", 1_000_000)
    assert refusal.value.status == status


def test_pixels_are_counted_before_anything_is_decoded(monkeypatch):
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda self: pytest.fail("it was decoded"))
    with pytest.raises(RefusedError, match="more than 1000000"):
        read_image(hostile_uploads.png_bomb(4000, 4000), "RGB", 1_000_000)


@pytest.mark.parametrize("mode", ["L", "RGB"])
@pytest.mark.parametrize("kind", ["PNG", "BMP", "GIF"])
def test_lossless_images_are_read_as_they_are(mode, kind):
    image = picture(mode="L")
    assert np.array_equal(np.asarray(read_image(encoded(image, kind), mode, 10_000)), np.asarray(image.convert(mode)))


def test_images_of_every_kind_come_in_eight_bits_and_upright():
    grey = picture()
    sixteen = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)
    assert np.array_equal(np.asarray(read_image(encoded(sixteen), "L", 10_000)), np.asarray(grey)), "16-bit PNG"
    frames = [picture(seed=seed) for seed in range(3)]
    animated = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert np.array_equal(np.asarray(read_image(animated, "L", 10_000)), np.asarray(frames[0])), "the first frame"
    cmyk = Image.new("CMYK", (12, 8), (0, 255, 255, 0))
    red = np.asarray(read_image(encoded(cmyk, "JPEG"), "RGB", 10_000))[4, 4]
    assert red[0] > 200 and max(red[1:]) < 60
    exif = Image.Exif()
    exif[0x0112] = 6  # taken with the camera turned by a quarter
    turned = read_image(encoded(grey, "PNG", exif=exif), "L", 10_000)
    assert np.array_equal(np.asarray(turned), np.rot90(np.asarray(grey), -1))
    for mode in ("RGBA", "LA"):
        assert read_image(encoded(grey.convert(mode), "PNG"), "L", 10_000).mode == "L"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"replicas": 0}, "replicas must be at least 1"),
        ({"policy": "fixed", "depth": 9}, "depth"),
        ({"policy": "saved"}, "holds no policy.json"),
        ({"buffer_bytes": 5}, "buffer_bytes must be at least max_bytes"),
    ],
)
def test_bad_settings_are_named(settings, message, saved):
    given = Settings(model=str(saved[0]), **settings)
    with pytest.raises(ValueError, match=message):
        given.check()
        Network(given)


def test_tokens_and_addresses_are_checked_first(tmp_path):
    (tmp_path / "token").write_text("short\n")
    for file, message in (("token", "at least 16 ASCII characters, got 5"), ("missing", "missing cannot be read")):
        with pytest.raises(ValueError, match=message):
            Settings("model", token_file=str(tmp_path / file)).token()
    with Settings("model", port=0).listen() as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ValueError, match=f"cannot listen on 127.0.0.1, port {port}: Address already in use.$"):
            Settings("model", port=port).listen()


# --- the processes that hold the model, with made-up work ------------------------------------------------------------


class Pool:
    """Replicas whose work is a function; runs `use(replicas)`, an asynchronous function."""

    def __init__(self, monkeypatch, work, use, **settings):
        monkeypatch.setattr(processes, "CONTEXT", multiprocessing.get_context("fork"))
        monkeypatch.setattr(processes, "work", work)
        monkeypatch.setattr(processes, "RESTART_S", 0)
        self.use, self.settings = use, Settings("model", **settings)
        asyncio.run(asyncio.wait_for(self.run(), 20))

    async def run(self):
        replicas = processes.Replicas(self.settings)
        keeping = asyncio.create_task(replicas.run())
        try:
            while replicas.alive < self.settings.replicas and not keeping.done():
                await asyncio.sleep(0.01)
            if keeping.done():
                keeping.result()
            await self.use(replicas)
        finally:
            keeping.cancel()
            await asyncio.wait([keeping])


def echo(connection, settings):
    """Answers with the sizes of the batch; stops at `stop`, and ends at `end`."""
    connection.send("inputs")
    with contextlib.suppress(EOFError):
        while True:
            requests, observed, _ = connection.recv()
            if "end" in requests:
                os._exit(3)
            if "stop" in requests:
                time.sleep(60)
            batch = len(requests), os.getpid(), observed
            found = [RuntimeError("no") if request == "fail" else (request, *batch) for request in requests]
            connection.send((found, (1 if "narrow" in requests else None, {"rate": 5.0})))


def test_requests_that_arrive_together_are_one_batch(monkeypatch):
    async def use(replicas):
        found = await asyncio.gather(*(replicas.answer(n) for n in range(5)))
        assert [(n, size) for n, size, *_ in found] == [(0, 4), (1, 4), (2, 4), (3, 4), (4, 1)]
        assert found[0][3] == [(1, None)], "one request was waiting beside the batch"
        (after, latency), now = found[4][3]
        assert after == 1 and latency > 0 and now == (0, None)
        failed, fine = await asyncio.gather(replicas.answer("fail"), replicas.answer(7), return_exceptions=True)
        assert isinstance(failed, RuntimeError) and fine[0] == 7
        await replicas.answer("narrow")
        assert [size for _, size, *_ in await asyncio.gather(*map(replicas.answer, range(2)))] == [1, 1], "advised"
        assert replicas.running[0].metrics == {"rate": 5.0}

    Pool(monkeypatch, echo, use, max_batch=4, batch_wait_ms=20)


def test_requests_of_the_only_replica_fail_at_once_when_it_ends_and_a_new_one_starts(monkeypatch, capfd):
    async def use(replicas):
        found = await asyncio.gather(replicas.answer("end"), *map(replicas.answer, range(5)), return_exceptions=True)
        assert all(isinstance(error, processes.ReplicaError) for error in found)
        while not replicas.alive:
            await asyncio.sleep(0.01)
        (_, _, second, _) = await replicas.answer(1)
        os.kill(second, signal.SIGKILL)  # while it has nothing to do
        while replicas.alive:
            await asyncio.sleep(0.01)
        with pytest.raises(processes.ReplicaError):
            await replicas.answer(1)

    Pool(monkeypatch, echo, use, max_batch=2)
    assert "A replica ended with exit code 3; a new one starts." in capfd.readouterr().out


def test_a_replica_that_does_not_answer_is_replaced(monkeypatch):
    async def use(replicas):
        first = replicas.running[0]
        with pytest.raises(processes.ReplicaError):
            await replicas.answer("stop")
        while replicas.running[0] is first or not replicas.alive:
            await asyncio.sleep(0.01)

    Pool(monkeypatch, echo, use, timeout_s=0.1)


def test_a_request_goes_to_another_replica_when_its_own_ends(monkeypatch):
    async def use(replicas):
        gateway = Gateway(replicas, replicas.settings)
        slow = asyncio.create_task(gateway._ask("stop"))
        await asyncio.sleep(0.2)
        busy = {replica.process.pid for replica in replicas.running.values()} - {(await replicas.answer(0))[2]}
        os.kill(busy.pop(), signal.SIGKILL)
        await asyncio.sleep(0.2)
        assert gateway.metrics.again._value.get() == 1 and not slow.done()
        slow.cancel()

    Pool(monkeypatch, echo, use, replicas=2)


@pytest.mark.parametrize(
    ("ending", "message"),
    [
        (lambda connection, _: (connection.send(ValueError("no such model")), time.sleep(9)), "no such model"),
        (lambda *_: os._exit(3), "exit code 3 while it loaded the model; its message is above"),
        (lambda *_: os.kill(os.getpid(), signal.SIGKILL), "exit code -9 .*: is there enough memory?"),
    ],
)
def test_a_model_that_cannot_be_loaded_ends_the_server_with_a_sentence(monkeypatch, ending, message):
    with pytest.raises(ValueError, match=message):
        Pool(monkeypatch, ending, None)


# --- HTTP, with a made-up model ---------------------------------------------------------------------------------------


class Model:
    """In the place of replicas: answers when it may."""

    def __init__(self):
        data = {"input_size": (1, 16, 16), "mean": (0.3,), "std": (0.4,)}
        self.running = {0: SimpleNamespace(metrics={"agreement": 0.5})}
        self.alive, self.inputs, self.asked, self.may = 1, Inputs(data, ("a", "b")), 0, threading.Event()
        self.may.set()

    async def answer(self, images):
        self.asked += 1
        while not self.may.is_set():
            await asyncio.sleep(0.01)
        return [{"depth": 0}] * len(images)


@contextlib.contextmanager
def front(**settings):
    """The HTTP server in a thread."""
    given, model = Settings("model", port=0, **settings), Model()
    server = http_server(Gateway(model, given).app(), given, given.token())
    with given.listen() as listening:
        url = f"http://127.0.0.1:{listening.getsockname()[1]}"
        thread = threading.Thread(target=lambda: asyncio.run(server.serve([listening])))
        thread.start()
        try:
            yield SimpleNamespace(url=url, port=listening.getsockname()[1], server=server, model=model)
        finally:
            model.may.set()
            server.should_exit = True
            thread.join()


ROUTES = ("/predict", "/metrics", "/healthz", "/readyz", "/nothing")


def get(url, path, **options):
    return httpx.request("POST" if path == "/predict" else "GET", url + path, timeout=10, **options)


def test_only_the_token_opens_what_it_protects(tmp_path):
    (tmp_path / "token").write_text("0123456789abcdef\n")
    with front(token_file=str(tmp_path / "token")) as server:
        for path in ROUTES:
            for given in ({}, {"Authorization": "Bearer 0123456789abcdeX"}, {"Authorization": "Bearer é".encode()}):
                found = get(server.url, path, headers=given)
                assert (found.status_code == 401) == (path in PROTECTED), path
                if path in PROTECTED:
                    assert found.headers["WWW-Authenticate"] == "Bearer" and found.json()["error"].endswith(".")
            right = {"Authorization": "Bearer 0123456789abcdef"}
            assert get(server.url, path, headers=right).status_code != 401
        assert ask(encoded(picture()), server.url, headers=right).status_code == 200


def test_headers_are_limited_and_secure_on_every_route():
    secure = {name.decode(): value.decode() for name, value in SECURITY_HEADERS}
    with front() as server:
        for path in ROUTES:
            found = get(server.url, path)
            assert secure.items() <= dict(found.headers).items(), path
            assert "server" not in found.headers
            for size in (16_384, 1_000_000):
                head = f"GET {path} HTTP/1.1\r\nHost: x\r\nX-Long: {size * 'a'}\r\n\r\n".encode()
                found = hostile_uploads.send("127.0.0.1", server.port, hostile_uploads.Case("", head, frozenset()))
                assert found.status == 431 or (size > 16_384 and not found.status), path  # a reset may overtake it
        for nonsense in (b"\x16\x03\x01\r\n\r\n", b"GET / HTTP/1.1\r\nContent-Length: five\r\n\r\n"):
            found = hostile_uploads.send("127.0.0.1", server.port, hostile_uploads.Case("", nonsense, frozenset()))
            assert found.status == 400 and json.loads(found.body) == {"error": "This is no valid request."}


@pytest.mark.parametrize(
    "sent",
    [
        b"",
        b"GET /healthz HTTP/1.1\r\nHost: x\r\nX-Half: ",
        b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\nGET /healthz HTTP/1.1\r\nHost",
        b"POST /nothing HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000\r\n\r\n",
    ],
    ids=["nothing", "half a header", "half a second header", "a body that nobody reads"],
)
def test_connections_that_send_no_whole_request_are_closed(sent):
    with front(upload_s=0.3) as server, socket.create_connection(("127.0.0.1", server.port), timeout=5) as connection:
        connection.sendall(sent)
        with contextlib.suppress(ConnectionError):
            for _ in range(200):
                if sent:
                    time.sleep(0.05)
                    connection.sendall(b"a")  # one byte after another does not help
                elif not connection.recv(1000):
                    return
            pytest.fail("the connection is still open")


def test_requests_in_flight_are_answered_before_the_server_ends():
    with front() as server, ThreadPoolExecutor(6) as clients:
        server.model.may.clear()
        answers = [clients.submit(ask, encoded(picture()), server.url) for _ in range(6)]
        while server.model.asked < 6:
            time.sleep(0.01)
        server.server.should_exit = True
        with pytest.raises(httpx.ConnectError):
            while True:
                get(server.url, "/healthz")
        server.model.may.set()
        assert [answer.result().status_code for answer in answers] == [200] * 6


def test_without_a_replica_nobody_waits():
    with front() as server:
        server.model.alive = 0
        found = ask(encoded(picture()), server.url)
        assert found.status_code == 503 and found.headers["Retry-After"] == "1"
        assert get(server.url, "/readyz").status_code == 503 and get(server.url, "/healthz").status_code == 200


def test_the_image_copies_what_is_there_and_does_not_run_as_root():
    lines = [line.split() for line in (EXAMPLES / "Dockerfile").read_text().splitlines()]
    copied = [source for word, *rest in filter(None, lines) if word == "COPY" for source in rest[:-1]]
    assert "hierens" in copied and all((EXAMPLES.parent / source).exists() for source in copied)
    assert ["USER", "1000"] in lines


# --- the service ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    model, names = tiny_tree(), [f"kind {i}" for i in range(10)]
    model.pretrained_cfg.update(input_size=(1, 16, 16), mean=(0.3,), std=(0.4,), crop_pct=1.0, label_names=names)
    directory = tmp_path_factory.mktemp("model")
    model.save_pretrained(directory)
    return directory, hierens.from_pretrained(directory)


@contextlib.contextmanager
def started(model, log, *flags, port=PORT):
    """The example in processes of its own."""
    command = [sys.executable, EXAMPLES / "serve.py", "--model", model, "--port", port, *flags]
    with log.open("w") as output:
        process = psutil.Popen([str(part) for part in command], stdout=output, stderr=output, start_new_session=True)
    children = []
    try:
        wait_ready(process, log, f"http://127.0.0.1:{port}")
        children = process.children(recursive=True)
        yield process
    finally:
        process.terminate()
        assert process.wait(60) == 0, log.read_text()
        _, alive = psutil.wait_procs(children, timeout=15)
        assert not alive, f"the server left processes behind: {alive}"


@pytest.fixture(scope="module")
def service(saved, tmp_path_factory):
    flags = ("--max-bytes", 200_000, "--max-pixels", 1_000_000, "--upload-s", 3, "--buffer-bytes", 900_000)
    with started(saved[0], tmp_path_factory.mktemp("service") / "log", *flags) as process:
        yield process


def wait_ready(process, log=None, url=URL, seconds=120):
    end = time.monotonic() + seconds
    while time.monotonic() < end and process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
        try:
            if httpx.get(f"{url}/readyz", timeout=5).status_code == 200:
                return
        except httpx.HTTPError:
            pass
        time.sleep(0.5)
    pytest.fail(f"the server did not become ready:\n{log and log.read_text()[-3000:]}")


def ask(data, url=URL, **options):
    return httpx.post(f"{url}/predict", files={"image": ("x.png", data, "image/png")}, timeout=30, **options)


def test_answers_are_the_models_own(service, saved):
    images = [picture((16, 16), seed=seed) for seed in range(4)]
    files = [("image", ("x.png", encoded(image), "image/png")) for image in images]
    together = httpx.post(f"{URL}/predict", files=files, timeout=30).raise_for_status().json()
    assert len(together["answers"]) == 4 and together["milliseconds"] > 0
    alone = ask(encoded(images[0])).raise_for_status().json()["answers"]
    for image, answer in zip([*images, images[0]], together["answers"] + alone, strict=True):
        x = ((torch.from_numpy(np.array(image)).float() / 255 - 0.3) / 0.4)[None, None]
        with torch.no_grad():
            leaf_logits = saved[1](x, leaves=answer["networks"], reduce=False)
        p = leaf_logits.mean(1).softmax(-1)[0]
        top = p.topk(5)
        assert [c["index"] for c in answer["classes"]] == top.indices.tolist()
        assert [c["probability"] for c in answer["classes"]] == pytest.approx(top.values.tolist(), abs=1e-5)
        assert answer["classes"][0]["name"] == f"kind {top.indices[0]}"
        assert answer["networks"] == 2 ** answer["depth"]
        assert answer["macs"] == saved[1].macs((1, 16, 16))[answer["depth"]]
        of_leaves = leaf_logits.softmax(-1)[0]
        entropy = torch.special.entr(of_leaves.mean(0)).sum().item()
        mutual = entropy - torch.special.entr(of_leaves).sum(-1).mean().item()
        assert answer["uncertainty"]["entropy"] == pytest.approx(entropy, abs=1e-4)
        if answer["depth"]:
            assert answer["uncertainty"]["mutual_information"] == pytest.approx(mutual, abs=1e-4)


def metrics(url=URL):
    lines = httpx.get(f"{url}/metrics", timeout=10).raise_for_status().text.splitlines()
    return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines if not line.startswith("#")}


def test_the_numbers_of_a_policy_are_metrics():
    with front() as server:
        assert metrics(server.url)['hierens_policy{name="agreement",replica="0"}'] == 0.5


def test_a_latency_objective_decides_the_next_batch_and_compares_images_between_batches(saved, tmp_path):
    shutil.copytree(saved[0], tmp_path / "model")
    images = torch.rand(60, 1, 16, 16)
    held_out = collect(saved[1], [(images, torch.zeros(60, dtype=torch.long))])
    save_policy(LatencyObjective.from_calibration(held_out, 1e5, 0.9, shadow_share=1.0), tmp_path / "model")
    network = Network(Settings(str(tmp_path / "model"), policy="saved"))
    request = (255 * images[:4]).byte().numpy()
    answers = network.answer([request, request], [(0, None)], 1.0)
    assert [len(of_request) for of_request in answers] == [4, 4] and network.advice()[0] >= 1
    assert network.shadow() and not network.shadow(), "all eight images"
    assert network.advice()[1]["agreement"] == 1, "without load, all networks were evaluated"
    network.answer([request], [(10_000_000, None)], 1e6)
    assert network.advice()[1]["overloaded"] == 1


def test_metrics_count_what_happened(service):
    before = metrics()
    ask(encoded(picture())).raise_for_status()
    assert ask(b"nothing").status_code == 400
    after = metrics()
    for name, more in (
        ('hierens_requests_total{status="200"}', 1),
        ('hierens_requests_total{status="400"}', 1),
        ("hierens_answer_seconds_count", 1),
    ):
        assert after[name] == before.get(name, 0) + more, name
    by_depth = [sum(v for k, v in each.items() if k.startswith("hierens_answers_total")) for each in (before, after)]
    assert by_depth[1] == by_depth[0] + 1
    assert after["hierens_queue"] == after["hierens_body_bytes"] == 0 and 0 <= after["hierens_depth"] <= 2


def test_it_says_that_it_lives_and_is_ready(service):
    assert httpx.get(f"{URL}/healthz", timeout=10).json() == {"status": "alive"}
    assert httpx.get(f"{URL}/readyz", timeout=10).json() == {"status": "ready"}
    missing = httpx.get(f"{URL}/nothing", timeout=10)
    assert missing.status_code == 404 and missing.json() == {"error": "Not Found."}


def check_hostile(number):
    for case in hostile_uploads.cases(number, max_bytes=200_000):
        found = hostile_uploads.send("127.0.0.1", PORT, case)
        assert found.status in case.expected, f"{case.name}: {found}"
        if found.body.startswith(b"{"):
            assert json.loads(found.body)["error"].endswith("."), case.name
    assert ask(encoded(picture())).status_code == 200, "and others are still served"


def test_hostile_uploads_get_a_status_and_a_sentence(service):
    check_hostile(20)


@pytest.mark.slow
def test_memory_stays_bounded_under_hostile_uploads(service):
    def used():
        return sum(p.memory_info().rss for p in (service, *service.children(recursive=True)))

    check_hostile(40)
    before = used()
    check_hostile(200)
    assert used() < before + 150e6


def test_a_full_upload_buffer_answers_503_with_retry_after(service):
    held = [socket.create_connection(("127.0.0.1", PORT), timeout=10) for _ in range(4)]
    try:
        for connection in held:
            connection.sendall(hostile_uploads.head(200_000))
        deadline = time.monotonic() + 2
        while metrics()["hierens_body_bytes"] < 800_000:
            assert time.monotonic() < deadline
        large = httpx.post(f"{URL}/predict", files={"image": ("x.png", bytes(150_000), "image/png")}, timeout=10)
        assert large.status_code == 503 and large.headers["Retry-After"] == "1"
        assert large.json() == {"error": "Too many uploads are under way; try again in a second."}
        assert ask(encoded(picture())).status_code == 200, "there is room for a small one"
    finally:
        for connection in held:
            connection.close()


def test_bodies_that_do_not_end_are_not_waited_for(service):
    with socket.create_connection(("127.0.0.1", PORT), timeout=10) as connection:
        connection.sendall(hostile_uploads.head(100_000))
        assert b" 408 " in connection.recv(1000).split(b"\r\n")[0]


def test_it_listens_on_its_own_port_alone(service):
    """No process of the server opens another port, or the port on another address."""
    listening = [
        (connection.laddr.ip, connection.laddr.port)
        for process in (service, *service.children(recursive=True))
        for connection in process.net_connections()
        if connection.status == psutil.CONN_LISTEN
    ]
    assert listening == [("127.0.0.1", PORT)]


def test_a_killed_replica_leaves_no_request_without_an_answer(service):
    # The forkserver has no children of its own accord but replicas.
    (replica,) = [p for p in service.children(recursive=True) if p.ppid() != service.pid]
    with ThreadPoolExecutor(8) as clients:
        answers = [clients.submit(ask, encoded(picture((16, 16)))) for _ in range(40)]
        answers[5].result()
        replica.kill()
        statuses = {answer.result().status_code for answer in answers}
    assert statuses <= {200, 503}
    wait_ready(service)
    assert ask(encoded(picture())).status_code == 200


@pytest.mark.slow
def test_a_signal_to_the_whole_group_cuts_no_request(saved, tmp_path):
    port, request = PORT + 1, hostile_uploads.upload(encoded(picture()))
    with started(saved[0], tmp_path / "log", port=port) as process:
        connections = [socket.create_connection(("127.0.0.1", port), timeout=30) for _ in range(8)]
        for connection in connections:
            connection.sendall(request[:-50])
        while metrics(f"http://127.0.0.1:{port}")["hierens_queue"] < 8:
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGTERM)
        with pytest.raises(ConnectionError):
            while True:
                socket.create_connection(("127.0.0.1", port), timeout=30).close()
        for connection in connections:
            connection.sendall(request[-50:])
            assert connection.recv(1000).startswith(b"HTTP/1.1 200 OK")
            connection.close()
