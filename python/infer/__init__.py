"""Runs large language models fast on ordinary CPUs.

    from infer import LLM, SamplingParams

    with LLM() as llm:
        print(llm.generate("Once upon a time", SamplingParams(max_tokens=64))[0].outputs[0].text)

`LLM` is the whole of it; everything else is what it takes and gives. Importing this package starts no thread and loads
neither numpy nor any library that the work at hand does not need.
"""

from infer._core import InferError, ModelInfo, QueueFullError, SamplingParams, __version__, system_info
from infer.info import model_info
from infer.llm import LLM
from infer.outputs import CompletionOutput, Logprob, RequestMetrics, RequestOutput, StreamOutput
from infer.quantization import quantize
from infer.serving import RequestOptions
from infer.tokenizer import Tokenizer

__all__ = [
    "LLM",
    "SamplingParams",
    "RequestOptions",
    "RequestOutput",
    "CompletionOutput",
    "StreamOutput",
    "Logprob",
    "RequestMetrics",
    "Tokenizer",
    "ModelInfo",
    "model_info",
    "quantize",
    "system_info",
    "InferError",
    "QueueFullError",
    "__version__",
]
