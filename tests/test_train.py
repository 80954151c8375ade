"""The command line of train.py: one clear line and exit status 2 for every misuse, nothing half-written; a run leaves
what it promises."""

import importlib.util
import json
import shutil
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import evaluate
import medssl
import train
from medssl import METHODS, byol
from medssl import __main__ as portraits
from medssl.common import cli, data, encoders, features, files, loop, metrics, presets, settings
from medssl.common.data import prepare
from medssl.common.monitor import Monitor
from tests.common import TINY, Flip, batch

REAL_TINY = encoders.ENCODERS["tiny"]
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
    """With a smaller network under the name tiny."""
    monkeypatch.setitem(encoders.ENCODERS, "tiny", TINY)
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
    train.main(["--method", "moco", "--data", str(folder), "--encoder", "tiny", "--out", "run", "--set",
                "queue_size=24", "dim=16", "--keep-every", "2", *FAST])
    out = Path("run")
    assert {p.name for p in out.iterdir()} == {"config.json", "log.jsonl", "checkpoint.pt", "encoder.pt",
                                               "encoder.json", "encoder-2.pt", "encoder-2.json",
                                               "views.png", "curves.png", "spectrum.png"}
    config = json.loads((out / "config.json").read_text())
    assert config["arguments"]["parts"]["moco"]["words"].items() >= {"queue_size": 24, "dim": 16}.items()
    assert config["encoder"]["mean"] and config["data"]["images"] == 40
    assert files.read_run(out) == files.Run(str(folder.resolve()), "label", 32, 1, "tiny", "default")
    assert torch.load(out / "checkpoint.pt", weights_only=True)["method"]["queue"].shape == (24, 16)
    encoders.load(out, encoders.build("tiny", 1, "default"))
    assert all(encoders.about(out / name)["size"] == 32 for name in ("encoder.pt", "encoder-2.pt"))
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in log] == [1, 2, 3] and {"loss", "chance", "lr", "images_per_s", "rank_me",
                                                            "spread"} <= log[-1].keys()
    for path in out.iterdir():                                              # neither file names nor places
        assert b"bright" not in path.read_bytes() or path.name == "config.json"
    said = capsys.readouterr().out
    assert "preset small: 3 steps of moco" in said and "queue_size 24 instead of 65536" in said
    assert "RECIPE of moco" in said and "encoder.pt" in said

    before = torch.load(out / "encoder.pt", weights_only=True)
    shutil.copytree(out, "copy")
    train.main(["--resume", "--out", "copy"])                               # nothing left to do, nothing changed
    assert all(torch.equal(v, before[k]) for k, v in torch.load("copy/encoder.pt", weights_only=True).items())
    train.main(["--method", "rotation+simclr", "--data", str(folder), "--encoder", "tiny", "--init",
                "run/checkpoint.pt", "--out", "next", "--set", "simclr.temperature=0.2", "rotation.weight=0.5", *FAST])
    said, tensors = capsys.readouterr().out, len(before)
    assert f"starting from run/checkpoint.pt: {tensors} of {tensors} tensors matched" in said
    assert "note: taken: the tensors under method.encoder.; left out: queue (1), " in said
    assert f", projector (4), key_encoder ({tensors}), key_projector (4), optimizer (" in said
    assert Path("next/encoder.pt").exists()


@pytest.fixture(scope="module")
def split(tmp_path_factory):
    """Forty training and sixteen validation pictures in two classes, as a MedMNIST file."""
    path = tmp_path_factory.mktemp("split") / "split.npz"
    pictures, labels = batch(56, 1, 32).numpy()[:, 0], np.arange(56)[:, None] % 2
    pictures = (pictures * np.where(labels == 1, 255, 120)[..., None]).astype(np.uint8)
    np.savez(path, train_images=pictures[:40], train_labels=labels[:40], val_images=pictures[40:],
             val_labels=labels[40:])
    return path


def test_resume_needs_nothing_but_the_folder(split, monkeypatch):
    """Weights, log and pictures of a run that was killed and gone on with are those of the uninterrupted run."""
    words = ["--method", "byol", "--data", str(split), *FAST]
    train.main([*words, "--out", "whole"])
    state = torch.load("whole/checkpoint.pt", weights_only=True)
    interrupt_after(2, [*words, "--out", "again", "--save-every", "1"])
    assert torch.load("again/checkpoint.pt", weights_only=True)["step"] == 2
    Path("again/.encoder.pt.1234.part").write_bytes(b"half")
    shutil.copy("whole/encoder.pt", "again/encoder.pt")                     # of a later step than the checkpoint
    with Path("again/log.jsonl").open("a") as log:
        log.write('{"step": 3, "loss": 99.0, "lr": 0.0, "images_per_s": 1.0}\n{"step": 4, "lo')
    drawn, draw = [], Monitor.draw_curves
    monkeypatch.setattr(Monitor, "draw_curves", lambda *given: drawn.append(given[1]) or draw(*given))
    train.main(["--resume", "--out", "again"])
    assert drawn[-1] == files.read_log(Path("again/log.jsonl"))             # to the last digit
    resumed = torch.load("again/checkpoint.pt", weights_only=True)
    assert resumed["step"] == 3 and all(torch.equal(v, state["method"][k]) for k, v in resumed["method"].items())
    first, second = (files.read_log(Path(name) / "log.jsonl") for name in ("whole", "again"))
    for record in first + second:
        del record["images_per_s"]
    assert first == second
    assert {path.name for path in Path("again").iterdir()} == {path.name for path in Path("whole").iterdir()}
    for name in ("curves.png", "spectrum.png", "views.png"):
        assert Path("again", name).read_bytes() == Path("whole", name).read_bytes(), name


def test_a_finished_run_gets_the_encoder_of_its_checkpoint(split, capsys):
    words = ["--method", "simclr", "--data", str(split), *FAST]
    train.main([*words, "--out", "run"])
    right = torch.load("run/encoder.pt", weights_only=True)
    torch.save({key: value + 1 for key, value in right.items()}, "run/encoder.pt")      # killed between the two files
    train.main(["--resume", "--out", "run"])
    assert all(torch.equal(value, right[key]) for key, value in torch.load("run/encoder.pt", weights_only=True).items())
    assert "--init run" in capsys.readouterr().out
    assert "--init run" in fails(capsys, "--resume", "--out", "run", "--steps", "9")


def test_a_run_of_an_earlier_version(split, capsys):
    train.main(["--method", "simclr", "--data", str(split), *FAST, "--out", "run"])
    config = json.loads(Path("run/config.json").read_text())
    config["arguments"] = {"data": str(split), "label": "label", "batch": None, "set": []}
    Path("run/config.json").write_text(json.dumps(config | {"plan": {"size": 32}, "training": {}}))
    assert files.read_run("run") == files.Run(str(split), "label", 32, 1, "tiny", "default")
    assert "earlier version" in fails(capsys, "--resume", "--out", "run")
    Path("run/config.json").write_text("{")
    assert "damaged" in fails(capsys, "--resume", "--out", "run")


def test_what_config_json_cannot_say_is_told_before_a_run_is_gone_on_with(split, capsys):
    train.main(["--method", "simclr", "--data", str(split), *FAST, "--out", "run"])
    whole = json.loads(Path("run/config.json").read_text())
    part = whole["arguments"]["parts"]["simclr"]
    for word, value in (("encoder", "vit"), ("stem", []), ("optimizer", "sdg"), ("amp", None), ("data", 5),
                        ("size", 2.5), ("size", 0), ("steps", "3"), ("steps", 10 ** 12), ("lr", None), ("lr", -1),
                        ("seed", "x"), ("method", "dcl"), ("parts", {}), ("options", 5), ("compile", 1),
                        ("device", None), ("parts", {"simclr": part | {"views": "none"}}),
                        ("parts", {"simclr": part | {"words": 5}}),
                        ("parts", {"simclr": part | {"words": {"temperature": "x"}}})):
        Path("run/config.json").write_text(json.dumps(whole | {"arguments": whole["arguments"] | {word: value}}))
        assert "run/config.json: damaged" in fails(capsys, "--resume", "--out", "run"), (word, value)
    for found in None, {}, "x":
        Path("run/config.json").write_text(json.dumps(whole | {"data": found}))
        assert "run/config.json: damaged" in fails(capsys, "--resume", "--out", "run")
    wrong = whole["arguments"] | {"parts": {"simclr": part | {"words": {"temperature": -1}}}}
    Path("run/config.json").write_text(json.dumps(whole | {"arguments": wrong}))
    assert "temperature=-1: has to be" in fails(capsys, "--resume", "--out", "run")
    Path("run/config.json").write_text(json.dumps(whole))
    train.main(["--resume", "--out", "run"])


def test_both_random_networks_stand_beside_the_trained_one(split, capsys):
    """As it starts, and with BatchNorm's statistics of the images: what each scores is known from elsewhere."""
    train.main(["--method", "simclr", "--data", str(split), *FAST, "--out", "run"])
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("kNN on"))
    dataset = data.load(split, 32)
    torch.manual_seed(0)
    encoder = encoders.build("tiny", 1, "default", dataset.mean, dataset.std)
    rows, val, scores = dataset.rows("train"), dataset.rows("val"), []
    for _ in range(2):
        known, asked = (features.extract(encoder, dataset.images, which, torch.device("cpu")) for which in (rows, val))
        votes = features.knn(known, dataset.labels[rows], asked).argmax(1)
        scores.append(metrics.balanced_accuracy(dataset.labels[val], votes))
        features.set_statistics(encoder, dataset.images, rows, torch.device("cpu"))
    assert f"{scores[0]:.3f} before training; {scores[1]:.3f} before training, normalised; 0.500 by chance" in line
    assert "no kNN" not in line


def test_views_are_drawn_before_the_first_step_and_the_rest_at_each_look(split, monkeypatch, capsys):
    seen, fit = [], train.loop.fit

    def watched(*args, **words):
        seen.append({path.name for path in Path("run").glob("*.png")})
        for record in fit(*args, **words):
            yield record
            seen.append({path.name for path in Path("run").glob("*.png")})
    monkeypatch.setattr(train.loop, "fit", watched)
    train.main(["--method", "genesis", "--data", str(split), *FAST, "--out", "run"])
    assert seen[0] == {"views.png"} and seen[1] == {"views.png", "curves.png", "spectrum.png", "restored.png"}
    assert "run/views.png" in capsys.readouterr().out
    config = json.loads(Path("run/config.json").read_text())
    level = torch.load("run/checkpoint.pt", weights_only=True)["method"]["level"]           # where its pictures begin
    assert level.sigmoid().flatten().tolist() == pytest.approx(config["encoder"]["mean"])


def test_after_ctrl_c_the_last_line_goes_on(split, monkeypatch, capsys):
    fit = train.loop.fit

    def interrupted(*args, **words):
        for record in fit(*args, **words):
            if record["step"] == 1:
                signal.raise_signal(signal.SIGINT)
            yield record
    monkeypatch.setattr(train.loop, "fit", interrupted)
    train.main(["--method", "simclr", "--data", str(split), *FAST, "--out", "my run"])
    said = capsys.readouterr().out.strip().splitlines()
    assert said[-1] == "next: python train.py --resume --out 'my run'" and any("2 of 3 steps" in line for line in said)


def test_a_failed_start_leaves_nothing(folder, monkeypatch):
    def broken(*args, **words):
        Path("run/log.jsonl").write_text("")
        raise RuntimeError("out of memory")
    monkeypatch.setattr(train.loop, "fit", broken)
    words = ["--method", "simclr", "--data", str(folder), *FAST, "--out", "run"]
    with pytest.raises(RuntimeError):
        train.main(words)
    assert not Path("run").exists()
    Path("run").mkdir()
    Path("run/mine.txt").write_text("not ours")
    with pytest.raises(RuntimeError):
        train.main(words)
    assert [path.name for path in Path("run").iterdir()] == ["mine.txt"]


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
    assert "did you mean temperature" in fails(capsys, "--method", "simclr", "--set", "temprature=1", "--data", folder,
                                               *FAST)
    assert "float" in fails(capsys, "--method", "simclr", "--set", "temperature=hot", "--data", folder, *FAST)
    assert "write name=value" in fails(capsys, "--set", "temperature", "--data", folder, *FAST)
    assert "PART.NAME" in fails(capsys, "--method", "simclr+byol", "--set", "dim=8", "--data", folder, *FAST)
    assert "has no decoder" in fails(capsys, "--method", "simclr", "--set", "decoder.skips=False", "--data", folder,
                                     *FAST)
    assert "must divide" in fails(capsys, "--method", "simclr", "--accum", "3", "--data", folder, *FAST)
    words = ["--data", folder, "--method", "simclr", *FAST]
    assert "simclr.weight" in fails(capsys, "--method", "simclr+byol", "--set", "simclr.weight=abc", "--data", folder,
                                    *FAST)
    assert "not a finite number" in fails(capsys, *words, "--set", "temperature=1e999")
    assert "did you mean --method" in fails(capsys, "--methd", "simclr")
    assert "--weight-decay" in fails(capsys, *words, "--weight-decay", "-1")
    assert "--weight-decay" in fails(capsys, *words, "--weight-decay", "nan")
    assert "--seed" in fails(capsys, *words, "--seed", "-1")
    assert "--init" in fails(capsys, *words, "--init", "")
    assert "option of adamw 'trust'" in fails(capsys, *words, "--options", "trust=0.1")
    assert "--options" in fails(capsys, *words, "--optimizer", "sgd", "--options", "momentum=-1")
    assert "--warmup" in fails(capsys, *words, "--warmup", "9")
    for value in ("1", "6", str(2**40)):                                    # with --accum 6, parts of a single image
        assert "--batch" in fails(capsys, *words, "--accum", "6" if value == "6" else "1", "--batch", value)
    assert "--size" in fails(capsys, *words, "--size", "99999")
    for device in ("xpu", "meta", "cpu:7", "cuda:x", "mps:1"):
        assert "--device" in fails(capsys, *words[:-2], "--device", device)
    assert not Path("runs").exists()


def test_wrong_places(folder, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    assert "empty" in fails(capsys, "--data", "empty", "--method", "simclr", *FAST)
    assert "nowhere" in fails(capsys, "--data", "nowhere", "--method", "simclr", *FAST)
    (tmp_path / "file").write_text("")
    assert "file" in fails(capsys, "--out", "file/run", "--data", folder, "--method", "simclr", *FAST)
    assert "checkpoint.pt" in fails(capsys, "--resume", "--out", "nothing")
    assert "needs --out" in fails(capsys, "--resume")
    assert "leave out --batch" in fails(capsys, "--resume", "--out", "x", "--batch", "3")
    (tmp_path / "old").mkdir()
    (tmp_path / "old/checkpoint.pt").write_bytes(b"")
    assert "holds checkpoint.pt already; --resume" in fails(capsys, "--out", "old", "--data", folder, "--method",
                                                            "simclr", *FAST)


def test_weights_to_start_from_are_looked_at_before_the_images(folder, capsys, monkeypatch):
    words = ["--data", str(folder), "--method", "simclr", "--encoder", "tiny", *FAST]
    torch.save(encoders.build("tiny").state_dict(), "bare.pt")
    train.main([*words, "--init", "bare.pt", "--out", "run"])
    assert "note: bare.pt does not say its stem" in capsys.readouterr().out
    monkeypatch.setattr(data, "load", lambda *_: pytest.fail("decoded the images"))
    Path("bad.pt").write_text("no weights")
    assert "no such file" in fails(capsys, *words, "--init", "nothing.pt")
    assert "bad.pt" in fails(capsys, *words, "--init", "bad.pt")


def test_lack_of_memory_is_a_line(capsys, monkeypatch):
    def main(_):
        torch.empty(2**50)
    monkeypatch.setattr(train, "main", main)
    assert "smaller --size" in fails(capsys)
    with pytest.raises(RuntimeError, match="shape"):
        cli.run(lambda: torch.rand(2, 2) @ torch.rand(3, 3))


def parsers(monkeypatch):
    """Those of all programs."""
    found = []
    monkeypatch.setattr(cli.Parser, "parse_args", lambda parser, _: found.append(parser) or 1 / 0)
    for main in (train.main, evaluate.main, prepare.main):
        with pytest.raises(ZeroDivisionError):
            main([])
    return found


def test_no_flag_takes_an_empty_word_or_half_a_seed(monkeypatch):
    """A flag that takes any word says so: it has a list of its words, a type that checks them, or is a name or a
    list of settings, which are looked up."""
    found = parsers(monkeypatch)
    assert len(found) == 5
    for parser in found:
        loose = [action.dest for action in parser._actions if action.nargs != 0 and not action.choices
                 and action.type in (None, int, str)]
        assert set(loose) <= {"method", "name", "set", "options"}, parser.prog


def test_a_set_without_images_to_learn_from(tmp_path, capsys):
    Image.new("L", (32, 32), 99).save(tmp_path / "a.png")
    (tmp_path / "split.csv").write_text("file,split\na.png,test\n")
    assert "no image to learn from" in fails(capsys, "--method", "rotation", "--data", tmp_path, *FAST)


def test_a_checkpoint_of_another_method_is_refused(folder, capsys):
    words = ["--data", str(folder), "--encoder", "tiny", *FAST]
    train.main(["--method", "rotation", *words, "--out", "a"])
    train.main(["--method", "simclr", *words, "--out", "b"])
    shutil.copy("a/checkpoint.pt", "b/checkpoint.pt")
    assert "belongs to another method" in fails(capsys, "--resume", "--out", "b")


def settle_with(*words, count=1000):
    args = train.parse(list(words))
    return settings.settle(args, METHODS, args.method.split("+"), presets.Found(count, 64, 1))


def settle(*words, count=1000):
    return settle_with(*words, count=count)[0]


@pytest.fixture
def unrehearsed(monkeypatch):
    """Settings are settled without making the method: forty million operations an image, as with tiny at 64 pixels."""
    monkeypatch.setattr(settings, "rehearse", lambda *_: 40e6)


def test_recipes_become_settings(unrehearsed):
    """The rate is given per 256 images for SGD and the like, and as it stands for Adam; epochs become steps."""
    paper = ["--preset", "paper", "--data", "x", "--encoder", "tiny", "--size", "64"]
    recipe = presets.recipe_of(METHODS["moco"])
    ours = settle("--method", "moco", "--batch", "128", "--epochs", "4", *paper)
    assert ours.training("out", False).lr == pytest.approx(recipe["lr"] / 2) and ours.steps == 28
    ours = settle("--method", "rotation", "--batch", "64", *paper)
    assert ours.training("out", False).lr == presets.recipe_of(METHODS["rotation"])["lr"]
    for name in METHODS:
        if name != "together":
            ours = settle("--method", name, *paper)
            assert ours.steps > 1 and ours.warmup <= ours.steps // 10
            assert ours.optimizer == presets.recipe_of(METHODS[name])["optimizer"]
    ours = settle()
    assert ours.method == "medmoco" and ours.data == "phantoms" and ours.encoder == "tiny"


def says_nothing(name, monkeypatch):
    monkeypatch.setattr(sys.modules[METHODS[name].__module__], "SMALL", {}, raising=False)


def test_the_small_preset_looks_at_the_set(unrehearsed, monkeypatch):
    """Each line is a rule of presets.py."""
    says_nothing("moco", monkeypatch)
    says_nothing("medmoco", monkeypatch)
    def small(images, side=64, channels=1, *words):
        args = train.parse(["--data", "x", "--method", "moco", *words])
        return settings.settle(args, METHODS, args.method.split("+"), presets.Found(images, side, channels))[0]
    assert [small(1000, side).size for side in (28, 56, 64, 90, 96, 336)] == [64, 64, 64, 96, 96, 96]
    ours = small(1000)
    assert ours.encoder == "tiny" and ours.optimizer == "adamw" and ours.batch == 64 and ours.stem == "default"
    assert small(500).steps == presets.PASSES * (500 // 64) and small(64).steps == presets.LEAST
    assert small(10 ** 6).steps == int(60 * presets.MINUTES / (3 * 64 * 40e6 / presets.PACE))
    assert small(40).batch == 32 and small(1000, 64, 1, "--steps", "7", "--size", "96").steps == 7
    assert [small(1000, 64, 1, "--steps", steps).warmup for steps in ("9", "100", "1000")] == [0, 10, 30]
    assert small(200).parts["moco"].words["queue_size"] == 50
    assert small(200, 64, 1, "--set", "queue_size=70").parts["moco"].words["queue_size"] == 70
    views = [small(1000, 64, channels).parts["moco"].views for channels in (1, 3)]
    assert views == ["slices", "histology"] and small(1000, 64, 3, "--views", "ct").parts["moco"].views == "ct"
    assert small(1000, 64, 3, "--channels", "1").parts["moco"].views == "slices"
    assert small(1000, 64, 1, "--channels", "3").parts["moco"].views == "slices"
    assert settings.settle(train.parse([]), METHODS, ["medmoco"], presets.PHANTOMS)[0].steps == 500


def test_a_rehearsal_counts_what_an_image_costs(monkeypatch):
    """tiny is ResNet-18 at a quarter of the width; MoCo sends two views through it."""
    monkeypatch.setitem(encoders.ENCODERS, "tiny", REAL_TINY)
    tiny, large = (settle_with("--method", "moco", "--data", "x", "--set", "queue_size=64", "--encoder", name)[1]
                   for name in ("tiny", "resnet18"))
    assert 35e6 < tiny < 50e6 and 12 * tiny < large < 16 * tiny


def test_what_a_method_needs_stands_beside_its_recipe(unrehearsed, monkeypatch):
    module = sys.modules[METHODS["moco"].__module__]
    monkeypatch.setattr(module, "SMALL", {"temperature": 0.5, "views": "xray", "steps": 700, "stem": "nopool",
                                          "lr": 0.5, "batch": 16}, raising=False)
    ours = settle("--method", "moco", "--data", "x", count=100)
    assert (ours.steps, ours.stem, ours.lr, ours.batch) == (1200, "nopool", 0.5, 16)
    assert ours.parts["moco"] == settings.Part("xray", words={"temperature": 0.5, "queue_size": 25})
    assert settle("--method", "moco", "--data", "x", count=16).steps == 700
    assert "temperature" not in settle("--method", "moco", "--data", "x", "--preset", "paper").parts["moco"].words


def test_phantoms_are_as_they_are_said_to_be():
    kinds, splits = data.phantoms._deal(round(2000 / 9), np.random.default_rng(0))
    patients = np.arange(2000) * round(2000 / 9) // 2000
    assert np.isin(np.asarray(splits)[patients], ("train", "unlabeled")).sum() == presets.PHANTOMS.images


def test_a_set_is_looked_at_without_decoding_it(folder, split, tmp_path):
    assert presets.look(str(folder), "label") == presets.Found(40, 32, 1)
    assert presets.look(str(split), "label") == presets.Found(40, 32, 1)
    np.save(tmp_path / "x.npy", np.zeros((9, 50, 70, 3), np.uint8))
    assert presets.look(str(tmp_path / "x.npy"), "label") == presets.Found(9, 70, 3)
    assert not (tmp_path / "cache").exists()


def test_settings_of_the_optimiser(unrehearsed):
    ours = settle("--method", "byol", "--data", "x", "--optimizer", "lars", "--options", "trust=0.02", "--warmup", "30")
    assert ours.options == {"trust": 0.02} and ours.training("out", False).options == {"trust": 0.02}
    assert ours.warmup == 30 * (1000 // 64) == ours.training("out", False).warmup > ours.steps / 10     # as was asked
    ours = settle("--method", "swav", "--data", "x", "--preset", "paper", "--encoder", "tiny", "--size", "64",
                  "--options", "trust=0.5")
    assert ours.options == {"momentum": 0.9, "trust": 0.5}                  # the RECIPE's, with one changed
    ours = settle("--method", "swav", "--data", "x", "--preset", "paper", "--optimizer", "adamw")
    assert ours.options == {}                                               # they were another optimiser's


MINE = """
import torch
from torch import nn

RECIPE = {"optimizer": "adam", "lr": 1e-3, "weight_decay": 0.0, "batch": 8, "epochs": 1, "warmup": 0,
          "views": "plain", "size": 32}
SMALL = {}


class Mine(nn.Module):
    def __init__(self, encoder, augment, wrong=0):
        super().__init__()
        self.encoder, self.wrong = encoder, wrong
        if wrong == 1:
            raise ValueError("wrong is 1; it must be 0")

    def views(self, images):
        if self.wrong == 2:
            raise ValueError("images of this size do not divide; choose another --size")
        if self.wrong == 3:
            first, second = (1, 2, 3)
        if self.wrong == 5:
            nn.BatchNorm1d(1)(images[:1, :1, 0, 0])
        return (images,)

    def forward(self, x):
        if self.wrong == 4:
            return {"loss": nn.functional.cross_entropy(self.encoder(x), torch.zeros(3, dtype=torch.long))}
        return {"loss": self.encoder(x).square().mean()}

    def after_step(self, outs, progress):
        pass
"""


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """A user's own method in a file of its own."""
    (tmp_path / "mine.py").write_text(MINE)
    spec = importlib.util.spec_from_file_location("mine", tmp_path / "mine.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "mine", module)
    spec.loader.exec_module(module)
    monkeypatch.setitem(METHODS, "mine", module.Mine)


def test_only_what_the_user_was_told_becomes_a_line(mine, folder, monkeypatch, capsys):
    monkeypatch.setattr(data, "load", lambda *_: pytest.fail("told only after decoding"))
    words = ["--method", "mine", "--data", str(folder), *FAST]
    assert "mine (--set): wrong is 1" in fails(capsys, *words, "--set", "wrong=1")
    assert "choose another --size" in fails(capsys, *words, "--set", "wrong=2")
    # mistakes in the code
    for wrong, message in ((3, "too many values"), (4, "batch_size"), (5, "more than 1 value")):
        with pytest.raises(ValueError, match=message):
            cli.run(lambda wrong=wrong: train.main([*words, "--set", f"wrong={wrong}"]))
    assert not Path("runs").exists()


def test_a_batch_larger_than_the_set_is_told(folder, capsys):
    train.main(["--method", "rotation", "--data", str(folder), "--out", "run", *FAST, "--batch", "64", "--steps", "1"])
    said = capsys.readouterr().out
    assert "--batch 32 avoids it" in said and "--split" in said and "no kNN" in said


def test_the_environment_may_silence_the_bar(folder, monkeypatch):
    """tqdm reads TQDM_DISABLE only where it is not told otherwise."""
    words, tqdm = [], train.tqdm
    monkeypatch.setattr(train, "tqdm", lambda **given: words.append(given) or tqdm(**given))
    train.main(["--method", "rotation", "--data", str(folder), "--out", "run", *FAST, "--steps", "1"])
    assert "disable" not in words[0]


def test_memory_is_counted_in_the_units_of_the_system(monkeypatch):
    usage = SimpleNamespace(getrusage=lambda _: SimpleNamespace(ru_maxrss=3 * 2 ** 30), RUSAGE_SELF=0)
    monkeypatch.setattr(train, "resource", usage)
    monkeypatch.setattr(train.sys, "platform", "darwin")
    assert train.memory(torch.device("cpu")) == 3
    monkeypatch.setattr(train.sys, "platform", "linux")
    assert train.memory(torch.device("cpu")) == 3 * 1024


def test_a_look_at_the_exported_encoder_leaves_the_method_in_its_mode(split):
    dataset, method = data.load(split, 32), byol.BYOL(encoders.build("tiny"), Flip(), export="target")
    config = loop.Config(steps=9, batch=8, lr=1.0, out=".")
    monitor = Monitor(method.encoder, dataset, dataset.rows("train"), torch.device("cpu"), config)
    with torch.no_grad():
        for p in method.target_encoder.parameters():
            p.zero_()
    assert method.train() and np.isnan(monitor.look(method)["rank_me"])     # the target's features are all nought
    assert method.training and method.encoder.bn1.training
    assert method.eval() and monitor.look(method) and not method.training


def test_a_long_run_has_no_list_of_its_looks(folder):
    dataset = data.load(folder, 32)
    config = loop.Config(steps=10 ** 9, batch=8, lr=1.0, out="run")
    monitor = Monitor(encoders.build("tiny"), dataset, dataset.rows(), torch.device("cpu"), config)
    assert [monitor.due(step) for step in (1, 10 ** 8, 10 ** 9 - 1, 10 ** 9)] == [False, True, False, True]


def test_help_lists_the_methods(capsys):
    with pytest.raises(SystemExit) as stopped:
        train.main(["--help"])
    assert stopped.value.code == 0 and all(name in capsys.readouterr().out for name in ("simclr",))
    assert "tensorboard" not in sys.modules


def test_the_version_is_told(capsys):
    with pytest.raises(SystemExit) as stopped:
        train.main(["--version"])
    assert stopped.value.code == 0 and capsys.readouterr().out.strip() == f"medssl {medssl.__version__}"
