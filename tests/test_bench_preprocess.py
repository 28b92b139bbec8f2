"""bench/preprocess.py: it runs on any machine, and its results state what was measured."""
import json
import subprocess
import sys

from tests.common import ROOT, SHARED, needs_shared, slow


@slow
@needs_shared
def test_it_measures_this_program_alone(tmp_path):
    done = subprocess.run([sys.executable, "bench/preprocess.py", "--rows", "300", "--times", "1",
                           "--no-peer", "--tokenizer", str(SHARED / "tokenizers" / "qwen2.5"),
                           "--template", "qwen", "--results", str(tmp_path)], cwd=ROOT,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(next(tmp_path.glob("preprocess-*.json")).read_text(encoding="utf-8"))
    assert found["settings"]["rows"] == 300 and found["summary"].keys() == {"ours", "ours again"}
    assert found["tokens"]["ours"]["tokens"] > 300 * 20 and "| ours again |" in done.stdout
    assert found["summary"]["ours again"]["load_seconds"] < found["summary"]["ours"]["load_seconds"]
