"""Reads a pickle as data: containers, numbers, text, bytes, arrays of bytes. Nothing that a file names is looked up.

Choosing which classes `pickle.Unpickler` may find does not make it safe. numpy's classes take pointers from the state
that a file gives them, and one memo index of four bytes allocates 64 GB. This module interprets the opcodes itself: a
class or function stays a `Name`, a call stays a `Call`, and memory is bounded by the size of the file.
"""

import dataclasses
import math
import pickletools

import numpy as np

OPCODES = 300_000  # in one file; a batch of CIFAR-10 has at most 100,000
CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
TUPLES = {"EMPTY_TUPLE": 0, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


@dataclasses.dataclass(frozen=True)
class Name:
    """A class or function that a file names. It is not looked up."""

    module: str
    name: str


@dataclasses.dataclass(eq=False)
class Call:
    """A call that a file asks for, and the state that it wants the result to get. It is not made."""

    function: object
    arguments: object
    state: object = None


BYTES_OF_TEXT = Name("_codecs", "encode")  # how Python 3 writes bytes for Python 2
RECONSTRUCT = {Name(f"numpy.{core}.multiarray", "_reconstruct") for core in ("core", "_core")}  # numpy 1 and 2
ARRAY, DTYPE = Name("numpy", "ndarray"), Name("numpy", "dtype")
UINT8 = ("u1", (3, "|", None, None, None, -1, -1, 0))  # argument and state of its dtype


def loads(content):
    """Return the value of a pickle of protocol 2 to 4, with a `Call` in the place of each object.

    Raises:
        ValueError: the pickle is broken, is too long, or has an opcode that plain data do not need.
    """
    try:
        return _Machine(content).run()
    except (IndexError, KeyError, TypeError, OverflowError) as error:  # an empty stack, nothing in the memo, ...
        raise ValueError("expected a pickle, got a broken one") from error


class _Machine:
    """The stack, the marks on it and the memo of an unpickler."""

    def __init__(self, content):
        self.content = content
        self.stack, self.marks, self.memo = [], [], {}
        self.text_left = len(content)  # characters to make bytes of: a file has no more of them than bytes

    def run(self):
        for number, (opcode, argument, _) in enumerate(pickletools.genops(self.content)):
            if number >= OPCODES:
                raise ValueError(f"expected a pickle of at most {OPCODES} opcodes, got more")
            if opcode.name == "STOP":  # genops raises where there is none
                return self.stack.pop()
            self.step(opcode.name, argument)

    def step(self, opcode, argument):
        push, pop = self.stack.append, self.stack.pop
        match opcode:
            case "PROTO" | "FRAME":
                pass
            case "NONE" | "NEWTRUE" | "NEWFALSE":
                push(CONSTANTS[opcode])
            case "BININT" | "BININT1" | "BININT2" | "LONG1":
                push(argument)
            case "SHORT_BINUNICODE" | "BINUNICODE" | "SHORT_BINBYTES" | "BINBYTES":
                push(argument)
            case "SHORT_BINSTRING" | "BINSTRING":  # Python 2's str, which pickletools gives as text
                push(argument.encode("latin-1"))
            case "MARK":
                self.marks.append(len(self.stack))
            case "TUPLE":
                push(tuple(self.since_mark()))
            case "EMPTY_TUPLE" | "TUPLE1" | "TUPLE2" | "TUPLE3":
                push(tuple([pop() for _ in range(TUPLES[opcode])][::-1]))
            case "EMPTY_LIST":
                push([])
            case "APPEND" | "APPENDS":
                values = [pop()] if opcode == "APPEND" else self.since_mark()
                self.top(list).extend(values)
            case "EMPTY_DICT":
                push({})
            case "SETITEM" | "SETITEMS":
                values = [pop(), pop()][::-1] if opcode == "SETITEM" else self.since_mark()
                self.set_items(self.top(dict), values)
            case "BINPUT" | "LONG_BINPUT":
                self.memo[argument] = self.stack[-1]
            case "MEMOIZE":
                self.memo[len(self.memo)] = self.stack[-1]
            case "BINGET" | "LONG_BINGET":
                push(self.memo[argument])
            case "GLOBAL":
                push(self.name(*argument.split(" ", 1)))
            case "STACK_GLOBAL":
                push(self.name(*[pop(), pop()][::-1]))
            case "REDUCE":
                arguments, function = pop(), pop()
                push(self.bytes_of_text(*arguments) if function == BYTES_OF_TEXT else Call(function, arguments))
            case "BUILD":
                state = pop()
                self.top(Call).state = state
            case _:
                raise ValueError(f"expected a pickle of plain data, got the opcode {opcode}")

    def since_mark(self):
        """Take what was pushed since the last mark."""
        mark = self.marks.pop()
        values = self.stack[mark:]
        del self.stack[mark:]
        return values

    def top(self, kind):
        """Return the last value, which must be of that type."""
        if type(self.stack[-1]) is not kind:
            raise TypeError
        return self.stack[-1]

    def name(self, module, name):
        if not type(module) is type(name) is str:
            raise TypeError
        return Name(module, name)

    def set_items(self, items, values):
        keys, values = values[::2], values[1::2]
        if len(keys) != len(values) or not all(type(key) in (bytes, str, int) for key in keys):
            raise TypeError
        items.update(zip(keys, values, strict=True))

    def bytes_of_text(self, text, encoding):
        self.text_left -= len(text)
        if type(text) is not str or encoding != "latin1" or self.text_left < 0:
            raise TypeError
        return text.encode("latin-1")


def array_of_bytes(value):
    """Return the uint8 array that a call and its state describe, made from its bytes.

    Raises:
        ValueError: they describe something else.
    """
    if not (_is_call_of(value, RECONSTRUCT) and _plain(value.arguments) == (ARRAY, (0,), "b")):
        raise ValueError(f"expected a numpy array, got {described(value)}")
    if not (type(value.state) is tuple and len(value.state) == 5):
        raise ValueError("expected a numpy array with its state, got another state")
    version, shape, dtype, by_columns, content = value.state
    if not (_is_call_of(dtype, {DTYPE}) and (*_plain(dtype.arguments)[:1], _plain(dtype.state)) == UINT8):
        raise ValueError("expected an array of uint8, got one of another dtype")
    if not (
        (version, type(by_columns), type(content), type(shape)) == (1, bool, bytes, tuple)
        and all(type(length) is int and 0 <= length <= len(content) for length in shape)
        and len(shape) == 2
        and math.prod(shape) == len(content)
    ):
        raise ValueError("expected an array of two axes, as long as its shape says; got another")
    return np.frombuffer(content, np.uint8).reshape(shape, order="F" if by_columns else "C")


def described(value):
    """Say in a few words what a value is, however large it is."""
    if type(value) is not Call:
        return f"a {type(value).__name__}"
    if type(value.function) is not Name:
        return f"a call of a {type(value.function).__name__}"
    return f"a call of {f'{value.function.module}.{value.function.name}'[:80]!a}"


def _is_call_of(value, functions):
    return type(value) is Call and type(value.function) is Name and value.function in functions


def _plain(values):
    """Return a tuple with text for bytes, as which Python 2 wrote it, and nothing for what is no tuple."""
    if type(values) is not tuple:
        return ()
    return tuple(value.decode("latin-1") if type(value) is bytes else value for value in values)
