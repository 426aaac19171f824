"""What the server counts, in Prometheus' text format."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from lora_ms.serve.engine_thread import EngineThread

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)


class ServerNumbers:
    """The numbers of one server; ``model`` is a name that is served."""

    def __init__(self, engine: EngineThread):
        self.registry = registry = CollectorRegistry()

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(name, text, labels, registry=registry)

        def histogram(name: str, text: str) -> Histogram:
            return Histogram(name, text, ("model",), registry=registry, buckets=SECONDS)

        self.prompt_tokens = counter("lora_ms_prompt_tokens", "Tokens of prompts.", "model")
        self.cached_tokens = counter("lora_ms_cached_tokens", "Tokens of prompts not computed again.", "model")
        self.generated_tokens = counter("lora_ms_generated_tokens", "Tokens of answers.", "model")
        self.answers = counter("lora_ms_answers", "Answers, by why they ended.", "model", "finish")
        self.first_token = histogram("lora_ms_first_token_seconds", "From a request to its first token.")
        self.seconds = histogram("lora_ms_request_seconds", "From a request to its answer's end.")
        self.responses = counter("lora_ms_http_responses", "Responses, by status.", "status")
        running = Gauge("lora_ms_requests_running", "Requests that have a row.", registry=registry)
        waiting = Gauge("lora_ms_requests_waiting", "Requests that wait for a row.", registry=registry)
        running.set_function(lambda: engine.engine.running)
        waiting.set_function(lambda: engine.engine.waiting)

    def forget(self, model: str) -> None:
        """Drops the numbers of a name that is not served any more."""
        for each in (self.prompt_tokens, self.cached_tokens, self.generated_tokens, self.first_token, self.seconds):
            each.remove_by_labels({"model": model})
        self.answers.remove_by_labels({"model": model})

    def text(self) -> bytes:
        """All of them."""
        return generate_latest(self.registry)
