"""The recorder, and tracing samples into a run directory."""

from avlprof.tracing.options import RecordOptions
from avlprof.tracing.record import RowRecord
from avlprof.tracing.recorder import Recorder, record
from avlprof.tracing.trace import estimate_bytes, trace_samples

__all__ = ["RecordOptions", "Recorder", "RowRecord", "estimate_bytes", "record", "trace_samples"]
