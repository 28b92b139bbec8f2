"""README.md: its script runs, its table of files is complete, its commands name existing files."""
import re
import subprocess
import sys

from tests.common import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_script_of_the_readme_runs():
    code = re.search(r"```python\n(.*?)```", README, re.DOTALL).group(1)
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    answer, count = done.stdout.splitlines()
    assert answer == "The sky is blue." and int(count) > 1000


def test_the_table_of_files_is_complete():
    named = set(re.findall(r"^\| `(\w+\.py)` \|", README, re.MULTILINE))
    assert named == {path.name for path in ROOT.glob("*.py")}


def test_the_lines_of_the_seven_files_are_right():
    """Within a tenth."""
    rows = re.findall(r"^\| `(\w+\.py)` \| (\d+) \|", README, re.MULTILINE)
    assert [name for name, _ in rows] == [f"{name}.py" for name in (
        "train", "data", "templates", "model", "lora", "losses", "optim")]
    for name, lines in rows:
        found = len((ROOT / name).read_text(encoding="utf-8").splitlines())
        assert abs(found - int(lines)) <= found / 10, (name, found)


def test_every_folder_has_its_line():
    named = set(re.findall(r"^\| `(\w+)/` \|", README, re.MULTILINE)) | {"models"}
    folders = {path.parent.name for path in ROOT.glob("*/__init__.py")}
    assert folders <= named


def test_commands_name_files_that_exist():
    texts = [README,
             *(path.read_text(encoding="utf-8")
               for path in [*ROOT.glob("configs/*.yaml"), *ROOT.glob("docs/*.md")])]
    for text in texts:
        for script in re.findall(r"python (\w+\.py)", text):
            assert (ROOT / script).is_file(), script
        for config in re.findall(r"configs/\w+\.yaml", text):
            assert (ROOT / config).is_file(), config


def test_links_and_folders_of_the_readme_exist():
    for name in re.findall(r"docs/\w+\.md", README):
        assert (ROOT / name).is_file(), name
