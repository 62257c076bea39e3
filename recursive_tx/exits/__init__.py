"""When a token exits the loops: rules, the pass with exits, thresholds."""

from recursive_tx.exits.rules import RULES as RULES
from recursive_tx.exits.rules import Exit as Exit
from recursive_tx.exits.rules import load as load
from recursive_tx.exits.rules import save as save
from recursive_tx.exits.rules import score as score
from recursive_tx.exits.rules import static as static
