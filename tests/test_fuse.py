"""Models made ready for inference: equal up to rounding in every family, and clear about what they are not for."""

import copy
import gc
from concurrent.futures import ThreadPoolExecutor

import pytest
import timm
import torch
from torch import nn
from torch.nn.utils import prune

import hierens
from hierens.branches.fused_layers import FusedConvolution, attachable, fused_convolution
from hierens.branches.tensors import BranchSlice
from support.networks import close, shared_tree, timm_tree

FAMILIES = {
    "resnet10t": {},  # batch norm, ReLU
    "test_efficientnet": {},  # SiLU, squeeze and excitation, depthwise
    "tf_mobilenetv3_small_075": {},  # TensorFlow's padding, hard swish
    "test_byobnet": {},  # batch norm with activation
    "repvgg_a0": {},  # several convolutions of one input
    "densenet121": {"block_config": (2, 2, 2, 2)},  # batch norm before the convolution
    "resnetv2_50x1_bit": {},  # standardised weights, group norm
    "test_nfnet": {},  # scaled standardised weights, no norm
    "test_convnext": {},  # channel layer norm
    "test_vit": {},  # no convolution but the first
    "levit_128s": {},  # batch norm after linear layers
    "csatv2": {},  # blocks without a grouped form
}


@pytest.fixture(scope="module")
def small():
    return shared_tree("test_efficientnet", 3)


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    """A tree of every family, which tests leave as it is, the same fused, and images."""
    model, x = timm_tree(request.param, 3, **FAMILIES[request.param])
    return model, model.fuse(), x


@torch.no_grad()
def test_fused_equals_plain_at_every_depth(family):
    model, fused, x = family
    for leaves in range(1, 5):
        expected = model(x, leaves=leaves, reduce=False)
        assert close(fused(x, leaves=leaves, reduce=False), expected), leaves
        fused.set_executor("looped")
        assert close(fused(x, leaves=leaves, reduce=False), expected), leaves
        fused.set_executor("auto")
    for step in fused.anytime(x):
        assert close(step.logits, model(x, leaves=step.leaves))


@pytest.mark.parametrize("value", [float("nan"), pytest.param(float("inf"), marks=pytest.mark.slow)])
@torch.no_grad()
def test_fused_models_propagate_nan_and_infinity_in_images(family, value):
    """oneDNN's attached ReLU, ReLU6 and hard sigmoid make 0 of it."""
    model, fused, x = family
    x = torch.cat([x, x])
    x[0, :, 5, 5] = value
    expected = model(x, reduce=False)
    assert expected[0].isnan().any()
    for executor in ("auto", "looped", "grouped"):
        fused.set_executor(executor)
        check_alike(fused(x, reduce=False), expected)
        check_alike(fused.forward_features(x), model.forward_features(x))
        for step in fused.anytime(x):
            check_alike(step.newest, expected[:, step.leaves - 1])
            assert close(fused(x[1:], leaves=step.leaves), model(x[1:], leaves=step.leaves)), "other images stay right"
    fused.set_executor("auto")


def check_alike(found, expected):
    assert torch.equal(found.isnan(), expected.isnan())
    finite = expected[expected.isfinite()]
    assert torch.allclose(found[expected.isfinite()], finite, rtol=0, atol=1e-4 * max([1.0, *finite.abs().tolist()]))


@torch.no_grad()
def test_fused_models_propagate_nan_in_weights():
    model, x = shared_tree("resnet10t", 2)
    next(model.parameters()).data[0] = float("nan")
    assert model(x).isnan().all() and model.fuse()(x).isnan().all()


@torch.no_grad()
def test_batch_norms_are_gone_and_activations_attached(small):
    model, _ = small
    kinds = [type(module) for module in model.fuse().modules()]
    assert nn.BatchNorm2d not in kinds and timm.layers.BatchNormAct2d not in kinds
    attached = [m for m in model.fuse().modules() if isinstance(m, FusedConvolution) and m.activation is not None]
    assert attached and all(m.attached for m in attached)


@torch.no_grad()
def test_the_model_is_left_as_it_is(small):
    model, x = small
    before, expected = copy.deepcopy(model.state_dict()), model(x)
    fused = model.fuse()
    fused(x)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    for parameter in fused.parameters():
        parameter.zero_()
    assert torch.equal(model(x), expected)
    assert all(parameter.requires_grad for parameter in model.parameters())


@torch.no_grad()
def test_kernels_follow_the_weights(small):
    """Reordered weights are made anew when weights are written, moved or copied."""
    model, x = small
    fused = model.fuse()
    fused(x)
    for parameter in fused.parameters():
        parameter.mul_(0.5)
    changed = fused(x)
    for module in fused.modules():
        if isinstance(module, FusedConvolution):
            module._kernels.clear()
    assert torch.equal(fused(x), changed)
    assert torch.equal(copy.deepcopy(fused)(x), changed)
    assert close(fused.double()(x.double()), changed.double())
    assert close(fused.float()(x), changed)


@torch.no_grad()
def test_half_precision(small):
    model, x = small
    expected = model(x)
    assert close(model.fuse().bfloat16()(x.bfloat16()), expected, 0.1)
    assert close(copy.deepcopy(model).bfloat16().fuse()(x.bfloat16()), expected, 0.1)


@torch.no_grad()
def test_subtrees_of_a_fused_model(small):
    model, x = small
    fused = model.fuse()
    assert close(fused.at_depth(1)(x), model(x, depth=1))
    assert close(model.at_depth(1).fuse()(x), model(x, depth=1))
    assert close(model.at_depth(0).fuse()(x), model(x, depth=0))
    assert isinstance(fused.at_depth(1), hierens.FusedEnsemble) and not fused.at_depth(1).training
    assert fused.macs() == model.macs()


def test_what_a_fused_model_refuses(small):
    model, x = small
    fused = model.fuse()
    calls = (
        fused.train,
        fused.grow,
        lambda: fused.save_pretrained("anywhere"),
        lambda: fused.reorder([]),
        lambda: fused.reset_classifier(3),
        fused.break_symmetry,
        fused.fuse,
    )
    for call in calls:
        with pytest.raises(ValueError, match=r"for inference only and cannot be .*then call fuse\(\) again"):
            call()
    assert fused.eval() is fused
    images = x.clone().requires_grad_()
    fused(images).sum().backward()  # with respect to the images there are gradients: saliency, adversarial examples
    own = x.clone().requires_grad_()
    model(own).sum().backward()
    assert close(images.grad, own.grad, 1e-3)


@pytest.mark.parametrize(
    "activation",
    [
        nn.ReLU(),
        nn.ReLU6(),
        nn.SiLU(),
        nn.GELU(),
        nn.GELU("tanh"),
        nn.Hardswish(),
        nn.Hardsigmoid(),
        nn.Sigmoid(),
        nn.Tanh(),
        nn.LeakyReLU(0.2),
        nn.Hardtanh(-0.5, 2.0),
    ],
    ids=repr,
)
@torch.no_grad()
def test_attached_activations_are_those_of_torch(activation):
    torch.manual_seed(0)
    layer = nn.Conv2d(8, 16, 3, padding=1, groups=2)
    x = (3 * torch.randn(2, 24, 9, 9)).contiguous(memory_format=torch.channels_last)
    weight, bias = torch.randn(5 * 16, 4, 3, 3), torch.randn(5 * 16)
    fused = FusedConvolution(layer, weight, bias, activation)
    assert attachable(activation)
    width = BranchSlice(3, 5, start=1)
    plain = nn.functional.conv2d(x, weight[16:64], bias[16:64], padding=1, groups=6)
    torch.testing.assert_close(fused_convolution(fused, x, width), activation(plain), rtol=1e-4, atol=1e-4)
    assert len(fused._kernels) == 1, "oneDNN's own operator must have run"


def plainly(model, x, **asked):
    """What the weights of a fused model say by `F.conv2d`, without oneDNN's own operators."""
    with torch.backends.mkldnn.flags(enabled=False):
        return model(x, **asked)


def convolutions(model):
    return [module for module in model.modules() if isinstance(module, FusedConvolution)]


def other_weights(model, round, layout=torch.contiguous_format):
    generator = torch.Generator().manual_seed(round)
    return {
        name: (tensor * (1 + 0.2 * torch.rand((), generator=generator))).clone(
            memory_format=layout if tensor.ndim == 4 else torch.contiguous_format
        )
        for name, tensor in model.state_dict().items()
    }


def bytes_of_all_tensors():
    gc.collect()
    tensors = [t for t in gc.get_objects() if type(t) in (torch.Tensor, nn.Parameter)]
    storages = [t.untyped_storage() for t in tensors if t.layout is torch.strided]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


@torch.no_grad()
@pytest.mark.parametrize("rounds", [20, pytest.param(100, marks=pytest.mark.slow)])
def test_rounds_of_loading_and_casting_answer_right_in_constant_memory(small, rounds):
    model, x = small
    fused, random, resident = model.fuse(), torch.Generator().manual_seed(0), []
    start = {name: tensor.clone() for name, tensor in fused.state_dict().items()}
    layers = convolutions(fused)
    for round in range(rounds):
        fused.load_state_dict({k: v.clone() for k, v in start.items()})  # lest all changes add up
        for _ in range(int(torch.randint(1, 3, (), generator=random))):
            fused(x, leaves=int(torch.randint(1, 5, (), generator=random)))
        layout = torch.channels_last if round % 3 else torch.contiguous_format
        fused.load_state_dict(other_weights(fused, round, layout), assign=bool(round % 2))
        if round % 4 == 1:
            fused.bfloat16().float()
        if round % 4 == 2:
            fused.double().float()
        if round % 4 == 3:
            with torch.inference_mode():
                fused.half().float()
                layers[0].weight.mul_(1.5)
        for leaves in torch.randperm(4, generator=random)[:2].add(1).tolist():
            for _ in range(2):
                assert close(fused(x, leaves=leaves), plainly(fused, x, leaves=leaves)), (round, leaves)
        for step in fused.anytime(x):
            assert close(step.logits, plainly(fused, x, leaves=step.leaves)), (round, step.leaves)
        for layer in layers:
            assert layer._kernels.numel() <= layer.weight.numel()
        if round in (9, rounds - 1):
            resident.append(bytes_of_all_tensors())
    assert resident[1] <= 1.01 * resident[0]


@pytest.mark.sampled
@torch.no_grad()
def test_weights_are_held_at_most_twice():
    """By the fused model itself: it shares nothing with the model that it was made from."""
    model, x = shared_tree("resnet18", 4)
    fused = model.fuse()
    for leaves in (8, 1, 1, 1, 2, 2, 4, 4, 3, 3, 8, 8, 8, 5):
        fused(x, leaves=leaves)
        for step in fused.anytime(x):
            assert step.leaves
    layers = convolutions(fused)
    weights, kernels = sum(m.weight.nbytes for m in layers), sum(m._kernels.bytes for m in layers)
    assert 0.5 * weights < kernels <= 1.02 * weights, "oneDNN rounds channels up to whole blocks"
    own = {tensor.data_ptr() for tensor in model.state_dict().values()}
    assert not own & {tensor.data_ptr() for tensor in fused.state_dict().values()}


@torch.no_grad()
def test_sets_of_branches_that_take_turns_do_not_push_each_other_out(monkeypatch):
    made = []
    reorder = FusedConvolution.reorder
    monkeypatch.setattr(FusedConvolution, "reorder", lambda *args: made.append(1) or reorder(*args))
    layer = FusedConvolution(nn.Conv2d(16, 16, 3, padding=1), torch.randn(8 * 16, 16, 3, 3), None)

    def run(active, start=0):
        x = torch.randn(1, 16 * active, 8, 8).contiguous(memory_format=torch.channels_last)
        width = BranchSlice(active, 8, start)
        plain = nn.functional.conv2d(x, width.rows(layer.weight), padding=1, groups=active)
        torch.testing.assert_close(fused_convolution(layer, x, width), plain, rtol=1e-4, atol=1e-4)

    for _ in range(5):
        run(8)
    assert len(made) == 1, "steady use"
    for _ in range(5):
        run(8), run(2)
    assert len(made) == 1 and len(layer._kernels) == 1, "in turns"
    for _ in range(5):
        run(2)
    assert len(made) == 2 and len(layer._kernels) == 1, "what is used no more gives way"
    for _ in range(3):
        for branch in range(8):
            run(1, branch)
    assert layer._kernels.numel() <= layer.weight.numel()
    made.clear()
    for branch in range(8):
        run(1, branch)
    assert not made and len(layer._kernels) == 8, "a walk leaf by leaf finds room for all"


@pytest.mark.sampled
@torch.no_grad()
def test_threads_share_a_fused_model(small):
    model, x = small
    fused = model.fuse()
    expected = {leaves: plainly(fused, x, leaves=leaves) for leaves in range(1, 5)}

    def calls(thread):
        random = torch.Generator().manual_seed(thread)
        for call in range(100):
            leaves = int(torch.randint(1, 5, (), generator=random))
            if call % 10 == thread:
                fused.float()  # forgets the kernels, under the feet of the others
            with torch.no_grad():
                if call % 5:
                    assert close(fused(x, leaves=leaves), expected[leaves])
                else:
                    assert all(close(step.logits, expected[step.leaves]) for step in fused.anytime(x))

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(calls, range(8)))
    assert all(layer._kernels.numel() <= layer.weight.numel() for layer in convolutions(fused))


@torch.no_grad()
def test_weights_that_are_not_finite_may_be_loaded():
    model, x = shared_tree("resnet10t", 2)
    fused = model.fuse()
    good = {name: tensor.clone() for name, tensor in fused.state_dict().items()}
    bad = {**good, next(iter(good)): torch.full_like(next(iter(good.values())), float("nan"))}
    fused.load_state_dict(bad)
    assert fused(x).isnan().all()
    fused.load_state_dict(good)
    assert close(fused(x), model(x)) and all(m.attached for m in convolutions(fused) if m.activation is not None)


def test_gradients_flow_to_weights_that_ask_for_them(small):
    model, x = small
    fused = model.fuse()
    weight = convolutions(fused)[0].weight.requires_grad_()
    with torch.no_grad():
        fused(x)
    fused(x).sum().backward()
    assert weight.grad.abs().sum() > 0


def test_weights_of_another_type_than_the_images_are_refused_as_by_torch(small):
    model, x = small
    fused = model.fuse()
    convolutions(fused)[0].bfloat16()
    with pytest.raises(RuntimeError, match="type"):
        fused(x)


CHANGES = {
    "replaced": lambda block, name: block.set_submodule(name, nn.Identity()),
    "parametrised": lambda block, name: nn.utils.parametrizations.weight_norm(block.get_submodule(name)),
    "pruned": lambda block, name: prune.identity(block.get_submodule(name), "weight"),
    "forward hook": lambda block, name: block.get_submodule(name).register_forward_hook(print),
    "backward hook": lambda block, name: block.get_submodule(name).register_full_backward_hook(print),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("way", ["fused", "copied", "cut"])
def test_layers_that_no_longer_run_as_modules_cannot_be_changed(small, change, way):
    model, x = small
    fused = model.fuse()
    fused = {"fused": fused, "copied": copy.deepcopy(fused), "cut": fused.at_depth(1)}[way]
    fused(x)
    block = fused.level(1).block
    name = next(name for name, module in block.named_modules() if isinstance(module, FusedConvolution))
    CHANGES[change](block, name)
    for call in (lambda: fused(x), lambda: fused.anytime(x), lambda: fused.forward_features(x)):
        with pytest.raises(ValueError, match=r"a fused model .* cannot be (changed|given).*then call fuse\(\) again"):
            call()


def test_hooks_that_folding_would_lose_are_named(small):
    model, x = small
    hooked = copy.deepcopy(model)
    convolution = next(m for m in hooked.level(1).modules() if isinstance(m, nn.Conv2d))
    handle = convolution.register_forward_hook(lambda *args: None)
    with pytest.raises(ValueError, match=r"none of their hooks: remove those of .* in level 1 first"):
        hooked.fuse()
    handle.remove()
    seen = []
    fused = hooked.fuse()
    fused.register_forward_hook(lambda *args: seen.append(1))
    fused.level(1).register_forward_hook(lambda *args: seen.append(1))
    with torch.no_grad():
        fused(x)
    assert len(seen) == 2, "those of the model and of its levels are called"
