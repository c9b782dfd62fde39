"""Trainings without the report and the figures, which take most of the time of so small a run."""

from shared.commands import train
from shared.training.tensorboard import ReportFigures


def leave_out_figures(set_attribute=setattr):
    """No report, no figures for TensorBoard, no page of the labels. A test gives `monkeypatch.setattr`."""
    set_attribute(ReportFigures, "draw", lambda *_: None)
    set_attribute(train.Results, "write_report", lambda *_: None)
    set_attribute(train, "save_page", lambda *_: None)
