"""Vector files of other tools: `import_file`, `export_file`, `validate_file`; one module a format."""

from steerable.formats.base import Format as Format
from steerable.formats.base import NeedsChoice as NeedsChoice
from steerable.formats.exchange import describe as describe
from steerable.formats.exchange import export_file as export_file
from steerable.formats.exchange import formats as formats
from steerable.formats.exchange import import_file as import_file
from steerable.formats.exchange import import_to as import_to
from steerable.formats.exchange import register_format as register_format
from steerable.formats.exchange import validate_file as validate_file
