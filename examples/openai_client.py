"""Ask a running server through OpenAI's own client.

pip install openai
mnemosyne serve model=smollm2
python examples/openai_client.py [URL]
"""

import sys

from openai import OpenAI


def main(url: str = "http://127.0.0.1:8000") -> None:
    client = OpenAI(base_url=f"{url}/v1", api_key="none", timeout=3600)
    model = client.models.list().data[0].id
    stream = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": "What is the capital of France?"}],
        max_tokens=64,
        stream=True,
        extra_body={"return_progress": True},  # chunks that say how far a long prompt is read
    )
    for chunk in stream:
        progress = (chunk.model_extra or {}).get("prompt_progress")
        if progress:
            print(f"\r{progress['processed']:,} of {progress['total']:,}", file=sys.stderr)
        for choice in chunk.choices:
            print(choice.delta.content or "", end="", flush=True)
    print()


if __name__ == "__main__":
    main(*sys.argv[1:])
