"""From a picture to a number: takes the walk that docs/tour.md tells, draws its pictures and writes its figures.

    python docs/tour.py                 rewrites docs/tour.md and docs/tour/: three minutes on two quiet CPU cores
    python docs/tour.py --short         the same in little, into a folder that is thrown away
    python docs/tour.py --references    only the line numbers in docs/tour.md, after a change of the code
"""

import argparse
import copy
import inspect
import re
import sys
import tempfile
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402

from medssl import SimCLR, SimSiam, simclr  # noqa: E402
from medssl.common import (  # noqa: E402
    augment,
    data,
    encoders,
    features,
    feed,
    loop,
    metrics,
    pen,
    plots,
    portraits,
    sheets,
)
from medssl.common.data import phantoms  # noqa: E402
from medssl.common.evaluation import readouts, subsets  # noqa: E402
from medssl.common.monitor import Monitor  # noqa: E402
from medssl.common.pen import COLOURS, EDGE, GAP, GREY, Canvas, height_of  # noqa: E402
from medssl.common.portraits import frames  # noqa: E402

PAGE = ROOT / "docs" / "tour.md"
CPU = torch.device("cpu")
SHARES = "0.05", "0.2", "1.0"                                               # of the training patients, with labels
CODE = {"data.load": data.load, "phantoms.make": phantoms.make, "Augment.__call__": augment.Augment.__call__,
        "SimCLR.views": SimCLR.views, "SimCLR.forward": SimCLR.forward, "nt_xent": simclr.nt_xent,
        "fit": loop.fit, "extract": features.extract, "knn": features.knn, "SimSiam": SimSiam,
        "Monitor.look": Monitor.look, "spread": metrics.spread, "rank_me": metrics.rank_me,
        "Target.training": subsets.Target.training, "linear_probe": readouts.linear_probe}

@dataclass
class Walk:
    """What the steps share. facts: the figures that docs/tour.md tells."""
    folder: Path
    dataset: data.Dataset
    steps: int
    wrong: int                                                              # steps of the wrong turn
    batch: int
    facts: dict = field(default_factory=dict)

    def __post_init__(self):
        self.size = self.dataset.images.shape[3]
        self.learnt, self.asked = self.dataset.rows("train"), self.dataset.rows("test")
        self.some = portraits.some_rows(self.dataset)                       # of the validation patients
        self.facts |= {"steps": self.steps, "wrong": self.wrong, "batch": self.batch, "learnt": len(self.learnt),
                       "patients": len(np.unique(self.dataset.groups)), "images": len(self.dataset),
                       "pixels": self.size, "asked": len(self.asked)}

    def method(self, cls, **words):
        torch.manual_seed(0)
        encoder = encoders.build("tiny", 1, "default", self.dataset.mean, self.dataset.std)
        return cls(encoder, augment.build("contrastive", self.size), **words)

    def config(self, steps):
        return loop.Config(steps=steps, batch=self.batch, lr=1e-3, optimizer="adamw", weight_decay=0.01,
                           warmup=steps // 10, log_every=max(1, steps // 40), device="cpu")

    def save(self, canvas, name):
        canvas.save(self.folder / name)


def walk(w):
    """All steps, one after the other."""
    before = w.method(SimCLR, temperature=0.2)
    draw_images(w)
    draw_views(w, before)
    w.save(portraits.portrait({"random network": copy.deepcopy(before)}, w.dataset, w.some), "before.png")
    after = copy.deepcopy(before)
    train(w, after)
    networks = {"random network": copy.deepcopy(before), f"after {w.steps} steps": copy.deepcopy(after)}
    w.save(portraits.portrait(networks, w.dataset, w.some), "after.png")
    encoders_ = {"random": before.encoder, "trained": after.encoder}
    rows = np.arange(len(w.dataset))
    found = {name: features.extract(encoder, w.dataset.images, rows, CPU) for name, encoder in encoders_.items()}
    draw_neighbours(w, found)
    wrong_turn(w)
    labels(w, found)
    for path in w.folder.glob("*.png"):
        pen.few_colours(path)


# ---- the steps

def draw_images(w, count=6):
    """Step 1."""
    rows = w.some[:count]
    images = feed.batch(w.dataset.images, rows, CPU)                        # (count, 1, H, W)
    lesion = torch.from_numpy(lesions(len(w.dataset), w.size)[rows]).float()[:, None]
    rim = F.max_pool2d(lesion, 3, 1, 1) > lesion                            # the pixels around it
    outlined = torch.where(rim, torch.tensor(COLOURS[1]).view(3, 1, 1) / 255, images)       # (count, 3, H, W)
    sheets.sheet([("image", images.expand(-1, 3, -1, -1)), ("lesion", outlined)], w.folder / "images.png",
                 titles=[w.dataset.classes[label] for label in w.dataset.labels[rows]])
    counts = np.bincount(w.dataset.labels)
    w.facts["classes"] = ", ".join(f"{count} {name}" for count, name in zip(counts, w.dataset.classes))


def lesions(count, size):
    """Where lesions lie in the built-in set, (N, H, W): it is drawn once more, and what they change is overheard. The
    set's own masks are of organs."""
    changed = []

    class Overheard(phantoms._Scene):
        def draw_lesions(self, kind):
            before = self.hu.copy()
            labels = super().draw_lesions(kind)
            changed.append(np.abs(self.hu - before) > 20)
            return labels
    with mock.patch.object(phantoms, "_Scene", Overheard):
        phantoms.make(count, size)
    return np.concatenate(changed)


def draw_views(w, method, count=6):
    """Step 2."""
    torch.manual_seed(0)
    images = feed.batch(w.dataset.images, w.some[:count], CPU)
    first, second = method.views(images)
    sheets.sheet([("image", images), ("view 1", first), ("view 2", second)], w.folder / "views.png")


def train(w, method):
    """Step 4: the loop, and the loss of each logging step."""
    history = []
    for record in loop.fit(method, w.dataset, w.config(w.steps), w.learnt):
        if isinstance(record["loss"], float):
            history.append(record)
    steps = [record["step"] for record in history]
    plots.panels([plots.Chart({"loss": (steps, [record["loss"] for record in history])}, "Loss of SimCLR", "step",
                              "loss", horizontal={"chance": history[-1]["chance"]}, markers=False)],
                 w.folder / "loss.png", size=(760, 320))
    w.facts |= {"loss": history[-1]["loss"], "chance": history[-1]["chance"],
                "others": 2 * w.batch - 1}


def draw_neighbours(w, found, near=5):
    """Step 6: test images, and the training images whose features are nearest, before training and after."""
    labels, classes = w.dataset.labels, w.dataset.classes
    nearest = {}
    for name, each in found.items():
        unit = F.normalize(each, dim=1)
        nearest[name] = w.learnt[(unit[w.asked] @ unit[w.learnt].T).topk(near, 1).indices.numpy()]      # (asked, near)
        w.facts[f"same_{name}"] = float((labels[nearest[name]] == labels[w.asked][:, None]).mean())
        votes = features.knn(each[w.learnt], labels[w.learnt], each[w.asked]).argmax(1)
        w.facts[f"knn_{name}"] = metrics.balanced_accuracy(labels[w.asked], votes)
    w.facts["same_chance"] = float(((np.bincount(labels[w.asked], minlength=len(classes)) / len(w.asked))
                                    * (np.bincount(labels[w.learnt], minlength=len(classes)) / len(w.learnt))).sum())
    shuffled = np.random.default_rng(0).permutation(len(w.asked))
    picked = [next(row for row in shuffled if labels[w.asked[row]] == c) for c in (1, 2, 3)]
    side, step, left = 64, 74, EDGE + 64 + 20
    canvas = Canvas(880, 2 * EDGE + 2 * height_of("") + 2 * GAP + 3 * (side + height_of("") + 2 * GAP))
    canvas.text(EDGE, EDGE, "asked")
    for block, name in enumerate(nearest):
        canvas.text(left + block * (near * step + 20), EDGE, f"nearest to it, {name} network")
    for number, row in enumerate(picked):
        y = EDGE + height_of("") + GAP + number * (side + height_of("") + 2 * GAP)
        draw_image(w, canvas, (EDGE, y, side), w.asked[row])
        for block, rows in enumerate(nearest.values()):
            for column, other in enumerate(rows[row]):
                x = left + block * (near * step + 20) + column * step
                draw_image(w, canvas, (x, y, side), other, framed=labels[other] == labels[w.asked[row]])
    canvas.text(EDGE, canvas.image.height / 2 - EDGE - height_of(""), "Left: three images of test patients. Right of "
                "them: images of training patients. Framed: of the same class.", colour=GREY)
    w.save(canvas, "neighbours.png")


def draw_image(w, canvas, box, row, framed=False):
    """The image with its class below it."""
    x, y, side = box
    picture = frames.native(feed.batch(w.dataset.images, [row], CPU)[0])
    canvas.paste(picture, x, y, side)
    canvas.text(x + side / 2, y + side + 1, w.dataset.classes[w.dataset.labels[row]], 12, anchor="ma")
    if framed:
        canvas.frame(x + 1, y + 1, x + side - 1, y + side - 1, COLOURS[0], 3)


def wrong_turn(w):
    """Step 7: SimSiam with and without its predictor, as the monitor sees them."""
    unlabelled, looks = replace(w.dataset, labels=None), {}
    config = replace(w.config(w.wrong), log_every=max(1, w.wrong // 12))
    for name, predictor in (("with predictor", True), ("without predictor", False)):
        method = w.method(SimSiam, hidden=512, dim=256, predictor=predictor)
        monitor = Monitor(method.encoder, unlabelled, w.learnt, CPU, config, draws=False)
        looks[name] = [{"step": 0, **monitor.look(method)}]
        for record in loop.fit(method, w.dataset, config, w.learnt):
            if monitor.due(record["step"]):
                looks[name].append({**record, **monitor.look(method)})
    charts = []
    for key, title, y_label in (("loss", "Loss", "-1: the views agree"),
                                ("spread", "Spread of the embedding", "about 1: healthy, 0: all alike")):
        series = {name: ([look["step"] for look in each if key in look],
                         [float(look[key]) for look in each if key in look]) for name, each in looks.items()}
        charts.append(plots.Chart(series, title, "step", y_label))
    plots.panels(charts, w.folder / "wrong.png", columns=2, size=(440, 280))
    ends = {"random network": w.method(SimSiam, hidden=512, dim=256, predictor=False),
            f"without predictor, {w.wrong} steps": method}
    w.save(portraits.portrait(ends, w.dataset, w.some), "collapse.png")
    for name, each in zip(("right", "wrong"), looks.values()):
        w.facts |= {f"{name}_loss": float(each[-1]["loss"]), f"{name}_spread": each[-1]["spread"],
                    f"{name}_rank": each[-1]["rank_me"]}


def labels(w, found):
    """Step 8: a linear classifier on features that stay as they are, from few labels to all."""
    target = subsets.find_target(w.dataset, w.dataset.groups, "labels", note=lambda line: None)
    truth, series = w.dataset.labels[w.asked], {}
    for name, each in found.items():
        counts, scores = [], []
        for share in SHARES:
            rows = target.training(w.dataset.groups, share, None, 0)
            predict, _ = readouts.linear_probe(each, w.dataset.labels, rows, target.rows["val"], len(target.classes))
            counts.append(len(rows))
            scores.append(metrics.balanced_accuracy(truth, predict(w.asked).argmax(1)))
        series[f"{name} network"] = counts, scores
        w.facts[f"few_{name}"], w.facts[f"all_{name}"] = scores[0], scores[-1]
    w.facts |= {"few": counts[0], "guess": 1 / len(target.classes)}
    chart = plots.Chart(series, "A linear classifier on the features: test patients", log_x=True,
                        x_label="training images with labels (log scale)", y_label="balanced accuracy",
                        horizontal={"chance": 1 / len(target.classes)})
    plots.panels([chart], w.folder / "labels.png", size=(760, 340))


# ---- the page

def reference(name):
    """A link to the lines of the code that did it."""
    code = inspect.unwrap(CODE[name])
    lines, first = inspect.getsourcelines(code)
    file, last = Path(inspect.getsourcefile(code)).relative_to(ROOT).as_posix(), first + len(lines) - 1
    return f"[`{name}`, {file}, lines {first} to {last}](../{file}#L{first}-L{last})"


def with_references(text):
    """The page with the line numbers of today."""
    return re.sub(r"\[`([\w.]+)`, [\w/.]+, lines \d+ to \d+\]\([^)]+\)", lambda found: reference(found[1]), text)


def with_figures(text, facts):
    """The page with these figures between the comments that name them."""
    def said(found):
        value = facts[found[1]]
        value = f"{value:.2f}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else value
        return f"<!-- {found[1]} -->{value}<!-- / -->"
    return re.sub(r"<!-- (\w+) -->[^<]*<!-- / -->", said, text)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--short", action="store_true", help="in little, into a folder that is thrown away")
    parser.add_argument("--references", action="store_true", help="only the line numbers in docs/tour.md")
    args = parser.parse_args()
    if args.references:
        PAGE.write_text(with_references(PAGE.read_text()))
    elif args.short:
        with tempfile.TemporaryDirectory() as folder:
            write(Walk(Path(folder), phantoms.make(200, 32), steps=4, wrong=4, batch=16), Path(folder) / "tour.md")
    else:
        folder = PAGE.with_suffix("")
        folder.mkdir(exist_ok=True)
        write(Walk(folder, data.load("phantoms", 64), steps=400, wrong=120, batch=64), PAGE)


def write(w, path):
    """Takes the walk and writes the page."""
    start = time.perf_counter()
    walk(w)
    path.write_text(with_references(with_figures(PAGE.read_text(), w.facts)))
    print(f"{path.name} and {len(list(w.folder.glob('*.png')))} pictures in {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
