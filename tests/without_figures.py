"""Trainings without the report and the pictures, which take most of the time of so small a run."""

from shared.commands import train
from shared.training import run


def leave_out_figures(set_attribute=setattr):
    """No report, no pictures of detections and labels, no figures. A test gives `monkeypatch.setattr`."""
    set_attribute(run.ReportFigures, "draw", lambda *_: None)
    set_attribute(run, "picture_of", lambda *_: None)
    set_attribute(train, "picture_of", lambda *_: None)
    set_attribute(train, "save_page", lambda *_, **__: None)
    set_attribute(train.Results, "write_report", lambda *_: None)
