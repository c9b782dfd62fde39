"""`python3 -m shared COMMAND`: the commands that need no detector."""

from __future__ import annotations

import importlib
import sys

from shared.environment import prepare_process, quiet_if_output_is_closed
from shared.errors import UserError

prepare_process()  # before torch, and before packages that may be missing

# the command: the module and function that take its arguments, and what it does
_COMMANDS = {
    "check": (
        "shared.commands.check",
        "main",
        "show what would stop training in the data of an experiment config, without the detector",
    ),
    "compare": (
        "shared.report.compare",
        "compare_main",
        "compare two detectors: runs, or any results in COCO's format",
    ),
    "convert": ("shared.data.convert.conversion", "main", "write annotations of other formats as COCO files"),
    "report": ("shared.report.report", "report_main", "write a page about any detections: numbers, figures, pictures"),
    "synthetic": ("shared.data.synthetic", "main", "write a small data set of shapes, in COCO's format"),
}


def main() -> None:
    name, *arguments = sys.argv[1:] or ["--help"]
    if name in ("-h", "--help"):
        lines = "\n".join(f"  {command:10} {about}" for command, (*_, about) in _COMMANDS.items())
        print(f"usage: python3 -m shared COMMAND …\n\n{lines}\n\nCOMMAND --help shows its arguments.")
        return
    if name not in _COMMANDS:
        sys.exit(f"error: unknown command {name!r}. Fix: use one of {', '.join(_COMMANDS)}")
    module, function, _ = _COMMANDS[name]
    try:
        with quiet_if_output_is_closed():
            getattr(importlib.import_module(module), function)(arguments)
    except UserError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
