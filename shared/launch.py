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
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from shared.command_line import read_arguments
from shared.config.augment import Augment
from shared.config.experiment import Experiment, Sections, read_experiment
from shared.config.file import fixed_hyperparameters, help_text
from shared.config.schema import SearcherSection, StoreOptions, TopLevelKeys, TrainingHyperparameters, parse_section
from shared.environment import on_cluster, quiet_if_output_is_closed, task_config, use_available_cores
from shared.errors import DivergedError, UserError, tell_torchrun
from shared.launchers import adopt_launcher
from shared.log import show_log
from shared.redaction import redacted
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


@dataclass(frozen=True)
class Command:
    """A command line and the experiment that it names."""

    arguments: argparse.Namespace
    experiment: Experiment


def read_command(module: str, sections: Sections) -> Command | None:
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
        return Command(arguments, experiment)


def experiment_for(arguments: argparse.Namespace, sections: Sections) -> Experiment:
    """The experiment of a command, without hyperparameters if the config's are not used: a search draws them, a
    checkpoint has its own, and a file of results needs none."""
    has_others = any(getattr(arguments, name, None) for name in ("checkpoint", "results", "model"))
    is_fixed = arguments.command != "search" and not has_others
    return read_experiment(arguments.config, arguments.overrides, sections, with_hyperparameters=is_fixed)


def main(trial_class: type[DetectionTrial], command: Command | None = None) -> None:
    """Runs a command, or trains the trial of a cluster's task.

    Args:
        command: what `read_command` returned; None reads the command line now.
    """
    from shared.training.memory import out_of_memory_anywhere, out_of_memory_as

    use_available_cores()
    with quiet_if_output_is_closed(), exit_on_errors(), out_of_memory_as(out_of_memory_anywhere):
        if on_cluster():
            train_on_cluster = _load("shared.commands.train", "train_on_cluster")
            show_log()
            train_on_cluster(trial_class)
            return
        command = command or read_command("__main__", trial_class.sections())
        run = _load(*_COMMANDS[command.arguments.command])
        show_log(command.arguments.verbose)
        if not command.arguments.verbose:  # it reports storage that a local user does not have
            logging.getLogger("determined").setLevel(logging.ERROR)
        run(trial_class, command.experiment, command.arguments)


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
        from shared.data.places import open_place  # no other command needs it

        open_place(arguments.store, StoreOptions())
    elif arguments.resume in OF_THE_RUN and arguments.output_dir is None:
        raise UserError(f"--resume {arguments.resume}: it needs a run. Fix: name the run's folder with --output-dir")
    if "RANK" in os.environ:  # rank 0 alone needs the checkpoint, and all ranks exit with its error
        return
    if arguments.resume not in (None, *OF_THE_RUN):
        _check_checkpoint(arguments.resume, "--resume")
    if arguments.output_dir is not None and arguments.resume is None:
        RunFolder(arguments.output_dir).refuse_other_run()


def _check_checkpoint(name: str, option: str) -> None:
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
        how = "to continue a training from its last checkpoint: --output-dir DIR --resume last"
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
