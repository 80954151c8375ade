"""The encoder equals torchvision's to the number, and weights go in and out under the same names."""

import argparse
import contextlib
import copy
import functools
import math
import pickle
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from medssl.common import encoders, files, unet
from medssl.common.errors import UserError
from tests.common import golden, tiny_encoder
from tests.test_contract import make


def fill(encoder, rule):
    """The deterministic weights that the golden numbers were computed with (see tests/golden/README.md)."""
    for i, (name, p) in enumerate(encoder.named_parameters()):
        k = torch.arange(p.numel(), dtype=torch.float64)
        if rule == "square" and p.ndim > 1:
            k = k.square_().remainder_(1000003)
        values = k.mul_(0.37).add_(i).sin_().mul_(0.05).add_(p.ndim == 1 and name.endswith("weight"))
        p.data = values.view_as(p).float()
    for i, (name, b) in enumerate((n, b) for n, b in encoder.named_buffers() if n in encoder.state_dict()):
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


def under(prefix, state):
    return {f"{prefix}{key}": value for key, value in state.items()}


HEAD = {"0.weight": torch.ones(3, 3), "0.bias": torch.ones(3), "3.weight": torch.ones(2, 3)}

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
    "SwAV": lambda own, slow: under("module.", own | under("projection_head.", HEAD)
                                    | {"prototypes.weight": HEAD["0.bias"]}),
    "SparK": lambda own, slow: {"module": under("sparse_encoder.sp_cnn.", own) | under("dense_decoder.dec.", HEAD)},
    "DINO": lambda own, slow: {"student": under("module.backbone.", slow), "teacher": under("backbone.", own)
                               | under("head.mlp.", HEAD)},
    "wrapped": lambda own, slow: {"model": under("module._orig_mod.", own)},
    "method": lambda own, slow: {"model": under("method.encoder.", own) | under("method.ema.", slow)},
    "segmentation": lambda own, slow: under("encoder.", own) | under("decoder.blocks.", HEAD),
    "twice the same": lambda own, slow: under("encoder.", own) | under("parts.simclr.encoder.", own),
}


def equal(one, other):
    """Whether two state dicts hold the same."""
    return one.keys() == other.keys() and all(torch.equal(value, other[key]) for key, value in one.items())


@pytest.mark.parametrize("library", FOREIGN)
def test_finds_the_network_in_what_libraries_save(library, tmp_path):
    source, slow, target = tiny_encoder(3), tiny_encoder(3), tiny_encoder(3)
    torch.save(FOREIGN[library](source.state_dict(), slow.state_dict()), tmp_path / "file.pth")
    assert encoders.load(tmp_path / "file.pth", target) == (len(source.state_dict()),) * 2
    assert equal(target.state_dict(), source.state_dict())


@pytest.mark.parametrize("name", ["moco", "byol", "moco+byol"])
def test_loads_a_checkpoint_of_our_own(name, tmp_path):
    method, target, notes = make(name), tiny_encoder(), []
    for key, value in method.named_parameters():
        value.data += "key_" in key or "target_" in key                     # the copy has moved away
    adam = {"state": {i: {"exp_avg": p.data} for i, p in enumerate(method.parameters())}}
    torch.save({"step": 1, "method": method.state_dict(), "optimizer": adam}, tmp_path / "checkpoint.pt")
    encoders.load(tmp_path / "checkpoint.pt", target, notes.append)
    assert equal(target.state_dict(), method.encoder.state_dict()) and "under method.encoder.;" in notes[-1]


def deeper():
    return encoders.ResNet(encoders.BasicBlock, (1, 1, 2, 1), 8)


@pytest.mark.parametrize("state,target,words", [
    (lambda: {"net": deeper().state_dict()}, tiny_encoder, r"net\.layer3\.1\.conv1\.weight is unexpected \(12 faults"),
    (lambda: tiny_encoder(3).state_dict(), deeper, r"encoder: layer3\.1\.conv1\.weight is missing \(10 faults"),
    (lambda: {"a": under("b.", tiny_encoder(width=4).state_dict())}, tiny_encoder,
     r"a\.b\.conv1\.weight is \[4, 1, 7, 7\], here \[8, 1, 7, 7\]"),
    (lambda: tiny_encoder().state_dict() | {"conv1.weight": torch.ones(3)}, tiny_encoder, r"weight is \[3\], here"),
    (lambda: {"patch_embed.weight": torch.ones(8, 1, 7, 7)}, tiny_encoder, "no conv1.weight, but patch_embed.weight"),
    (lambda: {"epoch": 3}, tiny_encoder, "no tensor at all"),
    (lambda: encoders.build("tiny", 3, "small").state_dict(), lambda: encoders.build("tiny", 2),
     "try --encoder tiny --stem small --channels 3"),
    (lambda: tiny_encoder().state_dict(), deeper, "fits no other encoder")])
def test_refuses_what_does_not_fit(state, target, words):
    target = target()
    before = copy.deepcopy(target.state_dict())
    with pytest.raises(UserError, match=words):
        encoders.load(state(), target)
    assert equal(target.state_dict(), before)


@pytest.mark.parametrize("name", encoders.ENCODERS)
@pytest.mark.parametrize("stem", ["default", "small"])
def test_the_kind_of_bare_weights(name, stem):
    with torch.device("meta"):
        state = encoders.build(name, 3, stem).state_dict()
    assert encoders.kind_of({"model": under("module.", state) | under("module.fc.", HEAD)}) == (name, stem)


def test_weights_of_no_kind_are_refused_with_the_nearest():
    state = encoders.build("tiny").state_dict()
    with pytest.raises(UserError, match="those of none of tiny.* stem default: bn1.weight is missing .1 faults.$"):
        encoders.kind_of({key: value for key, value in state.items() if key != "bn1.weight"})


def test_a_file_knows_what_it_was_made_with(tmp_path):
    """The stems "default" and "nopool" have the same keys and shapes, and other features."""
    encoder, notes = encoders.build("tiny", 2, "nopool", (0.1, 0.2), (0.3, 0.4)), []
    encoder.size = 96
    encoders.save(encoder, tmp_path / "encoder.pt")
    known = {"name": "tiny", "stem": "nopool", "channels": 2, "size": 96, "mean": [0.1, 0.2], "std": [0.3, 0.4]}
    assert encoders.about(tmp_path / "encoder.pt") == encoders.about(tmp_path / "checkpoint.pt") == known
    encoders.load(tmp_path, encoders.build("tiny", 2, "nopool"), notes.append)
    assert not notes
    for path in (tmp_path, tmp_path / "encoder.pt"):
        with pytest.raises(UserError, match=r"encoder\.pt: was made with stem nopool.* stem default.*--stem nopool"):
            encoders.load(path, encoders.build("tiny", 2, "default"))
    (tmp_path / "encoder.json").write_text("[")
    with pytest.raises(UserError, match=r"encoder\.json: damaged"):
        encoders.about(tmp_path / "encoder.pt")


def test_what_a_file_leaves_open_is_said(tmp_path):
    notes, full, short = [], tiny_encoder(), tiny_encoder(stages=3)
    torch.save(full.state_dict(), tmp_path / "bare.pth")
    encoders.load(tmp_path / "bare.pth", tiny_encoder(stem="nopool"), notes.append)
    encoders.load(full.state_dict(), short, notes.append)
    encoders.load(short.state_dict(), short, notes.append)                  # all is taken: nothing to say
    assert len(notes) == 2 and "nopool is assumed" in notes[0]
    assert f"left out: {len(full.layer4.state_dict())} others" in notes[1]


@pytest.mark.parametrize("skips", [True, False])
def test_the_decoder_against_a_plain_reading(skips):
    """Each stage: every pixel becomes a square of two by two, the skip beside it, two convolutions."""
    torch.manual_seed(0)
    decoder = unet.Decoder([8, 16], [2, 4], 2, skips).double().eval()
    fine, coarse = torch.randn(2, 8, 6, 6).double(), torch.randn(2, 16, 3, 3).double()
    x, stages = coarse, [*decoder.stages, *decoder.last]
    for stage, skip in zip(stages, [fine, None], strict=True):
        x = x.repeat_interleave(2, 2).repeat_interleave(2, 3)               # nearest
        x = stage.convs(torch.cat([x, skip], 1) if skips and skip is not None else x)
    assert torch.allclose(decoder([fine, coarse]), torch.einsum("oc,bchw->bohw", decoder.out.weight[..., 0, 0], x)
                          + decoder.out.bias.view(1, -1, 1, 1))
    assert [len(list(stage.convs)) for stage in stages] == [6, 6]


def test_a_decoder_starts_at_nought_and_leaves_it():
    """Other weights are as without zero_start, and the random numbers drawn after it too."""
    maps, made = [torch.rand(2, 8, 6, 6), torch.rand(2, 16, 3, 3)], {}
    for zero_start in (True, False):
        torch.manual_seed(0)
        made[zero_start] = unet.Decoder([8, 16], [2, 4], 1, zero_start=zero_start), torch.rand(3)
    (zero, after), (drawn, after_drawn) = made[True], made[False]
    assert torch.equal(after, after_drawn) and zero(maps).abs().max() == 0 and drawn(maps).abs().max() > 0.01
    for one, other in ((zero.stages, drawn.stages), (zero.last, drawn.last)):
        assert equal(one.state_dict(), other.state_dict())
    optimizer = torch.optim.SGD(zero.parameters(), 0.1)
    for _ in range(2):
        optimizer.zero_grad()
        (zero(maps) - 1).square().mean().backward()
        optimizer.step()
    assert all(p.grad.abs().max() > 0 for p in zero.parameters())           # from the second step on


def test_loads_other_numbers_of_channels():
    """Colour to gray: as if the gray image were repeated. Gray to colour: as if the colours were averaged."""
    colour, gray, back = tiny_encoder(3).eval(), tiny_encoder(1).eval(), tiny_encoder(3).eval()
    encoders.load(colour.state_dict(), gray)
    encoders.load(gray.state_dict(), back)
    one = torch.rand(2, 1, 64, 64)
    repeated = one.expand(-1, 3, -1, -1)
    assert torch.allclose(gray(one), colour(repeated), atol=1e-5)
    assert torch.allclose(gray(one), back(repeated), atol=1e-5)


def test_nothing_is_unpickled(tmp_path):
    class Evil:
        def __reduce__(self):
            return Path.touch, (tmp_path / "touched",)
    torch.save({"model": Evil()}, tmp_path / "zip.pt")
    for name, content in (("evil.pt", pickle.dumps({"a": Evil()}, 2)), ("empty.pt", b""), ("text.pt", b"hello")):
        (tmp_path / name).write_bytes(content)
    for name in ("evil.pt", "empty.pt", "text.pt", "zip.pt", "nothing.pt"):
        with pytest.raises(UserError, match=name):
            files.load_torch(tmp_path / name)
    assert not (tmp_path / "touched").exists()


def test_a_file_with_objects_names_a_command_that_takes_them_out(tmp_path):
    """A whole checkpoint of DINO: networks, and a Namespace and numpy's numbers beside them."""
    own, target = tiny_encoder().state_dict(), tiny_encoder()
    torch.save({"student": under("module.backbone.", own), "teacher": under("backbone.", own), "epoch": 3,
                "args": argparse.Namespace(arch="resnet18"), "loss": np.float64(3)}, tmp_path / "full one.pth")
    with pytest.raises(UserError, match=r"refused, it holds \S+ beside its tensors.*trust") as refused:
        files.load_torch(tmp_path / "full one.pth")
    command = shlex.split(str(refused.value).partition("alone: ")[2])
    subprocess.run([sys.executable, *command[1:]], cwd=tmp_path, check=True)
    encoders.load(tmp_path / "weights.pth", target)
    assert torch.equal(target.conv1.weight, own["conv1.weight"])


def test_files_are_whole_or_absent(tmp_path):
    (tmp_path / "a.txt").write_text("old")
    with pytest.raises(RuntimeError):
        with files.whole(tmp_path / "a.txt") as temporary:
            temporary.write_text("half")
            raise RuntimeError
    assert (tmp_path / "a.txt").read_text() == "old" and len(list(tmp_path.iterdir())) == 1


def test_a_damaged_file_becomes_a_line(tmp_path):
    """torch's unpickler trusts what it reads, and torch does not look at the checksums that it writes."""
    torch.save({"a": torch.full((64,), 3.0), "b": {"c": 1}}, tmp_path / "a.pt")
    whole = (tmp_path / "a.pt").read_bytes()
    start, weights = whole.index(b"PK") + 60, whole.index(torch.full((64,), 3.0).numpy().tobytes()) + 101
    for at in (*range(start, start + 160, 4), weights):
        (tmp_path / "a.pt").write_bytes(whole[:at] + bytes([whole[at] ^ 3]) + whole[at + 1:])
        with pytest.raises(UserError, match=r"a\.pt: refused") if at == weights else contextlib.suppress(UserError):
            files.load_torch(tmp_path / "a.pt")


def test_first_weights_are_scaled_to_their_fan():
    weight = encoders.build("resnet18").layer4[0].conv2.weight
    assert math.isclose(weight.std().item(), math.sqrt(2 / (512 * 9)), rel_tol=0.02)
