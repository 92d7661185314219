"""Which continuation does the model find likelier? Log-probabilities from `prompt_logprobs`, and the same from raw logits."""

import numpy as np

from infer import LLM, SamplingParams

START, ENDINGS = "Once upon a", [" time", " table"]

with LLM() as llm:
    for ending in ENDINGS:
        prompt = llm.tokenizer.encode(START + ending)
        (output,) = llm.generate([prompt], SamplingParams(max_tokens=1, prompt_logprobs=0))
        rows = output.prompt_logprobs or []
        total = sum(row[token].logprob for token, row in zip(prompt, rows, strict=True) if row is not None)

        logits = llm.logits(prompt).astype(np.float64)  # (tokens, vocabulary)
        logprobs = logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)
        again = logprobs[np.arange(len(prompt) - 1), prompt[1:]].sum()
        print(f"{START + ending!r}: {total:.3f} (from logits {again:.3f})")
