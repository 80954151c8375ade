"""Contrast or masked pictures where few are labelled? After Wolf et al., arXiv 2308.06534.

    python experiments/spark_contrastive.py --data FOLDER --out FOLDER --seeds 3

The work pretrains SwAV, MoCo v2, BYOL and SparK on chest CT, fine-tunes with less and less of three small sets, and
finds SparK the most robust to that. Its tables and its list of shares were not found (ours: all, a half, a quarter, a
tenth). It pretrains them for 800, 800, about 78 and 1,600 epochs; here each has its own preset's length, so that
budgets are as unequal as the presets. As there, the encoder is frozen for the first seventh of the read-out.
"""

import commands

PRETRAIN = {
    "swav": "--method swav",
    "moco": "--method moco",
    "byol": "--method byol",
    "spark": "--method spark",
}
EVALUATE = {
    "fewer": (["{generic}", *PRETRAIN], "--task finetune --labels 1.0 0.5 0.25 0.1 --epochs 14 --freeze 2"),
}

if __name__ == "__main__":
    commands.main(__doc__, PRETRAIN, EVALUATE)
