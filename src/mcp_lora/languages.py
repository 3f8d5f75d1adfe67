"""The answer where no tool fits, in the language of the question."""

import functools
from typing import Any

REFUSALS = {
    "en": "None of the available tools can do this.",
    "zh": "现有的工具都无法完成这个请求。",
    "ja": "利用できるツールでは、この依頼に対応できません。",
    "ko": "사용할 수 있는 도구로는 이 요청을 처리할 수 없습니다.",
    "es": "Ninguna de las herramientas disponibles puede hacer esto.",
    "fr": "Aucun des outils disponibles ne permet de faire cela.",
    "de": "Keines der verfügbaren Werkzeuge kann das erledigen.",
    "pt": "Nenhuma das ferramentas disponíveis consegue fazer isso.",
    "it": "Nessuno degli strumenti disponibili può farlo.",
    "ru": "Ни один из доступных инструментов не может этого сделать.",
}


def refusal(question: str) -> str:
    """Say that no tool on offer can do what is asked, in the question's language or else in English."""
    return REFUSALS[_identifier().classify(question)[0]]


@functools.cache
def _identifier() -> Any:
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    identifier = LanguageIdentifier.from_model_file(MODEL_FILE)
    identifier.set_languages(list(REFUSALS))
    return identifier
