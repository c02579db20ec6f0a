"""A model that somebody serves, and what its server says of itself."""

from __future__ import annotations

import functools
import os
from dataclasses import dataclass
from typing import Any, Literal

from ropepatch.errors import EndpointError, OptionError, did_you_mean
from ropepatch.evaluation.prompt import TextEncoder
from ropepatch.evaluation.served.client import Client

API_KEY_ENV = "OPENAI_API_KEY"
APIS = ("completions", "chat")

Api = Literal["completions", "chat"]
Way = Literal["ids", "text", "chat"]


@dataclass(frozen=True)
class Contact:
    """What a first exchange with the server showed.

    Attributes:
        way: how it takes prompts: as token ids, as text, or as the user's turn of a chat.
        served_as: what it calls the model in its answers; None when it does not say.
        context: the most tokens of prompt and answer together; None when it does not say.
        trained_length: of the model, in tokens; None when it does not say.
    """

    way: Way
    served_as: str | None
    context: int | None
    trained_length: int | None


@dataclass(frozen=True)
class Completion:
    """What a server made of a prompt.

    Attributes:
        text: what it generated.
        prompt_tokens: how many tokens it says the prompt had; None when it does not say.
        cached_tokens: how many of them it says it had in its cache; 0 when it does not say.
        generated_tokens: how many tokens it says it generated; 0 when it does not say.
        served_as: what it calls the model.
    """

    text: str
    prompt_tokens: int | None
    cached_tokens: int
    generated_tokens: int
    served_as: str | None


class ServedModel:
    """A model behind an OpenAI-compatible endpoint; pass it to `evaluate` in a model's place.

    Prompts are answered greedily (temperature 0). A server gives no probabilities of an answer that it did not choose,
    so `forced` and `logprob` of the results are None.

    Args:
        endpoint: base URL ("http://127.0.0.1:8080/v1").
        model: the model's name at the server.
        api: "completions": the prompt as it is; "chat": as a user's turn, in the server's own chat template.
        api_key_env: environment variable that holds the key. The default one may be missing: no key is sent then. The
            key is written nowhere.
        timeout: seconds without a byte from the server after which a request has failed.
        retries: further attempts at a request after a failure that may pass.
        concurrency: requests under way at the same time.
        original_length: trained length of the model in tokens, where the server does not say it.

    Raises:
        OptionError: an option is out of range, or the variable `api_key_env` is not set.
    """

    def __init__(
        self,
        endpoint: str,
        model: str,
        *,
        api: Api = "completions",
        api_key_env: str = API_KEY_ENV,
        timeout: float = 600.0,
        retries: int = 5,
        concurrency: int = 1,
        original_length: int | None = None,
    ) -> None:
        if not model:
            raise OptionError("the served model needs its name at the server", given=model)
        if api not in APIS:
            raise OptionError(f"unknown api {api!r}", allowed=APIS, hint=did_you_mean(str(api), APIS))
        if concurrency < 1:
            raise OptionError("concurrency out of range", given=concurrency, allowed="1 or more")
        if original_length is not None and original_length < 1:
            raise OptionError("original_length out of range", given=original_length, allowed="1 or more tokens")
        key = os.environ.get(api_key_env) or None
        if key is None and api_key_env != API_KEY_ENV:
            raise OptionError(f"the environment variable {api_key_env} holds no API key")
        self._make_client = functools.partial(Client, endpoint, key=key, timeout=timeout, retries=retries)
        self.endpoint = self.client().url
        self.model = model
        self.api: Api = api
        self.concurrency = concurrency
        self.original_length = original_length

    def __repr__(self) -> str:
        return f"ServedModel({self.endpoint!r}, {self.model!r}, api={self.api!r})"

    def client(self) -> Client:
        """A new client for its server."""
        return self._make_client()

    def contact(self, client: Client, encoder: TextEncoder) -> Contact:
        """Ask the server for its models, and a first token of the model: which way it takes prompts.

        Raises:
            EndpointError: no server, no such model (names those that there are), or a refusal.
        """
        listed = _listed(client)
        ids = encoder.encode("The grass is green. The sky is blue.").ids.tolist()
        attempts: list[tuple[Way, Any]] = [("chat", "Hello")]
        if self.api == "completions":
            attempts = [("ids", ids), ("text", "The grass is green.")]
        for way, prompt in attempts:
            try:
                found = self.complete(client, way, prompt, 1)
            except EndpointError as error:
                if way == "ids" and error.status in (400, 404, 415, 422, 500, 501):
                    continue
                raise self._explained(error, listed) from error
            # A server that took the ids for something else gives itself away by their number.
            if way != "ids" or found.prompt_tokens in (None, len(ids)):
                break
        facts = listed.get(self.model, {})
        meta = facts.get("meta")
        meta = meta if isinstance(meta, dict) else {}
        return Contact(
            way=way,
            served_as=found.served_as,
            # vLLM and llama.cpp, each in its own words.
            context=_whole(facts.get("max_model_len")) or _whole(meta.get("n_ctx")),
            trained_length=self.original_length or _whole(meta.get("n_ctx_train")),
        )

    def complete(self, client: Client, way: Way, prompt: list[int] | str, most_tokens: int) -> Completion:
        """What the model generates greedily after a prompt.

        Args:
            way: what `prompt` is: a list of token ids, a text, or a user's turn.
            most_tokens: most tokens to generate.

        Raises:
            EndpointError: no answer, a refusal, or an answer without a text.
        """
        body = {"model": self.model, "max_tokens": most_tokens, "temperature": 0}
        if way == "chat":
            answer = client.post("/chat/completions", {**body, "messages": [{"role": "user", "content": prompt}]})
        else:
            answer = client.post("/completions", {**body, "prompt": prompt})
        try:
            choice = answer["choices"][0]
            # A chat model that said nothing may have null for its text.
            text = choice["text"] if way != "chat" else choice["message"]["content"] or ""
            usage = answer.get("usage") or {}
            details = usage.get("prompt_tokens_details") or {}
            name = answer.get("model")
            if not isinstance(text, str):
                raise TypeError
        except (AttributeError, LookupError, TypeError) as error:
            raise EndpointError(f"the server at {self.endpoint} answers without a text", given=answer) from error
        return Completion(
            text=text,
            prompt_tokens=_whole(usage.get("prompt_tokens")),
            cached_tokens=_whole(details.get("cached_tokens")) or 0,
            generated_tokens=_whole(usage.get("completion_tokens")) or 0,
            served_as=name if isinstance(name, str) else None,
        )

    def _explained(self, error: EndpointError, listed: dict[str, dict[str, Any]]) -> EndpointError:
        """A refusal that a wrong name may explain, with the names that there are."""
        if error.status not in (400, 404, 422) or not listed or self.model in listed:
            return error
        explained = EndpointError(
            f"{error.message}; the server does not list the model {self.model!r}",
            allowed=sorted(listed),
            hint=did_you_mean(self.model, listed),
        )
        explained.status = error.status
        return explained


def _listed(client: Client) -> dict[str, dict[str, Any]]:
    """The server's models by name; empty where it gives no such list: it is a help, not a need."""
    try:
        answer = client.get("/models")
    except EndpointError:
        return {}
    models = answer.get("data") if isinstance(answer, dict) else None
    if not isinstance(models, list):
        return {}
    return {m["id"]: m for m in models if isinstance(m, dict) and isinstance(m.get("id"), str)}


def _whole(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None
