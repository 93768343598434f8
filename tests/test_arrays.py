"""What arrays reads from each kind of array, and that results are of the caller's kind."""

from __future__ import annotations

import array
import contextlib
import ctypes
import gc
import mmap
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import tasp_coll.arrays
from tasp_coll.arrays import Buffer, describe, new, overlap, packed, result, view
from tasp_coll.errors import ArgumentTypeError

PLAIN_DTYPES = ["bool", "int8", "uint16", "int64", "float16", "float32", "float64", "complex64", "complex128"]
TORCH_DTYPES = [
    *PLAIN_DTYPES,
    "bfloat16",
    "float8_e4m3fn",
    "float8_e5m2",
    "float8_e4m3fnuz",
    "float8_e8m0fnu",
]
JAX_DTYPES = [
    "bool",
    "int8",
    "uint16",
    "int32",
    "float16",
    "float32",
    "complex64",
    "bfloat16",
    "float8_e4m3fn",
]


def raw(buffer: Buffer) -> bytes:
    assert buffer.contiguous
    return ctypes.string_at(buffer.address, buffer.nbytes) if buffer.nbytes else b""


def fill(buffer: Buffer, content: bytes) -> None:
    assert len(content) == buffer.nbytes
    ctypes.memmove(buffer.address, content, len(content))


@pytest.fixture(scope="module")
def torch() -> Any:
    return pytest.importorskip("torch")


@pytest.fixture(scope="module")
def jax() -> Any:
    module = pytest.importorskip("jax")
    with contextlib.suppress(AttributeError, RuntimeError):  # too late where another test has started JAX
        module.config.update("jax_num_cpu_devices", 2)
    return module


class Exchanged:
    """An array of the array API as another library would define it: DLPack and a namespace, nothing else."""

    def __init__(self, host: np.ndarray[Any, Any], device: tuple[int, int] = (1, 0)) -> None:
        self.host, self.device = host, device

    def __dlpack__(self, **options: Any) -> Any:
        return self.host.__dlpack__(**options)

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.device

    def __array_namespace__(self) -> Any:
        return SimpleNamespace(from_dlpack=lambda producer: Exchanged(np.from_dlpack(producer)))


class Interfaced:
    def __init__(self, host: np.ndarray[Any, Any]) -> None:
        self.host = host

    @property
    def __array_interface__(self) -> dict[str, Any]:
        return self.host.__array_interface__


class Labelled(np.ndarray[Any, Any]):
    """A subclass that adds nothing to the memory."""


def mapped() -> mmap.mmap:
    memory = mmap.mmap(-1, 6)
    memory[:] = b"\1\2\3\4\5\6"
    return memory


# ---------------------------------------------------------------------------------------------- what is read


@pytest.mark.parametrize("dtype", PLAIN_DTYPES)
def test_numpy_fields(dtype: str) -> None:
    source = np.ones((3, 4), dtype)
    buffer = describe(source, "send")
    assert buffer == Buffer(
        source.ctypes.data, source.nbytes, (3, 4), dtype, source.itemsize, True, False, "numpy", buffer.owner
    )
    assert buffer.owner is source


@pytest.mark.parametrize(
    ("dtype", "name"),
    [
        (">i4", ">i4"),
        (">M8[ns]", ">M8[ns]"),
        ("M8[ns]", "datetime64[ns]"),
        ("m8[s]", "timedelta64[s]"),
        ("S5", "|S5"),
        ("U2", "<U2"),
        ("V8", "|V8"),
        ("longlong", "int64"),
        ([("a", "<i4"), ("b", "<f8")], "[('a', '<i4'), ('b', '<f8')]"),
    ],
)
def test_unusual_numpy_dtypes_have_distinct_names(dtype: Any, name: str) -> None:
    source = np.zeros(3, dtype)
    buffer = describe(source, "send")
    assert (buffer.dtype, buffer.address, buffer.nbytes) == (name, source.ctypes.data, source.nbytes)
    out = new(buffer, (6,))
    fill(out, raw(buffer) * 2)
    assert result(out).dtype == source.dtype


def test_record_array_is_named_as_the_plain_structure() -> None:
    plain = np.zeros(2, [("a", "<i4"), ("b", "<f8")])
    assert describe(plain.view(np.recarray), "send").dtype == describe(plain, "send").dtype


@pytest.mark.parametrize("dtype", TORCH_DTYPES)
def test_torch_and_numpy_agree_on_names(torch: Any, dtype: str) -> None:
    tensor = torch.zeros(4, dtype=getattr(torch, dtype))
    buffer = describe(tensor, "send")
    assert (buffer.dtype, buffer.address) == (dtype, tensor.data_ptr())
    if dtype not in PLAIN_DTYPES:
        ml_dtypes = pytest.importorskip("ml_dtypes")
        assert describe(np.zeros(4, getattr(ml_dtypes, dtype)), "send").dtype == dtype


@pytest.mark.parametrize("dtype", JAX_DTYPES)
def test_jax_is_read_in_place(jax: Any, dtype: str) -> None:
    source = jax.numpy.ones((3, 4), dtype)
    buffer = describe(source, "send")
    assert buffer[1:8] == (
        12 * source.dtype.itemsize,
        (3, 4),
        dtype,
        source.dtype.itemsize,
        True,
        True,
        "jax",
    )
    assert buffer.address == source.unsafe_buffer_pointer()


@pytest.mark.parametrize(
    ("source", "kind", "dtype", "readonly"),
    [
        (bytearray(b"abc"), "bytearray", "uint8", False),
        (b"abc", "bytes", "uint8", True),
        (memoryview(b"abcd").cast("i"), "memoryview", "int32", True),
        (memoryview(bytearray(8))[::2], "memoryview", "uint8", False),
        (array.array("d", [1, 2]), "array", "float64", False),
        (array.array("h", [1, 2]), "array", "int16", False),
        ((ctypes.c_float * 3)(1, 2, 3), "buffer", "float32", False),
        (((ctypes.c_bool * 2) * 3)(), "buffer", "bool", False),
        (ctypes.c_int64(7), "buffer", "int64", False),
        (mapped(), "buffer", "uint8", False),
        (Exchanged(np.arange(6.0)), "dlpack", "float64", None),
        (Interfaced(np.arange(6, dtype=np.int16)), "interface", "int16", False),
        (np.float32(3), "numpy", "float32", True),
        (np.zeros((2, 3), np.int8).view(Labelled), "numpy", "int8", False),
    ],
    ids=lambda value: type(value).__name__ if not isinstance(value, str | bool | None) else str(value),
)
def test_other_kinds(source: Any, kind: str, dtype: str, readonly: bool | None) -> None:
    buffer = describe(source, "send")
    assert (buffer.kind, buffer.dtype) == (kind, dtype)
    assert readonly is None or buffer.readonly is readonly  # NumPy 1 calls all DLPack imports read-only
    expected = source.host if isinstance(source, Exchanged | Interfaced) else np.asarray(memoryview(source))
    assert buffer.shape == expected.shape
    assert raw(packed(buffer)) == expected.tobytes()


def test_the_buffer_keeps_memory_alive_and_in_place() -> None:
    buffer = describe(bytearray(b"x" * 10_000), "send")
    gc.collect()
    assert raw(buffer) == b"x" * 10_000
    source = bytearray(4)
    buffer = describe(source, "send")
    with pytest.raises(BufferError):  # growing would move it away under a transfer
        source.extend(b"more")
    assert buffer.address


# ------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize("source", [1, 2.5, True, None, [1, 2], (1.0,), "text", range(3), {1: 2}, object()])
def test_what_is_no_array_is_refused(source: Any) -> None:
    with pytest.raises(ArgumentTypeError, match=r"^send must be an array .*numpy\.asarray\(send\); got "):
        describe(source, "send")


@pytest.mark.parametrize(
    ("source", "pattern"),
    [
        (np.array([None]), "recv must have elements of plain bytes.*'O'"),
        (np.zeros(2, [("a", object)]), "recv must have elements of plain bytes"),
        (np.zeros(2, np.dtype([])), "recv must have elements of plain bytes"),
        (np.ma.masked_array([1, 2], [True, False]), r"recv must not be masked.*recv\.filled\(\)"),
        ((ctypes.c_void_p * 2)(), "recv must hold elements of a type that NumPy knows"),
        ((ctypes.py_object * 2)(), "recv must have elements of plain bytes"),
        (
            Exchanged(np.arange(3), device=(2, 1)),
            r"recv must be in host memory, not on DLPack device \(2, 1\)",
        ),
        (SimpleNamespace(__cuda_array_interface__={}), "recv must be in host memory where CuPy is not installed"),
    ],
)
def test_unusable_arrays_are_refused(source: Any, pattern: str) -> None:
    with pytest.raises(ArgumentTypeError, match=pattern):
        describe(source, "recv")


@pytest.mark.filterwarnings("ignore::UserWarning")  # torch deprecates quantized and fake tensors' addresses
def test_unusable_torch_tensors_are_refused(torch: Any) -> None:
    fake = pytest.importorskip("torch._subclasses.fake_tensor")
    with fake.FakeTensorMode():
        without_memory = torch.zeros(3)
    for tensor, pattern in [
        (torch.zeros(3, device="meta"), "send must hold values, not be on the meta device"),
        (torch.eye(3).to_sparse(), "send must be dense.*sparse_coo"),
        (torch._empty_affine_quantized([3], scale=0.1, dtype=torch.qint8), "send must not be quantized"),
    ]:
        with pytest.raises(ArgumentTypeError, match=pattern):
            describe(tensor, "send")
    with pytest.raises(ArgumentTypeError, match="send must be a plain tensor with memory"):
        describe(without_memory, "send")


def test_unusable_jax_arrays_are_refused(jax: Any) -> None:
    def traced(x: Any) -> Any:
        with pytest.raises(ArgumentTypeError, match="send must be concrete, not traced"):
            describe(x, "send")
        return x

    jax.jit(traced)(1.0)
    with pytest.raises(ArgumentTypeError, match=r"send must be readable by NumPy.*key"):
        describe(jax.random.key(0), "send")
    gone = jax.numpy.ones(3)
    gone.delete()
    with pytest.raises(ArgumentTypeError, match="deleted or donated"):
        describe(gone, "send")


def test_jax_shards_are_refused_and_results_stay_on_their_device(jax: Any) -> None:
    devices = jax.devices("cpu")
    if len(devices) < 2:
        pytest.skip("needs two CPU devices")
    mesh = jax.sharding.Mesh(np.array(devices[:2]), "x")
    spread = jax.device_put(np.arange(4.0), jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x")))
    with pytest.raises(ArgumentTypeError, match=r"one device, not on 2: pass send\.addressable_shards"):
        describe(spread, "send")
    second = describe(jax.device_put(np.zeros(4, np.float32), devices[1]), "send")
    assert result(new(second, (8,))).devices() == {devices[1]}


# -------------------------------------------------------------------------------------------------- results

ROUND_TRIPS: dict[str, Callable[[], Any]] = {
    "numpy": lambda: np.arange(6, dtype=np.float32),
    "array": lambda: array.array("i", range(6)),
    "text": lambda: array.array("u", "abcdef"),
    "bytearray": lambda: bytearray(b"abcdef"),
    "dlpack": lambda: Exchanged(np.arange(6.0)),
}


@pytest.mark.filterwarnings("ignore:The 'u' type code:DeprecationWarning")
@pytest.mark.parametrize("kind", ROUND_TRIPS)
def test_result_is_of_the_callers_kind(kind: str) -> None:
    source = ROUND_TRIPS[kind]()
    buffer = describe(source, "send")
    out = new(buffer, (12,))
    assert out[1:6] == (2 * buffer.nbytes, (12,), buffer.dtype, buffer.itemsize, True)
    assert not out.readonly
    assert out.kind == buffer.kind
    fill(out, raw(buffer) * 2)
    made = result(out)
    assert type(made) is type(source)
    again = describe(made, "made")
    assert (raw(again), again.address, again.dtype) == (raw(buffer) * 2, out.address, buffer.dtype)


@pytest.mark.parametrize(
    ("source", "type_"),
    [
        (b"abc", bytearray),
        (memoryview(b"abc"), np.ndarray),
        ((ctypes.c_int32 * 3)(), np.ndarray),
        (Interfaced(np.zeros(3)), np.ndarray),
        (np.float64(2), np.ndarray),
        (np.zeros(3).view(Labelled), np.ndarray),
    ],
)
def test_result_where_the_kind_cannot_be_made(source: Any, type_: type) -> None:
    assert type(result(new(describe(source, "send"), (6,)))) is type_


@pytest.mark.parametrize("dtype", TORCH_DTYPES)
def test_torch_round_trip(torch: Any, dtype: str) -> None:
    source = torch.arange(6).to(getattr(torch, dtype)).reshape(2, 3)
    buffer = describe(source, "send")
    out = new(buffer, (4, 3))
    fill(out, raw(buffer) * 2)
    made = result(out)
    assert (made.dtype, tuple(made.shape), made.device.type) == (source.dtype, (4, 3), "cpu")
    assert torch.equal(made.view(torch.uint8), torch.cat([source.view(torch.uint8)] * 2))


def test_torch_gradients_are_left_out(torch: Any) -> None:
    source = torch.nn.Parameter(torch.arange(6.0).reshape(2, 3))
    for tensor in (source, source * 2, source.t(), (source * 2).t()):
        buffer = packed(describe(tensor, "send"))
        assert raw(buffer) == tensor.detach().contiguous().numpy().tobytes()
        assert not result(new(buffer, (4, 3))).requires_grad


def test_torch_lazy_views_are_resolved(torch: Any) -> None:
    source = torch.tensor([1 + 2j, 3 - 4j])
    for lazy in (source.conj(), source.conj().imag, source.conj().reshape(2, 1).expand(2, 3)):
        buffer = describe(lazy, "send")
        assert buffer.readonly == (lazy.is_conj() or lazy.is_neg())
        assert raw(packed(buffer)) == lazy.resolve_conj().resolve_neg().contiguous().numpy().tobytes()


@pytest.mark.parametrize("dtype", JAX_DTYPES)
def test_jax_round_trip_without_a_copy(jax: Any, dtype: str) -> None:
    source = jax.numpy.arange(6).astype(dtype).reshape(2, 3)
    buffer = describe(source, "send")
    out = new(buffer, (4, 3))
    fill(out, raw(buffer) * 2)
    made = result(out)
    assert isinstance(made, jax.Array)
    assert (made.dtype, made.shape, made.devices()) == (source.dtype, (4, 3), source.devices())
    assert np.asarray(made).tobytes() == raw(buffer) * 2
    assert made.unsafe_buffer_pointer() == out.address


def test_jax_keeps_64_bits(jax: Any) -> None:
    with jax.enable_x64(True) if hasattr(jax, "enable_x64") else jax.experimental.enable_x64():
        source = jax.numpy.arange(3, dtype="float64")
    out = new(describe(source, "send"), (3,))
    fill(out, np.arange(3.0).tobytes())
    memory = np.frombuffer(bytearray(raw(out)), np.uint8)
    for made in (result(out), view(out, memory, 0, (3,))):
        assert made.dtype == np.float64
        assert np.array_equal(np.asarray(made), np.arange(3.0))


def test_ml_dtypes_in_numpy() -> None:
    ml_dtypes = pytest.importorskip("ml_dtypes")
    source = np.arange(6).astype(ml_dtypes.bfloat16)
    buffer = describe(source, "send")
    assert (buffer.dtype, buffer.address) == ("bfloat16", source.ctypes.data)
    out = new(buffer, (12,))
    fill(out, raw(buffer) * 2)
    assert result(out).dtype == source.dtype
    assert np.array_equal(result(out), np.tile(source, 2))


@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (1,)])
def test_scalars_and_empty_arrays(shape: tuple[int, ...]) -> None:
    sources: list[Any] = [np.ones(shape, np.float32)]
    if "torch" in sys.modules:
        sources.append(sys.modules["torch"].ones(shape))
    if "jax" in sys.modules:
        sources.append(sys.modules["jax"].numpy.ones(shape, "float32"))
    for source in sources:
        buffer = describe(source, "send")
        assert (buffer.shape, buffer.contiguous) == (shape, True)
        assert raw(packed(buffer)) == np.ones(shape, np.float32).tobytes()
        out = new(buffer, shape)
        fill(out, raw(buffer))
        assert tuple(result(out).shape) == shape
        memory = np.frombuffer(bytearray(raw(buffer)), np.uint8)
        assert tuple(view(buffer, memory, 0, shape).shape) == shape


# -------------------------------------------------------------------------------------------------- packing

SLICES = st.builds(slice, *[st.none() | st.integers(-6, 6)] * 2, st.sampled_from([None, 1, 2, 3, -1, -2]))


@st.composite
def strided(draw: st.DrawFn, steps: st.SearchStrategy[slice] = SLICES) -> np.ndarray[Any, Any]:
    shape = draw(st.lists(st.integers(0, 5), max_size=3))
    dtype = draw(st.sampled_from(["int8", "float32", "complex128", ">i4", "S3", "M8[s]"]))
    source = np.arange(np.prod(shape, dtype=int)).astype(dtype).reshape(shape)
    source = source.transpose(draw(st.permutations(range(source.ndim))))
    source = source[tuple(draw(steps) for _ in shape)]
    if draw(st.booleans()):
        source = np.broadcast_to(source, (draw(st.integers(1, 3)), *source.shape))
    return source


@given(source=strided())
def test_packing_any_strides(source: np.ndarray[Any, Any]) -> None:
    buffer = describe(source, "send")
    dense = packed(buffer)
    assert raw(dense) == source.tobytes()
    assert (dense is buffer) == source.flags.c_contiguous
    assert dense[1:5] == buffer[1:5]
    assert dense.kind == buffer.kind
    assert result(new(dense, (2, 1))).dtype == source.dtype


@given(data=st.data())
def test_packing_any_torch_strides(torch: Any, data: st.DataObject) -> None:
    shape = data.draw(st.lists(st.integers(0, 5), min_size=1, max_size=3))
    source = torch.arange(int(np.prod(shape)), dtype=torch.float32).to(torch.bfloat16).reshape(shape)
    source = source.permute(data.draw(st.permutations(range(source.dim()))))
    source = source[tuple(slice(data.draw(st.integers(0, 3)), None, data.draw(st.integers(1, 3))) for _ in shape)]
    source = source.expand(data.draw(st.integers(1, 3)), *source.shape)
    dense = packed(describe(source, "send"))
    assert (dense.kind, dense.dtype, dense.shape) == ("torch", "bfloat16", tuple(source.shape))
    assert raw(dense) == source.view(torch.int16).numpy().tobytes()


def test_packing_other_kinds() -> None:
    base = np.arange(24, dtype=np.int32).reshape(4, 6)
    for source in (Exchanged(base[:, ::2]), Interfaced(base.T), base.data[::-1]):
        expected = getattr(source, "host", base[::-1])
        buffer = describe(source, "send")
        assert not buffer.contiguous
        dense = packed(buffer)
        assert raw(dense) == expected.tobytes()
        assert (dense.kind, dense.shape, dense.readonly) == (buffer.kind, expected.shape, False)


# ---------------------------------------------------------------------------------------------------- views


def test_numpy_view_shares_memory() -> None:
    memory = np.zeros(64, np.uint8)
    like = describe(np.zeros(1, np.float32), "send")
    window = view(like, memory, 8, (2, 3))
    window[:] = 1
    assert memory[8:32].tobytes() == np.ones(6, np.float32).tobytes()
    assert not memory[:8].any()
    assert not memory[32:].any()
    frozen = view(like, memory, 8, (2, 3), readonly=True)
    assert np.shares_memory(frozen, memory)
    with pytest.raises(ValueError, match="read-only"):
        frozen[:] = 2


@pytest.mark.parametrize("dtype", TORCH_DTYPES)
def test_torch_view_shares_memory(torch: Any, dtype: str) -> None:
    memory = np.zeros(512, np.uint8)
    like = describe(torch.zeros(1, dtype=getattr(torch, dtype)), "send")
    window = view(like, memory, 64, (2, 3))
    assert (window.dtype, tuple(window.shape)) == (like.owner.dtype, (2, 3))
    assert window.data_ptr() == memory.ctypes.data + 64
    frozen = view(like, memory, 64, (2, 3), readonly=True)
    memory[64:] = 1
    assert window.view(torch.uint8).all()
    assert not frozen.view(torch.uint8).any()
    memory.flags.writeable = False
    assert view(like, memory, 64, (2, 3)).data_ptr() != window.data_ptr()


@pytest.mark.parametrize("dtype", JAX_DTYPES)
def test_jax_view_is_a_copy(jax: Any, dtype: str) -> None:
    memory = np.zeros(512, np.uint8)
    copy = view(describe(jax.numpy.zeros(1, dtype), "send"), memory, 64, (2, 3))
    memory[:] = 1
    assert isinstance(copy, jax.Array)
    assert (copy.dtype.name, copy.shape) == (dtype, (2, 3))
    assert not any(np.asarray(copy).tobytes())


def test_dlpack_view_is_the_callers_kind() -> None:
    memory = np.zeros(64, np.uint8)
    like = describe(Exchanged(np.zeros(1)), "send")
    window, frozen = view(like, memory, 8, (3,)), view(like, memory, 8, (3,), readonly=True)
    memory[:] = 255
    assert isinstance(window, Exchanged)
    assert np.isnan(window.host).all()
    assert isinstance(frozen, Exchanged)
    assert not frozen.host.any()


def test_exporters_get_numpy_views() -> None:
    memory = np.arange(8, dtype=np.uint8)
    window = view(describe(array.array("h", [1]), "send"), memory, 2, (3,))
    assert window.tobytes() == bytes(range(2, 8))
    assert window.dtype == np.int16


# -------------------------------------------------------------------------------------------------- overlap


@given(a=st.lists(SLICES, min_size=2, max_size=2), b=st.lists(SLICES, min_size=2, max_size=2), flip=st.booleans())
def test_overlap_is_that_of_the_byte_bounds(a: list[slice], b: list[slice], flip: bool) -> None:
    memory = np.zeros((6, 6), np.int16)
    first, second = memory[tuple(a)], memory[tuple(b)]
    second = second.T if flip else second
    expected = bool(first.size and second.size) and np.may_share_memory(first, second)
    assert overlap(describe(first, "a"), describe(second, "b")) == expected
    assert overlap(describe(second, "b"), describe(first, "a")) == expected


def test_overlap_between_kinds(torch: Any) -> None:
    memory = np.zeros(32, np.float32)
    tensor = torch.from_numpy(memory)
    whole = describe(memory, "a")
    assert overlap(whole, describe(tensor[30:], "b"))
    assert overlap(describe(memory[::-3], "a"), describe(tensor[3::2], "b"))
    assert not overlap(describe(memory[:16], "a"), describe(tensor[16::2], "b"))
    assert not overlap(whole, describe(tensor[5:5], "b"))
    assert overlap(whole, describe(memory.data[::-2], "b"))


# ------------------------------------------------------------------------------------------------ isolation


def test_no_framework_is_imported() -> None:
    code = (
        "import sys, numpy, tasp_coll.arrays as a, tasp_coll.reduction\n"
        "a.result(a.new(a.describe(numpy.zeros((3, 4))[:, ::2], 'send'), (6, 2)))\n"
        "a.describe(bytearray(3), 'send')\n"
        "found = {'torch', 'jax', 'cupy', 'ml_dtypes', 'mpi4py'} & set(sys.modules)\n"
        "assert not found, found\n"
    )
    root = Path(tasp_coll.arrays.__file__).parent.parent
    path = os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")])
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60, env={**os.environ, "PYTHONPATH": path})
