"""Write docs/passes.md from what the built-in passes say about themselves.

python docs/make_passes.py            write the page
python docs/make_passes.py --check    exit 1 if the page is not up to date
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

from rewrite import Pass, get_pass, pass_names
from rewrite.pipeline.pass_ import OptionDescription, describe

PAGE = Path(__file__).with_name("passes.md")
PICTURES = Path(__file__).with_name("pictures") / "passes.json"
TOP = """\
# Passes

Written by `python docs/make_passes.py` from the descriptions that the passes themselves carry; `rewrite passes` and
`rewrite passes NAME` print the same, also for passes that other packages bring.

What the promises mean, and how each is checked, is in [how it works](how-it-works.md#the-proof). A pass is used as
`NAME` or `NAME{option=value option=value}`; options not given have the defaults below.

| pass | what it does | forward | backward |
| --- | --- | --- | --- |
"""


def main() -> int:
    """Write or check the page; the exit code."""
    if "--check" not in sys.argv[1:]:
        PAGE.write_text(page(), encoding="utf-8")
        return 0
    if PAGE.exists() and PAGE.read_text(encoding="utf-8") == page():
        return 0
    print(f"{PAGE} is not up to date: run python docs/make_passes.py", file=sys.stderr)
    return 1


def page() -> str:
    """The whole page."""
    found = list(built_in())
    rows = "".join(_row(each) for each in found)
    return TOP + rows + "".join(section(each) for each in found)


def built_in() -> Iterator[type[Pass]]:
    """The passes of this package, by name; others that are installed are their own packages' to document."""
    for name in pass_names():
        found = get_pass(name)
        if found.__module__.startswith("rewrite.passes."):
            yield found


def section(pass_class: type[Pass]) -> str:
    """One pass: its text, its promises, its options."""
    told, contract = describe(pass_class), pass_class().contract()
    text = told.doc.replace("``", "`")
    options = "".join(_option(each) for each in told.options)
    table = f"\n| option | type | default | |\n| --- | --- | --- | --- |\n{options}" if options else "\nNo options.\n"
    return f"\n## {told.name}\n\n{text}\n\nPromises: {contract}.\n{table}{_picture(told.name)}"


def _picture(name: str) -> str:
    """What the pass does to a tiny model, as docs/make_pictures.py drew it; empty for one that is not drawn yet."""
    drawn = json.loads(PICTURES.read_text(encoding="utf-8")).get(name)
    if drawn is None:
        return ""
    after = f", after `{drawn['after']}`" if drawn["after"] else ""
    lines = "".join(f"{line}\n" for line in drawn["lines"])
    return f"\n`{drawn['step']}` on a tiny model (`{drawn['model']}`{after}):\n\n```diff\n{lines}```\n"


def _row(pass_class: type[Pass]) -> str:
    told, contract = describe(pass_class), pass_class().contract()
    summary = _cell(told.summary.replace("``", "`"))
    return f"| [{told.name}](#{told.name}) | {summary} | {contract.forward.value} | {contract.backward.value} |\n"


def _option(told: OptionDescription) -> str:
    accepted = f" ({_cell(told.accepts)})" if told.accepts else ""
    return f"| `{told.name}` | {_cell(told.type)} | `{_cell(told.default)}` | {_cell(told.help)}{accepted} |\n"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


if __name__ == "__main__":
    sys.exit(main())
