"""Builders of tiny files in the formats of long-text data: LAMBADA, the Pile, LongBench, LongCrawl64."""

import json
import zipfile
from pathlib import Path

import numpy as np


def _parquet(path: Path, records: list[dict], schema) -> None:
    import pyarrow
    import pyarrow.parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records, schema=schema), path)


def lambada(folder: Path, texts: dict[str, list[str]]) -> Path:
    """The folder of cimec/lambada: plain_text/SPLIT-00000-of-00001.parquet with the columns text and domain."""
    import pyarrow

    schema = pyarrow.schema([("text", pyarrow.string()), ("domain", pyarrow.string())])
    for split, documents in texts.items():
        records = [{"text": text, "domain": "Fantasy" if split == "train" else None} for text in documents]
        _parquet(folder / "plain_text" / f"{split}-00000-of-00001.parquet", records, schema)
    return folder


def pile(folder: Path, documents: list[tuple[str, str]]) -> Path:
    """The folder of monology/pile-uncopyrighted-parquet: text and meta.pile_set_name, from (domain, text) pairs."""
    import pyarrow

    meta = pyarrow.struct([("pile_set_name", pyarrow.string())])
    schema = pyarrow.schema([("text", pyarrow.string()), ("meta", meta)])
    records = [{"text": text, "meta": {"pile_set_name": domain}} for domain, text in documents]
    _parquet(folder / "data" / "train-00000-of-00987.parquet", records, schema)
    return folder


def longbench(folder: Path, task: str, rows: list[tuple[str, str, list[str]]]) -> Path:
    """LongBench's data.zip with data/TASK.jsonl, from (context, input, answers)."""
    lines = [
        json.dumps({
            "input": question, "context": context, "answers": answers, "length": len(context.split()), "dataset": task,
            "language": "en", "all_classes": None, "_id": f"{index:048x}",
        })
        for index, (context, question, answers) in enumerate(rows)
    ]
    folder.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(folder / "data.zip", "w") as archive:
        archive.writestr(f"data/{task}.jsonl", "\n".join(lines) + "\n")
    return folder / "data.zip"


def longcrawl64(folder: Path, documents: list[list[int]], *, chunks=(2, 4), compressor=None, encode=bytes, split="train") -> Path:
    """LongCrawl64's SPLIT.zarr: zarr format 2, uint16 tokens [documents, tokens], a file BAND.PIECE for each chunk."""
    tokens = np.array(documents, "<u2")
    array = folder / f"{split}.zarr"
    array.mkdir(parents=True, exist_ok=True)
    layout = {
        "chunks": list(chunks), "compressor": compressor, "dtype": "<u2", "fill_value": 0, "filters": None, "order": "C",
        "shape": list(tokens.shape), "zarr_format": 2,
    }
    (array / ".zarray").write_text(json.dumps(layout, indent=4))
    padded = np.pad(tokens, [(0, -size % chunk) for size, chunk in zip(tokens.shape, chunks, strict=True)])
    for band in range(len(padded) // chunks[0]):
        for piece in range(padded.shape[1] // chunks[1]):
            block = padded[band * chunks[0] : (band + 1) * chunks[0], piece * chunks[1] : (piece + 1) * chunks[1]]
            (array / f"{band}.{piece}").write_bytes(encode(np.ascontiguousarray(block).tobytes()))
    return folder
