"""Features of an encoder that stays as it is: extracting them, and what nearest neighbours make of them."""

import numpy as np
import torch
import torch.nn.functional as F

from . import feed


@torch.no_grad()
def extract(encoder, images, rows, device, ask=None, size=256):
    """Pooled features (N, D) of dataset rows, the encoder in evaluation mode and left as it was found. ask(x) -> (B,
    D): what is asked of it, where that is something else than encoder(x)."""
    training, ask = encoder.training, ask or encoder
    encoder.eval()
    features = [ask(feed.batch(images, rows[i:i + size], device)).float().cpu() for i in range(0, len(rows), size)]
    encoder.train(training)
    return torch.cat(features)


def thumbnails(dataset, side=8, size=256):
    """Features (N, C * side * side) that nothing has learned: the images as an encoder is given them, made tiny."""
    mean, std = (torch.tensor(v, dtype=torch.float32).view(-1, 1, 1) for v in (dataset.mean, dataset.std))
    tiny = []
    for rows in np.split(np.arange(len(dataset)), range(size, len(dataset), size)):
        x = (feed.batch(dataset.images, rows, torch.device("cpu")) - mean) / std                    # (B, C, H, W)
        tiny.append(F.adaptive_avg_pool2d(x, side).flatten(1))                                      # (B, C * side^2)
    return torch.cat(tiny)


@torch.no_grad()
def set_statistics(encoder, images, rows, device, size=256):
    """BatchNorm's means and variances become those of these images, by one pass in training mode; the weights stay.

    A network that was never trained has 0 and 1 there, a trained one what it met last: the images it was trained on."""
    norms = [m for m in encoder.modules() if isinstance(m, torch.nn.modules.batchnorm._BatchNorm)]
    training, momenta = encoder.training, [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None                                        # the plain mean over batches
    rows = np.random.default_rng(0).permutation(rows)               # neighbours in a file look alike, a batch must not
    encoder.train()
    for part in np.array_split(rows, max(1, round(len(rows) / size))):
        encoder(feed.batch(images, part, device))
    encoder.train(training)
    for norm, momentum in zip(norms, momenta):
        norm.momentum = momentum
    return encoder


def knn(train_features, train_labels, features, k=20, temperature=0.1):
    """Class shares (N, classes) by the k nearest training images in cosine distance, each with the weight
    exp(similarity / temperature)."""
    train_labels = torch.as_tensor(np.asarray(train_labels))
    known, shares = F.normalize(train_features, dim=1), []
    for part in F.normalize(features, dim=1).split(4096):           # bounds the memory
        similarity = part @ known.T                                 # (n, M)
        nearest, index = similarity.topk(min(k, similarity.shape[1]), dim=1)                                # (n, k)
        votes = F.one_hot(train_labels[index], int(train_labels.max()) + 1) * (nearest / temperature).exp().unsqueeze(2)
        shares.append(votes.sum(1) / votes.sum((1, 2)).unsqueeze(1))                                # (n, classes)
    return torch.cat(shares).numpy()                                # (N, classes)
