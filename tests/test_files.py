"""Files are replaced atomically."""

import hashlib

import pytest

from mfuser.files import atomic_writer, sha256, write_text


def test_a_file_is_replaced_only_after_the_block_succeeds(tmp_path):
    file = tmp_path / "report.json"
    write_text(file, "old")
    with pytest.raises(OSError, match="disk full"), atomic_writer(file) as stream:
        stream.write(b"half")
        assert file.read_text() == "old"
        raise OSError("disk full")
    assert file.read_text() == "old"
    with atomic_writer(file) as stream:
        stream.write(b"new")
        assert file.read_text() == "old"
    assert file.read_text() == "new"
    assert list(tmp_path.iterdir()) == [file]


def test_the_data_is_on_disk_before_the_file_is_renamed(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr("os.fsync", lambda descriptor: calls.append("fsync"))
    monkeypatch.setattr("os.replace", lambda source, target: calls.append("replace"))
    write_text(tmp_path / "file", "text")
    assert calls == ["fsync", "replace"]


def test_sha256_is_of_the_whole_content(tmp_path):
    content = bytes(range(256)) * 10_000  # several chunks
    (tmp_path / "weights").write_bytes(content)
    assert sha256(tmp_path / "weights") == hashlib.sha256(content).hexdigest()
