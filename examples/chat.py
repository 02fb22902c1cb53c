"""Hold a conversation; each turn reads only what is new, as earlier turns are cached.

python examples/chat.py [MODEL]
"""

import sys

from mnemosyne import LLM, SamplingParams


def main(model: str = "smollm2") -> None:
    messages: list[dict[str, str]] = []
    params = SamplingParams(max_tokens=64)
    with LLM(model, cache={"page_size": 16}) as llm:
        for line in iter(lambda: input("> "), ""):  # an empty line ends it
            messages.append({"role": "user", "content": line})
            (output,) = llm.chat(messages, params)
            if output.error:
                print(f"refused: {output.error}")
                messages.pop()
                continue
            messages.append({"role": "assistant", "content": output.text})
            print(f"{output.text}\n({output.metrics.num_cached} tokens came from the cache)")


if __name__ == "__main__":
    main(*sys.argv[1:])
