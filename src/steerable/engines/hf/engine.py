"""The engine of Hugging Face transformers: continuous batching for the families that it fits (`routes.py` says which),
`model.generate` for the others (`fallback.py`), with the same requests and draws.

The model that it is given is never changed: hooks and attention of its own are those of a copy of the modules, which
shares the parameters. So several threads may use one model at once.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from steerable.engines.activations import capture as capture_texts
from steerable.engines.base import Completion, Continuation, Progress, Request
from steerable.engines.hf.batching import Batch
from steerable.engines.hf.fallback import in_batches
from steerable.engines.hf.fused import fuse
from steerable.engines.hf.hooks import Handle, check_around
from steerable.engines.hf.products import GenerationDtype, narrow, product_dtype
from steerable.engines.hf.routes import check_ids, check_length, is_bound, route
from steerable.engines.hf.scoring import score_tokens
from steerable.engines.hf.slots import ATTENTION
from steerable.engines.memory import check_memory
from steerable.engines.pool import default_rows
from steerable.engines.sampling import Decoding, decoding_of, pad_id
from steerable.models.copies import private_copy
from steerable.models.loading import stop_ids, unwrap_to_run
from steerable.steering.spec import Steering, drawn, steering_of
from steerable.store.errors import UsageError


@dataclass(frozen=True)
class TransformersEngine:
    """Generates, scores and reads texts with a Hugging Face model, which is never changed.

    Attributes:
        model: a transformers model, or what wraps one (PEFT, DistributedDataParallel, torch.compile, ...).
        tokenizer: for gates that read text (`thinking`, `boundary`); may be None without them.
        rows: sequences that are computed together; None: 64 on an accelerator, 8 to 192 on a CPU
            (`pool.default_rows`).
        generation_dtype: in which type the linear layers generate (`products.py`): "model", that of the weights;
            "bfloat16"; or "auto", which is bfloat16 for a float32 model of 50 million parameters or more on a CPU with
            units for it. Log-probabilities and activations are always computed by the model as it is.

    Example:
        >>> ids = tokenizer("2 + 2 =")["input_ids"]
        >>> engine = st.TransformersEngine(model, tokenizer)
        >>> [done] = engine.generate([st.Request(ids, steering=direction.steering(0.5))], max_new_tokens=4)
        >>> len(done.ids)
        4
    """

    model: Any
    tokenizer: Any = None
    rows: int | None = None
    generation_dtype: GenerationDtype = "model"

    @torch.inference_mode()
    def generate(
        self, requests: Sequence[Request], *, max_new_tokens: int = 500, progress: Progress | None = None
    ) -> list[Completion]:
        """Continue every request, up to a token of the model's `generation_config.eos_token_id` or `max_new_tokens`;
        completions in the order of the requests.

        Requests with any steerings and decodings share batches. Greedy tokens equal those of `model.generate`, unless
        `generation_dtype` is narrower; sampled ones depend on the request's seed and not on the other rows, up to the
        rounding of differently shaped matrix products, which now and then tips a draw that lies on a boundary.

        Raises UsageError for an empty prompt, for what is no token of the model, for texts beyond its learned
        positions, for settings of the `generation_config` that this engine lacks, and for steerings that do not fit the
        model; SteerableError when the model's logits are not finite. Warns (SteerableWarning) about steerings that
        touched no token, and about directions of another model.
        """
        if not requests:
            return []
        model = self._runnable()
        rows = self.rows
        if max_new_tokens < 1 or (rows is not None and rows < 1):
            raise UsageError(f"max_new_tokens ({max_new_tokens}) and rows ({rows}) must be at least 1")
        if any(len(request.prompt_ids) == 0 for request in requests):
            raise UsageError("a prompt is empty: every request needs at least one token")
        check_ids(model, [request.prompt_ids for request in requests])
        longest = max(len(request.prompt_ids) for request in requests) + max_new_tokens
        check_length(model, longest)
        way, products = route(model, longest - 1), product_dtype(model, self.generation_dtype)
        rows = rows or default_rows(model, longest, products if way.name == "slots" else None)
        longest -= 1  # the last new token is never fed
        if way.slots:
            check_around(model)
        if way.name == "slots":
            model = private_copy(model, _attn_implementation=ATTENTION)
        elif not is_bound(model):
            model = private_copy(model)
        if products != model.dtype:
            narrow(model)
        elif way.name == "slots":
            fuse(model)
        default = Decoding()
        if any(request.decoding is None for request in requests):
            default = decoding_of(model)
        decodings = [request.decoding or default for request in requests]
        pad = pad_id(model, self.tokenizer)
        with self._steered(model, [drawn(request.steering, request.seed) for request in requests]) as (
            handle,
            programs,
        ):
            if way.slots:
                plain = way.name == "slots"
                done: dict[int, Completion] = {}
                while left := [i for i in range(len(requests)) if i not in done]:
                    batch = Batch(
                        model, [requests[i] for i in left], [decodings[i] for i in left], [programs[i] for i in left],
                        handle, limit=max_new_tokens, rows=min(rows, len(left)), longest=longest, plain=plain, pad=pad,
                        stored=products if plain else None,
                    )  # fmt: skip
                    try:
                        batch.complete(progress)
                    except RuntimeError as error:
                        check_memory(error, batch.rows)
                        rows = batch.rows // 2
                    done |= {i: one for i, one in zip(left, batch.done, strict=True) if one is not None}
                return [done[i] for i in range(len(requests))]
            new = in_batches(
                model, requests, decodings, programs, handle,
                limit=max_new_tokens, rows=1 if way.name == "one by one" else rows,
                equal=way.name == "equal lengths", pad=pad, progress=progress,
            )  # fmt: skip
        stops = stop_ids(model)
        return [Completion(ids, ids[-1] in stops) for ids in new]

    @torch.inference_mode()
    def logprobs(self, sequences: Sequence[Continuation]) -> list[Tensor]:
        """The log-probability of each token of each continuation, given what stands before it and under the sequence's
        own steering: float32 `[tokens]` on the CPU, in the order of the sequences.

        Raises UsageError for an empty prompt, for what is no token of the model and for steerings that do not fit it.
        """
        if any(len(sequence.prompt_ids) == 0 for sequence in sequences):
            raise UsageError("a prompt is empty: every sequence needs at least one token")
        model = self._runnable()
        check_around(model)
        texts = [[*sequence.prompt_ids, *sequence.ids] for sequence in sequences]
        check_ids(model, texts)
        if not is_bound(model):
            model = private_copy(model)
        starts = [len(sequence.prompt_ids) for sequence in sequences]
        with self._steered(model, [sequence.steering for sequence in sequences]) as (handle, programs):
            scores = score_tokens(model, texts, starts, handle=handle, passes=[programs])
        return [score.float() for score in scores]

    def capture(self, texts: Sequence[str], **options: Any) -> Any:
        """Activations of the texts' tokens, unsteered; see `steerable.capture`, which has the same options."""
        return capture_texts(self.model, self.tokenizer, texts, **options)

    def _runnable(self) -> Any:
        # a compiled model runs as it is
        return self.model if hasattr(self.model, "_orig_mod") else unwrap_to_run(self.model)

    @contextmanager
    def _steered(self, model: Any, steerings: Iterable[Steering]) -> Iterator[tuple[Handle | None, list[int]]]:
        """The handle of all that steers, None where nothing does, and the number of each request's program, -1 for
        none."""
        numbers: dict[Steering, int] = {}
        programs = [
            numbers.setdefault(steering, len(numbers)) if any(not i.is_identity for i in steering) else -1
            for steering in map(steering_of, steerings)
        ]
        if not numbers:
            yield None, programs
            return
        with Handle(model, list(numbers), self.tokenizer, track=False) as handle:
            yield handle, programs
