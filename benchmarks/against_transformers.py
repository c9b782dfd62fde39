"""The DETR family here against a plain loop over transformers: its image processor and its model, a COCO data set as in
torchvision, PyTorch's loader, AdamW and the clipping of gradients. The same config, weights and batch size.
"""

import copy
import json
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from against import run
from command_line import ROOT, trial_class_of
from PIL import Image

DetrTrial = trial_class_of("detr")

# isort: split
import yaml

from coco_files import by_image, paths_of
from detr_files.optimizer import build_optimizer

NAME, TRIAL_CLASS = "transformers", DetrTrial
SMALL = FULL = {
    **yaml.safe_load((ROOT / "detr/bccd.yaml").read_text())["hyperparameters"],
    **{"horizontal_flip": 0.0, "model_ema_decay": None},
}


class Coco(torch.utils.data.Dataset):
    """Images and annotations, as the image processor takes them."""

    def __init__(self, folder: Path):
        annotations, self.folder = paths_of(folder, "train")
        coco = json.loads(annotations.read_text())
        self.images, self.objects = coco["images"], by_image(coco)
        labels = {category["id"]: label for label, category in enumerate(coco["categories"])}
        for each in coco["annotations"]:
            each["category_id"] = labels[each["category_id"]]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Image.Image, dict]:
        image = self.images[index]
        annotations = {"image_id": image["id"], "annotations": self.objects[image["id"]]}
        return Image.open(self.folder / image["file_name"]).convert("RGB"), annotations


def loop(trial: DetrTrial, folder: Path, workers: int, _: dict) -> Callable[[int], None]:
    """Trains as many batches as its argument."""
    processor, device = trial.processor, trial.context.device
    model = copy.deepcopy(trial.plain_model.detector).train()
    optimizer = build_optimizer(model, trial.hparams)

    def collate(samples: list[tuple[Image.Image, dict]]) -> dict:
        images, annotations = zip(*samples, strict=True)
        return processor(images=list(images), annotations=list(annotations), return_tensors="pt")

    loader = torch.utils.data.DataLoader(
        Coco(folder), trial.per_slot_batch_size, shuffle=True, num_workers=workers, collate_fn=collate, drop_last=True
    )
    endless = (batch for _ in iter(int, 1) for batch in loader)

    def train(count: int) -> None:
        for _ in range(count):
            batch = next(endless)
            labels = [{name: value.to(device) for name, value in each.items()} for each in batch["labels"]]
            loss = model(pixel_values=batch["pixel_values"].to(device), labels=labels).loss
            assert torch.isfinite(loss)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), trial.hparams.clip_grad)
            optimizer.step()

    return train


if __name__ == "__main__":
    run(sys.modules["__main__"])
