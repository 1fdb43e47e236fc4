"""What a checkpoint may say: a forged one is refused in one line before anything of the run is overwritten."""

import json
import pickle
import re
import shutil
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from hierens.core.fetching import LoadError
from hierens.training.checkpoints.files import MANIFEST, damage, seal
from hierens.training.checkpoints.selection import choose_checkpoint
from support.runs import trainer


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folders of runs of one epoch, by optimiser."""
    folders = {optimizer: tmp_path_factory.mktemp(optimizer) for optimizer in ("sgd", "adamw")}
    for optimizer, folder in folders.items():
        trainer(folder, epochs=1, optimizer=optimizer, lr=1e-3, ema_decay=0.9).fit()
    return folders


@pytest.fixture
def forge(finished, tmp_path):
    """Changes the files of a checkpoint, seals it and resumes the run; returns the message of the error, if any."""

    def try_it(change, optimizer="adamw"):
        run = tmp_path / "run"
        shutil.rmtree(run, ignore_errors=True)
        shutil.copytree(finished[optimizer], run, symlinks=True)
        checkpoint = next((run / "checkpoints").glob("step-*"))
        change(checkpoint)
        (checkpoint / MANIFEST).unlink()
        seal(checkpoint)
        going_on = trainer(run, epochs=2, optimizer=optimizer, lr=1e-3, ema_decay=0.9)
        before = {name: tensor.clone() for name, tensor in going_on.ensemble.state_dict().items()}
        try:
            going_on.fit()
        except LoadError as error:
            assert all(before[name].equal(tensor) for name, tensor in going_on.ensemble.state_dict().items())
            assert "\n" not in str(error) and str(checkpoint.parents[1]) in str(error)
            return str(error)
        return ""

    return try_it


def edited(**state):
    def change(checkpoint):
        file = checkpoint / "trainer.json"
        about = json.loads(file.read_text())
        about["state"] |= state
        file.write_text(json.dumps(about))

    return change


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"step": "3"}, "trainer.json: step must be a non-negative integer, got '3'"),
        ({"step": -1}, "step must be a non-negative integer, got -1"),
        ({"epoch": True}, "epoch must be a non-negative integer, got True"),
        ({"batch": 1.5}, "batch must be a non-negative integer, got 1.5"),
        ({"history": {}}, "history must be a list of records of validated epochs, got {}"),
        ({"history": [{"epoch": 1}]}, "history must be a list of records of validated epochs, got {'epoch': 1}"),
        ({"history": [{"epoch": 1, "step": 3, "accuracy": []}]}, "history must be a list of records"),
        ({"unlogged": ["x"]}, "unlogged must be a list of losses, got 'x'"),
        ({"surprise": 1}, "unknown or missing: 'surprise'"),
    ],
)
def test_fields_of_trainer_json(forge, state, message):
    assert message in forge(edited(**state))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{}", "has no state, config and data"),
        ('{"state": {}, "config": {}, "data": {}}', "unknown or missing: 'batch'"),
        ("[" * 100_000, "nested too deeply"),
        ('{"state": ', "is not valid JSON"),
    ],
)
def test_a_trainer_json_of_another_shape(forge, text, message):
    assert message in forge(lambda checkpoint: (checkpoint / "trainer.json").write_text(text))


class Marks:
    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return Path.touch, (self.file,)


@pytest.mark.parametrize("name", ["optimizer.bin", "random_states_0.pkl"])
def test_nothing_is_unpickled(forge, tmp_path, name):
    mark = tmp_path / "unpickled"
    error = forge(lambda checkpoint: torch.save({"state": Marks(mark)}, checkpoint / name))
    assert re.search(
        rf"{name} holds objects other than tensors and plain values, which hierens does not unpickle", error
    )
    assert "was not written by torch.save" in forge(
        lambda checkpoint: (checkpoint / name).write_bytes(pickle.dumps(Marks(mark)))
    )
    assert not mark.exists()


@pytest.mark.parametrize("name", ["optimizer.bin", "random_states_0.pkl"])
def test_junk_in_torchs_files(forge, name):
    assert f"{name} is damaged or was not written" in forge(
        lambda checkpoint: (checkpoint / name).write_bytes(b"junk" * 99)
    )
    for value in (3, [], {}, {"state": 3}):
        assert f"{name} holds " in forge(lambda checkpoint, value=value: torch.save(value, checkpoint / name))


def packed(checkpoint):
    file = checkpoint / "optimizer.bin"
    with zipfile.ZipFile(file) as old:
        records = {name: old.read(name) for name in old.namelist()}
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as new:
        for name, content in records.items():
            new.writestr(name, content)


def test_a_file_that_would_grow_when_it_is_read_is_refused(forge):
    assert "optimizer.bin is compressed" in forge(packed)


def optimizer_with(change):
    def edit(checkpoint):
        state = torch.load(checkpoint / "optimizer.bin", weights_only=True)
        change(state)
        torch.save(state, checkpoint / "optimizer.bin")

    return edit


@pytest.mark.parametrize(
    "change",
    [
        lambda state: state["param_groups"][0].update(weight_decay="x"),
        lambda state: state["param_groups"][0].update(weight_decay=float("nan")),
        lambda state: state["param_groups"].pop(),
        lambda state: state["param_groups"][0]["params"].pop(),
        lambda state: state.update(param_groups=3),
        lambda state: state["state"][0].update({name: torch.zeros(3, 5) for name in state["state"][0]}),
        lambda state: state["state"][0].update({name: torch.zeros(1).expand(10**12) for name in state["state"][0]}),
        lambda state: state["state"][0].update(dict.fromkeys(state["state"][0], "x")),
        lambda state: state["state"].update({0: 3}),
        lambda state: state["state"].update({9999: {}}),
    ],
)
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_state_that_the_optimiser_cannot_go_on_with(forge, change, optimizer):
    assert re.search(r"optimizer.bin holds (a|no) state", forge(optimizer_with(change), optimizer))


def test_weights_of_another_type(forge):
    def change(checkpoint):
        weights = load_file(checkpoint / "model.safetensors")
        name = next(name for name in weights if name.endswith("conv1.weight"))
        save_file(weights | {name: weights[name].to(torch.int8)}, checkpoint / "model.safetensors")

    assert "model.safetensors stores levels.0.0.conv1.weight as I8" in forge(change)


@pytest.mark.parametrize("name", ["model.safetensors", "model_ema.safetensors"])
def test_junk_for_weights(forge, name):
    assert f"{name} is damaged or no safetensors" in forge(lambda at: (at / name).write_bytes(b"junk" * 99))
    assert f"{name} is damaged or no safetensors" in forge(lambda at: (at / name).unlink())


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_an_unchanged_checkpoint_is_resumed(forge, optimizer):
    assert forge(lambda checkpoint: None, optimizer) == ""


@pytest.mark.parametrize("text", ["[" * 100_000, '{"files": {"a\\nb": {}}}', '{"files": 3}', "3"])
def test_a_manifest_that_says_something_else(tmp_path, text):
    checkpoint = tmp_path / "checkpoints" / "step-000000001"
    checkpoint.mkdir(parents=True)
    (checkpoint / MANIFEST).write_text(text)
    assert "\n" not in damage(checkpoint)
    assert choose_checkpoint(tmp_path, "auto") is None
