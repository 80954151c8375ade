"""Does the default help on these images, beside what costs nothing? The numbers of RESULTS.md.

    python experiments/does_it_help.py --data FOLDER --out FOLDER --seeds 5 --deal

Each deal of the patients has a pretraining, labelled patients and a test of its own, so that an interval over deals
holds all that is random. `frozen`: beside an untrained network, tiny pictures and statistics of grey values, and
whether the features add to these. `tuned`: all of the network trained with labels, at the best of three rates.
"""

import commands

PRETRAIN = {"medmoco": "--method medmoco"}
EVALUATE = {
    "frozen": (["{generic}", "thumbnails", "statistics", "medmoco", "medmoco+statistics"],
               "--task knn linear --labels 1.0 0.25 0.1 --seeds 2"),
    "tuned": (["medmoco"], "--task finetune --labels 1.0 0.1 --lr 3e-4 1e-3 3e-3 --seeds 1"),
}
MASKS = {
    "frozen": (["medmoco"], "--task segment --labels 1.0 0.1 --lr 3e-4 1e-3 3e-3 --seeds 1"),
    "tuned": (["medmoco"], "--task unet --labels 1.0 0.1 --lr 3e-4 1e-3 3e-3 --seeds 1"),
}

if __name__ == "__main__":
    commands.main(__doc__, PRETRAIN, EVALUATE, MASKS)
