"""`check`: what would stop training, before you pay for it.

`python3 model_def.py check` in a detector's folder starts the config's training, up to its first batch.
`python3 -m shared check` checks the data alone, for any detector.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import logging
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from shared.config.experiment import Experiment, Sections, read_experiment
from shared.errors import UserError, unwritable_as_error

if TYPE_CHECKING:  # they load torch or take a while
    from torch.utils.data import Dataset

    from shared.commands.data_report import Drawn, Report
    from shared.data.open import SplitData
    from shared.training.trial import DetectionTrial

_SAMPLE = 200  # images to read of each split, by default
_PAGES = (".png", ".pdf")


def add_check_options(parser: argparse.ArgumentParser) -> None:
    """The options of `check` besides the config and --set."""
    parser.add_argument("--images", default=str(_SAMPLE), help=f"images to read per split, or `all`; default {_SAMPLE}")
    parser.add_argument(
        "--page", type=Path, metavar="PNG", help="draw images with their labels there, also augmented ones"
    )


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """`python3 -m shared check`."""
    parser = argparse.ArgumentParser(
        prog="python3 -m shared check",
        description="What would stop training in the data of an experiment config. `python3 model_def.py check` in "
        "the detector's folder also checks the detector.",
    )
    parser.add_argument("config", type=Path, help="the experiment config, such as const.yaml")
    parser.add_argument("--set", dest="overrides", metavar="KEY=VALUE", action="append", default=[])
    add_check_options(parser)
    given = parser.parse_args(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    from shared.commands.data_report import Report, describe, open_both

    images, page = _parsed(given)
    hint = "`python3 model_def.py check` in the detector's folder"
    try:
        data = read_experiment(given.config, given.overrides, Sections(), with_hyperparameters=False).data
    except UserError as error:
        if "data: unknown key" not in str(error):
            raise
        raise UserError(f"{error}. If it is a detector's own key, use {hint}") from error
    if data.reads_files and data.train is None and data.val is None:
        raise UserError(
            f"{given.config} has neither data.train nor data.val. Fix: {hint} checks the data that the detector's "
            "own config names"
        )
    report = Report()
    with _quiet():
        opened = open_both(data, report)
    describe(opened, None, images, data.on_bad_image == "skip", report)
    print(f"the data alone; {hint} also checks the detector\n")
    _finish(report, opened, [], page)


def check_with_detector(
    trial_class: type[DetectionTrial], experiment: Experiment, arguments: argparse.Namespace
) -> NoReturn:
    """Prints what is in the data and what would stop the detector's training. Exits with 1 if something would."""
    images, page = _parsed(arguments)
    _finish(*_begin_training(trial_class, experiment, images, draws=page is not None), page)


def _begin_training(
    trial_class: type[DetectionTrial], experiment: Experiment, images: int | None, draws: bool
) -> tuple[Report, dict[str, SplitData], list[Drawn]]:
    """Builds the trial as `train` does, and makes samples of some of its images.

    Args:
        images: how many to read of each split; None for all.
        draws: also make augmented images to draw.
    """
    from shared.commands.data_report import Report, augmented_samples, describe, open_named
    from shared.data.open import SplitData
    from shared.training.meeting import local_processes
    from shared.training.processes import trial_context

    experiment = dataclasses.replace(experiment, data=dataclasses.replace(experiment.data, check_images=True))
    report, opened, augmented, trial, is_built = Report(), {}, [], None, False
    with _quiet(), contextlib.ExitStack() as stack:
        try:
            context = stack.enter_context(trial_context(experiment.config, *stack.enter_context(local_processes())))
            trial = trial_class(context, experiment, begin=False)
            try:
                trial.open_data()
            except UserError:
                if trial.evaluates_coco:  # continue, to find errors in the other split too
                    opened = open_named(trial.data, report)
                raise
            both = {"train": trial.train_data, "val": trial.val_data}
            opened = {split: data for split, data in both.items() if isinstance(data, SplitData)}
            trial.build()
            is_built = True
        except Exception as error:  # a detector's library fails in as many ways as configs are wrong
            report.stop(error)
        if not (opened or is_built):  # the config may name data in the library's own format
            with contextlib.suppress(UserError):
                opened = open_named(experiment.data, Report())
        scale = None
        with contextlib.suppress(Exception):  # the report has what is wrong with the config
            scale = trial_class.input_scale(experiment.hyperparameters)
        describe(opened, scale, images, experiment.data.on_bad_image == "skip", report)
        if is_built:
            _make_samples(trial, images, opened, report)
            if draws and not report.stops:
                augmented = augmented_samples(trial.training_dataset())
        elif opened:
            report.remarks.append("the training stops before its first sample, so none was made. Fix that, then check")
    return report, opened, augmented


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the lines of a run's start, and without the warnings that the report repeats."""
    levels = {None: logging.WARNING, "shared.data.open": logging.ERROR, "shared.training.detector": logging.ERROR}
    before = {name: logging.getLogger(name).level for name in levels}
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)
    try:
        yield
    finally:
        for name, level in before.items():
            logging.getLogger(name).setLevel(level)


def _make_samples(trial: DetectionTrial, images: int | None, opened: dict[str, SplitData], report: Report) -> None:
    """Makes the model's samples of some images; adds the samples that cannot be made to the report."""
    from torch.utils.data import DataLoader

    from shared.commands.data_report import spread
    from shared.data.dataset import SampleKey

    row: list[Any] = ["samples made of them"]
    for split in ("train", "val"):
        try:
            if split == "train":
                dataset = trial.training_dataset()
                keys = [SampleKey(0, index) for index in spread(len(dataset), images)]
            else:
                dataset = trial.evaluation_dataset(trial.val_data)
                evaluated = trial.evaluated_images(len(dataset))
                keys = [evaluated[index] for index in spread(len(evaluated), images)]
        except Exception as error:  # a pipeline that cannot be built
            report.stop(error)
            row.append(None)
            continue
        workers = min(trial.data.workers, len(os.sched_getaffinity(0)))
        errors = _SampleErrors(dataset, ignores_bad_images=split in opened)
        failed = list(filter(None, DataLoader(errors, batch_size=None, sampler=keys, num_workers=workers)))
        row.append(len(keys) - len(failed))
        if failed:
            first = f"{len(failed)} of {len(keys)} samples cannot be made, the first: {failed[0]}"
            report.stop(UserError(f"data.{split}: {first}"))
    report.rows.append(row)


class _SampleErrors:
    """A data set of what is wrong with each sample; "" if nothing is."""

    def __init__(self, dataset: Dataset, ignores_bad_images: bool):
        self.dataset, self.ignores_bad_images = dataset, ignores_bad_images

    def __getitem__(self, key: Any) -> str:
        from shared.data.images import BadImageError

        try:
            self.dataset[key]
        except BadImageError as error:
            return "" if self.ignores_bad_images else str(error)
        except UserError as error:
            return str(error)
        except Exception as error:  # whatever a library's own data set raises
            return f"{type(error).__name__}: {error}"
        return ""


def _parsed(arguments: argparse.Namespace) -> tuple[int | None, Path | None]:
    """The number of images to read, None for all, and the page. Checked first, as reading may take minutes."""
    images, page = arguments.images, arguments.page
    if images != "all" and not images.isdecimal():
        raise UserError(f"--images: {images!r} is unknown. Fix: give a number or `all`")
    if page is not None:
        if page.suffix.lower() not in _PAGES:
            raise UserError(f"--page: {page} is not a picture. Fix: give a name that ends with {' or '.join(_PAGES)}")
        if not page.absolute().parent.is_dir():
            raise UserError(f"--page: {page.absolute().parent} is not a folder. Fix: create it")
        if page.is_dir():
            raise UserError(f"--page: {page} is a folder. Fix: name a file")
    return None if images == "all" else int(images), page


def _finish(report: Report, opened: dict[str, SplitData], augmented: list[Drawn], page: Path | None) -> NoReturn:
    print(report)
    if page is not None and not opened:
        print("\nno page: the data could not be opened, or a detector's library opened it")
    elif page is not None:
        _save_page(opened, augmented, page)
        after = ", then augmented training images" if augmented else ""
        print(f"\nlabels of {' and '.join(f'data.{split}' for split in opened)}{after}: {page}")
    sys.exit(1 if report.stops else 0)


def _save_page(opened: dict[str, SplitData], augmented: list[Drawn], page: Path) -> None:
    from shared.commands.data_report import save_page
    from shared.data.storage import DiskImages

    folders = [of.images.folder.resolve() for of in opened.values() if isinstance(of.images, DiskImages)]
    if page.exists() and any(page.resolve().is_relative_to(folder) for folder in folders):
        raise UserError(f"--page: {page} is a file among the images and would be replaced. Fix: give another name")
    with unwritable_as_error(f"--page: {page}", "give another path"):
        save_page(opened, page, augmented)
