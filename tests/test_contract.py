"""What every method must be. A method that is added to METHODS is put through all of this with no line written here."""

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
from medssl.common import augment, encoders, unet
from tests.common import Flip, batch, tiny_encoder

ROOT = Path(__file__).parents[1]
NAMES = [name for name in METHODS if name != "together"] + ["rotation+byol", "spark+medmoco"]
# heads of the methods that make() builds: L a linear layer or convolution, N a norm, R a ReLU; and how many weights
HEADS = {
    "simclr": {"projector": "LRL 2608"},
    "dcl": {"projector": "LNRL 2672"},
    "simsiam": {"projector": "LNRL 2672", "predictor": "LNRL 296"},
    "byol": {"projector": "LNRL 2672", "predictor": "LNRL 1136", "target_projector": "LNRL 2672"},
    "vicreg": {"projector": "LNRL 2672"},
    "lejepa": {"projector": "LNRLNRL 3792"},
    "swav": {"projector": "LNRL 2672"},
    "moco": {"projector": "LRL 5200", "key_projector": "LRL 5200"},
    "medmoco": {"projector": "LRL 5200", "local_projector": "LRL 5200"},
    "spark": {"tokens": " 120", "norms": "NNNN 240", "projections": "LLLL 8156", "head": "L 2"},
    "rotation": {"head": "LRL 2212"},
    "relative": {"branch": "LRN 2144", "head": "LRLRL 3400"},
    "jigsaw": {"branch": "LRN 2144", "head": "LRL 9578"},
    "rubik": {"branch": "LRN 2144", "order_head": "LRLRL 10634", "tile_heads": "LRLLRL 19090"},
    "pcrl": {"projector": "LRL 2608", "control": "LRL 18240", "key_projector": "LRL 2608"},
}
# options that make a method cheap, where it has them
CHEAP = {"queue_size": 20, "hidden": 32, "dim": 16, "prototypes": 10, "freeze": 0, "crops": 2, "width": 32,
         "permutations": 10, "regions": 4, "predictor_hidden": 32, "bottleneck": 8}


def make(name, channels=1, size=64, stem="default", stages=4):
    torch.manual_seed(0)
    return make_on(name, tiny_encoder(channels, stem, stages=stages), channels, size)


def make_on(name, encoder, channels, size, views=None):
    views = views or augment.build("contrastive", size)
    if "+" in name:
        parts = {part: make_on(part, encoder, channels, size, views) for part in name.split("+")}
        return METHODS["together"](encoder, None, parts)
    words = inspect.signature(METHODS[name]).parameters
    filled = {word: value for word, value in CHEAP.items() if word in words}
    filled |= {word: value for word, value in {"channels": channels, "mean": [0.4] * channels}.items() if word in words}
    if "small" in words:
        filled["small"] = augment.build("contrastive", 32)
    if "decoder" in words:
        filled["decoder"] = unet.Decoder(encoder.widths, encoder.strides, channels)
    return METHODS[name](encoder, views, **filled)


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
    second = method(*views)
    assert first["loss"].ndim == 0 and first["loss"].isfinite() and first["loss"].requires_grad
    assert torch.equal(first["loss"], second["loss"])
    for word in ("embedding", "restored"):
        assert word not in first or not first[word].requires_grad, word
    assert first["loss"].dtype == torch.float32
    assert torch.as_tensor(first.get("chance", 0.0)).isfinite()


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
    out["loss"].backward()
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
    assert any(len(t) == 6 and not torch.equal(t[0], t[1]) for t in first)
    assert not any(t.requires_grad for t in first)


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
    """On the "meta" device tensors have no values: a CPU tensor among them, or a value that is asked for, is an error
    there, and an error or a wait on a GPU. With little else than the method: what has no values takes its time, too."""
    method = make_on(name, tiny_encoder(stages=2), 1, 64, Flip()).train().to("meta")
    words = inspect.signature(method.views).parameters
    groups = {"groups": torch.arange(9, device="meta") // 2} if "groups" in words else {}
    out = method(*method.views(torch.rand(9, 1, 64, 64, device="meta"), **groups))
    out["loss"].backward()
    method.after_step([detached(out)], 0.5)
    assert all(value.device.type == "meta" for value in out.values() if isinstance(value, torch.Tensor))


def sources():
    return {path.stem: path.read_text() for path in sorted((ROOT / "medssl").glob("[a-z]*.py"))}


RESERVED = {"views", "lr", "batch", "stem", "steps"}                       # in SMALL, beside words of the constructor
PARAGRAPHS = {
    "The idea.": "a paragraph that starts so and says what the network has to find out",
    "The algorithm.": "a paragraph that starts so, with numbered equations",
    "Shapes.": "a paragraph that starts so and follows the tensors from images to loss",
    "Differences.": "a paragraph that starts so: items of Paper, Released code, Here",
}


def test_every_file_is_a_method_with_header_and_recipe():
    assert set(sources()) == set(METHODS), "each file of medssl stands in METHODS under its own name, and nothing else"
    for name, text in sources().items():
        header = ast.get_docstring(ast.parse(text))
        for words, wanted in PARAGRAPHS.items():
            assert words.lower() in header.lower(), f"{name}.py: its header lacks '{words}': {wanted}"
        if name != "together":
            recipe, small = module(name).RECIPE, getattr(module(name), "SMALL", None)
            missing = {"optimizer", "lr", "weight_decay", "batch", "epochs", "warmup", "views", "size"} - set(recipe)
            assert not missing, f"{name}.py: RECIPE says nothing of {missing}"
            assert recipe["views"] in augment.VIEWS, f"{name}.py: RECIPE's views are none of common/augment.py"
            assert small is not None, f"{name}.py: SMALL is missing; it may be empty, see medssl/__init__.py"
            strange = set(small) - set(inspect.signature(METHODS[name]).parameters) - RESERVED
            assert not strange, f"{name}.py: SMALL has {strange}: no words of the constructor, and none of {RESERVED}"
            assert small.get("views", "plain") in augment.VIEWS and small.get("stem", "default") in encoders.STEMS


def module(name):
    return sys.modules[METHODS[name].__module__]


def test_methods_import_only_torch_and_the_standard_library():
    for name, text in sources().items():
        for node in ast.walk(ast.parse(text)):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not (isinstance(node, ast.ImportFrom) and node.level), f"{name}.py imports from a neighbour"
            for top in (imported.split(".")[0] for imported in names):
                assert top == "torch" or top in sys.stdlib_module_names, f"{name}.py imports {top}"


def test_repeated_helpers_are_identical():
    """A function that stands in several method files stands there in the same words: a mend reaches all of them."""
    seen = {}
    for name, text in sources().items():
        lines = text.splitlines()
        for node in ast.parse(text).body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                seen.setdefault(node.name, {})[name] = "\n".join(lines[node.lineno - 1:node.end_lineno])
    for helper, copies in seen.items():
        files = ", ".join(f"{name}.py" for name in copies)
        assert len(set(copies.values())) == 1, (f"{helper} differs between {files}: copy it word for word, comments "
                                                "included, or name it otherwise where it does something else")


def heads(method):
    letters = {nn.Linear: "L", nn.Conv2d: "L", nn.BatchNorm1d: "N", nn.BatchNorm2d: "N", nn.ReLU: "R"}
    return {name: "".join(letters.get(type(layer), "") for layer in head.modules())
            + f" {sum(p.numel() for p in head.parameters())}" for name, head in method.named_children()
            if not name.endswith(("encoder", "decoder")) and name not in ("slow", "ups")}


@pytest.mark.parametrize("name", HEADS)
def test_heads_have_the_layers_of_their_paper(name):
    assert heads(make(name)) == HEADS[name]


def test_an_exported_encoder_is_an_encoder():
    for name in NAMES:
        method = make(name)
        encoder = getattr(method, "exported", method.encoder)
        assert encoder.state_dict().keys() == tiny_encoder().state_dict().keys()


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


@pytest.mark.parametrize("name", NAMES)
def test_two_views_of_an_image_are_drawn_apart(name):
    x1, x2, *_ = *views_of(make(name)), None
    if isinstance(x1, torch.Tensor) and isinstance(x2, torch.Tensor) and x1.shape == x2.shape:
        assert (x1 != x2).flatten(1).any(1).all()


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
