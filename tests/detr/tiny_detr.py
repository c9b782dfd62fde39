"""Small transformers models, and what the tests of all detectors need to know about them."""

import functools
import json
from pathlib import Path

from tiny_experiment import experiment, load_model_def

# by model type
_SMALL_ENDS = {"embedding_size": 8, "hidden_sizes": [8, 16, 16, 16], "depths": [1, 1, 1, 1]}
_STAGES = {"out_features": ["stage2", "stage3", "stage4"]}
_RT_DETR_RESNET = {"model_type": "rt_detr_resnet", **_SMALL_ENDS, "layer_type": "basic", **_STAGES}
_RESNET = {"model_type": "resnet", **_SMALL_ENDS, "layer_type": "basic", **_STAGES}
_HGNET = {
    "model_type": "hgnet_v2",
    **_SMALL_ENDS,
    **_STAGES,
    "stem_channels": [3, 8, 8],
    "stage_in_channels": [8, 8, 16, 16],
    "stage_mid_channels": [8, 8, 8, 8],
    "stage_out_channels": [8, 16, 16, 16],
    "stage_num_blocks": [1, 1, 1, 1],
    "stage_numb_of_layers": [1, 1, 1, 1],
}
_WINDOWED = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 128,
    "patch_size": 16,
    "out_features": ["stage1", "stage2"],
}
_DINO = {"model_type": "rf_detr_dinov2", **_WINDOWED, "num_windows": 2}
_VIT = {
    "model_type": "lw_detr_vit",
    **_WINDOWED,
    "pretrain_image_size": 128,
    "num_windows": 4,
    "window_block_indices": [0],
}
_RT_DETR = {
    "freeze_backbone_batch_norms": False,
    "encoder_hidden_dim": 32,
    "encoder_in_channels": [16, 16, 16],
    "encoder_ffn_dim": 32,
    "encoder_attention_heads": 2,
    "d_model": 32,
    "num_queries": 20,
    "decoder_in_channels": [32, 32, 32],
    "decoder_ffn_dim": 32,
    "decoder_layers": 2,
    "decoder_attention_heads": 2,
    "num_denoising": 10,
}
_DETR = {
    "encoder_layers": 1,
    "decoder_layers": 2,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "num_queries": 20,
    "backbone_config": _RESNET,
}
_LW_DETR = {
    "d_model": 32,
    "decoder_layers": 2,
    "decoder_ffn_dim": 32,
    "decoder_self_attention_heads": 2,
    "decoder_cross_attention_heads": 2,
    "num_queries": 20,
    "group_detr": 2,
}
DETR_TYPES = {
    "rt_detr_v2": {**_RT_DETR, "backbone_config": _RT_DETR_RESNET},
    "rt_detr": {**_RT_DETR, "backbone_config": _RT_DETR_RESNET},
    "d_fine": {**_RT_DETR, "backbone_config": _HGNET, "lqe_hidden_dim": 8},
    "deimv2": {**_RT_DETR, "backbone_config": _HGNET, "lqe_hidden_dim": 8},
    "detr": {**_DETR, "d_model": 32, "auxiliary_loss": True},
    "conditional_detr": {**_DETR, "d_model": 32, "auxiliary_loss": True},
    "dab-detr": {**_DETR, "hidden_size": 32, "auxiliary_loss": True},
    "deformable_detr": {**_DETR, "d_model": 32, "auxiliary_loss": True, "disable_custom_kernels": True},
    "lw_detr": {**_LW_DETR, "backbone_config": _VIT, "projector_scale_factors": [1.0]},
    "rf_detr": {**_LW_DETR, "backbone_config": _DINO},
    "yolos": {
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "image_size": [128, 128],
        "num_detection_tokens": 20,
    },
}


def detr_config(shapes: Path, model_type: str = "rt_detr_v2", **changes: object) -> dict:
    """The same for one of transformers' model types."""
    return experiment(
        shapes,
        {
            "global_batch_size": 4,
            "config": {"model_type": model_type, **DETR_TYPES[model_type], **changes},
            "processor": {"size": {"height": 128, "width": 128}},
            "lr": 0.001,
            "backbone_lr": None,
        },
    )


def trial_class() -> type:
    return load_model_def("detr").DetrTrial


config = detr_config
HAS_TESTS_OF_ITS_OWN = True  # for most promises
SMALL_RATE = {"lr": 0.00002}
FROZEN = "model.backbone.model.encoder.stages.1"
BYTES_OF_AN_IMAGE = (3 * 640 * 640 * 4, 3 * 640 * 640 * 4)  # float32
SMALL_POINT = {
    "model": None,
    "config": {"model_type": "rt_detr_v2", **DETR_TYPES["rt_detr_v2"]},
    "processor": {"size": {"height": 128, "width": 128}},
    "weights": None,
    "global_batch_size": 4,
}
WEIGHT_DECAY_AND_RATE = {"weight_decay": 0.3, "lr": 0.0004}
_TERMS = {"d_fine": "vfl", "deimv2": "mal", "deformable_detr": "ce", "lw_detr": "ce", "rf_detr": "ce"}
WEIGHTED_LOSSES = {"": (detr_config, ["loss_vfl"])} | {
    name: (functools.partial(detr_config, model_type=name), [f"loss_{term}"]) for name, term in _TERMS.items()
}
TRAINS_WITHOUT_OBJECTS = True


def import_library() -> None:
    from transformers import is_torch_available

    if not is_torch_available():
        raise ImportError("it needs torch 2.6")


def losses_by_hand(trial, path, images):
    """Losses of transformers' image processor and training model, with batch norm in evaluation mode."""
    import torch
    from PIL import Image

    from shared.data.dataset import seed_all

    model = trial.evaluation_model.detector.train()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eval()
    coco = json.loads(path.read_text())
    for image in coco["images"]:
        of_image = [
            {**a, "category_id": a["category_id"] - 1} for a in coco["annotations"] if a["image_id"] == image["id"]
        ]
        pixels = Image.open(images / image["file_name"]).convert("RGB")
        target = {"image_id": image["id"], "annotations": of_image}
        inputs = trial.processor(images=pixels, annotations=target, return_tensors="pt")
        seed_all(trial.seed, image["id"], 3)  # the noise of its denoising queries
        outputs = model(pixel_values=inputs["pixel_values"], labels=inputs["labels"])
        terms = ("loss_vfl", "loss_bbox", "loss_giou")
        yield {"loss": outputs.loss.item(), **{name: outputs.loss_dict[name].item() for name in terms}}
