"""The report's figures in TensorBoard, drawn during training."""

import threading
from types import SimpleNamespace

import numpy as np
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter

from shared.training.run import TensorBoard


def test_closing_a_writer_during_a_figure_loses_no_figure(tmp_path):
    uploaded = threading.Event()

    def draw(*_):
        assert uploaded.wait(600)
        return {"report_bbox/Calibration": np.zeros((8, 8, 3), np.uint8)}

    writer = SummaryWriter(str(tmp_path))
    board = TensorBoard(writer, draw)
    board.draw_figures(SimpleNamespace(found=None), 20, is_last=False)
    writer.close()  # as Determined does at each upload
    uploaded.set()
    board.close()
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert [event.step for event in events.Images("report_bbox/Calibration")] == [20]
