"""Chat templates that take tools, each in a notation of calls, and bodies that offer some."""

from typing import Any

from transformers import PreTrainedTokenizerFast

from tests.support.models import tiny_tokenizer

_RESULTS = "{% elif message.role == 'tool' %}[result] {{ message.content }}\n"
_PROMPT = "{% endfor %}{% if add_generation_prompt %}[assistant] {% endif %}"
_OTHERS = "{% else %}[{{ message.role }}] {{ message.content }}\n{% endif %}"

HERMES = (
    "{% if tools %}[tools] {% for tool in tools %}{{ tool | tojson }}\n{% endfor %}{% endif %}"
    "{% for message in messages %}{% if message.tool_calls %}[assistant] {{ message.content }}"
    "{% for call in message.tool_calls %}{{ '\n<tool_call>\n' }}"
    '{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}'
    "\n</tool_call>{% endfor %}{{ '\n' }}" + _RESULTS + _OTHERS + _PROMPT
)
LLAMA3 = (
    "{% if tools %}[tools] {{ tools | tojson }}\n{% endif %}"
    "{% for message in messages %}{% if message.tool_calls %}"
    "{% if message.tool_calls | length != 1 %}{{ raise_exception('one call at a time') }}"
    "{% endif %}{% set call = message.tool_calls[0].function %}"
    '[assistant] {"name": "{{ call.name }}", "parameters": {{ call.arguments | tojson }}}\n'
    + _RESULTS
    + _OTHERS
    + _PROMPT
)
MISTRAL = (
    "{% for message in messages %}{% if tools and loop.first %}[tools] {{ tools | tojson }}\n"
    "{% endif %}{% if message.tool_calls %}[assistant] [TOOL_CALLS] ["
    "{% for call in message.tool_calls %}{% if call.id | length != 9 %}"
    "{{ raise_exception('ids have nine characters') }}{% endif %}"
    '{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}, '
    '"id": "{{ call.id }}"}{% if not loop.last %}, {% endif %}{% endfor %}]\n'
    + _RESULTS
    + _OTHERS
    + _PROMPT
)
# It names the tools and tells how to call them, but leaves earlier calls out.
INSTRUCTIONS = (
    "{% if tools %}[tools] {{ tools | tojson }} "
    'Answer <tool_call>\n{"name": NAME, "arguments": OBJECT}\n</tool_call>\n{% endif %}'
    "{% for message in messages %}[{{ message.role }}] {{ message.content }}\n" + _PROMPT
)
# Nothing tells how calls are to be written.
SILENT = INSTRUCTIONS.replace("Answer <tool_call>", "Call them: ")
TEMPLATES = {"hermes": HERMES, "llama3": LLAMA3, "mistral": MISTRAL}

WEATHER: dict[str, Any] = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 6},
        "unit": {"enum": ["°C", "°F"]},
        "days": {"type": "integer", "minimum": 1, "maximum": 9},
    },
    "required": ["city", "unit"],
    "additionalProperties": False,
}


def function(name: str, parameters: dict[str, Any] | None = None, **more: Any) -> Any:
    """A tool as requests have it."""
    own: dict[str, Any] = {"name": name, **more}
    if parameters is not None:
        own["parameters"] = parameters
    return {"type": "function", "function": own}


def call(name: str, arguments: str, call_id: str = "call_00001") -> Any:
    """A call as messages have it."""
    return {
        "id": call_id,
        "type": "function",
        "function": {"name": name, "arguments": arguments},
    }


TOOLS = [function("weather", WEATHER, description="Tells the weather."), function("time.now")]


def tokenizer_for(template: str) -> PreTrainedTokenizerFast:
    """The tiny tokenizer with a template."""
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    return tokenizer
