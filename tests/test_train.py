"""The command line of train.py: one clear line and exit status 2 for every misuse, nothing half-written; a run leaves what it promises."""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import train
from medssl import METHODS
from medssl.common import cli, encoders, files, settings
from tests.common import batch

FAST = ["--size", "32", "--stem", "default", "--batch", "16", "--steps", "3", "--log-every", "1", "--device", "cpu"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Forty gray pictures in two classes."""
    root = tmp_path_factory.mktemp("pictures")
    for i, picture in enumerate(batch(40, 1, 32).numpy()):
        path = root / ("bright" if i % 2 else "dark") / f"{i:02d}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray((picture[0] * (255 if i % 2 else 120)).astype(np.uint8)).save(path)
    return root


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MEDSSL_CACHE", str(tmp_path / "cache"))


def fails(capsys, *words):
    """What train.py says when it is called wrongly; status 2 and a single line are part of it."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        cli.run(lambda: train.main([str(w) for w in words]))
    said = capsys.readouterr().err.strip()
    assert stopped.value.code == 2 and "\n" not in said and "Traceback" not in said, said
    return said


def test_a_run_leaves_what_it_promises(folder, capsys):
    train.main(["--method", "moco", "--data", str(folder), "--encoder", "tiny", "--out", "run", "--set", "queue_size=24", "dim=16", "--keep-every", "2", *FAST])
    out = Path("run")
    assert {p.name for p in out.iterdir()} == {"config.json", "log.jsonl", "checkpoint.pt", "encoder.pt", "encoder.json", "encoder-2.pt", "encoder-2.json",
                                               "views.png", "curves.png", "spectrum.png"}
    config = json.loads((out / "config.json").read_text())
    assert config["arguments"]["parts"]["moco"]["words"] == {"queue_size": 24, "dim": 16}
    assert config["encoder"]["mean"] and config["data"]["images"] == 40
    assert files.read_run(out) == files.Run(str(folder.resolve()), "label", 32, 1, "tiny", "default")
    assert torch.load(out / "checkpoint.pt", weights_only=True)["method"]["queue"].shape == (24, 16)
    encoders.load(out, encoders.build("tiny", 1, "default"))
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in log] == [1, 2, 3] and {"loss", "chance", "lr", "images_per_s", "rank_me", "spread"} <= log[-1].keys()
    for path in out.iterdir():                                              # neither file names nor places
        assert b"bright" not in path.read_bytes() or path.name == "config.json"
    said = capsys.readouterr().out
    assert "RECIPE of moco" in said and "encoder.pt" in said

    before = torch.load(out / "encoder.pt", weights_only=True)
    shutil.copytree(out, "copy")
    train.main(["--resume", "--out", "copy"])                               # nothing left to do, nothing changed
    assert all(torch.equal(v, before[k]) for k, v in torch.load("copy/encoder.pt", weights_only=True).items())
    train.main(["--method", "rotation+simclr", "--data", str(folder), "--encoder", "tiny", "--init", "run", "--out", "next",
                "--set", "simclr.temperature=0.2", "rotation.weight=0.5", *FAST])
    assert "of" in capsys.readouterr().out and Path("next/encoder.pt").exists()


def test_resume_needs_nothing_but_the_folder(folder):
    words = ["--method", "byol", "--data", str(folder), "--encoder", "tiny", *FAST]
    train.main([*words, "--out", "whole"])
    state = torch.load("whole/checkpoint.pt", weights_only=True)
    interrupt_after(2, [*words, "--out", "again", "--save-every", "1"])
    assert torch.load("again/checkpoint.pt", weights_only=True)["step"] == 2
    train.main(["--resume", "--out", "again"])
    resumed = torch.load("again/checkpoint.pt", weights_only=True)
    assert resumed["step"] == 3 and all(torch.equal(v, state["method"][k]) for k, v in resumed["method"].items())


def interrupt_after(count, words):
    """A run that is left in the middle, as by kill."""
    original = train.loop.fit

    def fit(*args, **kwargs):
        for i, record in enumerate(original(*args, **kwargs)):
            if i == count:
                raise KeyboardInterrupt
            yield record
    train.loop.fit = fit
    try:
        with pytest.raises(KeyboardInterrupt):
            train.main(words)
    finally:
        train.loop.fit = original


def test_wrong_words(folder, capsys):
    assert "did you mean simclr" in fails(capsys, "--method", "simclear")
    assert "no part may stand twice" in fails(capsys, "--method", "byol+byol")
    assert "invalid choice" in fails(capsys, "--encoder", "resnet19")
    assert "--steps" in fails(capsys, "--steps", "0")
    assert "not allowed with" in fails(capsys, "--steps", "1", "--epochs", "1")
    assert "--bach" in fails(capsys, "--bach", "3")
    assert "did you mean temperature" in fails(capsys, "--method", "simclr", "--set", "temprature=1", "--data", folder, *FAST)
    assert "float" in fails(capsys, "--method", "simclr", "--set", "temperature=hot", "--data", folder, *FAST)
    assert "write name=value" in fails(capsys, "--set", "temperature", "--data", folder, *FAST)
    assert "PART.NAME" in fails(capsys, "--method", "simclr+byol", "--set", "dim=8", "--data", folder, *FAST)
    assert "has no decoder" in fails(capsys, "--method", "simclr", "--set", "decoder.skips=False", "--data", folder, *FAST)
    assert "must divide" in fails(capsys, "--method", "simclr", "--accum", "3", "--data", folder, *FAST)
    assert not Path("runs").exists()


def test_wrong_places(folder, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    assert "empty" in fails(capsys, "--data", "empty", "--method", "simclr", *FAST)
    assert "nowhere" in fails(capsys, "--data", "nowhere", "--method", "simclr", *FAST)
    (tmp_path / "file").write_text("")
    assert "file" in fails(capsys, "--out", "file/run", "--data", folder, "--method", "simclr", *FAST)
    assert "no such file" in fails(capsys, "--init", "nothing.pt", "--data", folder, "--method", "simclr", *FAST)
    assert "checkpoint.pt" in fails(capsys, "--resume", "--out", "nothing")
    assert "needs --out" in fails(capsys, "--resume")
    assert "leave out --batch" in fails(capsys, "--resume", "--out", "x", "--batch", "3")
    (tmp_path / "old").mkdir()
    (tmp_path / "old/checkpoint.pt").write_bytes(b"")
    assert "holds a run already" in fails(capsys, "--out", "old", "--data", folder, "--method", "simclr", *FAST)


def test_a_checkpoint_of_another_method_is_refused(folder, capsys):
    words = ["--data", str(folder), "--encoder", "tiny", *FAST]
    train.main(["--method", "rotation", *words, "--out", "a"])
    train.main(["--method", "simclr", *words, "--out", "b"])
    shutil.copy("a/checkpoint.pt", "b/checkpoint.pt")
    assert "belongs to another method" in fails(capsys, "--resume", "--out", "b")


def settle(*words, count=1000):
    args = train.parse(list(words))
    return settings.settle(args, METHODS, args.method.split("+"), count)


def test_recipes_become_settings():
    """The rate is given per 256 images for SGD and the like, and as it stands for Adam; epochs become steps."""
    recipe = settings.recipe_of(METHODS["moco"])
    ours = settle("--method", "moco", "--data", "x", "--batch", "128", "--epochs", "4")
    assert ours.training("out", False).lr == pytest.approx(recipe["lr"] / 2) and ours.steps == 28
    ours = settle("--method", "rotation", "--data", "x", "--batch", "64")
    assert ours.training("out", False).lr == settings.recipe_of(METHODS["rotation"])["lr"]
    for name in METHODS:
        if name != "together":
            ours = settle("--method", name, "--data", "x")
            assert ours.steps > 1 and ours.warmup <= ours.steps // 10
            assert ours.optimizer == settings.recipe_of(METHODS[name])["optimizer"]
    ours = settle()
    assert ours.method == "medmoco" and ours.data == "phantoms" and ours.encoder == "tiny"


def test_help_lists_the_methods(capsys):
    with pytest.raises(SystemExit) as stopped:
        train.main(["--help"])
    assert stopped.value.code == 0 and all(name in capsys.readouterr().out for name in ("simclr",))
    assert "tensorboard" not in sys.modules
