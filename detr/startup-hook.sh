#!/usr/bin/env bash
# Makes a Determined container ready. Determined *sources* this under `set -ex`, in every container and at each
# restart: nothing here may exit, and what is there already must cost no time.
python3 -m shared.container
