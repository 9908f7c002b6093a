"""An adapter's tensors in a message: one array of bytes in safetensors' format.

This format contains no code, and its header cannot ask for more memory than was sent. numpy has no bf16, whose bits
are therefore sent as int16, with the number format in the message's head. A client's names and shapes are compared with
what the server sent before any value is used.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence, Set
from typing import Any

import numpy as np
import safetensors.numpy
import torch
from flwr.app import Array, ArrayRecord, RecordDict
from torch import Tensor

from fedlora.adapters import AdapterState, LoraFactors
from fedlora.adapters.flat import OWN
from fedlora.adapters.state import EMPTY
from fedlora.common.errors import WireError

from .codec import FLOATS, LARGEST, SPARSE, code, entries, from_rows, gaps, pack, rows_of, unpack
from .fields import LONGEST_SHOWN, Fields, cut, expect, short

Values = np.ndarray[Any, np.dtype[Any]]
_ROUNDING = 1e-6  # more than the relative difference between a number in fp32 and in fp64
_DIMENSIONS = 8  # most of a tensor
_ENTRY = 256  # largest number of bytes of a tensor's entry in a header, without its name
_TENSORS = "tensors"
_NUMPY = {"fp32": "float32", "fp16": "float16", "bf16": "int16", "int8": "int8", "int4": "uint8"}


def put(record: RecordDict, head: dict[str, Any], key: str, adapter: AdapterState) -> None:
    """Add an adapter to a message: its tensors as a record, and its scalings in the head.

    All tensors are one array of bytes, since Flower sends separate requests for each array.

    Args:
        record: the message.
        head: the message's head.
        key: name of the adapter in the message.
        adapter: the adapter.
    """
    arrays: dict[str, Values] = {}
    for name, tensor in OWN.put(adapter).items():
        arrays |= _to_arrays(name, tensor, head["dtype"])
    head[f"{key}.modules"] = list(adapter.lora)
    head[f"{key}.scalings"] = [float(factors.scaling) for factors in adapter.lora.values()]
    head[f"{key}.tensors"] = list(adapter.tensors)
    data = safetensors.numpy.save(arrays)
    record[key] = ArrayRecord({_TENSORS: Array(dtype="uint8", shape=(len(data),), stype="safetensors", data=data)})


def get(
    record: RecordDict, fields: Fields, key: str, factors: Collection[str], *, like: AdapterState | None = None
) -> AdapterState:
    """Read an adapter from a message. Factors that were not sent are empty.

    Args:
        record: the message.
        fields: the message's head.
        key: name of the adapter in the message.
        factors: the factors that the message must contain; cores ("R") only for modules that have one.
        like: an adapter with the names, scalings and shapes that are expected; None: the sender may choose them.

    Raises:
        WireError: the message is malformed, or does not fit `like`.
    """
    modules, names = (fields.items(f"{key}.{what}", str) for what in ("modules", "tensors"))
    scalings = fields.items(f"{key}.scalings", float)
    if len(modules) != len(scalings):
        raise WireError(f"{fields.who}: the numbers of scalings and modules of {key!r} differ")
    if like is not None:
        fields.expect_names("modules", modules, like.lora)
        fields.expect_names("tensors", names, like.tensors)
    who, dtype = fields.who, str(fields.head["dtype"])
    must, may = _expected(modules, names, factors, dtype, like)
    arrays = _tensors(record, key, who, may, None if like is None else value_bytes(like))
    if not must <= arrays.keys() <= may or len(set(modules)) != len(modules) or len(set(names)) != len(names):
        odd = sorted((must - arrays.keys()) | (arrays.keys() - may))[:3]
        raise WireError(f"{who}: arrays and head of {key!r} do not agree, for instance on {short(odd)}")
    if dtype in LARGEST and like is None:
        raise WireError(f"{who}: number format {dtype} is only for what clients send")

    def read(name: str, part: str, model: Tensor | None) -> Tensor:
        where = f"{who}: {name if len(name) <= LONGEST_SHOWN else short(name)}"
        if dtype == SPARSE:
            values, zeros, shape = (arrays[key] for key in (name, *_beside(name, dtype)))
            return _scattered(values, zeros, shape, None if model is None else tuple(model.shape), where)
        if dtype in LARGEST and model is not None:
            return _decoded(arrays[name], arrays[f"{name}|scale"], dtype, like=model, part=part, where=where)
        return _to_tensor(arrays[name], dtype, None if model is None else tuple(model.shape), where)

    lora: dict[str, LoraFactors] = {}
    given = dict(zip(modules, scalings, strict=True))
    for module in given if like is None else like.lora:
        scaling, sent = given[module], None if like is None else like.lora[module]
        if not (0 < scaling < math.inf or (like is None and -math.inf < scaling < 0)):  # a fold may be negative
            raise WireError(f"{short(module)}: {who} sent scaling {scaling!r}, expected a positive number")
        if sent is not None:
            if not math.isclose(scaling, sent.scaling, rel_tol=_ROUNDING):  # the client may have computed it in fp32
                expect(f"{module}: {who}", "scaling", scaling, sent.scaling)
            scaling = sent.scaling
        found: dict[str, Tensor] = {}
        for factor in "ABR":
            if (name := OWN.of_factor(module, factor)) in arrays:
                found[factor] = read(name, factor, None if sent is None else getattr(sent, factor))
        A, B, R = found.get("A", EMPTY), found.get("B", EMPTY), found.get("R")
        if A.ndim != 2 or B.ndim != 2 or ({"A", "B"} <= found.keys() and A.shape[0] != B.shape[1]):
            raise WireError(
                f"{short(module)}: {who} sent A {short(tuple(A.shape))} and B {short(tuple(B.shape))}, expected "
                "[r, d_in] and [d_out, r]"
            )
        if R is not None and sent is None and R.shape != (A.shape[0], A.shape[0]):
            raise WireError(f"{short(module)}: {who} sent a core R {short(tuple(R.shape))}, expected [r, r]")
        lora[module] = LoraFactors(A=A, B=B, scaling=scaling, R=R)
    tensors = {
        name: read(OWN.of_tensor(name), name, like.tensors[name] if like else None)
        for name in (names if like is None else like.tensors)
    }
    return AdapterState(lora=lora, tensors=tensors)


def _expected(
    modules: Sequence[str], names: Sequence[str], factors: Collection[str], dtype: str, like: AdapterState | None
) -> tuple[set[str], set[str]]:
    """The names of the arrays that a message must contain, and of all that it may contain.

    The server decides which modules have a core. A client sends a core back if it got one.
    """
    must = {OWN.of_factor(module, factor) for module in modules for factor in factors if factor != "R"}
    must |= {OWN.of_tensor(name) for name in names}
    cored = [module for module in modules if like is None or like.lora[module].R is not None]
    may = must | {OWN.of_factor(module, "R") for module in cored if "R" in factors}
    if like is not None:
        must = may
    must, may = ({each for name in known for each in (name, *_beside(name, dtype))} for known in (must, may))
    return must, may


def _beside(name: str, dtype: str) -> tuple[str, ...]:
    """The names of the arrays that a tensor of this name has in this number format, beside its values."""
    return (f"{name}|scale",) if dtype in LARGEST else (f"{name}|gaps", f"{name}|shape") if dtype == SPARSE else ()


def value_bytes(adapter: AdapterState) -> int:
    """An upper bound for the bytes of the adapter's values in any number format.

    In fp32 with a scale for each row, or with a byte for each entry and a shape, or with less.
    """
    return sum(5 * t.numel() + 4 * sum(t.shape) + 8 * (t.ndim + 1) for t in OWN.put(adapter).values())


def finite_sum(who: str) -> Callable[..., Tensor]:
    """A function that adds a client's change to what it was sent, and raises WireError if the sum is not finite."""

    def add(name: str, change: Tensor, start: Tensor) -> Tensor:
        total = change + start
        if not torch.isfinite(total).all():
            raise WireError(f"{who}: {name}: its change, added to what it was sent, gives values that are not finite")
        return total

    return add


def _tensors(record: RecordDict, key: str, who: str, names: Set[str], most: int | None) -> dict[str, Values]:
    """The tensors of one adapter by name. They take no more memory than was sent.

    Reading a header creates an object for each tensor, also for empty ones. Its length is therefore limited first.

    Args:
        record: the message.
        key: name of the adapter in the message.
        who: the sender, for error messages.
        names: names of all tensors that the adapter may have.
        most: largest number of bytes of all values together; None: no limit, since the sender may choose the shapes.
    """
    arrays = record.array_records.get(key)
    if arrays is None or list(arrays) != [_TENSORS]:
        raise WireError(f"{who}: the message has no {key!r} record of tensors")
    data = arrays[_TENSORS].data
    header, longest = int.from_bytes(data[:8], "little"), sum(len(name.encode()) + _ENTRY for name in names) + _ENTRY
    if longest < header <= len(data) - 8:
        raise WireError(
            f"{who}: the header of {key!r} is {header} bytes, but {len(names)} tensors need no more than {longest}"
        )
    if most is not None and len(data) - 8 - header > most:
        raise WireError(f"{who}: the tensors of {key!r} hold {len(data) - 8 - header} bytes, expected at most {most}")
    try:
        return safetensors.numpy.load(data)
    except Exception as error:  # whatever a peer sent must end in a WireError
        raise WireError(f"{who}: the tensors of {key!r} are malformed: {cut(str(error))}") from None


def _to_arrays(key: str, tensor: Tensor, dtype: str) -> dict[str, Values]:
    """The arrays for one tensor: the tensor itself, or its codes and scales."""
    where, part = key.removeprefix(OWN.of_tensor("")).replace("|", "."), key.rpartition("|")[2]
    if dtype in FLOATS:
        return {key: _to_array(tensor, dtype, where)}
    if not torch.isfinite(tensor).all():
        raise WireError(f"{where}: values are not finite")
    if dtype == SPARSE:
        flat = tensor.detach().to("cpu", torch.float32).flatten().numpy()
        places = np.flatnonzero(flat)
        values = (flat[places], gaps(places, len(flat)), np.array(tensor.shape, np.int64))
        return dict(zip((key, *_beside(key, dtype)), values, strict=True))
    codes, scales = code(rows_of(tensor.detach().to("cpu"), part), LARGEST[dtype])
    packed = pack(codes) if dtype == "int4" else codes
    return {key: packed.contiguous().numpy(), f"{key}|scale": scales.contiguous().numpy()}


def _to_array(tensor: Tensor, dtype: str, where: str) -> Values:
    narrow = tensor.detach().to("cpu", FLOATS[dtype]).contiguous()
    if not torch.isfinite(narrow).all():
        hint = "; set wire.dtype = fp32 or bf16" if torch.isfinite(tensor).all() else ""
        raise WireError(f"{where}: values are not finite in {dtype}{hint}")
    return narrow.view(torch.int16).numpy() if dtype == "bf16" else narrow.numpy()


def _decoded(codes: Values, scales: Values, dtype: str, *, like: Tensor, part: str, where: str) -> Tensor:
    rows = rows_of(like, part)
    width = (rows.shape[1] + 1) // 2 if dtype == "int4" else rows.shape[1]
    got = _read(codes, _NUMPY[dtype], (rows.shape[0], width), where)
    sizes = _read(scales, "float32", (rows.shape[0],), f"{where} scales")
    if not (torch.isfinite(sizes).all() and (sizes >= 0).all()):
        raise WireError(f"{where} holds scales that are negative or not finite")
    tensor = (unpack(got, rows.shape[1]) if dtype == "int4" else got) * sizes[:, None]
    if not torch.isfinite(tensor).all():
        raise WireError(f"{where} holds scales that are too large")
    return from_rows(tensor, tuple(like.shape), part)


def _scattered(values: Values, zeros: Values, shape: Values, wanted: tuple[int, ...] | None, where: str) -> Tensor:
    """A sparse tensor. It takes memory for at most 255 numbers for each byte that was sent, and 255 more."""
    sizes = _read(shape, "int64", (len(shape),) if wanted is None else (len(wanted),), f"{where} shape").tolist()
    if (wanted is not None and tuple(sizes) != wanted) or len(sizes) > _DIMENSIONS or min(sizes, default=1) < 0:
        raise WireError(f"{where} is malformed: shape {short(sizes)}, expected {wanted or 'a tensor'}")
    _read(zeros, "uint8", (len(zeros),), f"{where} gaps")
    total = math.prod(sizes)
    places = entries(zeros, total)
    if places is None:
        raise WireError(f"{where} is malformed: its gaps do not end where its {total} entries do")
    given = _to_tensor(values, "fp32", (len(places),), where)
    tensor = torch.zeros(total)
    tensor[torch.from_numpy(places)] = given
    return tensor.reshape(sizes)


def _to_tensor(array: Values, dtype: str, shape: tuple[int, ...] | None, where: str) -> Tensor:
    bits = _read(array, _NUMPY[dtype], shape, where)
    tensor = (bits.view(torch.bfloat16) if dtype == "bf16" else bits).float()
    if not torch.isfinite(tensor).all():
        raise WireError(f"{where} holds values that are not finite")
    return tensor


def _read(array: Values, expected: str, wanted: tuple[int, ...] | None, where: str) -> Tensor:
    """The values, after a check of their number format and, unless `wanted` is None, of their shape."""
    if array.dtype != np.dtype(expected):
        raise WireError(f"{where} is malformed: it holds {array.dtype}, expected {expected}")
    if wanted is not None and array.shape != wanted:
        raise WireError(f"{where} is malformed: shape {short(array.shape)}, expected {wanted}")
    return torch.from_numpy(array)
