"""`torch.compile` takes each depth as one graph, and going back to a depth compiles nothing."""

import pytest
import torch
from torch._dynamo.testing import CompileCounter

import hierens
from support.networks import close, shared_tree, tiny_backbone


@pytest.fixture(autouse=True)
def fresh():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.parametrize(
    ("executor", "fused"),
    [
        ("auto", False),
        ("grouped", True),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (("auto", True), ("looped", False), ("looped", True), ("grouped", False))
        ),
    ],
)
@torch.no_grad()
def test_a_graph_for_each_depth_and_no_more(executor, fused):
    model, x = shared_tree("test_efficientnet", 3)
    model = model.fuse() if fused else model
    model.set_executor(executor)
    expected = [model(x, depth=depth) for depth in range(3)]
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for depth in (0, 1, 2, 1, 0, 2, 2, 0):
        assert close(compiled(x, depth=depth), expected[depth])
    assert counter.frame_count == 3


@torch.no_grad()
def test_a_fused_model_in_half_precision_compiles():
    """As on GPUs; oneDNN's question whether the processor has bfloat16 is nothing a compiler can look into."""
    model, x = shared_tree("test_efficientnet", 2)
    fused, x = model.fuse().to(torch.bfloat16), x.to(torch.bfloat16)
    compiled = torch.compile(fused, backend=CompileCounter(), fullgraph=True)
    torch.testing.assert_close(compiled(x, depth=1), fused(x, depth=1), rtol=0.1, atol=0.1)


@pytest.mark.sampled
def test_training_compiles_too():
    model, x = shared_tree("resnet10t", 3)
    counter = CompileCounter()
    compiled = torch.compile(model.train(), backend=counter, fullgraph=True)
    for depth in (2, 0, 2):
        compiled(x, depth=depth, reduce=False).sum().backward()
    assert counter.frame_count == 2


@pytest.mark.sampled
@torch.no_grad()
def test_code_is_generated_for_a_fused_model():
    """With Inductor, code generation and all; slow, so for one small model."""
    model, x = shared_tree("test_efficientnet", 2)
    fused = model.fuse()
    compiled = torch.compile(fused, fullgraph=True, dynamic=False)
    assert close(compiled(x, depth=1), fused(x, depth=1))


@pytest.mark.sampled
def test_trees_with_exits_compile_as_depths_do():
    model = hierens.tree_with_exits(tiny_backbone(), 3).eval()
    counter, x = CompileCounter(), torch.randn(4, 1, 16, 16)
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    with torch.no_grad():
        for depth in (0, 2, 4, 0, 2):
            assert close(compiled(x, depth=depth), model(x, depth=depth))
    assert counter.frame_count == 3


def test_exits_compile_as_depths_do():
    model = hierens.multi_exit(tiny_backbone(), 3, collaborate=True, weights="uniform", learn_weights=True)
    counter, x = CompileCounter(), torch.randn(4, 1, 16, 16)
    compiled = torch.compile(model.eval(), backend=counter, fullgraph=True)
    with torch.no_grad():
        for depth in (0, 2, 0, 2):
            assert close(compiled(x, depth=depth), model(x, depth=depth))
    assert counter.frame_count == 2
    model.gradient_equilibrium = True
    torch.compile(model.train(), backend=CompileCounter(), fullgraph=True)(x, reduce=False).sum().backward()
