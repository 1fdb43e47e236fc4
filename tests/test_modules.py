"""A branch is an ordinary module: whatever is done to modules holds, however a level is run, or is refused.

The oracle of every case is the same thing done to plain copies of the blocks, one network for each leaf.
"""

import copy
import io
import json
import multiprocessing
import pickle
import threading
from functools import cache

import pytest
import timm
import timm.utils
import torch
import torch.nn.functional as F
import torch.nn.utils.parametrizations
import torch.nn.utils.prune
from safetensors.torch import save_file
from torch import nn

import hierens
from hierens.branches.legacy_layout import first_layout
from hierens.branches.level import Level
from hierens.core.fetching import LoadError
from support.networks import close, independent_tree, tiny_backbone, with_statistics

EXECUTORS = ("looped", "grouped", "auto")


def tree(executor="auto", training=False, blocks=3):
    model = copy.deepcopy(_converted(blocks)).train(training)
    model.set_executor(executor)
    return model


@cache
def _converted(blocks):
    return independent_tree(with_statistics(tiny_backbone((8, 8, 16)), size=32), blocks)


def tokens(executor="auto", training=False):
    model = copy.deepcopy(_converted_tokens()).train(training)
    model.set_executor(executor)
    return model


@cache
def _converted_tokens():
    torch.manual_seed(0)
    args = {"img_size": 32, "patch_size": 16, "embed_dim": 24, "depth": 3, "num_heads": 2}
    return independent_tree(timm.create_model("vit_tiny_patch16_224", **args, num_classes=5, in_chans=1), 3)


def oracle(model, images):
    """Each leaf's logits by plain calls of each branch."""
    values = [images]
    for index, level in enumerate(model.levels):
        parents = [model.tree.parent(index, branch) for branch in range(len(level))]
        values = [
            branch(*v) if isinstance(v := values[p], tuple) else branch(v)
            for branch, p in zip(level, parents, strict=True)
        ]
    heads = [head(*v) if isinstance(v, tuple) else head(v) for head, v in zip(model.head, values, strict=True)]
    return torch.stack([leaf(value) for leaf, value in zip(model.classifier, heads, strict=True)], 1)


def images(count=4):
    return torch.randn(count, 1, 32, 32, generator=torch.Generator().manual_seed(3))


def agree(changed, twin=None, x=None):
    """Forward, gradients and buffers of a changed model equal those of plain calls of its twin's branches."""
    x = images() if x is None else x
    other = copy.deepcopy(changed) if twin is None else twin
    results = []
    for model, run in ((changed, lambda m: m(x, reduce=False)), (other, lambda m: oracle(m, x))):
        model.zero_grad()
        torch.manual_seed(5)
        logits = run(model)
        if logits.requires_grad:
            logits.square().mean().backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        results.append((logits.detach(), gradients, dict(model.named_buffers())))
    (logits, gradients, buffers), (expected, of_oracle, moved) = results
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)
    assert gradients.keys() == of_oracle.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(
            gradient, of_oracle[name], rtol=1e-3, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}"
        )
    for name, buffer in buffers.items():
        torch.testing.assert_close(buffer, moved[name], rtol=1e-4, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")


def replaced_convolution(model):
    for branch in model.levels[2]:
        torch.manual_seed(7)
        old = branch.get_submodule("layer3.0.conv1")
        new = nn.Conv2d(old.in_channels, old.out_channels, 3, old.stride, 1, bias=True)
        branch.set_submodule("layer3.0.conv1", new)


def one_replaced_convolution(model):
    torch.manual_seed(7)
    old = model.levels[2][1].get_submodule("layer3.0.conv2")
    new = nn.Conv2d(old.in_channels, old.out_channels, 5, 1, 2, bias=False)
    model.levels[2][1].set_submodule("layer3.0.conv2", new)


def swapped_activation(model):
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.ReLU):
                setattr(module, name, nn.GELU())


def other_setting(model):
    model.levels[1][1].get_submodule("layer1.0.bn2").eps = 0.5
    model.levels[2][0].set_submodule("layer3.0.act1", nn.LeakyReLU(0.5))


def frozen_level(model):
    for index in (0, 1):
        for branch in model.levels[index]:
            timm.utils.freeze(branch)


def frozen_statistics(model):
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()


def split_batch_norm(model):
    from timm.layers import convert_splitbn_model

    for level in model.levels:
        for index, branch in enumerate(level):
            level[index] = convert_splitbn_model(branch, 2)


def weight_norm(model):
    for branch in model.levels[2]:
        torch.nn.utils.parametrizations.weight_norm(branch.get_submodule("layer3.0.conv1"))


def pruned(model):
    for level in model.levels:
        for branch in level:
            for module in list(branch.modules()):
                if isinstance(module, nn.Conv2d):
                    torch.nn.utils.prune.l1_unstructured(module, "weight", 0.5)


def quantized_weights(model):
    torchao = pytest.importorskip("torchao.quantization")
    torchao.quantize_(model.classifier, torchao.Int8WeightOnlyConfig())


def quantized_dynamically(model):
    for index, leaf in enumerate(model.classifier):
        model.classifier[index] = torch.ao.quantization.quantize_dynamic(leaf, {nn.Linear}, dtype=torch.qint8)


def doubled_weights(model):
    model.load_state_dict(
        {name: t.clone() * (2 if t.is_floating_point() else 1) for name, t in model.state_dict().items()}, assign=True
    )


def partly_without_gradients(model):
    model.levels[2][1].requires_grad_(False)
    model.levels[1][0].get_submodule("layer1.0.conv2").weight.requires_grad_(False)


def emptied(model):
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.to_empty(device="cpu")
    model.load_state_dict(state)


def own_forward(model):
    module = model.levels[2][0].get_submodule("layer3.0.act1")
    module.forward = lambda x: x * 2


def fewer_channels(model):
    """Structured pruning in place: tensors keep their identity and their address."""
    for branch in model.levels[2]:
        first, norm = branch.get_submodule("layer3.0.conv1"), branch.get_submodule("layer3.0.bn1")
        second, kept = branch.get_submodule("layer3.0.conv2"), first.out_channels // 2
        first.weight.data, second.weight.data = first.weight.data[:kept], second.weight.data[:, :kept]
        for name in ("weight", "bias", "running_mean", "running_var"):
            getattr(norm, name).data = getattr(norm, name).data[:kept]


def equal_counters(model):
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.num_batches_tracked = module.num_batches_tracked.clone()


def synchronised_batch_norm(model):
    for level in model.levels:
        for index, branch in enumerate(level):
            level[index] = nn.SyncBatchNorm.convert_sync_batchnorm(branch)


CHANGES = [
    *(
        replaced_convolution,
        one_replaced_convolution,
        swapped_activation,
        other_setting,
        frozen_level,
        frozen_statistics,
    ),
    *(split_batch_norm, weight_norm, pruned, quantized_weights, quantized_dynamically, doubled_weights),
    *(partly_without_gradients, emptied, own_forward, fewer_channels, equal_counters, synchronised_batch_norm),
]
INFERENCE = (quantized_weights, quantized_dynamically, synchronised_batch_norm)  # the last trains on GPUs alone


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@pytest.mark.parametrize("executor", EXECUTORS)
def test_changes_to_modules_have_the_same_effect_in_both_executors(executor, change):
    for training in (False, True):
        if training and change in INFERENCE:
            continue
        models = [tree(executor, training) for _ in range(2)]
        for model in models:
            model(images()) if not training else None  # the grouped form is there already
            change(model)
        if change in INFERENCE:
            with torch.no_grad():  # rounding to integers makes steps of differences in the last digit
                torch.testing.assert_close(
                    models[0](images(), reduce=False), oracle(models[1], images()), rtol=0, atol=0.02
                )
        else:
            agree(*models)


@pytest.mark.parametrize("executor", EXECUTORS)
def test_nothing_changed_runs_in_one_call_and_agrees(executor):
    for make in (tree, tokens):
        for training in (False, True):
            model = make(executor, training)
            assert all(level.grouped_form() is not None for level in model.all_levels() if level.branches > 1)
            agree(model)


def test_modules_may_choose_another_method_of_their_class_as_forward():
    """As timm's FasterNet does. A change of that choice is seen, in one branch or in all."""
    backbone = timm.create_model("fasternet_t0", num_classes=5, embed_dim=8, depths=(1, 1, 1, 1)).eval()
    model = independent_tree(backbone, 3)
    images = torch.randn(2, 3, 64, 64)
    for level in model.levels:
        assert level.grouped and not level.looped_layers and level.channelwise
    model.set_executor("grouped")
    mixing = [m for branch in model.levels[2] for n, m in branch.named_modules() if n.endswith("spatial_mixing")]
    assert mixing
    for changed in (mixing[:0], mixing[:1], mixing):
        for module in changed:
            module.forward = module.forward_slicing
        torch.testing.assert_close(model(images, reduce=False), oracle(model, images))
    for module in mixing:
        module.forward = lambda x: x * 2
    torch.testing.assert_close(model(images, reduce=False), oracle(model, images))


@pytest.mark.parametrize("executor", EXECUTORS)
def test_hooks_of_every_branch_run_once(executor):
    model, ran = tree(executor), []
    for level in model.all_levels():
        for branch in level:
            for module in branch.modules():
                module.register_forward_pre_hook(lambda module, inputs: ran.append(("before", id(module))))
                module.register_forward_hook(lambda module, inputs, output: ran.append(("after", id(module))))
    for gradients in (torch.enable_grad, torch.no_grad):
        ran.clear()
        with gradients():
            model(images())
        oracle_model, expected = model, list(ran)
        ran.clear()
        with gradients():
            oracle(oracle_model, images())
        assert sorted(expected) == sorted(ran) and len(ran) > 100


@pytest.mark.parametrize("executor", EXECUTORS)
def test_hooks_that_change_values_and_gradients(executor):
    model = tree(executor)
    convolution, block = (model.levels[2][i].get_submodule(n) for i, n in ((1, "layer3.0.conv1"), (0, "layer2.0")))
    convolution.register_forward_hook(lambda module, inputs, output: output * 3)
    block.register_full_backward_hook(lambda module, inputs, outputs: (inputs[0] * 5,))
    agree(model)


@pytest.mark.parametrize("executor", EXECUTORS)
def test_grad_cam(executor):
    """What the package computes, for a layer of one branch: its activations and their gradients."""
    cams = pytest.importorskip("pytorch_grad_cam")
    model = tree(executor)
    for depth in (0, 2):
        small = model.at_depth(depth)
        small.set_executor(executor)
        layer = [small.levels[2][0].get_submodule("layer3.0")]
        shown = cams.GradCAM(model=small, target_layers=layer)(images(2), None)
        looped = copy.deepcopy(small)
        looped.set_executor("looped")
        expected = cams.GradCAM(model=looped, target_layers=[looped.levels[2][0].get_submodule("layer3.0")])(
            images(2), None
        )
        assert shown.shape == (2, 32, 32) and shown.max() > 0 and abs(shown - expected).max() < 1e-3


@pytest.mark.parametrize("executor", EXECUTORS)
def test_lora(executor):
    peft = pytest.importorskip("peft")
    for training in (False, True):
        model = tokens(executor, training)
        config = peft.LoraConfig(r=2, target_modules=r".*\.(qkv|fc1)", init_lora_weights=False)
        adapted = peft.get_peft_model(model, config)
        agree(adapted.base_model.model)
        wanting = {name for name, p in adapted.named_parameters() if p.requires_grad}
        assert wanting and all("lora" in name for name in wanting)
        with torch.no_grad():
            before = adapted(images())
            adapted.merge_adapter()
            torch.testing.assert_close(adapted(images()), before, rtol=1e-4, atol=1e-5)
            with adapted.disable_adapter():
                assert not torch.allclose(adapted(images()), before, atol=1e-4)


def test_an_average_of_weights_is_a_tree_of_its_own():
    model = tree(training=True)
    average = timm.utils.ModelEmaV3(model, decay=0.5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)
    average.update(model)
    agree(average.module)
    assert all(level._form().contiguous for level in average.module.levels[1:])


@pytest.mark.parametrize("kind", ["tree", "tokens", "with exits", "at depth", "fused", "fused tokens", "exits"])
def test_models_are_pickled(kind):
    model = {"tokens": tokens, "fused tokens": tokens}.get(kind, tree)()
    if kind == "with exits":
        model = hierens.tree_with_exits(timm.create_model("resnet10t", in_chans=1, num_classes=10), blocks=3).eval()
    elif kind == "exits":
        model = hierens.multi_exit(timm.create_model("resnet10t", in_chans=1, num_classes=10), exits=3).eval()
    elif kind == "at depth":
        model = model.at_depth(1)
    elif kind.startswith("fused"):
        model = model.fuse()
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for read in (torch.load(file, weights_only=False), pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
        for depth in range(model.depths):
            with torch.no_grad():
                assert torch.equal(read(images(), depth=depth), model(images(), depth=depth))


def test_a_pickle_holds_weights_once():
    model = hierens.hierensify(timm.create_model("resnet18", num_classes=10), blocks=4)
    weights = sum(t.numel() * t.element_size() for t in model.state_dict().values())
    file = io.BytesIO()
    torch.save(model, file)
    assert file.tell() <= 1.05 * weights
    assert len(pickle.dumps(model)) <= 1.05 * weights


def answer(model, x):
    torch.set_num_threads(1)
    with torch.no_grad():
        return [model(x, depth=depth) for depth in range(model.depths)]


@pytest.mark.sampled
def test_models_go_to_spawned_workers():
    models = [tree("grouped"), tree().at_depth(1), tree().fuse()]
    with multiprocessing.get_context("spawn").Pool(1) as workers:
        found = workers.starmap(answer, [(model, images()) for model in models])
    for model, there in zip(models, found, strict=True):
        for depth, logits in enumerate(answer(model, images())):
            assert torch.equal(there[depth], logits)


@pytest.mark.sampled
def test_ray_stores_models():
    """Ray pickles by cloudpickle and hands out buffers that cannot be written."""
    ray = pytest.importorskip("ray")
    ray.init(
        num_cpus=1,
        include_dashboard=False,
        object_store_memory=128_000_000,
        log_to_driver=False,
        configure_logging=False,
        _node_ip_address="127.0.0.1",
    )
    try:
        for model in (tree("grouped"), tree().fuse()):
            stored = ray.get(ray.put(model))
            for a, b in zip(answer(stored, images()), answer(model, images()), strict=True):
                assert torch.equal(a, b)
    finally:
        ray.shutdown()


def answers(model, requests, x):
    found = []
    for kind, value in requests:
        with torch.no_grad():
            if kind == "anytime":
                steps = list(model.anytime(x))
                found.append(torch.stack([step.logits for step in steps]))
            else:
                found.append(model(x, **{kind: value}))
    return found


@pytest.mark.parametrize("executor", [*EXECUTORS, "fused"])
@pytest.mark.parametrize("name", ["small", "tokens"])
def test_threads_get_what_a_single_one_gets(name, executor):
    model = {"small": tree, "tokens": tokens}[name]()
    check_threads(model, executor, images(2), calls=25)


@pytest.mark.slow
@pytest.mark.parametrize("executor", [*EXECUTORS, "fused"])
@pytest.mark.parametrize("name", ["resnet18", "mobilenetv2_050", "vit_tiny_patch16_224", "csatv2"])
def test_threads_of_whole_backbones_get_what_a_single_one_gets(name, executor):
    torch.manual_seed(0)
    backbone = timm.create_model(name, num_classes=7, **({"img_size": 64} if name.startswith("vit") else {}))
    model = hierens.hierensify(with_statistics(backbone), blocks=3).eval()
    model.break_symmetry(0.1)
    check_threads(model, executor, torch.randn(1, 3, 64, 64), calls=100)


def check_threads(model, executor, x, calls):
    model = model.fuse() if executor == "fused" else model
    if executor != "fused":
        model.set_executor(executor)
    kinds = (
        [("depth", d) for d in range(model.depths)]
        + [("leaves", n) for n in range(1, model.leaves + 1)]
        + [("anytime", 0)]
    )
    expected = answers(model, kinds, x)
    before = {name: (t.clone(), t.data_ptr(), t.requires_grad) for name, t in model.state_dict(keep_vars=True).items()}
    wrong, start = [], threading.Barrier(8)
    # A fused layer's sum is ordered by the kernel that runs, which depends on the branches that ran before.
    same = (lambda a, b: close(a, b, 1e-5)) if executor == "fused" else torch.equal

    def work(seed):
        generator = torch.Generator().manual_seed(seed)
        start.wait()
        try:
            for _ in range(calls):
                chosen = int(torch.randint(len(kinds), (), generator=generator))
                if not same(answers(model, [kinds[chosen]], x)[0], expected[chosen]):
                    wrong.append(kinds[chosen])
        except Exception as error:
            wrong.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    for name, tensor in model.state_dict(keep_vars=True).items():
        kept, address, wanted = before[name]
        assert torch.equal(tensor, kept) and tensor.data_ptr() == address and tensor.requires_grad == wanted


def test_a_change_while_others_run(executor="grouped"):
    """A trace for the changed level is made while other threads call modules."""
    model, other = tree(executor), tree(executor)
    stop, failed = threading.Event(), []

    def work():
        with torch.no_grad():
            expected = other(images())
            while not stop.is_set():
                try:
                    if not torch.equal(other(images()), expected):
                        failed.append("another answer")
                except Exception as error:
                    failed.append(error)
                    return

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(5):
            replaced_convolution(model)
            agree(model)
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert not failed


def test_files_of_the_first_layout_load(tmp_path):
    """In which a level's weights were packed along dim 0, under `block`."""
    model = tree()
    model.save_pretrained(tmp_path)
    old = first_layout(model)
    assert old["levels.2.block.layer3.0.conv1.weight"].shape == (4 * 16, 8, 3, 3)
    assert old["levels.2.block.layer3.0.bn1.num_batches_tracked"].shape == (4,)
    save_file({name: tensor.contiguous() for name, tensor in old.items()}, tmp_path / "model.safetensors")
    loaded = hierens.from_pretrained(tmp_path)
    assert all(torch.equal(loaded.state_dict()[name], tensor) for name, tensor in model.state_dict().items())
    with torch.no_grad():
        assert torch.equal(loaded(images()), model(images()))

    old["levels.2.block.layer3.0.conv1.weight"] = torch.zeros(3 * 16, 8, 3, 3)
    save_file({name: tensor.contiguous() for name, tensor in old.items()}, tmp_path / "model.safetensors")
    with pytest.raises(
        LoadError, match=r"block\.layer3\.0\.conv1\.weight is 48x8x3x3 in the file and 64x8x3x3 by the config"
    ):
        hierens.from_pretrained(tmp_path)


def test_a_tree_of_more_networks_than_its_weights_is_refused_first(tmp_path):
    """Each is built by itself, which 4,096 times takes long."""
    model = tree()
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["model_args"].update(branching=[1, 64, 64], leaves=4096)
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(LoadError, match="describes 4096 networks, and its weights can be those of"):
        hierens.from_pretrained(tmp_path)


def test_levels_are_lists_of_modules():
    model = tree()
    level = model.levels[2]
    assert isinstance(level, Level) and isinstance(level, nn.ModuleList) and len(level) == 4
    assert "levels.2.3.layer3.0.conv1.weight" in model.state_dict()
    F.mse_loss(model(images()), torch.zeros(4, 10)).backward()
    assert all(p.grad is not None for p in level[3].parameters())
