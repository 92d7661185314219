"""How requests are served: deadlines, tenants, users, priorities, a bounded queue, an orderly end."""

from __future__ import annotations

import asyncio
import threading
import time

import pytest
from machine import patience

from infer import LLM, InferError, QueueFullError, SamplingParams

LONG = SamplingParams(max_tokens=400, ignore_eos=True, temperature=0.0)
SHORT = SamplingParams(max_tokens=8, ignore_eos=True, temperature=0.0)


def test_a_deadline_ends_a_request_with_what_it_has(llm: LLM) -> None:
    """And says so."""
    (output,) = llm.generate("The river", LONG, timeout=0.05)
    completion = output.outputs[0]
    assert completion.finish_reason == "timeout"
    assert len(completion.token_ids) < 400
    whole = llm.generate("The river", LONG)[0].outputs[0]
    assert whole.finish_reason == "length"
    assert whole.token_ids[: len(completion.token_ids)] == completion.token_ids
    assert whole.text.startswith(completion.text)


def test_options_are_one_for_all_or_one_for_each(llm: LLM) -> None:
    """Everything else is refused by name."""
    outputs = llm.generate(["A", "B"], SHORT, priority=[1, -1], user=["ann", None], timeout=None, cache_salt="x")
    assert [len(output.outputs[0].token_ids) for output in outputs] == [8, 8]
    for options, message in [
        ({"priority": [1]}, "priority: 1 given for 2 prompts"),
        ({"priority": 1.5}, "priority must be an integer"),
        ({"user": 7}, "user must be None or a string"),
        ({"timeout": 0.0}, "timeout must be a number of seconds greater than 0, got 0"),
        ({"timeout": "soon"}, "timeout must be a number"),
        ({"cache_salt": b"x"}, "cache_salt must be None or a string"),
        ({"prio": 1}, "prio: no such option of a request"),
    ]:
        with pytest.raises(InferError, match=message):
            llm.generate(["A", "B"], SHORT, **options)


def test_other_tenants_find_nothing() -> None:
    """Equal salts share, other salts do not, and the text is the same."""
    with LLM(threads=2, seed=0) as llm:
        prompt = list(range(5, 69))
        outputs = [llm.generate(prompt, SHORT, cache_salt=salt)[0] for salt in ("red", "blue", "red", None)]
    assert [output.metrics.cached_tokens for output in outputs] == [0, 0, 63, 0]
    assert len({tuple(output.outputs[0].token_ids) for output in outputs}) == 1


def test_tasks_that_wait_for_a_place_leave_the_loop_its_threads() -> None:
    async def crowd(llm: LLM) -> None:
        endless = SamplingParams(max_tokens=1500, ignore_eos=True)
        tasks = [asyncio.create_task(llm.agenerate("a", endless)) for _ in range(40)]
        await asyncio.sleep(0.2)
        assert await asyncio.wait_for(asyncio.to_thread(int), patience(1.0)) == 0
        for task in tasks:
            task.cancel()
        assert all(isinstance(end, asyncio.CancelledError) for end in await asyncio.gather(*tasks, return_exceptions=True))

    with LLM(threads=1, max_num_seqs=1, max_waiting=1, when_full="wait") as llm:
        asyncio.run(crowd(llm))
        assert llm.generate("a", SHORT)[0].outputs[0].finish_reason == "length"


def test_a_full_queue_is_an_error_or_a_wait() -> None:
    """Whichever was asked for; nothing is lost either way."""
    prompts = [f"Chapter {number}" for number in range(12)]
    with LLM(threads=2, max_num_seqs=1, max_waiting=2) as llm, pytest.raises(QueueFullError, match="max_waiting is 2"):
        llm.generate(prompts, SHORT)
    with LLM(threads=2, max_num_seqs=1, max_waiting=2, when_full="wait") as llm:
        waited = llm.generate(prompts, SHORT)
        awaited = asyncio.run(llm.agenerate(prompts, SHORT))
        assert llm.metrics()["requests_finished"] == 24
    texts = [output.outputs[0].text for output in waited]
    assert texts == [output.outputs[0].text for output in awaited]
    with LLM(threads=2) as llm:
        assert texts == [output.outputs[0].text for output in llm.generate(prompts, SHORT)]


def test_priorities_overtake() -> None:
    """A request of a lower number ends first although it came last."""
    ended: list[str] = []
    with LLM(threads=2, max_num_seqs=1) as llm:

        def run(name: str, priority: int) -> None:
            llm.generate(name, SamplingParams(max_tokens=700 if name == "late" else 20, ignore_eos=True), priority=priority)
            ended.append(name)

        threads = [threading.Thread(target=run, args=(name, level)) for name, level in (("late", 3), ("later", 3), ("soon", -1))]
        for thread in threads:
            thread.start()
            time.sleep(0.02)
        for thread in threads:
            thread.join()
    assert ended[0] == "soon"


def test_closing_can_let_everyone_finish() -> None:
    """New requests are refused meanwhile."""
    llm = LLM(threads=2)
    results: list[str | None] = []
    params = SamplingParams(max_tokens=100, ignore_eos=True)
    worker = threading.Thread(target=lambda: results.append(llm.generate("Slowly", params)[0].outputs[0].finish_reason))
    worker.start()
    while llm.metrics()["running"] == 0:
        time.sleep(0.001)
    llm.close(drain=True)
    worker.join()
    assert results == ["length"]
    with pytest.raises(InferError, match="closed"):
        llm.generate("Again", SHORT)


def test_metrics_have_distributions(llm: LLM) -> None:
    """Every request that ends is in them."""
    before = llm.metrics()["histograms"]["time_to_first_token"]["count"]
    llm.generate(["One", "Two"], SHORT)
    histogram = llm.metrics()["histograms"]["time_to_first_token"]
    assert histogram["count"] == before + 2 == sum(histogram["counts"])
    assert len(histogram["counts"]) == len(histogram["bounds"]) + 1
    assert histogram["sum"] > 0


def test_what_the_cache_holds_can_be_followed() -> None:
    """Stored blocks hang together by their hashes, and are removed when memory is needed."""
    with LLM(threads=2, kv_events=True, max_model_len=256, kv_cache_memory_bytes=LLM_PAGES) as llm:
        llm.generate(list(range(5, 53)), SHORT)
        events = llm.kv_events()
        stored = [event for event in events if event["type"] == "BlockStored"]
        assert [event["block_size"] for event in stored] == [16, 16, 16]
        assert stored[0]["token_ids"] == list(range(5, 21))
        assert stored[1]["parent_block_hash"] == stored[0]["block_hashes"][0]
        assert llm.kv_events() == []
        for first in range(60, 100):
            llm.generate([first] * 200, SHORT)
        removed = [event for event in llm.kv_events() if event["type"] == "BlockRemoved"]
        assert stored[0]["block_hashes"][0] in {event["block_hashes"][0] for event in removed}


# Some forty pages of the bundled model.
LLM_PAGES = 8 << 20
