"""Together: several methods on one encoder, their losses added.

No single paper; Rubik's Cube+ (rubik.py) and PCRL (pcrl.py) are published examples of such sums.

The idea. Each pretext task has its blind spot: rotation need not see what looks the same from all sides, contrast need
not see what its augmentation changes, restoration need not see what the picture as a whole is. An encoder that has to
serve several of them can afford fewer of these.

The algorithm. Parts 1, ..., n share the encoder f; each has its own views, heads, queues and averages.
  loss = sum over parts k of weight_k loss_k(views_k)                                                               (1)
The loss of a network that knows nothing is the same sum of the parts' (where every part has one).

Shapes. images (B, C, H, W) -> for each part the tuple of its views -> one number. Outputs carry their part's name, as
in `rotation.accuracy`; each part's after_step gets its own back, without the name.

Differences.
- Views. Multi-task methods often pass one view through all their heads. Here: every part makes its own, so one step
  costs as much as a step of each part.
- BatchNorm. Here: each part's pass is normalised with its own statistics, but the encoder's running statistics mix all
  parts: with SparK, masked and whole images. SparK's sparse mode holds only inside SparK's forward.
- Training. Here: optimiser, batch and size are those of the first part's RECIPE, each part's augmentation that of its
  own.
- What is kept. Here: `encoder`, also where a part alone would export another.
"""

import inspect

import torch
from torch import nn


class Together(nn.Module):
    """Weighted sum of methods. parts: name -> method, all on this encoder; weights: name -> number, 1 where missing."""

    def __init__(self, encoder, augment, parts, weights=None):
        super().__init__()
        self.encoder, self.augment = encoder, augment                       # the parts bring their own augmentations
        strangers = [name for name, part in parts.items() if part.encoder is not encoder]
        if strangers:                                                       # would be trained, and not kept
            raise ValueError(f"{', '.join(strangers)}: built on another encoder; build every part on the one encoder")
        self.parts = nn.ModuleDict(parts)
        self.weights = dict.fromkeys(parts, 1.0) | (weights or {})

    @torch.no_grad()
    def views(self, images, labels=None, masks=None, groups=None):
        targets = {"labels": labels, "masks": masks, "groups": groups}
        views = []
        for part in self.parts.values():
            wanted = inspect.signature(part.views).parameters
            views.append(part.views(images, **{word: value for word, value in targets.items() if word in wanted}))
        return tuple(views)                                                 # one tuple per part

    def forward(self, *views):
        outs = {name: part(*view) for (name, part), view in zip(self.parts.items(), views)}
        together = {"loss": sum(weight * outs[name]["loss"] for name, weight in self.weights.items())}     # Eq. 1
        if all("chance" in out for out in outs.values()):
            together["chance"] = sum(weight * outs[name]["chance"] for name, weight in self.weights.items())
        for word in ("embedding", "restored"):
            found = [out[word] for out in outs.values() if word in out]
            if found:
                together[word] = found[0]                                   # of the first part that has one
        return together | {f"{name}.{word}": value for name, out in outs.items() for word, value in out.items()}

    @torch.no_grad()
    def after_step(self, outs, progress):
        for name, part in self.parts.items():
            own = f"{name}."
            part.after_step([{word.removeprefix(own): value for word, value in out.items() if word.startswith(own)}
                             for out in outs], progress)
