"""Settings of a full-scale training on miniatures, and what its tests do to it: stop it, run it in two processes, give it a benchmark."""

import functools
import multiprocessing
import os
import socket
from pathlib import Path

import fineweb


def text_settings(kind: type, folder: Path, **changes):
    """`kind` (a chapter's settings of a full-scale training) for eight steps on 60 rows of text and a tokenizer, written to `folder`."""
    return kind(
        **{
            "dataset": str(fineweb.fineweb_rows(folder / "rows")),
            "dataset_config": None,
            "tokenizer": str(fineweb.tokenizer(folder / "bpe")),
            "seq_len": 32,
            "global_batch": 8,
            "micro_batch": 2,
            "steps": 8,
            "warmup": 2,
            "lr": 5e-3,
            "dtype": "float32",
            "device": "cpu",
            "val_tokens": 512,
            "save_every": 4,
            "eval_every": 4,
            "devices": 1,
            "strategy": "single",
            **changes,
        }
    )


def image_settings(kind: type, folder: Path, **changes):
    """`kind` for images: ten steps on 60 coloured pictures, written to `folder`."""
    return kind(
        **{
            "dataset": str(fineweb.cifar_rows(folder)),
            "dataset_config": None,
            "global_batch": 8,
            "micro_batch": 8,
            "steps": 10,
            "warmup": 2,
            "lr": 1e-2,
            "dtype": "float32",
            "device": "cpu",
            "save_every": 0,
            "eval_every": 0,
            "devices": 1,
            "strategy": "single",
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


def _worker(train, settings, folder, rank, size, port):
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "MASTER_PORT": port}
    os.environ.update({"MASTER_ADDR": "127.0.0.1", **{name: str(value) for name, value in place.items()}})
    import torch

    from papers10.core import distributed

    torch.set_num_threads(1)  # OpenMP's threads do not survive a fork
    train(settings, folder)
    distributed.finish()


def train_in_processes(train, settings, folder: Path, size: int = 2) -> None:
    """`train(settings, folder)` in `size` forked processes, each with the environment that a launcher gives it.

    The launcher itself is tested with `lm.pretraining`; forks spare every process the imports.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    fork = multiprocessing.get_context("fork")
    workers = [fork.Process(target=_worker, args=(train, settings, folder, rank, size, port)) for rank in range(size)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(120)
    codes = [worker.exitcode for worker in workers]
    for worker in workers:
        worker.kill()
    assert codes == [0] * size, f"exit codes {codes}"


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
