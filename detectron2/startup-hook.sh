#!/usr/bin/env bash
# Makes a Determined container ready. Determined *sources* this under `set -ex`, in every container and at each
# restart: nothing here may exit, and what is there already must cost no time. Where Detectron2 does not import, it is
# compiled, which takes minutes at every start: docker/Dockerfile makes an image that has it.
python3 -m shared.container --plain black cloudpickle 'fvcore<0.1.6' hydra-core 'iopath<0.1.10' termcolor yacs \
    --build 'detectron2@git+https://github.com/facebookresearch/detectron2.git' detectron2._C
