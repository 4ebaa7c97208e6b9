"""What the judge may say, and the strict reading of what it said.

Every request has a fresh check word that the judge must repeat. A candidate cannot know it, so nothing that is copied
out of a candidate reads as a verdict. A reply that is not exactly one verdict is an error, never a 0.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from rewards.http_endpoint import EndpointReplyError

SHOWN_CHARS = 80  # of the beginning and of the end
Allowed = tuple[str, ...] | range


class JudgeReplyError(EndpointReplyError):
    """The judge answered, but not with one verdict of the form it was asked for."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """Field -> word or grade. `offsets`: where in the reply each one starts."""

    fields: Mapping[str, str | int]
    offsets: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class Form:
    """Named fields, each one of some words or a whole number in a range."""

    fields: Mapping[str, Allowed]
    explain: bool = False

    def schema(self) -> dict[str, Any]:
        """The JSON schema of a reply. The same for every request: servers compile each new one."""
        texts = {"check": {"type": "string"}} | ({"analysis": {"type": "string"}} if self.explain else {})
        typed = {
            name: {"type": "integer" if isinstance(allowed, range) else "string", "enum": list(allowed)}
            for name, allowed in self.fields.items()
        }
        properties: dict[str, Any] = {**texts, **typed}
        required = list(properties)
        return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}

    def instruction(self, check: str, structured: bool) -> str:
        """How to answer. It does not itself read as an answer: a reply that repeats it is none."""
        return self._json_instruction(check) if structured else self._line_instruction(check)

    def parse(self, reply: str, check: str, structured: bool) -> Verdict:
        """The one verdict in `reply`. Raises JudgeReplyError when there is none, another or more than one."""
        start = _after_thinking(reply)
        verdict = self._from_json(reply[start:], check) if structured else self._from_lines(reply[start:], check)
        return Verdict(verdict.fields, {name: start + at for name, at in verdict.offsets.items()})

    def _json_instruction(self, check: str) -> str:
        fields = [f'"check": "{check}"'] + (['"analysis": a text of a few sentences'] if self.explain else [])
        fields += [f'"{name}": {_listed(allowed, quoted=True)}' for name, allowed in self.fields.items()]
        return f"Reply with one JSON object and nothing else, with these fields: {'; '.join(fields)}."

    def _line_instruction(self, check: str) -> str:
        first = "First write an analysis of a few sentences. Then end" if self.explain else "Reply"
        lines = [f"{name.upper()} {check}: ..." for name in self.fields]
        rules = [f"{name.upper()} is {_listed(allowed)}." for name, allowed in self.fields.items()]
        shown = "\n".join(lines)
        return f"{first} with exactly these lines, the dots replaced. {' '.join(rules)}\n{shown}"

    # --- one JSON object ----------------------------------------------------------------------------------------------

    def _from_json(self, text: str, check: str) -> Verdict:
        given = _only_object(text)
        expected = {"check", *self.fields} | ({"analysis"} if self.explain else set())
        if set(given) != expected:
            _refuse(f"it has the fields {sorted(given)} instead of {sorted(expected)}", text)
        if given["check"] != check:
            _refuse("it does not repeat the check word", text)
        values = {name: self._read(name, given[name], text) for name in self.fields}
        return Verdict(values, {name: at for name in self.fields if (at := _json_offset(text, name)) is not None})

    def _read(self, name: str, value: Any, text: str) -> str | int:
        allowed = self.fields[name]
        if isinstance(value, str) and not isinstance(allowed, range):
            value = value.strip().casefold()
        whole = isinstance(value, int) and not isinstance(value, bool)
        if (whole if isinstance(allowed, range) else isinstance(value, str)) and value in allowed:
            return value
        return _refuse(f"{name} = {value!r} is not {_listed(allowed)}", text)

    # --- labelled lines -----------------------------------------------------------------------------------------------

    def _from_lines(self, text: str, check: str) -> Verdict:
        found = {name: self._labelled(text, name, check) for name in self.fields}
        return Verdict(
            {name: value for name, (value, _) in found.items()}, {name: at for name, (_, at) in found.items()}
        )

    def _labelled(self, text: str, name: str, check: str) -> tuple[str | int, int]:
        """The value of the last line with this label; those before it must agree."""
        label = re.compile(rf"^[ \t>*_`#-]*{name.upper()} {re.escape(check)}[*_` ]*:[*_` ]*(.*)$", re.MULTILINE)
        lines = list(label.finditer(text))
        if not lines:
            _refuse(f"no line starts with {name.upper()} and the check word", text)
        values = {self._word(name, line.group(1), text) for line in lines}
        if len(values) > 1:
            _refuse(f"it says {' and '.join(sorted(map(str, values)))} as {name}", text)
        return values.pop(), lines[-1].start(1)

    def _word(self, name: str, word: str, text: str) -> str | int:
        word = word.strip().strip("*_`\"' ").removesuffix(".")
        if isinstance(self.fields[name], range):
            return self._read(name, int(word) if re.fullmatch(r"-?[0-9]{1,4}", word) else word, text)
        return self._read(name, word, text)


def confidence(verdict: Verdict, form: Form, name: str, reply: str, logprobs: Any) -> float | None:
    """The probability of the first word that `form` allows for `name`, among those words; None where it is not known.

    `logprobs` is the `content` list of a chat completion. Taken at the token in which the verdict's word starts.
    """
    allowed, at = form.fields[name], verdict.offsets.get(name)
    token = None if at is None else _token_at(logprobs, reply, at)
    if token is None or isinstance(allowed, range):
        return None
    mass = dict.fromkeys(allowed, 0.0)
    for text, logprob in token:
        piece = text.strip().strip("\"'*_` ").casefold()
        hits = [word for word in allowed if piece and (word.startswith(piece) or piece.startswith(word))]
        if len(hits) == 1:
            mass[hits[0]] += math.exp(logprob)
    return mass[allowed[0]] / sum(mass.values()) if mass[str(verdict.fields[name])] > 0.0 else None


# --- reading ----------------------------------------------------------------------------------------------------------


def _refuse(why: str, text: str) -> NoReturn:
    shown = text if len(text) <= 2 * SHOWN_CHARS else f"{text[:SHOWN_CHARS]} ... {text[-SHOWN_CHARS:]}"
    raise JudgeReplyError(f"the judge's reply is no verdict: {why}. It replied {shown!r}")


def _after_thinking(reply: str) -> int:
    end = reply.rfind("</think>")
    if end < 0 and "<think>" in reply:
        _refuse("its thinking does not end", reply)
    return end + len("</think>") if end >= 0 else 0


def _only_object(text: str) -> dict[str, Any]:
    fenced = re.fullmatch(r"\s*```(?:json)?\s*\n(.*?)\n?\s*```\s*", text, re.DOTALL)
    try:
        found = json.loads(fenced.group(1) if fenced else text, object_pairs_hook=_pairs, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        _refuse(f"not one JSON object ({error})", text)
    if not isinstance(found, dict):
        _refuse("not a JSON object", text)
    return found


def _pairs(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    if len(dict(pairs)) != len(pairs):
        raise ValueError("a field occurs twice")
    return dict(pairs)


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _json_offset(text: str, name: str) -> int | None:
    """Where the field's text starts. Inside a JSON text a quotation mark always follows a backslash."""
    found = list(re.finditer(rf'(?<!\\)"{name}"\s*:\s*"', text))
    return found[-1].end() if found else None


def _listed(allowed: Allowed, *, quoted: bool = False) -> str:
    if isinstance(allowed, range):
        return f"a whole number from {allowed[0]} to {allowed[-1]}"
    return " or ".join(f'"{word}"' if quoted else word for word in allowed)


def _token_at(logprobs: Any, reply: str, at: int) -> list[tuple[str, float]] | None:
    """The alternatives, with their log-probabilities, of the token that covers character `at` of the reply."""
    if not isinstance(logprobs, list) or not all(isinstance(entry, dict) for entry in logprobs):
        return None
    tokens = [entry.get("token") for entry in logprobs]
    # vLLM lists the token that ended the reply too, which the text does not have.
    if not all(isinstance(token, str) for token in tokens) or not "".join(tokens).startswith(reply):
        return None
    end = 0
    for entry in logprobs:
        end += len(entry["token"])
        if at < end:
            return _alternatives(entry)
    return None


def _alternatives(entry: Mapping[str, Any]) -> list[tuple[str, float]]:
    found: list[tuple[str, float]] = []
    for one in entry.get("top_logprobs") or [entry]:
        token, logprob = (one.get("token"), one.get("logprob")) if isinstance(one, dict) else (None, None)
        if not isinstance(token, str) or not isinstance(logprob, int | float) or not logprob <= 1e-3:
            raise JudgeReplyError(f"the judge's log-probabilities are none: {str(one)[:SHOWN_CHARS]}")
        found.append((token, float(logprob)))
    return found
