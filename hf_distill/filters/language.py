"""The filter on the language of completions. Imports no torch."""

from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from ..errors import DistillError, did_you_mean
from .base import SingleRowFilter
from .code_blocks import split_code
from .rows import Row, completion_text, prompt_text

if TYPE_CHECKING:
    from py3langid.langid import LanguageIdentifier

_NO_LANGUAGE = "zxx"  # what py3langid returns for text in no language, such as numbers


class Language(SingleRowFilter):
    """Removes completions in another language than the prompt, or than some given languages.

    py3langid identifies the language of the text outside of code blocks, with a model of 140 languages that is part of
    the package. A completion is kept if its language or that of the prompt is uncertain: the text is short, or the
    probability is low. Prompts that request another language (translations) need `languages`.
    """

    name: Literal["language"] = "language"
    languages: list[str] | None = Field(
        None,
        min_length=1,
        description="Allowed languages as ISO 639-1 codes, such as [en, de]. Default (null): that of the prompt.",
    )
    min_characters: int = Field(
        40, ge=1, description="Texts with fewer characters have no certain language. Default: 40."
    )
    min_probability: float = Field(
        0.5, ge=0, le=1, description="A language with a lower probability is uncertain. Default: 0.5."
    )

    @property
    def packages(self) -> tuple[str, ...]:
        """Modules of the optional packages that it needs."""
        return ("py3langid", "markdown_it")

    def start(self) -> Callable[[Row], bool]:
        """Return the function that judges the rows of one data set in order."""
        identifier = _identifier()
        unknown = [code for code in self.languages or () if code not in identifier.labels]
        if unknown:
            raise DistillError(f"language: unknown code {unknown[0]!r}{did_you_mean(unknown[0], identifier.labels)}")
        return self.keep

    def keep(self, row: Row) -> bool:
        """Whether the row is kept."""
        language = self.identify(completion_text(row))
        if language is None:
            return True
        if self.languages is not None:
            return language in self.languages
        return self.identify(prompt_text(row)) in (None, language)

    def identify(self, text: str) -> str | None:
        """Return the code of the language of a text; None if it is uncertain."""
        prose = split_code(text)[0].strip()
        if len(prose) < self.min_characters:
            return None
        code, probability = _identifier().classify(prose)
        return code if probability >= self.min_probability and code != _NO_LANGUAGE else None


@cache
def _identifier() -> "LanguageIdentifier":
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
