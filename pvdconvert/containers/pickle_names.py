"""The names that checkpoints mention, and our own inert constructors for them. No torch; nothing is imported.

Each handler gets the interpreter (for its budget) and the arguments that the file gives to the call.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from pvdconvert.containers.values import (
    Array,
    DType,
    Global,
    Malformed,
    Storage,
    StridedTensor,
    Stub,
    check_shape,
    decode,
)

if TYPE_CHECKING:
    from pvdconvert.containers.pickle import Unpickler

_STORAGES = {
    "FloatStorage": "float32", "DoubleStorage": "float64", "HalfStorage": "float16", "BFloat16Storage": "bfloat16",
    "LongStorage": "int64", "IntStorage": "int32", "ShortStorage": "int16", "CharStorage": "int8",
    "ByteStorage": "uint8", "BoolStorage": "bool", "ComplexFloatStorage": "complex64",
    "ComplexDoubleStorage": "complex128",
    "UntypedStorage": "uint8", "storage.UntypedStorage": "uint8",
}  # fmt: skip
_TORCH_DTYPES = {
    "half": "float16", "float": "float32", "double": "float64", "short": "int16", "int": "int32", "long": "int64",
    **{n: n for n in ("float16", "bfloat16", "float32", "float64", "uint8", "int8", "int16", "int32", "int64", "bool",
                      "complex64", "complex128", "uint16", "uint32", "uint64")},
}  # fmt: skip


def storage_dtype(kind: Any) -> str | None:
    """The element type of a storage class named in a file, or None if we cannot read it."""
    if not isinstance(kind, Global) or not kind.name.startswith("torch."):
        return None
    return _STORAGES.get(kind.name.removeprefix("torch.").removeprefix("cuda."))


def _tensor(u: Unpickler, storage: Any, offset: Any, shape: Any, stride: Any, *rest: Any) -> Any:
    if not isinstance(storage, Storage):
        return Stub("torch.Tensor", (storage, offset, shape, stride))  # of an element type that we cannot read
    return StridedTensor.checked(storage, offset, shape, stride)


def _tensor_v3(
    u: Unpickler, storage: Any, offset: Any, shape: Any, stride: Any, grad: Any, hooks: Any, dtype: Any, *rest: Any
) -> Any:
    name = _TORCH_DTYPES.get(dtype.name.removeprefix("torch.")) if isinstance(dtype, Global) else None
    if not isinstance(storage, Storage) or name is None:
        return Stub("torch.Tensor", (storage, offset, shape, stride))
    return StridedTensor.checked(storage, offset, shape, stride, name)


def _from_type(u: Unpickler, func: Any, kind: Any, args: Any, state: Any) -> Any:
    return u.call(func, args)


def _encode(u: Unpickler, text: Any, codec: Any = "utf-8", errors: Any = "strict") -> bytes:
    if not isinstance(text, str) or codec not in ("latin1", "latin-1", "iso-8859-1", "ascii", "utf-8", "utf8"):
        raise Malformed(f"text encoded as {codec!r:.40}")
    u.spend(4 * len(text))
    return text.encode(codec)


def _reconstruct(u: Unpickler, kind: Any = None, shape: Any = None, code: Any = None) -> Array:
    return Array()


def _frombuffer(u: Unpickler, data: Any, dtype: Any, shape: Any, order: Any = "C") -> Array:
    out = Array()
    out.fill(shape, dtype, order == "F", data)
    return out


def _dtype(u: Unpickler, descr: Any = None, align: Any = False, copy: Any = False) -> DType:
    return DType(descr if isinstance(descr, str) else "V")


def _scalar(u: Unpickler, dtype: Any, data: Any = b"") -> Any:
    if isinstance(dtype, DType) and dtype.name and isinstance(data, bytes) and len(data) == dtype.size:
        return decode(memoryview(data), dtype.name, 1, big_endian=dtype.big_endian)[0].item()
    return Stub("numpy.scalar", (data,))


def _dict(u: Unpickler, source: Any = ()) -> dict[Any, Any]:
    return u.mapping(list(source.items()) if isinstance(source, dict) else source)


def _defaultdict(u: Unpickler, factory: Any = None, source: Any = ()) -> dict[Any, Any]:
    return _dict(u, source)


def _list(u: Unpickler, source: Any = (), *rest: Any) -> list[Any]:
    if not isinstance(source, (list, tuple, set, frozenset)):
        raise Malformed("a list made of something that is no sequence")
    u.spend(8 * len(source))
    return list(source)


def make_set(u: Unpickler, source: Any = ()) -> set[Any]:
    return {u.key(v) for v in _list(u, source)}


def _size(u: Unpickler, source: Any = ()) -> tuple[int, ...]:
    return check_shape(source)


def _complex(u: Unpickler, real: Any = 0.0, imag: Any = 0.0) -> complex:
    return complex(float(real), float(imag))


def _bytes(u: Unpickler, source: Any = b"", codec: Any = "latin1") -> bytes:
    if isinstance(source, str):
        return _encode(u, source, codec)
    if not isinstance(source, (bytes, bytearray)):
        raise Malformed("bytes made of something else")
    u.spend(len(source))
    return bytes(source)


def _device(u: Unpickler, kind: Any = "cpu", index: Any = None) -> str:
    return f"{kind!s:.40}" if index is None else f"{kind!s:.40}:{index!s:.10}"


def _path(u: Unpickler, *parts: Any) -> str:
    text = "/".join(p for p in parts if isinstance(p, str))
    u.spend(len(text))
    return text


def _reconstructor(u: Unpickler, kind: Any, base: Any = None, state: Any = None) -> Any:
    return u.call(kind, ())


def _newobj(u: Unpickler, kind: Any, *args: Any) -> Any:
    return u.call(kind, args)


HANDLERS: dict[str, Callable[..., Any]] = {
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _tensor_v3,
    "torch._utils._rebuild_parameter": lambda u, data, *rest: data,
    "torch._utils._rebuild_parameter_with_state": lambda u, data, *rest: data,
    "torch._tensor._rebuild_from_type": lambda u, func, kind, args, state: u.call(func, args),
    "torch._tensor._rebuild_from_type_v2": _from_type,
    "torch.Size": _size,
    "torch.device": _device,
    "numpy.core.multiarray._reconstruct": _reconstruct,
    "numpy.core.numeric._frombuffer": _frombuffer,
    "numpy.core.multiarray.scalar": _scalar,
    "numpy.dtype": _dtype,
    "_codecs.encode": _encode,
    "collections.OrderedDict": _dict,
    "collections.Counter": _dict,
    "collections.defaultdict": _defaultdict,
    "collections.deque": _list,
    "builtins.dict": _dict,
    "builtins.list": _list,
    "builtins.tuple": lambda u, source=(): tuple(_list(u, source)),
    "builtins.set": make_set,
    "builtins.frozenset": make_set,
    "builtins.complex": _complex,
    "builtins.bytes": _bytes,
    "builtins.bytearray": _bytes,
    "copyreg._reconstructor": _reconstructor,
    "copyreg.__newobj__": _newobj,
    **{f"pathlib.{sub}{kind}": _path for sub in ("", "_local.") for kind in
       ("Path", "PosixPath", "WindowsPath", "PurePath", "PurePosixPath", "PureWindowsPath")},
}  # fmt: skip
