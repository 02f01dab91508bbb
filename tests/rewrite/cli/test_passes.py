"""`rewrite passes`."""

from __future__ import annotations

import dataclasses
import json
from importlib.metadata import EntryPoint, entry_points

import pytest

from rewrite import plugins
from rewrite.pipeline import registry
from rewrite.pipeline.pass_ import describe
from tests.rewrite.cli.running import ROOT, fails, fresh, run


def test_passes_text_and_json_come_from_one_description() -> None:
    listed = json.loads(run("passes", "--json").stdout)
    assert [each["name"] for each in listed] == list(registry.pass_names())
    text = " ".join(run("passes").stdout.split())
    assert all(each["name"] in text and " ".join(each["summary"].split()) in text for each in listed)
    one = json.loads(run("passes", "dyt", "--json").stdout)
    assert one == next(each for each in listed if each["name"] == "dyt")
    description = describe(registry.get_pass("dyt"))
    assert one["contract"] == {"forward": "new", "backward": "new"}
    assert [option["name"] for option in one["options"]] == [option.name for option in description.options]
    page = " ".join(run("passes", "dyt").stdout.split())
    assert "promises forward new, backward new" in page
    assert "dyt{alpha=0.5 alpha_attention=none" in page
    for option in one["options"]:
        assert {option["name"], *option["type"].split(), option["default"]} <= set(page.split())
    assert "arXiv 2503.10622" in page


def test_passes_of_an_unknown_name() -> None:
    assert "there is no pass 'dit'; did you mean 'dyt'?" in fails("passes", "dit")


def test_a_pass_that_cannot_be_had_does_not_hide_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    lost = EntryPoint("lost", "no_such_module:Lost", registry.PASSES)
    monkeypatch.setattr(plugins, "entry_points", lambda group: [*entry_points(group=group), lost])
    text = " ".join(run("passes").stdout.split())
    assert "cannot be imported" in text
    assert "dyt" in text


def test_passes_are_described_without_torch() -> None:
    code = "import sys; from rewrite.cli.commands import app\ntry: app(['passes', '--json'])\n"
    code += "except SystemExit: print('torch' in sys.modules)"
    assert fresh(code, ROOT).endswith("False")


@pytest.mark.parametrize("name", registry.pass_names())
def test_what_the_source_tells_is_what_the_class_says(name: str) -> None:
    found = registry.get_pass(name)
    contract = found().contract()
    promises = {"forward": contract.forward.value, "backward": contract.backward.value}
    assert registry.description_of(name) == {**dataclasses.asdict(describe(found)), "contract": promises}
