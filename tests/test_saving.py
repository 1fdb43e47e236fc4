"""A model saved over another: readers get one or the other, with its own policy, whatever is killed."""

import contextlib
import errno
import json
import os
import subprocess
from collections import Counter

import pytest
import timm

import hierens
from hierens.core import fetching
from hierens.hub import saving as hub
from hierens.inference.policies import FixedDepth, load_policy, save_policy
from hierens.models import loading
from hierens.models.loading import load_with_policy
from support.processes import environment, script
from support.saver import POLICIES, RESULTS, marks, models, save


@pytest.fixture(scope="module")
def made():
    return models()


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def survive(folder, kills, seed):
    """Load in a loop while another process saves and is killed; how often which model was loaded, and what was hit."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    writer = subprocess.Popen(script("saver", folder, seed, kills), **pipes, env=environment())
    assert writer.stdout.readline() == "ready\n"
    (folder / "notes.txt").write_text("mine")
    loaded = Counter()
    while writer.poll() is None:
        model, policy = load_with_policy(folder)
        (number,) = marks(model)
        assert model.leaves == (4, 4, 2)[number] and policy == POLICIES[number]
        loaded[number] += 1
        with contextlib.suppress(BrokenPipeError):
            os.write(writer.stdin.fileno(), b".")
    assert writer.returncode == 0
    assert names(folder) == ["README.md", "config.json", "model.safetensors", "notes.txt"]
    return loaded, json.loads(writer.stdout.readline())


@pytest.mark.sampled
def test_readers_get_a_model_whole_while_its_writer_is_killed(tmp_path):
    loaded, hit = survive(tmp_path, kills=4, seed=int.from_bytes(os.urandom(2), "big"))
    assert sum(loaded.values()) > 8 and sum(hit.values()) == 4


@pytest.mark.slow
def test_readers_get_a_model_whole_through_fifty_kills(tmp_path):
    loaded, hit = survive(tmp_path, kills=50, seed=0)
    print(f"loaded {dict(loaded)}, killed {hit}")
    assert set(loaded) == {0, 1, 2} and sum(loaded.values()) > 100 and hit["before"] and hit["while moving"]


def test_saving_removes_the_policy_and_picture_of_an_earlier_model(made, tmp_path):
    save(made, 0, tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    assert {"accuracy.png", "policy.json"} < set(names(tmp_path))
    save(made, 2, tmp_path)
    assert names(tmp_path) == ["README.md", "config.json", "model.safetensors", "notes.txt"]
    model, policy = load_with_policy(tmp_path)
    assert marks(model) == {2} and policy is None
    assert load_policy(tmp_path, FixedDepth(0)) == FixedDepth(0)
    assert timm.create_model(f"local-dir:{tmp_path}", pretrained=True).leaves == 2


def test_a_policy_alone_leaves_the_model(made, tmp_path):
    save(made, 2, tmp_path)
    save_policy(FixedDepth(0), tmp_path)
    model, policy = load_with_policy(tmp_path)
    assert marks(model) == {2} and policy == FixedDepth(0)


def test_a_full_disk_leaves_the_model_that_was_there(made, tmp_path, monkeypatch):
    save(made, 0, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(hub, "draw_accuracy", full)  # when weights and config are written
    with pytest.raises(OSError, match="No space left on device"):
        made[1].save_pretrained(tmp_path, results=RESULTS, picture=True)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_model_that_is_replaced_while_it_loads_is_loaded_whole(made, tmp_path, monkeypatch):
    """Between its config and its weights, and between its weights and their use."""
    save(made, 0, tmp_path)
    replaced = []
    for name, call, number in (("read_header", loading.read_header, 2), ("check_fit", loading.check_fit, 1)):

        def and_replace(*args, call=call, number=number):
            if number not in replaced:
                replaced.append(number)
                save(made, number, tmp_path)
            return call(*args)

        monkeypatch.setattr(loading, name, and_replace)
    model, policy = load_with_policy(tmp_path)
    assert replaced == [2, 1]
    assert marks(model) == {2} and policy is None


def test_a_folder_that_is_written_all_the_time_is_given_up_in_a_sentence(made, tmp_path, monkeypatch):
    save(made, 0, tmp_path)
    monkeypatch.setattr(fetching, "_TIMEOUT", 0.3)

    def and_touch(file, read=loading.read_config):
        found = read(file)
        os.utime(file)
        return found

    monkeypatch.setattr(loading, "read_config", and_touch)
    with pytest.raises(fetching.LoadError, match=r"its files changed for 0 s. Load it again when the save is"):
        hierens.from_pretrained(tmp_path)


def test_uploads_of_a_folder_leave_out_what_a_kill_left(made, tmp_path):
    from huggingface_hub.utils import DEFAULT_IGNORE_PATTERNS, filter_repo_objects

    from hierens.core.atomic_files import saving

    save(made, 2, tmp_path)
    with saving(tmp_path) as partial:
        (partial / "config.json").write_text("half")
        found = [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()]
        sent = list(filter_repo_objects(found, ignore_patterns=DEFAULT_IGNORE_PATTERNS))
        assert len(found) == 4 and sorted(sent) == ["README.md", "config.json", "model.safetensors"]
