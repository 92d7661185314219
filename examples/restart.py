"""A prefix cache that survives restarts: the second process reads from the disk what the first one computed.

Run it twice. The folder may be deleted at any time; what is in it is checked, and computed again where it is missing.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from infer import LLM, SamplingParams

FOLDER = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(tempfile.gettempdir()) / "infer-example-pages"
STORY = "Once upon a time there was an old woman who lived alone at the edge of a dark forest. " * 20

with LLM(kv_offload_dir=FOLDER, kv_offload_max_bytes=256 << 20) as llm:
    output = llm.generate(STORY + "One day", SamplingParams(max_tokens=16, temperature=0.0))[0]
    metrics = output.metrics
    print(output.outputs[0].text)
    print(
        f"{metrics.cached_tokens} of {metrics.prompt_tokens} prompt tokens were there already, {metrics.restored_tokens} of them "
        f"on the disk; first token after {metrics.time_to_first_token:.3f} s"
    )
