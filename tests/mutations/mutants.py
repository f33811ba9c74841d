"""The lines that protect something, each with a way to break it and the tests that must notice.

One entry breaks one thing. `old` stands exactly once in `file` (tests/mutations/test_mutants.py looks), `new` takes
its place, and at least one of `tests` must fail. Tests are named as pytest wants them; several are parted by spaces.
"""

from tests.mutations.broker import MUTANTS_OF_BROKER
from tests.mutations.codes import VERIFICATION
from tests.mutations.consuming import CONSUMING
from tests.mutations.functions import FUNCTIONS
from tests.mutations.going_back import GOING_BACK
from tests.mutations.handling import HANDLING
from tests.mutations.leftovers import LEFTOVERS
from tests.mutations.locks import LOCKS
from tests.mutations.lookup import MUTANTS_OF_LOOKUP
from tests.mutations.losses import LOSSES
from tests.mutations.masking import MASKING
from tests.mutations.messages import SIGNED
from tests.mutations.mutant import Mutant
from tests.mutations.operators import OPERATORS
from tests.mutations.progress import PROGRESS
from tests.mutations.publishing import PUBLISHING
from tests.mutations.queues import QUEUES
from tests.mutations.reading import MUTANTS_OF_READING
from tests.mutations.settings import SETTINGS_AND_CONNECTIONS
from tests.mutations.watching import WATCHING
from tests.mutations.writing import MUTANTS_OF_WRITING

MUTANTS: tuple[Mutant, ...] = (
    *MUTANTS_OF_WRITING,
    *MUTANTS_OF_READING,
    *PUBLISHING,
    *CONSUMING,
    *HANDLING,
    *MUTANTS_OF_BROKER,
    *MUTANTS_OF_LOOKUP,
    *WATCHING,
    *OPERATORS,
    *QUEUES,
    *GOING_BACK,
    *VERIFICATION,
    *PROGRESS,
    *LOCKS,
    *LOSSES,
    *LEFTOVERS,
    *SIGNED,
    *FUNCTIONS,
    *MASKING,
    *SETTINGS_AND_CONNECTIONS,
)
