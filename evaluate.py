"""What are features worth? One command, one table, and always rows for the same network with random weights.

    python evaluate.py runs/a                                            the run's own images: kNN, linear probe, ...
    python evaluate.py runs/a runs/b imagenet.pth --labels 1.0 0.1 7n    several encoders, fewer and fewer labels
    python evaluate.py theirs.npz runs/a --task knn linear               beside features of any other program
    python evaluate.py thumbnails runs/a --task knn linear               beside the images themselves, 8 pixels wide
    python evaluate.py runs/a --task finetune --freeze 10 --epochs 50    train all of it; train.py --init takes it
    python evaluate.py runs/a/encoder-*.pt --task knn                    one run at several steps of its pretraining
    python evaluate.py runs/a --export encoder.pt --features out.npz     for other programs

Two rows are random. "random" is the network as it is initialised, BatchNorm at 0 and 1: a fixed bank of texture
filters, and no weak opponent. "random, normalised" has BatchNorm's statistics of the training images, as every trained
network has: it is the same network before learning.

Every choice (L2, epoch) is made on the validation split; the test split is scored once. Intervals are 95 %, by patient.
An evaluation that was stopped goes on with what is finished when it is given the same --out.
"""

import copy
import re
from dataclasses import fields
from pathlib import Path

import numpy as np
from tqdm import tqdm

from medssl.common import cli, encoders, features, files, loop, optim
from medssl.common.errors import UserError
from medssl.common.evaluation import figures, foreign, keep, plan, readouts, report, scores, subsets, tasks
from medssl.common.evaluation.study import Settings, Where, file_name, open_study
from medssl.common.evaluation.tasks import TASKS

SEEDS = 1000                                                                # at most
STRENGTHS = [f"S{i}" for i in range(7)]


def main(argv=None):
    args = parse(argv)
    settings, where = (chosen(kind, args) for kind in (Settings, Where))
    study = open_study(args.runs, where, settings, loop.processes(args.device)[2])
    asked = choose_tasks(args, study)
    study.out = choose_folder(args, study) if asked else None
    find_targets(study, asked)
    cells = [cell for task in asked for cell in plan.cells_of(settings, task)]
    plan.say(study, cells)
    if args.export:
        export(study, args.export)
    if args.features:
        save_features(study, Path(args.features))
    if asked:
        keep.open_folder(study)                                             # fails now rather than after an hour
        records, stopped = fit_all(study, cells)
        if records:
            tell(study, records, stopped)
        if stopped:
            raise KeyboardInterrupt


def chosen(kind, args):
    """The flags that a dataclass of settings has fields for."""
    values = {f.name: getattr(args, f.name) for f in fields(kind)}
    return kind(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})


def find_targets(study, asked):
    """The labels and masks that the tasks want, and with --per patient each test patient's label."""
    for kind in sorted({TASKS[task].target for task in asked} - {None}):
        study.targets[kind] = subsets.find_target(study.dataset, study.groups, kind, study.note)
    if study.settings.per == "patient" and "labels" in study.targets:
        target = study.targets["labels"]
        test = target.rows["test"]
        study.patients = scores.by_patient(target.values[test], study.groups[test], target.classes,
                                           study.settings.patient_label)


def fit_all(study, cells):
    """The records, and whether Ctrl-C came before the last. What is finished already is read, not done again."""
    jobs = [(seed, model, cell) for seed in range(study.settings.seeds) for model in study.models for cell in cells
            if tasks.applies(cell, model)]
    for model in study.models:
        out = [cell.task for cell in cells if model.features is not None and not tasks.applies(cell, model)]
        if out:
            names = ", ".join(dict.fromkeys(out))
            study.note(f"{model.name} holds features: {names} would need the network, and is left out")
    records, last = [], None
    with tqdm(total=len(jobs), unit="fit", delay=0.5, dynamic_ncols=True) as bar:
        try:
            for seed, model, cell in jobs:
                if last not in (None, (seed, model.name)):
                    study.forget_random()
                last, path = (seed, model.name), keep.path_of(study, cell, model, seed)
                bar.set_postfix_str(f"{model.name}, {cell.task}, seed {seed}", refresh=False)
                if path.is_file():
                    record = keep.load(path)
                else:
                    record = tasks.run(study, cell, model, seed)
                    keep.save(record, path)
                records.append(tasks.score(record, study))
                bar.update()
        except KeyboardInterrupt:
            tqdm.write(f"stopped: what was done so far is written; the same command with --out {study.out} goes on")
            return records, True
    return records, False


def tell(study, records, stopped):
    """Everything into the study's folder, and the tables on the terminal."""
    summaries, differences = report.summarise(study, records)
    report.write_json(study, records, summaries, differences, stopped)
    report.write_csv(study, records)
    pictures = figures.draw(study, records, summaries)
    for task in dict.fromkeys(s.cell.task for s in summaries):
        report.print_table(study, task, summaries, differences)
    report.print_differences(study, differences)
    print(f"in {study.out}: results.json, results.csv; fits, the answers to each test image; pictures "
          + ", ".join(pictures))


# ---- the command line

def parse(argv):
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
    if args.patient_label and args.per != "patient":
        parser.error("--patient-label goes with --per patient")
    for flag, path in (("--export", args.export), ("--features", args.features)):
        if path and not Path(path).absolute().parent.is_dir():
            parser.error(f"{flag} {path}: there is no folder {Path(path).parent}")
        if path and Path(path).is_dir():
            parser.error(f"{flag} {path}: is a folder; name a file in it")
    if args.seeds > SEEDS:
        parser.error(f"--seeds {args.seeds}: at most {SEEDS}")
    return args


def add_flags(add):
    add("runs", nargs="*", type=cli.filled, help="folders of runs, files of weights (as train.py --init takes "
        "them), .npz files of features, thumbnails; none: the random encoders alone")
    add("--data", type=cli.filled, help="default: the first run's; 'phantoms' is built in")
    add("--label", type=cli.filled, help="column of split.csv (default: the first run's)")
    add("--size", type=cli.side, help="side of the images (default: the first run's)")
    add("--channels", type=int, choices=(1, 3), help="default: the first run's, else as the images are")
    add("--encoder", choices=encoders.ENCODERS, help="of weights whose keys leave it open, and of random rows alone")
    add("--stem", choices=encoders.STEMS, help="likewise")
    add("--statistics", choices=("kept", "data"), default="kept",
        help="BatchNorm's statistics of the encoders: as they came, or of the training images")
    add("--task", nargs="*", choices=TASKS, help="default: knn linear with labels, segment with masks, collapse always")
    add("--stage", nargs="+", type=int, choices=(1, 2, 3, 4), default=[None],
        help="knn and linear of this stage's pooled map")
    add("--labels", nargs="+", type=amount, default=["1.0"],
        help="shares of the training images (whole patients), or numbers of images such as 7n")
    add("--imbalance", nargs="+", type=one_or_more, default=[None],
        help="so many images of each other class for one of the rare class")
    add("--imbalance-varies", choices=("others", "rare"), default="others",
        help="others: the rare class keeps its number of images along the series; rare: all classes are cut to the "
        "size of the rarest, and of that one 1/RATIO is kept")
    add("--resample", action="store_true", help="draw every class equally often (linear: weigh it; knn: no effect)")
    add("--augment", nargs="+", choices=STRENGTHS, default=["S1"], help="strength where the loop trains")
    add("--freeze", type=cli.not_negative, default=0, help="epochs with the encoder frozen before it is trained too")
    add("--batch", type=cli.positive, default=64)
    add("--optimizer", choices=optim.OPTIMIZERS, default="adamw", help="of all that the loop trains")
    add("--lr", type=cli.positive_number, default=1e-3)
    add("--head-lr", type=cli.positive_number, help="the head's (default: 10 times --lr; a transferred decoder: --lr)")
    add("--weight-decay", type=cli.not_negative, default=0.01)
    add("--loss", choices=readouts.LOSSES, help="balanced: class weights; for masks also jaccard and dice (default)")
    add("--neighbours", type=cli.positive, default=20, help="of knn; fewer where the smallest class has few images")
    add("--transfer", choices=("encoder", "encoder+decoder"), default="encoder", help="what unet takes from a run")
    add("--per", choices=("image", "patient"), default="image",
        help="patient: class shares are averaged over a patient's images too, and scored by patient beside by image")
    add("--patient-label", choices=("max",), help="of a patient with several classes: the last one, as of grades")
    add("--seeds", type=cli.positive, default=3, help="of subsets, heads, order and the random encoder")
    add("--out", type=cli.filled, metavar="DIR", help="default: results/NAME, numbered")
    add("--export", type=cli.filled, metavar="FILE",
        help="the one encoder, with torchvision's key names; and FILE-rgb for 3 channels")
    add("--features", type=cli.filled, metavar="FILE.npz",
        help="pooled features of all images, with labels, patients and splits")
    add("--device", type=cli.device, default="auto")
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


def choose_tasks(args, study):
    """--task, or what the set allows; nothing when only an export is asked for."""
    dataset = study.dataset
    able = [name for name, task in TASKS.items() if not task.target or getattr(dataset, task.target) is not None]
    if args.task is None:
        if dataset.labels is None and dataset.masks is None:
            study.note(f"{dataset.name} has neither labels nor masks: only collapse can be looked at")
        wanted = ("knn", "linear", "segment", "collapse")
        return [] if args.export or args.features else [name for name in wanted if name in able]
    for name in args.task:
        if name not in able:
            raise UserError(f"--task {name}: {dataset.name} has no {TASKS[name].target}; it can be looked at with "
                            f"{', '.join(able)}")
    check_flags(args, {TASKS[name].target for name in args.task}, [TASKS[name].staged for name in args.task])
    return list(dict.fromkeys(args.task))


def check_flags(args, targets, staged):
    """Flags that none of the tasks would heed."""
    tasks_given = f"--task {' '.join(args.task)}"
    if args.imbalance != [None] and "labels" not in targets:
        raise UserError(f"--imbalance thins a class of the labels; {tasks_given} does not use them")
    if args.loss in ("dice", "jaccard") and "masks" not in targets:
        raise UserError(f"--loss {args.loss} is for masks; {tasks_given} takes ce or balanced")
    if args.per == "patient" and "labels" not in targets:
        raise UserError(f"--per patient is for labels; {tasks_given} does not use them (masks are scored by patient "
                        "anyway)")
    if args.stage != [None] and not any(staged):
        raise UserError(f"--stage is for knn and linear; {tasks_given} does not heed it")


def choose_folder(args, study):
    """--out, or the first free results/NAME. Finished results are never written over."""
    if args.out and keep.was_stopped(Path(args.out)):
        return Path(args.out)
    stem = f"results/{study.models[-1].name if args.runs else 'random'}-{study.dataset.name}"
    return files.free_folder(args.out, stem, "results.json",
                             "choose another; or remove that file, and with more --seeds its fits are used again")


# ---- for other programs

def export(study, path):
    """The encoder as it is, and beside it one whose first layer takes 3 channels (a gray image repeated gives the same
    features)."""
    if study.models[-1].network is None:
        raise UserError(f"--export: {study.models[-1].file} holds features, not weights")
    network, path = copy.deepcopy(study.models[-1].network).cpu(), Path(path)
    encoders.save(network, path)
    written = [str(path)]
    if network.conv1.in_channels == 1:
        network.conv1.weight.data = network.conv1.weight.data.repeat(1, 3, 1, 1) / 3    # (O, 3, k, k)
        network.mean, network.std = network.mean * 3, network.std * 3
        written.append(str(path.with_name(f"{path.stem}-rgb{path.suffix}")))
        encoders.save(network, written[-1])
    print(f"exported {' and '.join(written)}; they want standardised images, (x - mean) / std of the .json, and are "
          "opened by torchvision, timm and monai as docs/copying.md says")
    kind = f"{network.name!r}, {network.conv1.weight.shape[1]}, {network.stem!r}"
    print(f"  here: net = medssl.common.encoders.build({kind}); net.load_state_dict(torch.load({written[-1]!r}))")


def save_features(study, path):
    """One file for each given model, or the random ones where none is given."""
    dataset, given = study.dataset, [m for m in study.models if not m.random] or study.models
    given = [m for m in given if m.features is None]
    if not given:
        raise UserError(f"--features {path}: none of the models is a network")
    for model in given:
        network = model.fresh(study, 0)
        found = features.extract(network, dataset.images, np.arange(len(dataset)), study.device).numpy()    # (N, D)
        own = path if len(given) == 1 else path.with_name(f"{path.stem}-{file_name(model.name)}{path.suffix}")
        print(foreign.write(own, found, dataset))


if __name__ == "__main__":
    cli.run(main)
