"""Vector files of other tools: `import_file`, `export_file`, `validate_file`; one module a family of formats."""

from steerable.formats.foreign import NeedsChoice as NeedsChoice
from steerable.formats.reading import IMPORTS as IMPORTS
from steerable.formats.reading import describe as describe
from steerable.formats.reading import import_file as import_file
from steerable.formats.reading import import_to as import_to
from steerable.formats.reading import validate_file as validate_file
from steerable.formats.writing import EXPORTS as EXPORTS
from steerable.formats.writing import export_file as export_file
