"""What is decided without the judge: a completion that fails a gate is worth 0 and is never sent.

Strong judges call a lone ":" or "Solution" right most of the time ("master keys", arXiv 2507.08794), and neither
reasoning nor voting cures that.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable

from rewards.answers import after_phrase, last_boxed
from rewards.judge.settings import PromptSettings
from rewards.registry import RewardInput

MASTER_KEYS = (
    "", "solution", "the solution", "answer", "the answer is", "final answer", "thought process", "let's think",
    "let's think step by step", "let's solve this", "let's solve this step by step",
    "let's solve this problem step by step", "let's solve the problem step by step", "step by step",
    "here is the answer", "the answer is correct", "same as the reference", "same as above", "see above",
    "解", "解答", "答案", "かいせつ", "解説", "풀이", "정답", "답", "respuesta", "solución", "lösung", "réponse",
)  # fmt: skip

MAX_ANSWER_CHARS = 2000  # longer is no final answer, but a text that may hold every answer

_LATEX_TEXT = re.compile(r"\\(?:text|textbf|mathrm|mathbf)\s*\{([^{}]*)\}")
_TEMPLATE_TOKEN = re.compile(
    r"<\|[^|<>\s]{1,40}\|>|\[\|[a-z]{1,20}\|\]|<｜[^｜<>]{1,40}｜>|\[/?INST\]|<</?SYS>>|</?s>|</?think>"
    r"|<(?:start|end)_of_turn>|\[(?:BOS|EOS|PAD)\]|<(?:bos|eos|pad)>|<\|?im_(?:start|end)\|?>"
)


def gate(sample: RewardInput, prompt: PromptSettings, *, short: bool) -> tuple[str, str]:
    """(the candidate to send, ""), or ("", why it is worth 0). `short`: the final answer alone is the candidate."""
    reason = unfit(sample)
    if reason:
        return "", reason
    candidate = final_answer(sample.final, prompt.answer_from) if short else sample.final.strip()
    if candidate is None:
        return "", "no final answer"
    limit = min(MAX_ANSWER_CHARS, prompt.max_candidate_chars) if short else prompt.max_candidate_chars
    if len(candidate) > limit:
        return "", f"longer than {limit} characters"
    for text in (candidate, sample.final):
        if is_master_key(text, sample.answer, prompt.master_keys):
            return "", f"no answer but {text.strip()[:40]!r}"
    return candidate, ""


def unfit(sample: RewardInput) -> str:
    """Why no model need be asked about a completion: it has no final answer of its own. "" when it has one."""
    if not sample.final.strip():
        return "empty"
    if sample.truncated:
        return "truncated"
    return forged(sample.final)


def forged(text: str) -> str:
    """Which token of a chat template `text` has, in words; "" when it has none."""
    token = _TEMPLATE_TOKEN.search(text)
    return f"chat template token {token.group()!r}" if token else ""


def final_answer(final: str, answer_from: str) -> str | None:
    """The answer that `final` states; None when it states none."""
    found = last_boxed(final)
    if found is None and answer_from != "boxed":
        found = after_phrase(final)
    if found is None and answer_from == "last_line":
        found = next((line.strip() for line in reversed(final.splitlines()) if line.strip()), None)
    return found or None


def is_master_key(candidate: str, reference: str = "", more: Iterable[str] = ()) -> bool:
    """Whether `candidate` answers nothing in particular. What says the same as the reference does answer."""
    bare = plain(candidate)
    if candidate.strip() == reference.strip() or bare == plain(reference) != "":
        return False
    keys = sorted(_PLAIN_KEYS | set(map(plain, more)), key=len, reverse=True)
    only_keys = re.compile(r"(?<!\S)(?:" + "|".join(re.escape(key) for key in keys if key) + r")(?!\S)")
    return not only_keys.sub("", bare).strip()


def plain(text: str) -> str:
    """Letters, digits and symbols in lower case with single spaces: what is left without marks and invisible signs."""
    bare = _LATEX_TEXT.sub(r"\1", text)
    folded = unicodedata.normalize("NFKC", bare).casefold().replace("’", "").replace("'", "")
    seen = "".join(c for c in folded if c.isspace() or unicodedata.category(c) not in ("Cf", "Cc"))
    return " ".join("".join(" " if unicodedata.category(c)[0] in "PZ" else c for c in seen).split())


_PLAIN_KEYS = frozenset(map(plain, MASTER_KEYS))
