"""The tables in the documents are those of the committed results."""

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

import update_readme  # noqa: E402


def run(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["update_readme.py", *words])
    update_readme.main()


def test_tables_in_the_documents_are_those_of_the_results(monkeypatch):
    run(monkeypatch, "--check")


def test_every_table_has_its_place_in_a_document():
    text = "".join(path.read_text() for path in update_readme.DOCUMENTS)
    assert all(f"<!-- {name} -->" in text for name in update_readme.TABLES)


def test_an_outdated_table_is_found_and_written_anew(tmp_path, monkeypatch):
    document = tmp_path / "README.md"
    document.write_text("before\n<!-- merge -->\nold\n<!-- /merge -->\nafter\n")
    monkeypatch.setattr(update_readme, "DOCUMENTS", [document])
    with pytest.raises(SystemExit, match="README.md has other tables than its results"):
        run(monkeypatch, "--check")
    assert "old" in document.read_text()
    run(monkeypatch)
    run(monkeypatch, "--check")
    assert "old" not in document.read_text() and document.read_text().endswith("-->\nafter\n")


def test_a_missing_result_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(update_readme, "RESULTS", tmp_path)
    with pytest.raises(SystemExit, match=r"expected a file \*_merge.json .*, got none"):
        update_readme.TABLES["merge"]()


def test_the_newest_of_several_machines_is_shown(tmp_path, monkeypatch):
    for machine, date in (("a", "2026-11-01"), ("b", "2026-11-28T10"), ("c", "2026-11-28T09")):
        (tmp_path / f"{machine}_merge.json").write_text(json.dumps({"date": date}))
    monkeypatch.setattr(update_readme, "RESULTS", tmp_path)
    assert update_readme.read("*_merge.json")["date"] == "2026-11-28T10"
