"""Saving, loading and copying an optimizer; the saved form is in `storage.state_format`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from gcond_kernels.ops.contexts import fixed_precision
from gcond_kernels.precision.guarded_step import step_of_zeros
from gcond_kernels.storage.state import Restored, Saved, to_json
from gcond_kernels.storage.state_format import KEY, VERSION
from gcond_kernels.storage.state_view import StateView
from gcond_kernels.training.window import schedule_of
from gcond_kernels.training.windowed import WindowedOptimizer, is_zero


class SavedOptimizer(WindowedOptimizer):
    """An optimizer whose state dict holds that of its base, and what is kept beside it."""

    @property
    def state(self) -> Any:
        """The state of each parameter: of the base, and under "gcond" what is kept beside it."""
        return StateView(self.base, self._kept_of)

    @state.setter
    def state(self, state: Any) -> None:
        self.base.state = state

    def _kept_of(self, parameter: Tensor) -> dict[str, Any]:
        place = self._storage.places.get(parameter)
        return {} if place is None else self._saved(alone=True).entry(place)

    def _saved(self, alone: bool = False) -> Saved:
        """Return what is saved beside the base; `alone` without what other ranks keep too."""
        storage, resolver, window = self._storage, self._resolver, self._window
        o, state = self._options.current, resolver.method_state
        left_out = alone and self._rank_strategy.shards_state
        history, momentum = (None, None) if left_out else self._rank_strategy.full_state()
        of_base, made = self.base.state, set(self._initialized)
        without_state = {p for p, _ in self._parameters() if p in made or not of_base.get(p)}
        by_tensor = {
            name: value
            for name, value in state.items()
            if o.granularity == "tensor" and name not in o.method.shared_state
        }
        kept = {"history": history, "momentum": momentum, "mask": storage.mask}
        common = {
            "version": VERSION,
            "tasks": list(self._weights),
            "method_name": o.method.state_type.__name__,
            "granularity": o.granularity,
            "method": to_json({k: v for k, v in state.items() if k not in by_tensor}),
            "counters": resolver.counters.tolist(),
            "kept": {name: there is not None for name, there in kept.items()},
            # As long whether a window has begun or not: torch may ask for each number by its place.
            "window": {
                "mode": o.mode,
                "accumulation_steps": o.accumulation_steps,
                "position": window.position,
                "counts": list(storage.counts),
                "losses": resolver.losses.tolist(),
                "weights": list(window.weights or self._weights.values()),
                "planned": list(window.planned or [0] * len(self._weights)),
            },
        }
        return Saved(storage, history, momentum, by_tensor, common, without_state)

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the base, and beside it what this optimizer adds, under "gcond".

        What belongs to a parameter (history, momentum, the sums of a window that is not full) lies
        in the state of that parameter, in its shape and sharded as it is; what belongs to the
        method lies in the parameter groups. So `torch.distributed.checkpoint` saves it, and loads
        it into any number of ranks, however the model is sharded there.

        In the middle of a window it holds the sums too, so that training goes on from there to the
        same bits. As with torch's optimizers the tensors are not copies. With the strategy "shard"
        all ranks call it, and each gets all of it; with "replicate" any rank alone may. What
        `recorder` holds is not in it, nor the state of `grad_scaler`, nor the settings of the
        method.

        Raises:
            RuntimeError: between the last backward() of a window and step(): `.grad` is in no state
                dict; or, with several ranks, in the middle of a window; or with "shard" not all
                ranks have called within two minutes.
        """
        if self._window.resolved:
            raise RuntimeError("there is a resolved gradient in .grad: call step() before saving")
        in_window = self._rank_strategy.begin_saving(any(self._storage.counts))
        if self._rank_strategy.size > 1 and in_window:
            raise RuntimeError(
                "with several ranks a state is saved between windows: call step() before saving"
            )
        for pre_hook in self._optimizer_state_dict_pre_hooks.values():
            pre_hook(self)
        self._update_layout()
        self._resolver.fit_state()
        with fixed_precision():
            state = self._saved().state_dict(self.base)
        # For those who look into a file; loading reads the groups.
        state[KEY] = {"version": VERSION, "counters": self._resolver.counters}
        self._forget_initialized()
        for post_hook in self._optimizer_state_dict_post_hooks.values():
            changed = post_hook(self, state)
            state = state if changed is None else changed
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue where `state_dict` was taken; tensors are moved to this process's device.

        Where the parameters have names, here and in the state (a base optimizer made of
        `model.named_parameters()`), they are matched by those, whatever their order in a group.

        Raises:
            ValueError: the state is of other tasks, parameters, a window of another shape, a
                plain optimizer, or another version; the message names the difference and nothing
                has changed.
        """
        for pre_hook in self._optimizer_load_state_dict_pre_hooks.values():
            changed = pre_hook(self, state_dict)
            state_dict = state_dict if changed is None else changed
        self._check_not_within("load_state_dict")
        if self._rank_strategy.is_sending:
            raise RuntimeError(
                "a part of this window is on its way to the other ranks: load a state between "
                "step() and backward()"
            )
        restored = Restored(state_dict, self.base, list(self._parameters()))
        self._check_common(restored.common)
        self._update_layout()
        restored.check(self._storage)
        with fixed_precision():
            self._restore(restored)
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def _check_common(self, common: Mapping[str, Any]) -> None:
        o = self._options.assigned
        if common["tasks"] != list(self._weights):
            raise ValueError(
                f"the state has tasks {common['tasks']}, this optimizer {list(self._weights)}"
            )
        here = {"method_name": o.method.state_type.__name__, "granularity": o.granularity}
        for what, own in here.items():
            if common[what] != own:
                raise ValueError(f"the state has {what} {common[what]!r}, this optimizer {own!r}")
        window = common["window"]
        for what in ("mode", "accumulation_steps"):
            if window["position"] > 0 and window[what] != getattr(o, what):
                raise ValueError(
                    f"the state was taken in the middle of a window with {what}={window[what]!r}, "
                    f"this optimizer has {getattr(o, what)!r}"
                )

    def _restore(self, restored: Restored) -> None:
        storage, resolver, window = self._storage, self._resolver, restored.common["window"]
        o = self._options.assigned
        shared = None if o.granularity == "model" else o.method.shared_state
        # Before anything is changed: a state with other settings is refused.
        restored.method_state(storage, resolver.fresh_state(), shared)
        self.base.load_state_dict(restored.of_base)
        for p, entry in restored.entries.items():
            if not entry["base_has_state"]:
                self.base.state.pop(p, None)
        self._start_window()
        new = [(p, name) for p, name in restored.parameters if p not in storage.places]
        if new:  # frozen here
            storage.append(new)
        sharded = self._rank_strategy.shards_state
        restored.write_to(storage, self._rank_strategy.local_shard if sharded else None)
        resolver.method_state = restored.method_state(storage, resolver.fresh_state(), shared)
        resolver.restore(restored.common["counters"], window["losses"])
        if window["position"]:
            turns = schedule_of(len(self._weights), o.accumulation_steps, o.mode)
            self._window.begin(window["weights"], turns)
            self._window.position = window["position"]
        self._rank_strategy.require_check()
        self._initialized.clear()

    # torch.distributed.checkpoint has the base make its state by a step that changes nothing.

    def _is_no_step(self) -> bool:
        """Return whether a step changes nothing: all gradients and learning rates are zero.

        A window that has begun has no gradients.
        """
        if not is_zero([g.get("lr", 0.0) for g in self.base.param_groups]):
            return False
        gradients = [p.grad for p, _ in self._parameters() if p.requires_grad]
        return bool(gradients) and all(g is not None and is_zero([g]) for g in gradients)

    def _prepare_saving(self) -> None:
        """Let the base make the state that a TrainingState needs; all ranks call it."""
        if self._rank_strategy.any_rank(self._window.resolved or any(self._storage.counts)):
            raise RuntimeError("a TrainingState is saved and loaded between windows: call step()")
        self._initialize_base()

    def _initialize_base(self) -> None:
        """Let the base make the state that it lacks; it goes when the state dict is made."""
        of_base = self.base.state
        without = [p for p, _ in self._parameters() if p.requires_grad and not of_base.get(p)]
        if without:
            self._initialized.extend(without)
            step_of_zeros(self.base, without)

    def _forget_initialized(self) -> None:
        for p in self._initialized:
            self.base.state.pop(p, None)
        self._initialized.clear()

    def __getstate__(self) -> dict[str, Any]:
        if self._rank_strategy.size > 1:
            raise RuntimeError("an optimizer that is one of several ranks cannot be copied")
        gradients = [(p, p.grad) for p, _ in self._parameters() if p.grad is not None]
        return {**super().__getstate__(), "_gradients": gradients if self._window.resolved else []}

    def __setstate__(self, state: dict[str, Any]) -> None:
        # What a window was resolved to is to be stepped with.
        gradients = state.pop("_gradients", [])
        super().__setstate__(state)
        for parameter, gradient in gradients:
            parameter.grad = gradient
        if gradients:
            self._assigned_gradients.remember(gradient for _, gradient in gradients)
