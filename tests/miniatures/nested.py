"""Builders of tiny files in the formats of the Nested Learning evaluation sets, and a tiny Llama with its tokenizer."""

import json
from pathlib import Path

from fineweb import sentences, tokenizer


def _json(file: Path, value) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(value))
    return file


def _lines(file: Path, rows) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def pg19_rows(folder: Path, books: int = 8) -> Path:
    """A parquet file with the columns of emozilla/pg19; a book is long."""
    import pyarrow
    import pyarrow.parquet

    rows = [
        {
            "short_book_title": f"Book {i}",
            "publication_date": 1900 + i,
            "url": "https://example.org",
            "text": " ".join(sentences(48)[i:] * 3),
        }
        for i in range(books)
    ]
    folder.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "train-00000-of-00001.parquet")
    return folder


def babilong(folder: Path, sizes=("0k",)) -> Path:
    """FOLDER/0k/qa1.jsonl … qa5 with input, question, target."""
    for size in sizes:
        for task in range(1, 6):
            rows = [
                {
                    "input": f"Mary went to the garden. {text}",
                    "question": "Where is Mary?",
                    "target": "garden",
                }
                for text in sentences(2)
            ]
            _lines(folder / size / f"qa{task}.jsonl", rows)
    return folder


def longhealth(folder: Path) -> Path:
    """benchmark_v5.json: patients with texts and questions with five choices, the right one in words."""
    question = {"No": 1, "question": "Which drug?", **{f"answer_{letter}": f"drug {letter}" for letter in "abcde"}}
    patient = {
        "name": "Anna Sample",
        "birthday": "1 January 1970",
        "diagnosis": "none",
        "texts": {"text_0": "She took drug c.", "text_1": "She is well."},
        "questions": [
            {**question, "correct": "drug c", "answer_location": {"text_0": {"start": [0.0], "end": [1.0]}}},
            {**question, "No": 2, "correct": "drug a", "answer_location": {}},
        ],
    }
    _json(folder / "benchmark_v5.json", {"patient_01": patient})
    return folder


def qasper(folder: Path) -> Path:
    """qasper-test-v0.3.json of the release: sections, questions, answers of each kind."""
    blank = {"unanswerable": False, "extractive_spans": [], "yes_no": None, "free_form_answer": "", "evidence": []}
    kinds = [
        {"extractive_spans": ["seven stones", "a letter"]},
        {"free_form_answer": "the moon"},
        {"yes_no": False},
        {"yes_no": True},
        {"unanswerable": True},
    ]
    paper = {
        "title": "On rivers",
        "abstract": "A river follows.",
        "full_text": [
            {"section_name": "Introduction", "paragraphs": ["The cat sees the moon.", "A river keeps a letter."]},
            {"section_name": None, "paragraphs": ["My friend forgets."]},
        ],
        "qas": [
            {"question": f"Question {i}?", "question_id": str(i), "answers": [{"answer": {**blank, **kind}}]}
            for i, kind in enumerate(kinds)
        ],
    }
    _json(folder / "qasper-test-v0.3.json", {"1909.00001": paper})
    return folder


def recall(folder: Path, name: str) -> Path:
    """validation.jsonl in one of the two layouts of the recall suite."""
    if name in ("swde", "fda", "squad"):
        rows = [{"doc_id": "1", "text": "The cat sees the moon. The cat sees", "value": "the moon", "key": "sees"}]
    else:
        rows = [
            {
                "context": "[DOC] The cat sees the moon. Who sees the moon?",
                "question": "Who sees the moon?",
                "answers": ["the cat", "a cat"],
            }
        ]
    _lines(folder / name / "validation.jsonl", rows)
    return folder / name


def ctnl(folder: Path, languages=("kalamang", "manchu")) -> Path:
    """One folder a language in the layout of MTOB; the first test entry is a canary."""
    for language in languages:
        place = folder / language
        (place / "resources").mkdir(parents=True)
        (place / "resources" / "grammar_book.txt").write_text("Verbs come last.")
        _json(place / "resources" / "wordlist.json", {"ke": {"ka": ["cat"], "wo": "moon"}, "ek": {"cat": ["ka"]}})
        tests = [{"canary": "x"}, {"original": "ka wo", "ground_truth": "The cat sees the moon."}]
        _json(place / "splits" / "test_examples_ke.json", tests)
    return folder


def llama(folder: Path) -> Path:
    """A two-layer Llama of width 32 and the tokenizer of `fineweb.tokenizer`, saved by the real library."""
    import torch
    import transformers

    tokenizer(folder)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=320,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=256,
        bos_token_id=0,
        eos_token_id=0,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"), eos_token="<|endoftext|>"
    )
    fast.save_pretrained(folder)
    return folder
