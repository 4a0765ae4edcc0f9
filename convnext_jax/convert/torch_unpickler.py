"""Reads the pickle of a PyTorch file as data: dicts, lists, numbers, strings and tensors.

No `pickle.Unpickler` with a guarded `find_class`, though that is the usual way. It would still
allocate what a memo index or a length asks for, hash tuples so deep that the interpreter crashes,
and let BUILD set the state of whatever a callable returned. The opcodes that PyTorch writes are
few, so they are carried out here. A global is a name and nothing more; REDUCE looks the name up in
the table of `torch_globals` and can call nothing else.
"""

import pickletools
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import IO, Any, Protocol, cast

from convnext_jax.convert.format_error import FormatError, quote
from convnext_jax.convert.torch_globals import INSTEAD, Global, Inert, call, check_global
from convnext_jax.convert.torch_tensors import STORAGE_DTYPES, Storage, is_size

# A training file of the largest ConvNeXt has some 10⁵; an empty dict takes one byte to ask for and
# 64 to build, so this, not the pickle's length, bounds memory and time.
_MOST_OPCODES = 500_000
# NumPy's generators keep 128 bits, the magic number has 80.
_LONGEST_INT = 1024

_TOO_LONG = (
    f"is refused: its pickle takes more than {_MOST_OPCODES:,} steps, far more than weights need; "
    + INSTEAD
)


class Source(Protocol):
    """What the pickle is read from; raises `FormatError` at its end."""

    position: int

    def read(self, size: int) -> bytes:
        """Exactly `size` bytes."""

    def readline(self) -> bytes:
        """A line with its line feed."""


@dataclass(frozen=True, slots=True)
class Pickled:
    """What a pickle held.

    Attributes:
      value: of dicts (with string keys only), lists, tuples, strings, bytes, numbers, None,
        `Tensor`, `Storage`, `Inert` and `Global`. May contain itself.
      storages: those that it refers to, by key.
    """

    value: Any
    storages: dict[str, Storage]


class _Machine:
    """The stack, the marks and the memo that pickle's opcodes work on."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.outer: list[list[Any]] = []
        self.memo: dict[int, Any] = {}
        self.storages: dict[str, Storage] = {}
        self.copied = 0

    def _pop_to_mark(self) -> list[Any]:
        items = self.stack
        self.stack = self.outer.pop()
        return items

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def integer(self, value: int) -> None:
        if value.bit_length() > _LONGEST_INT:
            raise FormatError(
                f"is refused: its pickle holds an integer of {value.bit_length()} bits; "
                "download it again, from a source that you trust"
            )
        self.stack.append(value)

    def mark(self, _: None) -> None:
        self.outer.append(self.stack)
        self.stack = []

    def tuple_to_mark(self, _: None) -> None:
        items = self._pop_to_mark()
        self.stack.append(tuple(items))

    def list_to_mark(self, _: None) -> None:
        self.stack.append(self._pop_to_mark())

    def tuple_of(self, count: int) -> None:
        if len(self.stack) < count:
            raise IndexError
        self.stack[-count:] = [tuple(self.stack[-count:])]

    def append(self, _: None) -> None:
        value = self.stack.pop()
        self._extend(self.stack[-1], [value])

    def appends(self, _: None) -> None:
        items = self._pop_to_mark()
        self._extend(self.stack[-1], items)

    @staticmethod
    def _extend(target: Any, items: list[Any]) -> None:
        if type(target) is list:
            target.extend(items)
        elif not isinstance(target, Inert):
            raise TypeError

    def set_item(self, _: None) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._update(self.stack[-1], [key, value])

    def set_items(self, _: None) -> None:
        items = self._pop_to_mark()
        self._update(self.stack[-1], items)

    @staticmethod
    def _update(target: Any, items: list[Any]) -> None:
        if type(target) is dict:
            # Other keys are an optimizer's. They are not needed, so nothing else is ever hashed:
            # neither deep tuples, nor integers chosen to collide.
            pairs = zip(items[::2], items[1::2], strict=True)
            target.update((key, value) for key, value in pairs if type(key) is str)
        elif not isinstance(target, Inert):
            raise TypeError

    def put(self, index: int) -> None:
        self.memo[index] = self.stack[-1]

    def memoize(self, _: None) -> None:
        self.memo[len(self.memo)] = self.stack[-1]

    def get(self, index: int) -> None:
        self.stack.append(self.memo[index])

    def global_(self, name: str) -> None:
        self.stack.append(check_global(name))

    def stack_global(self, _: None) -> None:
        name, module = self.stack.pop(), self.stack.pop()
        if type(name) is not str or type(module) is not str:
            raise TypeError
        self.stack.append(check_global(f"{module} {name}"))

    def _call(self, function: Any, arguments: Any) -> None:
        if not isinstance(function, Global) or type(arguments) is not tuple:
            raise TypeError
        if function.name == "collections OrderedDict" and arguments:
            self.copied += len(arguments[0])
            if self.copied > _MOST_OPCODES:
                raise FormatError(_TOO_LONG)
        self.stack.append(call(function, arguments))

    def reduce(self, _: None) -> None:
        arguments, function = self.stack.pop(), self.stack.pop()
        self._call(function, arguments)

    def new_object_with_keywords(self, _: None) -> None:
        keywords, arguments, cls = self.stack.pop(), self.stack.pop(), self.stack.pop()
        if keywords != {}:
            raise TypeError
        self._call(cls, arguments)

    def build(self, _: None) -> None:
        # The attributes of a state dict (its versions) and of options: neither holds weights.
        self.stack.pop()
        if not isinstance(self.stack[-1], dict | Inert):
            raise TypeError

    def persistent(self, _: None) -> None:
        reference = self.stack.pop()
        if type(reference) is not tuple or not 2 <= len(reference) <= 6:
            raise TypeError
        if type(reference[0]) is str and reference[0] == "module":
            raise FormatError(
                f"holds a whole PyTorch module, whose code is never run here; {INSTEAD}"
            )
        kind, cls, key, _location, numel, *rest = reference
        if type(kind) is not str or kind != "storage" or not isinstance(cls, Global):
            raise TypeError
        if type(key) is int:
            key = str(key)
        if type(key) is not str or not is_size(numel):
            raise TypeError
        view = None
        if rest and rest[0] is not None:
            _view_key, first, length = rest[0]
            if not is_size(first) or not is_size(length):
                raise TypeError
            view = (first, length)
        storage = Storage(key, STORAGE_DTYPES[cls.name], numel, view)
        known = self.storages.setdefault(key, storage)
        if known.numel * known.dtype.itemsize != numel * storage.dtype.itemsize:
            raise FormatError(f"is damaged: its storage {quote(key)} has two lengths")
        self.stack.append(storage)


_PUSHES = (
    "BINFLOAT", "BINSTRING", "SHORT_BINSTRING", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8",
    "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8", "BININT", "BININT1", "BININT2",
)  # fmt: skip

_HANDLERS: dict[str, Callable[[_Machine, Any], None]] = {
    **dict.fromkeys(_PUSHES, _Machine.push),
    "LONG1": _Machine.integer,
    "LONG4": _Machine.integer,
    "PROTO": lambda machine, version: None,
    "FRAME": lambda machine, length: None,
    "NONE": lambda machine, _: machine.push(None),
    "NEWTRUE": lambda machine, _: machine.push(True),
    "NEWFALSE": lambda machine, _: machine.push(False),
    "EMPTY_DICT": lambda machine, _: machine.push({}),
    "EMPTY_LIST": lambda machine, _: machine.push([]),
    "EMPTY_TUPLE": lambda machine, _: machine.push(()),
    # Sets hold no weights either, and as lists nothing in them is hashed.
    "EMPTY_SET": lambda machine, _: machine.push([]),
    "ADDITEMS": _Machine.appends,
    "FROZENSET": _Machine.list_to_mark,
    "MARK": _Machine.mark,
    "TUPLE": _Machine.tuple_to_mark,
    "TUPLE1": lambda machine, _: machine.tuple_of(1),
    "TUPLE2": lambda machine, _: machine.tuple_of(2),
    "TUPLE3": lambda machine, _: machine.tuple_of(3),
    "APPEND": _Machine.append,
    "APPENDS": _Machine.appends,
    "SETITEM": _Machine.set_item,
    "SETITEMS": _Machine.set_items,
    "BINPUT": _Machine.put,
    "LONG_BINPUT": _Machine.put,
    "MEMOIZE": _Machine.memoize,
    "BINGET": _Machine.get,
    "LONG_BINGET": _Machine.get,
    "GLOBAL": _Machine.global_,
    "STACK_GLOBAL": _Machine.stack_global,
    "REDUCE": _Machine.reduce,
    "NEWOBJ": _Machine.reduce,
    "NEWOBJ_EX": _Machine.new_object_with_keywords,
    "BUILD": _Machine.build,
    "BINPERSID": _Machine.persistent,
}

_OPCODES = {op.code.encode("latin-1"): op for op in pickletools.opcodes}


def _read_global(source: Source) -> str:
    # The reader of pickletools takes backslashes for escapes, which the pickle module does not.
    module, name = source.readline(), source.readline()
    return f"{module[:-1].decode('ascii')} {name[:-1].decode('ascii')}"


def load(source: Source) -> Pickled:
    """Reads one pickle and stops right after it.

    Args:
      source: stands at the pickle's first byte.

    Returns:
      Its data. Nothing of the file has been called, imported or, but for the pickle, read.

    Raises:
      FormatError: if the pickle is damaged or asks for anything that weights do not need.
    """
    machine = _Machine()
    # The readers of pickletools use these two methods of a file and no other.
    stream = cast("IO[bytes]", source)
    for _ in range(_MOST_OPCODES):
        at = source.position
        opcode = _OPCODES.get(source.read(1))
        try:
            if opcode is not None and opcode.name == "STOP":
                (value,) = machine.stack
                () = machine.outer
                return Pickled(value, machine.storages)
            handler = None if opcode is None else _HANDLERS.get(opcode.name)
            if opcode is None or handler is None:
                raise FormatError(
                    f"is refused: its pickle has "
                    f"{'no known opcode' if opcode is None else 'the opcode ' + opcode.name} at "
                    f"byte {at}, which torch.save does not write; download it again, from a source "
                    "that you trust"
                )
            if opcode.name == "GLOBAL":
                argument: Any = _read_global(source)
            else:
                argument = opcode.arg.reader(stream) if opcode.arg is not None else None
            handler(machine, argument)
        except (ValueError, TypeError, LookupError, OverflowError, struct.error) as error:
            raise FormatError(
                f"is damaged: its pickle makes no sense at byte {at}; download it again, from a "
                "source that you trust"
            ) from error
    raise FormatError(_TOO_LONG)
