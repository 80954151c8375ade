"""From a picture to a number: takes the walk of docs/tour.md, draws its pictures and writes its figures.

    python docs/tour.py             rewrites docs/tour.md and docs/tour/: about six minutes on two quiet CPU cores
    python docs/tour.py --short     the same in little, into a folder that is thrown away
"""

import argparse
import copy
import math
import os
import re
import sys
import tempfile
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "docs")]

import numpy as np
import portraits
import torch
import torch.nn.functional as F
from PIL import Image

from medssl import SimCLR, SimSiam
from medssl.common import augment, data, encoders, features, feed, loop, metrics, pictures
from medssl.common.data import phantoms
from medssl.common.monitor import Monitor

PAGE = ROOT / "docs" / "tour.md"
CPU = torch.device("cpu")
SHARES = 0.1, 0.25, 1.0                                                     # of the training patients, with labels


@dataclass
class Walk:
    """What the steps share. facts: the figures of docs/tour.md."""
    folder: Path
    dataset: data.Dataset
    steps: int                                                              # of SimCLR
    wrong: int                                                              # of the wrong turn
    tuned: int                                                              # of fine-tuning
    batch: int
    facts: dict = field(default_factory=dict)

    def __post_init__(self):
        self.size = self.dataset.images.shape[3]
        self.learnt, self.asked = self.dataset.rows("train"), self.dataset.rows("test")
        self.some = portraits.some_rows(self.dataset, self.batch)           # of validation patients, one batch of them
        self.facts |= {"steps": self.steps, "wrong": self.wrong, "batch": self.batch, "learnt": len(self.learnt),
                       "patients": len(np.unique(self.dataset.groups)), "images": len(self.dataset),
                       "pixels": self.size, "asked": len(self.asked), "others": 2 * self.batch - 1,
                       "chance": math.log(2 * self.batch - 1), "middle": self.batch // 2, "tuned": self.tuned,
                       "guess": 1 / len(self.dataset.classes),
                       "test_patients": len(np.unique(self.dataset.groups[self.asked]))}

    def method(self, cls, **words):
        torch.manual_seed(0)
        encoder = encoders.build("tiny", 1, "default", self.dataset.mean, self.dataset.std)
        return cls(encoder, augment.build("contrastive", self.size), **words)

    def config(self, steps):
        return loop.Config(steps=steps, batch=self.batch, lr=1e-3, optimizer="adamw", weight_decay=0.01,
                           warmup=steps // 10, log_every=max(1, steps // 40), device="cpu")

    def portrait(self, networks, name, file):
        image = portraits.portrait(networks, name, self.dataset, self.some)
        pictures.save(image.reduce(2), self.folder / file)


def walk(w):
    """All steps, one after the other."""
    before = w.method(SimCLR, temperature=0.2)
    draw_images(w)
    draw_views(w, before)
    w.portrait({"random network": copy.deepcopy(before)}, "simclr", "before.png")
    after = copy.deepcopy(before)
    train(w, after)
    networks = {"random network": copy.deepcopy(before), f"after {w.steps} steps": copy.deepcopy(after)}
    w.portrait(networks, "simclr", "after.png")
    cosines_told(w, networks)
    networks = {"random": before.encoder, "trained": after.encoder}
    rows = np.arange(len(w.dataset))
    known = {name: features.extract(encoder, w.dataset.images, rows, CPU) for name, encoder in networks.items()}
    w.facts |= {f"rank_{name}": metrics.rank_me(each[w.some]) for name, each in known.items()}
    draw_neighbours(w, known)
    wrong_turn(w)
    labels(w, networks, known)
    for path in w.folder.glob("*.png"):
        portraits.few_colours(path, 100)


# ---- images and views

def draw_images(w, count=4):
    """Step 1: a row for each class; whole images, and beside each what lies around its lesion, enlarged."""
    lesions, side, rows = lesions_of(len(w.dataset), w.size), w.size // 4, []
    for number, name in enumerate(w.dataset.classes):
        tiles, met = [], set()
        own = [row for row in w.learnt if w.dataset.labels[row] == number]
        for row in sorted(own, key=lambda row: -lesions[row].sum()):        # from each patient the largest that fits
            top, left = corner_of(lesions[row], side)
            rest = lesions[row].sum() - lesions[row, top:top + side, left:left + side].sum()
            if rest == 0 and w.dataset.groups[row] not in met and len(met) < count:
                met.add(w.dataset.groups[row])
                tiles += shown(feed.batch(w.dataset.images, [row], CPU)[0], top, left, side)
        rows += [(name, torch.stack(tiles))]                                # (2 count, 3, 128, 128)
    pictures.sheet(rows, w.folder / "images.png")
    counts = np.bincount(w.dataset.labels, minlength=len(w.dataset.classes))
    w.facts["classes"] = ", ".join(f"{count} {name}" for count, name in zip(counts, w.dataset.classes))


def corner_of(lesion, side):
    """Of a square of this side around the middle of the lesion (H, W), or of the image where there is none."""
    middles = [(axis.min() + axis.max() + 1) // 2 for axis in np.nonzero(lesion if lesion.any() else lesion + 1)]
    return [min(max(middle - side // 2, 0), len(lesion) - side) for middle in middles]


def shown(image, top, left, side):
    """The image (1, H, W) with a frame, and what is in the frame, both as (3, 128, 128)."""
    whole, scale = portraits.tile(image, 256), 256 / image.shape[2]
    frame = [scale * left, scale * top, scale * (left + side), scale * (top + side)]
    portraits.ImageDraw.Draw(whole).rectangle(frame, None, pictures.COLOURS[1], 4)
    near = portraits.tile(image[:, top:top + side, left:left + side], 256)
    return [torch.from_numpy(np.array(tile.reduce(2))).permute(2, 0, 1) / 255 for tile in (whole, near)]


def lesions_of(count, size):
    """Where lesions lie in the built-in set, (N, H, W): it is drawn once more, and what drawing them changes is noted.
    The set's own masks are of organs."""
    changed = []

    class Noted(phantoms._Scene):
        def draw_lesions(self, kind):
            before = self.hu.copy()
            labels = super().draw_lesions(kind)
            changed.append(np.abs(self.hu - before) > 20)
            return labels
    with mock.patch.object(phantoms, "_Scene", Noted):
        phantoms.make(count, size)
    return np.concatenate(changed)


def draw_views(w, method, count=6):
    """Step 2."""
    torch.manual_seed(0)
    images = feed.batch(w.dataset.images, w.some[:count], CPU)
    first, second = method.views(images)
    pictures.sheet([("image", images), ("view 1", first), ("view 2", second)], w.folder / "views.png")


# ---- training

def train(w, method):
    """Step 4: the loop, and the loss of each logging step."""
    history = [record for record in loop.fit(method, w.dataset, w.config(w.steps), w.learnt)
               if isinstance(record["loss"], float)]
    steps = [record["step"] for record in history]
    chart = pictures.Chart({"loss": (steps, [record["loss"] for record in history])}, "Loss of SimCLR", "step", "loss",
                           horizontal={"chance": history[-1]["chance"]})
    pictures.panels([chart], w.folder / "loss.png", size=(760, 320))
    w.facts["loss"] = history[-1]["loss"]


def cosines_told(w, networks):
    """Mean cosine of partners, and of all other pairs of view 1 and view 2."""
    for key, method in zip(("before", "after"), networks.values()):
        torch.manual_seed(0)
        _, views = portraits.views_of(method, w.dataset, w.some)
        matrix = portraits.cosines(portraits.Look(key, method, views, ["projector", "projector"]), len(w.some))
        own, place = matrix.diagonal(), portraits.places(matrix)
        others = (matrix.sum() - own.sum()) / (matrix.numel() - len(own))
        w.facts |= {f"own_{key}": float(own.mean()), f"other_{key}": float(others), f"place_{key}": int(place.median())}


def draw_neighbours(w, known, near=5):
    """Step 6: test images, and the training images whose features are nearest, before training and after."""
    truth, classes, right = w.dataset.labels, w.dataset.classes, {}
    for name, each in known.items():
        unit = F.normalize(each, dim=1)
        nearest = w.learnt[(unit[w.asked] @ unit[w.learnt].T).topk(near, 1).indices.numpy()]    # (asked, near)
        right[name] = nearest, (truth[nearest] == truth[w.asked][:, None]).mean(1)              # (asked,)
        w.facts[f"same_{name}"] = float(right[name][1].mean())
        votes = features.knn(each[w.learnt], truth[w.learnt], each[w.asked]).argmax(1)
        w.facts[f"knn_{name}"] = float(metrics.balanced_accuracy(truth[w.asked], votes))
    shares = [np.bincount(truth[rows], minlength=len(classes)) / len(rows) for rows in (w.asked, w.learnt)]
    w.facts["same_chance"] = float((shares[0] * shares[1]).sum())
    rows = []
    for kind in range(1, len(classes)):                                     # the middle one of its class, see the page
        own = np.flatnonzero(truth[w.asked] == kind)
        own = own[np.argsort(right["trained"][1][own], kind="stable")]
        asked = own[len(own) // 2]
        for name, (nearest, _) in right.items():
            tiles = [tile_of(w, w.asked[asked])] if name == "random" else [Image.new("RGB", (168, 202), "white")]
            tiles += [tile_of(w, row, truth[row] == kind) for row in nearest[asked]]
            rows.append((name, tiles))
    image, pen = pictures.paper(1500, 60 + len(rows) * 226)
    pictures.write(pen, (180, 10), "asked")
    pictures.write(pen, (430, 10), "nearest training images; framed: of the same class")
    for number, (name, tiles) in enumerate(rows):
        pictures.write(pen, (10, 60 + number * 226 + 84), name, anchor="lm")
        for column, tile in enumerate(tiles):
            image.paste(tile, (180 + column * 200 + 50 * (column > 0), 60 + number * 226))
    pictures.save(image.reduce(2), w.folder / "neighbours.png")


def tile_of(w, row, framed=False):
    """The image, and its class below it."""
    words = w.dataset.classes[w.dataset.labels[row]]
    image, pen = pictures.paper(168, 202)
    colour = (pictures.COLOURS[0], 8) if framed else ()
    image.paste(portraits.tile(feed.batch(w.dataset.images, [row], CPU)[0], 168, *colour), (0, 0))
    pictures.write(pen, (84, 170), words, anchor="ma", size=24)
    return image


def wrong_turn(w):
    """Step 7: SimSiam with and without its predictor, as the monitor sees them."""
    looks, methods = {}, {}
    config = replace(w.config(w.wrong), log_every=max(1, w.wrong // 12))
    for name, predictor in (("with predictor", True), ("without predictor", False)):
        method = methods[name] = w.method(SimSiam, hidden=512, dim=256, predictor=predictor)
        monitor = Monitor(method.encoder, replace(w.dataset, labels=None), w.learnt, CPU, config, draws=False)
        looks[name] = [{"step": 0, **monitor.look(method, 0)}]
        for record in loop.fit(method, w.dataset, config, w.learnt):
            if monitor.due(record["step"]):
                looks[name].append({**record, **monitor.look(method, record["step"])})
    charts = []
    for key, title, y_label in (("loss", "Loss", "-1: the views agree"),
                                ("spread", "Spread of the embedding", "about 1: healthy, 0: all alike")):
        series = {name: ([look["step"] for look in each if key in look],
                         [float(look[key]) for look in each if key in look]) for name, each in looks.items()}
        charts.append(pictures.Chart(series, title, "step", y_label))
    pictures.panels(charts, w.folder / "wrong.png", columns=2, size=(440, 280))
    networks = {"random network": w.method(SimSiam, hidden=512, dim=256, predictor=False),
                f"without predictor, {w.wrong} steps": methods["without predictor"]}
    w.portrait(networks, "simsiam", "collapse.png")
    for name, each in zip(("right", "wrong"), looks.values()):
        w.facts |= {f"{name}_loss": float(each[-1]["loss"]), f"{name}_spread": each[-1]["spread"]}


# ---- the number

class Classifier(torch.nn.Module):
    """An encoder and a linear layer, trained with labels by the same loop as the methods."""

    def __init__(self, encoder, classes, augment):
        super().__init__()
        self.encoder, self.head, self.augment = encoder, torch.nn.Linear(encoder.dim, classes), augment

    def views(self, images, labels):
        return self.augment(images), labels

    def forward(self, images, labels):
        loss = F.cross_entropy(self.head(self.encoder(images)), labels)
        return {"loss": loss, "chance": math.log(self.head.out_features)}

    def after_step(self, outs, progress):
        pass


def labels(w, networks, known):
    """Step 8: few labels to all; a linear classifier on features that stay as they are, and fine-tuning."""
    truth, order = w.dataset.labels, np.random.default_rng(0).permutation(np.unique(w.dataset.groups[w.learnt]))
    rows = [w.learnt[np.isin(w.dataset.groups[w.learnt], order[:round(share * len(order))])] for share in SHARES]
    charts, scores = [], {}
    for way, title in (("linear", "Features stay as they are"), ("tuned", "Fine-tuned")):
        lines, bands = {}, {}
        for name, encoder in networks.items():
            answers = [linear(w, known[name], own) if way == "linear" else tuned(w, encoder, own) for own in rows]
            values = [metrics.balanced_accuracy(truth[w.asked], answer) for answer in answers]
            scores[way, name] = answers
            lines[f"{name} network"] = [len(own) for own in rows], values
            bands[f"{name} network"] = list(zip(*(interval(w, score_of(truth, answer)) for answer in answers)))
            w.facts |= {f"{way}_few_{name}": float(values[0]), f"{way}_all_{name}": float(values[-1])}
        for at, which in ((0, "few"), (-1, "all")):
            gain = interval(w, gain_of(truth, scores[way, "trained"][at], scores[way, "random"][at]))
            w.facts[f"{way}_{which}_gain"] = "{:+.2f} to {:+.2f}".format(*gain)
        charts.append(pictures.Chart(lines, title, "training images with labels (log scale)", "balanced accuracy",
                                     log_x=True, bands=bands, horizontal={"chance": w.facts["guess"]}))
    w.facts["few"] = len(rows[0])
    pictures.panels(charts, w.folder / "labels.png", columns=2, size=(440, 320))


def score_of(truth, answer):
    return lambda asked, places: metrics.balanced_accuracy(truth[asked], answer[places])


def gain_of(truth, one, other):
    return lambda asked, places: score_of(truth, one)(asked, places) - score_of(truth, other)(asked, places)


def interval(w, score, draws=500):
    """95 %: the test patients are drawn with replacement, again and again, and scored each time."""
    rng, groups = np.random.default_rng(0), w.dataset.groups[w.asked]
    own = [np.flatnonzero(groups == group) for group in np.unique(groups)]
    values = []
    for _ in range(draws):
        places = np.concatenate([own[number] for number in rng.integers(len(own), size=len(own))])
        values.append(score(w.asked[places], places))
    return np.quantile(values, (0.025, 0.975))


def linear(w, feature, rows, steps=300):
    """Answers of a linear classifier, trained on the features of these rows, for the test images."""
    torch.manual_seed(0)
    feature = (feature - feature[rows].mean(0)) / (feature[rows].std(0) + 1e-6)
    head = torch.nn.Linear(feature.shape[1], len(w.dataset.classes))
    optimizer = torch.optim.AdamW(head.parameters(), 0.01, weight_decay=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(head(feature[rows]), torch.from_numpy(w.dataset.labels[rows])).backward()
        optimizer.step()
    return head(feature[w.asked]).argmax(1).numpy()


def tuned(w, encoder, rows):
    """The same, but the encoder learns on, too."""
    torch.manual_seed(0)
    method = Classifier(copy.deepcopy(encoder), len(w.dataset.classes), augment.build("mild", w.size))
    config = replace(w.config(w.tuned), batch=min(w.batch, len(rows)))
    for _ in loop.fit(method, w.dataset, config, rows):
        pass
    answers = features.extract(method.encoder, w.dataset.images, w.asked, CPU)
    return method.head(answers).argmax(1).numpy()


# ---- the page

def run_blocks(text, short):
    """Runs the page's blocks of Python, in an empty folder."""
    home = os.getcwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            for block in re.findall(r"```python\n(.*?)```", text, re.S):
                exec(block.replace("steps=300", "steps=4").replace("warmup=30", "warmup=1") if short else block, {})
        finally:
            os.chdir(home)


def with_figures(text, facts):
    """The page with these figures between the comments that name them."""
    def filled(match):
        value = facts[match[1]]
        value = f"{value:.2f}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else value
        return f"<!-- {match[1]} -->{value}<!-- / -->"
    return re.sub(r"<!-- (\w+) -->[^<]*<!-- / -->", filled, text)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--short", action="store_true", help="in little, into a folder that is thrown away")
    short, start = parser.parse_args().short, time.perf_counter()
    with tempfile.TemporaryDirectory() as thrown_away:
        if short:
            path, w = Path(thrown_away) / "tour.md", Walk(Path(thrown_away), phantoms.make(200, 32), 4, 4, 2, 16)
        else:
            path, w = PAGE, Walk(PAGE.with_suffix(""), data.load("phantoms", 64), 400, 120, 300, 64)
        w.folder.mkdir(exist_ok=True)
        walk(w)
        path.write_text(with_figures(PAGE.read_text(), w.facts))
        run_blocks(PAGE.read_text(), short)
        print(f"{path.name} and {len(list(w.folder.glob('*.png')))} pictures in {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
