"""Finding passes and backends through entry points of small distributions in a temporary folder."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import rewrite
from rewrite import plugins
from rewrite.errors import PipelineError, RewriteError
from rewrite.lowering.lower import backend_names, get_backend
from rewrite.pipeline.pass_ import Pass
from rewrite.pipeline.registry import as_passes, get_pass, parse_pipeline, pass_names

Install = Callable[..., None]

KEPT = "Contract(forward=SAME, backward=SAME)"
PASS = """
from dataclasses import dataclass
from rewrite import Pass
from rewrite.proof.contract import SAME, Contract

@dataclass(frozen=True)
class Probe(Pass):
    name = {name!r}
    alpha: float = 0.5
    label: str = ""

    def contract(self):
        return {contract}

    def run(self, program, context):
        pass
"""


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """Writes a distribution: its module's source and its entry points, as an installer leaves them."""
    monkeypatch.syspath_prepend(tmp_path)

    def write(package: str, points: str, source: str = "", group: str = "rewrite.passes") -> None:
        info = tmp_path / f"{package}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[{group}]\n{points}\n")
        (tmp_path / f"{package}.py").write_text(source)
        monkeypatch.delitem(sys.modules, package, raising=False)

    return write


def test_a_third_party_pass_arrives_as_the_built_in_ones_do(install: Install) -> None:
    install("probing", "probe = probing:Probe", PASS.format(name="probe", contract=KEPT))
    assert {"dyt", "probe"} <= set(pass_names())
    assert get_pass("probe")(alpha=1).text == "probe{alpha=1.0}"


def test_built_in_names() -> None:
    assert pass_names() == tuple(sorted(pass_names()))
    assert set(backend_names()) >= {"eager", "inductor", "onnxruntime"}


def test_listing_imports_nothing(install: Install) -> None:
    install("exploding", "boom = exploding:Boom", "raise ImportError('no such luck')")
    assert "boom" in pass_names()
    with pytest.raises(RewriteError, match=r"pass 'boom' from exploding 1.0 .* no such luck"):
        get_pass("boom")


def test_names_and_pipelines_need_no_torch() -> None:
    code = "import rewrite, sys; rewrite.pass_names(); rewrite.Selector; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"


def test_an_unknown_name_is_answered_with_the_nearest(install: Install) -> None:
    install("probing", "probe = probing:Probe")
    with pytest.raises(RewriteError, match=r"no pass 'prope'; did you mean 'probe'\?; installed: .*dyt"):
        get_pass("prope")
    with pytest.raises(RewriteError, match=r"no backend 'eagre'; did you mean 'eager'\?"):
        get_backend("eagre")


def test_a_name_given_twice_names_both_providers(install: Install) -> None:
    install("probing", "probe = probing:Probe")
    install("rival", "probe = rival.passes:Other")
    both = r"'probe' in rewrite.passes is provided twice, by probing 1.0 .* and rival 1.0 \(rival.passes:Other\)"
    for ask in (pass_names, lambda: get_pass("probe"), lambda: parse_pipeline("probe")):
        with pytest.raises(RewriteError, match=both):
            ask()


def test_a_built_in_name_cannot_be_taken(install: Install) -> None:
    install("rival", "dyt = rival:Other")
    with pytest.raises(RewriteError, match=r"'dyt' .* by rewrite .* rival 1.0|'dyt' .* rival 1.0 .* by rewrite"):
        get_pass("dyt")


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("Probe = dict", "is no subclass of rewrite.Pass"),
        ("def Probe(): pass", "is no subclass of rewrite.Pass"),
        (PASS.format(name="prob", contract=KEPT), "it calls itself 'prob'"),
        (PASS.format(name="probe", contract="None"), "gives no rewrite.Contract"),
        (PASS.format(name="probe", contract=KEPT).replace("def contract", "def promise"), r"it has no contract\(\)"),
        (PASS.format(name="probe", contract=KEPT).replace("def run", "def go"), r"it lacks run\(\)"),
        (PASS.format(name="probe", contract=KEPT).replace("frozen=True", ""), "dataclass"),
        (PASS.format(name="probe", contract=KEPT).replace('str = ""', "list = ()"), "is no type of an option"),
        ("other = 1", "cannot be imported"),
        ("import nowhere_to_be_found", "cannot be imported: No module named 'nowhere_to_be_found'"),
    ],
)
def test_what_is_no_proper_pass_is_refused(install: Install, source: str, reason: str) -> None:
    install("probing", "probe = probing:Probe", source)
    with pytest.raises(RewriteError, match=f"pass 'probe' from probing 1.0 .*{reason}"):
        get_pass("probe")


def test_backends(install: Install) -> None:
    install(
        "lowering",
        "paper = lowering:lower\nstone = lowering:number",
        "lower = print\nnumber = 1",
        "rewrite.backends",
    )
    assert get_backend("paper") is print
    with pytest.raises(RewriteError, match=r"backend 'stone' from lowering 1.0 .* is no function"):
        get_backend("stone")


def test_without_an_install_the_way_out_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plugins, "entry_points", lambda **_: ())
    for ask in (pass_names, backend_names, lambda: get_pass("dyt")):
        with pytest.raises(RewriteError, match=r"pip install -e \."):
            ask()


@pytest.fixture
def probe(install: Install) -> type[Pass]:
    install("probing", "probe = probing:Probe", PASS.format(name="probe", contract=KEPT))
    return get_pass("probe")


def test_pipelines_become_passes(probe: type[Pass]) -> None:
    expected = (probe(), probe(alpha=0.8, label="a b"))
    text = "probe,probe{alpha=0.8 label='a b'}"
    assert parse_pipeline(text) == as_passes(text) == as_passes(list(expected)) == expected
    assert as_passes(expected[1]) == expected[1:]
    assert as_passes(["probe", expected[1], "probe,probe"]) == (*expected, probe(), probe())


@pytest.mark.parametrize(
    ("text", "message", "caret"),
    [
        ("probe,prope", "no pass 'prope'; did you mean 'probe'?", 6),
        ("probe{alpa=1}", "no option 'alpa'; did you mean 'alpha'?", 6),
        ("probe,probe{label=x alpha=fast}", "option 'alpha' of pass 'probe' expects float, got 'fast'", 20),
    ],
)
def test_mistakes_in_a_pipeline_are_pointed_at(probe: type[Pass], text: str, message: str, caret: int) -> None:
    with pytest.raises(PipelineError) as caught:
        parse_pipeline(text)
    assert message in str(caught.value)
    assert str(caught.value).endswith(f"\n  {text}\n  {' ' * caret}^")


def test_what_is_no_pass_is_refused(probe: type[Pass]) -> None:
    with pytest.raises(RewriteError, match=r"names no pass; installed: .*dyt"):
        as_passes(" ")
    for wrong in (probe, 3, [3], None):
        with pytest.raises(RewriteError, match="is no pass: give its text"):
            as_passes(wrong)  # type: ignore[arg-type]


def test_the_package_offers_it() -> None:
    assert rewrite.get_pass is get_pass
    assert rewrite.pass_names is pass_names
