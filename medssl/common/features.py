"""Features of an encoder that stays as it is, and what its nearest neighbours say."""

import numpy as np
import torch
import torch.nn.functional as F

from . import feed


@torch.no_grad()
def extract(encoder, images, rows, device, size=256):
    """Pooled features (N, D) of dataset rows, the encoder in evaluation mode and left as it was found."""
    training = encoder.training
    encoder.eval()
    features = [encoder(feed.batch(images, rows[i:i + size], device)).float().cpu() for i in range(0, len(rows), size)]
    encoder.train(training)
    return torch.cat(features)


def knn(train_features, train_labels, features, k=20, temperature=0.1):
    """Class shares (N, classes) by the k nearest training images in cosine distance, weighted by exp(similarity / temperature)."""
    train_labels = torch.as_tensor(np.asarray(train_labels))
    known, shares = F.normalize(train_features, dim=1), []
    for part in F.normalize(features, dim=1).split(4096):                                            # bounds the memory
        similarity = part @ known.T                                                                  # (n, M)
        nearest, index = similarity.topk(min(k, similarity.shape[1]), dim=1)                         # (n, k)
        votes = F.one_hot(train_labels[index], int(train_labels.max()) + 1) * (nearest / temperature).exp().unsqueeze(2)
        shares.append(votes.sum(1) / votes.sum((1, 2)).unsqueeze(1))                                 # (n, classes)
    return torch.cat(shares).numpy()                                                                 # (N, classes)
