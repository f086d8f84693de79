import hashlib
import io
import os
import shutil
import tarfile
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from mmlib.data import sources
from mmlib.data.sources import Source, announce, fetch_source, known, manifest

FILES = {
    "data/b/2.jpg": b"two",
    "data/a.csv": b"one",
    "data/b c.txt": b"",
    "README.md": b"read me",
    "database/x": b"no",
}
NET = b"a network" * 1000
# What `sha256sum` prints for the files below data/, in order of their paths.
LINES = "".join(f"{hashlib.sha256(FILES[name]).hexdigest()}  {name}\n" for name in sorted(FILES) if "data/" in name)


def archive(files=FILES):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(f"repo-abc/{name}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


@pytest.fixture
def host(monkeypatch):
    """A server of two sources on this machine: what it serves by path, and what was asked of it."""
    served, asked = {"/o/r/abc.tar.gz": archive(), "/o/n/def/nets/net.pb": NET}, []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            content = served.get(self.path)
            self.send_response(404 if content is None else 200)
            self.send_header("Content-Length", str(len(content or b"")))
            self.end_headers()
            self.wfile.write(content or b"")

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    place = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(sources, "ARCHIVE", place + "/{repository}/{commit}.tar.gz")
    monkeypatch.setattr(sources, "FILE", place + "/{repository}/{commit}/{path}")
    digest = hashlib.sha256(LINES.encode()).hexdigest()
    monkeypatch.setitem(known(), "faces", Source("Faces", "o/r", "abc", "data/", digest, 1, "for research"))
    digest = hashlib.sha256(NET).hexdigest()
    monkeypatch.setitem(known(), "net", Source("Net", "o/n", "def", "nets/net.pb", digest, 2, "MIT"))
    yield served, asked, server
    server.shutdown()
    server.server_close()


def everything(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def test_a_file_is_fetched_once(host, tmp_path):
    _, asked, _ = host
    for _ in range(2):
        path = fetch_source("net", tmp_path / "sources")
        assert path == tmp_path / "sources/net/net.pb" and path.read_bytes() == NET
    assert len(asked) == 1 and everything(tmp_path) == ["sources/net/net.pb"]


def test_a_folder_of_a_repository_is_fetched_once_and_nothing_else_of_it(host, tmp_path):
    _, asked, _ = host
    for _ in range(2):
        path = fetch_source("faces", tmp_path)
        assert path == tmp_path / "faces"
    assert everything(path) == ["data/a.csv", "data/b c.txt", "data/b/2.jpg"]
    assert (path / "data/b/2.jpg").read_bytes() == b"two"
    assert len(asked) == 1 and [each.name for each in tmp_path.iterdir()] == ["faces"]


def test_a_manifest_is_what_sha256sum_prints(host, tmp_path):
    assert manifest(fetch_source("faces", tmp_path)) == LINES


def test_an_archive_that_is_there_is_not_fetched_again(host, tmp_path):
    _, asked, _ = host
    (tmp_path / "faces-abc.tar.gz").write_bytes(archive())
    fetch_source("faces", tmp_path)
    assert asked == []


def test_another_file_names_itself_and_both_sums_and_leaves_nothing(host, tmp_path):
    host[0]["/o/n/def/nets/net.pb"] = b"other"
    with pytest.raises(ValueError) as error:
        fetch_source("net", tmp_path)
    for part in ("net.pb", known()["net"].sha256, hashlib.sha256(b"other").hexdigest()):
        assert part in str(error.value)
    assert everything(tmp_path) == []


@pytest.mark.parametrize(
    "change", [{"data/a.csv": b"One"}, {"data/more": b""}, {"data/a.csv": None}], ids=["changed", "more", "fewer"]
)
def test_another_archive_names_itself_and_both_sums_and_leaves_nothing(host, tmp_path, change):
    files = {name: content for name, content in (FILES | change).items() if content is not None}
    host[0]["/o/r/abc.tar.gz"] = archive(files)
    with pytest.raises(ValueError, match=f"faces-abc.tar.gz: .*[0-9a-f]{{64}}, not {known()['faces'].sha256}"):
        fetch_source("faces", tmp_path)
    assert [*tmp_path.iterdir()] == []


@pytest.mark.parametrize("share", [0, 0.1, 0.6])
def test_an_archive_cut_short_leaves_nothing(host, tmp_path, share):
    host[0]["/o/r/abc.tar.gz"] = archive()[: int(share * len(archive()))]
    with pytest.raises(ValueError, match="faces-abc.tar.gz: not "):
        fetch_source("faces", tmp_path)
    assert [*tmp_path.iterdir()] == []


def test_an_archive_writes_nothing_outside_its_folder(host, tmp_path):
    host[0]["/o/r/abc.tar.gz"] = archive({**FILES, "data/../../../evil": b"x"})
    with pytest.raises(ValueError, match="faces-abc.tar.gz: not "):
        fetch_source("faces", tmp_path / "sources")
    assert everything(tmp_path) == []


def test_a_folder_that_was_changed_is_refused_and_kept(host, tmp_path):
    (fetch_source("faces", tmp_path) / "data/a.csv").write_bytes(b"changed")
    with pytest.raises(ValueError, match=f"faces: .*[0-9a-f]{{64}}, not {known()['faces'].sha256}; remove it"):
        fetch_source("faces", tmp_path)
    assert (tmp_path / "faces/data/a.csv").read_bytes() == b"changed"


@pytest.mark.parametrize("name, path", [("net", "net/net.pb"), ("faces", "faces-abc.tar.gz")])
def test_without_a_network_one_line_names_the_place_and_where_to_put_the_file(host, tmp_path, name, path):
    host[2].shutdown()
    host[2].server_close()
    with pytest.raises(ValueError, match=r"http://127.0.0.1\S* cannot be downloaded \(ConnectionError\)") as error:
        fetch_source(name, tmp_path)
    assert str(tmp_path / path) in str(error.value) and "\n" not in str(error.value)
    assert everything(tmp_path) == []


def test_a_file_that_is_gone_is_said(host, tmp_path):
    host[0].clear()
    with pytest.raises(ValueError, match=r"net.pb: cannot be downloaded \(HTTP 404\)"):
        fetch_source("net", tmp_path)


def test_what_is_fetched_is_announced_with_place_and_terms(host, tmp_path):
    fetch_source("net", tmp_path)
    assert announce(["faces", "net"], tmp_path) == [
        "Faces: github.com/o/r at abc, data/ (1 MB); terms: for research",
        "Net: github.com/o/n at def, nets/net.pb (2 MB); terms: MIT; already there",
    ]


def test_every_source_is_fixed_to_a_commit_and_a_sum():
    for source in known().values():
        package = source.repository.startswith("pypi.org/")
        assert len(bytes.fromhex(source.commit)) == (32 if package else 20) and len(bytes.fromhex(source.sha256)) == 32
        if package:
            assert source.commit in source.url.replace("/", "") and source.url.endswith(source.path)
        else:
            assert source.repository in source.url and source.commit in source.url
        assert source.terms and str(source).count(source.repository) == 1


@pytest.mark.skipif(
    "MMLIB_REAL_DATA" not in os.environ, reason="MMLIB_REAL_DATA names no folder with archives of faces"
)
def test_a_real_archive_is_the_published_one(tmp_path):
    commit = known()["lfw"].commit
    archive = Path(os.environ["MMLIB_REAL_DATA"]) / f"lfw-pairs-aligned-{commit}.tar.gz"
    shutil.copyfile(archive, tmp_path / f"lfw-{commit}.tar.gz")
    folder = fetch_source("lfw", tmp_path)
    assert len(everything(folder)) == 7701 and (folder / "data/AJ_Lamas/AJ_Lamas_0001.jpg").exists()
