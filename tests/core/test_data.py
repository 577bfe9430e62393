"""core.data: looking up, fetching from a local server, licences, checksums, the manifest."""

import hashlib
import http.server
import subprocess
import sys
import threading

import pytest
import yaml

from papers10.core import data
from papers10.core.config import ConfigError, from_mapping
from papers10.core.data import (
    ChecksumMismatch,
    DataMissing,
    LicenceNotAccepted,
    Source,
    available,
    dataset_rows,
    digits,
    fetch,
    licence,
    locate,
    manifest,
    manifest_problems,
    manifest_update,
    package_root,
    sources,
    verify,
)
from papers10.core.optional import MissingExtra

CONTENT = b"real rows\n"


@pytest.fixture(autouse=True)
def machine(monkeypatch, tmp_path):
    monkeypatch.setenv("PAPERS10_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("PAPERS10_DATA", raising=False)
    monkeypatch.delenv("PAPERS10_OFFLINE", raising=False)


@pytest.fixture
def server(tmp_path):
    folder = tmp_path / "served"
    folder.mkdir()
    (folder / "rows.csv").write_bytes(CONTENT)

    class Handler(http.server.SimpleHTTPRequestHandler):
        requests = 0

        def __init__(self, *args):
            super().__init__(*args, directory=str(folder))

        def do_GET(self):
            type(self).requests += 1
            super().do_GET()

        def log_message(self, *args):
            pass

    running = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=running.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{running.server_port}", Handler
    running.shutdown()
    running.server_close()


@pytest.fixture
def with_source(monkeypatch):
    def add(**fields):
        item = {"name": "rows", "kind": "url", "title": "Rows", "licence": "CC0", "attribution": "us", **fields}
        monkeypatch.setattr(data, "sources", lambda: [from_mapping(Source, item)])

    return add


def one_file(url, content=CONTENT):
    return [
        {
            "key": "rows.csv",
            "url": f"{url}/rows.csv",
            "sha256": hashlib.sha256(content).hexdigest(),
            "bytes": len(content),
        }
    ]


def test_every_source_is_complete():
    found = sources()
    names = [name for item in found for name in (item.name, *item.aliases)]
    assert len(names) == len(set(names))
    for item in found:
        assert item.licence and item.attribution and licence(item.name) == item.licence
        if item.kind == "package":
            assert item.files or item.path
    noncommercial = [item.name for item in found if "NC" in item.licence.split("-")]
    assert noncommercial and all(data.source(name).gate == "noncommercial" for name in noncommercial)


@pytest.mark.parametrize("name", ["digits", "pydoc", "stdlib", "stdlib/random.py"])
def test_base_install_has_these(name):
    assert locate(name).exists() and available(name)


def test_base_package_checksum():
    (check,) = verify("digits")
    assert check.sha256 == check.expected


def test_finding_does_not_import():
    code = "import sys; from papers10.core.data import locate; locate('digits'); sys.exit('sklearn' in sys.modules or 'torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_digits_are_scikit_learns():
    import torch
    from sklearn.datasets import load_digits

    images, labels = digits()
    reference = load_digits()
    assert images.dtype == torch.float32 and labels.dtype == torch.int64
    assert torch.equal(images, torch.tensor(reference.images / 16, dtype=torch.float32))
    assert labels.tolist() == reference.target.tolist()


def test_unknown_name_suggests():
    with pytest.raises(DataMissing, match="did you mean 'clinc150'"):
        locate("clinc15")


def test_missing_says_the_command():
    with pytest.raises(DataMissing, match="papers10 data get clinc150"):
        locate("clinc150")
    with pytest.raises(DataMissing, match="papers10 data get imagenet-1k --accept-licence"):
        locate("imagenet-1k")


def test_unknown_file_of_a_source():
    with pytest.raises(DataMissing, match="did you mean clinc150/domains.json"):
        locate("clinc150/domain.json")


@pytest.mark.parametrize("name", ["stdlib/../../../../etc/hostname", "claims/../../pyproject.toml"])
def test_names_do_not_lead_out(name):
    with pytest.raises(DataMissing):
        locate(name)


def test_user_folder_comes_first(monkeypatch, tmp_path):
    own = tmp_path / "own" / "mbpp"
    own.mkdir(parents=True)
    (own / "mbpp.jsonl").write_text("{}")
    monkeypatch.setenv("PAPERS10_DATA", str(own.parent))
    assert locate("mbpp/mbpp.jsonl") == own / "mbpp.jsonl" and not available("mbpp")
    (own / "sanitized-mbpp.json").write_text("[]")
    assert locate("mbpp") == own
    assert all(check.expected is None and len(check.sha256) == 64 for check in verify("mbpp"))


def test_verify_refuses_another_file(monkeypatch, tmp_path):
    (tmp_path / "digits").mkdir()
    (tmp_path / "digits" / "digits.csv.gz").write_bytes(b"")
    monkeypatch.setenv("PAPERS10_DATA", str(tmp_path))
    with pytest.raises(ChecksumMismatch, match="digits/digits.csv.gz: expected sha256 09f66e6d"):
        verify("digits")


def test_user_folder_with_original_file_names(monkeypatch, tmp_path):
    (tmp_path / "clip").mkdir()
    (tmp_path / "clip" / "bikes.mp4").write_bytes(b"")
    monkeypatch.setenv("PAPERS10_DATA", str(tmp_path))
    assert locate("clip/bikes").name == "bikes.mp4"


def test_package_data_is_found(monkeypatch, tmp_path):
    (tmp_path / "claims").mkdir()
    (tmp_path / "claims" / "some-paper.yaml").write_text("schema: 1\n")
    monkeypatch.setattr(data, "package_root", lambda: tmp_path)
    assert locate("claims/some-paper.yaml") == tmp_path / "claims" / "some-paper.yaml"


def test_fetch_checks_and_keeps(server, with_source, capsys):
    url, handler = server
    with_source(files=one_file(url))
    path = fetch("rows")
    assert path.read_bytes() == CONTENT and locate("rows") == path and "licence: CC0" in capsys.readouterr().out
    assert fetch("rows") == path and handler.requests == 1
    assert [p.name for p in path.parent.iterdir()] == ["rows.csv"]


def test_fetch_refuses_a_changed_file(server, with_source, tmp_path):
    url, _ = server
    with_source(files=one_file(url, b"other"))
    with pytest.raises(ChecksumMismatch, match="rows/rows.csv: .*not the expected file"):
        fetch("rows")
    assert not available("rows") and not [p for p in (tmp_path / "home").rglob("*") if p.is_file()]


def test_fetch_when_the_source_is_gone(server, with_source):
    url, _ = server
    with_source(files=[{**one_file(url)[0], "url": f"{url}/gone.csv"}])
    with pytest.raises(DataMissing, match="download from .*gone.csv failed"):
        fetch("rows")


def test_fetch_offline(server, with_source, monkeypatch):
    url, handler = server
    with_source(files=one_file(url))
    monkeypatch.setenv("PAPERS10_OFFLINE", "1")
    with pytest.raises(DataMissing, match="PAPERS10_OFFLINE is set"):
        fetch("rows")
    assert handler.requests == 0


@pytest.mark.parametrize("gate", ["noncommercial", "gated", "form"])
def test_gates_need_a_yes(server, with_source, gate):
    url, handler = server
    with_source(files=one_file(url), gate=gate)
    with pytest.raises(LicenceNotAccepted, match=f"rows: {gate} source.*--accept-licence"):
        fetch("rows")
    assert handler.requests == 0 and fetch("rows", accept_licence=True).is_file()


def test_user_source_cannot_be_fetched(with_source):
    with_source(kind="user")
    with pytest.raises(DataMissing, match="put it into the folder rows of PAPERS10_DATA"):
        fetch("rows")


def test_package_source_runs_pip_after_printing(with_source, monkeypatch, capsys):
    with_source(kind="package", package="rows-package", module="no_such_rows", version="1.2", no_deps=True, path="data")
    calls = []
    monkeypatch.setattr(
        data.subprocess, "run", lambda command: calls.append(command) or subprocess.CompletedProcess(command, 1)
    )
    with pytest.raises(DataMissing, match="pip could not install rows-package"):
        fetch("rows")
    assert calls == [[sys.executable, "-m", "pip", "install", "--no-deps", "rows-package==1.2"]]
    assert "running: python -m pip install --no-deps rows-package==1.2" in capsys.readouterr().out


def test_hub_source_without_the_package_names_the_extra(with_source, monkeypatch):
    with_source(kind="hub", repository="someone/rows", extra="lm")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(MissingExtra, match=r"papers10\[lm\]"):
        fetch("rows")


def test_hub_errors_say_why(monkeypatch):
    datasets = pytest.importorskip("datasets")
    from huggingface_hub.errors import GatedRepoError
    from requests import Response

    monkeypatch.delenv("PAPERS10_OFFLINE", raising=False)

    def fails(error):
        def load_dataset(*_, **__):
            raise error

        monkeypatch.setattr(datasets, "load_dataset", load_dataset)

    response = Response()
    response.status_code = 403
    for error, kind, words in (
        (datasets.exceptions.DatasetNotFoundError("no such set"), DataMissing, "a/b: missing on the hub"),
        (datasets.exceptions.DatasetNotFoundError("Dataset is gated"), LicenceNotAccepted, "a/b: gated"),
        (GatedRepoError("gated", response=response), LicenceNotAccepted, "a/b: gated"),
        (ConnectionError("no route"), DataMissing, "no route"),
    ):
        fails(error)
        with pytest.raises(kind, match=words) as caught:
            dataset_rows("a/b", instead="give the folder as path=")
        assert "path=" in str(caught.value)


@pytest.mark.parametrize(
    "fields",
    [
        {"kind": "package"},
        {"kind": "hub"},
        {"kind": "url"},
        {"kind": "url", "files": [{"key": "a", "url": "b"}]},
        {"kind": "ftp"},
    ],
)
def test_incomplete_source_is_refused(fields):
    item = {"name": "rows", "title": "t", "licence": "l", "attribution": "a", **fields}
    with pytest.raises(ConfigError):
        from_mapping(Source, item)


def test_package_root_of_a_checkout_without_links(monkeypatch, tmp_path):
    package = tmp_path / "papers10"
    (tmp_path / "data").mkdir()
    package.mkdir()
    (package / "_data").write_text("../data")
    found = type("Spec", (), {"submodule_search_locations": [str(package)]})
    monkeypatch.setattr(data.importlib.util, "find_spec", lambda name: found)
    assert package_root() == tmp_path / "data"


def test_manifest_update_keeps_origins(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "b.txt").write_text("b")
    (tmp_path / "a.txt").write_text("a")
    assert manifest_update(tmp_path) == ["a.txt: not listed", "sub/b.txt: not listed"]
    text = (tmp_path / "MANIFEST.yaml").read_text().replace("licence: Apache-2.0", "licence: CC0", 1)
    (tmp_path / "MANIFEST.yaml").write_text(text)
    (tmp_path / "a.txt").write_text("changed")
    (tmp_path / "sub" / "b.txt").unlink()
    assert manifest_problems(tmp_path) == ["a.txt: changed since it was listed", "sub/b.txt: listed but absent"]
    manifest_update(tmp_path)
    (entry,) = manifest(tmp_path)
    assert (entry.path, entry.licence, entry.bytes) == ("a.txt", "CC0", 7) and manifest_problems(tmp_path) == []


def test_committed_manifest_is_in_step():
    assert manifest_problems() == [], (
        "run: python -c 'from papers10.core.data import manifest_update; manifest_update()'"
    )


def test_shared_copies_are_the_published_files(monkeypatch):
    # CI and development keep copies of the fetched sources beside the checkout.
    folder = package_root().resolve().parent.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("no folder ../shared/data with clinc150 and banking77")
    monkeypatch.setenv("PAPERS10_DATA", str(folder))
    for name in ("clinc150", "banking77"):
        assert all(check.sha256 == check.expected for check in verify(name))


def test_source_list_is_plain_yaml():
    text = yaml.safe_load((package_root() / "sources.yaml").read_text())
    assert text["schema"] == 1 and len(text["sources"]) == len(sources())
