"""Do features of CT slices collapse, and do whitening and local contrast help? After Hassanpour et al., 2402.14611.

    python experiments/medmoco.py --data FOLDER --out FOLDER --seeds 3        a set with masks

The work is known by its abstract and by later code, which may differ from what made its numbers. It claims that MoCo v2
on CT slices uses few directions, that local contrast and decorrelation mend this, and about 8 % more Dice from a frozen
encoder (points or relative: not said). It starts from ImageNet's weights and from scratch; --generic gives the former.
"""

import commands

PRETRAIN = {
    "moco": "--method moco",
    "medmoco": "--method medmoco",
    "no-whitening": "--method medmoco --set decorrelation=None",
    "no-regions": "--method medmoco --set local_weight=0.0",
    "medmoco-generic": "--method medmoco --init {generic}",
}
EVALUATE = {
    "masks": (["{generic}", *PRETRAIN], "--task segment unet collapse --labels 1.0 0.1"),
}

if __name__ == "__main__":
    commands.main(__doc__, PRETRAIN, EVALUATE)
