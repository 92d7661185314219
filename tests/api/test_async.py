"""The async twins: same results, and the event loop stays free."""

from __future__ import annotations

import asyncio
import threading
import time

import pytest
from machine import patience

from infer import LLM, InferError, SamplingParams

PARAMS = SamplingParams(temperature=0.8, seed=5, max_tokens=24)
ENDLESS = SamplingParams(max_tokens=1500, ignore_eos=True)


async def test_agenerate_equals_generate(llm: LLM) -> None:
    prompts = [f"The {number}th prince" for number in range(10)]
    expected = [output.outputs[0].token_ids for output in llm.generate(prompts, PARAMS)]
    one_by_one = await asyncio.gather(*(llm.agenerate(prompt, PARAMS) for prompt in prompts))
    assert [output.outputs[0].token_ids for (output,) in one_by_one] == expected
    together = await llm.agenerate(prompts, PARAMS)
    assert [output.outputs[0].token_ids for output in together] == expected


async def test_astream_equals_stream(llm: LLM) -> None:
    expected = "".join(llm.stream("Once upon a time", PARAMS))
    assert "".join([piece async for piece in llm.astream("Once upon a time", PARAMS)]) == expected


async def test_achat_equals_chat(llm: LLM) -> None:
    messages = [{"role": "user", "content": "Tell me a story."}]
    expected = llm.chat(messages, PARAMS)[0].outputs[0].text
    assert (await llm.achat(messages, PARAMS))[0].outputs[0].text == expected
    assert "".join([piece async for piece in llm.astream_chat(messages, PARAMS)]) == expected


async def test_the_loop_stays_free(llm: LLM) -> None:
    longest = 0.0
    task = asyncio.create_task(llm.agenerate(["word " * 400] * 4, PARAMS.replace(max_tokens=64)))
    while not task.done():
        before = time.monotonic()
        await asyncio.sleep(0.005)
        longest = max(longest, time.monotonic() - before)
    assert len(task.result()) == 4
    assert longest < patience(0.25)


async def test_cancelling_a_task_cancels_its_requests(llm: LLM) -> None:
    task = asyncio.create_task(llm.agenerate(["Once"] * 16, ENDLESS))
    await asyncio.sleep(0.2)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    (output,) = await llm.agenerate("Once", PARAMS)
    assert output.metrics.queue_time is not None
    assert output.metrics.queue_time < patience(1.0)


async def test_leaving_astream_cancels(llm: LLM) -> None:
    stream = llm.astream(["Once"] * 16, ENDLESS)
    async for _ in stream:
        break
    await stream.aclose()
    (output,) = await llm.agenerate("Once", PARAMS)
    assert output.metrics.queue_time is not None
    assert output.metrics.queue_time < patience(1.0)


async def test_mistakes_raise_where_they_are_made(llm: LLM) -> None:
    with pytest.raises(InferError, match="token id"):
        await llm.agenerate([[1, -5]], PARAMS)
    with pytest.raises(InferError, match="sampling_params"):
        await llm.agenerate("a", [PARAMS, PARAMS])


def test_two_loops_in_two_threads(llm: LLM) -> None:
    expected = llm.generate("A loop", PARAMS)[0].outputs[0].text
    found: list[str] = []

    def work() -> None:
        async def twice() -> None:
            for _ in range(2):
                found.append((await llm.agenerate("A loop", PARAMS))[0].outputs[0].text)

        asyncio.run(twice())

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert found == [expected] * 4


async def test_close_ends_what_waits() -> None:
    llm = LLM(threads=2)
    task = asyncio.create_task(llm.agenerate("Once", ENDLESS))
    await asyncio.sleep(0.2)
    await asyncio.to_thread(llm.close)
    (output,) = await asyncio.wait_for(task, 10)
    assert output.outputs[0].finish_reason == "abort"
    with pytest.raises(InferError, match="closed"):
        await llm.agenerate("Once", PARAMS)
