"""The rules of the source tree, by ast: imports between folders, docstrings, no machine paths."""
import ast
import json
import re
import shutil
import subprocess
import sys

import pytest

from tests.common import ROOT

SCRIPTS = ("train", "chat", "serve", "board", "eval", "merge", "cli")
# a folder imports the root and folders that stand before it; scripts import whatever they like, and
# nobody imports them
FOLDERS = ("text", "methods", "checkpoint", ("fast", "scale"), "settings", "runtime", "exporting",
           ("evals", "serving", "web"))
RANKS = {}
for rank, names in enumerate(FOLDERS, 1):
    RANKS |= dict.fromkeys([names] if isinstance(names, str) else names, rank)
# what a module of requirements.txt is called when it is imported
PACKAGES = {"torch": "torch", "safetensors": "safetensors", "tokenizers": "tokenizers",
            "numpy": "numpy", "tqdm": "tqdm", "huggingface_hub": "huggingface_hub",
            "PyYAML": "yaml"}
# optional ones are imported in the function that uses them
OPTIONAL = {"flash_attn", "matplotlib", "jinja2", "jieba", "wandb", "swanlab", "mlflow", "pyarrow",
            "zstandard", "modelscope", "vllm"}
MODULES = {path.stem: path for path in sorted(ROOT.glob("*.py"))}
MODULES |= {f"{folder}.{path.stem}": path
            for folder in RANKS
            for path in sorted((ROOT / folder).glob("*.py"))
            if path.stem != "__init__"}
TREES = {name: ast.parse(path.read_text(encoding="utf-8"), feature_version=(3, 10))
         for name, path in MODULES.items()}


def imports(tree, inside_functions=True):
    """Top names of the packages that a file imports; of a module in a folder of ours the whole
    name."""
    found, todo = set(), list(ast.iter_child_nodes(tree))
    while todo:
        node = todo.pop()
        if isinstance(node, ast.Import):
            found |= {named(alias.name) for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "no relative imports"
            if node.module in RANKS:
                found |= {f"{node.module}.{alias.name}" for alias in node.names}
            else:
                found.add(named(node.module))
        elif (inside_functions
              or not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))):
            todo += ast.iter_child_nodes(node)
    return found


def named(module):
    return module if module.split(".")[0] in RANKS else module.split(".")[0]


def tracked(*endings):
    """Files of the repository with these endings, as git knows them (new ones too, ignored ones
    not)."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listing = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if listing.returncode:
        pytest.skip("not a git checkout")
    return [ROOT / name for name in listing.stdout.splitlines()
            if name.endswith(endings) and (ROOT / name).is_file()]


def test_every_folder_says_in_one_sentence_what_it_is_and_no_more():
    for folder in RANKS:
        tree = ast.parse((ROOT / folder / "__init__.py").read_text(encoding="utf-8"))
        assert len(tree.body) == 1 and ast.get_docstring(tree).endswith((".", "?")), folder


@pytest.mark.parametrize("name", MODULES)
def test_imports_point_one_way(name):
    """The root imports the root, a folder the root and folders before it, and no file a script."""
    rank = 99 if name in SCRIPTS else RANKS.get(name.split(".")[0], 0)
    for other in imports(TREES[name]) & set(MODULES):
        assert other not in SCRIPTS, f"{name} imports {other}"
        assert RANKS.get(other.split(".")[0], 0) <= rank, f"{name} imports {other}"


def test_no_circles():
    done, way = set(), []

    def visit(name):
        assert name not in way, " -> ".join([*way, name])
        if name not in done:
            way.append(name)
            for other in imports(TREES[name]) & set(MODULES):
                visit(other)
            done.add(way.pop())

    for name in MODULES:
        visit(name)


# ---- files that can be deleted ------------------------------------------------------------------

DELETABLE = [name for name in MODULES if name.startswith(("methods.", "fast.", "scale."))]
ENTRIES = ("runtime/build.py", "runtime/kernels.py")    # where such a file has its lines


def without(module: str, source: str) -> str:
    """The source of an entry file without its import of the module and without its table rows."""
    folder, name = module.split(".")
    line = re.compile(rf"^from {folder} import {name}$"             # its import
                      rf"|^    \"\w+\": Stage\(.*\b{name}\."          # its row of STAGES
                      rf"|^    \w+, +# {folder}/{name}\.py$")        # its row of PICKS
    return "".join(text for text in source.splitlines(keepends=True)
                   if not line.match(text.rstrip("\n")))


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A copy of what a training run needs."""
    copy = tmp_path_factory.mktemp("checkout")
    for path in [*ROOT.glob("*.py"), *(ROOT / folder for folder in (*RANKS, "configs", "data"))]:
        if path.is_dir():
            shutil.copytree(path, copy / path.name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(path, copy)
    (copy / "models").symlink_to(ROOT / "models")
    return copy


# runs of train.py, each forked from a process that has imported the packages and no file of ours
RUNS = '''
import json, os, runpy, sys
import safetensors.torch, tokenizers, torch._dynamo, tqdm, yaml
sys.path.insert(0, os.getcwd())
for line in sys.stdin:
    if os.fork() == 0:
        sys.argv = json.loads(line)
        os.dup2(2, 1)
        try:
            runpy.run_path("train.py", run_name="__main__")
        finally:
            json.dump(sorted(sys.modules), open("imported", "w"))
        sys.exit()
    print(os.waitstatus_to_exitcode(os.wait()[1]), flush=True)
'''


@pytest.fixture(scope="module")
def train_loss(checkout):
    """A function of an output_dir: (the loss of a plain run of two steps in the checkout, the
    modules that it imported)."""
    screen = checkout / "screen"
    with open(screen, "w") as stderr:
        server = subprocess.Popen([sys.executable, "-c", RUNS], cwd=checkout, text=True, bufsize=1,
                                  stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr)

    def run(output) -> tuple[float, set[str]]:
        argv = ["train.py", "--config", "configs/tiny_lora_sft.yaml", "max_steps=2",
                "max_samples=40", f"output_dir={output}"]
        server.stdin.write(json.dumps(argv) + "\n")
        assert server.stdout.readline() == "0\n", screen.read_text()[-4000:]
        loss = json.loads((output / "all_results.json").read_text())["train_loss"]
        return loss, set(json.loads((checkout / "imported").read_text()))

    yield run
    server.communicate()


@pytest.fixture(scope="module")
def complete_run(train_loss, tmp_path_factory):
    return train_loss(tmp_path_factory.mktemp("complete") / "out")


@pytest.mark.parametrize("module", DELETABLE)
def test_a_file_is_deleted_with_its_lines_and_a_plain_run_is_the_same(
        module, checkout, train_loss, complete_run, tmp_path):
    """Files of methods/, fast/ and scale/: nothing but the entry files needs them.

    A file that the complete run has not imported is not missed.
    """
    complete_loss, imported = complete_run
    assert {"runtime.build", "fast.fused_block"} <= imported
    if module not in imported:
        return
    file = checkout / f"{module.replace('.', '/')}.py"
    entries = {checkout / entry: (checkout / entry).read_text() for entry in ENTRIES}
    source = file.read_text()
    file.unlink()
    for path, text in entries.items():
        path.write_text(without(module, text))
    try:
        loss, _ = train_loss(tmp_path / "out")
    finally:
        file.write_text(source)
        for path, text in entries.items():
            path.write_text(text)
    assert loss == pytest.approx(complete_loss, rel=1e-5)


def test_only_the_entry_files_import_what_can_be_deleted():
    """Other files of the core import it inside a function, where a setting asks for it."""
    above = ("evals.", "serving.", *(f"{folder}." for folder in ("methods", "fast", "scale")))
    for name, tree in TREES.items():
        of_formats = ("checkpoint.packed", "checkpoint.grouped_files", "checkpoint.fp8_files",
                      "checkpoint.write_bnb")
        if name in SCRIPTS or name.startswith(above) or name in of_formats:
            continue
        found = imports(tree, inside_functions=False) & set(DELETABLE)
        assert not found or f"{name.replace('.', '/')}.py" in ENTRIES, (name, found)


# ---- packages and docstrings --------------------------------------------------------------------


def test_the_reader_of_imports_sees_all_kinds():
    tree = ast.parse(
        "import a.b as c\nfrom d.e import f\ntry:\n    import g\nexcept ImportError:\n    pass\n"
        "class H:\n    import i\n    def j(self):\n        from k import l\n"
    )
    assert imports(tree) == {"a", "d", "g", "i", "k"}
    assert imports(tree, inside_functions=False) == {"a", "d", "g", "i"}


@pytest.mark.parametrize("name", MODULES)
def test_only_the_packages_of_requirements_txt(name):
    known = set(sys.stdlib_module_names) | set(MODULES) | set(PACKAGES.values())
    assert imports(TREES[name], inside_functions=False) <= known
    assert imports(TREES[name]) <= known | OPTIONAL


def test_requirements_txt_is_that_list_and_nothing_is_left_over():
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    wanted = {re.match(r"[\w.-]+", line)[0]
              for line in lines if line.strip() and not line.startswith("#")}
    assert wanted == set(PACKAGES)
    used = set().union(*(imports(tree) for tree in TREES.values()))
    assert set(PACKAGES.values()) | OPTIONAL <= used


@pytest.mark.parametrize("name", MODULES)
def test_docstring_says_what_to_read_and_names_files_that_exist(name):
    text = ast.get_docstring(TREES[name])
    assert text and len(text.splitlines()) > 2
    order = r"\bRead (before|first|after|next)\b|^(Requires|Next): "
    assert re.search(order, text, re.M), "what to read before or after this file?"
    missing = [file
               for file in re.findall(r"[\w/]+\.(?:py|md)\b", text) if not (ROOT / file).is_file()]
    assert not missing, missing
    if name in SCRIPTS:
        assert f"python {name}.py" in text


def test_the_decoder_knows_no_family():
    """model.py goes by switches: no name of a family in it, Llama, from which all are told to
    differ, apart."""
    sys.path.insert(0, str(ROOT))
    from families import FAMILIES
    names = {re.match("seed_oss|gpt_oss|[a-z]+", name)[0] for name in FAMILIES} - {"llama"}
    assert len(names) > 8
    for file in ("model.py", "losses.py", "lora.py", "checkpoint/load.py", "checkpoint/adapters.py",
                 "merge.py"):
        text = (ROOT / file).read_text(encoding="utf-8").lower()
        assert not [name for name in names if re.search(rf"\b{name}", text)], file


def test_no_path_of_one_machine():
    pattern = re.compile(r"(?<![\w.}~-])/(root|tmp|work|home|Users)\b")
    files = tracked(".py", ".md", ".yaml", ".yml", ".txt", ".json", ".ini")
    assert ROOT / "train.py" in files
    found = [f"{path.relative_to(ROOT)}:{number}: {line.strip()[:100]}"
             for path in files
             for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
             if pattern.search(line)]
    assert not found, "\n".join(found)


def test_config_knows_nothing_of_torch():
    """Seen from inside: `python -m settings.config --keys` answers at once."""
    assert "torch" not in imports(TREES["settings.config"])
    code = "import sys, settings.config; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


@pytest.mark.parametrize("path", sorted((ROOT / "tests").glob("*.py")), ids=lambda path: path.name)
def test_no_test_hides_another_of_its_name(path):
    """Of two functions with one name Python keeps the last: the first would never run."""
    names = [node.name for node in ast.parse(path.read_text(encoding="utf-8")).body
             if isinstance(node, ast.FunctionDef)]
    assert sorted(names) == sorted(set(names))
