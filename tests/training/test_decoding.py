"""Images of every kind give the same pixels wherever hierens reads them, and what is no image gives the same words."""

import io
import json
import subprocess
import sys
import tarfile
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from hierens.training.config import DataConfig
from hierens.training.data.decoding import DecodingError, decode
from hierens.training.data.loaders import create_datasets, create_held_out, create_loaders
from hierens.training.data.unreadable import UnreadableImageError
from support.command_line import hierens as command
from support.hostile_uploads import png_header
from support.networks import tiny_tree

SIDE = 16
MODES = ("L", "RGB")
RANDOM = np.random.default_rng(0)
COLOURS = RANDOM.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
GREYS = RANDOM.integers(0, 256, (SIDE, SIDE), dtype=np.uint8)
UPRIGHT = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: lambda a: np.rot90(a),
}


def saved(image, kind, **options):
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def opened(data):
    return Image.open(io.BytesIO(data))


def oriented(orientation, kind="JPEG", damage=lambda exif: exif):
    exif = Image.Exif()
    exif[0x0112], exif[0x0131] = orientation, "a camera"
    return saved(COLOURS, kind, exif=damage(exif.tobytes()))


def paletted():
    """An image of 16 colours, and it in colours."""
    image = Image.fromarray(GREYS >> 4, "P")
    colours = RANDOM.integers(0, 256, (16, 3), dtype=np.uint8)
    image.putpalette(colours.tobytes())
    return image, Image.fromarray(colours[GREYS >> 4])


def cases():
    """Name -> the file, and the image in 8 bits, upright, of one frame."""
    grey, colour, others = Image.fromarray(GREYS), Image.fromarray(COLOURS), [Image.fromarray(255 - COLOURS)] * 2
    jpeg = np.asarray(opened(saved(colour, "JPEG")))
    pale, coloured = paletted()
    cmyk = saved(Image.fromarray(RANDOM.integers(0, 256, (SIDE, SIDE, 4), dtype=np.uint8), "CMYK"), "JPEG")
    wide = GREYS.astype(np.uint16) * 257
    animated = {"save_all": True, "append_images": others}
    clear = Image.fromarray(RANDOM.integers(0, 256, (SIDE, SIDE), dtype=np.uint8))
    both = colour.copy()
    both.putalpha(clear)
    found = {
        "PNG": (saved(colour, "PNG"), colour),
        "grey PNG": (saved(grey, "PNG"), grey),
        **{f"EXIF {turn}": (oriented(turn), Image.fromarray(UPRIGHT[turn](jpeg).copy())) for turn in UPRIGHT},
        "EXIF in a PNG": (oriented(6, "PNG"), Image.fromarray(UPRIGHT[6](COLOURS).copy())),
        "EXIF in a TIFF": (oriented(6, "TIFF"), Image.fromarray(UPRIGHT[6](COLOURS).copy())),
        "EXIF of 9": (oriented(9, "PNG"), colour),
        "broken EXIF": (oriented(6, "PNG", lambda exif: exif[:15]), colour),
        "no EXIF": (oriented(6, "PNG", lambda exif: b"Exif\0\0nothing"), colour),
        "cut EXIF": (oriented(6, "PNG", lambda exif: exif[:-9]), Image.fromarray(UPRIGHT[6](COLOURS).copy())),
        "I;16 PNG": (saved(wide, "PNG"), grey),
        "I;16B TIFF": (saved(Image.frombytes("I;16B", (SIDE, SIDE), wide.astype(">u2").tobytes()), "TIFF"), grey),
        "I TIFF": (saved(wide.astype(np.int32), "TIFF"), grey),
        "I TIFF, 31 bits": (saved(GREYS.astype(np.int32) << 23, "TIFF"), grey),
        "F TIFF, to 1": (saved(GREYS.astype(np.float32) / 255, "TIFF"), grey),
        "F TIFF, to 255": (saved(GREYS.astype(np.float32), "TIFF"), grey),
        "F TIFF, to 65535": (saved(wide.astype(np.float32), "TIFF"), grey),
        "CMYK JPEG": (cmyk, opened(cmyk).convert("RGB")),
        "palette": (saved(pale, "PNG"), coloured),
        "palette, a transparent colour": (saved(pale, "GIF", transparency=3), coloured),
        "palette, transparent colours": (saved(pale, "PNG", transparency=bytes(range(0, 160, 10))), coloured),
        "animated GIF": (saved(grey, "GIF", save_all=True, append_images=[Image.fromarray(255 - GREYS)]), grey),
        "animated WebP": (saved(colour, "WEBP", lossless=True, **animated), colour),
        "APNG": (saved(colour, "PNG", **animated), colour),
        "two pages": (saved(colour, "TIFF", **animated), colour),
        "LA": (saved(Image.merge("LA", (grey, clear)), "PNG"), grey),
        "RGBA": (saved(both, "PNG"), colour),
        "1 bit": (saved(grey.convert("1"), "PNG"), grey.convert("1").convert("L")),
    }
    return found


CASES = cases()
BAD = {
    "cut": (saved(COLOURS, "PNG")[:300], "it is damaged or cut short"),
    "bomb": (png_header(10_000, 10_000), "it has 10000 x 10000 pixels, more than 89478485"),
    "giant": (png_header(60_000, 60_000), "it has more than 89478485 pixels"),
    "text": (b"no image", "it is no image"),
    "nothing": (b"", "it is no image"),
    "brightness": (
        saved(GREYS.astype(np.float32) * 0 + 1e6, "TIFF"),
        "its largest value is 1e+06, and floats may have at most 65535",
    ),
}


def config(data_dir, mode, dataset="", **settings):
    defaults = {"mean": (0.0,), "std": (1.0,), "augment": "none", "workers": 0, "num_samples": len(CASES)}
    return DataConfig(dataset, str(data_dir), input_size=(3 if mode == "RGB" else 1, SIDE, SIDE), **defaults | settings)


def pixels(tensor):
    """(C, H, W) from 0 to 1 -> bytes as Pillow's arrays have them."""
    found = (tensor * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    return found[..., 0] if found.shape[-1] == 1 else found


def expected(mode):
    return [np.asarray(image.convert(mode)) for _, image in CASES.values()]


def write_folder(root, files):
    for split in ("train", "validation"):
        (root / split / "a").mkdir(parents=True)
        for number, data in enumerate(files):
            (root / split / "a" / f"{number:02d}.png").write_bytes(data)
    return root


def write_shard(root, files):
    splits = {}
    for split in ("train", "validation"):
        with tarfile.open(root / f"{split}.tar", "w") as tar:
            for number, data in enumerate(files):
                for kind, content in (("png", data), ("cls", b"0")):
                    member = tarfile.TarInfo(f"{number:02d}.{kind}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
        splits[split] = {"name": split, "filenames": [f"{split}.tar"], "shard_lengths": [len(files)]}
        splits[split]["num_samples"] = len(files)
    (root / "_info.json").write_text(json.dumps({"splits": splits}))
    return root


def write_table(root, files):
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(1)})
    rows = {
        "image": [{"bytes": data, "path": f"{n:02d}.png"} for n, data in enumerate(files)],
        "label": [0] * len(files),
    }
    for split in ("train", "validation"):
        datasets.Dataset.from_dict(rows, features=features).to_parquet(root / f"{split}-00000-of-00001.parquet")
    return root


def training(root, files, mode):
    data, _ = create_datasets(config(write_folder(root, files), mode))
    return [data[index][0] for index in range(len(data))]


def evaluation(root, files, mode):
    _, loader = create_loaders(config(write_folder(root, files), mode), 1, 5)
    return [image for images, _ in loader for image in images]


def torchvision(root, files, mode):
    root = write_folder(root, files) / "validation"
    data = create_held_out(config(root, mode, "torch/image_folder", val_split=""))
    return [data[index][0] for index in range(len(data))]


def shards(root, files, mode):
    data = config(write_shard(root, files), mode, "wds/made-up")
    return [image for images, _ in create_loaders(data, 1, 5, cpu=True)[1] for image in images]


def table(root, files, mode):
    data = create_held_out(config("", mode, f"hfds/{write_table(root, files)}"))
    return [data[index][0] for index in range(len(data))]


def table_as_a_stream(root, files, mode):
    data = config("", mode, f"hfids/{write_table(root, files)}")
    return [image for images, _ in create_loaders(data, 1, 5, cpu=True)[1] for image in images]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("place", [training, evaluation, torchvision, shards, table, table_as_a_stream])
def test_data_sets_give_the_pixels(place, mode, tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.SLEEP_TIME_ON_THREADS_SHUTDOWN", 0)
    found = [pixels(image) for image in place(tmp_path, [data for data, _ in CASES.values()], mode)]
    same = [np.array_equal(*pair) for pair in zip(found, expected(mode), strict=True)]
    assert [name for name, right in zip(CASES, same, strict=True) if not right] == []


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "given", [bytes, io.BytesIO, lambda data: Image.open(io.BytesIO(data)), partial(decode, mode="RGB")]
)
def test_a_file_its_bytes_an_opened_and_a_decoded_image_are_read_alike(given, mode):
    found = [decode(given(data), mode) for data, _ in CASES.values()]
    same = [np.array_equal(*pair) for pair in zip(found, expected(mode), strict=True)]
    assert {image.mode for image in found} == {mode}
    assert [name for name, right in zip(CASES, same, strict=True) if not right] == []


@pytest.mark.parametrize("mode", MODES)
def test_the_server_reads_the_same_pixels(mode):
    pytest.importorskip("starlette")
    from service.uploads import FORMATS, RefusedError, read_image

    for (name, (data, _)), pixels in zip(CASES.items(), expected(mode), strict=True):
        if opened(data).format in FORMATS:
            assert np.array_equal(read_image(data, mode, 10_000), pixels), name
        else:
            with pytest.raises(RefusedError, match="no image of PNG"):
                read_image(data, mode, 10_000)


# --- answers: those to an image of any kind are those to its twin, an ordinary PNG ------------------------------------


@pytest.fixture(scope="module", params=MODES)
def model(request, tmp_path_factory):
    """A saved model and its mode; it sees all pixels as they are."""
    channels = 3 if request.param == "RGB" else 1
    made = tiny_tree(2, in_chans=channels, num_classes=3)
    made.pretrained_cfg.update(
        input_size=(channels, SIDE, SIDE), mean=(0.5,) * channels, std=(0.25,) * channels, crop_pct=1.0
    )
    folder = tmp_path_factory.mktemp("models") / "model"
    made.save_pretrained(folder)
    return folder, request.param


@pytest.fixture
def twins(tmp_path, model):
    """Files of every kind, and as many ordinary ones of the same pixels."""
    (tmp_path / "images").mkdir()
    odd, plain = [], []
    for number, ((data, _), pixels) in enumerate(zip(CASES.values(), expected(model[1]), strict=True)):
        odd.append(tmp_path / "images" / f"odd-{number:02d}.png")
        plain.append(tmp_path / "images" / f"plain-{number:02d}.png")
        odd[-1].write_bytes(data)
        plain[-1].write_bytes(saved(pixels, "PNG"))
    return odd, plain


def assert_alike(answers):
    """Answers to the odd ones, then to the plain ones."""
    count = len(CASES)
    assert len(answers) == 2 * count and len(set(answers[count:])) > 9, "answers tell images apart"
    pairs = zip(CASES, answers[:count], answers[count:], strict=True)
    assert [name for name, odd, plain in pairs if odd != pytest.approx(plain, abs=1e-5)] == []


def test_predict_answers_alike(model, twins):
    done = command("predict", model[0], *twins[0], *twins[1], "--top", 3, "--json")
    assert done.code == 0, done.err
    answers = [
        {one["class"]: one["probability"] for one in answer["top"]} for answer in json.loads(done.out)["answers"]
    ]
    assert_alike([tuple(answer[index] for index in range(3)) for answer in answers])


def test_batch_prediction_answers_alike(model, twins, tmp_path):
    pq = pytest.importorskip("pyarrow.parquet")
    import batch_predict

    for name, given in {
        "folder": {"input": str(tmp_path / "images")},
        "shards": {"input": str(write_shard(tmp_path, [file.read_bytes() for part in twins for file in part]))},
    }.items():
        dataset = "wds/made-up" if name == "shards" else ""
        settings = batch_predict.Settings(
            str(model[0]), str(tmp_path / name), dataset=dataset, workers=0, cpu=True, **given
        )
        batch_predict.run(settings)
        rows = pq.read_table(tmp_path / name).to_pylist()
        assert [row["error"] for row in rows] == [None] * len(rows)
        assert_alike([(row["prediction"], row["probability"], row["entropy"]) for row in rows])


def test_the_page_reads_the_same_pixels(model, twins):
    pytest.importorskip("gradio")
    import app

    demo = app.Demo(app.Settings(str(model[0]), cpu=True))
    blocks = app.build(demo, [], Path())
    shown = next(block for block in blocks.blocks.values() if type(block).__name__ == "Image")
    read = [
        shown.preprocess(SimpleNamespace(path=str(file), orig_name=file.name, url=None))
        for part in twins
        for file in part
    ]
    assert shown.preprocess(None) is None
    assert_alike([tuple(demo.at_depth(image, 1).probabilities) for image in read])
    chosen = app.example_images(app.Settings(str(model[0]), examples=str(twins[0][0].parent)), demo)
    same = [np.array_equal(*pair) for pair in zip(chosen, expected("RGB"), strict=False)]
    assert all(same) and len(same) == 15


# --- what cannot be read ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BAD)
def test_what_is_no_image_is_told_in_the_same_words_everywhere(name, model, tmp_path):
    data, words = BAD[name]
    folder, mode = model
    file = tmp_path / "data" / "validation" / "a" / "00.png"
    held_out = create_datasets(config(write_folder(tmp_path / "data", [data, saved(GREYS, "PNG")]), mode))[1]
    with pytest.raises(UnreadableImageError) as raised:
        held_out[0]
    assert f"{file}: {words}" in str(raised.value)
    (tmp_path / "shard").mkdir()
    stream = config(write_shard(tmp_path / "shard", [data]), mode, "wds/made-up")
    _, loader = create_loaders(stream, 1, 5, cpu=True)
    assert list(loader) == [] and f"00: {words}" in loader.dataset.unreadable.counts[2][0]
    done = command("predict", folder, file)
    assert done.code == 1 and f"error: {file}: {words}" in done.err


@pytest.mark.parametrize("name", BAD)
def test_what_is_no_image_is_a_row_a_status_and_a_sentence(name, model, tmp_path):
    data, words = BAD[name]
    pq = pytest.importorskip("pyarrow.parquet")
    gr = pytest.importorskip("gradio")
    pytest.importorskip("starlette")
    import app
    import batch_predict
    from service.uploads import RefusedError, read_image

    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.png").write_bytes(data)
    output = tmp_path / "out"
    batch_predict.run(batch_predict.Settings(str(model[0]), str(output), str(tmp_path / "images"), workers=0, cpu=True))
    (row,) = pq.read_table(output).to_pylist()
    assert words in row["error"] and row["prediction"] is None
    demo = SimpleNamespace(decode=lambda source: decode(source, model[1]))
    with pytest.raises(gr.Error, match=r"a\.png cannot be read: it"):
        app.uploaded(demo.decode)(SimpleNamespace(path=str(tmp_path / "images" / "a.png"), orig_name="a.png"))
    with pytest.raises(RefusedError) as refusal:
        read_image(data, model[1], 1_000_000)
    assert refusal.value.status == (413 if name in ("bomb", "giant") else 400)


def test_the_limit_is_a_setting(tmp_path):
    data = config(write_folder(tmp_path, [saved(GREYS, "PNG")]), "L", max_pixels=SIDE * SIDE - 1)
    with pytest.raises(UnreadableImageError, match="it has 16 x 16 pixels, more than 255"):
        create_datasets(data)[0][0]
    with pytest.raises(ValueError, match="max_pixels must be at least 1, got 0"):
        DataConfig(max_pixels=0)


def test_pixels_are_counted_before_anything_is_decoded(monkeypatch):
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda self: pytest.fail("it was decoded"))
    for given in (io.BytesIO, opened):
        with pytest.raises(DecodingError, match="more than 99") as raised:
            decode(given(saved(GREYS, "PNG")), "L", max_pixels=99)
        assert raised.value.too_large


@pytest.mark.sampled
def test_damaged_exif_and_transparent_palettes_raise_no_warnings(tmp_path):
    for number, (data, _) in enumerate(CASES.values()):
        (tmp_path / f"{number}.png").write_bytes(data)
    code = "import sys, hierens.training.data.decoding as d; [d.decode(file, 'RGB') for file in sys.argv[1:]]"
    files = [str(file) for file in sorted(tmp_path.iterdir())]
    done = subprocess.run([sys.executable, "-W", "always", "-c", code, *files], capture_output=True, text=True)
    assert done.returncode == 0 and "PIL" not in done.stderr, done.stderr
