"""What the schema of a config says about one place in it, in words: read off pydantic's JSON schema."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from pydantic import BaseModel

_TYPES = {
    "boolean": "true or false",
    "integer": "an integer",
    "number": "a number",
    "string": "text",
    "array": "a list",
    "object": "a mapping",
    "null": "null",
}
_NAMES = {"boolean": "bool", "integer": "int", "number": "float", "string": "str"}
_BOUNDS = (("minimum", ">="), ("exclusiveMinimum", ">"), ("maximum", "<="), ("exclusiveMaximum", "<"))


@dataclass(frozen=True)
class Schema:
    """One node of a JSON schema. `definitions` are the schema's `$defs`; references are followed on construction."""

    node: Mapping[str, Any]
    definitions: Mapping[str, Any]

    @staticmethod
    def of(model: type[BaseModel]) -> Schema:
        return _schema(model)

    def at(self, node: Mapping[str, Any]) -> Schema:
        while "$ref" in node:
            node = self.definitions[node["$ref"].rpartition("/")[2]]
        return Schema(node, self.definitions)

    @property
    def properties(self) -> Mapping[str, Any]:
        return self.node.get("properties", {})

    @property
    def tags(self) -> list[str]:
        """The values of `kind` where this place can hold several kinds of section; else empty."""
        return list(self.node.get("discriminator", {}).get("mapping", {}))

    @property
    def choices(self) -> list[str]:
        only = [self.node["const"]] if "const" in self.node else []
        return [str(choice) for choice in self.node.get("enum", only)]

    @property
    def description(self) -> str:
        """What may stand here: `an integer >= 1`, `one of split, colocated`, `text or null`."""
        if "anyOf" in self.node:
            return " or ".join(self.at(option).description for option in self.node["anyOf"])
        if self.choices:
            return f"one of {', '.join(self.choices)}" if len(self.choices) > 1 else self.choices[0]
        if self.tags:
            return f"a mapping with kind: {' or '.join(self.tags)}"
        words = [_TYPES.get(self.node.get("type", ""), "a valid value")]
        words += [" and ".join(f"{sign} {self.node[key]:g}" for key, sign in _BOUNDS if key in self.node)]
        if "pattern" in self.node:
            words.append(f"that matches {self.node['pattern']}")
        if self.node.get("minItems") or self.node.get("minProperties"):
            words.append("that is not empty")
        return " ".join(filter(None, words))

    @property
    def default_hint(self) -> str:
        """`, or leave the key out for the default 8`, or `, or null`; empty where there is no simple default."""
        if any(option.get("type") == "null" for option in self.node.get("anyOf", [])):
            return ", or null"
        default = self.node.get("default")
        simple = default is not None and not isinstance(default, Mapping)
        return f", or leave the key out for the default {json.dumps(default)}" if simple else ""

    def nearest(self, value: Any) -> float | int | None:
        """The bound that `value` lies beyond, where the bound itself is valid."""
        low, high = self.section.node.get("minimum"), self.section.node.get("maximum")
        if not isinstance(value, int | float):
            return None
        return low if low is not None and value < low else high if high is not None and value > high else None

    def locate(self, location: Sequence[str | int]) -> tuple[tuple[str, ...], Schema, Schema]:
        """(path, node, parent) of a pydantic error location. Its tags and names of union members are no keys."""
        path: list[str] = []
        node = parent = self
        for part in location:
            if part == "[key]":
                continue
            if str(part) in node.section.tags:
                node = parent = node.section.member(str(part))
                continue
            if str(part) in node.members:
                node = parent = node.members[str(part)]
                continue
            parent = node.section
            path.append(str(part))
            node = parent.child(part)
        return tuple(path), node, parent

    @property
    def section(self) -> Schema:
        """The only thing besides `null` that this place may hold, or the only mapping; else the place itself."""
        options = [self.at(option) for option in self.node.get("anyOf", []) if option.get("type") != "null"]
        mappings = [option for option in options if option.properties or option.tags]
        return options[0] if len(options) == 1 else mappings[0] if len(mappings) == 1 else self

    @property
    def members(self) -> dict[str, Schema]:
        """What a place of several things may hold, by the names in pydantic's error locations; else empty."""
        options = [option for option in self.node.get("anyOf", []) if option.get("type") != "null"]
        names = [option.get("$ref", "").rpartition("/")[2] or _NAMES.get(option.get("type"), "") for option in options]
        return dict(zip(names, map(self.at, options), strict=True)) if len(options) > 1 else {}

    def member(self, tag: str) -> Schema:
        return self.at({"$ref": self.node["discriminator"]["mapping"][tag]})

    def child(self, key: str | int) -> Schema:
        """The place below `key`; an empty schema where none is known."""
        items, position = self.node.get("prefixItems"), key if isinstance(key, int) else 0
        if items and position < len(items):
            return self.at(items[position])
        extra = self.node.get("additionalProperties")
        below = self.properties.get(str(key)) or self.node.get("items") or (extra if isinstance(extra, Mapping) else {})
        return self.at(below)


def keys_of(schema: Schema, raw: Any, prefix: str = "") -> Iterator[str]:
    """Every valid dotted key of a config like `raw`, whose stage names and kinds decide what there is."""
    given = raw if isinstance(raw, Mapping) else {}
    schema = schema.section
    if schema.tags:
        kinds = [given["kind"]] if given.get("kind") in schema.tags else schema.tags
        for kind in kinds:
            yield from keys_of(schema.member(kind), raw, prefix)
        return
    names = schema.properties or (given if isinstance(schema.node.get("additionalProperties"), Mapping) else {})
    for name in names:
        yield f"{prefix}{name}"
        yield from keys_of(schema.child(name), given.get(name), f"{prefix}{name}.")


@cache
def _schema(model: type[BaseModel]) -> Schema:
    node = model.model_json_schema()
    return Schema(node, node.get("$defs", {}))
