"""Pretraining on a small set itself, beside ImageNet. After Chattopadhyay et al., arXiv 2303.02245.

    python experiments/small_sets.py --data FOLDER --out FOLDER --seeds 3 --generic imagenet.pth

The work claims that four methods, pretrained on sets of one to five thousand images, compete with ImageNet's weights.
Its tables were not found: there is no number to match. Its code leaves SimSiam's predictor out, which is known to
collapse: both are here, and `collapse` shows it. Its code deals images, ours patients; its head called linear has two
layers, ours one.
"""

import commands

PRETRAIN = {
    "simclr": "--method simclr",
    "dclw": "--method dcl --set sigma=0.5",
    "simsiam": "--method simsiam",
    "simsiam-no-predictor": "--method simsiam --set predictor=False",
    "vicreg": "--method vicreg",
}
EVALUATE = {
    "classes": (["{generic}", "thumbnails", "statistics", *PRETRAIN, "simclr+statistics"],
                "--task knn linear collapse --labels 1.0 0.25 0.1"),
    "finetuned": (["{generic}", *PRETRAIN], "--task finetune --labels 1.0 0.25 0.1 --lr 3e-4 1e-3 3e-3"),
}

if __name__ == "__main__":
    commands.main(__doc__, PRETRAIN, EVALUATE)
