"""Settings of a full-scale training on miniatures, and what its tests do to it: stop it, give it a benchmark."""

import functools
from pathlib import Path

import fineweb

_ONE_PROCESS = {
    "dataset_config": None,
    "global_batch": 8,
    "dtype": "float32",
    "device": "cpu",
    "devices": 1,
    "strategy": "single",
}


def text_settings(kind: type, folder: Path, **changes):
    """`kind` (a chapter's settings of a full-scale training) for eight steps on 60 rows of text and a tokenizer, written to `folder`."""
    return kind(
        **{
            **_ONE_PROCESS,
            "dataset": str(fineweb.fineweb_rows(folder / "rows")),
            "tokenizer": str(fineweb.tokenizer(folder / "bpe")),
            "seq_len": 32,
            "micro_batch": 2,
            "steps": 8,
            "warmup": 2,
            "lr": 5e-3,
            "val_tokens": 512,
            "save_every": 4,
            "eval_every": 4,
            **changes,
        }
    )


def image_settings(kind: type, folder: Path, **changes):
    """`kind` for images: ten steps on 60 coloured pictures, written to `folder`."""
    return kind(
        **{
            **_ONE_PROCESS,
            "dataset": str(fineweb.cifar_rows(folder)),
            "micro_batch": 8,
            "steps": 10,
            "warmup": 2,
            "lr": 1e-2,
            "save_every": 0,
            "eval_every": 0,
            **changes,
        }
    )


class Stop(Exception):
    """The training was stopped by `stop_at_first_checkpoint`."""


def stop_at_first_checkpoint(launch, settings, folder: Path) -> None:
    """`launch(settings, folder)`, ended by an exception right after it has written its first checkpoint."""
    from papers10.core import checkpoint

    saved = checkpoint.save

    def save_and_die(*arguments, **options):
        saved(*arguments, **options)
        raise Stop

    checkpoint.save = save_and_die
    try:
        launch(settings, folder)
    except Stop:
        return
    finally:
        checkpoint.save = saved
    raise AssertionError("the training wrote no checkpoint")


def local_benchmark(folder: Path, monkeypatch) -> dict:
    """Settings for the lm-eval task `tiny_choice`; lm-eval reads no other task (its own index takes seconds)."""
    from lm_eval import tasks

    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(folder / "cache"))
    monkeypatch.setattr(tasks, "TaskManager", functools.partial(tasks.TaskManager, include_defaults=False))
    return {
        "eval_tasks": ["tiny_choice"],
        "task_folder": str(fineweb.multiple_choice_task(folder / "task")),
        "steps": 2,
        "warmup": 0,
    }
