"""The arguments of every `model_def.py`. Reading them needs no torch."""

from __future__ import annotations

import argparse
import contextlib
import signal
from pathlib import Path

from shared.commands.check import add_check_options
from shared.export.metadata import FORMATS, TENSORRT, TRANSFORMERS
from shared.launchers import STOP_SIGNALS, parse_signals


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
        type=_signals,
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
    for command, default, kind, help in (
        (
            evaluate,
            "best",
            _share_or_best,
            "the lowest score that the report draws, 0 to 1; default `best`, with the greatest F1",
        ),
        (
            predict,
            0.3,
            _share_or_any_best,
            "the lowest score that is drawn, 0 to 1; default 0.3; `best` or `best-per-category`: from the run's report",
        ),
    ):
        command.add_argument(
            "--tiles",
            type=_count,
            metavar="PIXELS",
            help="detect in square tiles with sides of this length, for large images",
        )
        command.add_argument(
            "--overlap", type=_share, default=0.2, help="the share of a tile that the next one shows too; default 0.2"
        )
        command.add_argument("--min-score", type=kind, default=default, help=help)
        command.add_argument(
            "--checkpoint",
            help="a checkpoint's path or, with DET_MASTER set, its UUID; default: the config's pretrained weights",
        )
        command.add_argument("--model", type=Path, metavar="FILE", help="an exported file, instead of a checkpoint")
    add_export_options(add("export", "Write a detector to a file for ONNX Runtime or others, and check it on data."))
    add_check_options(add("check", "Show what would stop a training, and what is odd in its data."))
    return parser.parse_args()


def add_export_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--checkpoint", help="a checkpoint's path or UUID; default: the config's pretrained weights")
    formats_help = "default onnx; `torch` is a .pt2 file; `transformers` a folder for that package (detr only); "
    formats_help += "`tensorrt` prints the command that builds an engine"
    parser.add_argument("--format", choices=[*FORMATS, TRANSFORMERS, TENSORRT], default="onnx", help=formats_help)
    precisions = parser.add_mutually_exclusive_group()
    precisions.add_argument(
        "--half", dest="precision", action="store_const", const="float16", help="weights of 16 bits (openvino only)"
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
        type=_tolerance,
        help="the largest difference of mAP between checkpoint and file; default 0.001; with --half and --int8, none",
    )


def _tolerance(text: str) -> float:
    with contextlib.suppress(ValueError):
        if 0 <= float(text) <= 1:
            return float(text)
    raise argparse.ArgumentTypeError(f"{text} is not between 0 and 1")


def _count(text: str) -> int:
    if text.isdecimal() and int(text) > 0:
        return int(text)
    raise argparse.ArgumentTypeError(f"{text} is not a whole number above 0")


def _signals(text: str) -> tuple[signal.Signals, ...]:
    try:
        return parse_signals(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _status(text: str) -> int:
    if text.isdecimal() and int(text) < 256:
        return int(text)
    raise argparse.ArgumentTypeError(f"{text} is not a whole number from 0 to 255")


def _share(text: str) -> float:
    with contextlib.suppress(ValueError):
        if 0 <= float(text) <= 0.9:
            return float(text)
    raise argparse.ArgumentTypeError(f"{text} is not between 0 and 0.9")


def _share_or_best(text: str, words: tuple[str, ...] = ("best",)) -> float | str:
    if text in words:
        return text
    with contextlib.suppress(ValueError):
        if 0 <= float(text) <= 1:
            return float(text)
    raise argparse.ArgumentTypeError(f"{text} is neither between 0 and 1, nor {' nor '.join(f'`{w}`' for w in words)}")


def _share_or_any_best(text: str) -> float | str:
    return _share_or_best(text, ("best", "best-per-category"))
