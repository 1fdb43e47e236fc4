"""Publishes to a Hub and loads from it, also when it fails. A process of its own: the address is read on import.

python -m support.hub_client SAVED ADDRESS CACHE    prints what was found, as JSON
"""

import json
import os
import sys
import urllib.request
from pathlib import Path

import huggingface_hub
import timm
import torch
from huggingface_hub import ModelCard, constants
from huggingface_hub.utils import _http

import hierens
from hierens.inference.policies import FixedDepth, load_policy

REPOSITORY = "somebody/digits"


def call(address, path, **body):
    """A request to the server itself."""
    data = json.dumps(body).encode() if body else None
    with urllib.request.urlopen(urllib.request.Request(address + path, data)) as answer:
        return json.loads(answer.read())


def refused(function, *args, **kwargs):
    """The message of the ValueError that this must raise."""
    try:
        function(*args, **kwargs)
    except ValueError as error:
        return str(error)
    return "nothing was refused"


def main(saved, address, cache):
    """Publish and load, with and without failures of the server."""
    found, x = {}, torch.randn(4, 1, 32, 32, generator=torch.Generator().manual_seed(1))

    def total(model):
        return model(x, depth=1).double().sum().item()

    def fresh(name):
        return {"cache_dir": str(Path(cache) / name)}

    def load(name, **kwargs):
        return hierens.from_pretrained(REPOSITORY, **fresh(name), **kwargs)

    model = hierens.from_pretrained(saved)
    results = {"accuracy (%)": [1.0, 2.0, 3.0]}
    about = {"license": "apache-2.0", "datasets": ["digits"], "label_names": [f"a {n}" for n in range(10)]}
    for kind in (503, "close"):  # once each, while weights are uploaded and when all is committed
        call(address, "/trouble", call="PUT /lfs/.*", kind=kind)
        call(address, "/trouble", call=r"POST /api/models/.*/commit/.*", kind=kind)
    model.push_to_hub(REPOSITORY, private=True, results=results, policy=FixedDepth(1), **about)
    second = model.at_depth(1).push_to_hub(REPOSITORY, revision="small")

    ways = {
        "whole": load("a"),
        "again": load("a"),
        "timm": timm.create_model(f"hf-hub:{REPOSITORY}", pretrained=True).eval(),
        "folder": timm.create_model(f"local-dir:{saved}", pretrained=True).eval(),
        "small": load("a", revision="small"),
        "pinned": load("a", revision=second.rpartition("/")[2]),
    }
    found["leaves"] = {name: way.leaves for name, way in ways.items()}
    found["logits"] = {name: total(way) for name, way in ways.items()}
    found["names"] = ways["whole"].pretrained_cfg["label_names"][3]
    found["policies"] = [str(load_policy(REPOSITORY)), str(load_policy(REPOSITORY, FixedDepth(), revision="small"))]
    found["cached in"] = sorted(path.name for path in Path(cache).iterdir())

    card = ModelCard.load(REPOSITORY)
    found["card"] = card.data.to_dict()
    found["how to"] = f'from_pretrained("{REPOSITORY}")' in card.text

    constants.DOWNLOAD_CHUNK_SIZE = 2**12  # what has arrived is kept chunk by chunk
    call(address, "/trouble", call="GET /cdn/.*", kind="half")
    if int(huggingface_hub.__version__.partition(".")[0]) < 1:  # it goes on by itself only since then, else when asked
        assert "Connection broken" in refused(load, "b")
    found["logits"]["interrupted"] = total(load("b"))
    found["resumed at"] = max(first for _, path, first in call(address, "/seen")["seen"] if path.startswith("/cdn/"))

    refusals = found["refused"] = {}
    call(address, "/trouble", call="GET /cdn/.*", kind="damage")
    refusals["damaged"] = refused(load, "c")
    call(address, "/trouble", call="GET .*/config.json", kind="damage")
    refusals["damaged config"] = refused(load, "d")
    refusals["token"] = refused(load, "e", token="wrong")
    refusals["push token"] = refused(model.push_to_hub, REPOSITORY, token="wrong")
    refusals["push reader"] = refused(model.push_to_hub, REPOSITORY, token="reader")
    refusals["no token"] = refused(load, "e", token=False)
    refusals["repository"] = refused(hierens.from_pretrained, "somebody/else", **fresh("e"))
    refusals["revision"] = refused(load, "e", revision="nowhere")
    refusals["no policy"] = refused(load_policy, "somebody/else")
    refusals["name"] = refused(hierens.from_pretrained, "no/such/folder")
    call(address, "/trouble", call="HEAD .*/config.json", kind=501)  # which is not tried again
    refusals["server"] = refused(load, "e")

    # What HF_HUB_OFFLINE=1 sets when huggingface_hub is imported.
    constants.HF_HUB_OFFLINE = True
    getattr(_http, "reset_sessions", lambda: None)()  # before version 1 a session knows it from its beginning
    found["logits"]["offline"] = total(load("a"))
    refusals["offline"] = refused(load, "f")
    print(json.dumps(found))


if __name__ == "__main__":
    os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    main(*sys.argv[1:])
