"""The OpenAI API through OpenAI's own Python client: `openai_client.py KEEPWARM` starts a server of that binary."""

import subprocess
import sys
import tempfile

import openai


def ask(client, messages, session=None, **more):
    headers = {"X-Session-ID": session} if session else {}
    return client.chat.completions.with_raw_response.create(
        model="tiny-random", messages=messages, max_tokens=6, temperature=0, extra_headers=headers, **more
    )


def check(client):
    models = [model.id for model in client.models.list()]
    assert models == ["tiny-random"], models

    history = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is a tide?"}]
    raw = ask(client, history, session="python")
    first = raw.parse()
    assert first.object == "chat.completion" and first.choices[0].message.role == "assistant"
    assert first.usage.total_tokens == first.usage.prompt_tokens + first.usage.completion_tokens
    session = raw.headers["Keepwarm-Session"]
    assert raw.headers["Keepwarm-Source"] == "none" and raw.headers["ETag"]

    history += [
        {"role": "assistant", "content": first.choices[0].message.content},
        {"role": "user", "content": "And why?"},
    ]
    raw = ask(client, history, session="python")
    again = raw.parse()
    assert raw.headers["Keepwarm-Session"] == session
    assert again.usage.prompt_tokens_details.cached_tokens > 0, again.usage

    alone = ask(client, history).parse()
    assert alone.choices[0].message.content == again.choices[0].message.content, "kept state gives other tokens"

    stream = client.chat.completions.create(
        model="tiny-random",
        messages=history,
        max_tokens=6,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    pieces, usage, finish = [], None, None
    for chunk in stream:
        usage = chunk.usage or usage
        for choice in chunk.choices:
            pieces.append(choice.delta.content or "")
            finish = choice.finish_reason or finish
    assert "".join(pieces) == alone.choices[0].message.content, "streamed and whole answers differ"
    assert finish in ("stop", "length") and usage is not None, (finish, usage)

    sampled = [
        client.chat.completions.create(
            model="tiny-random", messages=history, max_tokens=8, temperature=1.0, top_p=0.9, seed=7
        ).choices[0].message.content
        for _ in range(2)
    ]
    assert sampled[0] == sampled[1], "a seed repeats an answer"

    text = client.completions.create(model="tiny-random", prompt="Once upon a time", max_tokens=4, temperature=0)
    assert text.object == "text_completion" and isinstance(text.choices[0].text, str)

    for wrong, error in [
        ({"model": "no-such-model"}, openai.NotFoundError),
        ({"temperature": -1}, openai.UnprocessableEntityError),
    ]:
        try:
            client.chat.completions.create(**{"model": "tiny-random", "messages": history, "max_tokens": 2, **wrong})
        except error as raised:
            assert raised.body, "an error has a body"
        else:
            raise AssertionError(f"{wrong} was accepted")


def main():
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.argv[1], "serve", "--http", "127.0.0.1:0", "--data-dir", folder]
        command += ["--gpu", "host=16MiB", "--pinned", "64MiB", "--model", "tiny:1"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as server:
            try:
                address = server.stdout.readline().split("http=")[1].split()[0]
                check(openai.OpenAI(base_url=f"http://{address}/v1", api_key="unused", max_retries=0, timeout=30))
            finally:
                server.terminate()
    print(f"openai {openai.__version__}: fine")


main()
