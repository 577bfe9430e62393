"""The chat client against a server on this machine: retries, cache, ledger, errors without keys, cassettes."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from papers10.agents.client import (
    BudgetExceeded,
    CassetteClient,
    Completion,
    EndpointError,
    HTTPChatClient,
    Ledger,
    request_key,
)

openai = pytest.importorskip("openai")
PING = [{"role": "user", "content": "ping"}]


class Server:
    """Answers with what `plan` says for each request: a status, or a function of the request that gives the body."""

    def __init__(self):
        self.requests, self.headers, self.plan = [], [], []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer.requests.append(request)
                outer.headers.append({name.lower(): value for name, value in self.headers.items()})
                step = outer.plan.pop(0) if outer.plan else 200
                body = (
                    {"error": {"message": f"refused {self.headers['Authorization']}"}}
                    if step != 200
                    else outer.answer(request)
                )
                data = json.dumps(body).encode()
                self.send_response(step)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                self.send_header("Retry-After-Ms", "1")
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/v1"

    @staticmethod
    def answer(request):
        message = {"role": "assistant", "content": f"pong {request['messages'][-1]['content']}"}
        if "tools" in request:
            call = {"id": "c1", "type": "function", "function": {"name": "look", "arguments": "{}"}}
            message = {"role": "assistant", "content": None, "tool_calls": [call]}
        choices = [{"index": i, "finish_reason": "stop", "message": message} for i in range(request.get("n", 1))]
        usage = {"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 15}
        return {
            "id": "1",
            "object": "chat.completion",
            "created": 0,
            "model": request["model"],
            "usage": usage,
            "choices": choices,
        }


@pytest.fixture
def server():
    made = Server()
    yield made
    made.server.shutdown()


def client(server, **options):
    return HTTPChatClient(server.url, **{"model": "m-large", "max_retries": 2} | options)


def test_everything_is_sent_and_read_back(server):
    answer = client(server).complete(PING, n=2, seed=3, temperature=0.5, max_tokens=7, top_p=0.9, top_k=5)
    (request,) = server.requests
    assert {k: request[k] for k in ("model", "n", "seed", "temperature", "max_tokens", "top_p", "top_k")} == {
        "model": "m-large",
        "n": 2,
        "seed": 3,
        "temperature": 0.5,
        "max_tokens": 7,
        "top_p": 0.9,
        "top_k": 5,
    }
    assert answer.texts == ["pong ping"] * 2 and (answer.prompt_tokens, answer.completion_tokens) == (10, 5)
    assert answer.finish_reasons == ["stop", "stop"] and answer.cost_usd is None


def test_calls_of_tools_come_as_dictionaries(server):
    tool = {"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}
    answer = client(server).complete(PING, tools=[tool])
    assert answer.texts == [""] and answer.tool_calls[0][0]["function"]["name"] == "look"


@pytest.mark.parametrize("status", [429, 500, 503])
def test_busy_servers_are_asked_again(server, status):
    server.plan = [status, status]
    assert client(server).complete(PING).texts == ["pong ping"]
    assert len(server.requests) == 3


def test_other_refusals_are_not_repeated_and_show_no_key(server, monkeypatch):
    monkeypatch.setenv("MY_KEY", "sk-very-secret")
    server.plan = [401]
    made = client(server, api_key_env="MY_KEY")
    with pytest.raises(EndpointError, match="status 401") as caught:
        made.complete(PING)
    assert caught.value.status == 401 and len(server.requests) == 1
    assert server.headers[0]["authorization"] == "Bearer sk-very-secret"
    assert "sk-very-secret" not in f"{caught.value} {made!r}" and caught.value.__cause__ is None


def test_a_server_that_is_gone_is_an_endpoint_error():
    made = HTTPChatClient("http://127.0.0.1:9/v1", model="m", max_retries=0, timeout_s=2)
    with pytest.raises(EndpointError, match="cannot be reached") as caught:
        made.complete(PING)
    assert caught.value.status is None


def test_repeated_questions_come_from_the_cache_also_in_another_process(server, tmp_path):
    first = client(server, cache=tmp_path).complete(PING, temperature=0)
    second = client(server, cache=tmp_path).complete(PING, temperature=0)
    assert (first.cached, second.cached) == (False, True) and first.texts == second.texts and len(server.requests) == 1
    client(server, cache=tmp_path).complete(PING, temperature=0, max_tokens=3)
    assert len(server.requests) == 2


def test_samples_without_a_seed_are_not_cached(server, tmp_path):
    made = client(server, cache=tmp_path)
    for _ in range(2):
        made.complete(PING, temperature=1.0)
    made.complete(PING, temperature=1.0, seed=1)
    assert len(server.requests) == 3 and len(list(tmp_path.iterdir())) == 1


def test_the_ledger_counts_and_stops(server, tmp_path):
    ledger = Ledger({"m": (1.0, 1.0), "m-large": (1e5, 2e5)}, max_cost_usd=3.0)
    made = client(server, ledger=ledger, cache=tmp_path)
    assert made.complete(PING, temperature=0).cost_usd == pytest.approx(2.0)
    assert made.complete(PING, temperature=0).cached
    made.complete([{"role": "user", "content": "more"}])
    with pytest.raises(BudgetExceeded, match=r"4\.0000 of 3\.0000 USD"):
        made.complete([{"role": "user", "content": "yet more"}])
    assert len(server.requests) == 2
    expected = {
        "model": "m-large",
        "requests": 3,
        "cached": 1,
        "prompt_tokens": 20,
        "completion_tokens": 10,
        "cost_usd": 4.0,
    }
    assert ledger.records() == [expected]


def test_a_budget_needs_prices():
    with pytest.raises(ValueError, match="prices: expected the price of a model"):
        Ledger(max_cost_usd=1.0)
    with pytest.raises(ValueError, match="prices: expected a price for 'other'"):
        Ledger({"m": (1, 1)}, max_cost_usd=1.0).allow("other")


def test_many_requests_keep_their_order_and_leave_errors_in_place(server):
    lists = [[{"role": "user", "content": str(i)}] for i in range(12)]
    answers = client(server, max_concurrency=4).complete_many(lists)
    assert [answer.texts[0] for answer in answers] == [f"pong {i}" for i in range(12)]
    server.plan = [400]
    (answer,) = client(server).complete_many(lists[:1])
    assert isinstance(answer, EndpointError)


def test_a_server_elsewhere_needs_a_key(monkeypatch):
    monkeypatch.delenv("NO_SUCH_KEY", raising=False)
    with pytest.raises(ValueError, match="NO_SUCH_KEY: expected a key"):
        HTTPChatClient("https://example.org/v1", api_key_env="NO_SUCH_KEY")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n": 0}, "n"),
        ({"temperature": -1.0}, "temperature"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"messages": []}, "messages"),
        ({"model": None}, "model: expected the name"),
    ],
)
def test_what_no_server_takes_is_refused_before_it_is_sent(server, options, message):
    options = {"messages": PING} | options
    messages = options.pop("messages")
    with pytest.raises(ValueError, match=message):
        client(server, model=None if "model" in options else "m").complete(messages, **options)
    assert not server.requests


def test_a_key_of_a_request_depends_on_all_of_it():
    keys = {request_key(url, {"model": model, "messages": PING}) for url in ("a", "b") for model in ("x", "y")}
    assert len(keys) == 4 and request_key("a", {"b": 1, "c": 2}) == request_key("a", {"c": 2, "b": 1})


def test_a_cassette_records_and_replays(tmp_path):
    tape = tmp_path / "tape.json"
    recorder = CassetteClient(tape, client=CassetteClient(["one", "two"]))
    assert [recorder.complete(PING, seed=i).texts for i in (0, 1, 0)] == [["one"], ["two"], ["one"]]
    player = CassetteClient(tape)
    assert player.complete(PING, seed=1).texts == ["two"]
    with pytest.raises(EndpointError, match="was not recorded"):
        player.complete(PING, seed=2)


def test_a_list_of_answers_ends():
    player = CassetteClient(["a", "b", "c"])
    assert player.complete(PING, n=2).texts == ["a", "b"]
    with pytest.raises(EndpointError, match="at its end"):
        player.complete(PING, n=2)
    assert [r["n"] for r in player.requests] == [2, 2]


def test_a_completion_has_plain_defaults():
    assert Completion(["x"]) == Completion(["x"], [], [], 0, 0, None, "", False, 0.0)
