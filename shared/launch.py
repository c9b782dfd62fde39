"""The command line of every `model_def.py`: train, search, evaluate, predict, export, check. On a cluster, the task.

`read_command` needs no torch, so that --help and most errors appear at once.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import logging
import multiprocessing
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from shared.commands.check import add_check_options
from shared.config.augment import Augment
from shared.config.experiment import Experiment, Sections, read_experiment
from shared.config.file import fixed_hyperparameters, help_text
from shared.config.schema import SearcherSection, StoreOptions, TopLevelKeys, TrainingHyperparameters, parse_section
from shared.environment import (
    STOP_SIGNALS,
    adopt_launcher,
    on_cluster,
    parse_signals,
    quiet_if_output_is_closed,
    task_config,
    use_available_cores,
)
from shared.errors import DivergedError, UserError, out_of_memory_as_error, tell_torchrun
from shared.export.metadata import FORMATS, TENSORRT, TRANSFORMERS
from shared.log import redacted, show_log
from shared.training.downloads import checkpoint_here
from shared.training.loggers import check_loggers
from shared.training.run_folder import OF_THE_RUN, RunFolder

if TYPE_CHECKING:
    from shared.training.trial import DetectionTrial


logger = logging.getLogger(__name__)

# `log_policies` of the shipped experiment files look for it: the master does not start such a task again
NOT_RETRIED = "not retried: error: "
# the command, the module and the function that run it: each loads torch
_COMMANDS = {
    "train": ("shared.commands.train", "train_locally"),
    "search": ("shared.search.search", "search"),
    "evaluate": ("shared.commands.evaluate", "evaluate"),
    "predict": ("shared.commands.predict", "predict"),
    "export": ("shared.commands.export", "export"),
    "check": ("shared.commands.check", "check_with_detector"),
}
_ON_ALL_RANKS = ("train", "evaluate", "predict")


def read_command(module: str, sections: Sections) -> tuple[argparse.Namespace, Experiment] | None:
    """Reads the command line and its config, and checks what is known without torch and the detector's library. Errors
    exit the program. A `model_def.py` calls it before it imports torch.

    Args:
        module: the caller's `__name__`. The result is None in a cluster's task, and if it is not the program.
    """
    if module != "__main__" or on_cluster():
        return None
    with exit_on_errors():
        if sys.argv[1:2] == ["--help-config"]:
            of_detector = {
                "": TopLevelKeys,
                "searcher": SearcherSection,
                "hyperparameters": sections.hyperparameters,
                "data": sections.data,
                "data.augment": Augment,
            }
            print(help_text(of_detector, sys.argv[2] if len(sys.argv) > 2 else None))
            sys.exit()
        arguments = read_arguments()
        if arguments.command in _ON_ALL_RANKS:
            adopt_launcher()
        experiment = experiment_for(arguments, sections)
        _check(arguments, experiment)
        return arguments, experiment


def experiment_for(arguments: argparse.Namespace, sections: Sections) -> Experiment:
    """The experiment of a command, without hyperparameters if the config's are not used: a search draws them, a
    checkpoint has its own, and a file of results needs none."""
    has_others = any(getattr(arguments, name, None) for name in ("checkpoint", "results", "model"))
    is_fixed = arguments.command != "search" and not has_others
    return read_experiment(arguments.config, arguments.overrides, sections, with_hyperparameters=is_fixed)


def main(trial_class: type[DetectionTrial], command: tuple[argparse.Namespace, Experiment] | None = None) -> None:
    """Runs a command, or trains the trial of a cluster's task.

    Args:
        command: what `read_command` returned; None reads the command line now.
    """
    use_available_cores()
    with quiet_if_output_is_closed(), exit_on_errors(), out_of_memory_as_error():
        if on_cluster():
            train_on_cluster = _load("shared.commands.train", "train_on_cluster")
            show_log()
            train_on_cluster(trial_class)
            return
        arguments, experiment = command or read_command("__main__", trial_class.sections())
        run = _load(*_COMMANDS[arguments.command])
        show_log(arguments.verbose)
        if not arguments.verbose:  # it reports storage that a local user does not have
            logging.getLogger("determined").setLevel(logging.ERROR)
        run(trial_class, experiment, arguments)


def _load(module: str, function: str) -> Callable[..., None]:
    try:
        found = getattr(importlib.import_module(module), function)
    except ModuleNotFoundError as error:
        if error.name != "optuna":  # no other command needs it
            raise
        raise UserError("search needs the package optuna. Fix: pip install optuna") from error
    sys.excepthook = sys.__excepthook__  # all that the program itself imports is installed
    return found


# --- the checks that need no torch ------------------------------------------------------------------


def _check(arguments: argparse.Namespace, experiment: Experiment) -> None:
    command = arguments.command
    if getattr(arguments, "checkpoint", None) is not None:
        _check_checkpoint(arguments.checkpoint, "--checkpoint")
    elif command in ("train", "check"):
        check_loggers(experiment.hyperparameters.loggers)
    elif command == "search" and not arguments.status:
        check_loggers_of_search(experiment.config)
    if command == "train":
        experiment.searcher_metric(None)
        _check_run(arguments)
    if command in ("train", "search", "evaluate", "export"):
        splits = {"evaluate": (getattr(arguments, "split", ""),), "export": ("val",)}.get(command, ("train", "val"))
        experiment.check_paths(splits, submitted=Path(sys.argv[0]).parent)


def check_loggers_of_search(config: dict[str, Any]) -> None:
    """Raises UserError if the trials of a search could not log. Their other hyperparameters are not drawn yet."""
    section = {name: value for name, value in config["hyperparameters"].items() if name == "loggers"}
    section = fixed_hyperparameters({"hyperparameters": section})
    check_loggers(parse_section(section, TrainingHyperparameters, "hyperparameters").loggers)


def _check_run(arguments: argparse.Namespace) -> None:
    """Raises UserError if no run can start with --output-dir and --resume."""
    if arguments.store is not None:
        from shared.data.storage import open_place  # no other command needs it

        open_place(arguments.store, StoreOptions())
    elif arguments.resume in OF_THE_RUN and arguments.output_dir is None:
        raise UserError(f"--resume {arguments.resume}: it needs a run. Fix: name the run's folder with --output-dir")
    if arguments.resume not in (None, *OF_THE_RUN):
        _check_checkpoint(arguments.resume, "--resume")
    if arguments.output_dir is not None and arguments.resume is None and "RANK" not in os.environ:
        RunFolder(arguments.output_dir).refuse_other_run()


def _check_checkpoint(name: str, option: str) -> None:
    if "RANK" in os.environ:  # rank 0 alone needs the checkpoint, and all ranks exit with its error
        return
    try:
        checkpoint_here(name)
    except UserError as error:
        raise UserError(f"{option}: {error}") from error


# --- errors -----------------------------------------------------------------------------------------


@contextlib.contextmanager
def exit_on_errors() -> Iterator[None]:
    """Exits with one line at an error that the user can fix, and at Ctrl-C."""
    try:
        yield
    except (UserError, DivergedError) as error:
        _exit_with(error)
    except KeyboardInterrupt:
        how = "to continue a run from its last checkpoint: --output-dir DIR --resume last"
        print(f"stopped; {how}", file=sys.stderr)
        _exit_at_once(128 + signal.SIGINT)


def _exit_at_once(status: int) -> NoReturn:
    """Exits without waiting for threads: Python aborts if one still writes a checkpoint."""
    for worker in multiprocessing.active_children():
        worker.kill()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _exit_with(error: Exception) -> NoReturn:
    # the error's own words; one from a loader worker comes with the worker's traceback
    message = redacted(re.split(r"\n[\w.]+Error: ", str(error))[-1].strip())
    rank = int(os.environ.get("RANK", 0))
    line = f"error: {message}" if rank == 0 else f"error on rank {rank}: {message}"
    if not on_cluster():
        tell_torchrun(line)
        sys.exit(line)
    line = f"{NOT_RETRIED}{message}"
    tell_torchrun(line)
    if NOT_RETRIED.split(":")[0] not in str(task_config().get("log_policies")):
        logger.info("Determined may start this trial again: its config lacks the `log_policies` of the shipped files")
    logger.error("%s", line)
    sys.exit(1)


# --- the arguments ----------------------------------------------------------------------------------


def read_arguments() -> argparse.Namespace:
    """The command line; `command` is what to do."""
    parser = argparse.ArgumentParser(
        prog="model_def.py",
        description="Train, evaluate, predict, export or check without a cluster. `--help-config [KEY]` explains the "
        "config.",
    )
    commands = parser.add_subparsers(required=True, dest="command", metavar="COMMAND")

    def add(name: str, about: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=about, description=about)
        command.add_argument("config", help="the experiment config, such as const.yaml")
        command.add_argument(
            "--set",
            dest="overrides",
            metavar="KEY=VALUE",
            action="append",
            default=[],
            help="any key of the config, such as hyperparameters.lr=0.01; repeat it for more keys",
        )
        command.add_argument("--verbose", action="store_true", help="also show the libraries' log")
        return command

    train = add("train", "Train, as a cluster would.")
    train.add_argument("--output-dir", type=Path, help="the run's folder; default runs/<time>")
    train.add_argument(
        "--store",
        metavar="PLACE",
        help="keep a copy of the run in s3://bucket/folder, gs://bucket/folder or a path; --resume continues from it",
    )
    train.add_argument(
        "--resume",
        metavar="CHECKPOINT",
        help="`last` or `best` of --output-dir; `auto`: `last` if it exists, else a new run; a checkpoint's path",
    )

    train.add_argument(
        "--stop-signals",
        type=parse_signals,
        default=STOP_SIGNALS,
        metavar="NAMES",
        help="signals after which it saves and stops, besides Ctrl-C; default TERM,USR1,USR2,HUP",
    )
    train.add_argument(
        "--stop-status",
        type=_status,
        metavar="STATUS",
        help="the exit status after such a signal; default 128 and its number, as 143 for TERM",
    )

    search = add("search", "Search hyperparameters with the config's `searcher`, as a cluster would.")
    search.add_argument("--output-dir", type=Path, help="folder for trials, table and best.yaml; default runs/search")
    search.add_argument("--jobs", type=_count, metavar="N", help="trials at once; default one per GPU, or one")
    search.add_argument(
        "--storage",
        metavar="URL",
        help="Optuna's storage for several machines: an SQL or redis URL, or a file on NFS; default in --output-dir",
    )
    search.add_argument("--status", action="store_true", help="only print the search's progress")

    evaluate = add("evaluate", "Compute COCO metrics on data.val, or on data.test.")
    evaluate.add_argument(
        "--split", choices=("val", "test"), default="val", help="the section of `data` to evaluate on; default val"
    )
    evaluate.add_argument("--output", type=Path, metavar="DIR", help="write metrics.json and results.json there")
    evaluate.add_argument("--report", type=Path, metavar="DIR", help="write report.html and report.json there")
    evaluate.add_argument("--results", type=Path, metavar="FILE", help="score a results.json in COCO's format instead")

    predict = add("predict", "Detect on images or videos, and draw the detections.")
    predict.add_argument(
        "--images",
        nargs="+",
        required=True,
        metavar="PATH",
        help="files, folders, globs, URLs of images, folders in buckets, videos",
    )
    predict.add_argument("--output", type=Path, required=True, metavar="DIR", help="pictures and results.json go there")
    predict.add_argument(
        "--format", choices=("png", "pdf"), default="png", help="of the pictures; default png; pdf keeps lines sharp"
    )
    predict.add_argument(
        "--track", action="store_true", help="number the objects of a video, with the package trackers"
    )
    report_help = "the lowest score that the report draws, 0 to 1; default `best`, with the greatest F1"
    drawn_help = "the lowest score that is drawn; default 0.3; `best` or `best-per-category`: from the run's report"
    evaluate.add_argument("--min-score", type=_number_to(1, "best"), default="best", help=report_help)
    predict.add_argument("--min-score", type=_number_to(1, "best", "best-per-category"), default=0.3, help=drawn_help)
    overlap_help = "the share of a tile that the next one shows too; default 0.2"
    for command in (evaluate, predict):
        command.add_argument(
            "--tiles",
            type=_count,
            metavar="PIXELS",
            help="detect in square tiles with sides of this length, for large images",
        )
        command.add_argument("--overlap", type=_number_to(0.9), default=0.2, help=overlap_help)
        command.add_argument(
            "--checkpoint",
            help="a checkpoint's path or, with DET_MASTER set, its UUID; default: the config's pretrained weights",
        )
        command.add_argument("--model", type=Path, metavar="FILE", help="an exported file, instead of a checkpoint")
    add_export_options(add("export", "Write a detector to a file for ONNX Runtime or others, and check it on data."))
    add_check_options(add("check", "Show what would stop training, and what is odd in its data."))
    return parser.parse_args()


def add_export_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--checkpoint", help="a checkpoint's path or UUID; default: the config's pretrained weights")
    formats_help = "default onnx; `torch` is a .pt2 file; `transformers` a folder for that package (detr only); "
    formats_help += "`tensorrt` prints the command that builds an engine"
    parser.add_argument("--format", choices=[*FORMATS, TRANSFORMERS, TENSORRT], default="onnx", help=formats_help)
    precisions = parser.add_mutually_exclusive_group()
    precisions.add_argument(
        "--half",
        dest="precision",
        action="store_const",
        const="float16",
        help="16 bits: weights, and arithmetic where the CPU has it (openvino only)",
    )
    precisions.add_argument(
        "--int8",
        dest="precision",
        action="store_const",
        const="int8",
        help="convolutions in 8 bits (onnx, openvino), calibrated on images of data.train",
    )
    parser.add_argument(
        "--raw", action="store_true", help="the network alone (onnx only); detect.py does the rest in NumPy"
    )
    parser.add_argument("--output", type=Path, metavar="DIR", help="the folder to write; default exports/FORMAT")
    parser.set_defaults(model=None, precision="float32")
    parser.add_argument("--images", type=_count, metavar="N", help="check on N images of data.val; default all")
    parser.add_argument(
        "--tolerance",
        type=_number_to(1),
        help="the largest difference of mAP between checkpoint and file; default 0.001; with --half and --int8, none",
    )


def _number_to(most: float, *words: str) -> Callable[[str], float | str]:
    """What reads a number from 0 to `most`, or one of the words."""

    def read(text: str) -> float | str:
        if text in words:
            return text
        with contextlib.suppress(ValueError):
            if 0 <= float(text) <= most:
                return float(text)
        others = "".join(f", nor `{word}`" for word in words)
        raise argparse.ArgumentTypeError(f"{text} is {'neither' if words else 'not'} between 0 and {most:g}{others}")

    return read


def _count(text: str) -> int:
    if text.isdecimal() and int(text) > 0:
        return int(text)
    raise argparse.ArgumentTypeError(f"{text} is not a whole number above 0")


def _status(text: str) -> int:
    if text.isdecimal() and int(text) < 256:
        return int(text)
    raise argparse.ArgumentTypeError(f"{text} is not a whole number from 0 to 255")
