"""train · evaluate · predict: the command line of every `model_def.py`, and what it says when it ends in an error."""

from __future__ import annotations

from shared.threads import use_available_cores

import argparse
import json
import logging
import os
import re
import sys
import time
from pathlib import Path
from typing import Any, NoReturn

import determined as det

from shared.detect import evaluate, predict
from shared.errors import UserError
from shared.here import train_here
from shared.on_cluster import train_on_cluster
from shared.training.determined_fixes import on_cluster
from shared.training.training_metrics import DivergedError
from shared.training.trial import DetectionTrial

logger = logging.getLogger(__name__)

# `log_policies` of the shipped experiment files look for it: the master does not start such a task again
NOT_RETRIED = "not retried: error: "


def main(trial_class: type[DetectionTrial]) -> None:
    """The entrypoint of every `model_def.py`."""
    logging.basicConfig(level=logging.INFO, format="%(levelname)s: %(message)s")
    use_available_cores()
    try:
        if on_cluster():
            train_on_cluster(trial_class)
            return
        logging.getLogger("determined").setLevel(logging.ERROR)
        arguments = _parser().parse_args()
        arguments.run(trial_class, arguments)
    except (UserError, DivergedError) as error:
        _end_with(error)
    except KeyboardInterrupt:
        print("stopped; a run goes on from its last checkpoint with --output-dir DIR --resume last", file=sys.stderr)
        sys.exit(130)


def _end_with(error: Exception) -> NoReturn:
    # its own words, also where it comes from a loader worker with that one's traceback
    message = re.split(r"\n[\w.]+Error: ", str(error))[-1].strip()
    rank = int(os.environ.get("RANK", 0))
    line = f"error: {message}" if rank == 0 else f"error on rank {rank}: {message}"
    if on_cluster():
        line = f"{NOT_RETRIED}{message}"
    if torchrun_s := os.environ.get("TORCHELASTIC_ERROR_FILE"):  # its report, which comes last, shows it then
        failure = {"message": line, "extraInfo": {"timestamp": int(time.time())}}
        Path(torchrun_s).write_text(json.dumps({"message": failure}))
    if not on_cluster():
        sys.exit(line)
    if NOT_RETRIED.split(":")[0] not in str(det.get_cluster_info().trial._config.get("log_policies")):
        logger.info("Determined may start this trial again: its config lacks the `log_policies` of the shipped files")
    logger.error("%s", line)
    sys.exit(1)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Train, evaluate or predict without a cluster.")
    commands = parser.add_subparsers(required=True, metavar="train | evaluate | predict")

    def add(name: str, run: Any, about: str) -> argparse.ArgumentParser:
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
        command.set_defaults(run=run)
        return command

    train = add("train", train_here, "Train, as a cluster would.")
    train.add_argument("--output-dir", type=Path, help="where everything of the run goes; default runs/<time>")
    train.add_argument("--resume", metavar="CHECKPOINT", help="`last` of --output-dir, or the path of a checkpoint")

    evaluating = add("evaluate", evaluate, "COCO metrics on data.val.")
    evaluating.add_argument("--output", type=Path, metavar="DIR", help="write metrics.json and results.json there")

    evaluating.add_argument(
        "--results",
        type=Path,
        metavar="FILE",
        help="score this results.json, in COCO's format, and no model",
    )

    predicting = add("predict", predict, "Detect on a folder of images, and draw.")
    predicting.add_argument(
        "--images",
        nargs="+",
        required=True,
        metavar="WHAT",
        help="image files, folders, globs in quotes, URLs of images, s3:// and gs:// folders, video files; mixed",
    )
    predicting.add_argument(
        "--output", type=Path, required=True, metavar="DIR", help="pictures and results.json go here"
    )
    predicting.add_argument(
        "--format", choices=("png", "pdf"), default="png", help="of the pictures; default png, pdf keeps lines sharp"
    )
    predicting.add_argument("--min-score", type=float, default=0.3, help="the lowest score that is drawn; default 0.3")
    for command in (evaluating, predicting):
        command.add_argument(
            "--checkpoint",
            help="a checkpoint's path or, with DET_MASTER set, its UUID; default: the config's pretrained weights",
        )
    return parser
