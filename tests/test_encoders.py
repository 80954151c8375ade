"""The encoder equals torchvision's to the number, and weights go in and out under the same names."""

import contextlib
import functools
import importlib
import json
import math
import pickle
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from medssl import byol, moco, together
from medssl.common import encoders, files
from medssl.common.errors import UserError
from tests.common import Flip, golden, tiny_encoder


def fill(encoder, rule):
    """The deterministic weights that the golden numbers were computed with (see tests/golden/README.md)."""
    for i, (name, p) in enumerate(encoder.named_parameters()):
        k = torch.arange(p.numel(), dtype=torch.float64)
        if rule == "square" and p.ndim > 1:
            k = k.square_().remainder_(1000003)
        values = k.mul_(0.37).add_(i).sin_().mul_(0.05).add_(p.ndim == 1 and name.endswith("weight"))
        p.data = values.view_as(p).float()
    persistent = encoder.state_dict().keys() - dict(encoder.named_parameters()).keys()
    for i, (name, b) in enumerate((n, b) for n, b in encoder.named_buffers() if n in persistent):
        k = torch.arange(b.numel(), dtype=torch.float64)
        if name.endswith("running_mean"):
            b.copy_((0.02 * torch.cos(0.11 * k + i)).float())
        elif name.endswith("running_var"):
            b.copy_((1 + 0.1 * torch.sin(0.23 * k + i) ** 2).float())
    return encoder


@pytest.fixture
def undrawn(monkeypatch):
    """Weights that are filled or loaded need not be drawn first: of large networks that takes long."""
    monkeypatch.setattr(torch.nn.init, "kaiming_normal_", lambda weight, *args, **words: weight)
    monkeypatch.setattr(torch.nn.Conv2d, "reset_parameters", lambda conv: None)


@functools.cache
def filled(name, rule):
    return fill(encoders.build(name, 3), rule).state_dict()


@pytest.mark.parametrize("name,tag", [("resnet18", "rgb"), ("resnet18", "gray"), ("resnet50", "rgb")])
def test_equals_torchvision(name, tag, undrawn):
    numbers = golden(name)
    for case in ("linear_eval", "square_train") if name == "resnet18" else ("square_train",):
        encoder = encoders.build(name, 3)
        encoder.load_state_dict(filled(name, case.split("_")[0]))
        assert sum(p.numel() for p in encoder.parameters()) == numbers["parameter_count"]
        if tag == "gray":
            color, encoder = encoder, encoders.build(name, 1)
            matched, total = encoders.load(color.state_dict(), encoder)
            assert matched == total == len(encoder.state_dict())
        encoder.train(case.endswith("train"))
        with torch.no_grad():
            maps = encoder.features(torch.from_numpy(numbers[f"{tag}_input"]).float())
        least = 2e-4 if name == "resnet50" and case.endswith("train") else 1e-5
        allowed = np.maximum(10 * numbers[f"{tag}_{case}_float32_error"], least)
        for i, m in enumerate(maps):
            wanted = numbers[f"{tag}_{case}_slice"][i]
            assert tuple(m.shape[1:]) == tuple(numbers["shapes"][i][-3:])
            found = m.flatten()[numbers["slice_index"][i]].numpy()
            assert np.abs(found - wanted).max() <= allowed[i] * np.abs(wanted).max() * 3
        pooled = numbers[f"{tag}_{case}_pooled"]
        assert np.abs(maps[-1].mean((2, 3)).numpy() - pooled).max() <= allowed[4] * np.abs(pooled).max()
    assert encoder.widths == [m.shape[1] for m in maps] and encoder.dim == maps[-1].shape[1]
    assert encoder.strides == [4, 8, 16, 32]


@pytest.mark.parametrize("stem,strides", [
    ("default", [4, 8, 16, 32]), ("nopool", [2, 4, 8, 16]), ("small", [1, 2, 4, 8])])
def test_stems_have_the_stated_strides(stem, strides):
    encoder = tiny_encoder(2, stem)
    maps = encoder.features(torch.rand(2, 2, 64, 96))
    assert encoder.strides == strides
    assert [m.shape[2:] for m in maps] == [(64 // s, 96 // s) for s in strides]
    assert encoder(torch.rand(1, 2, 33, 47)).shape == (1, encoder.dim)


def test_standardises_inside():
    plain = tiny_encoder(2).eval()
    scaled = encoders.ResNet(encoders.BasicBlock, (1, 1, 1, 1), 8, 2, mean=(0.2, 0.5), std=(0.1, 0.3)).eval()
    scaled.load_state_dict(plain.state_dict())                              # mean and std are not weights
    x = torch.rand(2, 2, 64, 64)
    by_hand = (x - torch.tensor([0.2, 0.5]).view(1, 2, 1, 1)) / torch.tensor([0.1, 0.3]).view(1, 2, 1, 1)
    assert torch.allclose(scaled(x), plain(by_hand), atol=1e-6)
    with pytest.raises(ValueError, match="one a channel"):
        encoders.ResNet(encoders.BasicBlock, (1, 1, 1, 1), 8, 2, mean=(0.2,))


def under(prefix, state):
    return {f"{prefix}{key}": value for key, value in state.items()}


HEAD = {"0.weight": torch.ones(3, 3), "0.bias": torch.ones(3), "3.weight": torch.ones(2, 3)}
NUMBERS = {"conv1": "0", "bn1": "1", "layer1": "4", "layer2": "5", "layer3": "6", "layer4": "7"}

# What libraries write: (the trained network's state dict, its slow copy's) -> the file's content.
FOREIGN = {
    "torchvision": lambda own, slow: own | under("fc.", HEAD),
    "MoCo": lambda own, slow: {"epoch": 3, "arch": "resnet50", "optimizer": {"state": {0: {"m": HEAD["0.bias"]}}},
                               "state_dict": under("module.encoder_k.", slow) | under("module.encoder_q.", own)
                               | under("module.encoder_q.fc.", HEAD) | {"module.queue": torch.ones(4, 4)}},
    "MoCo v3": lambda own, slow: {"state_dict": under("module.momentum_encoder.", slow)
                                  | under("module.base_encoder.", own)},
    "Lightning": lambda own, slow: {"state_dict": under("target_network.encoder.", slow)
                                    | under("online_network.encoder.", own) | under("online_network.projector.", HEAD)},
    "solo-learn": lambda own, slow: {"state_dict": under("backbone.", own) | under("momentum_backbone.", slow)
                                     | under("projector.", HEAD) | {"classifier.weight": torch.ones(2, 3)}},
    "lightly": lambda own, slow: under("backbone_momentum.", slow) | under("backbone.", own) | under("head.", HEAD),
    "lightly, numbered": lambda own, slow: {"state_dict": under("projection_head.layers.", HEAD) | under(
        "backbone.", {f"{NUMBERS[key.split('.')[0]]}.{key.split('.', 1)[1]}": value for key, value in own.items()})},
    "SwAV": lambda own, slow: under("module.", own | under("projection_head.", HEAD)
                                    | {"prototypes.weight": HEAD["0.bias"]}),
    "SparK": lambda own, slow: {"module": under("sparse_encoder.sp_cnn.", own) | under("dense_decoder.dec.", HEAD)},
    "DINO": lambda own, slow: {"student": under("module.backbone.", slow), "teacher": under("backbone.", own)
                               | under("head.mlp.", HEAD)},
    "model_state_dict": lambda own, slow: {"model_state_dict": under("net.", own)},
    "method": lambda own, slow: {"model": under("method.encoder.", own) | under("method.ema.", slow)},
    "segmentation": lambda own, slow: under("encoder.", own) | under("decoder.blocks.", HEAD) | under("head.", HEAD),
    "twice the same": lambda own, slow: under("encoder.", own) | under("parts.simclr.encoder.", own),
}


@pytest.mark.parametrize("library", FOREIGN)
def test_finds_the_network_in_what_libraries_save(library, tmp_path):
    source, slow, target, notes = tiny_encoder(3), tiny_encoder(3), tiny_encoder(3), []
    torch.save(FOREIGN[library](source.state_dict(), slow.state_dict()), tmp_path / "file.pth")
    assert encoders.load(tmp_path / "file.pth", target, notes.append) == (len(source.state_dict()),) * 2
    assert all(torch.equal(value, source.state_dict()[key]) for key, value in target.state_dict().items())
    if library == "MoCo":
        assert "under state_dict.module.encoder_q.; left out: optimizer (1), encoder_k (" in notes[1]
        assert "fc (3), queue (1)" in notes[1] and "epoch" not in notes[1]


@pytest.mark.parametrize("name", ["moco", "byol", "together"])
def test_loads_a_checkpoint_of_our_own(name, tmp_path):
    encoder, target, notes = tiny_encoder(), tiny_encoder(), []
    parts = {"moco": moco.MoCo(encoder, Flip(), queue_size=8), "byol": byol.BYOL(encoder, Flip())}
    method = parts[name] if name in parts else together.Together(encoder, None, parts)
    for key, value in method.named_parameters():
        if "key_" in key or "target_" in key:
            value.data += 1                                                 # the copy has moved away
    adam = {"state": {i: {"exp_avg": p.data} for i, p in enumerate(method.parameters())}, "param_groups": [{"lr": 1.0}]}
    torch.save({"step": 1, "config": {"lr": 1.0}, "method": method.state_dict(), "optimizer": adam},
               tmp_path / "checkpoint.pt")
    matched, total = encoders.load(tmp_path / "checkpoint.pt", target, notes.append)
    assert matched == total and torch.equal(target.conv1.weight, encoder.conv1.weight)
    assert "under method.encoder.; left out: " in notes[-1]


def test_refuses_what_is_ambiguous_and_says_where_it_looked(tmp_path):
    one, two, target = tiny_encoder(), tiny_encoder(), tiny_encoder()
    before = target.conv1.weight.clone()
    with pytest.raises(ValueError, match=r"more than once, under left\. and right\.: save the one"):
        encoders.load(under("left.", one.state_dict()) | under("right.", two.state_dict()), target)
    deep = encoders.ResNet(encoders.BasicBlock, (1, 1, 2, 1), 8)
    with pytest.raises(ValueError, match=r"under net\.: 12 unexpected \(first: net\.layer3\.1\.conv1\.\w+\); choose"):
        encoders.load({"net": deep.state_dict()}, target)
    with pytest.raises(ValueError, match=r"10 missing \(first: layer3\.1\.conv1\.weight\); choose the encoder"):
        encoders.load(target.state_dict(), deep)
    with pytest.raises(ValueError, match=r"under a\.b\.: 60 of another shape \(first: conv1.weight 4x1x7x7, here"):
        encoders.load({"a": under("b.", tiny_encoder(width=4).state_dict())}, target)
    for other in ("patch_embed.weight", "conv1.weight"):
        with pytest.raises(ValueError, match="a network of another kind") as said:
            encoders.load({other: torch.ones(8, 1, 7, 7)}, target)
        assert "choose" not in str(said.value)
    for nothing in ({}, {"epoch": 3}):
        with pytest.raises(ValueError, match="not a state dict of tensors"):
            encoders.load(nothing, target)
    circle = {}
    circle["again"] = circle
    with pytest.raises(ValueError, match="not a state dict"):
        encoders.load(circle, target)
    with pytest.raises(ValueError, match="encoder: 10 missing") as said:
        encoders.load(tiny_encoder(3).state_dict(), deep)
    assert "another shape" not in str(said.value)                           # channels are converted
    with pytest.raises(ValueError, match="conv1.weight 3, here"):
        encoders.load(one.state_dict() | {"conv1.weight": torch.ones(3)}, target)
    assert torch.equal(before, target.conv1.weight)


def test_what_is_left_out_is_said():
    notes, full, short = [], tiny_encoder(), encoders.ResNet(encoders.BasicBlock, (1, 1, 1), 8)
    encoders.load(full.state_dict(), short, notes.append)
    assert notes == [f"taken: the tensors under no prefix; left out: layer4 ({len(full.layer4.state_dict())})"]
    encoders.load(short.state_dict(), short, notes.append)
    assert len(notes) == 1                                                  # all was taken: nothing to say
    with pytest.raises(ValueError, match="missing.*layer4"):
        encoders.load(short.state_dict(), full)


def test_a_file_knows_what_it_was_made_with(tmp_path):
    """The stems "default" and "nopool" have the same keys and shapes, and other features."""
    encoder, notes = encoders.build("tiny", 2, "nopool", (0.1, 0.2), (0.3, 0.4)), []
    encoder.size = 96
    encoders.save(encoder, tmp_path / "encoder.pt")
    known = {"name": "tiny", "stem": "nopool", "channels": 2, "size": 96, "mean": [0.1, 0.2], "std": [0.3, 0.4]}
    assert encoders.about(tmp_path / "encoder.pt") == json.loads((tmp_path / "encoder.json").read_text()) == known
    encoders.load(tmp_path, encoders.build("tiny", 2, "nopool"), notes.append)
    assert not notes
    for path in (tmp_path, tmp_path / "encoder.pt"):
        with pytest.raises(ValueError, match=r"encoder\.pt: was made with stem nopool.* stem default.*--stem nopool"):
            encoders.load(path, encoders.build("tiny", 2, "default"))
    with pytest.raises(ValueError, match="made with name tiny and stem small"):
        encoders.save(encoders.build("tiny", 2, "small"), tmp_path / "small.pt")
        encoders.load(tmp_path / "small.pt", encoders.ResNet(encoders.BasicBlock, (2, 2, 2, 2), 8, 2, "small"))
    (tmp_path / "encoder.json").write_text("[")
    with pytest.raises(ValueError, match=r"encoder\.json: damaged"):
        encoders.about(tmp_path / "encoder.pt")


def test_a_file_without_a_neighbour(tmp_path):
    notes, run = [], tmp_path / "run"
    run.mkdir()
    for path in (tmp_path / "bare.pth", run / "encoder.pt", run / "encoder-9.pt", run / "encoder_of_others.pt"):
        torch.save(tiny_encoder().state_dict(), path)
    (run / "config.json").write_text(json.dumps({"encoder": {"name": "tiny", "stem": "nopool"}}))     # an older run
    encoders.load(run, tiny_encoder(stem="nopool"), notes.append)
    encoders.load(run / "encoder-9.pt", tiny_encoder(stem="nopool"), notes.append)
    assert not notes
    with pytest.raises(ValueError, match="was made with stem nopool"):
        encoders.load(run / "encoder-9.pt", tiny_encoder())
    for path, stem in ((tmp_path / "bare.pth", "default"), (run / "encoder_of_others.pt", "nopool")):
        encoders.load(path, tiny_encoder(stem=stem), notes.append)
        assert notes[-1].startswith(f"{path} does not say its stem") and notes[-1].endswith(f"{stem} is assumed")
    assert len(notes) == 2


def test_a_resnet_without_its_last_stage():
    encoder = encoders.build("resnet18-3stages", 3)
    assert (encoder.widths, encoder.strides, encoder.dim) == ([64, 128, 256], [4, 8, 16], 256)
    assert encoder(torch.rand(1, 3, 64, 64)).shape == (1, 256)
    assert {key.split(".")[0] for key in encoder.state_dict()} == {"conv1", "bn1", "layer1", "layer2", "layer3"}


@pytest.mark.parametrize("name,channels,stem", [
    ("resnet18", 3, "default"), ("resnet18", 1, "default"), ("resnet18", 3, "nopool"), ("resnet18", 1, "small"),
    ("resnet18-3stages", 1, "default")])
def test_how_other_libraries_open_a_file(name, channels, stem, tmp_path, undrawn):
    """The code is run: with the libraries that are installed, and with a stand-in for torchvision."""
    def stand_in():
        network = encoders.build("resnet18", 3)
        network.fc = torch.nn.Linear(512, 1000)
        network.features = lambda x: encoders.ResNet.features(network, x)
        network.register_buffer("shift", torch.zeros(1, 1, 1, 1), persistent=False)
        network.register_buffer("scale", torch.ones(1, 1, 1, 1), persistent=False)
        return network

    encoder = encoders.build(name, channels, stem).eval()
    for p in encoder.parameters():
        if p.ndim == 4:
            p.data.uniform_(-0.05, 0.05)
    encoders.save(encoder, tmp_path / "encoder.pt")
    code = encoders.opened_by(encoder, tmp_path / "encoder.pt")
    wanted = {"resnet18-3stages": ["torchvision"]}.get(name, ["torchvision", "monai"] + ["timm"] * (stem != "small"))
    assert list(code) == wanted
    x, seen = torch.rand(2, channels, 64, 64), []
    assert encoder(x).mean() > 0.01
    for library, lines in code.items():
        fake = {"torchvision": SimpleNamespace(models=SimpleNamespace(resnet18=stand_in))}
        try:
            module = importlib.import_module(library)
            importlib.import_module({"monai": "monai.networks.nets"}.get(library, library))
        except ImportError:
            module = fake.get(library)
        if module:
            words = {"torch": torch, library: module}
            exec(lines, words)
            torch.testing.assert_close(words["net"].eval()(x), encoder(x), atol=1e-5, rtol=1e-5)
            seen.append(library)
    assert "torchvision" in seen
    assert encoders.opened_by(encoders.build("tiny"), "x.pt") == encoders.opened_by(tiny_encoder(), "x.pt") == {}


def test_loads_what_others_saved(tmp_path):
    source, target = tiny_encoder(3), tiny_encoder(3)
    wrapped = under("module._orig_mod.", source.state_dict() | {"fc.weight": torch.zeros(2, 64)})
    torch.save({"state_dict": wrapped}, tmp_path / "wrapped.pth")
    assert encoders.load(tmp_path / "wrapped.pth", target) == (len(source.state_dict()),) * 2
    x = torch.rand(2, 3, 64, 64)
    assert torch.equal(source.eval()(x), target.eval()(x))

    gray = tiny_encoder(1)
    encoders.load(source.state_dict(), gray)
    one = torch.rand(2, 1, 64, 64)
    assert torch.allclose(gray.eval()(one), source(one.expand(-1, 3, -1, -1)), atol=1e-5)
    back = tiny_encoder(3)
    encoders.load(gray.state_dict(), back)
    assert torch.allclose(back.eval()(one.expand(-1, 3, -1, -1)), gray(one), atol=1e-5)

    encoders.save(source, tmp_path / "encoder.pt")
    assert torch.load(tmp_path / "encoder.pt", weights_only=True).keys() == source.state_dict().keys()


def test_refuses_what_does_not_fit(tmp_path):
    with pytest.raises(ValueError, match=r"missing.*layer1"):
        state = {k: v for k, v in tiny_encoder().state_dict().items() if not k.startswith("layer1")}
        encoders.load(state, tiny_encoder())
    with pytest.raises(ValueError, match="another shape"):
        encoders.load(tiny_encoder(width=4).state_dict(), tiny_encoder())
    with pytest.raises(ValueError, match="takes 2 channels"):
        encoders.load(tiny_encoder(2).state_dict(), tiny_encoder(3))
    with pytest.raises(ValueError, match="no such file"):
        encoders.load(tmp_path / "nothing.pt", tiny_encoder())

    class Evil:
        def __reduce__(self):
            return print, ("PWNED",)
    for name, content in (("evil.pt", pickle.dumps({"a": Evil()})), ("empty.pt", b""), ("text.pt", b"hello")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=name):
            files.load_torch(tmp_path / name)
    torch.save({"model": Evil()}, tmp_path / "zip.pt")
    with pytest.raises(ValueError, match="zip.pt"):
        files.load_torch(tmp_path / "zip.pt")


def test_files_are_whole_or_absent(tmp_path):
    (tmp_path / "a.txt").write_text("old")
    with pytest.raises(RuntimeError):
        with files.whole(tmp_path / "a.txt") as temporary:
            temporary.write_text("half")
            raise RuntimeError
    assert (tmp_path / "a.txt").read_text() == "old" and len(list(tmp_path.iterdir())) == 1


def test_whatever_a_damaged_file_raises_becomes_a_line(tmp_path):
    """torch's unpickler trusts that what it reads is well formed."""
    torch.save({"a": torch.zeros(2), "b": {"c": 1}}, tmp_path / "a.pt")
    whole, raised = (tmp_path / "a.pt").read_bytes(), set()
    start = whole.index(b"PK") + 60
    for at in range(start, start + 160, 2):
        (tmp_path / "a.pt").write_bytes(whole[:at] + bytes([whole[at] ^ 3]) + whole[at + 1:])
        with contextlib.suppress(UserError):
            files.load_torch(tmp_path / "a.pt")
        try:
            torch.load(tmp_path / "a.pt", weights_only=True)
        except Exception as error:
            raised.add(type(error).__name__)
    assert raised >= {"UnpicklingError", "RuntimeError"} and len(raised) > 3


def test_a_flipped_bit_among_the_weights_is_found(tmp_path):
    """torch does not look at the checksums that it writes, and would take other weights."""
    torch.save({"a": torch.full((64,), 3.0)}, tmp_path / "a.pt")
    whole = (tmp_path / "a.pt").read_bytes()
    at = whole.index(torch.full((64,), 3.0).numpy().tobytes()) + 101
    (tmp_path / "a.pt").write_bytes(whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1:])
    assert not torch.equal(torch.load(tmp_path / "a.pt", weights_only=True)["a"], torch.full((64,), 3.0))
    with pytest.raises(UserError, match="damaged"):
        files.load_torch(tmp_path / "a.pt")


def test_first_weights_are_scaled_to_their_fan():
    weight = encoders.build("resnet18").layer4[0].conv2.weight
    assert math.isclose(weight.std().item(), math.sqrt(2 / (512 * 9)), rel_tol=0.02)
