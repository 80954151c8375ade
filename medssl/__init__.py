"""Self-supervised pretraining for 2D medical images: one file a method, one loop, one evaluation.

A method is a torch.nn.Module with four members; there is no base class. Here is a whole one, at heart that of
rotation.py: turn each image by a multiple of 90 degrees, and let the network say by how much.

    class Rotation(nn.Module):
        def __init__(self, encoder, augment, hidden=1024):
            super().__init__()
            self.encoder, self.augment = encoder, augment
            self.head = nn.Sequential(nn.Linear(encoder.dim, hidden), nn.ReLU(), nn.Linear(hidden, 4))

        @torch.no_grad()
        def views(self, images):                                            # (B, C, H, W)
            turns = torch.randint(4, (len(images),), device=images.device)  # (B,)
            views = self.augment(images)
            four = torch.stack([views.rot90(k, (2, 3)) for k in range(4)])  # (4, B, C, H, W)
            return four[turns, torch.arange(len(views), device=views.device)], turns

        def forward(self, views, turns):
            answers = self.head(self.encoder(views))                        # (B, 4)
            loss = F.cross_entropy(answers, turns)
            accuracy = (answers.argmax(1) == turns).float().mean()
            return {"loss": loss, "chance": math.log(4), "accuracy": accuracy}

        def after_step(self, outs, progress):
            pass                                                            # nothing is remembered between steps

The rules:

    method.encoder                    the network that is trained for later use: encoder(x) -> (B, dim), with .dim;
                                      methods that look at places also use encoder.features(x) -> maps, fine to coarse,
                                      with .widths and .strides. Set them on an encoder of your own: encoder.dim = 2048
    method.views(images, *targets)    -> tuple of tensors. images (B, C, H, W) in [0, 1] on the device. All randomness
                                      is here. A parameter named labels, masks or groups (patients) is filled in; None
                                      where the set has none
    method.forward(*views)            -> dict with "loss" and whatever is worth logging; "chance", the loss of a network
                                      that knows nothing; tensors that after_step needs; detached "embedding" and
                                      "restored" for the monitor and the pictures. Deterministic, and changes no state
                                      but BatchNorm's running statistics
    method.after_step(outs, progress) once after each optimiser step: moving averages, queues, counters. outs are the
                                      dicts of the step's micro-batches, detached; progress runs over (0, 1]. All state
                                      is a parameter or a persistent buffer
    method.exported                   optional: the encoder to save, where it is not method.encoder

Constructors are Method(encoder, augment, **options). augment(images) -> views, random for each image;
augment(images, geometry=True) -> views and theta (B, 2, 3), the map from view to image in coordinates from -1 to 1.
Arguments named channels, size, mean (of the images, a number for each channel), decoder and small (an augmentation for
small crops) are filled in by train.py, the others have defaults and are changed with --set. An argument named
queue_size counts embeddings that are kept for later steps: with `--preset small` it is at most a quarter of the number
of images, unless --set gives it, since in a longer queue the images would meet themselves.

What holds for all methods, unless a header says otherwise:
- BatchNorm. Each view passes the networks on its own: statistics are those of one view in one process.
- Several processes. Losses that compare images with each other gather the embeddings of all processes, with gradient:
  more processes are a larger batch, with more negatives. Queues take in the keys of all of them.
- Accumulation of gradients (--accum: one optimiser step from several micro-batches) equals a larger batch but for
  BatchNorm's statistics, whitening and losses that compare images, which see one micro-batch at a time. Queues,
  averages and counters move once a step.

A file's RECIPE holds its paper's training settings: optimizer, lr (per 256 images for sgd, lars and lamb, as it stands
for adam and adamw), weight_decay, batch, epochs, warmup (epochs), views (a name from common/augment.py), size; and
where the paper has them options (of the optimiser), clip, weight_decay_end, views_small, and decoder (words of the
decoder that train.py builds).

A file's SMALL holds what the method needs in a short run of a small network on small images, each value with the
measurement that chose it, or the words "a guess": words of its constructor, and where RECIPE's or the run's do not do,
views, lr, batch, stem and the least number of steps. It may be empty.

Small functions such as mlp stand in every method file that uses them, so that one file can be copied; a test holds the
copies equal. A header has four paragraphs: the idea, the algorithm, the shapes, the differences (Paper, Released code,
Here). Settings of other works are written as the words of train.py that bring them about.
"""

from .autoencoder import Autoencoder
from .byol import BYOL
from .dcl import DCL
from .genesis import Genesis
from .jigsaw import Jigsaw
from .lejepa import LeJEPA
from .medmoco import MedMoCo
from .moco import MoCo
from .pcrl import PCRL
from .relative import Relative
from .rotation import Rotation
from .rubik import Rubik
from .simclr import SimCLR
from .simsiam import SimSiam
from .spark import SparK
from .swav import SwAV
from .together import Together
from .vicreg import VICReg

__version__ = "3.0.0"

METHODS = {
    "simclr": SimCLR, "dcl": DCL, "simsiam": SimSiam, "byol": BYOL, "vicreg": VICReg, "lejepa": LeJEPA,
    "swav": SwAV, "moco": MoCo, "medmoco": MedMoCo, "spark": SparK,
    "rotation": Rotation, "relative": Relative, "jigsaw": Jigsaw,
    "autoencoder": Autoencoder, "genesis": Genesis,
    "rubik": Rubik, "pcrl": PCRL, "together": Together,
}
