"""Features of an encoder that stays as it is, features that nothing has learned, and what nearest neighbours make of
them."""

import numpy as np
import torch
import torch.nn.functional as F

from . import feed

PERCENTILES = (1, 5, 10, 25, 50, 75, 90, 95, 99)


@torch.no_grad()
def in_batches(ask, images, rows, device, size=256):
    """ask(x) -> (B, D) of dataset rows, some at a time: (N, D)."""
    parts = [ask(feed.batch(images, rows[i:i + size], device)).float().cpu() for i in range(0, len(rows), size)]
    return torch.cat(parts)


def extract(encoder, images, rows, device, ask=None, size=256):
    """Pooled features (N, D) of dataset rows, the encoder in evaluation mode and left as it was found. ask(x) -> (B,
    D): what is asked of it, where that is something else than encoder(x)."""
    training = encoder.training
    encoder.eval()
    features = in_batches(ask or encoder, images, rows, device, size)
    encoder.train(training)
    return features


def thumbnails(dataset, side=8):
    """Features (N, C * side * side) that nothing has learned: the images as an encoder is given them, made tiny."""
    mean, std = (torch.tensor(v, dtype=torch.float32).view(-1, 1, 1) for v in (dataset.mean, dataset.std))
    return in_batches(lambda x: F.adaptive_avg_pool2d((x - mean) / std, side).flatten(1),
                      dataset.images, np.arange(len(dataset)), torch.device("cpu"))


def statistics(dataset, rows):
    """Features (N, 11 C) that nothing has learned: mean, deviation and nine percentiles of the grey values of each
    channel, wherever they stand in the image; standardised over these rows."""
    def ask(x):
        grey = x.flatten(2).numpy()                                 # (B, C, H W)
        values = [grey.mean(2)[None], grey.std(2)[None], np.percentile(grey, PERCENTILES, axis=2)]
        return torch.from_numpy(np.concatenate(values).swapaxes(0, 1)).flatten(1)                   # (B, 11 C)
    return standardised(in_batches(ask, dataset.images, np.arange(len(dataset)), torch.device("cpu")), rows)


def standardised(features, rows):
    """Mean 0 and deviation 1 over these rows in each column (N, D); a column that is constant there stays 0."""
    mean, std = features[rows].mean(0), features[rows].std(0, correction=0)
    std = torch.where(std > 1e-6 * features[rows].abs().max(), std, 1.0)
    return (features - mean) / std


def joined(parts, rows):
    """Features side by side. Each part is standardised over these rows and divided by the root of its width, so that
    all parts weigh alike in a cosine."""
    return torch.cat([standardised(part, rows) / part.shape[1] ** 0.5 for part in parts], 1)


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
