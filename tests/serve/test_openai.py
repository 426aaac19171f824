"""The ``openai`` package and curl as clients of a server on the tiny model with two adapters."""

import json
import shutil
import subprocess
import threading

import openai
import pytest

QUESTION = [{"role": "user", "content": "Hi friend!"}]
ANSWER = "Hello! How can I help you?"


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=server.url, api_key="any", max_retries=0, timeout=60) as found:
        yield found


def test_models(client):
    found = {model.id: model for model in client.models.list().data}
    assert list(found) == ["tiny", "tiny-alias", "one", "two"]
    assert (found["tiny"].parent, found["one"].parent) == (None, "tiny")
    assert found["one"].root.endswith("/one") and found["one"].max_model_len == 512
    assert client.models.retrieve("two").id == "two"


def test_a_chat(client):
    found = client.chat.completions.create(model="tiny", messages=QUESTION, logprobs=True, top_logprobs=2)
    (choice,) = found.choices
    assert (choice.message.role, choice.message.content, choice.finish_reason) == ("assistant", ANSWER, "stop")
    assert (found.usage.prompt_tokens, found.usage.completion_tokens, found.usage.total_tokens) == (14, 9, 23)
    entries = choice.logprobs.content
    assert "".join(entry.token for entry in entries) == ANSWER + "<|im_end|>"
    assert all(len(entry.top_logprobs) == 2 and entry.top_logprobs[0].token == entry.token for entry in entries)


def test_a_stream_is_the_whole_in_parts(client):
    chunks = list(
        client.chat.completions.create(
            model="tiny", messages=QUESTION, stream=True, stream_options={"include_usage": True}
        )
    )
    first, *middle, last, usage = chunks
    assert (first.choices[0].delta.role, first.choices[0].delta.content) == ("assistant", "")
    assert "".join(chunk.choices[0].delta.content for chunk in middle) == ANSWER
    assert last.choices[0].finish_reason == "stop"
    assert (usage.choices, usage.usage.completion_tokens) == ([], 9)
    assert len({chunk.id for chunk in chunks}) == 1


def test_the_base_and_two_adapters_at_once(client, server):
    alone = {
        name: client.chat.completions.create(model=name, messages=QUESTION, max_tokens=12) for name in ("one", "two")
    }
    texts = {name: found.choices[0].message.content for name, found in alone.items()}
    texts["tiny"] = ANSWER
    assert len({*texts.values()}) == 3
    together = {}

    def ask(name: str) -> None:
        found = client.chat.completions.create(model=name, messages=QUESTION, max_tokens=12)
        together[name] = (found.model, found.choices[0].message.content)

    threads = [threading.Thread(target=ask, args=(name,)) for name in texts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert together == {name: (name, text) for name, text in texts.items()}


def test_several_answers(client):
    found = client.chat.completions.create(model="tiny", messages=QUESTION, n=3, temperature=2.0, seed=5, max_tokens=8)
    again = client.chat.completions.create(model="tiny", messages=QUESTION, n=3, temperature=2.0, seed=5, max_tokens=8)
    texts = [choice.message.content for choice in found.choices]
    assert [choice.index for choice in found.choices] == [0, 1, 2] and len({*texts}) > 1
    assert texts == [choice.message.content for choice in again.choices]
    assert found.usage.prompt_tokens == 14


def test_stop_strings(client):
    for stream in (False, True):
        found = client.chat.completions.create(model="tiny", messages=QUESTION, stop=["can I", "never"], stream=stream)
        if stream:
            chunks = list(found)
            text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
            finish = chunks[-1].choices[0].finish_reason
        else:
            text, finish = found.choices[0].message.content, found.choices[0].finish_reason
        assert (text, finish) == ("Hello! How ", "stop")


def test_settings_reach_the_engine(client, server):
    def text(**settings):
        found = client.chat.completions.create(model="tiny", messages=QUESTION, **settings)
        return found.choices[0].message.content, found.choices[0].finish_reason

    assert text(max_completion_tokens=2) == ("Hello!", "length")
    (hello,) = server.ask("POST", "/tokenize", {"prompt": "Hello"}).json["tokens"]
    assert not text(logit_bias={str(hello): -100}, max_tokens=4)[0].startswith("Hello")
    assert text(extra_body={"ignore_eos": True, "max_tokens": 20})[1] == "length"
    assert text(temperature=0.0, extra_body={"repetition_penalty": 50.0, "max_tokens": 8})[0] != ANSWER


def test_a_completion_scores_its_prompt(client):
    ids = client.post("/../tokenize", body={"prompt": "The capital of"}, cast_to=object)["tokens"]
    found = client.completions.create(
        model="tiny", prompt=[ids, ids], max_tokens=1, logprobs=1, echo=True, temperature=0
    )
    assert [choice.index for choice in found.choices] == [0, 1]
    for choice in found.choices:
        scores = choice.logprobs
        assert len(scores.tokens) == len(ids) + 1 and scores.token_logprobs[0] is None
        assert "".join(scores.tokens).startswith("The capital of") and choice.text.startswith("The capital of")
        assert scores.text_offset[:2] == [0, len(scores.tokens[0])]
        best = [max(top.values()) for top in scores.top_logprobs[1:]]
        assert all(value <= most for value, most in zip(scores.token_logprobs[1:], best, strict=True))
    one = client.completions.create(model="tiny", prompt=ids[:1], max_tokens=1, logprobs=1, echo=True, temperature=0)
    assert len(one.choices[0].logprobs.tokens) == 2 and one.choices[0].logprobs.token_logprobs[0] is None
    alone = client.completions.create(model="tiny", prompt="The capital of", max_tokens=0, logprobs=1, echo=True)
    assert alone.choices[0].logprobs.token_logprobs[1:] == pytest.approx(scores.token_logprobs[1:-1], abs=1e-4)
    assert alone.choices[0].text == "The capital of"


def test_a_completion_as_a_stream(client):
    whole = client.completions.create(model="tiny", prompt="Hello", max_tokens=6, echo=True)
    chunks = list(client.completions.create(model="tiny", prompt="Hello", max_tokens=6, echo=True, stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole.choices[0].text
    assert chunks[-1].choices[0].finish_reason == whole.choices[0].finish_reason


def test_token_ids(server):
    body = {"prompt": "Hello", "max_tokens": 2, "return_token_ids": True}
    (choice,) = server.ask("POST", "/v1/completions", body).json["choices"]
    assert choice["prompt_token_ids"] == server.ask("POST", "/tokenize", {"prompt": "Hello"}).json["tokens"]
    assert len(choice["token_ids"]) == 2


def test_tokens_of_a_chat_are_the_prompt(server):
    found = server.ask("POST", "/tokenize", {"messages": QUESTION}).json
    assert (found["count"], found["max_model_len"], len(found["token_strs"])) == (14, 512, 14)


def test_errors_are_openais(client):
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(model="nobody", messages=QUESTION)
    assert (missing.value.body["param"], missing.value.body["code"]) == ("model", 404)
    with pytest.raises(openai.BadRequestError) as long:
        client.chat.completions.create(model="tiny", messages=QUESTION, max_tokens=5000)
    assert "maximum context length is 512" in long.value.body["message"]
    with pytest.raises(openai.BadRequestError) as kind:
        client.chat.completions.create(model="tiny", messages=[{"role": "wizard", "content": "a"}])
    assert "wizard" in kind.value.body["message"]


def test_one_adapter_at_a_plain_path(server):
    asked = server.ask("POST", "/api/one", {"prompt": "Hi friend!", "max_tokens": 12}).json
    assert asked["model"] == "one"
    assert asked["choices"][0]["message"] == server.chat(model="one", max_tokens=12).json["choices"][0]["message"]
    assert server.ask("GET", "/api/one").json["id"] == "one"
    with openai.OpenAI(base_url=server.url.replace("/v1", "/api/two/v1"), api_key="any") as client:
        assert [model.id for model in client.models.list().data] == ["two"]
        assert client.chat.completions.create(model="two", messages=QUESTION, max_tokens=3).model == "two"
        with pytest.raises(openai.BadRequestError):
            client.chat.completions.create(model="one", messages=QUESTION)
    assert server.ask("GET", "/api/nobody").status == 404


def test_an_adapter_is_loaded_and_unloaded(server, adapters):
    load = {"lora_name": "three", "lora_path": "three"}
    found = server.ask("POST", "/v1/load_lora_adapter", load)
    assert (found.status, found.text) == (200, "Success: LoRA adapter 'three' added successfully.")
    assert server.ask("POST", "/v1/load_lora_adapter", load).status == 400
    assert server.chat(model="three", max_tokens=4).status == 200
    own = server.ask("POST", "/tokenize", {"model": "three", "messages": QUESTION}).json["tokens"]
    plain = server.ask("POST", "/tokenize", {"prompt": "(Hi friend!)"}).json["tokens"]
    assert own == plain  # the chat template in its folder
    found = server.ask("POST", "/v1/unload_lora_adapter", {"lora_name": "three"})
    assert (found.status, found.text) == (200, "Success: LoRA adapter 'three' removed successfully.")
    assert server.chat(model="three").status == 404
    assert server.ask("POST", "/v1/unload_lora_adapter", {"lora_name": "three"}).status == 404
    absolute = {"lora_name": "three", "lora_path": str(adapters / "three")}
    assert server.ask("POST", "/v1/load_lora_adapter", absolute).status == 200
    assert server.ask("POST", "/v1/unload_lora_adapter", {"lora_name": "three"}).status == 200


@pytest.mark.skipif(shutil.which("curl") is None, reason="no curl here")
def test_curl(server):
    def curl(*words: str) -> str:
        return subprocess.run(
            ["curl", "-sS", "--max-time", "30", *words], capture_output=True, text=True, check=True
        ).stdout

    body = json.dumps({"model": "tiny", "messages": QUESTION, "stream": True})
    text = curl("-N", f"{server.url}/chat/completions", "-H", "Content-Type: application/json", "-d", body)
    assert text.endswith("data: [DONE]\n\n") and '"content": "Hello"' in text
    assert "lora_ms_generated_tokens_total" in curl(server.url.replace("/v1", "/metrics"))
    assert curl("-o", "/dev/null", "-w", "%{http_code}", server.url.replace("/v1", "/health")) == "200"
    assert "<title>lora_ms</title>" in curl(server.url.replace("/v1", "/"))
