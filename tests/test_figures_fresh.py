"""The figures of the README files are those of the results files, and the benchmarks import."""

import importlib
import json

import pytest
from benchmarks import render, results
from conftest import ROOT

SCRIPTS = sorted(path.stem for path in (ROOT / "tests" / "benchmarks").glob("*.py"))
RESULT = {
    "command": "python tests/benchmarks/soak_resume.py",
    "commit": "0123456789abcdef",
    "date": "2030-01-02",
    "processor": {"name": "Processor", "cores": 2, "instructions": ["avx2"]},
    "versions": {"python": "3.12.0", "torch": "2.20.0"},
    "figures": {"killed": 7, "unreadable": 0, "lost": 0, "finished": 3, "different": 0},
}


@pytest.mark.parametrize("name", render.PAGES)
def test_the_tables_of_a_page_match_the_results(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    assert render.render(text, results.read_results()) == text, (
        "python tests/benchmarks/render.py rewrites it"
    )


def test_every_table_has_its_place_on_a_page():
    placed = []
    for name in render.PAGES:
        text = (ROOT / name).read_text(encoding="utf-8")
        placed += [found["name"] for found in render.MARKED.finditer(text)]
    assert sorted(placed) == sorted(render.TABLES)


def test_what_was_not_measured_is_not_claimed():
    page = "before\n<!-- results: bench-resume -->\n| old | 100 |\n<!-- end -->\nafter\n"
    text = render.render(page, {})
    assert "100" not in text and render.NOT_MEASURED in text
    assert text.startswith("before\n") and text.endswith("<!-- end -->\nafter\n")


def test_a_measured_table_names_its_commit_machine_and_command():
    page = "<!-- results: bench-resume -->\n<!-- end -->\n"
    text = render.render(page, {"resume": RESULT})
    assert "| kills at random moments | 7 |" in text
    for part in (
        "2030-01-02",
        "`0123456`",
        "2 CPU cores (Processor, avx2)",
        "torch 2.20.0",
        RESULT["command"],
    ):
        assert part in text
    assert render.render(text, {"resume": RESULT}) == text


def test_a_result_keeps_what_it_was_measured_on(tmp_path):
    path = results.write_result("small", {"figure": 0.5}, "python x.py", tmp_path)
    kept = json.loads(path.read_text())
    assert kept["figures"] == {"figure": 0.5} and kept["command"] == "python x.py"
    assert {"commit", "date", "processor", "versions"} < set(kept)
    assert {"python", "torch", "onnxruntime", "numpy"} == set(kept["versions"])
    assert results.read_results(tmp_path) == {"small": kept}


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_benchmark_imports(name):
    """They are run by hand, and would go unnoticed when a name that they import is gone."""
    importlib.import_module(f"benchmarks.{name}")
