"""What a command line says, read before torch is loaded: --help, and most of what is wrong, is there at once."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import logging
import multiprocessing
import os
import re
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import determined as det

import shared.environment  # noqa: F401 before torch
from shared.commands.check import add_arguments as add_check_arguments
from shared.config.experiment import check_paths, parse_data, parse_searcher_metric, refuse_another_detector_s
from shared.config.file import fixed_hyperparameters, load_config, make_paths_absolute
from shared.config.schema import DataConfig, TrainingHyperparameters, parse_section
from shared.environment import on_cluster
from shared.errors import DivergedError, UserError, tell_torchrun
from shared.redaction import redacted
from shared.training.checkpoint_folder import checkpoint_here
from shared.training.loggers import check_loggers
from shared.training.run_folder import OF_THE_RUN, RunFolder

logger = logging.getLogger(__name__)

# `log_policies` of the shipped experiment files look for it: the master does not start such a task again
NOT_RETRIED = "not retried: error: "


def look_first(module: str, hyperparameters: type, data: type[DataConfig] = DataConfig) -> None:
    """Ends the program with what is wrong with its command line, config or paths, as far as that is known without the
    detector's library. Called by a `model_def.py` before it imports torch; nothing where it is not the program, or is
    a cluster's task.

    Args:
        module: its `__name__`.
        hyperparameters, data: the detector's sections of the config.
    """
    if module != "__main__" or on_cluster():
        return
    with ended_by_errors():
        arguments = read_arguments()
        keys = {
            section: [field.name for field in dataclasses.fields(into)]
            for section, into in (("hyperparameters", hyperparameters), ("data", data))
        }
        config = load_config(arguments.config, arguments.overrides, keys)
        make_paths_absolute(config, ())
        parsed = parse_data(config, data)
        checkpoint = getattr(arguments, "checkpoint", None)
        if checkpoint is not None:
            _look_at_checkpoint(checkpoint, "--checkpoint")
        elif arguments.command != "search" and getattr(arguments, "results", None) is None:
            config["hyperparameters"] = fixed_hyperparameters(config)
            refuse_another_detector_s(config, hyperparameters, arguments.config)
            given = parse_section(config["hyperparameters"], hyperparameters, "hyperparameters")
            if arguments.command in ("train", "check"):
                check_loggers(given.loggers)
        elif arguments.command == "search" and not arguments.status:
            _look_at_loggers(config)
        if arguments.command == "train":
            parse_searcher_metric(config, None)
            _look_at_run(arguments)
        if arguments.command in ("train", "search", "evaluate"):
            submitted = Path(sys.argv[0]).parent
            check_paths(parsed, ("val",) if arguments.command == "evaluate" else ("train", "val"), submitted)


def _look_at_loggers(config: dict[str, Any]) -> None:
    """Raises UserError where the trials of a search could not log; their other hyperparameters are not drawn yet."""
    section = {key: value for key, value in (config.get("hyperparameters") or {}).items() if key == "loggers"}
    section = fixed_hyperparameters({"hyperparameters": section})
    check_loggers(parse_section(section, TrainingHyperparameters, "hyperparameters").loggers)


def _look_at_run(arguments: argparse.Namespace) -> None:
    """Raises UserError where --output-dir or --resume is not what a run can begin with."""
    if arguments.resume in OF_THE_RUN and arguments.output_dir is None:
        raise UserError(f"--resume {arguments.resume}: say of which run, by --output-dir")
    if arguments.resume not in (None, *OF_THE_RUN):
        _look_at_checkpoint(arguments.resume, "--resume")
    if arguments.output_dir is not None and arguments.resume is None:
        RunFolder(arguments.output_dir).refuse_other_run()


def _look_at_checkpoint(name: str, option: str) -> None:
    try:
        checkpoint_here(name)
    except UserError as error:
        raise UserError(f"{option}: {error}") from error


def read_arguments() -> argparse.Namespace:
    """The command line of a `model_def.py`; `command` is what is to be done."""
    parser = argparse.ArgumentParser(
        prog="model_def.py", description="Train, evaluate, predict or check without a cluster."
    )
    commands = parser.add_subparsers(
        required=True, dest="command", metavar="train | search | evaluate | predict | check"
    )

    def add(name: str, about: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=about, description=about)
        command.add_argument("config", help="the experiment config, const.yaml for example")
        command.add_argument(
            "--set",
            dest="overrides",
            metavar="KEY=VALUE",
            action="append",
            default=[],
            help="any key of the config, hyperparameters.lr=0.01 for example; may be repeated",
        )
        command.add_argument("--verbose", action="store_true", help="show also what the libraries log")
        return command

    train = add("train", "Train, as a cluster would.")
    train.add_argument("--output-dir", type=Path, help="where everything of the run goes; default runs/<time>")
    train.add_argument(
        "--resume",
        metavar="CHECKPOINT",
        help="`last` or `best` of --output-dir; `auto`: `last` where there is one, else anew; the path of a checkpoint",
    )

    search = add("search", "Search hyperparameters, as a cluster would: what a `searcher` of the config says.")
    search.add_argument("--output-dir", type=Path, help="where trials, table and best.yaml go; default runs/search")
    search.add_argument("--jobs", type=_count, metavar="N", help="trials at once; default one a GPU, or one")
    search.add_argument(
        "--storage",
        metavar="URL",
        help="Optuna's, for several machines: an SQL or redis URL, or a file on NFS; default a file in --output-dir",
    )
    search.add_argument("--status", action="store_true", help="only say how far it is")

    evaluate = add("evaluate", "COCO metrics on data.val.")
    evaluate.add_argument("--output", type=Path, metavar="DIR", help="write metrics.json and results.json there")
    evaluate.add_argument("--report", type=Path, metavar="DIR", help="write report.html and report.json there")
    evaluate.add_argument("--results", type=Path, metavar="FILE", help="score a results.json in COCO's format instead")

    predict = add("predict", "Detect on images or videos, and draw.")
    predict.add_argument(
        "--images",
        nargs="+",
        required=True,
        metavar="PATH",
        help="files, folders, globs, URLs of images, folders in buckets, videos",
    )
    predict.add_argument("--output", type=Path, required=True, metavar="DIR", help="pictures and results.json go here")
    predict.add_argument(
        "--format", choices=("png", "pdf"), default="png", help="of the pictures; default png, pdf keeps lines sharp"
    )
    predict.add_argument(
        "--min-score",
        type=_share_or_best,
        default=0.3,
        help="the lowest score that is drawn, 0 to 1; default 0.3; `best`: that of the run's report",
    )
    evaluate.add_argument(
        "--min-score",
        type=_share_or_best,
        default="best",
        help="the lowest score that the report draws, 0 to 1; default `best`, where F1 is greatest",
    )
    for command in (evaluate, predict):
        command.add_argument(
            "--checkpoint",
            help="a checkpoint's path or, with DET_MASTER set, its UUID; default: the config's pretrained weights",
        )
    add_check_arguments(add("check", "What would stop a training, and what is odd in its data."))
    return parser.parse_args()


def _count(text: str) -> int:
    if text.isdecimal() and int(text) > 0:
        return int(text)
    raise argparse.ArgumentTypeError(f"{text} is not a whole number above 0")


def _share_or_best(text: str) -> float | str:
    if text == "best":
        return text
    with contextlib.suppress(ValueError):
        if 0 <= float(text) <= 1:
            return float(text)
    raise argparse.ArgumentTypeError(f"{text} is neither between 0 and 1, nor `best`")


@contextlib.contextmanager
def ended_by_errors() -> Iterator[None]:
    """Ends the program with one line where something is wrong that a user can put right."""
    try:
        yield
    except (UserError, DivergedError) as error:
        _end_with(error)
    except KeyboardInterrupt:
        print(
            "stopped; a training goes on from its last checkpoint with --output-dir DIR --resume last", file=sys.stderr
        )
        _exit_at_once(128 + signal.SIGINT)


def _exit_at_once(status: int) -> NoReturn:
    """Ends the process without waiting for its threads: Python aborts where one still writes a checkpoint."""
    for worker in multiprocessing.active_children():
        worker.kill()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _end_with(error: Exception) -> NoReturn:
    # its own words, also where it comes from a loader worker with that one's traceback
    message = redacted(re.split(r"\n[\w.]+Error: ", str(error))[-1].strip())
    rank = int(os.environ.get("RANK", 0))
    line = f"error: {message}" if rank == 0 else f"error on rank {rank}: {message}"
    if on_cluster():
        line = f"{NOT_RETRIED}{message}"
    tell_torchrun(line)
    if not on_cluster():
        sys.exit(line)
    if NOT_RETRIED.split(":")[0] not in str(det.get_cluster_info().trial._config.get("log_policies")):
        logger.info("Determined may start this trial again: its config lacks the `log_policies` of the shipped files")
    logger.error("%s", line)
    sys.exit(1)
