"""The encoder equals torchvision's to the number, and weights go in and out under the same names."""

import functools
import math
import pickle

import numpy as np
import pytest
import torch

from medssl.common import encoders, files
from tests.common import golden, tiny_encoder


def fill(encoder, rule):
    """The deterministic weights that the golden numbers were computed with (see tests/golden/README.md)."""
    for i, (name, p) in enumerate(encoder.named_parameters()):
        k = torch.arange(p.numel(), dtype=torch.float64)
        if rule == "square" and p.ndim > 1:
            k = (k * k) % 1000003
        values = 0.05 * torch.sin(0.37 * k + i) + (p.ndim == 1 and name.endswith("weight"))
        p.data = values.view_as(p).float()
    persistent = encoder.state_dict().keys() - dict(encoder.named_parameters()).keys()
    for i, (name, b) in enumerate((n, b) for n, b in encoder.named_buffers() if n in persistent):
        k = torch.arange(b.numel(), dtype=torch.float64)
        if name.endswith("running_mean"):
            b.copy_((0.02 * torch.cos(0.11 * k + i)).float())
        elif name.endswith("running_var"):
            b.copy_((1 + 0.1 * torch.sin(0.23 * k + i) ** 2).float())
    return encoder


@functools.cache
def filled(name, rule):
    return fill(encoders.build(name, 3), rule).state_dict()


@pytest.mark.beside
@pytest.mark.parametrize("name,tag", [("resnet18", "rgb"), ("resnet18", "gray"), ("resnet50", "rgb")])
def test_equals_torchvision(name, tag):
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
        allowed = np.maximum(10 * numbers[f"{tag}_{case}_float32_error"], 2e-4 if name == "resnet50" and case.endswith("train") else 1e-5)
        for i, m in enumerate(maps):
            wanted = numbers[f"{tag}_{case}_slice"][i]
            assert tuple(m.shape[1:]) == tuple(numbers["shapes"][i][-3:])
            assert np.abs(m.flatten()[numbers["slice_index"][i]].numpy() - wanted).max() <= allowed[i] * np.abs(wanted).max() * 3
        pooled = numbers[f"{tag}_{case}_pooled"]
        assert np.abs(maps[-1].mean((2, 3)).numpy() - pooled).max() <= allowed[4] * np.abs(pooled).max()
    assert encoder.widths == [m.shape[1] for m in maps] and encoder.strides == [4, 8, 16, 32] and encoder.dim == maps[-1].shape[1]


@pytest.mark.parametrize("stem,strides", [("default", [4, 8, 16, 32]), ("nopool", [2, 4, 8, 16]), ("small", [1, 2, 4, 8])])
def test_stems_have_the_stated_strides(stem, strides):
    encoder = tiny_encoder(2, stem)
    maps = encoder.features(torch.rand(2, 2, 64, 96))
    assert encoder.strides == strides
    assert [m.shape[2:] for m in maps] == [(64 // s, 96 // s) for s in strides]
    assert encoder(torch.rand(1, 2, 33, 47)).shape == (1, encoder.dim)


def test_standardises_inside():
    plain, scaled = tiny_encoder(2).eval(), encoders.ResNet(encoders.BasicBlock, (1, 1, 1, 1), 8, 2, mean=(0.2, 0.5), std=(0.1, 0.3)).eval()
    scaled.load_state_dict(plain.state_dict())                              # mean and std are not weights
    x = torch.rand(2, 2, 64, 64)
    by_hand = (x - torch.tensor([0.2, 0.5]).view(1, 2, 1, 1)) / torch.tensor([0.1, 0.3]).view(1, 2, 1, 1)
    assert torch.allclose(scaled(x), plain(by_hand), atol=1e-6)
    with pytest.raises(ValueError, match="one a channel"):
        encoders.ResNet(encoders.BasicBlock, (1, 1, 1, 1), 8, 2, mean=(0.2,))


def test_loads_what_others_saved(tmp_path):
    source, target = tiny_encoder(3), tiny_encoder(3)
    wrapped = {f"module._orig_mod.{k}": v for k, v in source.state_dict().items()} | {"module._orig_mod.fc.weight": torch.zeros(2, 64)}
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
        encoders.load({k: v for k, v in tiny_encoder().state_dict().items() if not k.startswith("layer1")}, tiny_encoder())
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


def test_first_weights_are_scaled_to_their_fan():
    weight = encoders.build("resnet18").layer4[0].conv2.weight
    assert math.isclose(weight.std().item(), math.sqrt(2 / (512 * 9)), rel_tol=0.02)
