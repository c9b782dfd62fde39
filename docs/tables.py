"""Writes the tables of keys into the pages of the documentation, from the dataclasses of the config.

    .venv/bin/python docs/tables.py

A test fails if a page and the code differ.
"""

import importlib
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from shared.config.augment import Augment
from shared.config.file import keys_of
from shared.config.schema import DataConfig, SearcherSection, TopLevelKeys


def sections() -> dict[Path, tuple[str, type]]:
    """Per page, the name of its table and the dataclass. A detector's page has the name of its folder."""
    found = {
        ROOT / "docs/reference/config.md": ("top-level keys", TopLevelKeys),
        ROOT / "docs/reference/data.md": ("data keys", DataConfig),
        ROOT / "docs/search.md": ("searcher keys", SearcherSection),
        ROOT / "docs/train/augment.md": ("augment keys", Augment),
    }
    for file in sorted(ROOT.glob("*/*_hyperparameters.py")):
        sys.path.insert(0, str(file.parent))
        module = importlib.import_module(file.stem)
        (name,) = (name for name in vars(module) if name.endswith("Hyperparameters") and name[:8] != "Training")
        found[ROOT / f"docs/detectors/{file.parent.name}.md"] = ("hyperparameters", getattr(module, name))
    return found


def with_table(page: str, name: str, section: type) -> str:
    """The text of a page with the current table between its two markers."""
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    pattern = re.compile(f"{re.escape(begin)}.*{re.escape(end)}", re.DOTALL)
    assert pattern.search(page), f"{begin} and {end} are missing"
    return pattern.sub(lambda _: f"{begin}\n\n{markdown_table(section)}\n\n{end}", page)


def markdown_table(section: type) -> str:
    """The keys of a section as a Markdown table: those of the section itself, then those that all detectors have."""
    own = section.__annotations__
    keys = sorted(keys_of(section), key=lambda key: key.name not in own)
    with_upstream = any(key.upstream for key in keys)
    heads = ["key", "default", *(["upstream"] if with_upstream else []), "what"]
    rows = []
    for key in keys:
        text = f"{key.text} ({key.allowed})" if key.allowed else key.text
        upstream = [f"`{key.upstream}`" if key.upstream else "–"] if with_upstream else []
        default = key.default if key.default in ("required", "–") else f"`{key.default}`"
        rows.append([f"`{key.name}`", default, *upstream, text.replace("|", "\\|")])
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(line)} |" if line[0] != "---" else f"|{'|'.join(line)}|" for line in lines)


def main() -> None:
    for path, (name, section) in sections().items():
        path.write_text(with_table(path.read_text(), name, section))


if __name__ == "__main__":
    main()
