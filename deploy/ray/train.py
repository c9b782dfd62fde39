"""Trains on a Ray cluster. In a detector's folder:

    python3 ../deploy/ray/train.py 16 distributed.yaml --store s3://bucket/runs/a

Ray Train starts 16 workers, one per GPU, and starts all again if one fails. Each worker starts `model_def.py train`.
"""

import argparse
import ctypes
import importlib.util
import os
import signal
import socket
import subprocess
import sys

import ray
import torch.distributed
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer

_SET_PARENT_DEATH_SIGNAL = 1  # of prctl


def train_on_worker(config: dict) -> None:
    """Starts the process of one rank, which reads RANK and the other variables that Ray sets."""
    with socket.socket() as any_port:  # Ray's own group has MASTER_PORT
        any_port.bind(("", 0))
        port = [any_port.getsockname()[1]]
    torch.distributed.broadcast_object_list(port, src=0)
    done = subprocess.run(
        [sys.executable, "model_def.py", "train", *config["arguments"], "--resume", "auto"],
        cwd=os.path.dirname(importlib.util.find_spec("model_def").origin),  # Ray's copy of the folder
        env={**os.environ, "MASTER_PORT": str(port[0])},
        # if Ray kills the worker, the training saves and stops
        preexec_fn=lambda: ctypes.CDLL(None).prctl(_SET_PARENT_DEATH_SIGNAL, signal.SIGTERM),
    )
    if done.returncode:
        raise RuntimeError(f"model_def.py train ended with status {done.returncode}; its output says why")


def main() -> None:
    parser = argparse.ArgumentParser(description="Trains on a Ray cluster.")
    parser.add_argument("workers", type=int)
    parser.add_argument("--cpu", action="store_true", help="one process per core instead of one per GPU")
    arguments, of_train = parser.parse_known_args()
    ray.init(runtime_env={"working_dir": "."})
    TorchTrainer(
        train_on_worker,
        train_loop_config={"arguments": of_train},
        torch_config=TorchConfig(backend="gloo"),  # of Ray's own group; the training's uses the GPUs
        scaling_config=ScalingConfig(num_workers=arguments.workers, use_gpu=not arguments.cpu),
        run_config=RunConfig(failure_config=FailureConfig(max_failures=20)),
    ).fit()


if __name__ == "__main__":
    main()
