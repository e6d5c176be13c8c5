"""What an exception of a model means: the runtimes' own messages, and nothing that only looks like them."""

from __future__ import annotations

import errno

import pytest

from asyncembed.encoders.failures import FailureKind, classify


class AcceleratorError(RuntimeError):
    """As torch derives it."""


class OutOfMemoryError(RuntimeError):
    """As torch derives and names it."""


OnnxFail = type("Fail", (Exception,), {"__module__": "onnxruntime.capi.onnxruntime_pybind11_state"})

OUT_OF_MEMORY = [
    OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 15.77 GiB"),
    OutOfMemoryError("HIP out of memory. Tried to allocate 20.00 MiB"),
    OutOfMemoryError("a message of a later version"),
    RuntimeError("CUDA out of memory. Tried to allocate 20.00 MiB"),
    AcceleratorError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"),
    RuntimeError("CUDA error: out of memory"),
    RuntimeError("CUDA driver error: out of memory"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    RuntimeError("MPS backend out of memory (MPS allocated: 8.00 GB, other allocations: 1.00 GB)"),
    RuntimeError("XPU out of memory. Tried to allocate 4.00 GiB"),
    RuntimeError("level_zero backend failed with error: 40 (UR_RESULT_ERROR_OUT_OF_RESOURCES)"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:117] . DefaultCPUAllocator: can't allocate memory: you tried"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:80] DefaultCPUAllocator: not enough memory: you tried"),
    RuntimeError("std::bad_alloc"),
    MemoryError(),
    MemoryError("std::bad_alloc"),
    OSError(errno.ENOMEM, "Cannot allocate memory"),
    OnnxFail("[ONNXRuntimeError] : 1 : FAIL : Failed to allocate memory for requested buffer of size 8388608"),
    RuntimeError("Exception from src/inference/src/cpp/infer_request.cpp: Exceeded max size of memory object"),
    RuntimeError(
        "Exception from src/plugins/intel_cpu/src/node.cpp:794:\n[CPU] Gather node with name 'embeddings/Gather' "
        "Check 'ptr' failed at src/plugins/intel_cpu/src/cpu_memory.cpp:257:\nFailed to allocate 25165824 bytes"
    ),
    RuntimeError(
        "Exception from src/plugins/intel_cpu/src/node.cpp:823:\n"
        "[CPU] Transpose node with name 'Transpose_6383' can't alloc"
    ),
    RuntimeError("Exception from src/core/src/runtime/allocator.cpp:79:\nstd::bad_alloc"),
]
FATAL = [
    AcceleratorError("CUDA error: an illegal memory access was encountered"),
    RuntimeError("CUDA error: device-side assert triggered"),
    RuntimeError("level_zero backend failed with error: 20 (UR_RESULT_ERROR_DEVICE_LOST)"),
]
OTHER = [
    RuntimeError("CUDA error: invalid argument"),
    RuntimeError("CUDA error: no kernel image is available for execution on the device"),
    RuntimeError("The size of tensor a (514) must match the size of tensor b (512)"),
    RuntimeError("memory format option is only supported by strided tensors"),
    RuntimeError("out of memory"),
    ValueError("CUDA error: invalid argument"),
    ValueError("cannot tokenise 'RuntimeError: CUDA out of memory, what shall I do?'"),
    ValueError("cannot tokenise 'CUDA error: an illegal memory access was encountered'"),
    KeyError("CUDA out of memory"),
    IndexError("index out of range in self"),
    OSError(errno.ENOSPC, "No space left on device"),
    TypeError("std::bad_alloc"),
    Exception(),
]


def named(errors: list[Exception]) -> list[object]:
    return [pytest.param(error, id=f"{type(error).__name__} {str(error)[:40]}") for error in errors]


@pytest.mark.parametrize("error", named(OUT_OF_MEMORY))
def test_classify_exhaustion_is_out_of_memory(error: Exception) -> None:
    assert classify(error) is FailureKind.OUT_OF_MEMORY


@pytest.mark.parametrize("error", named(FATAL))
def test_classify_dead_device_is_fatal(error: Exception) -> None:
    assert classify(error) is FailureKind.FATAL


@pytest.mark.parametrize("error", named(OTHER))
def test_classify_anything_else_is_other(error: Exception) -> None:
    assert classify(error) is FailureKind.OTHER


@pytest.mark.parametrize("error", named([error for error in OUT_OF_MEMORY + FATAL if str(error)]))
def test_classify_letters_of_any_case_are_the_same(error: Exception) -> None:
    for text in (str(error).upper(), str(error).lower()):
        recased = error if isinstance(error, (MemoryError, OSError)) else type(error)(text)
        assert classify(recased) is classify(error)


def caused_by(cause: BaseException) -> Exception:
    try:
        raise ValueError("the forward pass failed") from cause
    except ValueError as error:
        return error


def in_handling_of(context: BaseException) -> Exception:
    try:
        try:
            raise context
        except type(context):
            raise KeyError("while cleaning up") from None
    except KeyError as error:
        return error


@pytest.mark.parametrize("wrap", [caused_by, in_handling_of, lambda error: caused_by(in_handling_of(error))])
@pytest.mark.parametrize("error", named(OUT_OF_MEMORY + FATAL + OTHER))
def test_classify_looks_through_causes_and_contexts(wrap: object, error: Exception) -> None:
    assert callable(wrap)
    assert classify(wrap(error)) is classify(error)


def test_classify_dead_device_outweighs_exhaustion() -> None:
    dead = RuntimeError("CUDA error: device-side assert triggered")
    dead.__cause__ = OutOfMemoryError("CUDA out of memory")
    assert classify(dead) is FailureKind.FATAL


def test_classify_chain_that_bites_its_tail_ends() -> None:
    first, second = ValueError("a"), ValueError("b")
    first.__cause__, second.__context__ = second, first
    assert classify(first) is FailureKind.OTHER


def test_classify_real_exhaustion_of_python_is_out_of_memory() -> None:
    with pytest.raises(MemoryError) as raised:
        bytearray(1 << 62)
    assert classify(raised.value) is FailureKind.OUT_OF_MEMORY
