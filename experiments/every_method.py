"""Which method? Every one on the same images, as RESULTS.md compares them.

    python experiments/every_method.py --data FOLDER --out FOLDER --seeds 3 --deal --train='--steps 500'

Each with the values of its own SMALL. All get the same number of steps, which is not the same time: `--list` prints the
commands, and each run's log.jsonl holds images a second.
"""

import commands

from medssl import METHODS

PRETRAIN = {name: f"--method {name}" for name in METHODS if name != "together"}
EVALUATE = {"frozen": (["thumbnails", "statistics", *PRETRAIN], "--task knn linear --labels 1.0 0.1 --seeds 2")}
MASKS = {"frozen": ([*PRETRAIN], "--task segment --labels 1.0 --seeds 1")}

if __name__ == "__main__":
    commands.main(__doc__, PRETRAIN, EVALUATE, MASKS)
