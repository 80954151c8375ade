"""Eyes while a method is trained: what it sees, whether its features collapse, and what a kNN makes of them.

Everything is looked at on a fixed set of images and with the same randomness, and nothing is learned from it. The pictures are
drawn as soon as there is something to show: views.png before the first step, the others at each look.
"""

from dataclasses import replace

import numpy as np
import torch

from . import features, feed, metrics, plots

CLASSES_SCORED = 1500, 500                          # labelled training images that a kNN knows, validation images it is asked about


class Monitor:
    """first: the encoder before training, which the trained one has to beat; out: the folder for pictures, None for none."""

    def __init__(self, first, dataset, rows, device, settings, out):
        self.every = max(1, settings.steps // 10 // settings.log_every) * settings.log_every
        self.steps, self.dataset, self.device, self.out, self.latest = settings.steps, dataset, device, out, {}
        pick = np.random.default_rng(0).permutation
        self.fixed = pick(rows)[:256]
        labelled = [] if dataset.labels is None else rows[dataset.labels[rows] >= 0]
        val = [] if dataset.splits is None or dataset.labels is None else dataset.rows("val")
        known, asked = CLASSES_SCORED
        self.train, self.val = pick(labelled)[:known], [row for row in pick(val)[:asked] if dataset.labels[row] >= 0]
        self.scored = len(self.val) > 0 and len(np.unique(dataset.labels[self.train])) > 1
        self.spectra = {"start": metrics.spectrum(self.features(first, self.fixed))}
        self.start = self.knn(first)

    def features(self, encoder, rows):
        return features.extract(encoder, self.dataset.images, rows, self.device)

    def knn(self, encoder):
        """Balanced accuracy on the validation patients."""
        if not self.scored:
            return None
        votes = features.knn(self.features(encoder, self.train), self.dataset.labels[self.train], self.features(encoder, self.val))
        return float(metrics.balanced_accuracy(self.dataset.labels[self.val], votes.argmax(1)))

    def chance(self):
        """What guessing would score."""
        return 1 / len(np.unique(self.dataset.labels[self.val]))

    def due(self, step):
        """Is there a look after this step?"""
        return step % self.every == 0 or step == self.steps

    @torch.no_grad()
    def look(self, method):
        """The numbers of this moment, for the log; spectrum.png and restored.png."""
        encoder = getattr(method, "exported", method.encoder)
        seen = self.features(encoder, self.fixed)
        self.spectra["end"] = metrics.spectrum(seen)
        self.latest = {"rank_me": float(metrics.rank_me(seen))}
        if self.scored:
            self.latest["knn"] = self.knn(encoder)
        views = self.views(method)
        training = method.training
        out = method.eval()(*views)                                         # by every process: some losses gather all embeddings
        method.train(training)
        if "embedding" in out:
            self.latest["spread"] = float(metrics.spread(out["embedding"].float().cpu().numpy()))
        if self.out:
            plots.spectrum_chart(self.spectra, self.out / "spectrum.png")
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
        plots.views_sheet(flat(self.views(method)), self.out / "views.png")

    def draw_restored(self, views, restored):
        """Beside what was restored: the view itself under a mask; of (distorted, target) the target; else the image."""
        views = flat(views)
        pictures = [tensor for tensor in views if tensor.ndim == 4 and tensor.is_floating_point()]
        images = feed.batch(self.dataset.images, self.fixed[:8], "cpu")
        clean = {1: pictures[0], 2: pictures[-1]}.get(len(pictures), images)
        plots.restored_sheet(clean, views, restored, self.out / "restored.png")

    def draw_curves(self, history):
        """The log so far, as curves.png."""
        def series(key):
            points = [(record["step"], record[key]) for record in history if key in record]
            return {key: tuple(zip(*points))} if points else {}

        chance = [record["chance"] for record in history if "chance" in record]
        panels = [{"series": series("loss"), "title": "loss", "x_label": "step", "y_label": "loss",
                   "horizontal": {"chance": chance[-1]} if chance else None}]
        if series("knn"):
            panels.append({"series": series("knn"), "title": "kNN on validation images", "x_label": "step", "y_label": "balanced accuracy",
                           "horizontal": {"before training": self.start}})
        if series("rank_me"):
            panels.append({"series": series("rank_me"), "title": "RankMe of the features", "x_label": "step",
                           "y_label": "effective directions"})
        plots.panels(panels, self.out / "curves.png")

    def summary(self, record):
        """For the bar."""
        shown = {"loss": f"{record['loss']:.3f}"}
        if "chance" in record:
            shown["chance"] = f"{record['chance']:.3f}"
        shown["images/s"] = f"{record['images_per_s']:.0f}"
        return shown | {name: f"{self.latest[key]:.2f}" for key, name in (("rank_me", "RankMe"), ("knn", "kNN")) if key in self.latest}


def flat(views):
    """The tensors of the views, also of several methods together, on the CPU."""
    return tuple(tensor.cpu() for view in views for tensor in (view if isinstance(view, tuple) else (view,)))
