"""What every method must be. A method that is added to METHODS is put through all of this; HEADS takes a line of it."""

import ast
import contextlib
import copy
import inspect
import math
import re
import sys
import textwrap
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import medssl
from medssl import METHODS, rotation
from medssl.common import augment, encoders, unet
from tests.common import Flip, batch, tiny_encoder

ROOT = Path(__file__).parents[1]
ALONE = [name for name in METHODS if name != "together"]
NAMES = [*ALONE, "rotation+byol", "spark+medmoco"]
# options that make a method cheap, where it has them
CHEAP = {"queue_size": 20, "hidden": 32, "dim": 16, "prototypes": 10, "freeze": 0, "crops": 2, "width": 32,
         "permutations": 10, "regions": 4, "predictor_hidden": 32, "bottleneck": 8}


def make(name, channels=1, size=64, stem="default", stages=4):
    torch.manual_seed(0)
    return make_on(name, tiny_encoder(channels, stem, stages=stages), channels, size)


def make_on(name, encoder, channels, size, views=None, cheap=CHEAP):
    views = views or augment.build("contrastive", size)
    if "+" in name:
        parts = {part: make_on(part, encoder, channels, size, views) for part in name.split("+")}
        return METHODS["together"](encoder, None, parts)
    words = inspect.signature(METHODS[name]).parameters
    cheap = {**cheap, "channels": channels, "mean": [0.4] * channels}
    if "small" in words:
        cheap["small"] = augment.build("contrastive", 32)
    if "decoder" in words:
        cheap["decoder"] = unet.Decoder(encoder.widths, encoder.strides, channels)
    return METHODS[name](encoder, views, **{word: value for word, value in cheap.items() if word in words})


def views_of(method, count=9, channels=1, size=64, seed=1):
    torch.manual_seed(seed)
    return method.views(batch(count, channels, size))


def state(method):
    return {name: value.clone() for name, value in method.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def detached(out):
    return {k: v.detach() if isinstance(v, torch.Tensor) else v for k, v in out.items()}


@pytest.mark.parametrize("name", NAMES)
def test_forward_is_deterministic_and_changes_only_running_statistics(name):
    method = make(name).train()
    with torch.no_grad():
        for p in method.parameters():                                       # slow copies lag behind, as after a step
            p.add_(1e-3 * torch.randn_like(p) * p.requires_grad)
    views = views_of(method)
    before = state(method)
    first = method(*views)
    after = state(method)
    changed = [key for key in before if not torch.equal(before[key], after[key])]
    assert all(re.search(r"running_(mean|var)$|num_batches_tracked$", key) for key in changed), changed
    loss = first["loss"]
    assert loss.ndim == 0 and loss.isfinite() and loss.requires_grad and loss.dtype == torch.float32
    assert torch.equal(loss, method(*views)["loss"])
    for word in ("embedding", "restored", "chance"):
        assert not getattr(first.get(word), "requires_grad", False), word
    assert torch.as_tensor(first.get("chance", 0.0)).isfinite()
    method.eval()
    before = state(method)
    with torch.no_grad():
        assert method(*views)["loss"].isfinite()
    assert same(before, state(method))


@pytest.mark.parametrize("name", NAMES)
def test_every_trainable_parameter_gets_a_gradient(name):
    method = make(name).train()
    method(*views_of(method))["loss"].backward()
    for key, p in method.named_parameters():
        if p.requires_grad:
            assert p.grad is not None and p.grad.isfinite().all(), key
            # a bias that is followed by a norm, or by a softmax over the same shift, cannot matter
            assert p.grad.abs().max() > 0 or key.endswith("bias"), key


@pytest.mark.parametrize("name", NAMES)
def test_state_moves_in_after_step_and_survives_a_round_trip(name):
    method = make(name).train()
    optimizer = torch.optim.SGD([p for p in method.parameters() if p.requires_grad], 0.1)
    for step in range(2):
        out = method(*views_of(method, seed=step))
        optimizer.zero_grad()
        out["loss"].backward()
        optimizer.step()
        before = state(method)
        method.after_step([detached(out)], (step + 1) / 4)
    if not inspect.getsource(type(method).after_step).rstrip().split("#")[0].rstrip().endswith("pass"):
        assert not same(before, state(method))                              # a hook that does nothing should say `pass`
    other = make(name).train()
    other.load_state_dict(state(method))
    views = views_of(method, seed=5)
    out, again = method(*views), other(*views)
    assert torch.equal(out["loss"], again["loss"])
    method.after_step([detached(out)], 1.0)
    other.after_step([detached(again)], 1.0)
    assert same(state(method), state(other))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("channels,size,stem,count", [(3, 64, "default", 5), (1, 96, "default", 4),
                                                      (1, 32, "small", 6)])
def test_channels_sizes_and_odd_batches(name, channels, size, stem, count):
    method = make(name, channels, size, stem).train()
    out = method(*views_of(method, count, channels, size))
    assert out["loss"].isfinite()
    if "restored" in out:
        assert out["restored"].shape == (count, channels, size, size)


@pytest.mark.parametrize("name", NAMES)
def test_views_differ_between_equal_images_and_follow_the_seed(name):
    method = make(name).train()
    picture = batch(1).expand(6, -1, -1, -1)

    def tensors():
        torch.manual_seed(3)
        views = method.views(picture)
        return [t for view in views for t in (view if isinstance(view, tuple) else (view,))]

    first, second = tensors(), tensors()
    assert all(torch.equal(a, b) for a, b in zip(first, second))
    assert any(len(t) == 6 and (t[0].float() - t[1].float()).abs().max() > 0.01 for t in first)
    assert not any(t.requires_grad for t in first)
    if name in ALONE and len(first) > 1 and first[0].shape == first[1].shape:  # two views of an image
        assert ((first[0] - first[1]).flatten(1).abs().amax(1) > 0.01).all()


@pytest.fixture
def no_autocast(monkeypatch):
    """The meta device knows none."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())


@pytest.mark.parametrize("name", NAMES)
def test_stays_on_its_device_and_reads_nothing_back(name, no_autocast):
    """On the "meta" device tensors have no values: a CPU tensor among them, or a value that is asked for, is an error
    there, and an error or a wait on a GPU. With little else than the method: what has no values takes its time, too."""
    method = make_on(name, tiny_encoder(stages=2), 1, 64, Flip()).train().to("meta")
    out = method(*method.views(torch.rand(9, 1, 64, 64, device="meta")))
    out["loss"].backward()
    method.after_step([detached(out)], 0.5)
    assert all(value.device.type == "meta" for value in out.values() if isinstance(value, torch.Tensor))


@pytest.mark.parametrize("name", NAMES)
def test_copies_share_nothing_and_what_is_exported_is_an_encoder(name):
    """A method can be copied: no hook or closure still points at the original's tensors."""
    method = make(name).train()
    assert getattr(method, "exported", method.encoder).state_dict().keys() == tiny_encoder().state_dict().keys()
    twin = copy.deepcopy(method)
    views = views_of(method)
    with torch.no_grad():
        for p in method.parameters():
            p.zero_()
    torch.testing.assert_close(twin(*views)["loss"], make(name).train()(*views)["loss"], atol=1e-5, rtol=1e-5)


HEADS = {                           # beside an encoder of 64 features: how wide the layers are, as the defaults have it
    "simclr": {"projector": "64-512 relu 512-256"},
    "dcl": {"projector": "64-512 norm relu 512-128"},
    "simsiam": {"projector": "64-2048 norm relu 2048-512", "predictor": "512-128 norm relu 128-512"},
    "byol": {"projector": "64-512 norm relu 512-256", "predictor": "256-512 norm relu 512-256",
             "target_projector": "64-512 norm relu 512-256"},
    "vicreg": {"projector": "64-4096 norm relu 4096-4096"},
    "lejepa": {"projector": "64-2048 norm relu 2048-2048 norm relu 2048-128"},
    "swav": {"projector": "64-2048 norm relu 2048-128"},
    "moco": dict.fromkeys(("projector", "key_projector"), "64-64 relu 64-128"),
    "medmoco": dict.fromkeys(("projector", "local_projector", "slow.1", "slow.2"), "64-64 relu 64-128"),
    "rotation": {"head": "64-1024 relu 1024-4"},
    "relative": {"branch": "64-2048 relu norm", "head": "4096-2048 relu 2048-2048 relu 2048-8"},
    "jigsaw": {"branch": "64-512 relu norm", "head": "4608-4096 relu 4096-100"},
    "rubik": {"branch": "64-64 relu norm", "order_head": "576-1024 relu 1024-1024 relu 1024-100",
              **dict.fromkeys(("tile_heads.horizontal", "tile_heads.vertical"), "576-1024 relu 1024-9")},
    "pcrl": {**dict.fromkeys(("projector", "key_projector"), "64-512 relu 512-128"), "control": "6-256 relu 256-64"},
    "spark": {}, "autoencoder": {}, "genesis": {}}                          # see test_spark and test_encoders
WORDS = {nn.Linear: lambda layer: f"{layer.in_features}-{layer.out_features}",
         nn.BatchNorm1d: lambda layer: "norm", nn.ReLU: lambda layer: "relu"}


@pytest.mark.parametrize("name", HEADS)
def test_heads_have_the_layers_of_their_papers(name):
    method = make_on(name, tiny_encoder(), 1, 64, cheap={"queue_size": 20})
    found = {key: " ".join(WORDS[type(layer)](layer) for layer in net) for key, net in method.named_modules()
             if isinstance(net, nn.Sequential) and len(net) and isinstance(net[0], nn.Linear)}
    assert found == HEADS[name]


def sources():
    return {path.stem: path.read_text() for path in sorted((ROOT / "medssl").glob("[a-z]*.py"))}


def test_every_file_is_a_method_with_a_recipe():
    assert set(sources()) == set(METHODS), "each file of medssl stands in METHODS under its own name, and nothing else"
    for name in ALONE:
        module = sys.modules[METHODS[name].__module__]
        words = {"optimizer", "lr", "weight_decay", "batch", "epochs", "warmup", "views", "size"}
        assert not words - set(module.RECIPE), f"{name}.py: RECIPE needs {words}"
        words = {"views", "lr", "batch", "stem", "steps", *inspect.signature(METHODS[name]).parameters}
        assert not set(module.SMALL) - words, f"{name}.py: SMALL may have {words}"
        assert {module.RECIPE["views"], module.SMALL.get("views", "plain")} <= set(augment.VIEWS), f"{name}.py: views"
        assert module.SMALL.get("stem", "default") in encoders.STEMS, f"{name}.py: stem"


def test_repeated_helpers_are_identical():
    """A function that stands in several method files stands there in the same words: a mend reaches all of them."""
    seen = {}
    for name, text in sources().items():
        lines = text.splitlines()
        for node in ast.parse(text).body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                seen.setdefault(node.name, {})[name] = "\n".join(lines[node.lineno - 1:node.end_lineno])
    for helper, copies in seen.items():
        assert len(set(copies.values())) == 1, f"{helper} differs between {', '.join(copies)}: copy it word for word"


def test_the_method_of_the_contract_is_one():
    """The lines that the contract begins with do what rotation.py does."""
    names = {"torch": torch, "nn": nn, "F": F, "math": math}
    exec(textwrap.dedent(medssl.__doc__[medssl.__doc__.index("    class Rotation"):].split("\nThe rules:")[0]), names)
    method = names["Rotation"](tiny_encoder(), lambda images: images)
    views, turns = views_of(method)
    assert torch.equal(views, rotation.rotate(batch(9), turns)) and len(turns.unique()) > 1
    method(views, turns)["loss"].backward()
    assert method.encoder.conv1.weight.grad.abs().max() > 0
