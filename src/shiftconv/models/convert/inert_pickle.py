"""A pickle reader that can only describe: it imports nothing, calls nothing, and spends memory in step with the file.

The standard library's unpickler imports the names in a file and calls them. Even with both switched off, its C version
can be made to allocate 64 GB by a five-byte memo index, to overflow the stack by hashing nested tuples, or to hash for
ever. This machine knows the opcodes of protocols 2 to 5 only; a class becomes a :class:`Name`, its call :class:`Made`.

Source of the opcodes: the documentation of ``pickletools`` in Python's standard library.
"""

import struct
from dataclasses import dataclass, field
from io import BufferedIOBase
from typing import Any, NoReturn

OPCODE_LIMIT = 2_000_000  # the largest genuine checkpoints, with optimizer states, need some hundred thousand
_NAME_LIMIT = 1000  # bytes of a module or class name
_NUMBER_LIMIT = 255  # bytes of an integer

_CONSTANTS = {ord("N"): None, 0x88: True, 0x89: False}
_EMPTY = {ord("}"): dict, ord("]"): list, ord(")"): tuple, 0x8F: list}
_PACKED = {ord("K"): "<B", ord("M"): "<H", ord("J"): "<i", ord("G"): ">d"}
# The bytes of the length, and what the data are. Python 2 strings have no encoding; latin1 keeps every byte.
_TEXT = {
    0x8C: (1, "utf-8"),
    ord("X"): (4, "utf-8"),
    0x8D: (8, "utf-8"),
    ord("U"): (1, "latin1"),
    ord("T"): (4, "latin1"),
}
_BYTES = {ord("C"): 1, ord("B"): 4, 0x8E: 8, 0x96: 8}
_LONG = {0x8A: 1, 0x8B: 4}
_PUT = {ord("q"): 1, ord("r"): 4}
_GET = {ord("h"): 1, ord("j"): 4}
_TUPLE = {0x85: 1, 0x86: 2, 0x87: 3}
_KEY_TYPES = (str, int, float, bool, bytes, type(None))


class PickleError(ValueError):
    """The bytes are no pickle, are damaged, or ask for more than a checkpoint needs."""


@dataclass(frozen=True)
class Name:
    """A class or function that the file names; never looked up."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


@dataclass(eq=False, slots=True)
class Made:
    """What would have come of calling ``what``; holds all that the file would have put into it."""

    what: object
    args: object
    state: object = None
    entries: dict[Any, Any] = field(default_factory=dict)


class InertUnpickler:
    """Reads one pickle after another from ``file``, up to byte ``end``; subclasses give meaning to names and ids.

    Args:
        file: positioned at the first pickle.
        end: no byte from here on exists, whatever the file claims.
    """

    def __init__(self, file: BufferedIOBase, end: int):
        self.file, self.end = file, end
        self.opcodes_left = OPCODE_LIMIT
        self.stack: list[Any] = []
        self.marks: list[list[Any]] = []
        self.memo: dict[int, Any] = {}

    def make(self, what: object, args: object) -> object:
        """What stands for ``what(*args)``."""
        return Made(what, args)

    def persistent(self, pid: object) -> object:
        """What stands for the object that the file keeps outside of the pickle under ``pid``."""
        return Made(None, pid)

    def load(self) -> Any:
        """The next pickle's object. :class:`PickleError` says what is wrong with it."""
        self.stack, self.marks, self.memo = [], [], {}
        steps = _STEPS
        try:
            while True:
                self.spend(1)
                opcode = self.take(1)[0]
                if opcode == 0x2E:  # STOP
                    return self.stack.pop()
                step = steps.get(opcode)
                if step is None:
                    self.fail(f"opcode {bytes([opcode])!r} is not one of protocols 2 to 5")
                step(self, opcode)
        except (IndexError, KeyError, TypeError, ValueError) as error:
            if isinstance(error, PickleError):
                raise
            raise PickleError(f"damaged pickle before byte {self.file.tell()} ({type(error).__name__})") from error

    def fail(self, why: str) -> NoReturn:
        raise PickleError(f"damaged pickle before byte {self.file.tell()}: {why}")

    def spend(self, opcodes: int) -> None:
        self.opcodes_left -= opcodes
        if self.opcodes_left < 0:
            self.fail(f"more than {OPCODE_LIMIT} opcodes, which no checkpoint needs")

    def take(self, count: int) -> bytes:
        left = self.end - self.file.tell()
        if count > left:
            self.fail(f"{count} bytes expected, {left} left in the file")
        return self.file.read(count)

    def take_int(self, width: int) -> int:
        return int.from_bytes(self.take(width), "little")

    def take_line(self) -> str:
        line = self.file.readline(_NAME_LIMIT)
        if not line.endswith(b"\n"):
            self.fail("a name without its end")
        return line[:-1].decode("utf-8")

    def pop_mark(self) -> list[Any]:
        items, self.stack = self.stack, self.marks.pop()
        return items

    def constant(self, opcode: int) -> None:
        self.stack.append(_CONSTANTS[opcode])

    def empty(self, opcode: int) -> None:
        self.stack.append(_EMPTY[opcode]())

    def packed(self, opcode: int) -> None:
        code = _PACKED[opcode]
        self.stack.append(struct.unpack(code, self.take(struct.calcsize(code)))[0])

    def text(self, opcode: int) -> None:
        width, encoding = _TEXT[opcode]
        self.stack.append(self.take(self.take_int(width)).decode(encoding, "surrogatepass"))

    def raw(self, opcode: int) -> None:
        self.stack.append(self.take(self.take_int(_BYTES[opcode])))

    def long(self, opcode: int) -> None:
        count = self.take_int(_LONG[opcode])
        if count > _NUMBER_LIMIT:
            self.fail(f"an integer of {count} bytes")
        self.stack.append(int.from_bytes(self.take(count), "little", signed=True))

    def number(self, opcode: int) -> None:  # Python 2 writes integers of more than 32 bits as text
        self.stack.append(int(self.take_line().removesuffix("L")))

    def put(self, opcode: int) -> None:
        self.memo[self.take_int(_PUT[opcode])] = self.stack[-1]

    def memoize(self, opcode: int) -> None:
        self.memo[len(self.memo)] = self.stack[-1]

    def get(self, opcode: int) -> None:
        self.stack.append(self.memo[self.take_int(_GET[opcode])])

    def mark(self, opcode: int) -> None:
        self.marks.append(self.stack)
        self.stack = []

    def drop(self, opcode: int) -> None:
        if opcode == ord("1"):
            self.pop_mark()
        else:
            self.stack.pop()

    def duplicate(self, opcode: int) -> None:
        self.stack.append(self.stack[-1])

    def short_tuple(self, opcode: int) -> None:
        count = _TUPLE[opcode]
        if len(self.stack) < count:
            self.fail("a tuple of more items than there are")
        items = tuple(self.stack[-count:])
        self.stack[-count:] = [items]

    def long_tuple(self, opcode: int) -> None:
        items = tuple(self.pop_mark())
        self.stack.append(items)

    def frozen_set(self, opcode: int) -> None:
        items = self.pop_mark()
        self.stack.append(items)

    def append(self, opcode: int) -> None:
        items = [self.stack.pop()] if opcode == ord("a") else self.pop_mark()
        if isinstance(self.stack[-1], list):
            self.stack[-1].extend(items)

    def set_items(self, opcode: int) -> None:
        if opcode == ord("s"):
            items = self.stack[-2:]
            del self.stack[-2:]
        else:
            items = self.pop_mark()
        if len(items) % 2:
            self.fail("a key without a value")
        target = self.stack[-1]
        entries = target.entries if isinstance(target, Made) else target
        if not isinstance(entries, dict):
            self.fail(f"items set in a {type(target).__name__}")
        for key, value in zip(items[::2], items[1::2], strict=True):
            self.enter(entries, key, value)

    def enter(self, entries: dict[Any, Any], key: object, value: object) -> None:
        # Hashing a nested tuple recurses without end, and chosen huge integers collide; weights are named by neither.
        if isinstance(key, _KEY_TYPES) and not (isinstance(key, int) and key.bit_length() > 64):
            entries[key] = value

    def name(self, opcode: int) -> None:
        if opcode == ord("c"):
            self.stack.append(Name(self.take_line(), self.take_line()))
            return
        name, module = self.stack.pop(), self.stack.pop()
        if not (isinstance(name, str) and isinstance(module, str) and len(name) + len(module) < _NAME_LIMIT):
            self.fail("a class or function without a name")
        self.stack.append(Name(module, name))

    def call(self, opcode: int) -> None:
        if opcode == 0x92:  # NEWOBJ_EX has keyword arguments too
            self.stack.pop()
        args = self.stack.pop()
        self.stack.append(self.make(self.stack.pop(), args))

    def build(self, opcode: int) -> None:
        state = self.stack.pop()
        if isinstance(self.stack[-1], Made):
            self.stack[-1].state = state

    def persist(self, opcode: int) -> None:
        self.stack.append(self.persistent(self.stack.pop()))

    def protocol(self, opcode: int) -> None:
        version = self.take(1)[0]
        if version not in range(2, 6):
            self.fail(f"protocol {version} instead of 2 to 5")

    def frame(self, opcode: int) -> None:
        self.take(8)  # a hint for buffered reading only


_STEPS = {
    **dict.fromkeys(_CONSTANTS, InertUnpickler.constant),
    **dict.fromkeys(_EMPTY, InertUnpickler.empty),
    **dict.fromkeys(_PACKED, InertUnpickler.packed),
    **dict.fromkeys(_TEXT, InertUnpickler.text),
    **dict.fromkeys(_BYTES, InertUnpickler.raw),
    **dict.fromkeys(_LONG, InertUnpickler.long),
    **dict.fromkeys(_PUT, InertUnpickler.put),
    **dict.fromkeys(_GET, InertUnpickler.get),
    **dict.fromkeys(_TUPLE, InertUnpickler.short_tuple),
    **dict.fromkeys(b"01", InertUnpickler.drop),
    **dict.fromkeys(b"ae\x90", InertUnpickler.append),
    **dict.fromkeys(b"su", InertUnpickler.set_items),
    **dict.fromkeys(b"c\x93", InertUnpickler.name),
    **dict.fromkeys(b"R\x81\x92", InertUnpickler.call),
    **dict.fromkeys(b"IL", InertUnpickler.number),
    0x94: InertUnpickler.memoize,
    ord("("): InertUnpickler.mark,
    ord("2"): InertUnpickler.duplicate,
    ord("t"): InertUnpickler.long_tuple,
    0x91: InertUnpickler.frozen_set,
    ord("b"): InertUnpickler.build,
    ord("Q"): InertUnpickler.persist,
    0x80: InertUnpickler.protocol,
    0x95: InertUnpickler.frame,
}
