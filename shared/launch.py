"""The entrypoint of every `model_def.py`: train · search · evaluate · predict · check; or a task of a cluster."""

from __future__ import annotations

import argparse
import logging
import sys

from shared.commands.check import check_with
from shared.commands.command_line import ended_by_errors, read_arguments
from shared.commands.detect import evaluate, predict
from shared.commands.train import train_here, train_on_cluster
from shared.environment import on_cluster, use_available_cores
from shared.errors import UserError
from shared.log import show_log
from shared.training.memory import out_of_memory_anywhere, out_of_memory_as
from shared.training.trial import DetectionTrial


def search_here(trial_class: type[DetectionTrial], arguments: argparse.Namespace) -> None:
    try:
        from shared.search.search import search  # Optuna is nothing that the other commands need
    except ModuleNotFoundError as error:
        raise UserError(f"search needs the package {error.name}: pip install optuna") from error

    search(trial_class, arguments)


_COMMANDS = {"train": train_here, "search": search_here, "evaluate": evaluate, "predict": predict, "check": check_with}


def main(trial_class: type[DetectionTrial]) -> None:
    """Does what the command line says, or trains what the cluster gives."""
    sys.excepthook = sys.__excepthook__  # all that the program itself imports is there
    use_available_cores()
    with ended_by_errors(), out_of_memory_as(out_of_memory_anywhere):
        if on_cluster():
            show_log()
            train_on_cluster(trial_class)
            return
        arguments = read_arguments()
        show_log(arguments.verbose)
        if not arguments.verbose:  # it speaks of storage that is none of the user's here
            logging.getLogger("determined").setLevel(logging.ERROR)
        _COMMANDS[arguments.command](trial_class, arguments)
