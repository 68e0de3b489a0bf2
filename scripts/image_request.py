"""Sends a server one request of each kind that a container must answer; fails loudly.

python scripts/image_request.py http://127.0.0.1:8000
"""

import json
import sys
from typing import Any
from urllib.request import Request, urlopen


def call(url: str, body: dict[str, Any] | None = None) -> Any:
    """The JSON answer of one request: POST with a body, GET without."""
    data = None if body is None else json.dumps(body).encode()
    request = Request(url, data, {"content-type": "application/json"})
    with urlopen(request, timeout=120) as answer:
        return json.load(answer)


def main() -> None:
    """List the adapters, then generate with the base and with each adapter."""
    url = sys.argv[1].rstrip("/")
    names = [adapter["name"] for adapter in call(f"{url}/adapters")["adapters"]]
    print(f"adapters: {', '.join(names) or 'none'}")
    body = {"inputs": "The capital of France is", "parameters": {"max_new_tokens": 8}}
    for query in ["", *(f"?adapter={name}" for name in names)]:
        text = call(f"{url}/generate{query}", body)["generated_text"]
        if not isinstance(text, str) or not text.strip():
            raise SystemExit(f"/generate{query} answered no text: {text!r}")
        print(f"/generate{query}: {text!r}")


if __name__ == "__main__":
    main()
