"""The server example: what strangers may send, and that its answers are the model's own."""

import io
import json
import socket
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:Image size")
pytest.importorskip("ray")
pytest.importorskip("prometheus_client")
httpx = pytest.importorskip("httpx")
psutil = pytest.importorskip("psutil")

import serve as example
from service.uploads import RefusedError, read_image

import hierens
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
def test_bad_settings_are_named_before_ray_starts(settings, message, saved):
    with pytest.raises(ValueError, match=message):
        example.build(example.Settings(model=str(saved[0]), **settings))


# --- the service ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    model, names = tiny_tree(), [f"kind {i}" for i in range(10)]
    model.pretrained_cfg.update(input_size=(1, 16, 16), mean=(0.3,), std=(0.4,), crop_pct=1.0, label_names=names)
    directory = tmp_path_factory.mktemp("model")
    model.save_pretrained(directory)
    return directory, hierens.from_pretrained(directory)


@pytest.fixture(scope="module")
def service(saved, tmp_path_factory):
    """The example in processes of its own: a minute after a Ray ends, its threads end who began it."""
    flags = {"model": saved[0], "port": PORT, "max-bytes": 200_000, "max-pixels": 1_000_000, "upload-s": 3}
    command = [sys.executable, EXAMPLES / "serve.py", "--buffer-bytes", 900_000]
    command += [part for name, value in flags.items() for part in (f"--{name}", value)]
    before, ours = {process.pid for process in psutil.process_iter()}, []
    log = tmp_path_factory.mktemp("service") / "log"
    with log.open("w") as output:
        process = psutil.Popen([str(part) for part in command], stdout=output, stderr=output)
    try:
        wait_ready(process, log)
        ours = [p for p in psutil.process_iter() if p.pid not in before]
        yield process, ours
    finally:
        process.terminate()
        process.wait(60)
    # Ray's agents notice within a minute that they are alone, and end by themselves.
    left = [p for p in ours if "ray" in (command := " ".join(_command(p))) and "Agent" not in command]
    _, alive = psutil.wait_procs(left, timeout=15)
    assert not alive, f"Ray left processes behind: {alive}"


def wait_ready(process, log, seconds=400):
    end = time.monotonic() + seconds
    while time.monotonic() < end and process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
        try:
            if httpx.get(f"{URL}/readyz", timeout=5).status_code == 200:
                return
        except httpx.HTTPError:
            pass
        time.sleep(0.5)
    pytest.fail(f"the server did not become ready:\n{log.read_text()[-3000:]}")


def _command(process):
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def ask(data, **options):
    return httpx.post(f"{URL}/predict", files={"image": ("x.png", data, "image/png")}, timeout=30, **options)


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


def metrics():
    lines = httpx.get(f"{URL}/metrics", timeout=10).raise_for_status().text.splitlines()
    return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines if not line.startswith("#")}


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
        return sum(p.memory_info().rss for p in service[1] if p.is_running())

    check_hostile(40)
    before = used()
    check_hostile(200)
    assert used() < before + 150e6


def test_what_is_too_much_is_told_to_come_back(service):
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
