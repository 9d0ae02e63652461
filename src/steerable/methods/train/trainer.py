"""TRL's GRPOTrainer with the loss of "Bias-Only Adaptation", our engine for the rollouts, and small checkpoints.

The loss (Sinii et al. 2025, arXiv 2505.18706), for G samples a prompt with rewards r_i = +1 or -1:

    A_i = r_i - mean_j r_j,      L = -(1 / N_tok) sum_i A_i sum_t log pi(y_it | ...)  [+ beta k3]

which is GRPO without its division by the standard deviation, with `loss_type="dapo"` (one divisor, the tokens of the
whole batch) and one optimiser step a batch, so that every ratio is 1 and nothing is clipped. A_i is the RLOO advantage
times (G - 1) / G, a constant that Adam does not see.
"""

from __future__ import annotations

import copy
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from inspect import signature
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from trl import GRPOConfig, GRPOTrainer

from steerable.chains.generation import request_seed, split_chain
from steerable.engines.base import Completion, Request
from steerable.engines.sampling import Decoding, pad_id
from steerable.engines.transformers import TransformersEngine
from steerable.methods.train.loop import SmallCheckpoints
from steerable.methods.train.parameters import Trained
from steerable.methods.train.rewards import REASONS, Reward
from steerable.models.loading import stop_ids, unwrap
from steerable.steering.think import think_tags_if_any
from steerable.store.errors import SteerableWarning, UsageError

LOSS = {
    "loss_type": "dapo",
    "scale_rewards": "none",
    "use_bias_correction_kl": False,
    "num_iterations": 1,
    "top_p": 1.0,
    "top_k": 0,
}
"""The published loss as arguments of TRL's GRPOConfig."""
_ROWS = 16  # of one forward pass, grouped by length


class VectorTrainer(SmallCheckpoints, GRPOTrainer):  # type: ignore[misc]
    """TRL's GRPOTrainer for tasks with a verifiable answer.

    The methods of TRL that it overrides, and the arguments that it relies on, are those of the minor version that
    pyproject.toml names; `tests/methods/train/test_seam.py` checks them. `counted` is what the steps so far gave.

    Args:
        trained: The model and what is trained in it.
        args: TRL's settings: `LOSS`, and what varies.
        prompts: The text of each task, up to where the model begins to speak.
        tasks: The tasks, in the same order.
        reward: `(task, answer) -> (reward, reason)`.
        tokenizer: The model's. It is left as it is; TRL gets a copy with a padding token.
        own_engine: Roll out with the package's engine, else as TRL's arguments say.
        rows: Sequences that our engine computes together.
        kl_rows: Rollouts a step on which entropy and the divergence from the untrained model are estimated.
    """

    _buffered_inputs: Any  # TRL's: the passes of the step
    CURVE = ("step", "reward", "accuracy", "tokens", "kl", "entropy")

    def __init__(
        self,
        trained: Trained,
        args: GRPOConfig,
        prompts: Sequence[str],
        tasks: Sequence[Mapping[str, Any]],
        reward: Reward,
        tokenizer: Any,
        *,
        own_engine: bool = True,
        rows: int = 64,
        kl_rows: int = 16,
    ) -> None:
        from datasets import Dataset

        self.tasks, self.paid, self.rows, self.kl_rows = tasks, reward, rows, kl_rows
        self.counted: Counter[str] = Counter()
        self.logged_tokens = 0
        self.nothing_learnt = False
        self.stops, self.tokenizer = stop_ids(trained.model), tokenizer
        super().__init__(
            trained,
            [self.pay],
            args,
            train_dataset=Dataset.from_dict({"prompt": list(prompts), "task": list(range(len(prompts)))}),
            processing_class=_padding(tokenizer, trained.model),
            peft_config=trained.peft_config,
            rollout_func=self.roll_out if own_engine else None,
        )
        self.eos_token_ids = self.stops  # TRL adds the tokenizer's end token, though it may have none
        if hasattr(self, "generation_config"):
            self.generation_config.eos_token_id = self.stops or None
        trained.model = self.model
        trained.remember()
        self.tags = think_tags_if_any(tokenizer)
        check_sharding(self)

    # Rollouts and rewards

    @property
    def place(self) -> str:
        """The step and the process: with a rollout's index what it draws from."""
        return f"{self.state.global_step}/{self.accelerator.process_index}"

    def roll_out(self, prompts: list[str], trainer: Any) -> dict[str, Any]:
        """Completions of the prompts, each of which comes as often as it has samples."""
        ids = [list(self.tokenizer(text, add_special_tokens=False)["input_ids"]) for text in prompts]
        model = self.accelerator.unwrap_model(self.model)
        model = model.get_base_model() if hasattr(model, "get_base_model") else model
        training = model.training
        model.eval()
        try:
            decoding = Decoding(self.temperature, self.top_k, self.top_p)
            seeds = [request_seed(self.args.seed, self.place, i) for i in range(len(ids))]
            requests = [Request(row, seed, (), decoding) for row, seed in zip(ids, seeds, strict=True)]
            with self.timed("generation"), _without_fused_head(model):
                engine = TransformersEngine(model, self.tokenizer, rows=self.rows)
                completions = engine.generate(requests, max_new_tokens=self.max_completion_length)
        finally:
            model.train(training)
        return {"prompt_ids": ids, "completion_ids": [c.ids for c in completions], "logprobs": None}

    def pay(self, completion_ids: list[list[int]], task: list[int], log_metric: Any, **_: Any) -> list[float]:
        """The rewards of a batch; shares of the reasons are logged."""
        rewards, reasons, cut = [], Counter(dict.fromkeys(REASONS, 0)), 0
        with self.timed("reward"):
            for i, (ids, number) in enumerate(zip(completion_ids, task, strict=True)):
                completion = Completion(ids, bool(ids) and ids[-1] in self.stops)
                cut += not completion.finished
                chain = split_chain(self.tokenizer, self.tags, completion, endless=not self.stops)
                paid_for = {**self.tasks[number], "rollout": f"{self.place}/{i}"}
                value, reason = self.paid(paid_for, chain["answer"] if chain["closed"] else None)
                rewards.append(value)
                reasons[reason] += 1
        for reason, count in sorted(reasons.items()):
            log_metric(f"reason/{reason}", count / len(rewards))
        if self.stops:  # without an end token nothing is cut off
            log_metric("cut off", cut / len(rewards))
        self.counted += reasons
        self.counted["tokens"] += sum(map(len, completion_ids))
        return rewards

    def _generate_and_score_completions(self, inputs: Any) -> Any:
        # Our engine times itself; TRL's is timed here, less what is pushed to vLLM on the way (`sync`).
        with nullcontext() if self.rollout_func else self.timed("generation"):
            batch = super()._generate_and_score_completions(inputs)
        if self._samples:
            self._measure(batch)
        advantages = self.accelerator.gather(batch["advantages"])
        self.nothing_learnt = self.beta == 0.0 and not bool(advantages.any())
        if self.nothing_learnt:
            self.counted["steps skipped"] += 1
            why = "in every group all rewards are equal"
            if self.counted["steps skipped"] == 1:
                why += (
                    ", so there is nothing to learn from; tasks of middling difficulty, or more samples a task "
                    "(--group), would help"
                )
            warnings.warn(f"step {self.state.global_step + 1} is skipped: {why}", SteerableWarning, stacklevel=2)
        return batch

    @property
    def _samples(self) -> bool:
        """Whether divergence and entropy are measured on a sample of the rollouts, as no pass computes all of them."""
        return bool(self.beta == 0.0 and self.kl_rows and not (self._dist.is_fsdp or self._dist.is_zero3))

    @torch.no_grad()
    def _measure(self, batch: Mapping[str, Any]) -> None:
        """On a few rollouts of different tasks, whatever they were paid: the entropy a token, and KL(policy ||
        untrained) a token by Schulman's k3 estimator."""
        with self.timed("kl"):
            rows = torch.arange(0, len(batch["completion_ids"]), self.num_generations)[: self.kl_rows]
            mask = batch["completion_mask"][rows]
            ids = torch.cat([batch["prompt_ids"][rows], batch["completion_ids"][rows]], dim=1)
            seen = torch.cat([batch["prompt_mask"][rows], mask], dim=1)
            score = partial(self._get_per_token_logps_and_entropies, self.model, ids, seen, mask.shape[1])
            policy, entropies, _ = score(compute_entropy=True)
            self._metrics["train"]["entropy"].append(float((entropies * mask).sum() / mask.sum()))
            with self.trained.reference() as has_reference:
                if has_reference:
                    ratio = score()[0] - policy
                    self._metrics["train"]["kl"].append(float(((ratio.exp() - ratio - 1) * mask).sum() / mask.sum()))

    def _get_train_sampler(self, dataset: Any = None) -> Any:
        """TRL's, which begins again with the first epoch's order where a training goes on in a later one."""
        sampler = super()._get_train_sampler(dataset)

        def set_epoch(epoch: int) -> None:
            sampler.generator.manual_seed(sampler.seed)
            for _ in range(epoch):
                torch.randperm(sampler.num_samples, generator=sampler.generator)

        sampler.set_epoch = set_epoch
        return sampler

    # The update

    @property
    def _alone(self) -> bool:
        """One process: only then may the rows of a forward pass depend on the data."""
        return bool(self.accelerator.num_processes == 1)

    def training_step(self, model: Any, *args: Any, **options: Any) -> Tensor:
        """One forward and backward pass; a step that teaches nothing leaves no gradient."""
        loss = super().training_step(model, *args, **options)
        if self.nothing_learnt:  # without any gradient the optimiser's momentum does not move the parameters either
            for parameter in model.parameters():
                parameter.grad = None
        return loss

    def _prepare_inputs(self, generation_batch: dict[str, Any]) -> dict[str, Any]:
        """TRL's, with the rollouts of a step sorted, so that a pass pads little and few passes teach nothing."""
        before = self._buffered_inputs
        inputs: dict[str, Any] = super()._prepare_inputs(generation_batch)
        if self._buffered_inputs is not before and self._alone:
            self._buffered_inputs = _by_length(self._buffered_inputs)
            inputs = self._buffered_inputs[self._step % self.args.steps_per_generation]
        return inputs

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        # A rollout without an advantage has no part in the gradient: most of those whose group agrees. A pass in which
        # nobody has one still needs a row to compute.
        chosen = (inputs["advantages"] != 0).nonzero()[:, 0]
        rows = len(inputs["advantages"])
        if self._samples and self._alone and len(chosen) < rows:
            chosen = chosen if len(chosen) else chosen.new_zeros(1)
            inputs = {
                name: value[chosen] if isinstance(value, Tensor) and value.dim() and len(value) == rows else value
                for name, value in inputs.items()
            }
        loss: Tensor = super()._compute_loss(model, inputs)
        entropies = self._metrics["train"]["entropy"]  # TRL means over passes: each counts by its tokens
        if self._samples:
            entropies.pop()
        else:
            tokens = self.accelerator.gather(inputs["completion_mask"].sum()).sum()
            passes = self.current_gradient_accumulation_steps
            entropies[-1] *= float(tokens * passes / inputs["num_items_in_batch"])
        return loss

    def _get_per_token_logps_and_entropies(
        self, model: Any, input_ids: Tensor, attention_mask: Tensor, logits_to_keep: int, *args: Any, **options: Any
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """TRL's, with rows of similar length together, each group without its common padding, and every row in the
        positions that it has alone."""
        with _positions_of_the_mask(model):
            return self._scored(model, input_ids, attention_mask, logits_to_keep, *args, **options)

    def _scored(
        self, model: Any, input_ids: Tensor, attention_mask: Tensor, logits_to_keep: int, *args: Any, **options: Any
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        score = super()._get_per_token_logps_and_entropies
        simple = {"batch_size", "compute_entropy", "compute_aux_loss"}
        if not self._alone or any(v is not None and k not in simple for k, v in options.items()):
            return score(model, input_ids, attention_mask, logits_to_keep, *args, **options)
        if input_ids.device.type == "cpu" and not options.get("compute_aux_loss"):
            score = self._scored_plainly
        left, right = attention_mask[:, :-logits_to_keep], attention_mask[:, -logits_to_keep:]
        order = attention_mask.sum(1).argsort()
        parts: list[tuple[Tensor, Tensor | None, Tensor | None]] = []
        for rows in order.split(min(_ROWS, self.args.per_device_train_batch_size)):
            start = left.shape[1] - int(left[rows].sum(1).max())
            keep = max(1, int(right[rows].sum(1).max()))
            ids, seen = (x[rows, start : left.shape[1] + keep] for x in (input_ids, attention_mask))
            logps, entropies, aux = score(model, ids, seen, keep, *args, **options)
            parts.append((_wide(logps, logits_to_keep), _wide(entropies, logits_to_keep), aux))
        back = order.argsort()
        logps, entropies, aux = zip(*parts, strict=True)
        return (
            torch.cat(logps)[back],
            None if entropies[0] is None else torch.cat(entropies)[back],
            None if aux[0] is None else torch.stack(aux).mean(),
        )

    def _scored_plainly(
        self, model: Any, ids: Tensor, seen: Tensor, keep: int, *_: Any, compute_entropy: bool = False, **__: Any
    ) -> tuple[Tensor, Tensor | None, None]:
        """TRL's, from the model's own logits of the completions. Without Triton TRL works tile by tile and on prompts,
        too: a pass of smol-think with its gradient takes a fifth longer by it."""
        last = {"logits_to_keep": keep + 1} if "logits_to_keep" in signature(unwrap(model).forward).parameters else {}
        logits = model(input_ids=ids, attention_mask=seen, use_cache=False, **last).logits[:, -keep - 1 : -1]
        logits = logits.float() / self.temperature
        logps = -F.cross_entropy(logits.flatten(0, 1), ids[:, -keep:].flatten(), reduction="none").view(len(ids), keep)
        if not compute_entropy:
            return logps, None, None
        with torch.no_grad():
            entropies = logits.logsumexp(-1) - (logits.softmax(-1) * logits).sum(-1)
        return logps, entropies, None

    # What it says and leaves

    def row(self, logs: Mapping[str, Any], seconds: Mapping[str, float]) -> dict[str, Any]:
        """A step's line of log.jsonl, from what TRL logs."""
        made = (self.counted["tokens"] - self.logged_tokens) * self.accelerator.num_processes  # with equal shares
        self.logged_tokens = self.counted["tokens"]
        return {
            "reward": logs["reward"],
            "accuracy": logs.get("reason/right"),
            "tokens": logs["completions/mean_length"],
            "truncated": logs.get("cut off"),
            "kl": logs.get("kl"),
            "entropy": logs.get("entropy"),
            "flat_groups": logs["frac_reward_zero_std"],
            "skipped": self.nothing_learnt,
            "loss": float(logs["loss"]),
            "gradient_norm": float(logs.get("grad_norm") or 0.0),
            "learning_rate": float(logs["learning_rate"]),
            "reasons": {reason: logs.get(f"reason/{reason}") for reason in REASONS},
            "seconds": seconds,
            "tokens_per_second": round(made / max(seconds.get("generation", 0.0), 1e-9), 1) if made else None,
        }

    def create_model_card(self, *_: Any, **__: Any) -> None:
        """None: the artefact describes itself."""


def check_sharding(trainer: Any) -> None:
    """Raises UsageError for what needs the weights in one piece where FSDP or ZeRO 3 has cut them up."""
    if not (trainer._dist.is_fsdp or trainer._dist.is_zero3):
        return
    if trainer.rollout_func:
        raise UsageError(
            "--generation engine cannot roll out from weights that FSDP or ZeRO 3 spreads over processes: use "
            "vllm-colocate or vllm-server, or, where one device holds the model, accelerate's MULTI_GPU or ZeRO 2"
        )
    if trainer.trained.factors:
        raise UsageError("--rank with --method bias cannot be trained by FSDP or ZeRO 3: use MULTI_GPU or ZeRO 2")


def _padding(tokenizer: Any, model: Any) -> Any:
    """A copy of the tokenizer whose padding token the model has, since TRL pads with it and writes it into the model's
    config; and without an end token that the model does not stop at."""
    named = copy.deepcopy(tokenizer)
    if named.eos_token_id not in stop_ids(model):
        named.eos_token = None
    if named.pad_token_id != pad_id(model, named):
        # What is named becomes a special token, which texts are split at: an ordinary one is the last resort.
        size = min(len(named), model.config.get_text_config().vocab_size)
        special = sorted(i for i in named.all_special_ids if i < size)
        stops = [i for i in stop_ids(model) if i in special]
        named.pad_token = named.convert_ids_to_tokens([*stops, *special, size - 1][0])
    return named


@contextmanager
def _without_fused_head(model: Any) -> Iterator[None]:
    """The model's stock forward pass in place of the one that TRL bound to it to score tokens: our engine computes a
    model with a bound forward pass by a slower way, since that may be bound to these very modules."""

    def is_fused(forward: Any) -> bool:  # its name is that of the method which it wraps
        return getattr(getattr(forward, "__code__", None), "co_name", None) == "_fused_forward"

    bound = [module for module in model.modules() if is_fused(vars(module).get("forward"))]
    passes = [vars(module).pop("forward") for module in bound]
    try:
        yield
    finally:
        for module, forward in zip(bound, passes, strict=True):
            module.forward = forward


@contextmanager
def _positions_of_the_mask(model: Any) -> Iterator[None]:
    """Positions that count from a row's first token: without them a model counts padding on the left, too, which one
    with learned positions sees."""
    if "position_ids" not in signature(unwrap(model).forward).parameters:
        yield
        return

    def place(_: Any, args: Any, inputs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return args, inputs | {"position_ids": (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)}

    hook = model.register_forward_pre_hook(place, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()


def _by_length(passes: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rollouts of a step in as many passes: those with an advantage first, each kind from short to long."""
    seen = torch.cat([torch.cat([p["prompt_mask"], p["completion_mask"]], dim=1) for p in passes])
    flat = torch.cat([p["advantages"] for p in passes]) == 0
    order = (flat * (seen.shape[1] + 1) + seen.sum(1)).argsort(stable=True)

    def split(name: str) -> Sequence[Any]:
        parts = [p[name] for p in passes]
        if isinstance(parts[0], Tensor) and parts[0].dim():
            return torch.cat(parts)[order].split([len(part) for part in parts])
        if isinstance(parts[0], list):
            rows = [row for part in parts for row in part]
            return [[rows[i] for i in chosen] for chosen in order.split([len(part) for part in parts])]
        return parts

    columns = {name: split(name) for name in passes[0]}
    return [{name: parts[i] for name, parts in columns.items()} for i in range(len(passes))]


def _wide(x: Tensor | None, width: int) -> Any:
    return None if x is None else torch.nn.functional.pad(x, (0, width - x.shape[1]))
