"""The local proof: a program equals another because each part that differs equals its old form, held alone.

Most of a program is untouched by a pass. Where two graphs agree node for node, equality needs no run; where they differ,
the old and the new form of that part alone are run on the values that flow into it. A part that fails at recorded values
grows downstream: what a pass moved from one layer to the next is equal behind both. What fails at a probe is wrong.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from torch.fx import Node

from rewrite.graph.maps import ParameterMap
from rewrite.graph.program import Program
from rewrite.graph.relation import Relation
from rewrite.numerics.compare import TOLERANCE

from .claims import Claims, Pair
from .classes import signature
from .cuts import Cut, Cutter
from .held import Held, hold
from .hold import Forms, trials
from .record import Tape
from .setting import Setting
from .tensors import World
from .variants import EXAMPLE, variants

_ROUNDS = 12
"""How often parts may grow: the last time by 2^11 nodes."""


@dataclass
class LocalProof:
    """Holds ``after`` against ``before``; with ``gradients`` those of the old parameters too, with ``training`` both modes.

    ``maps`` say how parameters of ``after`` follow from those of ``before``; ``moved`` names nodes whose values change on
    purpose. Where it says how, they are held to that, and what reads them is given that; else what reads them is held and
    not they themselves.
    """

    before: Program
    after: Program
    maps: Mapping[str, ParameterMap] = field(default_factory=dict)
    gradients: bool = True
    training: bool = True
    probed: bool = True
    seed: int = 0
    moved: Mapping[str, Relation | None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        related = {name: relation for name, relation in self.moved.items() if relation is not None}
        self.claims = Claims.of(self.before, self.after, related)
        moved = (new for new in self.claims.partner if new.name in self.moved and new.op != "placeholder")
        moved = (new for new in moved if new not in self.claims.related)
        self._withdraw([(self.claims.partner[new], new) for new in moved])
        origin = World.of(self.before.module)
        self.worlds = (origin, World.of(self.after.module, self.maps, origin))
        self.tape = Tape(self.before, dict(variants(self.before, self.seed)), self.seed)

    def held(self) -> Iterator[Held]:
        """Every cut, held: the first of each class in every way, the others on the example alone."""
        cuts = self.grown()
        kinds = {id(cut): signature(cut, self.before.module, self.after.module) for cut in cuts}
        first = set() if not self.probed else {id(cut) for cut in {kinds[id(cut)]: cut for cut in reversed(cuts)}.values()}
        probed = [cut for cut in cuts if id(cut) in first]
        self.tape.keep(_borders(cuts), _borders(probed))
        for cut in cuts:
            yield self._hold(cut, first=id(cut) in first)

    def grown(self) -> list[Cut]:
        """The cuts, grown until each holds at the recorded values of the example, or cannot grow any more."""
        passed: set[tuple[Pair, ...]] = set()
        for growth in range(_ROUNDS):
            cuts = Cutter(self.claims).cuts()
            untried = [cut for cut in cuts if cut.outputs not in passed]
            self.tape.keep(_borders(cuts))
            failing = [cut for cut in untried if not self._holds_recorded(cut)]
            passed |= {cut.outputs for cut in untried if cut not in failing}
            if not self._grow(failing, 2**growth):
                return cuts
        return Cutter(self.claims).cuts()

    def _holds_recorded(self, cut: Cut) -> bool:
        """Whether a cut holds where it stands, with the weights as they are and with others: ones and zeros hide much."""
        values = self.tape.values(cut.old_border, EXAMPLE, training=False)
        assert values is not None
        forms = Forms.of(self.worlds, cut)
        settings = (Setting(gradients=False, moved=moved, seed=self.seed) for moved in (0.0, 0.3))
        return all(forms.judged(values, setting).largest <= TOLERANCE for setting in settings)

    def _grow(self, failing: Sequence[Cut], steps: int) -> bool:
        """Drop the claims of failing cuts and of what follows within ``steps`` nodes; whether there was any to drop."""
        final = set(self.claims.final())
        pairs = {pair for cut in failing for pair in cut.outputs} - final
        for pair in list(pairs):
            pairs |= set(_downstream(pair, self.claims, steps)) - final
        self._withdraw(pairs)
        return bool(pairs)

    def _withdraw(self, pairs: Collection[Pair]) -> None:
        """Drop some claims; not those about the outputs."""
        final = set(self.claims.final())
        for pair in (p for p in pairs if p not in final):
            self.claims.drop(pair)
        if pairs:
            self.claims.settle()

    def _hold(self, cut: Cut, *, first: bool) -> Held:
        plain = Setting(gradients=self.gradients, seed=self.seed)
        modes = (False, True) if self.training else (False,)
        forms = Forms.of(self.worlds, cut)
        return hold(forms, trials(forms, cut.old_border, self.tape, plain, modes, first=first))


def _borders(cuts: Iterable[Cut]) -> frozenset[Node]:
    return frozenset(node for cut in cuts for node in cut.old_border)


def _downstream(pair: Pair, claims: Claims, steps: int) -> Iterator[Pair]:
    """The claims about what follows a pair, within some nodes; inputs are the same whatever is rewired to them."""
    reached, level = {pair[1]}, [pair[1]]
    while level and steps > 0:
        level = [user for node in level for user in node.users if user not in reached]
        reached |= set(level)
        steps -= len(level)
    yield from ((claims.partner[node], node) for node in reached if node in claims.partner and node.op != "placeholder")
