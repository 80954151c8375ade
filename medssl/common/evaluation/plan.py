"""What is about to be done: the cells of the series, and the same in words before anything is fitted."""

import itertools

import numpy as np

from . import report, tasks
from .study import Cell, by
from .tasks import TASKS


def cells_of(settings, name):
    """The cells of the series for one task: the axes that it has."""
    task = TASKS[name]
    if not task.target:
        return [Cell(name)]
    axes = (settings.labels, settings.imbalance if task.target == "labels" else [None],
            settings.augment if task.trains else [None], settings.stage if task.staged else [None])
    return [Cell(name, *each) for each in itertools.product(*axes)]


def say(study, cells):
    """What is about to be done, task by task, with numbers of images and patients."""
    dataset, settings, told = study.dataset, study.settings, set()
    print(f"{dataset.name}: images {by(dataset.images.shape[1:])}; {len(study.models)} models on {study.device}, "
          f"seeds: {settings.seeds}")
    for name in dict.fromkeys(cell.task for cell in cells):
        task = TASKS[name]
        words = f"{name}: {'encoder frozen, in evaluation mode; ' * task.frozen}{task.words}"
        if not task.target:
            print(f"{words}; {len(study.watched())} images")
            continue
        target = study.targets[task.target]
        val, test = (count(study, target.rows[split]) for split in ("val", "test"))
        choice = f"{task.chosen} chosen on validation: {val}" if task.chosen else "nothing is chosen"
        print(f"{words}{length(settings, name, target)}; {choice}; scored once on test: {test}")
        for cell in (cell._replace(augment=None, stage=None) for cell in cells if cell.task == name):
            if (task.target, cell[1:]) not in told:
                told.add((task.target, cell[1:]))
                say_training(study, target, cell, task.target == "labels")


def length(settings, name, target):
    if not TASKS[name].trains:
        return ""
    per_epoch, steps, frozen = tasks.schedule(settings, name, target)
    first = f", in the first {frozen} the encoder is frozen" * (0 < frozen < steps)
    return f" for {steps} steps of {settings.batch} ({steps / per_epoch:.3g} epochs){first}"


def say_training(study, target, cell, labels):
    """The images that a cell learns from, and which classes are not among them."""
    seeds = range(study.settings.seeds)
    each = [tasks.training_rows(study, cell, seed) for seed in seeds]
    first = " (first seed)" if len(seeds) > 1 else ""
    print(f"    {report.describe(cell)}: training on {count(study, each[0])}{first}")
    lost = [c for i, c in enumerate(target.classes) if labels and any(i not in target.values[rows] for rows in each)]
    if lost:
        more = f" and {len(lost) - 4} more classes" if len(lost) > 4 else ""
        study.note(f"{report.describe(cell)}: in some seeds no training image of {', '.join(lost[:4])}{more}; scored "
                   "with what is there")


def count(study, rows):
    patients = len(np.unique(study.groups[rows]))
    return f"{len(rows)} images of {patients} patients" if study.dataset.groups is not None else f"{len(rows)} images"
