#!/usr/bin/env bash
# Makes a Determined container ready. Determined *sources* this under `set -ex`, in every container and at each
# restart: nothing here may exit, and what is there already must cost no time. Where mmcv-full does not import, it is
# compiled, which takes minutes at every start: docker/Dockerfile makes an image that has it.
python3 -m shared.container --on-torch mmdet==2.28.2 \
    --plain addict opencv-python-headless packaging scipy six terminaltables yapf \
    --build mmcv-full==1.7.2 mmcv.ops
