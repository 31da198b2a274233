"""Settings of single parameters, for those who know bitsandbytes' manager; :meth:`q_optim.AdamW.override` does it for one optimizer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, MutableMapping
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from q_core.optimizers import prefer


class GlobalOptimManager:
    """Settings of parameters for every optimizer of this process: made before the optimizer's first step, above its groups' settings.

    There is one, :meth:`get_instance`. Parameters are known by identity: a model that is moved with ``.to(device)`` keeps them, a copy
    has none.
    """

    _instance: GlobalOptimManager | None = None

    def __init__(self) -> None:
        if GlobalOptimManager._instance is not None:
            raise RuntimeError("GlobalOptimManager: there is one a process; call GlobalOptimManager.get_instance()")
        self.overrides: MutableMapping[Tensor, dict[str, Any]] = WeakTensorKeyDictionary()

    @classmethod
    def get_instance(cls) -> GlobalOptimManager:
        """The manager of this process."""
        if cls._instance is None:
            cls._instance = cls()
        return cls._instance

    def register_parameters(self, params: Iterable[Tensor]) -> None:
        """For code that does so; parameters needn't be registered, because they are known by identity.

        Raises:
            TypeError: there is something else than tensors, or groups of them.
        """
        for param in params:
            for each in param["params"] if isinstance(param, dict) else [param]:
                if not isinstance(each, Tensor):
                    raise TypeError(f"GlobalOptimManager.register_parameters: got {type(each).__name__}, expected parameters")

    def override_config(
        self,
        parameters: Tensor | Iterable[Tensor],
        key: str | None = None,
        value: Any = None,
        key_value_dict: Mapping[str, Any] | None = None,
    ) -> None:
        """Override one setting, ``key`` and ``value``, or those of ``key_value_dict``, of a parameter or several.

        Raises:
            ValueError: neither is given, or both are.
        """
        if (key is None) == (key_value_dict is None):
            raise ValueError("GlobalOptimManager.override_config: expected key and value, or key_value_dict")
        settings: dict[str, Any] = dict(key_value_dict or {})
        if key is not None:
            settings[key] = value
        for param in [parameters] if isinstance(parameters, Tensor) else parameters:
            self.overrides[param] = {**self.overrides.get(param, {}), **settings}

    def register_module_override(self, module: torch.nn.Module, param_name: str, config: Mapping[str, Any]) -> None:
        """Override settings of whichever parameter of a module has this name when an optimizer takes its first step."""
        prefer(module, param_name, **config)
