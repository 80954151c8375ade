"""The command line of evaluate.py: what it writes, that it leaks nothing, and one clear line for every misuse."""

import csv
import functools
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import evaluate
from medssl.common import cli, encoders, metrics, pictures
from medssl.common.data import Dataset
from medssl.common.evaluation import keep, readouts, report, scores, study, subsets, tasks
from medssl.common.evaluation.study import Cell, Model, Settings, Study
from medssl.common.evaluation.tasks import TASKS
from tests.common import TINY, batch, tiny_encoder

FAST = ["--steps", "2", "--batch", "16", "--seeds", "2", "--device", "cpu"]
ONCE = ["--steps", "2", "--batch", "16", "--seeds", "1", "--device", "cpu"]
PICTURES = {"scores.png", "labels-knn.png", "labels-unet.png", "convergence-finetune.png", "confusion-knn-run.png",
            "overlay-segment-random.png", "overlay-unet-run.png", "spectrum.png"}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A set of 96 gray pictures (three classes by brightness, a bright block as mask, 24 patients), a run on it, and
    weights of other kinds."""
    root = tmp_path_factory.mktemp("home")
    lines, pictures = ["file,label,mask,split,group,one"], batch(96, 1, 32).numpy()[:, 0]
    for folder in ("images", "masks"):
        (root / "set" / folder).mkdir(parents=True)
    for i, picture in enumerate(pictures):
        kind, patient, mask = i % 3, i // 4, np.zeros((32, 32), np.uint8)
        mask[8:20, 4 * (i % 4):4 * (i % 4) + 12] = 1
        Image.fromarray((picture * 60 + 40 * kind + 60 * mask).astype(np.uint8)).save(root / f"set/images/{i}.png")
        Image.fromarray(mask).save(root / f"set/masks/{i}.png")
        split = "test" if patient % 4 == 1 else "val" if patient % 4 == 3 else "train"
        lines.append(f"images/{i}.png,{'dark medium bright'.split()[kind]},masks/{i}.png,{split},p{patient},same")
    (root / "set/split.csv").write_text("\n".join(lines))
    make_run(root / "run", root / "set", 1, 32)
    return root


def make_run(folder, data, channels, size, mean=(0.3,), std=(0.2,)):
    """A run as train.py leaves it, but untrained."""
    folder.mkdir(exist_ok=True)
    torch.manual_seed(9)
    encoders.save(encoders.build("tiny", channels, "default", mean, std), folder / "encoder.pt")
    (folder / "config.json").write_text(json.dumps({
        "arguments": {"data": str(data), "label": "label", "seed": 0},
        "data": {"channels": channels, "size": size, "classes": []},
        "encoder": {"name": "tiny", "channels": channels, "stem": "default", "mean": mean, "std": std}}))


@pytest.fixture(scope="module")
def npz(tmp_path_factory):
    """A MedMNIST file of 28-pixel pictures, bright or dark; and the same pictures with their labels shuffled."""
    root = tmp_path_factory.mktemp("npz")
    generator = np.random.default_rng(0)
    labels = generator.integers(2, size=700)
    images = (batch(700, 1, 24).numpy()[:, 0] * 100 + 80 * labels[:, None, None]).astype(np.uint8)
    for name, kinds in (("true", labels), ("shuffled", generator.permutation(labels))):
        parts = {"train": slice(0, 200), "val": slice(200, 300), "test": slice(300, 700)}
        np.savez(root / f"{name}.npz", **{f"{part}_images": images[rows] for part, rows in parts.items()},
                 **{f"{part}_labels": kinds[rows, None] for part, rows in parts.items()})
    return root


@pytest.fixture(autouse=True, scope="module")
def small(tmp_path_factory):
    """One cache for all tests, smaller networks under the names tiny and resnet18, intervals from few draws, and two
    strengths of the linear probe's penalty to choose from."""
    with pytest.MonkeyPatch.context() as patch:
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
    """One evaluation with everything, watched: which rows each read-out was asked for, in order."""
    asked, out = [], tmp_path_factory.mktemp("out") / "results"
    patch = pytest.MonkeyPatch()
    answered = tasks.answered

    def watch(fit, predict, **facts):
        return answered(fit, lambda rows: asked[-1].append(rows) or predict(rows), **facts)

    def run_one(study, cell, model, seed, original=tasks.run):
        if TASKS[cell.task].target:
            asked.append([cell.task])
        return original(study, cell, model, seed)
    patch.setattr(tasks, "answered", watch)
    patch.setattr(tasks, "run", run_one)
    answers, probe = readouts.answers, readouts.linear_probe
    patch.setattr(readouts, "answers", lambda method, images, rows, *rest:
                  asked[-1].append(rows) or answers(method, images, rows, *rest))
    patch.setattr(readouts, "linear_probe", lambda x, y, train, val, *rest:
                  asked[-1].extend([train, val]) or probe(x, y, train, val, *rest))
    run(home / "run", "--task", "knn", "linear", "finetune", "segment", "unet", "collapse", "--labels", "1.0", "7n",
        "--out", out, *FAST)
    patch.undo()
    return out, asked


def test_results(whole, home):
    out, _ = whole
    found = json.loads((out / "results.json").read_text())
    assert found["data"]["labels"]["images"] == {"train": 48, "val": 24, "test": 24}
    assert found["data"]["masks"]["patients"]["train"] == 12
    assert [m["name"] for m in found["models"]] == ["random", "random, normalised", "run"]
    # finetune and unet have one random model, the frozen tasks two
    assert len(found["fits"]) == 2 * len(found["cells"]) == 2 * (2 * (3 * 3 + 2 * 2) + 3)
    fits = {(f["task"], f["labels"], f["model"], f["seed"]): f for f in found["fits"]}
    assert fits["knn", "7n", "run", 1]["train_images"] == 7 and fits["knn", "1.0", "run", 1]["train_patients"] == 12
    assert fits["linear", "1.0", "run", 0]["l2"] in readouts.L2_GRID
    right = 24 * fits["linear", "1.0", "run", 0]["scores"]["accuracy"]
    assert right == pytest.approx(round(right), abs=1e-3)
    epochs = [epoch for epoch, _ in fits["finetune", "7n", "run", 0]["curve"]]
    assert epochs == pytest.approx([0, 1 / 3, 2 / 3], abs=1e-5)
    for task in ("knn", "linear", "segment", "collapse"):                   # a random encoder of its own for every seed
        assert len({f["frozen"] for f in found["fits"] if f["task"] == task and f["model"] == "random"}) == 2
        assert len({f["frozen"] for f in found["fits"] if f["task"] == task and f["model"] == "run"}) == 1
    cell = next(c for c in found["cells"] if (c["task"], c["labels"], c["model"]) == ("unet", "7n", "run"))
    pair = next(d for d in found["differences"] if (d["task"], d["labels"], d["metric"]) == ("unet", "7n", "dice"))
    assert pair["seeds"] == 2 and 0 <= pair["not_positive"] <= 1 and pair["settled"] in (True, False)
    own, base = ([fits["unet", "7n", name, seed]["scores"]["dice"] for seed in (0, 1)] for name in ("run", "random"))
    assert cell["scores"]["dice"]["mean"] == pytest.approx(np.mean(own), abs=1e-5) and cell["seeds"] == 2
    assert cell["scores"]["dice"]["spread"] == pytest.approx(np.std(own, ddof=1), abs=1e-5)
    assert pair["mean"] == pytest.approx(np.mean(own) - np.mean(base), abs=1e-5)
    assert pair["interval"][0] <= pair["mean"] <= pair["interval"][1]
    assert {"epochs_to_95", "epochs_to_95_of_random", "iou", "dice_per_slice", "dice 1"} <= cell["scores"].keys()
    with open(out / "results.csv") as file:
        lines = list(csv.DictReader(file))
    assert {"auc", "recall dark", "average_precision", "rank_me", "iou 1"} <= {line["metric"] for line in lines}
    assert PICTURES <= {p.name for p in out.glob("*.png")}
    for kind in ("run-finetune", "random-unet"):                            # what train.py --init takes
        encoder = encoders.build("tiny", 1, "default")
        assert encoders.load(out / kind, encoder)[0] == len(encoder.state_dict())
        assert readouts.fingerprint(encoder) != fits["knn", "1.0", "run", 0]["frozen"]


def test_the_test_split_is_scored_once_and_last(whole):
    """Each of the 52 fits that learn asks for the 24 test rows once; before that, only training asks for validation
    rows."""
    _, asked = whole
    assert len(asked) == 52
    test = {i for i in range(96) if i // 4 % 4 == 1}
    for task, *rows in asked:
        kinds = [set(r) == test or bool(set(r) & test) and "mixed" for r in rows]
        trained = TASKS[task].trains                                        # `answers` sees the same rows again there
        assert kinds == [False] * (len(kinds) - 1 - trained) + [True] * (1 + trained), task


def test_it_learns_what_is_there_and_no_more(npz):
    """Bright and dark are told apart; with shuffled labels every read-out is at chance (400 test images:
    0.5 +- 0.05)."""
    for name in ("true", "shuffled"):
        run("--data", npz / f"{name}.npz", "--encoder", "tiny", "--stem", "default", "--task", "knn", "linear",
            "finetune", "--seeds", "1", "--steps", "12", "--batch", "32", "--out", name, "--device", "cpu")
    for cell in json.loads(Path("true/results.json").read_text())["cells"]:
        assert cell["scores"]["balanced_accuracy"]["mean"] > 0.9 and cell["interval"]["auc"][0] > 0.9, cell
    for cell in json.loads(Path("shuffled/results.json").read_text())["cells"]:
        assert abs(cell["scores"]["balanced_accuracy"]["mean"] - 0.5) < 0.08, cell
        assert abs(cell["scores"]["auc"]["mean"] - 0.5) < 0.1, cell


def test_series(home, capsys, monkeypatch):
    """Imbalance, resampling, strengths, freezing, the optimiser, and checkpoints of one run; test images untouched."""
    tune, drawn = readouts.tune, []
    monkeypatch.setattr(readouts, "tune", lambda *args: drawn.append(
        (args[1].labels[args[2]], args[4].weights, args[4].head_rate, args[4].config)) or tune(*args))
    for step in (10, 9):
        Path("many").mkdir(exist_ok=True)
        (Path("many") / f"encoder-{step}.pt").write_bytes((home / "run/encoder.pt").read_bytes())
    Path("many/config.json").write_bytes((home / "run/config.json").read_bytes())
    run("many/encoder-10.pt", "many/encoder-9.pt", "--task", "linear", "finetune", "--imbalance", "1", "8", "--stage",
        "2", "--augment", "S0", "S6", "--resample", "--freeze", "0.4", "--loss", "balanced",
        "--head-lr", "0.1", "--optimizer", "lars", "--lr", "0.02", "--weight-decay", "0.2", "--out", "out", "--steps",
        "3", "--batch", "16", "--seeds", "1", "--device", "cpu")
    found = json.loads(Path("out/results.json").read_text())
    assert [m["name"] for m in found["models"]] == ["random", "random, normalised", "many@9", "many@10"]
    sizes = {(f["imbalance"], f["augment"]): f["train_images"] for f in found["fits"]}
    # 2 : 2 : 2, 16 : 16 : 2
    assert sizes == {(1, None): 6, (8, None): 34, (1, "S0"): 6, (1, "S6"): 6, (8, "S0"): 34, (8, "S6"): 34}
    assert len(drawn) == 12
    assert all(np.bincount(labels, weights).tolist() == pytest.approx([1, 1, 1]) and rate == 5
               for labels, weights, rate, _ in drawn)
    assert {(config.optimizer, config.lr, config.weight_decay) for *_, config in drawn} == {("lars", 0.02, 0.2)}
    pictures = {path.name for path in Path("out").iterdir()}
    assert {"imbalance-linear.png", "augment-finetune.png", "steps-finetune.png"} <= pictures
    said = capsys.readouterr().out
    assert "in the first 1 the encoder is frozen" in said and "recall bright" in said and "unchanged" in said
    assert "8 patients" not in said


def test_exports(home, capsys):
    run(home / "run", "--export", "encoder.pt", "--features", "out.npz", "--device", "cpu")
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


def test_other_sizes_channels_and_files(home, capsys):
    """Another size or channel count is converted, and said; bare weights tell their kind."""
    run(home / "run", "--size", "40", "--channels", "3", "--task", "collapse", "--seeds", "1", "--device", "cpu")
    said = capsys.readouterr().out
    assert "trained on 1 x 32 x 32 images and is scored on 3 x 40 x 40 ones, its first layer summed or spread" in said
    big = encoders.build("resnet18", 3)
    state = {f"module.{key}": value for key, value in big.state_dict().items()}
    state |= {"module.fc.weight": torch.zeros(9, 512)}
    torch.save({"state_dict": state}, "imagenet.pth")
    Path("imagenet.json").write_text(json.dumps({"mean": [0.1, 0.2, 0.6], "std": [0.1, 0.2, 0.3]}))
    own = SimpleNamespace(dataset=SimpleNamespace(images=np.zeros((1, 1, 8, 8))), device="cpu", note=print)
    gray = study.load_network(Model("imagenet", "resnet18", "default", Path("imagenet.pth")), own)
    assert gray.mean == pytest.approx((0.3,)) and gray.std == pytest.approx((0.2,))
    torch.testing.assert_close(gray.conv1.weight, big.conv1.weight.sum(1, keepdim=True))
    run("imagenet.pth", home / "run", "--task", "collapse", "--seeds", "1", "--device", "cpu", "--out", "two")
    found = json.loads(Path("two/results.json").read_text())
    random = [f"random {kind}{more}" for kind in ("resnet18 default", "tiny default")
              for more in ("", ", normalised")]
    assert [m["name"] for m in found["models"]] == [*random, "imagenet", "run"]
    assert "as run saw them" in capsys.readouterr().out
    assert "made with" in fails(capsys, "imagenet.pth", "--data", home / "set", "--encoder", "resnet50")


def test_sets_that_lack_something(home, npz, capsys, tmp_path):
    words = ["--device", "cpu", "--encoder", "tiny", "--task"]
    assert "no masks" in fails(capsys, "--data", npz / "true.npz", *words, "segment")
    for i in range(40):
        Path(f"bare/{i % 2}").mkdir(parents=True, exist_ok=True)
        Image.fromarray((batch(1, 1, 32, i).numpy()[0, 0] * 200).astype(np.uint8)).save(f"bare/{i % 2}/{i}.png")
    run("--data", "bare", *words, "knn", "--seeds", "1")
    said = capsys.readouterr().out
    assert "has no splits" in said and "scored" in said and "no patient numbers" in said and "random" in said
    np.save("stack.npy", np.stack([np.full((32, 32), 3 * i, np.uint8) for i in range(30)]))
    assert "no labels" in fails(capsys, "--data", "stack.npy", *words, "linear")
    run("--data", "stack.npy", "--device", "cpu", "--encoder", "tiny", "--seeds", "1")
    assert "neither labels nor masks" in capsys.readouterr().out
    assert "only one class (same)" in fails(capsys, "--data", home / "set", "--label", "one", *words, "knn")
    table = (home / "set/split.csv").read_text()
    for kind in ("images/", "masks/"):
        table = table.replace(kind, f"{home}/set/{kind}")
    lines = table.split("\n")
    Path("lacking").mkdir()
    kept = [line for line in lines if not (",bright," in line and ",train," in line) and ",val," not in line]
    Path("lacking/split.csv").write_text("\n".join(kept))
    run("--data", "lacking", *words, "knn", "linear", "--seeds", "1")
    said = capsys.readouterr().out
    assert "no image of the train split holds class bright: never predicted" in said and "no validation split" in said
    assert "fewer than 20" in said


def test_wrong_words(home, npz, capsys):
    words = [home / "run", "--device", "cpu"]
    assert "--data" in fails(capsys) and "no such file" in fails(capsys, "nothing.pt")
    assert "nowhere" in fails(capsys, *words, "--data", "nowhere")
    for flag, value in (("--task", "knm"), ("--labels", "0"), ("--labels", "1.5"), ("--labels", "0n"),
                        ("--imbalance", "0.5"), ("--augment", "S7"), ("--seeds", "0"),
                        ("--loss", "focal"), ("--lr", "-1"), ("--freeze", "-1")):
        assert flag in fails(capsys, *words, flag, value)
    assert "99n" in fails(capsys, *words, "--task", "knn", "--labels", "99n")
    assert "--freeze" in fails(capsys, *words, "--task", "finetune", "--freeze", "10", "--epochs", "5")
    assert "is for masks" in fails(capsys, *words, "--task", "finetune", "--loss", "dice")
    assert "--imbalance" in fails(capsys, *words, "--task", "segment", "--imbalance", "10")
    assert "exactly one" in fails(capsys, home / "run", *words, "--export", "x.pt")
    assert "no folder" in fails(capsys, *words, "--export", "nowhere/x.pt")
    assert "no folder" in fails(capsys, *words, "--features", "nowhere/x.npz")
    Path("folder").mkdir()
    for flag in "--export", "--features":
        assert "is a folder" in fails(capsys, *words, flag, "folder")
    assert "at most 1000" in fails(capsys, *words, "--seeds", "100000000")
    assert "--epochs: 1e300 is more than" in fails(capsys, *words, "--epochs", "1e300")
    Path("file").write_text("")
    assert "file" in fails(capsys, *words, "--out", "file/deep")
    assert not Path("results").exists()


def test_evil_and_damaged_weights(home, capsys, monkeypatch):
    class Evil:
        def __reduce__(self):
            return Path.touch, (Path("touched"),)
    torch.save({"conv1.weight": Evil()}, "evil.pt")
    Path("noise.pt").write_bytes(bytes(5000))
    state = torch.load(home / "run/encoder.pt", weights_only=True)
    torch.save(state | {"bn1.weight": torch.full((8,), float("nan"))}, "nan.pt")
    torch.save({"conv1.weight": torch.zeros(5, 1, 3, 3)}, "other.pt")
    torch.save({f"{side}.{key}": value + (side == "b") for side in "ab" for key, value in state.items()}, "twice.pt")
    torch.save({"net": {key: value for key, value in state.items() if key != "layer4.0.bn2.bias"}}, "part.pt")
    monkeypatch.setitem(encoders.ENCODERS, "resnet18-3stages", (encoders.BasicBlock, (1, 1, 1), 8))     # takes the rest
    for name, word in (("evil", "refused"), ("noise", "refused"), ("nan", "not finite"), ("other", "those of none of"),
                       ("twice", "as tiny with stem default it holds this encoder more than once, under a. and b.:"),
                       ("part", "as tiny with stem default it does not fit this encoder, read under net.: 1 missing")):
        assert word in fails(capsys, f"{name}.pt", "--data", home / "set", "--device", "cpu")
    assert not Path("touched").exists()
    for strange in ({"name": "vit"}, {"stem": ["small"]}):
        Path("part.json").write_text(json.dumps(strange))
        assert "part.json: says" in fails(capsys, "part.pt", "--data", home / "set", "--device", "cpu")
    Path("hollow").mkdir()
    assert "neither a run" in fails(capsys, "hollow")
    Path("hollow/encoder.pt").write_bytes((home / "run/encoder.pt").read_bytes())
    Path("hollow/config.json").write_text("{")
    assert "damaged" in fails(capsys, "hollow")
    config = json.loads((home / "run/config.json").read_text())
    for room, word, value in (("encoder", "name", "vit"), ("encoder", "stem", []), ("arguments", "data", 5),
                              ("data", "size", "64")):
        Path("hollow/config.json").write_text(json.dumps(config | {room: config[room] | {word: value}}))
        assert "hollow/config.json: " in fails(capsys, "hollow")


def test_differences_are_taken_seed_by_seed():
    """Two random rows, two encoders, three seeds; each encoder is held against the random one of its own kind; a seed
    that one lacks is left out."""
    kinds = {"random a": ("a", None), "random b": ("b", None), "one": ("b", "file"), "two": ("a", "file")}
    own = Study(None, None, None, [Model(name, kind, "default", file) for name, (kind, file) in kinds.items()], None)
    assert own.bases_of("one") == ["random b"] and own.bases_of("two") == own.bases_of("random a") == ["random a"]
    cell = Cell("unet", "1.0", None, "S1")

    def record(name, seed, v):
        scored = scores.Scored({"dice": v, "iou": 0.5}, ("dice", "iou"), lambda rows: np.array([v, 2 * v]),
                               np.arange(4))
        return tasks.Record(name, cell, seed, train_images=10, train_patients=5, scored=scored)
    records = [record(name, seed, 0.1 * i + 0.01 * seed) for i, name in enumerate(kinds) for seed in range(3)
               if (name, seed) != ("one", 2)]
    cells, differences = report.summarise(own, records)
    assert [c.seeds for c in cells] == [2] * 4 and cells[2].mean("dice") == pytest.approx(0.205)
    found = {(d.first, d.second, d.metric): d for d in differences}
    assert len(found) == 12 and found["two", "random a", "dice"].gain.mean == pytest.approx(0.3)
    assert found["two", "random a", "dice"].gain.interval == pytest.approx([0.3, 0.3])
    assert found["two", "one", "iou"].gain.interval == pytest.approx([0.2, 0.2])
    assert found["two", "one", "dice"].gain.half_width_over_seeds == pytest.approx(0, abs=1e-9)


def test_words():
    assert report.describe(Cell("knn", "7n", 10.0, "S2")) == "labels 7n, imbalance 10, S2"
    mixed = {"a": float("nan"), "b": np.float32(0.5), "c": (np.int64(3),)}
    assert report.tidy(mixed) == {"a": None, "b": 0.5, "c": [3]}
    assert study.file_name("a/b c@10") == "a_b_c@10"


def test_every_choice_is_made_on_the_validation_rows(whole):
    _, asked = whole
    validation = {i for i in range(96) if i // 4 % 4 == 3}
    for task, *rows in asked:
        chosen = rows[:-2] if TASKS[task].trains else rows[1:2] if task == "linear" else []
        assert all(set(r) == validation for r in chosen) and (task == "knn" or chosen), task


def test_intervals_draw_whole_patients():
    labels, groups = np.arange(40) % 2, np.arange(40) // 4
    rows = {"train": np.arange(20), "val": np.arange(0), "test": np.arange(20, 40)}
    target = subsets.Target(labels, ("a", "b"), labels, rows)
    own = Study(Settings(), None, torch.device("cpu"), [], groups, targets={"labels": target},
                kept={("random", None): (torch.randn(40, 3), "")})
    record = tasks.score(tasks.run(own, Cell("knn", "1.0"), Model("random", "tiny", "default"), 0), own)
    assert record.scored.units.tolist() == groups[20:].tolist()


def test_each_seed_has_its_own_order_and_head(home, monkeypatch):
    """And bars are drawn of the models that were fitted only."""
    tune, bars, seen, drawn = readouts.tune, pictures.bars, [], []
    monkeypatch.setattr(pictures, "bars", lambda chart, path: drawn.append(chart.groups) or bars(chart, path))
    monkeypatch.setattr(readouts, "tune", lambda method, *rest: seen.append(
        (rest[3].config.seed, readouts.fingerprint(method.head))) or tune(method, *rest))
    run(home / "run", "--task", "finetune", "--out", "out", *FAST)
    # the same heads on both encoders
    assert len(seen) == 4 and {seed for seed, _ in seen} == {0, 1} and len({head for _, head in seen}) == 2
    assert drawn == [["random", "run"]]


# ---- features of other programs, stages, changed images, going on

def test_features_of_another_program_score_as_their_weights_do(home, capsys):
    """Written here with nothing but torch: the same kNN and linear numbers as the encoder loaded as weights."""
    lines = (home / "set/split.csv").read_text().split("\n")[1:]
    names = [line.split(",")[0] for line in lines]
    encoder = encoders.build("tiny", 1, "default", (0.3,), (0.2,)).eval()
    encoder.load_state_dict(torch.load(home / "run/encoder.pt", weights_only=True))
    pictures = torch.stack([torch.from_numpy(np.array(Image.open(home / "set" / name))) for name in names])
    with torch.no_grad():
        features = encoder(pictures[:, None] / 255)
    order = np.random.default_rng(0).permutation(96)                        # files may come in any order
    np.savez("theirs.npz", features=features[order].numpy(), files=np.array(names)[order])
    np.savez("by_row.npz", features=features.numpy())
    train = [line.split(",")[3] == "train" for line in lines]
    pixels = pictures.numpy() / 255                                         # (n, 32, 32)
    standard = (pixels - pixels[train].mean()) / pixels[train].std()
    np.savez("tiny.npz", features=standard.reshape(-1, 8, 4, 8, 4).mean((2, 4)).reshape(-1, 64))
    run(home / "run", "theirs.npz", "by_row.npz", "thumbnails", "tiny.npz", "--task", "knn", "linear", "segment",
        "collapse", "--steps", "1", "--batch", "16", "--seeds", "1", "--device", "cpu", "--out", "out")
    found = json.loads(Path("out/results.json").read_text())["cells"]
    own = {(c["task"], c["model"]): {name: score["mean"] for name, score in c["scores"].items()} for c in found}
    for task in ("knn", "linear", "collapse"):
        for one, other in (("run", "theirs"), ("run", "by_row"), ("tiny", "thumbnails")):
            assert own[task, other] == pytest.approx(own[task, one], abs=1e-4, nan_ok=True), task
    assert ("segment", "run") in own and ("segment", "theirs") not in own
    assert "theirs holds features: segment would need the network" in capsys.readouterr().out
    run("thumbnails", "--data", home / "set", "--task", "knn", "--seeds", "1", "--device", "cpu", "--out", "alone")
    assert next(c for c in json.loads(Path("alone/results.json").read_text())["cells"]
                if c["model"] == "thumbnails")["scores"] == next(
        c for c in found if (c["task"], c["model"]) == ("knn", "thumbnails"))["scores"]
    assert "none of the models is a network" in fails(capsys, "thumbnails", "--data", home / "set", "--features", "x")
    Path("thumbnails").mkdir()                                              # a folder of that name comes first
    assert "neither a run nor a file of weights" in fails(capsys, "thumbnails", "--data", home / "set")
    np.savez("few.npz", features=features[:90].numpy(), files=names[:90])
    said = fails(capsys, "few.npz", "--data", home / "set")
    assert "6 of them have none, first images/90.png, images/91.png, images/92.png" in said
    np.savez("short.npz", features=features[:90].numpy())
    assert "has 96 images" in fails(capsys, "short.npz", "--data", home / "set")
    np.savez("other.npz", x=np.zeros(3))
    assert "no array named features, but x" in fails(capsys, "other.npz", "--data", home / "set")
    for wrong in ({"files": names[:90]}, {"files": np.array(3)}, {"rows": np.arange(96)[:, None]},
                  {"rows": np.full(96, np.nan)}, {"rows": np.array(names)}):
        np.savez("wrong.npz", features=features.numpy(), **wrong)
        assert "must name each of the 96 rows" in fails(capsys, "wrong.npz", "--data", home / "set")
    np.savez("evil.npz", features=np.array([{}], object))
    assert "evil.npz" in fails(capsys, "evil.npz", "--data", home / "set")


def test_rows_are_named_after_runs(home):
    """Whichever of a run's files is given; a file that stands alone has its own name."""
    weights = (home / "run/encoder.pt").read_bytes()
    Path("a").mkdir()
    for name in ("encoder", "encoder-20", "checkpoint"):
        (Path("a") / f"{name}.pt").write_bytes(weights)
    Path("checkpoint.pt").write_bytes(weights)
    Path("a/config.json").write_bytes((home / "run/config.json").read_bytes())
    paths = "a", "a/encoder.pt", "a/encoder-20.pt", "a/checkpoint.pt", "checkpoint.pt"
    names = [study.describe(path, study.Where()).name for path in paths]
    assert names == ["a", "a", "a@20", "a", "checkpoint"]


def test_stages_changes_grades_and_patients(home, capsys):
    """The pooled map of stage 4 is the encoder's own feature; images as they are score as under `linear`."""
    run(home / "run", "--task", "knn", "linear", "grade", "robustness", "--stage", "1", "4", "--per", "patient",
        "--patient-label", "max", "--out", "out", *ONCE)
    run(home / "run", "--task", "knn", "linear", "--out", "plain", *ONCE)
    found, plain = (json.loads(Path(f"{name}/results.json").read_text())["cells"] for name in ("out", "plain"))
    own = {(c["task"], c["stage"], c["model"]): c["scores"] for c in found}
    for c in plain:
        staged = own[c["task"], 4, c["model"]]
        assert all(staged[name] == score for name, score in c["scores"].items()) and "auc_per_patient" in staged
    assert own["knn", 1, "run"] != own["knn", 4, "run"]
    robust = own["robustness", None, "run"]
    assert robust["balanced_accuracy"] == own["linear", 4, "run"]["balanced_accuracy"]
    each = [robust[f"{name} {k}"]["mean"] for name in ("darker", "noisier", "blurrier", "turned") for k in (1, 2, 3)]
    assert robust["drop"]["mean"] == pytest.approx(robust["balanced_accuracy"]["mean"] - np.mean(each), abs=1e-5)
    assert len(set(each)) > 1 and Path("out/robustness.png").exists() and Path("out/stage-knn.png").exists()
    assert ("grade", None, "random, normalised") not in own and "quadratic_kappa" in own["grade", None, "run"]
    words = [home / "run", "--device", "cpu", "--task"]
    assert "several classes" in fails(capsys, *words, "knn", "--per", "patient")
    assert "--stage" in fails(capsys, *words, "finetune", "--stage", "1")
    assert "--per" in fails(capsys, *words, "unet", "--per", "patient")
    assert "--patient-label" in fails(capsys, *words, "knn", "--patient-label", "max")


def test_a_stopped_evaluation_goes_on(home, monkeypatch, capsys):
    words = [home / "run", "--task", "knn", "finetune", "collapse", "--out", "out", *FAST]
    original, done = tasks.run, []

    def stop(*args):
        if len(done) == 7:
            raise KeyboardInterrupt
        done.append(args[1:])
        return original(*args)
    monkeypatch.setattr(tasks, "run", stop)
    with pytest.raises(KeyboardInterrupt):
        run(*words)
    assert json.loads(Path("out/results.json").read_text())["stopped"]
    assert "--out out goes on" in capsys.readouterr().out
    assert "of another evaluation" in fails(capsys, *words, "--lr", "0.5")
    first = len(done)
    done.clear()
    monkeypatch.setattr(tasks, "run", lambda *args: done.append(args[1:]) or original(*args))
    fit = min(Path("out/fits").iterdir())
    whole = fit.read_bytes()
    for damaged in whole[:-100], whole.replace(b"facts", b"farts"):
        fit.write_bytes(damaged)
        assert f"{fit}: damaged" in fails(capsys, *words)
    fit.write_bytes(whole)
    for name in "asked.json", "results.json":                               # JSON, but not what was written there
        kept = Path("out", name).read_text()
        Path("out", name).write_text("[]")
        assert "--out out: holds " in fails(capsys, *words)
        Path("out", name).write_text(kept)
    run(*words)
    assert len(done) == 2 * 8 - first                                       # nothing was fitted twice
    monkeypatch.setattr(tasks, "run", original)
    run(*words[:-len(FAST) - 1], "whole", *FAST)
    assert Path("whole/results.csv").read_bytes() == Path("out/results.csv").read_bytes()
    assert "holds results.json already" in fails(capsys, *words)
    Path("out/results.json").unlink()
    done.clear()
    monkeypatch.setattr(tasks, "run", lambda *args: done.append(args[1:]) or original(*args))
    run(*words, "--seeds", "3")
    assert len(done) == 8                                                   # one more seed; the others were there


def test_fits_of_other_weights_are_not_gone_on_with():
    dataset = Dataset("", np.zeros((4, 1, 8, 8), np.uint8), np.arange(4) % 2)

    def digest(network, **words):
        model = Model("run", "tiny", "default", Path("encoder.pt"), network=network)
        return keep.digest(Study(Settings(**words), dataset, torch.device("cpu"), [model], np.arange(4)))
    first, second = tiny_encoder(), tiny_encoder()
    assert digest(first) == digest(first, seeds=9) and len({digest(first), digest(second), digest(first, lr=0.5)}) == 3


def test_statistics_of_the_training_images(home):
    """--statistics data changes nothing but BatchNorm's means and variances."""
    for name in ("kept", "data"):
        run(home / "run", "--task", "collapse", "--statistics", name, "--out", name, "--seeds", "1", "--device", "cpu")
    own = [{c["model"]: c["scores"]["rank_me"]["mean"]
            for c in json.loads(Path(f"{name}/results.json").read_text())["cells"]}
           for name in ("kept", "data")]
    assert own[0]["run"] != own[1]["run"]
    assert all(own[0][name] == own[1][name] for name in ("random", "random, normalised"))
    assert own[0]["random"] != own[0]["random, normalised"]
