"""Self-supervised pretraining for 2D medical images: one file a method, one loop, one evaluation.

A method is a torch.nn.Module with four members; there is no base class. This is the whole contract:

    method.encoder                    the network that is trained for later use: encoder(x) -> (B, dim), with .dim;
                                      methods that look at places also use encoder.features(x) -> maps, fine to coarse,
                                      with .widths and .strides
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
small crops) are filled in by train.py, the others have defaults and are changed with --set. A number that can never be
right is refused by the constructor, with a ValueError of one line that names the word and the value.

A file's RECIPE holds its paper's training settings: optimizer, lr (per 256 images for sgd, lars and lamb, as it stands
for adam and adamw), weight_decay, batch, epochs, warmup (epochs), views (a name from common/augment.py), size; and
where the paper has them options (of the optimiser), clip, weight_decay_end, views_small.

A file's SMALL holds what the method needs in a short run of a small network on small images, with the measurement that
chose it: words of its constructor, and where RECIPE's or the run's do not do, views, lr, batch, stem and the least
number of steps. It may be empty.

Small functions such as mlp stand in every method file that uses them, so that one file can be copied; a test holds the
copies equal. A header has four paragraphs: the idea, the algorithm, the shapes, the differences (Paper, Released code,
Here). A table of other works' settings is written as the words of train.py that bring them about; a test reads it.
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

__version__ = "2.0.0"

METHODS = {
    "simclr": SimCLR, "dcl": DCL, "simsiam": SimSiam, "byol": BYOL, "vicreg": VICReg, "lejepa": LeJEPA,
    "swav": SwAV, "moco": MoCo, "medmoco": MedMoCo, "spark": SparK,
    "rotation": Rotation, "relative": Relative, "jigsaw": Jigsaw,
    "autoencoder": Autoencoder, "genesis": Genesis,
    "rubik": Rubik, "pcrl": PCRL, "together": Together,
}
