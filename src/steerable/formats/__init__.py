"""Vector files of other tools: `import_file`, `export_file`, `validate_file`; one module a family of formats."""

from .foreign import NeedsChoice as NeedsChoice
from .reading import IMPORTS as IMPORTS
from .reading import describe as describe
from .reading import import_file as import_file
from .reading import import_to as import_to
from .reading import validate_file as validate_file
from .writing import EXPORTS as EXPORTS
from .writing import export_file as export_file
