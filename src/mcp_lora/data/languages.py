"""The answer if no tool fits, in the language of the question if its script shows it."""

import re

_ENGLISH = "None of the available tools can do this."
# Kana before Han: Japanese is written in both.
_BY_SCRIPT = (
    (re.compile(r"[\u3040-\u30ff]"), "利用できるツールでは、この依頼に対応できません。"),
    (re.compile(r"[\uac00-\ud7af]"), "사용할 수 있는 도구로는 이 요청을 처리할 수 없습니다."),
    (re.compile(r"[\u4e00-\u9fff]"), "现有的工具都无法完成这个请求。"),
    (re.compile(r"[\u0400-\u04ff]"), "Ни один из доступных инструментов не может этого сделать."),
)


def refusal(question: str) -> str:
    """Return the answer that no candidate tool fits, in the question's language or else in English."""
    return next((answer for script, answer in _BY_SCRIPT if script.search(question)), _ENGLISH)
