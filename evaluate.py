"""What are features worth? One command, one table, and always rows for the same network with random weights.

    python evaluate.py runs/a                                            the run's own images: kNN, linear probe, ...
    python evaluate.py runs/a runs/b imagenet.pth --labels 1.0 0.1 7n    several encoders, fewer and fewer labels
    python evaluate.py theirs.npz runs/a --task knn linear               beside features of any other program
    python evaluate.py thumbnails statistics runs/a runs/a+statistics    beside features that nothing has learned
    python evaluate.py runs/a --task finetune --freeze 10 --epochs 50    train all of it; train.py --init takes it
    python evaluate.py runs/a/encoder-*.pt --task knn                    one run at several steps of its pretraining
    python evaluate.py runs/a --export encoder.pt --features out.npz     for other programs

Two rows are random. "random" is the network as it is initialised, BatchNorm at 0 and 1: a fixed bank of texture
filters, and no weak opponent. "random, normalised" has BatchNorm's statistics of the training images, as every trained
network has: it is the same network before learning.

Every choice (L2, rate, epoch) is made on the validation split; the test split is scored once. Intervals are 95 %, by
patient. An evaluation that was stopped goes on with what is finished when it is given the same --out.
"""

import copy
import itertools
import os
import re
from pathlib import Path

import numpy as np
from tqdm import tqdm

from medssl.common import cli, encoders, features, files, loop, optim
from medssl.common.errors import UserError
from medssl.common.evaluation import figures, keep, readouts, report, subsets, tasks
from medssl.common.evaluation.study import Cell, file_name, open_study
from medssl.common.evaluation.tasks import TASKS

STRENGTHS = [f"S{i}" for i in range(7)]


def main(argv=None):
    args = parse(argv)
    study = open_study(args, loop.processes(args.device)[2])
    chosen = choose_tasks(args, study)
    study.out = results_folder(args, study) if chosen else None
    for kind in sorted({TASKS[name].target for name in chosen} - {None}):
        study.targets[kind] = subsets.find_target(study.dataset, study.groups, kind, study.note)
        study.targets[kind].per_patient = args.per == "patient"
    for name in chosen:
        tasks.check_answers(study, name)
    cells = [cell for name in chosen for cell in cells_of(args, name)]
    report.say(study, cells)
    if args.export:
        export(study, Path(args.export))
    if args.features:
        save_features(study, Path(args.features))
    if chosen:
        keep.open_folder(study)                                             # fails now rather than after an hour
        records, stopped = fit_all(study, cells)
        if records:
            write_results(study, records, stopped)
        if stopped:
            raise KeyboardInterrupt


def choose_tasks(args, study):
    """--task, or what the set allows; nothing when only an export is asked for."""
    dataset = study.dataset
    able = [name for name, task in TASKS.items() if not task.target or getattr(dataset, task.target) is not None]
    if args.task is None:
        if dataset.labels is None and dataset.masks is None:
            study.note(f"{dataset.name} has neither labels nor masks: only collapse can be looked at")
        return [] if args.export or args.features else [name for name in able if TASKS[name].default]
    for name in args.task:
        if name not in able:
            raise UserError(f"--task {name}: {dataset.name} has no {TASKS[name].target}; it can be looked at with "
                            f"{', '.join(able)}")
    return list(dict.fromkeys(args.task))


def results_folder(args, study):
    """--out, or the first free results/NAME. Finished results are never written over."""
    if args.out and keep.was_stopped(Path(args.out)):
        return Path(args.out)
    stem = f"results/{study.models[-1].name if args.runs else 'random'}-{study.dataset.name}"
    return files.free_folder(args.out, stem, "results.json",
                             "choose another; or remove that file, and with more --seeds its fits are used again")


def cells_of(args, name):
    """The cells of the series for one task: the axes that it has."""
    task = TASKS[name]
    if not task.target:
        return [Cell(name)]
    axes = (args.labels, args.imbalance if task.target == "labels" else [None],
            args.augment if task.trains else [None], args.stage if task.staged else [None])
    return [Cell(name, *each) for each in itertools.product(*axes)]


def fit_all(study, cells):
    """The records, and whether Ctrl-C came before the last. What is finished already is read, not done again."""
    jobs = [(seed, model, cell) for seed in study.seeds for model in study.models for cell in cells
            if tasks.applies(cell, model)]
    for model in study.models:
        out = [cell.task for cell in cells if not (model.random or tasks.applies(cell, model))]
        if out:
            study.note(f"{model.name} is left out of {', '.join(dict.fromkeys(out))}: that is asked of networks alone")
    records, last = [], None
    with tqdm(total=len(jobs), unit="fit", delay=0.5, dynamic_ncols=True) as bar:
        try:
            for seed, model, cell in jobs:
                if last not in (None, (seed, model.name)):
                    study.forget_random()
                last = seed, model.name
                bar.set_postfix_str(f"{model.name}, {cell.task}, seed {seed}", refresh=False)
                records.append(tasks.record_of(study, cell, model, seed))
                bar.update()
        except KeyboardInterrupt:
            tqdm.write(f"stopped: what was done so far is written; the same command with --out {study.out} goes on")
            return records, True
    return records, False


def write_results(study, records, stopped):
    """Everything into the study's folder, results.json last: what is without it can be gone on with. Then the tables on
    the terminal."""
    summaries, differences = report.summarise(study, records)
    report.write_csv(study, records)
    names = figures.draw(study, records, summaries)
    report.write_results_json(study, records, summaries, differences, stopped)
    report.print_results(study, summaries, differences)
    print(f"in {study.out}: results.json, results.csv; fits, the answers to each test image; pictures "
          + ", ".join(names))


# ---- the command line

def parse(argv=None):
    parser = cli.Parser(prog="evaluate.py", description=__doc__.split("\n")[0],
                        epilog="; ".join(f"{name}: {task.words}" for name, task in TASKS.items()))
    add_flags(parser.add_argument)
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--epochs", type=cli.positive_number, default=10,
                        help="an epoch has as many steps with few labels as with all")
    length.add_argument("--steps", type=cli.positive)
    args = parser.parse_args(argv)
    if args.export and len(args.runs) != 1:
        parser.error("--export takes exactly one run or file of weights")
    for flag in ("export", "features"):
        if getattr(args, flag):
            refuse_taken(Path(getattr(args, flag)), f"--{flag}")
    return args


def add_flags(add):
    add("runs", nargs="*", type=cli.filled, help="folders of runs, files of weights (as train.py --init takes "
        "them), .npz files of features, thumbnails, statistics (of grey values), or RUN+statistics; none: the random "
        "encoders alone")
    add("--data", type=cli.filled, help="default: the first run's; 'phantoms' is built in")
    add("--label", type=cli.filled, help="column of split.csv (default: the first run's)")
    add("--size", type=cli.side, help="side of the images (default: the first run's)")
    add("--channels", type=int, choices=(1, 3), help="default: the first run's, else as the images are")
    add("--encoder", choices=encoders.ENCODERS, help="of weights whose keys leave it open, and of random rows alone")
    add("--stem", choices=encoders.STEMS, help="likewise")
    add("--deal", type=cli.whole, metavar="SEED", help="deal the patients anew to train, val and "
        "test, from this seed: for cross-validation (default: as the first run)")
    add("--task", nargs="*", choices=TASKS, help="default: knn linear with labels, segment with masks, collapse always")
    add("--stage", nargs="+", type=int, choices=(1, 2, 3, 4), default=[None],
        help="knn and linear of this stage's pooled map")
    add("--labels", nargs="+", type=amount, default=["1.0"],
        help="shares of the training images (whole patients), or numbers of images such as 7n")
    add("--imbalance", nargs="+", type=one_or_more, default=[None], metavar="RATIO",
        help="so many images of each other class for one of the rare class; the rare class, first cut to (smallest "
        "other class) / (largest RATIO) images, keeps its number along the series")
    add("--resample", action="store_true", help="draw every class equally often (linear: weigh it; knn: no effect)")
    add("--augment", nargs="+", choices=STRENGTHS, default=["S1"], help="strength where the loop trains")
    add("--freeze", type=cli.not_negative, default=0, help="epochs with the encoder frozen before it is trained too")
    add("--batch", type=cli.positive, default=64)
    add("--optimizer", choices=optim.OPTIMIZERS, default="adamw", help="of all that the loop trains")
    add("--lr", nargs="+", type=cli.positive_number, default=[1e-3],
        help="of several, each fit takes the one that is best on validation")
    add("--head-lr", type=cli.positive_number, help="the head's (default: 10 times --lr; a transferred decoder: --lr)")
    add("--weight-decay", type=cli.not_negative, default=0.01)
    add("--loss", choices=readouts.LOSSES, help="balanced: class weights; for masks also dice (default)")
    add("--neighbours", type=cli.positive, default=20, help="of knn; fewer where the smallest class has few images")
    add("--transfer", choices=("encoder", "encoder+decoder"), default="encoder", help="what unet takes from a run")
    add("--per", choices=("image", "patient"), default="image",
        help="patient: class shares are averaged over a patient's test images, and patients are scored")
    add("--seeds", type=cli.positive, default=3, help="of subsets, heads, order and the random encoder")
    add("--all-columns", action="store_true", help="all scores on the terminal, too")
    add("--out", type=cli.filled, metavar="DIR", help="default: results/NAME, numbered")
    add("--export", type=cli.filled, metavar="FILE",
        help="the one encoder, with torchvision's key names; and FILE-rgb for 3 channels")
    add("--features", type=cli.filled, metavar="FILE.npz",
        help="pooled features of all images, with labels, patients and splits")
    add("--device", default="auto")
    add("--amp", choices=("off", "bf16", "fp16"), default="off", help="where the loop trains")
    add("--cache", type=cli.filled, metavar="DIR", help="where decoded images are kept")


def one_or_more(text):
    if not 1 <= cli.not_negative(text):
        raise ValueError
    return float(text)


def amount(text):
    if not (re.fullmatch(r"[1-9]\d*n", text) or 0 < float(text) <= 1):
        raise ValueError
    return text


# ---- for other programs

def refuse_taken(path, flag):
    """What is there already is never written over, be it a file, a link or a device."""
    if os.path.lexists(path):
        raise UserError(f"{flag} {path}: is there already; name a file that is not")
    if not path.absolute().parent.is_dir():
        raise UserError(f"{flag} {path}: there is no folder {path.parent}")


def export(study, path):
    """The encoder as it is, and beside it one whose first layer takes 3 channels (a gray image repeated gives the same
    features)."""
    if study.models[-1].network is None:
        raise UserError(f"--export: {study.models[-1].name} is features, not weights")
    network, rgb = copy.deepcopy(study.models[-1].network).cpu(), path.with_name(f"{path.stem}-rgb{path.suffix}")
    written = [path] + [rgb] * (network.conv1.in_channels == 1)
    for each in written[1:] + [p.with_suffix(".json") for p in written]:
        refuse_taken(each, "--export")
    encoders.save(network, path)
    if rgb in written:
        network.conv1.weight.data = network.conv1.weight.data.repeat(1, 3, 1, 1) / 3    # (O, 3, k, k)
        network.mean, network.std = network.mean * 3, network.std * 3
        encoders.save(network, rgb)
    print(f"exported {' and '.join(map(str, written))}; they want standardised images, (x - mean) / std of the .json; "
          "docs/copying.md opens them in other libraries")


def save_features(study, path):
    """One file for each given model, or the random ones where none is given."""
    dataset, given = study.dataset, [m for m in study.models if not m.random] or study.models
    given = [m for m in given if m.encoder]
    if not given:
        raise UserError(f"--features {path}: none of the models is a network")
    paths = [path] if len(given) == 1 else [path.with_name(f"{path.stem}-{file_name(m.name)}{path.suffix}")
                                            for m in given]
    for each in paths:
        refuse_taken(each, "--features")
    for model, each in zip(given, paths):
        network = model.fresh(study, 0)
        own = features.extract(network, dataset.images, np.arange(len(dataset)), study.device)              # (N, D)
        print(keep.write_features(each, own.numpy(), dataset))


if __name__ == "__main__":
    cli.run(main)
