"""Print an answer as it is written; leaving the loop cancels the rest."""

from infer import LLM, SamplingParams

with LLM() as llm:
    question = [{"role": "user", "content": "Tell me a story."}]
    words = 0
    for piece in llm.stream_chat(question, SamplingParams(temperature=0.8, seed=3, max_tokens=200)):
        print(piece, end="", flush=True)
        words += piece.count(" ")
        if words > 40:
            break
    print()
