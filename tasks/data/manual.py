"""The language reference that Python carries: technical text, far from speeches and from encyclopaedias."""

import importlib.util

from nla.machine.cache import Cache, digest
from nla.machine.errors import UserError, require_integer
from tasks.data.text import Text


class PythonTopics(Text):
    """The long topics of Python's `help()`, in alphabetical order. They differ a little between versions of Python.

    Args:
        least: number of characters from which on a topic is taken. Shorter topics are mostly parts of longer ones.
    """

    splits = ("test",)

    def __init__(self, name: str, least: int) -> None:
        require_integer("data.text.least", least, 0)
        self.name, self.least = name, least

    def documents(self) -> list[str]:
        from pydoc_data.topics import topics

        found = [topics[name] for name in sorted(topics) if len(topics[name]) >= self.least]
        if not found:
            longest = max(map(len, topics.values()))
            raise UserError(f"data.text.least={self.least} leaves no topic; the longest has {longest:,} characters")
        return found

    def check(self) -> None:
        if importlib.util.find_spec("pydoc_data") is None:
            raise UserError("data=python_topics needs Python's own module pydoc_data, which this Python lacks; use data=sotu")
        self.documents()

    def identity(self, cache: Cache) -> str:
        return digest(self.documents())
