"""Exporting an extended model at one scale to engines that have none of our code.

At one scale t an extended model is a RoPE model with its own frequency vector f and one temperature
s on the logits. Engines divide the plain curve theta**(-2i/d) by a factor for each i, so the vector
becomes factors, and s goes into the query weights (`queries`), where no engine can lose it.
"""

from .parity import Parity, ParityRow, verify
from .record import ExportRecord, read_record
from .workflow import export

__all__ = ["ExportRecord", "Parity", "ParityRow", "export", "read_record", "verify"]
