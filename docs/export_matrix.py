"""Exports small detectors of each family in each format, and writes the table of docs/export.md.

    OMP_NUM_THREADS=1 .venv/bin/python docs/export_matrix.py --only 'EfficientDet|YOLOX' --formats onnx openvino

The weights are random. The checkpoint's most confident detections on ten images serve as ground truth. So its mAP is 1,
and that of a file shows what differs. Results are in docs/export_matrix.json. A run replaces those that it measures.
"""

import argparse
import importlib
import json
import re
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
import yaml
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = map(str, (ROOT, ROOT / "efficientdet", ROOT / "tests", *ROOT.glob("tests/*/")))
PAGE, NUMBERS = ROOT / "docs/export.md", ROOT / "docs/export_matrix.json"
BEGIN, END = "<!-- export matrix: begin -->", "<!-- export matrix: end -->"
FORMATS = ("onnx", "openvino", "torch", "raw")
_TRUTHS = 10  # of each image

# --- the table ----------------------------------------------------------------------------------------------


def table(results: dict[str, dict[str, dict]]) -> str:
    """The Markdown of the results, with the reasons below. A detector without results has no row."""
    results = {name: row for name, row in results.items() if row}
    if not results:
        return "No detector has been measured by this program yet."
    reasons = list(dict.fromkeys(c["reason"] for row in results.values() for c in row.values() if "reason" in c))
    lines = [f"| detector | {' | '.join(FORMATS)} |", "|---" * (len(FORMATS) + 1) + "|"]
    for name, row in results.items():
        cells = (_cell(row.get(each), reasons) for each in FORMATS)
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", *(f"{i}. {reason}" for i, reason in enumerate(reasons, 1))])


def _cell(found: dict | None, reasons: list[str]) -> str:
    if found is None:
        return "available"
    if "reason" in found:
        return f"blocked ({reasons.index(found['reason']) + 1})"
    return f"{found['map']:+.4f}, {found['matched']:.1%}, {found['time']:.2f}".replace("-0.0000", "+0.0000")


def with_table(page: str, results: dict[str, dict[str, dict]]) -> str:
    """The text of the page with the current table between its two markers."""
    pattern = re.compile(f"{re.escape(BEGIN)}.*{re.escape(END)}", re.DOTALL)
    assert pattern.search(page), f"{BEGIN} and {END} are missing"
    return pattern.sub(lambda _: f"{BEGIN}\n\n{table(results)}\n\n{END}", page)


# --- the detectors ------------------------------------------------------------------------------------------


def detectors(shapes: Path) -> Iterator[tuple[str, str, Callable[[], dict]]]:
    """Name, detector's folder, and a function that makes the experiment config."""
    from tiny_detectron2 import detectron2_config
    from tiny_detr import DETR_TYPES, detr_config
    from tiny_efficientdet import config as efficientdet_config
    from tiny_mmdetection import DENSE_HEAD, SMALL_BACKBONE, TINY, mmdet_config

    for i in range(8):
        yield f"EfficientDet-D{i}", "efficientdet", lambda i=i: _efficientdet(efficientdet_config(shapes), i)
    scales = {f"data.{split}.pipeline.1.img_scale": [128, 128] for split in ("val", "test")}
    groups = {"model.bbox_head.norm_cfg": {"type": "GN", "num_groups": 8, "requires_grad": True}}
    small = {**SMALL_BACKBONE, **DENSE_HEAD}
    one_width = {**scales, "model.backbone.init_cfg": None}
    for name, file, changes in (
        ("RetinaNet", "retinanet/retinanet_r50_fpn_1x_coco", None),
        ("FSAF", "fsaf/fsaf_r50_fpn_1x_coco", small),
        ("FreeAnchor", "free_anchor/retinanet_free_anchor_r50_fpn_1x_coco", small),
        ("PISA", "pisa/pisa_retinanet_r50_fpn_1x_coco", small),
        ("GHM", "ghm/retinanet_ghm_r50_fpn_1x_coco", small),
        ("GFL", "gfl/gfl_r50_fpn_1x_coco", None),
        ("FCOS", "fcos/fcos_r50_caffe_fpn_gn-head_1x_coco", {**small, **groups}),
        ("ATSS", "atss/atss_r50_fpn_1x_coco", {**small, **groups}),
        ("AutoAssign", "autoassign/autoassign_r50_fpn_8x2_1x_coco", one_width),
        ("YOLOF", "yolof/yolof_r50_c5_8x8_1x_coco", one_width),
        ("SSD", "ssd/ssd300_coco", {"model.backbone.init_cfg": None}),
        ("YOLOX", "yolox/yolox_tiny_8x8_300e_coco", scales),
        ("Faster R-CNN", "faster_rcnn/faster_rcnn_r50_fpn_1x_coco", None),
        ("Mask R-CNN", "mask_rcnn/mask_rcnn_r50_fpn_1x_coco", None),
        ("Cascade R-CNN", "cascade_rcnn/cascade_rcnn_r50_fpn_1x_coco", one_width),
        ("FoveaBox", "foveabox/fovea_r50_fpn_4x4_1x_coco", one_width),
        ("TOOD", "tood/tood_r50_fpn_1x_coco", one_width),
        ("VFNet", "vfnet/vfnet_r50_fpn_1x_coco", one_width),
        ("SOLO", "solo/solo_r50_fpn_1x_coco", one_width),
        ("YOLACT", "yolact/yolact_r50_1x8_coco", {"model.backbone.init_cfg": None}),
    ):
        given = TINY[f"{file}.py"] if changes is None else changes
        yield f"MMDetection: {name}", "mmdetection", lambda f=file, c=given: mmdet_config(shapes, f"{f}.py", **c)
    for name, file in (
        ("RetinaNet", "COCO-Detection/retinanet_R_50_FPN_1x.yaml"),
        ("Faster R-CNN", "COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml"),
        ("Mask R-CNN", "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.yaml"),
        ("Mask R-CNN, C4", "COCO-InstanceSegmentation/mask_rcnn_R_50_C4_1x.yaml"),
        ("Cascade Mask R-CNN", "Misc/cascade_mask_rcnn_R_50_FPN_1x.yaml"),
        ("FCOS", "COCO-Detection/fcos_R_50_FPN_1x.py"),
        ("RPN", "COCO-Detection/rpn_R_50_FPN_1x.yaml"),
    ):
        yield f"Detectron2: {name}", "detectron2", lambda f=file: detectron2_config(shapes, f)
    for kind in DETR_TYPES:
        yield f"detr: {kind}", "detr", lambda k=kind: detr_config(shapes, k)


def _efficientdet(config: dict, number: int) -> dict:
    del config["hyperparameters"]["backbone"], config["hyperparameters"]["model_config"]
    prefix = "tf_" if number > 5 else ""  # effdet has D6 and D7 with TensorFlow's padding alone
    config["hyperparameters"]["model"] = f"{prefix}efficientdet_d{number}"
    return config


def with_random_weights(trial_class: type) -> type:
    """The trial with scores between 0 and 1 that differ: equal ones would be in any order."""

    class Random(trial_class):
        def build_model(self) -> torch.nn.Module:
            model = super().build_model()
            torch.manual_seed(0)
            for name, parameter in model.named_parameters():
                of_class = re.search("cls|class_|conv_obj|objectness", name)
                of_class = of_class and not re.search("_convs|_rep|_subnet", name)  # inner layers
                if hasattr(self, "processor"):  # detr
                    if name.endswith("class_embed.bias"):
                        parameter.data.zero_()
                    parameter.data.add_(0.1 * torch.randn_like(parameter))
                elif of_class and name.endswith("bias"):
                    parameter.data.normal_(2 if "conv_obj" in name else -2, 1)
                elif re.search(r"(fc_cls|predictor\.cls_score|objectness_logits|rpn_cls)\.weight$", name):
                    parameter.data.mul_(20)
            if hasattr(self, "predictors"):  # EfficientDet
                network, size = self.detector(model), self.inputs["input_size"][-2:]
                images = (_images(self.data.val.images, size) - self.mean) / self.std
                _set_statistics(network, network, images)
                _set_deviation(network, images)
            elif hasattr(model, "backbone"):
                mean, std = (getattr(model, f"pixel_{name}", usual) for name, usual in (("mean", 128), ("std", 64)))
                _set_statistics(model, model.backbone, (_images(self.data.val.images, (128, 128)) - mean) / std)
            return model

        def check_pretrained(self) -> None:
            pass

    Random.__module__ = trial_class.__module__
    return Random


def _images(folder: str, size: tuple[int, int]) -> torch.Tensor:
    """(N, 3, height, width) uint8: all images of a folder, stretched."""
    opened = (Image.open(path).convert("RGB").resize(size[::-1]) for path in sorted(Path(folder).glob("*.png")))
    return torch.from_numpy(np.stack([np.asarray(image).transpose(2, 0, 1) for image in opened]))


def _set_statistics(model: torch.nn.Module, part: torch.nn.Module, images: torch.Tensor) -> None:
    """The part's batch norms get the mean and variance of what they see in these images. With 0 and 1, the activations
    of a deep network vanish or explode: its scores are ties, and their order is chance."""

    def measure(norm: torch.nn.Module, given: tuple[torch.Tensor]) -> None:
        norm.running_mean.copy_(given[0].mean((0, 2, 3)))
        norm.running_var.copy_(given[0].var((0, 2, 3)))

    model.eval()
    hooks = [each.register_forward_pre_hook(measure) for each in part.modules() if hasattr(each, "running_var")]
    with torch.no_grad():
        part(images)
    for hook in hooks:
        hook.remove()


def _set_deviation(network: torch.nn.Module, images: torch.Tensor) -> None:
    """The outputs of an EfficientDet get a deviation of at most 1, so that its scores are not all 0 or 1."""
    with torch.no_grad():
        for head, outputs in zip((network.class_net, network.box_net), network(images), strict=True):
            head.predict.conv_pw.weight /= max(level.std() for level in outputs)


# --- a run --------------------------------------------------------------------------------------------------


def measure(detector: str, config: dict, folder: Path, names: list[str]) -> Iterator[tuple[str, dict]]:
    """Of each format, what `export` reports, or why it refuses."""
    from conftest import run_command

    from shared.commands.export import export
    from shared.errors import UserError

    trial_class = with_random_weights(importlib.import_module(f"tiny_{detector}").trial_class())
    path = folder / "config.yaml"
    try:
        config["data"]["val"]["annotations"] = own_truth(trial_class, config, folder)
    except UserError as error:
        yield from ((name, {"reason": _reason(error)}) for name in FORMATS)
        return
    path.write_text(yaml.safe_dump(config))
    for name in names:
        given = {"format": "onnx" if name == "raw" else name, "raw": name == "raw", "output": folder / name}
        given |= {"images": None, "tolerance": 1.0, "precision": "float32", "checkpoint": None}
        try:
            run_command(export, trial_class, path, **given)
        except UserError as error:
            if error.__cause__ is not None:  # no refusal, but a fault
                traceback.print_exception(error.__cause__, limit=-12)
            yield name, {"reason": _reason(error)}
            continue
        numbers = json.loads((folder / name / "export.json").read_text())
        apart, (of_checkpoint, of_file) = numbers["differences"], numbers["sides"].values()
        worst = max((each["metrics"][0] for each in numbers["comparisons"]), key=lambda m: abs(m["b"] - m["a"]))
        yield (
            name,
            {
                "map": round(worst["b"] - worst["a"], 5),
                "matched": apart["matched"] / max(apart["detections"], 1),
                "detections": apart["detections"],
                "time": round(of_checkpoint["images_per_second"] / of_file["images_per_second"], 3),
            },
        )


def _reason(error: Exception) -> str:
    return re.sub(r"^[\w. -]+: ", "", str(error)).partition(" Fix:")[0].rstrip(".") + "."


def own_truth(trial_class: type, config: dict, folder: Path) -> str:
    """The detector's most confident detections, as annotations. Raises UserError if the detector cannot be exported."""
    from shared.commands.detection import detect_all, detecting_trial
    from shared.config.experiment import read_experiment
    from shared.evaluation.detections import to_coco_results
    from shared.training.meeting import local_processes

    path = folder / "first.yaml"
    path.write_text(yaml.safe_dump(config))
    experiment = read_experiment(path, [], trial_class.sections())
    with local_processes() as processes, detecting_trial(trial_class, experiment, None, processes) as trial:
        trial.exportable()
        data = trial.open_val()
        ids = [category["id"] for category in data.categories]
        found = [each for _, batch in detect_all(trial, data, in_process=True) for each in batch]
    rows = [row for each in found for row in to_coco_results(each, ids) if min(row["bbox"][2:]) > 1]
    rows = sorted(rows, key=lambda row: -row["score"])[: _TRUTHS * len(found)]
    coco = json.loads(Path(config["data"]["val"]["annotations"]).read_text())
    coco["annotations"] = [
        {**row, "id": i, "area": float(np.prod(row["bbox"][2:])), "iscrowd": 0} for i, row in enumerate(rows, 1)
    ]
    (folder / "val.json").write_text(json.dumps(coco))
    return str(folder / "val.json")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", metavar="REGEX", help="the detectors to measure")
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=FORMATS)
    given = parser.parse_args()
    from shared.data import synthetic

    results = json.loads(NUMBERS.read_text()) if NUMBERS.exists() else {}
    with tempfile.TemporaryDirectory() as place:
        shapes = Path(place) / "shapes"
        synthetic.write(shapes, train=4, val=10)
        every = list(detectors(shapes))
        results = {name: results.get(name, {}) for name, _, _ in every}  # in this order
        for name, detector, make in every:
            if not re.search(given.only, name):
                continue
            with tempfile.TemporaryDirectory() as folder:
                try:
                    for format_name, found in measure(detector, make(), Path(folder), given.formats):
                        results[name][format_name] = found
                        print(f"{name}, {format_name}: {found}", file=sys.stderr, flush=True)
                        NUMBERS.write_text(json.dumps(results, indent=1) + "\n")
                except Exception:  # one that cannot be built must not stop the others
                    traceback.print_exc()
    PAGE.write_text(with_table(PAGE.read_text(), results))


if __name__ == "__main__":
    main()
