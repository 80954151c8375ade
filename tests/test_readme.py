"""The README tells the truth about what can be counted."""

import re
import sys
from pathlib import Path

import pytest
import torch

import evaluate
import train
from medssl import BYOL, METHODS, SparK, spark
from medssl.common import encoders
from tests.common import batch

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_every_method_has_its_row_and_its_lines():
    rows = dict(re.findall(r"^\| \[(\w+)\]\(medssl/\1\.py\) \|.*?\| (\d+) \|", README, re.M))
    assert set(rows) == set(METHODS), f"README's table wants one row a method: {set(rows) ^ set(METHODS)}"
    for name, lines in rows.items():
        true = len((ROOT / f"medssl/{name}.py").read_text().splitlines())
        assert abs(int(lines) - true) <= 5, f"{name}.py has {true} lines, the README says {lines}"


def test_links_lead_somewhere():
    for text in (README, (ROOT / "data/README.md").read_text()):
        for target in re.findall(r"\]\(([^)#]+)\)", text):
            if not target.startswith("http"):
                assert (ROOT / target).exists() or (ROOT / "data" / target).exists(), target


def test_commands_have_flags_that_exist(capsys):
    flags = {}
    for name, module in (("train.py", train), ("evaluate.py", evaluate)):
        try:
            module.main(["--help"])
        except SystemExit:
            flags[name] = set(re.findall(r"--[\w-]+", capsys.readouterr().out))
    for name, words in re.findall(r"python (train\.py|evaluate\.py)([^`\n]*)", README):
        assert set(re.findall(r"--[a-z][\w-]*", words)) <= flags[name] | {"--nproc_per_node"}, words


def block(mark):
    return re.search(rf"<!-- {mark} -->\n```python\n(.*?)```", README, re.S)[1]


@pytest.mark.parametrize("mark", ["maps", "timm"])
def test_networks_of_other_libraries_are_encoders(mark, monkeypatch):
    """Also for methods that copy their encoder: a copy must not run the original's layers."""
    pytest.importorskip({"maps": "torchvision"}.get(mark, mark))
    monkeypatch.setitem(sys.modules, "spark", spark)                        # as if its file had been copied
    words = {}
    exec(block(mark), words)
    encoder, images = words["encoder"], torch.rand(2, 3, 64, 64)
    assert [tuple(each.shape[1:]) for each in encoder.features(images)] == [
        (width, 64 // stride, 64 // stride) for width, stride in zip(encoder.widths, encoder.strides)]
    method = BYOL(encoder, lambda x: x, hidden=8, dim=4)
    method(*method.views(images))["loss"].backward()
    assert encoder.train()(images).shape == (2, encoder.dim)
    for weight in method.target_encoder.parameters():
        weight.data.zero_()
    assert not method.target_encoder(images).any() and encoder(images).any()
    small = torch.rand(2, 3, 128, 128)
    method = SparK(encoder, lambda x: x, channels=3)
    assert method(*method.views(small))["loss"].isfinite()


def test_other_formats_say_the_same(tmp_path, monkeypatch):
    """README's word on compilation, and its lines on safetensors and ONNX where the packages are there."""
    safetensors, onnx = pytest.importorskip("safetensors.torch"), pytest.importorskip("onnx.reference")
    encoder, x = encoders.build("tiny", 1).eval(), batch(2, size=32)
    wanted = encoder(x).detach()
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(encoder, backend="eager", fullgraph=True)(x), wanted)
    monkeypatch.chdir(tmp_path)
    exported = x[:1]
    monkeypatch.setattr(encoders, "build", lambda *_: encoder)
    exec(block("formats").replace("128, 128", "32, 32"), {})
    saved = safetensors.load_file("encoder.safetensors")
    assert all(saved[key].equal(value) for key, value in encoder.state_dict().items())
    session = onnx.ReferenceEvaluator("encoder.onnx")
    said, = session.run(None, {session.input_names[0]: exported.numpy()})
    torch.testing.assert_close(torch.from_numpy(said), encoder(exported).detach(), atol=1e-5, rtol=1e-4)
