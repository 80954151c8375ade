"""Eyes while a method is trained: what it sees, whether its features collapse, and what a kNN makes of them.

Everything is looked at on a fixed set of images and with the same randomness, and nothing is learned from it. The
pictures are drawn as soon as there is something to show: views.png before the first step, the others at each look.
"""

import copy
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from . import encoders, features, feed, metrics, pictures

KNOWN, ASKED = 1500, 500                            # training images that a kNN knows, validation images it is asked


class Monitor:
    """first: the encoder before training, which the trained one has to beat; draws: whether this process does."""

    def __init__(self, first, dataset, rows, device, config, draws=True):
        self.every = max(1, config.steps // 10 // config.log_every) * config.log_every
        self.steps, self.dataset, self.device = config.steps, dataset, device
        self.latest, self.looks = {}, {}                                    # of now; step: kNN
        self.out = Path(config.out) if draws else None
        pick = np.random.default_rng(0).permutation
        self.fixed = pick(rows)[:256]
        labelled = [] if dataset.labels is None else rows[dataset.labels[rows] >= 0]
        val = [] if dataset.splits is None or dataset.labels is None else dataset.rows("val")
        self.train, self.val = pick(labelled)[:KNOWN], [row for row in pick(val)[:ASKED] if dataset.labels[row] >= 0]
        self.unscored = self.why_not()
        normalised = features.set_statistics(copy.deepcopy(first), dataset.images, pick(rows)[:KNOWN], device)
        before = {"before training": first, "before training, normalised": normalised}
        self.spectra = {name: metrics.spectrum(self.features(encoder, self.fixed)) for name, encoder in before.items()}
        self.right = {}                                                     # which validation images a kNN tells
        self.start = {} if self.unscored else {name: self.knn(encoder, name) for name, encoder in before.items()}

    def why_not(self):
        """Why a kNN cannot be scored, and what would help; None where it can."""
        if self.dataset.labels is None:
            return "the images have no labels"
        if self.dataset.splits is None:
            return ("the images are not split; `python -m medssl.common.data DATA --to FOLDER --split 0.7 0.1 0.2` "
                    "deals them out")
        if not len(self.val):
            return "no validation image has a label"
        if len(np.unique(self.dataset.labels[self.train])) < 2:
            return "the training images have labels of fewer than two classes"
        return None

    def features(self, encoder, rows):
        return features.extract(encoder, self.dataset.images, rows, self.device)

    def knn(self, encoder, name="trained"):
        """Balanced accuracy on the validation patients."""
        known, asked = self.features(encoder, self.train), self.features(encoder, self.val)
        votes = features.knn(known, self.dataset.labels[self.train], asked).argmax(1)
        self.right[name] = votes == self.dataset.labels[self.val]
        return float(metrics.balanced_accuracy(self.dataset.labels[self.val], votes))

    def fell(self):
        """Whether the trained features tell clearly less than the untrained network's: by more than twice the standard
        error, patients being what is drawn. On few patients the score jumps by chance alone."""
        if not self.looks:
            return False
        before = self.right[max(self.start, key=self.start.get)]
        labels = self.dataset.labels[self.val]
        share = 1 / np.bincount(labels)[labels] / len(np.unique(labels))    # each class weighs alike
        loss = (before.astype(float) - self.right["trained"]) * share       # (N,), adds up to the fall of the score
        groups = np.arange(len(labels)) if self.dataset.groups is None else self.dataset.groups[self.val]
        each = np.bincount(np.unique(groups, return_inverse=True)[1], loss)                 # (patients,)
        return len(each) > 1 and loss.sum() > 2 * each.std(ddof=1) * len(each) ** 0.5

    def chance(self):
        """What guessing would score."""
        return 1 / len(np.unique(self.dataset.labels[self.val]))

    def due(self, step):
        """Is there a look after this step?"""
        return step % self.every == 0 or step == self.steps

    @torch.no_grad()
    def look(self, method, step):
        """The numbers of this moment, for the log; spectrum.png and restored.png."""
        encoder = encoders.exported(method)
        seen = self.features(encoder, self.fixed)
        self.spectra["trained"] = metrics.spectrum(seen)
        self.latest = {"rank_me": float(metrics.rank_me(seen))}
        if not self.unscored:
            self.latest["knn"] = self.looks[step] = self.knn(encoder)
        views = self.views(method)
        training = method.training
        out = method.eval()(*views)                                         # in every process: some losses gather
        method.train(training)
        if "embedding" in out:
            self.latest["spread"] = float(metrics.spread(out["embedding"].float().cpu().numpy()))
        if self.out:
            pictures.spectrum_chart(self.spectra, self.out / "spectrum.png")
            if "restored" in out:
                self.draw_restored(views, out["restored"].float().cpu())
        return self.latest

    @torch.no_grad()
    def views(self, method):
        """What the method sees of the fixed images."""
        torch.manual_seed(0)
        rows, nobody = self.fixed[:64], replace(self.dataset, groups=None)  # no patient numbers in pictures
        return feed.make_views(method, feed.batch(self.dataset.images, rows, self.device), nobody, rows)

    def draw_views(self, method):
        pictures.views_sheet(tensors_of(self.views(method)), self.out / "views.png")

    def draw_restored(self, views, restored):
        """Beside what was restored: the view itself under a mask; of (distorted, target) the target; else the image."""
        views = tensors_of(views)
        shown = [tensor for tensor in views if tensor.ndim == 4 and tensor.is_floating_point()]
        images = feed.batch(self.dataset.images, self.fixed[:8], "cpu")
        clean = {1: shown[0], 2: shown[-1]}.get(len(shown), images)
        pictures.restored_sheet(clean, views, restored, self.out / "restored.png")

    def draw_curves(self, history):
        """The log so far, as curves.png."""
        def chart(key, name, title, y_label, levels):
            points = [(record["step"], record[key]) for record in history if key in record]
            series = {name: tuple(zip(*points))} if points else {}
            return pictures.Chart(series, title, "step", y_label, horizontal=levels)

        chance = {"chance": history[-1]["chance"]} if "chance" in history[-1] else {}
        guess = {} if self.unscored else {"chance": self.chance()}
        charts = [chart("loss", "loss", "loss", "loss", chance),
                  chart("knn", "trained", "kNN on validation images", "balanced accuracy", self.start | guess),
                  chart("rank_me", "trained", "RankMe of the features", "effective directions", {})]
        pictures.panels([each for each in charts if each.series], self.out / "curves.png")

    def summary(self, record):
        """For the bar."""
        shown = {"loss": f"{record['loss']:.3f}"}
        if "chance" in record:
            shown["chance"] = f"{record['chance']:.3f}"
        shown["images/s"] = f"{record['images_per_s']:.0f}"
        names = {"rank_me": "RankMe", "knn": "kNN"}
        return shown | {names[key]: f"{value:.2f}" for key, value in self.latest.items() if key in names}


def tensors_of(views):
    """The tensors of the views, also of several methods together, on the CPU."""
    return tuple(tensor.cpu() for view in views for tensor in (view if isinstance(view, tuple) else (view,)))
