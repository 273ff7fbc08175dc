"""The recorder, and tracing samples into a run directory."""

from avlprof.tracing.options import RecordOptions, TraceSettings, estimate_bytes, run_meta
from avlprof.tracing.record import RowRecord
from avlprof.tracing.recorder import Recorder, record
from avlprof.tracing.trace import encode, trace_samples

__all__ = [
    "RecordOptions",
    "Recorder",
    "RowRecord",
    "TraceSettings",
    "encode",
    "estimate_bytes",
    "record",
    "run_meta",
    "trace_samples",
]
