"""Submits experiments with Hydra.

python3 hydra/submit.py                                                    # const.yaml
python3 hydra/submit.py experiment=gfl hyperparameters.global_batch_size=8
python3 hydra/submit.py --multirun hyperparameters.global_batch_size=8,16  # an experiment each
python3 hydra/submit.py searcher=adaptive hyperparameters.global_batch_size="{type: categorical, vals: [8, 16]}"
python3 hydra/submit.py --cfg job                                          # only shows what would be submitted
"""

from __future__ import annotations

from pathlib import Path

import hydra
from determined.experimental import client
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf

_FOLDER = Path(__file__).parent.parent
for file in _FOLDER.glob("*.yaml"):
    ConfigStore.instance().store(file.stem, OmegaConf.load(file), group="experiment", package="_global_")


@hydra.main(version_base="1.3", config_path="configs", config_name="config")
def submit(config: DictConfig) -> None:
    """Creates the experiment on the cluster that DET_MASTER names."""
    experiment = client.create_experiment(OmegaConf.to_container(config, resolve=True), _FOLDER)
    print(f"Created experiment {experiment.id}")


if __name__ == "__main__":
    submit()
