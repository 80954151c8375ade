"""How labels are read out: a linear probe on frozen features, or heads that the loop trains.

Frozen read-outs        linear_probe (on features extracted once), Segmenter with a LinearHead
Trained read-outs       Classifier, Grader, Segmenter with a U-Net decoder; they keep to the contract of a method and
                        train through loop.fit
Choosing                every choice (L2, epoch, rate) is made on validation rows; none of these functions ever sees a
                        test row before it is made
"""

import copy
import hashlib
import math
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from .. import augment, feed, loop, metrics, optim
from ..features import standardised

L2_GRID = (10.0, 1.0, 0.1, 1e-2, 1e-3, 1e-4, 1e-5)                                # of the linear probe, strong to weak


# ---- frozen features

def linear_probe(features, labels, train, val, classes, class_weights=None):
    """Logistic regression on features (N, D) standardised over the training rows. The L2 penalty with the best balanced
    accuracy on the validation rows is kept, the stronger one if two are equal. Returns the class shares of any rows, as
    a function, and what was chosen."""
    x = standardised(features, train)                                       # (N, D)
    y, best, weights = torch.as_tensor(labels), None, None
    for l2 in L2_GRID:
        weights = logistic(x[train], y[train], classes, l2, class_weights, weights)
        score = metrics.balanced_accuracy(labels[val], affine(x[val], weights).argmax(1))
        if best is None or score > best["validation"]:
            best, chosen = {"validation": score, "l2": l2}, weights
    return lambda rows: affine(x[rows], chosen).softmax(1).numpy(), best


def logistic(x, y, classes, l2, class_weights=None, start=None):
    """Weights (D + 1, classes), the last row the bias, that minimise mean cross-entropy + l2 / 2 |weights without
    bias|^2, by L-BFGS."""
    weights = torch.zeros(x.shape[1] + 1, classes, dtype=x.dtype) if start is None else start.clone()
    weights.requires_grad_()
    optimizer = torch.optim.LBFGS([weights], max_iter=100, tolerance_grad=1e-6, tolerance_change=1e-9,
                                  line_search_fn="strong_wolfe")

    def loss():
        optimizer.zero_grad()
        value = F.cross_entropy(affine(x, weights), y, class_weights) + l2 / 2 * weights[:-1].square().sum()
        value.backward()
        return value
    optimizer.step(loss)
    return weights.detach()


def affine(x, weights):
    return x @ weights[:-1] + weights[-1]                                   # (N, classes)


def freeze(encoder):
    """No gradients, and evaluation mode that the loop's train() cannot undo: BatchNorm keeps its statistics."""
    encoder.eval().requires_grad_(False)
    encoder.train = lambda mode=True: encoder


def release(encoder):
    vars(encoder).pop("train", None)
    encoder.requires_grad_(True)


def fingerprint(module):
    """Hash of all weights and buffers."""
    digest = hashlib.sha256()
    for value in module.state_dict().values():
        digest.update(value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


# ---- losses of logits (B, K, ...) against classes (B, ...); beside them torch's cross-entropy

def soft_dice(logits, targets, class_weights=None):
    """1 - soft Dice, the mean over the classes that the batch holds, over all its pixels together; + weighted
    cross-entropy."""
    shares = logits.softmax(1)
    truth = F.one_hot(targets, logits.shape[1]).movedim(-1, 1).to(shares.dtype)                      # (B, K, ...)
    pixels = [0, *range(2, logits.ndim)]
    both, predicted, true = (shares * truth).sum(pixels), shares.sum(pixels), truth.sum(pixels)     # (K,) each
    there = true > 0
    dice = (2 * both / (predicted + true) * there).sum() / there.sum()
    return 1 - dice + F.cross_entropy(logits, targets, class_weights)


LOSSES = {"ce": F.cross_entropy, "balanced": F.cross_entropy, "dice": soft_dice}


def balanced_weights(counts):
    """Class weights by which every class weighs alike; 0 for a class that is not there."""
    counts = np.asarray(counts, float)
    present = counts > 0
    return torch.tensor(present * counts.sum() / (np.maximum(counts, 1) * present.sum()), dtype=torch.float32)


# ---- supervised methods

class Classifier(nn.Module):
    """One linear layer on the pooled feature."""

    def __init__(self, encoder, augment, classes, class_weights=None):
        super().__init__()
        self.encoder, self.augment = encoder, augment
        self.head = nn.Linear(encoder.dim, classes)
        self.register_buffer("class_weights", torch.ones(classes) if class_weights is None else class_weights)

    @torch.no_grad()
    def views(self, images, labels):
        return self.augment(images), labels

    def forward(self, x, labels):
        loss = F.cross_entropy(self.logits(x), labels, self.class_weights)
        return {"loss": loss, "chance": math.log(self.head.out_features)}

    def logits(self, x):
        return self.head(self.encoder(x)).float()                           # (B, classes)

    def answer(self, x):
        return self.logits(x).softmax(1)

    def after_step(self, outs, progress):
        pass


class Grader(Classifier):
    """One output on the pooled feature, for classes that are ordered: its square distance to the grade is the loss."""

    def __init__(self, encoder, augment, classes):
        super().__init__(encoder, augment, 1)
        self.classes = classes
        nn.init.constant_(self.head.bias, (classes - 1) / 2)                # starts in the middle of the scale

    def forward(self, x, labels):
        return {"loss": F.mse_loss(self.logits(x).squeeze(1), labels.float())}

    def answer(self, x):
        """(B, classes); the nearest grade has the largest share: thresholds lie at .5, 1.5, ..."""
        grades = torch.arange(self.classes, device=x.device)
        return (-(self.logits(x) - grades) ** 2).softmax(1)


class Segmenter(nn.Module):
    """A head on the encoder's maps: head(maps) -> (B, classes, h, w). The masks take the way of the images, nearest,
    background outside."""

    def __init__(self, encoder, augment, head, classes, loss="dice", class_weights=None):
        super().__init__()
        self.encoder, self.augment, self.head, self.loss = encoder, augment, head, LOSSES[loss]
        self.register_buffer("class_weights", torch.ones(classes) if class_weights is None else class_weights)

    @torch.no_grad()
    def views(self, images, masks):
        x, theta = self.augment(images, geometry=True)
        return x, augment.warp(masks, theta).long()                         # (B, C, H, W), (B, H, W)

    def forward(self, x, masks):
        return {"loss": self.loss(self.logits(x), masks, self.class_weights)}

    def logits(self, x):
        """(B, classes, H, W). A decoder's output may be larger than the image, since sides are rounded up on the way
        down. It is cut: cell i looks at pixel i * stride. What is smaller is enlarged."""
        height, width = x.shape[2:]
        logits = self.head(self.encoder.features(x)).float()[..., :height, :width]          # (B, classes, h, w)
        return F.interpolate(logits, (height, width), mode="bilinear")

    def answer(self, x):
        return self.logits(x).argmax(1).byte()                              # (B, H, W)

    def after_step(self, outs, progress):
        pass


class LinearHead(nn.Module):
    """A 1x1 convolution on the maps, brought to stride 4 and joined. A BatchNorm without weights of its own puts the
    maps on one scale: in evaluation the whole is one affine map of each place's features."""

    def __init__(self, widths, strides, classes):
        super().__init__()
        self.stride = strides[0]
        self.scale, self.out = nn.BatchNorm2d(sum(widths), affine=False), nn.Conv2d(sum(widths), classes, 1)

    def forward(self, maps):
        size = [max(1, side * self.stride // 4) for side in maps[0].shape[2:]]
        maps = [F.interpolate(m, size, mode="area" if m.shape[2] > size[0] else "bilinear") for m in maps]
        return self.out(self.scale(torch.cat(maps, 1)))                     # (B, classes, H / 4, W / 4)


@torch.no_grad()
def answers(method, images, rows, device, size=128):
    """Class shares (N, K) or masks (N, H, W) of dataset rows."""
    training = method.training
    method.eval()
    parts = [method.answer(feed.batch(images, rows[i:i + size], device)).cpu() for i in range(0, len(rows), size)]
    method.train(training)
    return torch.cat(parts).numpy()


@dataclass(frozen=True)
class Training:
    """How a read-out is trained."""
    config: loop.Config
    look: int                                   # steps between two looks at the validation score
    frozen_steps: int = 0                       # of config.steps, with the encoder frozen
    weights: np.ndarray | None = None           # how often each row is drawn
    head_rate: float = 1.0                      # the head's learning rate, as a multiple of the encoder's


def tune(method, dataset, rows, score, training):
    """Train with the loop: first with the encoder frozen, then (a second fit, a fresh optimiser) all of it.
    score(method) on validation images is taken at every look, and the weights with the best one are those that remain.
    Returns [(step, score)], before training first."""
    config, look = training.config, training.look
    method.to(loop.processes(config.device)[2])
    curve, best, done = [(0, score(method))], None, 0
    for phase, steps in enumerate((training.frozen_steps, config.steps - training.frozen_steps)):
        if not steps:
            continue
        (release if phase else freeze)(method.encoder)
        part = replace(config, steps=steps, warmup=min(config.warmup, steps // 10), seed=2 * config.seed + phase,
                       log_every=look)
        groups = optim.parameter_groups(method, config.weight_decay, {"head.": training.head_rate})
        for record in loop.fit(method, dataset, part, rows, training.weights, groups):
            if record["step"] % look == 0 or record["step"] == steps:
                curve.append((done + record["step"], score(method)))
                if best is None or curve[-1][1] > best[0]:
                    best = curve[-1][1], copy.deepcopy(method.state_dict())
        if record["step"] < steps:                                          # the loop ends early, in order, on Ctrl-C
            raise KeyboardInterrupt
        done += steps
    method.load_state_dict(best[1])
    return curve
