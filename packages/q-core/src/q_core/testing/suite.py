"""The conformance suite: what each op of a backend has to hold, as pytest tests.

A vendor's whole test file::

    from q_core.testing.suite import *

    CAPABILITIES = Capabilities(backend="acme")

Every test is run for every op that the backend implements, on calls of the op's record: odd and zero sizes, partial blocks, any layout.
A test may not be overridden or removed; what isn't right yet is named in ``Capabilities.known_failures``. Extra: ``q-core[testing]``.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from q_core import ops
from q_core.chain import decline_reason
from q_core.record import OpRecord
from q_core.samples.make import Make
from q_core.specs import RECORDS, bounds
from q_core.specs.check import FLOATS
from q_core.testing.agreement import copy_call, describe, fresh, map_tensors, reference_function, tensors_of
from q_core.testing.calls import Call, LargeMake, activation, bad_calls, calls_with_non_finite_values, sample_calls
from q_core.testing.capabilities import Capabilities
from q_core.testing.target import Target, chosen, fill_freed_memory, implementations, target_of

Test = Callable[..., None]


def only_ops(applies: Callable[[OpRecord], bool]) -> Callable[[Test], Test]:
    """Run a test for some ops only, by their records."""

    def mark(test: Test) -> Test:
        test.applies = applies  # type: ignore[attr-defined]
        return test

    return mark


def _capabilities(module: ModuleType) -> Capabilities:
    declared = getattr(module, "CAPABILITIES", None)
    if not isinstance(declared, Capabilities):
        raise pytest.UsageError(f'{module.__name__}: CAPABILITIES is missing; write CAPABILITIES = Capabilities(backend="…").')
    return declared


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "op" not in metafunc.fixturenames or not hasattr(_THIS, metafunc.function.__name__):
        return
    capabilities = _capabilities(metafunc.module)
    applies = getattr(metafunc.function, "applies", lambda record: True)
    try:
        names = [op for op in implementations(capabilities) if applies(RECORDS[op])]
    except ValueError as error:
        raise pytest.UsageError(str(error)) from None
    known = capabilities.known_failures
    marks = {op: known.get(f"{metafunc.function.__name__}[{op}]") for op in names}
    metafunc.parametrize(
        "op", [pytest.param(op, marks=[pytest.mark.xfail(reason=why, strict=True)] if why else []) for op, why in marks.items()]
    )


@pytest.fixture
def target(op: str, request: pytest.FixtureRequest, record_property: Callable[[str, object], None]) -> Iterator[Target]:
    """The op of the backend under test, chosen to serve."""
    capabilities = _capabilities(request.module)
    with chosen(capabilities):
        made = target_of(capabilities, op)
        yield made
    if made.declined:
        record_property("declined", made.reasons())


# --- values -----------------------------------------------------------------------------------------------------------


def test_samples(target: Target) -> None:
    """The op's own samples, which touch the corners of its contract in every dtype, agree with the reference.

    Mend: as for ``test_agreement``, whose calls are drawn.
    """
    for dtype in FLOATS:
        for call in sample_calls(target.record, dtype, target.capabilities.device):
            if target.serves(call):
                messages = target.disagreements(call)
                assert not messages, messages[0]
    target.finish()


def test_agreement(target: Target) -> None:
    """Results are the reference's: equal where the contract is exact (codes, absmax, caches), within the format's bound elsewhere.

    Mend: run the printed call through ``q_core.testing.disagreements_of``, element by element. Usual causes: strides or a storage
    offset ignored, a partial last block, the nibble order (first element high), ties (to the lower entry), an argument unused, sums in
    16 bits. The bound is in ``q_core.specs.bounds``; the rule is in the docstring of ``q_core.ops.<op>``.
    """

    def agrees(call: Call) -> None:
        messages = target.disagreements(call)
        assert not messages, messages[0]

    target.for_all(agrees)
    target.finish()


def test_non_finite_values(target: Target) -> None:
    """NaN and infinity in the activations reach what depends on them, and nothing else.

    Mend: a maximum that drops NaN (``fmax``, ``x > best``), a clamp that turns it into a number, a scale of 0 · inf, a value that leaks
    into another row or block. Block formats: one such element makes its block's absmax non-finite and its codes those of 0.
    """

    def agrees(call: Call) -> None:
        messages = target.disagreements(call)
        assert not messages, messages[0]

    target.for_all(agrees, calls_with_non_finite_values(target.record, target.capabilities.device))
    target.finish()


@only_ops(lambda record: record.name.startswith("quantize_"))
def test_zero_encodes_to_zero(target: Target) -> None:
    """What is 0 decodes to exactly 0, in blocks of zeros and among other values.

    Mend: take the code book's entry for 0 (in NF4 code 7, in the signed dynamic map 127), and don't divide by an absmax of 0.
    """

    def keeps_zeros(call: Call) -> None:
        name = activation(target.record, call)
        assert name is not None
        values = call[name].clone(memory_format=torch.contiguous_format)
        values.view(-1)[1::2] = 0
        outputs = list(target.run(copy_call(call | {name: values})).values())
        decoded = _decoded(target.record, call | {name: values}, outputs)
        assert bool((decoded[values == 0] == 0).all()), f"{target.record.name}{call!r}: a zero decodes to another value"

    target.for_all(keeps_zeros)
    target.finish()


def _decoded(record: OpRecord, call: dict[str, Any], outputs: list[Tensor]) -> Tensor:
    """By the reference of the inverse op, whose first arguments are this one's outputs; where there is none, the codes."""
    inverse = RECORDS.get(f"de{record.name}")
    if inverse is None:
        return outputs[0]
    known = call | {"dtype": torch.float32, "shape": list(call[record.arguments[0]].shape)}
    rest = [known[name] for name in inverse.arguments[len(outputs) :]]
    decoded: Tensor = reference_function(inverse)(*outputs, *rest)
    return decoded


# --- memory -----------------------------------------------------------------------------------------------------------


def test_inputs_are_left_alone(target: Target) -> None:
    """Arguments keep their bytes, and so does the memory around them; of mutated ones, the memory around.

    Mend: write into a new tensor, not into an argument or a view of it (``.contiguous()`` gives the argument itself where it is
    contiguous). Memory around a tensor changes when a kernel writes past its end, such as a whole vector at the last partial block.
    """

    def untouched(call: Call) -> None:
        used = copy_call(call)
        before = {
            name: [_bytes_outside(t, name in target.record.mutates) for t in tensors_of(value)] for name, value in used.items()
        }
        target.run(used)
        for name, value in used.items():
            for tensor, bytes_before in zip(tensors_of(value), before[name], strict=True):
                same = torch.equal(_bytes_outside(tensor, name in target.record.mutates), bytes_before)
                assert same, f"{target.record.name}{call!r}: it wrote to {name}, or beside it"

    target.for_all(untouched)
    target.finish()


def _bytes_outside(tensor: Tensor, mutated: bool) -> Tensor:
    """The bytes of a tensor's storage, without those of the tensor if it may be written to (then it is contiguous)."""
    everything = torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(tensor.untyped_storage())
    if not mutated:
        return everything.clone()
    start = tensor.storage_offset() * tensor.element_size()
    return torch.cat((everything[:start], everything[start + tensor.numel() * tensor.element_size() :]))


@only_ops(lambda record: not record.mutates)
def test_outputs_are_new(target: Target) -> None:
    """Outputs are contiguous, of the shapes and dtypes that tracing promises, and share memory with nothing, not with a later call's.

    Mend: return a new tensor each time. A buffer kept between calls, or ``x.view(…)`` of an input, is not one.
    """

    def are_new(call: Call) -> None:
        used = copy_call(call)
        outputs = tensors_of(list(target.run(used).values()))
        again = tensors_of(list(target.run(copy_call(call)).values()))
        promised = tensors_of(
            target.record.fake(**{name: map_tensors(lambda t: t.to("meta"), value) for name, value in call.items()})
        )
        where = f"{target.record.name}{call!r}"
        assert len(outputs) == len(promised), f"{where}: {len(outputs)} outputs, expected {len(promised)}"
        for i, (output, fake) in enumerate(zip(outputs, promised, strict=True)):
            got = (output.dtype, list(output.shape), output.device.type)
            assert got == (fake.dtype, list(fake.shape), torch.device(target.capabilities.device).type), (
                f"{where}: output {i} is {got}"
            )
            assert output.is_contiguous(), f"{where}: output {i} has strides {output.stride()}, expected a contiguous one"
        owners = [_storage(tensor) for value in used.values() for tensor in tensors_of(value)]
        made = [_storage(tensor) for tensor in (*outputs, *again) if tensor.numel()]
        assert len(set(made)) == len(made) and not set(made) & set(owners), f"{where}: outputs share memory"

    target.for_all(are_new)
    target.finish()


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


@only_ops(lambda record: bool(record.mutates))
def test_mutated_arguments_get_a_new_version(target: Target) -> None:
    """What is mutated gets a new version, and nothing else; otherwise autograd would use a saved tensor that has changed.

    Mend: q-core bumps the versions; name your op's arguments as the hook does and write to none but those that it mutates.
    """

    def versions(call: Call) -> None:
        used = copy_call(call)
        before = {name: [tensor._version for tensor in tensors_of(value)] for name, value in used.items()}
        target.run(used)
        for name, value in used.items():
            for tensor, version in zip(tensors_of(value), before[name], strict=True):
                assert (tensor._version > version) == (name in target.record.mutates), f"{target.record.name}{call!r}: {name}"

    target.for_each(versions, sample_calls(target.record, torch.float32, target.capabilities.device))
    target.finish()


# --- the same every time ----------------------------------------------------------------------------------------------


def test_determinism(target: Target) -> None:
    """The same call gives the same bits, whatever was in memory before.

    Mend: initialise what you sum into, write every element of an output, and sum in a fixed order: no atomics on floats.
    """

    def repeats(call: Call) -> None:
        first = target.run(copy_call(call))
        for _ in range(2):
            fill_freed_memory(first)
            second = target.run(copy_call(call))
            assert _same_bits(first, second), f"{target.record.name}{call!r}: two calls differ"

    target.for_all(repeats)
    target.finish()


def test_thread_count(target: Target) -> None:
    """The number of threads doesn't change a result.

    Mend: split work so that one thread makes an output element, and that its sum has the same order in every split.
    """
    before = torch.get_num_threads()

    def independent(call: Call) -> None:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(target.run(copy_call(call)))
        assert all(_same_bits(results[0], other) for other in results), f"{target.record.name}{call!r}: it depends on the threads"

    try:
        for dtype in (torch.float32, torch.bfloat16):
            target.for_each(independent, sample_calls(target.record, dtype, target.capabilities.device, LargeMake(), most=3))
    finally:
        torch.set_num_threads(before)
    target.finish()


def _same_bits(a: dict[str, Any], b: dict[str, Any]) -> bool:
    pairs = zip(tensors_of(list(a.values())), tensors_of(list(b.values())), strict=True)
    return all(torch.equal(_bytes(x), _bytes(y)) for x, y in pairs)


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)


# --- with torch -------------------------------------------------------------------------------------------------------


def test_opcheck(target: Target) -> None:
    """``torch.library.opcheck``: schema, fake kernel and autograd registration hold for the real implementation.

    Mend: its message names the check; a schema fault is a mutated or returned argument, a fake one another shape, dtype or stride.
    """

    def checks(call: Call) -> None:
        used = copy_call(call)
        names = _differentiable(target.record, used) if target.record.gradient else []
        arguments = [used[name].requires_grad_() if name in names else used[name] for name in target.record.arguments]
        torch.library.opcheck(getattr(torch.ops.q, target.record.name).default, tuple(arguments))

    for call in sample_calls(target.record, torch.float32, target.capabilities.device):
        if target.serves(call):
            checks(call)
            break  # it takes half a second, and other tests see to other shapes and dtypes
    target.finish()


def _differentiable(record: OpRecord, call: dict[str, Any]) -> list[str]:
    """Arguments that the op's formula has a gradient for: tried out on the reference."""
    floating = [name for name in record.arguments if isinstance(call[name], Tensor) and call[name].is_floating_point()]
    wanted = set(record.autocast) or {name for name in floating if call[name].dtype is call[floating[0]].dtype}
    return [name for name in floating if name in wanted and name not in ("cos", "sin")]


@only_ops(lambda record: record.gradient is not None)
def test_gradients(target: Target) -> None:
    """Gradients through the op are those of the reference in float64, and being recorded doesn't change a result.

    Mend: the formula is q-core's and calls other ops; a backend's part is their values (``dequantize_4bit`` in ``gemm_4bit``'s).
    """

    def differentiates(call: Call) -> None:
        names = _differentiable(target.record, call)
        got = _gradients(target.record, target.function, call, names, torch.float32)
        # Rounded activations have no slope; the formula's is declared to be that of the native product.
        smooth = Call(call | {"activations": "native"}) if "activations" in call else call
        expected = _gradients(target.record, reference_function(target.record), smooth, names, torch.float64)
        for name, gradient, wide in zip(names, got, expected, strict=True):
            assert gradient.dtype is torch.float32, f"{target.record.name}{call!r}: gradient of {name} is {gradient.dtype}"
            wrong = ~((gradient.cpu().double() - wide).abs() <= bounds.gradient(wide))
            assert not bool(wrong.any()), f"{target.record.name}{call!r}: gradient of {name} is off in {int(wrong.sum())} elements"

    target.for_each(differentiates, sample_calls(target.record, torch.float32, target.capabilities.device))
    target.finish()


def _gradients(record: OpRecord, function: Callable[..., Any], call: Call, names: list[str], dtype: torch.dtype) -> list[Tensor]:
    on = "cpu" if dtype is torch.float64 else None
    placed = {name: map_tensors(lambda tensor: tensor.to(on or tensor.device), fresh(value)) for name, value in call.items()}
    leaves = {name: placed[name].detach().to(dtype).requires_grad_() for name in names}
    outputs = tensors_of(function(*((placed | leaves)[name] for name in record.arguments)))
    make = Make(seed=7)
    loss = sum((o * make.normal(*o.shape).to(o)).sum() for o in outputs)
    return list(torch.autograd.grad(loss, list(leaves.values())))  # type: ignore[arg-type]  # sum() may be 0, if there were no outputs


def test_bad_arguments(target: Target) -> None:
    """A wrong argument is the documented error of the public function, naming op and argument, before the backend sees it.

    Mend: q-core validates; this fails if the backend shadows the public function, or if its predicate raises.
    """
    for bad in bad_calls(target.record, target.capabilities.device):
        with pytest.raises((TypeError, ValueError), match=rf"{target.record.name}: ") as raised:
            getattr(ops, target.record.name)(**bad.call)
        message = str(raised.value)
        assert bad.argument in message and "expected" in message, f"{bad.argument} is {bad.what}: {message}"


def test_predicate_answers_without_values(target: Target) -> None:
    """The predicate says the same of tensors without values as of real ones: ``q-core explain`` and tracing ask it so.

    Mend: let ``accepts`` ask for shapes, strides and dtypes only, and return None or a reason in words.
    """

    def same(call: Call) -> None:
        meta = {name: map_tensors(lambda tensor: tensor.to("meta"), value) for name, value in call.items()}
        reasons = [decline_reason(target.implementation, target.record, arguments) for arguments in (call, meta)]
        assert reasons[0] == reasons[1], f"{target.record.name}({describe(call)}): {reasons[0]!r}, without values {reasons[1]!r}"
        assert reasons[0] is None or (isinstance(reasons[0], str) and reasons[0].strip()), "a reason is words"

    for dtype in FLOATS:
        for call in sample_calls(target.record, dtype, target.capabilities.device):
            same(call)


# --- the suite itself -------------------------------------------------------------------------------------------------


def test_promised_ops_are_implemented(request: pytest.FixtureRequest) -> None:
    """The backend implements what ``Capabilities.ops`` promises, and something at all.

    Mend: is the function marked with ``@impl``, in a module of ``Backend.families``, and named as the op?
    """
    capabilities = _capabilities(request.module)
    implemented = set(implementations(capabilities))
    assert implemented, f"{capabilities.backend} implements no op"
    if capabilities.ops is not None:
        assert implemented == set(capabilities.ops), f"{capabilities.backend} implements {sorted(implemented)}"


def test_no_standard_test_is_overridden(request: pytest.FixtureRequest) -> None:
    """The module has every standard test, as it is here, and names no known failure that isn't one of them.

    Mend: take the override away; name what fails, with its reason, in ``Capabilities.known_failures``.
    """
    for name in __all__:
        if name.startswith(("test_", "pytest_")) or name == "target":
            assert getattr(request.module, name, None) is getattr(_THIS, name), f"{name} is overridden or removed"
    known = _capabilities(request.module).known_failures
    standard = {f"{name}[{op}]" for name in __all__ if name.startswith("test_") for op in RECORDS}
    unknown = set(known) - standard
    assert not unknown, f"known_failures names {sorted(unknown)}, expected «test[op]», such as 'test_agreement[gemm_4bit]'"


_THIS = sys.modules[__name__]

__all__ = ["Capabilities", "pytest_generate_tests", "target"]
__all__ += [name for name in list(globals()) if name.startswith("test_")]
