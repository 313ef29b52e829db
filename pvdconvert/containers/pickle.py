"""The one reader of pickles: an interpreter that can build inert values and nothing else. No torch.

It never imports or calls a name from the file. Known names map to our own safe constructors (``pickle_names``), others
become a :class:`Stub`. Work and memory are bounded by the size of the file: one step an opcode, no opcode without
a byte, and whatever can copy is charged to a budget. Python's own ``pickle`` is not used: its memo and its frames can
be made to allocate gigabytes from a few bytes, and it hashes nested tuples in exponential time.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any

from pvdconvert.containers.pickle_names import HANDLERS, make_set
from pvdconvert.containers.values import Array, DType, Global, Malformed, Stub
from pvdconvert.errors import InputError, UnsafeError

MAX_OPS = 1_000_000
MAX_LINE = 4096
MAX_INT_BYTES = 1024
SLACK = 64 << 20

# Calling any of these is an attack, not a checkpoint: said aloud instead of only ignored.
_DANGEROUS = frozenset(
    {"os", "posix", "nt", "subprocess", "sys", "shutil", "socket", "runpy", "importlib", "ctypes", "pty", "commands"}
    | {"webbrowser", "code", "pdb", "timeit", "asyncio", "multiprocessing", "http", "urllib"}
)
_DANGEROUS_BUILTINS = frozenset({"eval", "exec", "execfile", "compile", "open", "__import__", "input", "breakpoint"})


_INT, _SHORT, _UINT, _ULONG, _DOUBLE = (struct.Struct(form) for form in ("<i", "<H", "<I", "<Q", ">d"))


def _renamed(module: str, name: str) -> str:
    if module in ("__builtin__", "copy_reg"):
        module = {"__builtin__": "builtins", "copy_reg": "copyreg"}[module]
    elif module.startswith("numpy._core"):
        module = "numpy.core" + module.removeprefix("numpy._core")
    return f"{module}.{name}"


class Unpickler:
    """Reads one pickle from ``data`` at ``pos``; :attr:`pos` is then just behind it.

    ``persistent(pid)`` answers persistent ids (torch's storages). Raises Malformed, or UnsafeError where the file asks
    for a call that only an attack needs.
    """

    def __init__(
        self, data: memoryview, pos: int = 0, persistent: Callable[[Any], Any] | None = None, where: str = "file"
    ) -> None:
        self.data, self.pos, self.persistent, self.where = data, pos, persistent, where
        self.budget = 4 * len(data) + SLACK
        self.stack: list[Any] = []
        self.marks: list[list[Any]] = []
        self.memo: dict[int, Any] = {}
        self.tokens = 0

    def load(self) -> Any:
        ops, data = _OPS, self.data
        try:
            for _ in range(MAX_OPS):
                code = data[self.pos]
                self.pos += 1
                if code == 0x2E:  # STOP
                    return self.stack.pop()
                op = ops.get(code)
                if op is None:
                    raise Malformed(f"opcode 0x{code:02x} at byte {self.pos - 1} is unknown or not allowed")
                op(self)
        except (IndexError, KeyError, struct.error) as error:
            raise Malformed(f"truncated or corrupt pickle near byte {self.pos}") from error
        except (ValueError, OverflowError, TypeError, RecursionError) as error:
            raise Malformed(f"corrupt pickle near byte {self.pos}: {error}") from error
        raise Malformed(f"more than {MAX_OPS} pickle operations")

    # Reading.
    def take(self, count: int) -> memoryview:
        start = self.pos
        if count < 0 or count > len(self.data) - start:
            raise Malformed(f"a value of {count} bytes at byte {start} reaches beyond the end")
        self.pos = start + count
        return self.data[start : self.pos]

    def number(self, form: struct.Struct) -> Any:
        value = form.unpack_from(self.data, self.pos)[0]
        self.pos += form.size
        return value

    def byte(self) -> int:
        value = self.data[self.pos]
        self.pos += 1
        return value

    def line(self) -> str:
        chunk = bytes(self.data[self.pos : self.pos + MAX_LINE])
        end = chunk.find(b"\n")
        if end < 0:
            raise Malformed(f"an endless line at byte {self.pos}")
        self.pos += end + 1
        return chunk[:end].decode("utf-8", "backslashreplace")

    def text(self, count: int) -> str:
        return bytes(self.take(count)).decode("utf-8", "surrogatepass")

    def long(self, count: int) -> int:
        if count > MAX_INT_BYTES:
            raise Malformed(f"an integer of {count} bytes")
        return int.from_bytes(self.take(count), "little", signed=True)

    def spend(self, count: int) -> None:
        self.budget -= count
        if self.budget < 0:
            raise Malformed("the pickle unpacks to far more than its size")

    # Building.
    def push(self, value: Any) -> None:
        self.stack.append(value)

    def pop_mark(self) -> list[Any]:
        items = self.stack
        self.stack = self.marks.pop()
        return items

    def key(self, value: Any) -> Any:
        """``value`` if it can be a key in constant time, else a unique name for it."""
        if value is None or type(value) in (str, int, float, bool, bytes, complex, Global):
            return value
        if type(value) is tuple and len(value) <= 16 and all(type(v) in (str, int, float, bool) for v in value):
            return value
        self.tokens += 1
        return f"<{getattr(value, 'name', type(value).__name__)}#{self.tokens}>"

    def mapping(self, pairs: Any) -> dict[Any, Any]:
        self.spend(16 * len(pairs))
        return {self.key(k): v for k, v in pairs}

    def call(self, func: Any, args: Any) -> Any:
        """What stands for ``func(*args)``."""
        if not isinstance(args, tuple):
            raise Malformed(f"a call without an argument tuple near byte {self.pos}")
        if isinstance(func, Stub):
            return Stub(f"{func.name}()", args)
        if not isinstance(func, Global):
            raise Malformed(f"a call of something that is no function near byte {self.pos}")
        parts = func.name.split(".")
        if _DANGEROUS & set(parts[:-1]) or (parts[0] == "builtins" and parts[-1] in _DANGEROUS_BUILTINS):
            raise UnsafeError(
                f"{self.where}: loading this file would call {func.name!r:.80}: refused, nothing was run",
                hint="it is not a plain checkpoint; do not open it with other programs",
            )
        handler = HANDLERS.get(func.name)
        return Stub(func.name, args) if handler is None else handler(self, *args)

    def set_items(self, target: Any, flat: list[Any]) -> None:
        if len(flat) % 2:
            raise Malformed(f"a dictionary with a key but no value near byte {self.pos}")
        into = target.entries if isinstance(target, Stub) else target
        if not isinstance(into, dict):
            raise Malformed(f"items set on something that is no dictionary near byte {self.pos}")
        for k in range(0, len(flat), 2):
            into[self.key(flat[k])] = flat[k + 1]

    def extend(self, target: Any, values: list[Any]) -> None:
        if isinstance(target, (list, Stub)):
            (target if isinstance(target, list) else target.items).extend(values)
        elif isinstance(target, set):
            target.update(self.key(v) for v in values)
        else:
            raise Malformed(f"items appended to something that is no list near byte {self.pos}")

    def build(self, target: Any, state: Any) -> None:
        if isinstance(target, Stub):
            target.state = state
        elif isinstance(target, Array) and isinstance(state, tuple) and len(state) == 5:
            target.fill(*state[1:])
        elif isinstance(target, DType) and isinstance(state, tuple) and len(state) > 1:
            target.big_endian = state[1] == ">"
            if len(state) > 4 and (state[2] is not None or state[3] is not None):
                target.kind = "V"
        # An attribute set on a plain dict or list (a state_dict's _metadata) carries nothing that we need.


# Opcodes (PEP 307, 3154, 574). EXT1/2/4, NEXT_BUFFER and READONLY_BUFFER need outside help and are refused.
def _memo_put(u: Unpickler, index: int) -> None:
    u.memo[index] = u.stack[-1]


def _mark(u: Unpickler) -> None:
    u.marks.append(u.stack)
    u.stack = []


def _pop(u: Unpickler) -> None:
    if u.stack:
        u.stack.pop()
    else:
        u.pop_mark()


def _pop_mark(u: Unpickler) -> None:
    u.pop_mark()


def _skip(count: int) -> Callable[[Unpickler], None]:
    def op(u: Unpickler) -> None:
        u.take(count)

    return op


def _tuple_n(count: int) -> Callable[[Unpickler], None]:
    def op(u: Unpickler) -> None:
        if len(u.stack) < count:
            raise IndexError
        start = len(u.stack) - count
        u.stack[start:] = [tuple(u.stack[start:])]

    return op


def _dict_op(u: Unpickler) -> None:
    items, out = u.pop_mark(), dict[Any, Any]()
    u.set_items(out, items)
    u.push(out)


def _set_item(u: Unpickler) -> None:
    value, key = u.stack.pop(), u.stack.pop()
    u.set_items(u.stack[-1], [key, value])


def _append(u: Unpickler) -> None:
    value = u.stack.pop()
    u.extend(u.stack[-1], [value])


def _bulk(action: Callable[[Unpickler, Any, list[Any]], None]) -> Callable[[Unpickler], None]:
    def op(u: Unpickler) -> None:
        items = u.pop_mark()
        action(u, u.stack[-1], items)

    return op


def _global(u: Unpickler) -> None:
    module = u.line()
    u.push(Global(_renamed(module, u.line())))


def _stack_global(u: Unpickler) -> None:
    name, module = u.stack.pop(), u.stack.pop()
    if not isinstance(name, str) or not isinstance(module, str) or len(name) + len(module) > MAX_LINE:
        raise Malformed("a global without a name")
    u.push(Global(_renamed(module, name)))


def _reduce(u: Unpickler) -> None:
    args, func = u.stack.pop(), u.stack.pop()
    u.push(u.call(func, args))


def _newobj_ex(u: Unpickler) -> None:
    kwargs, args, kind = u.stack.pop(), u.stack.pop(), u.stack.pop()
    out = u.call(kind, args)
    if isinstance(out, Stub) and isinstance(kwargs, dict):
        out.entries.update(kwargs)
    u.push(out)


def _inst(u: Unpickler) -> None:
    module = u.line()
    func = Global(_renamed(module, u.line()))
    u.push(u.call(func, tuple(u.pop_mark())))


def _obj(u: Unpickler) -> None:
    items = u.pop_mark()
    u.push(u.call(items[0], tuple(items[1:])))


def _build(u: Unpickler) -> None:
    state = u.stack.pop()
    u.build(u.stack[-1], state)


def _persid(u: Unpickler, pid: Any) -> None:
    if u.persistent is None:
        raise Malformed("it refers to data outside of itself")
    u.push(u.persistent(pid))


def _int(u: Unpickler) -> None:
    text = u.line()
    u.push({"00": False, "01": True}[text] if text in ("00", "01") else int(text))


def _string(u: Unpickler) -> None:
    text = u.line()
    if len(text) < 2 or text[0] not in "'\"" or text[-1] != text[0]:
        raise Malformed("a string without quotes")
    u.push(text[1:-1])  # escapes stay as they are: such strings are names or labels


def _latin(u: Unpickler, count: int) -> None:
    raw = bytes(u.take(count))
    try:
        u.push(raw.decode("ascii"))
    except UnicodeDecodeError:
        u.push(raw)  # python 2's str: bytes of an array


_OPS: dict[int, Callable[[Unpickler], None]] = {
    ord("("): _mark,
    ord("0"): _pop,
    ord("1"): _pop_mark,
    ord("2"): lambda u: u.push(u.stack[-1]),
    ord("F"): lambda u: u.push(float(u.line())),
    ord("I"): _int,
    ord("L"): lambda u: u.push(int(u.line().rstrip("L"))),
    ord("J"): lambda u: u.push(u.number(_INT)),
    ord("K"): lambda u: u.push(u.byte()),
    ord("M"): lambda u: u.push(u.number(_SHORT)),
    ord("N"): lambda u: u.push(None),
    ord("P"): lambda u: _persid(u, u.line()),
    ord("Q"): lambda u: _persid(u, u.stack.pop()),
    ord("R"): _reduce,
    ord("S"): _string,
    ord("T"): lambda u: _latin(u, u.number(_INT)),
    ord("U"): lambda u: _latin(u, u.byte()),
    ord("V"): lambda u: u.push(u.line().encode("latin1", "backslashreplace").decode("raw-unicode-escape")),
    ord("X"): lambda u: u.push(u.text(u.number(_UINT))),
    ord("a"): _append,
    ord("b"): _build,
    ord("c"): _global,
    ord("d"): _dict_op,
    ord("}"): lambda u: u.push({}),
    ord("e"): _bulk(Unpickler.extend),
    ord("g"): lambda u: u.push(u.memo[int(u.line())]),
    ord("h"): lambda u: u.push(u.memo[u.byte()]),
    ord("i"): _inst,
    ord("j"): lambda u: u.push(u.memo[u.number(_UINT)]),
    ord("l"): lambda u: u.push(u.pop_mark()),
    ord("]"): lambda u: u.push([]),
    ord("o"): _obj,
    ord("p"): lambda u: _memo_put(u, int(u.line())),
    ord("q"): lambda u: _memo_put(u, u.byte()),
    ord("r"): lambda u: _memo_put(u, u.number(_UINT)),
    ord("s"): _set_item,
    ord("t"): lambda u: u.push(tuple(u.pop_mark())),
    ord(")"): lambda u: u.push(()),
    ord("u"): _bulk(Unpickler.set_items),
    ord("G"): lambda u: u.push(u.number(_DOUBLE)),
    0x80: _skip(1),
    0x81: _reduce,
    0x85: _tuple_n(1),
    0x86: _tuple_n(2),
    0x87: _tuple_n(3),
    0x88: lambda u: u.push(True),
    0x89: lambda u: u.push(False),
    0x8A: lambda u: u.push(u.long(u.byte())),
    0x8B: lambda u: u.push(u.long(u.number(_UINT))),
    ord("B"): lambda u: u.push(bytes(u.take(u.number(_UINT)))),
    ord("C"): lambda u: u.push(bytes(u.take(u.byte()))),
    0x8C: lambda u: u.push(u.text(u.byte())),
    0x8D: lambda u: u.push(u.text(u.number(_ULONG))),
    0x8E: lambda u: u.push(bytes(u.take(u.number(_ULONG)))),
    0x8F: lambda u: u.push(set()),
    0x90: _bulk(Unpickler.extend),
    0x91: lambda u: u.push(make_set(u, u.pop_mark())),
    0x92: _newobj_ex,
    0x93: _stack_global,
    0x94: lambda u: _memo_put(u, len(u.memo)),
    0x95: _skip(8),
    0x96: lambda u: u.push(bytes(u.take(u.number(_ULONG)))),
}


def load(data: memoryview, where: str, pos: int = 0, persistent: Callable[[Any], Any] | None = None) -> tuple[Any, int]:
    """One pickle of ``data`` from ``pos``: (value, position behind it). ``where`` names the file in errors.

    Raises InputError (corrupt, or beyond the bounds) or UnsafeError (asks for a dangerous call).
    """
    reader = Unpickler(data, pos, persistent, where)
    try:
        return reader.load(), reader.pos
    except Malformed as error:
        raise InputError(f"{where}: {error}") from error
