"""BYOL before segmenting 2D slices: how much of it, and on top of what? After Kalapos and Gyires-Toth, 2209.00314.

    python experiments/byol_segmentation.py --data FOLDER --out FOLDER --seeds 3 --generic imagenet.pth

The work compares ImageNet's weights, BYOL on heart MR, and BYOL on heart MR that starts from ImageNet, each followed by
a U-Net. Its abstract: the last converges four to five times sooner; under five epochs of it are enough; with few labels
supervised ImageNet is the most accurate; fewer than 100 slices come near the best. Its tables were not found. It counts
slices, ours are whole patients; its loss is Jaccard, ours Dice with cross-entropy. `epochs_to_95` in results.csv is the
speed; `steps` scores the encoder after every 100 steps of pretraining.
"""

import commands

PRETRAIN = {
    "specialist": "--method byol --keep-every 100",
    "hierarchical": "--method byol --init {generic} --keep-every 100",
}
EVALUATE = {
    "labels": (["{generic}", *PRETRAIN], "--task unet --labels 1.0 0.5 0.2 0.1 0.05 0.02"),
    "steps": (["{runs}/specialist/encoder-*.pt"], "--task unet --labels 0.1"),
}

if __name__ == "__main__":
    commands.main(__doc__, PRETRAIN, EVALUATE)
