"""Each start of a run has another number of processes, as after the loss of a GPU."""

import collections
import os

import pytest
import yaml
from conftest import ROOT, reports, run_model_def
from tiny_mmdetection import DENSE_HEAD, SMALL_BACKBONE, mmdet_config

# a model_def.py that prints which images are in which batch, and what was drawn at random for them
NOTING = """
import os, sys
sys.path.insert(0, os.getcwd())
import model_def
from shared.launch import main

class Noting(model_def.MMDetectionTrial):
    def losses(self, model, batch):
        total = float(batch.images.sum())
        os.write(1, f"BATCH {self.batches_trained} {batch.image_ids} {total:.0f}\\n".encode())
        return super().losses(model, batch)

Noting.__module__ = "model_def"
main(Noting)
"""


@pytest.mark.slow
def test_one_then_two_then_four_then_one_process_train_what_one_would(shapes, tmp_path):
    # no batch statistics, and losses that the library normalizes over all processes
    config = mmdet_config(
        shapes,
        "fcos/fcos_r50_caffe_fpn_gn-head_1x_coco.py",
        **{
            **SMALL_BACKBONE,
            **DENSE_HEAD,
            "model.bbox_head.norm_cfg": {"type": "GN", "num_groups": 8, "requires_grad": True},
            "model.backbone.norm_eval": True,
            "model.backbone.norm_cfg.requires_grad": False,
            "lr_config": {"_delete_": True, "policy": "fixed"},
        },
    )
    config["data"]["workers"] = 0
    config.update(scheduling_unit=1, min_validation_period={"batches": 100})
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    script = tmp_path / "noting.py"
    script.write_text(NOTING)

    def train(run, length, processes, *resume):
        arguments = ("train", tmp_path / "config.yaml", "--output-dir", tmp_path / run, *resume)
        done = run_model_def(
            *(*arguments, "--set", f"searcher.max_length.batches={length}"),
            processes=processes,
            cwd=ROOT / "mmdetection",
            env={"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"},
            script=script,
        )
        return [line.split("BATCH ")[1] for line in done.stdout.splitlines() if "BATCH " in line]

    def by_batch(lines):
        images, sums = collections.defaultdict(set), collections.defaultdict(float)
        for line in lines:
            number, rest = line.split(" ", 1)
            ids, total = rest.rsplit(" ", 1)
            images[int(number)] |= set(yaml.safe_load(ids))
            sums[int(number)] += float(total)
        return images, sums

    noted = train("elastic", 2, 1)
    for length, processes in ((4, 2), (6, 4), (8, 1)):
        noted += train("elastic", length, processes, "--resume", "last")
    alone = train("alone", 8, 1)

    (images, sums), (expected_images, expected_sums) = by_batch(noted), by_batch(alone)
    assert images == expected_images
    assert len(images) == 8
    assert dict(sums) == pytest.approx(dict(expected_sums), abs=os.cpu_count() * 2.0)  # rounded, each process its own
    ours = [report["metrics"]["loss"] for report in reports(tmp_path / "elastic", "train")]
    expected = [report["metrics"]["loss"] for report in reports(tmp_path / "alone", "train")]
    assert ours == pytest.approx(expected, rel=1e-4)
