"""Which files the web board may read and write: files inside its folders.

    folders = Folders(["."])
    folders.inside("configs/my.yaml")       # its path; BadRequest for ../other/my.yaml
    folders.check_settings(entries)         # the same check for paths in a config

Links are resolved first: a link to a file outside is refused.

Requires: serving/schema.py (BadRequest).
Next: web/jobs.py, board.py.
"""
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from serving.schema import BadRequest
from text.chat_formats import TEMPLATES

CONFIGS = (".yaml", ".yml", ".json")
MOST_FILES = 500            # in a list of configs or folders
# keys whose values are never paths
TEXTS = ("ask", "placeholders", "default_system", "prompt", "lora_target", "oft_target",
         "freeze_trainable_modules")


class Folders:
    """The folders that the board may use; scripts run in the first one."""

    def __init__(self, roots: Iterable[str | Path]):
        self.roots = [Path(root).expanduser().resolve() for root in roots]
        for root in self.roots:
            if not root.is_dir():
                raise ValueError(f"--folder {root}: no such folder")

    def inside(self, name: str) -> Path:
        """The absolute path of a name; relative names start at the first folder.

        Raises BadRequest for a path outside of all folders.
        """
        if not isinstance(name, str) or not name or "\0" in name:
            raise BadRequest("the name of a file or folder is missing or is not a text")
        try:
            path = (self.roots[0] / os.path.expanduser(name)).resolve()
        except (OSError, RuntimeError):             # links in a circle, a name that is too long
            raise BadRequest(f"{name[:100]!r} is not a valid path") from None
        if not any(path.is_relative_to(root) for root in self.roots):
            raise BadRequest(f"{name[:200]} lies outside of the board's folders "
                             f"({', '.join(map(str, self.roots))}). To allow it, start board.py "
                             "with --folder FOLDER", status=403)
        return path

    def shown(self, path: Path) -> str:
        """A path as the page shows it: relative to the first folder if it is inside."""
        for form in (path, path.resolve()):         # links inside keep their names
            if form.is_relative_to(self.roots[0]):
                return str(form.relative_to(self.roots[0]))
        return str(path)

    def check_settings(self, entries: Iterable[tuple]):
        """Raise BadRequest if the value of an entry (key, value, …) is a path outside."""
        for name, value, *_ in entries:
            if name.partition(".")[0] in TEXTS:
                continue
            for text in texts_in(value):
                is_path = os.path.isabs(text) or text.startswith("~") or ".." in Path(text).parts
                if is_path and "://" not in text:
                    self.check_setting(name, text)

    def check_setting(self, name: str, text: str):
        try:
            self.inside(text)
        except BadRequest as error:
            raise BadRequest(f"{name}: {error}", name, status=error.status) from None

    def configs(self) -> list[str]:
        """The config files that the page offers: in configs/ and in the --folder folders."""
        found = sorted((self.roots[0] / "configs").glob("**/*.yaml"))
        for root in self.roots[1:]:
            found += sorted(path for path in root.glob("**/*") if path.suffix in CONFIGS)
        return [self.shown(path) for path in found[:MOST_FILES] if path.is_file()]

    def suggestions(self) -> dict[str, list[str]]:
        """{key: values that the form suggests}, from the files in the folders."""
        first = self.roots[0]
        places = [first / "models", first / "saves", *self.roots[1:]]
        models = self.holders(places, "config.json")
        adapters = self.holders(places, "adapter_config.json")
        datasets = list(read_object(first / "data/dataset_info.json"))
        return {"model_name_or_path": models, "adapter_name_or_path": adapters, "dataset": datasets,
                "eval_dataset": datasets, "template": sorted(TEMPLATES)}

    def holders(self, places: list[Path], name: str) -> list[str]:
        """Folders one or two levels below the places that contain a file of this name."""
        found = [path.parent for place in places for pattern in (f"*/{name}", f"*/*/{name}")
                 for path in sorted(place.glob(pattern))]
        return [self.shown(path) for path in found[:MOST_FILES]]


def read_object(path: Path) -> dict:
    """The object of a JSON file; {} where it is missing or half written."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def texts_in(value) -> Iterator[str]:
    """All texts in a value: of a list or mapping each text, of `a,b` both parts."""
    if isinstance(value, str):
        yield from (part.strip() for part in value.strip("[]").split(","))
    elif isinstance(value, dict):
        for item in value.values():
            yield from texts_in(item)
    elif isinstance(value, list):
        for item in value:
            yield from texts_in(item)
