"""ExecuTorch's programs answer as the model does; in a process of its own, as its runtime is native code."""

import json
import subprocess
import sys
from importlib.util import find_spec

import pytest

from support.processes import environment

CODE = """
import json, sys
import torch
from support.exportable import MODELS
from executorch.runtime import Runtime

torch.manual_seed(1)
found = {}
for name in json.loads(sys.argv[1]):
    model = MODELS[name]().eval()
    folder = model.export(f"{sys.argv[2]}/{name}", format="executorch")
    manifest = json.loads((folder / "export.json").read_text())
    found[name] = {"files": sorted(file.name for file in folder.iterdir()), "batch": manifest["largest_batch"]}
    for entry in manifest["depths"]:
        program = Runtime.get().load_program(str(folder / entry["file"]))
        method = program.load_method("forward")
        off = []
        for batch in (1, 5, manifest["largest_batch"]):
            images = torch.randn(batch, *manifest["input"]["shape"][1:])
            with torch.no_grad():
                expected = model(images, depth=entry["depth"])
            off.append(float((method.execute([images])[0] - expected).abs().max() / expected.abs().max()))
        found[name][entry["depth"]] = max(off), entry["difference"]
print(json.dumps(found))
"""


@pytest.mark.skipif(find_spec("executorch") is None, reason="executorch is not installed")
@pytest.mark.parametrize(
    "names", [["exits"], pytest.param(["tree", "transformer", "tree with exits"], marks=pytest.mark.slow)]
)
def test_programs_answer_as_the_model_at_every_depth(names, tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", CODE, json.dumps(names), str(tmp_path)],
        capture_output=True,
        text=True,
        env=environment(),
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert list(found) == names
    for name, said in found.items():
        depths = {key: value for key, value in said.items() if key.isdigit()}
        assert said["files"] == [*(f"depth_{depth}.pte" for depth in range(len(depths))), "export.json"], name
        assert said["batch"] == 8
        for off, measured in depths.values():
            assert off < 1e-4 and measured < 1e-4, name
