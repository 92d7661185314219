"""A long run of everything that users do, with an eye on what the process holds.

    python benches/soak.py [--minutes 60] [--threads 1] [--pause 0.05]

One engine with a small KV cache, a small folder on disk, prompt lookup and a bounded queue serves random requests from several
threads: completions, streams that are left, deadlines, cancelled tasks, chats, logits, refused arguments, sessions. Every
minute a second engine is opened, used and closed. Resident memory, open files and threads are sampled; the first quarter
counts as warming up, and the lower quartiles of the second and the last quarter should be level (many a sample meets the
second engine, so the upper ones are not). Kept in `benches/results/soak-*.json`, with a plot where matplotlib is installed.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import statistics
import tempfile
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from record import RESULTS, origin, plot, save

from infer import LLM, InferError, SamplingParams

if TYPE_CHECKING:
    from collections.abc import Callable

STEM = "Once upon a time there was a king who had three daughters, and the youngest was so beautiful that the sun wondered. "


def _prompt(dice: random.Random) -> Any:
    if dice.random() < 0.5:
        return STEM * dice.randrange(1, 8) + f"One day {dice.randrange(50)}"
    return [dice.randrange(4, 8000) for _ in range(dice.randrange(1, 600))]


def _params(dice: random.Random) -> SamplingParams:
    return SamplingParams(
        max_tokens=dice.randrange(1, 60),
        temperature=dice.choice([0.0, 0.8, 1.2]),
        n=dice.choice([1, 1, 3]),
        logprobs=dice.choice([None, 3]),
        seed=dice.randrange(1000),
        stop=dice.choice([None, ["."]]),
    )


def complete(llm: LLM, dice: random.Random, _: Path) -> None:
    """Several prompts, some with too little time."""
    prompts = [_prompt(dice) for _ in range(dice.randrange(1, 5))]
    llm.generate(prompts, _params(dice), use_tqdm=False, user=f"user {dice.randrange(5)}", timeout=dice.choice([None, 0.05]))


def leave_a_stream(llm: LLM, dice: random.Random, _: Path) -> None:
    """Read a few pieces and go."""
    for count, _piece in enumerate(llm.stream(_prompt(dice), _params(dice))):
        if count > 4:
            break


def cancel_a_task(llm: LLM, dice: random.Random, _: Path) -> None:
    """From asyncio."""

    async def main() -> None:
        task = asyncio.create_task(llm.agenerate(_prompt(dice), _params(dice)))
        await asyncio.sleep(dice.random() * 0.05)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    asyncio.run(main())


def talk(llm: LLM, dice: random.Random, _: Path) -> None:
    """A conversation of a few turns."""
    messages = [{"role": "user", "content": f"Tell me a story of {dice.randrange(100)} bears."}]
    for _turn in range(3):
        answer = llm.chat(messages, _params(dice), use_tqdm=False)[0].outputs[0].text
        messages += [{"role": "assistant", "content": answer}, {"role": "user", "content": "Go on."}]


def read_logits(llm: LLM, dice: random.Random, _: Path) -> None:
    """A whole prompt's."""
    llm.logits([dice.randrange(4, 8000) for _ in range(dice.randrange(1, 200))])


def be_refused(llm: LLM, dice: random.Random, _: Path) -> None:
    """By an exception that names what is wrong."""
    try:
        llm.generate([[10**9]], _params(dice), use_tqdm=False)
    except InferError:
        return
    raise AssertionError("a token beyond the vocabulary was accepted")


def keep_a_session(llm: LLM, dice: random.Random, folder: Path) -> None:
    """Into a file and back."""
    path = folder / f"session {threading.get_ident()}"
    llm.save_session(path, llm.tokenizer.encode(STEM * dice.randrange(1, 5)))
    llm.load_session(path)


DEEDS: list[Callable[[LLM, random.Random, Path], None]] = [
    *[complete] * 4,
    *[leave_a_stream] * 3,
    cancel_a_task,
    talk,
    read_logits,
    be_refused,
    keep_a_session,
]


class Users:
    """Threads that do random deeds until told to stop."""

    def __init__(self, llm: LLM, folder: Path, count: int, pause: float) -> None:
        self._over = threading.Event()
        self.deeds = 0
        self.failures: list[str] = []
        self._threads = [threading.Thread(target=self._run, args=(llm, folder, number, pause)) for number in range(count)]
        for thread in self._threads:
            thread.start()

    def _run(self, llm: LLM, folder: Path, number: int, pause: float) -> None:
        dice = random.Random(number)
        while not self._over.is_set():
            deed = dice.choice(DEEDS)
            try:
                deed(llm, dice, folder)
            except Exception as error:  # kept and reported: nothing may fail
                self.failures.append(f"{deed.__name__}: {error!r}")
            self.deeds += 1
            time.sleep(pause * dice.random() * 2)

    def stop(self) -> None:
        """Wait for all of them."""
        self._over.set()
        for thread in self._threads:
            thread.join()


def sample(began: float) -> dict[str, float]:
    """What the process holds now."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    resident, files = int(status["VmRSS"].split()[0]) * 1024, sum(1 for _ in Path("/proc/self/fd").iterdir())
    return {"seconds": time.monotonic() - began, "resident": resident, "files": files, "threads": int(status["Threads"])}


def level(samples: list[dict[str, float]], quarter: int) -> float:
    """The lower quartile of resident memory in a quarter of the time."""
    length = len(samples) // 4
    resident = [one["resident"] for one in samples[quarter * length : (quarter + 1) * length]]
    return statistics.quantiles(resident, n=4)[0]


def another_engine() -> None:
    """Opened, used and closed."""
    with LLM(threads=1, max_num_seqs=2) as llm:
        llm.generate("Once", SamplingParams(max_tokens=4), use_tqdm=False)


def draw(axes: Any, samples: list[dict[str, float]]) -> None:
    """Memory over time."""
    axes.plot([one["seconds"] / 60 for one in samples], [one["resident"] / 2**20 for one in samples])
    axes.set(xlabel="minutes", ylabel="resident memory, MiB", ylim=(0, None))


def main() -> None:
    """Run, sample, fit and keep."""
    parser = argparse.ArgumentParser(description="Everything that users do, for a long time.")
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--users", type=int, default=4)
    parser.add_argument("--pause", type=float, default=0.05, help="seconds between a user's deeds, on average")
    arguments = parser.parse_args()
    source = origin()
    samples = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        llm = LLM(
            threads=arguments.threads,
            max_num_seqs=8,
            kv_cache_memory_bytes=32 << 20,
            kv_offload_dir=folder / "pages",
            kv_offload_max_bytes=64 << 20,
            speculative_config={"method": "ngram"},
            max_waiting=16,
            when_full="wait",
        )
        began = time.monotonic()
        users = Users(llm, folder, arguments.users, arguments.pause)
        next_engine = 60.0
        while (now := time.monotonic() - began) < arguments.minutes * 60:
            time.sleep(min(5.0, arguments.minutes))
            samples.append(sample(began))
            if now > next_engine:
                another_engine()
                next_engine += 60
        users.stop()
        metrics = {key: value for key, value in llm.metrics().items() if key != "histograms"}
        llm.close()
    steady = samples[len(samples) // 4 :]
    growth = level(samples, 3) - level(samples, 1)
    result = {
        "minutes": arguments.minutes,
        "deeds": users.deeds,
        "failures": users.failures,
        "resident_by_quarter": [level(samples, quarter) for quarter in range(4)],
        "most_files": max(one["files"] for one in steady),
        "most_threads": max(one["threads"] for one in steady),
        "after_close": sample(began),
        "metrics": metrics,
        "samples": samples,
        **source,
    }
    path = save(RESULTS, "soak", result)
    plot(path.with_suffix(".svg"), lambda axes: draw(axes, samples))
    print(
        f"{users.deeds} deeds in {arguments.minutes} minutes, {len(users.failures)} failures; "
        f"{level(samples, 1) / 2**20:.1f} MiB resident in the second quarter, {growth / 2**20:+.1f} in the last"
    )


if __name__ == "__main__":
    main()
