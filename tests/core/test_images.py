"""Batches of labelled images: order, resume, processes, folders, refusals."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "miniatures"))
import fineweb

from papers10.core import images
from papers10.core.data import DataMissing, LicenceNotAccepted, dataset_rows
from papers10.core.images import ImageRows, image_rows, load_images, score_images

datasets = pytest.importorskip("datasets")


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    return image_rows(str(fineweb.cifar_rows(tmp_path_factory.mktemp("rows"))))


def test_each_image_comes_once_an_epoch_and_a_saved_place_goes_on(rows):
    training, held_out = rows
    assert (len(training), len(held_out), images.class_count(training)) == (48, 12, 3)
    batches = ImageRows(training, 8, 16, seed=1)
    first = [next(batches) for _ in range(3)]
    assert sorted(torch.cat([labels for _, labels in first]).tolist()) == sorted(training["label"])
    again = ImageRows(training, 8, 16, seed=1)
    again.load_state_dict(batches.state_dict())
    for a, b in zip(next(batches), next(again), strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(next(ImageRows(training, 8, 16, seed=2))[0], first[0][0])


def test_two_processes_share_a_batch(rows, monkeypatch):
    whole = next(ImageRows(rows[0], 8, 6, seed=0))
    monkeypatch.setattr(images.distributed, "world_size", lambda: 2)
    for rank in (0, 1):
        monkeypatch.setattr(images.distributed, "rank", lambda rank=rank: rank)
        part = next(ImageRows(rows[0], 8, 6, seed=0))
        assert torch.equal(part[0], whole[0][rank::2]) and torch.equal(part[1], whole[1][rank::2])


def test_pixels_lie_between_minus_one_and_one(rows):
    pictures, labels = load_images(rows[0], [0, 5], 20)
    assert (
        pictures.shape == (2, 3, 20, 20)
        and pictures.min() >= -1
        and pictures.max() <= 1
        and labels.dtype == torch.int64
    )


def test_scores_of_a_perfect_reader(rows):
    brightest = lambda pictures: 50 * torch.nn.functional.one_hot(pictures.mean((2, 3)).argmax(1), 3).float()
    model = torch.nn.Module()
    model.forward, model.weight = brightest, torch.nn.Parameter(torch.zeros(1))
    scores = score_images(model, rows[1], 8, 5)
    assert scores["accuracy"] == 1.0 and scores["val_loss"] < 1e-6


def test_folders_with_one_subfolder_a_class(tmp_path):
    from PIL import Image

    for part in ("train", "val"):
        for name in ("cat", "dog"):
            (tmp_path / part / name).mkdir(parents=True)
            Image.new("RGB", (4, 4), (250, 0, 0) if name == "cat" else (0, 0, 250)).save(
                tmp_path / part / name / "0.png"
            )
    training, held_out = image_rows(str(tmp_path))
    assert training.features["label"].names == ["cat", "dog"] and len(held_out) == 2
    assert load_images(training, [0], 4)[0].shape == (1, 3, 4, 4)


def test_refusals(rows, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="expected at least 100 images, got 48"):
        ImageRows(rows[0], 8, 100, seed=0)
    with pytest.raises(ValueError, match="img or image, and label"):
        load_images(rows[0].rename_column("img", "picture"), [0], 8)
    with pytest.raises(DataMissing, match=r"train/ and val/"):
        image_rows(str(tmp_path))
    with pytest.raises(DataMissing, match="image-net.org"):
        image_rows("imagenet21k")
    monkeypatch.setenv("PAPERS10_OFFLINE", "1")
    with pytest.raises(DataMissing, match="uoft-cs/cifar10: PAPERS10_OFFLINE"):
        image_rows("cifar10")


def test_errors_of_the_hub_name_id_reason_and_what_to_give(monkeypatch, tmp_path):
    def fail(error):
        def load(*_, **__):
            raise error

        return load

    for error, kind, reason in (
        (datasets.exceptions.DatasetNotFoundError("is a gated dataset"), LicenceNotAccepted, "gated"),
        (datasets.exceptions.DatasetNotFoundError("doesn't exist"), DataMissing, "missing"),
        (ConnectionError("no route"), DataMissing, "no route"),
    ):
        monkeypatch.setattr(datasets, "load_dataset", fail(error))
        with pytest.raises(kind, match=f"owner/rows: .*{reason}.*give FILE"):
            dataset_rows("owner/rows", instead="give FILE")
    with pytest.raises(FileNotFoundError, match="expected an existing file or a hub id"):
        dataset_rows(tmp_path / "absent.jsonl")
    (tmp_path / "rows.csv").write_text("a,b\n")
    with pytest.raises(ValueError, match=r"\.parquet, \.json or \.jsonl"):
        dataset_rows(tmp_path / "rows.csv")
