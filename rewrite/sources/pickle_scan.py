"""A pickle read as data: the names it mentions, and what it would call, rebuild and store. Nothing runs.

Only the opcodes that torch's `weights_only` unpickler knows are accepted, which are those of `torch.save`.
"""

from __future__ import annotations

import pickletools
from dataclasses import dataclass, field
from typing import Any

# Written by Python 3 for the readers of Python 2, which protocol 2 was made for.
_RENAMED = {"__builtin__": "builtins", "copy_reg": "copyreg"}

_LITERALS = {"BININT", "BININT1", "BININT2", "BINFLOAT", "BINUNICODE", "SHORT_BINSTRING", "LONG1"}
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_EMPTY = {"EMPTY_TUPLE": "tuple", "EMPTY_LIST": "list", "EMPTY_DICT": "dict", "EMPTY_SET": "set"}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_GET, _PUT = {"BINGET", "LONG_BINGET"}, {"BINPUT", "LONG_BINPUT"}


class UnreadableError(Exception):
    """The pickle is damaged, or uses what `torch.save` does not write."""


@dataclass(frozen=True)
class Global:
    """A class or function, by the name that the pickle gives it."""

    module: str
    name: str

    @property
    def path(self) -> str:
        return f"{self.module}.{self.name}"


@dataclass(eq=False)
class Node:
    """One object that the pickle would make.

    `kind` is `tuple`, `list`, `dict`, `set`, `storage`, `call` (of a function or class, with arguments) or
    `new` (a class, rebuilt without its constructor). `items` are a tuple's elements or the arguments; `entries`
    all that is put in afterwards, a mapping's keys and values by turns; `states` all that BUILD sets. Both only
    grow, since an entry that is replaced later may have been used before.
    """

    kind: str
    of: Any = None
    items: tuple[Any, ...] = ()
    entries: list[Any] = field(default_factory=list)
    states: list[Any] = field(default_factory=list)

    @property
    def callee(self) -> str:
        """The name of what is called or rebuilt; empty if it is not given by name."""
        return self.of.path if isinstance(self.of, Global) else ""

    @property
    def is_mapping(self) -> bool:
        return self.kind == "dict" or (self.callee == "collections.OrderedDict" and not self.items)


@dataclass(frozen=True)
class Scan:
    """The object that the pickle makes, and all others on the way, with the names in order of mention."""

    root: Any
    nodes: tuple[Node, ...]
    names: tuple[Global, ...]


def scan(data: bytes) -> Scan:
    """Follow the opcodes with placeholders for every object.

    Raises:
        UnreadableError: damage, or an opcode or use of one that `torch.save` does not produce.
    """
    machine = _Machine()
    try:
        for opcode, argument, _ in pickletools.genops(data):
            machine.step(opcode.name, argument)
        root = machine.pop()
    except (ValueError, IndexError, KeyError, TypeError, AttributeError, UnicodeError):
        raise UnreadableError("its pickle is damaged") from None
    return Scan(root, tuple(machine.nodes), tuple(machine.names))


class _Machine:
    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.marks: list[list[Any]] = []
        self.memo: dict[int, Any] = {}
        self.nodes: list[Node] = []
        self.names: dict[Global, None] = {}

    def step(self, name: str, argument: Any) -> None:
        if name in _LITERALS:
            self.stack.append(argument)
        elif name in _CONSTANTS:
            self.stack.append(_CONSTANTS[name])
        elif name in _EMPTY:
            self.push(Node(_EMPTY[name]))
        elif name in _GET:
            self.stack.append(self.memo[argument])
        elif name in _PUT:
            self.memo[argument] = self.stack[-1]
        elif name in _TUPLES:
            items = [self.pop() for _ in range(_TUPLES[name])]
            self.push(Node("tuple", items=tuple(reversed(items))))
        elif name == "PROTO" and argument != 2:
            raise UnreadableError(f"it was saved with pickle_protocol={argument}, where torch.save's own is 2")
        elif name not in ("PROTO", "STOP"):
            operation = getattr(self, f"do_{name.lower()}", None)
            if operation is None:
                raise UnreadableError(f"its pickle has the opcode {name}, which torch.save does not write")
            operation(argument)

    def push(self, node: Node) -> None:
        self.nodes.append(node)
        self.stack.append(node)

    def pop(self) -> Any:
        return self.stack.pop()

    def pop_mark(self) -> list[Any]:
        items, self.stack = self.stack, self.marks.pop()
        return items

    def target(self, *, mapping: bool) -> Node:
        node = self.stack[-1]
        if not isinstance(node, Node) or not (node.is_mapping if mapping else node.kind == "list"):
            raise UnreadableError("its pickle fills an object that is no list or dict")
        return node

    def do_global(self, argument: str) -> None:
        module, name = argument.split(" ")
        found = Global(_RENAMED.get(module, module), name)
        self.names[found] = None
        self.stack.append(found)

    def do_mark(self, _: None) -> None:
        self.marks.append(self.stack)
        self.stack = []

    def do_tuple(self, _: None) -> None:
        items = tuple(self.pop_mark())
        self.push(Node("tuple", items=items))

    def do_append(self, _: None) -> None:
        item = self.pop()
        self.target(mapping=False).entries.append(item)

    def do_appends(self, _: None) -> None:
        items = self.pop_mark()
        self.target(mapping=False).entries.extend(items)

    def do_setitem(self, _: None) -> None:
        value, key = self.pop(), self.pop()
        self.target(mapping=True).entries.extend((key, value))

    def do_setitems(self, _: None) -> None:
        items = self.pop_mark()
        if len(items) % 2:
            raise UnreadableError("its pickle is damaged")
        self.target(mapping=True).entries.extend(items)

    def do_reduce(self, _: None) -> None:
        self.make("call")

    def do_newobj(self, _: None) -> None:
        self.make("new")

    def make(self, kind: str) -> None:
        arguments, of = self.pop(), self.pop()
        if not isinstance(arguments, Node) or arguments.kind != "tuple":
            raise UnreadableError("its pickle is damaged")
        self.push(Node(kind, of=of, items=arguments.items))

    def do_build(self, _: None) -> None:
        state = self.pop()
        node = self.stack[-1]
        if not isinstance(node, Node) or node.kind not in ("call", "new"):
            raise UnreadableError("its pickle sets the state of an object that has none")
        node.states.append(state)

    def do_binpersid(self, _: None) -> None:
        key = self.pop()
        if not isinstance(key, Node) or key.kind != "tuple" or not key.items or key.items[0] != "storage":
            raise UnreadableError("its pickle refers to something outside that is no tensor's storage")
        self.push(Node("storage", items=key.items))
