"""Pretext tasks on medical data: does pretraining help, and when? After Zhang, Zheng, Gu, arXiv 2209.12157.

    python experiments/pretext.py --data FOLDER --out FOLDER --seeds 3        --list prints the commands

The work is in 3D, on chest CT. Its questions: do pretrained networks start ahead when they are fine-tuned, and end
ahead? Does the rare class gain most, and at which imbalance? Is anything left of the gain beside resampling and
stronger augmentation? Which of BYOL's encoders transfers? Do Rubik's rotation heads have to be shallow? Its six
augmentations are S1 to S6 here. Not found: its list of ratios (ours: 1, 3, 10, 30), the outcome with and without skip
connections, the number of its repeats. Here: images, and the small preset unless --train says otherwise. `--masks` is
for a set with masks instead of classes.
"""

import commands

PRETRAIN = {
    "rotation": "--method rotation",
    "relative": "--method relative",
    "jigsaw": "--method jigsaw",
    "rubik": "--method rubik",
    "rubik-masked": "--method rubik --set mask=True",
    "rubik-deep": "--method rubik --set deep_heads=True",
    "autoencoder": "--method autoencoder",
    "genesis": "--method genesis",
    "simclr": "--method simclr",
    "byol": "--method byol",
    "byol-target": "--method byol --set export=target",
    "pcrl": "--method pcrl",
}
EVALUATE = {
    "speed": (PRETRAIN, "--task knn linear finetune --labels 1.0 0.1"),
    "imbalance": (PRETRAIN, "--task finetune --imbalance 1 3 10 30"),
    "resampled": (PRETRAIN, "--task finetune --imbalance 1 3 10 30 --resample"),
    "augmented": (PRETRAIN, "--task finetune --labels 0.1 --augment S0 S1 S2 S3 S4 S5 S6"),
}
MASKS = {
    "speed": (PRETRAIN, "--task segment unet --labels 1.0 0.1"),
    "decoder": (["autoencoder", "genesis", "pcrl"], "--task unet --labels 0.1 --transfer encoder+decoder"),
    "augmented": (PRETRAIN, "--task unet --labels 0.1 --augment S0 S1 S2 S3 S4 S5 S6"),
}

if __name__ == "__main__":
    commands.main(__doc__, PRETRAIN, EVALUATE, MASKS)
