"""Trainings without the report and the figures, which take most of the time of so small a run."""

import shared.commands.train
import shared.training.tensorboard


def leave_out_figures(set_attribute=setattr):
    """No report, no figures for TensorBoard, no page of the labels. A test gives `monkeypatch.setattr`."""
    set_attribute(shared.training.tensorboard.ReportFigures, "draw", lambda *_: None)
    for name in ("save_page", "_write_report"):
        set_attribute(shared.commands.train, name, lambda *_: None)
