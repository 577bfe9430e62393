"""Builders of tiny files in the formats of the full-scale run: FineWeb-Edu rows, a tokenizer, image rows, an lm-eval task."""

import io
import json
from pathlib import Path


def sentences(count):
    subjects, verbs, objects = (
        ("the cat", "a river", "my friend", "the old clock"),
        ("sees", "follows", "keeps", "forgets"),
        ("the moon", "a letter", "seven stones"),
    )
    return [f"{subjects[i % 4]} {verbs[(i // 4) % 4]} {objects[(i // 16) % 3]}." for i in range(count)]


def fineweb_rows(folder: Path, rows: int = 60) -> Path:
    """A parquet file with the columns and types of HuggingFaceFW/fineweb-edu."""
    import pyarrow
    import pyarrow.parquet

    schema = pyarrow.schema(
        [
            ("text", pyarrow.string()),
            ("id", pyarrow.string()),
            ("dump", pyarrow.string()),
            ("url", pyarrow.string()),
            ("file_path", pyarrow.string()),
            ("language", pyarrow.string()),
            ("language_score", pyarrow.float64()),
            ("token_count", pyarrow.int64()),
            ("score", pyarrow.float64()),
            ("int_score", pyarrow.int64()),
        ]
    )
    texts = [" ".join(sentences(48)[i % 7 : i % 7 + 14]) for i in range(rows)]
    records = [
        {
            "text": text,
            "id": f"<urn:uuid:{i}>",
            "dump": "CC-MAIN-2024-10",
            "url": "https://example.org",
            "file_path": "s3://none",
            "language": "en",
            "language_score": 0.98,
            "token_count": len(text) // 4,
            "score": 3.2,
            "int_score": 3,
        }
        for i, text in enumerate(texts)
    ]
    folder.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(
        pyarrow.Table.from_pylist(records, schema=schema), folder / "train-00000-of-00001.parquet"
    )
    return folder


def tokenizer(folder: Path) -> Path:
    """A byte-level BPE of 300 tokens with GPT-2's end marker, saved as tokenizer.json by the real library."""
    from tokenizers import ByteLevelBPETokenizer

    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(sentences(48), vocab_size=300, special_tokens=["<|endoftext|>"], show_progress=False)
    folder.mkdir(parents=True, exist_ok=True)
    bpe._tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def cifar_rows(folder: Path, rows: int = 60) -> Path:
    """Parquet rows with the columns of uoft-cs/cifar10: img (PNG bytes) and label; the label is the brightest channel."""
    import datasets
    import numpy
    from PIL import Image

    draw = numpy.random.default_rng(0)
    images, labels = [], []
    for index in range(rows):
        label = index % 3
        pixels = draw.integers(0, 90, (32, 32, 3), dtype=numpy.uint8)
        pixels[..., label] += 120
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, format="PNG")
        images.append({"bytes": buffer.getvalue(), "path": None})
        labels.append(label)
    features = datasets.Features(
        {"img": datasets.Image(), "label": datasets.ClassLabel(names=["red", "green", "blue"])}
    )
    folder.mkdir(parents=True, exist_ok=True)
    datasets.Dataset.from_dict({"img": images, "label": labels}, features=features).to_parquet(
        str(folder / "train-00000-of-00001.parquet")
    )
    return folder


def multiple_choice_task(folder: Path, questions: int = 12) -> Path:
    """A local lm-eval task `tiny_choice` in the layout of ARC: question, choices, gold index."""
    folder.mkdir(parents=True, exist_ok=True)
    data = folder / "tiny.jsonl"
    data.write_text(
        "".join(
            json.dumps({"question": f"{s.rsplit(' ', 2)[0]}", "choices": ["the moon.", "qqqq zzzz."], "gold": 0}) + "\n"
            for s in sentences(questions)
        )
    )
    (folder / "tiny_choice.yaml").write_text(f"""task: tiny_choice
dataset_path: json
dataset_kwargs:
  data_files:
    train: {data}
    test: {data}
training_split: train
test_split: test
fewshot_split: train
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: choices
doc_to_target: gold
metric_list:
  - metric: acc
  - metric: acc_norm
""")
    return folder
