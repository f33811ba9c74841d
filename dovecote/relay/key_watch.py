"""The keys that the leading relay signs with, looked at once a second."""

from dovecote.envelope.signatures import MessageKey, valid_keys
from dovecote.store.reader import Connection


class KeyWatch:
    """Knows the key to sign with, and finds out about rotation and revocation.

    Errors: NoMessageKey, psycopg.Error, when it is made and in `look`.
    """

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._keys = valid_keys(connection)

    @property
    def newest(self) -> MessageKey:
        """The key to sign with."""
        return next(iter(self._keys.values()))

    def look(self) -> bool:
        """Look again; return whether a key was revoked: what is queued may be signed with it, and be refused."""
        before, self._keys = self._keys, valid_keys(self._connection)
        return not before.keys() <= self._keys.keys()
