"""Many tasks share one engine: requests are batched together, however and whenever they arrive."""

import asyncio

from infer import LLM, SamplingParams


async def tell(llm: LLM, who: str) -> str:
    """Write the beginning of one tale."""
    pieces = [piece async for piece in llm.astream(f"The {who} said", SamplingParams(max_tokens=24, seed=7))]
    return f"The {who} said" + "".join(pieces)


async def main() -> None:
    """Ask for all tales at once, and give up on one that takes too long."""
    with LLM() as llm:
        for tale in await asyncio.gather(*(tell(llm, who) for who in ("king", "fox", "miller", "old woman"))):
            print(tale)
        endless = llm.agenerate("And then", SamplingParams(max_tokens=1500, ignore_eos=True))
        try:
            await asyncio.wait_for(endless, timeout=0.2)
        except TimeoutError:
            print("gave up; the engine is free again")


asyncio.run(main())
