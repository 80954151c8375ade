"""The studies behind RESULTS.md: pretrains, evaluates, and prints tables with means and 95 % intervals over seeds.

    python tests/results.py STUDY [STUDY ...] --out FOLDER [--jobs 2] [--steps N]

A study is nothing but commands of train.py and evaluate.py, which are printed as they run, two at a time with one thread each. Runs that are
there already are not trained again.
"""

import argparse
import csv
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
from medssl.common import metrics                                           # noqa: E402

CONTRASTIVE = ("simclr", "dcl", "simsiam", "byol", "vicreg", "swav", "moco", "medmoco")
ALL = (*CONTRASTIVE, "spark", "rotation", "relative", "jigsaw", "autoencoder", "genesis", "rubik", "pcrl")
WORDS = {                          # what a method needs at this small size; everything else is the preset or the same for all
    "simclr": "--set temperature=0.2", "vicreg": "--set dim=512 hidden=512", "simsiam": "--set hidden=512 dim=256", "moco": "--set temperature=0.2",
    "spark": "--stem nopool", "relative": "--views mild --set gap=0.2 jitter=0.1", "jigsaw": "--views mild --set gap=0.2 jitter=0.1",
    "rubik": "--views mild", "swav": "--set crops=4"}
SMALL = "--encoder tiny --size {size} --batch 64 --optimizer adamw --lr 1e-3 --weight-decay 0.01 --steps {steps} --log-every 125 --device cpu"
QUEUE = {"moco": " queue_size=512 momentum=0.9", "medmoco": " queue_size=512 momentum=0.9", "pcrl": " queue_size=512 momentum=0.9", "spark": " width=64",
         "swav": " prototypes=100 freeze=40", "byol": " momentum=0.9"}


def train(name, method, data, seed, steps, size=64, views=None, words=None):
    """One run's command; on other sets than phantoms the preset's settings are written out."""
    extra = WORDS.get(method, "") if words is None else words
    if views:
        extra = f"--views {views} " + extra.replace("--views mild", "")
    if data != "phantoms":
        settings = QUEUE.get(method, "")
        if settings:
            extra += settings if "--set" in extra else f" --set{settings}"
    return name, f"train.py --method {method} --data {data} --seed {seed} {SMALL.format(size=size, steps=steps)} {extra}".split()


def study_phantoms(args):
    """Every method, the same number of steps: kNN, linear probe, collapse, and fine-tuning with a tenth of the labels."""
    runs = [train(f"{m}-{s}", m, "phantoms", s, args.steps or 300) for m in ALL for s in range(args.seeds)]
    runs += [train(f"simsiam-without-{s}", "simsiam", "phantoms", s, args.steps or 300, words="--set predictor=False hidden=512 dim=256") for s in range(args.seeds)]
    return runs, ["--task knn linear collapse", "--task finetune --labels 0.1 --steps 60 --batch 64 --loss balanced"]


def study_two_minutes(args):
    """SimCLR, MoCo v2 and Med-MoCo as long as two minutes on two cores; MoCo's views are its RECIPE's."""
    views = {"simclr": "contrastive", "moco": "slices", "medmoco": "slices"}
    runs = [train(f"{m}-{s}", m, "phantoms", s, args.steps or 800, views=v) for s in range(args.seeds) for m, v in views.items()]
    return runs, ["--task knn linear segment collapse --steps 100"]


def study_rbc(args):
    """Red blood cells: kNN and linear probe after the same number of steps. Size is a class cue, so crops stay mild."""
    methods = [m for m in ALL if m in (*CONTRASTIVE, "spark", "rotation", "genesis")]
    runs = [train(f"{m}-{s}", m, args.data or "../shared/data/rbc_chula", s, args.steps or 400, 64,
                  "histology" if m in CONTRASTIVE and m != "swav" else None) for m in methods for s in range(args.seeds)]
    return runs, ["--task knn linear"]


def study_collapse(args):
    """MoCo v2 against its remedies: neither, local, decorrelation, both."""
    variants = {"neither": "regions=0 decorrelation=None", "local": "decorrelation=None", "decorrelation": "regions=0", "both": ""}
    runs = []
    for variant, words in variants.items():
        for seed in range(args.seeds):
            name, command = train(f"{variant}-{seed}", "medmoco", args.data or "phantoms", seed, args.steps or 400,
                                  words=f"--set {words} queue_size=512 momentum=0.9".replace("--set  ", "--set "))
            runs.append((name, [w for w in command]))
    return runs, [args.evaluate or "--task knn linear segment collapse --steps 100"]


STUDIES = {"phantoms": study_phantoms, "two_minutes": study_two_minutes, "rbc": study_rbc, "collapse": study_collapse}


def run(command, log):
    """Seconds that it took; the output goes into a log beside the run."""
    print("+ python " + " ".join(command), flush=True)
    start = time.perf_counter()
    with open(log, "w") as file:
        status = subprocess.run([sys.executable, str(ROOT / command[0]), *command[1:]], stdout=file, stderr=subprocess.STDOUT,
                                env=os.environ | {"OMP_NUM_THREADS": "1"}).returncode
    if status:
        print(f"FAILED with status {status}: see {log}", flush=True)
    return time.perf_counter() - start


def base(name):
    stem, _, number = name.rpartition("-")
    return stem if number.isdigit() else name


def table(paths, by=("task", "labels", "imbalance", "metric")):
    """Mean and 95 % interval over pretraining seeds (the fits of one run averaged first), as markdown."""
    values = {}
    for path in paths:
        for line in csv.DictReader(open(path)):
            if line["value"] and "recall" not in line["metric"]:
                key = (tuple(line[k] for k in by), base(line["model"]))
                values.setdefault(key, {}).setdefault((line["model"], line["seed"] if line["model"] == "random" else ""), []).append(float(line["value"]))
    for column in dict.fromkeys(key[0] for key in values):
        print("\n" + " ".join(word for word in column if word))
        rows = {name: [sum(v) / len(v) for v in each.values()] for (c, name), each in values.items() if c == column}
        for name, numbers in sorted(rows.items(), key=lambda item: -sum(item[1]) / len(item[1])):
            mean, half = metrics.mean_interval(numbers)
            print(f"| {name} | {mean:.3f} ± {half:.3f} | {len(numbers)} |")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("study", choices=STUDIES)
    parser.add_argument("--out", required=True)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--data", help="another data set than the study's own")
    parser.add_argument("--evaluate", help="other words for evaluate.py")
    args = parser.parse_args()
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    runs, evaluations = STUDIES[args.study](args)
    with ThreadPoolExecutor(args.jobs) as pool:
        todo = [(name, command) for name, command in runs if not (out / name / "encoder.pt").exists()]
        seconds = dict(zip([name for name, _ in todo], pool.map(lambda r: run([*r[1], "--out", str(out / r[0])], out / f"{r[0]}.log"), todo)))
        for name in dict.fromkeys(map(base, seconds)):
            own = [s for n, s in seconds.items() if base(n) == name]
            print(f"{name}: {sum(own) / len(own):.0f} s a run", flush=True)
        groups = {}
        for name, _ in runs:                                                # the seeds of a few methods at a time, so that both cores have work
            groups.setdefault(base(name), []).append(str(out / name))
        jobs = [(["evaluate.py", *folders, *words.split(), "--seeds", "1", "--device", "cpu", "--out", str(out / f"{name}-{i}-results")], out / f"{name}-{i}-results.log")
                for i, words in enumerate(evaluations) for name, folders in groups.items() if not (out / f"{name}-{i}-results/results.csv").exists()]
        list(pool.map(lambda job: run(*job), jobs))
    table(sorted(out.glob("*-results/results.csv")))


if __name__ == "__main__":
    main()
