"""Networks for images of any size: timm's `dynamic_img_size` and the names that end in _dynamic and _dense."""

import copy

import pytest
import small_model
import timm
import torch

import sepvit
from sepvit_lib.networks import create_network

SLOW = pytest.mark.slow

# The blocks with a single window are the same at these sizes as at 224 × 224.
SAME_BLOCKS = [(224, 224), (224, 200), (193, 224), (160, 208), (120, 115)]
SAME_BLOCKS += [(113, 224), (201, 211), (151, 97), (129, 131), (224, 97)]
OTHER_BLOCKS = [(64, 64), (97, 113), (256, 224), (300, 501)]


@pytest.fixture(scope="module")
def plain():
    model = timm.create_model("SepViT_Lite", num_classes=5).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("win_tokens"):
            torch.nn.init.normal_(parameter, std=3)
    return model


@pytest.fixture
def dynamic(plain):
    model = timm.create_model("SepViT_Lite_dynamic", num_classes=5).eval()
    model.load_state_dict(plain.state_dict())
    return model


def with_same_pointwise(plain, size):
    """The network at a size, with the pointwise attention that its weights have."""
    model = copy.deepcopy(plain)
    grids = zip(model.named_blocks().values(), model.window_grids((224, 224)), model.window_grids(size))
    for block, old, new in grids:
        if block.win_tokens is not None:
            block.win_tokens.data = sepvit.resample_window_tokens(block.win_tokens.data, old, new)
    model.img_size = size
    return model


def largest_difference(y, expected):
    return (y - expected).abs().max().item()


@pytest.mark.parametrize("size", SAME_BLOCKS + OTHER_BLOCKS)
def test_any_size_equals_a_network_of_that_size(plain, dynamic, size):
    images = torch.randn(2, 3, *size)
    if size in SAME_BLOCKS:
        expected = copy.deepcopy(plain)
        expected.set_input_size(size)
    else:
        expected = with_same_pointwise(plain, size)
    with torch.no_grad():
        y, logits = dynamic(images), expected(images)
        assert largest_difference(y, logits) < 1e-6
        with torch.autocast("cpu", torch.bfloat16):
            assert largest_difference(dynamic(images).float(), expected(images).float()) < 2e-2
    assert size != (224, 224) or torch.equal(y, plain(images))


@pytest.fixture(scope="module")
def small():
    model = timm.create_model(small_model.MODEL, num_classes=5, img_size=224, dynamic_img_size=True).eval()
    for block in model.named_blocks().values():
        if block.win_tokens is not None:
            torch.nn.init.normal_(block.win_tokens)
    return model


SHORT = [(224, 224), (120, 115), (201, 211)]
LONG = [pytest.param(size, marks=SLOW) for size in SAME_BLOCKS if size not in SHORT]


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=SLOW)])
@pytest.mark.parametrize("size", [*SHORT, *LONG])
def test_compiled_and_exported(small, size, backend):
    torch._dynamo.reset()
    images = torch.randn(2, 3, *size)
    with torch.no_grad():
        expected = small(images)
        compiled = torch.compile(copy.deepcopy(small), fullgraph=True, backend=backend)
        assert largest_difference(compiled(images), expected) < 1e-5
        program = torch.export.export(small, (images,))
        assert largest_difference(program.module()(images), expected) < 1e-5
        assert largest_difference(torch.jit.trace(small, images)(images), expected) < 1e-5
        assert torch.equal(small(images), expected)  # none of them left anything behind


def test_tokens_are_resampled_once_a_size(small, monkeypatch):
    resample, calls = sepvit.resample_window_tokens, []
    monkeypatch.setattr(sepvit, "resample_window_tokens", lambda *args: calls.append(args) or resample(*args))
    small.eval()
    blocks = sum(block.win_tokens is not None for block in small.named_blocks().values())
    sizes = [torch.randn(1, 3, 64 * side, 64) for side in range(1, sepvit.MAX_SIZES + 4)]
    with torch.no_grad():
        for count, images in ((1, sizes[0]), (1, sizes[0]), (2, sizes[6]), (2, sizes[0]), (2, sizes[6])):
            small(images)
            assert len(calls) == count * blocks
        for images in sizes:
            small(images)
    modules = [m for m in small.modules() if isinstance(m, sepvit.ResampledWindowTokens) and m.kept]
    assert max(len(module.kept[2]) for module in modules) <= sepvit.MAX_SIZES
    assert all(m.kept is None for m in copy.deepcopy(small).modules() if isinstance(m, sepvit.ResampledWindowTokens))
    assert small.state_dict().keys() == timm.create_model(small_model.MODEL, num_classes=5).state_dict().keys()


@pytest.mark.parametrize("change", ["in place", "loaded", "data", "inside data"])
def test_changed_tokens_take_effect(dynamic, change):
    images, block = torch.randn(1, 3, 120, 115), dynamic.blocks[0][0]
    fresh = torch.randn_like(block.win_tokens)
    with torch.inference_mode():
        before = dynamic(images)
    with torch.no_grad():
        if change == "in place":
            block.win_tokens.copy_(fresh)
        elif change == "loaded":
            dynamic.load_state_dict(dynamic.state_dict() | {"blocks.0.0.win_tokens": fresh})
        elif change == "data":
            block.win_tokens.data = fresh
        else:  # torch cannot tell, but evaluations start with eval()
            block.win_tokens.data.copy_(fresh)
            dynamic.eval()
        after = dynamic(images)
        assert not torch.equal(after, before)
        assert torch.equal(after, copy.deepcopy(dynamic).train().eval()(images))


def test_training_at_any_size_trains_the_tokens(dynamic):
    dynamic.train()
    for size in ((224, 224), (120, 115), (256, 224)):
        dynamic.zero_grad()
        dynamic(torch.randn(2, 3, *size)).square().sum().backward()
        tokens = {name: p for name, p in dynamic.named_parameters() if name.endswith("win_tokens")}
        assert all(parameter.grad.abs().sum() > 0 for parameter in tokens.values())


def test_dense_name_takes_any_size_and_loads_a_classifier(plain):
    features = timm.create_model("SepViT_Lite_dense", features_only=True, out_indices=(1, 3)).eval()
    features.model.load_state_dict(plain.state_dict())
    expected = sepvit.create_dense("SepViT_Lite", out_indices=(1, 3)).eval()
    expected.load_state_dict(plain.state_dict())
    fresh = {n: v for n, v in expected.state_dict().items() if n not in plain.state_dict()}
    features.model.load_state_dict(features.model.state_dict() | fresh)
    for size in ((224, 224), (50, 71), (301, 200)):
        with torch.no_grad():
            images = torch.randn(1, 3, *size)
            maps = features(images)
            assert all(map(torch.equal, maps, expected(images)))
            for y, reduction in zip(maps, features.feature_info.reduction()):
                assert y.shape[2:] == tuple(-(-side // reduction) for side in size)
    model = timm.create_model("SepViT_Lite_dense", num_classes=5)
    model.load_state_dict(plain.state_dict())
    assert torch.equal(model.head.weight, plain.head.weight)
    model.set_input_size(96)
    assert model(torch.randn(1, 3, 50, 71)).shape == (1, 5)


def test_commands_build_the_network_for_their_size():
    network = create_network("--model", "SepViT_Lite_dynamic", 5, 384)
    plain = timm.create_model("SepViT_Lite", num_classes=5, img_size=384)
    assert network.state_dict().keys() == plain.state_dict().keys()  # pointwise attention in the blocks that have it
    assert network.img_size == (384, 384)
    assert create_network("--model", "SepViT_Lite_dense", 5, 384)(torch.randn(1, 3, 50, 71)).shape == (1, 5)
