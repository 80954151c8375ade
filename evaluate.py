"""What are an encoder's features worth? One command, one table, and always a row for the same network with random weights.

    python evaluate.py runs/a                                             the run's own images: kNN, linear probe, linear segmentation, spectrum
    python evaluate.py runs/a runs/b imagenet.pth --labels 1.0 0.1 7n     several encoders, with fewer and fewer labels
    python evaluate.py runs/a --task finetune --freeze 10 --epochs 50     train all of it; leaves an encoder.pt that train.py --init takes
    python evaluate.py runs/a/encoder-*.pt --task knn                     one run at several steps of its pretraining
    python evaluate.py runs/a --export encoder.pt --features out.npz      for other programs

Every choice (L2, epoch) is made on the validation split; the test split is scored once. Intervals are 95 %, by patient.
"""

import copy
import itertools
import os
import re
from dataclasses import fields
from pathlib import Path

import numpy as np
from tqdm import tqdm

from medssl.common import cli, encoders, files, loop
from medssl.common.errors import UserError
from medssl.common.evaluation import figures, readouts, report, subsets, tasks
from medssl.common.evaluation.study import Cell, Settings, Where, file_name, open_study
from medssl.common.evaluation.tasks import TASKS

STRENGTHS = [f"S{i}" for i in range(7)]


def main(argv=None):
    args = parse(argv)
    settings, where = (chosen(kind, args) for kind in (Settings, Where))
    study = open_study(args.runs, where, settings, loop.processes(args.device)[2])
    asked = choose_tasks(args, study)
    study.out = choose_folder(args, study) if asked else None
    for kind in sorted({TASKS[task].target for task in asked} - {None}):
        study.targets[kind] = subsets.find_target(study.dataset, study.groups, kind, study.note)
    cells = [cell for task in asked for cell in cells_of(settings, task)]
    say_what(study, cells)
    if args.export:
        export(study, args.export)
    if args.features:
        save_features(study, args.features)
    if asked:
        study.out.mkdir(parents=True, exist_ok=True)                        # fails now rather than after an hour
        records, stopped = fit_all(study, cells)
        if records:
            tell(study, records)
        if stopped:
            raise KeyboardInterrupt


def chosen(kind, args):
    """The flags that a dataclass of settings has fields for."""
    values = {f.name: getattr(args, f.name) for f in fields(kind)}
    return kind(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})


def fit_all(study, cells):
    """The records, and whether Ctrl-C came before the last."""
    records, seeds = [], range(study.settings.seeds)
    with tqdm(total=len(cells) * len(study.models) * len(seeds), unit="fit", delay=0.5, dynamic_ncols=True) as bar:
        try:
            for seed, model in itertools.product(seeds, study.models):
                for cell in cells:
                    bar.set_postfix_str(f"{model.name}, {cell.task}, seed {seed}", refresh=False)
                    records.append(tasks.run(study, cell, model, seed))
                    bar.update()
                study.forget_random()
        except KeyboardInterrupt:
            tqdm.write("stopped: what was done so far is written")
            return records, True
    return records, False


def tell(study, records):
    """Everything into the study's folder, and the tables on the terminal."""
    summaries, differences = report.summarise(study, records)
    report.write_json(study, records, summaries, differences)
    report.write_csv(study, records)
    pictures = figures.draw(study, records, summaries)
    for task in dict.fromkeys(s.cell.task for s in summaries):
        report.print_table(study, task, summaries, differences)
    report.print_differences(study, differences)
    print(f"in {study.out}: results.json, results.csv; pictures {', '.join(pictures)}")


# ---- the command line

def parse(argv):
    parser = cli.Parser(prog="evaluate.py", description=__doc__.split("\n")[0],
                        epilog="; ".join(f"{name}: {task.words}" for name, task in TASKS.items()))
    add = parser.add_argument
    add("runs", nargs="*", help="folders of runs, or files of weights (ours, torchvision's, timm's); none: the random encoder alone")
    add("--data", help="default: the first run's; 'phantoms' is built in")
    add("--label", help="column of split.csv (default: the first run's)")
    add("--size", type=cli.positive, help="side of the images (default: the first run's)")
    add("--channels", type=int, choices=(1, 3), help="default: the first run's, else as the images are")
    add("--encoder", choices=encoders.ENCODERS, help="of weight files, where their keys leave it open, and of the random row without any run")
    add("--stem", choices=encoders.STEMS, help="likewise")
    add("--task", nargs="*", choices=TASKS, help="default: knn linear with labels, segment with masks, collapse always")
    add("--labels", nargs="+", type=amount, default=["1.0"], help="shares of the training images (whole patients), or numbers of images such as 7n")
    add("--imbalance", nargs="+", type=one_or_more, default=[None],
        help="1: all classes cut to the size of the rarest; 10: and of that one a tenth is kept")
    add("--resample", action="store_true", help="draw every class equally often (linear: weigh it; knn: no effect)")
    add("--augment", nargs="+", choices=STRENGTHS, default=["S1"], help="strength under finetune, segment and unet")
    add("--freeze", type=cli.not_negative, default=0, help="epochs with the encoder frozen before finetune and unet release it")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--epochs", type=cli.positive_number, default=10, help="an epoch has as many steps with few labels as with all")
    length.add_argument("--steps", type=cli.positive)
    add("--batch", type=cli.positive, default=64)
    add("--lr", type=cli.positive_number, default=1e-3, help="AdamW's")
    add("--head-lr", type=cli.positive_number, help="the head's (default: 10 times --lr; --lr for a decoder that was transferred)")
    add("--loss", choices=readouts.LOSSES, help="balanced: class weights; dice (and cross-entropy; default) and jaccard: masks")
    add("--transfer", choices=("encoder", "encoder+decoder"), default="encoder", help="what unet takes from a run that had a decoder")
    add("--seeds", type=cli.positive, default=3, help="of subsets, heads, order and the random encoder")
    add("--out", metavar="DIR", help="default: results/NAME, numbered")
    add("--export", metavar="FILE", help="the one encoder, with torchvision's key names; and FILE-rgb for 3-channel programs")
    add("--features", metavar="FILE.npz", help="pooled features of all images, with labels, patients and splits")
    add("--device", default="auto")
    add("--amp", choices=("off", "bf16", "fp16"), default="off", help="while training heads and encoders")
    add("--cache", metavar="DIR", help="where decoded images are kept")
    args = parser.parse_args(argv)
    if args.export and len(args.runs) != 1:
        parser.error("--export takes exactly one run or file of weights")
    for flag, path in (("--export", args.export), ("--features", args.features)):
        if path and not Path(path).absolute().parent.is_dir():
            parser.error(f"{flag} {path}: there is no folder {Path(path).parent}")
    return args


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
            raise UserError(f"--task {name}: {dataset.name} has no {TASKS[name].target}; it can be looked at with {', '.join(able)}")
    targets = {TASKS[name].target for name in args.task}
    if args.imbalance != [None] and "labels" not in targets:
        raise UserError(f"--imbalance thins a class of the labels; --task {' '.join(args.task)} does not use them")
    if args.loss in ("dice", "jaccard") and "masks" not in targets:
        raise UserError(f"--loss {args.loss} is for masks; --task {' '.join(args.task)} takes ce or balanced")
    return list(dict.fromkeys(args.task))


def cells_of(settings, name):
    """The cells of the series for one task. Frozen features have no augmentation, and masks no rare class to thin."""
    task = TASKS[name]
    if not task.target:
        return [Cell(name, None, None, None)]
    axes = (settings.labels, settings.imbalance if task.target == "labels" else [None], settings.augment if task.trains else [None])
    return [Cell(name, *each) for each in itertools.product(*axes)]


def choose_folder(args, study):
    """--out, or the first free results/NAME. Old results are never written over; the folder is made when there are results."""
    stem = f"results/{study.models[-1].name if args.runs else 'random'}-{study.dataset.name}"
    numbered = (Path(stem if i == 1 else f"{stem}-{i}") for i in range(1, 10_000))
    out = Path(args.out) if args.out else next(p for p in numbered if not p.exists())
    if (out / "results.json").exists():
        raise UserError(f"--out {out}: holds results already; choose another")
    there = next(p for p in (out, *out.absolute().parents) if p.exists())
    if not (there.is_dir() and os.access(there, os.W_OK)):
        raise UserError(f"--out {out}: {there} is not a folder that can be written to")
    return out


# ---- in words

def say_what(study, cells):
    """What is about to be done, task by task, with numbers of images and patients."""
    dataset, settings, told = study.dataset, study.settings, set()
    print(f"{dataset.name}: images {' x '.join(map(str, dataset.images.shape[1:]))}; {len(study.models)} encoders on {study.device}, "
          f"seeds: {settings.seeds}")
    for name in dict.fromkeys(cell.task for cell in cells):
        task = TASKS[name]
        if not task.target:
            print(f"{name}: {task.words}; {len(study.watched())} images")
            continue
        target = study.targets[task.target]
        print(f"{name}: {task.words}{length(settings, name, target)}; " + (f"{task.chosen} chosen on validation: "
              f"{count(study, target.rows['val'])}; " if task.chosen else "nothing is chosen; ")
              + f"scored once on test: {count(study, target.rows['test'])}")
        for cell in (cell for cell in cells if cell.task == name):
            if (task.target, cell[1:3]) not in told:
                told.add((task.target, cell[1:3]))
                say_training(study, target, cell._replace(augment=None), task.target == "labels")


def length(settings, name, target):
    if not TASKS[name].trains:
        return ""
    per_epoch, steps, frozen = tasks.schedule(settings, name, target)
    first = f", in the first {frozen} the encoder is frozen" * (0 < frozen < steps)
    return f" for {steps} steps of {settings.batch} ({steps / per_epoch:.3g} epochs){first}"


def say_training(study, target, cell, labels):
    """The images that a cell learns from, and which classes are not among them."""
    seeds = range(study.settings.seeds)
    each = [target.training(study.groups, cell.labels, cell.imbalance, seed) for seed in seeds]
    print(f"    {report.describe(cell)}: training on {count(study, each[0])}" + (" (first seed)" if len(seeds) > 1 else ""))
    lost = [c for i, c in enumerate(target.classes) if labels and any(i not in target.values[rows] for rows in each)]
    if lost:
        study.note(f"{report.describe(cell)}: in some seeds no training image of {', '.join(lost[:4])}"
                   f"{f' and {len(lost) - 4} more classes' if len(lost) > 4 else ''}; scored with what is there")


def count(study, rows):
    patients = len(np.unique(study.groups[rows]))
    return f"{len(rows)} images of {patients} patients" if study.dataset.groups is not None else f"{len(rows)} images"


# ---- for other programs

def export(study, path):
    """The encoder as it is, and beside it one whose first layer takes 3 channels (a gray image repeated gives the same features)."""
    network, path = copy.deepcopy(study.models[-1].network).cpu(), Path(path)
    encoders.save(network, path)
    written = [str(path)]
    if network.conv1.in_channels == 1:
        network.conv1.weight.data = network.conv1.weight.data.repeat(1, 3, 1, 1) / 3                        # (O, 3, k, k)
        network.mean, network.std = network.mean * 3, network.std * 3
        written.append(str(path.with_name(f"{path.stem}-rgb{path.suffix}")))
        encoders.save(network, written[-1])
    print(f"exported {' and '.join(written)}: torchvision's key names (conv1.weight, bn1.*, layer1.0.conv1.weight, ..., no fc), also timm's and those of "
          "segmentation libraries; load_state_dict(..., strict=False) into a network with an fc; the .json has the mean and deviation to standardise with")


def save_features(study, path):
    dataset, arrays = study.dataset, {}
    for model in study.models:
        arrays[f"features_{file_name(model.name)}"] = study.features(model, 0, everything=True)[0].numpy()
    study.kept.clear()                                                      # the tasks ask for fewer rows
    arrays |= {"patients": study.groups, "splits": dataset.splits}
    arrays |= {"labels": dataset.labels, "classes": np.array(dataset.classes)} if dataset.labels is not None else {}
    with files.whole(path) as temporary, open(temporary, "wb") as file:
        np.savez_compressed(file, **arrays)
    print(f"{path}: {', '.join(f'{key} {value.shape}' for key, value in arrays.items())}")


if __name__ == "__main__":
    cli.run(main)
