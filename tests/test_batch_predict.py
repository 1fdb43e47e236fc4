"""Batch prediction as it is used: over folders and data sets, by one process or two, killed and started again."""

import multiprocessing
import os
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import PartialState
from PIL import Image

pytest.importorskip("pyarrow")

import batch_predict
import pyarrow.parquet as pq
from batch_predict import MANIFEST, Settings

import hierens
from hierens.inference.policies import Confidence, Deadline, save_policy
from support.made_up import DAMAGES, jpeg, write_shards
from support.networks import tiny_tree
from support.processes import free_port

CLASSES = ("cat", "dog", "owl")


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    model = tiny_tree(num_classes=3)
    model.pretrained_cfg.update(input_size=(1, 16, 16), mean=(0.5,), std=(0.25,), crop_pct=1.0)
    folder = tmp_path_factory.mktemp("models") / "model"
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """40 images in a folder per class and one in none; three cannot be read."""
    root = tmp_path_factory.mktemp("images")
    for number in range(40):
        file = root / "deep" / CLASSES[number % 3] / f"{number:02d}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(jpeg(number))
    for number, damage in zip((4, 11, 30), DAMAGES.values(), strict=True):
        file = root / "deep" / CLASSES[number % 3] / f"{number:02d}.jpg"
        file.write_bytes(damage(file.read_bytes()))
    (root / "loose.png").write_bytes(jpeg(99))
    (root / "notes.txt").write_text("no image")
    return root


def settings(model_dir, output, folder=None, **changed):
    defaults = {"shard_size": 7, "batch_size": 3, "workers": 0, "cpu": True, "input": str(folder or "")}
    return Settings(str(model_dir), str(output), **defaults | changed)


def rows(output):
    return pq.read_table(output).to_pylist()


def parts(output):
    return {file.name: file.read_bytes() for file in sorted(Path(output).glob("*.parquet"))}


@pytest.fixture(scope="module")
def undisturbed(model_dir, folder, tmp_path_factory):
    output = tmp_path_factory.mktemp("out") / "undisturbed"
    batch_predict.run(settings(model_dir, output, folder))
    return output


def test_every_image_is_a_row_with_the_answer_that_the_model_gives_it_alone(model_dir, folder, undisturbed):
    found = rows(undisturbed)
    files = sorted(file.relative_to(folder).as_posix() for file in folder.rglob("*.[jp][pn]g"))
    assert [row["path"] for row in found] == files and [row["index"] for row in found] == list(range(41))
    assert len(parts(undisturbed)) == 6
    model = hierens.from_pretrained(model_dir)
    for row in found:
        assert row["label"] == (CLASSES.index(Path(row["path"]).parent.name) if "/" in row["path"] else None)
        if Path(row["path"]).stem in ("04", "11", "30"):
            assert row["error"] and row["prediction"] is None and row["probability"] is None and row["networks"] is None
            continue
        image = Image.open(folder / row["path"]).convert("L")
        # By hand what the config says: the short side to 16 pixels, the middle of the long one, mean 0.5, std 0.25.
        width, height = (int(16 * side / min(image.size)) for side in image.size)
        left, top = round((width - 16) / 2), round((height - 16) / 2)
        image = image.resize((width, height), Image.Resampling.BILINEAR).crop((left, top, left + 16, top + 16))
        x = (torch.from_numpy(np.array(image)).float() / 255 - 0.5) / 0.25
        p = model(x[None, None]).softmax(-1).detach()[0]
        assert row["prediction"] == int(p.argmax()) and row["name"] is not None and row["error"] is None
        assert row["probability"] == pytest.approx(float(p.max()), abs=1e-5)
        assert row["entropy"] == pytest.approx(float(torch.special.entr(p).sum()), abs=1e-5)
        assert (row["networks"], row["macs"]) == (4, model.macs((1, 16, 16))[-1])


def test_names_come_from_flags_or_the_config_or_the_folders(model_dir, folder, tmp_path):
    (folder_only := tmp_path / "images").mkdir()
    for name in CLASSES:
        (folder_only / name).mkdir()
        (folder_only / name / "1.jpg").write_bytes(jpeg(1))
    batch_predict.run(settings(model_dir, tmp_path / "a", folder_only))
    assert {row["name"] for row in rows(tmp_path / "a")} <= set(CLASSES)
    assert [row["label"] for row in rows(tmp_path / "a")] == [0, 1, 2]
    model = hierens.from_pretrained(model_dir)
    model.pretrained_cfg["label_names"] = ["owl", "cat", "dog"]
    model.save_pretrained(tmp_path / "named")
    batch_predict.run(settings(tmp_path / "named", tmp_path / "b", folder_only))
    assert [row["label"] for row in rows(tmp_path / "b")] == [1, 2, 0]
    batch_predict.run(settings(model_dir, tmp_path / "c", folder_only, labels=("x", "y", "z")))
    assert {row["name"] for row in rows(tmp_path / "c")} <= {"x", "y", "z"}
    assert [row["label"] for row in rows(tmp_path / "c")] == [None] * 3


@pytest.mark.parametrize(("batch_size", "workers"), [(1, 0), (16, 0), (3, 2)])
def test_rows_do_not_depend_on_batches_and_workers(model_dir, folder, undisturbed, tmp_path, batch_size, workers):
    batch_predict.run(settings(model_dir, tmp_path, folder, batch_size=batch_size, workers=workers))
    if batch_size == 3:
        assert parts(tmp_path) == parts(undisturbed)
    for row, expected in zip(rows(tmp_path), rows(undisturbed), strict=True):
        for name in ("probability", "entropy"):
            assert row.pop(name) == (None if row["error"] else pytest.approx(expected.pop(name), abs=1e-6))
            expected.pop(name, None)
        assert row == expected


def test_a_finished_part_stays_and_missing_ones_are_made(model_dir, folder, undisturbed, tmp_path):
    batch_predict.run(settings(model_dir, tmp_path, folder))
    (tmp_path / "part-00002.parquet").unlink()
    kept = (tmp_path / "part-00001.parquet").stat().st_mtime_ns
    (tmp_path / "_part-00002.parquet.partial").write_bytes(b"half")
    batch_predict.run(settings(model_dir, tmp_path, folder))
    assert parts(tmp_path) == parts(undisturbed) and len(list(tmp_path.iterdir())) == 7
    assert (tmp_path / "part-00001.parquet").stat().st_mtime_ns == kept


@pytest.mark.sampled
def test_other_settings_are_refused(model_dir, folder, undisturbed, tmp_path):
    before = parts(undisturbed)
    other = hierens.from_pretrained(model_dir)
    other.break_symmetry(0.1)
    next(iter(other.parameters())).data += 1
    other.save_pretrained(tmp_path / "other")
    (tmp_path / "more").symlink_to(folder)
    (tmp_path / "one.jpg").write_bytes(jpeg(1))
    for what, changed in {
        "policy": {"depth": 0},
        "shard size": {"shard_size": 8},
        "model": {"model": str(tmp_path / "other")},
        "inputs": {"input": str(tmp_path)},
        "labels": {"labels": ("x", "y", "z")},
    }.items():
        with pytest.raises(ValueError, match=f"was started with another {what} .*: use the same settings, or choose"):
            batch_predict.run(replace(settings(model_dir, undisturbed, folder), **changed))
    assert parts(undisturbed) == before


@pytest.mark.sampled
def test_bad_settings_are_refused_before_any_work(model_dir, folder, tmp_path):
    policy = tmp_path / "clock.json"
    save_policy(Deadline(10), tmp_path).rename(policy)
    for changed, message in (
        ({"input": "/nowhere"}, "'/nowhere' does not exist"),
        ({"input": str(model_dir)}, "no image in"),
        ({"depth": 3}, "depth must be from 0 to 2"),
        ({"depth": 1, "policy": str(policy)}, "not both"),
        ({"policy": str(policy)}, "depends on the clock"),
        ({"policy": "/nowhere"}, "not a local directory"),
        ({"labels": ("a",)}, "1 names, but the model 3 classes"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"dataset": "fashion_mnist"}, "has neither t10k-images"),
        ({"dataset": "digits", "split": "test"}, "splits train and validation, not 'test'"),
        ({"dataset": "wds/x", "input": ""}, "data_dir is needed"),
    ):
        with pytest.raises(ValueError, match=message):
            batch_predict.run(replace(settings(model_dir, tmp_path / "out", folder), **changed))
    assert not (tmp_path / "out").exists()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "part-00000.parquet").write_bytes(b"")
    with pytest.raises(ValueError, match=f"contains Parquet files but no {MANIFEST}"):
        batch_predict.run(settings(model_dir, tmp_path / "out", folder))


def test_the_policy_beside_the_model_is_used(model_dir, folder, tmp_path):
    model = hierens.from_pretrained(model_dir)
    model.save_pretrained(tmp_path / "model")
    batch_predict.run(settings(tmp_path / "model", tmp_path / "b", folder, depth=0))
    sure = sorted(row["probability"] for row in rows(tmp_path / "b") if not row["error"])
    save_policy(Confidence((sure[19],)), tmp_path / "model")
    batch_predict.run(settings(tmp_path / "model", tmp_path / "a", folder))
    found = [row for row in rows(tmp_path / "a") if not row["error"]]
    costs = dict(zip((1, 2, 4), model.macs((1, 16, 16)), strict=True))
    assert {row["networks"] for row in found} > {1}, "some images leave early, others do not"
    assert all(row["macs"] == costs[row["networks"]] for row in found)
    assert {row["networks"] for row in rows(tmp_path / "b")} == {1, None}


@pytest.mark.parametrize("split", ["train", "validation"])
def test_data_sets_by_index(model_dir, tmp_path, split):
    generator = np.random.default_rng(0)
    for part, count in (("train", 9), ("t10k", 5)):
        for name, values in (
            ("images-idx3", generator.integers(0, 256, (count, 28, 28), dtype=np.uint8)),
            ("labels-idx1", np.arange(count, dtype=np.uint8) % 3),
        ):
            header = bytes((0, 0, 8, values.ndim)) + np.array(values.shape, ">i4").tobytes()
            (tmp_path / f"{part}-{name}-ubyte").write_bytes(header + values.tobytes())
    batch_predict.run(settings(model_dir, tmp_path / "out", tmp_path, dataset="fashion_mnist", split=split))
    found = rows(tmp_path / "out")
    assert [row["label"] for row in found] == [number % 3 for number in range(9 if split == "train" else 5)]
    assert all(row["prediction"] is not None and row["path"] is None for row in found)


@pytest.mark.parametrize("workers", [0, 2])
def test_shards(model_dir, tmp_path, workers):
    root = write_shards(tmp_path / "s", "validation", shards=3, images=7, damaged=(4,))
    whole = (root / "validation-0001.tar").read_bytes()
    (root / "validation-0001.tar").write_bytes(whole[: len(whole) // 2])
    output = tmp_path / "out"
    batch_predict.run(settings(model_dir, output, root, dataset="wds/made-up", shard_size=5, workers=workers))
    found = rows(output)
    assert [row["index"] for row in found] == list(range(len(found)))
    assert [row["path"] for row in found[:7]] == [f"validation-0000.tar/validation{n:05d}" for n in range(7)]
    assert [row["label"] for row in found[:7]] == [n % 3 for n in range(7)]
    assert [row["path"] for row in found if row["error"]] == [found[4]["path"], "validation-0001.tar"]
    assert found[-1]["path"] == "validation-0002.tar/validation00020"


def test_hugging_face(model_dir, tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr("datasets.config.SLEEP_TIME_ON_THREADS_SHUTDOWN", 0)
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=list(CLASSES))})
    stored = [{"bytes": jpeg(i), "path": f"{i}.jpg"} for i in range(12)]
    stored[3]["bytes"] = stored[3]["bytes"][:300]
    table = datasets.Dataset.from_dict({"image": stored, "label": [i % 3 for i in range(12)]}, features=features)
    (tmp_path / "hf").mkdir()
    table.to_parquet(tmp_path / "hf" / "validation-00000-of-00001.parquet")
    for kind, workers in (("hfids", 0), ("hfids", 2), ("hfds", 0)):
        output = tmp_path / f"{kind}{workers}"
        batch_predict.run(settings(model_dir, output, dataset=f"{kind}/{tmp_path / 'hf'}", workers=workers))
        found = rows(output)
        assert [row["index"] for row in found if row["error"]] == [3] and len(found) == 12
        assert [row["label"] for row in found if not row["error"]] == [i % 3 for i in range(12) if i != 3]
        assert {row["name"] for row in found} <= {*CLASSES, None}


def in_a_process(chosen, environment):
    torch.set_num_threads(1)
    os.environ.update(environment)
    batch_predict.run(chosen)
    PartialState().destroy_process_group()


@pytest.fixture(scope="module")
def processes():
    """Processes that are forked from one that has made the imports."""
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["test_batch_predict"])
    yield lambda chosen, **environment: _started(context, chosen, environment)
    if before is None:
        del os.environ["PYTHONPATH"]
    else:
        os.environ["PYTHONPATH"] = before


def _started(context, chosen, environment):
    process = context.Process(target=in_a_process, args=(chosen, environment))
    process.start()
    return process


def together(processes, chosen, count):
    """Several processes that share the work over gloo."""
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(count)}
    return [processes(chosen, RANK=str(rank), LOCAL_RANK=str(rank), **common) for rank in range(count)]


@pytest.mark.sampled
def test_two_processes_write_what_one_writes(model_dir, folder, undisturbed, tmp_path, processes):
    both = together(processes, settings(model_dir, tmp_path, folder), 2)
    for process in both:
        process.join(120)
        assert process.exitcode == 0
    assert parts(tmp_path) == parts(undisturbed)


@pytest.mark.sampled
def test_killed_and_resumed_by_another_number_of_processes(model_dir, tmp_path, processes):
    (tmp_path / "images").mkdir()
    for number in range(150):
        (tmp_path / "images" / f"{number}.jpg").write_bytes(jpeg(number % 20))
    chosen = settings(model_dir, tmp_path / "out", tmp_path / "images", shard_size=2, batch_size=2)
    process = processes(chosen)
    deadline = time.monotonic() + 120
    while len(list((tmp_path / "out").glob("part-*"))) < 3 and time.monotonic() < deadline:
        time.sleep(0.001)
    process.kill()
    process.join(120)
    assert process.exitcode == -signal.SIGKILL
    kept = {file: file.stat().st_mtime_ns for file in (tmp_path / "out").glob("part-*")}
    assert 3 <= len(kept) < 75, "killed on the way"
    for process in together(processes, chosen, 2):
        process.join(120)
        assert process.exitcode == 0
    assert all(file.stat().st_mtime_ns == when for file, when in kept.items())
    batch_predict.run(replace(chosen, output=str(tmp_path / "undisturbed")))
    assert parts(tmp_path / "out") == parts(tmp_path / "undisturbed")
    assert pq.read_table(tmp_path / "out").num_rows == 150
