"""Watching an engine: what it logs, a timeline of its requests, and its counters."""

from __future__ import annotations

import logging

from infer import LLM, SamplingParams

logging.basicConfig(format="%(levelname)s %(message)s")
logging.getLogger("infer").setLevel(logging.DEBUG)

with LLM(trace=True) as llm:
    llm.generate(["Once upon a time", "The fox said", "In the deep sea"], SamplingParams(max_tokens=12, seed=1), user="ann")
    events = llm.trace_events()
    start = events[0]["time"]
    for event in events:
        print(f"{(event['time'] - start) * 1000:8.2f} ms  request {event['request_id']}  {event['event']}")
    metrics = llm.metrics()
    print(f"{metrics['steps']} steps computed {metrics['computed_tokens']} tokens, {metrics['generated_tokens']} of them new")
