"""A mistake on the command line is one line with a fix, before torch is loaded."""

import json
import sys
import unicodedata

import pytest
import yaml
from conftest import ROOT

from efficientdet_hyperparameters import EfficientDetHyperparameters
from shared.config.experiment import Sections
from shared.launch import read_command


@pytest.fixture
def looked(monkeypatch, shapes, tmp_path):
    """Parses a command line as a model_def.py does first, beside a config of the shapes. Returns the error line, or
    None."""
    monkeypatch.chdir(tmp_path)
    data = {
        split: {"annotations": str(shapes / f"annotations/{split}.json"), "images": str(shapes / split)}
        for split in ("train", "val")
    }
    config = {"data": data, "hyperparameters": {"lr": 0.1}, "searcher": {"name": "single", "max_length": {"epochs": 1}}}
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(config))

    def call(command="train", config="c.yaml", *arguments):
        monkeypatch.setattr(sys, "argv", ["model_def.py", command, str(config), *map(str, arguments)])
        try:
            read_command("__main__", Sections(EfficientDetHyperparameters))
        except SystemExit as ended:
            return ended.code
        return None

    return call


def test_a_sound_command_line_passes(looked):
    assert looked() is None
    assert looked("check") is None


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("lr=0.1", "'lr' is a key of hyperparameters. Fix: --set hyperparameters.lr=0.1"),
        (
            "warmup_epoch=1",
            "'warmup_epoch' is not a key of an experiment config; did you mean 'hyperparameters.warmup_epo",
        ),
        ("workers=2", "'workers' is a key of data. Fix: --set data.workers=2"),
        ("max_length.batches=2", "'max_length' is a key of searcher. Fix: --set searcher.max_length.batches=2"),
        ("hyperparameters.amp=true", "hyperparameters.amp: true is unknown. Fix: use one of bf16, fp16, null"),
        (
            "hyperparameters.class_weights=equal",
            "hyperparameters.class_weights: 'equal' is unknown. Fix: use one of balanced, {name: number}, null",
        ),
        (
            "hyperparameters.clip_mode=l2",
            "hyperparameters.clip_mode: 'l2' is unknown. Fix: use one of norm, value, agc",
        ),
        ("hyperparameters.warmup_epoch=1", "unknown key 'warmup_epoch'; did you mean 'warmup_epochs'?"),
        ("searcher.metrc=bbox_mAP", "searcher: unknown key 'metrc'; did you mean 'metric'?"),
        ("searcher.smaller_is_better=true", "a larger 'bbox_mAP' is better. Fix: write false"),
        ("hyperparameters.fast_images=true", "fast_images: it is a key of data. Fix: write data.fast_images"),
        ("data.mosaic=1", "data.mosaic: it is a key of data.augment. Fix: write data.augment.mosaic"),
        (
            "foo=1",
            "'foo' is not a key of an experiment config. Fix: `python3 model_def.py --help-config` lists all keys",
        ),
        ("data.train.images=$NOWHERE/x", "data.train.images: the variable $NOWHERE of $NOWHERE/x is not set"),
    ],
)
def test_a_wrong_override_is_an_error_with_a_suggestion(looked, override, line):
    assert line in looked("train", "c.yaml", "--set", override)


def test_a_file_that_is_no_config_is_an_error_that_says_what_it_is(looked, shapes, tmp_path):
    assert "looks like an annotation file. Fix: give an experiment config" in looked(
        config=shapes / "annotations/train.json"
    )
    assert "is a folder. Fix: give the experiment config itself: c.yaml" in looked(config=tmp_path)
    assert "c.yml does not exist; did you mean" in looked(config="c.yml")
    line = looked(config=ROOT / "mmdetection/const.yaml")
    assert "const.yaml is another detector's: this one has no hyperparameters" in line
    (tmp_path / "large.yaml").write_text("#" * 2**21)
    assert "is not an experiment config: it has 2 MiB" in looked(config="large.yaml")


def test_an_error_about_a_path_suggests_a_similar_one(looked, shapes, tmp_path):
    def line_for(path):
        return looked("train", "c.yaml", "--set", f"data.val.images={path}")

    assert line_for(shapes / "vall").endswith(f"/vall does not exist; did you mean {shapes}/val?")
    assert line_for(shapes / "VAL").endswith(f"did you mean {shapes}/val?")
    (tmp_path / unicodedata.normalize("NFD", "Zähler")).mkdir()
    assert "did you mean" in line_for(tmp_path / unicodedata.normalize("NFC", "Zähler"))
    (tmp_path / "outer/inner/val").mkdir(parents=True)
    assert line_for(tmp_path / "outer/val").endswith(f"did you mean {tmp_path}/outer/inner/val?")
    assert f"{shapes} has no zzz" in line_for(shapes / "zzz/val")


def test_an_error_about_a_path_suggests_no_file_by_its_ending(looked, tmp_path):
    assert f"cells.yaml does not exist; {tmp_path} has no cells.yaml. Fix" in looked(config="cells.yaml")


def test_paths_may_have_a_tilde_a_variable_or_be_beside_the_yaml_file(looked, shapes, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(shapes))
    monkeypatch.setenv("SHAPES", str(shapes))
    assert (
        looked("train", "c.yaml", "--set", "data.val.images=~/val", "--set", "data.train.images=$SHAPES/train") is None
    )
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "pictures").symlink_to(shapes / "val")
    (elsewhere / "d.yaml").write_text((tmp_path / "c.yaml").read_text().replace(str(shapes / "val"), "pictures"))
    assert looked("train", "elsewhere/d.yaml") is None


def test_a_checkpoint_named_only_best_is_an_error_that_names_a_run(looked, tmp_path):
    assert "--checkpoint: best is not a checkpoint" in looked("evaluate", "c.yaml", "--checkpoint", "best")
    of_run = tmp_path / "runs/a/checkpoints/best"
    of_run.mkdir(parents=True)
    line = looked("evaluate", "c.yaml", "--checkpoint", "best")
    assert "of the newest run here runs/a/checkpoints/best" in line
    assert "--resume best: it needs a run. Fix: name the run's folder with --output-dir" in looked(
        "train", "c.yaml", "--resume", "best"
    )
    assert "--resume auto: it needs a run. Fix: name the run's folder with --output-dir" in looked(
        "train", "c.yaml", "--resume", "auto"
    )


def test_a_score_in_percent_is_refused(looked, capsys):
    assert looked("predict", "c.yaml", "--images", "a", "--output", "b", "--min-score", "50") == 2
    assert "--min-score: 50 is neither between 0 and 1, nor `best`" in capsys.readouterr().err


def test_a_run_s_folder_is_not_written_over(looked, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/metrics.jsonl").write_text(json.dumps({}))
    assert "holds a run already. Fix: add `--resume last`" in looked("train", "c.yaml", "--output-dir", "run")


@pytest.mark.parametrize(
    ("key", "shown"),
    [
        ("lr", "default: 0.01, upstream: --lr"),
        ("data.workers", "default: 4, ≥ 0"),
        ("amp", "one of `bf16`, `fp16`"),
        ("searcher.max_length", "length of the training"),
        ("data.augment.mosaic", "the probability of combining"),
        ("min_validation_period", "how often to validate"),
        ("patience", "hyperparameters.early_stopping.patience"),
    ],
)
def test_help_config_explains_a_key(key, shown, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["model_def.py", "--help-config", key])
    with pytest.raises(SystemExit) as ended:
        read_command("__main__", Sections(EfficientDetHyperparameters))
    assert not ended.value.code
    assert shown in capsys.readouterr().out


@pytest.mark.parametrize(
    ("key", "near"),
    [
        ("learning_rate", "hyperparameters.lr"),
        ("searcher.metrik", "searcher.metric"),
        ("data.augment.mozaic", "data.augment.mosaic"),
    ],
)
def test_help_config_names_the_nearest_key(key, near, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["model_def.py", "--help-config", key])
    with pytest.raises(SystemExit, match=f"there is no key '{key}'; did you mean '{near}'"):
        read_command("__main__", Sections(EfficientDetHyperparameters))
