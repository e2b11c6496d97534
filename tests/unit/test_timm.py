"""timm's model interface, tested like timm's own models (its tests/test_models.py and test_model_input.py)."""

import multiprocessing
from concurrent.futures import Executor, ProcessPoolExecutor

import pytest
import timm
import torch
from conftest import VARIANTS
from timm.layers import get_notrace_functions, get_notrace_modules
from timm.models import get_model_traits, group_parameters
from timm.models._hub import save_for_hf
from timm.optim import create_optimizer_v2, param_groups_layer_decay
from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

import sepvit

# The largest takes as long as all others, and its code is theirs.
FORMS = [pytest.param(variant, marks=pytest.mark.slow if variant == "SepViT_Base" else ()) for variant in VARIANTS]
FORMS += [pytest.param(f"SepViT_Lite_{form}") for form in ("dynamic", "dense")]
CHANNELS = {
    name: list(sepvit.VARIANTS["_".join(name.split("_")[:2])]["embed_dims"]) for name in timm.list_models("SepViT*")
}


@pytest.mark.parametrize("variant", FORMS)
def test_forward_and_head(variant):
    model = timm.create_model(variant).eval()
    images = torch.randn(1, *model.default_cfg["input_size"])
    with torch.no_grad():
        logits = model(images)
        features = model.forward_features(images)
        pooled = model.forward_head(features, pre_logits=True)
    assert logits.shape == (1, 1000)
    assert not torch.isnan(logits).any()
    assert pooled.shape == (1, model.head_hidden_size)
    torch.testing.assert_close(model.head(pooled), logits)


@pytest.mark.parametrize("variant", FORMS)
def test_default_cfg(variant):
    with torch.device("meta"):
        model = timm.create_model(variant).eval()
        cfg, state_dict = model.default_cfg, model.state_dict()
        images = torch.randn(1, *cfg["input_size"])
        assert model.output_fmt == "NHWC"
        assert model.forward_features(images).shape == (1, *cfg["pool_size"], model.num_features)
        model.reset_classifier(0)
        assert model(images).shape == (1, model.num_features)
        model.reset_classifier(0, "")
        assert model(images).shape == (1, *cfg["pool_size"], model.num_features)
        model = timm.create_model(variant, num_classes=0, global_pool="").eval()
        assert model(images).shape == (1, *cfg["pool_size"], model.num_features)
    for name in (cfg["classifier"], cfg["first_conv"]):
        assert f"{name}.weight" in state_dict
    assert model.pretrained_cfg is model.default_cfg
    assert get_model_traits(model)["fixed_input_size"] == (variant in VARIANTS)


@pytest.mark.parametrize("variant", FORMS)
def test_features_only(variant):
    with torch.device("meta"):
        model = timm.create_model(variant, features_only=True).eval()
        maps = model(torch.randn(1, 3, 224, 224))
    assert model.feature_info.channels() == CHANNELS[variant]
    assert model.feature_info.reduction() == [4, 8, 16, 32]
    assert [tuple(m.shape[1:]) for m in maps] == [(c, s, s) for c, s in zip(CHANNELS[variant], (56, 28, 14, 7))]


def test_features_only_of_some_stages_at_another_size():
    model = timm.create_model("SepViT_Lite", features_only=True, out_indices=(0, 2), img_size=(96, 64))
    assert model.feature_info.channels() == [32, 128]
    maps = model(torch.randn(1, 3, 96, 64))
    assert [tuple(m.shape) for m in maps] == [(1, 32, 24, 16), (1, 128, 6, 4)]
    sum(m.sum() for m in maps).backward()
    assert not any("blocks.3" in name for name, _ in model.named_parameters())


@pytest.mark.parametrize("kind", ["hook", "fx"])
def test_features_by_module_name(kind):
    model = timm.create_model("SepViT_Lite").eval()
    images = torch.randn(1, 3, 224, 224)
    expected = model.forward_intermediates(images, output_fmt="NHWC", intermediates_only=True)
    features = timm.create_model("SepViT_Lite", features_only=True, feature_cls=kind).eval()
    inner = features.body if kind == "hook" else features.graph_module
    inner.load_state_dict({name: model.state_dict()[name] for name in inner.state_dict()})
    for y, e in zip(features(images), expected):
        torch.testing.assert_close(y, e, rtol=0, atol=1e-6)


def test_forward_intermediates():
    model = timm.create_model("SepViT_Lite", img_size=64).eval()
    images = torch.randn(2, 3, 64, 64)
    final, maps = model.forward_intermediates(images)
    torch.testing.assert_close(final, model.forward_features(images))
    assert [tuple(m.shape) for m in maps] == [(2, 32, 16, 16), (2, 64, 8, 8), (2, 128, 4, 4), (2, 256, 2, 2)]
    assert len(model.forward_intermediates(images, indices=2)[1]) == 2
    some = model.forward_intermediates(images, indices=[1, -1], intermediates_only=True, norm=True)
    torch.testing.assert_close(some[0], maps[1])
    torch.testing.assert_close(some[1].permute(0, 2, 3, 1), final)
    nhwc = model.forward_intermediates(images, output_fmt="NHWC", intermediates_only=True)
    torch.testing.assert_close(nhwc[0], maps[0].permute(0, 2, 3, 1))
    ran = []
    model.blocks[3][0].register_forward_hook(lambda *_: ran.append(1))
    early, _ = model.forward_intermediates(images, indices=[0], stop_early=True)
    assert early.shape == (2, 16, 16, 32)
    assert ran == []
    with pytest.raises(AssertionError):
        model.forward_intermediates(images, output_fmt="NLC")


def test_prune_intermediate_layers():
    model = timm.create_model("SepViT_Lite", img_size=64).eval()
    images = torch.randn(1, 3, 64, 64)
    expected = model.forward_intermediates(images, indices=[1], intermediates_only=True)
    assert model.prune_intermediate_layers([1]) == [1]
    assert isinstance(model.get_classifier(), torch.nn.Identity)
    assert model.num_features == 64
    assert not any(".2." in name for name, _ in model.blocks.named_parameters() if name.startswith("2."))
    pruned = model.forward_intermediates(images, indices=[1], intermediates_only=True)
    torch.testing.assert_close(pruned[0], expected[0])
    assert model(images).shape == (1, 8, 8, 64)


def test_classifier_and_pooling():
    model = timm.create_model("SepViT_Lite", img_size=64, global_pool="max", num_classes=5).eval()
    images = torch.randn(1, 3, 64, 64)
    features = model.forward_features(images)
    torch.testing.assert_close(model.forward_head(features, pre_logits=True), features.amax(dim=(1, 2)))
    assert model.get_classifier().out_features == 5
    model.half().reset_classifier(9, "avg")
    assert model.get_classifier().weight.dtype == torch.float16
    assert model.num_classes == 9
    model.float()
    assert model(images).shape == (1, 9)
    unpooled = timm.create_model("SepViT_Lite", img_size=64, global_pool="", num_classes=5).eval()
    assert unpooled(images).shape == (1, 2, 2, 5)


@pytest.fixture(scope="module")
def fresh_process():
    """A process in which nothing was compiled or exported.

    TorchScript knows PyTorch's operators by their ids. torch.compile leaves the ids of freed ones behind (torch 2.11),
    and another object with such an id is taken for an operator.
    """
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield pool


def fx_graph(model: torch.nn.Module) -> torch.nn.Module:
    settings = {"leaf_modules": list(get_notrace_modules()), "autowrap_functions": list(get_notrace_functions())}
    train_nodes, eval_nodes = get_graph_node_names(model, tracer_kwargs=settings)
    nodes = {"train_return_nodes": [train_nodes[-1]], "eval_return_nodes": [eval_nodes[-1]]}
    return create_feature_extractor(model, **nodes, tracer_kwargs=settings)


def check_script(variant: str) -> None:
    model = timm.create_model(variant, img_size=64).eval()
    images = torch.randn(1, 3, 64, 64 if variant in VARIANTS else 97)
    with torch.no_grad():
        torch.testing.assert_close(torch.jit.script(model)(images), model(images))
    torch.jit.script(fx_graph(model).eval())


@pytest.mark.parametrize("variant", FORMS)
def test_torchscript(variant: str, fresh_process: Executor):
    """Of the model, and of its graph."""
    fresh_process.submit(check_script, variant).result()


@pytest.mark.parametrize("variant", FORMS)
def test_fx(variant):
    model = timm.create_model(variant, img_size=64, num_classes=42)
    images = torch.randn(2, 3, 64, 64)
    graph = fx_graph(model)
    model.eval()
    with torch.no_grad():
        assert torch.equal(next(iter(graph.eval()(images).values())), model(images))
    graph.train()
    next(iter(graph(images).values())).mean().backward()
    assert all(p.grad is not None for p in graph.parameters())


def test_in_chans_and_pretrained_weights_from_a_file(tmp_path):
    source = timm.create_model("SepViT_Lite", num_classes=1000)
    path = tmp_path / "weights.pth"
    torch.save(source.state_dict(), path)
    overlay = {"file": str(path)}
    grey = timm.create_model("SepViT_Lite", pretrained=True, pretrained_cfg_overlay=overlay, in_chans=1, num_classes=5)
    weight = source.patch_embeds[0].proj.weight
    torch.testing.assert_close(grey.patch_embeds[0].proj.weight, weight.sum(dim=1, keepdim=True))
    features = timm.create_model(
        "SepViT_Lite", pretrained=True, pretrained_cfg=dict(source.pretrained_cfg, file=str(path)), features_only=True
    )
    assert torch.equal(features.model.patch_embeds[0].proj.weight, weight)
    with pytest.raises(RuntimeError, match="No pretrained weights"):
        timm.create_model("SepViT_Lite", pretrained=True)


def test_hub_round_trip_after_a_resize(tmp_path):
    model = timm.create_model("SepViT_Lite", num_classes=7).eval()
    model.set_input_size((96, 128))
    save_for_hf(model, tmp_path)
    restored = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    images = torch.randn(1, 3, 96, 128)
    with torch.no_grad():
        torch.testing.assert_close(restored(images), model(images), rtol=0, atol=0)


def test_no_weight_decay_covers_window_tokens_and_vectors():
    model = timm.create_model("SepViT_Lite")
    optimizer = create_optimizer_v2(model, "adamw", lr=1e-3, weight_decay=0.05)
    names = {id(p): name for name, p in model.named_parameters()}
    decayed = {names[id(p)] for group in optimizer.param_groups if group["weight_decay"] for p in group["params"]}
    expected = {n for n, p in model.named_parameters() if p.ndim >= 2 and not n.endswith("win_tokens")}
    assert decayed == expected
    assert len(model.no_weight_decay()) == 6


def test_layer_decay_follows_depth():
    model = timm.create_model("SepViT_Lite")
    groups = param_groups_layer_decay(model, weight_decay=0.05, layer_decay=0.5)
    names = {id(p): name for name, p in model.named_parameters()}
    scale = {names[id(p)]: group["lr_scale"] for group in groups for p in group["params"]}
    order = (
        "patch_embeds.0.proj.weight blocks.0.0.mlp.fc1.weight blocks.1.0.mlp.fc1.weight blocks.1.1.mlp.fc1.weight "
        "blocks.2.0.mlp.fc1.weight blocks.2.5.mlp.fc1.weight blocks.3.1.mlp.fc1.weight head.weight".split()
    )
    scales = [scale[name] for name in order]
    assert scales == sorted(set(scales))
    assert scale["patch_embeds.2.proj.weight"] == scale["blocks.2.0.mlp.fc1.weight"]
    assert scale["pos_block.2.proj.0.weight"] == scale["blocks.2.0.mlp.fc1.weight"]
    assert scale["norm.weight"] == scale["blocks.3.1.mlp.fc1.weight"]
    assert scale["head.weight"] == 1.0
    coarse = group_parameters(model, model.group_matcher(coarse=True))
    assert len(coarse) == 6  # stem, four stages, norm and head
