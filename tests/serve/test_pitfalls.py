"""What users of such servers ran into: one test for each."""

import http.client
import json
import shutil
import socket
import threading
import time

QUESTION = [{"role": "user", "content": "Hi friend!"}]
LONG = {"messages": QUESTION, "ignore_eos": True, "max_tokens": 450, "stream": True}


def test_a_base_url_with_a_slash_at_its_end(server):
    assert server.ask("GET", "/v1//models").json == server.ask("GET", "/v1/models").json
    assert server.ask("GET", "/v1/models/").status == 200
    assert server.ask("POST", "//v1///chat//completions", {"messages": QUESTION, "max_tokens": 1}).status == 200


def test_without_a_key_every_bearer_is_taken(server):
    for value in ("Bearer", "Bearer ", "Bearer x", "Bearer undefined", "Basic eDp5", ""):
        assert server.ask("GET", "/v1/models", headers={"Authorization": value}).status == 200


def test_nulls_and_unknown_keys_are_taken_and_named(server):
    null = dict.fromkeys(
        "stop temperature top_p n max_tokens logit_bias tools stream response_format seed user".split()
    )
    found = server.chat(**null, max_completion_tokens=1)
    assert found.status == 200 and "x-ignored-keys" not in found.headers
    found = server.chat(max_tokens=1, chat_id="a", user="me", metadata={"a": "b"}, **{"odd\r\nkey": 1})
    assert (found.status, found.headers["x-ignored-keys"]) == (200, "chat_id, odd??key")
    server.says("(without effect: chat_id, odd??key)")


def test_an_answer_of_the_openai_package_goes_back_as_it_is(server):
    answer = {
        "role": "assistant",
        "content": "Hello!",
        "refusal": None,
        "tool_calls": None,
        "annotations": [],
        "audio": None,
    }
    assert (
        server.chat(messages=[*QUESTION, answer, *QUESTION], max_tokens=1, tools=[], tool_choice="auto").status == 200
    )


def test_content_in_parts(server):
    parts = [{"type": "text", "text": "Hi friend!"}]
    assert server.chat(messages=[{"role": "user", "content": parts}]).json["choices"] == server.chat().json["choices"]


def test_titles_and_tags_are_asked_in_the_same_moment(server):
    found = []
    threads = [threading.Thread(target=lambda: found.append(server.chat(max_tokens=20))) for _ in range(9)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [reply.status for reply in found] == [200] * 9
    assert len({reply.json["choices"][0]["message"]["content"] for reply in found}) == 1


def test_the_role_comes_before_the_prompt_is_read(server):
    with opened(server, LONG), opened(server, LONG), opened(server, LONG), opened(server, LONG):
        fifth = opened(server, LONG)  # waits for a row
        line = fifth.response.readline()
        assert json.loads(line.removeprefix(b"data: "))["choices"][0]["delta"] == {"role": "assistant", "content": ""}
        assert server.number("lora_ms_requests_waiting") == 1
        fifth.close()
    quiet(server)


def test_a_request_whose_client_goes_stops(server):
    before = server.number("lora_ms_generated_tokens_total")
    stream = opened(server, LONG)
    stream.response.readline()
    stream.close()
    whole = socket.create_connection(("127.0.0.1", server.port))
    body = json.dumps({**LONG, "stream": False, "n": 3}).encode()
    head = ["POST /v1/chat/completions HTTP/1.1", "Host: localhost", "Content-Type: application/json"]
    whole.sendall("\r\n".join([*head, f"Content-Length: {len(body)}", "", ""]).encode() + body)
    time.sleep(0.1)
    whole.close()
    quiet(server)
    assert server.number("lora_ms_generated_tokens_total") - before < 4 * 450


def test_a_web_page_elsewhere_asks_first(server):
    ours, others = {"Origin": "http://localhost:3000"}, {"Origin": "http://evil.example"}
    asks = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization,content-type"}
    found = server.ask("OPTIONS", "/v1/chat/completions", headers={**ours, **asks})
    assert (found.status, found.headers["access-control-allow-origin"]) == (200, "http://localhost:3000")
    assert server.ask("OPTIONS", "/v1/chat/completions", headers={**others, **asks}).status == 400
    found = server.ask("GET", "/v1/models", headers=ours)
    assert found.headers["access-control-allow-origin"] == "http://localhost:3000"
    assert "access-control-allow-origin" not in server.ask("GET", "/v1/models", headers=others).headers


def test_a_page_whose_name_was_turned_to_this_machine_is_refused(server):
    assert server.ask("GET", "/v1/models", headers={"Host": "evil.example"}).status == 421
    for host in ("localhost", "localhost:8000", "127.0.0.1", "[::1]:80", "proxy.example"):
        assert server.ask("GET", "/v1/models", headers={"Host": host}).status == 200


def test_an_adapter_that_does_not_fit_is_refused(server, adapters):
    for name, broken in (("nothing", {}), ("elsewhere", {"a.b.lora_A.weight": (2, 4), "a.b.lora_B.weight": (4, 2)})):
        folder = adapters / name
        folder.mkdir(exist_ok=True)
        write(folder, broken)
        reply = server.ask("POST", "/v1/load_lora_adapter", {"lora_name": name, "lora_path": name})
        assert reply.status == 400 and name in reply.json["error"]["message"], reply
    assert [model["id"] for model in server.ask("GET", "/v1/models").json["data"]] == [
        "tiny",
        "tiny-alias",
        "one",
        "two",
    ]


def test_an_adapter_of_code_or_elsewhere_is_refused(server, adapters, tmp_path):
    pickled = adapters / "pickled"
    shutil.copytree(adapters / "one", pickled)
    (pickled / "adapter_model.safetensors").rename(pickled / "adapter_model.bin")
    shutil.copytree(adapters / "one", tmp_path / "outside")
    (adapters / "link").symlink_to(tmp_path / "outside")
    said = {}
    for path in ("pickled", "link", str(tmp_path / "outside"), "one/../../outside", str(tmp_path / "no")):
        reply = server.ask("POST", "/v1/load_lora_adapter", {"lora_name": "x", "lora_path": path})
        assert reply.status == 400
        said[path] = reply.json["error"]["message"]
    assert "adapter_model" in said.pop("pickled")
    assert {*said.values()} == {"lora_path is not a folder below one of --adapter-folders"}


def test_the_page_is_all_there_is_and_strict(server):
    found = server.ask("GET", "/")
    policy = found.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy
    for name, kind in (("page.js", "text/javascript"), ("page.css", "text/css"), ("page.svg", "image/svg+xml")):
        assert name in found.text
        part = server.ask("GET", f"/{name}")
        assert part.status == 200 and part.headers["content-type"].startswith(kind)
        assert "//" not in part.text.replace("http://www.w3.org/2000/svg", "").replace("// ---", "")
    assert "http" not in found.text


# --- helpers


class opened:
    """A stream of which nothing is read yet."""

    def __init__(self, server, body):
        self.connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
        self.connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
        self.response = self.connection.getresponse()
        assert self.response.status == 200

    def close(self):
        self.response.close()
        self.connection.close()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.close()


def quiet(server) -> None:
    """Waits until nothing runs; a request that went on would take much longer."""
    end = time.monotonic() + 2
    while server.number("lora_ms_requests_running") + server.number("lora_ms_requests_waiting"):
        assert time.monotonic() < end
        time.sleep(0.02)


def write(folder, shapes):
    import numpy as np
    from safetensors.numpy import save_file

    save_file(
        {f"base_model.model.{key}": np.ones(shape, np.float32) for key, shape in shapes.items()},
        folder / "adapter_model.safetensors",
    )
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["b"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
