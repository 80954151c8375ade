"""The command line of evaluate.py: what it writes, that it leaks nothing, and one clear line for every misuse."""

import csv
import functools
import json
import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import evaluate
from medssl.common import cli, encoders, metrics
from medssl.common.evaluation import figures, keep, readouts, report, scores, study, subsets, tasks
from medssl.common.evaluation.study import Cell, Model, Study
from medssl.common.evaluation.tasks import TASKS
from tests.common import TINY, batch

DRAWN = {name: getattr(figures.pictures, name)
         for name in ("bars", "panels", "curves", "spectrum_chart", "confusion_picture", "overlays")}
PICTURES = {"scores.png", "labels-knn.png", "labels-unet.png", "convergence-finetune.png", "confusion-knn-run.png",
            "overlay-segment-random.png", "overlay-unet-run.png", "spectrum.png"}
CPU = ["--device", "cpu"]
FAST = ["--steps", "2", "--batch", "16", "--seeds", "2", *CPU]
ONCE = ["--steps", "2", "--batch", "16", "--seeds", "1", *CPU]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A set of 96 gray pictures (three classes by brightness, a bright block as mask, 24 patients), a run on it, and
    weights of other kinds."""
    root = tmp_path_factory.mktemp("home")
    lines, pictures = ["file,label,mask,split,group,one,own"], batch(96, 1, 32).numpy()[:, 0]
    for folder in ("images", "masks"):
        (root / "set" / folder).mkdir(parents=True)
    for i, picture in enumerate(pictures):
        kind, patient, mask = i % 3, i // 4, np.zeros((32, 32), np.uint8)
        mask[8:20, 4 * (i % 4):4 * (i % 4) + 12] = 1
        Image.fromarray((picture * 60 + 40 * kind + 60 * mask).astype(np.uint8)).save(root / f"set/images/{i}.png")
        Image.fromarray(mask).save(root / f"set/masks/{i}.png")
        split = "test" if patient % 4 == 1 else "val" if patient % 4 == 3 else "train"
        kinds = f"{'dark medium bright'.split()[kind]},masks/{i}.png,{split},p{patient},same,{'ab'[patient // 4 % 2]}"
        lines.append(f"images/{i}.png,{kinds}")
    (root / "set/split.csv").write_text("\n".join(lines))
    make_run(root / "run", root / "set", 1, 32)
    return root


def make_run(folder, data, channels, size, mean=(0.3,), std=(0.2,), **arguments):
    """A run as train.py leaves it, but untrained."""
    folder.mkdir(exist_ok=True)
    torch.manual_seed(9)
    encoders.save(encoders.build("tiny", channels, "default", mean, std), folder / "encoder.pt")
    (folder / "config.json").write_text(json.dumps({
        "arguments": {"data": str(data), "label": "label", "channels": None, **arguments},
        "data": {"channels": channels, "size": size, "classes": []},
        "encoder": {"name": "tiny", "channels": channels, "stem": "default", "mean": mean, "std": std}}))


@pytest.fixture(autouse=True, scope="module")
def small(tmp_path_factory):
    """One cache for all tests, smaller networks under the names tiny and resnet18, intervals from few draws, two
    strengths of the linear probe's penalty to choose from, and no pictures but where they are looked at."""
    with pytest.MonkeyPatch.context() as patch:
        for name in DRAWN:
            patch.setattr(figures.pictures, name, lambda *_, **__: None)
        patch.setitem(encoders.ENCODERS, "resnet18", encoders.ENCODERS["tiny"])
        patch.setitem(encoders.ENCODERS, "tiny", TINY)
        patch.setenv("MEDSSL_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setattr(readouts, "L2_GRID", readouts.L2_GRID[1::3])
        patch.setattr(metrics, "draws", functools.partial(metrics.draws, repeats=40))
        yield


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def run(*words):
    evaluate.main([str(word) for word in words])


def results(out, part="cells"):
    return json.loads((Path(out) / "results.json").read_text())[part]


def fails(capsys, *words):
    """What evaluate.py says when it is called wrongly; status 2 and a single line are part of it."""
    capsys.readouterr()                                                     # what was said before
    with pytest.raises(SystemExit) as stopped:
        cli.run(lambda: run(*words))
    said = capsys.readouterr().err.split("\r")[-1].strip()
    assert stopped.value.code == 2 and "\n" not in said and "Traceback" not in said, said
    return said


@pytest.fixture(scope="module")
def whole(home, tmp_path_factory):
    """One evaluation with everything, watched: which rows each fit was asked for, in order; how each was trained."""
    asked, trained, out = [], [], tmp_path_factory.mktemp("out") / "results"
    save_features(home)
    with pytest.MonkeyPatch.context() as patch:
        answered, do, tune, answers, probe = tasks.answered, tasks.do, readouts.tune, readouts.answers, \
            readouts.linear_probe
        patch.setattr(tasks, "do", lambda study, cell, *rest: asked.append([cell.task]) or do(study, cell, *rest))
        patch.setattr(tasks, "answered", lambda fit, predict, **facts: answered(
            fit, lambda rows: asked[-1].append(rows) or predict(rows), **facts))
        patch.setattr(readouts, "answers", lambda method, images, rows, *rest:
                      asked[-1].append(rows) or answers(method, images, rows, *rest))
        patch.setattr(readouts, "linear_probe", lambda x, y, train, val, *rest:
                      asked[-1].extend([train, val]) or probe(x, y, train, val, *rest))
        patch.setattr(readouts, "tune", lambda method, *rest: trained.append(
            (asked[-1][0], rest[3], readouts.fingerprint(method.head))) or tune(method, *rest))
        for name, draw in DRAWN.items():
            patch.setattr(figures.pictures, name, draw)
        run(home / "run", *(home / f"{name}.npz" for name in ("theirs", "by_row", "tiny", "grey")), "thumbnails",
            "statistics", f"{home}/run+statistics", "--task", "knn", "linear", "finetune", "segment", "unet",
            "collapse", "--labels", "1.0", "7n", "--out", out, *FAST)
    return SimpleNamespace(out=out, asked=asked, trained=trained)


def save_features(home):
    """Files of features: those of the run, by file name and by row, and thumbnails and statistics by hand."""
    names = np.array([f"images/{i}.png" for i in range(96)])
    pixels = np.stack([np.array(Image.open(home / "set" / name)) for name in names]) / 255                # (96, 32, 32)
    encoder = encoders.build("tiny", 1, "default", (0.3,), (0.2,)).eval()
    encoder.load_state_dict(torch.load(home / "run/encoder.pt", weights_only=True))
    with torch.no_grad():
        theirs = encoder(torch.tensor(pixels[:, None]).float()).numpy()
    order = np.random.default_rng(0).permutation(96)                        # files may come in any order
    np.savez(home / "theirs.npz", features=theirs[order], files=names[order])
    np.savez(home / "by_row.npz", features=theirs)
    train = np.arange(96) // 4 % 4 % 2 == 0
    standard = (pixels - pixels[train].mean()) / pixels[train].std()
    np.savez(home / "tiny.npz", features=standard.reshape(-1, 8, 4, 8, 4).mean((2, 4)).reshape(-1, 64))
    grey = pixels.reshape(96, -1)
    grey = np.column_stack([grey.mean(1), grey.std(1), np.percentile(grey, [1, 5, 10, 25, 50, 75, 90, 95, 99], 1).T])
    np.savez(home / "grey.npz", features=(grey - grey[train].mean(0)) / grey[train].std(0))


def test_results(whole):
    assert results(whole.out, "data")["labels"]["images"] == {"train": 48, "val": 24, "test": 24}
    assert results(whole.out, "data")["masks"]["patients"]["train"] == 12
    fits = {(f["task"], f["labels"], f["model"], f["seed"]): f for f in results(whole.out, "fits")}
    # finetune and unet have one random model, the frozen tasks two; knn and linear 7 rows without a network
    assert len(fits) == 2 * len(results(whole.out)) == 2 * (2 * (2 * (3 + 7) + 3 + 2 * 2) + 3 + 6)
    assert fits["knn", "7n", "run", 1]["train_images"] == 7 and fits["knn", "1.0", "run", 1]["train_patients"] == 12
    assert fits["linear", "1.0", "run", 0]["l2"] in readouts.L2_GRID
    right = 24 * fits["linear", "1.0", "run", 0]["scores"]["accuracy"]
    assert right == pytest.approx(round(right), abs=1e-3)
    epochs = [epoch for epoch, _ in fits["finetune", "7n", "run", 0]["curve"]]
    assert epochs == pytest.approx([0, 1 / 3, 2 / 3], abs=1e-5)
    for task in ("knn", "linear", "segment", "collapse"):                   # a random encoder of its own for every seed
        assert len({f["frozen"] for f in fits.values() if f["task"] == task and f["model"] == "random"}) == 2
        assert len({f["frozen"] for f in fits.values() if f["task"] == task and f["model"] == "run"}) == 1
    cell = next(c for c in results(whole.out) if (c["task"], c["labels"], c["model"]) == ("unet", "7n", "run"))
    pair = next(d for d in results(whole.out, "differences")
                if (d["task"], d["labels"], d["metric"]) == ("unet", "7n", "dice"))
    own, base = ([fits["unet", "7n", name, seed]["scores"]["dice"] for seed in (0, 1)] for name in ("run", "random"))
    assert cell["scores"]["dice"]["mean"] == pytest.approx(np.mean(own), abs=1e-5) and cell["seeds"] == 2
    assert cell["scores"]["dice"]["spread"] == pytest.approx(np.std(own, ddof=1), abs=1e-5)
    assert pair["mean"] == pytest.approx(np.mean(own) - np.mean(base), abs=1e-5) and pair["seeds"] == 2
    assert pair["interval"][0] <= pair["mean"] <= pair["interval"][1]
    assert {"epochs_to_95", "epochs_to_95_of_random", "iou", "dice_per_slice", "dice 1"} <= cell["scores"].keys()
    with open(whole.out / "results.csv") as file:
        lines = list(csv.DictReader(file))
    assert {"auc", "recall dark", "average_precision", "rank_me", "iou 1"} <= {line["metric"] for line in lines}
    assert PICTURES <= {path.name for path in whole.out.glob("*.png")}
    for kind in ("run-finetune", "random-unet"):                            # what train.py --init takes
        encoder = encoders.build("tiny", 1, "default")
        assert encoders.load(whole.out / kind, encoder)[0] == len(encoder.state_dict())
        assert readouts.fingerprint(encoder) != fits["knn", "1.0", "run", 0]["frozen"]


def test_rows_are_asked_for_once_and_choices_are_made_on_validation(whole):
    """Each fit that learns asks for the 24 test rows once, at its end; before that, only training asks for validation
    rows."""
    test, val = ({i for i in range(96) if i // 4 % 4 == part} for part in (1, 3))
    learning = [each for each in whole.asked if TASKS[each[0]].target]
    assert len(learning) == 2 * 2 * (2 * (3 + 7) + 3 + 2 * 2)
    for task, *rows in learning:
        kinds = [set(r) == test or bool(set(r) & test) and "mixed" for r in rows]
        trained = TASKS[task].trains                                        # `answers` sees the same rows again there
        assert kinds == [False] * (len(kinds) - 1 - trained) + [True] * (1 + trained), task
        chosen = rows[:-2] if trained else rows[1:2] if task == "linear" else []
        assert all(set(r) == val for r in chosen) and (task == "knn" or chosen), task


def test_how_read_outs_are_trained(whole):
    """The same heads on both encoders of a seed, at ten times the rate, gradients clipped."""
    for task in ("finetune", "unet", "segment"):
        own = [(training, head) for name, training, head in whole.trained if name == task]
        assert {training.config.seed for training, _ in own} == {0, 1} and len({head for _, head in own}) == 2
        assert all(training.head_rate == pytest.approx(10) and training.config.clip == 5 and training.config.lr == 1e-3
                   for training, _ in own)


def test_features_without_a_network(whole, home, capsys):
    """Those of another program score as the weights that they came from; thumbnails and statistics as written here."""
    own = {(c["task"], c["labels"], c["model"]): {name: score["mean"] for name, score in c["scores"].items()}
           for c in results(whole.out)}
    for task, labels in (("knn", "1.0"), ("linear", "7n"), ("collapse", None)):
        for one, other in (("run", "theirs"), ("run", "by_row"), ("tiny", "thumbnails"), ("grey", "statistics")):
            assert own[task, labels, other] == pytest.approx(own[task, labels, one], abs=1e-4, nan_ok=True), task
    assert ("linear", "1.0", "run+statistics") in own and ("collapse", None, "run+statistics") not in own
    data = ["--data", home / "set"]
    assert "none of the models is a network" in fails(capsys, "thumbnails", *data, "--features", "x")
    Path("thumbnails").mkdir()                                              # a folder of that name comes first
    assert "neither a run nor a file of weights" in fails(capsys, "thumbnails", *data)
    features, names = np.zeros((96, 2)), [f"images/{i}.png" for i in range(96)]
    for arrays, word in (({"features": features[:90], "files": names[:90]},
                          "6 of them have none, first images/90.png, images/91.png, images/92.png"),
                         ({"features": features[:90]}, "has 96"), ({"x": np.zeros(3)}, "cannot be read"),
                         ({"features": features, "files": names[:90]}, "for 90 images"),
                         ({"features": features + np.nan}, "finite"), ({"features": np.array([{}], object)}, "read"),
                         ({"features": np.zeros(96)}, "must be a table")):
        np.savez("raw.npz", **arrays)
        assert word in fails(capsys, "raw.npz", *data)


def test_joined_features_weigh_alike(home):
    """Each part has mean 0 over the training images and the same total variance."""
    args = evaluate.parse([str(home / "run+statistics"), "--cache", "cache"])
    own = study.open_study(args, torch.device("cpu"))
    own.targets["labels"] = subsets.find_target(own.dataset, own.groups, "labels", own.note)
    joined, _ = own.features(own.models[-1], 0)
    part = joined[own.targets["labels"].rows["train"]]
    assert own.models[-1].name == "run+statistics" and joined.shape == (96, 64 + 11)
    torch.testing.assert_close(part.mean(0), torch.zeros(75), atol=1e-5, rtol=0)
    assert part[:, 64:].var(0, correction=0).sum().item() == pytest.approx(1, abs=1e-3)
    assert part[:, :64].var(0, correction=0).sum().item() == pytest.approx(1, abs=0.2)     # dead features are 0


def test_random_normalised_has_seen_training_images_alone(home):
    """Test and validation images do not move its statistics; the untouched random row has 0 and 1."""
    args = evaluate.parse(["--data", str(home / "set"), "--encoder", "tiny"])
    own = study.open_study(args, torch.device("cpu"))
    plain, normalised = (model.fresh(own, 3) for model in own.models)
    own.dataset.images = own.dataset.images.copy()
    own.dataset.images[own.dataset.rows("val", "test")] = 255
    again = own.models[1].fresh(own, 3)
    assert plain.bn1.running_mean.abs().max() == 0 and normalised.bn1.running_mean.abs().max() > 1e-3
    torch.testing.assert_close(again.bn1.running_mean, normalised.bn1.running_mean)


@pytest.fixture(scope="module")
def npz(tmp_path_factory):
    """A MedMNIST file of 28-pixel pictures, bright or dark; and the same pictures with their labels shuffled."""
    root, generator = tmp_path_factory.mktemp("npz"), np.random.default_rng(0)
    labels = generator.integers(2, size=700)
    images = (batch(700, 1, 24).numpy()[:, 0] * 100 + 80 * labels[:, None, None]).astype(np.uint8)
    for name, kinds in (("true", labels), ("shuffled", generator.permutation(labels))):
        parts = {"train": slice(0, 200), "val": slice(200, 300), "test": slice(300, 700)}
        np.savez(root / f"{name}.npz", **{f"{part}_images": images[rows] for part, rows in parts.items()},
                 **{f"{part}_labels": kinds[rows, None] for part, rows in parts.items()})
    return root


def test_it_learns_what_is_there_and_no_more(npz):
    """Bright and dark are told apart; with shuffled labels every read-out is at chance (400 test images:
    0.5 +- 0.05)."""
    for name in ("true", "shuffled"):
        run("--data", npz / f"{name}.npz", "--encoder", "tiny", "--stem", "default", "--task", "knn", "linear",
            "finetune", "--seeds", "1", "--steps", "12", "--batch", "32", "--out", name, *CPU)
    for cell in results("true"):
        assert cell["scores"]["balanced_accuracy"]["mean"] > 0.9 and cell["interval"]["auc"][0] > 0.9, cell
    for cell in results("shuffled"):
        assert abs(cell["scores"]["balanced_accuracy"]["mean"] - 0.5) < 0.08, cell
        assert abs(cell["scores"]["auc"]["mean"] - 0.5) < 0.1, cell


def copies(home, *paths):
    """The run's encoder or config.json under other names."""
    for path in map(Path, paths):
        path.parent.mkdir(exist_ok=True)
        path.write_bytes((home / "run" / ("encoder.pt" if path.suffix == ".pt" else "config.json")).read_bytes())


def test_series(home, capsys, monkeypatch):
    """Imbalance, resampling, strengths, freezing, the optimiser, several rates, and checkpoints of one run."""
    tune, drawn = readouts.tune, []
    monkeypatch.setattr(readouts, "tune", lambda *args: drawn.append(
        (args[1].labels[args[2]], args[4].weights, args[4].head_rate, args[4].config)) or tune(*args))
    copies(home, "many/encoder-10.pt", "many/encoder-9.pt", "many/config.json")
    run("many/encoder-10.pt", "many/encoder-9.pt", "--task", "linear", "finetune", "--imbalance", "1", "8", "--stage",
        "2", "--augment", "S0", "S6", "--resample", "--freeze", "0.4", "--loss", "balanced", "--all-columns",
        "--head-lr", "0.1", "--optimizer", "lars", "--lr", "0.02", "--weight-decay", "0.2", "--out", "out", "--steps",
        "3", "--batch", "16", "--seeds", "1", *CPU)
    assert [m["name"] for m in results("out", "models")] == ["random", "random, normalised", "many@9", "many@10"]
    sizes = {(f["imbalance"], f["augment"]): f["train_images"] for f in results("out", "fits")}
    # 2 : 2 : 2, 16 : 16 : 2
    assert sizes == {(1, None): 6, (8, None): 34, (1, "S0"): 6, (1, "S6"): 6, (8, "S0"): 34, (8, "S6"): 34}
    assert len(drawn) == 12
    assert all(np.bincount(labels, weights).tolist() == pytest.approx([1, 1, 1]) and rate == 5
               for labels, weights, rate, _ in drawn)
    assert {(config.optimizer, config.lr, config.weight_decay) for *_, config in drawn} == {("lars", 0.02, 0.2)}
    said = capsys.readouterr().out
    assert "in the first 1 the encoder is frozen" in said and "recall bright" in said and "kappa" in said


def test_the_rate_that_is_best_on_validation_is_taken(home, monkeypatch):
    """Each fit tries all rates from the same start; the record is the best one's, and its encoder is kept."""
    curves = {1e-4: [(0, 0.9), (1, 0.3)], 1e-2: [(0, 0.9), (1, 0.7)], 1e-3: [(0, 0.9), (1, 0.7)]}
    tried, monitored = [], []

    def tune(method, dataset, rows, score, training):
        tried.append((training.config.lr, training.head_rate, readouts.fingerprint(method)))
        torch.nn.init.constant_(method.encoder.conv1.weight, training.config.lr)
        return curves[training.config.lr]
    monkeypatch.setattr(readouts, "tune", tune)
    monkeypatch.setattr(readouts, "answers", lambda method, images, rows, device: monitored.append(
        method.encoder.conv1.weight.mean().item()) or np.full((len(rows), 3), 1 / 3))
    run(home / "run", "--task", "finetune", "--lr", *curves, "--out", "out", *ONCE)
    assert len(tried) == 6 and all(len({start for *_, start in tried[i:i + 3]}) == 1 for i in (0, 3))
    assert all(rate == pytest.approx(10) for _, rate, _ in tried) and monitored == pytest.approx([1e-2, 1e-2])
    assert [(f["lr"], f["validation"]) for f in results("out", "fits")] == [(1e-2, 0.7)] * 2
    assert encoders.load("out/run-finetune", kept := encoders.build("tiny"))
    assert kept.conv1.weight.mean().item() == pytest.approx(1e-2)


def test_exports(home, capsys):
    run(home / "run", "--export", "encoder.pt", "--features", "out.npz", *CPU)
    assert not Path("results").exists()                                     # nothing else was asked for
    x = torch.rand(2, 1, 32, 32)
    gray = encoders.build("tiny", 1, "default", (0.3,), (0.2,))
    colour = encoders.build("tiny", 3, "default", (0.3,) * 3, (0.2,) * 3)
    gray.load_state_dict(torch.load("encoder.pt", weights_only=True), strict=True)
    colour.load_state_dict(torch.load("encoder-rgb.pt", weights_only=True), strict=True)
    torch.testing.assert_close(gray.eval()(x), colour.eval()(x.repeat(1, 3, 1, 1)), atol=1e-4, rtol=1e-4)
    assert json.loads(Path("encoder-rgb.json").read_text())["mean"] == pytest.approx([0.3] * 3)
    with np.load("out.npz") as found:
        assert found["features"].shape == (96, 64) and (np.abs(found["features"]).sum(1) > 0).all()
        assert all(found[name].shape == (96,) for name in ("labels", "patients", "splits", "files"))
        assert found["classes"].tolist() == ["bright", "dark", "medium"]
    Path("mine").write_text("precious")                                     # what is there stays
    os.symlink("mine", "link.pt")
    os.mkfifo("pipe")
    Path("new-rgb.pt").write_text("precious")
    for flag, name in (("--export", "mine"), ("--features", "pipe"), ("--export", "link.pt"), ("--export", "new.pt")):
        assert "is there already" in fails(capsys, home / "run", flag, name, *CPU)
    assert Path("mine").read_text() == Path("new-rgb.pt").read_text() == "precious" and not Path("new.pt").exists()


def test_other_sizes_channels_and_files(home, capsys):
    """Another size or channel count is converted, and said; bare weights tell their kind."""
    run(home / "run", "--size", "40", "--channels", "3", "--task", "collapse", "--seeds", "1", *CPU)
    said = capsys.readouterr().out
    assert "trained on 1 x 32 x 32 images and is scored on 3 x 40 x 40 ones, its first layer summed or spread" in said
    big = encoders.build("resnet18", 3)
    state = {f"module.{key}": value for key, value in big.state_dict().items()}
    torch.save({"state_dict": state | {"module.fc.weight": torch.zeros(9, 512)}}, "imagenet.pth")
    Path("imagenet.json").write_text(json.dumps({"mean": [0.1, 0.2, 0.6], "std": [0.1, 0.2, 0.3]}))
    own = SimpleNamespace(dataset=SimpleNamespace(images=np.zeros((1, 1, 8, 8))), device="cpu", note=print)
    gray = study.open_network(Model("imagenet", "resnet18", "default", Path("imagenet.pth")), own)
    assert gray.mean == pytest.approx((0.3,)) and gray.std == pytest.approx((0.2,))
    torch.testing.assert_close(gray.conv1.weight, big.conv1.weight.sum(1, keepdim=True))
    run("imagenet.pth", home / "run", "--task", "collapse", "--seeds", "1", *CPU, "--out", "two")
    random = [f"random {kind}{more}" for kind in ("resnet18 default", "tiny default") for more in ("", ", normalised")]
    assert [m["name"] for m in results("two", "models")] == [*random, "imagenet", "run"]
    assert "as run saw them" in capsys.readouterr().out


def test_cross_validation(home, capsys):
    """--deal deals whole patients anew, by its seed; a run's own is taken, and words say so."""
    splits = []
    make_run(Path("dealt"), home / "set", 1, 32, deal=4)
    for words in ([home / "run"], [home / "run", "--deal", "4"], [home / "run", "--deal", "5"], ["dealt"]):
        own = study.open_study(evaluate.parse(list(map(str, words))), torch.device("cpu"))
        splits.append(own.dataset.splits.tolist())
        assert all(len(set(splits[-1][i:i + 4])) == 1 for i in range(0, 96, 4))
    assert splits[1] == splits[3] and len(set(map(tuple, splits))) == 3
    assert own.seeds[0] == 4000                                             # another random network for each deal
    assert "with other splits" in capsys.readouterr().out


def test_sets_that_lack_something(home, npz, capsys):
    words = [*CPU, "--encoder", "tiny", "--task"]
    assert "no masks" in fails(capsys, "--data", npz / "true.npz", *words, "segment")
    assert "only one class (same)" in fails(capsys, "--data", home / "set", "--label", "one", *words, "knn")
    np.save("stack.npy", np.stack([np.full((32, 32), 3 * i, np.uint8) for i in range(30)]))
    run("--data", "stack.npy", *CPU, "--encoder", "tiny", "--seeds", "1")
    assert "neither labels nor masks" in capsys.readouterr().out

    def some(wanted):
        """Some rows of the set, without masks."""
        with open(home / "set/split.csv") as file:
            rows = [row | {"file": home / "set" / row["file"]} for row in csv.DictReader(file) if wanted(row)]
        Path("some").mkdir(exist_ok=True)
        with open("some/split.csv", "w") as file:
            writer = csv.DictWriter(file, ["file", "label", "split", "group"], extrasaction="ignore")
            writer.writeheader()
            writer.writerows(rows)
        return "--data", "some", *words
    run(*some(lambda row: row["split"] != "val" and (row["label"], row["split"]) != ("bright", "train")),
        "knn", "linear", "--seeds", "1")
    said = capsys.readouterr().out
    assert "no image of the train split holds class bright: never predicted" in said and "no validation split" in said
    few = some(lambda row: row["split"] == "test" or row["group"] == "p0")
    assert "two in train and one in test" in fails(capsys, *few, "knn")


def test_wrong_words(home, capsys):
    words = [home / "run", *CPU]
    Path("file").write_text("")
    for given, word in (([], "--data"), (["nothing.pt"], "no such file"), ([*words, "--data", "nowhere"], "nowhere"),
                        ([*words, "--task", "knn", "--labels", "99n"], "99n"),
                        ([*words, "--task", "finetune", "--freeze", "10", "--epochs", "5"], "--freeze"),
                        ([home / "run", *words, "--export", "x.pt"], "exactly one"),
                        ([*words, "--export", "nowhere/x.pt"], "no folder"), ([*words, "--out", "file/deep"], "file"),
                        ([*words, "--task", "knn", "--per", "patient"], "several classes, as 6 have"),
                        *(([*words, *pair], pair[0]) for pair in (
                            ("--labels", "0"), ("--labels", "1.5"), ("--labels", "0n"), ("--imbalance", "0.5"),
                            ("--seeds", "0"), ("--lr", "-1"), ("--freeze", "-1")))):
        assert word in fails(capsys, *given), given
    assert not Path("results").exists()


def test_damaged_weights(home, capsys):
    state = torch.load(home / "run/encoder.pt", weights_only=True)
    torch.save(state | {"bn1.weight": torch.full((8,), float("nan"))}, "nan.pt")
    assert "not finite" in fails(capsys, "nan.pt", "--data", home / "set", *CPU)
    Path("nan.json").write_text(json.dumps({"name": "vit", "stem": "default"}))
    assert "unknown encoder in the .json of nan.pt 'vit'" in fails(capsys, "nan.pt", "--data", home / "set", *CPU)


def test_rows_are_named_after_runs(home):
    """Whichever of a run's files is given; a file that stands alone has its own name."""
    copies(home, "a/encoder.pt", "a/encoder-20.pt", "a/checkpoint.pt", "a/config.json", "checkpoint.pt")
    paths = "a", "a/encoder.pt", "a/encoder-20.pt", "a/checkpoint.pt", "checkpoint.pt", "a+statistics", "statistics"
    args = SimpleNamespace(encoder="tiny", stem="default")
    names = ["a", "a", "a@20", "a", "checkpoint", "a+statistics", "statistics"]
    assert [study.model_of(path, args).name for path in paths] == names
    assert study.file_name("a/b c@10") == "a_b_c@10"


# ---- records and reports

def test_differences_are_taken_seed_by_seed():
    """Two random rows, two encoders, three seeds; each encoder is held against the random one of its own kind; a seed
    that one lacks is left out; intervals are 95 % of the draws of the mean over all seeds."""
    kinds = {"random a": ("a", None), "random b": ("b", None), "one": ("b", "file"), "two": ("a", "file")}
    own = Study(None, None, None, [Model(name, kind, "default", file) for name, (kind, file) in kinds.items()], None)
    assert own.bases_of("one") == ["random b"] and own.bases_of("two") == own.bases_of("random a") == ["random a"]
    patients = np.random.default_rng(0).normal(size=(3, 60))                # a score of each patient in each seed

    def record(name, seed, value):
        def again(rows):
            return np.array([value + patients[seed, rows].mean() * (name == "two"), 2 * value])
        scored = scores.Scored({"dice": value, "iou": 0.5}, ("dice", "iou"), again, np.arange(60))
        return tasks.Record(name, Cell("unet", "1.0", None, "S1"), seed, np.ones((1, 3, 2)), train_images=10,
                            scored=scored)
    records = [record(name, seed, 0.1 * i + 0.01 * seed) for i, name in enumerate(kinds) for seed in range(3)
               if (name, seed) != ("one", 2)]
    own.targets["masks"] = SimpleNamespace(classes=("0", "1"))
    summaries, differences = report.summarise(own, records)
    assert [s.seeds for s in summaries] == [2] * 4 and summaries[2].mean("dice") == pytest.approx(0.205)
    assert summaries[2].scores["dice"]["spread"] == pytest.approx(0.01 / 2 ** 0.5)
    gains = {(d.first, d.second, d.metric): d.gain for d in differences}
    assert len(gains) == 12 and gains["two", "random a", "dice"].mean == pytest.approx(0.3)
    assert gains["one", "random b", "dice"].interval == pytest.approx([0.1, 0.1])
    assert gains["two", "one", "iou"].interval == pytest.approx([0.2, 0.2])
    assert gains["one", "random b", "dice"].half_width_over_seeds == pytest.approx(0, abs=1e-9)
    draws = metrics.draws(lambda rows: 0.305 + patients[:2, rows].mean(), np.arange(60))
    expected = np.percentile(draws, [2.5, 97.5])
    assert summaries[3].interval["dice"] == pytest.approx(expected.tolist(), abs=1e-9)
    assert gains["two", "random a", "dice"].interval == pytest.approx((expected - 0.005).tolist(), abs=1e-9)


def test_a_task_whose_answers_have_another_shape(home, monkeypatch):
    """One number an image is a task added in one place; one that is scored otherwise than it says fails before the
    first fit."""
    answers = scores.Answers(
        "grey (images,)", lambda target: np.zeros(len(target.test)),
        lambda values, target: scores.Scored({"grey": values.mean()}, ("grey",), lambda rows: values[rows].mean()[None],
                                             target.test_groups))
    task = tasks.Task(
        "grey", "", lambda fit: tasks.answered(fit, lambda rows: fit.study.dataset.images[rows].mean((1, 2, 3))),
        ("grey",), needs="features", frozen=True, target="labels", answers=answers, chance=lambda target: 1 / 3)
    monkeypatch.setitem(TASKS, "grey", task)
    monkeypatch.setattr(evaluate.tasks, "TASKS", TASKS)
    own = evaluate.parse([str(home / "run"), *CPU, "--seeds", "2", "--out", "out"])
    own.task = ["grey"]                                                     # the parser's choices are older
    monkeypatch.setattr(evaluate, "parse", lambda argv: own)
    run()
    assert all(c["scores"]["grey"]["mean"] > 1 for c in results("out"))
    for change in ({"columns": ("nothing",)}, {"answers": scores.SHARES},
                   {"columns": ("auc",), "answers": scores.SHARES}):        # the last one at its first fit
        monkeypatch.setitem(TASKS, "grey", tasks.replace(task, **change))
        own.out = "other"
        with pytest.raises(ValueError, match="task grey"):
            run()
        assert not list(Path().glob("other/results.*"))


def test_stages_and_patients(home, capsys):
    """The pooled map of stage 4 is the encoder's own feature; with --per patient, patients are scored."""
    run(home / "run", "--task", "knn", "linear", "grade", "--stage", "1", "4", "--out", "out", *ONCE)
    run(home / "run", "--task", "knn", "linear", "--out", "plain", *ONCE)
    run(home / "run", "--task", "knn", "--label", "own", "--per", "patient", "--out", "patients", *ONCE)
    own, plain = ({(c["task"], c["stage"], c["model"]): {name: score["mean"] for name, score in c["scores"].items()}
                   for c in results(name)} for name in ("out", "plain"))
    for task, _, model in plain:
        assert own[task, 4, model] == pytest.approx(plain[task, None, model], abs=1e-4, nan_ok=True)
    assert own["knn", 1, "run"] != own["knn", 4, "run"] and ("grade", None, "random, normalised") not in own
    accuracies = [6 * c["scores"]["accuracy"]["mean"] for c in results("patients")]         # of six test patients
    assert accuracies == pytest.approx(np.round(accuracies), abs=1e-4) and "by patient" in capsys.readouterr().out


def test_a_stopped_evaluation_goes_on(home, monkeypatch, capsys):
    words = [home / "run", "--task", "knn", "finetune", "collapse", "--labels", "7n", "--out", "out", *FAST]
    original, done = tasks.do, []

    def watch(*args, most=99):
        if len(done) == most:
            raise KeyboardInterrupt
        done.append(args[1:])
        return original(*args)
    monkeypatch.setattr(tasks, "do", functools.partial(watch, most=7))
    with pytest.raises(KeyboardInterrupt):
        run(*words)
    assert results("out", "stopped") and "--out out goes on" in capsys.readouterr().out
    assert "of another evaluation" in fails(capsys, *words, "--lr", "0.5")
    first, fit = len(done), min(Path("out/fits").iterdir())
    done.clear()
    whole = fit.read_bytes()
    fit.write_bytes(whole[:-100])
    assert f"{fit}: damaged" in fails(capsys, *words)
    fit.write_bytes(whole)
    done.clear()
    Path("out/fits/.knn.npz.1.part").write_text("left by a process that was killed")
    monkeypatch.setattr(tasks, "do", watch)
    monkeypatch.setattr(report, "write_csv", lambda *_: exec("raise MemoryError"))          # killed before the end
    with pytest.raises(MemoryError):
        run(*words)
    here = os.getcwd()
    monkeypatch.undo()
    monkeypatch.chdir(here)
    assert results("out", "stopped") and len(done) == 2 * 8 - first and not list(Path("out/fits").glob(".*"))
    run(*words)
    run(*words[:words.index("--out")], "--out", "whole", *FAST)
    assert Path("whole/results.csv").read_bytes() == Path("out/results.csv").read_bytes()
    assert results("whole", "notes") == results("out", "notes") and "neighbours" in str(results("out", "notes"))
    assert "holds results.json already" in fails(capsys, *words)
    Path("out/results.json").unlink()
    monkeypatch.setattr(tasks, "do", watch)
    done.clear()
    run(*words, "--seeds", "3")
    assert len(done) == 8                                                   # one more seed; the others were there


def test_fits_of_other_models_are_not_gone_on_with(tmp_path):
    dataset = SimpleNamespace(images=np.zeros((4, 1, 8, 8), np.uint8))
    a, b = (Study(evaluate.parse(["x"]), dataset, None, [Model(name)], None, tmp_path) for name in "ab")
    keep.open_folder(a)
    keep.open_folder(a)
    with pytest.raises(ValueError, match="of another evaluation"):
        keep.open_folder(b)
