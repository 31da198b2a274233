"""A weight held in a quantized format that torch treats as one tensor.

:class:`QuantizedTensor` is a traceable wrapper subclass: it shows the dense weight's shape and dtype, holds the format's component
tensors, and defines the handful of operations that make sense on them. So a plain ``nn.Linear`` or ``nn.Embedding`` works with one as
its weight, and ``.to``, ``copy``, ``pickle``, ``state_dict``, torch.compile and export do what they do with any parameter. Everything
else raises, and says to call ``.dequantize()``.

The components may be held in a backend's private layout (:meth:`QuantizedTensor.prepack`), which only that backend's products can read.
Nothing else ever sees it: :func:`canonical_components` is what all the rest goes through, so that copies, casts, moves, pickles, state
dicts and shards are in the canonical layout.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor

from q_core.formats.four_bit import FourBit
from q_core.formats.fp8_rows import Fp8Rows
from q_core.formats.grouped_int import AffineGroups, SuperGroups
from q_core.formats.int8_rows import Int8Rows
from q_core.formats.weight_format import WEIGHT_DTYPES, Components, WeightFormat
from q_core.layouts import CANONICAL
from q_core.specs.check import short

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

FUNCTIONS: dict[Any, Callable[..., Any]] = {}
"""What torch.nn calls on a weight, above autograd."""

OPERATORS: dict[Any, Callable[..., Any]] = {}
"""What is left below autograd, by overload or its name. The modules imported at the end of this one fill both."""


class QuantizedTensor(torch.Tensor):
    """A dense weight's stand-in, made by :meth:`quantize`, :meth:`from_components` or :meth:`empty`.

    It doesn't train: it refuses ``requires_grad``. Gradients flow through it to activations.

    Attributes:
        format: how the weight is held.
        shape, dtype: of the weight it decodes to.
        component_layout: that the component tensors are held in: ``q_core.layouts.CANONICAL``, or a backend's own. As they are held, they
            are attributes, such as ``weight.absmax``. (Tensors have a ``layout`` of torch's already.)
        components: the component tensors by name, in the canonical layout; unpacked anew each time if that isn't the one they are held in.
    """

    format: WeightFormat
    component_layout: str
    _resolved: tuple[tuple[int, ...], Components] | None

    @staticmethod
    def __new__(
        cls, components: Components, format: WeightFormat, shape: Sequence[int], dtype: torch.dtype, layout: str = CANONICAL
    ) -> QuantizedTensor:
        device = components[format.component_names[0]].device
        return torch.Tensor._make_wrapper_subclass(cls, tuple(shape), dtype=dtype, device=device, requires_grad=False)

    def __init__(
        self, components: Components, format: WeightFormat, shape: Sequence[int], dtype: torch.dtype, layout: str = CANONICAL
    ) -> None:
        self.format = format
        self.component_layout = layout
        for name in format.component_names:
            setattr(self, name, components[name])
        self._resolved = None

    # --- making one -------------------------------------------------------------------------------------------------

    @classmethod
    def quantize(cls, dense: Tensor, format: WeightFormat) -> QuantizedTensor:
        """Quantize a dense weight.

        Args:
            dense: float32, bfloat16 or float16, any shape that the format takes.
            format: :class:`FourBit`, :class:`Int8Rows` or :class:`Fp8Rows`.

        Raises:
            TypeError: ``dense`` is quantized already or of another dtype.
            ValueError: an element is not finite, which would spoil its whole block.
        """
        if isinstance(dense, QuantizedTensor):
            raise TypeError(f"QuantizedTensor.quantize: dense is {dense!r}, expected a plain tensor; call .dequantize() first")
        check_dtype("QuantizedTensor.quantize: dense", dense.dtype)
        dense = dense.detach()
        if not dense.is_meta and not all_finite(dense):
            count = int((~torch.isfinite(dense)).sum())
            raise ValueError(
                f"QuantizedTensor.quantize: {count} of {dense.numel()} elements are NaN or infinite, expected finite ones"
            )
        return cls(format.quantize(dense), format, dense.shape, dense.dtype)

    @classmethod
    def from_components(
        cls, components: Components, format: WeightFormat, *, shape: Sequence[int], dtype: torch.dtype
    ) -> QuantizedTensor:
        """Wrap components that exist already; nothing is copied.

        Raises:
            ValueError, TypeError: they are not components of a weight of that shape and dtype; the message names which.
        """
        check_dtype("QuantizedTensor.from_components: dtype", dtype)
        format.check(components, shape)
        return cls(components, format, shape, dtype)

    @classmethod
    def empty(
        cls, shape: Sequence[int], format: WeightFormat, *, dtype: torch.dtype, device: torch.device | str = "cpu"
    ) -> QuantizedTensor:
        """An uninitialized one, to be loaded into; ``device`` may be "meta"."""
        check_dtype("QuantizedTensor.empty: dtype", dtype)
        return cls(format.empty(shape, device), format, shape, dtype)

    # --- its layout -------------------------------------------------------------------------------------------------

    def prepack(self, layout: str) -> QuantizedTensor:
        """The weight in a backend's private layout, for that backend's products; double-quantized scales are decoded for good.

        Args:
            layout: ``<backend>.<name>``, one of the ``layouts`` of an installed backend.

        Returns:
            A weight that decodes to the same, bit for bit, in memory of its own; a Parameter if this is one. It takes this one's place:
            ``linear.weight = linear.weight.prepack(layout)``.

        Raises:
            ValueError: ``layout`` is the canonical one, or the weight hasn't two axes.
            NoBackendError: no backend that may serve here makes that layout of such a weight.
        """
        if layout == CANONICAL:
            raise ValueError(
                f"QuantizedTensor.prepack: layout is {layout!r}, expected a backend's own; call .unpack() for this one"
            )
        if layout == self.component_layout:
            return self
        format = self.format.resolved_format
        components = format.prepack(resolve(self), self.shape, layout)
        return _like(self, QuantizedTensor(components, format, self.shape, self.dtype, layout))

    def unpack(self) -> QuantizedTensor:
        """The weight in the canonical layout: itself if it is, else in memory of its own; a Parameter if this is one."""
        if self.component_layout == CANONICAL:
            return self
        return _like(self, QuantizedTensor(self.components, self.format, self.shape, self.dtype))

    # --- what it is -------------------------------------------------------------------------------------------------

    @property
    def components(self) -> dict[str, Tensor]:
        return dict(canonical_components(self))

    @property
    def stored_bytes(self) -> int:
        """Bytes of the components."""
        return sum(component.nbytes for component in held_components(self).values())

    @property
    def cached_bytes(self) -> int:
        """Bytes that :func:`resolve` keeps beside the components."""
        if self._resolved is None:
            return 0
        own = {id(component) for component in held_components(self).values()}
        return sum(component.nbytes for component in self._resolved[1].values() if id(component) not in own)

    def dequantize(self) -> Tensor:
        """The dense weight, of this tensor's shape and dtype."""
        return self.format.dequantize(resolve(self), self.shape, self.dtype)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        layout = "" if self.component_layout == CANONICAL else f", layout={self.component_layout!r}"
        return f"QuantizedTensor({self.format}, shape={tuple(self.shape)}, dtype={self.dtype}, device='{self.device}'{layout})"

    # --- copies and pickles: components only, whatever is derived stays behind --------------------------------------------

    def __deepcopy__(self, memo: dict[int, Any]) -> QuantizedTensor:
        if id(self) not in memo:
            components = {name: copy.deepcopy(component, memo) for name, component in self.components.items()}
            memo[id(self)] = _rebuild(components, self.format, tuple(self.shape), self.dtype, _is_parameter(self))
        result = memo[id(self)]
        assert isinstance(result, QuantizedTensor)
        return result

    def __reduce_ex__(self, protocol: object) -> tuple[Any, ...]:
        return _rebuild, (self.components, self.format, tuple(self.shape), self.dtype, _is_parameter(self))

    # --- torch's protocols ------------------------------------------------------------------------------------------

    def __tensor_flatten__(self) -> tuple[list[str], tuple[WeightFormat, torch.dtype, str]]:
        return list(self.format.component_names), (self.format, self.dtype, self.component_layout)

    @classmethod
    def __tensor_unflatten__(
        cls, components: Components, context: tuple[WeightFormat, torch.dtype, str], outer_size: Sequence[int], outer_stride: object
    ) -> QuantizedTensor:
        format, dtype, layout = context
        return cls(components, format, outer_size, dtype, layout)

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Iterable[type], args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        handler = FUNCTIONS.get(func)
        if handler is not None:
            return handler(*args, **(kwargs or {}))
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Iterable[type], args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        handler = OPERATORS.get(func) or OPERATORS.get(str(func))
        if handler is None:
            unsupported(func)
        return handler(func, *args, **(kwargs or {}))

    # --- FSDP2 ------------------------------------------------------------------------------------------------------

    def fsdp_pre_all_gather(
        self, mesh: DeviceMesh, outer_size: torch.Size, outer_stride: object, module: object, mp_policy: Any
    ) -> tuple[tuple[Tensor, ...], tuple[WeightFormat, torch.Size, torch.dtype]]:
        """A shard's components, flat: shards are whole rows of whole blocks, so one after the other they are the whole's.

        On a mesh of one rank fully_shard takes the first tensor alone, so all of them are joined there.
        """
        components = self.components
        if mesh.size() == 1:
            flat: tuple[Tensor, ...] = (sharding.join(components),)
        else:
            flat = tuple(component.reshape(-1) for component in components.values())
        return flat, (self.format, outer_size, mp_policy.param_dtype or self.dtype)

    def fsdp_post_all_gather(
        self,
        gathered: tuple[Tensor, ...],
        metadata: tuple[WeightFormat, torch.Size, torch.dtype],
        param_dtype: torch.dtype,
        *,
        out: Tensor | None = None,
    ) -> tuple[QuantizedTensor, tuple[Tensor, ...]] | None:
        """The whole weight around the gathered components. It shares their memory, so that a later gather has nothing to do.

        Raises:
            ValueError: the shard's format or dtype is no longer that of the first gather, whose tensor modules hold on to.
        """
        format, shape, dtype = metadata
        if out is not None:
            assert isinstance(out, QuantizedTensor)
            if (out.format, out.dtype) != (format, dtype):
                raise ValueError(
                    f"fully_shard: a quantized weight held as {out.format}, {short(out.dtype)} at the first forward is {format}, "
                    f"{short(dtype)} now; cast or load it before the first forward"
                )
            return None
        empty = format.empty(shape, "meta")
        if len(gathered) == 1:
            components = sharding.take_apart(gathered[0], empty)
        else:
            components = {name: part.view(empty[name].shape) for name, part in zip(empty, gathered, strict=True)}
        return QuantizedTensor(components, format, shape, dtype), ()


def held_components(weight: QuantizedTensor) -> dict[str, Tensor]:
    """A weight's components as they are, in its own layout.

    Raises:
        ValueError: torch.export is at work on a private layout. A copy of the program, or one that was saved, would hold canonical
            components, and read them as private ones.
    """
    # The flag, because torch 2.11's compiler takes is_exporting() for true.
    if weight.component_layout != CANONICAL and torch.compiler._is_exporting_flag:
        raise ValueError(
            f"torch.export: a weight is held in the layout {weight.component_layout!r}, which doesn't leave the process; "
            "call .unpack() on it first"
        )
    return {name: getattr(weight, name) for name in weight.format.component_names}


def canonical_components(weight: QuantizedTensor) -> Components:
    """A weight's components in the canonical layout: themselves, or unpacked into new memory.

    Raises:
        NoBackendError: the backend whose layout it is can't serve any more; the message says how to get the weight back.
    """
    held = held_components(weight)
    return held if weight.component_layout == CANONICAL else weight.format.unpack(held, weight.shape, weight.component_layout)


def linear(x_TK: Tensor, weight: QuantizedTensor, shape: Sequence[int], bias: Tensor | None) -> Tensor:
    """The product [..., K] × [N, K] → [..., N]: the one use of a weight that takes it in its own layout.

    Args:
        x_TK, bias: as the format's op takes them.
        weight: of any format and layout.
        shape: the weight's, which a caller may keep, because asking a tensor subclass costs more than the op's dispatch.
    """
    components = resolve(weight) if weight.component_layout == CANONICAL else held_components(weight)
    return weight.format.linear(x_TK, components, shape, bias, weight.component_layout)


def resolve(weight: QuantizedTensor) -> Components:
    """A weight's components as the ops take them: in the canonical layout, and double-quantized scales decoded.

    Decoding them takes 6 % of the time of a one-token product with 4096 × 4096 weights (measured on a CPU, q-cpu 0.1), and a larger
    share of a faster product. So what is decoded while no gradients are recorded is kept: half a bit a weight at blocksize 64, counted
    by :attr:`QuantizedTensor.cached_bytes`. It is keyed to the components' version counters, and no copy, move or pickle takes it
    along, so it is never out of date. Training, where one decoding serves many tokens, keeps nothing.

    A function and not a method, because torch.compile traces into functions, and takes methods of tensors for operators.
    """
    components = canonical_components(weight)
    if not weight.format.derives:
        return components
    if torch.compiler.is_compiling():
        return weight.format.resolve(components)
    stamp = tuple(_version(component) for component in components.values())
    if weight._resolved is not None and weight._resolved[0] == stamp:
        return weight._resolved[1]
    weight._resolved = None
    if torch.is_grad_enabled():
        return weight.format.resolve(components)
    with torch.inference_mode(False), torch.no_grad():  # an inference tensor couldn't be saved for a later backward
        resolved = weight.format.resolve(components)
    weight._resolved = stamp, resolved
    return resolved


def _rebuild(
    components: Components, format: WeightFormat, shape: tuple[int, ...], dtype: torch.dtype, is_parameter: bool
) -> QuantizedTensor:
    result = QuantizedTensor.from_components(components, format, shape=shape, dtype=dtype)
    return _parameter(result) if is_parameter else result


def _like(original: QuantizedTensor, result: QuantizedTensor) -> QuantizedTensor:
    return _parameter(result) if _is_parameter(original) else result


def _parameter(tensor: QuantizedTensor) -> QuantizedTensor:
    return torch.nn.Parameter(tensor, requires_grad=False)  # type: ignore[return-value]


torch.serialization.add_safe_globals([QuantizedTensor, FourBit, Int8Rows, AffineGroups, SuperGroups, Fp8Rows, _rebuild])


def _is_parameter(tensor: Tensor) -> bool:
    return isinstance(tensor, torch.nn.Parameter)


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


def all_finite(dense: Tensor) -> bool:
    """Whether no element is NaN or infinite; its extremes say it, without masks as large as the tensor."""
    if not dense.numel():
        return True
    lowest, highest = torch.aminmax(dense.detach())
    return bool(torch.isfinite(lowest) & torch.isfinite(highest))


def check_dtype(what: str, dtype: torch.dtype) -> None:
    if dtype not in WEIGHT_DTYPES:
        raise TypeError(f"{what} is {short(dtype)}, expected one of {', '.join(map(short, WEIGHT_DTYPES))}")


def unsupported(operation: object, why: str = "is not defined for a QuantizedTensor") -> NoReturn:
    # Not a TypeError: Python's operators would turn that into their own, which doesn't say what to do.
    raise ValueError(f"{operation} {why}; call .dequantize() on it first")


def map_components(
    tensor: QuantizedTensor, function: Callable[[Tensor], Tensor], *, dtype: torch.dtype | None = None
) -> QuantizedTensor:
    if dtype is not None:
        check_dtype("QuantizedTensor.to: dtype", dtype)
    components = {name: function(component) for name, component in tensor.components.items()}
    return QuantizedTensor(components, tensor.format, tensor.shape, dtype or tensor.dtype)


def alias(tensor: QuantizedTensor) -> QuantizedTensor:
    """The same memory, and so the same layout."""
    components = {name: torch.ops.aten.alias.default(component) for name, component in held_components(tensor).items()}
    return QuantizedTensor(components, tensor.format, tensor.shape, tensor.dtype, tensor.component_layout)


from q_core.formats import operators, sharding  # noqa: E402, F401 (they fill the tables, and need the class)
