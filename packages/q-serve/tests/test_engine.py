"""An error ends one request, never the engine; and nothing of it reaches another."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM, PreTrainedModel

from q_serve.build import build
from q_serve.core.kv_blocks import BlockPool
from q_serve.core.request import FinishReason, Request
from q_serve.core.sampling import SamplingParams
from q_serve.core.scheduler import ScheduledRequest, Scheduler, SchedulerConfig
from q_serve.engine import FAILED, NOT_FINITE, Engine, Output
from q_serve.options import EngineOptions

POISON = 11


class Counting:
    """A runner whose tokens count up; it fails on steps with a poisoned request."""

    def __init__(self) -> None:
        self.steps = 0

    def execute(self, batch: Sequence[ScheduledRequest]) -> list[int | None]:
        self.steps += 1
        if any(POISON in scheduled.request.tokens for scheduled in batch):
            raise RuntimeError("poisoned")
        return [scheduled.end % 10 if scheduled.samples else None for scheduled in batch]


def counting_engine() -> Engine:
    return Engine(Scheduler(SchedulerConfig(16, 8, 100), BlockPool(64, 4, model="m")), Counting(), vocab_size=20)


def request(name: str, tokens: Sequence[int], max_tokens: int = 6, **params: float) -> Request:
    return Request(name, list(tokens), SamplingParams(max_tokens=max_tokens, **{"temperature": 0} | params))  # type: ignore[arg-type]


def run(engine: Engine) -> list[Output]:
    outputs = []
    while engine.has_work:
        outputs += engine.step()
        engine.scheduler.check_integrity()
    return outputs


def test_a_failing_step_ends_only_who_fails_alone() -> None:
    engine = counting_engine()
    good, bad, other = request("good", [1, 2, 3]), request("bad", [1, POISON]), request("other", [4])
    for each in (good, bad, other):
        engine.add(each)
    outputs = run(engine)
    assert bad.finish_reason is FinishReason.ERROR and bad.error == FAILED
    assert [output for output in outputs if output.request_id == "bad"] == [Output("bad", None, FinishReason.ERROR, FAILED, 0)]
    assert good.finish_reason is other.finish_reason is FinishReason.LENGTH
    assert list(good.output_tokens) == [3, 4, 5, 6, 7, 8]
    assert engine.scheduler.pool.num_available == 64


def test_an_abort_frees_everything_once_and_says_nothing() -> None:
    engine = counting_engine()
    engine.add(request("a", [1] * 30))
    engine.add(request("b", [2] * 3))
    engine.step()
    engine.abort("a")
    engine.abort("a")
    engine.abort("never was")
    assert {output.request_id for output in run(engine)} == {"b"}
    assert engine.scheduler.pool.num_available == 64


def test_tokens_outside_the_vocabulary_are_refused() -> None:
    for token in (-1, 20):
        with pytest.raises(ValueError, match=f"token id {token}"):
            counting_engine().add(request("a", [1, token]))


@pytest.fixture(scope="module")
def poisoned(save: Callable[[PreTrainedModel], Path], tiny_llama: LlamaForCausalLM) -> Path:
    """A model that has a NaN in the embedding of one token."""
    model = LlamaForCausalLM(tiny_llama.config)
    model.load_state_dict(tiny_llama.state_dict())
    with torch.no_grad():
        model.model.embed_tokens.weight[POISON, 0] = float("nan")
    return save(model)


def test_nan_stays_where_it_is(poisoned: Path) -> None:
    def engine() -> Engine:
        # So few blocks that those of the failed request are used again at once.
        options = EngineOptions(model=poisoned, dtype="float32", num_blocks=12, block_size=4, max_batch_tokens=8, max_model_len=40)
        return build(options).engine

    clean = list(range(20, 38))
    alone = request("alone", clean)
    golden = engine()
    golden.add(alone)
    run(golden)

    tested = engine()
    bad, good = request("bad", [*clean[:12], POISON, *clean[:6]]), request("good", clean[5:10])
    tested.add(bad)
    tested.add(good)
    run(tested)
    assert bad.finish_reason is FinishReason.ERROR and bad.error == NOT_FINITE
    assert good.finish_reason is FinishReason.LENGTH
    after = [request("after", clean), request("again", clean)]
    for each in after:
        tested.add(each)
        run(tested)
        assert each.output_tokens == alone.output_tokens
    assert [each.num_cached_prompt_tokens for each in after] == [0, 16], "the failed request's blocks were cached"


def test_seeded_draws_do_not_depend_on_the_batch(tiny_directory: Path) -> None:
    def engine() -> Engine:
        return build(EngineOptions(model=tiny_directory, dtype="float32", num_blocks=40, block_size=4, max_model_len=100)).engine

    def seeded(name: str) -> Request:
        return request(name, range(30, 50), max_tokens=30, temperature=1.0, seed=5, top_p=0.9)

    alone = seeded("alone")
    quiet = engine()
    quiet.add(alone)
    run(quiet)
    busy = engine()
    crowd = [request(f"r{i}", range(i, i + 20), max_tokens=30, temperature=1.0, seed=i) for i in range(6)]
    together = seeded("together")
    for each in (*crowd, together):
        busy.add(each)
    run(busy)
    assert busy.scheduler.num_preemptions > 0
    assert together.output_tokens == alone.output_tokens
    assert len({tuple(each.output_tokens) for each in crowd}) == 6


def test_each_token_has_a_draw_of_its_own(save: Callable[[PreTrainedModel], Path], tiny_llama: LlamaForCausalLM) -> None:
    model = LlamaForCausalLM(tiny_llama.config)
    torch.nn.init.zeros_(model.lm_head.weight)  # every token is as likely as any
    engine = build(EngineOptions(model=save(model), dtype="float32", num_blocks=40, max_model_len=100)).engine
    drawn = request("drawn", [1], max_tokens=60, temperature=1.0, seed=1)
    engine.add(drawn)
    run(engine)
    # of 60 draws from 320, about 55 differ
    assert len(set(drawn.output_tokens)) > 40
