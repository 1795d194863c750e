"""The file of a benchmark's numbers: what was measured, and on what."""

import json

from benchmarks._support import machine


def test_a_report_is_written_with_its_environment(tmp_path, capsys):
    path = tmp_path / "results" / "speed.json"
    machine.write_report({"seconds": [1.5, 2.0]}, path)
    written = json.loads(path.read_text())
    assert written["seconds"] == [1.5, 2.0]
    assert written["environment"].keys() == {"device", "threads", "versions", "commit", "date", "load"}
    assert capsys.readouterr().out == ""


def test_the_environment_a_report_was_measured_in_stays(tmp_path):
    path = tmp_path / "speed.json"
    machine.write_report({"environment": {"device": "a phone"}, "seconds": 1}, path)
    assert json.loads(path.read_text())["environment"] == {"device": "a phone"}


def test_without_a_file_it_is_shown(capsys):
    machine.write_report({"seconds": 1}, None, show=True)
    assert json.loads(capsys.readouterr().out)["seconds"] == 1


def test_compact_json_is_the_same_json():
    value = {
        "a": [1, 2.5, None],
        "b": [[1, 2], [3]],
        "c": [{"d": [True]}],
        "e": [],
        "f": "x [ y  z ]",
        "g": ["two  blanks", "[ x ]"],
    }
    assert json.loads(machine.compact(value)) == value
    assert '"a": [1, 2.5, null]' in machine.compact(value)
