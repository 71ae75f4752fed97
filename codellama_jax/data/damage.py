"""Documents that turn out to be damaged while they are read: counted, logged once, few or none.

What can be known at the start (a missing or shorter file, another tokenizer) is refused there. A
record that cannot be read later is replaced by another, and the run goes on until more of a
corpus's documents are damaged than MAX_SHARE.
"""

import logging
import threading
from collections.abc import Callable, Iterable

MAX_SHARE = 0.001  # of a corpus's documents; with more, reading stops


class Damage:
    """The damaged documents of one corpus that this process has met."""

    def __init__(self, name: str, num_documents: int):
        self.documents: set[int] = set()
        self._name, self._limit = name, int(MAX_SHARE * num_documents)
        self._lock = threading.Lock()

    def read(self, document: int, read: Callable, others: Iterable[tuple[int, Callable]]):
        """read() of a document, or that of the first of `others` that can be read.

        Raises ValueError where too many are damaged, or all of these.
        """
        try:
            return read()
        except ValueError as error:
            first = error
            self._note(document, error)
        for number, read_other in others:
            try:
                return read_other()
            except ValueError as error:
                self._note(number, error)
        raise first

    def _note(self, document: int, error: ValueError) -> None:
        with self._lock:
            if document not in self.documents:
                self.documents.add(document)
                logging.getLogger(__name__).warning("%s; another document is read instead", error)
            if len(self.documents) > self._limit:
                raise ValueError(
                    f"{error}: {len(self.documents)} documents of corpus {self._name!r} are "
                    f"damaged, more than the {self._limit} ({MAX_SHARE:.1%}) that may be"
                ) from None
