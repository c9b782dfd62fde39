"""A run in Weights & Biases."""

from __future__ import annotations

import inspect
import os
import re
import sys
from pathlib import Path
from typing import Any

from shared.errors import UserError
from shared.redaction import redacted

# where no variable says otherwise; finish_timeout in seconds: what is not sent by then stays in the run's folder
_SETTINGS = {"silent": True, "console": "off", "finish_timeout": 120.0}


def check_login() -> None:
    """Raises UserError where wandb would ask for an API key."""
    import wandb

    if "prompt" not in inspect.signature(wandb.login).parameters:
        raise UserError(
            f"hyperparameters.loggers: wandb {wandb.__version__} is too old; python3 -m pip install -U wandb"
        )
    if wandb.setup(settings=_settings()).settings.mode in ("offline", "dryrun", "disabled"):
        return
    if not wandb.login(prompt=False, verify=False):
        raise UserError(
            "hyperparameters.loggers: wandb has no API key; `wandb login` asks for it, WANDB_API_KEY gives it, and "
            "WANDB_MODE=offline does without"
        )


def project_name(name: str) -> str:
    """The name without what W&B allows in no project's."""
    return re.sub(r"[/\\#?%:]", "-", name)[:128]


class WandbRun:
    """
    Args:
        folder: of the run; its name is the run's.
        kept: the id of the run to go on with; None for a new one.

    Attributes:
        id: None where W&B keeps nothing of it.
        place: where its numbers are, for a human.
    """

    def __init__(self, config: dict[str, Any], project: str, folder: Path, kept: str | None):
        import wandb

        ours = {
            "WANDB_PROJECT": ("project", project_name(project)),
            "WANDB_DIR": ("dir", str(folder)),
            "WANDB_NAME": ("name", folder.name),
            "WANDB_RUN_ID": ("id", kept),
            "WANDB_RESUME": ("resume", "allow"),
        }
        self.run = wandb.init(
            # said once more: wandb has read the environment before `keep_places`
            **{key: os.environ.get(variable) or value for variable, (key, value) in ours.items()},
            config=config,
            allow_val_change=True,  # of a run that goes on: a greater length
            reinit="create_new",  # a program's own run is left alone
            settings=_settings(),
        )
        # W&B's own step only grows: what a killed run has trained after its checkpoint would be refused
        self.run.define_metric("*", step_metric="batches")
        self.id = None if self.run.disabled else self.run.id
        # offline, what `wandb sync` takes
        self.place = self.run.url or str(Path(self.run.dir).parent)

    def report(self, batches: int, values: dict[str, float]) -> None:
        self.run.log({**values, "batches": batches})

    def conclude(self, batches: int, best: dict[str, float], picture: Path | None) -> None:
        """The best validation's numbers, and the picture of the last one, after `batches`."""
        import wandb

        self.run.summary.update(best)
        if picture is not None:
            self.run.log({picture.stem: wandb.Image(str(picture)), "batches": batches})

    def finish(self, code: int) -> None:
        """
        Args:
            code: the program's exit status.
        """
        self.run.finish(exit_code=code)


def _settings() -> Any:
    import wandb

    ours = {key: value for key, value in _SETTINGS.items() if f"WANDB_{key.upper()}" not in os.environ}
    if any(redacted(argument) != argument for argument in sys.argv):
        ours["x_disable_meta"] = True  # the command line is a part of it
    return wandb.Settings(**ours)
