"""How tasks reach services and language models: what `context.service` and `context.llm` return."""

import importlib
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Endpoint:
    """An instance of a service: its address `host:port`, its name, and the model of a service that has one."""

    endpoint: str
    instance_id: str
    model: str = ""

    @property
    def host(self) -> str:
        """The address without the port."""
        return self.endpoint.rpartition(":")[0].strip("[]")

    @property
    def port(self) -> int:
        """The port."""
        return int(self.endpoint.rpartition(":")[2])

    @property
    def url(self) -> str:
        """The address as the beginning of a URL."""
        return f"http://{self.endpoint}"


@dataclass(frozen=True, slots=True)
class Llm:
    """A language model as clients of OpenAI's API reach it: the URL of the gateway, a key, and the model's name."""

    base_url: str
    api_key: str = field(repr=False)
    model: str

    def env(self) -> dict[str, str]:
        """Return the environment variables by which programs and libraries reach it."""
        return {
            "OPENAI_BASE_URL": self.base_url,
            "OPENAI_API_BASE": self.base_url,
            "OPENAI_API_KEY": self.api_key,
            "OPENAI_MODEL": self.model,
        }

    def openai(self, **settings: Any) -> Any:
        """Return an `openai.OpenAI`, which does not repeat requests: the gateway has. Raises ImportError."""
        return _openai().OpenAI(**self._settings() | settings)

    def async_openai(self, **settings: Any) -> Any:
        """Return an `openai.AsyncOpenAI`; see `openai`."""
        return _openai().AsyncOpenAI(**self._settings() | settings)

    def _settings(self) -> dict[str, Any]:
        return {"base_url": self.base_url, "api_key": self.api_key, "max_retries": 0}


def _openai() -> Any:
    return importlib.import_module("openai")
