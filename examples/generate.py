"""Complete several prompts at once, each with its own parameters."""

from infer import LLM, SamplingParams

prompts = ["Once upon a time", "The captain looked at the sea and"]
params = [
    SamplingParams(temperature=0, max_tokens=32),
    SamplingParams(temperature=0.8, top_p=0.95, max_tokens=32, seed=1),
]

with LLM() as llm:  # or LLM("path/to/model.gguf"), LLM("org/name:Q8_0")
    for output in llm.generate(prompts, params):
        print(output.prompt + output.outputs[0].text)
        print(output.metrics)
