"""`check CONFIG`: what would stop a training, before it is paid for.

`python3 model_def.py check` in a detector's folder begins the training that the config says, up to its first batch;
`python3 -m shared check` looks at the data alone, whatever the detector.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from shared.errors import UserError

if TYPE_CHECKING:
    from shared.commands.data_report import Report
    from shared.config.schema import DataConfig
    from shared.data.open import SplitData
    from shared.training.trial import DetectionTrial


_SAMPLE = 200  # images of each split that are read where nothing else is said
_PAGES = (".png", ".pdf")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `check` beside the config and --set."""
    parser.add_argument(
        "--images", default=str(_SAMPLE), help=f"how many of each split are read, or `all`; default {_SAMPLE}"
    )
    parser.add_argument(
        "--page", type=Path, metavar="PNG", help="draw a page of images of both splits with their labels"
    )


def check_with(trial_class: type[DetectionTrial], arguments: argparse.Namespace) -> NoReturn:
    """Prints what is in the data, and what would stop a training by the detector; ends with status 1 where one would.

    Args:
        arguments: `config`, `overrides`, and those of `add_arguments`.
    """
    from shared.config.file import fixed_hyperparameters, load_config, make_paths_absolute

    images = _image_count(arguments.images)
    _refuse_page(arguments.page)
    config = load_config(str(arguments.config), arguments.overrides)
    config["hyperparameters"] = fixed_hyperparameters(config)
    make_paths_absolute(config, trial_class.path_hyperparameters)
    report, opened = check_training(trial_class, config, images)
    _end(report, opened, arguments.page)


def check_training(
    trial_class: type[DetectionTrial], config: dict[str, Any], images: int | None
) -> tuple[Report, dict[str, SplitData]]:
    """Begins a training, and makes samples of some of its images.

    Args:
        config: its hyperparameters fixed, its paths absolute.
        images: how many of each split are read; all where None.
    """
    from shared.commands.data_report import SPLITS, Report, describe, open_named
    from shared.config.experiment import parse_data
    from shared.data.open import SplitData

    report, opened = Report(), {}

    class Checked(trial_class):
        def open_train_and_val(self) -> tuple[Any, Any]:
            try:
                both = super().open_train_and_val()
            except UserError:
                if getattr(self, "evaluates_coco", True):  # what is wrong with either of them
                    opened.update(open_named(self.data, report))
                raise
            opened.update((split, of) for split, of in zip(SPLITS, both, strict=True) if isinstance(of, SplitData))
            return both

    section = config["data"] = {**(config.get("data") or {}), "check_images": True}
    with _begun(Checked, config) as (trial, error):
        if error is not None:
            report.stop(error)
            if not opened:  # the config has ended it before: what the data section names may be another library's
                with contextlib.suppress(UserError):
                    opened.update(open_named(parse_data(config, trial_class.data_class), Report()))
        scale = None
        with contextlib.suppress(Exception):  # what is wrong with the config, the trial has said
            scale = trial_class.input_scale(config)
        describe(opened, scale, images, section.get("on_bad_image") == "skip", report)
        if trial is not None:
            _make_samples(trial, images, opened, report)
        elif opened:
            report.remarks.append("the training stops before its first sample, and none was made; check again then")
    return report, opened


@contextlib.contextmanager
def _begun(trial_class: type[DetectionTrial], config: dict[str, Any]) -> Iterator[tuple[Any, Exception | None]]:
    """The trial as a training has it before its first batch, or what ended that."""
    from shared.config.experiment import per_slot_batch_size
    from shared.training.context import trial_context
    from shared.training.processes import local_processes

    with _quiet(), contextlib.ExitStack() as stack:
        try:
            distributed, device = stack.enter_context(local_processes())
            if (batch_size := config["hyperparameters"].get("global_batch_size")) is not None:
                per_slot_batch_size(batch_size, distributed.size)
            trial = trial_class(stack.enter_context(trial_context(config, distributed, device)))
        except Exception as error:  # a detector's library fails in as many ways as configs are wrong
            yield None, error
        else:
            yield trial, None


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the lines of a training's start, and what these two warn of, which the report has."""
    warned = ("shared.data.open", "shared.training.detector")
    levels = {None: logging.WARNING, **dict.fromkeys(warned, logging.ERROR)}
    before = {name: logging.getLogger(name).level for name in levels}
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)
    try:
        yield
    finally:
        for name, level in before.items():
            logging.getLogger(name).setLevel(level)


def _make_samples(trial: Any, images: int | None, opened: dict[str, SplitData], report: Report) -> None:
    """Makes what the model would be given of some images; adds what cannot be made to the report."""
    from torch.utils.data import DataLoader

    from shared.commands.data_report import SPLITS, spread
    from shared.data.dataset import SampleKey

    datasets = {"train": trial.training_dataset, "val": lambda: trial.evaluation_dataset(trial.val_data)}
    row: list[Any] = ["samples made of them"]
    for split in SPLITS:
        try:
            dataset = datasets[split]()
        except Exception as error:  # a pipeline that cannot be built
            report.stop(error)
            row.append(None)
            continue
        if split == "train":
            keys: list[Any] = [SampleKey(0, index) for index in spread(len(dataset), images)]
        else:
            evaluated = trial.evaluated_images(len(dataset))
            keys = [evaluated[i] for i in spread(len(evaluated), images)]
        tried = _Tried(dataset, bad_images_are_known=split in opened)
        workers = min(trial.data.workers, len(os.sched_getaffinity(0)))
        failed = list(filter(None, DataLoader(tried, batch_size=None, sampler=keys, num_workers=workers)))
        row.append(len(keys) - len(failed))
        if failed:
            first = f"{len(failed)} of {len(keys)} samples cannot be made, the first: {failed[0]}"
            report.stop(UserError(f"data.{split}: {first}"))
    report.rows.append(row)


class _Tried:
    """A data set that gives what is wrong with a sample, "" where nothing is."""

    def __init__(self, dataset: Any, bad_images_are_known: bool):
        self.dataset, self.bad_images_are_known = dataset, bad_images_are_known

    def __getitem__(self, key: Any) -> str:
        from shared.data.images import BadImageError

        try:
            self.dataset[key]
        except BadImageError as error:
            return "" if self.bad_images_are_known else str(error)
        except UserError as error:
            return str(error)
        except Exception as error:  # whatever a library's own data set raises
            return f"{type(error).__name__}: {error}"
        return ""


def _image_count(given: str) -> int | None:
    if given != "all" and not given.isdecimal():
        raise UserError(f"--images: {given!r} is neither a number nor `all`")
    return None if given == "all" else int(given)


def _refuse_page(path: Path | None) -> None:
    """Before the check, which may take minutes."""
    if path is None:
        return
    if path.suffix.lower() not in _PAGES:
        raise UserError(f"--page: {path} is no picture; let its name end with {' or '.join(_PAGES)}")
    if not path.absolute().parent.is_dir():
        raise UserError(f"--page: {path.absolute().parent} is not a folder")
    if path.is_dir():
        raise UserError(f"--page: {path} is a folder; name a file")


def _refuse_page_over_image(page: Path, opened: dict[str, SplitData]) -> None:
    from shared.data.storage import DiskImages

    folders = [of.images.folder.resolve() for of in opened.values() if isinstance(of.images, DiskImages)]
    if page.exists() and any(page.resolve().is_relative_to(folder) for folder in folders):
        raise UserError(f"--page: {page} is a file among the images and would be replaced. Fix: give another name")


def _end(report: Report, opened: dict[str, SplitData], page: Path | None) -> NoReturn:
    print(report)
    if page is not None and not opened:
        print("\nno page: the data could not be opened, or a detector's library has opened it")
    elif page is not None:
        from shared.commands.data_report import save_page

        _refuse_page_over_image(page, opened)
        try:
            save_page(opened, page)
        except OSError as error:
            raise UserError(f"--page: {page} cannot be written: {error.strerror or error}") from error
        print(f"\nlabels of {' and '.join(f'data.{split}' for split in opened)}: {page}")
    sys.exit(1 if report.stops else 0)


def main(arguments: Sequence[str] | None = None) -> None:
    """`python3 -m shared check`."""
    from shared.commands.data_report import Report, describe, open_both
    from shared.config.file import load_config

    parser = argparse.ArgumentParser(
        prog="python3 -m shared check",
        description="What a training would meet in the data of an experiment config. `python3 model_def.py check` in "
        "the detector's folder also checks the detector.",
    )
    parser.add_argument("config", type=Path, help="the experiment config, const.yaml for example")
    parser.add_argument("--set", dest="overrides", metavar="KEY=VALUE", action="append", default=[])
    add_arguments(parser)
    given = parser.parse_args(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    try:
        images = _image_count(given.images)
        _refuse_page(given.page)
        data = _data_of_any_detector(load_config(str(given.config), given.overrides))
        if data.train is None and data.val is None and data.backend != "fake":
            raise UserError(
                f"{given.config} has neither data.train nor data.val; `python3 model_def.py check` in the detector's "
                "folder looks at what the detector's own config names"
            )
        report = Report()
        with _quiet():
            opened = open_both(data, report)
        describe(opened, None, images, data.on_bad_image == "skip", report)
        print("the data alone; `python3 model_def.py check` in the detector's folder also checks the detector\n")
        _end(report, opened, given.page)
    except UserError as error:
        sys.exit(f"error: {error}")


def _data_of_any_detector(config: dict[str, Any]) -> DataConfig:
    """The `data` section; MMDetection's `file_client_args` are read as MMDetection reads them, where that is one of
    our own backends."""
    from shared.config.experiment import parse_data
    from shared.config.schema import BACKEND_ALIASES, BACKENDS

    section = dict(config.get("data") or {})
    client = section.pop("file_client_args", None)
    if isinstance(client, dict):
        name = BACKEND_ALIASES.get(client.get("backend"), client.get("backend", "disk"))
        if name not in BACKENDS:
            raise UserError(
                f"data.file_client_args: only MMDetection reads through {name!r}; its `python3 model_def.py check` does"
            )
        section["backend"] = name
        section |= {"bucket": bucket} if (bucket := client.get("bucket") or client.get("bucket_name")) else {}
        section |= {"endpoint_url": client["endpoint_url"]} if client.get("endpoint_url") else {}
    return parse_data({"data": section})
