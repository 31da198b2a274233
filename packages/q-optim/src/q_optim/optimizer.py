"""What the optimizers share: states of several precisions, one op call for all parameters that are alike, exact checkpoints.

A subclass says what its settings are and which update they make; see :mod:`q_optim.adam`. Per parameter the state is ``step``, an int, and
the tensors of :mod:`q_optim.storage`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Mapping
from typing import Any, ClassVar, Literal, NamedTuple, overload

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT, StateDict

from q_core.backend import NoBackendError
from q_core.optimizers import preferences
from q_core.specs.check import FLOATS
from q_optim import checkpoint, checks, shards
from q_optim.arguments import ONE_WAY, StorageArguments, check_storage, paging_of
from q_optim.manager import GlobalOptimManager
from q_optim.segment import Segment
from q_optim.states import StatePlaces, held_tensors
from q_optim.storage import DEFAULT_BLOCKSIZES, Part, Storage, blocksize_within_rows, storage_of
from q_optim.update import StochasticallyRounded, Update

_OF_MANY = ("params", "param_names")  # what a group has beside settings


class _Alike(NamedTuple):
    """What parameters must share to be updated by one call."""

    device: torch.device
    storage: Storage
    step: int
    rounded: bool
    settings: Hashable


class BlockwiseOptimizer(torch.optim.Optimizer, ABC):
    """Base of the optimizers; see :class:`q_optim.AdamW` for the use and :class:`StorageArguments` for what all of them take."""

    supported_bits: ClassVar[tuple[int, ...]] = (8, 32)
    default_bits: ClassVar[int] = 32
    default_paged: ClassVar[bool] = False

    def __init__(self, params: ParamsT, settings: Mapping[str, Any], storage: StorageArguments) -> None:
        what = type(self).__name__
        given: dict[str, Any] = dict(storage)
        unknown = given.keys() - StorageArguments.__annotations__.keys()
        if unknown:
            raise TypeError(
                f"{what}: there is no argument {sorted(unknown)[0]!r}, expected those of {what} and of q_optim.StorageArguments"
            )
        bits = given.get("optim_bits", self.default_bits)
        algorithm, *special = _lineage(self)
        if bits != self.default_bits and any("default_bits" in vars(cls) for cls in special):
            raise ValueError(f"{what}: optim_bits is {bits!r}, but its states have {self.default_bits}; use {algorithm.__name__}")
        self._paging = paging_of(what, given, by_default=self.default_paged)
        self._forget()
        defaults = {
            **settings,
            "algorithm": algorithm.__name__,
            "optim_bits": bits,
            "min_8bit_size": given.get("min_8bit_size", 4096),
            "blocksize": given.get("blocksize"),
            "stochastic_rounding": given.get("stochastic_rounding", False),
            "maximize": given.get("maximize", False),
        }
        self.check_group(what, {**defaults, **{key: given[key] for key in ONE_WAY if key in given}})
        super().__init__(params, defaults)

    def _forget(self) -> None:
        self._overrides: dict[Tensor, dict[str, Any]] = {}
        self._resolved: dict[Tensor, dict[str, Any]] | None = None
        self._skipped: dict[Tensor, Tensor] = {}
        self._places = StatePlaces(self._paging)

    # What an algorithm defines.

    @abstractmethod
    def update(self, group: dict[str, Any], step: int) -> Update:
        """The update of step number ``step``, from 1."""

    def check_group(self, what: str, group: dict[str, Any]) -> None:
        """Refuse settings that can't be meant."""
        checks.supported(what, "algorithm", group["algorithm"], (_lineage(self)[0].__name__,), "an optimizer has one")
        checks.number(what, "lr", group["lr"])
        checks.number(what, "weight_decay", group["weight_decay"])
        check_storage(what, group, self.supported_bits)

    def check_parameter(self, what: str, param: Tensor) -> None:
        """Refuse a parameter that can't be trained."""
        if param.dtype not in FLOATS:
            raise TypeError(f"{what} has dtype {param.dtype}, expected float32, bfloat16 or float16")
        if param.device.type == "meta":
            raise ValueError(f"{what} is on the meta device and has no values; load or initialize the model first")
        shards.check(what, param)
        if self._paging is not None and param.device.type != "cpu" and shards.is_sharded(param):
            raise TypeError(f"{what} is sharded, expected one that isn't with paged states; give FSDP an offload policy instead")

    def initial(self, group: dict[str, Any]) -> float:
        """What second moments begin with."""
        return 0.0

    def settings_of_bitsandbytes(self, group: Mapping[str, Any]) -> dict[str, Any]:
        """This algorithm's settings, from a parameter group that bitsandbytes saved."""
        return {key: value for key, value in group.items() if key in self.defaults}

    # Parameters and their settings.

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        name = type(self).__name__
        for key in ("is_paged", "paged_budget", "paged_directory"):
            if key in param_group:
                raise ValueError(f"{name}: a parameter group has {key}, but paging is for all groups; give it to {name}")
        self.check_group(name, {**self.defaults, **param_group})
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        served: set[tuple[torch.device, torch.dtype]] = set()
        try:
            for param in group["params"]:
                if param.requires_grad:
                    what = f"{name}: {self._name(param)} of shape {list(param.shape)}"
                    self.check_parameter(what, param)
                    if group["stochastic_rounding"] and param.dtype == torch.float16:
                        raise TypeError(f"{what} has dtype torch.float16, but stochastic_rounding is for bfloat16")
                    if (param.device, param.dtype) not in served:
                        self._check_served(what, group, param)
                        served.add((param.device, param.dtype))
        except (TypeError, ValueError):
            self.param_groups.pop()
            raise
        self._resolved = None

    @torch.no_grad()
    def _check_served(self, what: str, group: dict[str, Any], param: Tensor) -> None:
        """Refuse a parameter where no backend serves the update, by an update of a single zero, before any training."""
        bits = group["optim_bits"]
        update, storage = self.update(group, 1), storage_of(bits, group["blocksize"] or DEFAULT_BLOCKSIZES[bits])
        zero = torch.zeros((1,) * param.dim(), dtype=param.dtype, device=param.device)
        parts = list(self._parts(storage, group, update.states, zero))
        states = {part.key: torch.zeros(part.shape, dtype=part.dtype, device=param.device) for part in parts}
        counter = torch.zeros((), dtype=torch.int64, device=param.device)
        try:
            update([Segment(zero.shape, zero, torch.zeros_like(zero), states, counter)], storage)
        except NoBackendError as error:
            raise ValueError(f"{what} is on {param.device}, where no backend updates it: {error}") from error

    def override(
        self, params: Tensor | torch.nn.Module | Iterable[Tensor], *, bits: Literal[4, 8, 32] | None = None, **settings: Any
    ) -> None:
        """Give some parameters settings of their own, above those of their group.

        Args:
            params: a parameter, several, or a module, whose parameters are meant; each must be this optimizer's.
            bits: precision of their states, short for ``optim_bits``.
            **settings: any that a parameter group may have.

        Raises:
            ValueError: a parameter isn't this optimizer's, a setting doesn't exist or isn't right, or the precision of a state that
                exists already would change; nothing is changed then.
        """
        what = f"{type(self).__name__}.override"
        chosen = (
            [params] if isinstance(params, Tensor) else list(params.parameters() if isinstance(params, torch.nn.Module) else params)
        )
        if bits is not None:
            if "optim_bits" in settings:
                raise TypeError(f"{what}: bits and optim_bits are the same setting; give one of them")
            settings = {"optim_bits": bits, **settings}
        self._check_known(what, settings)
        groups = {param: group for group in self.param_groups for param in group["params"]}
        for param in chosen:
            if param not in groups:
                raise ValueError(f"{what}: a parameter of shape {list(param.shape)} is in none of the optimizer's groups")
            before = self._settings(groups[param], param)
            merged = {**before, **settings}
            self.check_group(what, merged)
            if self.state.get(param) and self._storage(merged, param) != self._storage(before, param):
                raise ValueError(
                    f"{what}: {self._name(param)} of shape {list(param.shape)} has states already; override before the first step"
                )
        for param in chosen:
            self._overrides[param] = {**self._overrides.get(param, {}), **settings}
        self._resolved = None

    def skipped(self) -> dict[str, int]:
        """How many elements were left as they were, by parameter: their gradients, or others of their blocks, weren't finite.

        Counted since this optimizer was made. Parameters go by their names, if the optimizer was given them, else by their places.
        """
        found = {self._name(param): int(count) for param, count in self._skipped.items()}
        return {name: count for name, count in found.items() if count}

    def _name(self, param: Tensor) -> str:
        """A parameter's name, if the optimizer was given names, else its place in the order of all."""
        place = 0
        for group in self.param_groups:
            for i, each in enumerate(group["params"]):
                if each is param:
                    return str(group["param_names"][i]) if "param_names" in group else f"parameter {place}"
                place += 1
        raise AssertionError("asked for parameters of the groups only")

    def _settings(self, group: dict[str, Any], param: Tensor) -> dict[str, Any]:
        """A group's settings, with what this parameter has of its own."""
        if self._resolved is None:
            self._resolved = self._resolve()
        settings = self._resolved.get(param)
        return {**group, **settings} if settings else group

    def _resolve(self) -> dict[Tensor, dict[str, Any]]:
        """What parameters have of their own: what modules prefer, the manager's overrides, and above those this optimizer's."""
        resolved: dict[Tensor, dict[str, Any]] = defaultdict(dict)
        own = {param: group for group in self.param_groups for param in group["params"]}
        for source in (preferences(), GlobalOptimManager.get_instance().overrides, self._overrides):
            for param, settings in source.items():
                if param in own:
                    resolved[param].update(settings)
        for param, settings in resolved.items():
            self._check_known(f"{type(self).__name__}: an override of {self._name(param)}", settings)
            self.check_group(f"{type(self).__name__}: an override of {self._name(param)}", {**own[param], **settings})
        return resolved

    def _check_known(self, what: str, settings: Mapping[str, Any]) -> None:
        unknown = settings.keys() - self.defaults.keys()
        if unknown:
            raise ValueError(f"{what}: there is no setting {sorted(unknown)[0]!r}, expected one of {sorted(self.defaults)}")

    def _storage(self, settings: dict[str, Any], param: Tensor) -> Storage:
        bits = settings["optim_bits"]
        if bits == 32 or param.numel() < settings["min_8bit_size"]:
            return storage_of(32, 0)
        blocksize = settings["blocksize"] or DEFAULT_BLOCKSIZES[bits]
        if shards.is_sharded(param):
            blocksize = blocksize_within_rows(param.shape, blocksize)
        return storage_of(bits, blocksize) if blocksize else storage_of(32, 0)

    # The step.

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update every parameter that has a gradient.

        Args:
            closure: evaluates the model again, calls ``backward`` and returns the loss, which is then returned.

        Raises:
            ValueError: a gradient is sparse; nothing is updated then.
            RuntimeError: a device graph is being captured; likewise.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        alike: dict[_Alike, tuple[dict[str, Any], list[Tensor]]] = {}
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is None:
                    continue
                if param.grad.is_sparse:
                    raise ValueError(
                        f"{type(self).__name__}: the gradient of {self._name(param)} of shape {list(param.shape)} is sparse, "
                        "expected a dense one; build its nn.Embedding with sparse=False"
                    )
                settings = self._settings(group, param)
                key = _Alike(
                    device=param.device,
                    storage=self._storage(settings, param),
                    step=self.state[param]["step"] + 1 if param in self.state else 1,
                    rounded=settings["stochastic_rounding"] and param.dtype == torch.bfloat16,
                    settings=_identity(group, settings),
                )
                alike.setdefault(key, (settings, []))[1].append(param)
        for device in {key.device for key in alike}:
            if _is_capturing(device):
                raise RuntimeError(
                    f"{type(self).__name__}: step() is called while a graph of {device} is captured, but steps are counted on the host: "
                    "each replay would repeat this one's update; capture forward and backward alone, and call step() after them"
                )
        self._make_states(alike)
        for number, (key, (settings, params)) in enumerate(alike.items()):
            update = self.update(settings, key.step)
            if key.rounded:
                # Of the step alone, so that a resumed run repeats the noise.
                seed = key.step << 20 | number
                update = StochasticallyRounded(update, torch.Generator(key.device).manual_seed(seed))
            self._update(update, key, settings, params)
        return loss

    def _make_states(self, alike: Mapping[_Alike, tuple[dict[str, Any], list[Tensor]]]) -> None:
        """States of parameters that are updated for the first time, or whose algorithm keeps one more since its settings changed."""
        missing: list[tuple[Tensor, Part]] = []
        for key, (settings, params) in alike.items():
            names = self.update(settings, key.step).states
            for param in params:
                state = self.state.get(param, {})
                if not state or any(name not in state for name in names):
                    missing += [(param, part) for part in self._parts(key.storage, settings, names, param) if part.key not in state]
                if param not in self._skipped:
                    self._skipped[param] = torch.zeros((), dtype=torch.int64, device=key.device)
        for param, part, tensor in self._places.make(missing):
            self.state[param].setdefault("step", 0)
            self.state[param][part.key] = tensor

    def _copy_in(self, states: Mapping[Tensor, Mapping[str, Any]]) -> None:
        """Hold copies of these states; what was held is given up, and its place with it."""
        self._places = StatePlaces(self._paging)
        self.state = defaultdict(dict)
        held = [(param, key, value) for param, state in states.items() for key, value in held_tensors(state).items()]
        made = self._places.make([(param, Part(key, value.dtype, value.shape, 0.0)) for param, key, value in held])
        for param, state in states.items():
            self.state[param]["step"] = state["step"]
        for param, part, tensor in made:
            shards.local(tensor).copy_(shards.share(param, states[param][part.key]))
            self.state[param][part.key] = tensor

    def _parts(self, storage: Storage, settings: dict[str, Any], names: Iterable[str], param: Tensor) -> Iterable[Part]:
        for name in names:
            yield from storage.parts(name, param.shape, self.initial(settings) if name == "state2" else 0.0)

    def _update(self, update: Update, key: _Alike, settings: dict[str, Any], params: list[Tensor]) -> None:
        segments = []
        for param in params:
            assert param.grad is not None
            grad = -param.grad if settings["maximize"] else param.grad
            segments.append(Segment(param.shape, param, grad, held_tensors(self.state[param]), self._skipped[param]))
        self._places.run(update, segments, key.storage)
        for param in params:
            self.state[param]["step"] = key.step

    # Checkpoints.

    def load_state_dict(self, state_dict: StateDict) -> None:
        """Take over what ``state_dict()`` gave, bit for bit; resumed training continues as if it had not stopped.

        What bitsandbytes' optimizer of the same algorithm gave is taken over too, see :mod:`q_optim.checkpoint`.

        Raises:
            ValueError: a state is missing, or doesn't fit its parameter; nothing is changed then.
        """
        what = f"{type(self).__name__}.load_state_dict"
        state_dict = checkpoint.as_ours(what, self, state_dict)
        states = self._checked_states(what, state_dict)
        # torch would cast codes and scales to the parameter's dtype, so it gets the groups alone.
        super().load_state_dict({**state_dict, "state": {}})
        self._resolved = None
        self._copy_in(states)

    def _checked_states(self, what: str, state_dict: StateDict) -> dict[Tensor, dict[str, Any]]:
        groups, states = state_dict["param_groups"], dict(state_dict["state"])
        # torch's load_state_dict puts differentiable among the defaults; it is none of our settings.
        checkpoint.check_groups(what, groups, self.param_groups, self.defaults.keys() - ONE_WAY.keys())
        checked = {}
        for saved, own in zip(groups, self.param_groups, strict=True):
            self.check_group(what, saved)
            for index, param in zip(saved["params"], own["params"], strict=True):
                state = states.pop(index, None)
                if state:
                    settings = self._settings({**own, **saved, "params": own["params"]}, param)
                    names = self.update(settings, 1).states
                    parts = list(self._parts(self._storage(settings, param), settings, names, param))
                    checkpoint.check_state(f"{what}: the state of {self._name(param)} of shape {list(param.shape)}", state, parts)
                    checked[param] = state
        if states:
            raise ValueError(f"{what}: there are states of parameters {sorted(states)}, which no group has")
        return checked

    # Copies: what isn't torch's own part of an optimizer's state.

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_paging": self._paging, "_overrides": self._overrides}

    def __setstate__(self, state: dict[str, Any]) -> None:
        if "_overrides" in state:  # of a copy; torch's load_state_dict sets the groups and states alone
            self._paging = state["_paging"]
            self._forget()
        super().__setstate__(state)
        if "_overrides" in state and self._paging is not None:
            self._copy_in(self.state)


def _is_capturing(device: torch.device) -> bool:
    """Whether what is launched on a device isn't run but becomes part of a graph."""
    ask = getattr(torch.get_device_module(device), "is_current_stream_capturing", None)  # a CPU's module has none
    return ask is not None and bool(ask())


def _identity(group: dict[str, Any], settings: dict[str, Any]) -> Hashable:
    """Equal for parameters whose settings are."""
    return id(group) if settings is group else tuple((key, repr(value)) for key, value in settings.items() if key not in _OF_MANY)


def _lineage(optimizer: BlockwiseOptimizer) -> list[type]:
    """The class of the algorithm, whose precision is an argument, and then those made from it."""
    classes = type(optimizer).__mro__
    return list(reversed(classes[: classes.index(BlockwiseOptimizer)]))
