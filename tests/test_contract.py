"""What every method must be. A method that is added to METHODS is put through all of this without a line written here."""

import ast
import contextlib
import copy
import inspect
import re
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from medssl import METHODS
from medssl.common import augment, unet
from tests.common import batch, tiny_encoder

ROOT = Path(__file__).parents[1]
NAMES = [name for name in METHODS if name != "together"] + ["rotation+byol", "spark+medmoco"]
SMALL = {"queue_size": 20, "hidden": 32, "dim": 16, "prototypes": 10, "freeze": 0, "crops": 2, "width": 32, "permutations": 10, "regions": 4,
         "predictor_hidden": 32, "bottleneck": 8}                           # options that make a method cheap, where it has them


def make(name, channels=1, size=64, stem="default"):
    torch.manual_seed(0)
    encoder = tiny_encoder(channels, stem)
    if "+" in name:
        return METHODS["together"](encoder, None, {part: make_on(part, encoder, channels, size) for part in name.split("+")})
    return make_on(name, encoder, channels, size)


def make_on(name, encoder, channels, size):
    words = inspect.signature(METHODS[name]).parameters
    filled = {word: value for word, value in SMALL.items() if word in words}
    if "channels" in words:
        filled["channels"] = channels
    if "small" in words:
        filled["small"] = augment.build("contrastive", 32)
    if "decoder" in words:
        filled["decoder"] = unet.Decoder(encoder.widths, encoder.strides, channels)
    return METHODS[name](encoder, augment.build("contrastive", size), **filled)


def views_of(method, count=9, channels=1, size=64, seed=1):
    torch.manual_seed(seed)
    words = inspect.signature(method.views).parameters
    given = {"groups": torch.arange(count) // 2} if "groups" in words else {}
    return method.views(batch(count, channels, size), **given)


def state(method):
    return {name: value.clone() for name, value in method.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def detached(out):
    return {k: v.detach() if isinstance(v, torch.Tensor) else v for k, v in out.items()}


@pytest.mark.beside
@pytest.mark.parametrize("name", NAMES)
def test_forward_is_deterministic_and_changes_only_running_statistics(name):
    method = make(name).train()
    views = views_of(method)
    before = state(method)
    first = method(*views)
    after = state(method)
    changed = [key for key in before if not torch.equal(before[key], after[key])]
    assert all(re.search(r"running_(mean|var)$|num_batches_tracked$", key) for key in changed), changed
    second = method(*views)
    assert first["loss"].ndim == 0 and first["loss"].isfinite() and first["loss"].requires_grad
    assert torch.equal(first["loss"], second["loss"])
    for word in ("embedding", "restored"):
        assert word not in first or not first[word].requires_grad, word
    assert first["loss"].dtype == torch.float32
    untrained = float(torch.as_tensor(first.get("chance", 1.0)))
    assert 0 < untrained < 50


@pytest.mark.beside
@pytest.mark.parametrize("name", NAMES)
def test_every_trainable_parameter_gets_a_gradient(name):
    method = make(name).train()
    method(*views_of(method))["loss"].backward()
    dead = []
    for key, p in method.named_parameters():
        if p.requires_grad:
            assert p.grad is not None and p.grad.isfinite().all(), key
            if p.grad.abs().max() == 0:
                dead.append(key)
    # a bias that is followed by a norm, or by a softmax over the same shift, cannot matter
    assert all(key.endswith("bias") for key in dead), dead


@pytest.mark.beside
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


@pytest.mark.beside
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("channels,size,stem,count", [(3, 64, "default", 5), (1, 96, "default", 4), (1, 32, "small", 6)])
def test_channels_sizes_and_odd_batches(name, channels, size, stem, count):
    method = make(name, channels, size, stem).train()
    out = method(*views_of(method, count, channels, size))
    assert out["loss"].isfinite()
    out["loss"].backward()
    if "restored" in out:
        assert out["restored"].shape == (count, channels, size, size)


@pytest.mark.beside
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
    assert any(len(t) == 6 and not torch.equal(t[0], t[1]) for t in first)
    assert not any(t.requires_grad for t in first)


@pytest.mark.beside
@pytest.mark.parametrize("name", NAMES)
def test_evaluation_mode_changes_nothing(name):
    method = make(name)
    views = views_of(method)
    method.eval()
    before = state(method)
    with torch.no_grad():
        assert method(*views)["loss"].isfinite()
    assert same(before, state(method))


@pytest.fixture
def no_autocast(monkeypatch):
    """The meta device knows none."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())


@pytest.mark.parametrize("name", NAMES)
def test_stays_on_its_device_and_reads_nothing_back(name, no_autocast):
    """On the "meta" device tensors have no values: a CPU tensor among them, or a value that is asked for, is an error there, and an error or a wait
    on a GPU."""
    method = make(name).train().to("meta")
    words = inspect.signature(method.views).parameters
    groups = {"groups": torch.arange(9, device="meta") // 2} if "groups" in words else {}
    out = method(*method.views(torch.rand(9, 1, 64, 64, device="meta"), **groups))
    out["loss"].backward()
    method.after_step([detached(out)], 0.5)
    assert all(value.device.type == "meta" for value in out.values() if isinstance(value, torch.Tensor))


def sources():
    return {path.stem: path.read_text() for path in sorted((ROOT / "medssl").glob("*.py")) if path.stem not in ("__init__", "__main__")}


def test_every_file_is_a_method_with_header_and_recipe():
    names = set(sources())
    assert names == set(METHODS)
    for name, text in sources().items():
        header = ast.get_docstring(ast.parse(text))
        for word in ("The idea.", "The algorithm.", "Shapes.", "Differences", "ccumulation"):
            assert word in header, f"{name}.py: its header lacks '{word}'"
        if name != "together":
            recipe = sys.modules[f"medssl.{name}"].RECIPE
            assert {"optimizer", "lr", "weight_decay", "batch", "epochs", "warmup", "views", "size"} <= set(recipe), name
            assert recipe["views"] in augment.RECIPES


def test_methods_import_only_torch_and_the_standard_library():
    for name, text in sources().items():
        for node in ast.walk(ast.parse(text)):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module] if isinstance(node, ast.ImportFrom) else []
            assert not (isinstance(node, ast.ImportFrom) and node.level), f"{name}.py imports from a neighbour"
            for module in modules:
                top = module.split(".")[0]
                assert top == "torch" or top in sys.stdlib_module_names, f"{name}.py imports {module}"


def test_repeated_helpers_are_identical():
    """A function that stands in several method files stands there in the same words, so that a mend reaches all of them."""
    seen = {}
    for name, text in sources().items():
        for node in ast.parse(text).body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                seen.setdefault(node.name, {})[name] = ast.get_source_segment(text, node)
    for helper, copies in seen.items():
        assert len(set(copies.values())) == 1, f"{helper} differs between {', '.join(copies)}"


def test_the_loop_names_no_method():
    for file in ("loop.py", "feed.py", "optim.py", "evaluation/readouts.py"):
        text = (ROOT / "medssl/common" / file).read_text()
        words = set(re.findall(r"[a-z]+", text.lower()))
        assert not words & (set(METHODS) - {"together", "relative"}), file


@pytest.mark.beside
def test_an_exported_encoder_is_an_encoder():
    for name in NAMES:
        method = make(name)
        encoder = getattr(method, "exported", method.encoder)
        assert encoder.state_dict().keys() == tiny_encoder().state_dict().keys()


@pytest.mark.beside
def test_copies_share_nothing():
    """A method can be copied: no hook or closure still points at the original's tensors."""
    for name in NAMES:
        method = make(name).train()
        twin = copy.deepcopy(method)
        views = views_of(method)
        with torch.no_grad():
            for p in method.parameters():
                p.zero_()
        assert twin(*views)["loss"].isfinite()
        assert any(p.abs().sum() > 0 for p in twin.parameters())
        fresh = make(name).train()
        assert torch.allclose(twin(*views)["loss"], fresh(*views)["loss"], atol=1e-5), name


@pytest.mark.beside
@pytest.mark.parametrize("name", NAMES)
def test_two_views_of_an_image_are_drawn_apart(name):
    x1, x2, *_ = *views_of(make(name)), None
    if isinstance(x1, torch.Tensor) and isinstance(x2, torch.Tensor) and x1.shape == x2.shape:
        assert (x1 != x2).flatten(1).any(1).all()


@pytest.mark.beside
@pytest.mark.parametrize("name", ["moco", "medmoco", "pcrl"])
def test_keys_come_from_the_slow_networks_alone(name):
    method = make(name).eval()
    views = views_of(method)
    with torch.no_grad():
        keys = method(*views)["keys"]
        for p in method.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p))
        assert torch.equal(method(*views)["keys"], keys)
