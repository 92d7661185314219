"""All golden cases, in the order in which they are generated."""

from golden_case import Case
from golden_gemma import EXPERTS, GEMMA, GLM
from golden_layer_norm import LAYER_NORM_FAMILIES
from golden_llama import LLAMA, LLAMA_LIKE, PHI3

CASES: list[Case] = [*LLAMA, *LLAMA_LIKE, *PHI3, *GEMMA, *LAYER_NORM_FAMILIES, *GLM, *EXPERTS]
