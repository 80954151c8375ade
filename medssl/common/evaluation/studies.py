"""The protocols of the works on a set of your own: pretrains, reads out, and says which claims hold there.

    python -m medssl.common.evaluation.studies                                       lists the studies and their claims
    python -m medssl.common.evaluation.studies collapse --data FOLDER --budget 60 --out studies/collapse

A study is nothing but commands of train.py and evaluate.py (protocols.py says which), one thread each, --jobs at a
time. The pace of every method is measured first, and --budget decides how long the runs are: a third of it goes to the
read-outs, if they can use it. What is finished is not done again; stopped runs go on at their last checkpoint. So the
same command with the same --out goes on, after Ctrl-C or a power cut.

FOLDER then holds runs, results and logs; table.md, chart.png and verdicts.json: means and 95 % t intervals over
pretraining seeds of the scores, of the gains over random weights, and of what each claim says.
"""

import json
import math
import shlex
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from ... import METHODS
from .. import augment, cli, data, files, presets
from ..data.layouts import find
from ..errors import UserError
from . import commands, findings
from .claims import CLAIMS, Evaluation, Given, Run
from .commands import Command, Work, held, minutes
from .protocols import LOOKS, STUDIES, VIEWED
from .study import Where, describe
from .subsets import find_target
from .tasks import TASKS

PROBE = 10                                      # steps by which a pace is measured; the monitor looks half-way
BATCH = 32                                      # of read-outs that are trained
LEAST_READ, MOST_READ = 60, 20                  # steps; passes over the training images
SHORT_READ = 150                                # steps: on the hippocampus 60 decided nothing, 150 did (RESULTS)
LEAST = 50                                      # steps of a run
FITS = 3                                        # seeds of the read-outs
COSTS = {"finetune": 0.6, "grade": 0.6, "segment": 0.6, "unet": 1.2}        # of an image, beside the cheapest run's
STARTING, FROZEN = 8, 3                         # seconds: of an evaluation; of a fit that trains nothing
LOOKED = 10                                     # times the monitor looks at a run
CHECKPOINTS = 10                                # of a run: what a stopped one loses at most is a tenth
RARE = 4                                        # images of the rare class that an imbalance series leaves at least


def main(argv=None):
    args = parse(argv)
    if args.name is None:
        list_studies()
        return
    protocol = STUDIES[cli.one_of(args.name, STUDIES, "study")]
    out = Path(args.out)
    missing = [script for script in ("train.py", "evaluate.py") if not (commands.ROOT / script).is_file()]
    if missing:
        raise UserError(f"{' and '.join(missing)}: not in {commands.ROOT}; studies run them, so start from a checkout "
                        "of the project, not from an installed package")
    check(args, protocol)
    with held(out) as lock:
        work = Work(out, args.jobs, lock)
        with begun(out, args):
            given = look(args, protocol, work)
        asked = list(protocol.commands(given))
        plan = settle(args, given, protocol, asked, work)
        print(told(args, protocol, asked, plan))
        work.do(named(given, asked, plan, args.views, out))
        found = findings.Found(given, [each for each in asked if isinstance(each, Evaluation)], out)
        if not found.fits:
            raise UserError(f"--out {out}: nothing was read out; the logs say why")
        pictures = findings.write(found, args.name, protocol.line, protocol)
        print(f"in {out}: table.md, verdicts.json, {', '.join(pictures)}; runs, results, logs")
        if work.failed:
            raise UserError(f"{len(work.failed)} commands failed: {', '.join(work.failed)}; see {out / 'logs'}; the "
                            "same command tries them again")


def parse(argv):
    parser = cli.Parser(prog="python -m medssl.common.evaluation.studies",
                        description="Runs a study of the works on a set of images; without a name, lists them.")
    add = parser.add_argument
    add("name", nargs="?", help="which study")
    add("--data", type=cli.filled, default="phantoms", help="folder or file of images (default: phantoms, built in)")
    add("--label", type=cli.filled, default="label", help="column of split.csv that holds the label")
    add("--size", type=cli.side, help="side of the images in pixels (default: as train.py chooses)")
    add("--views", choices=augment.VIEWS,
        help="views of the contrastive methods (default: as train.py chooses)")
    add("--weights", type=cli.filled, metavar="FILE", help="weights to compare with, for the study imagenet")
    add("--budget", type=cli.positive_number, default=30, metavar="MINUTES", help="of it all (default 30)")
    add("--seeds", type=cli.positive, default=3, help="of pretraining (default 3; a verdict wants five)")
    add("--jobs", type=cli.positive, default=1, help="commands at a time, one thread each (default 1)")
    add("--out", type=cli.filled, metavar="FOLDER", help="where everything goes")
    args = parser.parse_args(argv)
    if args.name and not args.out:
        parser.error("--out FOLDER is needed: a study that was stopped goes on there")
    return args


def list_studies():
    for name, protocol in STUDIES.items():
        needs = f" (needs {', '.join(protocol.needs)})" if protocol.needs else ""
        print(f"{name}: {protocol.line}{needs}")
        for claim in protocol.claims:
            print(f"    claim {claim}: {CLAIMS[claim]}")


# ---- the folder

@contextmanager
def begun(out, args):
    """Refuses a folder that holds another study; a start that fails leaves the folder free."""
    asked = {key: value for key, value in vars(args).items() if key not in ("jobs", "out")}
    path = out / "asked.json"
    before = json.loads(path.read_text()) if path.is_file() else asked
    other = [f"{key} {before.get(key)}" for key, value in asked.items() if before.get(key) != value]
    if other:
        raise UserError(f"--out {out}: was begun with {', '.join(other)}; choose another folder")
    yield
    files.write_json(path, asked)


# ---- what there is

def check(args, protocol):
    """Flags that the study lacks or would not heed."""
    if "other images than the phantoms" in protocol.needs and args.data == "phantoms":
        raise UserError(f"{args.name}: the phantoms are its generic images; give others with --data")
    if ("--weights" in protocol.needs) != bool(args.weights):
        raise UserError(f"{args.name}: " + ("needs --weights FILE" if not args.weights else "takes no --weights"))


def look(args, protocol, work):
    """The set, as far as a study has to know it."""
    weights, network, known_as = described(args.weights)
    path = args.data if args.data == "phantoms" else str(Path(args.data).resolve())
    label, removed = args.label, None
    if "patients" in protocol.needs:
        path, removed = prepared(path, args, work)
        label = "label"                                                     # of the prepared set
    found = presets.look(path, label)
    plan = presets.small([METHODS["byol"]], found)
    dataset = data.load(path, args.size or plan["size"], None, label)
    has = {kind: getattr(dataset, kind) is not None for kind in ("labels", "masks")}
    lacking = [kind for kind in ("labels", "masks") if kind in protocol.needs and not has[kind]]
    if lacking or not any(has.values()):
        raise UserError(f"{args.name}: {dataset.name} has no {' and no '.join(lacking or has)}")
    if dataset.splits is None:
        print(f"note: {dataset.name} has no splits, so pretraining sees the test images too, without labels; "
              "`python -m medssl.common.data DATA --to FOLDER --split 0.7 0.1 0.2` deals patients out")
        dataset = data.split(dataset)
    ratios, rare = series(dataset, args.name) if has["labels"] else ((), None)
    channels, size = dataset.images.shape[1:3]
    return Given(path, args.seeds, **has, size=size, channels=channels, label=label, ratios=ratios, rare=rare,
                 images={name: len(dataset.rows(name)) for name in ("train", "val", "test")},
                 per_epoch=max(1, found.images // plan["batch"]), weights=weights, known_as=known_as,
                 network=network, removed=removed)


def prepared(path, args, work):
    """The set cut into slices, and beside it the same without near-duplicates, patients in the same splits."""
    source = None if path == "phantoms" else find(path, args.label, volumes=True)
    if source and not (source.groups or source.volumes):
        raise UserError(f"{args.name}: {path} has no patients, and only among the images of one patient are "
                        "near-duplicates looked for")
    deal = [] if source is None or source.splits else "--split 0.7 0.1 0.2".split()
    label = [] if args.label == "label" else ["--label", args.label]
    size = ["--size", str(args.size)] if args.size else []
    kept, removed, module = work.out / "data", work.out / "data-removed", ["-m", "medssl.common.data"]
    work.do([Command("prepare", [*module, path, "--to", str(kept), *deal, *label, *size], kept),
             Command("dedupe", [*module, str(kept), "--to", str(removed), "--dedupe"], removed, after=("prepare",))])
    if work.failed:
        raise UserError(f"{args.name}: {path} could not be prepared, see {work.out / 'logs'}; prepare it with "
                        "`python -m medssl.common.data` and give the new folder with --data")
    return str(kept.resolve()), str(removed.resolve())


def series(dataset, name):
    """The imbalance ratios that leave some images of the rare class, and that class."""
    groups = np.arange(len(dataset)) if dataset.groups is None else dataset.groups
    target = find_target(dataset, groups, "labels", lambda line: None)
    counts = np.bincount(target.values[target.rows["train"]], minlength=len(target.classes))
    others = min(count for c, count in enumerate(counts) if count and c != target.rare)
    ratios = tuple(ratio for ratio in (1, 3, 10, 30, 100) if others >= ratio * RARE)
    if name == "imbalance" and len(ratios) < 2:
        raise UserError(f"imbalance: the smallest of the other classes has {others} training images, too few to make "
                        "one class rare")
    return ratios, target.classes[target.rare]


def described(path):
    """The file, the flags of train.py that build its network, and what evaluate.py calls it."""
    if path is None:
        return None, "", None
    model = describe(path, Where())
    if model.encoder is None:
        raise UserError(f"--weights {path}: holds features; pretraining needs weights to start from")
    return str(Path(path).resolve()), f"--encoder {model.encoder} --stem {model.stem}", model.name


# ---- how long

@dataclass
class Pace:
    """What was measured of a kind of run."""
    step: float                                 # seconds
    batch: int
    rest: float                                 # seconds of a run that are not steps: opening the set, looks


def settle(args, given, protocol, asked, work):
    """How many steps each run and each read-out has. Settled once: a study that goes on keeps it."""
    path = work.out / "plan.json"
    if path.is_file():
        return json.loads(path.read_text())
    runs = [each for each in asked if isinstance(each, Run)]
    paces = measure(args, given, runs, work)
    unit = min(pace.step / pace.batch for pace in paces.values())
    evaluations = [each for each in asked if isinstance(each, Evaluation)]
    whole = args.budget * 60 * args.jobs
    fixed, per_step = (sum(times) for times in zip(*(reading(each, given.images, unit) for each in evaluations)))
    read = readout_steps((whole / 3 - fixed) / per_step if per_step else 0, given.images["train"])
    reading_time = fixed + read * per_step
    left = max(whole - reading_time, whole / 2) - sum(paces[kind(run)].rest for run in runs)
    steps = lengths(runs, paces, max(left, 0), protocol.alike)
    seconds = {run.name: steps[run.name] * paces[kind(run)].step + paces[kind(run)].rest for run in runs}
    enough = readout_steps(SHORT_READ, given.images["train"])
    plan = {"steps": steps, "read": read, "seconds": seconds, "pretraining": sum(seconds.values()),
            "reading": reading_time, "paces": {key: asdict(pace) for key, pace in paces.items()},
            "short": per_step > 0 and read < enough, "enough": enough,
            "budget_for_enough": 3 * (fixed + enough * per_step) / 60 / args.jobs}
    files.write_json(path, plan)
    return plan


def kind(run):
    """Runs of one kind have one pace."""
    return f"{run.method} {run.words}".strip()


def measure(args, given, runs, work):
    """The pace of each kind of run, from a few steps of its first one."""
    first = {}
    for run in runs:
        first.setdefault(kind(run), run)
    probes = [Command(f"pace-{run.row}", [*train_words(given, run, args.views, PROBE), "--log-every", str(PROBE // 2),
                                          "--out", str(work.out / "pace" / run.row)],
                      work.out / "pace" / run.row, PROBE) for run in first.values()]
    if any(not probe.done() for probe in probes):
        print(f"measuring the pace of {', '.join(run.row for run in first.values())}: {PROBE} steps each", flush=True)
    work.do(probes)
    if work.failed:
        raise UserError(f"{', '.join(work.failed)}: failed, so nothing was begun; see {work.out / 'logs'}")
    return {key: pace_of(work.out / "pace" / run.row) for key, run in first.items()}


def pace_of(folder):
    """The second half of a probe begins with a look of the monitor, of which a run has ten."""
    config, log = files.read_config(folder), files.read_log(folder / "log.jsonl")
    batch = config["arguments"]["batch"]
    first, second = (batch / record["images_per_s"] for record in log)      # seconds of a step
    return Pace(first, batch, STARTING + LOOKED * max(0, second - first) * PROBE / 2)


def reading(evaluation, images, unit):
    """Seconds of an evaluation: (whatever its steps, for each step). unit: seconds to train on an image."""
    fixed, per_step = STARTING, 0
    models = len(evaluation.runs) * (len(LOOKS) if evaluation.runs[0].kept else 1) + len(evaluation.files)
    cells = math.prod(len(entries) for key, entries in evaluation.series.items() if key != "augment")
    for task in evaluation.tasks:
        random = 2 if TASKS[task].frozen else 1
        fits = (models + random) * FITS * cells
        fits *= len(evaluation.series.get("augment", "1")) if TASKS[task].trains else 1
        if TASKS[task].trains:
            forward = (11 * images["val"] + images["test"]) / 3             # looks need no backward pass
            fixed += fits * forward * unit * COSTS[task]
            per_step += fits * BATCH * unit * COSTS[task]
        else:
            fixed += fits * FROZEN
    return fixed, per_step


def readout_steps(steps, train):
    return int(max(LEAST_READ, min(steps, MOST_READ * max(1, train // BATCH))))


def lengths(runs, paces, seconds, alike):
    """{run: steps}, so that all of them take so long, and have the same images, or time, for each share. None has
    fewer than LEAST steps: where images are alike all runs grow with the shortest, else only those that are short."""
    if alike == "minutes":
        each = {run.name: seconds * run.share / sum(other.share for other in runs) / paces[kind(run)].step
                for run in runs}
        return {name: max(LEAST, int(steps)) for name, steps in each.items()}
    for_one = {run.name: run.share / paces[kind(run)].batch for run in runs}                    # steps for an image
    seconds_for_one = sum(for_one[run.name] * paces[kind(run)].step for run in runs)
    images = max(seconds / seconds_for_one, LEAST / min(for_one.values()))
    return {name: round(images * steps) for name, steps in for_one.items()}


def told(args, protocol, asked, plan):
    """What will run, and how long."""
    runs = [each for each in asked if isinstance(each, Run)]
    evaluations = [each for each in asked if isinstance(each, Evaluation)]
    rows = ", ".join(f"{row} {plan['steps'][f'{row}-0']}" for row in dict.fromkeys(run.row for run in runs))
    times = [plan[key] / 60 / args.jobs for key in ("pretraining", "reading")]
    lines = [f"{args.name}: {protocol.line}",
             *(f"  claim {claim}: {CLAIMS[claim]}" for claim in protocol.claims),
             f"{len(runs)} runs of pretraining, {args.seeds} of each, with so many steps: {rows}",
             f"{len(evaluations)} evaluations, {FITS} seeds each, {plan['read']} steps of {BATCH} where they train",
             f"about {minutes(sum(times))}: {minutes(times[0])} pretraining, {minutes(times[1])} reading out; "
             f"{args.jobs} at a time, one thread each"]
    if sum(times) > 1.2 * args.budget:
        lines.append(f"note: runs of {LEAST} and read-outs of {LEAST_READ} steps, the least, need more than --budget "
                     f"{args.budget:g}; fewer --seeds or more --jobs take less")
    if plan.get("short"):
        lines.append(f"note: read-outs of {plan['read']} steps decide little: networks are still learning then; "
                     f"--budget {math.ceil(plan['budget_for_enough'])} gives them {plan['enough']}, in another --out")
    return "\n".join(lines)


# ---- the commands

def train_words(given, run, views, steps):
    words = ["train.py", "--method", run.method, "--data", run.data or given.data, "--seed", str(run.seed),
             "--steps", str(steps), "--size", str(given.size), "--save-every", str(math.ceil(steps / CHECKPOINTS))]
    words += ["--label", given.label] if given.label != "label" and run.data in (None, given.data) else []
    words += ["--views", views] if views and run.method in VIEWED else []
    return words + shlex.split(run.words)


def named(given, asked, plan, views, out):
    """Every Run and Evaluation as a Command."""
    folders = {each.name: out / "runs" / each.name for each in asked if isinstance(each, Run)}
    evaluations = sum(isinstance(each, Evaluation) for each in asked)
    for each in asked:
        if isinstance(each, Run):
            steps, leaves = plan["steps"][each.name], folders[each.name]
            words = train_words(given, each, views, steps)
            words += ["--keep-every", str(given.per_epoch)] if each.kept else []
            words += ["--init", str(folders.get(each.init, each.init))] if each.init else []
            after = (each.init,) if each.init in folders else ()
            yield Command(each.name, [*words, "--out", str(leaves)], leaves, steps, after, plan["seconds"][each.name])
        else:
            leaves = out / "results" / each.name
            words = evaluate_words(given, each, plan, folders)
            yield Command(f"results-{each.name}", [*words, "--out", str(leaves)], leaves,
                          after=tuple(run.name for run in each.runs), seconds=plan["reading"] / evaluations)


def evaluate_words(given, evaluation, plan, folders):
    words = ["evaluate.py"]
    for run in evaluation.runs:
        kept = [epochs * given.per_epoch for epochs in LOOKS if run.kept]
        words += [str(folders[run.name] / f"encoder-{step}.pt") for step in kept if step < plan["steps"][run.name]]
        words.append(str(folders[run.name]))
    words += [*evaluation.files, "--task", *evaluation.tasks, "--seeds", str(FITS), "--steps", str(plan["read"]),
              "--batch", str(BATCH)]
    for key, entries in evaluation.series.items():
        words += [f"--{key}", *map(str, entries)]
    if evaluation.data:                                                     # else all is as the first run has it
        words += ["--data", evaluation.data, "--channels", str(given.channels), "--label", given.label]
    return words + shlex.split(evaluation.words)


if __name__ == "__main__":
    cli.run(main)
