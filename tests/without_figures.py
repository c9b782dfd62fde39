"""Trainings without report and pictures, which take most of the time of such small runs."""

from shared.commands import train
from shared.training import run


def leave_out_figures(set_attribute=setattr):
    """Removes reports, pictures and figures. A test gives `monkeypatch.setattr`."""
    set_attribute(run.TensorBoard, "draw_figures", lambda *_: None)
    set_attribute(run, "picture_of", lambda *_: None)
    set_attribute(train, "picture_of", lambda *_: None)
    set_attribute(train, "save_page", lambda *_, **__: None)
    set_attribute(train.Results, "write_report", lambda *_: None)
