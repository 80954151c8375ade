"""The studies behind RESULTS.md: pretrains, evaluates, and prints tables with means and 95 % intervals over seeds.

    python tests/results.py STUDY --out FOLDER [--data FOLDER] [--jobs 2] [--steps N] [--seeds 3]

A study is nothing but commands of train.py and evaluate.py, which are printed as they run, so many at a time, one thread each. What is there
already does not run again. The folder of a real set is given with --data; without it a study uses the built-in phantoms.
"""

import argparse
import csv
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
from medssl.common import metrics

CONTRASTIVE = ("simclr", "dcl", "simsiam", "byol", "vicreg", "swav", "moco", "medmoco")
ALL = (*CONTRASTIVE, "spark", "rotation", "relative", "jigsaw", "autoencoder", "genesis", "rubik", "pcrl")
BASE = "--encoder tiny --batch 64 --optimizer adamw --lr 1e-3 --weight-decay 0.01 --log-every 125 --device cpu"
QUEUE = "--set queue_size=128 momentum=0.9"
SMALL = {                          # what a method needs in a short run on small images; all else is the same for all
    "simclr": "--views contrastive --set temperature=0.2", "vicreg": "--set dim=512 hidden=512", "simsiam": "--set hidden=512 dim=256", "byol": "--set momentum=0.9",
    "moco": "--views contrastive --set queue_size=128 momentum=0.99 bn_chunks=1 temperature=0.2", "medmoco": QUEUE, "pcrl": QUEUE, "spark": "--stem nopool --set width=64",
    "swav": "--set prototypes=20 freeze=0 crops=2 epsilon=0.03", "relative": "--views mild --set gap=0.2 jitter=0.1", "jigsaw": "--views mild --set gap=0.2 jitter=0.1",
    "rubik": "--views mild"}


class Study:
    """One study's folder, the runs in it, and the work that waits for a free core."""

    def __init__(self, args):
        self.args, self.out, self.waiting = args, Path(args.out), []
        self.seeds = range(args.seeds)
        self.data = args.data or "phantoms"
        self.masks = self.data == "phantoms" or (Path(self.data) / "masks").is_dir()
        self.labels = self.data == "phantoms" or not self.masks
        self.views = f"--views {args.views}" if args.views else ""

    def train(self, name, method, steps, seed=0, data=None, words=""):
        """Adds a run: BASE, what the method needs, then this study's own words, the last of which win."""
        command = f"train.py --method {method} --data {data or self.data} --seed {seed} --steps {steps} --size {self.args.size} {BASE} {SMALL.get(method, '')} {words}"
        if not (self.out / name / "encoder.pt").exists():
            self.waiting.append((f"{command} --out {self.out / name}".split(), self.out / f"{name}.log"))
        return name

    def evaluate(self, name, runs, words):
        """Adds an evaluation of some runs, whose results are in the folder NAME-results."""
        folders = " ".join(str(self.out / run) for run in runs)
        if not (self.out / f"{name}-results/results.csv").exists():
            self.waiting.append((f"evaluate.py {folders} {words} --device cpu --out {self.out}/{name}-results".split(), self.out / f"{name}-results.log"))

    def each(self, runs, words):
        """An evaluation for the seeds of every method, so that all cores have work."""
        for stem in dict.fromkeys(map(base, runs)):
            self.evaluate(f"{stem}-{len(words)}", [run for run in runs if base(run) == stem], words)

    def work(self):
        """Does all that waits, --jobs at a time."""
        with ThreadPoolExecutor(self.args.jobs) as pool:
            list(pool.map(lambda job: run(*job), self.waiting))
        self.waiting = []


def phantoms(study):
    """Every method, the same number of steps: kNN, linear probe, collapse, and for most fine-tuning with a tenth of the labels."""
    steps = study.args.steps or 300
    runs = [study.train(f"{m}-{s}", m, steps, s) for m in ALL for s in study.seeds]
    runs += [study.train(f"simsiam_without-{s}", "simsiam", steps, s, words="--set predictor=False") for s in study.seeds]
    study.work()
    study.each(runs, "--task knn linear collapse --seeds 1")
    study.each([r for r in runs if base(r) not in CONTRASTIVE[1:]], "--task finetune --labels 0.1 --steps 60 --loss balanced --seeds 1")


def two_minutes(study):
    """SimCLR, MoCo v2 and Med-MoCo for about two minutes on two cores: a step of MoCo, half of it without a gradient, takes less."""
    steps = {"simclr": 1200, "moco": 2000, "medmoco": 1200}
    runs = [study.train(f"{m}-{s}", m, study.args.steps or steps[m], s) for s in study.seeds for m in steps]
    study.work()
    study.each(runs, "--task knn linear segment collapse --steps 100 --seeds 1")
    study.each(runs, "--task linear finetune --labels 0.05 0.1 1.0 --steps 80 --batch 32 --loss balanced --seeds 2")
    study.evaluate("labels", [f"{m}-0" for m in steps], "--task finetune --labels 0.05 0.1 0.3 1.0 --steps 80 --batch 32 --loss balanced --seeds 3")


def equal_time(study):
    """The same training time for every method, --seconds of one core: the pace is measured first."""
    methods = (*CONTRASTIVE, "spark", "rotation")
    words = {m: study.views for m in CONTRASTIVE if m != "swav"}
    if study.args.size % 16:                                                # the cells of "nopool"; "small" has cells of 8
        words["spark"] = "--stem small"
    for m in methods:
        study.train(f"pace-{m}", m, 30, words=words.get(m, "") + " --log-every 10")
    study.work()
    runs = []
    for m in methods:
        pace = json.loads((study.out / f"pace-{m}/log.jsonl").read_text().splitlines()[-1])["images_per_s"] / 64
        runs += [study.train(f"{m}-{s}", m, max(50, round(pace * study.args.seconds)), s, words=words.get(m, "")) for s in study.seeds]
    study.work()
    study.each(runs, "--task knn --seeds 1")


def collapse(study):
    """MoCo v2 against its remedies: neither, local, decorrelation, both."""
    variants = {"neither": "regions=0 decorrelation=None", "local": "decorrelation=None", "decorrelation": "regions=0", "both": "regions=20"}
    runs = [study.train(f"{v}-{s}", "medmoco", study.args.steps or 400, s, words=f"--set {words}") for v, words in variants.items() for s in study.seeds]
    study.work()
    study.each(runs, "--task " + "knn " * study.labels + "segment " * study.masks + "collapse --steps 100 --seeds 1")
    study.evaluate("spectrum", [f"{v}-0" for v in variants], "--task collapse --seeds 1")


def labels(study):
    """How many labels pretraining saves: fine-tuning with all of them, a tenth, and with a few images."""
    steps = study.args.steps or 500
    runs = [study.train(f"{m}-0", m, steps, words=study.views if m in CONTRASTIVE else "") for m in ("simclr", "medmoco", "spark")]
    study.work()
    task, few = ("unet", "7n") if study.masks else ("finetune --loss balanced", "77n")
    study.evaluate("labels", runs, f"--task {task} --labels 1.0 0.1 {few} --steps 80 --batch 32 --seeds {study.args.seeds}")


def imbalance(study):
    """The rare class thinned further and further, with and without resampling, and under stronger augmentation."""
    runs = [study.train(f"{m}-0", m, study.args.steps or 400) for m in ("simclr", "rotation")]
    study.work()
    study.evaluate("thinned", runs, f"--task finetune --imbalance 1 10 100 --steps 80 --batch 32 --seeds {study.args.seeds}")
    study.evaluate("resampled", runs, f"--task finetune --imbalance 10 --resample --steps 80 --batch 32 --seeds {study.args.seeds}")
    study.evaluate("augmented", runs, f"--task finetune --labels 0.1 --augment S0 S3 S6 --steps 80 --batch 32 --seeds {study.args.seeds}")


def chain(study):
    """BYOL on phantoms, on the set's own images, and on the one after the other; then a U-Net with a twentieth of the masks and with all."""
    steps = study.args.steps or 400
    study.train("generic-0", "byol", steps, data="phantoms")
    study.train("own-0", "byol", steps)
    study.work()
    study.train("both-0", "byol", steps, words=f"--init {study.out}/generic-0")
    study.work()
    study.evaluate("chain", ["generic-0", "own-0", "both-0"], f"--data {study.data} --task unet --labels 0.05 1.0 --steps 80 --batch 32 --seeds {study.args.seeds}")


def masked(study):
    """SparK against random weights: fine-tuning and U-Net with a twentieth of the labels."""
    runs = [study.train(f"spark-{s}", "spark", study.args.steps or 300, s) for s in range(3)]
    study.work()
    study.evaluate("spark-finetune", runs, "--task finetune --labels 0.05 --steps 100 --batch 32 --loss balanced --seeds 5")
    study.evaluate("spark-unet", runs, "--task unet --labels 0.05 --steps 100 --batch 32 --seeds 5")


def architecture(study):
    """BYOL's two encoders; restoring with and without skip connections, and whether the decoder is worth keeping."""
    steps, runs = study.args.steps or 300, []
    for s in study.seeds:
        runs += [study.train(f"byol_{which}-{s}", "byol", steps, s, words=f"--set export={which}") for which in ("online", "target")]
        runs += [study.train(f"{m}_{'skips' if skips else 'plain'}-{s}", m, steps, s, words=f"--set decoder.skips={skips}")
                 for m in ("genesis", "autoencoder") for skips in (True, False)]
    study.work()
    study.each(runs, "--task knn finetune unet --labels 0.1 --steps 60 --batch 32 --seeds 1")
    study.each([r for r in runs if "skips" in r], "--task unet --transfer encoder+decoder --labels 0.1 --steps 60 --batch 32 --seeds 1")


def small_batches(study):
    """SimCLR against the decoupled loss with 16 and with 128 images a step, as many images in all."""
    images = 64 * (study.args.steps or 400)
    runs = [study.train(f"{m}_{b}-{s}", m, images // b, s, words=f"--batch {b} --set temperature=0.1")
            for m in ("simclr", "dcl") for b in (16, 128) for s in study.seeds]
    study.work()
    study.each(runs, "--task knn linear --seeds 1")


SHOWN = ("balanced_accuracy", "auc", "dice", "rank_me", "epochs_to_95", "epochs_to_95_of_random")
STUDIES = {f.__name__: f for f in (phantoms, two_minutes, equal_time, collapse, labels, imbalance, chain, masked, architecture, small_batches)}


def run(command, log):
    """The output goes into a log beside the run."""
    print("+ python " + " ".join(command), flush=True)
    start = time.perf_counter()
    with open(log, "w") as file:
        status = subprocess.run([sys.executable, str(ROOT / command[0]), *command[1:]], stdout=file, stderr=subprocess.STDOUT,
                                env=os.environ | {"OMP_NUM_THREADS": "1"}).returncode
    print(f"{log.stem}: " + (f"FAILED with status {status}: see {log}" if status else f"{time.perf_counter() - start:.0f} s"), flush=True)


def base(name):
    stem, _, number = name.rpartition("-")
    return stem if number.isdigit() else name


def table(paths, by=("task", "labels", "imbalance", "augment", "metric")):
    """Mean and 95 % interval, as markdown: over pretraining seeds (the fits of one run averaged first) where there are several, else over fits."""
    values = {}
    for path in paths:
        for line in csv.DictReader(open(path)):
            if line["value"] and (line["metric"] in SHOWN or line["metric"].startswith("recall ")):
                column = " ".join(line[k] for k in by if line[k])
                values.setdefault((path.parent.name, column), {}).setdefault(base(line["model"]), []).append((line["model"], float(line["value"])))
    for (folder, column), rows in values.items():
        print(f"\n{folder}: {column}")
        for name, scores in rows.items():
            runs = {}
            for model, score in scores:
                runs.setdefault(model, []).append(score)
            numbers = [sum(v) / len(v) for v in runs.values()] if len(runs) > 1 else next(iter(runs.values()))
            mean, half = metrics.mean_interval(numbers)
            print(f"| {name} | {mean:.3f} ± {half:.3f} | {len(numbers)} |")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("study", choices=STUDIES)
    parser.add_argument("--out", required=True)
    parser.add_argument("--data", help="folder of a real set (default: phantoms)")
    parser.add_argument("--views", help="of the contrastive methods on that set (default: their RECIPEs')")
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--steps", type=int, help="of pretraining (default: the study's)")
    parser.add_argument("--seconds", type=float, default=60, help="of pretraining, in equal_time")
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()
    study = Study(args)
    study.out.mkdir(parents=True, exist_ok=True)
    STUDIES[args.study](study)
    study.work()
    table(sorted(study.out.glob("*-results/results.csv")))


if __name__ == "__main__":
    main()
