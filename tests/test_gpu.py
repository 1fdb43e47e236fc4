"""Every step of benchmarks/gpu.py works, goes on where it stopped, and says what is missing: on a CPU, in tiny."""

import json
import shutil
import signal
import subprocess
import sys
from itertools import product

import gpu
import numpy as np
import pytest
import torch
import tyro
from gpu_steps import packing, page, per_image, records, roofline, speed_table, switching, training
from gpu_steps.batches import DeviceImages, loader
from gpu_steps.networks import NETWORKS, built, precision
from gpu_steps.records import Cell, Context, Deadline, Record, fill
from PIL import Image
from safetensors.torch import load_file
from torchvision import transforms as T

from hierens.inference.confidence import Confidence
from hierens.models.loading import from_pretrained
from hierens.training.config import DataConfig
from hierens.training.data.loaders import create_transform
from hierens.training.presets import preset
from support.accelerator import reset_accelerator

CLASSES = ("cat", "dog", "eel")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """32 x 32 images by class: 96 to train on, 18 to test on."""
    root, draw = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for split, count in (("train", 32), ("test", 6)):
        for name in CLASSES:
            (root / split / name).mkdir(parents=True)
            for number in range(count):
                pixels = draw.integers(0, 256, (32, 32, 3), np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{number:02}.png")
    return root


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    """A step is a process of its own: nothing is left of the one before."""
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", torch.backends.cudnn.benchmark)


def run(step, tmp_path, **more):
    """A step with tiny settings, as if its process had just begun."""
    gpu.START = gpu.time.monotonic()
    reset_accelerator()
    return gpu.main(gpu.Settings(step, runs=tmp_path, tiny=True, seconds=0.01, **more))


def written(tmp_path, step):
    return json.loads((tmp_path / "results" / f"{step}.json").read_text())


# --- what is measured -------------------------------------------------------------------------------------------------


@pytest.fixture
def quick(monkeypatch):
    """Each way is called a few times only."""
    monkeypatch.setattr(
        speed_table, "rounds", lambda ways, seconds: {n: [w() is not None and 0.5] for n, w in ways.items()}
    )


@pytest.mark.sampled
def test_speed_is_measured_bit_by_bit(tmp_path, quick):
    options = {"precisions": ("bf16",), "batch_sizes": (2,)}
    assert run("speed", tmp_path, minutes=0.0, **options) == "5 cells: speed again"
    assert run("speed", tmp_path, **options) == ""
    record = written(tmp_path, "speed")
    assert record["left"] == 0 and record["tiny"] and record["machine"]["torch"] == torch.__version__
    assert record["peaks"]["bf16"]["operations_per_s"] > 0 and "together" in record["tuning"]["tiny_resnet, bf16"]
    assert [(row["network"], row["depth"]) for row in record["rows"]] == [
        *product(["tiny_resnet"], range(3)),
        *product(["tiny_vit"], range(2)),
    ]
    for row in record["rows"]:
        assert not row.get("failed") and {*page.SHOWN, "grouped, channels last"} <= set(row["ms"])
        assert row["least_ms"] > 0 and max(row["difference"].values()) < 0.05
    assert run("report", tmp_path) == ""
    assert "tiny_vit, bf16" in (tmp_path / "gpu.md").read_text()


def test_time_per_mac_is_in_relation_to_the_backbone_run_the_same_way():
    ways = {way: [1, 1, 1] for way in ("backbone", "looped", "grouped", "auto")} | {"backbone, fused": [2, 2, 2]}
    first = {"network": "a", "precision": "bf16", "batch": 1, "depth": 0, "macs": 10, "ms": ways}
    second = {**first, "depth": 1, "macs": 15, "ms": {**ways, "grouped": [3, 3, 3], "fused": [6, 6, 6]}}
    assert page.per_mac(second, [first, second], "grouped") == page.per_mac(second, [first, second], "fused") == 2
    assert page.per_mac(second, [second], "grouped") is None


def test_the_roofline_counts_what_layers_read_and_write():
    model = built("tiny_resnet")
    values = roofline.activation_values(model, (3, 16, 16))
    seen = []  # by hand: inputs that differ, and every output, of the first network's layers
    alone = model.at_depth(0)
    inputs = {}

    def note(layer, x, y):
        inputs[x[0].data_ptr()] = x[0]
        seen.append(y)

    for layer in alone.modules():
        if isinstance(layer, (torch.nn.Conv2d, torch.nn.Linear)):
            layer.register_forward_hook(note)
    alone.set_executor("looped")
    with torch.no_grad():
        alone(torch.zeros(1, 3, 16, 16))
    assert values[0] == sum(t.numel() for t in (*inputs.values(), *seen))
    assert values == sorted(values) and values[-1] < 4 * values[0]
    peak = {"operations_per_s": 1e9, "bytes_per_s": 1e9}
    assert roofline.least_ms(10**6, 10, 10, batch=1, item=2, peak=peak) == pytest.approx(2.0)  # its operations
    assert roofline.least_ms(1, 10**6, 10**6, batch=2, item=2, peak=peak) == pytest.approx(6.0)  # its bytes


def test_precisions_are_put_back():
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    with precision("tf32") as dtype:
        assert dtype is torch.float32 and torch.get_float32_matmul_precision() == "high"
        assert torch.backends.cudnn.allow_tf32
    with precision("fp32"):
        assert torch.get_float32_matmul_precision() == "highest" and not torch.backends.cudnn.allow_tf32
    assert (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32) == before


@pytest.mark.sampled
def test_switching_is_measured(tmp_path):
    assert run("switching", tmp_path, batch_sizes=(1,)) == ""
    rows = {row["cell"]: row for row in written(tmp_path, "switching")["rows"]}
    measured = [f"tiny_resnet, {way}, batch 1" for way in ("tree, eager", "fused, eager", "fused, torch.compile")]
    for cell in measured:
        row = rows.pop(cell)
        assert "failed" not in row and row["alternating_ms"][1] > 0 and len(row["first_call_ms"]) == 2
    assert torch.cuda.is_available() or {row["failed"] for row in rows.values()} == {"CUDA graphs need a GPU"}
    assert run("report", tmp_path) == ""


def test_a_way_that_answers_otherwise_is_not_timed(tmp_path, monkeypatch):
    monkeypatch.setattr(
        switching, "_runner", lambda model, x, way, tiny: lambda depth: lambda: x.new_full((len(x), 10), 1e3)
    )
    run("switching", tmp_path, batch_sizes=(1,))
    assert "gives other outputs than" in written(tmp_path, "switching")["rows"][0]["failed"]


def test_a_cell_that_fails_says_why_and_the_others_are_measured(tmp_path):
    context = Context(tmp_path, tmp_path, True, Deadline(60))
    record = Record(context, "some")

    def fail():
        raise torch.OutOfMemoryError("CUDA out of memory.\nmore")

    assert fill(record, [Cell("a", 0, fail), Cell("b", 0, lambda: {"x": 1}), Cell("c", 1e9, fail)]) == 1
    rows = json.loads((tmp_path / "some.json").read_text())["rows"]
    assert rows == [{"cell": "a", "failed": "OutOfMemoryError: CUDA out of memory."}, {"cell": "b", "x": 1}]


def test_tables_do_not_mix_machines(tmp_path):
    context = Context(tmp_path, tmp_path, True, Deadline(60))
    file = Record(context, "speed").write(rows=[])
    file.write_text(file.read_text().replace(torch.__version__, "1.0"))
    with pytest.raises(ValueError, match=r"was measured with torch '1.0'.*Move the file away"):
        Record(context, "speed", go_on=True)


def test_clocks_are_those_that_the_driver_tells(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert records.clocks() == {}
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho '1980 MHz, 2619 MHz, 1980 MHz, 2619 MHz, 700.00 W, 580.1'\n")
    program.chmod(0o755)
    assert records.clocks()["clocks.sm"] == "1980 MHz" and records.clocks()["driver_version"] == "580.1"


@pytest.mark.sampled
def test_images_leave_at_their_own_depth(tmp_path):
    assert run("per-image", tmp_path) == ""
    rows = written(tmp_path, "per-image")["rows"]
    assert [row["leaving"] for row in rows] == list(per_image.LEAVING)
    for row in rows:
        assert sum(row["leaves"]) == row["batch"] == 8 and row["difference"] < 1e-5
        assert 0 < row["macs"] < 1 and all(times[1] > 0 for times in row["ms"].values())
    assert rows[0]["leaves"] == [2, 2, 4] and rows[2]["leaves"][0] == 6  # the shares that are asked for
    assert run("report", tmp_path) == ""
    assert "| tiny_resnet |     8 |             75% |" in (tmp_path / "gpu.md").read_text()


def test_a_walk_by_graphs_equals_the_policy_for_every_batch_and_threshold():
    model, images = built("tiny_resnet").fuse(), torch.randn(7, 3, 16, 16)
    with torch.no_grad():
        walk = per_image.GraphedWalk(model, images)
        for thresholds in ((0.0, 0.0), (2.0, 2.0), (0.2, 0.3), tuple(walk.thresholds(images, 0.4))):
            expected = Confidence(thresholds)(model, images)
            logits, leaves = walk(images, thresholds)
            assert torch.equal(leaves, expected.leaves) and torch.allclose(logits, expected.logits, atol=1e-5)


@pytest.mark.sampled
def test_light_trees_are_measured(tmp_path):
    assert run("light", tmp_path, batch_sizes=(1,)) == ""
    rows = written(tmp_path, "light")["rows"]
    assert [row["depth"] for row in rows] == [1, 2, 3] and all(row["ms"]["full, fused"][1] > 0 for row in rows)
    assert run("report", tmp_path) == ""
    assert "| test_vit |     1 |        8 |" in (tmp_path / "gpu.md").read_text()


# --- images -----------------------------------------------------------------------------------------------------------


def test_images_travel_in_parts_that_arrive_one_by_one(folders, tmp_path, monkeypatch):
    monkeypatch.setattr(packing, "SIDE", 4)  # mosaics of 16 images
    run("pack", tmp_path, data_dir=str(folders), part_megabytes=0.12)
    files = sorted((tmp_path / "packed").iterdir())
    assert len(files) > 3 and all(file.stat().st_size < 120_000 for file in files)
    arrived = tmp_path / "arrived"
    arrived.mkdir()
    for count, file in enumerate(files[::-1], 1):
        file.rename(arrived / file.name)
        left = run("join", tmp_path, packed=arrived)
        (arrived / file.name).unlink()
        assert bool(left) == (count < len(files))
        if count == 1:
            with pytest.raises(
                ValueError, match=r"train-1-of-\d.*all parts of test are missing: run the steps pack and join"
            ):
                packing.read_joined(tmp_path / "images")
    for split, expected in packing.read_folders(str(folders)).items():
        joined = packing.read_joined(tmp_path / "images")[split]
        assert joined.classes == expected.classes == CLASSES
        assert np.array_equal(joined.images, expected.images) and np.array_equal(joined.labels, expected.labels)
    first = np.asarray(Image.open(folders / "train" / "cat" / "00.png"))
    assert np.array_equal(packing.read_joined(tmp_path / "images")["train"].images[0], first)


def test_parts_that_are_damaged_or_of_other_images_are_refused(folders, tmp_path):
    data = packing.read_folders(str(folders))
    packing.pack(data, tmp_path / "packed", 30)
    assert packing.join(tmp_path / "packed", tmp_path / "images") == []
    other = {name: packing.Split(255 - split.images, split.labels, split.classes) for name, split in data.items()}
    packing.pack(other, tmp_path / "other", 30)
    with pytest.raises(ValueError, match=r"different data sets: remove .*images"):
        packing.join(tmp_path / "other", tmp_path / "images")
    part = tmp_path / "packed" / "test-1-of-1.safetensors"
    part.write_bytes(part.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"cannot be read as a part.*copy it again"):
        packing.join(tmp_path / "packed", tmp_path / "elsewhere")
    with pytest.raises(ValueError, match=r"no parts in .*nothing: copy the files of `pack`"):
        packing.join(tmp_path / "nothing", tmp_path / "nowhere")
    with pytest.raises(ValueError, match="part_megabytes must be larger"):
        packing.pack(data, tmp_path / "small", 0.01)


def test_images_of_several_sizes_are_refused(folders, tmp_path):
    (tmp_path / "data").symlink_to(folders)
    for split in ("train", "test"):
        (tmp_path / "mixed" / split / "a").mkdir(parents=True)
        for size in (8, 9):
            Image.new("RGB", (size, size)).save(tmp_path / "mixed" / split / "a" / f"{size}.png")
    with pytest.raises(ValueError, match=r"one size, found \(8, 8, 3\) and \(9, 9, 3\)"):
        packing.read_folders(str(tmp_path / "mixed"))


# --- augmentation -----------------------------------------------------------------------------------------------------

CONFIG = DataConfig(input_size=(3, 8, 8), augment="crop_flip", pad=1, mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.25))


def one_image(copies):
    """The same image many times: every crop and flip of it differs."""
    image = np.random.default_rng(0).integers(1, 256, (8, 8, 3), np.uint8)
    return image, packing.Split(np.stack([image] * copies), np.zeros(copies, np.int64), ("a",))


def outcomes(image):
    """All crops and flips that the product's augmentation can give, normalised."""
    padded = T.functional.pad(Image.fromarray(image), 1)
    finish = T.Compose([T.ToTensor(), T.Normalize(CONFIG.mean, CONFIG.std)])
    crops = [T.functional.crop(padded, top, left, 8, 8) for top in range(3) for left in range(3)]
    return torch.stack([finish(view) for crop in crops for view in (crop, T.functional.hflip(crop))])


def counts(batch, possible):
    """How often each outcome came; every image is one of them, bit for bit."""
    same = (batch[:, None] == possible[None]).flatten(2).all(-1)
    assert bool((same.sum(1) == 1).all())
    return same.sum(0)


def test_augmentation_is_the_products_in_distribution():
    number = 3600  # 200 of each outcome are due
    image, split = one_image(number)
    possible = outcomes(image)
    ours = DeviceImages(split, CONFIG, torch.device("cpu"), training=True)
    batch, labels = ours.__getitems__(list(range(number)))
    assert batch.shape == (number, 3, 8, 8) and batch.dtype is torch.float32 and labels.shape == (number,)
    torch.manual_seed(0)
    product_transform = create_transform(CONFIG, training=True)
    theirs = torch.stack([product_transform(Image.fromarray(image)) for _ in range(number)])
    for found in (counts(batch, possible), counts(theirs, possible)):
        chi_squared = float(((found - 200) ** 2 / 200).sum())
        assert chi_squared < 41  # 17 degrees of freedom: exceeded once in a thousand times
    held_out = DeviceImages(split, CONFIG, torch.device("cpu")).__getitems__([0])[0][0]
    assert torch.equal(held_out, create_transform(CONFIG, training=False)(Image.fromarray(image)))


def test_augmentation_depends_on_seed_epoch_and_sample_alone():
    _, split = one_image(64)
    first, again, other = (DeviceImages(split, CONFIG, torch.device("cpu"), seed, True) for seed in (0, 0, 1))
    for images in (first, again, other):
        images.set_epoch(3)
    batch = first.__getitems__(list(range(64)))[0]
    assert torch.equal(again.__getitems__([63, 5])[0], batch[[63, 5]])
    assert not torch.equal(other.__getitems__(list(range(64)))[0], batch)
    first.set_epoch(4)
    assert not torch.equal(first.__getitems__(list(range(64)))[0], batch)


def test_a_batch_is_fetched_whole():
    _, split = one_image(10)
    seen = []
    images = DeviceImages(split, CONFIG, torch.device("cpu"), before_batch=lambda: seen.append(1))
    assert [len(labels) for _, labels in loader(images, 4, training=False)] == [4, 4, 2] and len(seen) == 3
    with pytest.raises(ValueError, match=r"takes images of \(3, 9, 9\), these are \(3, 8, 8\)"):
        DeviceImages(split, DataConfig(input_size=(3, 9, 9)), torch.device("cpu"))


# --- training ---------------------------------------------------------------------------------------------------------


@pytest.mark.sampled
def test_steps_that_are_stopped_end_in_the_weights_of_one_that_is_not(folders, tmp_path):
    options = {"data_dir": str(folders), "epochs": 3, "train_precision": "no"}
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert run("train-distilled-1", whole, **options) == ""
    (parts / "results").mkdir(parents=True)  # the same plan: the fastest way is measured, and may be another each time
    shutil.copy(whole / "results" / "plan.json", parts / "results")
    # 6 updates an epoch: the first step stops within the first epoch, the second within the last
    left = run("train-distilled-1", parts, updates=4, **options)
    assert "3 of 3 epochs" in left and left.endswith("train-distilled-2")
    stopped = written(parts, "train-distilled-1")
    assert "The training is not finished" in page.training(parts / "results", "distilled")
    assert stopped["done"] == 0 and 4 <= stopped["updates"] < 6 and "final" not in stopped
    # What a later step is told otherwise about epochs does not count: the plan of the first one does.
    changed = {**options, "epochs": 7}
    assert "1 of 3 epochs" in run("train-distilled-2", parts, updates=10, **changed)
    assert run("train-distilled-3", parts, **changed) == ""
    assert (
        written(parts, "train-distilled-3")["final"]["accuracy"]
        == written(whole, "train-distilled-1")["final"]["accuracy"]
    )
    weights = [load_file(folder / "distilled" / "model" / "model.safetensors") for folder in (whole, parts)]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items())
    model = from_pretrained(parts / "distilled" / "model")
    assert model.pretrained_cfg["label_names"] == list(CLASSES)
    assert run("report", parts) == ""
    assert "3 of 3 epochs" in (parts / "gpu.md").read_text()


@pytest.mark.slow
def test_the_learning_rate_falls_over_the_whole_training_however_it_is_cut(folders, tmp_path):
    options = {"data_dir": str(folders), "epochs": 2, "train_precision": "no"}
    run("train-labels-1", tmp_path, updates=3, **options)
    run("train-labels-2", tmp_path, **options)
    lines = [json.loads(line) for line in (tmp_path / "labels" / "log.jsonl").read_text().splitlines()]
    rates = [line["lr"] for line in lines if "lr" in line]
    steps = torch.arange(1, 13) / 12
    assert rates == pytest.approx((0.05 * (1 + torch.cos(torch.pi * steps))).tolist(), abs=1e-6)


@pytest.mark.sampled
def test_a_step_is_over_before_its_limit(folders, tmp_path, monkeypatch):
    options = {"data_dir": str(folders), "epochs": 50, "train_precision": "no"}
    run("plan", tmp_path, **options)
    before = signal.getsignal(signal.SIGTERM)
    assert "of 50 epochs" in run("train-labels-1", tmp_path, minutes=0.0, **options)  # after the first update
    assert signal.getsignal(signal.SIGTERM) is before
    assert written(tmp_path, "train-labels-1")["updates"] <= 2


def test_the_plan_is_one_for_both_objectives_and_fits_the_time(folders, tmp_path):
    assert run("plan", tmp_path, data_dir=str(folders), minutes=2.0, train_steps=2, train_precision="no") == ""
    record = written(tmp_path, "plan")
    plan, ways = record["plan"], record["ways"]
    assert len(ways) == 4 and all(way["images_per_s"] > 0 for way in ways)
    best = max(ways, key=lambda way: way["images_per_s"])
    assert (plan["executor"], plan["channels_last"]) == (best["executor"], best["channels_last"])
    assert plan["epochs"] * plan["epoch_s"] <= 2 * 2.0 * 60 and 1 <= plan["epochs"] <= 200
    context = Context(tmp_path / "results", tmp_path, True, Deadline(60))
    own = [training._settled(context, name, None, {}, training.Shape(9)) for name in ("distilled", "labels")]
    assert own == [plan, plan]


def test_the_recipe_is_the_papers_with_larger_batches(tmp_path):
    plan = {"epochs": 200, "precision": "bf16", "channels_last": True}
    context = Context(tmp_path, tmp_path, False, Deadline(1))
    runs = [training.recipe(context, plan, name, tmp_path) for name in ("distilled", "labels")]
    for made in runs:
        config = made.train
        assert (config.optimizer, config.lr, config.momentum, config.weight_decay) == ("sgd", 0.2, 0.9, 5e-4)
        assert (config.schedule, config.epochs, config.batch_size, config.alpha, config.temperature) == (
            *("cosine", 200, 256, 0.5, 2.0),
        )
        assert (made.data.augment, made.data.pad, made.data.hflip) == ("crop_flip", 4, 0.5)
        assert made.model.backbone == "hne_resnet50_cifar_small"
    assert [made.train.objective for made in runs] == ["independent+hierarchical_codistillation", "independent"]


def test_msdnet_has_its_authors_recipe_with_larger_batches(tmp_path):
    plan = {"epochs": 60, "precision": "no", "channels_last": True}
    made = training.recipe(Context(tmp_path, tmp_path, False, Deadline(1)), plan, "msdnet", tmp_path)
    stage = preset("imta-stage1")
    assert made.model == stage.model and made.train.decay_epochs == (30, 45)
    kept = ("objective", "optimizer", "momentum", "weight_decay", "schedule", "decay_rate", "gradient_equilibrium")
    assert all(getattr(made.train, name) == getattr(stage.train, name) for name in kept)


def test_msdnet_is_trained_with_a_plan_of_its_own(folders, tmp_path):
    assert run("train-msdnet-1", tmp_path, data_dir=str(folders), epochs=1, train_precision="no") == ""
    assert len(written(tmp_path, "plan-msdnet")["ways"]) == 2 and not (tmp_path / "results" / "plan.json").exists()
    assert run("report", tmp_path) == ""
    text = (tmp_path / "gpu.md").read_text()
    assert "| contiguous    |" in text and "1 of 1 epochs" in text and "not finished" not in text


def test_a_later_step_without_a_checkpoint_is_refused(folders, tmp_path):
    with pytest.raises(ValueError, match=r"there is none in .*distilled: copy that folder"):
        run("train-distilled-2", tmp_path, data_dir=str(folders))


# --- all of it --------------------------------------------------------------------------------------------------------


def test_the_networks_are_those_that_are_asked_for():
    assert [network.entry for network in NETWORKS.values()] == [
        *("hne_resnet50_cifar_small", "hne_mobilenetv2_075", "resnet18", "vit_tiny_patch16_224"),
    ]


def test_unknown_steps_and_a_missing_gpu_are_named(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="no step 'sped': choose speed, switching"):
        run("sped", tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="speed needs a GPU, and there is none; --tiny"):
        gpu.main(gpu.Settings("speed", runs=tmp_path))
    with pytest.raises(ValueError, match="no precision 'fp8': choose bf16, tf32, fp32"):
        run("speed", tmp_path, precisions=("fp8",))


def test_the_page_is_made_of_the_results_that_are_there(tmp_path):
    context = gpu.context_of(gpu.Settings("report"))
    made = page.write(context.results, tmp_path / "gpu.md").read_text()
    assert made == (gpu.ROOT / "docs" / "results" / "gpu.md").read_text(), "run: python benchmarks/gpu.py report"


@pytest.mark.sampled
def test_steps_are_told_on_the_command_line():
    settings = tyro.cli(gpu.Settings, args=["train-labels-2", "--tiny", "--batch-sizes", "1", "2", "--minutes", "4"])
    assert (settings.step, settings.tiny, settings.batch_sizes, settings.minutes) == ("train-labels-2", True, (1, 2), 4)
    program = [sys.executable, gpu.__file__, "speed", "--precisions", "fp8", "--tiny"]
    done = subprocess.run(program, capture_output=True, text=True)
    assert done.returncode == 1 and "error: there is no precision 'fp8'" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_page_without_results_says_so_for_every_step(tmp_path):
    text = page.write(tmp_path / "none", tmp_path / "gpu.md").read_text()
    steps = ("speed", "switching", "per-image", "light", "plan", "train-distilled-1", "train-labels-1")
    assert all(f"Not measured yet: `python benchmarks/gpu.py {step}`" in text for step in steps)
