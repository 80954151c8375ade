"""The command line of train.py: one clear line and exit status 2 for every misuse, nothing half-written; a run leaves
what it promises."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import train
from medssl import METHODS, byol, moco
from medssl.common import cli, config, data, encoders, features, files, loop, metrics, optim
from medssl.common.monitor import Monitor
from medssl.rotation import Rotation
from tests.common import TINY, Flip, batch

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


@pytest.fixture(scope="module")
def split(tmp_path_factory):
    """Forty training and sixteen validation pictures in two classes, as a MedMNIST file."""
    path = tmp_path_factory.mktemp("split") / "split.npz"
    pictures, labels = batch(56, 1, 32).numpy()[:, 0], np.arange(56)[:, None] % 2
    pictures = (pictures * np.where(labels == 1, 255, 120)[..., None]).astype(np.uint8)
    np.savez(path, train_images=pictures[:40], train_labels=labels[:40], val_images=pictures[40:],
             val_labels=labels[40:])
    return path


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """In an empty folder, with a smaller network under the name tiny."""
    monkeypatch.setitem(encoders.ENCODERS, "tiny", TINY)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MEDSSL_CACHE", str(tmp_path / "cache"))


def fails(capsys, *words, status=2):
    """What train.py says when it is called wrongly; the status and a single line are part of it."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        cli.run(lambda: train.main([str(w) for w in words]))
    said = capsys.readouterr().err.strip()
    assert stopped.value.code == status and "\n" not in said and "Traceback" not in said, said
    return said


def test_a_run_leaves_what_it_promises(folder, capsys):
    train.main(["--method", "moco", "--data", str(folder), "--encoder", "tiny", "--out", "run", "--set",
                "queue_size=24", "dim=16", "--keep-every", "2", *FAST])
    out = Path("run")
    assert {p.name for p in out.iterdir()} == {"config.json", "log.jsonl", "checkpoint.pt", "encoder.pt",
                                               "encoder.json", "encoder-2.pt", "encoder-2.json",
                                               "views.png", "curves.png", "spectrum.png"}
    run = files.read_run(out)
    assert (run.data, run.size, run.channels, run.encoder, run.deal) == (str(folder.resolve()), 32, None, "tiny", None)
    assert torch.load(out / "checkpoint.pt", weights_only=True)["method"]["queue"].shape == (24, 16)
    encoders.load(out, encoders.build("tiny", 1, "default"))
    log = files.read_log(out / "log.jsonl")
    assert [line["step"] for line in log] == [1, 2, 3]
    assert {"loss", "chance", "lr", "images_per_s", "rank_me", "spread"} <= log[-1].keys()
    for path in out.iterdir():                                              # neither file names nor places
        assert b"bright" not in path.read_bytes() or path.name == "config.json"

    before = torch.load(out / "encoder.pt", weights_only=True)
    train.main(["--resume", "--out", "run"])                                # nothing left to do, nothing changed
    assert all(torch.equal(v, before[k]) for k, v in torch.load("run/encoder.pt", weights_only=True).items())
    assert "--init run" in fails(capsys, "--resume", "--out", "run", "--steps", "9")
    train.main(["--method", "rotation+simclr", "--data", str(folder), "--encoder", "tiny", "--init",
                "run/checkpoint.pt", "--out", "next", "--set", "simclr.temperature=0.2", "rotation.weight=0.5", *FAST])
    said = capsys.readouterr().out
    assert f"starting from run/checkpoint.pt: {len(before)} of {len(before)} tensors" in said
    assert "note: taken: " in said and "left out: " in said                 # the head, the queue, the slow copies


def at_each_step(monkeypatch, do):
    """Calls do(step) before the first step, and after each one before its record is passed on."""
    original = loop.fit

    def fit(*args, **words):
        do(0)
        for record in original(*args, **words):
            do(record["step"])
            yield record
    monkeypatch.setattr(loop, "fit", fit)


def test_resume_needs_nothing_but_the_folder(split, monkeypatch):
    """Weights, log and pictures of a run that was killed and resumed are those of the uninterrupted run."""
    words = ["--method", "byol", "--data", str(split), "--deal", "1", *FAST]
    train.main([*words, "--out", "whole"])
    state = torch.load("whole/checkpoint.pt", weights_only=True)

    def kill(step):
        if step == 3:                                                       # not saved yet
            raise KeyboardInterrupt
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        at_each_step(patch, kill)
        train.main([*words, "--out", "again", "--save-every", "1"])
    assert torch.load("again/checkpoint.pt", weights_only=True)["step"] == 2
    Path("again/.encoder.pt.1234.part").write_bytes(b"half")
    shutil.copy("whole/encoder.pt", "again/encoder.pt")                     # of a later step than the checkpoint
    with Path("again/log.jsonl").open("a") as log:
        log.write('{"step": 3, "loss": 99.0, "lr": 0.0, "images_per_s": 1.0}\n{"step": 4, "lo')
    train.main(["--resume", "--out", "again"])
    resumed = torch.load("again/checkpoint.pt", weights_only=True)
    assert resumed["step"] == 3 and all(torch.equal(v, state["method"][k]) for k, v in resumed["method"].items())
    first, second = (files.read_log(Path(name) / "log.jsonl") for name in ("whole", "again"))
    for record in first + second:
        del record["images_per_s"]
    assert first == second
    assert {path.name for path in Path("again").iterdir()} == {path.name for path in Path("whole").iterdir()}
    for name in ("curves.png", "spectrum.png", "views.png"):
        assert Path("again", name).read_bytes() == Path("whole", name).read_bytes(), name


def test_a_config_that_does_not_do_and_a_checkpoint_of_another_method(split, capsys):
    train.main(["--method", "simclr", "--data", str(split), *FAST, "--out", "run"])
    whole = json.loads(Path("run/config.json").read_text())
    old = {key: value for key, value in whole["arguments"].items() if key != "deal"}
    for content, said in (({"arguments": 5}, "damaged"), ({"arguments": whole["arguments"] | {"parts": 5}}, "damaged"),
                          ({"data": None}, "damaged"), ({"arguments": old}, "earlier version")):
        Path("run/config.json").write_text(json.dumps(whole | content))
        assert said in fails(capsys, "--resume", "--out", "run"), content
    Path("run/config.json").write_text(json.dumps(whole))
    train.main(["--method", "rotation", "--data", str(split), *FAST, "--out", "other"])
    shutil.copy("other/checkpoint.pt", "run/checkpoint.pt")
    assert "belongs to another method" in fails(capsys, "--resume", "--out", "run")


def test_both_random_networks_stand_beside_the_trained_one_and_harm_is_told(split, capsys, monkeypatch):
    """As it starts, and with BatchNorm's statistics of the images: what each scores is known from elsewhere."""
    knn, asked = Monitor.knn, []

    def poor(monitor, encoder, name="trained"):
        """After training everything is wrong."""
        asked.append(name)
        score = knn(monitor, encoder, name)
        if name == "trained":
            monitor.right[name][:] = False
            score = 0.3 - len(asked) / 10
        return score
    monkeypatch.setattr(Monitor, "knn", poor)
    train.main(["--method", "simclr", "--data", str(split), *FAST, "--out", "run"])
    said = capsys.readouterr().out
    dataset = data.load(split, 32)
    torch.manual_seed(0)
    encoder = encoders.build("tiny", 1, "default", dataset.mean, dataset.std)
    rows, val, right = dataset.rows("train"), dataset.rows("val"), []
    for _ in range(2):
        known, asked = (features.extract(encoder, dataset.images, which, torch.device("cpu")) for which in (rows, val))
        votes = features.knn(known, dataset.labels[rows], asked).argmax(1)
        right.append(metrics.balanced_accuracy(dataset.labels[val], votes))
        features.set_statistics(encoder, dataset.images, rows, torch.device("cpu"))
    assert f"{right[0]:.3f} before training; {right[1]:.3f} before training, normalised; 0.500 by chance" in said
    assert "LESS THAN BEFORE" in said and "--steps 1 " in said and "--views mild" in said


def test_a_fall_within_its_error_is_not_told(split):
    dataset = data.load(split, 32)
    monitor = Monitor(encoders.build("tiny"), dataset, dataset.rows("train"), torch.device("cpu"),
                      loop.Config(steps=2, batch=8, lr=1.0, out="."))
    monitor.looks, monitor.start = {1: 0.5}, {"before training": 1.0}
    for wrong, told in ((1, False), (2, False), (10, True)):
        monitor.right = {"before training": np.ones(16, bool), "trained": np.arange(16) >= wrong}
        assert monitor.fell() == told, wrong
    monitor.right["trained"] = np.arange(16) >= 10
    monitor.dataset.groups = np.zeros(len(dataset), int)                    # all of one patient: nothing is known
    assert not monitor.fell()


def test_views_are_drawn_before_the_first_step_and_the_rest_at_each_look(split, monkeypatch):
    seen = []
    at_each_step(monkeypatch, lambda step: seen.append({path.name for path in Path("run").glob("*.png")}))
    train.main(["--method", "genesis", "--data", str(split), *FAST, "--out", "run"])
    assert seen[0] == {"views.png"} and seen[2] == {"views.png", "curves.png", "spectrum.png", "restored.png"}
    mean = json.loads(Path("run/config.json").read_text())["encoder"]["mean"]
    level = torch.load("run/checkpoint.pt", weights_only=True)["method"]["level"]           # where its pictures begin
    assert level.sigmoid().flatten().tolist() == pytest.approx(mean)


def test_after_ctrl_c_the_last_line_goes_on(split, monkeypatch, capsys):
    before = signal.getsignal(signal.SIGINT)
    at_each_step(monkeypatch, lambda step: step == 1 and signal.raise_signal(signal.SIGINT))
    train.main(["--method", "simclr", "--data", str(split), *FAST, "--out", "my run"])
    said = capsys.readouterr().out.strip().splitlines()
    assert said[-1] == "next: python train.py --resume --out 'my run'" and any("2 of 3 steps" in line for line in said)
    assert torch.load("my run/checkpoint.pt", weights_only=True)["step"] == 2
    assert signal.getsignal(signal.SIGINT) is before


def test_a_failed_start_leaves_nothing(folder, monkeypatch):
    def broken(*args, **words):
        Path("run/log.jsonl").write_text("")
        raise RuntimeError("broken")
    monkeypatch.setattr(train.loop, "fit", broken)
    words = ["--method", "simclr", "--data", str(folder), *FAST, "--out", "run"]
    for before in ([], ["mine.txt"]):
        for name in before:
            Path("run").mkdir()
            Path("run", name).write_text("not ours")
        with pytest.raises(RuntimeError):
            train.main(words)
        assert [path.name for path in Path("run").glob("*")] == before


def test_a_full_disk_is_a_line_and_the_last_checkpoint_is_kept():
    """ulimit bounds what a process may write to a file."""
    Path("run").mkdir()
    files.save_torch("run/checkpoint.pt", {"x": torch.zeros(3)})
    before = Path("run/checkpoint.pt").read_bytes()
    limited = "import resource, runpy, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); " \
              "resource.setrlimit(resource.RLIMIT_FSIZE, (30000, 30000)); sys.argv = sys.argv[1:]; " \
              "from medssl.common import files, cli; " \
              "import torch; cli.run(lambda: files.save_torch('run/checkpoint.pt', {'x': torch.zeros(10**6)}))"
    done = subprocess.run([sys.executable, "-c", limited, "train.py"], capture_output=True, text=True,
                          env=os.environ | {"PYTHONPATH": str(Path(train.__file__).parent)})
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and "disk full" in done.stderr, done.stderr
    assert Path("run/checkpoint.pt").read_bytes() == before and not list(Path("run").glob(".*.part"))


WRONG = {                           # words: what is said
    "--method simclear": "did you mean simclr", "--method byol+byol": "no part may stand twice",
    "--method simclr+byol --set dim=8": "PART.NAME", "--method simclr+byol --set simclr.weight=abc": "simclr.weight",
    "--steps 0": "--steps", "--methd simclr": "did you mean --method", "--accum 3": "must divide",
    "--set temprature=1": "did you mean temperature", "--set temperature=hot": "float",
    "--set temperature": "write name=value", "--set temperature=1e999": "not a finite number",
    "--set decoder.skips=False": "has no decoder", f"--set dim={10**15}": "--set dim=",
    "--weight-decay -1": "--weight-decay", "--weight-decay nan": "--weight-decay", f"--seed {2**63}": "--seed",
    "--init nothing.pt": "no such file", "--options trust=0.1": "option of adamw 'trust'",
    "--options betas=(0.9,)": "--options of adamw", "--optimizer sgd --options momentum=-1": "-1",
    "--optimizer lars --options eps=x": "--options of lars", "--warmup 9": "--warmup", "--batch 1": "--batch",
    f"--batch {2**40}": "--batch", "--accum 6 --batch 6": "--batch", "--size 99999": "--size",
    "--device cuda:x": "--device", "--device nothing": "--device", "--data nowhere": "nowhere",
    "--data empty": "empty", "--data ~nosuchuser/x": "nosuchuser", "--data loop": "loop", "--data a\udcff": "--data",
    "--out file/run": "file", "--out old": "holds checkpoint.pt already; --resume", "--out loop": "loop",
}


@pytest.mark.parametrize(("words", "said"), WRONG.items(), ids=map(ascii, WRONG))
def test_wrong_words(words, said, folder, capsys):
    Path("empty").mkdir()
    Path("old").mkdir()
    Path("old/checkpoint.pt").write_bytes(b"")
    Path("file").write_text("")
    Path("loop").symlink_to("loop")
    assert said in fails(capsys, "--data", folder, "--method", "simclr", *FAST, *words.split())
    assert not Path("runs").exists()


def test_wrong_ways_to_resume(capsys):
    for words, said in (([], "needs --out"), (["--out", "nothing"], "no checkpoint.pt"),
                        (["--out", "x", "--batch", "3"], "leave out --batch")):
        assert said in fails(capsys, "--resume", *words)


def test_nothing_is_written_onto_what_is_no_file(tmp_path):
    (tmp_path / "mine").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "mine")
    os.mkfifo(tmp_path / "pipe")
    for name in ("link", "pipe"):
        with pytest.raises(ValueError, match="choose another name"):
            files.write_json(tmp_path / name, {})
    assert (tmp_path / "mine").read_text() == "mine" and (tmp_path / "link").is_symlink()


def test_lack_of_memory_is_a_line(capsys, monkeypatch):
    monkeypatch.setattr(train, "main", lambda _: torch.empty(2**50))
    assert "smaller --size" in fails(capsys)
    with pytest.raises(RuntimeError, match="shape"):
        cli.run(lambda: torch.rand(2, 2) @ torch.rand(3, 3))


# ---- what no flag says

def complete(*words, count=1000, side=64, channels=1, fixed_length=False):
    args = train.parse(["--data", "x", *words])
    config.complete(args, METHODS, config.Found(count, side, channels, fixed_length))
    return args


def test_recipes_become_settings():
    """The rate is given per 256 images for SGD and the like, and as it stands for Adam; epochs become steps."""
    paper = ["--preset", "paper", "--encoder", "tiny", "--size", "64"]
    recipe = config.recipe_of(METHODS["moco"])
    args = complete("--method", "moco", "--batch", "128", "--epochs", "4", *paper)
    args.out = "x"
    assert config.training(args).lr == pytest.approx(recipe["lr"] / 2) and args.steps == 28
    for name in set(METHODS) - {"together"}:
        args = complete("--method", name, *paper)
        assert args.steps > 1 and args.warmup <= args.steps // 10
        assert args.optimizer == config.recipe_of(METHODS[name])["optimizer"]
        args.out = "x"
        assert config.training(args).lr == args.lr * (args.batch / 256 if args.optimizer in optim.SCALED else 1)


def test_the_small_preset_looks_at_the_set(monkeypatch):
    monkeypatch.setattr(moco, "SMALL", {})
    small = lambda *words, **found: complete("--method", "moco", *words, **found)           # noqa: E731
    assert [small(side=side).size for side in (28, 56, 64, 90, 96, 336)] == [64, 64, 64, 96, 96, 96]
    args = small()
    assert (args.encoder, args.optimizer, args.batch, args.stem) == ("tiny", "adamw", 64, "default")
    assert [small(count=count).steps for count in (64, 500, 10**6)] == [500, 200 * 7, 2000]
    assert small(fixed_length=True).steps == 500
    assert small(count=40).batch == 32 and small("--steps", "7").steps == 7
    assert [small("--steps", steps).warmup for steps in ("9", "100", "1000")] == [0, 10, 30]
    assert small(count=200).parts["moco"].words["queue_size"] == 50 and small(count=200).parts["moco"].queue_cut
    asked = small("--set", "queue_size=70", count=200).parts["moco"]
    assert asked.words["queue_size"] == 70 and asked.queue_cut is None
    assert [small(channels=channels).parts["moco"].views for channels in (1, 3)] == ["slices", "histology"]
    assert small("--views", "ct", channels=3).parts["moco"].views == "ct"
    assert small("--channels", "1", channels=3).parts["moco"].views == "slices"


def test_what_a_method_needs_stands_beside_its_recipe(monkeypatch):
    monkeypatch.setattr(moco, "SMALL", {"temperature": 0.5, "views": "xray", "steps": 700, "stem": "nopool", "lr": 0.5,
                                        "batch": 16})
    args = complete("--method", "moco", count=100)
    assert (args.steps, args.stem, args.lr, args.batch) == (1200, "nopool", 0.5, 16)
    assert args.parts["moco"].views == "xray"
    assert args.parts["moco"].words == {"temperature": 0.5, "queue_size": 25}
    assert complete("--method", "moco", count=16).steps == 700
    assert "temperature" not in complete("--method", "moco", "--preset", "paper").parts["moco"].words


def test_settings_of_the_optimiser():
    args = complete("--method", "byol", "--optimizer", "lars", "--options", "trust=0.02", "--warmup", "30")
    assert args.options == {"trust": 0.02} and args.warmup == 30 * (1000 // 64) > args.steps / 10   # as was asked
    paper = ["--preset", "paper", "--method"]
    assert complete(*paper, "swav", "--options", "trust=0.5").options == {"momentum": 0.9, "trust": 0.5}
    assert complete(*paper, "swav", "--optimizer", "adamw").options == {}   # they were another optimiser's


def test_the_end_of_the_decay():
    """--weight-decay sets the start alone: SparK's own value given by hand is SparK's own schedule."""
    paper = ["--preset", "paper", "--method", "spark"]
    assert [complete(*paper, *words).weight_decay_end for words in
            ([], ["--weight-decay", "0.04"], ["--weight-decay-end", "0.3"])] == [0.2, 0.2, 0.3]
    args = complete("--method", "spark", "--weight-decay", "0.04", "--weight-decay-end", "0.2")
    assert (args.weight_decay, args.weight_decay_end) == (0.04, 0.2)
    assert complete("--method", "spark").weight_decay_end is None


def test_phantoms_are_as_they_are_said_to_be():
    kinds, splits = data.phantoms._deal(round(2000 / 9), np.random.default_rng(0))
    patients = np.arange(2000) * round(2000 / 9) // 2000
    learnt_from = np.isin(np.asarray(splits)[patients], data.LEARNT_FROM).sum()
    assert config.look(train.parse([]))[1].images == learnt_from


def test_a_set_is_looked_at_without_decoding_it(folder, split, tmp_path):
    np.save(tmp_path / "x.npy", np.zeros((9, 50, 70, 3), np.uint8))
    for path, found in ((folder, (40, 32, 1)), (split, (40, 32, 1)), (tmp_path / "x.npy", (9, 70, 3))):
        seen = config.look(train.parse(["--data", str(path)]))[1]
        assert (seen.images, seen.side, seen.channels) == found
    assert not (tmp_path / "cache").exists()


class Mine(Rotation):
    __module__ = Rotation.__module__                                        # whose recipe it takes

    def __init__(self, encoder, augment, wrong=0):
        super().__init__(encoder, augment)
        self.wrong = wrong
        if wrong == 1:
            raise ValueError("wrong is 1; it must be 0")

    def views(self, images):
        x, turns = (1, 2, 3) if self.wrong == 3 else super().views(images)
        return x, turns

    def forward(self, x, turns):
        return super().forward(x, turns[:3])


def test_a_mistake_in_the_code_keeps_its_traceback(folder, monkeypatch, capsys):
    monkeypatch.setitem(METHODS, "mine", Mine)
    words = ["--method", "mine", "--data", str(folder), *FAST]
    assert "mine (--set wrong=1): wrong is 1" in fails(capsys, *words, "--set", "wrong=1")
    for wrong, message in ((3, "too many values"), (4, "batch_size")):
        with pytest.raises(ValueError, match=message):
            cli.run(lambda wrong=wrong: train.main([*words, "--set", f"wrong={wrong}"]))
    assert not Path("runs/mine-pictures0/checkpoint.pt").exists()


def test_a_look_at_the_exported_encoder_leaves_the_method_in_its_mode(split):
    dataset, method = data.load(split, 32), byol.BYOL(encoders.build("tiny"), Flip(), export="target")
    settings = loop.Config(steps=10**9, batch=8, lr=1.0, out=".")
    monitor = Monitor(method.encoder, dataset, dataset.rows("train"), torch.device("cpu"), settings)
    assert [monitor.due(step) for step in (1, 10**8, 10**9 - 1, 10**9)] == [False, True, False, True]
    with torch.no_grad():
        for p in method.target_encoder.parameters():
            p.zero_()
    assert method.train() and np.isnan(monitor.look(method, 1)["rank_me"])  # the target's features are all nought
    assert method.training and method.encoder.bn1.training
    assert method.eval() and monitor.look(method, 2) and not method.training
